"""Experts under other names: every tensor as it was, in the files that it was in, and the documents in step."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import packing
import pytest
from converting import environment, files
from layouts import make
from packing import Model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mixtools
from mixtools import errors
from mixtools.checking import gates
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.hf import HF, HF_V5
from mixtools.respelling import respelled

OTHER = {"legacy": "v5", "v5": "legacy"}


def respell(source: Path, out: Path, to: str, **how: Any) -> Path:
    mixtools.expert_names(source, out, to=to, **how)
    return out


def raw(folder: Path) -> dict[str, dict[str, bytes]]:
    """By file and name, the bytes of every tensor."""
    return {
        path.name: {name: make.bits(tensor) for name, tensor in load_file(path).items()}
        for path in folder.glob("*.safetensors")
    }


def renamed(model: Model, spelling: str) -> Model:
    return Model(model.kind, model.bits, model.group, model.symmetric, model.shuffled, spelling, model.about)


@pytest.mark.parametrize("start", ["legacy", "v5", "hybrid"])
@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors"])
def test_there_and_back(tmp_path: Path, kind: str, start: str) -> None:
    model = Model(kind, symmetric=False, spelling=start)
    source = model.write_shards(tmp_path / "a")
    (source / "quant_log.csv").write_text("layer,loss\n", "utf-8")
    (source / "recipe.yaml").write_text("quant_stage: {}\n", "utf-8")
    for at, to in enumerate(["v5", "legacy"] if start == "legacy" else ["legacy", "v5"]):
        out = respell(source, tmp_path / f"{at}", to)
        expected = renamed(model, to)
        found = open_checkpoint(out)
        make.assert_same(make.read_all(found), model.dense)
        assert found.layout.name == {"legacy": "hf", "v5": "hf-v5"}[to]
        for file, tensors in raw(out).items():
            assert {name: make.bits(expected.stored[name]) for name in tensors} == tensors
            assert len(tensors) == len(load_file(source / file))
        told = json.loads((out / "config.json").read_text("utf-8"))
        assert told["quantization_config"] == expected.quantization
        index = json.loads((out / make.INDEX).read_text("utf-8"))
        assert index["metadata"] == {"total_size": 1, "made_by": "another"}
        assert index["weight_map"].keys() == expected.stored.keys()
        assert (out / "quant_log.csv").read_text("utf-8") == "layer,loss\n"
        assert (out / "recipe.yaml").exists()
        source = out
    if start != "hybrid":
        assert raw(out) == raw(tmp_path / "a")


def test_a_dense_folder_and_its_documents(tmp_path: Path) -> None:
    """What no name stands in is copied byte for byte."""
    tensors = make.hf(make.torrent(packing.DIMS), packing.DIMS)
    source = make.write_hf(tmp_path / "a", tensors, packing.DIMS)
    (source / "README.md").write_text("block_sparse_moe.experts.0.w1\n", "utf-8")
    out = respell(source, tmp_path / "b", "v5")
    found = open_checkpoint(out)
    make.assert_same(make.read_all(found), tensors)
    assert {name for names in raw(out).values() for name in names} == {
        HF_V5.piece(slot, found.config).name for slot in found.slots()
    }
    assert files(out)["config.json"] == files(source)["config.json"]
    assert files(out)["README.md"] == files(source)["README.md"]
    assert gates.kind_of(found, out) == "dense"
    back = open_checkpoint(respell(out, tmp_path / "c", "legacy"))
    assert set(back.store.entries) == {HF.piece(slot, back.config).name for slot in back.slots()}


def test_auto_gptq_s_folder_keeps_its_biases_and_its_name(tmp_path: Path) -> None:
    model = Model("gptq")
    stem = "model.layers.1.block_sparse_moe.experts.2.w2."
    model.stored[stem + "bias"] = model.stored["model.norm.weight"] * 0
    source = model.write(tmp_path / "a", "gptq_model-4bit-32g.safetensors", beside=True, inside=False)
    out = respell(source, tmp_path / "b", "v5")
    names = raw(out)["gptq_model-4bit-32g.safetensors"].keys()
    assert "model.layers.1.mlp.experts.2.down_proj.bias" in names and len(names) == len(model.stored)
    make.assert_same(make.read_all(open_checkpoint(out)), model.dense)
    assert files(out)["quantize_config.json"] == files(source)["quantize_config.json"]
    with safe_open(out / "gptq_model-4bit-32g.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


NAMING = {
    "bits": 4,
    "ignore": ["model.layers.0.block_sparse_moe.gate", "lm_head", r"re:.*block_sparse_moe\.gate$"],
    "modules_to_not_convert": ["gate", "experts.0.w1"],
    "modules_in_block_to_quantize": [
        ["self_attn.q_proj"], ["block_sparse_moe.experts.0.w1", "block_sparse_moe.experts.0.w3"]
    ],
    "dynamic": {r"-:.*block_sparse_moe\.experts\.3\.w2.*": {}, r"+:.*\.self_attn\..*": {"bits": 8}},
    "extra_config": {"model.layers.1.block_sparse_moe.experts.7.w2": {"bits": 8}},
    "config_groups": {"group_0": {"targets": ["Linear", r"re:.*w1$"], "weights": {"num_bits": 4}}},
    "meta": {"note": "w1 of block_sparse_moe"},
    "model_name_or_path": "/models/w1/block_sparse_moe",
}  # fmt: skip


def test_names_are_re_spelled_where_modules_are_named_and_nowhere_else() -> None:
    found = respelled({"quantization_config": NAMING, "w1": "w1"}, HF_V5, inside=False)
    about = found["quantization_config"]
    assert about == {
        **NAMING,
        "ignore": ["model.layers.0.mlp.gate", "lm_head", r"re:.*mlp\.gate$"],
        "modules_to_not_convert": ["gate", "experts.0.gate_proj"],
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"]],
        "dynamic": {r"-:.*mlp\.experts\.3\.down_proj.*": {}, r"+:.*\.self_attn\..*": {"bits": 8}},
        "extra_config": {"model.layers.1.mlp.experts.7.down_proj": {"bits": 8}},
        "config_groups": {"group_0": {"targets": ["Linear", r"re:.*gate_proj$"], "weights": {"num_bits": 4}}},
    }
    assert found["w1"] == "w1"
    assert respelled(found, HF, inside=False) == {"quantization_config": NAMING, "w1": "w1"}
    assert respelled({"a": 1}, HF_V5, inside=False) == {"a": 1}


def test_what_cannot_be_re_spelled(tmp_path: Path) -> None:
    tensors = make.hf(make.torrent(packing.DIMS), packing.DIMS)
    source = make.write_hf(tmp_path / "d", tensors, packing.DIMS)
    with pytest.raises(errors.UsageError, match="legacy already"):
        respell(source, tmp_path / "out", "legacy")
    with pytest.raises(errors.UsageError, match="'v4' is not one of legacy, v5"):
        respell(source, tmp_path / "out", "v4")
    fused = make.write_hf(tmp_path / "f", make.fused(tensors, packing.DIMS), packing.DIMS)
    for folder in (
        fused,
        make.write_a(tmp_path / "a", packing.DIMS),
        make.write_e(tmp_path / "e", tensors, packing.DIMS),
    ):
        with pytest.raises(errors.LayoutError, match="`mixtools convert to-hf` makes such a folder"):
            respell(folder, tmp_path / "out", "v5")
    assert not (tmp_path / "out").exists()


def test_tied_and_wrapped_models_keep_their_other_names(tmp_path: Path) -> None:
    tensors = make.hf(make.torrent(packing.DIMS), packing.DIMS)
    del tensors["model.embed_tokens.weight"]
    tensors = {f"module.{name}": tensor for name, tensor in tensors.items()}
    tensors["module.model.layers.0.self_attn.rotary_emb.inv_freq"] = tensors["module.model.norm.weight"].clone()
    make.write_json(tmp_path / "config.json", {**packing.DIMS.config(), "tie_word_embeddings": True})
    save_file(tensors, tmp_path / "model.safetensors")
    before = make.read_all(open_checkpoint(tmp_path))
    found = open_checkpoint(respell(tmp_path, tmp_path / "b", "v5"))
    make.assert_same(make.read_all(found), before)
    assert "module.lm_head.weight" in found.store.entries and len(found.store.entries) == len(tensors)


KILLED = """
import os, signal, sys
import mixtools
from mixtools.storage import output
written, write = 0, output.Writing.write
def stop(self, block):
    global written
    written += 1
    if written > 40:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, block)
output.Writing.write = stop
mixtools.expert_names(sys.argv[1], sys.argv[2], to="v5", jobs=1)
"""


def test_a_killed_run_continues_to_the_same_bytes(tmp_path: Path) -> None:
    source = Model("gptq").write_shards(tmp_path / "a")
    out = tmp_path / "b"
    run = [sys.executable, "-c", KILLED, str(source), str(out)]
    assert subprocess.run(run, env=environment(), check=False).returncode == -signal.SIGKILL
    assert not (out / "config.json").exists()
    result = mixtools.expert_names(source, out, to="v5", jobs=2)
    assert result.document["resumed_bytes"] > 0
    whole = respell(source, tmp_path / "c", "v5")
    assert files(out) == files(whole)


def test_damage_is_not_carried_on(tmp_path: Path) -> None:
    """A source of ours has checksums; a flipped bit is found before the copy is whole."""
    source = respell(Model("gptq").write(tmp_path / "a"), tmp_path / "b", "v5")
    file = source / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(errors.ChecksumError):
        respell(source, tmp_path / "c", "legacy")
