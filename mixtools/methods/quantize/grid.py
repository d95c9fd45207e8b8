"""Grids: which values a matrix may take in a format, from its weights and what its inputs weigh.

    weights [in, out], Σ x² by column ─► Grid: scale, min by group and row; levels ─► codes ─► Packed

All matrices here lie with their columns first, [in, out]: a group's columns then are neighbours in memory, and rows,
which are independent of each other, fill a processor's lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from ...formats import Packed
from ...formats.base import Format

# of a group's range: a smaller one leaves the largest weights out and serves all the others better
CLIPS = tuple(1 - 0.05 * step for step in range(11))
WHOLE = 1 << 30  # as a span: all columns that there are
_TOGETHER = 128  # columns of a group at most whose Hessian is looked at
_FIT_VALUES = 1 << 22  # weights that are tried at a time: what is made of them stays in the cache


@dataclass(frozen=True)
class Grid:
    """value = scale * level + min, in fp32, of the group and the row.

    `scale`, `min` [groups, out]; `group`: columns; level = low + code, or `table`[code], ascending. `clip`: the mean
    share of the groups' ranges that it spans, where ranges were tried.
    """

    group: int
    scale: Tensor
    min: Tensor
    low: int = 0
    count: int = 16
    table: Tensor | None = None
    clip: float | None = None

    @cached_property
    def choices(self) -> range | Tensor:
        """All levels as ops/feedback.py takes them; a table on the CPU, where it is looked at block by block."""
        return range(self.low, self.low + self.count) if self.table is None else self.table.cpu()

    def copy(self) -> Grid:
        """One whose scales may be changed."""
        return replace(self, scale=self.scale.clone(), min=self.min.clone())

    def groups_of(self, columns: Tensor) -> Tensor:
        """Rows of `scale` for columns [n]."""
        return columns // self.group

    def levels(self, codes: Tensor) -> Tensor:
        """fp32 of codes."""
        return codes.float() + self.low if self.table is None else self.table[codes.long()]

    def values(self, codes: Tensor, first: int = 0) -> Tensor:
        """Weights [n, out] of the codes [n, out] of columns from `first` on."""
        of = self.groups_of(torch.arange(first, first + len(codes), device=codes.device))
        return self.scale[of] * self.levels(codes) + self.min[of]

    def nearest(self, weights: Tensor, first: int = 0) -> Tensor:
        """Codes, uint8 [n, out], nearest to the weights [n, out] of columns from `first` on."""
        of = self.groups_of(torch.arange(first, first + len(weights), device=weights.device))
        scale = self.scale[of]
        level = torch.where(scale != 0, (weights - self.min[of]) / scale, 0.0)
        if self.table is None:
            return (level.round_().clamp_(self.low, self.low + self.count - 1) - self.low).to(torch.uint8)
        return torch.bucketize(level, (self.table[1:] + self.table[:-1]) / 2).to(torch.uint8)


class Fitted(NamedTuple):
    """A factor of some columns' values, which are linear in it: `value` [out] * `unit` [columns, out] + the rest.

    `stored` gives the nearest one that can be stored; `set` changes it in its grid.
    """

    value: Tensor
    unit: Tensor
    stored: Callable[[Tensor], Tensor]
    set: Callable[[Tensor], None]


class Scheme(Protocol):
    """A way to store matrices, as calibrated quantization needs it."""

    @property
    def format(self) -> Format: ...

    @property
    def span(self) -> int:
        """Columns whose scales are fitted together, a multiple of a group's; 0 where they are not fitted again."""
        ...

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> Grid:
        """Of weights [in, out], fp32; `power` [in]: what each column's inputs weigh, the Hessian's diagonal.

        With `hessian` [in, in] errors of a group's columns count together: for rounding that carries none of them on.
        """
        ...

    @property
    def plain(self) -> bool:
        """Whether a reader's weights are the grid's values, rounded to the format's dtype."""
        ...

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        """What can be fitted again in the `span` columns from `first` on, of their codes [span, out]."""
        ...

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        """As stored, of codes uint8 [in, out], in runs of columns with a grid each."""
        ...


class GroupFormat(Format, Protocol):
    """A format of groups (formats/)."""

    @property
    def bits(self) -> int: ...

    @property
    def group(self) -> int: ...

    @property
    def symmetric(self) -> bool: ...

    def encode(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed: ...


@dataclass(frozen=True)
class Groups:
    """Groups of `format.group` columns with a scale and a zero each: GPTQ's, AWQ's, compressed-tensors'.

    `least_zero`: 1 where the format cannot store a zero of 0. `clips`: shares of a group's range that are tried.
    """

    format: GroupFormat
    least_zero: int = 0
    clips: Sequence[float] = CLIPS

    plain: ClassVar[bool] = True

    @property
    def span(self) -> int:
        return self.format.group if self.format.group > 0 else WHOLE

    def columns(self, width: int) -> int:
        """Of a group."""
        return self.format.group if self.format.group > 0 else width

    def _stored(self, scale: Tensor) -> Tensor:
        return scale.to(self.format.dtype.torch()).float()

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        """The group's scale; its zero stays."""
        number = first // grid.group
        scale = grid.scale[number].clone()
        zero = torch.where(scale != 0, -grid.min[number] / torch.where(scale != 0, scale, 1.0), 0.0)

        def change(value: Tensor) -> None:
            grid.scale[number], grid.min[number] = value, -value * zero

        yield Fitted(scale, codes.float() - zero, self._stored, change)

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> Grid:
        """Of the ranges tried, by group and row, the one with the least error."""
        group = self.columns(len(weights))
        together = hessian is not None and group <= _TOGETHER
        step = max(1, _FIT_VALUES // weights.shape[1] // group) * group
        parts = []
        for at in range(0, len(weights), step):
            end = min(at + step, len(weights))
            weigh = power[at:end].view(-1, group, 1)
            if together and hessian is not None:
                weigh = torch.stack([hessian[i : i + group, i : i + group] for i in range(at, end, group)])
            parts.append(self._fit(weights[at:end].view(-1, group, weights.shape[1]), weigh))
        scale, zero, clip = (torch.cat(part) for part in zip(*parts, strict=True))
        return Grid(group, scale, -scale * zero, 0, 1 << self.format.bits, clip=float(clip.mean()))

    def _fit(self, weights: Tensor, weigh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scale, zero and clip [groups, out] of weights [groups, columns, out]; `weigh`: power [groups, columns, 1], or
        Hessians [groups, columns, columns]."""
        top, middle = (1 << self.format.bits) - 1, 1 << self.format.bits - 1
        low, high = weights.amin(1).clamp_(max=0), weights.amax(1).clamp_(min=0)
        if self.format.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        best: tuple[Tensor, ...] | None = None
        for clip in self.clips:
            scale = self._stored((high - low) * (clip / top))
            safe = torch.where(scale > 0, scale, 1.0)
            if self.format.symmetric:
                zero = torch.full_like(scale, middle)
            else:
                zero = (-low * clip / safe).round_().clamp_(self.least_zero, top)
            levels = (weights / safe[:, None] + zero[:, None]).round_().clamp_(0, top)
            wrong = levels.sub_(zero[:, None]).mul_(scale[:, None]).sub_(weights)
            error = (wrong.square_() * weigh if weigh.shape[2] == 1 else torch.bmm(weigh, wrong) * wrong).sum(1)
            found: tuple[Tensor, ...] = (error, scale, zero, torch.full_like(scale, clip))
            if best is not None:
                better = error < best[0]
                found = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            best = found
        assert best is not None
        return best[1], best[2], best[3]

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        scale, least = (torch.cat([getattr(grid, name) for grid, _ in parts]) for name in ("scale", "min"))
        codes = parts[0][1] if len(parts) == 1 else torch.cat([codes for _, codes in parts])
        zero = torch.where(scale > 0, -least / torch.where(scale > 0, scale, 1.0), 1 << self.format.bits - 1)
        return self.format.encode(codes.T, scale.T, zero.round_().to(torch.uint8).T)
