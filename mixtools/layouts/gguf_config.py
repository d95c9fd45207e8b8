"""A Mixtral's configuration in the metadata of a GGUF, both ways.

Keys: gguf-py/gguf/constants.py of https://github.com/ggml-org/llama.cpp, as its converter writes them for
MixtralForCausalLM and its loader reads them (src/models/llama.cpp). To both a Mixtral is a llama with experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MixtralConfig
from ..errors import ConfigError, LayoutError
from ..scaling import RopeScaling
from ..storage.gguf_values import Kind, Metadata, Value, float32, string, uint32

ARCHITECTURE = "llama"
IMATRIX = "imatrix"  # the general.type of an importance matrix

# field of config.json -> key behind the architecture's name
_SIZES = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "num_local_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
}
_OPTIONAL = ("num_key_value_heads",)
_THETA = 10000.0  # what llama.cpp takes where the key is missing
FILE_TYPES: Mapping[str, int] = {  # llama_ftype of include/llama.h
    "F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11, "Q3_K_M": 12,
    "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18, "IQ2_XXS": 19, "IQ2_XS": 20,
    "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25, "IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28,
    "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32, "MXFP4_MOE": 38,
}  # fmt: skip


def file_type_name(number: object) -> str:
    """Q4_K_M for 15; "type 99" for one that no file here has."""
    return next((name for name, known in FILE_TYPES.items() if known == number), f"type {number}")


def architecture(config: MixtralConfig, file: str | Path) -> dict[str, Value]:
    """The llama.* keys. Raises ConfigError for stretched positions that a GGUF has no key for."""
    document = config.to_hf("")
    told = {name: uint32(document[field]) for field, name in _SIZES.items()}
    told["vocab_size"] = uint32(config.vocab_size)
    told["attention.layer_norm_rms_epsilon"] = float32(config.rms_norm_eps)
    told["rope.freq_base"] = float32(config.rope_theta)
    told["rope.dimension_count"] = uint32(config.head_dim)
    if config.head_dim * config.num_heads != config.hidden_size:  # llama.cpp's own rule where they are missing
        told |= {"attention.key_length": uint32(config.head_dim), "attention.value_length": uint32(config.head_dim)}
    if (scaling := config.rope_scaling) is not None:
        told |= _scaling_keys(scaling, file)
    return {f"{ARCHITECTURE}.{name}": value for name, value in told.items()}


def expect_mixtral(metadata: Metadata, file: Path) -> None:
    """Raises LayoutError, by name, for what is another model's file, or no model."""
    kind = text(metadata, "general.type")
    if kind == IMATRIX:
        raise LayoutError("is an importance matrix, not a model; it goes with --imatrix", file=file)
    name = text(metadata, "general.architecture")
    if name is None:
        raise LayoutError("names no architecture (general.architecture); not a model", file=file)
    if name != ARCHITECTURE:
        why = f"is a GGUF of architecture {name!r}; a Mixtral's is {ARCHITECTURE!r} with experts"
        raise LayoutError(why, file=file)
    if not metadata.get(f"{ARCHITECTURE}.expert_count", uint32(0)).value:
        raise LayoutError("is a llama without experts (no llama.expert_count); not a Mixtral", file=file)


def document(metadata: Metadata, rows: int, file: Path) -> dict[str, Any]:
    """config.json of what the metadata says. `rows`: of the embedding. Raises ConfigError for a key that is missing."""

    def of(name: str) -> Any:
        return metadata[key].value if (key := f"{ARCHITECTURE}.{name}") in metadata else None

    told: dict[str, Any] = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu"}
    for field, name in _SIZES.items():
        value = of(name)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # a number a layer, as some writers have it
        if value is None and field not in _OPTIONAL:
            raise ConfigError(f"lacks {ARCHITECTURE}.{name}", file=file)
        told[field] = value
    told["num_key_value_heads"] = told["num_key_value_heads"] or told["num_attention_heads"]
    epsilon = of("attention.layer_norm_rms_epsilon")
    if epsilon is None:
        raise ConfigError(f"lacks {ARCHITECTURE}.attention.layer_norm_rms_epsilon", file=file)
    theta = of("rope.freq_base")
    told |= {
        "vocab_size": rows, "rms_norm_eps": _short(epsilon),
        "rope_theta": _THETA if theta is None else _short(theta), "tie_word_embeddings": False, "sliding_window": None,
    }  # fmt: skip
    if (head_dim := of("attention.key_length") or of("rope.dimension_count")) is not None:
        told["head_dim"] = head_dim
    if (scaling := _scaling(of, file)) is not None:
        told["rope_scaling"] = scaling
    for name in ("bos", "eos"):
        if (value := metadata.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            told[f"{name}_token_id"] = value.value
    return {key: value for key, value in told.items() if value is not None or key == "sliding_window"}


def _scaling_keys(scaling: RopeScaling, file: str | Path) -> dict[str, Value]:
    odd = [name for name in ("attention_factor", "mscale", "mscale_all_dim") if getattr(scaling, name) is not None]
    odd += ["truncate"] if scaling.truncate is False else []
    if scaling.type not in ("linear", "yarn") or odd:
        what = f"{', '.join(odd)} in rope_scaling" if odd else f"rope_scaling of type {scaling.type}"
        raise ConfigError(f"{what} has no place in a GGUF of llama.cpp's llama architecture", file=file)
    told = {"type": string(scaling.type), "factor": float32(scaling.factor)}
    if scaling.original_max_position_embeddings is not None:
        told["original_context_length"] = uint32(scaling.original_max_position_embeddings)
    for name in ("beta_fast", "beta_slow"):
        if (value := getattr(scaling, name)) is not None:
            told[f"yarn_{name}"] = float32(value)
    return {f"rope.scaling.{name}": value for name, value in told.items()}


def _scaling(of: Callable[[str], Any], file: Path) -> dict[str, Any] | None:
    """rope_scaling of config.json. `yarn_attn_factor` multiplies what transformers' attention_factor replaces."""
    kind, factor = of("rope.scaling.type"), of("rope.scaling.factor")
    if factor is None and (inverse := of("rope.scale_linear")):
        kind, factor = "linear", inverse
    if kind in (None, "none"):
        return None
    if of("rope.scaling.attn_factor") not in (None, 1.0) or of("rope.scaling.yarn_attn_factor") not in (None, 1.0):
        raise ConfigError("scales attention by a factor of its own (attn_factor), which is not supported", file=file)
    told = {
        "type": kind, "rope_type": kind, "factor": factor,
        "original_max_position_embeddings": of("rope.scaling.original_context_length"),
        "beta_fast": of("rope.scaling.yarn_beta_fast"), "beta_slow": of("rope.scaling.yarn_beta_slow"),
    }  # fmt: skip
    return {key: _short(value) for key, value in told.items() if value is not None}


def _short(value: Any) -> Any:
    """A float32 as the shortest number that it is the nearest of: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) else value


def text(metadata: Metadata, key: str) -> str | None:
    """A string of the metadata; None where it is missing or of another kind."""
    value = metadata.get(key)
    return str(value.value) if value is not None and value.kind is Kind.STRING else None
