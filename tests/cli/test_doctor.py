"""mixtools doctor: what this machine can do, and how fast."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from mixtools import rates
from mixtools.cli import doctor
from mixtools.cli.main import main
from mixtools.ops.gpu import able


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(["doctor", *arguments])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rates, "_SECONDS", 0.0)
    monkeypatch.setattr(rates, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(rates, "_BYTES", {"cpu": 1 << 16})


def test_nothing_is_measured_unless_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert "measured" not in json.loads(run(capsys, "--json"))
    assert "measured on" not in run(capsys)


def test_rates_of_this_machine(quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads(run(capsys, "--measure", "--json"))["measured"]["cpu"]
    assert told["copy_bytes_per_second"] > 0 and set(told["products_per_second"]) == {"float32", "bfloat16"}
    assert set(told["blocks_bytes_per_second"]) == {"Q8_0", "Q6_K", "Q4_K", "Q2_K"}
    assert all(rate > 0 for part in ("products_per_second", "blocks_bytes_per_second") for rate in told[part].values())
    lines = run(capsys, "--measure").splitlines()
    assert "measured on cpu" in lines and sum("GB/s of blocks" in line for line in lines) == 4


def test_work_is_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for whatever is asked."""
    monkeypatch.setattr(rates, "_best", lambda run, device: (run(), 1.0)[1])
    monkeypatch.setattr(rates, "_SIDE", {"cpu": 50})
    monkeypatch.setattr(rates, "_BYTES", {"cpu": 4000})
    told = rates.measure(torch.device("cpu"))
    assert told["copy_bytes_per_second"] == 8000 and told["products_per_second"]["float32"] == 2 * 50**3
    assert told["blocks_bytes_per_second"]["Q4_K"] == 14336 * 16 * 144


def test_a_card_without_kernels_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    told = able.remark(torch.device("cuda"))
    assert told is not None and told.endswith("widened to 16 bits: Triton is not installed: pip install triton")
    assert able.remark(torch.device("cpu")) is None
    monkeypatch.setattr(able, "problem", lambda _: None)
    assert able.remark(torch.device("cuda")) is None


@pytest.mark.parametrize(
    ("cuda", "there", "capability", "said"),
    [
        (None, False, None, "a build for CPUs alone"), ("12.8", False, None, "finds no card"),
        ("12.8", True, (7, 5), "Old is too old: compute capability 7.5, and bf16 needs 8.0"),
        ("12.8", True, (9, 0), None), ("12.8", True, None, "Triton is not installed: pip install triton"),
    ],
)  # fmt: skip
def test_why_no_card(monkeypatch: pytest.MonkeyPatch, cuda, there, capability, said) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(there))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old")
    told = doctor._gpu()
    can, found = told["kernels"], told["problems"]
    assert ({"Q4_K", "nf4"} <= set(can["products"]) and "Q6_K" in can["encoders"]) if said is None else can == {}
    assert found == [] if said is None else (len(found) == 1 and said in found[0])
