"""SHA-256 of a file while it is written, out of order and on several threads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..errors import OutputError

_BLOCK = 4 << 20


class Digest:
    """Follows what is written into a file: reads it back, from its start on as far as it is whole, on `pool`.

    What was just written is still in memory, so reading back costs a copy. To hash what is in hand instead would need
    an order: of two threads that write side by side only one is where the hash is.
    """

    def __init__(self, file: int, pool: ThreadPoolExecutor) -> None:
        self.file, self.position = file, 0  # all before it is hashed
        self._pool = pool
        self._hash = hashlib.sha256()
        self._lock = threading.Lock()
        self._whole = 0  # all before it is written
        self._apart: dict[int, int] = {}  # start -> end of what lies behind a gap
        self._work: Future[None] | None = None
        self._stopped = False

    def wrote(self, start: int, end: int) -> None:
        """The bytes from `start` to `end` are there, and will not change. Such runs must meet exactly."""
        with self._lock:
            self._apart[start] = end
            before = self._whole
            while (reached := self._apart.pop(self._whole, None)) is not None:
                self._whole = reached
            if self._whole > before and (self._work is None or self._work.done()):
                self._work = self._pool.submit(self._advance)

    def finish(self, size: int) -> str:
        """The digest of all `size` bytes, in hexadecimal. Raises OutputError if some were never told of."""
        if self._work is not None:
            self._work.result()
        self._advance()  # what came while the thread was ending
        if self.position != size:
            raise OutputError(f"was written to byte {self.position} of {size}; nothing is committed")
        return self._hash.hexdigest()

    def stop(self) -> None:
        """Let the thread end soon."""
        self._stopped = True

    def _advance(self) -> None:
        buffer = memoryview(bytearray(_BLOCK))
        while self.position < self._whole and not self._stopped:
            view = buffer[: min(_BLOCK, self._whole - self.position)]
            count = os.preadv(self.file, [view], self.position)
            if count == 0:
                raise OutputError("shrank while it was written")
            self._hash.update(view[:count])
            drop(self.file, self.position, count)
            self.position += count


def drop(file: int, start: int, size: int) -> None:
    """Let the system forget pages, as far as they are on the disk."""
    if hasattr(os, "posix_fadvise"):
        with contextlib.suppress(OSError):
            os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def of_file(path: Path, advance: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read to its end; `advance` is told each run of bytes. Raises OSError."""
    found, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            found.update(buffer[:count])
            if advance is not None:
                advance(count)
    return found.hexdigest()
