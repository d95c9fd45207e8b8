"""What mixtools.quantize tells before and after: dry runs, documents, lines."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from layouts import make
from quantizing import LEAST, ODD, command, names, quantize, tensors

import mixtools
from mixtools import errors, job
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize.results import Planned, Quantized
from mixtools.storage.replacing import WORK

TESTS = Path(__file__).parents[2]
NANO = TESTS / "data" / "nano-mixtral"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make.write_a(tmp_path / "small", LEAST)


# --- dry runs, and what is told ---


def test_a_dry_run_writes_nothing_and_knows_the_sizes(tmp_path: Path, source: Path) -> None:
    types = ["F16", "Q8_0", "Q4_0", "Q4_K_M"]
    planned = mixtools.quantize(source, tmp_path / "out", type=types, dry_run=True)
    assert isinstance(planned, Planned)
    assert not (tmp_path / "out").exists()
    done = quantize(source, tmp_path / "out", *types)
    assert planned.document["files"] == done.document["files"]
    assert planned.document["bytes"] == sum(
        (tmp_path / "out" / file["file"]).stat().st_size for file in done.document["files"]
    )


def test_a_dry_run_of_a_split_file(tmp_path: Path, source: Path) -> None:
    planned = mixtools.quantize(source, tmp_path / "out", type=["F16"], max_shard_size=20_000, dry_run=True)
    done = quantize(source, tmp_path / "out", "F16", max_shard_size=20_000)
    assert planned.document["files"] == done.document["files"]


@pytest.mark.parametrize("writer", [make.write_a, make.write_c])
def test_a_configuration_alone(tmp_path: Path, writer: Any) -> None:
    """Without a weight; names and sizes are those of the real run, but for what its metadata tell beside."""
    source = writer(tmp_path / "whole", LEAST)
    alone = tmp_path / "alone" / "whole"
    alone.mkdir(parents=True)
    shutil.copy(source / "params.json", alone)
    types = ["F16", "Q8_0", "Q4_K_M"]
    planned = mixtools.quantize(alone, tmp_path / "out", type=types, dry_run=True).document
    done = quantize(source, tmp_path / "out", *types).document
    for one, other in zip(planned["files"], done["files"], strict=True):
        assert {**one, "bytes": 0, "max_ram_bytes": 0} == {**other, "bytes": 0, "max_ram_bytes": 0}
        assert 0 <= other["bytes"] - one["bytes"] < 512
    assert planned["dry_run"] is True and planned["seconds"] is None
    assert "params.json alone" in planned["notes"][0]


def test_a_configuration_alone_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Mixtral"
    folder.mkdir()
    make.write_json(folder / "config.json", LEAST.config())
    monkeypatch.chdir(folder)
    planned = mixtools.quantize(".", "out", type=["Q8_0"], dry_run=True)
    assert planned.document["files"][0]["file"] == "Mixtral.Q8_0.gguf"
    assert names(folder) == ["config.json"]


def test_a_configuration_alone_in_the_hubs_cache(tmp_path: Path) -> None:
    """Has the name that the real run would give."""
    folder = tmp_path / "models--mistralai--Mixtral-8x7B-v0.1" / "snapshots" / "985aa055"
    folder.mkdir(parents=True)
    make.write_json(folder / "config.json", LEAST.config())
    planned = mixtools.quantize(folder, tmp_path / "out", type=["Q8_0"], dry_run=True)
    assert planned.document["files"][0]["file"] == "Mixtral-8x7B-v0.1.Q8_0.gguf"


@pytest.mark.parametrize("document", ["{", "[]", '{"model_type": "llama"}', "{}"])
def test_a_configuration_that_is_no_mixtrals(tmp_path: Path, document: str) -> None:
    (tmp_path / "params.json").write_text(document)
    with pytest.raises(errors.ConfigError):
        mixtools.quantize(tmp_path, tmp_path / "out", type=["Q8_0"], dry_run=True)


def test_a_configuration_alone_is_not_enough_to_quantize(tmp_path: Path) -> None:
    make.write_json(tmp_path / "config.json", LEAST.config())
    with pytest.raises(errors.MixtoolsError):
        quantize(tmp_path, tmp_path / "out", "Q8_0")


def test_documents(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What scripts may rely on: CLI.md."""
    arguments = (source, tmp_path / "out", "--method", "gguf", "--type", "Q8_0", "--type", "F16")
    common = {"output", "files", "bytes", "missing", "notes", "seconds", "peak_memory_bytes"}
    code, planned = command(capsys, *arguments, "--dry-run")
    assert code == 0 and planned.keys() == common | {"dry_run", "jobs", "disk_free_bytes"}
    assert planned["jobs"] == 2 and planned["seconds"] >= 0 and planned["missing"] == ["tokenizer"]
    code, done = command(capsys, *arguments)
    assert code == 0 and done.keys() == common | {"tensors", "resumed_bytes"}
    for document in (planned, done):
        for file in document["files"]:
            assert file.keys() == {"file", "type", "bytes", "bits_per_weight", "max_ram_bytes"}
    assert done["tensors"] == 2 * len(tensors(tmp_path / "out" / "small.F16.gguf"))
    assert done["peak_memory_bytes"] > 0
    code, failed = command(capsys, *arguments)
    assert code == 8 and failed["error"]["type"] == "OutputExists"
    code, failed = command(capsys, source, tmp_path / "out", "--type", "Q4_K_L")
    assert code == 2 and "there is no such type; there are F32, F16" in failed["error"]["message"]


def test_lines_for_people(tmp_path: Path, source: Path) -> None:
    done = quantize(source, tmp_path / "out", "Q8_0", "F16")
    assert isinstance(done, Quantized)
    head, one, other, *rest = done.lines()
    assert head.split() == ["file", "type", "bits", "size", "max", "RAM"]
    assert one.split()[:3] == ["small.Q8_0.gguf", "Q8_0", f"{done.rows[0].bits_per_weight:.3f}"]
    assert other.split()[:2] == ["small.F16.gguf", "F16"]
    assert rest[-1] == f"Check it with: mixtools check {tmp_path / 'out' / 'small.Q8_0.gguf'} --against {source}"
    assert any("the source has no tokenizer" in line for line in rest)


def test_progress_reaches_its_end(tmp_path: Path, source: Path) -> None:
    """And no further, also where a part was made before."""
    steps: list[tuple[str, int]] = []

    class Told:
        def start(self, label: str, total: int, unit: str = "B") -> None:
            steps.append((label, total))

        def advance(self, amount: int) -> None:
            steps.append(("", -amount))

        def finish(self) -> None:
            pass

    done = quantize(source, tmp_path / "out", "Q8_0", "F16", progress=Told())
    assert steps[0] == ("quantizing", done.bytes)
    assert sum(amount for _, amount in steps) == 0


def test_the_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many types are made of it."""
    from mixtools.storage.source import Source

    read = 0
    real = Source.read_into

    def counted(self: Source, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        real(self, offset, view)

    checkpoint = open_checkpoint(make.write_a(tmp_path / "odd", ODD))
    monkeypatch.setattr(Source, "read_into", counted)
    mixtools.quantize(checkpoint, tmp_path / "out", type=["Q8_0", "F16", "Q4_0"])
    assert read == sum(tensor.nbytes for tensor in make.torrent(ODD).values())


def test_threads_that_cannot_be(tmp_path: Path, source: Path) -> None:
    with pytest.raises(errors.UsageError):
        quantize(source, tmp_path / "out", "Q8_0", jobs=0)
    assert job.Run(jobs=1).jobs == 1 and not (tmp_path / "out" / WORK).exists()
