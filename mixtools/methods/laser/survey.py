"""Ranks that must be known before an output can be planned: those of factors, of a budget, and fixed ones."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from ...errors import UsageError
from ...layouts.checkpoint import Checkpoint, located
from ...names import Slot
from ...progress import Progress, Silent
from .budget import Matrix, check, distribute, stored_bytes
from .method import report_of
from .worker import Row, Worker

Found = TypeVar("Found")


class Survey(NamedTuple):
    """Ranks that are known before anything is written, and what was found when they were chosen.

    A slot without a rank stays as it is. `told` belongs in the report.
    """

    ranks: Mapping[Slot, int]
    rows: Mapping[Slot, Row]
    told: Mapping[str, Any] = {}


class Kept(Protocol):
    """What an earlier, killed run found, and where this one's go (storage/findings.py)."""

    @property
    def found(self) -> Mapping[str, Any]: ...

    def keep(self, name: str, found: Any) -> None: ...


class Noted:
    """In memory alone."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def keep(self, name: str, found: Any) -> None:
        self.found[name] = found


def survey(worker: Worker, slots: Sequence[Slot], progress: Progress | None = None, kept: Kept | None = None) -> Survey:
    """Rank and row of each slot, nothing rebuilt. Raises as Worker.analyse and the rule do."""

    def look(slot: Slot) -> Row:
        return worker.row(slot, worker.scan(slot))

    rows = dict(_each(worker, slots, look, progress, kept))
    return Survey({slot: int(row["rank"]) for slot, row in rows.items()}, rows)


def rank_survey(
    worker: Worker, slots: Sequence[Slot], progress: Progress | None = None, kept: Kept | None = None
) -> Survey:
    """Ranks by the rule, from values alone; rows come when the matrices do. Raises as `survey`."""

    def look(slot: Slot) -> int:
        found = worker.spectrum(slot)
        with located(worker.source, slot):
            return report_of(found, worker.method).rank

    return Survey(dict(_each(worker, slots, look, progress, kept)), {})


def budget_survey(
    worker: Worker, slots: Sequence[Slot], shares: tuple[float, float], progress: Progress | None = None,
    kept: Kept | None = None,
) -> Survey:  # fmt: skip
    """Ranks that share a budget, of `shares` in all and of each layer at least (budget.py).

    What stays whole has a row, the others get theirs when they are made.

    An error is a share of what the matrix holds: of its output's energy, damped, or of ‖W‖², by the norm. Raises
    UsageError for a budget that cannot be, and as `survey`.
    """

    def look(slot: Slot) -> Row:
        found = worker.spectrum(slot)
        row = worker.row(slot, report_of(found, worker.method, len(found.values)))
        return {"row": row, "lost": base64.b64encode(found.tail.tobytes()).decode()}

    stored = {slot: worker.source.spec(slot) for slot in slots}
    shapes = {slot: (spec.shape[0], spec.shape[1]) for slot, spec in stored.items()}
    check([(shapes[slot], stored[slot].dtype.itemsize) for slot in slots], *shares)
    found = dict(_each(worker, slots, look, progress, kept))
    matrices = {}
    for slot in slots:
        lost = np.frombuffer(base64.b64decode(found[slot]["lost"]))
        matrices[slot] = Matrix(lost, shapes[slot], stored[slot].dtype.itemsize, int(slot.layer or 0))
    ranks = distribute(matrices, *shares)
    whole = {slot: found[slot]["row"] for slot, rank in ranks.items() if rank is None}
    told = {"budget": told_budget(matrices, ranks)}
    return Survey({slot: rank for slot, rank in ranks.items() if rank is not None}, whole, told)


def told_budget(matrices: Mapping[Slot, Matrix], ranks: Mapping[Slot, int | None]) -> dict[str, Any]:
    """What became of a budget: shares of bytes in all and by layer, and the mean of the matrices' errors."""
    errors = [0.0 if (rank := ranks[slot]) is None else float(matrix.lost[rank]) for slot, matrix in matrices.items()]
    layers = {matrix.layer: [slot for slot in matrices if slot.layer == matrix.layer] for matrix in matrices.values()}

    def share(members: Sequence[Slot]) -> float:
        used = sum(stored_bytes(matrices[slot], ranks[slot]) for slot in members)
        return used / sum(matrices[slot].whole_bytes for slot in members)

    return {
        "share": share(list(matrices)),
        "bytes": sum(stored_bytes(matrix, ranks[slot]) for slot, matrix in matrices.items()),
        "of_bytes": sum(matrix.whole_bytes for matrix in matrices.values()),
        "whole": sum(rank is None for rank in ranks.values()),
        "mean_error": sum(errors) / len(errors),
        "layers": {str(layer): share(members) for layer, members in layers.items()},
    }


def fixed_survey(source: Checkpoint, slots: Sequence[Slot], rank: int) -> Survey:
    """The same rank for all; rows come when the matrices do. Raises UsageError for a rank above a matrix's."""
    for slot in slots:
        check_rank(source, slot, rank)
    return Survey(dict.fromkeys(slots, rank), {})


def check_rank(source: Checkpoint, slot: Slot, rank: int) -> None:
    rows, cols = source.spec(slot).shape
    if rank > min(rows, cols):
        message = f"rank rule rank={rank}: a {rows}x{cols} matrix has rank {min(rows, cols)} at most"
        raise UsageError(message, tensor=slot)


def _each(
    worker: Worker, slots: Sequence[Slot], look: Callable[[Slot], Found], progress: Progress | None, kept: Kept | None
) -> Iterator[tuple[Slot, Found]]:
    """What is seen of each, but for those that an earlier run has seen."""
    progress, kept = progress or Silent(), kept or Noted()
    worker.expect(slot for slot in slots if str(slot) not in kept.found)
    progress.start("spectra", len(slots), "matrices")
    for slot in slots:
        if str(slot) not in kept.found:
            kept.keep(str(slot), look(slot))
        yield slot, kept.found[str(slot)]
        progress.advance(1)
    progress.finish()
