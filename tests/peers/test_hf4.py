"""transformers 4 on what we write: an expert's matrices are modules of their own, by the names that the Hub has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import made
from transformers import AutoModelForCausalLM

import mixtools
from mixtools.formats import Awq, Gptq, Int8, Nf4, PackedInts
from mixtools.storage.dtypes import DType

pytestmark = [
    pytest.mark.peers("hf4"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

PACKED = {
    "4 bits": PackedInts(4, 128),
    "4 bits, asymmetric": PackedInts(4, 128, symmetric=False),
    "4 bits, bf16": PackedInts(4, 128, dtype=DType.BF16),
    "8 bits, whole rows": PackedInts(8, -1),
    "2 bits, asymmetric, groups of 64": PackedInts(2, 64, symmetric=False),
}
# both multiply in fewer bits than 32: 4-bit weights in bf16, 8-bit ones with activations of 8 bits
NF4, INT8 = made.Arithmetic(1e-3, 3e-4), made.Arithmetic(2e-3, 1e-3)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model, and what transformers says of its keys."""
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype, device_map={"": "cpu"}
    )
    return model, {what: sorted(keys) for what, keys in told.items() if keys}


def test_a_dense_folder(texts: list[list[int]], tmp_path: Path) -> None:
    mixtools.convert(made.NANO, tmp_path / "out")
    model, told = load(tmp_path / "out")
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(tmp_path / "out", texts), made.FP32)


@pytest.mark.parametrize("format", PACKED.values(), ids=PACKED)
def test_packed_integers(format: PackedInts, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    model, told = load(folder)
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), made.FP32)


COMMANDS = {
    "gptq": ({"method": "gptq", "format": "compressed-tensors"}, made.FP32),
    "awq": ({"method": "awq", "format": "compressed-tensors"}, made.FP32),
    "nf4": ({"method": "nf4"}, NF4),
    "int8": ({"method": "int8"}, INT8),
}


@pytest.mark.parametrize(("options", "how"), COMMANDS.values(), ids=COMMANDS)
def test_what_the_command_writes(
    options: dict[str, str], how: made.Arithmetic, texts: list[list[int]], tmp_path: Path
) -> None:
    folder = made.quantized(tmp_path / "out", **options)
    model, told = load(folder, torch.float16 if options["method"] == "int8" else torch.float32)
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), how)


def test_a_model_with_the_real_vocabulary(tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", PackedInts(4, 128), source=made.random(tmp_path / "source"))
    model, told = load(folder)
    assert told == {}
    made.expect_equal(made.theirs(model, made.RANDOM_TEXTS), made.ours(folder, made.RANDOM_TEXTS), made.FP32)


@pytest.mark.parametrize("double", [False, True])
def test_nf4(double: bool, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Nf4(double=double))
    model, told = load(folder)
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), NF4)


def test_int8(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Int8())
    model, told = load(folder, torch.float16)
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), INT8)


# --- what it does not load ---

FORMATS = {"compressed-tensors": PackedInts(4, 128), "nf4": Nf4(), "int8": Int8()}


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_v5_names_are_refused(format: PackedInts | Nf4 | Int8, tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="has no attribute|is neither a parameter"):
        load(made.packed(tmp_path / "out", format, names="v5"), torch.float16)


def test_three_bits_lay_otherwise_in_its_compressed_tensors(tmp_path: Path) -> None:
    """0.17 puts ten codes of 3 bits in a word, 0.19 packs them densely; by 0.19 transformers 4 reads no zeros."""
    with pytest.raises(RuntimeError, match=r"size mismatch for weight_packed.*\[256, 24\].*\[256, 26\]"):
        load(made.packed(tmp_path / "out", PackedInts(3, 64)))


def test_gptq_needs_another_package(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="requires optimum"):
        load(made.packed(tmp_path / "out", Gptq(4, 128)))


def test_awq_needs_another_package(tmp_path: Path) -> None:
    with pytest.raises((ImportError, ValueError), match="autoawq"):
        load(made.packed(tmp_path / "out", Awq(128)))
