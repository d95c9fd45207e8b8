"""Check on quantized outputs: what quantizing and smoothing mean passes, a fault beside them is found and named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import packing
import pytest
import torch
from layouts import make
from mixtral_oracle import DATA, NANO, SHAPES
from packing import Grid, Model
from safetensors.torch import load_file, save_file

import mixtools
from mixtools import conversion, errors, job
from mixtools.checking import faults, gates, integrity, judge
from mixtools.formats import Awq, Format, Gptq, Packed, PackedInts
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import ATTENTION, EXPERT, Role, Slot
from mixtools.storage.dtypes import DType

TEXT = DATA / "text.txt"
CONFIG = dataclasses.replace(
    SHAPES["mqa"], hidden_size=64, intermediate_size=96, num_heads=4, num_kv_heads=2, head_dim=32
)
MATRICES = (*ATTENTION, *EXPERT)
KINDS: list[Format] = [Gptq(4, 64), Awq(64), PackedInts(4, 64, DType.BF16), Gptq(3, 64), Gptq(8, 64)]


def quantize(source: Checkpoint, folder: Path, kind: Gptq | Awq | PackedInts, **options: str) -> Path:
    """Every linear to the nearest code, by plain loops' grid."""

    def encode(slot: Slot) -> Packed:
        grid = Grid.of(source.read(slot), kind.bits, kind.group, symmetric=kind.symmetric)
        return kind.encode(grid.codes.to(torch.uint8), grid.scales.to(kind.dtype.torch()).float(), grid.zeros)

    slots = [slot for slot in source.slots() if slot.role in MATRICES]
    changes = conversion.Changes.each(slots, encode, dict.fromkeys(slots, kind))
    dtype = "keep" if kind.dtype is DType.BF16 else "f16"
    job.run(conversion.plan_hf(source, conversion.Options(dtype=dtype, **options), changes), folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[Format, Path]:
    source = open_checkpoint(NANO)
    return {kind: quantize(source, tmp_path_factory.mktemp(kind.name) / "q", kind) for kind in KINDS}


def check(output: Path, source: Path = NANO, **options: object) -> dict:
    given = {"text": TEXT, "ctx": 128, "max_tokens": 512, "new_tokens": 4, **options}
    cpu = judge.Machine(torch.device("cpu"))
    return judge.run(
        open_checkpoint(source), open_checkpoint(output, strict=False), judge.Options(**given), cpu
    ).document


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_quantized_output_is_sound_and_judged_by_its_bits(made: dict[Format, Path], kind: Format) -> None:
    found = check(made[kind])
    assert found["integrity"]["problems"] == [] and found["integrity"]["passed"]
    assert found["integrity"]["different"] == 2 * (4 + 8 * 3)
    keys = {one["key"] for one in found["configuration"]["differences"]}
    assert found["configuration"]["passed"] and "quantization_config" in keys
    assert ("dtype" in keys) == (kind.dtype is DType.F16)
    assert found["kind"] == {Gptq(3, 64): "gptq-3bit", Gptq(8, 64): "gptq-8bit"}.get(kind, kind.name)
    assert found["verdict"] == "passed" and {gate["name"] for gate in found["gates"]} == {"ppl_ratio", "kld_mean"}
    assert found["output"]["quantized"] == [f"{kind.name}: {kind.about}"]


def test_documents_of_an_output_tell_every_loader(made: dict[Format, Path]) -> None:
    told = {kind: json.loads((folder / "config.json").read_text("utf-8")) for kind, folder in made.items()}
    assert told[Gptq(4, 64)]["torch_dtype"] == told[Awq(64)]["torch_dtype"] == "float16"
    packed = told[PackedInts(4, 64, DType.BF16)]
    assert packed["torch_dtype"] == "bfloat16"
    assert packed["quantization_config"]["ignore"] == [
        "model.layers.0.block_sparse_moe.gate", "model.layers.1.block_sparse_moe.gate", "lm_head"
    ]  # fmt: skip
    for kind, folder in made.items():
        beside = folder / "quantize_config.json"
        assert beside.exists() == isinstance(kind, Gptq)
        if isinstance(kind, Gptq):
            assert json.loads(beside.read_text("utf-8")) == told[kind]["quantization_config"]


def test_v5_names_are_written_with_what_names_them(tmp_path: Path) -> None:
    folder = quantize(open_checkpoint(NANO), tmp_path / "q", PackedInts(4, 64), expert_names="v5")
    found = open_checkpoint(folder)
    assert found.layout.name == "hf-v5"
    assert "model.layers.1.mlp.experts.7.up_proj.weight_packed" in found.store.entries
    assert "model.layers.0.mlp.gate" in found.about["ignore"]
    legacy = open_checkpoint(quantize(open_checkpoint(NANO), tmp_path / "l", PackedInts(4, 64)))
    assert all(torch.equal(found.read(slot), legacy.read(slot)) for slot in legacy.slots())
    with pytest.raises(errors.UsageError, match="expert names: 'v4' is not one of legacy, v5"):
        conversion.plan_hf(legacy, conversion.Options(expert_names="v4"))


def test_a_respelled_output_must_be_what_it_was(made: dict[Format, Path], tmp_path: Path) -> None:
    source = made[Gptq(4, 64)]
    mixtools.expert_names(source, tmp_path / "v5", to="v5")
    found = check(tmp_path / "v5", source)
    assert found["kind"] == "dense" and found["verdict"] == "passed"
    assert found["integrity"]["different"] == 0
    assert {gate["name"] for gate in found["gates"]} == {"tensors_different", "ppl_ratio", "kld_mean"}


def test_made_dense_again_it_is_what_its_reader_saw(made: dict[Format, Path], tmp_path: Path) -> None:
    mixtools.convert(made[Awq(64)], tmp_path / "dense")
    found = check(tmp_path / "dense", made[Awq(64)])
    assert found["verdict"] == "passed" and found["kind"] == "dense" and found["kld"]["mean"] == 0
    one, other = (
        mixtools.perplexity(folder, TEXT, ctx=128, max_tokens=256) for folder in (made[Awq(64)], tmp_path / "dense")
    )
    assert one.document["perplexity"] == other.document["perplexity"]


def test_a_left_over_quantization_config_is_a_fault(made: dict[Format, Path], tmp_path: Path) -> None:
    """Loaders look for packed matrices that are not there."""
    folder = tmp_path / "dense"
    mixtools.convert(NANO, folder)
    config = json.loads((folder / "config.json").read_text("utf-8"))
    config["quantization_config"] = Gptq(4, 64).fragment()["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    found = check(folder)
    assert found["verdict"] == "failed"
    assert "quantization_config is not the source's" in found["integrity"]["problems"][0]["message"]


@pytest.mark.parametrize("change", [{"rope_theta": 1e4}, {"bos_token_id": 3}])
def test_any_other_difference_of_the_configuration_fails(
    made: dict[Format, Path], tmp_path: Path, change: dict[str, object]
) -> None:
    mixtools.expert_names(made[Awq(64)], tmp_path / "q", to="v5")
    file = tmp_path / "q" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}), "utf-8")
    assert check(tmp_path / "q")["verdict"] == "failed"


def test_inspect_tells_bits_and_groups(made: dict[Format, Path]) -> None:
    told = str(mixtools.inspect(made[PackedInts(4, 64, DType.BF16)]))
    assert "Hugging Face (safetensors), compressed-tensors" in told
    assert "compressed-tensors: 4 bits, groups of 64, symmetric" in told


def test_a_quantized_source_is_taken_only_on_request(made: dict[Format, Path], tmp_path: Path) -> None:
    source = made[Gptq(4, 64)]
    with pytest.raises(errors.QuantizedError, match="--requantize"):
        mixtools.laser(source, tmp_path / "laser", layers="1")
    with pytest.raises(errors.QuantizedError, match=r"quantized already \(gptq\).*--requantize"):
        mixtools.quantize(source, tmp_path / "q8.gguf", type=["Q8_0"])


@pytest.mark.parametrize("kind", [Gptq(4, 64), Awq(64), PackedInts(4, 64, DType.BF16)], ids=lambda kind: kind.name)
def test_it_speaks_and_is_reduced_on_request(made: dict[Format, Path], tmp_path: Path, kind: Format) -> None:
    dense = tmp_path / "dense"
    mixtools.convert(made[kind], dense)
    said = [mixtools.generate(folder, "The following", max_new_tokens=8).document for folder in (made[kind], dense)]
    assert said[0]["text"] == said[1]["text"] and said[0]["text"]
    mixtools.laser(
        made[kind], tmp_path / "laser", layers="1", targets="w1", experts="0", rank_rule="rank=9", requantize=True
    )
    found = open_checkpoint(tmp_path / "laser")
    assert found.quantization is None and found.main_dtype() is kind.dtype


def test_eight_bits_are_held_to_more_than_four() -> None:
    for name in ("gptq-8bit", "compressed-tensors-8bit"):
        assert all(gates.DEFAULTS[name][gate] < limit for gate, limit in gates.DEFAULTS["gptq"].items())
    assert all(gates.DEFAULTS["gptq-3bit"][gate] > limit for gate, limit in gates.DEFAULTS["gptq"].items())
    assert not gates.DEFAULTS.get("gptq-2bit")


# --- smoothing ---


def smoothed(source: MemoryReader, spread: float = 30.0) -> dict[Slot, torch.Tensor]:
    """All that smoothing scales, and then a fresh rounding to 4 bits."""
    generator = torch.Generator().manual_seed(7)

    def scales(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) - 0.5) * 2 * torch.tensor(spread).log())

    tensors = {slot: source.read(slot).float() for slot in source.slots()}
    for layer in range(source.config.num_layers):
        for norm, readers in (
            (Role.ATTENTION_NORM, (Role.Q, Role.K, Role.V)),
            (Role.FFN_NORM, (Role.GATE, Role.UP, Role.ROUTER)),
        ):
            s = scales(source.config.hidden_size)
            tensors[Slot(norm, layer)] /= s
            for slot in tensors:
                if slot.layer == layer and slot.role in readers:
                    tensors[slot] *= s
        for expert in range(source.config.num_experts):
            s = scales(source.config.intermediate_size)
            tensors[Slot(Role.UP, layer, expert)] /= s[:, None]
            tensors[Slot(Role.DOWN, layer, expert)] *= s
    for slot, tensor in tensors.items():
        if slot.role in MATRICES:
            tensors[slot] = Grid.of(tensor, 4, 32, symmetric=False).dense
        else:
            tensors[slot] = tensor.half()
    return tensors


@pytest.fixture(scope="module")
def source() -> MemoryReader:
    return random_reader(CONFIG, seed=3, dtype=torch.bfloat16)


def test_smoothing_is_no_damage(source: MemoryReader) -> None:
    found = integrity.compare(source, MemoryReader(CONFIG, smoothed(source)))
    assert found.problems == [] and found.differences
    assert all(one.fault is None for one in found.differences)
    assert max(one.relative_error for one in found.differences) > 2  # ... though it looks like it
    assert min(one.same_signs for one in found.differences) > 0.9


@pytest.mark.parametrize("fault", ["swapped", "another expert", "unpermuted", "twice", "reshaped"])
def test_a_fault_is_found_through_smoothing(source: MemoryReader, fault: str) -> None:
    tensors = smoothed(source)
    gate, up, q, down = Slot(Role.GATE, 1, 2), Slot(Role.UP, 1, 2), Slot(Role.Q, 0), Slot(Role.DOWN, 0, 1)
    heads = CONFIG.num_heads
    if fault == "swapped":
        tensors[gate], tensors[up] = tensors[up], tensors[gate]
        expected = {gate: f"holds the source's {up}", up: f"holds the source's {gate}"}
    elif fault == "another expert":
        other = Slot(Role.DOWN, 0, 0)
        tensors[down] = tensors[other]
        expected = {down: f"holds the source's {other}"}
    elif fault == "unpermuted":
        tensors[q] = tensors[q].view(heads, 2, -1, CONFIG.hidden_size).transpose(1, 2).reshape(tensors[q].shape)
        expected = {q: faults.UNPERMUTED}
    elif fault == "twice":
        tensors[q] = tensors[q].view(heads, -1, 2, CONFIG.hidden_size).transpose(1, 2).reshape(tensors[q].shape)
        expected = {q: faults.TWICE}
    else:
        tensors[down] = tensors[down].T.contiguous().view(tensors[down].shape)
        expected = {down: faults.RESHAPED}
    found = integrity.compare(source, MemoryReader(CONFIG, tensors))
    assert {one.slot: one.fault for one in found.differences if one.fault} == expected
    assert len(found.problems) == 1


def test_signs_of_what_is_unrelated() -> None:
    one, other = torch.randn(2, 40, 50, generator=torch.Generator().manual_seed(0))
    assert 0.45 < faults.same_signs(one, other) < 0.55
    assert faults.same_signs(one, one * torch.rand(50)) == 1
    assert faults.same_signs(torch.zeros(3, 3), one[:3, :3]) == 1  # nothing says otherwise
    mostly = other.clone()
    mostly[:5] = 0
    assert 0.4 < faults.same_signs(one, mostly) < 0.6
    assert faults.nearest_by_signs(one, {Slot(Role.Q, 0): other}) is None
    assert faults.nearest_by_signs(one, {Slot(Role.Q, 0): other, Slot(Role.K, 0): one * 5}) == Slot(Role.K, 0)


def test_a_checksum_that_fails_in_a_bias_is_told(tmp_path: Path) -> None:
    model = Model("gptq")
    model.stored["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(packing.DIMS.d).half()
    source = model.write(tmp_path / "a")
    mixtools.expert_names(source, tmp_path / "b", to="v5")
    file = tmp_path / "b" / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.0.self_attn.q_proj.bias"][1] = -0.0
    save_file(stored, tmp_path / "other.safetensors", {"format": "pt"})
    assert open_checkpoint(tmp_path / "b").problems == []
    names = sorted(stored)
    make.write_json(tmp_path / "names.json", names)
    manifest = json.loads((tmp_path / "b" / "mixtools.json").read_text("utf-8"))
    manifest["crc32"] = {
        name: "00000000" if name.endswith("q_proj.bias") else crc for name, crc in manifest["crc32"].items()
    }
    (tmp_path / "b" / "mixtools.json").write_text(json.dumps(manifest), "utf-8")
    with pytest.raises(errors.ChecksumError, match=r"q_proj\.bias: stored checksum 00000000"):
        open_checkpoint(tmp_path / "b")
    assert mixtools.inspect(tmp_path / "b").problems
