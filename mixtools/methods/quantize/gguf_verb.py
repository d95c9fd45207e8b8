"""mixtools.quantize --method gguf: from types to files, in one pass, or a pass a type where it is calibrated."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import MemoryBudgetError, UsageError
from ...machine import human_bytes, peak_memory
from ...progress import Progress

if TYPE_CHECKING:
    from ...job import Job
    from ...layouts.checkpoint import Checkpoint
    from .asked import Asked
    from .importance import Importance
    from .mixtures import Mixture
    from .results import Planned, Quantized, Row
    from .run import File


def mixtures_of(
    types: Sequence[str] | str | None, *, tensor_types: Sequence[str] | str | None, output: str | None,
    embedding: str | None, rules: str, pure: bool = False,
) -> list[Mixture]:  # fmt: skip
    from .mixtures import RULES, Mixture, dtype_named, type_named

    if not types:
        raise UsageError("--type is missing: --type Q4_K_M, or several; `mixtools quantize --help` lists them")
    if rules not in RULES:
        raise UsageError(f"--rules {rules}: there is {', '.join(RULES)}")
    overrides = []
    for text in listed(tensor_types):
        pattern, equals, dtype = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--tensor-type {text}: write REGEX=TYPE")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--tensor-type {text}: {pattern!r} is no regular expression ({error})") from None
        overrides.append((pattern, dtype_named(dtype, f"--tensor-type {pattern}=")))
    names = list(dict.fromkeys(map(type_named, listed(types))))
    return [
        Mixture(
            name, pure, tuple(overrides), dtype_named(output, "--output-tensor-type ") if output else None,
            dtype_named(embedding, "--token-embedding-type ") if embedding else None, rules,
        )
        for name in names
    ]  # fmt: skip


def listed(value: Sequence[str] | str | None) -> Sequence[str]:
    """Where one of several may be given by itself."""
    return [value] if isinstance(value, str) else value or []


def place_of(out: Path, name: str | None) -> tuple[Path, str | None]:
    """The folder, and the file's name there, without its suffix, where OUT tells it."""
    if name is not None and (re.search(r"[/\0]", name) or name in ("", ".", "..")):
        raise UsageError(f"--name {name!r} is no file's name")
    return (out.parent, out.name.removesuffix(".gguf")) if out.suffix == ".gguf" else (out, None)


def importance_of(file: str | Path | None, source: Checkpoint) -> Importance | None:
    if file is None:
        return None
    from .importance import read

    found = read(Path(file))
    found.expect_model(source.config)
    return found


def rows_of(files: Sequence[File]) -> tuple[Row, ...]:
    from .results import Row

    return tuple(
        Row(
            file.plan.files[0].name,
            file.mixture.name,
            file.plan.total_bytes,
            file.bits_per_weight,
            len(file.plan.files),
        )
        for file in files
    )


def carry_out(
    source: Checkpoint, folder: Path, planned: Sequence[tuple[File, Job]], importance: Importance | None, *,
    resume: bool, overwrite: bool, jobs: int, limit: int | None, dry_run: bool, progress: Progress, device: str = "cpu",
) -> Quantized | Planned:  # fmt: skip
    from ...job import Run, is_made, run_together
    from ...storage.disk import free_bytes
    from .forecast import memory, seconds
    from .results import Planned, Quantized
    from .run import expect_weighed, fans
    from .stored import encoder_on

    files, made = [file for file, _ in planned], [job for _, job in planned]
    if importance is not None:
        expect_weighed(source, files, importance)
    jobs = within(limit, jobs, files, made[0])
    notes = tuple(dict.fromkeys(note for job in made for note in job.notes))
    if dry_run:
        return Planned(
            folder, rows_of(files), made[0].missing, jobs, memory(files, made[0], jobs), free_bytes(folder),
            seconds(source, files, jobs), notes,
        )  # fmt: skip
    there = [is_made(job, folder) for job in made]
    if (
        resume and not overwrite and any(there) and not all(there)
    ):  # a run that was killed between two files, or one more type
        names = [file.plan.files[0].name for file, is_there in zip(files, there, strict=True) if is_there]
        notes += (f"{', '.join(names)}: there already, of the same source and options",)
        kept = [pair for pair, is_there in zip(planned, there, strict=True) if not is_there]
        files, made = [file for file, _ in kept], [job for _, job in kept]
    began = time.monotonic()
    work = fans(source, files, importance, encoder_on(device))
    done = run_together(made, folder, work, Run(overwrite, resume, jobs, progress))
    return Quantized(
        folder, source.place, rows_of([file for file, _ in planned]),
        sum(one["tensors"] for one in done), sum(one["bytes"] for one in done),
        sum(one["resumed_bytes"] for one in done), made[0].missing, round(time.monotonic() - began, 3), peak_memory(),
        notes,
    )  # fmt: skip


def within(limit: int | None, jobs: int, files: Sequence[File], job: Job) -> int:
    """Threads that fit. Raises MemoryBudgetError where not even one does."""
    from .forecast import memory

    if limit is None:
        return jobs
    fitting = [count for count in range(1, jobs + 1) if memory(files, job, count) <= limit]
    if not fitting:
        need = human_bytes(memory(files, job, 1))
        raise MemoryBudgetError(
            "--max-memory is too small even for one thread", expected=need, found=human_bytes(limit)
        )
    return max(fitting)


def from_config(
    file: Path, out: Path, mixtures: Sequence[Mixture], *, name: str | None, shard: int | None, imatrix: bool, jobs: int
) -> Planned:
    """Sizes of a model of which only the configuration is there. Raises ConfigError for one that is no Mixtral's."""
    from ...config import from_document, load_object
    from ...job import BARE
    from ...layouts.gguf_config import architecture
    from ...storage.disk import free_bytes
    from .about import folder_name
    from .results import Planned
    from .run import plan_file

    document = load_object(file)
    config = from_document(document, file)
    folder, stem = place_of(out, name)
    stems = [stem or f"{name or folder_name(file.parent)}.{mixture.name}" for mixture in mixtures]
    files = [
        plan_file(mixture, config, architecture(config, file), stem, tied=document.get("tie_word_embeddings") is True,
                  imatrix=imatrix, max_shard_bytes=shard)
        for mixture, stem in zip(mixtures, stems, strict=True)
    ]  # fmt: skip
    note = f"sizes follow from {file.name} alone; a vocabulary adds some hundred kB to each file"
    return Planned(folder, rows_of(files), (), jobs, BARE, free_bytes(folder), None, (note,))


def carry_out_calibrated(
    asked: Asked, source: Checkpoint, folder: Path, planned: Sequence[tuple[File, Job]]
) -> Quantized | Planned:
    """One run of the stream a type: each has its own states. Raises as the verb."""
    from ...job import Run, is_made, run
    from ...storage.disk import free_bytes
    from .asked import needs
    from .calibrated import plan_blocks
    from .results import Planned, Quantized

    how, stream = asked.calibrated(source)
    need = needs(source, how, stream, asked.limit)
    files = [file for file, _ in planned]
    made = [plan_blocks(source, file, job, how, stream, room=need.room) for file, job in planned]
    notes = tuple(dict.fromkeys(note for job in made for note in job.notes))
    if asked.dry_run:
        notes += (f"one pass over the text for each of {len(made)} types",) if len(made) > 1 else ()
        seconds = need.seconds * len(made)
        return Planned(folder, rows_of(files), made[0].missing, 1, need.memory, free_bytes(folder), seconds, notes)
    there = [is_made(job, folder) for job in made]
    skipped = asked.resume and not asked.overwrite and not all(there)
    began, total = time.monotonic(), [0, 0, 0]
    for job, is_there in zip(made, there, strict=True):
        if skipped and is_there:
            notes += (f"{job.plan.files[0].name}: there already, of the same source and options",)
            continue
        done = run(job, folder, Run(asked.overwrite, asked.resume, 1, asked.progress))
        total = [sofar + done[key] for sofar, key in zip(total, ("tensors", "bytes", "resumed_bytes"), strict=True)]
    tensors, written, resumed = total
    return Quantized(
        folder, source.place, rows_of(files), tensors, written, resumed, made[0].missing,
        round(time.monotonic() - began, 3), peak_memory(), notes, said=tuple(how.said),
    )  # fmt: skip
