"""Importance matrices: for each tensor the sums of its squared inputs, as llama.cpp's programs write and read them.

    GGUF form    general.type "imatrix", imatrix.datasets, imatrix.chunk_count, imatrix.chunk_size; for each tensor, in
                 the order of their names, F32 NAME.in_sum2 [experts, columns] and NAME.counts [experts, 1]
    .dat form    int32 entries; for each int32 length and name, int32 calls, int32 values, and the values: means times
                 calls, experts side by side. Then, since 2024, int32 chunks, int32 length and name of the text

Both little-endian. An encoder takes sums over counts, and ones for an expert that no token came to, whose sums say
nothing. Files of before April 2024 name a tensor for each expert; they are read as stacked. Source:
tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp and tools/quantize/quantize.cpp in
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...config import MixtralConfig
from ...errors import FormatError, TensorError
from ...layouts.gguf import GGUF, GGUF_2023
from ...layouts.gguf_config import IMATRIX, text
from ...names import EXPERT
from ...storage import gguf
from ...storage.dtypes import DType
from ...storage.gguf_values import Kind, Metadata, string, uint32
from ...storage.gguf_values import array as array_of
from ...storage.source import Source

Floats = npt.NDArray[np.float32]

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024
_MOST_EXPERTS = 512  # that llama.cpp knows
_DATASETS, _CHUNKS, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_KEYS = {_DATASETS: (Kind.ARRAY, Kind.STRING), _CHUNKS: (Kind.UINT32, None), _CHUNK_SIZE: (Kind.UINT32, None)}
_OF_AN_EXPERT = {
    role: re.compile(re.sub(r"\\{(layer|expert)\\}", "(0|[1-9][0-9]*)", re.escape(GGUF_2023.rules[role].name)))
    for role in EXPERT
}
_ANOTHER = "is this the importance matrix of another model?"


@dataclass(frozen=True)
class Importance:
    """By GGUF's name of a tensor ("blk.0.ffn_gate_exps.weight"): `sums` [experts or 1, columns] of its squared inputs,
    and `counts` [experts or 1], how many were summed.

    From the .dat form the experts' sums lie in one row, counts are calls and not tokens, and `chunk_size` is 0.
    """

    sums: Mapping[str, Floats]
    counts: Mapping[str, Floats]
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    file: Path | None = None

    def weights(self, name: str, expert: int | None, columns: int) -> Floats | None:
        """What each column of a tensor, or of one expert in it, weighs: [columns], mean squares of its inputs.

        Ones where no token came to the expert, None where the tensor has no entry: both as llama-quantize has it.
        Raises TensorError for an entry of another size.
        """
        if name not in self.sums:
            return None
        sums, counts = self.sums[name], self.counts[name]
        experts, rest = divmod(sums.size, columns)
        fits = sums.size == columns if expert is None else rest == 0 and expert < experts
        if not fits or (len(counts) > 1 and len(counts) != experts):
            wanted = f"{columns} columns" if expert is None else f"{columns} columns of expert {expert}"
            raise self._misfit(name, wanted)
        row = sums.reshape(experts, columns)[expert or 0]
        count = counts[expert or 0] if len(counts) > 1 else counts[0]
        return row / count if count > 0 else np.ones(columns, np.float32)

    def expect_model(self, config: MixtralConfig) -> None:
        """Raises TensorError for an entry that is not of a model of this shape."""
        places = {GGUF.piece(slot, config).name: slot for slot in config.slots()}
        for name, sums in self.sums.items():
            if name not in places:
                raise TensorError(f"the model has no such tensor; {_ANOTHER}", file=self.file, tensor=name)
            slot = places[name]
            experts, columns = 1 if slot.expert is None else config.num_experts, config.shape(slot.role)[-1]
            if sums.size != experts * columns or len(self.counts[name]) not in (1, experts):
                raise self._misfit(name, f"{columns} columns" + (f" of {experts} experts" if experts > 1 else ""))

    def _misfit(self, name: str, wanted: str) -> TensorError:
        rows, columns = self.sums[name].shape
        found = f"{columns} columns" + (f" of {rows} experts" if rows > 1 else "")
        return TensorError(f"wrong size; {_ANOTHER}", file=self.file, tensor=name, expected=wanted, found=found)


# --- reading ---


def read(path: Path) -> Importance:
    """Either form. Raises FormatError for a file that is none or is damaged, TensorError for an entry that cannot be,
    InputError for one that cannot be opened.
    """
    source = Source(path)
    try:
        if source.size >= len(gguf.MAGIC) and source.read(0, len(gguf.MAGIC)) == gguf.MAGIC:
            return _read_gguf(source, path)
        return _read_dat(source, path)
    finally:
        source.close()


def _read_gguf(source: Source, path: Path) -> Importance:
    header = gguf.read_header(source)
    if text(header.metadata, "general.type") != IMATRIX:
        raise FormatError("is a GGUF file, but no importance matrix (its general.type is another)", file=path)
    datasets, chunks, chunk_size = (_value(header.metadata, key, path) for key in _KEYS)
    found: dict[str, dict[str, Floats]] = {_SUMS: {}, _COUNTS: {}}
    for entry in header.entries:
        suffix = next((suffix for suffix in found if entry.name.endswith(suffix)), None)
        if suffix is None:
            raise FormatError(f"is neither {_SUMS[1:]} nor {_COUNTS[1:]}", file=path, tensor=entry.name)
        if entry.dtype is not DType.F32:
            raise TensorError("wrong dtype", file=path, tensor=entry.name, expected="F32", found=entry.dtype.value)
        values = np.frombuffer(source.read(entry.offset, entry.nbytes), "<f4").astype(np.float32)
        found[suffix][entry.name.removesuffix(suffix)] = values.reshape(entry.shape)
    sums, counts = found[_SUMS], found[_COUNTS]
    if not sums:
        raise FormatError("is an importance matrix without an entry", file=path)
    for name in sorted(sums.keys() ^ counts.keys()):
        lacking = _COUNTS if name in sums else _SUMS
        raise FormatError(f"lacks its {lacking[1:]}", file=path, tensor=name)
    for name, array in sums.items():
        rows = math.prod(array.shape[:-1])
        # those of one count may be experts side by side: what llama-imatrix makes of the .dat form
        if not array.size or counts[name].size not in (1, rows):
            raise TensorError("wrong number of counts", file=path, tensor=name, expected=rows, found=counts[name].size)
        sums[name], counts[name] = array.reshape(counts[name].size, -1), np.rint(counts[name].reshape(-1))
    return _checked(Importance(sums, counts, tuple(datasets), chunks, chunk_size, path))


def _value(metadata: Metadata, key: str, path: Path) -> Any:
    found = metadata.get(key)
    if found is None or (found.kind, found.item) != _KEYS[key]:
        raise FormatError(f"is an importance matrix without {key}; llama-quantize refuses it, too", file=path)
    return found.value


def _read_dat(source: Source, path: Path) -> Importance:
    at = 0

    def take(size: int, what: str) -> bytes:
        nonlocal at
        if not 0 <= size <= source.size - at:
            raise FormatError(f"is no importance matrix, or a damaged one: {what} does not fit in the file", file=path)
        at += size
        return source.read(at - size, size)

    def number(what: str) -> int:
        return int(struct.unpack("<i", take(4, what))[0])

    entries = number("the number of entries")
    if entries < 1:
        raise FormatError("is no importance matrix, or a damaged one: it has no entries", file=path)
    sums: dict[str, Floats] = {}
    counts: dict[str, Floats] = {}
    for index in range(entries):
        place = f"entry {index + 1} of {entries}"
        length = number(f"the name of {place}")
        name = _name(take(length if length <= _LONGEST_NAME else -1, f"the name of {place}"), path)
        calls, size = number(f"{name}'s calls"), number(f"{name}'s size")
        if name in sums:
            raise FormatError("is there twice", file=path, tensor=name)
        if size < 1 or calls < 0:
            raise FormatError(f"{size} values from {calls} calls cannot be", file=path, tensor=name)
        sums[name] = np.frombuffer(take(4 * size, name), "<f4").astype(np.float32)[None]
        counts[name] = np.array([max(calls, 1)], np.float32)  # of no calls llama-quantize takes the values as they are
    chunks = 0
    datasets: tuple[str, ...] = ()
    if at < source.size:
        chunks = number("the number of chunks")
        if chunks < 0:
            raise FormatError(f"is damaged: {chunks} chunks cannot be", file=path)
        dataset = _name(take(number("the text's name"), "the text's name"), path)
        datasets = (dataset,) if dataset else ()
    if at < source.size:
        raise FormatError(f"is damaged: {source.size - at} bytes are left over behind the entries", file=path)
    return _checked(Importance(sums, counts, datasets, chunks, 0, path))


def _name(data: bytes, path: Path) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise FormatError("is no importance matrix, or a damaged one: a name is not UTF-8", file=path) from None


def _checked(found: Importance) -> Importance:
    """With experts stacked. Raises TensorError for numbers that no sums of squares and no counts can be."""
    for what, arrays in (("sums", found.sums), ("counts", found.counts)):
        for name, array in arrays.items():
            if not (good := np.isfinite(array) & (array >= 0)).all():
                wrong = array[~good][0]
                raise TensorError(f"holds {wrong} among its {what}, which cannot be", file=found.file, tensor=name)
    sums, counts = _stacked(found)
    return Importance(sums, counts, found.datasets, found.chunks, found.chunk_size, found.file)


def _stacked(found: Importance) -> tuple[dict[str, Floats], dict[str, Floats]]:
    """Entries of a tensor for each expert as those of one: an expert that is not there has a count of 0."""
    sums: dict[str, Floats] = {}
    counts: dict[str, Floats] = {}
    parts: dict[str, dict[int, str]] = {}
    for name in found.sums:
        whole, expert = _place(name)
        if expert is None:
            sums[name], counts[name] = found.sums[name], found.counts[name]
        else:
            parts.setdefault(whole, {})[expert] = name
    for whole, names in parts.items():
        shapes = {found.sums[name].shape for name in names.values()}
        experts, (rows, columns) = 1 + max(names), min(shapes)
        if whole in sums or experts > _MOST_EXPERTS or len(shapes) > 1 or rows > 1:
            raise TensorError("has entries of its experts that contradict each other", file=found.file, tensor=whole)
        sums[whole] = np.zeros((experts, columns), np.float32)
        counts[whole] = np.zeros(experts, np.float32)
        for expert, name in names.items():
            sums[whole][expert], counts[whole][expert] = found.sums[name][0], found.counts[name][0]
    return sums, counts


def _place(name: str) -> tuple[str, int | None]:
    """The stacked tensor that an expert's own is a part of, and its number; or the name as it is, and None."""
    for role, pattern in _OF_AN_EXPERT.items():
        if found := pattern.fullmatch(name):
            layer, expert = map(int, found.groups())
            return GGUF.rules[role].name.format(layer=layer), expert
    return name, None


# --- writing ---


def encode(importance: Importance) -> bytes:
    """The GGUF form, as llama-imatrix writes it. Raises FormatError for names that it cannot hold."""
    shapes = {name: (sums.shape[0], sums.shape[1]) for name, sums in importance.sums.items()}
    head, offsets, size = _plan(shapes, importance.datasets, importance.chunks, importance.chunk_size)
    data = bytearray(size)
    data[: len(head)] = head
    parts = [part for name in _ordered(shapes) for part in (importance.sums[name], importance.counts[name])]
    for part, offset in zip(parts, offsets, strict=True):
        raw = part.astype("<f4").tobytes()
        data[offset : offset + len(raw)] = raw
    return bytes(data)


def encoded_bytes(shapes: Mapping[str, tuple[int, int]], datasets: Sequence[str]) -> int:
    """Size of the file of sums [experts or 1, columns]."""
    return _plan(shapes, datasets, 0, 0)[2]


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(names, key=str.encode)


def _plan(
    shapes: Mapping[str, tuple[int, int]], datasets: Sequence[str], chunks: int, chunk_size: int
) -> tuple[bytes, tuple[int, ...], int]:
    """The header, where each array starts, and the file's size: the last array, too, is padded."""
    metadata = {
        "general.type": string(IMATRIX), _DATASETS: array_of(Kind.STRING, datasets),
        _CHUNKS: uint32(chunks), _CHUNK_SIZE: uint32(chunk_size),
    }  # fmt: skip
    tensors: list[tuple[str, DType, tuple[int, ...]]] = []
    for name in _ordered(shapes):
        rows, columns = shapes[name]  # ggml leaves out leading dimensions of 1
        tensors.append((name + _SUMS, DType.F32, (rows, columns) if rows > 1 else (columns,)))
        tensors.append((name + _COUNTS, DType.F32, (rows, 1) if rows > 1 else (1,)))
    head, offsets = gguf.encode_header(metadata, tensors)
    alignment = gguf.alignment_of(metadata)
    return head, offsets, len(head) + sum(gguf.padded(dtype.nbytes(shape), alignment) for _, dtype, shape in tensors)
