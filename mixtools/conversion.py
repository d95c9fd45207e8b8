"""Conversion between layouts: each tensor once through memory, in blocks, into its planned place."""

from __future__ import annotations

import functools
import json
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import __version__
from .config import MixtralConfig
from .errors import FormatError, InputError, Interrupted, TensorError, UnsafeError, UsageError
from .layouts.checkpoint import Checkpoint
from .layouts.detect import stays_inside
from .layouts.hf import HF, HF_BIN, HF_FUSED
from .layouts.table import Layout, from_canonical
from .layouts.torrent import CONSOLIDATED, STACKED, TORRENT
from .names import Slot
from .progress import Progress, Silent
from .storage import manifest, plan
from .storage.dtypes import DType
from .storage.output import Output, Region
from .storage.store import CHUNK, Bits
from .text.pieces import read_model, read_pieces

DTYPES = {"bf16": DType.BF16, "f16": DType.F16, "f32": DType.F32}
TOKENIZER = "tokenizer.model"
MAX_DOCUMENT = 64 << 20
# what lies beside every output made within: the recipe, whatever command its step calls
ENCLOSED: ContextVar[Mapping[str, bytes]] = ContextVar("enclosed", default={})  # noqa: B039, nobody changes it


@dataclass(frozen=True)
class Options:
    """`dtype` "keep" copies bit patterns; `max_shard_bytes` bounds a shard of layout D."""

    dtype: str = "keep"
    max_shard_bytes: int = 5_000_000_000


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
    """What is written at one go: regions of the output, and what makes their blocks, one iterator a region."""

    regions: tuple[Region, ...]
    make: Callable[[Output], Iterable[Iterator[Bits]]]


@dataclass(frozen=True)
class Job:
    """A conversion that is fully planned: sizes are known, nothing is written.

    `changes`: the slots that are made anew; all others are copied. `prepare` finds further ones, once the output is
    open and can keep notes. `record`: what beside `options` decides the bytes, for journal and manifest. `report`
    gives, once all is written, the documents that tell of it.
    """

    source: Checkpoint
    layout: Layout
    options: Options
    plan: plan.Plan
    documents: Mapping[str, bytes]
    last: Mapping[str, bytes]
    missing: tuple[str, ...] = ()  # what the output lacks because the source does, for the user to know
    changes: Mapping[Slot, Unit] = field(default_factory=dict)
    prepare: Callable[[Output], Mapping[Slot, Unit]] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)
    report: Callable[[Output], Mapping[str, bytes]] | None = None
    label: str = "converting"
    jobs: int | None = None  # threads at most

    @property
    def peak_bytes(self) -> int:
        """Buffers of a worker that copies: a block before and after, or a tensor that is transposed or multiplied."""
        copied = [slot for slot in self.source.slots() if slot not in self.changes]
        whole = [_stored_bytes(self, slot) for slot in copied if not _granule(self, slot)]
        whole += [2 * _stored_bytes(self, slot) for slot in copied if self.source.is_factored(slot)]  # fp32 between
        return 2 * max([2 * CHUNK, *whole])


def plan_hf(source: Checkpoint, options: Options, stored: Mapping[Slot, Sequence[plan.Shape]] | None = None) -> Job:
    """Layout D: sharded safetensors, configuration, tokenizer and chat template.

    `stored`: slots that lie there as other tensors than one of their own shape.
    """
    tensors = _tensors(source, HF, options, stored or {})
    target = plan_for(HF, tensors, options.max_shard_bytes)
    documents, missing = _hf_documents(source)
    dtypes = dict.fromkeys(dtype for _, dtype, _ in tensors)  # in order: a tie is not left to the order of a set
    torch_dtype = max(dtypes, key=lambda dtype: sum(math.prod(s) for _, d, s in tensors if d is dtype)).torch_name
    config = _json(source.config.to_hf(torch_dtype))
    return Job(source, HF, options, target, documents, {"config.json": config}, missing)


def plan_torrent(source: Checkpoint, options: Options, *, safetensors: bool) -> Job:
    """Layout C, or A as a torch zip."""
    layout = CONSOLIDATED if safetensors else TORRENT
    target = plan_for(layout, _tensors(source, layout, options), options.max_shard_bytes)
    model = source.folder / TOKENIZER
    documents = {TOKENIZER: _tokenizer(model)} if model.is_file() else {}
    last = {"params.json": _json(source.config.to_params())}
    return Job(source, layout, options, target, documents, last, () if documents else (TOKENIZER,))


def plan_for(layout: Layout, tensors: Sequence[plan.Shape], max_shard_bytes: int) -> plan.Plan:
    """The weight files of a layout, named as `detect` finds them; D, E and F in shards.

    Raises UsageError for A', which is no file of its own: write A and cut the file.
    """
    if layout in (HF, HF_FUSED):
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


def run(job: Job, folder: Path, how: Run | None = None) -> dict[str, Any]:
    """Carry a planned conversion out; returns what was done, as a document.

    Raises the errors of storage.output and of the source's reading. An interrupted or failed run leaves its
    work in `folder`/.mixtools, and the same call continues it to the same bytes.
    """
    how = how or Run()
    _expect_elsewhere(job.source.folder, folder)
    key = {"options": asdict(job.options), "source": [s.fingerprint() for s in job.source.store.sources]}
    key |= {"layout": job.layout.name, "mixtools": __version__, **job.record}
    with Output(folder, job.plan, key, overwrite=how.overwrite, resume=how.resume) as output:
        total = sum(tensor.nbytes for tensor in job.plan.tensors.values())
        changes = {**job.changes, **(job.prepare(output) if job.prepare else {})}
        for source in job.source.store.sources:
            source.read_once()
        how.progress.start(job.label, total)
        how.progress.advance(output.done_bytes)
        resumed = output.done_bytes
        units = {slot: changes.get(slot) or _copy(job, slot) for slot in job.source.slots()}
        earlier = [slot for slot, unit in units.items() if output.done.keys() >= {*unit.regions}]
        write_units(units.values(), output, replace(how, jobs=min(how.jobs, job.jobs or how.jobs)))
        job.source.finish(earlier)
        how.progress.finish()
        origin = {
            "mixtools": __version__,
            "layout": job.layout.name,
            "options": asdict(job.options),
            **job.record,
            "source": {"layout": job.source.layout.name, "files": _sizes(job.source)},
        }
        record = manifest.encode(origin, {file.name: file.size for file in job.plan.files}, output.checksums())
        told = job.report(output) if job.report else {}
        output.commit({**job.documents, **told, **ENCLOSED.get(), manifest.NAME: record}, job.last)
    return {"tensors": len(job.plan.tensors), "bytes": total, "resumed_bytes": resumed, "missing": list(job.missing)}


def _copy(job: Job, slot: Slot) -> Unit:
    """The slot as it is, or cast."""
    return _unit(job.layout, slot, job.source.config, job.plan, lambda: _blocks(job, slot))


def _unit(
    layout: Layout, slot: Slot, config: MixtralConfig, target: plan.Plan, blocks: Callable[[], Iterator[Bits]]
) -> Unit:
    """`blocks` gives canonical rows; they are written as `layout` has them."""
    op = layout.rules[slot.role].op

    def make(_: Output) -> Iterator[Iterator[Bits]]:
        yield (from_canonical(op, block, config.head_dim) for block in blocks())

    return Unit((region_of(layout, slot, config, target),), make)


def write_slots(
    layout: Layout, config: MixtralConfig, blocks: Callable[[Slot], Iterator[Bits]], output: Output, how: Run
) -> None:
    """All slots that are not yet written, on `jobs` threads; the first error stops them all.

    `blocks` gives a slot's canonical rows [rows, columns] in order, in runs that are multiples of
    `layout.granule`, with the target's dtype.
    """
    units = (_unit(layout, slot, config, output.plan, functools.partial(blocks, slot)) for slot in config.slots())
    write_units(units, output, how)


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


def region_of(layout: Layout, slot: Slot, config: MixtralConfig, target: plan.Plan) -> Region:
    """Where a slot's bytes go in the output."""
    piece = layout.piece(slot, config)
    return Region(piece.name, piece.start * target.tensors[piece.name].row_bytes)


def _stored_bytes(job: Job, slot: Slot) -> int:
    shape, dtype = job.source.spec(slot)
    return math.prod(shape) * dtype.itemsize


def _granule(job: Job, slot: Slot) -> int:
    config = job.source.config
    return math.lcm(job.layout.granule(slot, config), job.source.layout.granule(slot, config))


def _blocks(job: Job, slot: Slot) -> Iterator[Bits]:
    """The slot in canonical form, with the target's dtype."""
    source, target = job.source.spec(slot).dtype, _target_dtype(job.source, slot, job.options)
    for block in job.source.blocks(slot, CHUNK, job.layout.granule(slot, job.source.config)):
        yield cast(block, source, target, slot)


def cast(bits: Bits, source: DType, target: DType, slot: Slot) -> Bits:
    """Bit patterns of one dtype as those of another, rounded to nearest even.

    Raises TensorError where a finite value would become infinite.
    """
    if source is target:
        return bits
    import torch

    before = torch.from_numpy(bits.view(f"i{source.itemsize}")).view(source.torch())
    after = before.to(target.torch())
    overflow = after.isinf() & before.isfinite()
    if overflow.any():
        value = before[overflow][0].item()
        wider = "bf16 or f32" if target is DType.F16 else "f32"
        raise TensorError(f"{value:g} does not fit {target.torch_name}; use {wider}", tensor=slot)
    signed: Bits = after.view(getattr(torch, f"int{8 * target.itemsize}")).numpy()
    return signed.view(np.dtype(f"u{target.itemsize}"))


def _target_dtype(source: Checkpoint, slot: Slot, options: Options) -> DType:
    return source.spec(slot).dtype if options.dtype == "keep" else DTYPES[options.dtype]


def _tensors(
    source: Checkpoint, layout: Layout, options: Options, stored: Mapping[Slot, Sequence[plan.Shape]] | None = None
) -> list[plan.Shape]:
    if options.dtype not in ("keep", *DTYPES):
        raise UsageError(f"dtype {options.dtype!r} is not one of keep, {', '.join(DTYPES)}")
    return stored_tensors(layout, source.config, lambda slot: _target_dtype(source, slot, options), stored or {})


def stored_tensors(
    layout: Layout,
    config: MixtralConfig,
    dtype_of: Callable[[Slot], DType],
    instead: Mapping[Slot, Sequence[plan.Shape]] | None = None,
) -> list[plan.Shape]:
    """A layout's tensors in slot order, each once. Raises TensorError where two dtypes would meet in one.

    `instead`: slots that lie there as other tensors than the layout's own.
    """
    tensors: dict[str, plan.Shape] = {}
    for slot in config.slots():
        if instead and slot in instead:
            tensors |= {shape[0]: shape for shape in instead[slot]}
            continue
        piece = layout.piece(slot, config)
        dtype = dtype_of(slot)
        known = tensors.setdefault(piece.name, (piece.name, dtype, piece.shape))
        if known[1] is not dtype:
            raise TensorError("would join tensors of two dtypes; choose one with --dtype", tensor=piece.name)
    return list(tensors.values())


def _hf_documents(source: Checkpoint) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """Tokenizer files and generation_config.json, and the names of those that the source cannot give."""
    from .text.tokenizer_files import hf_files

    documents = {"generation_config.json": _json({"bos_token_id": 1, "eos_token_id": 2})}
    model = source.folder / TOKENIZER
    if model.is_file():
        return {**documents, **hf_files(model)}, ()
    kept = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
    found = {name: _document(source.folder, name) for name in kept if (source.folder / name).is_file()}
    return {**documents, **found}, () if "tokenizer.json" in found else (TOKENIZER,)


def _tokenizer(model: Path) -> bytes:
    """Its bytes, once they are known to be a tokenizer: a link to some other file must not be published."""
    data = read_model(model)
    read_pieces(data, model)
    return data


def _document(folder: Path, name: str) -> bytes:
    path = folder / name
    if not stays_inside(folder, path):
        raise UnsafeError("is a link that leaves the folder; not copied", file=path)
    try:
        if (size := path.stat().st_size) > MAX_DOCUMENT:
            raise FormatError("is too large to be copied", file=path, expected=f"<= {MAX_DOCUMENT} bytes", found=size)
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None


def _expect_elsewhere(source: Path, folder: Path) -> None:
    if source.resolve() == folder.resolve():
        raise UsageError("the output is the source's own folder; name another", file=folder)


def _sizes(source: Checkpoint) -> dict[str, int]:
    return {path.name: path.stat().st_size for s in source.store.sources for path in s.paths}


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
