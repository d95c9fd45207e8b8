"""Rounding: which code each weight gets on a grid, given what reaches the matrix.

nearest        each weight by itself
second-order   a column at a time in activation order, its error carried on to the columns behind it (GPTQ, arXiv
               2210.17323, as linalg/ldl.py has it); groups keep their places, so that no format needs a g_idx
sweep          coordinate descent over the codes, and scales fitted again to them by least squares (as in QuIP#, arXiv
               2402.04396, and CDQuant, arXiv 2406.17542)

Weights lie [in, out] (grid.py). The error that counts is e H eᵀ of each row's e = weight - value, H = Σ x xᵀ. Several
matrices go in step, a block of columns of them all in one launch on a GPU; each comes out as it does by itself.
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
class Given:
    """A matrix to round: `weights` [in, out], fp32, its Hessian [in, in], or none where nothing is swept, and that
    Hessian's factor."""

    weights: Tensor
    found: Factor
    hessian: Hessian | None = None

    @property
    def kind(self) -> tuple[object, ...]:
        """What those of one scheme have in common that can go in step."""
        return self.weights.shape, _starts(self.found)


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


def second_order(given: Sequence[Given], grids: Sequence[Grid]) -> list[Rounded]:
    """With each column's error carried on to those behind it. Matrices of one kind, each on a grid of its own."""
    ordered = [one.weights[one.found.order] for one in given]
    groups = [grid.groups_of(one.found.order).int().cpu() for one, grid in zip(given, grids, strict=True)]
    size, width = given[0].weights.shape
    codes = torch.zeros(len(given), size, width, dtype=torch.uint8, device=ordered[0].device)
    errors = torch.zeros_like(codes, dtype=ordered[0].dtype)

    def rounded(block: slice, targets: list[Tensor], bases: list[Tensor], feedback: list[Tensor]) -> None:
        now = codes[:, block], errors[:, block]
        _round(grids, [one[block] for one in groups], now, targets=targets, weights=bases, feedback=feedback)

    _walk([one.found for one in given], ordered, errors, rounded)
    backs = [torch.argsort(one.found.order) for one in given]
    made = zip(grids, codes, errors, backs, strict=True)
    return [Rounded(grid, own_codes[back], own_errors[back]) for grid, own_codes, own_errors, back in made]


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
        return self.weights.shape, self.scales.shape, self.grids[0].scale.shape, _starts(self.found)


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
    errors = torch.zeros(len(trials), len(scales), each * out, device=scales.device)
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
        errors[:, block] = own.div_(scale).flatten(2).transpose(0, 1)
        total.add_((missed.square_().sum(-1) * pivots[block]).sum(0, dtype=torch.float64))

    _walk(found, ordered, errors, rounded)
    added = torch.tensor([trial.added for trial in trials], dtype=torch.float64, device=scales.device)
    for part in torch.split(errors, BLOCK, 1):  # a sum of float64 takes a copy of so many digits
        squares = part.square_().view(*part.shape[:2], each, out).sum((1, 3), dtype=torch.float64)
        total.sub_(squares.mul_(added[:, None]))
    return total


def _walk(
    found: Sequence[Factor], ordered: Sequence[Tensor], errors: Tensor,
    rounded: Callable[[slice, list[Tensor], list[Tensor], list[Tensor]], None],
) -> None:  # fmt: skip
    """Go over the columns of several matrices in their orders, block by block, all in step.

    `ordered` [in, out] of each, its rows maybe several times beside each other in `errors` [matrices, in, times * out].
    `rounded` takes, of each, a block's targets and weights [b, times * out] and the feedback within it [b, b]; it sets
    `errors` of the block: weight less value.
    """
    width = errors.shape[2]
    carried: list[Tensor | None] = [None] * len(found)  # of few inputs: what panels ask of those behind, [k, width]
    for panels in zip(*(one.panels for one in found), strict=True):
        start, size = panels[0].start, len(panels[0].feedback)
        inside = [own[start : start + size] for own in errors]
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


def sweep(given: Sequence[Given], rounded: Sequence[Rounded], scheme: Scheme) -> list[Rounded]:
    """One pass of least squares and coordinate descent over what was rounded; the damped error never grows.

    Matrices of one kind, with their Hessians. Scales of more than MOST_COLUMNS columns are not fitted over few inputs:
    that takes the Hessian itself.
    """
    made = [Rounded(one.grid.copy(), one.codes.clone(), one.errors.clone()) for one in rounded]
    slopes = [_Slopes(one, own) for one, own in zip(given, made, strict=True)]
    size = len(given[0].weights)
    span = min(size, scheme.span)
    whole = span > MOST_COLUMNS
    if whole:
        everything = slice(0, size)
        for own in slopes:
            if not isinstance(own.hessian, Few):
                _fit_scales(own.made, everything, own.near(everything), own.of(everything), scheme)
    step = BLOCK if whole or not span else max(span, BLOCK // span * span)
    for start in range(0, size, step):
        block = slice(start, min(start + step, size))
        targets, weights, feedback = [], [], []
        for one, own in zip(given, slopes, strict=True):
            beside, slope, power = own.near(block), own.of(block), own.power[block]
            if span and not whole:
                _fit_scales(own.made, block, beside, slope, scheme)
            targets.append(one.weights[block] + slope / power[:, None] - own.made.errors[block])
            weights.append(one.weights[block])
            beside.diagonal().zero_()
            feedback.append(beside / power)
        grids = [one.grid for one in made]
        groups = [grid.groups_of(torch.arange(start, block.stop)).int() for grid in grids]
        codes, errors = _beside([one.codes[block] for one in made]), _beside([one.errors[block] for one in made])
        _round(grids, groups, (codes, errors), targets=targets, weights=weights, feedback=feedback)
        for number, own in enumerate(slopes):
            if len(made) > 1:  # else it is the matrix itself that was changed
                own.made.codes[block], own.made.errors[block] = codes[number], errors[number]
            own.changed(block)
    return made


class _Slopes:
    """Half the gradient of the damped error by a matrix's columns, as its errors change."""

    def __init__(self, given: Given, made: Rounded) -> None:
        assert given.hessian is not None
        self.made, self.hessian = made, given.hessian
        diagonal = self.hessian.diagonal()
        self.added = given.found.damping * float(diagonal.mean(dtype=torch.float64))
        self.power = diagonal + self.added
        self.outputs = self.hessian.rows @ made.errors if isinstance(self.hessian, Few) else None  # of few [k, out]
        self._before = made.errors[:0]

    def near(self, columns: slice) -> Tensor:
        """The damped Hessian of some columns among themselves."""
        found = near(self.hessian, columns)
        found.diagonal().add_(self.added)
        return found

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
    grids: Sequence[Grid], groups: Sequence[Tensor], changed: tuple[Tensor, Tensor], *, targets: Sequence[Tensor],
    weights: Sequence[Tensor], feedback: Sequence[Tensor],
) -> None:  # fmt: skip
    """A block of lines of each matrix, of these groups, targets and weights [b, out]; codes and errors [matrices, b,
    out] are changed."""
    codes, errors = changed
    scales, mins = (_beside([getattr(grid, name) for grid in grids]) for name in ("scale", "min"))
    block = Block(
        _beside(targets), _beside(weights), errors, codes, scales, mins, _beside(groups), _beside(feedback)
    )  # fmt: skip
    round_block(block, grids[0].choices, threads=torch.get_num_threads())


def _beside(matrices: Sequence[Tensor]) -> Tensor:
    """In one tensor, which of a single one is that itself."""
    return matrices[0][None] if len(matrices) == 1 else torch.stack([*matrices])


def _starts(found: Factor) -> tuple[int, ...]:
    return tuple(panel.start for panel in found.panels)
