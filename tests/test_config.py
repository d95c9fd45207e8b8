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
from mixtools.checking.integrity import compare_configs
from mixtools.config import MixtralConfig, from_document, load_json
from mixtools.names import Role

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
        {**PARAMS, "model_type": "transformer"},
        {**PARAMS, "tie_word_embeddings": True},
        {**HF, "tie_word_embeddings": True},
        {**HF, "hidden_act": "swish"},
        {**HF, "attention_bias": True},
        {**PARAMS, "sliding_window": None, "yarn": None},
    ],
)  # fmt: skip
def test_every_spelling(document: dict) -> None:
    assert from_document(document, "x.json") == MIXTRAL


def test_8x22b_has_longer_positions() -> None:
    large = {**PARAMS, "dim": 6144, "n_heads": 48, "n_layers": 56, "hidden_dim": 16384}
    assert from_document(large, "params.json").max_position_embeddings == 65536
    assert from_document({**large, "max_seq_len": 1024}, "params.json").max_position_embeddings == 1024


# --- what is missing ---


@pytest.mark.parametrize(
    "there",
    [
        {},
        {"vocab_size": 500, "hidden_size": 6144, "num_attention_heads": 48},
        {"num_attention_heads": 64, "head_dim": 8},
        {"num_key_value_heads": 4, "num_local_experts": 16, "num_experts_per_tok": 3, "intermediate_size": 11},
        {"sliding_window": 4096, "rope_theta": 5e5},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rms_norm_eps": 1e-6, "max_position_embeddings": 77},
    ],
)
def test_what_is_missing_from_a_mixtrals_config_is_what_transformers_takes(there: dict) -> None:
    theirs = transformers.MixtralConfig(**json.loads(json.dumps(there)))
    ours = from_document({"model_type": "mixtral", **there}, "config.json")
    assert ours == from_document({**theirs.to_dict(), "head_dim": ours.head_dim}, "config.json")
    scaling = theirs.rope_parameters
    assert (ours.hidden_size, ours.intermediate_size, ours.num_layers, ours.num_heads, ours.num_kv_heads) == (
        theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, theirs.num_attention_heads,
        theirs.num_key_value_heads,
    )  # fmt: skip
    assert (ours.vocab_size, ours.num_experts, ours.experts_per_token, ours.rms_norm_eps, ours.rope_theta) == (
        theirs.vocab_size, theirs.num_local_experts, theirs.num_experts_per_tok, theirs.rms_norm_eps,
        scaling["rope_theta"],
    )  # fmt: skip
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.sliding_window == theirs.sliding_window
    assert (ours.rope_scaling.type if ours.rope_scaling else "default") == scaling["rope_type"]


def test_eight_key_value_heads_by_default_and_as_many_as_heads_for_null() -> None:
    """32 heads of 8 with 8 for keys and values: k and v of 64 rows, as transformers builds them."""
    small = {**without(HF, "num_key_value_heads"), "head_dim": 8}
    config = from_document(small, "config.json")
    assert (config.num_kv_heads, config.shape(Role.K), config.shape(Role.V)) == (8, (64, 4096), (64, 4096))
    assert transformers.MixtralConfig(**small).num_key_value_heads == 8
    assert from_document({**small, "num_key_value_heads": None}, "config.json").num_kv_heads == 32
    assert from_document(without(small, "model_type"), "folder/config.json").num_kv_heads == 8
    with pytest.raises(errors.ConfigError, match="4 heads cannot share 8.*their number is missing"):
        from_document({**small, "num_attention_heads": 4}, "config.json")


def test_a_params_json_keeps_the_defaults_of_the_torrent() -> None:
    found = from_document(without(PARAMS, "n_kv_heads"), "params.json")
    assert (found.num_kv_heads, found.max_position_embeddings, found.rope_theta) == (32, 32768, 1e6)


@pytest.mark.parametrize("file", ["config.json", "params.json"])
@pytest.mark.parametrize("document", [{}, {"model_type": "transformer"}, {"architectures": ["MixtralForCausalLM"]}])
def test_what_does_not_say_that_it_is_a_mixtral_has_no_sizes(document: dict, file: str) -> None:
    with pytest.raises(errors.ConfigError, match="lacks dim or hidden_size, hidden_dim or intermediate_size"):
        from_document(document, file)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "num_local_experts"])
def test_null_is_not_missing(key: str) -> None:
    with pytest.raises(errors.ConfigError, match="lacks"):
        from_document({**HF, key: None}, "config.json")


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
        ({"sliding_window": 0}, "sliding_window is 0, which no model has"),
        ({"sliding_window": -1}, "sliding_window"),
        ({"sliding_window": [4096, 32768]}, "sliding_window is .*, not an integer"),
        ({"sliding_window": True}, "sliding_window"),
        ({"sliding_window": 64.0}, "sliding_window"),
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
        from_document(document, "params.json")  # type: ignore[arg-type]  # that is what is refused


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
KEYS = st.sampled_from([*PARAMS, *HF, "rope_parameters", "rope_scaling", "rope_theta", "max_seq_len", "yarn"])


@given(st.dictionaries(KEYS, VALUES, max_size=6))
def test_only_our_errors(change: dict) -> None:
    try:
        config = from_document({**PARAMS, **change}, "params.json")
    except errors.ConfigError:
        return
    for field in dataclasses.fields(config):
        if field.name not in ("sliding_window", "rope_scaling"):
            assert getattr(config, field.name) > 0
    assert config.sliding_window is None or config.sliding_window > 0
    json.dumps(dataclasses.asdict(config))


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


@pytest.mark.parametrize(
    "config",
    [
        MIXTRAL,
        MixtralConfig(48, 40, 2, 4, 2, 16, 97, 4, 1, 1e-6, 5e5, 77),
        dataclasses.replace(MIXTRAL, sliding_window=4096),
    ],
)
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


def test_mistrals_own_document_tells_the_window() -> None:
    config = dataclasses.replace(MIXTRAL, sliding_window=4096)
    assert config.to_params()["sliding_window"] == 4096
    assert not {"sliding_window", "rope_scaling"} & MIXTRAL.to_params().keys()


def test_a_window_in_the_output_alone_is_a_problem() -> None:
    output = from_document({**HF, "sliding_window": 16}, "config.json")
    (problem,) = compare_configs(MIXTRAL, output, "config.json")
    assert "sliding_window is not the source's" in str(problem)
    assert str(problem).endswith("expected none, found 16")
    assert compare_configs(output, output) == []
