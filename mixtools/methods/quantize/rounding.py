"""Rounding: which code each weight gets on a grid, given what reaches the matrix.

nearest        each weight by itself
second-order   a column at a time in activation order, its error carried on to the columns behind it (GPTQ, arXiv
               2210.17323, as linalg/ldl.py has it); groups keep their places, so that no format needs a g_idx
sweep          coordinate descent over the codes, and scales fitted again to them by least squares (as in QuIP#, arXiv
               2402.04396, and CDQuant, arXiv 2406.17542)

Weights lie [in, out] (grid.py). The error that counts is e H eᵀ of each row's e = weight - value, H = Σ x xᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg.few import Few, Hessian, near
from ...linalg.ldl import Factor
from ...ops.feedback import MOST_COLUMNS, Block, round_block
from .grid import Fitted, Grid, Scheme

BLOCK = 128  # columns whose errors are carried on one by one; those of a block go to the blocks behind it by a product


@dataclass(frozen=True)
class Rounded:
    """`codes` uint8 [in, out] on `grid`, and `errors` [in, out]: weight less value."""

    grid: Grid
    codes: Tensor
    errors: Tensor


def nearest(weights: Tensor, grid: Grid) -> Rounded:
    """Each weight to the level next to it."""
    codes = grid.nearest(weights)
    return Rounded(grid, codes, weights - grid.values(codes))


def second_order(weights: Tensor, grid: Grid, found: Factor) -> Rounded:
    """With each column's error carried on to those behind it."""
    ordered, groups = weights[found.order], grid.groups_of(found.order).int().cpu()
    made = Rounded(
        grid, torch.zeros(ordered.shape, dtype=torch.uint8, device=weights.device), torch.zeros_like(ordered)
    )

    def rounded(block: slice, targets: list[Tensor], bases: list[Tensor], feedback: list[Tensor]) -> None:
        _round(made, block, groups[block], targets=targets[0], weights=bases[0], feedback=feedback[0])

    _walk([found], [ordered], made.errors[:, None], rounded)
    back = torch.argsort(found.order)
    return Rounded(grid, made.codes[back], made.errors[back])


@dataclass(frozen=True)
class Trial:
    """Rows of a matrix, `weights` [in, out], that are rounded with each of `scales` [tries, in] on its columns, to see
    what comes of it.

    `found`: of the Hessian of inputs that are not scaled; `added`: what damping has put on its diagonal. `grids`: one
    of the scaled weights for each try, all of the same levels and groups.
    """

    weights: Tensor
    found: Factor
    added: float
    scales: Tensor
    grids: Sequence[Grid]

    @property
    def kind(self) -> tuple[object, ...]:
        """What those of one scheme have in common that can be rounded together."""
        starts = tuple(panel.start for panel in self.found.panels)
        return self.weights.shape, self.scales.shape, self.grids[0].scale.shape, starts


def lost(trials: Sequence[Trial]) -> Tensor:
    """Σ e H eᵀ over the rows of each trial [trials, tries], float64, of second-order rounding of all of one kind at
    once: a block of columns of them all is one launch on a GPU. NaN where an error is no finite number.

    What is kept are errors of the weights as they are, e / scale of those that are rounded: to them one factor is
    right for all tries.
    """
    each, out = len(trials[0].grids), trials[0].weights.shape[1]
    found = [trial.found for trial in trials]
    ordered = [trial.weights[trial.found.order] for trial in trials]
    # [in, trials, tries]
    scales = torch.stack([trial.scales[:, trial.found.order].T for trial in trials], 1)
    pivots = torch.stack([one.pivots for one in found], 1)[..., None]
    grids = [grid for trial in trials for grid in trial.grids]
    steps, leasts = (torch.stack([getattr(grid, name) for grid in grids]) for name in ("scale", "min"))
    groups = torch.stack([trial.grids[0].groups_of(trial.found.order).int() for trial in trials]).cpu()
    groups = groups.repeat_interleave(each, 0)  # [trials * tries, in]
    errors = torch.zeros(len(scales), len(trials), each * out, device=scales.device)
    codes = torch.empty(len(grids), BLOCK, out, dtype=torch.uint8, device=scales.device)
    total = torch.zeros(len(trials), each, dtype=torch.float64, device=scales.device)

    def rounded(block: slice, targets: list[Tensor], bases: list[Tensor], feedback: list[Tensor]) -> None:
        scale = scales[block, ..., None]  # [columns, trials, tries, 1]
        shape = (*scale.shape[:3], out)
        wanted, weights = (torch.stack(part, 1).view(shape).mul_(scale) for part in (targets, bases))
        own, by_column = torch.zeros_like(wanted), scale.movedim(0, -1).contiguous()  # [trials, tries, 1, columns]
        fed = (torch.stack(feedback)[:, None] * by_column).div_(by_column.mT)
        first, second, third = (one.flatten(1, 2).transpose(0, 1) for one in (wanted, weights, own))
        given = Block(
            first, second, third, codes[:, : len(scale)], steps, leasts, groups[:, block], fed.flatten(0, 1)
        )  # fmt: skip
        round_block(given, grids[0].choices, threads=torch.get_num_threads())
        missed = wanted.sub_(weights).add_(own).div_(scale)  # each target less the value that it became
        errors[block] = own.div_(scale).flatten(2)
        total.add_((missed.square_().sum(-1) * pivots[block]).sum(0, dtype=torch.float64))

    _walk(found, ordered, errors, rounded)
    added = torch.tensor([trial.added for trial in trials], dtype=torch.float64, device=scales.device)
    for part in torch.split(errors, BLOCK):  # a sum of float64 takes a copy of so many digits
        squares = part.square_().view(len(part), len(trials), each, out).sum((0, 3), dtype=torch.float64)
        total.sub_(squares.mul_(added[:, None]))
    return total


def _walk(
    found: Sequence[Factor], ordered: Sequence[Tensor], errors: Tensor,
    rounded: Callable[[slice, list[Tensor], list[Tensor], list[Tensor]], None],
) -> None:  # fmt: skip
    """Go over the columns of several matrices in their orders, block by block, all in step.

    `ordered` [in, out] of each, its rows maybe several times beside each other in `errors` [in, matrices, times * out].
    `rounded` takes, of each, a block's targets and weights [b, times * out] and the feedback within it [b, b]; it sets
    `errors` of the block: weight less value.
    """
    width = errors.shape[2]
    carried: list[Tensor | None] = [None] * len(found)  # of few inputs: what panels ask of those behind, [k, width]
    for panels in zip(*(one.panels for one in found), strict=True):
        start, size = panels[0].start, len(panels[0].feedback)
        inside = [errors[start : start + size, number] for number in range(len(found))]
        bases = [lines[start : start + size] for lines in ordered]
        for number, (panel, asked) in enumerate(zip(panels, carried, strict=True)):
            if panel.inputs is not None and asked is not None:
                bases[number] = torch.addmm(_wide(bases[number], width), panel.inputs.T, asked)
        for at in range(0, size, BLOCK):
            block = slice(at, min(at + BLOCK, size))
            weights = [_wide(base[block], width) for base in bases]
            targets = [
                torch.addmm(one, panel.feedback[:at, block].T, before[:at])
                for one, panel, before in zip(weights, panels, inside, strict=True)
            ]
            where = slice(start + at, start + block.stop)
            rounded(where, targets, weights, [panel.feedback[block, block] for panel in panels])
        for number, (panel, asked) in enumerate(zip(panels, carried, strict=True)):
            own = inside[number]
            if panel.gain is None:
                continue
            if asked is None:
                carried[number] = panel.gain @ own
                continue
            asked.addmm_(panel.gain, own)
            # of the weights, no more of what panels before made of them
            own.sub_(bases[number]).add_(_wide(ordered[number][start : start + size], width))


def _wide(lines: Tensor, width: int) -> Tensor:
    """Lines so wide, their items as often beside each other as it takes."""
    return lines if lines.shape[1] == width else lines.repeat(1, width // lines.shape[1])


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
        _round(made, block, groups, targets=targets, weights=weights[block], feedback=beside / power[block])
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
    """A block of lines, of these groups, targets and weights [b, out]; its codes and errors are changed."""
    grid = made.grid
    given = Block(targets, weights, made.errors[block], made.codes[block], grid.scale, grid.min, groups, feedback)
    round_block(given, grid.choices, threads=torch.get_num_threads())
