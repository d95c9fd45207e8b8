"""mixtools.quantize: a checkpoint in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ...errors import InputError, UsageError
from ...machine import check_device, parse_limit, parse_size
from ...options import Device, DryRun, Jobs, MaxMemory, Overwrite, Requantize, Resume, Source
from ...progress import Callback, Progress, watched
from ...verbs import Option
from .kinds import TAKES, Kind

if TYPE_CHECKING:
    from .asked import Asked
    from .mixtures import Mixture
    from .results import Planned, Quantized

GGUF = "gguf"
METHODS = (GGUF, *TAKES)
ROUNDINGS = ("second-order", "nearest")
BACKENDS = ("native", "auto-gptq", "autoawq")


def quantize(
    source: Source,
    out: Annotated[str | Path, Option("OUT", "Folder, or for one GGUF type a file.gguf.", argument=True)],
    *,
    method: Annotated[str, Option("gguf|gptq|awq|nf4|int8", "The kind of output.")] = GGUF,
    type: Annotated[list[str] | str | None, Option("TYPE", "GGUF: Q4_K_M, Q8_0, ...; may be given again.")] = None,
    bits: Annotated[int | None, Option("N", "gptq, awq: a weight; 4.")] = None,
    group_size: Annotated[int | None, Option("N", "gptq, awq: columns with one scale; 128, -1 for a row.")] = None,
    format: Annotated[
        str | None, Option("auto-gptq|autoawq|compressed-tensors", "gptq, awq: how it is stored; the method's own.")
    ] = None,
    expert_names: Annotated[str, Option("legacy|v5", "Who loads which: the README's table.")] = "legacy",
    calibration: Annotated[
        str | Path | None,
        Option("FILE", "Text (txt, jsonl, json, parquet), or default: one that comes along.", words=("default",)),
    ] = None,
    samples: Annotated[int, Option("N", "Of the text.", low=1)] = 128,
    seq_len: Annotated[int, Option("N", "Tokens of a sample.", low=2)] = 2048,
    sampling: Annotated[str | None, Option("spread|start|random", "Where samples are taken: spread evenly.")] = None,
    seed: Annotated[int | None, Option("N", "Of random samples.", low=0)] = None,
    smooth: Annotated[
        str,
        Option(
            "auto|off",
            "Move scales between a layer's matrices where that helps: KLD / 3 with outlier channels, nothing without.",
        ),
    ] = "auto",
    rounding: Annotated[
        str, Option("second-order|nearest", "nearest: each weight by itself; twice the KLD.")
    ] = "second-order",
    damping: Annotated[
        float | None,
        Option(
            "SHARE",
            "Of the Hessian's mean diagonal, added to it; 0.05. Down to 0.01 KLD + 5 % at most.",
            low=1e-6,
            high=1,
        ),
    ] = None,
    sweeps: Annotated[
        int, Option("N", "Of coordinate descent and fitted scales: KLD - 5 %, rounding takes 3 times as long.", low=0)
    ] = 1,
    hessian_block: Annotated[
        int | None,
        Option("N", "Of w2's Hessian keep blocks of N columns: less memory; half a row: KLD + 9 %.", low=256),
    ] = None,
    sequential: Annotated[
        bool,
        Option(
            "",
            "Inputs come through the quantized layers; within noise on small models.",
            flags=("--sequential/--no-sequential",),
        ),
    ] = True,
    name: Annotated[str | None, Option("NAME", "Of GGUF files: NAME.TYPE.gguf.")] = None,
    imatrix: Annotated[str | Path | None, Option("FILE", "Importance matrix, GGUF or .dat.")] = None,
    pure: Annotated[bool, Option("", "The type for every matrix, without its mixture.")] = False,
    tensor_type: Annotated[
        list[str] | str | None, Option("REGEX=TYPE", "For tensors whose name matches; the first match decides.")
    ] = None,
    output_tensor_type: Annotated[str | None, Option("TYPE", "Of output.weight.")] = None,
    token_embedding_type: Annotated[str | None, Option("TYPE", "Of token_embd.weight.")] = None,
    rules: Annotated[str, Option("today|2023-12", "llama.cpp's mixtures of today, or of December 2023.")] = "today",
    max_shard_size: Annotated[str | int | None, Option("SIZE", "Split files; 5GB, a GGUF not at all.")] = None,
    quantized_by: Annotated[str | None, Option("NAME", "For a GGUF's metadata.")] = None,
    backend: Annotated[
        str, Option("native|auto-gptq|autoawq", "The original package instead, in an environment of its own.")
    ] = "native",
    make_backend: Annotated[bool, Option("", "Make that environment first.", machine=True)] = False,
    requantize: Requantize = False,
    dry_run: DryRun = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    jobs: Jobs = 2,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Quantized | Planned:
    """Quantize from any layout, in one pass, a few tensors in memory: GGUF, GPTQ, AWQ, bitsandbytes.

    Example: mixtools quantize Mixtral-8x7B-Instruct-v0.1 quants --method gguf --type Q4_K_M --type Q6_K

    GGUF: each type is a file NAME.TYPE.gguf in OUT, beside those that are there, with ggml's own bytes. Types: F32,
    F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q2_K_S, Q3_K_S/M/L, Q4_K_S/M, Q5_K_S/M, Q6_K, IQ4_NL, IQ4_XS,
    MXFP4_MOE; IQ1_S to IQ3_M with the package libgguf. IQ1, IQ2, IQ3_XXS, IQ3_XS and Q2_K_S need --imatrix.

    With --calibration FILE (or default) the same bytes lose less: a layer at a time, over a text, each layer is
    smoothed where that helps and its matrices are rounded with their errors carried on. gptq and awq need it (the
    default text unless a file is given); nf4 and int8 are bitsandbytes' own bytes without it.

    Example: mixtools quantize Mixtral-8x7B-v0.1 Mixtral-8x7B-v0.1-GPTQ --method gptq --calibration texts.jsonl

    What goes together, as method, format: bits; zeros. Groups are 32, 64, 128, or -1, a row.

    gptq, auto-gptq: 2, 3, 4, 8; in the middle.

    gptq, compressed-tensors: 4, 8; in the middle.

    awq, autoawq: 4; by group.

    awq, compressed-tensors: 4, 8; by group.

    awq, auto-gptq: 2, 3, 4, 8; by group.

    nf4: 4, in blocks of 64. int8: 8, by row.

    --dry-run tells sizes, memory and time; for GGUF, SRC may then hold a config.json or params.json alone.

    Example: mixtools quantize Mixtral-8x7B-v0.1 out --type Q4_K_M --dry-run --json

    Raises UsageError for options that cannot be, TensorError for weights that are not finite, MemoryBudgetError where
    `max_memory` is too small, and the errors of reading the source and writing the output (errors.py).
    """
    from .asked import Asked

    check_device(device)
    preflight(**{key: value for key, value in locals().items() if key in _CHECKED})
    if imatrix is not None and not Path(imatrix).is_file():
        from ...storage.source import missing

        raise InputError(missing(Path(imatrix), "does not exist"), file=imatrix)
    asked = Asked(
        method=method, calibration=calibration, samples=samples, seq_len=seq_len, sampling=sampling, seed=seed,
        smooth=smooth == "auto", rounding=rounding, damping=damping, sweeps=sweeps, block=hessian_block,
        sequential=sequential, requantize=requantize, dry_run=dry_run, resume=resume, overwrite=overwrite, jobs=jobs,
        limit=parse_limit(max_memory), device=device, progress=watched(progress),
        shard=None if max_shard_size is None else parse_size(max_shard_size, "max_shard_size"),
    )  # fmt: skip
    if backend != "native":
        from .packed_verb import quantize_by_backend

        kind = Kind.of(method, None, bits, group_size)
        return quantize_by_backend(asked, source, Path(out), kind, backend, make=make_backend)
    if method != GGUF:
        from .packed_verb import quantize_packed

        return quantize_packed(asked, source, Path(out), Kind.of(method, format, bits, group_size), expert_names)
    from .gguf_verb import mixtures_of

    mixtures = mixtures_of(
        type, pure=pure, tensor_types=tensor_type, output=output_tensor_type,
        embedding=token_embedding_type, rules=rules,
    )  # fmt: skip
    return _to_gguf(asked, source, Path(out), mixtures, name=name, imatrix=imatrix, quantized_by=quantized_by)


_CHECKED = frozenset(
    {"method", "type", "bits", "group_size", "format", "calibration", "imatrix", "rounding", "smooth", "sampling",
     "expert_names", "backend", "make_backend", "tensor_type", "output_tensor_type", "token_embedding_type", "rules",
     "max_shard_size", "hessian_block", "out", "name", "pure", "quantized_by", "seed"}
)  # fmt: skip


def preflight(
    *, method: str = GGUF, type: Sequence[str] | str | None = None, bits: int | None = None,
    group_size: int | None = None, format: str | None = None, expert_names: str = "legacy",
    calibration: str | Path | None = None, imatrix: str | Path | None = None, rounding: str = "second-order",
    smooth: str = "auto", sampling: str | None = None, seed: int | None = None, hessian_block: int | None = None,
    backend: str = "native", make_backend: bool = False, max_shard_size: str | int | None = None,
    out: str | Path = "", **others: Any,
) -> None:  # fmt: skip
    """Raises UsageError for values that a command would refuse."""
    for option, value, there in (
        ("method", method, METHODS), ("rounding", rounding, ROUNDINGS), ("smooth", smooth, ("auto", "off")),
        ("expert-names", expert_names, ("legacy", "v5")), ("backend", backend, BACKENDS),
    ):  # fmt: skip
        if value not in there:
            raise UsageError(f"--{option} {value}: there is {', '.join(there)}")
    if max_shard_size is not None:
        parse_size(max_shard_size, "max_shard_size")
    if sampling is not None or seed is not None:
        from ...inference.sampling import Sampling

        Sampling.of(sampling, seed)
    row = method == "int8" or group_size == -1
    if hessian_block is not None and (hessian_block % 256 or row):
        why = "not for int8 and --group-size -1, where a row is one group"
        raise UsageError(f"--hessian-block {hessian_block}: a multiple of 256, and {why}")
    if method == GGUF:
        _expect_unused("gguf", bits=bits, group_size=group_size, format=format, backend=backend != "native" or None,
                       make_backend=make_backend or None, expert_names=expert_names != "legacy" or None)  # fmt: skip
        if calibration is not None and imatrix is not None:
            raise UsageError("--imatrix weighs columns as --calibration does, from its own text: give one of the two")
        _preflight_gguf(type, out, others)
        return
    gguf_only = ("tensor_type", "output_tensor_type", "token_embedding_type", "name", "quantized_by")
    _expect_unused(
        method, type=type or None, imatrix=imatrix, pure=others.get("pure") or None,
        rules=others.get("rules", "today") != "today" or None, **{key: others.get(key) for key in gguf_only},
    )  # fmt: skip
    _preflight_packed(method, format, (bits, group_size), backend, make_backend=make_backend)


def _preflight_gguf(type: Sequence[str] | str | None, out: str | Path, others: dict[str, Any]) -> None:
    from .gguf_verb import mixtures_of

    mixtures = mixtures_of(
        type, tensor_types=others.get("tensor_type"), output=others.get("output_tensor_type"),
        embedding=others.get("token_embedding_type"), rules=others.get("rules", "today"),
    )  # fmt: skip
    if len(mixtures) > 1 and str(out).endswith(".gguf"):
        raise UsageError(f"several types are several files: name a folder, not {out}")


def _preflight_packed(
    method: str, format: str | None, size: tuple[int | None, int | None], backend: str, *, make_backend: bool
) -> None:
    Kind.of(method, format, *size)
    if backend == "native":
        if make_backend:
            raise UsageError("--make-backend makes the environment of a --backend; name one")
        return
    from .backends import find

    if (wanted := find(backend).method) != method:
        raise UsageError(f"--backend {backend} quantizes by --method {wanted}, not {method}")
    if format not in (None, backend):
        raise UsageError(f"--backend {backend} writes its own format; leave out --format {format}")


def _expect_unused(method: str, **given: object) -> None:
    """Raises UsageError for an option of another method."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} does not go with --method {method}")


def _to_gguf(
    asked: Asked, source: Any, out: Path, mixtures: Sequence[Mixture], *, name: str | None,
    imatrix: str | Path | None, quantized_by: str | None,
) -> Quantized | Planned:  # fmt: skip
    from .gguf_verb import carry_out, from_config, importance_of, place_of
    from .run import Options, expect_not_quantized, is_config_alone, plan_jobs

    weighed = imatrix is not None or asked.calibration is not None
    if asked.dry_run and isinstance(source, str | Path) and (config := is_config_alone(Path(source))) is not None:
        return from_config(config, out, mixtures, name=name, shard=asked.shard, imatrix=weighed, jobs=asked.jobs)
    from ...hub.opening import open_model
    from ...storage.dtypes import DType
    from .about import default_name
    from .stored import expect_encoder

    checkpoint = replace(open_model(source), dense=DType.F32)  # as ggml decodes blocks: not rounded to bf16 between
    expect_not_quantized(checkpoint, asked.requantize)
    folder, stem = place_of(out, name)
    options = Options(
        name or default_name(checkpoint), stem, asked.shard, quantized_by, importance_of(imatrix, checkpoint),
        named=bool(name), calibrated=asked.calibration is not None,
    )  # fmt: skip
    planned = plan_jobs(checkpoint, mixtures, options)
    expect_encoder({choice.type for file, _ in planned for choice in file.choices.values()})
    if asked.calibration is not None:
        from .gguf_verb import carry_out_calibrated

        return carry_out_calibrated(asked, checkpoint, folder, planned)
    return carry_out(
        checkpoint, folder, planned, options.importance, resume=asked.resume, overwrite=asked.overwrite,
        jobs=asked.jobs, limit=asked.limit, dry_run=asked.dry_run, progress=asked.progress, device=asked.device,
    )  # fmt: skip
