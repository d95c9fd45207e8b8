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
from .table import Layout, Piece, to_canonical

if TYPE_CHECKING:
    import torch


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
        """The stored tensor that holds this slot, maybe with others."""
        return self.store.entries[self.piece(slot).name]

    def piece(self, slot: Slot) -> Piece:
        return self.layout.piece(slot, self.config)

    def blocks(self, slot: Slot, max_bytes: int, granule: int = 1) -> Iterator[Bits]:
        """The tensor as runs of canonical rows [rows, columns], in order, each about `max_bytes`.

        `granule`: each run but the last is a multiple of so many rows; 0 gives the tensor in one run.
        A block is valid until the next is asked for (its buffer is used again).
        """
        name, _, start, stop, op = self.piece(slot)
        entry = self.store.entries[name]
        granule = math.lcm(granule, self.layout.granule(slot, self.config))  # lcm with 0, the whole, is 0
        if entry.strides is not None:
            granule = 0
        step = stop - start
        if granule:
            step = min(step, max(1, max_bytes // (entry.row_bytes * granule)) * granule)
        buffer = np.empty((step, entry.row_bytes // entry.dtype.itemsize), f"u{entry.dtype.itemsize}")
        for at in range(start, stop, step):
            end = min(at + step, stop)
            bits = self.store.read_rows(name, at, end, out=buffer[: end - at])
            yield to_canonical(op, bits, self.config.head_dim)

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
        self.store.finish(self.piece(slot).name for slot in earlier if not self._fills_record(slot))

    def _fills_record(self, slot: Slot) -> bool:
        entry = self.entry(slot)
        size = math.prod(self.config.shape(slot.role)) * entry.dtype.itemsize
        return entry.record is None or entry.record.size == size

    def bytes_by_dtype(self) -> dict[DType, int]:
        counts: Counter[DType] = Counter()
        for entry in self.store.entries.values():
            counts[entry.dtype] += entry.nbytes
        return dict(counts)


def find_problems(folder: Path, layout: Layout, config: MixtralConfig, store: Store) -> list[MixtoolsError]:
    """Full coverage in both directions, shapes and dtypes; the worst first, empty when all is well."""
    expected = {piece.name: piece.shape for piece in (layout.piece(slot, config) for slot in config.slots())}
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


def _some(names: list[str]) -> str:
    return "one tensor" if len(names) == 1 else f"{len(names)} tensors ({', '.join(names[:3])}, ...)"
