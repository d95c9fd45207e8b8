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

from ...linalg.few import Few, Hessian, near
from ...linalg.ldl import Factor, Panel
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
    ordered, groups = weights[found.order], grid.groups_of(found.order).int().cpu()
    lost = torch.zeros((), dtype=torch.float64, device=weights.device)  # told at the end: nobody waits for a device
    made = Rounded(
        grid, torch.zeros(ordered.shape, dtype=torch.uint8, device=weights.device), torch.zeros_like(ordered)
    )
    carried: Tensor | None = None  # of few inputs: what panels ask of those behind them, [k, out]
    for panel in found.panels:
        own = slice(panel.start, panel.start + len(panel.feedback))
        local = Rounded(grid, made.codes[own], made.errors[own])
        base = ordered[own]
        if panel.inputs is not None and carried is not None:
            base = torch.addmm(base, panel.inputs.T, carried)
        lost = lost + _panel(local, panel, base, found.pivots[own], groups[own])
        if panel.gain is not None:
            carried = panel.gain @ local.errors if carried is None else carried.addmm_(panel.gain, local.errors)
            local.errors.sub_(base).add_(ordered[own])  # of the weights, no more of what panels before made of them
    back = torch.argsort(found.order)
    return Rounded(grid, made.codes[back], made.errors[back], float(lost))


def _panel(made: Rounded, panel: Panel, base: Tensor, pivots: Tensor, groups: Tensor) -> Tensor:
    """Round columns `base` [b, out] of a panel, whose errors are those of `base`; the damped error that they add.

    `groups` int32 [b], on the CPU: of the grid, by column."""
    lost = torch.zeros((), dtype=torch.float64, device=base.device)
    for start in range(0, len(base), BLOCK):
        block = slice(start, min(start + BLOCK, len(base)))
        targets = torch.addmm(base[block], panel.feedback[:start, block].T, made.errors[:start])
        _round(made, block, groups[block], targets=targets, weights=base, feedback=panel.feedback[block, block])
        missed = targets.sub_(base[block]).add_(made.errors[block])  # each target less the value that it became
        lost = lost + (missed.square_().sum(1) * pivots[block]).sum(dtype=torch.float64)
    return lost


def sweep(weights: Tensor, rounded: Rounded, hessian: Hessian, damping: float, scheme: Scheme) -> Rounded:
    """One pass of least squares and coordinate descent over what was rounded; the damped error never grows.

    `hessian` [in, in]; `damping`: a share of the mean of its diagonal. Scales of more than MOST_COLUMNS columns are not
    fitted over few inputs: that takes the Hessian itself.
    """
    made = Rounded(rounded.grid.copy(), rounded.codes.clone(), rounded.errors.clone())
    added = damping * float(hessian.diagonal().mean(dtype=torch.float64))
    power = hessian.diagonal() + added
    span = min(len(weights), scheme.span)
    whole = span > MOST_COLUMNS
    slopes = _Slopes(made, hessian, added)
    if whole and not isinstance(hessian, Few):
        everything = slice(0, len(weights))
        _fit_scales(made, everything, _near(hessian, everything, added), slopes.of(everything), scheme)
    step = BLOCK if whole or not span else max(span, BLOCK // span * span)
    for start in range(0, len(weights), step):
        block = slice(start, min(start + step, len(weights)))
        beside, slope = _near(hessian, block, added), slopes.of(block)
        if span and not whole:
            _fit_scales(made, block, beside, slope, scheme)
        targets = weights[block] + slope / power[block, None] - made.errors[block]
        beside.diagonal().zero_()
        groups = made.grid.groups_of(torch.arange(start, block.stop)).int()
        _round(made, block, groups, targets=targets, weights=weights, feedback=beside / power[block])
        slopes.changed(block)
    return made


def _near(hessian: Hessian, columns: slice, added: float) -> Tensor:
    """The damped Hessian of some columns among themselves."""
    found = near(hessian, columns)
    found.diagonal().add_(added)
    return found


class _Slopes:
    """Half the gradient of the damped error by a matrix's columns, as its errors change."""

    def __init__(self, made: Rounded, hessian: Hessian, added: float) -> None:
        self.made, self.hessian, self.added = made, hessian, added
        self.outputs = hessian.rows @ made.errors if isinstance(hessian, Few) else None  # of few inputs [k, out]
        self._before = made.errors[:0]

    def of(self, columns: slice) -> Tensor:
        """[b, out]"""
        errors = self.made.errors[columns]
        if not isinstance(self.hessian, Few):
            return torch.addmm(errors * self.added, self.hessian[columns], self.made.errors)
        assert self.outputs is not None
        self._before = errors.clone()
        return torch.addmm(errors * self.added, self.hessian.rows[:, columns].T, self.outputs)

    def changed(self, columns: slice) -> None:
        """The errors of the columns that were asked for last are others now."""
        if isinstance(self.hessian, Few):
            assert self.outputs is not None
            self.outputs.addmm_(self.hessian.rows[:, columns], self.made.errors[columns] - self._before)


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
    made: Rounded, block: slice, groups: Tensor, *, targets: Tensor, weights: Tensor, feedback: Tensor
) -> None:  # fmt: skip
    """A block of lines, whose columns are of these groups; its codes and errors are changed."""
    grid = made.grid
    given = Block(
        targets, weights[block], made.errors[block], made.codes[block], grid.scale, grid.min, groups, feedback
    )
    round_block(given, grid.choices, threads=torch.get_num_threads())
