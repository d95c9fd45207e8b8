"""mixtools laser --search: the edits are those that a text says help; the rest stays as it is.

Every decision of the search goes into the output's journal, so that a killed run continues it (__init__.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from .... import conversion
from ....checking.perplexity import Windows
from ....errors import UsageError
from ....inference.calibrate import Calibration, Text
from ....inference.stream import Stream
from ....job import Job
from ....layouts.checkpoint import Checkpoint
from ....layouts.hf import HF
from ....progress import Progress
from ....storage.output import Output
from .. import report as pages
from ..figures import OUTPUT
from ..run import Edit
from ..selection import Options, select
from ..survey import Survey
from ..worker import Worker
from . import Row, SearchOptions, search

_PREFIX, _WHOLE = "search ", "search"  # names of notes in the journal


@dataclass(frozen=True)
class Asked:
    """How to search, and what for: `texts` tells the two texts apart from others, for journal and report."""

    options: SearchOptions
    text: Windows
    held_out: Windows
    texts: Mapping[str, Any]

    @property
    def record(self) -> dict[str, Any]:
        own = {name: value for name, value in asdict(self.options).items() if name != "batch"}  # memory, not outcome
        return {**own, "rank_rules": list(self.options.rules), **self.texts}


def plan_search(
    source: Checkpoint,
    options: Options,
    asked: Asked,
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.bfloat16,
    max_memory: int | None = None,
    progress: Progress | None = None,
) -> Job:
    """A job (conversion.run) that searches once its output is open, and then writes. Raises UsageError for factors."""
    if options.factored:
        raise UsageError("a search does not know its ranks before the output is planned: leave out --factored")
    slots = select(source.config, options)
    device = device or torch.device("cpu")
    rule = "laserrmt" if asked.options.method == "laserrmt" else ", ".join(asked.options.rules)
    told = {"laser": {**options.document(), "rank_rule": rule}}

    def work(output: Output) -> list[conversion.Work]:
        if _WHOLE not in output.notes:
            earlier = [Row.from_document(found) for name, found in output.notes.items() if name.startswith(_PREFIX)]
            result = search(
                source, slots, asked.text, asked.held_out, asked.options, device=device, dtype=dtype,
                max_memory=max_memory, progress=progress, done=earlier,
                on_decision=lambda row: output.note(f"{_PREFIX}{row.slot}", row.document()),
            )  # fmt: skip
            output.note(_WHOLE, {"held_out": result.held_out.document(), "rows": [r.document() for r in result.rows]})
        rows = [Row.from_document(found) for found in output.notes[_WHOLE]["rows"]]
        ranks = {row.slot: row.rank for row in rows if row.rank is not None}
        calibration = None
        if asked.options.norm == OUTPUT:  # the same text once more: judged weights are not kept through a kill
            stream = Stream(source, device, dtype, max_memory=max_memory, progress=progress)
            text = Text(tuple(asked.text.sequences), {})
            calibration = Calibration(stream, text, list(ranks), asked.options.routed)
        worker = Worker(source, replace(asked.options.for_matrix(), exact=options.exact), device, calibration)
        edit = Edit(worker, options, Survey(ranks, {}))
        return [edit.work(slot) for slot in ranks]

    def tell(output: Output) -> dict[str, bytes]:
        return pages.documents(_report(source, {**told, "search": asked.record}, output))

    shards = conversion.Options(max_shard_bytes=options.max_shard_bytes)
    job = conversion.plan_hf(source, shards, conversion.Changes(work=work))
    record = {**job.record, **told, "search": asked.record}
    in_order = 1 if asked.options.norm == OUTPUT else None
    return replace(job, report=tell, reports=pages.FILES, record=record, label="reducing", jobs=in_order)


def _report(source: Checkpoint, told: dict[str, Any], output: Output) -> dict[str, Any]:
    """Rows of what was edited, each with what the search found of it; and all candidates, with the reasons."""
    whole = output.notes[_WHOLE]
    decided = {row.slot: row for row in map(Row.from_document, whole["rows"])}
    rows, candidates = [], []
    for slot in source.config.slots():
        if (row := decided.get(slot)) is None:
            continue
        best = row.best
        found = {
            "delta_nll": best.delta_nll if best else None, "delta_nll_stderr": best.stderr if best else None,
            "accepted": row.accepted,
        }  # fmt: skip
        if row.accepted:
            made = output.notes[str(slot)]
            error = best.layer_error if best and made["layer_error"] is None else made["layer_error"]
            rows.append({**made, **found, "layer_error": error, "tokens": row.tokens})
        tried = {**row.document(), "tensor": HF.piece(slot, source.config).name}
        candidates.append({**tried, **found})
    searched = {**told["search"], "accepted": len(rows), "held_out": whole["held_out"], "candidates": candidates}
    return pages.document(source.layout.name, {**told, "search": searched}, rows)
