"""bitsandbytes' grids: nf4's sixteen levels under the largest value of 64 columns, int8's under that of a row.

A range that is clipped is free here: both store their scale in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...formats import Int8, Nf4, Packed
from ...formats.nf4 import BLOCK, levels
from .grid import CLIPS, WHOLE, Fitted, Grid

_TOP = 127  # int8's largest code


@dataclass(frozen=True)
class Nf4Blocks:
    """Blocks of 64 columns; rows must be multiples of it, or a block would go on in the next row."""

    format: Nf4
    clips: Sequence[float] = CLIPS

    span = BLOCK

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> Grid:
        return _fit(weights, power, BLOCK, self.clips, levels().to(weights.device))

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        yield _fitted(grid, codes, first)

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        codes = torch.cat([codes for _, codes in parts]).T.contiguous()
        return self.format.encode_codes(codes, torch.cat([grid.scale for grid, _ in parts]).T.contiguous().view(-1))


@dataclass(frozen=True)
class Int8Rows:
    """A scale a row."""

    format: Int8
    clips: Sequence[float] = CLIPS

    span = WHOLE

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> Grid:
        return _fit(weights, power, len(weights), self.clips, None)

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        yield _fitted(grid, codes, first)

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        ((grid, codes),) = parts
        signed = (codes.T.short() - _TOP).to(torch.int8).contiguous()
        return self.format.encode_codes(signed, grid.scale[0] * _TOP)


def _fitted(grid: Grid, codes: Tensor, first: int) -> Fitted:
    number = first // grid.group

    def change(value: Tensor) -> None:
        grid.scale[number] = value

    return Fitted(grid.scale[number].clone(), grid.levels(codes), lambda value: value, change)


def _fit(weights: Tensor, power: Tensor, group: int, clips: Sequence[float], table: Tensor | None) -> Grid:
    """Of the ranges tried, by group and row, the one with the least error under the columns' power."""
    width, rows = weights.shape
    largest = weights.view(width // group, group, rows).abs().amax(1) / (1 if table is not None else _TOP)
    count = _TOP * 2 + 1 if table is None else len(table)
    best: tuple[Tensor, ...] | None = None
    for clip in clips:
        grid = Grid(group, largest * clip, torch.zeros_like(largest), -_TOP if table is None else 0, count, table)
        errors = (weights - grid.values(grid.nearest(weights))).square_() * power[:, None]
        found: tuple[Tensor, ...] = (
            errors.view(width // group, group, rows).sum(1),
            grid.scale,
            torch.full_like(largest, clip),
        )
        if best is not None:
            better = found[0] < best[0]
            found = tuple(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
        best = found
    assert best is not None
    return Grid(
        group, best[1], torch.zeros_like(largest), -_TOP if table is None else 0, count, table, float(best[2].mean())
    )
