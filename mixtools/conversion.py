"""Conversion between layouts: each tensor once through memory, in blocks, into its planned place.

    source ─► Options, Changes ─► Job (job.py): a unit for each slot that is copied or cast, one for each Work

A method that makes some matrices anew gives its Changes to `plan_hf`; what it does not touch is copied byte for byte.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from . import documents
from .config import MixtralConfig
from .errors import MixtoolsError, TensorError, UsageError
from .formats import ByRows, Format, Packed, Plain, naming
from .hub import cache
from .job import BARE, WITH_TORCH, Inputs, Job, Unit
from .layouts.checkpoint import Checkpoint
from .layouts.hf import HF, HF_BIN, HF_FUSED, HF_V5
from .layouts.table import Layout, from_canonical
from .layouts.torrent import CONSOLIDATED, STACKED, TORRENT
from .names import Role, Slot
from .storage import manifest, plan
from .storage.casting import CAST_BYTES, cast, widen
from .storage.dtypes import WEIGHT_DTYPES, DType
from .storage.output import Output, Region
from .storage.store import CHUNK, Bits, from_tensor

if TYPE_CHECKING:
    import torch

LEGACY = "legacy"
# who loads which: the README's table. Both have every matrix in a tensor of its own, or in parts of its own
EXPERT_NAMES = {LEGACY: HF, "v5": HF_V5}
DTYPES = {"bf16": DType.BF16, "f16": DType.F16, "f32": DType.F32}


def compute_dtype(name: str) -> torch.dtype | None:
    """The torch dtype of a --dtype value; None for auto. Raises UsageError."""
    if name != "auto" and name not in DTYPES:
        raise UsageError(f"--dtype: {name!r} is none of auto, {', '.join(DTYPES)}")
    return None if name == "auto" else DTYPES[name].torch()


@dataclass(frozen=True)
class Options:
    """`dtype` "keep" copies bit patterns; `max_shard_bytes` bounds a shard of layout D; with `keep_tied`
    a head that is the embedding has no tensor of its own there. `expert_names`: a key of EXPERT_NAMES.
    """

    dtype: str = "keep"
    max_shard_bytes: int = 5_000_000_000
    keep_tied: bool = False
    expert_names: str = LEGACY


class Work(NamedTuple):
    """Slots that a method makes anew at one go, and how: what is stored of each, in their order."""

    slots: tuple[Slot, ...]
    make: Callable[[Output], Iterable[Packed]]


@dataclass(frozen=True)
class Changes:
    """What a method makes of a source.

    `formats`: how slots are stored, of those that are not to be plain and of the source's dtype. `work` gives, once the
    output is open and can keep notes, all that is made anew; the other slots are copied.
    """

    formats: Mapping[Slot, Format] = field(default_factory=dict)
    work: Callable[[Output], Iterable[Work]] = lambda _: ()

    @classmethod
    def each(
        cls, slots: Iterable[Slot], encode: Callable[[Slot], Packed], formats: Mapping[Slot, Format] | None = None
    ) -> Changes:
        """Of a method whose unit is one matrix."""

        def work(slot: Slot) -> Work:
            return Work((slot,), lambda _: [encode(slot)])

        works = [work(slot) for slot in slots]
        return cls(formats or {}, lambda _: works)


def plan_hf(source: Checkpoint, options: Options, changes: Changes | None = None) -> Job:
    """Layout D: sharded safetensors, configuration, tokenizer and chat template.

    Raises UsageError for options that cannot be, TokenizerError and what else reading the source's documents raises.
    """
    changes, source = changes or Changes(), _decoded_to(source, options)
    formats = {**_plain(source, options), **changes.formats}
    if options.keep_tied and not source.tied:
        raise UsageError("--keep-tied: head and embedding of this model are two tensors", file=source.folder)
    layout = expect_names(options.expert_names)
    layout = layout.sharing(Role.HEAD, Role.EMBED) if options.keep_tied else layout
    tensors = stored_tensors(layout, source.config, formats)
    cast_to = DTYPES[options.dtype].torch_name if options.dtype != "keep" else None
    plain = _plain_modules(layout, source.config, formats)
    fragments = (naming(format.fragment(), plain) for format in dict.fromkeys(formats.values()))
    beside = documents.for_hf(source, cast_to, _main_dtype(tensors).torch_name, fragments, options.keep_tied)
    target = plan_for(layout, tensors, options.max_shard_bytes)
    job = _job(source, layout, options, target, Changes(formats, changes.work))
    return replace(job, **vars(beside))


def expect_names(spelling: str) -> Layout:
    """The layout of Hugging Face's with so spelled experts. Raises UsageError for a spelling that there is not."""
    if spelling not in EXPERT_NAMES:
        raise UsageError(f"expert names: {spelling!r} is not one of {', '.join(EXPERT_NAMES)}")
    return EXPERT_NAMES[spelling]


def _plain_modules(layout: Layout, config: MixtralConfig, formats: Mapping[Slot, Format]) -> list[str]:
    """Names of the linear modules that are not quantized: routers and the head, and what a method leaves."""
    linear = (slot for slot in config.slots() if slot.role is not Role.EMBED and len(config.shape(slot.role)) == 2)
    pieces = (layout.piece(slot, config) for slot in linear if isinstance(formats[slot], Plain))
    return [piece.name.removesuffix(".weight") for piece in pieces]


def plan_torrent(source: Checkpoint, options: Options, *, safetensors: bool) -> Job:
    """Layout C, or A as a torch zip."""
    layout, source = CONSOLIDATED if safetensors else TORRENT, _decoded_to(source, options)
    formats = _plain(source, options)
    tensors = stored_tensors(layout, source.config, formats)
    job = _job(source, layout, options, plan_for(layout, tensors, options.max_shard_bytes), Changes(formats))
    return replace(job, **vars(documents.for_torrent(source)))


def _plain(source: Checkpoint, options: Options) -> dict[Slot, Format]:
    """Every slot as it is, or cast. Raises UsageError for a dtype that there is not."""
    if options.dtype not in ("keep", *DTYPES):
        raise UsageError(f"dtype {options.dtype!r} is not one of keep, {', '.join(DTYPES)}")
    if options.dtype == "keep" and source.gguf is not None:
        main = source.main_dtype()
        return {slot: Plain(_before_gguf(source, slot, main)) for slot in source.slots()}
    return {slot: Plain(DTYPES.get(options.dtype) or source.spec(slot).dtype) for slot in source.slots()}


def _decoded_to(source: Checkpoint, options: Options) -> Checkpoint:
    """The same, its blocks decoded straight to the dtype that is asked for, not rounded twice."""
    return replace(source, dense=DTYPES[options.dtype]) if options.dtype in DTYPES else source


def _before_gguf(source: Checkpoint, slot: Slot, main: DType) -> DType:
    """A GGUF has norms and router in F32, in 2023 the router in F16, whatever the model's dtype was: that one, where it
    loses nothing.
    """
    stored = source.spec(slot).dtype
    if stored is main or slot.role not in (Role.NORM, Role.ATTENTION_NORM, Role.FFN_NORM, Role.ROUTER):
        return stored
    bits = source.bits(slot)
    try:
        back = widen(cast(bits, stored, main, slot), main)
    except TensorError:
        return stored
    return main if np.array_equal(back.view(np.uint32), widen(bits, stored).view(np.uint32)) else stored


def _job(source: Checkpoint, layout: Layout, options: Options, target: plan.Plan, changes: Changes) -> Job:
    """All but the documents; `changes` tells the format of every slot."""
    formats = changes.formats

    def copy(slot: Slot) -> Unit:
        dtype = formats[slot].dtype
        return slot_unit(layout, slot, source.config, target, lambda: _blocks(source, layout, slot, dtype))

    def units(output: Output) -> list[Unit]:
        made = {work.slots[0]: _work_unit(work, layout, source.config, formats) for work in changes.work(output)}
        anew = {slot for unit in made.values() for slot in unit.slots}
        told = {region for unit in made.values() for region in unit.regions}
        copied = {slot: copy(slot) for slot in source.slots() if slot not in anew}
        for slot, unit in copied.items():  # of slots that share a tensor the first
            if told.isdisjoint(unit.regions):
                told |= {*unit.regions}
                made[slot] = unit
        return [made[slot] for slot in source.slots() if slot in made]

    usual = {"keep_tied": False, "expert_names": LEGACY}  # as before there was a choice
    told = {name: value for name, value in asdict(options).items() if name not in usual or value != usual[name]}
    record = {"layout": layout.name, "options": told}
    casts = any(formats[slot].dtype is not source.spec(slot).dtype for slot in source.slots())
    torchless = all(isinstance(source.format(slot), ByRows) for slot in source.slots())
    return Job(
        inputs_of(source), target, units, record, {}, {}, title=layout.title,
        base_bytes=BARE if torchless else WITH_TORCH, worker_bytes=worker_bytes(source, layout, casts),
    )  # fmt: skip


def inputs_of(source: Checkpoint) -> Inputs:
    """A checkpoint as a job reads it, and as the manifest of what is made of it tells."""
    files = source.store.sources
    sizes = {path.name: path.stat().st_size for file in files for path in file.paths}
    return Inputs(
        source.folder, files, {"layout": source.layout.name, "files": sizes, **_origin(source)}, source.finish
    )


def _origin(source: Checkpoint) -> dict[str, str]:
    """Of a model from the Hub, or of one in another layout, its name there, and the commit."""
    if (name := cache.hub_id(source.folder)) is not None:
        return {"repository": name, "commit": source.folder.name}
    entry = manifest.of_output(manifest.load(source.folder) or {}, source.place.name)
    made = entry.get("source")
    if not isinstance(made, dict) or manifest.method(entry) is not None:
        return {}
    return {key: str(made[key]) for key in ("repository", "commit") if key in made}


def _work_unit(work: Work, layout: Layout, config: MixtralConfig, formats: Mapping[Slot, Format]) -> Unit:
    """A method's own, in layout D, where each slot is a tensor, or several, to itself."""
    pieces = {slot: layout.piece(slot, config) for slot in work.slots}
    names = [piece.part(part.suffix) for slot, piece in pieces.items() for part in formats[slot].parts(piece.shape)]

    def make(output: Output) -> Iterator[Iterator[Bits]]:
        for slot, packed in zip(work.slots, work.make(output), strict=True):
            if packed.format != (planned := formats[slot]):
                raise MixtoolsError("is not what was planned", tensor=slot, expected=planned, found=packed.format)
            for part in packed.parts:
                yield iter([from_tensor(part)])

    return Unit(tuple(Region(name, 0) for name in names), make, work.slots)


def worker_bytes(source: Checkpoint, layout: Layout, casts: bool) -> int:
    """Buffers of a thread that copies: a block before and after, or a tensor that is transposed or decoded."""
    most = 2 * CHUNK
    for slot in source.slots():
        shape, dtype = source.spec(slot)
        decoding = source.format(slot).decode_bytes(shape)
        granule = math.lcm(layout.granule(slot, source.config), source.layout.granule(slot, source.config))
        most = max(most, decoding and dtype.nbytes(shape) + decoding, 0 if granule else dtype.nbytes(shape))
    return 2 * most + (CAST_BYTES * most // 4 if casts else 0)  # most is two blocks, of two bytes a value


def plan_for(layout: Layout, tensors: Sequence[plan.Shape], max_shard_bytes: int) -> plan.Plan:
    """The weight files of a layout, named as `detect` finds them; D, E and F in shards.

    Raises UsageError for A', which is no file of its own: write A and cut the file.
    """
    if layout.letter in (HF.letter, HF_FUSED.letter):
        return plan.sharded_safetensors(tensors, max_shard_bytes)
    if layout is HF_BIN:
        return plan.sharded_torch_zips(tensors, max_shard_bytes)
    if layout is CONSOLIDATED:
        return plan.single_safetensors("consolidated.safetensors", tensors)
    if layout is STACKED:
        return plan.dealt_torch_zips([f"consolidated.{i:02}.pt" for i in range(8)], tensors)
    if layout is TORRENT:
        return plan.torch_zips({"consolidated.00.pth": tensors})
    raise UsageError(f"layout {layout.letter} ({layout.title}) cannot be written")


def slot_unit(
    layout: Layout, slot: Slot, config: MixtralConfig, target: plan.Plan, blocks: Callable[[], Iterator[Bits]]
) -> Unit:
    """`blocks` gives canonical rows [rows, columns] in order, in runs that are multiples of `layout.granule`, with the
    target's dtype; they are written as `layout` has them.
    """
    rule, piece = layout.rules[slot.role], layout.piece(slot, config)

    def make(_: Output) -> Iterator[Iterator[Bits]]:
        yield (from_canonical(rule.op, block, config.head_dim) for block in blocks())

    start = piece.start * target.tensors[piece.name].row_bytes
    return Unit((Region(piece.name, start),), make, (slot,))


def _blocks(source: Checkpoint, layout: Layout, slot: Slot, dtype: DType) -> Iterator[Bits]:
    """The slot in canonical form, cast to `dtype`."""
    stored = source.spec(slot).dtype
    for block in source.blocks(slot, CHUNK, layout.granule(slot, source.config)):
        yield cast(block, stored, dtype, slot)


def _main_dtype(tensors: Sequence[plan.Shape]) -> DType:
    """The dtype of most numbers; of equals, the first."""
    dtypes = dict.fromkeys(dtype for _, dtype, _ in tensors if dtype in WEIGHT_DTYPES)
    return max(dtypes, key=lambda dtype: sum(math.prod(s) for _, d, s in tensors if d is dtype))


def stored_tensors(layout: Layout, config: MixtralConfig, formats: Mapping[Slot, Format]) -> list[plan.Shape]:
    """A layout's tensors in slot order, each once. Raises TensorError where two dtypes would meet in one."""
    tensors: dict[str, plan.Shape] = {}
    for slot in config.slots():
        piece = layout.piece(slot, config)
        for suffix, dtype, shape in formats[slot].parts(piece.shape):
            name = piece.part(suffix)
            known = tensors.setdefault(name, (name, dtype, shape))
            if known[1] is not dtype:
                raise TensorError("would join tensors of two dtypes; choose one with --dtype", tensor=name)
    return list(tensors.values())
