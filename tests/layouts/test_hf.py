"""Layouts D, E and F against transformers, which writes them and reads what we write."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import make

from mixtools import conversion, job
from mixtools.config import MixtralConfig
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage.safetensors import read_header
from mixtools.storage.source import Source

EVEN = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)


def model_of(dims: make.Dims, canonical: make.Tensors) -> transformers.MixtralForCausalLM:
    config = transformers.MixtralConfig(**{key: v for key, v in dims.config().items() if key != "architectures"})
    model = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    own = model.state_dict()
    source = canonical if canonical.keys() == own.keys() else make.fused(canonical, dims)
    model.load_state_dict(source)
    return model


def save(model: transformers.MixtralForCausalLM, folder: Path, **options: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)


@pytest.mark.parametrize("max_shard_size", ["1GB", "2KB"])
@pytest.mark.parametrize("original", [True, False], ids=["D", "F"])
def test_what_transformers_saves(tmp_path: Path, original: bool, max_shard_size: str) -> None:
    """Config in transformers 5's spelling (rope_parameters, dtype) included."""
    canonical = make.hf(make.torrent(EVEN), EVEN)
    save(model_of(EVEN, canonical), tmp_path, save_original_format=original, max_shard_size=max_shard_size)
    names = [entry.name for path in tmp_path.glob("*.safetensors") for entry in read_header(Source(path))]
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.layout.letter == ("F" if any("gate_up_proj" in name for name in names) else "D")
    assert (tmp_path / make.INDEX).exists() == (max_shard_size == "2KB")
    make.assert_same(make.read_all(checkpoint), canonical)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    assert checkpoint.config.rope_theta == 1e6


def test_fused_is_written_when_asked_for(tmp_path: Path) -> None:
    """Else the test above would have seen layout D twice."""
    save(model_of(EVEN, make.hf(make.torrent(EVEN), EVEN)), tmp_path, save_original_format=False)
    assert open_checkpoint(tmp_path).layout.letter == "F"


@pytest.mark.parametrize("dims", [EVEN, make.Dims()], ids=["even", "odd"])
@pytest.mark.parametrize("files", [1, 3])
def test_written_by_libraries(tmp_path: Path, dims: make.Dims, files: int) -> None:
    canonical = make.hf(make.torrent(dims), dims)
    found = {
        "D": make.write_hf(tmp_path / "D", canonical, dims, files),
        "E": make.write_e(tmp_path / "E", canonical, dims, files),
        "F": make.write_hf(tmp_path / "F", make.fused(canonical, dims), dims, files),
    }
    for letter, folder in found.items():
        checkpoint = open_checkpoint(folder)
        assert checkpoint.layout.letter == letter
        make.assert_same(make.read_all(checkpoint), canonical)
        checkpoint.finish()


def test_rotary_buffers_of_old_files_are_ignored(tmp_path: Path) -> None:
    canonical = make.hf(make.torrent(EVEN), EVEN)
    buffers = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(2) for i in range(EVEN.layers)}
    checkpoint = open_checkpoint(make.write_e(tmp_path, canonical | buffers, EVEN))
    make.assert_same(make.read_all(checkpoint), canonical)


@pytest.mark.parametrize("max_shard_bytes", [1 << 30, 3000])
@pytest.mark.parametrize("dims", [EVEN, make.Dims(d=6)], ids=["even", "grouped"])
def test_transformers_loads_what_we_write(tmp_path: Path, dims: make.Dims, max_shard_bytes: int) -> None:
    tensors = make.torrent(dims)
    source = open_checkpoint(make.write_a(tmp_path / "a", dims, tensors))
    job.run(conversion.plan_hf(source, conversion.Options(max_shard_bytes=max_shard_bytes)), tmp_path / "d")
    model, info = transformers.MixtralForCausalLM.from_pretrained(
        tmp_path / "d", output_loading_info=True, dtype="auto"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype is torch.bfloat16
    own = model.state_dict()
    canonical = make.hf(tensors, dims)
    make.assert_same(own, canonical if own.keys() == canonical.keys() else make.fused(canonical, dims))


def test_config_as_transformers_reads_it(tmp_path: Path) -> None:
    config = MixtralConfig(48, 40, 2, 4, 2, 16, 97, num_experts=4, experts_per_token=1, rope_theta=5e5)
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf("float16")))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.MixtralConfig)
    document = config.to_hf("float16")
    same = {key for key in document if key not in ("rope_theta", "torch_dtype", "architectures")}
    assert {key: getattr(theirs, key) for key in same} == {key: document[key] for key in same}
    assert theirs.rope_parameters["rope_theta"] == 5e5
    assert theirs.dtype is torch.float16
