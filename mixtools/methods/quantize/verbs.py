"""mixtools.quantize: a checkpoint in fewer bits."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import InputError, MemoryBudgetError, UsageError
from ...machine import check_device, human_bytes, parse_limit, parse_size, peak_memory
from ...options import Device, DryRun, Jobs, MaxMemory, Overwrite, Requantize, Resume, Source
from ...progress import Callback, Progress, watched
from ...verbs import Option

if TYPE_CHECKING:
    from ...job import Job
    from ...layouts.checkpoint import Checkpoint
    from .importance import Importance
    from .mixtures import Mixture
    from .results import Planned, Quantized, Row
    from .run import File

METHODS = ("gguf",)


def quantize(
    source: Source,
    out: Annotated[str | Path, Option("OUT", "Folder, or for one type a file.gguf.", argument=True)],
    *,
    method: Annotated[str, Option("gguf", "The kind of file.")] = "gguf",
    type: Annotated[list[str] | str | None, Option("TYPE", "Q4_K_M, Q8_0, BF16, ...; may be given again.")] = None,
    name: Annotated[str | None, Option("NAME", "Of the files: NAME.TYPE.gguf.")] = None,
    imatrix: Annotated[str | Path | None, Option("FILE", "Importance matrix, GGUF or .dat.")] = None,
    pure: Annotated[bool, Option("", "The type for every matrix, without its mixture.")] = False,
    tensor_type: Annotated[
        list[str] | str | None, Option("REGEX=TYPE", "For tensors whose name matches; the first match decides.")
    ] = None,
    output_tensor_type: Annotated[str | None, Option("TYPE", "Of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, Option("TYPE", "Of token_embd.weight.")] = None,
    rules: Annotated[str, Option("today|2023-12", "llama.cpp's mixtures of today, or of December 2023.")] = "today",
    max_shard_size: Annotated[str | int | None, Option("SIZE", "Split files into parts, e.g. 40GB.")] = None,
    quantized_by: Annotated[str | None, Option("NAME", "For the files' metadata.")] = None,
    requantize: Requantize = False,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    jobs: Jobs = 2,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Quantized | Planned:
    """Quantize to GGUF, from any layout, in one pass: no 16-bit file in between, several types at once.

    Example: mixtools quantize Mixtral-8x7B-Instruct-v0.1 quants --method gguf --type Q4_K_M --type Q6_K

    Each type is a file NAME.TYPE.gguf in OUT, beside those that are there, with ggml's own bytes. Types: F32, F16,
    BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q2_K_S, Q3_K_S/M/L, Q4_K_S/M, Q5_K_S/M, Q6_K, IQ4_NL, IQ4_XS, MXFP4_MOE;
    IQ1_S to IQ3_M with the package libgguf. IQ1, IQ2, IQ3_XXS, IQ3_XS and Q2_K_S need --imatrix.

    --dry-run tells sizes; SRC may then hold a config.json or params.json alone.

    Example: mixtools quantize Mixtral-8x7B-v0.1 out --type Q4_K_M --dry-run --json

    Raises UsageError for options that cannot be, TensorError for weights that are not finite, MemoryBudgetError where
    `max_memory` is too small for one thread, and the errors of reading the source and writing the output (errors.py).
    """
    from ...storage.source import missing
    from .run import Options, is_config_alone, plan_jobs

    check_device(device)
    preflight(method=method, type=type, max_shard_size=max_shard_size, out=out)
    mixtures = _mixtures(
        type, pure=pure, tensor_types=tensor_type, output=output_tensor_type,
        embedding=token_embedding_type, rules=rules,
    )  # fmt: skip
    shard = None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size")
    if imatrix is not None and not Path(imatrix).is_file():
        raise InputError(missing(Path(imatrix), "does not exist"), file=imatrix)
    if dry_run and isinstance(source, str | Path) and (config := is_config_alone(Path(source))) is not None:
        return _from_config(config, Path(out), mixtures, name=name, shard=shard, imatrix=imatrix is not None, jobs=jobs)
    from ...hub.opening import open_model
    from ...storage.dtypes import DType
    from .about import default_name
    from .run import expect_not_quantized
    from .stored import expect_encoder

    checkpoint = replace(open_model(source), dense=DType.F32)  # as ggml decodes blocks: not rounded to bf16 between
    expect_not_quantized(checkpoint, requantize)
    folder, stem = _place(Path(out), name)
    options = Options(
        name or default_name(checkpoint), stem, shard, quantized_by, _importance(imatrix, checkpoint), named=bool(name)
    )
    planned = plan_jobs(checkpoint, mixtures, options)
    expect_encoder({choice.type for file, _ in planned for choice in file.choices.values()})
    return _carry_out(checkpoint, folder, planned, options.importance, resume=resume, overwrite=overwrite, jobs=jobs,
                      limit=parse_limit(max_memory), dry_run=dry_run, progress=watched(progress))  # fmt: skip


def preflight(
    *, method: str = "gguf", type: Sequence[str] | str | None = None,
    tensor_type: Sequence[str] | str | None = None,
    output_tensor_type: str | None = None, token_embedding_type: str | None = None, rules: str = "today",
    max_shard_size: str | int | None = None, out: str | Path = "", **_: Any,
) -> None:  # fmt: skip
    """Raises UsageError for values that a command would refuse."""
    if method not in METHODS:
        raise UsageError(f"--method {method}: there is {', '.join(METHODS)}")
    if max_shard_size is not None:
        parse_size(max_shard_size, "max_shard_size")
    mixtures = _mixtures(
        type, tensor_types=tensor_type, output=output_tensor_type, embedding=token_embedding_type,
        rules=rules,
    )  # fmt: skip
    if len(mixtures) > 1 and str(out).endswith(".gguf"):
        raise UsageError(f"several types are several files: name a folder, not {out}")


def _mixtures(
    types: Sequence[str] | str | None, *, tensor_types: Sequence[str] | str | None, output: str | None,
    embedding: str | None, rules: str, pure: bool = False,
) -> list[Mixture]:  # fmt: skip
    from .mixtures import RULES, Mixture, dtype_named, type_named

    if not types:
        raise UsageError("--type is missing: --type Q4_K_M, or several; `mixtools quantize --help` lists them")
    if rules not in RULES:
        raise UsageError(f"--rules {rules}: there is {', '.join(RULES)}")
    overrides = []
    for text in _listed(tensor_types):
        pattern, equals, dtype = text.rpartition("=")
        if not equals or not pattern:
            raise UsageError(f"--tensor-type {text}: write REGEX=TYPE")
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(f"--tensor-type {text}: {pattern!r} is no regular expression ({error})") from None
        overrides.append((pattern, dtype_named(dtype, f"--tensor-type {pattern}=")))
    names = list(dict.fromkeys(map(type_named, _listed(types))))
    return [
        Mixture(
            name, pure, tuple(overrides), dtype_named(output, "--output-tensor-type ") if output else None,
            dtype_named(embedding, "--token-embedding-type ") if embedding else None, rules,
        )
        for name in names
    ]  # fmt: skip


def _listed(value: Sequence[str] | str | None) -> Sequence[str]:
    """Where one of several may be given by itself."""
    return [value] if isinstance(value, str) else value or []


def _place(out: Path, name: str | None) -> tuple[Path, str | None]:
    """The folder, and the file's name there, without its suffix, where OUT tells it."""
    if name is not None and (re.search(r"[/\0]", name) or name in ("", ".", "..")):
        raise UsageError(f"--name {name!r} is no file's name")
    return (out.parent, out.name.removesuffix(".gguf")) if out.suffix == ".gguf" else (out, None)


def _importance(file: str | Path | None, source: Checkpoint) -> Importance | None:
    if file is None:
        return None
    from .importance import read

    found = read(Path(file))
    found.expect_model(source.config)
    return found


def _rows(files: Sequence[File]) -> tuple[Row, ...]:
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


def _carry_out(
    source: Checkpoint, folder: Path, planned: Sequence[tuple[File, Job]], importance: Importance | None, *,
    resume: bool, overwrite: bool, jobs: int, limit: int | None, dry_run: bool, progress: Progress,
) -> Quantized | Planned:  # fmt: skip
    from ...job import Run, is_made, run_together
    from ...storage.disk import free_bytes
    from .forecast import memory, seconds
    from .results import Planned, Quantized
    from .run import expect_weighed, fans

    files, made = [file for file, _ in planned], [job for _, job in planned]
    if importance is not None:
        expect_weighed(source, files, importance)
    jobs = _within(limit, jobs, files, made[0])
    notes = tuple(dict.fromkeys(note for job in made for note in job.notes))
    if dry_run:
        return Planned(
            folder, _rows(files), made[0].missing, jobs, memory(files, made[0], jobs), free_bytes(folder),
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
    done = run_together(made, folder, fans(source, files, importance), Run(overwrite, resume, jobs, progress))
    return Quantized(
        folder, source.place, _rows([file for file, _ in planned]),
        sum(one["tensors"] for one in done), sum(one["bytes"] for one in done),
        sum(one["resumed_bytes"] for one in done), made[0].missing, round(time.monotonic() - began, 3), peak_memory(),
        notes,
    )  # fmt: skip


def _within(limit: int | None, jobs: int, files: Sequence[File], job: Job) -> int:
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


def _from_config(
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
    folder, stem = _place(out, name)
    stems = [stem or f"{name or folder_name(file.parent)}.{mixture.name}" for mixture in mixtures]
    files = [
        plan_file(mixture, config, architecture(config, file), stem, tied=document.get("tie_word_embeddings") is True,
                  imatrix=imatrix, max_shard_bytes=shard)
        for mixture, stem in zip(mixtures, stems, strict=True)
    ]  # fmt: skip
    note = f"sizes follow from {file.name} alone; a vocabulary adds some hundred kB to each file"
    return Planned(folder, _rows(files), (), jobs, BARE, free_bytes(folder), None, (note,))
