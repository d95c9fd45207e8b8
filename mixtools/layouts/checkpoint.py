"""Checkpoint: a Reader over any table layout, lazy and in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import MixtralConfig
from ..errors import LayoutError, MixtoolsError, TensorError
from ..names import Slot
from ..storage.dtypes import WEIGHT_DTYPES, DType
from ..storage.store import Bits, Entry, Store
from .reader import Spec
from .table import Layout, Op, Piece, factor_names, to_canonical

if TYPE_CHECKING:
    import torch

_STRIP = 4  # times `max_bytes`: a transposition is fastest in strips of about 16 MB


@dataclass
class Checkpoint:
    """A dense checkpoint on disk. `problems` is empty unless it was opened leniently."""

    folder: Path
    layout: Layout
    config: MixtralConfig
    store: Store
    problems: list[MixtoolsError] = field(default_factory=list)

    def slots(self) -> Iterator[Slot]:
        return self.config.slots()

    def spec(self, slot: Slot) -> Spec:
        return Spec(self.config.shape(slot.role), self.entry(slot).dtype)

    def entry(self, slot: Slot) -> Entry:
        """The stored tensor that holds this slot, maybe with others; of a matrix stored as factors, the first."""
        name = self.piece(slot).name
        return self.store.entries[factor_names(name)[0] if self.is_factored(slot) else name]

    def is_factored(self, slot: Slot) -> bool:
        """Whether two factors are stored instead of the matrix."""
        name = self.piece(slot).name
        return name not in self.store.entries and factor_names(name)[0] in self.store.entries

    def piece(self, slot: Slot) -> Piece:
        return self.layout.piece(slot, self.config)

    def blocks(self, slot: Slot, max_bytes: int, granule: int = 1) -> Iterator[Bits]:
        """The tensor as runs of canonical rows [rows, columns], in order, each about `max_bytes`.

        `granule`: each run but the last is a multiple of so many rows; 0 gives the tensor in one run.
        A block is valid until the next is asked for (its buffer is used again).
        """
        if self.is_factored(slot):
            yield from self._product_blocks(slot, max_bytes, granule)
            return
        name, _, start, stop, op = self.piece(slot)
        entry = self.store.entries[name]
        asked, granule = (
            granule,
            math.lcm(granule, self.layout.granule(slot, self.config)),
        )  # lcm with 0, the whole, is 0
        if entry.strides is not None:
            granule = 0
        step = stop - start
        if granule:
            step = min(step, max(1, max_bytes // (entry.row_bytes * granule)) * granule)
        buffer = np.empty((step, entry.row_bytes // entry.dtype.itemsize), f"u{entry.dtype.itemsize}")
        for at in range(start, stop, step):
            end = min(at + step, stop)
            bits = self.store.read_rows(name, at, end, out=buffer[: end - at])
            if op is Op.TRANSPOSE:  # from memory, in strips: a second whole would cost more than their narrow reads
                for part in _parts(bits.shape[1], bits.shape[0] * entry.dtype.itemsize, _STRIP * max_bytes, asked):
                    yield to_canonical(op, bits[:, part], self.config.head_dim)
            else:
                yield to_canonical(op, bits, self.config.head_dim)

    def _product_blocks(self, slot: Slot, max_bytes: int, granule: int) -> Iterator[Bits]:
        """As `blocks`, of A·B: multiplied whole in fp32 and rounded once, so that blocks do not change a bit."""
        import torch

        pair = [self.store.entries[name] for name in factor_names(self.piece(slot).name)]
        dtype = pair[0].dtype
        signed = [self.store.read_rows(entry.name, 0, entry.rows).view(f"i{dtype.itemsize}") for entry in pair]
        a, b = (torch.from_numpy(bits).view(dtype.torch()).float() for bits in signed)
        product = (a @ b).to(dtype.torch()).view(getattr(torch, f"int{8 * dtype.itemsize}")).numpy()
        bits: Bits = product.view(f"u{dtype.itemsize}")
        for part in _parts(len(bits), bits.shape[1] * dtype.itemsize, max_bytes, granule):
            yield bits[part]

    def bits(self, slot: Slot) -> Bits:
        """The whole tensor's bit patterns in canonical form, [rows, columns]; a vector is one row."""
        return next(self.blocks(slot, 0, granule=0))

    def read(self, slot: Slot) -> torch.Tensor:
        """See Reader.read."""
        import torch

        spec = self.spec(slot)
        signed = self.bits(slot).view(f"i{spec.dtype.itemsize}")
        return torch.from_numpy(signed).view(spec.dtype.torch()).reshape(spec.shape)

    def finish(self, earlier: Iterable[Slot] = ()) -> None:
        """Judge the checksums that need bytes which no slot covered, or which an earlier run read.

        `earlier`: slots that were read then. One that has a record to itself was judged then; a part of a
        stacked tensor, or a view of a larger storage, was not.
        """
        read = [pair for slot in earlier for pair in self._read_sizes(slot)]
        self.store.finish(entry.name for entry, size in read if entry.record and entry.record.size != size)

    def _read_sizes(self, slot: Slot) -> Iterator[tuple[Entry, int]]:
        """The stored tensors that a reading of the slot reads, and how many bytes of each."""
        name, _, start, stop, _ = self.piece(slot)
        factored = self.is_factored(slot)
        for entry in map(self.store.entries.__getitem__, factor_names(name) if factored else [name]):
            yield entry, entry.nbytes if factored else (stop - start) * entry.row_bytes

    def bytes_by_dtype(self) -> dict[DType, int]:
        counts: Counter[DType] = Counter()
        for entry in self.store.entries.values():
            counts[entry.dtype] += entry.nbytes
        return dict(counts)


def _parts(rows: int, row_bytes: int, max_bytes: int, granule: int) -> Iterator[slice]:
    """Runs of a multiple of `granule` rows, each about `max_bytes`; 0 gives one run."""
    step = max(1, max_bytes // (row_bytes * granule)) * granule if granule else rows
    return (slice(at, at + step) for at in range(0, rows, step))


def find_problems(folder: Path, layout: Layout, config: MixtralConfig, store: Store) -> list[MixtoolsError]:
    """Full coverage in both directions, shapes and dtypes; the worst first, empty when all is well."""
    expected: dict[str, tuple[int, ...]] = {}
    for slot in config.slots():
        expected |= _expected(layout.piece(slot, config), store)
    missing = [name for name in expected if name not in store.entries]
    unknown = [name for name in store.entries if name not in expected and not layout.ignores(name)]
    problems: list[MixtoolsError] = []
    if missing:
        problems.append(LayoutError(f"lacks {_some(missing)}", file=folder, tensor=missing[0]))
    if unknown:
        why = f"has {_some(unknown)} unknown to layout {layout.letter} ({layout.title})"
        problems.append(LayoutError(why, file=store.entries[unknown[0]].source.label, tensor=unknown[0]))
    for name, shape in expected.items():
        if (found := store.entries.get(name)) is None:
            continue
        if found.shape != shape:
            problems.append(
                TensorError("wrong shape", file=found.source.label, tensor=name, expected=shape, found=found.shape)
            )
        elif found.dtype not in WEIGHT_DTYPES:
            wanted = "/".join(dtype.value for dtype in WEIGHT_DTYPES)
            problems.append(
                TensorError(
                    "not a weight's dtype",
                    file=found.source.label,
                    tensor=name,
                    expected=wanted,
                    found=found.dtype.value,
                )
            )
    return problems


def _expected(piece: Piece, store: Store) -> dict[str, tuple[int, ...]]:
    """The stored tensors of a slot and their shapes: the layout's own, or the two factors found in its place."""
    first, second = factor_names(piece.name)
    if piece.name in store.entries or first not in store.entries or len(piece.shape) != 2:
        return {piece.name: piece.shape}
    rank = (*store.entries[first].shape, 0, 0)[1]  # any rank will do, if both have it
    return {first: (piece.shape[0], rank), second: (rank, piece.shape[1])}


def _some(names: list[str]) -> str:
    return "one tensor" if len(names) == 1 else f"{len(names)} tensors ({', '.join(names[:3])}, ...)"
