"""mixtools.quantize --method gptq, awq, nf4, int8: layout D with its linears in fewer bits."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...conversion import Changes, plan_hf
from ...conversion import Options as Conversion
from ...errors import UsageError
from ...formats import Packed
from ...formats.int8 import int8
from ...formats.nf4 import nf4
from ...hub.opening import open_model
from ...job import WITH_TORCH, Job, Run, run
from ...layouts.checkpoint import Checkpoint, located
from ...machine import peak_memory
from ...names import Slot
from ...storage.disk import free_bytes
from . import backends
from .asked import Asked, needs
from .calibrated import plan_packed
from .kinds import Kind
from .mixtures import MATRICES
from .results import Planned, Quantized, Row
from .run import expect_not_quantized

SHARD = 5_000_000_000


def quantize_packed(asked: Asked, source: Any, out: Path, kind: Kind, expert_names: str) -> Quantized | Planned:
    """Raises as the verb."""
    checkpoint = open_model(source)
    expect_not_quantized(checkpoint, asked.requantize)
    kind.expect_fits(checkpoint.config)
    conversion = Conversion(max_shard_bytes=asked.shard or SHARD, expert_names=expert_names)
    if asked.calibration is None and kind.method in ("nf4", "int8"):
        job = _plan_plain(checkpoint, kind, conversion)
        jobs, memory, seconds = asked.jobs, WITH_TORCH + asked.jobs * job.worker_bytes, None
        said: list[str] = []
    else:
        how, stream = asked.calibrated(checkpoint)
        need = needs(checkpoint, how, stream, asked.limit)
        job = plan_packed(checkpoint, kind, how, stream, conversion, room=need.room)
        jobs, memory, seconds, said = 1, need.memory, need.seconds if asked.dry_run else None, how.said
    rows = (_row(job, _label(kind), checkpoint),)
    if asked.dry_run:
        return Planned(out, rows, job.missing, jobs, memory, free_bytes(out), seconds, job.notes)
    began = time.monotonic()
    done = run(job, out, Run(asked.overwrite, asked.resume, jobs, asked.progress))
    return Quantized(
        out, checkpoint.place, rows, done["tensors"], done["bytes"], done["resumed_bytes"], job.missing,
        round(time.monotonic() - began, 3), peak_memory(), job.notes, folder=True, said=tuple(said),
    )  # fmt: skip


def _label(kind: Kind) -> str:
    return kind.method if kind.format == "bitsandbytes" else f"{kind.method}-{kind.bits}bit"


def _row(job: Job, label: str, source: Checkpoint) -> Row:
    files = job.plan.files
    weights = sum(tensor.nbytes for tensor in job.plan.tensors.values())
    bits = 8 * weights / source.config.num_parameters
    return Row(files[0].name, label, sum(file.size for file in files), bits, len(files))


def _plan_plain(source: Checkpoint, kind: Kind, conversion: Conversion) -> Job:
    """bitsandbytes' own bytes of each matrix, whatever reaches it."""
    encode = nf4 if kind.method == "nf4" else int8
    slots = [slot for slot in source.slots() if slot.layer is not None and slot.role in MATRICES]
    formats = {slot: kind.matrix_format(source.spec(slot).dtype) for slot in slots}

    def make(slot: Slot) -> Packed:
        with located(source, slot):
            return encode(source.read(slot))

    job = plan_hf(source, conversion, Changes.each(slots, make, formats))
    record = {**job.record, kind.method: {"format": kind.format, "bits": kind.bits}}
    most = max(math.prod(source.spec(slot).shape) for slot in slots)
    return replace(
        job, record=record, label="quantizing", base_bytes=WITH_TORCH, worker_bytes=max(job.worker_bytes, 16 * most)
    )


def quantize_by_backend(
    asked: Asked, source: Any, out: Path, kind: Kind, backend: str, *, make: bool
) -> Quantized | Planned:
    """By the original package. Raises as the verb, and what backends.run_backend raises."""
    found = backends.find(backend)
    checkpoint = open_model(source)
    expect_not_quantized(checkpoint, asked.requantize)
    wanted = backends.Asked(kind.bits, kind.group, kind.symmetric)
    if asked.damping is not None:
        wanted = replace(wanted, damping=asked.damping)
    backends.expect_fit(backend, wanted, checkpoint)
    how, stream = asked.calibrated(checkpoint)
    job = plan_packed(checkpoint, kind, how, stream, Conversion())  # of the same sizes
    row, memory = _row(job, f"{_label(kind)} by {backend}", checkpoint), 4 * checkpoint.config.num_parameters
    if asked.dry_run:
        return Planned(out, (row,), job.missing, 1, memory, free_bytes(out), None, how.text.notes)
    if make or not backends.is_made(backend):
        if not make:
            raise UsageError(
                f"--backend {backend} runs {found.pins[0]} in an environment of its own, which is not there; add "
                "--make-backend to make it"
            )
        backends.make_backend(backend, asked.progress)
    began = time.monotonic()
    ran = backends.run_backend(
        backend, checkpoint, out, wanted, [ids.tolist() for ids in how.text.sequences], progress=asked.progress
    )
    files = [name for name in ran.files if name.endswith(".safetensors")]
    weights = sum((out / name).stat().st_size for name in files)
    row = Row(files[0], row.type, weights, 8 * weights / checkpoint.config.num_parameters, len(files))
    return Quantized(
        out, checkpoint.place, (row,), len(job.plan.tensors), ran.bytes, 0, (), round(time.monotonic() - began, 3),
        peak_memory(), how.text.notes, folder=True,
    )  # fmt: skip
