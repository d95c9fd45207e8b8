"""mixtools laser: a checkpoint whose chosen matrices are replaced by approximations of lower rank.

    slots ─► read ─► spectrum ─► rank (rule) ─► rebuilt, or A and B ─► layout D
                        └─► a row of laser-report.json, kept in the journal until the end

One matrix at a time is decomposed, on a GPU those of a layer; all that is not chosen is copied byte for byte meanwhile.

method.py     the arithmetic of one matrix     figures.py    what is found in it
selection.py  which matrices, and options      worker.py     one matrix of a checkpoint
survey.py     ranks before the output          budget.py     ranks that share a budget of bytes
sequential.py inputs from reduced layers       forecast.py   memory and time
report.py     what is told                     together.py   matrices of a layer at once
search/       edits that a text says help
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import conversion
from ...errors import UsageError
from ...formats import Format, Packed
from ...inference.calibrate import Calibration
from ...job import Job
from ...layouts.checkpoint import Checkpoint, located
from ...names import Slot
from ...storage.output import Output
from . import report as pages
from .figures import WEIGHTS
from .method import Result, check_factors, factored
from .selection import Options, select
from .sequential import Sequential
from .survey import Survey
from .worker import Worker


def plan_laser(
    source: Checkpoint,
    options: Options,
    *,
    known: Survey | None = None,
    calibration: Calibration | None = None,
    device: torch.device | None = None,
    record: Mapping[str, Any] | None = None,
) -> Job:
    """Layout D with the chosen matrices reduced.

    `known`: ranks chosen before (needed for factors). `record`: what else decides the bytes, for the journal, and is
    told in the report. Raises UsageError for slots, ranks or factors that cannot be.
    """
    method = options.method
    method.require(calibration is not None or (known is not None and method.norm == WEIGHTS))
    slots = select(source.config, options)
    if known is not None:
        slots = [slot for slot in slots if slot in known.ranks]
    if calibration is not None:
        calibration.slots = tuple(slots)  # what stays whole is not looked at again
    worker = Worker(source, method, device or torch.device("cpu"), calibration)
    worker.expect(slots)
    edit = Edit(worker, options, known)
    if isinstance(calibration, Sequential):
        calibration.reduce = lambda slot: edit.result(slot).dense
    formats = _factored(source, slots, known) if options.factored else {}
    changes = conversion.Changes(formats, lambda _: [edit.work(slot) for slot in slots])
    job = conversion.plan_hf(source, conversion.Options(max_shard_bytes=options.max_shard_bytes), changes)
    told = {"laser": options.document(), **(record or {}), **(known.told if known else {})}
    return replace(
        job, record={**job.record, **told, **_digest(known)}, label="reducing",
        jobs=1 if calibration else None,  # layers in their order
        report=lambda output: pages.documents(_report(source, told, known, output)),
        reports=pages.FILES,
    )  # fmt: skip


class Edit(NamedTuple):
    """How a chosen slot becomes what is written."""

    worker: Worker
    options: Options
    known: Survey | None

    def work(self, slot: Slot) -> conversion.Work:
        def make(output: Output) -> Iterator[Packed]:
            with self.worker.turn:
                result = self.result(slot)
                if isinstance(self.worker.calibration, Sequential):
                    self.worker.calibration.settle(slot, result.dense)
            found = self.known.rows.get(slot) if self.known else None
            output.note(str(slot), found or self.worker.row(slot, result.report))
            yield result.stored

        return conversion.Work((slot,), make)

    def result(self, slot: Slot) -> Result:
        """Raises as Worker.analyse and the rule do."""
        analysis = self.worker.analyse(slot)
        rank = self.known.ranks[slot] if self.known else self.worker.rank(slot, analysis)
        with located(self.worker.source, slot):
            return analysis.factored(rank) if self.options.factored else analysis.dense(rank)


def _factored(source: Checkpoint, slots: Sequence[Slot], known: Survey | None) -> dict[Slot, Format]:
    """The format of each slot. Raises UsageError, which names matrix and numbers, where factors are not smaller."""
    if known is None:
        raise UsageError("factors need their ranks before the output can be planned: survey the matrices first")
    formats: dict[Slot, Format] = {}
    for slot in slots:
        (rows, cols), dtype = source.spec(slot)
        with located(source, slot):
            check_factors((rows, cols), known.ranks[slot])
        formats[slot] = factored(dtype, known.ranks[slot])
    return formats


def _digest(known: Survey | None) -> dict[str, str]:
    """Of ranks that were chosen before: a journal fits no others."""
    if known is None:
        return {}
    text = ";".join(f"{slot}={rank}" for slot, rank in known.ranks.items())
    return {"ranks": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _report(source: Checkpoint, told: Mapping[str, Any], known: Survey | None, output: Output) -> dict[str, Any]:
    """The report's document. Rows that no unit wrote are those of matrices that were looked at and left alone."""
    rows = {str(slot): row for slot, row in (known.rows if known else {}).items()} | output.notes
    ordered = [rows[str(slot)] for slot in source.config.slots() if str(slot) in rows]
    return pages.document(source.layout.name, told, ordered)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run."""
    document: dict[str, Any] = json.loads((folder / f"{pages.NAME}.json").read_text("utf-8"))
    return document
