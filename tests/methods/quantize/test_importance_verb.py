"""mixtools imatrix as users and scripts meet it, on nano."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mixtools
from mixtools import errors
from mixtools.cli.main import main
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.machine import peak_memory
from mixtools.methods.quantize import imatrix as module
from mixtools.methods.quantize.imatrix import FEW_TOKENS, Collected, imatrix
from mixtools.methods.quantize.importance import encode, read
from mixtools.storage import disk
from mixtools.text.tokenizer import Tokenizer
from mixtools.verbs import Forecast

TESTS = Path(__file__).parents[2]
NANO, TEXT = TESTS / "data" / "nano-mixtral", TESTS / "data" / "text.txt"
GOLDEN = json.loads((TESTS / "golden" / "imatrix-nano.json").read_text("utf-8"))


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["imatrix", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    code, out, err = run(capsys, *arguments, "--json", "--quiet")
    assert (code, err) == (0, ""), out + err
    found: dict[str, Any] = json.loads(out)
    return found


def test_the_command_in_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nano.gguf"
    told = document(capsys, NANO, out, "--text", TEXT, "--ctx", 128, "--process-output")
    found = read(out)
    assert [*tmp_path.iterdir()] == [out] and out.stat().st_size == told["bytes"]
    assert (found.datasets, found.chunks, found.chunk_size) == (("text.txt",), 12, 128)
    for name, golden in GOLDEN["entries"].items():
        np.testing.assert_array_equal(found.counts[name], golden["counts"])
        np.testing.assert_allclose(found.sums[name].sum(1), golden["totals"], rtol=1e-4)
    assert told["output"] == str(out) and told["datasets"] == ["text.txt"] and told["entries"] == 17
    assert (told["chunks"], told["chunk_size"], told["tokens"]) == (12, 128, 12 * 128)
    for layer, row in enumerate(told["layers"]):
        counts = GOLDEN["entries"][f"blk.{layer}.ffn_gate_exps.weight"]["counts"]
        assert (row["layer"], row["experts"]) == (layer, counts)
        assert (row["min"], row["median"], row["max"]) == (min(counts), np.median(counts), max(counts))
    starved = [(layer, expert, count) for layer in (0, 1)
               for expert, count in enumerate(GOLDEN["entries"][f"blk.{layer}.ffn_gate_exps.weight"]["counts"])
               if count < 128]  # fmt: skip
    assert [tuple(one.values()) for one in told["starved"]] == starved and starved
    assert told["starved_below"] == FEW_TOKENS == 128 and told["remarks"] == []
    assert 0 < told["seconds"] < 100 and 10**7 < told["peak_memory_bytes"] <= peak_memory()


def test_twice_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        made = imatrix(NANO, tmp_path / f"{name}.gguf", text=TEXT, ctx=64, chunks=5)
        assert isinstance(made, Collected) and (made.chunks, made.chunk_size) == (5, 64)
    data = (tmp_path / "a.gguf").read_bytes()
    assert (tmp_path / "b.gguf").read_bytes() == data == encode(read(tmp_path / "a.gguf"))
    assert "output.weight" not in read(tmp_path / "a.gguf").sums


def test_what_people_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nano.gguf"
    code, said, err = run(capsys, NANO, out, "--text", TEXT, "--ctx", 64, "--chunks", 100, "--quiet")
    assert (code, err) == (0, "")
    lines = said.splitlines()
    assert lines[0].split() == ["layer", "tokens", "per", "expert:", "least", "median", "most"]
    counts = read(out).counts["blk.1.ffn_gate_exps.weight"]
    assert lines[2].replace(",", "").split() == [
        "1", f"{counts.min():.0f}", f"{np.median(counts):.10g}", f"{counts.max():.0f}"
    ]  # fmt: skip
    few = [f"layer 1 expert {expert} ({count:.0f})" for expert, count in enumerate(counts) if count < 128]
    assert lines[3].startswith("starved: ") and "experts saw fewer than 128 tokens: layer 1 expert" in lines[3]
    assert all(one in lines[3] for one in few) and few
    assert lines[4] == "note: the text fills 25 chunks, not 100"
    assert lines[5].startswith(f"wrote {out}: 16 entries, ")
    assert lines[5].endswith(" from 25 chunks of 64 tokens of text.txt")
    assert lines[7] == f"Use it with: mixtools quantize {NANO} OUT --method gguf --type Q4_K_M --imatrix {out}"


def made_up(*experts: int) -> Collected:
    layers = (module.Visited(3, experts),)
    return Collected(Path("o.gguf"), "m", 9, ("t",), 1, 512, 8, layers, 1.0, 10, ())


def test_experts_without_a_token_are_told_apart() -> None:
    told = str(made_up(0, 127, 128, 500))
    assert "starved: 1 expert saw no token, so that all its columns weigh the same: layer 3 expert 0 (0);" in told
    assert "starved: 1 expert saw fewer than 128 tokens: layer 3 expert 1 (127);" in told
    assert "starved" not in str(made_up(128, 129)) and "1,000" in str(made_up(1000, 1000))
    many = str(made_up(*range(1, 21)))
    assert "expert 11 (12) and 8 more, which --json lists;" in many and "expert 12" not in many


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nano.gguf"
    told = document(capsys, NANO, out, "--text", TEXT, "--ctx", 128, "--dry-run")
    assert not any(tmp_path.iterdir())
    assert told["dry_run"] is True and (told["chunks"], told["chunk_size"], told["tokens"]) == (12, 128, 1536)
    assert told["layers"] == 2 and told["seconds"] >= 0 and told["peak_memory_bytes"] > 10**7
    forecast = imatrix(NANO, out, text=TEXT, ctx=128, dry_run=True)
    assert isinstance(forecast, Forecast) and "would send 12 chunks of 128 tokens through 2 layers" in str(forecast)
    made = imatrix(NANO, out, text=TEXT, ctx=128)
    assert forecast.bytes == told["bytes"] == out.stat().st_size and isinstance(made, Collected)


def test_options_change_what_they_say(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("<s>[INST] Hello </s> there, " * 40 + "\n", "utf-8")
    plain, special = tmp_path / "plain.gguf", tmp_path / "special.gguf"
    a = imatrix(NANO, plain, text=text, ctx=16)
    b = imatrix(NANO, special, text=text, ctx=16, parse_special=True)
    assert isinstance(a, Collected) and isinstance(b, Collected) and b.chunks < a.chunks
    half = imatrix(NANO, tmp_path / "half.gguf", text=text, ctx=16, dtype="auto")
    assert isinstance(half, Collected)
    name = "blk.1.attn_q.weight"
    sums, stored = read(plain).sums[name], read(tmp_path / "half.gguf").sums[name]
    assert not np.array_equal(sums, stored)
    np.testing.assert_allclose(stored, sums, rtol=0.05)


def test_a_last_line_end_is_left_out_as_llama_imatrix_does(tmp_path: Path) -> None:
    text, out = "Hello there" * 30, tmp_path / "o.gguf"
    length = len(Tokenizer.from_folder(NANO).encode(text))
    for name, end in (("one", "\n"), ("two", "\n\n"), ("crlf", "\r\n")):
        (tmp_path / f"{name}.txt").write_text(text + end, "utf-8", newline="")
    made = imatrix(NANO, out, text=tmp_path / "one.txt", ctx=length)
    assert isinstance(made, Collected) and made.chunks == 1 and made.remarks == ()
    with pytest.raises(errors.InputError, match=f"the text has {length} tokens, fewer than one window"):
        imatrix(NANO, out, text=tmp_path / "one.txt", ctx=length + 1, overwrite=True)
    more = imatrix(NANO, out, text=tmp_path / "two.txt", ctx=length + 1, overwrite=True)
    assert isinstance(more, Collected) and more.chunks == 1
    crlf = imatrix(NANO, tmp_path / "crlf.gguf", text=tmp_path / "crlf.txt", ctx=8)
    assert isinstance(crlf, Collected) and "CRLF" in crlf.remarks[0]


# --- what is in the way ---


def test_a_matrix_is_replaced_only_if_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "nano.gguf"
    imatrix(NANO, out, text=TEXT, ctx=64, chunks=2)
    old = out.read_bytes()
    code, said, err = run(capsys, NANO, out, "--text", TEXT, "--ctx", 64, "--chunks", 3, "--quiet")
    assert (code, said) == (8, "") and err == f"error: {out}: is there already; --overwrite replaces it\n"
    assert out.read_bytes() == old
    document(capsys, NANO, out, "--text", TEXT, "--ctx", 64, "--chunks", 3, "--overwrite")
    assert read(out).chunks == 3


@pytest.mark.parametrize("overwrite", [False, True])
def test_nothing_else_is_replaced(tmp_path: Path, overwrite: bool) -> None:
    folder, model, link = tmp_path / "folder.gguf", tmp_path / "model.gguf", tmp_path / "link.gguf"
    folder.mkdir()
    model.write_bytes(b"GGUF" + bytes(100))
    link.symlink_to(tmp_path / "nowhere")
    other = tmp_path / "other.gguf"
    other.symlink_to(TESTS / "golden" / "imatrix-tiny.gguf")
    for out, why in ((folder, "is there already, and no file"), (model, "no importance matrix; --overwrite leaves"),
                     (link, "is there already, and no file"), (other, "is there already, and no file")):  # fmt: skip
        with pytest.raises(errors.OutputExists, match=why) as caught:
            imatrix(NANO, out, text=TEXT, overwrite=overwrite)
        assert caught.value.file == str(out)
    assert model.read_bytes() == b"GGUF" + bytes(100) and {*tmp_path.iterdir()} == {folder, model, link, other}


def test_an_output_that_cannot_be_is_told_before_anything_is_read(tmp_path: Path) -> None:
    cases: list[tuple[type[errors.MixtoolsError], str, Path, dict[str, Any]]] = [
        (errors.UsageError, "let it end in .gguf", tmp_path / "imatrix.dat", {}),
        (errors.UsageError, "--device: 'gpu' is none of", tmp_path / "o.gguf", {"device": "gpu"}),
        (errors.UsageError, "--dtype: 'fp8' is none of auto, bf16", tmp_path / "o.gguf", {"dtype": "fp8"}),
        (errors.UsageError, "--chunks -1: take at least one", tmp_path / "o.gguf", {"chunks": -1}),
        (errors.UsageError, "'much' is not a size", tmp_path / "o.gguf", {"max_memory": "much"}),
        (errors.OutputError, "its folder is not there", tmp_path / "none" / "o.gguf", {}),
        (errors.OutputError, "cannot be written", tmp_path / ("o" * 249 + ".gguf"), {}),
    ]
    for kind, message, out, options in cases:
        with pytest.raises(kind) as caught:
            imatrix(tmp_path / "no model", out, text=tmp_path / "no text", **options)
        assert message in str(caught.value), str(caught.value)
    assert not any(tmp_path.iterdir())


def test_no_text_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, NANO, tmp_path / "o.gguf")
    assert code == 2 and "--text" in err
    (tmp_path / "short.txt").write_text("Hello", "utf-8")
    code, _, err = run(capsys, NANO, tmp_path / "o.gguf", "--text", tmp_path / "short.txt")
    assert code == 3 and "fewer than one window of 512" in err
    for option in ("--ctx", "--chunks"):
        assert run(capsys, NANO, tmp_path / "o.gguf", "--text", TEXT, option, 0)[0] == 2


def test_ids_without_a_row_and_damaged_files_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[Path] = []  # what judges the checksums of files that were read in part
    monkeypatch.setattr(Checkpoint, "finish", lambda checkpoint: finished.append(checkpoint.folder))
    imatrix(NANO, tmp_path / "o.gguf", text=TEXT, ctx=64, chunks=1)
    assert finished == [NANO]
    plain = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda *given, **how: [*plain(*given, **how)[:10], 5000] * 10)
    with pytest.raises(errors.TokenizerError, match="has the id 5000, and the model has 2048 rows"):
        imatrix(NANO, tmp_path / "p.gguf", text=TEXT, ctx=64)


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = disk.write_durably

    def full(path: Path, data: bytes) -> None:
        plain(path, data[:100])
        if data:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(disk, "write_durably", full)
    with pytest.raises(errors.DiskError, match="the disk is full"):
        imatrix(NANO, tmp_path / "o.gguf", text=TEXT, ctx=64, chunks=2)
    assert not any(tmp_path.iterdir())


def test_an_interrupted_run_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "o.gguf"
    imatrix(NANO, out, text=TEXT, ctx=64, chunks=2)
    old = out.read_bytes()

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(KeyboardInterrupt):
        imatrix(NANO, out, text=TEXT, ctx=64, chunks=3, overwrite=True)
    assert out.read_bytes() == old and [*tmp_path.iterdir()] == [out]


def test_too_little_memory_is_told(tmp_path: Path) -> None:
    with pytest.raises(errors.MemoryBudgetError):
        imatrix(NANO, tmp_path / "o.gguf", text=TEXT, max_memory=peak_memory() + 1_000_000)


def test_a_forecast_of_memory_holds(tmp_path: Path) -> None:
    """In a process of its own, and with no more memory than was told."""
    code = (
        "import sys, mixtools\n"
        "text = dict(text=sys.argv[3], ctx=256)\n"
        "told = mixtools.imatrix(*sys.argv[1:3], **text, dry_run=True)\n"
        "done = mixtools.imatrix(*sys.argv[1:3], **text, max_memory=told.peak_memory_bytes)\n"
        "print(told.peak_memory_bytes, done.peak_memory_bytes)"
    )
    call = [sys.executable, "-c", code, str(NANO), str(tmp_path / "o.gguf"), str(TEXT)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    told, peak = map(int, done.stdout.split())
    assert peak <= told <= 3 * peak


def test_a_gguf_file_is_a_model_too(tmp_path: Path) -> None:
    """Its tokenizer and its rows of q and k, which lie otherwise, come out as those of the folder it was made from."""
    mixtools.quantize(NANO, tmp_path / "nano.gguf", method="gguf", type=["F32"])
    opened = mixtools.open(tmp_path / "nano.gguf")
    for name, model in (("a", NANO), ("b", opened)):
        imatrix(model, tmp_path / f"{name}.imatrix.gguf", text=TEXT, ctx=64, chunks=4)
    assert (tmp_path / "a.imatrix.gguf").read_bytes() == (tmp_path / "b.imatrix.gguf").read_bytes()


def test_it_is_the_function_of_the_package() -> None:
    assert mixtools.imatrix is imatrix and "imatrix" in dir(mixtools)
