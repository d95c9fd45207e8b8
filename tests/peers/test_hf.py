"""transformers 5 on what we write: a Mixtral's experts are one tensor there, and what is packed by expert has to be
gathered. It tells of keys that found no place, or of places that found no key, and goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import made
from transformers import AutoModelForCausalLM

import mixtools
from mixtools.api.converting import expert_names
from mixtools.formats import Awq, Gptq, Int8, Nf4, PackedInts
from mixtools.storage.dtypes import DType

pytestmark = [
    pytest.mark.peers("hf"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

SYMMETRIC = {
    "4 bits": PackedInts(4, 128),
    "4 bits, bf16": PackedInts(4, 128, dtype=DType.BF16),
    "8 bits, whole rows": PackedInts(8, -1),
    "3 bits, groups of 64": PackedInts(3, 64),
}

BF16 = made.Arithmetic(1e-3, 1e-4)  # experts are decoded to the scales' dtype, whatever the model computes in


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


def load(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Mapping[str, Any]]:
    """The model, and what transformers says of its keys."""
    model, told = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=dtype, device_map={"": "cpu"}
    )
    return model, {what: sorted(keys) for what, keys in told.items() if keys}


def expect_loads(folder: Path, texts: Sequence[Sequence[int]], how: made.Arithmetic) -> None:
    """With every key, and as the model that we read."""
    model, told = load(folder)
    assert told == {}
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), how)


def test_a_dense_folder(texts: list[list[int]], tmp_path: Path) -> None:
    mixtools.convert(made.NANO, tmp_path / "out")
    expect_loads(tmp_path / "out", texts, made.FP32)


@pytest.mark.parametrize("format", SYMMETRIC.values(), ids=SYMMETRIC)
def test_packed_integers_by_legacy_names(format: PackedInts, texts: list[list[int]], tmp_path: Path) -> None:
    expect_loads(made.packed(tmp_path / "out", format), texts, made.FP16 if format.dtype is DType.F16 else BF16)


def test_what_the_command_writes(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.quantized(tmp_path / "out", method="gptq", format="compressed-tensors")
    expect_loads(folder, texts, BF16)


def test_a_model_with_the_real_vocabulary(tmp_path: Path) -> None:
    source = made.random(tmp_path / "source")
    expect_loads(made.packed(tmp_path / "out", PackedInts(4, 128), source=source), made.RANDOM_TEXTS, made.FP16)


# --- what it does not load ---


def test_a_dense_folder_by_v5_names_leaves_the_experts_random(texts: list[list[int]], tmp_path: Path) -> None:
    """They are those of GPTQModel: transformers 5 itself writes experts by the legacy names, or as one tensor."""
    mixtools.convert(made.NANO, tmp_path / "legacy")
    expert_names(tmp_path / "legacy", tmp_path / "out", to="v5")
    model, told = load(tmp_path / "out")
    assert len(told["missing_keys"]) == 4 and len(told["unexpected_keys"]) == 48
    assert made.beside(made.theirs(model, texts), made.ours(tmp_path / "out", texts)).same_top < 0.5


def test_packed_integers_by_v5_names_leave_the_experts_random(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", PackedInts(4, 128), names="v5")
    model, told = load(folder)
    assert [name for name in told["missing_keys"] if ".experts." not in name] == []
    assert len(told["missing_keys"]) == 4 and len(told["unexpected_keys"]) == 144
    assert made.beside(made.theirs(model, texts), made.ours(folder, texts)).same_top < 0.5


@pytest.mark.parametrize("names", ["legacy", "v5"])
def test_asymmetric_packed_integers_are_refused(names: str, tmp_path: Path) -> None:
    """Its gathering of experts passes their zeros over."""
    with pytest.raises(RuntimeError, match="conversion of the weights|ignore_mismatched_sizes"):
        load(made.packed(tmp_path / "out", PackedInts(4, 128, symmetric=False), names=names))


@pytest.mark.parametrize("names", ["legacy", "v5"])
@pytest.mark.parametrize("format", [Gptq(4, 128), Awq(128)], ids=["auto-gptq", "autoawq"])
def test_gptq_and_awq_need_another_package(format: Gptq | Awq, names: str, tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="requires"):
        load(made.packed(tmp_path / "out", format, names=names))


@pytest.mark.parametrize("double", [False, True])
def test_nf4_by_legacy_names_is_refused(double: bool, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(made.packed(tmp_path / "out", Nf4(double=double)))


def test_nf4_by_v5_names_leaves_the_experts_random(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Nf4(), names="v5")
    model, told = load(folder)
    assert len(told["missing_keys"]) == 4 and len(told["unexpected_keys"]) == 48
    assert made.beside(made.theirs(model, texts), made.ours(folder, texts)).same_top < 0.5


def test_int8_by_legacy_names_takes_codes_for_weights(texts: list[list[int]], tmp_path: Path) -> None:
    model, told = load(made.packed(tmp_path / "out", Int8()), torch.float16)
    assert "missing_keys" not in told and len(told["unexpected_keys"]) == 48
    experts = [one for name, one in model.state_dict().items() if ".experts." in name]
    assert experts and all(one.dtype is torch.int8 for one in experts)
    with pytest.raises(RuntimeError, match="got Char"):
        made.theirs(model, texts[:1])


def test_int8_by_v5_names_leaves_the_experts_random(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Int8(), names="v5")
    model, told = load(folder, torch.float16)
    assert len(told["missing_keys"]) == 4
    assert made.beside(made.theirs(model, texts), made.ours(folder, texts)).same_top < 0.5
