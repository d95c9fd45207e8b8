"""A GGUF of before April 2024, a tensor an expert, as one that today's llama.cpp loads: `convert gguf-upgrade`.

The experts' blocks are laid side by side, not a bit of them changed; the router becomes F32, exactly, as files of today
have it; all keys are kept. Since https://github.com/ggml-org/llama.cpp/pull/6387 llama.cpp refuses the old ones.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from .conversion import inputs_of
from .errors import LayoutError, TensorError
from .job import Job, Unit
from .layouts.checkpoint import Checkpoint
from .layouts.gguf import GGUF, GGUF_2023
from .names import Role, Slot
from .storage import plan
from .storage.casting import cast
from .storage.dtypes import DType
from .storage.output import Output, Region
from .storage.plan_gguf import gguf_files
from .storage.store import CHUNK, Bits

_WIDENED = (DType.F16, DType.BF16)  # a router in these becomes F32


def plan_upgrade(source: Checkpoint, stem: str) -> Job:
    """Raises LayoutError for a source that is no such file, TensorError for a layer whose experts differ in type."""
    if source.gguf is None or source.layout.letter != GGUF_2023.letter:
        raise LayoutError(
            f"is {source.layout.title}; gguf-upgrade takes GGUFs of before April 2024, a tensor an expert",
            file=source.place,
        )
    tensors = _tensors(source)
    target = gguf_files(stem, source.gguf.metadata, list(tensors.values()))

    def unit(slot: Slot) -> Unit:
        piece = GGUF.piece(slot, source.config)
        start = piece.start * target.tensors[piece.name].row_bytes
        return Unit((Region(piece.name, start),), lambda _: [_rows(source, slot)], (slot,))

    def units(_: Output) -> list[Unit]:
        return [unit(slot) for slot in _slots(source)]

    record = {"layout": GGUF.name, "options": {"upgrade": stem}}
    return Job(
        inputs_of(source), target, units, record, {}, {}, notes=source.remarks,
        title=GGUF.title, label="upgrading", shared=True, worker_bytes=2 * CHUNK,
    )  # fmt: skip


def _slots(source: Checkpoint) -> Iterator[Slot]:
    """Those that have a tensor of their own."""
    return (slot for slot in source.slots() if not (source.tied and slot.role is Role.HEAD))


def _tensors(source: Checkpoint) -> dict[str, plan.Shape]:
    found: dict[str, plan.Shape] = {}
    types: dict[str, dict[DType, list[str]]] = defaultdict(lambda: defaultdict(list))
    for slot in _slots(source):
        piece, entry = GGUF.piece(slot, source.config), source.entry(slot)
        types[piece.name][entry.dtype].append(entry.name)
        found[piece.name] = (piece.name, _target(slot, entry.dtype), piece.shape)
    for name, by_type in types.items():
        if len(by_type) > 1:
            _refuse_mixed(source, name, by_type)
    return found


def _refuse_mixed(source: Checkpoint, name: str, by_type: dict[DType, list[str]]) -> None:
    """Files that llama.cpp of 11 to 14 January 2024 made can be such; a stacked tensor has one type."""
    told = "; ".join(f"{dtype.value}: {', '.join(names)}" for dtype, names in by_type.items())
    raise TensorError(
        f"would join experts of several types ({told}); make it anew from the dense model, or from this one with "
        "`mixtools quantize --requantize`",
        file=source.place, tensor=name,
    )  # fmt: skip


def _target(slot: Slot, dtype: DType) -> DType:
    return DType.F32 if slot.role is Role.ROUTER and dtype in _WIDENED else dtype


def _rows(source: Checkpoint, slot: Slot) -> Iterator[Bits]:
    """The stored rows of a slot, as they are; q and k, too, lie alike in both layouts."""
    entry = source.entry(slot)
    step = max(1, CHUNK // entry.row_bytes)
    for at in range(0, entry.rows, step):
        rows = source.store.read_rows(entry.name, at, min(at + step, entry.rows))
        yield cast(rows, entry.dtype, _target(slot, entry.dtype), entry.name)
