"""Stretched rotary positions in every spelling, as transformers reads and writes them, and what is refused."""

from __future__ import annotations

import dataclasses
import json

import pytest
import transformers

from mixtools import errors
from mixtools.config import MixtralConfig, from_document
from mixtools.scaling import RopeScaling

MIXTRAL = MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000)
HF = MIXTRAL.to_hf("bfloat16")
LINEAR, DYNAMIC = RopeScaling("linear", 2.5), RopeScaling("dynamic", 4.0)
YARN = RopeScaling("yarn", 4.0, 8192, beta_fast=32.0, beta_slow=1.0, truncate=True)
ODD = dataclasses.replace(YARN, attention_factor=1.5, beta_fast=16.0, mscale=0.7, truncate=False)
LLAMA3 = RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)


@pytest.mark.parametrize("scaling", [LINEAR, DYNAMIC, YARN, ODD, LLAMA3])
def test_there_and_back(scaling: RopeScaling) -> None:
    config = dataclasses.replace(MIXTRAL, sliding_window=4096, rope_scaling=scaling)
    assert from_document(json.loads(json.dumps(config.to_params())), "params.json") == config
    assert from_document(json.loads(json.dumps(config.to_hf("bfloat16"))), "config.json") == config


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("scaling", [None, LINEAR, DYNAMIC, YARN, ODD, LLAMA3])
def test_transformers_reads_what_we_write(scaling: RopeScaling | None, window: int | None) -> None:
    """In the old spelling: the new one is not written, and what it says must come out of the old one."""
    config = dataclasses.replace(MIXTRAL, sliding_window=window, rope_scaling=scaling, rope_theta=1e5)
    document = config.to_hf("bfloat16")
    assert "rope_parameters" not in document
    theirs = transformers.MixtralConfig(**json.loads(json.dumps(document)))
    assert theirs.sliding_window == window
    found = theirs.rope_parameters
    assert found["rope_theta"] == 1e5
    if scaling is None:
        assert found["rope_type"] == "default"
        return
    assert document["rope_scaling"]["type"] == document["rope_scaling"]["rope_type"] == found["rope_type"]
    usual = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}  # transformers' own, and left out
    for name, value in dataclasses.asdict(scaling).items():
        if name != "type" and value is not None:
            assert found.get(name, usual.get(name)) == value


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4}}, RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 1e6}}, RopeScaling("linear", 4.0)),
        ({"rope_scaling": None, "rope_parameters": {"type": "dynamic", "factor": 2}}, RopeScaling("dynamic", 2.0)),
        ({"rope_scaling": {}, "rope_parameters": {"type": "dynamic", "factor": 2}}, RopeScaling("dynamic", 2.0)),
        # both spellings; and one added by hand to what transformers 5 had saved
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
         RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}},
         RopeScaling("linear", 4.0)),
        ({"rope_scaling": {"type": "dynamic", "factor": 4, "original_max_position_embeddings": 9}},
         RopeScaling("dynamic", 4.0)),
        ({"rope_scaling": {"type": "yarn", "factor": 4}},
         RopeScaling("yarn", 4.0, 32768, beta_fast=32.0, beta_slow=1.0, truncate=True)),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 8192, "beta_fast": 0}},
         YARN),
        ({"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192}}, YARN),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 7},
          "original_max_position_embeddings": 8192}, YARN),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                           "original_max_position_embeddings": 8192}, "partial_rotary_factor": 1.0}, LLAMA3),
        ({"partial_rotary_factor": 0.5}, None),  # transformers' Mixtral does not look at it
        ({"rope_scaling": {"type": "default"}}, None),
    ],
)  # fmt: skip
def test_scaling_in_either_spelling(change: dict, expected: RopeScaling | None) -> None:
    assert from_document({**HF, **change}, "config.json") == dataclasses.replace(MIXTRAL, rope_scaling=expected)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"type": "linear", "factor": 4}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 7},
         "original_max_position_embeddings": 8192},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"rope_scaling": {}, "rope_parameters": {"type": "dynamic", "factor": 2.0}},
    ],
)  # fmt: skip
def test_of_several_the_scaling_that_transformers_takes(change: dict) -> None:
    document = {**HF, **change}
    found = transformers.MixtralConfig(**json.loads(json.dumps(document)))
    found.standardize_rope_params()  # as every model does
    ours = from_document(document, "config.json").rope_scaling
    assert ours is not None
    for name in ("type", "factor", "original_max_position_embeddings"):
        theirs = found.rope_parameters.get("rope_type" if name == "type" else name)
        assert getattr(ours, name) == theirs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 4}}, "rope_scaling asks for 'longrope', which is not support"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "rope_parameters asks for 'proportional'.*linear, dynami"),
        ({"rope_scaling": {"type": "su"}}, "'su'"),
        ({"rope_scaling": {"type": ["linear"]}}, "asks for ..linear.., which is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling of type linear lacks factor"),
        ({"rope_scaling": {"type": "yarn"}}, "lacks factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 1}}, "lacks high_freq_factor"),
        ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor is None, not a number"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, "not a number"),
        ({"rope_scaling": {"type": "dynamic", "factor": 0}}, "factor is 0, which no model has"),
        ({"rope_scaling": {"type": "dynamic", "factor": float("nan")}}, "which no model has"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "not a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "beta_fast": "32"}}, "beta_fast is '32', not a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "truncate": 1}}, "truncate is 1, not true or false"),
        ({"rope_scaling": {"type": "yarn", "factor": 4, "original_max_position_embeddings": 1.5}}, "not an integer"),
        ({"rope_scaling": {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}}, "above low"),
        ({"rope_scaling": {"type": "linear", "rope_type": "dynamic", "factor": 2}}, "type and rope_type contradict"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"type": "linear", "factor": 4}},
         "rope_scaling and rope_parameters contradict"),
        ({"rope_scaling": {"type": "default"}, "rope_parameters": {"type": "linear", "factor": 4}}, "contradict"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": None, "rope_parameters": {"rope_theta": 1e4}},
         "rope_theta stands in rope_parameters alone"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2}, "partial_rotary_factor": 0.5}, "turns whole heads"),
        ({"rope_scaling": "linear"}, "not an object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}, "head_dim": 2}, "nothing to scale"),
        ({"yarn": {"factor": 4, "alpha": 1, "beta": 32}}, "Mistral's newer models"),
    ],
)  # fmt: skip
def test_scaling_that_cannot_be(change: dict, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message) as caught:
        from_document({**HF, **change}, "config.json")
    assert caught.value.file == "config.json"
    assert len(str(caught.value)) < 300
