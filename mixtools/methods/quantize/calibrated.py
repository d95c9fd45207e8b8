"""Calibrated quantization as jobs: layer by layer, from the states of the layers before, into planned files.

Kind ─► formats of all slots ─► layout D: plan, documents ─► Job ┐  units: copies, a layer each
mixture ─► types of all slots ─► GGUF: header, offsets    ─► Job ┘  Passage ─► each slot as stored
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...conversion import Changes, plan_hf
from ...conversion import Options as Conversion
from ...conversion import Work as Anew
from ...errors import UsageError
from ...formats import Format, Packed, Plain
from ...inference.calibrate import Text
from ...inference.stream import Stream
from ...job import WITH_TORCH, Job, Unit
from ...layouts.checkpoint import Checkpoint
from ...layouts.gguf import GGUF
from ...layouts.table import from_canonical
from ...names import Role, Slot, layer_slots
from ...ops.cpu import NATIVE
from ...storage import manifest
from ...storage.dtypes import DType
from ...storage.output import Output
from ...storage.store import Bits, from_tensor
from . import report
from .kinds import Kind
from .matrix import Options
from .mixtures import MATRICES
from .passage import Passage, Room
from .run import File, copied, region
from .worker import Method

_PLAIN = Room()


@dataclass(frozen=True)
class Calibrated:
    """What decides the bytes beside the kind of file. `options`: of rounding; `smooth`, `sequential`: see Method.

    `said`: lines on each output, for its user, once it is written.
    """

    text: Text
    options: Options
    smooth: bool = True
    sequential: bool = True
    said: list[str] = field(default_factory=list)

    def record(self, stream: Stream) -> dict[str, Any]:
        """For the journal and the manifest; BLAS sums in another order on another number of threads."""
        import torch

        return {
            "calibration": self.text.record, **asdict(self.options), "smooth": self.smooth,
            "sequential": self.sequential, "compute": str(stream.dtype).removeprefix("torch."),
            "device": stream.device.type, "threads": torch.get_num_threads(),
        }  # fmt: skip


def plan_packed(
    source: Checkpoint, kind: Kind, how: Calibrated, stream: Stream, conversion: Conversion, *, room: Room = _PLAIN
) -> Job:
    """Layout D with its linears in the kind's format. Raises UsageError for a model that does not fit it."""
    kind.expect_fits(source.config)
    main = source.main_dtype()
    plain = kind.plain_dtype(main)
    format, scheme = kind.matrix_format(main), kind.scheme(main)
    formats: dict[Slot, Format] = {
        slot: format if slot.role in MATRICES else Plain(plain) for slot in source.slots() if slot.layer is not None
    }
    method = Method(lambda _: scheme, lambda _: plain, how.options, how.smooth, how.sequential)

    def work(output: Output) -> Iterable[Anew]:
        passage = Passage(source, stream, method, how.text.sequences, output, head=False, room=room)
        for index in range(source.config.num_layers):
            slots = tuple(layer_slots(index, source.config.num_experts))
            yield Anew(slots, functools.partial(_layer, passage, index))

    if plain is not main:
        conversion = replace(conversion, dtype={DType.F16: "f16", DType.BF16: "bf16", DType.F32: "f32"}[plain])
    job = plan_hf(source, conversion, Changes(formats, work))
    told = {"method": kind.method, "format": kind.format, "bits": kind.bits, "group_size": kind.group}
    return _finished(job, source, kind.method, {**told, **how.record(stream)}, how)


def plan_blocks(
    source: Checkpoint, file: File, job: Job, how: Calibrated, stream: Stream, *, room: Room = _PLAIN
) -> Job:
    """A GGUF that is planned already, its matrices rounded over the text. Raises UsageError for a type without grid."""
    for slot, choice in file.choices.items():
        if slot.role in MATRICES and choice.type not in NATIVE:
            name = GGUF.piece(slot, source.config).name
            raise UsageError(
                f"--calibration: {name} would be {choice.type.value}, which is not rounded here; choose a type of "
                "blocks that mixtools encodes itself, or leave --calibration out", tensor=name,
            )  # fmt: skip
    from .grid_ggml import Blocks

    method = Method(
        lambda slot: Blocks(file.choices[slot].type), lambda slot: file.choices[slot].type,
        how.options, how.smooth, how.sequential,
    )  # fmt: skip
    head = not source.tied and file.choices[Slot(Role.HEAD)].type in NATIVE

    def units(output: Output) -> list[Unit]:
        passage = Passage(source, stream, method, how.text.sequences, output, head=head, room=room)
        made = [copied(source, file, Slot(Role.EMBED))]
        for index in range(source.config.num_layers):
            slots = tuple(layer_slots(index, source.config.num_experts))
            made.append(_unit(source, file, slots, functools.partial(passage.layer, index)))
        if head:
            made.append(_unit(source, file, (Slot(Role.NORM), Slot(Role.HEAD)), passage.head))
            return made
        ends = [Slot(Role.NORM)] if source.tied else [Slot(Role.NORM), Slot(Role.HEAD)]
        return [*made, *(copied(source, file, slot) for slot in ends)]

    told = {"method": "gguf", **job.record["quantize"], **how.record(stream)}
    return _finished(replace(job, units=units), source, "quantize", told, how)


def _layer(passage: Passage, index: int, _: Output) -> Iterator[Packed]:
    return passage.layer(index)


def _unit(source: Checkpoint, file: File, slots: tuple[Slot, ...], make: Callable[[], Iterator[Packed]]) -> Unit:
    """Slots of a GGUF, as it orders their rows."""

    def rows(_: Output) -> Iterator[Iterator[Bits]]:
        for slot, packed in zip(slots, make(), strict=True):
            (part,) = packed.parts
            yield iter([from_canonical(GGUF.rules[slot.role].op, from_tensor(part), source.config.head_dim)])

    return Unit(tuple(region(source, file, slot) for slot in slots), rows, slots)


def _finished(job: Job, source: Checkpoint, name: str, told: Mapping[str, Any], how: Calibrated) -> Job:
    """One thread, whose products have torch's: layers follow each other. `told` goes under `name` in the manifest."""
    stem = job.plan.files[0].name.removesuffix(".gguf") if job.shared else None
    documents = report.documents(source, told, stem)

    def reported(output: Output) -> Mapping[str, bytes]:
        how.said.extend(report.told(output.notes))
        how.said.append(f"report: {output.folder / report.names(stem)[-1]}")
        return documents(output)

    return replace(
        job, record={**job.record, name: dict(told)}, label="quantizing", jobs=1, base_bytes=WITH_TORCH,
        notes=(*job.notes, *how.text.notes), report=reported, reports=report.names(stem),
        told={manifest.CALIBRATION: how.text.name},
    )  # fmt: skip
