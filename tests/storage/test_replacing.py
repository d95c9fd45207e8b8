"""--overwrite deletes what mixtools wrote, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from storage import small

from mixtools import errors
from mixtools.storage import manifest, output, replacing
from mixtools.storage.replacing import WORK

FIRST = {
    "model-00001-of-00009.safetensors": b"old weights",
    "README.md": b"# old",
    "config.json": b"older",
    "images/of/old.png": b"old",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An earlier output."""
    return fill(tmp_path / "out", FIRST | {manifest.NAME: small.listed(FIRST)})


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def refused(folder: Path, match: str) -> None:
    """Nothing is changed, nor left behind."""
    before = small.found(folder)
    with pytest.raises(errors.OutputExists, match=match) as caught:
        small.write(folder, overwrite=True)
    assert caught.value.file in (str(folder), str(folder / manifest.NAME))
    assert small.found(folder) == before
    assert not (folder / WORK).exists()


def test_all_that_was_written_goes(folder: Path) -> None:
    small.write(folder, overwrite=True)
    assert small.found(folder) == small.expected()
    assert sorted(path.name for path in (folder / "images").iterdir()) == ["x.png"]


def test_a_folder_that_held_ours_alone_goes_with_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small, "DOCUMENTS", {"tokenizer.json": b"{}"})
    small.write(folder, overwrite=True)
    assert not (folder / "images").exists()


@pytest.mark.parametrize(
    "name", ["results.csv", "plot.png", "notes.md", "LICENSE", "train.py", ".ssh", "images/mine.png"]
)
@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_the_users_own_stays(folder: Path, tmp_path: Path, name: str, kind: str) -> None:
    fill(tmp_path, {"elsewhere/x": b"precious"})
    path = folder / name
    if kind == "file":
        path.write_bytes(b"mine")
    elif kind == "folder":
        fill(path, {"x": b"mine"})
    else:
        path.symlink_to(tmp_path / "elsewhere")
    small.write(folder, overwrite=True)
    small.write(folder, overwrite=True)  # nor is it taken for ours the second time
    kept = small.expected() | {"file": {name: b"mine"}, "folder": {f"{name}/x": b"mine"}, "link": {}}[kind]
    assert {key: raw for key, raw in small.found(folder).items() if not path.is_symlink() or key != name} == kept
    assert path.is_symlink() == (kind == "link") and (tmp_path / "elsewhere/x").read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["README.md", "model-00001-of-00009.safetensors"])
def test_what_was_edited_since_is_not_deleted(folder: Path, name: str) -> None:
    """Of the same size, and of the same time: only its bytes tell."""
    status = (folder / name).stat()
    edited = bytes([FIRST[name][0] ^ 1]) + FIRST[name][1:]
    (folder / name).write_bytes(edited)
    os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    if name == "README.md":  # the new output has none
        small.write(folder, overwrite=True)
        assert small.found(folder) == small.expected() | {name: edited}
    else:
        refused(folder, f"holds {name}, which was changed since mixtools wrote it; it would be read as one of the new")


@pytest.mark.parametrize("name", ["config.json", "images/x.png", "tokenizer.json"])
def test_in_the_way_of_the_new(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"mine!")
    with pytest.raises(errors.OutputExists, match=f"{name}, which was .* the new output has one too"):
        small.write(folder, overwrite=True, names=small.DOCUMENTS | small.LAST)
    assert (folder / name).read_bytes() == b"mine!" and not (folder / WORK).exists()


def test_in_the_way_of_what_is_known_at_the_end_only(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"mine!")
    with pytest.raises(errors.OutputExists, match=r"tokenizer\.json, which was not written by mixtools"):
        small.write(folder, overwrite=True)  # without `names`
    (folder / "tokenizer.json").unlink()
    assert small.write(folder, overwrite=True) == len(small.regions(small.PLAN)), "nothing is lost"
    assert small.found(folder) == small.expected()


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "pytorch_model.bin", "consolidated.00.pth", "consolidated.00.pth-split0", "x.index.json"],
)
def test_a_stray_weight_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"mine")
    refused(folder, f"holds {name}, which was not written by mixtools; it would be read as one of the new output's")


def test_a_folder_named_like_a_weight(folder: Path) -> None:
    (folder / small.PLAN.files[0].name).mkdir()
    refused(folder, f"{small.PLAN.files[0].name}, which was not written by mixtools; the new output has one too")


@pytest.mark.parametrize("files", [{"config.json": b"{}", "model.safetensors": b"x"}, {"notes.txt": b"mine"}])
def test_no_output_of_ours(tmp_path: Path, files: dict[str, bytes]) -> None:
    refused(fill(tmp_path / "out", files), "no output of mixtools; --overwrite replaces nothing else")


@pytest.mark.parametrize("text", ["{", "[0]", '{"files": {"config.json": {"size": "1"}}, "crc32": {}}'])
def test_a_damaged_manifest(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_text(text)
    refused(folder, "without it --overwrite cannot tell whose the files are")


@pytest.mark.parametrize("name", ["../precious", "/PRECIOUS", "..", "linked/precious", "a/../../precious", "x\0y", ""])
@pytest.mark.parametrize("digest", [True, False], ids=["sha256", "of old"])
def test_a_manifest_that_lists_what_lies_elsewhere(folder: Path, tmp_path: Path, name: str, digest: bool) -> None:
    """As in a folder from the net. Only what lies in the folder itself can be replaced."""
    fill(tmp_path, {"precious": b"precious", "elsewhere/precious": b"precious"})
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    name = name.replace("/PRECIOUS", str(tmp_path / "precious"))
    document = json.loads((folder / manifest.NAME).read_text())
    document["files"][name] = json.loads(small.listed({name: b"precious"}))["files"][name] if digest else 8
    (folder / manifest.NAME).write_text(json.dumps(document))
    small.write(folder, overwrite=True)
    for path in ("precious", "elsewhere/precious"):
        assert (tmp_path / path).read_bytes() == b"precious"


def test_a_link_in_the_place_of_a_file(folder: Path, tmp_path: Path) -> None:
    """Even to the same bytes: somebody put it there."""
    shutil.move(folder / "README.md", tmp_path / "README.md")
    (folder / "README.md").symlink_to(tmp_path / "README.md")
    small.write(folder, overwrite=True)
    assert (folder / "README.md").is_symlink() and (tmp_path / "README.md").exists()


def test_an_output_of_old(tmp_path: Path) -> None:
    """Its manifest lists the weights by size: they go, and documents of the names that it wrote; not others."""
    old = {"model.safetensors": b"weights", "config.json": b"{}", "tokenizer.json": b"{}", "laser-report.html": b""}
    mine = {"results.csv": b"mine", "README.md": b"mine"}
    record = json.dumps({"mixtools": "0", "files": {"model.safetensors": 7}, "crc32": {}}).encode()
    folder = fill(tmp_path / "out", old | mine | {manifest.NAME: record})
    small.write(folder, overwrite=True)
    assert small.found(folder) == small.expected() | mine


def test_changed_while_the_new_was_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = output.Output.checksums

    def meanwhile(self: output.Output) -> dict[str, int]:
        (folder / "README.md").write_bytes(b"# new thoughts")
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(output.Output, "checksums", meanwhile)
        with pytest.raises(errors.OutputExists, match=r"README\.md, which was changed while the new output was made"):
            small.write(folder, overwrite=True)
    assert small.found(folder) == FIRST | {manifest.NAME: small.listed(FIRST), "README.md": b"# new thoughts"}
    assert small.write(folder, overwrite=True) == len(small.regions(small.PLAN)), "nothing is lost"
    assert small.found(folder) == small.expected() | {"README.md": b"# new thoughts"}


def test_progress_of_reading_what_is_replaced(folder: Path) -> None:
    class Told:
        said: list[tuple[str, int]]

        def start(self, label: str, total: int, unit: str = "B") -> None:
            self.said = [(label, total)]

        def advance(self, amount: int) -> None:
            self.said.append(("", amount))

        def finish(self) -> None:
            pass

    told = Told()
    replacing.replaceable(folder, (), told)
    label, total = told.said[0]
    assert label == "reading what is replaced" and total == sum(map(len, FIRST.values()))
    assert sum(amount for _, amount in told.said[1:]) == total
