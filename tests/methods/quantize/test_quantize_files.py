"""mixtools.quantize: where its files go, what they are called, what is told of them, and what stops it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import quantizing
from layouts import make
from quantizing import LEAST, command, names, quantize, read, tensors

import mixtools
from mixtools import errors
from mixtools.layouts.detect import open_checkpoint

TESTS = Path(__file__).parents[2]
NANO = TESTS / "data" / "nano-mixtral"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make.write_a(tmp_path / "small", LEAST)


# --- names ---


def test_named_for_the_folder(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", "Q8_0", "F16")
    assert names(tmp_path / "out") == ["small.F16.gguf", "small.Q8_0.gguf"]


def test_named_for_the_working_folder(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(source)
    quantize(Path(), tmp_path / "out", "Q8_0")
    monkeypatch.chdir("/")
    quantize(tmp_path / "out" / ".." / "small", tmp_path / "out", "F16")
    assert names(tmp_path / "out") == ["small.F16.gguf", "small.Q8_0.gguf"]


def test_named_for_a_link_that_is_given(tmp_path: Path, source: Path) -> None:
    (tmp_path / "nicer").symlink_to(source)
    quantize(tmp_path / "nicer", tmp_path / "out", "Q8_0")
    assert names(tmp_path / "out") == ["nicer.Q8_0.gguf"]


def test_named_by_the_user(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", "Q8_0", name="Their-Model.v2")
    assert names(tmp_path / "out") == ["Their-Model.v2.Q8_0.gguf"]
    assert quantizing.metadata(tmp_path / "out" / "Their-Model.v2.Q8_0.gguf")["general.name"] == "Their-Model.v2"


@pytest.mark.parametrize("name", ["a/b", "..", ".", "", "a\0b"])
def test_names_that_are_none(tmp_path: Path, source: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match="is no file's name"):
        quantize(source, tmp_path / "out", "Q8_0", name=name)
    assert not (tmp_path / "out").exists()


def test_named_for_the_hubs_repository(tmp_path: Path, source: Path) -> None:
    """Of a folder in the Hub's cache: not the hash of a revision."""
    repository = tmp_path / "hub" / "models--mistralai--Mixtral-8x7B-v0.1"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("985aa055")
    shutil.copytree(source, repository / "snapshots" / "985aa055")
    quantize(repository / "snapshots" / "985aa055", tmp_path / "one", "Q8_0")
    quantize(repository, tmp_path / "two", "Q8_0")
    assert names(tmp_path / "one") == names(tmp_path / "two") == ["Mixtral-8x7B-v0.1.Q8_0.gguf"]


@pytest.mark.parametrize(
    ("file", "stem"),
    [("Mixtral-8x7B.F16.gguf", "Mixtral-8x7B"), ("mixtral-bf16.gguf", "mixtral"), ("my.model.gguf", "my.model"),
     ("ggml-model-f16.gguf", "ggml-model"), ("F16.gguf", "F16"), ("x.Q8_0.gguf", "x"), ("x-FP16.gguf", "x"),
     ("a.BF16-00001-of-00001.gguf", "a"), ("a.IQ4_XS.gguf", "a"), ("a.UD-Q4_K_M.gguf", "a")],
)  # fmt: skip
def test_named_for_a_gguf_without_its_type(tmp_path: Path, source: Path, file: str, stem: str) -> None:
    quantize(source, tmp_path / "x.gguf", "F16")
    folder = tmp_path / "theirs"
    folder.mkdir()
    if "-of-" in file:
        quantize(source, folder / "a.BF16.gguf", "BF16", max_shard_size=10_000)
        parts = sorted(folder.glob("a.BF16-*.gguf"))
        assert len(parts) > 1
        (tmp_path / "given").symlink_to(parts[0])
        given = parts[1]
    else:
        given = (tmp_path / "x.gguf").rename(folder / file)
    quantize(given, tmp_path / "out", "Q8_0")
    assert names(tmp_path / "out") == [f"{stem}.Q8_0.gguf"]


# --- OUT ---


def test_out_that_is_a_file(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, document = command(capsys, source, tmp_path / "new" / "Mine.gguf", "--type", "q8_0")
    assert code == 0 and document["output"] == str(tmp_path / "new")
    assert [file["file"] for file in document["files"]] == ["Mine.gguf"]
    assert names(tmp_path / "new") == ["Mine.gguf"]
    quantize(source, tmp_path / "out", "Q8_0")
    assert (tmp_path / "out" / "small.Q8_0.gguf").read_bytes() == (tmp_path / "new" / "Mine.gguf").read_bytes()


def test_out_that_is_a_file_in_parts(tmp_path: Path, source: Path) -> None:
    done = quantize(source, tmp_path / "out" / "Mine.gguf", "F16", max_shard_size=20_000)
    count = done.document["files"][0]["parts"]
    assert count > 1
    assert names(tmp_path / "out") == [f"Mine-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]


def test_out_in_the_working_folder(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    quantize(source, Path("Mine.gguf"), "F16")
    assert names(tmp_path) == ["Mine.gguf", "small"]


def test_several_types_are_no_file(tmp_path: Path, source: Path) -> None:
    with pytest.raises(errors.UsageError, match="several types are several files: name a folder"):
        quantize(source, tmp_path / "x.gguf", "F16", "Q8_0")
    assert not (tmp_path / "x.gguf").exists()


def test_out_that_holds_others_files(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("mine")
    (out / "small.Q4_K_M.gguf").write_text("mine")
    quantize(source, out, "Q8_0")
    assert names(out) == ["README.md", "small.Q4_K_M.gguf", "small.Q8_0.gguf"]
    assert (out / "README.md").read_text() == (out / "small.Q4_K_M.gguf").read_text() == "mine"


@pytest.mark.parametrize("below", [False, True], ids=["the same", "below"])
@pytest.mark.parametrize("writer", [make.write_a, make.write_c])
def test_out_in_the_sources_folder(tmp_path: Path, writer: Any, below: bool) -> None:
    """As many people keep them. The folder is then still what it was."""
    source = writer(tmp_path / "small", LEAST)
    before = read(source)
    quantize(source, source / "gguf" if below else source, "Q8_0")
    quantize(source, source / "gguf" if below else source, "F16")
    after = read(source)
    assert {name: after[name] for name in before} == before
    if not below:
        assert after.keys() - before.keys() == {"small.Q8_0.gguf", "small.F16.gguf", "mixtools.json"}
    checkpoint = open_checkpoint(source)
    make.assert_same(make.read_all(checkpoint), make.hf(make.torrent(LEAST), LEAST))


def test_a_source_in_the_place_of_the_output(tmp_path: Path, source: Path) -> None:
    """Under its own name, or by a link."""
    quantize(source, tmp_path / "x.F16.gguf", "F16")
    before = (tmp_path / "x.F16.gguf").read_bytes()
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "y.gguf").symlink_to(tmp_path / "x.F16.gguf")
    for given, out in (
        ("x.F16.gguf", tmp_path / "x.F16.gguf"),
        ("x.F16.gguf", tmp_path),
        ("link/y.gguf", tmp_path / "x.F16.gguf"),
    ):
        for overwrite in (False, True):
            with pytest.raises(errors.UsageError, match="is the source itself; name another output"):
                quantize(tmp_path / given, out, "F16", overwrite=overwrite)
    assert (tmp_path / "x.F16.gguf").read_bytes() == before


def test_out_that_is_an_output_of_another_kind(tmp_path: Path, source: Path) -> None:
    mixtools.convert(source, tmp_path / "hf")
    with pytest.raises(errors.OutputExists, match="is an output of mixtools by itself; name another folder"):
        quantize(source, tmp_path / "hf", "Q8_0")


# --- taken, added, replaced ---


def test_a_type_is_added(tmp_path: Path, source: Path) -> None:
    """To a folder with others of the same command, in the same bytes as all at once, and those are let be."""
    out = tmp_path / "out"
    quantize(source, out, "Q8_0")
    stamp = (out / "small.Q8_0.gguf").stat()
    done = quantize(source, out, "Q8_0", "F16")
    assert any(note == "small.Q8_0.gguf: there already, of the same source and options" for note in done.notes)
    assert (out / "small.Q8_0.gguf").stat() == stamp
    assert [file["file"] for file in done.document["files"]] == ["small.Q8_0.gguf", "small.F16.gguf"]
    assert done.document["bytes"] == sum(len(tensor.data) for tensor in tensors(out / "small.F16.gguf").values())
    quantize(source, tmp_path / "both", "Q8_0", "F16")
    assert read(out) == read(tmp_path / "both")


@pytest.mark.parametrize("change", [{"pure": True}, {"tensor_type": ["ffn=Q5_0"]}, {"resume": False}, "another source"])
def test_what_is_there_is_not_taken_for_what_was_asked(tmp_path: Path, source: Path, change: Any) -> None:
    out = tmp_path / "out"
    quantize(source, out, "Q4_0", name="small")
    before = read(out)
    options = change if isinstance(change, dict) else {}
    if change == "another source":
        shutil.rmtree(source)
        make.write_a(source, LEAST, make.torrent(LEAST, seed=5))
    for types in (("Q4_0", "F16"), ("F16", "Q4_0"), ("Q4_0",)):
        with pytest.raises(errors.OutputExists, match="is there already; --overwrite replaces it") as caught:
            quantize(source, out, *types, name="small", **options)
        assert caught.value.file == str(out / "small.Q4_0.gguf")
        assert read(out) == before
        assert names(out) == ["small.Q4_0.gguf"]
    quantize(source, out, "F16", "Q4_0", name="small", overwrite=True, **options)
    quantize(source, tmp_path / "new", "F16", "Q4_0", name="small", **options)
    assert read(out) == read(tmp_path / "new")


def test_the_same_again(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path / "out", "Q8_0", "F16")
    with pytest.raises(errors.OutputExists, match="is there already"):
        quantize(source, tmp_path / "out", "Q8_0", "F16")


def test_overwrite_leaves_what_was_edited(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    quantize(source, out, "Q8_0", "F16")
    with (out / "small.F16.gguf").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    before = read(out)
    with pytest.raises(errors.OutputExists, match="was changed since mixtools wrote it"):
        quantize(source, out, "Q8_0", "F16", overwrite=True)
    assert read(out) == before


def test_the_manifest(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path, "Q4_0", "F16", tensor_type=["attn_v=Q8_0"], output_tensor_type="F32", name="x")
    document = json.loads((tmp_path / "mixtools.json").read_text())
    assert [*document["outputs"]] == ["x.F16.gguf", "x.Q4_0.gguf"]
    entry = document["outputs"]["x.Q4_0.gguf"]
    assert entry["layout"] == "gguf" and entry["options"] == {"name": "x"}
    assert entry["quantize"] == {
        "name": "Q4_0", "tensor_types": [["attn_v", "Q8_0"]], "output": "F32", "rules": "today"
    }  # fmt: skip
    size = (source / "consolidated.00.pth").stat().st_size
    assert entry["source"] == {"layout": "torrent", "files": {"consolidated.00.pth": size}}
    assert [*entry["files"]] == ["x.Q4_0.gguf"]
    assert entry["crc32"].keys() == tensors(tmp_path / "x.Q4_0.gguf").keys()
