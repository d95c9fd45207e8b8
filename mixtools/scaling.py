"""RopeScaling: how a configuration stretches rotary positions beyond those of the training; inference/rope.py does it.

Two spellings, which both old and new files use: `rope_scaling` beside `rope_theta` (transformers 4), and all of it in
`rope_parameters` (transformers 5).
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError

LARGEST = 1 << 24  # no dimension of any Mixtral comes near; keeps nonsense out of the arithmetic

_RANGE = (0.0, 1e6)  # of every factor, ends excluded
_NEEDS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_OPTIONS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # of yarn
_FROM_LENGTH = ("yarn", "llama3")  # the types that count from the length of the first training
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # turns over that length; the paper's


@dataclass(frozen=True)
class RopeScaling:
    """Of the types linear, dynamic, yarn and llama3; a field that `type` does not use is None.

    The names are transformers' own.
    """

    type: str
    factor: float
    original_max_position_embeddings: int | None = None  # positions of the first training
    attention_factor: float | None = None  # of cosine and sine; None follows from factor and both mscale
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None  # whether the bounds that follow from the betas are whole numbers
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def to_hf(self) -> dict[str, Any]:
        """The value of `rope_scaling`, as transformers 4 and 5 read it; what is usual is left out."""
        usual = {**_BETAS, "truncate": True}
        document = {key: value for key, value in asdict(self).items() if value is not None and value != usual.get(key)}
        return {"type": self.type, "rope_type": self.type, **document}


def read_scaling(document: Mapping[str, Any], max_positions: int, file: str | Path) -> RopeScaling | None:
    """The scaling that a configuration asks for; None if none. Both sections must be objects.

    As in transformers 5, `rope_scaling` replaces `rope_parameters` where it stands; as in 4, there is nothing else.
    Raises ConfigError for a type that is not supported, a value that cannot be, or two that contradict each other.
    """
    if document.get("yarn"):
        raise ConfigError("yarn, in the spelling of Mistral's newer models, is not supported; write it as rope_scaling "
                          "in the spelling of transformers", file=file)  # fmt: skip
    first = _read("rope_scaling", document, max_positions, file)
    second = _read("rope_parameters", document, max_positions, file)
    if document.get("rope_scaling") and second not in (None, first):
        raise ConfigError("rope_scaling and rope_parameters contradict each other", file=file)
    return first or second


def _read(key: str, document: Mapping[str, Any], max_positions: int, file: str | Path) -> RopeScaling | None:
    section: Mapping[str, Any] = document.get(key) or {}
    kind = _type(key, section, file)
    if kind == "default":
        return None
    if not isinstance(kind, str) or kind not in _NEEDS:
        known = f"supported are default, {', '.join(_NEEDS)}"
        raise ConfigError(f"{key} asks for {reprlib.repr(kind)}, which is not supported; {known}", file=file)
    for part in (section, document):
        if (share := part.get("partial_rotary_factor")) not in (None, 1):
            raise ConfigError(f"partial_rotary_factor is {reprlib.repr(share)}; a Mixtral turns whole heads", file=file)
    values: dict[str, Any] = {}
    if kind in _FROM_LENGTH:
        # transformers gives the one at top level precedence, and takes max_position_embeddings where there is none
        name = "original_max_position_embeddings"
        stated = next((part[name] for part in (document, section) if part.get(name) is not None), max_positions)
        values[name] = int(number(stated, None, f"{key}.{name}", file))
    if kind == "yarn":
        values |= _yarn(key, section, file)
    for name in _NEEDS[kind]:
        if name not in section:
            raise ConfigError(f"{key} of type {kind} lacks {name}", file=file)
        if kind == "yarn" and section[name] is None:  # its factor may be left to the two lengths
            values[name] = max_positions / values["original_max_position_embeddings"]
        else:
            values[name] = number(section[name], _RANGE, f"{key}.{name}", file)
    if kind == "llama3" and values["low_freq_factor"] >= values["high_freq_factor"]:
        raise ConfigError(f"{key}.high_freq_factor must be above low_freq_factor", file=file)
    return RopeScaling(kind, **values)


def _yarn(key: str, section: Mapping[str, Any], file: str | Path) -> dict[str, Any]:
    """What may be left out."""
    truncate = section.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{key}.truncate is {reprlib.repr(truncate)}, not true or false", file=file)
    # to transformers a 0 is as good as nothing, but for the attention factor, which must not be 0
    there = [name for name in _OPTIONS if section.get(name) or (name == "attention_factor" and section.get(name) == 0)]
    stated = {name: number(section[name], _RANGE, f"{key}.{name}", file) for name in there}
    return {**_BETAS, "truncate": truncate, **stated}


def _type(key: str, section: Mapping[str, Any], file: str | Path) -> Any:
    """Old files say `type`, newer ones `rope_type`, some both."""
    said = [section[name] for name in ("rope_type", "type") if section.get(name) is not None]
    if len(said) == 2 and said[0] != said[1]:
        raise ConfigError(f"{key}: type and rope_type contradict each other", file=file)
    return said[0] if said else "default"


def number(value: Any, limits: tuple[float, float] | None, key: str, file: str | Path) -> int | float:
    """A JSON value that must be a number between `limits`, or without them a positive integer. Raises ConfigError."""
    allowed = (int, float) if limits else (int,)
    if isinstance(value, bool) or not isinstance(value, allowed):
        wanted = "a number" if limits else "an integer"
        raise ConfigError(f"{key} is {reprlib.repr(value)}, not {wanted}", file=file)
    low, high = limits or (0, LARGEST)
    if not low < value < high:
        raise ConfigError(f"{key} is {reprlib.repr(value)}, which no model has", file=file)
    return float(value) if limits else value
