"""A layout as a table: for each role the name on disk, and the shape operation beside it.

A stored tensor is seen as rows (leading dimensions flattened). A slot is a run of those rows, brought to
canonical form by one operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

import numpy as np

from ..config import MixtralConfig
from ..names import Role, Slot
from ..ops import cpu
from ..storage.store import Bits


class Op(Enum):
    """How stored rows become canonical ones."""

    KEEP = "as they are"
    ROTARY = "rotary pairs adjacent; canonical order has the first halves, then the second halves"
    TRANSPOSE = "transposed"


@dataclass(frozen=True)
class Rule:
    """One line of a layout's table. `stack` parts per expert share one tensor, this being number `part`."""

    name: str
    op: Op = Op.KEEP
    stack: int = 0  # 0: a tensor of its own
    part: int = 0
    folded: bool = False  # stacked experts are folded into the rows: [E*F, D] instead of [E, F, D]


def part_name(name: str, suffix: str) -> str:
    """The name of a stored part (formats/) of the matrix `name`."""
    return name if suffix == "weight" else f"{name.removesuffix('.weight')}.{suffix}"


class Piece(NamedTuple):
    """Where a slot lies: rows [start, stop) of the tensor `name`, which has `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    op: Op

    def part(self, suffix: str) -> str:
        """The name of a stored part of this matrix (formats/): of "weight" its own, of others in its place."""
        return part_name(self.name, suffix)


@dataclass(frozen=True)
class Layout:
    """One way to lay a Mixtral on disk. `letter` is that of the format page."""

    letter: str
    name: str
    title: str
    rules: Mapping[Role, Rule]
    ignored: tuple[str, ...] = ()  # suffixes of buffers that old files carry and nobody needs
    root: str = ""  # what stands before every name but the head's

    def piece(self, slot: Slot, config: MixtralConfig) -> Piece:
        rule = self.rules[slot.role]
        shape = config.shape(slot.role)
        name = rule.name.format(layer=slot.layer, expert=slot.expert)
        if rule.op is Op.TRANSPOSE:
            shape = shape[::-1]
        if not rule.stack:
            return Piece(name, shape, 0, shape[0] if len(shape) > 1 else 1, rule.op)
        rows, columns = shape
        start = ((slot.expert or 0) * rule.stack + rule.part) * rows
        block = rule.stack * rows
        whole = (config.num_experts * block, columns) if rule.folded else (config.num_experts, block, columns)
        return Piece(name, whole, start, start + rows, rule.op)

    def renamed(self, root: str, before_head: str) -> Layout:
        """The same with other words before the names, as wrappers of modules leave them: `root` in place of its own
        root, `before_head` in front of the head's name.
        """

        def name(role: Role, rule: Rule) -> str:
            return before_head + rule.name if role is Role.HEAD else root + rule.name.removeprefix(self.root)

        rules = {role: replace(rule, name=name(role, rule)) for role, rule in self.rules.items()}
        return replace(self, rules=rules, root=root)

    def sharing(self, role: Role, of: Role) -> Layout:
        """The same where a tensor of `role` is not stored, being that of `of`: tied embeddings."""
        return replace(self, rules={**self.rules, role: self.rules[of]})

    def ignores(self, name: str) -> bool:
        """Whether a tensor of this name is a known buffer that no model needs."""
        return name.endswith(self.ignored) if self.ignored else False

    def granule(self, slot: Slot, config: MixtralConfig) -> int:
        """The fewest canonical rows that can be converted by themselves; 0 means only the whole."""
        op = self.rules[slot.role].op
        return {Op.KEEP: 1, Op.ROTARY: config.head_dim, Op.TRANSPOSE: 0}[op]


def to_canonical(op: Op, bits: Bits, head_dim: int) -> Bits:
    """Stored rows [rows, columns] (whole heads for ROTARY) in canonical form."""
    if op is Op.ROTARY:
        heads = bits.reshape(-1, head_dim // 2, 2, bits.shape[1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(bits.shape)
    return cpu.transpose(bits) if op is Op.TRANSPOSE else bits


def from_canonical(op: Op, bits: Bits, head_dim: int) -> Bits:
    """Inverse of to_canonical."""
    if op is Op.ROTARY:
        heads = bits.reshape(-1, 2, head_dim // 2, bits.shape[1])
        return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(bits.shape)
    return cpu.transpose(bits) if op is Op.TRANSPOSE else bits
