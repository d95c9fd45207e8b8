"""GGUF files put together by hand, right or wrong, and what gguf's own writer makes of the same."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np

from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import TYPES, Header, read_header
from mixtools.storage.gguf_values import Kind, Metadata, Value
from mixtools.storage.plan import Plan, Shape
from mixtools.storage.source import Source

# one value of each kind, at an end of its range
SCALARS = {
    Kind.UINT8: 255, Kind.INT8: -128, Kind.UINT16: 65_535, Kind.INT16: -32_768, Kind.UINT32: 4_294_967_295,
    Kind.INT32: -2_147_483_648, Kind.FLOAT32: 0.10000000149011612, Kind.BOOL: True, Kind.STRING: "Grüße, 世界 🙂\0\n",
    Kind.UINT64: 18_446_744_073_709_551_615, Kind.INT64: -9_223_372_036_854_775_808, Kind.FLOAT64: 0.1,
}  # fmt: skip
EVERY_KIND: Metadata = {
    **{f"one.{kind.name}": Value(kind, value) for kind, value in SCALARS.items()},
    **{f"two.{kind.name}": Value(Kind.ARRAY, [value, type(value)()], kind) for kind, value in SCALARS.items()},
}
SHAPES: Sequence[Shape] = [
    ("vector", DType.F32, (5,)), ("matrix", DType.Q4_K, (3, 512)), ("experts", DType.Q8_0, (2, 3, 32)),
    ("four", DType.BF16, (2, 1, 3, 7)),
]  # fmt: skip


def text(raw: bytes | str) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw)) + raw


def pair(key: bytes | str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def array(key: bytes | str, item: int, count: int, values: bytes = b"") -> bytes:
    return pair(key, Kind.ARRAY, struct.pack("<IQ", item, count) + values)


def tensor(name: bytes | str = "t", dims: Sequence[int] = (8,), number: int = 0, offset: int = 0) -> bytes:
    """A record with its dimensions in the format's order."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def file(
    pairs: Sequence[bytes] = (), tensors: Sequence[bytes] = (), data: bytes = b"", *, magic: bytes = b"GGUF",
    version: int = 3, counts: tuple[int, int] | None = None, alignment: int = 32,
) -> bytes:  # fmt: skip
    """`counts`: of tensors and keys, where they are not to be right."""
    head = magic + struct.pack("<IQQ", version, *(counts or (len(tensors), len(pairs))))
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data if data else head


class Memory(Source):
    """Bytes in the place of a file: ten times as fast to make."""

    def __init__(self, raw: bytes, label: str = "memory") -> None:
        self.label, self._raw, self._files, self._maps = label, raw, [], {}

    @property
    def size(self) -> int:
        return len(self._raw)

    def read_into(self, offset: int, view: memoryview) -> None:
        view[:] = self._raw[offset : offset + len(view)]


def read(path: Path, raw: bytes) -> Header:
    path.write_bytes(raw)
    return read_header(Source(path))


def data_of(name: str, dtype: DType, shape: Sequence[int]) -> bytes:
    """Bytes that differ from tensor to tensor."""
    return np.random.default_rng(len(name)).bytes(dtype.nbytes(shape))


def written(plan: Plan) -> dict[str, bytes]:
    """The files of a plan, as an output would hold them."""
    files = {file.name: bytearray(file.size) for file in plan.files}
    for file in plan.files:
        files[file.name][: len(file.head)] = file.head
    for name, placed in plan.tensors.items():
        raw = data_of(name, placed.dtype, placed.shape)
        files[placed.file][placed.offset : placed.offset + len(raw)] = raw
    assert all(len(files[file.name]) == file.size for file in plan.files)
    return {name: bytes(raw) for name, raw in files.items()}


def written_by_gguf(
    folder: Path, name: str, metadata: Metadata, tensors: Sequence[Shape], *, alignment: int = 32, split: int = 0
) -> dict[str, bytes]:
    """The same by gguf's GGUFWriter, `split` being its largest size of a part."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(folder / f"{name}.gguf", "x", split_max_size=split)
    writer.kv_data[0].clear()  # of the architecture that it puts first
    writer.data_alignment = alignment
    for key, value in metadata.items():
        item = None if value.item is None else gguf.GGUFValueType(value.item)
        writer.add_key_value(key, value.value, gguf.GGUFValueType(value.kind), item)
    for tensor_name, dtype, shape in tensors:
        raw = np.frombuffer(data_of(tensor_name, dtype, shape), np.uint8)
        rows = raw.reshape(*shape[:-1], dtype.row_bytes(shape[-1]))
        writer.add_tensor(tensor_name, rows, raw_dtype=gguf.GGMLQuantizationType(TYPES[dtype]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {path.name: path.read_bytes() for path in folder.iterdir()}
