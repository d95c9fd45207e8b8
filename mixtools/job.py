"""A job: everything that a run writes, planned before the first byte, and carried out on threads, resumably.

    units ─► threads ─► regions of the output, each with its line in the journal ─► report, manifest ─► commit
      └ regions, and what makes their blocks: copied, decoded, quantized, ...
    fans  ─► the same for several outputs at once, each slot of the source being read for all of them

It knows no method, no layout and no copying: whoever plans a job gives it its units, those that copy included
(conversion.py). Nothing else writes an output.
"""

from __future__ import annotations

import contextlib
import json
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
from .storage.place import Place
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


class Target(NamedTuple):
    """Where a slot goes in one of several outputs, and how its blocks are stored there."""

    output: Output
    region: Region
    encode: Callable[[Bits], Bits]


class Fan(NamedTuple):
    """A slot that goes into several outputs: its blocks are made once."""

    targets: tuple[Target, ...]
    blocks: Callable[[], Iterator[Bits]]
    slots: tuple[Slot, ...]

    def is_pending(self) -> bool:
        return any(region not in output.done for output, region, _ in self.targets)

    def write(self) -> Iterator[int]:
        """Bytes as they are written."""
        pending = [target for target in self.targets if target.region not in target.output.done]
        writings = [output.begin(region) for output, region, _ in pending]
        for block in self.blocks():
            yield sum(writing.write(target.encode(block)) for writing, target in zip(writings, pending, strict=True))
        for writing in writings:
            writing.finish()


class UnitOf(NamedTuple):
    """A unit of the one output that it writes."""

    unit: Unit
    output: Output

    @property
    def slots(self) -> tuple[Slot, ...]:
        return self.unit.slots

    def is_pending(self) -> bool:
        return not self.output.done.keys() >= {*self.unit.regions}

    def write(self) -> Iterator[int]:
        for region, blocks in zip(self.unit.regions, self.unit.make(self.output), strict=True):
            if region in self.output.done:
                continue
            writing = self.output.begin(region)
            for block in blocks:
                yield writing.write(block)
            writing.finish()


Task = UnitOf | Fan


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
    anything; `worker_bytes`: what a thread takes at most beside it. `told`: what decides no byte, for the manifest
    alone.
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
    told: Mapping[str, Any] = field(default_factory=dict)
    title: str = ""
    label: str = "converting"
    shared: bool = False  # its files lie beside others' in the output's folder
    jobs: int | None = None  # threads at most
    base_bytes: int = BARE
    worker_bytes: int = 0


def run(job: Job, folder: Path, how: Run | None = None) -> dict[str, Any]:
    """Carry a job out; returns what was done, as a document.

    Raises the errors of storage.output and of the units. An interrupted or failed run leaves its work in
    `folder`/.mixtools, and the same call continues it to the same bytes.
    """
    return run_together(
        [job], folder, lambda outputs: [UnitOf(unit, outputs[0]) for unit in job.units(outputs[0])], how
    )[0]


def run_together(
    jobs: Sequence[Job], folder: Path, tasks: Callable[[Sequence[Output]], Sequence[Task]],
    how: Run | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """As `run`, of jobs with the same inputs in one folder; `tasks`, from their outputs, writes all of them."""
    how = how or Run()
    inputs = jobs[0].inputs
    for job in jobs:
        _expect_apart(job, folder)
    with contextlib.ExitStack() as stack:
        outputs: list[Output] = []
        try:
            for job in jobs:
                reserved = sum(output.needed_bytes for output in outputs)
                outputs.append(stack.enter_context(_open(job, folder, how, reserved)))
        except BaseException:
            for output in outputs:
                output.abandon()
            raise
        pending = tasks(outputs)
        for file in inputs.files:
            file.read_once()
        resumed = [output.done_bytes for output in outputs]
        earlier = [slot for task in pending if not task.is_pending() for slot in task.slots]
        how.progress.start(jobs[0].label, sum(map(_bytes, jobs)))
        how.progress.advance(sum(resumed))
        write_tasks(pending, replace(how, jobs=min(how.jobs, jobs[0].jobs or how.jobs)))
        inputs.finish(earlier)
        how.progress.finish()
        for job, output in zip(jobs, outputs, strict=True):
            _commit(job, output)
    return [
        {
            "tensors": len(job.plan.tensors), "bytes": _bytes(job), "resumed_bytes": before,
            "missing": list(job.missing), "not_kept": list(job.not_kept),
        }
        for job, before in zip(jobs, resumed, strict=True)
    ]  # fmt: skip


def _bytes(job: Job) -> int:
    return sum(tensor.nbytes for tensor in job.plan.tensors.values())


def _open(job: Job, folder: Path, how: Run, reserved: int) -> Output:
    key = {"mixtools": __version__, **job.record, "source": [file.fingerprint() for file in job.inputs.files]}
    names = [*job.documents, *job.last, *job.reports, *_enclosed(job), manifest.NAME]
    return Output(
        folder, job.plan, key, names=names, overwrite=how.overwrite, resume=how.resume, progress=how.progress,
        shared=job.shared, reserved=reserved,
    )  # fmt: skip


def _commit(job: Job, output: Output) -> None:
    report = job.report(output) if job.report else {}
    origin, checksums = _origin(job), output.checksums()

    def record(files: Mapping[str, manifest.File]) -> bytes:
        if job.shared:
            return manifest.encode_beside(output.folder, origin, files, checksums)
        return manifest.encode(origin, files, checksums)

    output.commit({**job.documents, **report, **_enclosed(job)}, job.last, record)


def _origin(job: Job) -> dict[str, Any]:
    """What the manifest tells of how it was made."""
    return {"mixtools": __version__, **job.record, **job.told, "source": job.inputs.about}


def _enclosed(job: Job) -> Mapping[str, bytes]:
    """Nothing where a folder is shared: it is nobody's then."""
    return {} if job.shared else ENCLOSED.get()


def is_made(job: Job, folder: Path) -> bool:
    """Whether the files of a job whose folder is shared lie there, made of the same inputs in the same way."""
    if Place(folder, tuple(file.name for file in job.plan.files)).is_committing():  # its work is not cleared away
        return False
    document = manifest.load(folder) if folder.is_dir() else None
    entry = (document or {}).get(manifest.OUTPUTS, {}).get(job.plan.files[0].name)
    wanted = json.loads(json.dumps(_origin(job)))
    if entry is None or any(entry.get(key) != value for key, value in wanted.items()):
        return False
    paths = [folder / file.name for file in job.plan.files]
    if any(
        not path.is_file() or path.stat().st_size != file.size for path, file in zip(paths, job.plan.files, strict=True)
    ):
        return False
    born = min(path.stat().st_mtime_ns for path in paths)  # a source of the same size, changed since, is newer
    return all(path.stat().st_mtime_ns <= born for file in job.inputs.files for path in file.paths)


def _expect_apart(job: Job, folder: Path) -> None:
    """A source of links may have its files in the folder that is replaced. Raises UsageError."""
    sources = [path for file in job.inputs.files for path in file.paths]
    if job.shared:
        written = {(folder / file.name).resolve() for file in job.plan.files}
        for path in sources:
            if path.resolve() in written:
                raise UsageError("is the source itself; name another output", file=path)
        return
    if job.inputs.folder.resolve() == folder.resolve():
        raise UsageError("the output is the source's own folder; name another", file=folder)
    if not folder.is_dir():
        return
    copied = [path for path in job.documents.values() if isinstance(path, Path)]
    for path in (*copied, *sources):
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


def write_tasks(tasks: Iterable[Task], how: Run) -> None:
    """Those that are not yet written, on `jobs` threads, begun in order; the first error stops them all."""
    stop = threading.Event()

    def one(task: Task) -> None:
        if stop.is_set() or not task.is_pending():
            return
        try:
            for written in task.write():
                how.progress.advance(written)
                if stop.is_set():
                    raise Interrupted("stopped; the same command continues")
        except BaseException:
            stop.set()  # at once: this thread would begin the next task before the waiting one wakes
            raise

    with ThreadPoolExecutor(how.jobs, "mixtools") as pool:
        futures = [pool.submit(one, task) for task in tasks]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            stop.set()  # also for KeyboardInterrupt, which arrives here
            pool.shutdown(cancel_futures=True)
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        for error in sorted(errors, key=lambda error: isinstance(error, Interrupted)):
            raise error  # the cause, not what it interrupted in the other threads
