"""ggml's block types as grids: the scales that its encoder finds, columns weighed by what their inputs are worth.

The blocks keep what the encoder chose but for the codes, and for d and dmin of a super-block, which are fitted again to
the codes (grid.py): the same bytes for a reader, whichever way they were rounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ...formats import Ggml, Packed, ggml_grid
from ...ops.encode import encode
from ...ops.gpu import able
from ...storage.dtypes import DType
from .grid import Fitted, Grid

_LEAST_POWER = 1e-6  # of the mean: a block of columns that nothing reached is still encoded


@dataclass(frozen=True)
class BlockGrid(Grid):
    """`blocks` uint8 [out, bytes] as encoded; `supers`: d [supers, out], and dmin where there is one."""

    blocks: Tensor = field(default_factory=lambda: torch.empty(0))
    supers: tuple[Tensor, ...] = ()
    subs: tuple[Tensor, ...] = ()  # sub-scales and sub-minima [groups, out]

    def copy(self) -> BlockGrid:
        return replace(
            self, scale=self.scale.clone(), min=self.min.clone(), supers=tuple(one.clone() for one in self.supers)
        )


@dataclass(frozen=True)
class Blocks:
    """A type that is encoded here (ops/cpu.NATIVE)."""

    type: DType

    plain: ClassVar[bool] = True

    @property
    def format(self) -> Ggml:
        return Ggml(self.type, DType.F32)

    @property
    def span(self) -> int:
        """A super-block; MXFP4's scales are powers of two, and stay."""
        return 0 if self.type is DType.MXFP4 else self.type.block

    def grid(self, weights: Tensor, power: Tensor, hessian: Tensor | None = None) -> BlockGrid:
        blocks = _encoded(
            weights.T.contiguous(), self.type, power.clamp(min=_LEAST_POWER * float(power.mean())).float()
        )
        found = ggml_grid.supers(self.type, blocks)
        levels = ggml_grid.levels(self.type)
        even = bool((np.diff(levels) == 1).all())
        scale, least = found.grid()
        return BlockGrid(
            ggml_grid.group(self.type), scale, least, int(levels[0]) if even else 0, len(levels),
            None if even else torch.from_numpy(levels).to(weights.device), blocks=blocks,
            supers=tuple(part for part in (found.d, found.dmin) if part is not None),
            subs=tuple(part.float() for part in (found.scales, found.mins) if part is not None),
        )  # fmt: skip

    def scales(self, grid: Grid, codes: Tensor, first: int) -> Iterator[Fitted]:
        """d, then dmin: value = d * (sub-scale * level) - dmin * sub-minimum."""
        assert isinstance(grid, BlockGrid)
        number, each = first // self.type.block, self.type.block // grid.group
        groups = slice(number * each, (number + 1) * each)
        units = [grid.subs[0][groups].repeat_interleave(grid.group, 0) * grid.levels(codes)]
        if len(grid.supers) > 1:
            units.append(-grid.subs[1][groups].repeat_interleave(grid.group, 0))
        for unit, factors, subs, place, sign in zip(
            units, grid.supers, grid.subs, (grid.scale, grid.min), (1, -1), strict=False
        ):

            def change(
                value: Tensor, factors: Tensor = factors, subs: Tensor = subs, place: Tensor = place, sign: int = sign
            ) -> None:
                factors[number] = value
                place[groups] = value * subs[groups] * sign

            yield Fitted(factors[number].clone(), unit, _half, change)

    def pack(self, parts: Sequence[tuple[Grid, Tensor]]) -> Packed:
        made = []
        for grid, codes in parts:
            assert isinstance(grid, BlockGrid)
            blocks = ggml_grid.with_supers(self.type, grid.blocks, *grid.supers) if self.span else grid.blocks
            made.append(ggml_grid.with_codes(self.type, blocks, codes).cpu())
        return Packed(self.format, (made[0] if len(made) == 1 else torch.cat(made, 1),))


def _encoded(rows: Tensor, type: DType, importance: Tensor) -> Tensor:
    """Blocks of rows, fp32: made where they lie, on a card that has kernels of the type; the bytes are the same."""
    if rows.device.type != "cpu" and able.problem(rows.device) is None:
        from ...ops.gpu import encoding

        if type in encoding.ENCODED:
            return encoding.encode(rows, type, importance)
    given = np.ascontiguousarray(importance.cpu().numpy())
    made = encode(rows.cpu().numpy(), DType.F32, type, given, threads=torch.get_num_threads())
    return torch.from_numpy(made).to(rows.device)


def _half(value: Tensor) -> Tensor:
    return value.half().float()
