"""auto-gptq on what we write in its format, and we on what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from auto_gptq import AutoGPTQForCausalLM
from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
from peers import made
from safetensors.torch import load_file, save_file

from mixtools.formats import Awq, Gptq, PackedInts
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import backends
from mixtools.storage.dtypes import DType

pytestmark = [
    pytest.mark.peers("autogptq"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

FORMATS = {
    "4 bits": Gptq(4, 128),
    "4 bits, asymmetric, groups of 32": Gptq(4, 32, symmetric=False),
    "4 bits, whole rows": Gptq(4, -1),
    "2 bits": Gptq(2, 64),
    "3 bits": Gptq(3, 128),
    "3 bits, asymmetric": Gptq(3, 64, symmetric=False),
    "8 bits": Gptq(8, 128),
}
FP32 = made.ALMOST_FP32  # its sines of positions stay in fp16
BIASES = ("bias",)  # it gives each matrix one, and fills it with zeros where the file has none


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    return made.windows()


def load(folder: Path, **options: object) -> torch.nn.Module:
    return AutoGPTQForCausalLM.from_quantized(str(folder), device="cpu", **options).model


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_folder_means_to_it_what_it_means_to_us(format: Gptq, texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    model = load(folder)
    made.expect_keys(model, folder, BIASES)
    assert not any(bias.any() for name, bias in model.state_dict().items() if name.endswith(BIASES))
    ours = made.ours(folder, texts)
    made.expect_equal(made.theirs(model, texts), ours, made.FP16)
    made.expect_equal(made.theirs(model.float(), texts), ours, FP32)


COMMANDS = {
    "gptq": {"method": "gptq"},
    "gptq, 3 bits": {"method": "gptq", "bits": 3, "group_size": 64},
    "awq": {"method": "awq", "format": "auto-gptq"},
}


@pytest.mark.parametrize("options", COMMANDS.values(), ids=COMMANDS)
def test_what_the_command_writes(options: dict[str, Any], texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.quantized(tmp_path / "out", **options)
    model = load(folder)
    made.expect_keys(model, folder, BIASES)
    made.expect_equal(made.theirs(model.float(), texts), made.ours(folder, texts), FP32)


def test_a_model_with_the_real_vocabulary(tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Gptq(4, 128), source=made.random(tmp_path / "source"))
    model = load(folder)
    made.expect_keys(model, folder, BIASES)
    made.expect_equal(made.theirs(model.float(), made.RANDOM_TEXTS), made.ours(folder, made.RANDOM_TEXTS), FP32)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_its_layer_packs_the_same_bytes(format: Gptq) -> None:
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(3))
    packed = made.nearest(weight, format)
    rows, groups = packed.parts[2].shape[1], packed.parts[2].shape[0]
    linear = torch.nn.Linear(256, rows, bias=False)
    linear.weight.data = format.to(DType.F32).decode(packed.parts)
    layer = QuantLinear(format.bits, format.group, 256, rows, bias=False)
    zeros = (
        torch.full((rows, groups), float(1 << format.bits - 1)) if format.symmetric else zeros_of(packed.parts, format)
    )
    layer.pack(linear, packed.parts[2].T.float().contiguous(), zeros, layer.g_idx)
    layer.half()
    for name, part in zip(("qweight", "qzeros", "scales", "g_idx"), packed.parts, strict=True):
        assert torch.equal(layer.state_dict()[name], part), name


def zeros_of(parts: tuple[torch.Tensor, ...], format: Gptq) -> torch.Tensor:
    """[out, groups], by the layer's own forward: of a matrix of codes 0 it gives -scale * zero."""
    qweight, qzeros, scales, index = parts
    layer = QuantLinear(format.bits, format.group, len(index), scales.shape[1], bias=False)
    layer.load_state_dict({"qweight": 0 * qweight, "qzeros": qzeros, "scales": 0 * scales + 1, "g_idx": index})
    dense = -layer(torch.eye(len(index)).half())
    return dense.float()[:: len(index) // len(scales)].T.contiguous()


# --- what it does not load ---


def test_v5_names_leave_the_experts_empty(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Gptq(4, 128), names="v5")
    model = load(folder)  # without a word
    with pytest.raises(AssertionError):
        made.expect_keys(model, folder, BIASES)
    experts = [tensor for name, tensor in model.state_dict().items() if name.endswith("w1.qweight")]
    assert len(experts) == 16 and not any(tensor.any() for tensor in experts)


def test_zeros_as_they_are_would_be_read_as_one_more(texts: list[list[int]], tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", Gptq(4, 128, v2=True))
    model = load(folder)  # it does not know checkpoint_format
    assert made.beside(made.theirs(model.float(), texts), made.ours(folder, texts)).kld > 0.1


@pytest.mark.parametrize("format", [Awq(128), PackedInts(4, 128)], ids=["autoawq", "compressed-tensors"])
def test_what_is_not_its_own_is_refused(format: Awq | PackedInts, tmp_path: Path) -> None:
    folder = made.packed(tmp_path / "out", format)
    with pytest.raises((TypeError, FileNotFoundError, ValueError, RuntimeError, AttributeError, KeyError)):
        load(folder)


def test_a_flipped_bit_is_noticed_here(texts: list[list[int]], tmp_path: Path) -> None:
    """That these comparisons can fail."""
    folder = made.packed(tmp_path / "out", Gptq(4, 128))
    ours = made.ours(folder, texts)
    file = next(path for path in sorted(folder.glob("*.safetensors")) if any("w2.scales" in n for n in load_file(path)))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("w2.scales"))
    tensors[name] = tensors[name].flip(1)
    save_file(tensors, file, {"format": "pt"})
    assert made.beside(made.theirs(load(folder).float(), texts), ours).kld > 1e-4


# --- what it writes ---


@pytest.fixture
def back_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This very environment, as that of the back end."""
    made.lend_environment(tmp_path / "backends", "auto-gptq", monkeypatch)


@pytest.mark.usefixtures("back_end")
@pytest.mark.parametrize("asked", [backends.Asked(), backends.Asked(3, 64, False)], ids=["4 bits", "3 bits asymmetric"])
def test_the_back_end_writes_what_we_read(asked: backends.Asked, texts: list[list[int]], tmp_path: Path) -> None:
    calibration = [text[:64] for text in texts]
    ran = backends.run_backend("auto-gptq", open_checkpoint(made.NANO), tmp_path / "out", asked, calibration)
    assert {"model.safetensors", "config.json", "quantize_config.json", "tokenizer.model"} <= {*ran.files}
    found = open_checkpoint(tmp_path / "out")
    assert found.quantized() == [Gptq(asked.bits, asked.group, symmetric=asked.symmetric)]
    model = load(tmp_path / "out")
    made.expect_keys(model, tmp_path / "out")
    ours = made.ours(tmp_path / "out", texts)
    made.expect_equal(made.theirs(model.float(), texts), ours, FP32)
    assert made.beside(made.ours(made.NANO, texts), ours).kld < (0.03 if asked.bits == 4 else 0.2)
    golden = json.loads((Path(__file__).parents[1] / "golden" / "gptq-config.json").read_text("utf-8"))
    written = json.loads((tmp_path / "out" / "quantize_config.json").read_text("utf-8"))
    assert written.keys() == golden["quantize_config.json"].keys() == golden["config.json"].keys()
