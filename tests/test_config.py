"""Configurations in every spelling, and everything that is none."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mixtools import errors
from mixtools.config import MixtralConfig, from_document, load_json

PARAMS = {
    "dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32, "n_kv_heads": 8,
    "norm_eps": 1e-05, "vocab_size": 32000, "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}  # fmt: skip
HF = {
    "architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mixtral", "num_attention_heads": 32,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "vocab_size": 32000,
}  # fmt: skip
MIXTRAL = MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000)


def without(document: dict, *keys: str) -> dict:
    return {key: value for key, value in document.items() if key not in keys}


@pytest.mark.parametrize(
    "document",
    [
        PARAMS,
        HF,
        {**PARAMS, "rope_theta": 1e6},
        {**PARAMS, "rope_theta": None},
        {**PARAMS, "rope_theta": 1000000},
        {**without(PARAMS, "moe"), "num_experts_per_tok": 2, "num_experts": 8},
        {**without(PARAMS, "moe", "dim", "hidden_dim"), "hidden_size": 4096, "intermediate_size": 14336,
         "num_local_experts": 8, "num_experts_per_tok": 2},
        {**PARAMS, "hidden_size": 4096, "num_hidden_layers": 32},
        {**PARAMS, "moe": {"num_experts_per_tok": 2, "num_local_experts": 8}},
        without(PARAMS, "head_dim", "norm_eps"),
        {**without(HF, "rope_theta", "torch_dtype"), "dtype": "bfloat16", "head_dim": 128,
         "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {**HF, "rope_parameters": {"rope_theta": 1e6}, "rope_scaling": None, "head_dim": None},
        {**HF, "rope_scaling": {"type": "default"}},
        {**PARAMS, "unknown": [1, {"x": None}]},
    ],
)  # fmt: skip
def test_every_spelling(document: dict) -> None:
    assert from_document(document, "x.json") == MIXTRAL


def test_8x22b_has_longer_positions() -> None:
    large = {**PARAMS, "dim": 6144, "n_heads": 48, "n_layers": 56, "hidden_dim": 16384}
    assert from_document(large, "params.json").max_position_embeddings == 65536
    assert from_document({**large, "max_seq_len": 1024}, "params.json").max_position_embeddings == 1024


def test_as_many_key_value_heads_as_heads_by_default() -> None:
    assert from_document(without(HF, "num_key_value_heads"), "x").num_kv_heads == 32


FIELDS = ("dim", "n_layers", "head_dim", "hidden_dim", "n_heads", "n_kv_heads", "vocab_size")
NONSENSE = [
    0, -1, 1 << 24, 1 << 70, 10**4000, 1.5, 4096.0, True, False, "4096", "", [], [1], {}, {"a": 1}, float("nan"),
    float("inf"),
]  # fmt: skip


@pytest.mark.parametrize("value", NONSENSE, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize("field", FIELDS)
def test_nonsense(field: str, value: object) -> None:
    with pytest.raises(errors.ConfigError, match=field) as caught:
        from_document({**PARAMS, field: value}, "params.json")
    assert caught.value.file == "params.json"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("field", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize(
    "value", [0, -1e6, 1e300, 10**400, float("nan"), float("inf"), True, "1e6", [1e6], {}], ids=lambda v: repr(v)[:10]
)
def test_nonsensical_numbers(field: str, value: object) -> None:
    with pytest.raises(errors.ConfigError, match=field):
        from_document({**PARAMS, field: value}, "params.json")


@pytest.mark.parametrize("field", ["num_experts_per_tok", "num_experts"])
@pytest.mark.parametrize("value", [0, -2, 1.0, "8", None, [8], 1 << 20])
def test_nonsensical_experts(field: str, value: object) -> None:
    with pytest.raises(errors.ConfigError):
        from_document({**PARAMS, "moe": {**PARAMS["moe"], field: value}}, "params.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 2048}, "contradict"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 1e6}}, "rope_theta contradict"),
        ({"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e6}}, "rope_theta contradict"),
        ({"num_experts": 16}, "num_experts contradict"),
        ({"num_local_experts": 16}, "contradict"),
        ({"moe": 8}, "not an object"),
        ({"moe": [8]}, "not an object"),
        ({"rope_parameters": "default"}, "not an object"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}}, "'yarn', which no Mixtral uses"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear'"),
        ({"rope_scaling": {"type": ["linear"]}}, "no Mixtral uses"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "not a number"),
        ({"n_kv_heads": 5}, "evenly"),
        ({"n_kv_heads": 64}, "evenly"),
        ({"head_dim": 3}, "odd"),
        ({"moe": {"num_experts_per_tok": 9, "num_experts": 8}}, "only 8"),
        ({"n_layers": 1 << 20}, "which no model has"),
        ({"n_heads": 31, "head_dim": None}, "do not divide"),
        ({"n_heads": 8192, "n_kv_heads": 8, "head_dim": None}, "do not divide"),
        ({"model_type": "llama"}, "'llama'; a Mixtral has 'mixtral'"),
        ({"model_type": [["x"]]}, "a Mixtral has"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_bias": True}, "attention_bias"),
    ],
)
def test_contradictions(change: dict, message: str) -> None:
    with pytest.raises(errors.ConfigError, match=message):
        from_document({**PARAMS, **change}, "params.json")


@pytest.mark.parametrize("key", ["dim", "n_layers", "hidden_dim", "n_heads", "vocab_size"])
def test_missing(key: str) -> None:
    with pytest.raises(errors.ConfigError, match=f"lacks {key}"):
        from_document(without(PARAMS, key), "params.json")
    with pytest.raises(errors.ConfigError, match=f"lacks {key}"):
        from_document({**PARAMS, key: None}, "params.json")


@pytest.mark.parametrize("document", [None, [], "x", 1, [PARAMS]])
def test_no_object(document: object) -> None:
    with pytest.raises(errors.ConfigError, match="not a JSON object"):
        from_document(document, "params.json")  # type: ignore[arg-type]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*PARAMS, *HF, "rope_parameters", "rope_scaling", "rope_theta", "max_seq_len"])


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_only_our_errors(change: dict) -> None:
    try:
        config = from_document({**PARAMS, **change}, "params.json")
    except errors.ConfigError:
        return
    for field in dataclasses.fields(config):
        assert getattr(config, field.name) > 0


@pytest.mark.parametrize(
    "text",
    [
        b"", b"{", b'{"a": 1,}', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b'{"a":' * 50_000, b"9" * 5000,
        b'{"dim": 1, "dim": 2}', b"{} {}", b"\0" * 10,
    ],
    ids=lambda text: repr(text[:12]),
)  # fmt: skip
def test_no_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "params.json").write_bytes(text)
    with pytest.raises(errors.ConfigError, match="not valid JSON") as caught:
        load_json(tmp_path / "params.json")
    assert caught.value.file == str(tmp_path / "params.json")


def test_unreadable(tmp_path: Path) -> None:
    with pytest.raises(errors.ConfigError, match="cannot be read"):
        load_json(tmp_path / "none")
    (tmp_path / "large").write_bytes(b" " * (2 << 20))
    with pytest.raises(errors.ConfigError, match="larger than"):
        load_json(tmp_path / "large")
    (tmp_path / "twice").write_text('{"dim": 1, "dim": 1}')
    assert load_json(tmp_path / "twice") == {"dim": 1}


@pytest.mark.parametrize("config", [MIXTRAL, MixtralConfig(48, 40, 2, 4, 2, 16, 97, 4, 1, 1e-6, 5e5, 77)])
def test_there_and_back(config: MixtralConfig) -> None:
    assert from_document(json.loads(json.dumps(config.to_params())), "params.json") == config
    assert from_document(json.loads(json.dumps(config.to_hf("bfloat16"))), "config.json") == config


@pytest.mark.parametrize("head_dim", [None, 24])
def test_as_transformers_writes_it(tmp_path: Path, head_dim: int | None) -> None:
    theirs = transformers.MixtralConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=head_dim, vocab_size=77, num_local_experts=5, num_experts_per_tok=3, rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 12345.0}, max_position_embeddings=99,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    found = from_document(load_json(tmp_path / "config.json"), tmp_path / "config.json")
    assert found == MixtralConfig(64, 96, 3, 4, 2, head_dim or 16, 77, 5, 3, 1e-6, 12345.0, 99)
