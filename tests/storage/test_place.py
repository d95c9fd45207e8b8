"""Outputs that share a folder: each is whole or not there, and none is in the others' way."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from storage import beside

from mixtools import errors
from mixtools.storage import manifest
from mixtools.storage.output import JOURNAL, Output
from mixtools.storage.replacing import WORK
from mixtools.storage.source import Source

TREE = Path(__file__).parents[2]
MINE = {"README.md": b"# mine", "model.safetensors": b"mine", "images/x.png": b"mine", "other.gguf": b"mine"}
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'tests'}"}


# --- what is written ---


@pytest.mark.parametrize("order", list(itertools.permutations(["one", "two", "split"])))
def test_whole_in_any_order(tmp_path: Path, order: tuple[str, ...]) -> None:
    """Each is added to what stands there; the manifest does not tell which came first."""
    for count, stem in enumerate(order, 1):
        beside.write(tmp_path, stem)
        assert beside.found(tmp_path) == beside.expected((stem, 0) for stem in order[:count])
    assert beside.work(tmp_path) == []


def test_side_by_side(tmp_path: Path) -> None:
    """Both are open at once; the one that is done first is whole while the other is not."""
    with Output(tmp_path, beside.plan("one"), {**beside.KEY, "version": 0}, shared=True) as one:
        beside.write(tmp_path, "two")
        assert beside.found(tmp_path) == beside.expected([("two", 0)])
        assert beside.work(tmp_path) == [".mixtools-one.gguf"] == [one.work.name]
    assert beside.write(tmp_path, "one") == 0
    assert beside.found(tmp_path) == beside.expected([("one", 0), ("two", 0)])


def test_committed_at_once(tmp_path: Path) -> None:
    """None is lost from the manifest, however many threads end at the same time."""
    stems = [f"x{number}" for number in range(12)]
    failed: list[BaseException] = []
    start = threading.Barrier(len(stems))

    def one(stem: str) -> None:
        try:
            start.wait()
            beside.write(tmp_path, stem)
        except BaseException as error:  # a thread's own is lost
            failed.append(error)

    threads = [threading.Thread(target=one, args=(stem,)) for stem in stems]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert beside.found(tmp_path) == beside.expected((stem, 0) for stem in stems)


def test_read_back(tmp_path: Path) -> None:
    for stem in ("one", "split"):
        beside.write(tmp_path, stem)
    document = manifest.load(tmp_path)
    assert document is not None
    assert document["files"].keys() == {*beside.files("one"), *beside.files("split")}
    for stem, name in (("one", "one.gguf"), ("split", "split-00002-of-00003.gguf")):
        assert manifest.of_output(document, name)["made"] == [stem, "0"]
    assert manifest.of_output(document, "README.md") is document


def test_others_files_are_let_be(tmp_path: Path) -> None:
    beside.put(tmp_path, MINE)
    for overwrite in (False, True):
        beside.write(tmp_path, "one", overwrite=overwrite)
        assert beside.found(tmp_path) == {**MINE, **beside.expected([("one", 0)])}


def test_a_link_to_the_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    beside.write(tmp_path / "link", "one")
    assert beside.found(tmp_path / "real") == beside.expected([("one", 0)])
    assert (tmp_path / "link").is_symlink()


def test_order_of_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The manifest tells of files that are there."""
    order: list[str] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda source, target: (order.append(Path(target).name), rename(source, target)))
    beside.write(tmp_path, "split")
    assert order == [*beside.files("split"), manifest.NAME]


def test_what_lies_between_tensors_is_zero(tmp_path: Path) -> None:
    """GGUF aligns its tensors; what a broken disk left there does not stay, and is part of the digest."""
    beside.write(tmp_path, "one", stop=2)
    part = tmp_path / ".mixtools-one.gguf" / "one.gguf"
    planned = beside.plan("one").tensors
    hole = planned["b"].offset + planned["b"].nbytes
    assert hole < planned["c"].offset
    raw = bytearray(part.read_bytes())
    raw[hole] = raw[-1] = 7
    part.write_bytes(raw)
    assert beside.write(tmp_path, "one") == 2
    assert beside.found(tmp_path) == beside.expected([("one", 0)])


# --- interruptions ---


@pytest.mark.parametrize(("stem", "scenario"), [("one", "fresh"), ("split", "overwrite")])
def test_killed_before_every_change_to_the_disk(tmp_path: Path, stem: str, scenario: str) -> None:
    script = Path(__file__).parent / "killed_beside.py"
    command = [sys.executable, script, tmp_path / "out", stem, scenario]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 30


@pytest.mark.parametrize("stop", [0, 1, 3])
def test_resume(tmp_path: Path, stop: int) -> None:
    beside.put(tmp_path, MINE)
    beside.write(tmp_path, "one", stop=stop)
    beside.write(tmp_path, "two", stop=2)
    assert beside.found(tmp_path) == MINE
    assert beside.write(tmp_path, "one") == stop
    assert beside.write(tmp_path, "two") == 2
    assert beside.found(tmp_path) == {**MINE, **beside.expected([("one", 0), ("two", 0)])}


def test_cut_at_every_byte_of_the_journal(tmp_path: Path) -> None:
    """Lines of every kind: the key, regions, a note, the digests, the commit that could not rename."""
    planned = beside.plan("one")
    base = tmp_path / "base"
    with (
        Output(base, planned, {"version": 0, **beside.KEY}, shared=True) as out,
        pytest.MonkeyPatch.context() as patch,
    ):
        out.note("found", [1, 2])
        for region, rows in beside.regions("one"):
            out.add(region, rows)
        patch.setattr(Path, "rename", _fails)
        with pytest.raises(errors.OutputError):
            out.commit({}, {}, lambda files: beside.record(base, "one", files, out))
    raw = (base / ".mixtools-one.gguf" / JOURNAL).read_bytes()
    kinds = [next(iter(json.loads(line))) for line in raw.splitlines()]
    assert kinds == ["key", "note", "tensor", "tensor", "tensor", "tensor", "sealed", "committing"]
    ends = [0, *itertools.accumulate(len(line) for line in raw.splitlines(keepends=True))]
    for cut in sorted({at + step for at in ends for step in (-1, 0, 1, 9)} & {*range(len(raw) + 1)}):
        folder = tmp_path / str(cut)
        shutil.copytree(base, folder)
        (folder / ".mixtools-one.gguf" / JOURNAL).write_bytes(raw[:cut])
        resumed = beside.write(folder, "one")
        assert resumed == sum(end <= cut for end in ends[3:7]), cut
        assert beside.found(folder) == beside.expected([("one", 0)])
        assert beside.work(folder) == []


def _fails(*_: object) -> None:
    raise OSError(5, "no")


def test_other_run_in_the_way(tmp_path: Path) -> None:
    beside.write(tmp_path, "one", stop=3)
    other = {**beside.KEY, "options": {"dtype": "f16"}}
    with pytest.raises(errors.OutputExists, match="differs in options;") as caught:
        beside.write(tmp_path, "one", key=other)
    assert caught.value.file == str(tmp_path)
    assert beside.write(tmp_path, "two", key=other) == 0  # of another file it is no matter
    assert beside.write(tmp_path, "one", stop=3) == 3
    assert beside.write(tmp_path, "one", key=other, overwrite=True) == 0
    assert beside.found(tmp_path) == beside.expected([("one", 0), ("two", 0)])


def test_one_listed_while_another_was_killed_as_it_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file is in place, its entry is not; the manifest that it goes on to write tells of what came meanwhile."""
    rename = os.rename

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == manifest.NAME:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            beside.write(tmp_path, "one")
    assert (tmp_path / "one.gguf").exists()
    beside.write(tmp_path, "two")
    assert beside.write(tmp_path, "one") == 4
    assert beside.found(tmp_path) == beside.expected([("one", 0), ("two", 0)])


# --- locks ---

LOCKER = """
import sys
from pathlib import Path
from storage import beside
from mixtools.storage.output import Output
with Output(Path(sys.argv[1]), beside.plan("one"), {**beside.KEY, "version": 0}, shared=True):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_locked_by_another_process(tmp_path: Path) -> None:
    """For the one file, not for others of the folder."""
    folder = tmp_path / "out"
    command = [sys.executable, "-c", LOCKER, folder]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        for overwrite in (False, True):
            with pytest.raises(errors.OutputLocked, match="another mixtools process") as caught:
                beside.write(folder, "one", overwrite=overwrite)
            assert caught.value.file == str(folder / "one.gguf")
        beside.write(folder, "two")
        process.kill()
    beside.write(folder, "one")  # a lock dies with its owner
    assert beside.found(folder) == beside.expected([("one", 0), ("two", 0)])


def test_locked_by_this_process(tmp_path: Path) -> None:
    with Output(tmp_path, beside.plan("one"), beside.KEY, shared=True), pytest.raises(errors.OutputLocked):
        beside.write(tmp_path, "one")


# --- room, and no traces ---


def test_reserved_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two outputs of one run that fit each by itself, the second is refused before anything is written."""
    size = beside.plan("one").total_bytes
    monkeypatch.setattr(os, "statvfs", lambda _: type("Status", (), {"f_frsize": 1, "f_bavail": size + 10}))
    with Output(tmp_path / "first", beside.plan("one"), beside.KEY, shared=True) as one:
        assert one.needed_bytes == size
    with pytest.raises(errors.DiskError, match=r"needs 0\.00 GB more, 0\.00 GB are free"):
        beside.write(tmp_path / "out", "one", reserved=11)
    assert not (tmp_path / "out").exists()
    beside.write(tmp_path / "out", "one", reserved=10)


def test_no_trace_of_what_never_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: type("Status", (), {"f_frsize": 1, "f_bavail": 0}))
    with pytest.raises(errors.DiskError):
        beside.write(tmp_path / "new", "one")
    assert not (tmp_path / "new").exists()
    beside.put(tmp_path / "old", {"x": b"mine"})
    with pytest.raises(errors.DiskError):
        beside.write(tmp_path / "old", "one")
    assert [path.name for path in (tmp_path / "old").iterdir()] == ["x"]


def test_names_of_work_folders_tell_the_outputs_apart(tmp_path: Path) -> None:
    """Also one that is the start of another's name."""
    with (
        Output(tmp_path, beside.plan("x"), beside.KEY, shared=True),
        Output(tmp_path, beside.plan("x.gguf"), beside.KEY, shared=True),
        Output(tmp_path, beside.plan("split"), beside.KEY, shared=True),
    ):
        assert beside.work(tmp_path) == [
            ".mixtools-split-00001-of-00003.gguf",
            ".mixtools-x.gguf",
            ".mixtools-x.gguf.gguf",
        ]
        assert not (tmp_path / WORK).exists()


def test_checksums_reach_the_reader(tmp_path: Path) -> None:
    """Each file's from its own entry, though the tensors of both have the same names."""
    from mixtools.storage.gguf import read_header
    from mixtools.storage.store import Store, by_name

    for stem in ("one", "two"):
        beside.write(tmp_path, stem)
    for stem in ("one", "two"):
        entries = read_header(Source(tmp_path / f"{stem}.gguf")).entries
        store = Store(by_name(manifest.with_checksums(tmp_path, entries)))
        for name, entry in store.entries.items():
            assert entry.record is not None
            assert store.read_rows(name, 0, entry.rows).tobytes() == beside.data(stem, name)
    raw = bytearray((tmp_path / "two.gguf").read_bytes())
    raw[beside.plan("two").tensors["c"].offset] ^= 1
    (tmp_path / "two.gguf").write_bytes(raw)
    entries = read_header(Source(tmp_path / "two.gguf")).entries
    store = Store(by_name(manifest.with_checksums(tmp_path, entries)))
    with pytest.raises(errors.ChecksumError):
        store.read_rows("c", 0, store.entries["c"].rows)
