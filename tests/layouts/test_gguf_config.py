"""What a GGUF's keys say of a model: read, missing, impossible, and from a config.json there and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantizing
from gguf_old import all_of, keys, of_2023, write
from layouts import make
from quantizing import quantize

from mixtools import errors
from mixtools.layouts.detect import open_checkpoint
from mixtools.scaling import RopeScaling

ODD = make.Dims(d=32, f=64, layers=2, heads=2, kv=1, hd=16, vocab=5, experts=3)
VALUES = quantizing.expected(make.hf(make.torrent(ODD), ODD), ODD)


def new(folder: Path, kind: str = "F16", **changes: Any) -> Path:
    return write(folder / f"new.{kind}.gguf", VALUES, all_of(kind, "F32"), keys(ODD, **changes))


@pytest.mark.parametrize(
    "key",
    ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
     "expert_used_count", "attention.layer_norm_rms_epsilon"],
)  # fmt: skip
def test_keys_that_are_missing(tmp_path: Path, key: str) -> None:
    path = new(tmp_path, **{f"llama.{key}": None})
    with pytest.raises(errors.ConfigError, match=f"lacks llama.{key}") as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", "2"), ("block_count", -1.5), ("block_count", 10**9), ("embedding_length", True),
        ("embedding_length", 10**9), ("expert_count", 2.5), ("expert_used_count", 9), ("attention.head_count", [2, 1]),
        ("attention.head_count", 0), ("attention.head_count_kv", 3), ("attention.layer_norm_rms_epsilon", "x"),
        ("rope.freq_base", -1.0), ("rope.freq_base", float("nan")), ("rope.dimension_count", 15),
        ("rope.dimension_count", 8), ("rope.scaling.type", 5), ("rope.scaling.factor", "x"),
    ],
)  # fmt: skip
def test_keys_that_cannot_be(tmp_path: Path, key: str, value: Any) -> None:
    """One of our errors, with the file, whatever stands there."""
    more = {"llama.rope.scaling.factor": 2.0} if key == "rope.scaling.type" else {}
    more |= {"llama.rope.scaling.type": "yarn"} if key == "rope.scaling.factor" else {}
    path = new(tmp_path, **{**more, f"llama.{key}": value})
    with pytest.raises(errors.MixtoolsError) as caught:
        open_checkpoint(path)
    assert isinstance(caught.value, errors.InputError) and str(path) in str(caught.value)


def test_keys_a_layer_each(tmp_path: Path) -> None:
    """As some writers have them, of all layers the same."""
    path = new(tmp_path, **{"llama.attention.head_count_kv": [1, 1], "llama.feed_forward_length": [64, 64]})
    assert open_checkpoint(path).config.num_kv_heads == 1


def test_keys_that_may_be_missing(tmp_path: Path) -> None:
    """What llama.cpp takes then: as many key heads as heads, the width's share of a head, Llama's theta."""
    dims = ODD._replace(kv=2)
    values = quantizing.expected(make.hf(make.torrent(dims), dims), dims)
    left = {"llama.attention.head_count_kv": None, "llama.rope.dimension_count": None, "llama.rope.freq_base": None}
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", values, all_of("F16"), keys(dims, **left)))
    assert (checkpoint.config.num_kv_heads, checkpoint.config.head_dim) == (2, 16)
    assert checkpoint.config.rope_theta == 10000.0


def test_numbers_are_the_shortest_of_their_floats(tmp_path: Path) -> None:
    """1e-05, not 9.999999747378752e-06: else an output of it would differ from its source."""
    checkpoint = open_checkpoint(new(tmp_path))
    assert checkpoint.config.rms_norm_eps == 1e-5 and checkpoint.document["rms_norm_eps"] == 1e-5
    assert checkpoint.config.max_position_embeddings == 32768


@pytest.mark.parametrize(
    ("told", "scaling"),
    [
        ({"type": "none"}, None),
        ({"type": "linear", "factor": 4.0}, RopeScaling("linear", 4.0)),
        ({"type": "yarn", "factor": 2.5, "original_context_length": 4096, "yarn_beta_fast": 16.0},
         RopeScaling("yarn", 2.5, 4096, beta_fast=16.0, beta_slow=1.0, truncate=True)),
        ({"type": "yarn", "factor": 8.0, "original_context_length": 4096, "yarn_beta_slow": 2.0, "attn_factor": 1.0},
         RopeScaling("yarn", 8.0, 4096, beta_fast=32.0, beta_slow=2.0, truncate=True)),
    ],
)  # fmt: skip
def test_stretched_positions(tmp_path: Path, told: dict[str, Any], scaling: RopeScaling | None) -> None:
    path = new(tmp_path, **{f"llama.rope.scaling.{key}": value for key, value in told.items()})
    assert open_checkpoint(path).config.rope_scaling == scaling


def _old(folder: Path, **changes: Any) -> Path:
    return write(folder / "old.gguf", of_2023(VALUES), all_of("F16"), keys(ODD, **changes))


def test_stretched_in_the_spelling_of_2023(tmp_path: Path) -> None:
    path = _old(tmp_path, **{"llama.rope.scale_linear": 4.0})
    assert open_checkpoint(path).config.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize("told", [{"attn_factor": 1.5}, {"yarn_attn_factor": 0.5}, {"type": "longrope"}])
def test_stretched_as_nothing_here_can(tmp_path: Path, told: dict[str, Any]) -> None:
    told = {"type": "yarn", "factor": 2.0, **told}
    path = new(tmp_path, **{f"llama.rope.scaling.{key}": value for key, value in told.items()})
    with pytest.raises(errors.ConfigError):
        open_checkpoint(path)


def test_stretched_both_ways(tmp_path: Path) -> None:
    """From a config.json into the metadata and back."""
    folder = make.write_hf(tmp_path / "x", make.hf(make.torrent(ODD), ODD), ODD)
    for number, scaling in enumerate((
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, "beta_slow": 0.5},
    )):  # fmt: skip
        make.write_json(folder / "config.json", {**ODD.config(), "rope_scaling": scaling})
        quantize(folder, tmp_path / f"{number}.gguf", "F16")
        assert open_checkpoint(tmp_path / f"{number}.gguf").config == open_checkpoint(folder).config


@pytest.mark.parametrize("kind", ["Q8_0", "F16"])
def test_a_vocabulary_of_another_size_than_told(tmp_path: Path, kind: str) -> None:
    """The embedding's rows decide: old files tell no size, and some a wrong one."""
    path = new(tmp_path, kind, **{"llama.vocab_size": 99})
    assert open_checkpoint(path).config.vocab_size == 5
