"""mixtools.convert: a checkpoint in another layout, and the commands that are one direction of it each."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import LayoutError, UsageError
from ..machine import check_device, parse_limit, parse_size
from ..options import Device, DryRun, Jobs, MaxMemory, Out, Overwrite, Resume, ShardSize, Source
from ..progress import Callback, Progress, watched
from ..verbs import Forecast, Option

if TYPE_CHECKING:
    from ..job import Job, Run
    from ..layouts.checkpoint import Checkpoint
    from ..writing import Written
else:
    Checkpoint = Path  # not imported for the command line, where a model is a text

Dtype = Annotated[str, Option("keep|bf16|f16|f32", "keep copies bit patterns.")]
KeepTied = Annotated[bool, Option("", "A head that is the embedding stays one tensor with it.")]


def convert(
    source: Source, out: Out,
    to: Annotated[str, Option("hf|torrent|consolidated|gguf", "The layout to write.")] = "hf", *,
    dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB", keep_tied: KeepTied = False,
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Written | Forecast:  # fmt: skip
    """A checkpoint in another layout, or re-sharded or cast in its own.

    `to`: "hf" (Hugging Face, safetensors in shards), "torrent" (consolidated.00.pth) or "consolidated"
    (consolidated.safetensors); "gguf" makes a GGUF of before April 2024 into one of today (`quantize` makes one of
    anything else), and `out` is a file. `max_shard_size` and `keep_tied` are for "hf", `dtype` is not for "gguf".
    Memory: a few MB a job, or a tensor where it must be transposed or decoded. Raises UsageError for options that
    cannot be, MemoryBudgetError where `max_memory` is too small for one job, and the errors of reading the source and
    writing the output (errors.py).
    """
    from ..hub.opening import open_model
    from ..job import Run
    from ..writing import write

    check_device(device)
    limit = parse_limit(max_memory)
    checkpoint = open_model(source)
    how = Run(overwrite, resume, jobs, watched(progress))
    if to == "gguf":
        if dtype != "keep" or keep_tied:
            raise UsageError("dtype and keep_tied are not for gguf: no value changes")
        return _upgrade(checkpoint, Path(out), how, limit, dry_run)
    job = _plan(checkpoint, to, dtype, parse_size(max_shard_size, "max_shard_size"), keep_tied)
    return write(job, checkpoint, Path(out), how, limit=limit, dry_run=dry_run)


def torrent_to_hf(
    source: Source, out: Out, *, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Written | Forecast:  # fmt: skip
    """Mistral's layouts (torrent, split, stacked, consolidated) to Hugging Face.

    Example: mixtools convert torrent-to-hf mixtral-8x7b-32kseqlen Mixtral-8x7B-v0.1
    """
    checkpoint = _of_layout(source, ("A", "A'", "B", "C"), "none of Mistral's; use `mixtools convert to-hf`")
    return convert(
        checkpoint, out, "hf", dtype=dtype, max_shard_size=max_shard_size, dry_run=dry_run, resume=resume,
        overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
    )  # fmt: skip


def to_hf(
    source: Source, out: Out, *, dtype: Dtype = "keep", max_shard_size: ShardSize = "5GB",
    keep_tied: KeepTied = False,
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Written | Forecast:  # fmt: skip
    """Anything readable to Hugging Face; Hugging Face itself to re-shard or cast.

    Example: mixtools convert to-hf Mixtral-8x7B-v0.1 Mixtral-8x7B-f16 --dtype f16 --max-shard-size 10GB
    """
    return convert(
        source, out, "hf", dtype=dtype, max_shard_size=max_shard_size, keep_tied=keep_tied, dry_run=dry_run,
        resume=resume, overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
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
) -> Written | Forecast:  # fmt: skip
    """Hugging Face to Mistral's own names, as mistral-inference and vLLM read them.

    Example: mixtools convert hf-to-torrent Mixtral-8x7B-v0.1 out --pth
    """
    checkpoint = _of_layout(source, ("D", "E", "F"), "not Hugging Face")
    return convert(
        checkpoint, out, "consolidated" if safetensors else "torrent", dtype=dtype, dry_run=dry_run, resume=resume,
        overwrite=overwrite, jobs=jobs, max_memory=max_memory, device=device, progress=progress,
    )  # fmt: skip


def expert_names(
    source: Source, out: Out, *,
    to: Annotated[str, Option("legacy|v5", "block_sparse_moe.experts.X.w1, or mlp.experts.X.gate_proj.")],
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Written | Forecast:  # fmt: skip
    """A Hugging Face folder with its experts under other names, quantized or not; no byte of a tensor changes.

    Example: mixtools convert expert-names Mixtral-8x7B-GPTQ Mixtral-8x7B-GPTQ-v5 --to v5

    legacy is what vLLM, auto-gptq and autoawq take, v5 what GPTQModel takes. Files, shards and documents stay as they
    are; what config.json says of modules by their names is re-spelled along.
    """
    from ..hub.opening import open_model
    from ..job import Run
    from ..respelling import plan_respelled
    from ..writing import write

    check_device(device)
    limit = parse_limit(max_memory)
    checkpoint = open_model(source)
    how = Run(overwrite, resume, jobs, watched(progress))
    return write(plan_respelled(checkpoint, to), checkpoint, Path(out), how, limit=limit, dry_run=dry_run)


def gguf_upgrade(
    source: Annotated[str | Path | Checkpoint, Option("OLD", "The file, or its first part.", argument=True, key="src")],
    out: Annotated[str | Path, Option("NEW", "File to write, NEW.gguf.", argument=True)], *,
    dry_run: DryRun = False, resume: Resume = True, overwrite: Overwrite = False,
    jobs: Jobs = 2, max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Written | Forecast:  # fmt: skip
    """A GGUF of before April 2024 as one that today's llama.cpp loads; no value changes.

    Example: mixtools convert gguf-upgrade mixtral-8x7b-instruct-v0.1.Q4_K_M.gguf Mixtral-8x7B-Instruct.Q4_K_M.gguf

    llama.cpp refuses the old ones since their experts are tensors of their own. Here they are laid side by side, block
    for block; the router becomes F32, exactly; metadata and tokenizer are kept.
    """
    return convert(
        source, out, "gguf", dry_run=dry_run, resume=resume, overwrite=overwrite, jobs=jobs, max_memory=max_memory,
        device=device, progress=progress,
    )  # fmt: skip


def _upgrade(source: Checkpoint, out: Path, how: Run, limit: int | None, dry_run: bool) -> Written | Forecast:
    from ..gguf_upgrade import plan_upgrade
    from ..writing import write

    if out.suffix != ".gguf":
        raise UsageError(f"the output is a file: name it {out.name or 'NEW'}.gguf", file=out)
    job = plan_upgrade(source, out.name.removesuffix(".gguf"))
    return write(job, source, out, how, limit=limit, dry_run=dry_run)


def preflight(max_shard_size: str | int = 0, **_: Any) -> None:
    """Raises UsageError for values that a command would refuse."""
    parse_size(max_shard_size, "max_shard_size")


def preflight_names(to: str, **_: Any) -> None:
    """Raises UsageError for a spelling that there is not."""
    from ..conversion import expect_names

    expect_names(to)


def _of_layout(source: Source, letters: tuple[str, ...], otherwise: str) -> Checkpoint:
    """Raises LayoutError for another layout than the command takes."""
    from ..hub.opening import open_model

    checkpoint = open_model(source)
    if checkpoint.layout.letter not in letters:
        raise LayoutError(f"is {checkpoint.layout.title}, {otherwise}", file=checkpoint.folder)
    return checkpoint


def _plan(source: Checkpoint, to: str, dtype: str, max_shard_bytes: int, keep_tied: bool) -> Job:
    from .. import conversion

    options = conversion.Options(dtype=dtype, max_shard_bytes=max_shard_bytes, keep_tied=keep_tied)
    if to == "hf":
        return conversion.plan_hf(source, options)
    if to not in ("torrent", "consolidated"):
        raise UsageError(f"to: {to!r} is not one of hf, torrent, consolidated, gguf")
    return conversion.plan_torrent(source, options, safetensors=to == "consolidated")
