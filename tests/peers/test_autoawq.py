"""autoawq on what we write in its format, and we on what it writes.

Its loader takes a machine without a graphics card for one with Intel's extension; it is told of another device, and
computes by its plain path.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # its farewell
    from awq import AutoAWQForCausalLM
from awq.models import base
from awq.modules.linear import gemm
from awq.utils.packing_utils import dequantize_gemm
from peers import made
from safetensors.torch import load_file, save_file

from mixtools.formats import Awq, Gptq, PackedInts
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import backends

pytestmark = [
    pytest.mark.peers("autoawq"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

FORMATS = {"asymmetric": Awq(128), "symmetric": Awq(128, symmetric=True), "groups of 32": Awq(32)}


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


@pytest.fixture(autouse=True)
def plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gemm, "TRITON_AVAILABLE", False)
    monkeypatch.setattr(base, "get_best_device", lambda: "another")


def load(folder: Path) -> torch.nn.Module:
    return AutoAWQForCausalLM.from_quantized(str(folder), fuse_layers=False, device_map={"": "cpu"}).model


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_folder_means_to_it_what_it_means_to_us(format: Awq, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    model = load(folder)
    made.expect_keys(model, folder)
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), made.FP16)


def test_what_the_command_writes(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.quantized(tmp_path / "out", method="awq")
    model = load(folder)
    made.expect_keys(model, folder)
    made.expect_equal(made.theirs(model, texts), made.ours(folder, texts), made.FP16)


def test_a_model_with_the_real_vocabulary(tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Awq(128), source=made.random(tmp_path / "source"))
    model = load(folder)
    made.expect_keys(model, folder)
    made.expect_equal(made.theirs(model, made.RANDOM_TEXTS), made.ours(folder, made.RANDOM_TEXTS), made.FP16)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_it_unpacks_the_same_weights(format: Awq) -> None:
    packed = made.nearest(torch.randn(96, 256, generator=torch.Generator().manual_seed(3)), format)
    qweight, qzeros, scales = packed.parts
    assert torch.equal(dequantize_gemm(qweight, qzeros, scales, 4, format.group).T, packed.dense)


# --- what it does not load ---


def test_v5_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        load(made.packed(tmp_path / "out", Awq(128), names="v5"))


@pytest.mark.parametrize("format", [Gptq(4, 128), PackedInts(4, 128)], ids=["auto-gptq", "compressed-tensors"])
def test_what_is_not_its_own_is_refused(format: Gptq | PackedInts, tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    with pytest.raises(UnboundLocalError, match="q_linear_module"):
        load(folder)


def test_scales_in_another_order_are_noticed_here(texts: list[list[int]], tmp_path: Path) -> None:
    """That these comparisons can fail."""
    folder = made.packed(tmp_path / "out", Awq(128))
    ours = made.ours(folder, texts)
    name = "model.layers.1.block_sparse_moe.experts.0.w2.scales"
    file = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(file)
    tensors[name] = tensors[name].flip(1).contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(AssertionError):
        made.expect_equal(made.theirs(load(folder), texts), ours, made.FP16)


# --- what it writes ---


def test_the_back_end_writes_what_we_read(
    texts: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made.lend_environment(tmp_path / "backends", "autoawq", monkeypatch)
    asked, calibration = backends.Asked(symmetric=False), [text[:64] for text in texts]
    ran = backends.run_backend("autoawq", open_checkpoint(made.NANO), tmp_path / "out", asked, calibration)
    assert {"model.safetensors", "config.json", "tokenizer.model"} <= {*ran.files}
    assert open_checkpoint(tmp_path / "out").quantized() == [Awq(128)]
    model = load(tmp_path / "out")
    made.expect_keys(model, tmp_path / "out")
    ours = made.ours(tmp_path / "out", texts)
    made.expect_equal(made.theirs(model, texts), ours, made.FP16)
    assert made.beside(made.ours(made.NANO, texts), ours).kld < 0.06
    golden = json.loads((Path(__file__).parents[1] / "golden" / "awq-config.json").read_text("utf-8"))
    assert made.config(tmp_path / "out")["quantization_config"] == golden["config.json"]
