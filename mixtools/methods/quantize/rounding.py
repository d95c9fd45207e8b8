"""Rounding: which code each weight gets on a grid, given what reaches the matrix.

nearest        each weight by itself
second-order   a column at a time in activation order, its error carried on to the columns behind it (GPTQ, arXiv
               2210.17323, as linalg/ldl.py has it); groups keep their places, so that no format needs a g_idx
sweep          coordinate descent over the codes, and scales fitted again to them by least squares (as in QuIP#, arXiv
               2402.04396, and CDQuant, arXiv 2406.17542)

Weights lie [in, out] (grid.py). The error that counts is e H eᵀ of each row's e = weight - value, H = Σ x xᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg.ldl import Factor
from ...ops.feedback import MOST_COLUMNS, Block, round_block
from .grid import Fitted, Grid, Scheme

BLOCK = 128  # columns whose errors are carried on one by one; those of a block go to the blocks behind it by a product


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [in, out] on `grid`, and `errors` [in, out]: weight less value.

    `lost`: Σ e (H + damping) eᵀ over the rows, where rounding tells it.
    """

    grid: Grid
    codes: Tensor
    errors: Tensor
    lost: float | None = None


def nearest(weights: Tensor, grid: Grid) -> Rounded:
    """Each weight to the level next to it."""
    codes = grid.nearest(weights)
    return Rounded(grid, codes, weights - grid.values(codes))


def second_order(weights: Tensor, grid: Grid, found: Factor) -> Rounded:
    """With each column's error carried on to those behind it."""
    ordered, lost = weights[found.order], 0.0
    made = Rounded(
        grid, torch.zeros(ordered.shape, dtype=torch.uint8, device=weights.device), torch.zeros_like(ordered)
    )
    for start in range(0, len(ordered), BLOCK):
        block = slice(start, min(start + BLOCK, len(ordered)))
        targets = torch.addmm(ordered[block], found.feedback[:start, block].T, made.errors[:start])
        _round(made, block, found.order[block], targets=targets, weights=ordered,
               feedback=found.feedback[block, block])  # fmt: skip
        missed = targets.sub_(ordered[block]).add_(made.errors[block])  # each target less the value that it became
        lost += float((missed.square_().sum(1) * found.pivots[block]).sum(dtype=torch.float64))
    back = torch.argsort(found.order)
    return Rounded(grid, made.codes[back], made.errors[back], lost)


def sweep(weights: Tensor, rounded: Rounded, hessian: Tensor, damping: float, scheme: Scheme) -> Rounded:
    """One pass of least squares and coordinate descent over what was rounded; the damped error never grows.

    `hessian` [in, in]; `damping`: a share of the mean of its diagonal.
    """
    made = Rounded(rounded.grid.copy(), rounded.codes.clone(), rounded.errors.clone())
    added = damping * float(hessian.diagonal().mean(dtype=torch.float64))
    power = hessian.diagonal() + added
    span = min(len(weights), scheme.span)
    whole = span > MOST_COLUMNS
    if whole:
        _fit_scales(made, slice(0, len(weights)), *_near(made, slice(0, len(weights)), hessian, added), scheme)
    step = BLOCK if whole or not span else max(span, BLOCK // span * span)
    for start in range(0, len(weights), step):
        block = slice(start, min(start + step, len(weights)))
        near, slope = _near(made, block, hessian, added)
        if span and not whole:
            _fit_scales(made, block, near, slope, scheme)
        targets = weights[block] + slope / power[block, None] - made.errors[block]
        near.diagonal().zero_()
        columns = torch.arange(start, block.stop, device=weights.device)
        _round(made, block, columns, targets=targets, weights=weights, feedback=near / power[block])
    return made


def _near(made: Rounded, columns: slice, hessian: Tensor, added: float) -> tuple[Tensor, Tensor]:
    """The damped Hessian of some columns among themselves, and half the gradient of the error by them [n, out]."""
    near = hessian[columns, columns].clone()
    near.diagonal().add_(added)
    return near, torch.addmm(made.errors[columns] * added, hessian[columns], made.errors)


def _fit_scales(made: Rounded, columns: slice, near: Tensor, slope: Tensor, scheme: Scheme) -> None:
    """All scales of some columns in turn: grid, errors and `slope` are changed."""
    span = min(len(made.errors), scheme.span)
    for first in range(columns.start, columns.stop, span):
        own = slice(first, first + span)
        for fitted in scheme.scales(made.grid, made.codes[own], first):
            _refit(fitted, made.errors[own], slope, near, slice(first - columns.start, own.stop - columns.start))


def _refit(fitted: Fitted, errors: Tensor, slope: Tensor, near: Tensor, inside: slice) -> None:
    """A factor by least squares; `errors` of its columns and `slope` [block, out] follow.

    `near` [block, block] is the block's Hessian, `inside` which of its columns the factor is of. The error is quadratic
    in the factor, so that the stored value next to the best one loses nothing against any other.
    """
    reach = near[:, inside] @ fitted.unit  # [block, out]
    top, bottom = (fitted.unit * slope[inside]).sum(0), (fitted.unit * reach[inside]).sum(0)
    moved = fitted.stored(fitted.value + top / torch.where(bottom > 0, bottom, 1.0))
    change = torch.where(torch.isfinite(moved) & (moved * fitted.value > 0), moved - fitted.value, 0.0)
    errors -= change * fitted.unit
    slope -= change * reach
    fitted.set(torch.where(change != 0, moved, fitted.value))


def _round(
    made: Rounded, block: slice, columns: Tensor, *, targets: Tensor, weights: Tensor, feedback: Tensor
) -> None:  # fmt: skip
    """A block of lines, which hold these columns of the matrix; its codes and errors are changed."""
    grid = made.grid
    levels = range(grid.low, grid.low + grid.count) if grid.table is None else grid.table
    given = Block(
        targets, weights[block], made.errors[block], made.codes[block], grid.scale, grid.min,
        grid.groups_of(columns).int().cpu(), feedback,
    )  # fmt: skip
    round_block(given, levels, threads=torch.get_num_threads())


def error(errors: Tensor, hessian: Tensor) -> float:
    """Σ over rows of e H eᵀ: the energy of what the matrix puts out wrongly."""
    return float((errors * (hessian @ errors)).sum(dtype=torch.float64))
