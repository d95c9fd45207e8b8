"""What stands in a folder that an output goes to: it stays, or --overwrite replaces it if mixtools wrote it."""

from __future__ import annotations

from pathlib import Path

import pytest
from storage import beside, small

from mixtools import errors
from mixtools.storage import manifest
from mixtools.storage.output import Output

# --- what is there already ---


@pytest.mark.parametrize("stem", ["one", "split"])
def test_taken(tmp_path: Path, stem: str) -> None:
    for version in ("old", "new"):
        if version == "new":
            with pytest.raises(errors.OutputExists, match="is there already; --overwrite replaces it") as caught:
                beside.write(tmp_path, stem, version=version)
            assert caught.value.file == str(tmp_path / beside.first(stem))
            assert beside.found(tmp_path) == beside.expected([(stem, "old"), ("other", 0)])
        beside.write(tmp_path, stem, version=version, overwrite=True)
        if version == "old":
            beside.write(tmp_path, "other")
    assert beside.found(tmp_path) == beside.expected([(stem, "new"), ("other", 0)])
    assert beside.work(tmp_path) == []


def test_the_old_is_kept_until_the_new_is_whole(tmp_path: Path) -> None:
    beside.write(tmp_path, "split", version="old")
    beside.write(tmp_path, "split", version="new", overwrite=True, stop=3)
    assert beside.found(tmp_path) == beside.expected([("split", "old")])
    with pytest.raises(errors.OutputExists):
        beside.write(tmp_path, "split", version="new")  # the flag is needed again while the old is there
    assert beside.write(tmp_path, "split", version="new", overwrite=True) == 3
    assert beside.found(tmp_path) == beside.expected([("split", "new")])


@pytest.mark.parametrize("taken", ["split-00001-of-00003.gguf", "split-00003-of-00003.gguf"])
@pytest.mark.parametrize("listed", [False, True], ids=["no manifest", "another listed"])
def test_somebodys_own(tmp_path: Path, taken: str, listed: bool) -> None:
    """Any part of a name, and with --overwrite, too."""
    beside.put(tmp_path, {taken: b"mine"})
    if listed:
        beside.write(tmp_path, "other")
    before = beside.found(tmp_path)
    for overwrite, message in ((False, "is there already"), (True, "was not written by mixtools; move it away")):
        with pytest.raises(errors.OutputExists, match=message) as caught:
            beside.write(tmp_path, "split", overwrite=overwrite)
        assert caught.value.file == str(tmp_path / taken)
    assert beside.found(tmp_path) == before
    assert beside.work(tmp_path) == []


def test_a_part_of_another_output_is_replaced(tmp_path: Path) -> None:
    """By one of that name: what is left of the other is no output any more, and not listed as one."""
    beside.write(tmp_path, "split")
    beside.write(tmp_path, "split-00002-of-00003", overwrite=True)
    left = beside.files("split")
    del left["split-00002-of-00003.gguf"]
    assert beside.found(tmp_path) == {**left, **beside.expected([("split-00002-of-00003", 0)])}


@pytest.mark.parametrize("how", ["flipped", "longer", "a link to the same", "a folder"])
def test_changed_since_it_was_written(tmp_path: Path, how: str) -> None:
    folder = tmp_path / "out"
    for stem in ("split", "other"):
        beside.write(folder, stem)
    path = folder / "split-00002-of-00003.gguf"
    raw = bytearray(path.read_bytes())
    path.rename(tmp_path / "x")
    raw[-1] ^= 1
    if how == "a folder":
        path.mkdir()
    elif how == "a link to the same":
        path.symlink_to(tmp_path / "x")
    else:
        path.write_bytes(bytes(raw) if how == "flipped" else bytes(raw) + b"x")
    before = beside.found(folder)
    with pytest.raises(errors.OutputExists, match="was changed since mixtools wrote it; move it away") as caught:
        beside.write(folder, "split", version="new", overwrite=True)
    assert caught.value.file == str(path)
    assert beside.found(folder) == before
    assert beside.work(folder) == []
    beside.write(folder, "other", version="new", overwrite=True)  # of which nothing was changed
    assert beside.found(folder)["other.gguf"] == beside.files("other", "new")["other.gguf"]


@pytest.mark.parametrize("target", ["one.gguf", "other.gguf", "gone"])
def test_a_link_in_the_place_of_the_file(tmp_path: Path, target: str) -> None:
    beside.put(tmp_path, {"other.gguf": b"mine"})
    if target != "one.gguf":
        (tmp_path / "one.gguf").symlink_to(target)
    else:
        (tmp_path / "one.gguf").symlink_to(tmp_path / "one.gguf")  # to itself
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExists):
            beside.write(tmp_path, "one", overwrite=overwrite)
    assert (tmp_path / "one.gguf").is_symlink()
    assert (tmp_path / "other.gguf").read_bytes() == b"mine"


def test_a_manifest_that_is_a_link(tmp_path: Path) -> None:
    """It is replaced; what it points to is not written to."""
    beside.write(tmp_path / "out", "one")
    (tmp_path / "out" / manifest.NAME).rename(tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    (tmp_path / "out" / manifest.NAME).symlink_to(tmp_path / "x")
    beside.write(tmp_path / "out", "two")
    assert beside.found(tmp_path / "out") == beside.expected([("one", 0), ("two", 0)])
    assert (tmp_path / "x").read_bytes() == before


def test_a_work_folder_that_is_a_link(tmp_path: Path) -> None:
    beside.put(tmp_path, {"precious/x": b"mine"})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".mixtools-one.gguf").symlink_to(tmp_path / "precious")
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExists, match="is a link; what it points to is not ours"):
            beside.write(tmp_path / "out", "one", overwrite=overwrite)
    assert (tmp_path / "precious" / "x").read_bytes() == b"mine"


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    beside.put(tmp_path, {"x": b"mine"})
    with pytest.raises(errors.OutputExists, match="is a file; the output is a folder"):
        beside.write(tmp_path / "x", "one")


@pytest.mark.parametrize("overwrite", [False, True])
def test_changed_while_the_new_is_made(tmp_path: Path, overwrite: bool) -> None:
    """Somebody puts a file there meanwhile, or edits the old one: it stays."""
    if overwrite:
        beside.write(tmp_path, "one", version="old")
    planned = beside.plan("one")
    with Output(tmp_path, planned, beside.KEY, shared=True, overwrite=overwrite) as out:
        for region, rows in beside.regions("one"):
            out.add(region, rows)
        (tmp_path / "one.gguf").write_bytes(b"theirs")
        with pytest.raises(errors.OutputExists, match="while the new"):
            out.commit({}, {}, lambda files: beside.record(tmp_path, "one", files, out))
    assert (tmp_path / "one.gguf").read_bytes() == b"theirs"


# --- folders that tell of something else ---


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_of_its_own(tmp_path: Path, overwrite: bool) -> None:
    """It has no place for others: its manifest tells of all files in the folder, and --overwrite removes them."""
    small.write(tmp_path)
    with pytest.raises(errors.OutputExists, match="is an output of mixtools by itself; name another folder") as caught:
        beside.write(tmp_path, "one", overwrite=overwrite)
    assert caught.value.file == str(tmp_path)
    assert beside.found(tmp_path) == small.expected()


@pytest.mark.parametrize(("overwrite", "why"), [(False, "not empty"), (True, "files by themselves")])
def test_a_folder_of_outputs_is_none_of_its_own(tmp_path: Path, overwrite: bool, why: str) -> None:
    """Replacing it would take every model in it."""
    beside.write(tmp_path, "one")
    with pytest.raises(errors.OutputExists, match=why):
        small.write(tmp_path, overwrite=overwrite)
    assert beside.found(tmp_path) == beside.expected([("one", 0)])


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"5", b'"outputs"', b'{"outputs": []}', b'{"outputs": {"x": {}}}', b'{"outputs": 5}',
            b'{"outputs": {"x": {"files": {"y": {}}, "crc32": {}}}}', b'{"outputs": {"x": 1}}', b"\xff"]
)  # fmt: skip
def test_a_manifest_of_nonsense(tmp_path: Path, raw: bytes) -> None:
    """Where others were listed: nothing is lost from it."""
    beside.put(tmp_path, {manifest.NAME: raw})
    for overwrite in (False, True):
        with pytest.raises(errors.OutputExists, match="is not a manifest of mixtools") as caught:
            beside.write(tmp_path, "one", overwrite=overwrite)
        assert caught.value.file == str(tmp_path / manifest.NAME)
    assert beside.found(tmp_path) == {manifest.NAME: raw}
    assert beside.work(tmp_path) == []


def test_a_manifest_that_breaks_while_the_output_is_made(tmp_path: Path) -> None:
    """What is written is kept for the next attempt."""
    planned = beside.plan("one")
    with Output(tmp_path, planned, {"version": 0, **beside.KEY}, shared=True) as out:
        for region, rows in beside.regions("one"):
            out.add(region, rows)
        beside.put(tmp_path, {manifest.NAME: b"{"})
        with pytest.raises(errors.FormatError, match="is not a manifest of mixtools"):
            out.commit({}, {}, lambda files: beside.record(tmp_path, "one", files, out))
    assert beside.found(tmp_path) == {manifest.NAME: b"{"}
    (tmp_path / manifest.NAME).unlink()
    assert beside.write(tmp_path, "one") == 4
    assert beside.found(tmp_path) == beside.expected([("one", 0)])
