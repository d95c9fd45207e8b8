"""mixtools laser: a checkpoint whose chosen matrices are replaced by approximations of lower rank.

    slots ─► read ─► spectrum ─► rank (rule) ─► rebuilt, or A and B ─► layout D
                        └─► a row of laser-report.json, kept in the journal until the end

One matrix at a time is decomposed; all that is not chosen is copied byte for byte meanwhile. See method.py for
the arithmetic, report.py for what is told.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import conversion
from ...config import MixtralConfig
from ...errors import MixtoolsError, UsageError
from ...formats import Format, Packed
from ...inference.calibrate import Calibration
from ...job import Job
from ...layouts.checkpoint import Checkpoint
from ...layouts.hf import HF
from ...linalg.spectrum import decompose
from ...names import ATTENTION, EXPERT, Slot
from ...progress import Progress, Silent
from ...storage.dtypes import DType
from ...storage.output import Output
from . import report as pages
from .method import Analysis, Report, Result, check_factors, factored, scan
from .method import Options as Method

TARGETS = {role.value: role for role in (*EXPERT, *ATTENTION)}
ALL_TARGETS = ",".join(TARGETS)
Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a LASER run does. layers, experts: `all`, `5`, `3,7` or `20-31`; targets: of w1,w2,w3,q,k,v,o.

    rank_rule, factored, exact: see method.py. max_shard_bytes bounds a shard of the output.
    """

    layers: str
    targets: str = ALL_TARGETS
    experts: str = "all"
    rank_rule: str = "mp"
    factored: bool = False
    exact: bool = False
    max_shard_bytes: int = 5_000_000_000

    @property
    def method(self) -> Method:
        """Raises UsageError for a rule that there is not."""
        return Method.parse(self.rank_rule, self.factored, self.exact)

    def document(self) -> dict[str, Any]:
        """What decides the weights, for journal, manifest and report."""
        names = ("layers", "targets", "experts", "rank_rule", "factored", "exact")
        return {name: getattr(self, name) for name in names}


class Survey(NamedTuple):
    """Ranks that are known before anything is written, and what was found when they were chosen.

    A slot without a rank stays as it is.
    """

    ranks: Mapping[Slot, int]
    rows: Mapping[Slot, Row]


# --- which matrices ---


def select(config: MixtralConfig, options: Options) -> list[Slot]:
    """The chosen matrices in the model's order. Raises UsageError for a layer, expert or target that there is not."""
    layers = parse_numbers(options.layers, config.num_layers, "layers")
    experts = parse_numbers(options.experts, config.num_experts, "experts")
    names = [name.strip() for name in options.targets.split(",")]
    if unknown := [name for name in names if name not in TARGETS]:
        raise UsageError(f"--targets: {unknown[0]!r} is not one of {ALL_TARGETS}")
    roles = {TARGETS[name] for name in names}
    return [
        slot
        for slot in config.slots()
        if slot.role in roles and slot.layer in layers and (slot.expert is None or slot.expert in experts)
    ]


def parse_numbers(text: str, count: int, what: str) -> set[int]:
    """`all`, `5`, `3,7`, `20-31`, or several of these, of 0 .. count-1. Raises UsageError."""
    if text.strip() == "all":
        return set(range(count))
    found: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last if dash else first)
        except ValueError:
            raise UsageError(f"--{what}: {part.strip()!r} is no number; write all, 5, 3,7 or 20-31") from None
        if low > high:
            raise UsageError(f"--{what}: {part.strip()} runs backwards; write {high}-{low}")
        if high >= count or low < 0:
            raise UsageError(f"--{what}: {part.strip()} is out of range; the model has {what} 0 to {count - 1}")
        found |= set(range(low, high + 1))
    return found


# --- one matrix ---


class Worker:
    """Reads and decomposes matrices, one at a time whatever the number of threads: that bounds the memory."""

    def __init__(self, source: Checkpoint, method: Method, device: torch.device, calibration: Calibration | None):
        self.source, self.method, self.device, self.calibration = source, method, device, calibration
        self.turn = threading.Lock()

    def analyse(self, slot: Slot) -> Analysis:
        """Raises SpectrumError, which names file and tensor, for NaN or Inf."""
        with located(self.source, slot):
            covariance = self.calibration.covariance(slot) if self.calibration else None
            weight = self.source.read(slot).to(self.device)
            return Analysis(decompose(weight, exact=self.method.exact), covariance)

    def scan(self, slot: Slot) -> Report:
        """Figures alone, the cheapest way."""
        if self.calibration:
            analysis = self.analyse(slot)
            return analysis.report(self.rank(slot, analysis))
        with located(self.source, slot):
            return scan(self.source.read(slot).to(self.device), self.method)

    def rank(self, slot: Slot, analysis: Analysis) -> int:
        """By the rule; the full one where the rule asks for inputs and no calibration token came here."""
        with located(self.source, slot):
            if self.method.rank_rule.needs_covariance and self.calibration and not self.calibration.tokens[slot]:
                return min(analysis.weight.shape)
            return analysis.rank(self.method.rank_rule)

    def row(self, slot: Slot, report: Report) -> Row:
        """The report's row, with what the whole model knows of the matrix."""
        tokens = self.calibration.tokens[slot] if self.calibration else None
        return pages.row(slot, HF.piece(slot, self.source.config).name, report, tokens)


@contextmanager
def located(source: Checkpoint, slot: Slot) -> Iterator[None]:
    """Errors within name the file and the tensor they are about."""
    try:
        yield
    except MixtoolsError as error:
        entry = source.entry(slot)
        error.file, error.tensor = error.file or str(entry.source.label), error.tensor or entry.name
        raise


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


# --- the job ---


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
    method.rank_rule.require(known is not None or calibration is not None)
    slots = select(source.config, options)
    if known is not None:
        slots = [slot for slot in slots if slot in known.ranks]
    edit = Edit(Worker(source, method, device or torch.device("cpu"), calibration), options, known)
    formats = _factored(source, slots, known) if options.factored else {}
    changes = conversion.Changes(formats, lambda _: [edit.work(slot) for slot in slots])
    job = conversion.plan_hf(source, conversion.Options(max_shard_bytes=options.max_shard_bytes), changes)
    told = {"laser": options.document(), **(record or {})}
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


# --- before anything is done ---


def memory_bytes(source: Checkpoint, slots: Sequence[Slot], calibrated: bool = False) -> int:
    """What decomposing and rebuilding the largest chosen matrix takes at most, beside the interpreter."""
    most = 0
    for slot in slots:
        shape, dtype = source.spec(slot)
        most = max(most, _matrix_bytes(shape, dtype, calibrated))
    return most


def _matrix_bytes(shape: Sequence[int], dtype: DType, calibrated: bool) -> int:
    p = min(shape)
    # the weight, the same before it was permuted or transposed, and rebuilt
    weights = 3 * math.prod(shape) * dtype.itemsize
    # reflectors, their copy, and half of all vectors three times over (all vectors with a covariance)
    square = 8 * p * p * (6 if calibrated else 4)
    return weights + square + 4 * 8 * p * 1024


def flop(shape: Sequence[int], rebuild: bool) -> float:
    """Gram by symmetry, tridiagonal form, and, to rebuild, an eighth of the vectors and two products with them."""
    p, q = sorted(shape)
    kept = p / 8 if rebuild else 0
    return float(p * p * q + 3 * 4 / 3 * p**3 + 2 * p * p * kept + 4 * p * q * kept)


def forecast_seconds(source: Checkpoint, slots: Sequence[Slot], rebuild: bool, clock: Callable[[], float]) -> float:
    """From the shapes and this machine's rate in one small product."""
    side = 768
    matrix = torch.ones(side, side, dtype=torch.float64)
    matrix @ matrix
    began = clock()
    for _ in range(3):
        matrix @ matrix
    rate = 3 * 2 * side**3 / max(clock() - began, 1e-9)
    return sum(flop(source.spec(slot).shape, rebuild) for slot in slots) / rate


def role_counts(slots: Sequence[Slot]) -> dict[str, int]:
    """How many matrices of each target."""
    return {name: n for name, role in TARGETS.items() if (n := sum(slot.role is role for slot in slots))}


def is_fixed(method: Method) -> int | None:
    """The rank, of a rule that needs no look at the matrix."""
    return getattr(method.rank_rule, "count", None)


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a finished run."""
    document: dict[str, Any] = json.loads((folder / f"{pages.NAME}.json").read_text("utf-8"))
    return document
