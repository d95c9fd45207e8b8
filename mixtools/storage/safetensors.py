"""Headers of safetensors files, read with suspicion and written with planned offsets.

Format: https://github.com/huggingface/safetensors#format. The reader is stricter than the library's:
duplicate keys, leading blanks, holes and overlaps are refused, as the format says they must be.
"""

from __future__ import annotations

import json
import reprlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

from ..errors import FormatError
from . import lfs
from .dtypes import ELEMENTS, DType
from .source import Source
from .store import Entry

MAX_HEADER = 100_000_000
_MAX_VALUES = 2_000_000  # in a header: a hundred times 8x22B's; each costs up to 200 bytes of memory
_MAX_DIMENSIONS = 64  # torch's own limit
_DTYPES = {dtype.value: dtype for dtype in ELEMENTS}


def read_header(source: Source) -> list[Entry]:
    """The tensors of one file, in the order of their bytes.

    Raises FormatError for every violation of the format, naming the tensor where there is one.
    """
    if source.size < 8:
        raise FormatError(f"holds {source.size} bytes; a safetensors file has at least 8", file=source.label)
    lfs.refuse(source.read(0, min(source.size, len(lfs.START))), source.label)
    length = int.from_bytes(source.read(0, 8), "little")
    if length > MAX_HEADER:
        raise FormatError(f"header claims {length} bytes; the limit is {MAX_HEADER}", file=source.label)
    if 8 + length > source.size:
        raise FormatError("is truncated within its header", file=source.label, expected=8 + length, found=source.size)
    header = _parse(source.read(8, length), source)
    start = 8 + length
    entries = [_entry(name, info, start, source) for name, info in header.items()]
    return _cover(sorted(entries, key=lambda entry: (entry.offset, entry.nbytes)), start, source)


def encode_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """The header, its length first, padded so that the first tensor starts at a multiple of 8.

    Raises FormatError for a block type, which the format does not know.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape in tensors:
        if dtype not in ELEMENTS:
            raise FormatError(f"safetensors has no {dtype.value}", tensor=name)
        end = offset + dtype.nbytes(shape)
        header[name] = {"dtype": dtype.value, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _parse(raw: bytes, source: Source) -> dict[str, Any]:
    if not raw.startswith(b"{"):
        raise FormatError("header does not start with '{'", file=source.label)
    if sum(map(raw.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise FormatError(f"header holds more than {_MAX_VALUES} values, which no model needs", file=source.label)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise FormatError("key stands twice in the header", file=source.label, tensor=twice)
        return found

    try:
        header = json.loads(raw.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"header is not valid JSON ({error})", file=source.label) from None
    metadata = header.pop("__metadata__", None)
    if metadata is None:  # null is what some writers say for none, and the library takes it
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("__metadata__ is not a map of strings", file=source.label)
    return dict(header)


def _entry(name: str, info: Any, start: int, source: Source) -> Entry:
    def refuse(why: str) -> FormatError:
        return FormatError(why, file=source.label, tensor=name)

    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("header entry has not exactly dtype, shape and data_offsets")
    if any("\ud800" <= char <= "\udfff" for char in name):
        raise refuse("a name that is not Unicode")
    kind, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(kind, str) or (dtype := _DTYPES.get(kind)) is None:
        raise refuse(f"dtype {reprlib.repr(kind)} is not one of {', '.join(_DTYPES)}")
    if not _whole_numbers(shape) or len(shape) > _MAX_DIMENSIONS:
        raise refuse(f"shape {reprlib.repr(shape)} is not a list of whole numbers")
    if not _whole_numbers(offsets) or len(offsets) != 2:
        raise refuse(f"data_offsets {reprlib.repr(offsets)} are not two whole numbers")
    entry = Entry(name, dtype, tuple(shape), source, start + offsets[0])
    if offsets[1] - offsets[0] != entry.nbytes:
        raise FormatError(
            "data_offsets do not fit shape and dtype",
            file=source.label, tensor=name, expected=f"{entry.nbytes} bytes", found=offsets[1] - offsets[0],
        )  # fmt: skip
    return entry


def _whole_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _cover(entries: list[Entry], start: int, source: Source) -> list[Entry]:
    """The tensors must fill the file exactly: no hole, no overlap, nothing behind."""
    at = start
    for entry in entries:
        if entry.offset != at:
            what = "overlaps the one before it" if entry.offset < at else "leaves a hole before it"
            raise FormatError(what, file=source.label, tensor=entry.name, expected=at, found=entry.offset)
        at += entry.nbytes
    if at != source.size:
        last = entries[-1].name if entries else None
        what = "is truncated" if at > source.size else "has bytes behind the last tensor"
        raise FormatError(what, file=source.label, tensor=last, expected=f"{at} bytes", found=source.size)
    return entries
