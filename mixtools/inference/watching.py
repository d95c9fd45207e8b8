"""A reader that tells how much of a model has been loaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

from ..formats import Packed
from ..layouts.reader import Reader
from ..names import Slot
from ..progress import Progress
from .blocks import Storing

Found = TypeVar("Found")


class _Watched:
    """A reader that tells what was read of it: `size` of a slot is the bytes that it takes in memory."""

    def __init__(self, reader: Reader, progress: Progress, size: Callable[[Slot], int]) -> None:
        self.config, self.slots, self.spec = reader.config, reader.slots, reader.spec
        self._reader, self._progress, self._size = reader, progress, size
        progress.start("loading", sum(map(size, reader.slots())))

    def read(self, slot: Slot) -> Tensor:
        return self._told(slot, self._reader.read(slot))

    def _told(self, slot: Slot, found: Found) -> Found:
        self._progress.advance(self._size(slot))
        return found


class _WatchedStore(_Watched):
    """One that gives matrices as they are stored, too."""

    def __init__(self, reader: Storing, progress: Progress, size: Callable[[Slot], int]) -> None:
        super().__init__(reader, progress, size)
        self.format, self._packed = reader.format, reader.packed

    def packed(self, slot: Slot) -> Packed:
        return self._told(slot, self._packed(slot))


def watched(reader: Reader, progress: Progress | None, size: Callable[[Slot], int]) -> Reader:
    """The reader itself where nobody wants to know."""
    if progress is None:
        return reader
    return _WatchedStore(reader, progress, size) if isinstance(reader, Storing) else _Watched(reader, progress, size)
