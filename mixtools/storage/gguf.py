"""Headers of GGUF files, read with suspicion and written with planned offsets.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; type numbers: ggml.h of
https://github.com/ggml-org/llama.cpp. A file is: magic, version, the counts of tensors and keys, the metadata, one
record a tensor, and the tensors' bytes, each starting at a multiple of the alignment.
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import FormatError
from . import lfs
from .dtypes import GGML, DType
from .gguf_cursor import Cursor
from .gguf_values import Kind, Metadata, Value, uint32
from .source import Source
from .store import Entry

MAGIC = b"GGUF"
VERSION = 3
ALIGNMENT = "general.alignment"
MAX_KEYS = MAX_TENSORS = 100_000  # sixty times the tensors of 8x22B, one for each expert
MAX_ITEMS = 4_000_000  # in all arrays: three times the largest vocabularies; each costs up to 100 bytes of memory
MAX_KEY = 65_535  # bytes, as the format says
MAX_NAME = 63  # bytes of a tensor's name, all that llama.cpp has room for
MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT, _MAX_ALIGNMENT = 32, 1 << 20
_LEAST_KEY, _LEAST_TENSOR = 14, 33  # bytes of the shortest records there are

TYPES: Mapping[DType, int] = GGML
_DTYPES = {number: dtype for dtype, number in TYPES.items()}
_GONE, _INNER, _OTHERS = "which ggml gave up in 2023", "which ggml has only while it computes", "which is not read here"
_Q4_0, _IQ4_NL = (f"which ggml gave up in 2024; fetch the same model in {name}" for name in ("Q4_0", "IQ4_NL"))
_LACKING = {  # what ggml had or has and this program has not
    4: ("Q4_2", _GONE), 5: ("Q4_3", _GONE), 9: ("Q8_1", _INNER), 15: ("Q8_K", _INNER),
    31: ("Q4_0_4_4", _Q4_0), 32: ("Q4_0_4_8", _Q4_0), 33: ("Q4_0_8_8", _Q4_0),
    34: ("TQ1_0", _OTHERS), 35: ("TQ2_0", _OTHERS),
    36: ("IQ4_NL_4_4", _IQ4_NL), 37: ("IQ4_NL_4_8", _IQ4_NL), 38: ("IQ4_NL_8_8", _IQ4_NL),
    40: ("NVFP4", _OTHERS), 41: ("Q1_0", _OTHERS), 42: ("Q2_0", _OTHERS),
}  # fmt: skip
_LETTERS = {  # of struct and numpy
    Kind.UINT8: "B", Kind.INT8: "b", Kind.UINT16: "H", Kind.INT16: "h", Kind.UINT32: "I", Kind.INT32: "i",
    Kind.FLOAT32: "f", Kind.BOOL: "?", Kind.UINT64: "Q", Kind.INT64: "q", Kind.FLOAT64: "d",
}  # fmt: skip
_STARTS = {  # of what came before GGUF, as the bytes lie in the file
    b"lmgg": "ggml", b"fmgg": "ggmf", b"tjgg": "ggjt", b"algg": "ggla",
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """What stands before the tensors' bytes; metadata and entries in the file's order."""

    version: int
    metadata: dict[str, Value]
    entries: list[Entry]
    alignment: int


def read_header(source: Source) -> Header:
    """The metadata and the tensors of one file; shapes are row-major, so the format's own dimensions reversed.

    Strings that are no UTF-8 keep their bytes as Python's surrogateescape does. Holes between tensors and bytes behind
    the last are let be: nothing reads them, and writers differ in whether the last tensor is padded. Raises FormatError
    for every other violation of the format, naming the key or the tensor where there is one.
    """
    cursor = Cursor(source)
    version = _version(cursor)
    count_tensors, count_keys = cursor.unpack("QQ")
    for what, count, least, most in (
        ("tensors", count_tensors, _LEAST_TENSOR, MAX_TENSORS), ("keys", count_keys, _LEAST_KEY, MAX_KEYS)
    ):  # fmt: skip
        if count * least > source.size - cursor.at:
            raise cursor.refuse(f"claims {count} {what}, more than its {source.size} bytes can hold")
        if count > most:
            raise cursor.refuse(f"claims {count} {what}, which no model needs")
    metadata = _read_metadata(cursor, count_keys)
    alignment = alignment_of(metadata, source.label)
    records = [_read_tensor(cursor) for _ in range(count_tensors)]
    start = padded(cursor.at, alignment)
    entries = [Entry(name, dtype, shape, source, start + offset) for name, dtype, shape, offset in records]
    _expect_unique((entry.name for entry in entries), source.label)
    _expect_room(entries, start, alignment, source)
    return Header(version, metadata, entries, alignment)


def encode_header(
    metadata: Metadata, tensors: Sequence[tuple[str, DType, tuple[int, ...]]]
) -> tuple[bytes, tuple[int, ...]]:
    """The header, padded to the metadata's alignment, and where each tensor's bytes start in the file.

    Raises FormatError for what the format cannot hold.
    """
    check_tensors(tensors)
    alignment = alignment_of(metadata)
    head = bytearray(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
    for key, value in metadata.items():
        head += _encode_key(key) + struct.pack("<I", value.kind) + _encode_value(key, value)
    offset, offsets = 0, []
    for name, dtype, shape in tensors:
        head += _prefixed(name.encode())
        head += struct.pack(f"<I{len(shape)}QIQ", len(shape), *reversed(shape), TYPES[dtype], offset)
        offsets.append(offset)
        offset += padded(dtype.nbytes(shape), alignment)
    head += bytes(-len(head) % alignment)
    return bytes(head), tuple(len(head) + offset for offset in offsets)


def check_tensors(tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> None:
    """Raises FormatError for a tensor that the format cannot hold, and for a name that stands twice."""
    for name, dtype, shape in tensors:
        _expect_dimensions(name, len(shape))
        _expect_shape(name, shape)
        if dtype not in TYPES:
            raise FormatError(f"GGUF has no {dtype.value}", tensor=name)
        _expect_whole_blocks(name, dtype, shape)
        if not _is_unicode(name):
            raise FormatError("a name that is not Unicode", tensor=name)
        if not 0 < (size := len(name.encode())) <= MAX_NAME:
            raise FormatError(f"a name of {size} bytes; llama.cpp reads 1 to {MAX_NAME}", tensor=name)
    _expect_unique(name for name, _, _ in tensors)


def alignment_of(metadata: Metadata, file: str | None = None) -> int:
    """The alignment that metadata tell of. Raises FormatError for one that the format does not allow."""
    value = metadata.get(ALIGNMENT, uint32(_DEFAULT_ALIGNMENT))
    if value.kind is not Kind.UINT32:
        raise FormatError(f"{ALIGNMENT} is not of the kind uint32 but {value.kind.name.lower()}", file=file)
    alignment = int(value.value)
    if not 8 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise FormatError(f"{ALIGNMENT} is {alignment}, not a power of two of 8 to {_MAX_ALIGNMENT}", file=file)
    return alignment


def padded(size: int, alignment: int) -> int:
    """The next multiple of the alignment."""
    return size + -size % alignment


def _version(cursor: Cursor) -> int:
    source = cursor.source
    start = source.read(0, min(source.size, len(lfs.START)))
    lfs.refuse(start, source.label)
    magic = start[:4]
    if (old := _STARTS.get(magic) or _STARTS.get(magic[::-1])) is not None:
        raise cursor.refuse(f"is of the format {old}, from before GGUF (August 2023); convert the model anew")
    if magic == MAGIC[::-1]:
        raise cursor.refuse("is a big-endian GGUF; convert it with `gguf-convert-endian` of the gguf package")
    if start.lstrip()[:1] == b"<":  # what a browser's address of a file gives instead of the file
        raise cursor.refuse("is a web page, not the file itself; fetch it again")
    if len(magic) == 4 and magic != MAGIC:
        raise cursor.refuse(f"begins with {magic!r}, not with {MAGIC!r}: not a GGUF file")
    cursor.skip(4)
    (version,) = cursor.unpack("I")
    if version and version & 0xFFFF == 0:
        raise cursor.refuse("is a big-endian GGUF; convert it with `gguf-convert-endian` of the gguf package")
    if version == 1:
        raise cursor.refuse("is GGUF version 1 (32-bit counts), which nothing reads any more; convert the model anew")
    if version not in (2, VERSION):
        raise cursor.refuse(f"is GGUF version {version}; known are 2 and {VERSION}")
    return int(version)


def _read_metadata(cursor: Cursor, count: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    room = MAX_ITEMS
    for _ in range(count):
        key = _read_key(cursor)
        if key in metadata:
            raise cursor.refuse("stands twice")
        kind = _read_kind(cursor)
        if kind is not Kind.ARRAY:
            metadata[key] = Value(kind, _read_values(cursor, kind, 1)[0])
        else:
            item = _read_kind(cursor)
            (length,) = cursor.unpack("Q")
            if item is Kind.ARRAY:
                raise cursor.refuse("is an array of arrays, which no writer makes and llama.cpp refuses")
            if (room := room - length) < 0:
                raise cursor.refuse(f"brings the arrays' values to more than {MAX_ITEMS}, which no model needs")
            metadata[key] = Value(kind, _read_values(cursor, item, length), item)
        cursor.key = None
    return metadata


def _read_key(cursor: Cursor) -> str:
    (size,) = cursor.unpack("Q")
    if not 0 < size <= MAX_KEY:
        raise cursor.refuse(f"a key of {size} bytes; the format allows 1 to {MAX_KEY}")
    raw = cursor.take(size)
    try:
        cursor.key = raw.decode()
    except UnicodeDecodeError:
        raise cursor.refuse(f"a key that is not UTF-8: {raw[:40]!r}") from None
    return cursor.key


def _read_kind(cursor: Cursor) -> Kind:
    (number,) = cursor.unpack("I")
    try:
        return Kind(number)
    except ValueError:
        raise cursor.refuse(f"is of the kind {number}; known are 0 to {max(Kind)}") from None


def _read_values(cursor: Cursor, kind: Kind, count: int) -> list[Any]:
    if kind is Kind.STRING:
        return cursor.strings(count)
    letter = "B" if kind is Kind.BOOL else _LETTERS[kind]
    values = cursor.array(np.dtype(f"<{letter}"), count)
    if kind is Kind.BOOL:
        if count and values.max() > 1:
            raise cursor.refuse(f"a truth value is {values.max()}, neither 0 nor 1")
        values = values.astype(bool)
    found: list[Any] = values.tolist()
    return found


def _read_tensor(cursor: Cursor) -> tuple[str, DType, tuple[int, ...], int]:
    """Name, dtype, shape, and offset from the first tensor's bytes."""
    (size,) = cursor.unpack("Q")
    if not 0 < size <= MAX_KEY:
        raise cursor.refuse(f"a tensor's name of {size} bytes")
    raw = cursor.take(size)
    try:
        name = cursor.tensor = raw.decode()
    except UnicodeDecodeError:
        raise cursor.refuse(f"a tensor's name that is not UTF-8: {raw[:40]!r}") from None
    (dimensions,) = cursor.unpack("I")
    _expect_dimensions(name, dimensions, cursor.source.label)
    *reverse, number, offset = cursor.unpack(f"{dimensions}QIQ")
    shape = tuple(reverse[::-1])
    _expect_shape(name, shape, cursor.source.label)
    if (dtype := _DTYPES.get(number)) is None:
        lacking, why = _LACKING.get(number, (f"number {number}", "which is not known"))
        raise cursor.refuse(f"is of the type {lacking}, {why}")
    _expect_whole_blocks(name, dtype, shape, cursor.source.label)
    cursor.tensor = None
    return name, dtype, shape, offset


def _expect_dimensions(name: str, count: int, file: str | None = None) -> None:
    if not 0 < count <= MAX_DIMENSIONS:
        raise FormatError(f"has {count} dimensions; GGUF allows 1 to {MAX_DIMENSIONS}", file=file, tensor=name)


def _expect_shape(name: str, shape: Sequence[int], file: str | None = None) -> None:
    if min(shape) < 1:
        raise FormatError(f"shape {list(shape)} holds nothing", file=file, tensor=name)
    if 8 * math.prod(shape) >= 1 << 63:  # no element has more than 8 bytes
        raise FormatError(f"shape {list(shape)} overflows 63 bits", file=file, tensor=name)


def _expect_whole_blocks(name: str, dtype: DType, shape: Sequence[int], file: str | None = None) -> None:
    try:
        dtype.row_bytes(shape[-1])
    except ValueError as error:
        raise FormatError(str(error), file=file, tensor=name) from None


def _expect_unique(names: Iterable[str], file: str | None = None) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise FormatError("stands twice in the header", file=file, tensor=name)
        seen.add(name)


def _expect_room(entries: Sequence[Entry], start: int, alignment: int, source: Source) -> None:
    """Each tensor aligned, within the file, and over no other."""

    def refuse(why: str, entry: Entry, expected: object = None, found: object = None) -> FormatError:
        return FormatError(why, file=source.label, tensor=entry.name, expected=expected, found=found)

    total = sum(padded(entry.nbytes, alignment) for entry in entries)
    ordered = sorted(entries, key=lambda entry: entry.offset)
    for entry in ordered:
        offset = entry.offset - start
        if offset % alignment:
            raise refuse(f"offset {offset} is no multiple of the alignment, {alignment}", entry)
        if entry.offset >= source.size and offset + entry.nbytes > total:  # not even all others lie before it
            raise refuse(f"offset {offset} lies past the end of the file", entry)
    for before, entry in itertools.pairwise(ordered):
        if entry.offset < before.offset + before.nbytes:
            found = entry.offset
            raise refuse(f"overlaps {before.name}", entry, f"at least {before.offset + before.nbytes}", found)
    for entry in ordered:
        if entry.offset + entry.nbytes > source.size:
            last = ordered[-1]
            raise refuse("is truncated", entry, f"{last.offset + last.nbytes} bytes", source.size)


def _encode_key(key: str) -> bytes:
    if not _is_unicode(key):
        raise FormatError(f"key {key}: is not Unicode")
    raw = key.encode()
    if not 0 < len(raw) <= MAX_KEY:
        raise FormatError(f"a key of {len(raw)} bytes; the format allows 1 to {MAX_KEY}")
    return _prefixed(raw)


def _encode_value(key: str, value: Value) -> bytes:
    if value.kind is not Kind.ARRAY:
        return _encode_values(key, value.kind, [value.value])
    if value.item is None or value.item is Kind.ARRAY:
        raise FormatError(f"key {key}: an array needs a kind of its items, and not array")
    return struct.pack("<IQ", value.item, len(value.value)) + _encode_values(key, value.item, value.value)


def _encode_values(key: str, kind: Kind, values: Sequence[Any]) -> bytes:
    try:
        if kind is Kind.STRING:
            return b"".join([_prefixed(value.encode(errors="surrogateescape")) for value in values])
        if kind is Kind.BOOL and not all(isinstance(value, bool) for value in values):
            raise TypeError("not True or False")
        return struct.pack(f"<{len(values)}{_LETTERS[kind]}", *values)
    except (AttributeError, OverflowError, TypeError, UnicodeEncodeError, struct.error) as error:
        raise FormatError(f"key {key}: cannot be stored as {kind.name.lower()} ({error})") from None


def _prefixed(raw: bytes) -> bytes:
    return struct.pack("<Q", len(raw)) + raw


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= char <= "\udfff" for char in text)
