"""Quantized folders as other programs write them: read to the values that they stand for, or refused, and why."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import packing
import pytest
import torch
from layouts import make
from packing import Model
from safetensors.torch import load_file

from mixtools import conversion, errors, job
from mixtools.formats import Awq, Gptq, PackedInts, Plain
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

Q = "model.layers.0.self_attn.q_proj."


def expect(folder: Path, model: Model) -> Checkpoint:
    found = open_checkpoint(folder)
    make.assert_same(make.read_all(found), model.dense)
    return found


def edit(file: Path, change: Any) -> None:
    document = json.loads(file.read_text("utf-8"))
    change(document)
    file.write_text(json.dumps(document), "utf-8")


MODELS = [
    Model("gptq"), Model("gptq", group=-1), Model("gptq", symmetric=False), Model("gptq", bits=3),
    Model("gptq", bits=2, symmetric=False), Model("gptq", bits=8, group=16),
    Model("gptq", shuffled=True, symmetric=False),
    Model("gptq", about={"checkpoint_format": "gptq_v2"}, symmetric=False), Model("awq", symmetric=False),
    Model("awq", group=-1), Model("compressed-tensors"), Model("compressed-tensors", symmetric=False),
    Model("compressed-tensors", bits=8, group=-1), Model("compressed-tensors", bits=3, symmetric=False),
]  # fmt: skip


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.kind}-{m.bits}-{m.group}-{m.symmetric}-{m.shuffled}")
@pytest.mark.parametrize("spelling", ["legacy", "v5", "hybrid"])
def test_each_is_read_as_it_was_meant(model: Model, spelling: str, tmp_path: Path) -> None:
    model = dataclasses.replace(model, spelling=spelling, stored={}, dense={})
    found = expect(model.write(tmp_path), model)
    assert found.layout.name == {"legacy": "hf", "v5": "hf-v5", "hybrid": "hf-hybrid"}[spelling]
    assert found.main_dtype() is DType.F16
    assert found.quantization == model.kind + ("" if model.bits == 4 else f"-{model.bits}bit")
    assert isinstance(found.format(Slot(Role.ROUTER, 0)), Plain)
    quantized = found.format(Slot(Role.DOWN, 1, 2))
    assert isinstance(quantized, {"gptq": Gptq, "awq": Awq}.get(model.kind, PackedInts))
    assert (quantized.bits, quantized.group) == (model.bits, model.group)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_version_decides_what_a_zero_means(tmp_path: Path, symmetric: bool) -> None:
    """0x77777777 is a zero of 8 in the first version, of 7 in the second: a symmetric file must be one of the two."""
    model = Model("gptq", about={"checkpoint_format": "gptq_v2"}, symmetric=symmetric)
    expect(model.write(tmp_path), model)
    edit(tmp_path / "config.json", lambda told: told["quantization_config"].update(checkpoint_format="gptq"))
    found, slot = open_checkpoint(tmp_path), Slot(Role.Q, 0)
    if symmetric:
        with pytest.raises(errors.TensorError, match=r"q_proj.*is it gptq_v2\?: expected 8, found 9"):
            found.read(slot)
        return
    scales = model.stored[Q + "scales"].T.repeat_interleave(packing.GROUP, 1)
    torch.testing.assert_close(found.read(slot), model.dense[Q + "weight"] - scales, rtol=2e-3, atol=2e-3)


def test_without_a_word_on_symmetry_zeros_are_read(tmp_path: Path) -> None:
    model = Model("gptq", symmetric=False, about={"sym": None})
    expect(model.write(tmp_path), model)


@pytest.mark.parametrize("file", ["gptq_model-4bit-32g.safetensors", "gptq_model-4bit--1g.safetensors"])
def test_auto_gptq_s_own_name_biases_and_document(tmp_path: Path, file: str) -> None:
    model = Model("gptq")
    zeros = {f"{name[:-7]}bias": torch.zeros(part.shape[1]).half() for name, part in model.stored.items()
             if name.endswith("qweight")}  # fmt: skip
    model.stored |= zeros
    model.write(tmp_path, file, beside=True, inside=False)
    found = expect(tmp_path, model)
    assert found.quantization == "gptq" and not found.remarks
    expect(tmp_path / file, model)
    model.stored[Q + "bias"][3] = 0.5
    model.write(tmp_path, file)
    with pytest.raises(errors.LayoutError, match=r"q_proj\.bias: has one tensor unknown .* no Mixtral has biases"):
        open_checkpoint(tmp_path)


def test_auto_gptq_s_name_in_shards(tmp_path: Path) -> None:
    model = Model("gptq")
    model.write_shards(tmp_path)
    for path in tmp_path.glob("model*"):
        text = path.read_text("utf-8").replace('"model-', '"gptq_model-4bit-32g-') if path.suffix == ".json" else ""
        renamed = path.rename(tmp_path / path.name.replace("model", "gptq_model-4bit-32g", 1))
        if text:
            renamed.write_text(text, "utf-8")
    expect(tmp_path, model)


def test_two_of_auto_gptq_s_files_are_not_mixed(tmp_path: Path) -> None:
    Model("gptq").write(tmp_path, "gptq_model-4bit-32g.safetensors")
    model = Model("gptq", group=64, dims=packing.DIMS._replace(f=128))
    model.write(tmp_path, "gptq_model-4bit-64g.safetensors")
    with pytest.raises(errors.LayoutError, match="two layouts at once; name the one you mean"):
        open_checkpoint(tmp_path)
    expect(tmp_path / "gptq_model-4bit-64g.safetensors", model)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_the_package_s_own_document_is_enough(tmp_path: Path, kind: str) -> None:
    model = Model(kind, symmetric=False)
    model.write(tmp_path, beside=True, inside=False)
    expect(tmp_path, model)
    if kind == "awq":  # its older spelling
        own = {"zero_point": True, "q_group_size": packing.GROUP, "w_bit": 4, "version": "GEMM"}
        make.write_json(tmp_path / "quant_config.json", own)
        expect(tmp_path, model)


def test_documents_that_contradict_each_other(tmp_path: Path) -> None:
    """transformers reads the one, auto-gptq the other."""
    Model("gptq").write(tmp_path, beside=True)
    edit(tmp_path / "quantize_config.json", lambda told: told.update(group_size=128))
    with pytest.raises(errors.ConfigError, match="group_size is not that of config.json's.*expected 32, found 128"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("where", ["config.json", "quantize_config.json"])
def test_what_either_document_tells_is_known(tmp_path: Path, where: str) -> None:
    """Of two that agree the one may be silent."""
    model = Model("gptq", about={"checkpoint_format": "gptq_v2"}, symmetric=False)
    model.write(tmp_path, beside=True)
    edit(tmp_path / "quantize_config.json", lambda told: told.pop("quant_method"))
    if where == "config.json":
        edit(tmp_path / "quantize_config.json", lambda told: [told.pop(key) for key in ("checkpoint_format", "bits")])
    else:
        edit(tmp_path / "config.json", lambda told: told["quantization_config"].pop("checkpoint_format"))
    expect(tmp_path, model)


def test_a_document_of_another_quantization_is_left_alone(tmp_path: Path) -> None:
    model = Model("awq", symmetric=False)
    model.write(tmp_path)
    make.write_json(tmp_path / "quantize_config.json", {"bits": 3, "group_size": 7, "checkpoint_format": "marlin"})
    expect(tmp_path, model)


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_without_any_document_nothing_is_guessed(tmp_path: Path, kind: str) -> None:
    Model(kind).write(tmp_path, inside=False)
    with pytest.raises(errors.QuantizedError, match="is quantized .*, and neither config.json nor .* tells how"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("kind", "about"),
    [
        ("gptq", {"checkpoint_format": "marlin"}),
        ("gptq", {"is_marlin_format": True}),
        ("gptq", {"pack_dtype": "int16"}),
        ("gptq", {"quant_method": "auto-round"}),
        ("awq", {"version": "gemv"}),
        ("awq", {"bits": 8}),
        ("compressed-tensors", {"format": "int-quantized"}),
        ("compressed-tensors", {"config_groups": {}}),
    ],
)  # fmt: skip
def test_other_forms_of_the_same_packages_are_refused(tmp_path: Path, kind: str, about: dict[str, Any]) -> None:
    Model(kind).write(tmp_path)
    edit(tmp_path / "config.json", lambda told: told["quantization_config"].update(about))
    with pytest.raises(errors.QuantizedError, match="in no form that is read here"):
        open_checkpoint(tmp_path)


def test_gptqmodel_s_keys_are_passed_over(tmp_path: Path) -> None:
    about = {
        "lm_head": False, "pack_dtype": "int32", "format": "gptq", "act_group_aware": False,
        "meta": {"quantizer": ["gptqmodel:7.7.0"], "damp_percent": 0.05, "static_groups": False},
    }  # fmt: skip
    model = Model("gptq", spelling="v5", about=about)
    expect(model.write(tmp_path, beside=True), model)


@pytest.mark.parametrize(("kind", "form"), [("gptq", "auto_round:auto_gptq"), ("awq", "auto_round:auto_awq")])
def test_auto_round_s_own(tmp_path: Path, kind: str, form: str) -> None:
    about = {"quant_method": "auto-round", "packing_format": form, "version": None, "data_type": "int", "iters": 200}
    model = Model(kind, symmetric=False, about=about, spelling="hybrid")
    model.stored = {name: part for name, part in model.stored.items() if not name.endswith("g_idx")}
    expect(model.write(tmp_path), model)


def test_single_modules_of_other_bits(tmp_path: Path) -> None:
    """GPTQModel's `dynamic`: where g_idx is there, a matrix tells its own bits and groups."""
    model, other = Model("gptq"), Model("gptq", bits=8, group=16)
    mine = {name for name in model.stored if ".self_attn.v_proj." in name}
    model.stored |= {name: other.stored[name] for name in mine}
    model.dense |= {name: part for name, part in other.dense.items() if ".self_attn.v_proj." in name}
    found = expect(model.write(tmp_path), model)
    assert [format.about for format in found.quantized()] == [
        "4 bits, groups of 32, symmetric", "8 bits, groups of 16, symmetric"
    ]  # fmt: skip
    assert found.quantization == "gptq"


def test_shards(tmp_path: Path) -> None:
    model = Model("awq", symmetric=False)
    expect(model.write_shards(tmp_path), model)


@pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
def test_a_missing_part_is_named(tmp_path: Path, part: str) -> None:
    model = Model("gptq")
    del model.stored[Q + part]
    model.write(tmp_path)
    with pytest.raises(errors.LayoutError, match=r"layers\.0\.self_attn\.q_proj\.\w+: lacks one tensor") as caught:
        open_checkpoint(tmp_path)
    assert part == "qweight" or str(caught.value.tensor) == Q + part


def test_zeros_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    model = Model("compressed-tensors", symmetric=False)
    del model.stored[Q + "weight_zero_point"]
    with pytest.raises(errors.LayoutError, match=r"q_proj\.weight_zero_point: lacks one tensor"):
        open_checkpoint(model.write(tmp_path))


def test_bits_that_are_not_those_of_the_words(tmp_path: Path) -> None:
    model = Model("compressed-tensors")
    model.write(tmp_path)
    weights = "quantization_config"
    edit(tmp_path / "config.json", lambda told: told[weights]["config_groups"]["group_0"]["weights"].update(num_bits=8))
    with pytest.raises(errors.TensorError, match=r"weight_packed: wrong shape: expected \(64, 16\), found \(64, 8\)"):
        open_checkpoint(tmp_path)


def test_a_g_idx_that_names_no_group_is_told_with_its_matrix(tmp_path: Path) -> None:
    model = Model("gptq")
    model.stored[Q + "g_idx"][5] = 2
    found = open_checkpoint(model.write(tmp_path))
    with pytest.raises(
        errors.TensorError, match=r"model.safetensors: tensor .*q_proj.* names a group that is none of the 2"
    ):
        found.read(Slot(Role.Q, 0))


@pytest.mark.parametrize("dtype", ["keep", "bf16", "f32"])
def test_made_dense(tmp_path: Path, dtype: str) -> None:
    """Nothing tells of the quantization any more; a cast is rounded once."""
    model = Model("gptq", symmetric=False, spelling="v5")
    model.write(tmp_path / "q", beside=True)
    edit(tmp_path / "q" / "config.json", lambda told: told.update(torch_dtype="bfloat16"))  # as TheBloke's have it
    (tmp_path / "q" / "special.json").write_text("{}", "utf-8")
    job.run(conversion.plan_hf(open_checkpoint(tmp_path / "q"), conversion.Options(dtype=dtype)), tmp_path / "dense")
    files = {path.name for path in (tmp_path / "dense").iterdir()}
    assert files == {"config.json", "model.safetensors", "mixtools.json", "special.json"}
    config = json.loads((tmp_path / "dense" / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["torch_dtype"] == {"keep": "float16", "bf16": "bfloat16", "f32": "float32"}[dtype]
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    if dtype == "keep":
        make.assert_same(stored, model.dense)
        return
    grid = Model("gptq", symmetric=False)
    for name, part in grid.dense.items():
        if name.removesuffix("weight") + "qweight" not in grid.stored:
            assert torch.equal(stored[name], part.to(stored[name].dtype))
    exact = stored[Q + "weight"].double()
    scales = grid.stored[Q + "scales"].T.double().repeat_interleave(packing.GROUP, 1)
    if dtype == "f32":  # whole multiples of the scales, to the last bit
        assert torch.equal((exact / scales).round() * scales, exact)
    else:
        assert (exact - model.dense[Q + "weight"].double()).abs().max() <= 2**-8 * exact.abs().max()


def test_a_folder_that_only_says_so_is_read_as_it_lies(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, make.hf(make.torrent(packing.DIMS), packing.DIMS), packing.DIMS)
    edit(folder / "config.json", lambda told: told.update(quantization_config=Model("gptq").quantization))
    assert open_checkpoint(folder).quantization is None


def test_compressed_tensors_with_an_order_of_columns(tmp_path: Path) -> None:
    """weight_g_idx, as llm-compressor writes it with actorder."""
    model = Model("compressed-tensors", symmetric=False)
    name = "model.layers.0.self_attn.q_proj."
    index = torch.randperm(packing.DIMS.d, generator=torch.Generator().manual_seed(0)) // packing.GROUP
    model.stored[name + "weight_g_idx"] = index.int()
    found = open_checkpoint(model.write(tmp_path))
    parts = PackedInts(4, packing.GROUP, symmetric=False)
    codes = model.dense[name + "weight"].float() / model.stored[name + "weight_scale"].float().repeat_interleave(32, 1)
    zeros = torch.tensor([[(word >> 4 * at) & 15 for word in line] for line in
                          model.stored[name + "weight_zero_point"].tolist() for at in range(8)])  # fmt: skip
    codes = codes.round() + zeros.repeat_interleave(32, 1)
    expected = (codes - zeros[:, index]) * model.stored[name + "weight_scale"].float()[:, index]
    assert torch.equal(found.read(Slot(Role.Q, 0)), expected.half())
    assert dataclasses.replace(parts, indexed=True) == found.format(Slot(Role.Q, 0))
