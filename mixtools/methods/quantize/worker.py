"""What is done with a norm and the matrices that read it: smoothing chosen, matrices rounded, figures told."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...errors import MixtoolsError, SpectrumError, TensorError
from ...formats import Packed, Plain
from ...inference.hessian import Gram
from ...linalg.few import Hessian, energy
from ...linalg.ldl import Factor
from ...names import Slot
from ...storage.dtypes import DType
from . import matrix, rounding, smoothing
from .clock import Clock
from .grid import Grid, Scheme
from .matrix import Options
from .rounding import Rounded, Trial

ROWS_TRIED = 512  # of a matrix, spread evenly, by which smoothing is chosen
ROWS_TOLD = 128  # by which the report's errors are told
_TOGETHER = 1 << 30  # bytes of errors that are kept at once, where matrices are tried together
_COLUMNS = 1024  # whose values are made at a time: they are of 32 bits

Row = dict[str, Any]
Stored = tuple[Slot, Packed]


@dataclass(frozen=True)
class Method:
    """How a model is quantized. `scheme` of a matrix; `stored` of norm and router; `smooth`: whether it is tried;
    `sequential`: whether a layer's inputs come through the quantized layers before it.
    """

    scheme: Callable[[Slot], Scheme]
    stored: Callable[[Slot], DType]
    options: Options = field(default_factory=Options)
    smooth: bool = True
    sequential: bool = True


class Tried(NamedTuple):
    """A matrix [in, out], or a run of its columns, by which smoothing is chosen; `columns` of what is smoothed."""

    slot: Slot
    weights: Tensor
    hessian: Hessian
    found: Factor | None
    columns: slice = slice(None)


class Asked(NamedTuple):
    """A matrix [in, out], or a run of its columns, to be rounded, with its Hessian and that Hessian's factor."""

    slot: Slot
    weights: Tensor
    hessian: Hessian
    found: Factor | None


Outcome = tuple[Rounded, Row]  # and what the report says of it


class Worker:
    """`read` gives a weight as the source has it, fp32, on the device; `keep` takes one as a reader will see it.

    `rows`: what the report says of each matrix; `told`: of them all.
    """

    def __init__(
        self, method: Method, read: Callable[[Slot], Tensor], keep: Callable[[Slot, Tensor], None], clock: Clock
    ) -> None:
        self.method, self.read, self.keep, self.clock = method, read, keep, clock
        self.rows: dict[Slot, Row] = {}
        self.told: Row = {}

    def norm(
        self, slot: Slot, inputs: Gram, readers: Sequence[tuple[Mapping[Slot, Tensor], Gram]]
    ) -> tuple[Stored, Tensor]:
        """The norm as stored, and the scales [in] that its readers' columns get; `readers` with their own inputs."""
        norm, dtype = self.read(slot), self.method.stored(slot)
        choice = smoothing.Choice(0.0, torch.ones_like(norm), {})
        if self.method.smooth and inputs.tokens:
            heard = []
            for weights, gram in readers:
                found = self.factor(gram.blocks[0]) if gram.tokens else None
                heard += [Tried(slot, one, gram.blocks[0], found) for slot, one in weights.items() if gram.tokens]
            with self.clock("smoothing"):
                choice = smoothing.choose(inputs.magnitude / inputs.tokens, partial(self.tried, heard))
        stored, scale = smoothing.on_norm(norm, choice.scale, dtype.torch())
        if not bool(torch.isfinite(stored).all()):
            raise TensorError(f"does not fit {dtype.value}", tensor=slot)
        self.told[slot.role.value] = {
            "exponent": choice.exponent, "errors": choice.errors, "bounded": smoothing.bounded(choice.scale),
        }  # fmt: skip
        self.keep(slot, stored)
        return (slot, Packed(Plain(dtype), (stored.cpu(),))), scale

    def tried(self, tried: Sequence[Tried], scales: Tensor) -> list[float]:
        """The energy of the outputs' error of some rows of matrices, at inputs divided by each of `scales`
        [tries, in].

        With the order and the damping of a Hessian as it is (`found`): then no try needs a factor of its own. What is
        alike is rounded together where there is a card.
        """
        total, trials = np.zeros(len(scales)), []
        for _, readers in itertools.groupby((one for one in tried if one.found is None), lambda one: id(one.hessian)):
            total += [*self._nearest([*readers], scales)]
        for one in tried:
            if one.found is not None:
                own, weights = scales[:, one.columns], spread(one.weights, ROWS_TRIED)
                scheme, power = self.method.scheme(one.slot), one.hessian.diagonal()
                with _of(one.slot):
                    grids = [scheme.grid(weights * scale[:, None], power / scale.square()) for scale in own]
                added = one.found.damping * float(power.mean(dtype=torch.float64))
                trials.append((one.slot, Trial(weights, one.found, added, own, grids)))
        for _, alike in itertools.groupby(trials, lambda one: (self.method.scheme(one[0]), one[1].kind)):
            for batch in _batches([*alike]):
                lost = rounding.lost([trial for _, trial in batch]).cpu().numpy()
                for (slot, _), errors in zip(batch, lost, strict=True):
                    if not np.isfinite(errors).all():
                        raise SpectrumError(matrix.NOT_FINITE, tensor=slot)
                    total += errors
        return list(map(float, total))

    def _nearest(self, readers: Sequence[Tried], scales: Tensor) -> Iterator[float]:
        """The same of matrices with one Hessian, each weight rounded by itself."""
        hessian, options = readers[0].hessian, self.method.options
        for scale in scales[:, readers[0].columns]:
            whole, power, total = matrix.scaled(hessian, scale), hessian.diagonal() / scale.square(), 0.0
            for slot, weights, *_ in readers:
                few = spread(weights, ROWS_TRIED) * scale[:, None]
                with _of(slot):
                    made = matrix.quantize(few, power, self.method.scheme(slot), options, None, hessian=whole)
                total += energy(hessian, made.errors / scale[:, None])
            yield total

    def round(self, asked: Iterable[Asked], together: int = 1) -> Iterator[tuple[Slot, Outcome]]:
        """Each in its turn; so many of what is alike in step. Raises SpectrumError, which names the slot, for a matrix
        that comes out as no number."""
        waiting = iter(asked)
        while batch := [*itertools.islice(waiting, together)]:
            made = self._rounded(batch)
            outcomes = [(one.slot, self.outcome(one, found)) for one, found in zip(batch, made, strict=True)]
            del batch, made  # before others are read
            while outcomes:
                yield outcomes.pop(0)

    def _rounded(self, batch: Sequence[Asked]) -> list[Rounded]:
        made: dict[int, Rounded] = {}
        schemes = [self.method.scheme(one.slot) for one in batch]
        with self.clock("rounding"):
            for scheme in dict.fromkeys(schemes):
                numbers = [number for number, one in enumerate(schemes) if one == scheme]
                cases = [matrix.Case(one.weights, one.hessian.diagonal(), one.found, one.hessian)
                         for one in (batch[number] for number in numbers)]  # fmt: skip
                made |= zip(numbers, matrix.quantize_all(cases, scheme, self.method.options), strict=True)
            for number, one in enumerate(batch):
                with _of(one.slot):
                    matrix.check(made[number])
        return [made[number] for number in range(len(batch))]

    def outcome(self, asked: Asked, made: Rounded) -> Outcome:
        with self.clock("report"):
            row = _figures(asked.weights, asked.hessian, self.method.scheme(asked.slot), made)
        return made, {**row, "damping": asked.found.damping if asked.found else None}

    def finished(self, slot: Slot, parts: Sequence[Outcome], tokens: int) -> Stored:
        """`parts`: runs of columns, in order."""
        with self.clock("packing"), _of(slot):
            scheme, made = self.method.scheme(slot), [(one.grid, one.codes) for one, _ in parts]
            packed = scheme.pack(made)
            # from a GPU it would go to the CPU, decoded there, and back
            on_card = scheme.plain and made[0][1].device.type != "cpu"
            self.keep(slot, values(made, scheme.format.dtype.torch()) if on_card else packed.dense)
        energy = sum(row["energy"] for _, row in parts) or 1.0
        first = parts[0][1]
        self.rows[slot] = {
            "tokens": tokens, "damping": first["damping"], "clip": first["clip"],
            **{name: sum(row[name] for _, row in parts) / energy for name in ("nearest", "error")},
        }  # fmt: skip
        return slot, packed

    def factor(self, hessian: Hessian) -> Factor | None:
        with self.clock("factor"):
            return matrix.prepared(hessian, self.method.options)

    def weights(self, slot: Slot, rows: int | None = None) -> Tensor:
        """[in, out], or of so many rows of the matrix, spread evenly."""
        found = self.read(slot).T
        return spread(found, rows) if rows else found.contiguous()


def _batches(trials: list[tuple[Slot, Trial]]) -> Iterator[list[tuple[Slot, Trial]]]:
    """One by one on a CPU; on a card as many as memory is meant for."""
    _, first = trials[0]
    each = first.weights.numel() * len(first.scales) * 4
    most = 1 if first.weights.device.type == "cpu" else max(1, _TOGETHER // each)
    yield from (trials[at : at + most] for at in range(0, len(trials), most))


@contextmanager
def _of(slot: Slot) -> Iterator[None]:
    """Errors within name the slot."""
    try:
        yield
    except MixtoolsError as error:
        error.tensor = error.tensor or str(slot)
        raise


def values(parts: Sequence[tuple[Grid, Tensor]], dtype: torch.dtype) -> Tensor:
    """A matrix [out, in] of codes [in, out], in runs of columns with a grid each."""
    out = parts[0][1].new_empty((parts[0][1].shape[1], sum(len(codes) for _, codes in parts)), dtype=dtype)
    at = 0
    for grid, codes in parts:
        for first in range(0, len(codes), _COLUMNS):
            run = codes[first : first + _COLUMNS]
            out[:, at : at + len(run)] = grid.values(run, first).T
            at += len(run)
    return out


def spread(weights: Tensor, rows: int) -> Tensor:
    """So many of the rows of weights [in, out], all if there are no more."""
    return weights[:, :: max(1, weights.shape[1] // rows)].contiguous()


def _figures(weights: Tensor, hessian: Hessian, scheme: Scheme, made: Rounded) -> Row:
    """Energies of some rows' outputs, and of their errors: rounded to nearest, and as made."""
    few, errors = spread(weights, ROWS_TOLD), spread(made.errors, ROWS_TOLD)
    grid = scheme.grid(few, torch.ones_like(hessian.diagonal()))
    plain = few - grid.values(grid.nearest(few))
    return {
        "energy": energy(hessian, few), "nearest": energy(hessian, plain), "error": energy(hessian, errors),
        "clip": made.grid.clip,
    }  # fmt: skip
