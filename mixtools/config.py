"""MixtralConfig: from params.json or config.json, and to them."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError
from .names import Role, Slot, all_slots
from .scaling import RopeScaling, number, read_scaling

DEFAULT_ROPE_THETA = 1e6  # the torrent's params.json omits it; 1e4, Llama's, ruins the model silently
MAX_CONFIG_BYTES = 1 << 20
QUANTIZE_CONFIG, QUANT_CONFIG = "quantize_config.json", "quant_config.json"  # auto-gptq's and autoawq's own

# field -> (key in params.json, key in config.json); the two under "moe" may also stand at top level
_KEYS: dict[str, tuple[str, str]] = {
    "hidden_size": ("dim", "hidden_size"),
    "intermediate_size": ("hidden_dim", "intermediate_size"),
    "num_layers": ("n_layers", "num_hidden_layers"),
    "num_heads": ("n_heads", "num_attention_heads"),
    "num_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "num_experts": ("num_experts", "num_local_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_tok"),
    "rms_norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta", "rope_theta"),
    "max_position_embeddings": ("max_seq_len", "max_position_embeddings"),
}
# transformers' MixtralConfig (5.23): what a key that is missing means in a document that says it is a Mixtral's ...
_SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_layers": 32, "num_heads": 32, "vocab_size": 32000,
    "num_experts": 8, "experts_per_token": 2,
}  # fmt: skip
# ... and, since these are no measures of a model, in any config.json
_HABITS = {"num_kv_heads": 8, "max_position_embeddings": 131072}
_FLOATS = {"rms_norm_eps": (0.0, 1.0), "rope_theta": (1.0, 1e12)}  # the range that makes sense, ends excluded
_MOST_EXPERTS = 1 << 16  # in all layers together


@dataclass(frozen=True)
class MixtralConfig:
    """Shape and constants of a Mixtral. Defaults are those of every published one."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_experts: int = 8
    experts_per_token: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float = DEFAULT_ROPE_THETA
    max_position_embeddings: int = 32768
    sliding_window: int | None = None  # positions that a token sees, its own included; None: all before it
    rope_scaling: RopeScaling | None = None

    @property
    def reach(self) -> int:
        """Positions that a text may take: those trained on, or as far as `rope_scaling` stretches them.

        Models differ in which of the two max_position_embeddings tells; the larger is taken, as vLLM does.
        """
        scaling, longest = self.rope_scaling, self.max_position_embeddings
        if scaling is None:
            return longest
        return max(longest, int(scaling.factor * (scaling.original_max_position_embeddings or longest)))

    def shape(self, role: Role) -> tuple[int, ...]:
        """Canonical shape of a tensor of this role, [out, in] for a matrix."""
        d, f, hd = self.hidden_size, self.intermediate_size, self.head_dim
        return {
            Role.EMBED: (self.vocab_size, d),
            Role.ATTENTION_NORM: (d,),
            Role.Q: (self.num_heads * hd, d),
            Role.K: (self.num_kv_heads * hd, d),
            Role.V: (self.num_kv_heads * hd, d),
            Role.O: (d, self.num_heads * hd),
            Role.FFN_NORM: (d,),
            Role.ROUTER: (self.num_experts, d),
            Role.GATE: (f, d),
            Role.DOWN: (d, f),
            Role.UP: (f, d),
            Role.NORM: (d,),
            Role.HEAD: (self.vocab_size, d),
        }[role]

    def slots(self) -> Iterator[Slot]:
        return all_slots(self.num_layers, self.num_experts)

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(self.shape(slot.role)) for slot in self.slots())

    def to_params(self) -> dict[str, Any]:
        """The document of the torrent layouts. rope_theta is written, though the original omits it.

        Mistral's own loader knows `sliding_window`; it has no key for `rope_scaling`, which stands there in Hugging
        Face's spelling for ours.
        """
        document = {params: getattr(self, field) for field, (params, _) in _KEYS.items()}
        moe = {key: document.pop(key) for key in ("num_experts_per_tok", "num_experts")}
        stretched = {"rope_scaling": self.rope_scaling.to_hf()} if self.rope_scaling else {}
        limited = {"sliding_window": self.sliding_window} if self.sliding_window else {}
        return {**document, **limited, **stretched, "moe": moe}

    def to_hf(self, torch_dtype: str, bos: int = 1, eos: int = 2) -> dict[str, Any]:
        """The document of the Hugging Face layouts, in the spelling that old and new loaders read."""
        stretched = {"rope_scaling": self.rope_scaling.to_hf()} if self.rope_scaling else {}
        return {
            "architectures": ["MixtralForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": bos,
            "eos_token_id": eos,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "model_type": "mixtral",
            "output_router_logits": False,
            "router_aux_loss_coef": 0.02,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": False,
            "torch_dtype": torch_dtype,
            "use_cache": True,
            **{hf: getattr(self, field) for field, (_, hf) in _KEYS.items()},
            **stretched,
        }


def from_document(document: Mapping[str, Any], file: str | Path) -> MixtralConfig:
    """Read params.json or config.json; each key may have either spelling.

    A key that is missing means what it means to the loaders: in a document of model_type mixtral transformers'
    default, else one of the few that the torrent omits. Raises ConfigError for a missing key that has none, a value
    that cannot be, or a feature that is not supported.
    """
    if not isinstance(document, Mapping):
        raise ConfigError("is not a JSON object", file=file)
    _refuse_other_models(document, file)
    flat: dict[str, Any] = dict(document)
    for section in (_section(document, "moe", file), *_thetas(document, file)):
        for key, value in section.items():
            if flat.get(key) is not None and value is not None and flat[key] != value:
                raise ConfigError(f"two values of {key} contradict each other", file=file)
            flat[key] = value if value is not None else flat.get(key)
    values = _values(flat, file)
    missing = [" or ".join(dict.fromkeys(keys)) for field, keys in _KEYS.items() if field not in values]
    if missing:
        raise ConfigError(f"lacks {', '.join(missing)}", file=file)
    window = flat.get("sliding_window")
    config = MixtralConfig(
        **values,  # type: ignore[arg-type]  # each was checked by number
        sliding_window=None if window is None else int(number(window, None, "sliding_window", file)),
        rope_scaling=read_scaling(document, int(values["max_position_embeddings"]), file),
    )
    _check_together(config, flat, file)
    return config


def _values(flat: Mapping[str, Any], file: str | Path) -> dict[str, int | float]:
    """The numbers that are there, and those that follow from others or from what is usual."""
    values: dict[str, int | float] = {}
    for field, keys in _KEYS.items():
        found = {key: flat[key] for key in keys if flat.get(key) is not None}
        numbers = {key: number(value, _FLOATS.get(field), key, file) for key, value in found.items()}
        if len(set(numbers.values())) > 1:
            raise ConfigError(f"keys contradict each other: {numbers}", file=file)
        for value in numbers.values():
            values[field] = value
    stated = flat.get("model_type") == "mixtral"
    usual = {**(_SIZES if stated else {}), **(_HABITS if stated or Path(file).name == "config.json" else {})}
    for field, default in usual.items():
        if not flat.keys() & set(_KEYS[field]):  # null is not missing: to transformers it is no number of anything ...
            values.setdefault(field, default)
    values.setdefault("num_kv_heads", values.get("num_heads", 0))  # ... but for this: as many as heads
    values.setdefault("rope_theta", DEFAULT_ROPE_THETA)
    values.setdefault("rms_norm_eps", 1e-5)
    if "head_dim" not in values and "num_heads" in values and "hidden_size" in values:
        head_dim, rest = divmod(int(values["hidden_size"]), int(values["num_heads"]))
        if rest:
            why = f"lacks head_dim, and {values['num_heads']} heads do not divide {values['hidden_size']}"
            raise ConfigError(why, file=file)
        values["head_dim"] = head_dim
    # 8x22B was trained on 65,536 positions, 8x7B on 32,768; params.json says neither
    values.setdefault("max_position_embeddings", 65536 if values.get("hidden_size") == 6144 else 32768)
    return values


def load_json(path: Path, limit: int = MAX_CONFIG_BYTES) -> Any:
    """Read a JSON document of at most `limit` bytes. Raises ConfigError if it is not one."""
    try:
        if path.stat().st_size > limit:
            raise ConfigError(f"is larger than {limit} bytes; not what its name says", file=path)
        if not path.is_file():
            raise ConfigError("is not a regular file", file=path)
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"is not valid JSON ({error})", file=path) from None
    except OSError as error:
        raise ConfigError(f"cannot be read ({error.strerror})", file=path) from None


def load_object(path: Path, limit: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """A JSON object, as `load_json` reads it; an empty one where there is no such file. Raises ConfigError."""
    document = load_json(path, limit) if path.exists() else {}
    if not isinstance(document, dict):
        raise ConfigError("is not a JSON object", file=path)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            raise ValueError(f"two values of {reprlib.repr(key)}")
    return found


def _section(document: Mapping[str, Any], key: str, file: str | Path) -> Mapping[str, Any]:
    section = document.get(key) or {}
    if not isinstance(section, Mapping):
        raise ConfigError(f"{key} is {reprlib.repr(section)}, not an object", file=file)
    return section


def _thetas(document: Mapping[str, Any], file: str | Path) -> Iterator[Mapping[str, Any]]:
    """rope_theta where transformers 5 nests it: in rope_parameters, which it does not see beside a rope_scaling."""
    hidden, seen = (_section(document, key, file).get("rope_theta") for key in ("rope_parameters", "rope_scaling"))
    stands_alone = document.get("rope_scaling") and document.get("rope_theta") is None and seen is None
    if stands_alone and hidden not in (None, DEFAULT_ROPE_THETA):
        why = "rope_theta stands in rope_parameters alone, where rope_scaling hides it; write it at the top level"
        raise ConfigError(why, file=file)
    yield from ({"rope_theta": theta} for theta in (hidden, seen))


def _refuse_other_models(document: Mapping[str, Any], file: str | Path) -> None:
    """What says that this is no Mixtral. attention_bias says nothing: transformers' Mixtral does not look at it."""
    expected = {"model_type": ("mixtral", "transformer"), "hidden_act": ("silu", "swish")}  # "transformer": Mistral's
    for key, allowed in expected.items():
        if (value := document.get(key, allowed[0])) not in allowed:
            raise ConfigError(f"{key} is {reprlib.repr(value)}; a Mixtral has {allowed[0]!r}", file=file)


def _check_together(config: MixtralConfig, flat: Mapping[str, Any], file: str | Path) -> None:
    if config.num_heads % config.num_kv_heads:
        guessed = "" if flat.keys() & set(_KEYS["num_kv_heads"]) else " (their number is missing and taken as usual)"
        raise ConfigError(
            f"{config.num_heads} heads cannot share {config.num_kv_heads} key-value heads evenly{guessed}", file=file
        )
    if config.num_layers * config.num_experts > _MOST_EXPERTS:
        raise ConfigError(f"{config.num_layers} layers of {config.num_experts} experts, which no model has", file=file)
    if config.head_dim % 2:
        raise ConfigError(f"head_dim {config.head_dim} is odd; rotary embedding needs pairs", file=file)
    if config.head_dim == 2 and config.rope_scaling is not None and config.rope_scaling.type == "dynamic":
        raise ConfigError("head_dim 2 leaves dynamic rope scaling nothing to scale", file=file)
    if config.experts_per_token > config.num_experts:
        raise ConfigError(f"{config.experts_per_token} experts per token of only {config.num_experts}", file=file)
