"""vLLM on a CPU, on what we write: it runs by legacy names alone, and of packed weights those of 4 bits and symmetric.

It multiplies in bf16, and with AMD's kernels packed weights with activations of 8 bits: logits of packed folders are
near ours, not equal. What it makes of packed weights on a graphics card is not tested here.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from peers import made, served

import mixtools
from mixtools.api.converting import expert_names
from mixtools.formats import Awq, Gptq, Nf4, PackedInts

pytestmark = pytest.mark.peers("vllm")


class Near(NamedTuple):
    """`same_top`: share of tokens with the same likeliest one; `apart`: mean distance of log-probabilities."""

    same_top: float
    apart: float


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


def near(folder: Path, texts: list[list[int]], work: Path) -> Near:
    found = served.served(folder, texts, work)
    ours = made.ours(folder, texts).log_softmax(-1).view(len(texts), len(texts[0]), -1)[:, :-1]
    top, told = torch.tensor(found.top), torch.tensor(found.logprobs)
    text = torch.tensor(texts)[:, 1:, None]
    return Near(
        float((ours.argmax(-1) == top).float().mean()), float((ours.gather(-1, text)[..., 0] - told).abs().mean())
    )


def test_a_dense_folder(texts: list[list[int]], tmp_path: Path) -> None:
    mixtools.convert(made.NANO, tmp_path / "out")
    found = near(tmp_path / "out", texts, tmp_path)
    assert found.same_top >= 0.985 and found.apart < 0.02, found


@pytest.mark.parametrize("format", [Gptq(4, 128), PackedInts(4, 128)], ids=["auto-gptq", "compressed-tensors"])
def test_symmetric_weights_of_4_bits(format: Gptq | PackedInts, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    found = near(folder, texts, tmp_path)
    assert found.same_top >= 0.95 and found.apart < 0.05, found
    # nearer to our reading of the folder than the source is
    there = made.ours(folder, texts)
    assert made.beside(made.ours(made.NANO, texts), there).same_top < found.same_top


@pytest.mark.parametrize("format", ["auto-gptq", "compressed-tensors"])
def test_what_the_command_writes(format: str, texts: list[list[int]], tmp_path: Path) -> None:
    found = near(made.quantized(tmp_path / "out", method="gptq", format=format), texts, tmp_path)
    assert found.same_top >= 0.95 and found.apart < 0.05, found


# --- what it does not load ---

REFUSED = {
    "auto-gptq, asymmetric": (Gptq(4, 128, symmetric=False), "validation error for VllmConfig"),
    "auto-gptq, 8 bits": (Gptq(8, 128), "does not support weight_bits = uint8b128"),
    "autoawq": (Awq(128), "No WNA16 MoE backend"),
    "compressed-tensors, asymmetric": (PackedInts(4, 128, symmetric=False), "No WNA16 MoE backend"),
    "nf4": (Nf4(), "validation error for ModelConfig"),
}


@pytest.mark.parametrize(("format", "why"), REFUSED.values(), ids=REFUSED)
def test_what_it_has_no_kernel_for_here(
    format: Gptq | Awq | PackedInts | Nf4, why: str, texts: list[list[int]], tmp_path: Path
) -> None:
    with pytest.raises(served.RefusedError, match=why):
        served.served(made.packed(tmp_path / "out", format), texts[:1], tmp_path)


def test_v5_names_of_packed_weights_are_refused(texts: list[list[int]], tmp_path: Path) -> None:
    with pytest.raises(served.RefusedError, match=r"w13_qzeros"):
        served.served(made.packed(tmp_path / "out", Gptq(4, 128), names="v5"), texts[:1], tmp_path)


def test_v5_names_of_dense_weights_are_refused(texts: list[list[int]], tmp_path: Path) -> None:
    mixtools.convert(made.NANO, tmp_path / "legacy")
    expert_names(tmp_path / "legacy", tmp_path / "out", to="v5")
    with pytest.raises(served.RefusedError):
        served.served(tmp_path / "out", texts[:1], tmp_path)
