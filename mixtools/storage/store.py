"""Store: named tensors in files, read row by row, each byte checked against its stored checksum."""

from __future__ import annotations

import math
import threading
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import ChecksumError
from .crc import Ledger
from .dtypes import DType
from .source import Source

if TYPE_CHECKING:
    from torch import Tensor

Bits = npt.NDArray[np.unsignedinteger]  # a tensor's bit patterns, 2-D: [rows, row length]
CHUNK = 4 << 20  # bytes read at once: stays in a core's cache from the read to the checksum to the write


@dataclass(frozen=True)
class Record:
    """A run of bytes with a stored CRC-32: a zip member, or a tensor listed in mixtools.json."""

    offset: int
    size: int
    crc: int


@dataclass(frozen=True)
class Entry:
    """Where a named tensor lies. `strides` in elements, None where the tensor is contiguous."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    source: Source
    offset: int
    strides: tuple[int, ...] | None = None
    record: Record | None = None

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, all leading dimensions flattened; a vector is one row."""
        return self.dtype.row_bytes(self.shape[-1] if self.shape else 1)

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])


@dataclass
class Store:
    """All tensors of a checkpoint by their names on disk."""

    entries: Mapping[str, Entry]
    _ledgers: dict[tuple[str, int], Ledger] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def sources(self) -> list[Source]:
        return list({id(entry.source): entry.source for entry in self.entries.values()}.values())

    def read_rows(self, name: str, start: int, stop: int, out: Bits | None = None) -> Bits:
        """Bit patterns of rows [start, stop) of a tensor, [stop - start, row length].

        `out` is a buffer of that shape to reuse. Raises ChecksumError once all bytes of a record were
        read and do not give its stored checksum; FormatError or InputError if they cannot be read.
        """
        entry = self.entries[name]
        bits = np.dtype(f"u{entry.dtype.word}")
        if entry.strides is not None:
            return self._read_strided(entry, bits)[start:stop]
        array = np.empty((stop - start, entry.row_bytes // bits.itemsize), bits) if out is None else out
        view = as_bytes(array)
        self._read_checked(entry, entry.offset + start * entry.row_bytes, view)
        return array

    def mapped_rows(self, name: str, start: int, stop: int, *, fetch: bool) -> Bits | None:
        """As `read_rows`, not copied but as they lie in their file (Source.mapped), not to be written to; None where
        that cannot be.

        `fetch`: they are read into memory now, one after the other, and not when they are looked at; so are those with
        a checksum in any case. Raises as `read_rows`.
        """
        entry = self.entries[name]
        offset, size = entry.offset + start * entry.row_bytes, (stop - start) * entry.row_bytes
        if entry.strides is not None or (view := entry.source.mapped(offset, size, fetch=fetch)) is None:
            return None
        if entry.record is not None:
            crc = 0
            for at in range(0, size, CHUNK):
                crc = zlib.crc32(view[at : at + CHUNK], crc)
            self._note(entry, entry.record, offset - entry.record.offset, offset - entry.record.offset + size, crc)
        return np.frombuffer(view, f"u{entry.dtype.word}").reshape(stop - start, -1)

    def finish(self, also: Iterable[str] = ()) -> None:
        """Read what no tensor covered of each half-read record, so that its checksum can be judged.

        `also`: tensors whose records are judged even if nothing of them was read here, because an earlier run
        read them in part.
        """
        for name in also:
            if (record := self.entries[name].record) is not None:
                self._ledgers.setdefault(_key(self.entries[name]), Ledger(record.size))
        buffer = memoryview(bytearray(CHUNK))
        for entry in self.entries.values():
            if entry.record is None or (ledger := self._ledgers.get(_key(entry))) is None:
                continue
            for start, stop in ledger.gaps():
                for at in range(start, stop, CHUNK):
                    self._read_checked(entry, entry.record.offset + at, buffer[: min(CHUNK, stop - at)])

    def _read_strided(self, entry: Entry, bits: np.dtype[np.unsignedinteger]) -> Bits:
        """The whole tensor made contiguous; rare enough (transposed parameters in old .bin files)."""
        assert entry.strides is not None
        last = sum((n - 1) * s for n, s in zip(entry.shape, entry.strides, strict=True))
        span = np.empty(0 if 0 in entry.shape else last + 1, bits)
        self._read_checked(entry, entry.offset, as_bytes(span))
        strides = tuple(s * bits.itemsize for s in entry.strides)
        view = np.lib.stride_tricks.as_strided(span, entry.shape, strides, writeable=False)
        whole: Bits = view.copy().reshape(entry.rows, entry.row_bytes // bits.itemsize)
        return whole

    def _read_checked(self, entry: Entry, offset: int, view: memoryview) -> None:
        record = entry.record
        crc = 0
        for at in range(0, len(view), CHUNK):
            chunk = view[at : at + CHUNK]
            entry.source.read_into(offset + at, chunk)
            if record is not None:
                crc = zlib.crc32(chunk, crc)
        if record is not None:
            start = offset - record.offset
            self._note(entry, record, start, start + len(view), crc)

    def _note(self, entry: Entry, record: Record, start: int, stop: int, crc: int) -> None:
        with self._lock:
            key = _key(entry)
            ledger = self._ledgers.setdefault(key, Ledger(record.size))
            ledger.add(start, stop, crc)
            found = crc if stop - start == record.size else ledger.total()
            if found is None:
                return
            self._ledgers.pop(key, None)  # judged; a second reading is judged anew
        if found != record.crc:
            raise ChecksumError(
                f"stored checksum {record.crc:08x}, read {found:08x}; the file is damaged, fetch it again",
                file=entry.source.label,
                tensor=entry.name,
            )


def _key(entry: Entry) -> tuple[str, int]:
    assert entry.record is not None
    return entry.source.label, entry.record.offset


def by_name(entries: Iterable[Entry]) -> dict[str, Entry]:
    return {entry.name: entry for entry in entries}


def to_tensor(bits: Bits, dtype: DType) -> Tensor:
    """Bit patterns as a torch tensor of the same shape, shared, not copied."""
    import torch

    signed = bits.view(f"i{dtype.itemsize}")  # torch knows few unsigned integers
    if signed.flags.writeable:
        return torch.from_numpy(signed).view(dtype.torch())
    with warnings.catch_warnings():  # which it gives once, of a mapped file
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(signed).view(dtype.torch())


def from_tensor(tensor: Tensor) -> Bits:
    """Bit patterns [rows, row length] of a tensor, a vector being one row; shared where it is contiguous on the CPU."""
    import torch

    size = tensor.element_size()
    signed = tensor.detach().cpu().contiguous().view(getattr(torch, f"int{8 * size}")).numpy()
    bits: Bits = signed.view(f"u{size}").reshape(-1, tensor.shape[-1] if tensor.ndim else 1)
    return bits


def as_bytes(bits: Bits) -> memoryview:
    """The bytes of a contiguous array, shared, not copied."""
    return memoryview(bits.reshape(-1).view(np.uint8).data)
