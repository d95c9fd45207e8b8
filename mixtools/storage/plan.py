"""Plan: every file, tensor and offset of an output, known before the first byte is written."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..errors import UsageError
from . import safetensors, torchzip_layout
from .dtypes import DType

Seal = Callable[[Mapping[str, int]], list[tuple[int, bytes]]]


class TensorPlan(NamedTuple):
    """One stored tensor: its file and where its bytes start there."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    file: str
    offset: int

    @property
    def nbytes(self) -> int:
        return self.dtype.nbytes(self.shape)

    @property
    def row_bytes(self) -> int:
        return self.dtype.row_bytes(self.shape[-1] if self.shape else 1)


@dataclass(frozen=True)
class FilePlan:
    """One file: `head` goes to offset 0; `seal` gives, from the tensors' CRCs, what is written at the end."""

    name: str
    size: int
    head: bytes
    seal: Seal | None = None


@dataclass(frozen=True)
class Plan:
    """All weight files, and small documents that make the folder loadable and hence come last."""

    files: Sequence[FilePlan]
    tensors: Mapping[str, TensorPlan]
    index: Mapping[str, bytes]

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.files)


Shape = tuple[str, DType, tuple[int, ...]]


def _bytes(tensor: Shape) -> int:
    return tensor[1].nbytes(tensor[2])


def single_safetensors(name: str, tensors: Sequence[Shape]) -> Plan:
    """One safetensors file."""
    file, placed = _safetensors_file(name, tensors)
    return Plan([file], {tensor.name: tensor for tensor in placed}, {})


def sharded_safetensors(tensors: Sequence[Shape], max_shard_bytes: int) -> Plan:
    """model.safetensors, or model-00001-of-N with an index where one shard is not enough."""
    shards = divide("model", "safetensors", tensors, max_shard_bytes)
    pairs = [_safetensors_file(name, shard) for name, shard in shards.items()]
    placed = {tensor.name: tensor for _, shard in pairs for tensor in shard}
    return Plan([file for file, _ in pairs], placed, _index("model.safetensors", shards))


def sharded_torch_zips(tensors: Sequence[Shape], max_shard_bytes: int) -> Plan:
    """pytorch_model.bin, or pytorch_model-00001-of-N with an index where one shard is not enough."""
    shards = divide("pytorch_model", "bin", tensors, max_shard_bytes)
    return torch_zips(shards, _index("pytorch_model.bin", shards))


def dealt_torch_zips(names: Sequence[str], tensors: Sequence[Shape]) -> Plan:
    """Torch zips of these names, the tensors in their order and spread evenly by bytes."""
    files: dict[str, list[Shape]] = {name: [] for name in names}
    total, before = sum(map(_bytes, tensors)), 0
    for tensor in tensors:
        files[names[before * len(names) // total]].append(tensor)
        before += _bytes(tensor)
    return torch_zips(files)


def divide(stem: str, suffix: str, tensors: Sequence[Shape], max_bytes: int) -> dict[str, list[Shape]]:
    """Tensors by file, in order, each file filled as far as `max_bytes` allows but holding at least one."""
    if max_bytes < 1:
        raise UsageError(f"a shard of {max_bytes} bytes holds no tensor")
    shards: list[list[Shape]] = [[]]
    room = max_bytes
    for tensor in tensors:
        if shards[-1] and _bytes(tensor) > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(tensor)
        room -= _bytes(tensor)
    count = len(shards)
    if count == 1:
        return {f"{stem}.{suffix}": shards[0]}
    return {f"{stem}-{i:05}-of-{count:05}.{suffix}": shard for i, shard in enumerate(shards, 1)}


def _index(stem: str, shards: Mapping[str, Sequence[Shape]]) -> dict[str, bytes]:
    """The index that goes with several shards."""
    if len(shards) == 1:
        return {}
    total = sum(_bytes(tensor) for shard in shards.values() for tensor in shard)
    weight_map = {tensor[0]: file for file, shard in shards.items() for tensor in shard}
    document = {"metadata": {"total_size": total}, "weight_map": weight_map}
    return {f"{stem}.index.json": (json.dumps(document, indent=2) + "\n").encode()}


def torch_zips(files: Mapping[str, Sequence[Shape]], index: Mapping[str, bytes] | None = None) -> Plan:
    """torch.save's zips, one for each file name."""
    plans, placed = [], {}
    for name, tensors in files.items():
        zipped = torchzip_layout.ZipPlan(name.rpartition(".")[0], tensors)
        plans.append(FilePlan(name, zipped.size, b"", zipped.seal))
        for (tensor, dtype, shape), offset in zip(tensors, zipped.offsets, strict=True):
            placed[tensor] = TensorPlan(tensor, dtype, shape, name, offset)
    return Plan(plans, placed, index or {})


def _safetensors_file(name: str, tensors: Sequence[Shape]) -> tuple[FilePlan, list[TensorPlan]]:
    head = safetensors.encode_header(tensors)
    offset = len(head)
    placed = []
    for tensor, dtype, shape in tensors:
        placed.append(TensorPlan(tensor, dtype, shape, name, offset))
        offset += _bytes((tensor, dtype, shape))
    return FilePlan(name, offset, head), placed
