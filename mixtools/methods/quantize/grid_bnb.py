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
class AbsMax:
    """nf4's blocks of 64 columns, which rows must be multiples of, or a block would go on in the next; int8's rows."""

    format: Nf4 | Int8
    clips: Sequence[float] = CLIPS

    @property
    def plain(self) -> bool:
        """int8's scale is stored as the largest value of a row, and divided again."""
        return isinstance(self.format, Nf4)

    @property
    def span(self) -> int:
        return BLOCK if isinstance(self.format, Nf4) else WHOLE

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> Grid:
        table = levels().to(weights.device) if isinstance(self.format, Nf4) else None
        return _fit(weights, power, min(self.span, len(weights)), self.clips, table)

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        number = first // grid.group

        def change(value: Tensor) -> None:
            grid.scale[number] = value

        yield Fitted(grid.scale[number].clone(), grid.levels(codes), lambda value: value, change)

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        codes = torch.cat([codes for _, codes in parts]).T.contiguous()
        scale = torch.cat([grid.scale for grid, _ in parts]).T.contiguous()  # [out, groups]
        if isinstance(self.format, Nf4):
            return self.format.encode_codes(codes, scale.view(-1))
        return self.format.encode_codes((codes.short() - _TOP).to(torch.int8), scale[:, 0] * _TOP)


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
