"""mixtools convert: between layouts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from ..errors import LayoutError, MemoryBudgetError
from . import base

if TYPE_CHECKING:
    from .. import job as jobs_room
    from ..layouts.checkpoint import Checkpoint

app = typer.Typer(help="Rename and reshape a checkpoint into another layout.", no_args_is_help=True)

Dtype = Annotated[str, typer.Option("--dtype", metavar="keep|bf16|f16|f32", help="keep copies bit patterns.")]
ShardSize = Annotated[str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard, e.g. 5GB.")]
BASE_MEMORY = 100_000_000  # the interpreter, numpy and the headers


@app.command("torrent-to-hf")
def torrent_to_hf(
    src: base.Source, out: base.Out, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: base.DryRun = False, resume: base.Resume = True, overwrite: base.Overwrite = False,
    jobs: base.Jobs = 2, max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Mistral's layouts (torrent, split, stacked, consolidated) to Hugging Face.

    Example: mixtools convert torrent-to-hf mixtral-8x7b-32kseqlen Mixtral-8x7B-v0.1
    """
    base.check_device(device)
    source = _open(src)
    if source.layout.letter not in ("A", "A'", "B", "C"):
        raise LayoutError(f"is {source.layout.title} already; use `mixtools convert to-hf`", file=src)
    how = How(dry_run, resume, overwrite, jobs, base.max_memory_bytes(max_memory), base.Screen(json, quiet))
    _convert_to_hf(source, out, dtype, max_shard_size, how)


@app.command("to-hf")
def to_hf(
    src: base.Source, out: base.Out, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: base.DryRun = False, resume: base.Resume = True, overwrite: base.Overwrite = False,
    jobs: base.Jobs = 2, max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Anything readable to Hugging Face; Hugging Face itself to re-shard or cast.

    Example: mixtools convert to-hf Mixtral-8x7B-v0.1 Mixtral-8x7B-f16 --dtype f16 --max-shard-size 10GB
    """
    base.check_device(device)
    how = How(dry_run, resume, overwrite, jobs, base.max_memory_bytes(max_memory), base.Screen(json, quiet))
    _convert_to_hf(_open(src), out, dtype, max_shard_size, how)


@app.command("hf-to-torrent")
def hf_to_torrent(
    src: base.Source, out: base.Out,
    safetensors: Annotated[
        bool, typer.Option("--safetensors/--pth", help="consolidated.safetensors, or consolidated.00.pth.")
    ] = True,
    dtype: Dtype = "keep",
    dry_run: base.DryRun = False, resume: base.Resume = True, overwrite: base.Overwrite = False,
    jobs: base.Jobs = 2, max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Hugging Face to Mistral's own names, as mistral-inference and vLLM read them.

    Example: mixtools convert hf-to-torrent Mixtral-8x7B-v0.1 out --pth
    """
    from .. import conversion as engine

    base.check_device(device)
    source = _open(src)
    if source.layout.letter not in ("D", "E", "F"):
        raise LayoutError(f"is {source.layout.title}, not Hugging Face", file=src)
    job = engine.plan_torrent(source, engine.Options(dtype=dtype), safetensors=safetensors)
    how = How(dry_run, resume, overwrite, jobs, base.max_memory_bytes(max_memory), base.Screen(json, quiet))
    _carry_out(source, job, out, how)


class How(NamedTuple):
    """The options that change no byte of the output."""

    dry_run: bool
    resume: bool
    overwrite: bool
    jobs: int
    max_memory: int | None
    screen: base.Screen


def _open(src: str) -> Checkpoint:
    from ..layouts.detect import open_checkpoint

    return open_checkpoint(base.find_model(src))


def _convert_to_hf(source: Checkpoint, out: Path, dtype: str, shard: str, how: How) -> None:
    from .. import conversion as engine

    options = engine.Options(dtype=dtype, max_shard_bytes=base.parse_size(shard, "--max-shard-size"))
    _carry_out(source, engine.plan_hf(source, options), out, how)


def _carry_out(source: Checkpoint, job: jobs_room.Job, out: Path, how: How) -> None:

    from .. import job as jobs_room

    jobs = _jobs_within(job, how.jobs, how.max_memory)
    if how.dry_run:
        document = _forecast(source, job, out, jobs)
        how.screen.result(document, lambda: _tell_forecast(document))
        return
    began = time.monotonic()
    run = jobs_room.Run(overwrite=how.overwrite, resume=how.resume, jobs=jobs, progress=how.screen.progress())
    done = jobs_room.run(job, out, run)
    seconds = time.monotonic() - began
    document = {
        "output": str(out), "layout": job.record["layout"], "files": [file.name for file in job.plan.files], **done,
        "seconds": round(seconds, 3), "peak_memory_bytes": base.peak_memory(),
    }  # fmt: skip
    how.screen.result(document, lambda: _tell(document, source, out))


def _jobs_within(job: jobs_room.Job, jobs: int, limit: int | None) -> int:
    """As many threads as asked for and as fit."""
    if limit is None:
        return jobs
    fitting = (limit - BASE_MEMORY) // job.worker_bytes
    if fitting < 1:
        need = base.human_bytes(BASE_MEMORY + job.worker_bytes)
        raise MemoryBudgetError("--max-memory is too small even for one thread", expected=need, found=limit)
    return min(jobs, fitting)


def _forecast(source: Checkpoint, job: jobs_room.Job, out: Path, jobs: int) -> dict[str, Any]:
    """Sizes are exact; memory is an upper bound; time is reading at the measured rate, twice."""
    folder = out
    while not folder.exists():
        folder = folder.absolute().parent
    status = os.statvfs(folder)
    rate = _read_rate(source)
    return {
        "dry_run": True, "source": source.layout.name, "layout": job.record["layout"], "options": job.record["options"],
        "files": {file.name: file.size for file in job.plan.files}, "bytes": job.plan.total_bytes,
        "tensors": len(job.plan.tensors), "missing": list(job.missing),
        "peak_memory_bytes": BASE_MEMORY + jobs * job.worker_bytes, "jobs": jobs,
        "disk_free_bytes": status.f_bavail * status.f_frsize, "seconds": round(2 * job.plan.total_bytes / rate, 1),
    }  # fmt: skip


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
    size, free = base.human_bytes(document["bytes"]), base.human_bytes(document["disk_free_bytes"])
    yield f"would write {document['tensors']} tensors, {size}, in {len(document['files'])} files ({free} free)"
    memory, seconds = base.human_bytes(document["peak_memory_bytes"]), base.human_time(document["seconds"])
    yield f"memory at most {memory} with {document['jobs']} threads; about {seconds}"
    yield from _tell_missing(document)


def _tell(document: dict[str, Any], source: Checkpoint, out: Path) -> Iterator[str]:
    size, seconds = base.human_bytes(document["bytes"]), document["seconds"]
    rate = base.human_bytes((document["bytes"] - document["resumed_bytes"]) / max(seconds, 1e-9))
    memory = base.human_bytes(document["peak_memory_bytes"])
    yield f"{source.layout.title} -> {document['layout']}"
    yield f"wrote {document['tensors']} tensors, {size}, in {base.human_time(seconds)} ({rate}/s, peak memory {memory})"
    if document["resumed_bytes"]:
        yield f"{base.human_bytes(document['resumed_bytes'])} were there already, from the interrupted run"
    yield from _tell_missing(document)
    yield f"Check it with: mixtools check {out} --against {source.folder}"


def _tell_missing(document: dict[str, Any]) -> Iterator[str]:
    if document["missing"]:
        names = ", ".join(document["missing"])
        yield f"note: the source has no {names}; the output has weights and configuration only"
