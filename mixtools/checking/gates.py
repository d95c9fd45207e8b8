"""Gates: the figures that an output must reach, by kind, and how `--gate NAME=VALUE` changes them.

The defaults are sanity limits around what llama.cpp publishes for 7B models and larger, not a judgement of quality. A
tiny model loses more by the same method: give it limits of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..storage import manifest

if TYPE_CHECKING:
    from ..layouts.checkpoint import Checkpoint

AT_LEAST = frozenset({"same_top", "teacher_forced_agreement", "identical"})
NAMES = {
    "tensors_different": "tensors that are neither the source's nor an exact cast of it",
    "ppl_ratio": "the output's perplexity over the source's",
    "kld_mean": "mean KL divergence of the next-token distributions, in nats",
    "kld_median": "its median",
    "kld_p99": "its 99th percentile",
    "kld_max": "its maximum",
    "rms_delta_p": "root mean square change of the probability of the text's own token",
    "same_top": "share of tokens with the same most likely token (at least)",
    "teacher_forced_agreement": "the same along the prompts' continuations (at least)",
    "identical": "prompts that are continued without any difference (at least)",
}
_EXACT = {"tensors_different": 0.0, "ppl_ratio": 1.002, "kld_mean": 0.002}
_FOUR_BITS = {"ppl_ratio": 1.03, "kld_mean": 0.035}
_FOUR_BITS_OF_A_TABLE = {"ppl_ratio": 1.04, "kld_mean": 0.045}
_THREE_BITS = {"ppl_ratio": 1.12, "kld_mean": 0.15}
_FIVE_BITS = {"ppl_ratio": 1.01, "kld_mean": 0.012}
_SIX_BITS = {"ppl_ratio": 1.005, "kld_mean": 0.006}
DEFAULTS: dict[str, dict[str, float]] = {
    "dense": _EXACT,
    "laser": {},  # it is meant to change the model: the change is reported, not judged
    "Q8_0": {"ppl_ratio": 1.002, "kld_mean": 0.002},
    "Q6_K": _SIX_BITS,
    "int8": _SIX_BITS,
    "Q5_K_M": _FIVE_BITS,
    "Q5_K_S": _FIVE_BITS,
    "Q5_0": _FIVE_BITS,
    "Q5_1": _FIVE_BITS,
    "Q4_K_M": _FOUR_BITS,
    "Q4_K_S": _FOUR_BITS,
    "Q4_0": _FOUR_BITS,
    "Q4_1": _FOUR_BITS,
    "nf4": _FOUR_BITS_OF_A_TABLE,
    "IQ4_NL": _FOUR_BITS_OF_A_TABLE,
    "IQ4_XS": _FOUR_BITS_OF_A_TABLE,
    "gptq": _FOUR_BITS,
    "awq": _FOUR_BITS,
    "compressed-tensors": _FOUR_BITS,
    "gptq-8bit": _SIX_BITS,
    "compressed-tensors-8bit": _SIX_BITS,
    "Q3_K_L": {"ppl_ratio": 1.07, "kld_mean": 0.09},
    "Q3_K_M": {"ppl_ratio": 1.08, "kld_mean": 0.10},
    "Q3_K_S": _THREE_BITS,
    "gptq-3bit": _THREE_BITS,
    "compressed-tensors-3bit": _THREE_BITS,
    **{kind: {"ppl_ratio": 1.15, "kld_mean": 0.20} for kind in ("IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS")},
    "Q2_K": {"ppl_ratio": 1.35, "kld_mean": 0.35},
    **{kind: {"ppl_ratio": 1.6, "kld_mean": 0.6} for kind in ("Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS")},
    # below that, groups of 2 bits and IQ1: what a model has left is for its user to judge
}


@dataclass(frozen=True)
class Gate:
    """A limit and what was found; `value` None where the figure was not measured."""

    name: str
    limit: float
    value: float | None

    @property
    def passed(self) -> bool:
        """NaN passes nothing, and neither does what was not measured."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.name in AT_LEAST else self.value <= self.limit

    def document(self) -> dict[str, Any]:
        return {"name": self.name, "limit": self.limit, "value": self.value, "passed": self.passed}


def parse(texts: Iterable[str]) -> dict[str, float]:
    """Limits of `NAME=VALUE` texts. Raises UsageError for an unknown name, or a value that is no number."""
    limits: dict[str, float] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in NAMES:
            raise UsageError(f"--gate {text}: {name!r} is not one of {', '.join(NAMES)}")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = math.nan
        if not equals or math.isnan(limits[name]):
            raise UsageError(f"--gate {text}: write {name}=NUMBER")
    return limits


def kind_of(checkpoint: object, folder: Path) -> str:
    """What sort of output this is: "dense", "laser" or another method's name, or a quantization ("Q4_K_M", ...)."""
    if (quantization := getattr(checkpoint, "quantization", None)) is not None:
        return str(quantization)
    return _method(folder) or ("laser" if (folder / "laser-report.json").is_file() else "dense")


def was_quantized(output: Checkpoint) -> bool:
    """Whether its manifest tells that `quantize` made its blocks: even of such a source they are others then."""
    told = manifest.load(output.folder)
    return told is not None and "quantize" in manifest.of_output(told, output.place.name)


def _method(folder: Path) -> str | None:
    """A method's job tells its options in the manifest, under its name."""
    try:
        told = json.loads((folder / manifest.NAME).read_text("utf-8"))
        return manifest.method(told)
    except (OSError, ValueError, TypeError):
        return None  # a manifest is no condition; a damaged one is reported where it is read


def choose(kind: str, asked: Mapping[str, float], measured: Iterable[str]) -> dict[str, float]:
    """Limits by name: the kind's own as far as they will be measured, and those asked for.

    Raises UsageError if one that was asked for will not be, or if nothing will tell how good a quantized output is.
    """
    known = set(measured)
    missing = [name for name in asked if name not in known]
    if missing:
        raise UsageError(f"--gate {missing[0]} needs a figure that is not measured; add --text or --prompts")
    defaults = DEFAULTS.get(kind, {})
    if defaults and not known & {*defaults, *asked}:
        raise UsageError(f"a {kind} output is judged by its perplexity and divergence: add --text FILE")
    return {**{name: limit for name, limit in defaults.items() if name in known}, **asked}


def judge(limits: Mapping[str, float], values: Mapping[str, float]) -> list[Gate]:
    """Gates in the order of NAMES."""
    return [Gate(name, limits[name], values.get(name)) for name in NAMES if name in limits]
