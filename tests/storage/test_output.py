"""The output folder: absent, unfinished or whole; whatever stops the writer, and whenever."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from storage import small

from mixtools import errors
from mixtools.storage import manifest, output
from mixtools.storage.output import JOURNAL, Output, Region
from mixtools.storage.replacing import WORK

TREE = Path(__file__).parents[2]
OLD = {"config.json": b"old", "model-00001-of-00009.safetensors": b"old weights", "README.md": b"# old"}
OLD |= {"images/old.png": b"old", manifest.NAME: small.listed({**OLD, "images/old.png": b"old"})}


def old_checkpoint(folder: Path) -> Path:
    for name, raw in OLD.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(raw)
    return folder


@pytest.mark.parametrize("plan", [small.PLAN, small.ZIP], ids=["safetensors", "zip"])
def test_whole(tmp_path: Path, plan) -> None:
    small.write(tmp_path / "a" / "b", plan)
    assert small.found(tmp_path / "a" / "b") == small.expected(plan)
    assert not (tmp_path / "a" / "b" / WORK).exists()


def test_others_read_it(tmp_path: Path) -> None:
    small.write(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "np") as opened:
            if name != "a":  # numpy has no bf16
                assert opened.get_tensor(name).tobytes() == small.data(name)


@pytest.mark.parametrize("scenario", ["fresh", "overwrite", "zip"])
def test_killed_before_every_change_to_the_disk(tmp_path: Path, scenario: str) -> None:
    """By SIGKILL, in the middle of writes too, and some twice; then continued to the same bytes."""
    script = Path(__file__).parent / "killed.py"
    environment = {**os.environ, "PYTHONPATH": str(TREE)}
    result = subprocess.run(
        [sys.executable, script, tmp_path / "out", scenario],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 40


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_modes_follow_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        small.write(tmp_path / "out")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask
    for path in (path for path in (tmp_path / "out").rglob("*") if path.is_file()):
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_order_of_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, then documents; the configuration and then the index make the folder loadable, so they are last."""
    order: list[str] = []
    synced: set[str] = set()
    rename, fsync = os.rename, os.fsync

    def renamed(source: Path, target: Path) -> None:
        assert Path(source).name in synced, "not yet on the disk"
        order.append(Path(target).name)
        rename(source, target)

    def synchronized(file: int) -> None:
        synced.add(Path(f"/proc/self/fd/{file}").readlink().name)
        fsync(file)

    monkeypatch.setattr(os, "rename", renamed)
    monkeypatch.setattr(os, "fsync", synchronized)
    small.write(tmp_path)
    weights = [file.name for file in small.PLAN.files]
    documents = [Path(name).name for name in (*small.DOCUMENTS, manifest.NAME)]
    assert order == [*weights, *documents, "config.json", "model.safetensors.index.json"]
    assert synced >= {JOURNAL, tmp_path.name, WORK, tmp_path.parent.name}


@pytest.mark.parametrize("old", [False, True], ids=["fresh", "overwrite"])
def test_each_step_is_on_the_disk_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    """When the power fails a folder may lose what changed since its last fsync: what tells of it must not be lost."""
    folder = old_checkpoint(tmp_path / "out") if old else tmp_path / "out"
    steps: list[tuple[str, str]] = []

    def watch(name: str, tell: Callable[..., tuple[str, str]]) -> None:
        real = getattr(os, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            steps.append(tell(*arguments))
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, watched)

    watch("fsync", lambda file: ("sync", Path(f"/proc/self/fd/{file}").readlink().name))
    watch("rename", lambda source, target: ("rename", Path(target).name))
    watch("unlink", lambda path, **_: ("remove", Path(path).name))
    watch("rmdir", lambda path, **_: ("remove", Path(path).name))
    small.write(folder, overwrite=old)

    def places(*kinds: str, of: Collection[str] | None = None) -> list[int]:
        return [at for at, (kind, name) in enumerate(steps) if kind in kinds and (of is None or name in of)]

    first_change = min(places("rename") + places("remove", of=OLD))
    (journal_sync,) = places("sync", of=[JOURNAL])
    assert max(places("sync", of=[WORK])) < journal_sync < first_change, "the new files, then the line that commits"
    (journal_end,) = places("remove", of=[JOURNAL])
    in_place = [at for at in places("sync", of=["out"]) if at < journal_end]
    assert max(places("rename")) < max(in_place, default=-1), "all is in place before the journal goes"
    (work_end,) = places("remove", of=[WORK])
    assert journal_end < work_end < max(places("sync", of=["out"])), "a folder that is done stays done"
    assert work_end < max(places("sync", of=[tmp_path.name])), "nor is the folder itself lost"


def test_not_empty(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(errors.OutputExists, match="not empty") as caught:
        small.write(tmp_path)
    assert caught.value.file == str(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(errors.OutputExists, match="is a file"):
        small.write(tmp_path / "x")
    with pytest.raises(errors.OutputError, match="cannot be written"):
        small.write(tmp_path / "x" / "y")


def test_work_folder_that_is_a_link(tmp_path: Path) -> None:
    """What it points to must not be emptied."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / WORK).symlink_to(tmp_path / "precious")
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExists):
            small.write(tmp_path / "out", overwrite=overwrite)
    assert (tmp_path / "precious" / "x").exists()


def test_overwrite_keeps_the_old_until_commit(tmp_path: Path) -> None:
    old_checkpoint(tmp_path)
    small.write(tmp_path, overwrite=True, stop=5)
    assert small.found(tmp_path) == OLD
    with pytest.raises(errors.OutputExists):
        small.write(tmp_path)  # the flag is needed again while the old is there
    assert small.write(tmp_path, overwrite=True) == 5
    assert small.found(tmp_path) == small.expected()


LOCKER = """
import sys
from pathlib import Path
from storage import small
from mixtools.storage.output import Output
with Output(Path(sys.argv[1]), small.PLAN, small.KEY):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_locked_by_another_process(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": f"{TREE}{os.pathsep}{TREE / 'tests'}"}
    with subprocess.Popen(
        [sys.executable, "-c", LOCKER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        for overwrite in (False, True):
            with pytest.raises(errors.OutputLocked, match="another mixtools process") as caught:
                small.write(folder, overwrite=overwrite)
            assert caught.value.file == str(folder)
        process.kill()
    small.write(folder)  # a lock dies with its owner
    assert small.found(folder) == small.expected()


def test_locked_by_this_process(tmp_path: Path) -> None:
    with Output(tmp_path, small.PLAN, small.KEY), pytest.raises(errors.OutputLocked):
        small.write(tmp_path)
    small.write(tmp_path)


def test_incomplete_is_not_committed(tmp_path: Path) -> None:
    with Output(tmp_path, small.PLAN, small.KEY) as unfinished:
        for region, rows in small.regions(small.PLAN)[:-1]:
            unfinished.add(region, [rows])
        with pytest.raises(errors.OutputError, match="never written whole") as caught:
            unfinished.commit(small.DOCUMENTS, small.LAST)
    assert caught.value.tensor == "d"
    assert small.found(tmp_path) == {}


def test_blocks_that_fail_are_not_journaled(tmp_path: Path) -> None:
    def broken() -> Iterator[object]:
        yield small.regions(small.PLAN)[0][1]
        raise errors.ChecksumError("damaged")

    with Output(tmp_path, small.PLAN, small.KEY) as unfinished:
        with pytest.raises(errors.ChecksumError):
            unfinished.add(Region("a", 0), broken())
        assert unfinished.done == {}
    assert small.write(tmp_path) == 0


def test_threads(tmp_path: Path) -> None:
    with Output(tmp_path, small.PLAN, small.KEY) as shared:
        parts = small.regions(small.PLAN)
        threads = [
            threading.Thread(target=lambda mine: [shared.add(r, [b]) for r, b in mine], args=(parts[i::4],))
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        shared.commit(small.DOCUMENTS, small.LAST, lambda files: manifest.encode({}, files, {}))
    assert small.found(tmp_path) == small.expected()


# --- going on after an interruption


@pytest.mark.parametrize("stop", [0, 1, 4, 9])
def test_resume(tmp_path: Path, stop: int) -> None:
    small.write(tmp_path, stop=stop)
    assert small.found(tmp_path) == {}
    assert small.write(tmp_path) == stop
    assert small.found(tmp_path) == small.expected()


def test_no_resume(tmp_path: Path) -> None:
    small.write(tmp_path, stop=4)
    assert small.write(tmp_path, resume=False) == 0
    assert small.found(tmp_path) == small.expected()


@pytest.mark.parametrize("cut", [1, 5, 20, "newline"])
def test_torn_last_line(tmp_path: Path, cut: int | str) -> None:
    """The line that a kill cut is forgotten, and the next one does not stick to its rest."""
    small.write(tmp_path, stop=4)
    journal = tmp_path / WORK / JOURNAL
    raw = journal.read_bytes()
    journal.write_bytes(raw[:-1] if cut == "newline" else raw[: -int(cut)])
    assert small.write(tmp_path, stop=7) == 3
    assert small.write(tmp_path) == 7
    assert small.found(tmp_path) == small.expected()


@pytest.mark.parametrize("how", ["flipped", "cut", "removed", "zeroed"])
def test_damaged_part_is_done_again(tmp_path: Path, how: str) -> None:
    small.write(tmp_path, stop=6)
    tensor = small.PLAN.tensors["b"]
    part = tmp_path / WORK / tensor.file
    raw = bytearray(part.read_bytes())
    raw[tensor.offset + 3] ^= 1
    damaged = {"flipped": bytes(raw), "cut": bytes(raw[: tensor.offset + 3]), "zeroed": bytes(len(raw))}
    if how == "removed":
        part.unlink()
    else:
        part.write_bytes(damaged[how])
    assert small.write(tmp_path) < 6
    assert small.found(tmp_path) == small.expected()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ({**small.KEY, "options": {"dtype": "f16"}}, "differs in options;"),
        ({**small.KEY, "source": []}, "differs in source;"),
        ({**small.KEY, "more": 1}, "differs in more;"),
        ({"options": 0, "source": 0}, "differs in options, source;"),
    ],
)
def test_other_run_in_the_way(tmp_path: Path, key: dict, message: str) -> None:
    small.write(tmp_path, stop=4)
    with pytest.raises(errors.OutputExists, match=message):
        small.write(tmp_path, key=key)
    assert small.write(tmp_path, stop=4) == 4  # untouched
    assert small.write(tmp_path, key=key, overwrite=True) == 0
    assert small.found(tmp_path) == small.expected()


def test_other_plan_in_the_way(tmp_path: Path) -> None:
    small.write(tmp_path, stop=4)
    with pytest.raises(errors.OutputExists, match="differs in plan;"):
        small.write(tmp_path, small.ZIP)


def test_journal_of_nonsense(tmp_path: Path) -> None:
    for text in (b"", b"\n", b"5\n", b"[]\n", b"null\n", b"{}\n", b"\xff\n", b"[" * 100_000, b'{"key": 1}\n'):
        folder = tmp_path / "out"
        (folder / WORK).mkdir(parents=True)
        (folder / WORK / JOURNAL).write_bytes(text)
        try:
            small.write(folder)
        except errors.OutputExists:
            small.write(folder, overwrite=True)
        assert small.found(folder) == small.expected()
        shutil.rmtree(folder)


def test_journal_mutations(tmp_path: Path) -> None:
    """Only our errors escape, and no journal makes a wrong output pass."""
    small.write(tmp_path / "base", stop=9)
    raw = (tmp_path / "base" / WORK / JOURNAL).read_bytes()
    chance = random.Random(0)
    folder, resumed = tmp_path / "out", 0
    for _ in range(120):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "base", folder)
        data = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + 1] = chance.choice((b"", b"0", b"9", b"-", b'"', b"\n", chance.randbytes(1)))
        (folder / WORK / JOURNAL).write_bytes(data)
        with contextlib.suppress(errors.OutputError):
            resumed += small.write(folder) > 0
            assert small.found(folder) == small.expected()
    assert resumed > 20


def test_regions_that_were_never_written(tmp_path: Path) -> None:
    """A journal that lists what no run wrote: negative, outside, empty, of no tensor."""
    small.write(tmp_path, stop=2)
    lines = [("a", -1, 10), ("a", 0, -5), ("a", 0, 0), ("a", 590, 100), ("a", 1 << 70, 1), ("zz", 0, 1), (["a"], 0, 1)]
    with (tmp_path / WORK / JOURNAL).open("a") as file:
        for name, start, size in lines:
            file.write(json.dumps({"tensor": name, "start": start, "bytes": size, "crc32": "00000000"}) + "\n")
    assert small.write(tmp_path) == 2
    assert small.found(tmp_path) == small.expected()


def test_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for chunk in (1, 7, 64):
        monkeypatch.setattr(output, "CHUNK", chunk)
        small.write(tmp_path / str(chunk), stop=5)
        assert small.write(tmp_path / str(chunk)) == 5
        assert small.found(tmp_path / str(chunk)) == small.expected()
