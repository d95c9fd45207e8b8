"""Plans of GGUF files: one, or parts as llama-gguf-split makes them, which llama.cpp finds by their names."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import UsageError
from . import gguf
from .gguf_values import Kind, Metadata, Value
from .plan import FilePlan, Plan, Shape, TensorPlan, divide

NUMBER, COUNT, TENSORS = "split.no", "split.count", "split.tensors.count"
_MAX_PARTS = 65_535  # split.count has 16 bits


def gguf_files(name: str, metadata: Metadata, tensors: Sequence[Shape], max_shard_bytes: int | None = None) -> Plan:
    """NAME.gguf, or NAME-00001-of-0000N.gguf and so on where one part of `max_shard_bytes` is not enough.

    The first part holds all metadata, the others only their number, as in llama.cpp. The alignment is the metadata's;
    what they tell of being a part themselves is dropped. Raises FormatError for what the format cannot hold, UsageError
    for parts too small or too many.
    """
    gguf.check_tensors(tensors)
    own = {key: value for key, value in metadata.items() if key not in (NUMBER, COUNT, TENSORS)}
    parts = {f"{name}.gguf": list(tensors)}
    if max_shard_bytes is not None:
        parts = divide(name, "gguf", tensors, max_shard_bytes)
    if len(parts) > _MAX_PARTS:
        raise UsageError(f"parts of {max_shard_bytes} bytes are {len(parts)}; GGUF allows {_MAX_PARTS}")
    files, placed = [], {}
    for number, (file, part) in enumerate(parts.items()):
        told = dict(own) if number == 0 else {}
        if len(parts) > 1:
            told[NUMBER] = Value(Kind.UINT16, number)
            told[COUNT] = Value(Kind.UINT16, len(parts))
            told[TENSORS] = Value(Kind.INT32, len(tensors))
        alignment = gguf.alignment_of(told)
        head, offsets = gguf.encode_header(told, part)
        size = len(head)
        for (tensor, dtype, shape), offset in zip(part, offsets, strict=True):
            placed[tensor] = TensorPlan(tensor, dtype, shape, file, offset)
            size = gguf.padded(offset + placed[tensor].nbytes, alignment)  # llama.cpp wants the last one padded too
        files.append(FilePlan(file, size, head))
    return Plan(files, placed, {})
