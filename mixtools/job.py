"""A job: everything that a run writes, planned before the first byte, and carried out on threads, resumably.

    units ─► threads ─► regions of the output, each with its line in the journal ─► report, manifest ─► commit
      └ regions, and what makes their blocks: copied, decoded, quantized, ...

It knows no method, no layout and no copying: whoever plans a job gives it its units, those that copy included
(conversion.py). Nothing else writes an output.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from .errors import Interrupted, UsageError
from .machine import human_bytes, human_time
from .names import Slot
from .progress import Progress, Silent
from .storage import manifest
from .storage.output import Document, Output, Region
from .storage.plan import Plan
from .storage.source import Source
from .storage.store import Bits
from .version import __version__

BARE, WITH_TORCH = 100_000_000, 400_000_000  # an interpreter with numpy and the headers; one that has imported torch
# what lies beside every output made within: the recipe, whatever command its step calls
ENCLOSED: ContextVar[Mapping[str, bytes]] = ContextVar("enclosed", default={})  # noqa: B039, nobody changes it


@dataclass(frozen=True)
class Run:
    """How, not what: none of this changes a byte of the output."""

    overwrite: bool = False
    resume: bool = True
    jobs: int = 2
    progress: Progress = field(default_factory=Silent)

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"{self.jobs} jobs do no work; at least one does")


class Unit(NamedTuple):
    """What is written at one go: regions of the output, and what makes their blocks, one iterator a region.

    `slots`: whose weights are read for it.
    """

    regions: tuple[Region, ...]
    make: Callable[[Output], Iterable[Iterator[Bits]]]
    slots: tuple[Slot, ...] = ()


@dataclass(frozen=True)
class Inputs:
    """What a job reads: files that are read once, in `folder`, which cannot be the output.

    `about` tells of them in the manifest. `finish` is told, once all is read, the slots that an earlier run wrote, and
    judges the checksums that are still open.
    """

    folder: Path
    files: Sequence[Source]
    about: Mapping[str, Any]
    finish: Callable[[Iterable[Slot]], None]


@dataclass(frozen=True)
class Job:
    """Fully planned: sizes are known, nothing is written.

    `units` gives all that is written, once the output is open and can keep notes. `record`: what decides the bytes, for
    the journal (which fits no other) and the manifest. `documents` are written after the weights, `last` after them;
    `report` gives, once all weights are written, the documents that tell of them, of the names `reports`. `missing`:
    what the output lacks because the source does; `not_kept`: what the source has and the output cannot hold; `notes`:
    what else its user should know. `title`: of what is written. `base_bytes`: what the process takes before it does
    anything; `worker_bytes`: what a thread takes at most beside it.
    """

    inputs: Inputs
    plan: Plan
    units: Callable[[Output], Sequence[Unit]]
    record: Mapping[str, Any]
    documents: Mapping[str, Document]
    last: Mapping[str, Document]
    missing: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    report: Callable[[Output], Mapping[str, bytes]] | None = None
    reports: tuple[str, ...] = ()
    title: str = ""
    label: str = "converting"
    jobs: int | None = None  # threads at most
    base_bytes: int = BARE
    worker_bytes: int = 0


def run(job: Job, folder: Path, how: Run | None = None) -> dict[str, Any]:
    """Carry a job out; returns what was done, as a document.

    Raises the errors of storage.output and of the units. An interrupted or failed run leaves its work in
    `folder`/.mixtools, and the same call continues it to the same bytes.
    """
    how = how or Run()
    if job.inputs.folder.resolve() == folder.resolve():
        raise UsageError("the output is the source's own folder; name another", file=folder)
    _expect_apart(job, folder)
    key = {"mixtools": __version__, **job.record, "source": [file.fingerprint() for file in job.inputs.files]}
    names = [*job.documents, *job.last, *job.reports, *ENCLOSED.get(), manifest.NAME]
    with Output(
        folder, job.plan, key, names=names, overwrite=how.overwrite, resume=how.resume, progress=how.progress
    ) as output:
        units = job.units(output)
        for file in job.inputs.files:
            file.read_once()
        total = sum(tensor.nbytes for tensor in job.plan.tensors.values())
        resumed = output.done_bytes
        earlier = [slot for unit in units if output.done.keys() >= {*unit.regions} for slot in unit.slots]
        how.progress.start(job.label, total)
        how.progress.advance(resumed)
        write_units(units, output, replace(how, jobs=min(how.jobs, job.jobs or how.jobs)))
        job.inputs.finish(earlier)
        how.progress.finish()
        report = job.report(output) if job.report else {}
        origin = {"mixtools": __version__, **job.record, "source": job.inputs.about}
        checksums = output.checksums()
        output.commit(
            {**job.documents, **report, **ENCLOSED.get()}, job.last,
            lambda files: manifest.encode(origin, files, checksums),
        )  # fmt: skip
    done = {"tensors": len(job.plan.tensors), "bytes": total, "resumed_bytes": resumed}
    return {**done, "missing": list(job.missing), "not_kept": list(job.not_kept)}


def _expect_apart(job: Job, folder: Path) -> None:
    """A source of links may have its files in the folder that is replaced. Raises UsageError."""
    if not folder.is_dir():
        return
    copied = [path for path in job.documents.values() if isinstance(path, Path)]
    for path in (*copied, *(path for file in job.inputs.files for path in file.paths)):
        if path.resolve().parent == folder.resolve():
            raise UsageError(f"is a file of the source, which links to it; name another output than {folder}",
                             file=path.resolve())  # fmt: skip


def told(done: Mapping[str, Any], *, rate: bool = False) -> Iterator[str]:
    """Lines on a run, from what `run` returned, with `seconds` and `peak_memory_bytes`."""
    size, seconds = human_bytes(done["bytes"]), done["seconds"]
    speed = human_bytes((done["bytes"] - done["resumed_bytes"]) / max(seconds, 1e-9))
    about = f"{f'{speed}/s, ' if rate else ''}peak memory {human_bytes(done['peak_memory_bytes'])}"
    yield f"wrote {done['tensors']} tensors, {size}, in {human_time(seconds)} ({about})"
    if done["resumed_bytes"]:
        yield f"{human_bytes(done['resumed_bytes'])} were there already, from the interrupted run"
    yield from lost(done["missing"], done["not_kept"])


def lost(missing: Sequence[str], not_kept: Sequence[str]) -> Iterator[str]:
    """Said of an output that lacks something, also where no notes are wanted."""
    if missing:
        yield f"note: the source has no {', '.join(missing)}; the output has none either"
    if not_kept:
        yield f"note: the output cannot hold {', '.join(not_kept)}"


def write_units(units: Iterable[Unit], output: Output, how: Run) -> None:
    """Those that are not yet written, on `jobs` threads, begun in order; the first error stops them all."""
    stop = threading.Event()

    def until_stopped(blocks: Iterator[Bits]) -> Iterator[Bits]:
        for block in blocks:
            if stop.is_set():
                raise Interrupted("stopped; the same command continues")
            yield block

    def one(unit: Unit) -> None:
        if output.done.keys() >= {*unit.regions} or stop.is_set():
            return
        for region, blocks in zip(unit.regions, unit.make(output), strict=True):
            if region not in output.done:
                how.progress.advance(output.add(region, until_stopped(blocks)))

    with ThreadPoolExecutor(how.jobs, "mixtools") as pool:
        futures = [pool.submit(one, unit) for unit in units]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # also for KeyboardInterrupt, which arrives here
            pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
            raise error  # the cause, not what it interrupted in the other threads
