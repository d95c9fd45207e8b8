"""mixtools.quantize over a text: what it writes, how well, killed and continued, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from converting import environment
from layouts import make
from quantizing import command

import mixtools
from mixtools import errors
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import passage
from mixtools.methods.quantize.results import Planned, Quantized
from mixtools.names import Role, Slot
from mixtools.storage import output as storage_output

DATA = Path(__file__).parents[2] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
SMALL: dict[str, Any] = {"calibration": TEXT, "samples": 8, "seq_len": 64}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "gptq-3": {"method": "gptq", "bits": 3, "group_size": 32},
    "awq": {"method": "awq"},
    "nearest": {"method": "awq", "rounding": "nearest"},
    "asym-gptq": {"method": "awq", "format": "auto-gptq", "group_size": -1},
    "compressed": {"method": "awq", "format": "compressed-tensors", "expert_names": "v5"},
    "compressed-8": {"method": "gptq", "format": "compressed-tensors", "bits": 8},
    "nf4": {"method": "nf4"},
    "int8": {"method": "int8"},
    "blocks": {"method": "gptq", "hessian_block": 256, "sweeps": 0},
    "gguf": {"method": "gguf", "type": ["Q4_K_M"]},
    "gguf-2": {"method": "gguf", "type": ["Q2_K_S"], "smooth": "off"},  # llama.cpp makes it with an imatrix alone
    "iq4": {"method": "gguf", "type": ["IQ4_XS"], "hessian_block": 256},
}


def quantize(out: Path, source: Path = NANO, **options: Any) -> Quantized:
    done = mixtools.quantize(source, out, **{**SMALL, **options})
    assert isinstance(done, Quantized)
    return done


def model(done: Quantized) -> Path:
    return done.output if done.folder else done.output / done.rows[0].file


def kld(done: Quantized, source: Path = NANO) -> float:
    checked = mixtools.check(model(done), source, text=TEXT, ctx=128, new_tokens=0)
    assert checked.verdict in ("passed", "intact") or checked.document["gates"], checked.document
    assert not checked.document["integrity"]["problems"]
    assert all(found["expected"] for found in checked.document["configuration"]["differences"])
    return float(checked.document["kld"]["mean"])


@pytest.mark.parametrize("name", KINDS)
def test_it_is_whole_and_near_its_source(tmp_path: Path, name: str) -> None:
    done = quantize(tmp_path / "out", **KINDS[name])
    limit = {"gptq-3": 0.1, "gguf-2": 0.2, "int8": 0.002, "compressed-8": 0.002}.get(name, 0.03)
    assert kld(done) < limit
    checkpoint = open_checkpoint(model(done))
    assert checkpoint.quantization is not None
    assert not checkpoint.problems


def test_second_order_is_better_than_nearest(tmp_path: Path) -> None:
    lost = {how: kld(quantize(tmp_path / how, method="gptq", rounding=how)) for how in ("nearest", "second-order")}
    assert lost["second-order"] < 0.85 * lost["nearest"]


def test_gguf_without_a_text_is_still_ggmls_bytes(tmp_path: Path) -> None:
    mixtools.quantize(NANO, tmp_path / "plain", type=["Q4_K_M"], name="x")
    quantize(tmp_path / "text", type=["Q4_K_M"], name="x", method="gguf")
    plain, text = (open_checkpoint(tmp_path / which / "x.Q4_K_M.gguf") for which in ("plain", "text"))
    assert {n: e.dtype for n, e in plain.store.entries.items()} | {} != {}
    assert [*plain.store.entries] == [*text.store.entries]
    golden = json.loads((Path(__file__).parents[2] / "golden" / "quantized-nano.json").read_text())
    assert golden, "other tests hold the plain bytes against ggml's"
    assert torch.equal(plain.read(Slot(Role.EMBED)), text.read(Slot(Role.EMBED)))
    assert not torch.equal(plain.read(Slot(Role.DOWN, 0, 0)), text.read(Slot(Role.DOWN, 0, 0)))


def test_what_is_not_quantized_is_fp16_in_the_packages_formats(tmp_path: Path) -> None:
    source = open_checkpoint(NANO)
    for kind, dtype in (("gptq", torch.float16), ("awq", torch.float16), ("compressed", torch.bfloat16)):
        made = open_checkpoint(model(quantize(tmp_path / kind, **KINDS[kind])))
        for slot in (Slot(Role.EMBED), Slot(Role.HEAD), Slot(Role.NORM), Slot(Role.ROUTER, 0), Slot(Role.FFN_NORM, 1)):
            assert made.read(slot).dtype == dtype, slot
        assert torch.equal(made.read(Slot(Role.EMBED)).float(), source.read(Slot(Role.EMBED)).to(dtype).float())


def test_the_default_text(tmp_path: Path) -> None:
    done = mixtools.quantize(NANO, tmp_path / "out", method="gptq", samples=4, seq_len=64)
    assert isinstance(done, Quantized)
    told = json.loads((tmp_path / "out" / "mixtools.json").read_text())["gptq"]
    assert told["calibration"]["samples"] == 4 and told["bits"] == 4
    assert kld(done) < 0.03


# --- killed ---


class KilledError(BaseException):
    pass


def dies(patch: pytest.MonkeyPatch, at: int) -> None:
    """Before the `at`-th region, note or file of states is written."""
    count = 0

    def dying(real: Any) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise KilledError
            return real(*arguments, **named)

        return wrapped

    for owner, name in (
        (storage_output.Output, "wrote"), (storage_output.Output, "note"), (passage.Passage, "_keep"),
    ):  # fmt: skip
        patch.setattr(owner, name, dying(getattr(owner, name)))


def weights(folder: Path) -> dict[str, str]:
    """The report tells of times, and is no part of the promise."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return {
        n: hashlib.sha256(data).hexdigest() for n, data in files.items() if "report" not in n and n != "mixtools.json"
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = make.Dims(d=64, f=64, layers=3, heads=2, kv=1, hd=32, vocab=2048, experts=3)
    folder = make.write_a(tmp_path_factory.mktemp("small") / "small", dims)
    (folder / "tokenizer.model").write_bytes((NANO / "tokenizer.model").read_bytes())
    return folder


@pytest.mark.parametrize("kind", ["gptq", "gguf"])
def test_killed_anywhere_it_ends_the_same(
    tmp_path: Path, small: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {
        "gptq": {"method": "gptq", "group_size": 32}, "gguf": {"method": "gguf", "type": "Q4_0", "name": "x"},
    }[kind]  # fmt: skip
    quantize(tmp_path / "whole", small, **options)
    whole, points = weights(tmp_path / "whole"), 0
    for at in range(1, 1000, 7):
        out = tmp_path / f"out{at}"
        with monkeypatch.context() as patch:
            dies(patch, at)
            try:
                quantize(out, small, **options, jobs=1)
            except KilledError:
                points += 1
            else:
                break
        assert not weights(out).keys() & whole.keys() if out.exists() else True
        done = quantize(out, small, **options, jobs=3)
        assert weights(out) == whole, f"killed before {at}"
        assert (done.resumed_bytes > 0) is (at > 2)
        assert not [path for path in out.iterdir() if path.name.startswith(".mixtools")]
    assert points > 6


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("layer", ["0", "2"])
def test_killed_as_a_layer_is_told_of(
    tmp_path: Path, small: Path, layer: str, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run comes back to the last one once it is written: what is told of it must be there by then."""
    options: dict[str, Any] = {"method": "gptq", "group_size": 32}
    tell, calls = passage.Passage._tell, []

    def dying(self: passage.Passage, name: str, work: Any) -> None:
        calls.append(name)
        if calls.count(layer) == call:
            raise KilledError
        tell(self, name, work)

    with monkeypatch.context() as patch:
        patch.setattr(passage.Passage, "_tell", dying)
        with pytest.raises(KilledError):
            quantize(tmp_path / "out", small, **options)
    quantize(tmp_path / "out", small, **options)
    report = json.loads((tmp_path / "out" / "quantize-report.json").read_text("utf-8"))
    assert {row["layer"] for row in report["matrices"]} == {0, 1, 2}


def test_killed_for_good(tmp_path: Path) -> None:
    """By SIGKILL, before changes to the disk: nothing in the process has a say."""
    script = Path(__file__).parent / "killed_calibrated.py"
    tests = Path(__file__).parents[2]
    paths = os.pathsep.join(map(str, (tests.parent, tests, tests / "storage")))
    result = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, check=False,
        env=environment(OMP_NUM_THREADS="1", PYTHONPATH=paths),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 12


def test_a_run_that_goes_on_does_not_begin_anew(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last states are there: layers before them are not run again, but where they were damaged."""
    options: dict[str, Any] = {"method": "gptq", "group_size": 32}
    quantize(tmp_path / "whole", small, **options)
    ran: list[int] = []
    quantized = passage.Passage._quantized

    def watched(self: passage.Passage, index: int, states: Any, **how: Any) -> Any:
        ran.append(index)
        if len(ran) == 3:
            raise KilledError
        return quantized(self, index, states, **how)

    for damaged, expected in ((False, [2]), (True, [0, 1, 2])):
        out = tmp_path / f"out{damaged}"
        ran.clear()
        with monkeypatch.context() as patch:
            patch.setattr(passage.Passage, "_quantized", watched)
            with pytest.raises(KilledError):
                quantize(out, small, **options)
        assert ran == [0, 1, 2]
        (states,) = (out / ".mixtools").glob("states.*")
        assert states.name == "states.2"
        if damaged:
            data = bytearray(states.read_bytes())
            data[100] ^= 1
            assert zlib.crc32(data)
            states.write_bytes(data)
        ran[:] = []

        def seen(self: passage.Passage, index: int, states: Any, **how: Any) -> Any:
            ran.append(index)
            return quantized(self, index, states, **how)

        with monkeypatch.context() as patch:
            patch.setattr(passage.Passage, "_quantized", seen)
            quantize(out, small, **options)
        assert ran == expected
        assert weights(out) == weights(tmp_path / "whole")


def test_another_text_continues_nothing(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"method": "gptq", "group_size": 32}
    with monkeypatch.context() as patch:
        dies(patch, 30)
        with pytest.raises(KilledError):
            quantize(tmp_path / "out", small, **options)
    with pytest.raises(errors.OutputExists, match="interrupted run that differs in gptq"):
        quantize(tmp_path / "out", small, **options, seed=3)


def test_a_full_disk_loses_nothing(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"method": "gptq", "group_size": 32}
    quantize(tmp_path / "whole", small, **options)
    fsync, count = os.fsync, 0

    def full(file: int) -> None:
        nonlocal count
        count += 1
        if count == 1:
            raise OSError(28, "No space left on device")
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(passage.os, "fsync", full)
        with pytest.raises(errors.DiskError, match="disk is full"):
            quantize(tmp_path / "out", small, **options)
    assert quantize(tmp_path / "out", small, **options).resumed_bytes > 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")


# --- refused ---


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"method": "gptq", "bits": 5}, "there it has 2, 3, 4, 8 bits"),
        ({"method": "awq", "bits": 8}, "--format autoawq --bits 8"),
        ({"method": "awq", "group_size": 100}, "--group-size 100: there is -1, 32, 64, 128"),
        ({"method": "nf4", "group_size": 64}, "has groups of its own"),
        ({"method": "gptq", "format": "autoawq"}, "it is stored as auto-gptq or compressed-tensors"),
        ({"method": "gptq", "type": ["Q4_K_M"]}, "--type does not go with --method gptq"),
        ({"method": "gptq", "imatrix": "x"}, "--imatrix does not go with --method gptq"),
        ({"method": "gguf", "type": ["Q4_K_M"], "bits": 4}, "--bits does not go with --method gguf"),
        ({"method": "gguf", "type": ["Q4_K_M"], "imatrix": TEXT}, "give one of the two"),
        ({"method": "gguf", "type": ["F16"]}, "would be F16, which is not rounded here"),
        ({"method": "gptq", "rounding": "up"}, "--rounding up: there is second-order, nearest"),
        ({"method": "int8", "hessian_block": 256}, "not for int8"),
        ({"method": "gptq", "hessian_block": 256, "group_size": -1}, "a row is one group"),
        ({"method": "gptq", "hessian_block": 300}, "a multiple of 256"),
        ({"method": "gptq", "samples": 0}, "0 samples"),
        ({"method": "gptq", "sampling": "often"}, "not one of spread"),
        ({"method": "gptq", "backend": "autoawq"}, "quantizes by --method awq"),
        ({"method": "gptq", "make_backend": True}, "name one"),
        ({"method": "exl2"}, "there is gguf, gptq, awq, nf4, int8"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(tmp_path: Path, options: dict[str, Any], why: str) -> None:
    with pytest.raises(errors.UsageError, match=why):
        quantize(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit(tmp_path: Path, small: Path) -> None:
    with pytest.raises(errors.UsageError, match="hidden size of 64 is no multiple of --group-size 128"):
        quantize(tmp_path / "out", small, method="gptq")
    dims = make.Dims(d=32, f=32, layers=1, heads=2, kv=1, hd=16, vocab=2048, experts=2)
    odd = make.write_a(tmp_path / "odd", dims)
    with pytest.raises(errors.UsageError, match="key heads' width of 16 is no multiple of 32, as --format auto-gptq"):
        quantize(tmp_path / "out", odd, method="gptq", group_size=32)
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_too_short(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("two words")
    with pytest.raises(errors.InputError, match=r"fewer than one sample of 64; --seq-len .* would fit"):
        quantize(tmp_path / "out", method="gptq", calibration=short)
    with pytest.raises(errors.InputError, match=r"missing\.txt: cannot be read \(No such file"):
        quantize(tmp_path / "out", method="gptq", calibration=tmp_path / "missing.txt")


def test_weights_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    dims = make.Dims(d=64, f=64, layers=2, heads=2, kv=1, hd=32, vocab=2048, experts=3)
    tensors = make.torrent(dims)
    tensors["layers.1.feed_forward.experts.2.w3.weight"][3, 4] = float("nan")
    folder = make.write_c(tmp_path / "bad", dims, tensors)
    (folder / "tokenizer.model").write_bytes((NANO / "tokenizer.model").read_bytes())
    with pytest.raises(errors.TensorError, match=r"holds nan at \[3, 4\]") as caught:
        quantize(tmp_path / "out", folder, method="gptq", group_size=32)
    assert caught.value.tensor == "layers.1.feed_forward.experts.2.w3.weight"


def test_a_quantized_source(tmp_path: Path) -> None:
    once = quantize(tmp_path / "once", method="gptq")
    with pytest.raises(errors.QuantizedError, match="convert\n? ?to-hf"):
        quantize(tmp_path / "twice", model(once), method="awq")
    again = quantize(tmp_path / "twice", model(once), method="awq", requantize=True)
    assert kld(again) < 0.06


# --- told ---


def test_a_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = mixtools.quantize(NANO, tmp_path / "out", method="gptq", **SMALL, dry_run=True)
    assert isinstance(told, Planned) and not (tmp_path / "out").exists()
    done = quantize(tmp_path / "out", method="gptq")
    assert told.rows == done.rows and told.document["files"] == done.document["files"]
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) == told.rows[0].bytes
    assert told.peak_memory_bytes > 0 and told.seconds is not None
    code, document = command(
        capsys, NANO, tmp_path / "x", "--method", "gguf", "--type", "Q4_K_M", "--type", "Q2_K", "--calibration", TEXT,
        "--samples", 4, "--seq-len", 64, "--dry-run",
    )  # fmt: skip
    assert code == 0 and any("one pass over the text for each of 2 types" in note for note in document["notes"])


def test_too_little_memory(tmp_path: Path) -> None:
    with pytest.raises(errors.MemoryBudgetError, match="one layer and its Hessians"):
        quantize(tmp_path / "out", method="gptq", max_memory="100MB")
    spilled = quantize(tmp_path / "spilled", method="gptq", max_memory="435MB")
    quantize(tmp_path / "memory", method="gptq")
    assert weights(spilled.output) == weights(tmp_path / "memory")


@pytest.mark.parametrize(("text", "why"), [("default", None), ("missing.txt", "missing.txt does not exist")])
def test_a_recipe_takes_the_text_that_comes_along(tmp_path: Path, text: str, why: str | None) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: q\ndescription: q\nsteps:\n- do: quantize\n  src: {NANO}\n  out: {tmp_path / 'out'}\n  method: gptq\n"
        f"  calibration: {text}\n  samples: 4\n  seq_len: 64\n"
    )
    if why is not None:
        with pytest.raises(errors.RecipeError, match=why):
            mixtools.run_recipe(recipe)
        return
    mixtools.run_recipe(recipe)
    assert (tmp_path / "out" / "quantize-report.html").is_file()
