"""Which matrices LASER takes, and how: the options of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...config import MixtralConfig
from ...errors import UsageError
from ...layouts.checkpoint import Checkpoint
from ...linalg.weighted import DAMPING
from ...names import ATTENTION, EXPERT, Slot
from .figures import OUTPUT, WEIGHTS
from .method import DEFAULT_RULES
from .method import Options as Method

TARGETS = {role.value: role for role in (*EXPERT, *ATTENTION)}
ALL_TARGETS = ",".join(TARGETS)


@dataclass(frozen=True)
class Options:
    """What a LASER run does. layers, experts: `all`, `5`, `3,7` or `20-31`; targets: of w1,w2,w3,q,k,v,o.

    rank_rule (None: the norm's own), factored, exact, norm, damping: see method.py. budget, layer_floor: see budget.py;
    None is no budget, and half of it as the floor. sequential: inputs come from the layers as they were reduced, those
    before. routed: a token counts at an expert by the square of its weight there. max_shard_bytes bounds a shard.
    """

    layers: str
    targets: str = ALL_TARGETS
    experts: str = "all"
    rank_rule: str | None = None
    factored: bool = False
    exact: bool = False
    norm: str = WEIGHTS
    damping: float = DAMPING
    budget: float | None = None
    layer_floor: float | None = None
    sequential: bool = False
    routed: bool = False
    max_shard_bytes: int = 5_000_000_000

    @property
    def method(self) -> Method:
        """Raises UsageError for a norm or a rule that there is not."""
        rule = self.rank_rule or DEFAULT_RULES.get(self.norm, DEFAULT_RULES[WEIGHTS])
        return Method.parse(rule, self.factored, self.exact, self.norm, self.damping)

    @property
    def is_surveyed(self) -> bool:
        """Whether all matrices are looked at before anything is written, to find their ranks."""
        return self.budget is not None or (self.factored and self.method.fixed_rank is None)

    @property
    def floor(self) -> float:
        """Of a layer's bytes, under a budget."""
        return (self.budget or 0.0) / 2 if self.layer_floor is None else self.layer_floor

    def survey_document(self) -> dict[str, Any]:
        """What decides the spectra: another budget or floor, or storing factors or not, asks for no other look."""
        free = ("budget", "layer_floor", "sequential", "factored")
        return {name: value for name, value in self.document().items() if name not in free}

    def document(self) -> dict[str, Any]:
        """What decides the weights, for journal, manifest and report."""
        found: dict[str, Any] = {name: getattr(self, name) for name in _ALWAYS}
        found["rank_rule"] = None if self.budget is not None else str(self.method.rank_rule)
        if self.norm == OUTPUT:
            found |= {name: getattr(self, name) for name in ("damping", "sequential", "routed")}
        if self.budget is not None:
            found |= {"budget": self.budget, "layer_floor": self.floor}
        return found


_ALWAYS = ("layers", "targets", "experts", "rank_rule", "factored", "exact", "norm")


class Asked(NamedTuple):
    """Which matrices, and what becomes of them."""

    source: Checkpoint
    slots: list[Slot]
    options: Options


def select(config: MixtralConfig, options: Options) -> list[Slot]:
    """The chosen matrices in the model's order. Raises UsageError for a layer, expert or target that there is not."""
    layers = parse_numbers(options.layers, config.num_layers, "layers")
    experts = parse_numbers(options.experts, config.num_experts, "experts")
    names = [name.strip() for name in options.targets.split(",")]
    if unknown := [name for name in names if name not in TARGETS]:
        raise UsageError(f"--targets: {unknown[0]!r} is not one of {ALL_TARGETS}")
    roles = {TARGETS[name] for name in names}
    return [
        slot
        for slot in config.slots()
        if slot.role in roles and slot.layer in layers and (slot.expert is None or slot.expert in experts)
    ]


def parse_numbers(text: str, count: int, what: str) -> set[int]:
    """`all`, `5`, `3,7`, `20-31`, or several of these, of 0 .. count-1. Raises UsageError."""
    if text.strip() == "all":
        return set(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise UsageError(f"--{what}: {part.strip()!r} is no number; write all, 5, 3,7 or 20-31") from None
        if low > high:
            raise UsageError(f"--{what}: {part.strip()} runs backwards; write {high}-{low}")
        if high >= count or low < 0:
            raise UsageError(f"--{what}: {part.strip()} is out of range; the model has {what} 0 to {count - 1}")
        found |= set(range(low, high + 1))
    return found


def role_counts(slots: Sequence[Slot]) -> dict[str, int]:
    """How many matrices of each target."""
    return {name: n for name, role in TARGETS.items() if (n := sum(slot.role is role for slot in slots))}
