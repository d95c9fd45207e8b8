"""Who a tensor is. Strings that name tensors on disk live in layouts/ alone."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple


class Role(Enum):
    """What a tensor is in a Mixtral; the value is the field's own word for it."""

    EMBED = "embed"
    ATTENTION_NORM = "attention_norm"
    Q = "q"
    K = "k"
    V = "v"
    O = "o"  # noqa: E741  (the field's own letter)
    FFN_NORM = "ffn_norm"
    ROUTER = "router"
    GATE = "w1"
    DOWN = "w2"
    UP = "w3"
    NORM = "norm"
    HEAD = "head"


ATTENTION = (Role.Q, Role.K, Role.V, Role.O)
EXPERT = (Role.GATE, Role.DOWN, Role.UP)
LAYER = (Role.ATTENTION_NORM, *ATTENTION, Role.FFN_NORM, Role.ROUTER, *EXPERT)


class Slot(NamedTuple):
    """Where a tensor sits: its role, its layer (None outside the stack), its expert (None outside one)."""

    role: Role
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        parts = [] if self.layer is None else [f"layers.{self.layer}"]
        parts += [] if self.expert is None else [f"experts.{self.expert}"]
        return ".".join([*parts, self.role.value])


def layer_slots(layer: int, num_experts: int) -> Iterator[Slot]:
    """The slots of one layer, in the order in which a forward pass needs them."""
    for role in (Role.ATTENTION_NORM, *ATTENTION, Role.FFN_NORM, Role.ROUTER):
        yield Slot(role, layer)
    for expert in range(num_experts):
        for role in EXPERT:
            yield Slot(role, layer, expert)


def all_slots(num_layers: int, num_experts: int) -> Iterator[Slot]:
    """Every slot of a model: embedding, layers, final norm, head."""
    yield Slot(Role.EMBED)
    for layer in range(num_layers):
        yield from layer_slots(layer, num_experts)
    yield Slot(Role.NORM)
    yield Slot(Role.HEAD)
