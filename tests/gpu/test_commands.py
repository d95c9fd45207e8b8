"""Commands that use a GPU's kernels, which here Triton interprets on the CPU: the same results as without them."""

from __future__ import annotations

from pathlib import Path

import pytest
from layouts import make

import mixtools
from mixtools.inference import loading
from mixtools.inference.model import Mixtral
from mixtools.methods.quantize import stored
from mixtools.ops.gpu import able, encoding, launch

NANO = Path(__file__).resolve().parents[1] / "data" / "nano-mixtral"
DIMS = make.Dims(d=256, f=256, layers=1, heads=4, kv=1, hd=64, vocab=9, experts=2)


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_ROWS", dict.fromkeys(range(1, 9), 32))


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch):
    """Has a command run as on a machine without a GPU."""

    def run(command):
        with monkeypatch.context() as patch:
            for module in (able, loading.able):
                patch.setattr(module, "problem", lambda _: "not here")
            return command()

    return run


def test_quantize_to_gguf(tmp_path, monkeypatch, without_kernels):
    source = make.write_a(tmp_path / "dense", DIMS)
    types = ["Q4_K_M", "Q8_0", "Q5_1", "F16"]  # of Q5_1 there is no kernel
    without_kernels(lambda: mixtools.quantize(source, tmp_path / "cpu", type=types, name="small"))
    asked, plain = [], encoding.encode
    monkeypatch.setattr(encoding, "encode", lambda *given: asked.append(given[1].value) or plain(*given))
    mixtools.quantize(source, tmp_path / "card", type=types, name="small", jobs=1)
    assert {"Q4_K", "Q6_K", "Q8_0"} <= set(asked) <= {"Q4_K", "Q6_K", "Q8_0", "Q5_K"}
    for type in types:
        name = f"small.{type}.gguf"
        assert (tmp_path / "card" / name).read_bytes() == (tmp_path / "cpu" / name).read_bytes()


def test_a_cpu_that_was_asked_for_encodes(monkeypatch):
    monkeypatch.setattr(able, "problem", lambda _: pytest.fail("asked"))
    assert stored.encoder_on("cpu") is stored.encode


def test_generate(monkeypatch, without_kernels):
    loaded, plain = [], loading.PlanesMixtral.read
    monkeypatch.setattr(loading.PlanesMixtral, "read", lambda *one, **more: loaded.append(1) or plain(*one, **more))

    def told():
        return mixtools.generate(NANO, prompt="The", max_new_tokens=4, dtype="f32").text

    assert told() == without_kernels(told)
    assert loaded == [1]


def test_perplexity(tmp_path, without_kernels):
    """Of a GPTQ model, whose layers are run as they are stored."""
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 6, "utf-8")
    mixtools.quantize(NANO, tmp_path / "gptq", method="gptq", calibration=text, samples=1, seq_len=32, sweeps=0)

    def measured():
        return mixtools.perplexity(tmp_path / "gptq", text=text, ctx=48, max_tokens=48, dtype="f32").perplexity

    assert measured() == pytest.approx(without_kernels(measured), rel=1e-5)


def test_what_is_widened_is_told(tmp_path):
    mixtools.quantize(NANO, tmp_path / "gptq", method="gptq", bits=8, samples=1, seq_len=32, sweeps=0)
    told = mixtools.generate(tmp_path / "gptq", prompt="The", max_new_tokens=1)
    assert any("no kernel here multiplies them: gptq-8bit, 8 bits" in note for note in told.notes)
    assert not any("widened" in note for note in mixtools.generate(NANO, prompt="The", max_new_tokens=1).notes)


def test_the_kernels_are_for_those_who_can_run_them():
    import torch

    assert able.problem(torch.device("cpu")) is None  # in the interpreter
    assert "no kernels for mps" in str(able.problem(torch.device("mps")))
    assert isinstance(loading.load(mixtools.open(NANO)), Mixtral)
