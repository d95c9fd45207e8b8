"""Edited weights set aside in a file without a name, and a reader that gives them instead of the source's."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ....config import MixtralConfig
from ....errors import DiskError
from ....layouts.reader import Reader, Spec
from ....names import Slot

_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB a call


@dataclass(frozen=True)
class Place:
    """Where a weight lies on the shelf."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


Edits = Mapping[Slot, Place]


class Shelf:
    """Tensors in a temporary file that is gone when closed. Reading and writing may go on at once, in any thread."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(prefix="mixtools-search-", dir=folder)  # noqa: SIM115  (lives as long as this)
        self._end = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # by size: matrices of one role share it

    def put(self, weight: Tensor) -> Place:
        """Raises DiskError if the file cannot grow."""
        size = weight.nbytes
        if self._free[size]:
            offset = self._free[size].pop()
        else:
            offset, self._end = self._end, self._end + size
        place = Place(offset, tuple(weight.shape), weight.dtype)
        view = memoryview(weight.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)
        self._all(lambda done: os.pwrite(self._file.fileno(), view[done : done + _IO_BYTES], offset + done), size)
        return place

    def get(self, place: Place) -> Tensor:
        """A copy, on the CPU."""
        weight = torch.empty(place.shape, dtype=place.dtype)
        view = memoryview(weight.view(torch.uint8).numpy().reshape(-1).data)
        self._all(
            lambda done: os.preadv(self._file.fileno(), [view[done : done + _IO_BYTES]], place.offset + done),
            weight.nbytes,
        )
        return weight

    def drop(self, place: Place) -> None:
        """Its room is used again."""
        self._free[place.dtype.itemsize * torch.Size(place.shape).numel()].append(place.offset)

    def close(self) -> None:
        self._file.close()

    @staticmethod
    def _all(move: Callable[[int], int], size: int) -> None:
        done = 0
        while done < size:
            try:
                moved = move(done)
            except OSError as error:
                raise DiskError(f"the temporary file of the edited weights failed ({error.strerror})") from None
            if not moved:
                raise DiskError("the temporary file of the edited weights was cut short by someone else")
            done += moved


@dataclass
class EditedReader:
    """A Reader that gives `edits` instead of the source's tensors."""

    source: Reader
    shelf: Shelf
    edits: Edits = field(default_factory=dict)

    @property
    def config(self) -> MixtralConfig:
        return self.source.config

    def slots(self) -> Iterator[Slot]:
        return self.source.slots()

    def spec(self, slot: Slot) -> Spec:
        return self.source.spec(slot)

    def read(self, slot: Slot) -> Tensor:
        place = self.edits.get(slot)
        return self.source.read(slot) if place is None else self.shelf.get(place)
