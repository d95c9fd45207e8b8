"""A search for edits that help: which matrices to truncate, and to which rank, judged by a text.

rows.py      options, a row for each candidate, the result
shelf.py     edited weights, out of memory
bench.py     what an edit does to the text's log-likelihood, from kept states
gain.py      late layers to early, accepted by the paired change and its standard error
laserrmt.py  LaserRMT's published way
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from ....checking.perplexity import Windows
from ....errors import UsageError
from ....layouts.reader import Reader
from ....linalg.rules import Fixed, parse_rule
from ....names import ATTENTION, EXPERT, Slot
from ....progress import Progress, Silent
from . import laserrmt
from .bench import Bench
from .gain import gain
from .rows import Figure, Row, SearchOptions, SearchResult, Trial

__all__ = ["Figure", "Row", "SearchOptions", "SearchResult", "Trial", "search"]


def search(
    reader: Reader,
    slots: Sequence[Slot],
    text: Windows,
    held_out: Windows,
    options: SearchOptions,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    max_memory: int | None = None,
    progress: Progress | None = None,
    spill: Path | None = None,
    on_decision: Callable[[Row], None] | None = None,
    done: Iterable[Row] = (),
) -> SearchResult:
    """Try the matrices `slots` at lower ranks, judged on `text`; the final figure is of `held_out`.

    `dtype` is that of the computation; an edited weight is rounded to its own first. Deterministic. `on_decision` is
    told each row as it is decided, and `done` takes rows that an earlier run was told: the same search goes on with
    them. `spill`: the folder of what does not fit, and of edited weights; the system's temporary folder if None.
    Costs in layer passes (all of a text through one layer): see gain.py and laserrmt.py; the figure costs 2 for each
    layer. Raises UsageError, before a weight is read, for slots that cannot be edited, texts of a single window, and
    texts that share a window; SpectrumError for a weight with NaN; MemoryBudgetError, DiskError as Stream.hidden.
    """
    _check(reader, slots, options)
    _check_texts(text, held_out)
    device, progress = torch.device(device), progress or Silent()
    known = {row.slot: row for row in done}
    rows: dict[Slot, Row] = {}

    def decide(found: Iterable[Row]) -> None:
        for row in found:
            rows[row.slot] = row
            if on_decision and known.get(row.slot) is not row:
                on_decision(row)

    ordered: list[tuple[float, Slot]] = []
    if options.method == "laserrmt":
        ordered = laserrmt.order(reader, slots, known, device, progress)
        decide(known.get(row.slot, row) for row in laserrmt.passed_over(ordered, options.lowest))
        ordered = ordered[: options.lowest]
    layers = [int(slot.layer or 0) for _, slot in ordered] or [int(slot.layer or 0) for slot in slots]
    bench = Bench(
        reader, text, layers, batch=options.batch, device=device, dtype=dtype, max_memory=max_memory,
        progress=progress, spill=spill, method=options.for_matrix(), routed=options.routed,
    )  # fmt: skip
    try:
        if options.method == "laserrmt":
            decide(laserrmt.one_by_one(bench, ordered, known))
        else:
            decide(gain(bench, slots, options, known))
        figure = bench.figure(held_out)
    finally:
        bench.close()
    edits = {slot: rank for slot in slots if (rank := rows[slot].rank) is not None}
    return SearchResult(edits, tuple(rows.values()), figure, bench.layer_passes, tuple(bench.remarks))


def _check(reader: Reader, slots: Sequence[Slot], options: SearchOptions) -> None:
    there = set(reader.slots())
    if not slots:
        raise UsageError("no matrix is left to search among")
    if len(set(slots)) < len(slots):
        raise UsageError("a matrix is named twice")
    for slot in slots:
        if slot not in there:
            raise UsageError(f"{slot} is not in this model")
        if slot.role not in (*ATTENTION, *EXPERT):
            raise UsageError(f"{slot} is not a matrix that LASER touches")
    if options.method != "gain":
        return
    smallest = min(slots, key=lambda slot: min(reader.config.shape(slot.role)))
    rows, cols = reader.config.shape(smallest.role)
    for rule in map(parse_rule, options.rules):
        if isinstance(rule, Fixed) and rule.count > min(rows, cols):
            raise UsageError(f"rank rule {rule}: {smallest} is {rows}x{cols} and has rank {min(rows, cols)} at most")


def _check_texts(text: Windows, held_out: Windows) -> None:
    for name, windows in (("text", text), ("held-out text", held_out)):
        if len(windows.sequences) < 2:
            raise UsageError(
                f"the {name} is a single window, which gives no standard error; take a longer text or a shorter --ctx"
            )
    seen = {tuple(ids.tolist()) for ids in text.sequences}
    shared = sum(tuple(ids.tolist()) in seen for ids in held_out.sequences)
    if shared:
        raise UsageError(f"{shared} of {len(held_out.sequences)} held-out windows are in the text too")
