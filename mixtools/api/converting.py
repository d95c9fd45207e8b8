"""mixtools.convert: a checkpoint in another layout, and the commands that are one direction of it each."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import LayoutError, MemoryBudgetError, UsageError
from ..machine import check_device, human_bytes, human_time, parse_limit, parse_size, peak_memory
from ..options import Device, DryRun, Jobs, MaxMemory, Out, Overwrite, Resume, ShardSize, Source
from ..progress import Callback, Progress, watched
from ..verbs import Forecast, Option, Result

if TYPE_CHECKING:
    from ..job import Job, Run
    from ..layouts.checkpoint import Checkpoint

Dtype = Annotated[str, Option("keep|bf16|f16|f32", "keep copies bit patterns.")]
BASE_MEMORY = 100_000_000  # the interpreter, numpy and the headers


@dataclass(frozen=True)
class Converted(Result):
    """What was written. `resumed_bytes`: of `bytes`, those that an interrupted run had written. `missing`: documents
    that the output lacks because the source does.
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
    seconds: float
    peak_memory_bytes: int

    @property
    def document(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "layout": self.layout, "files": list(self.files), "tensors": self.tensors,
            "bytes": self.bytes, "resumed_bytes": self.resumed_bytes, "missing": list(self.missing),
            "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        from ..job import told

        yield self.title
        yield from told(self.document, rate=True)
        yield f"Check it with: mixtools check {self.output} --against {self.source}"


def convert(
    source: Source, out: Out,
    to: Annotated[str, Option("hf|torrent|consolidated", "The layout to write.")] = "hf", *,
    dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Converted | Forecast:  # fmt: skip
    """A checkpoint in another layout, or re-sharded or cast in its own.

    `to`: "hf" (Hugging Face, safetensors in shards), "torrent" (consolidated.00.pth) or "consolidated"
    (consolidated.safetensors). `max_shard_size` is for "hf". Memory: a few MB a job, or a tensor where it must be
    transposed or decoded. Raises UsageError for options that cannot be, MemoryBudgetError where `max_memory` is too
    small for one job, and the errors of reading the source and writing the output (errors.py).
    """
    from ..hub.opening import open_model
    from ..job import Run

    check_device(device)
    limit = parse_limit(max_memory)
    checkpoint = open_model(source)
    job = _plan(checkpoint, to, dtype, parse_size(max_shard_size, "max_shard_size"))
    threads = _jobs_within(job, jobs, limit)
    if dry_run:
        return _forecast(checkpoint, job, Path(out), threads)
    return _carry_out(checkpoint, job, Path(out), Run(overwrite, resume, threads, watched(progress)))


def torrent_to_hf(
    source: Source, out: Out, *, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Converted | Forecast:  # fmt: skip
    """Mistral's layouts (torrent, split, stacked, consolidated) to Hugging Face.

    Example: mixtools convert torrent-to-hf mixtral-8x7b-32kseqlen Mixtral-8x7B-v0.1
    """
    checkpoint = _of_layout(source, ("A", "A'", "B", "C"), "already; use `mixtools convert to-hf`")
    return convert(
        checkpoint, out, "hf", dtype=dtype, max_shard_size=max_shard_size, dry_run=dry_run, resume=resume,
        overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
    )  # fmt: skip


def to_hf(
    source: Source, out: Out, *, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Converted | Forecast:  # fmt: skip
    """Anything readable to Hugging Face; Hugging Face itself to re-shard or cast.

    Example: mixtools convert to-hf Mixtral-8x7B-v0.1 Mixtral-8x7B-f16 --dtype f16 --max-shard-size 10GB
    """
    return convert(
        source, out, "hf", dtype=dtype, max_shard_size=max_shard_size, dry_run=dry_run, resume=resume,
        overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
    )  # fmt: skip


def hf_to_torrent(
    source: Source, out: Out, *,
    safetensors: Annotated[
        bool, Option("", "consolidated.safetensors, or consolidated.00.pth.", flags=("--safetensors/--pth",))
    ] = True,
    dtype: Dtype = "keep",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Converted | Forecast:  # fmt: skip
    """Hugging Face to Mistral's own names, as mistral-inference and vLLM read them.

    Example: mixtools convert hf-to-torrent Mixtral-8x7B-v0.1 out --pth
    """
    checkpoint = _of_layout(source, ("D", "E", "F"), "not Hugging Face")
    return convert(
        checkpoint, out, "consolidated" if safetensors else "torrent", dtype=dtype, dry_run=dry_run, resume=resume,
        overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
    )  # fmt: skip


def preflight(max_shard_size: str | int = 0, **_: Any) -> None:
    """Raises UsageError for values that a command would refuse."""
    parse_size(max_shard_size, "max_shard_size")


def _of_layout(source: Source, letters: tuple[str, ...], otherwise: str) -> Checkpoint:
    """Raises LayoutError for another layout than the command takes."""
    from ..hub.opening import open_model

    checkpoint = open_model(source)
    if checkpoint.layout.letter not in letters:
        raise LayoutError(f"is {checkpoint.layout.title}, {otherwise}", file=checkpoint.folder)
    return checkpoint


def _plan(source: Checkpoint, to: str, dtype: str, max_shard_bytes: int) -> Job:
    from .. import conversion

    options = conversion.Options(dtype=dtype, max_shard_bytes=max_shard_bytes)
    if to == "hf":
        return conversion.plan_hf(source, options)
    if to not in ("torrent", "consolidated"):
        raise UsageError(f"to: {to!r} is not one of hf, torrent, consolidated")
    return conversion.plan_torrent(source, options, safetensors=to == "consolidated")


def _jobs_within(job: Job, jobs: int, limit: int | None) -> int:
    """As many threads as asked for and as fit."""
    if limit is None:
        return jobs
    fitting = (limit - BASE_MEMORY) // job.worker_bytes
    if fitting < 1:
        need = human_bytes(BASE_MEMORY + job.worker_bytes)
        raise MemoryBudgetError("--max-memory is too small even for one thread", expected=need, found=limit)
    return min(jobs, fitting)


def _carry_out(source: Checkpoint, job: Job, out: Path, how: Run) -> Converted:
    from ..job import run
    from ..layouts.hf import HF
    from ..layouts.torrent import CONSOLIDATED, TORRENT

    began = time.monotonic()
    done = run(job, out, how)
    layout = next(one for one in (HF, TORRENT, CONSOLIDATED) if one.name == job.record["layout"])
    return Converted(
        output=out, source=source.folder, title=f"{source.layout.title} -> {layout.title}", layout=layout.name,
        files=tuple(file.name for file in job.plan.files), tensors=done["tensors"], bytes=done["bytes"],
        resumed_bytes=done["resumed_bytes"], missing=tuple(done["missing"]),
        seconds=round(time.monotonic() - began, 3), peak_memory_bytes=peak_memory(),
    )  # fmt: skip


def _forecast(source: Checkpoint, job: Job, out: Path, jobs: int) -> Forecast:
    """Sizes are exact; memory is an upper bound; time is reading at the measured rate, twice."""
    folder = out
    while not folder.exists():
        folder = folder.absolute().parent
    status = os.statvfs(folder)
    document = {
        "dry_run": True, "source": source.layout.name, **job.record,
        "files": {file.name: file.size for file in job.plan.files}, "bytes": job.plan.total_bytes,
        "tensors": len(job.plan.tensors), "missing": list(job.missing),
        "peak_memory_bytes": BASE_MEMORY + jobs * job.worker_bytes, "jobs": jobs,
        "disk_free_bytes": status.f_bavail * status.f_frsize,
        "seconds": round(2 * job.plan.total_bytes / _read_rate(source), 1),
    }  # fmt: skip
    return Forecast(
        document["bytes"], document["peak_memory_bytes"], document["seconds"], document,
        tuple(_tell_forecast(document)),
    )  # fmt: skip


def _read_rate(source: Checkpoint) -> float:
    """Bytes a second of the source, from its first tensors, up to 128 MB."""
    began, read = time.monotonic(), 0
    for slot in source.slots():
        for block in source.blocks(slot, 4 << 20):
            read += block.nbytes
        if read > 128e6:
            break
    return max(1.0, read / (time.monotonic() - began))


def _tell_forecast(document: dict[str, Any]) -> Iterator[str]:
    from ..job import lacking

    size, free = human_bytes(document["bytes"]), human_bytes(document["disk_free_bytes"])
    yield f"would write {document['tensors']} tensors, {size}, in {len(document['files'])} files ({free} free)"
    memory, seconds = human_bytes(document["peak_memory_bytes"]), human_time(document["seconds"])
    yield f"memory at most {memory} with {document['jobs']} threads; about {seconds}"
    if document["missing"]:
        yield lacking(document["missing"])
