"""GPTQModel on what we write for it, and transformers 5 through it: both know experts by the v5 names."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import pytest
import torch
from gptqmodel import BACKEND, GPTQModel
from peers import made
from transformers import AutoModelForCausalLM

from mixtools.api.converting import expert_names
from mixtools.formats import Awq, Gptq, PackedInts

pytestmark = [
    pytest.mark.peers("gptqmodel"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

FORMATS = {
    "GPTQ": Gptq(4, 128),
    "GPTQ, whole rows": Gptq(4, -1),
    "GPTQ, 8 bits": Gptq(8, 128),
    "GPTQ, 3 bits": Gptq(3, 128),
    "GPTQ, 2 bits": Gptq(2, 64),
    "GPTQ, second version": Gptq(4, 128, v2=True),
    "GPTQ, second version, asymmetric, groups of 32": Gptq(4, 32, symmetric=False, v2=True),
    "AWQ": Awq(128),
    "AWQ, groups of 32": Awq(32),
}
Load = Callable[[Path], torch.nn.Module]


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes logs where it is started."""
    monkeypatch.chdir(tmp_path)


def load(folder: Path) -> torch.nn.Module:
    """In fp16, the scales' own: by itself it takes bf16."""
    return GPTQModel.load(str(folder), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_folder_means_to_it_what_it_means_to_us(format: Gptq | Awq, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format, names="v5")
    model = load(folder)
    made.expect_keys(model, folder)
    ours = made.ours(folder, texts)
    made.expect_equal(made.theirs(model, texts), ours, made.FP16)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_what_the_command_writes(method: str, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.quantized(tmp_path / "out", method=method, expert_names="v5")
    model = load(folder)
    made.expect_keys(model, folder)
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), made.FP16)


@pytest.mark.parametrize("format", [Gptq(4, 128), Awq(128)], ids=["GPTQ", "AWQ"])
def test_a_model_with_the_real_vocabulary(format: Gptq | Awq, tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format, names="v5", source=made.random(tmp_path / "source"))
    model = load(folder)
    made.expect_keys(model, folder)
    made.expect_equal(made.theirs(model, made.RANDOM_TEXTS), made.ours(folder, made.RANDOM_TEXTS), made.FP16)


@pytest.mark.parametrize("format", [Gptq(4, 128), Awq(128)], ids=["GPTQ", "AWQ"])
def test_transformers_through_it(format: Gptq | Awq, texts: list[list[int]], tmp_path: Path) -> None:
    """From legacy names, re-spelled."""
    made.packed(tmp_path / "legacy", format)
    expert_names(tmp_path / "legacy", tmp_path / "out", to="v5")
    model, told = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype=torch.float16, device_map={"": "cpu"}
    )
    assert not any(told.values())
    made.expect_equal(made.theirs(model, texts), made.ours(tmp_path / "out", texts), made.FP16)


# --- what they do not load ---


def test_legacy_names_of_gptq_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Missing required quantized weights"):
        load(made.packed(tmp_path / "out", Gptq(4, 128)))


def test_legacy_names_of_awq_leave_the_experts_empty(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Awq(128))
    model = load(folder)  # with a word in its log
    with pytest.raises(AssertionError):
        made.expect_keys(model, folder)
    assert not made.beside(made.theirs(model, texts), made.ours(folder, texts)).same_top > 0.5  # often NaN


@pytest.mark.parametrize("format", [Gptq(4, 128), Awq(128)], ids=["GPTQ", "AWQ"])
def test_legacy_names_leave_transformers_without_experts(format: Gptq | Awq, tmp_path: Path) -> None:
    _, told = AutoModelForCausalLM.from_pretrained(
        made.packed(tmp_path / "out", format), output_loading_info=True, dtype=torch.float16, device_map={"": "cpu"}
    )
    parts = len(format.suffixes)
    assert len(told["missing_keys"]) == len(told["unexpected_keys"]) == 2 * 8 * 3 * parts


def test_zeros_less_one_are_taken_from_itself_alone(tmp_path: Path) -> None:
    """It does not trust what others did with them; of the second version it does (above)."""
    with pytest.raises(ValueError, match="sym=False model with format=FORMAT.GPTQ is only supported if produced by"):
        load(made.packed(tmp_path / "out", Gptq(4, 128, symmetric=False), names="v5"))


def test_packed_integers_need_another_package(tmp_path: Path) -> None:
    with pytest.raises(ImportError, match="compressed-tensors"):
        load(made.packed(tmp_path / "out", PackedInts(4, 128), names="v5"))
