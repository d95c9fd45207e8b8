"""Cursor: a place in the header of a GGUF, which moves on only where the file has the bytes."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FormatError
from .source import Source

MAX_HEADER = 64_000_000  # four times what the largest vocabularies take
_CHUNK = 1 << 20


class Cursor:
    """The file's first bytes, fetched as far as they are needed, and the key or tensor that is being read."""

    def __init__(self, source: Source) -> None:
        self.source, self.at = source, 0
        self.key: str | None = None
        self.tensor: str | None = None
        self._data = b""

    def refuse(self, why: str, **found: object) -> FormatError:
        """An error that names where the cursor is."""
        if self.key is not None:
            key = self.key if len(self.key) <= 200 else self.key[:197] + "..."
            why = f"key {key}: {why}"
        return FormatError(why, file=self.source.label, tensor=self.tensor, **found)

    def skip(self, size: int) -> int:
        """Step over bytes, which the file must have; returns where they start. Raises FormatError."""
        start = self.at
        if start + size > len(self._data):
            self._fetch(start + size)
        self.at = start + size
        return start

    def take(self, size: int) -> bytes:
        start = self.skip(size)
        return self._data[start : self.at]

    def unpack(self, letters: str) -> tuple[Any, ...]:
        """Little-endian values of these letters of the struct module."""
        start = self.skip(struct.calcsize(f"<{letters}"))
        return struct.unpack_from(f"<{letters}", self._data, start)

    def array(self, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
        """So many values of one dtype."""
        start = self.skip(count * dtype.itemsize)
        return np.frombuffer(self._data, dtype, count, start)

    def strings(self, count: int) -> list[str]:
        """So many strings, their lengths before them; bytes that are no UTF-8 are kept by surrogateescape."""
        length = struct.Struct("<Q").unpack_from
        found = []
        at, data = self.at, self._data
        for _ in range(count):
            if at + 8 > len(data):
                data = self._fetch(at + 8)
            end = at + 8 + length(data, at)[0]
            if end > len(data):
                data = self._fetch(end)
            found.append(data[at + 8 : end].decode("utf-8", "surrogateescape"))
            at = end
        self.at = at
        return found

    def _fetch(self, end: int) -> bytes:
        """Have the file's bytes as far as `end`, and some more. Raises FormatError where there are none."""
        size = self.source.size
        if end > size:
            raise self.refuse("is truncated within its header", expected=f"at least {end} bytes", found=size)
        if end > MAX_HEADER:
            raise self.refuse(f"makes the header longer than {MAX_HEADER} bytes, which no model needs")
        have = len(self._data)
        self._data += self.source.read(have, min(max(end, 2 * have, _CHUNK), size, MAX_HEADER) - have)
        return self._data
