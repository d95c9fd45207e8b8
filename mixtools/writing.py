"""A planned job as the answer to a verb: what it will take, or what it did."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import MemoryBudgetError
from .job import Job, Run, lost, run, told
from .layouts.checkpoint import Checkpoint
from .machine import human_bytes, human_threads, human_time, peak_memory
from .storage.disk import free_bytes
from .storage.store import CHUNK
from .verbs import Forecast, Result

_PROBE = 128_000_000  # bytes of the source that are read to know its rate


@dataclass(frozen=True)
class Written(Result):
    """An output. `resumed_bytes`: of `bytes`, those that an interrupted run had written. `missing`: documents that the
    output lacks because the source does; `not_kept`: what the source has and the output cannot hold.
    """

    output: Path
    source: Path
    title: str
    layout: str
    files: tuple[str, ...]
    tensors: int
    bytes: int
    resumed_bytes: int
    missing: tuple[str, ...]
    not_kept: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "layout": self.layout, "files": list(self.files), "tensors": self.tensors,
            "bytes": self.bytes, "resumed_bytes": self.resumed_bytes, "missing": list(self.missing),
            "not_kept": list(self.not_kept), "notes": list(self.notes),
            "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield self.title
        yield from told(self.document, rate=True)
        yield f"Check it with: mixtools check {self.output} --against {self.source}"


def write(job: Job, source: Checkpoint, out: Path, how: Run, *, limit: int | None, dry_run: bool) -> Written | Forecast:
    """Carry a job out, on as many threads as were asked for and fit; of a dry run, tell what it will take.

    Raises MemoryBudgetError where `limit` bytes are too few for one thread, and what job.run raises.
    """
    how = replace(how, jobs=_jobs_within(job, how.jobs, limit))
    if dry_run:
        return _forecast(job, source, out, how.jobs)
    began = time.monotonic()
    done = run(job, out.parent if job.shared else out, how)
    return Written(
        output=out, source=source.place, title=f"{source.layout.title} -> {job.title}", layout=job.record["layout"],
        files=tuple(file.name for file in job.plan.files), tensors=done["tensors"], bytes=done["bytes"],
        resumed_bytes=done["resumed_bytes"], missing=tuple(done["missing"]),
        not_kept=tuple(done["not_kept"]), seconds=round(time.monotonic() - began, 3), peak_memory_bytes=peak_memory(),
        notes=job.notes,
    )  # fmt: skip


def _jobs_within(job: Job, jobs: int, limit: int | None) -> int:
    if limit is None:
        return jobs
    fitting = (limit - job.base_bytes) // job.worker_bytes
    if fitting < 1:
        need = human_bytes(job.base_bytes + job.worker_bytes)
        raise MemoryBudgetError("--max-memory is too small even for one thread", expected=need, found=limit)
    return min(jobs, fitting)


def _forecast(job: Job, source: Checkpoint, out: Path, jobs: int) -> Forecast:
    """Sizes are exact; memory is an upper bound; time is reading at the measured rate, twice."""
    size, memory = job.plan.total_bytes, job.base_bytes + jobs * job.worker_bytes
    seconds, free = round(2 * size / read_rate(source), 1), free_bytes(out)
    document = {
        "dry_run": True, "source": source.layout.name, **job.record,
        "files": {file.name: file.size for file in job.plan.files}, "bytes": size, "tensors": len(job.plan.tensors),
        "missing": list(job.missing), "not_kept": list(job.not_kept), "peak_memory_bytes": memory, "jobs": jobs,
        "disk_free_bytes": free, "seconds": seconds,
    }  # fmt: skip
    said = [
        f"would write {len(job.plan.tensors)} tensors, {human_bytes(size)}, in {len(job.plan.files)} files "
        f"({human_bytes(free)} free)",
        f"memory at most {human_bytes(memory)} with {human_threads(jobs)}; about {human_time(seconds)}",
        *lost(job.missing, job.not_kept),
    ]
    return Forecast(size, memory, seconds, document, tuple(said))


def read_rate(source: Checkpoint) -> float:
    """Bytes a second of the source's dense tensors, from the first of them."""
    began, read = time.monotonic(), 0
    for slot in source.slots():
        for block in source.blocks(slot, CHUNK):
            read += block.nbytes
        if read > _PROBE:
            break
    return max(1.0, read / (time.monotonic() - began))
