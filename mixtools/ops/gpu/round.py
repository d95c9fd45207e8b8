"""The launch of rounding.py: one for all matrices of a batch and all their rows. Nothing here imports Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from . import launch
from .launch import Arguments, Launch

TILE = 8  # columns whose sums, scales and errors are in registers together: sixteen would spill


def round_blocks(
    tensors: tuple[Tensor, ...], levels: tuple[Tensor, Tensor] | range, lanes: int = launch.LANES, tile: int = TILE
) -> Launch:
    """`tensors`: those of a feedback.Block in its order, or of as many as there are matrices in a first dimension of
    them all: targets [M, B, R], scales [M, G, R], group_of [M, B], feedback [M, B, B]. `levels`: integers, or a table
    [L] and its limits [L - 1], both on the CPU (feedback.py)."""
    names = ("targets", "weights", "errors", "codes", "scales", "mins", "group_of", "feedback")
    batch = tensors if tensors[0].ndim == 3 else tuple(one[None] for one in tensors)
    given = dict(zip(names, batch, strict=True))
    targets, group_of = given["targets"], given.pop("group_of").contiguous()
    matrices, columns, rows = targets.shape
    parts, device = -(-rows // lanes), targets.device
    if isinstance(levels, range):
        numbers, low, high, bits = targets, levels[0], levels[-1], -1  # no number is looked at
    else:
        numbers, low, high, bits = _numbers(*levels), 0, 0, (len(levels[0]) - 1).bit_length()
    arguments: Arguments = {
        **given, "group_of": group_of.to(device, non_blocking=True), "numbers": numbers.to(device, non_blocking=True),
        "deltas": targets.new_empty((matrices, -(-columns // tile) * tile, parts * lanes)),
        "columns": columns, "rows": rows, "low": float(low), "high": float(high),
    }  # fmt: skip
    for name, tensor in given.items():
        arguments |= {f"{name}_line": tensor.stride(1), f"{name}_next": tensor.stride(0)}
    constants = {"LANES": lanes, "TILE": tile, "WHOLE": columns % tile == 0, "BITS": bits}
    return Launch("round_blocks", (parts, matrices), arguments, constants, "rounding")


def _numbers(table: Tensor, limits: Tensor) -> Tensor:
    """[2, a power of two from L on]: levels, then what a number is greater than that is nearer to this level than to
    the one before; no number is greater than what fills the second line up."""
    size = 1 << (len(table) - 1).bit_length()
    found = table.new_full((2, size), torch.inf)
    found[0, : len(table)], found[1, 1 : len(table)] = table, limits
    return found
