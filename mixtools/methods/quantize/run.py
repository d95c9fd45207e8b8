"""GGUF files as jobs: planned from the configuration alone, and written in one pass over the source.

mixture ─► choices (a type for each slot) ─► Plan (header, offsets) ─► Job, one a file
slot of the source ─► blocks of rows, once ─► stored as each file has them ─► its region of each file
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ...config import MixtralConfig
from ...conversion import inputs_of, worker_bytes
from ...errors import QuantizedError, UsageError
from ...job import BARE, Fan, Job, Target, Unit
from ...layouts.checkpoint import Checkpoint
from ...layouts.families import any_of
from ...layouts.gguf import GGUF
from ...layouts.gguf_config import architecture
from ...layouts.gguf_files import is_gguf
from ...layouts.table import Layout, from_canonical
from ...names import Role, Slot
from ...ops.encode import encode
from ...storage import plan
from ...storage.dtypes import DType
from ...storage.gguf_values import Metadata, Value, string, uint32
from ...storage.output import Output, Region
from ...storage.plan_gguf import gguf_files
from ...storage.store import CHUNK, Bits
from . import about
from .importance import Importance
from .mixtures import MATRICES, Choice, Mixture, choose, needs_imatrix
from .stored import Encode, checked, store

_NO_VOCABULARY = {"tokenizer.ggml.model": string("none")}  # as llama.cpp has it


@dataclass(frozen=True)
class Options:
    """What decides the bytes, but for the mixtures. `name`: of the files, before the type; `stem`: of the only one.

    `named`: the name was asked for, and goes before the one that a GGUF has already.
    """

    name: str
    stem: str | None = None
    max_shard_bytes: int | None = None
    quantized_by: str | None = None
    importance: Importance | None = None
    named: bool = False
    calibrated: bool = False  # in the mixtures that llama.cpp takes with an importance matrix


@dataclass(frozen=True)
class File:
    """One output: its types and its plan. `fallbacks`: tensors whose rows fit no block of the type wanted."""

    mixture: Mixture
    choices: Mapping[Slot, Choice]
    layout: Layout
    plan: plan.Plan
    fallbacks: Sequence[str] = field(default_factory=list)

    @property
    def bits_per_weight(self) -> float:
        """Of all tensors together."""
        tensors = self.plan.tensors.values()
        return 8 * sum(tensor.nbytes for tensor in tensors) / sum(math.prod(tensor.shape) for tensor in tensors)


def plan_file(
    mixture: Mixture, config: MixtralConfig, metadata: Metadata, stem: str, *, tied: bool, imatrix: bool,
    max_shard_bytes: int | None,
) -> File:  # fmt: skip
    """Header and offsets. Raises UsageError for a type that llama.cpp does not make without an importance matrix."""
    choices = choose(mixture, config, tied=tied, imatrix=imatrix)
    if not imatrix and (first := next(needs_imatrix(mixture, choices), None)) is not None:
        slot, dtype = first
        name = GGUF.piece(slot, config).name
        raise UsageError(
            f"--type {mixture.name} needs an importance matrix, as in llama.cpp ({name} would be {dtype.value}); make "
            "one with `mixtools imatrix` and give it with --imatrix"
        )
    layout = GGUF.sharing(Role.HEAD, Role.EMBED) if tied else GGUF
    shapes: dict[str, plan.Shape] = {}
    fallbacks = []
    for slot in config.slots():
        piece, (dtype, wanted) = layout.piece(slot, config), choices[slot]
        if piece.name not in shapes:
            shapes[piece.name] = (piece.name, dtype, piece.shape)
            if wanted is not None:
                fallbacks.append(f"{piece.name} {wanted.value} -> {dtype.value}")
    return File(mixture, choices, layout, gguf_files(stem, metadata, [*shapes.values()], max_shard_bytes), fallbacks)


class Shared(NamedTuple):
    """What files of all types have in common. `missing`: what they lack because the source does."""

    metadata: Metadata
    missing: tuple[str, ...]
    notes: tuple[str, ...]


def shared_by_all(source: Checkpoint, options: Options) -> Shared:
    """All keys but general.*. Raises TokenizerError and ConfigError for what a GGUF cannot hold."""
    from ...text.declared import has_tokenizer

    metadata: dict[str, Value] = {}
    missing: tuple[str, ...] = ()
    notes = source.remarks
    if source.gguf is None:
        metadata |= architecture(source.config, source.folder)
        if has_tokenizer(source.folder):
            from ...text import to_gguf

            found = to_gguf.vocabulary(source.folder, source.config.vocab_size)
            metadata |= found.metadata
            notes += found.remarks
        else:
            metadata |= _NO_VOCABULARY
            missing = ("tokenizer",)
    metadata |= about.kept(source)
    if options.importance is not None:
        metadata |= _about_importance(options.importance)
    return Shared(metadata, missing, notes)


def _about_importance(importance: Importance) -> dict[str, Value]:
    """As llama-quantize tells of the matrix that it used."""
    told = {
        "quantize.imatrix.file": string(importance.file.name if importance.file else ""),
        "quantize.imatrix.entries_count": uint32(len(importance.sums)),
        "quantize.imatrix.chunks_count": uint32(importance.chunks),
    }
    if importance.datasets:
        told["quantize.imatrix.dataset"] = string(importance.datasets[0])
    return told


def plan_jobs(source: Checkpoint, mixtures: Sequence[Mixture], options: Options) -> list[tuple[File, Job]]:
    """A job for each file type. Raises what `plan_file` and `shared_by_all` raise."""
    planned = []
    shared = shared_by_all(source, options)
    for mixture in mixtures:
        metadata = about.general(
            source, options.name, mixture.name, quantized_by=options.quantized_by, named=options.named
        )
        metadata |= shared.metadata
        file = plan_file(
            mixture, source.config, metadata, options.stem or f"{options.name}.{mixture.name}", tied=source.tied,
            imatrix=options.importance is not None or options.calibrated, max_shard_bytes=options.max_shard_bytes,
        )  # fmt: skip
        planned.append((file, _job(source, file, options, shared)))
    return planned


def _job(source: Checkpoint, file: File, options: Options, shared: Shared) -> Job:
    mixture = {key: value for key, value in asdict(file.mixture).items() if value}
    told: dict[str, Any] = {
        key: [[pattern, dtype.value] for pattern, dtype in value] if key == "tensor_types"
        else value.value if isinstance(value, DType) else value
        for key, value in mixture.items()
    }  # fmt: skip
    if options.importance is not None:
        told["imatrix"] = _digest(options.importance)
    notes = shared.notes
    if file.fallbacks:
        shown = ", ".join(file.fallbacks[:3]) + (", ..." if len(file.fallbacks) > 3 else "")
        notes += (f"{len(file.fallbacks)} tensors have rows that are no multiple of their type's blocks: {shown}",)
    record = {"layout": GGUF.name, "options": {"name": options.name}, "quantize": told}
    return Job(
        inputs_of(source), file.plan, lambda _: (), record, {}, {}, shared.missing, notes=notes,
        title=f"GGUF {file.mixture.name}", label="quantizing", shared=True,
        base_bytes=BARE, worker_bytes=worker_bytes(source, GGUF, casts=True) + 2 * CHUNK,
    )  # fmt: skip


def _digest(importance: Importance) -> str:
    """Of all that decides a byte of an output."""
    digest = hashlib.sha256()
    for name in sorted(importance.sums):
        for part in (name.encode(), importance.sums[name].tobytes(), importance.counts[name].tobytes()):
            digest.update(part)
    return digest.hexdigest()[:16]


def fans(
    source: Checkpoint, files: Sequence[File], importance: Importance | None, encoded: Encode = encode
) -> Callable[[Sequence[Output]], list[Fan]]:
    """What carries the jobs out: a fan for each slot that has a tensor. `encoded`: what makes blocks."""

    def tasks(outputs: Sequence[Output]) -> list[Fan]:
        made, seen = [], set()
        for slot in source.slots():
            targets = tuple(
                Target(output, region(source, file, slot), _encoder(source, file, slot, importance, encoded))
                for output, file in zip(outputs, files, strict=True)
            )
            place = targets[0].region
            if place not in seen:  # a tied head is the embedding
                seen.add(place)
                made.append(Fan(targets, functools.partial(_blocks, source, slot), (slot,)))
        return made

    return tasks


def region(source: Checkpoint, file: File, slot: Slot) -> Region:
    """Where a slot's rows lie."""
    piece = file.layout.piece(slot, source.config)
    return Region(piece.name, piece.start * file.plan.tensors[piece.name].row_bytes)


def copied(source: Checkpoint, file: File, slot: Slot) -> Unit:
    """A slot by itself, cast or encoded without importances."""
    encode = _encoder(source, file, slot, None)

    def make(_: Output) -> Iterator[Iterator[Bits]]:
        yield map(encode, _blocks(source, slot))

    return Unit((region(source, file, slot),), make, (slot,))


def _blocks(source: Checkpoint, slot: Slot) -> Iterator[Bits]:
    """Rows in the order in which a GGUF has them, in the source's dtype. Raises TensorError for NaN and infinity."""
    op, head_dim = GGUF.rules[slot.role].op, source.config.head_dim
    blocks = source.blocks(slot, CHUNK, GGUF.granule(slot, source.config))
    for block in checked(blocks, source.spec(slot).dtype, source.entry(slot)):
        yield from_canonical(op, block, head_dim)


def _encoder(
    source: Checkpoint, file: File, slot: Slot, importance: Importance | None, encoded: Encode = encode
) -> Callable[[Bits], Bits]:
    shape, dtype = source.spec(slot)
    target = file.choices[slot].type
    piece = file.layout.piece(slot, source.config)
    weights = None
    if importance is not None and slot.role in MATRICES:
        weights = importance.weights(piece.name, slot.expert, shape[1])
    return lambda block: store(block, dtype, target, weights, slot, encoded)


def expect_weighed(source: Checkpoint, files: Sequence[File], importance: Importance) -> None:
    """Raises UsageError where a tensor needs importances and the matrix has none for it."""
    for file in files:
        for slot, dtype in needs_imatrix(file.mixture, file.choices):
            name = GGUF.piece(slot, source.config).name
            if importance.weights(name, slot.expert, source.spec(slot).shape[1]) is None:
                raise UsageError(f"has no entry for {name}, which {dtype.value} needs", file=importance.file)


def expect_not_quantized(source: Checkpoint, requantize: bool) -> None:
    """Raises QuantizedError for a source that has lost what a second quantization would lose again."""
    if source.quantization is not None and not requantize:
        raise QuantizedError(
            f"is quantized already ({source.quantization}): take the dense model, or make one with `mixtools convert "
            "to-hf`, or add --requantize, which loses more than either",
            file=source.place,
        )


def is_config_alone(path: Path) -> Path | None:
    """The configuration of a folder that holds no weights, for a dry run; None where there are some, or no folder."""
    if not path.is_dir() or any_of(path) or is_gguf(path):
        return None
    return next((path / name for name in ("config.json", "params.json") if (path / name).is_file()), None)
