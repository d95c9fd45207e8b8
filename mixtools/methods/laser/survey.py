"""Ranks that must be known before an output can be planned: those of factors, of a budget, and fixed ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import UsageError
from ...layouts.checkpoint import Checkpoint
from ...linalg.spectrum import Spectrum
from ...names import Slot
from ...progress import Progress, Silent
from .budget import Matrix, distribute, stored_bytes
from .method import report_of
from .worker import Row, Worker, located


class Survey(NamedTuple):
    """Ranks that are known before anything is written, and what was found when they were chosen.

    A slot without a rank stays as it is. `told` belongs in the report.
    """

    ranks: Mapping[Slot, int]
    rows: Mapping[Slot, Row]
    told: Mapping[str, Any] = {}


def survey(worker: Worker, slots: Sequence[Slot], progress: Progress | None = None) -> Survey:
    """Rank and row of each slot, nothing rebuilt. Raises as Worker.analyse and the rule do."""
    progress = progress or Silent()
    progress.start("spectra", len(slots), "matrices")
    ranks, rows = {}, {}
    for slot in slots:
        report = worker.scan(slot)
        ranks[slot], rows[slot] = report.rank, worker.row(slot, report)
        progress.advance(1)
    progress.finish()
    return Survey(ranks, rows)


def rank_survey(worker: Worker, slots: Sequence[Slot], progress: Progress | None = None) -> Survey:
    """Ranks by the rule, from values alone; rows come when the matrices do. Raises as `survey`."""
    ranks: dict[Slot, int] = {}
    for slot, found in _spectra(worker, slots, progress):
        with located(worker.source, slot):
            ranks[slot] = report_of(found, worker.method).rank
    return Survey(ranks, {})


def budget_survey(
    worker: Worker, slots: Sequence[Slot], share: float, floor: float, progress: Progress | None = None
) -> Survey:
    """Ranks that share a budget (budget.py); what stays whole has a row, the others get theirs when they are made.

    An error is a share of what the matrix holds: of its output's energy, damped, or of ‖W‖², by the norm. Raises
    UsageError for a budget that cannot be, and as `survey`.
    """
    spectra = dict(_spectra(worker, slots, progress))
    matrices = {
        slot: Matrix(found.tail, found.shape, worker.source.spec(slot).dtype.itemsize, int(slot.layer or 0))
        for slot, found in spectra.items()
    }
    ranks = distribute(matrices, share, floor)
    rows = {
        slot: worker.row(slot, report_of(spectra[slot], worker.method, min(matrices[slot].shape)))
        for slot, rank in ranks.items() if rank is None
    }  # fmt: skip
    told = {"budget": told_budget(matrices, ranks)}
    return Survey({slot: rank for slot, rank in ranks.items() if rank is not None}, rows, told)


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


def _spectra(worker: Worker, slots: Sequence[Slot], progress: Progress | None) -> Iterator[tuple[Slot, Spectrum]]:
    progress = progress or Silent()
    progress.start("spectra", len(slots), "matrices")
    for slot in slots:
        yield slot, worker.spectrum(slot)
        progress.advance(1)
    progress.finish()
