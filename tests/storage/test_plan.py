"""Plans: what lies where, before a byte is written."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtools import errors
from mixtools.storage import plan
from mixtools.storage.dtypes import DType

SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=30)


def shapes(sizes: list[int]) -> list[plan.Shape]:
    return [(f"t{i}", DType.F32, (size, 2)) for i, size in enumerate(sizes)]


@given(SIZES, st.integers(1, 1000), st.sampled_from(["safetensors", "bin"]))
def test_shards(sizes: list[int], limit: int, kind: str) -> None:
    make = plan.sharded_safetensors if kind == "safetensors" else plan.sharded_torch_zips
    found = make(shapes(sizes), limit)
    assert list(found.tensors) == [f"t{i}" for i in range(len(sizes))]
    by_file: dict[str, list[plan.TensorPlan]] = {file.name: [] for file in found.files}
    for tensor in found.tensors.values():
        by_file[tensor.file].append(tensor)
    for file in found.files:
        tensors = by_file[file.name]
        assert sum(tensor.nbytes for tensor in tensors) <= limit or len(tensors) == 1
        ends = [tensor.offset + tensor.nbytes for tensor in tensors]
        assert all(end <= tensor.offset for end, tensor in zip(ends, tensors[1:], strict=False))
        assert ends[-1] <= file.size
    filled = [sum(tensor.nbytes for tensor in tensors) for tensors in by_file.values()]
    firsts = [tensors[0].nbytes for tensors in by_file.values()]
    # no shard ends early: its successor's first tensor would not have fitted
    assert all(size + first > limit for size, first in zip(filled, firsts[1:], strict=False))
    if len(found.files) == 1:
        assert found.index == {}
    else:
        ((name, text),) = found.index.items()
        assert name == ("model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json")
        index = json.loads(text)
        assert index["weight_map"] == {tensor.name: tensor.file for tensor in found.tensors.values()}
        assert index["metadata"] == {"total_size": sum(math.prod(shape) * 4 for _, _, shape in shapes(sizes))}


def test_names() -> None:
    assert [file.name for file in plan.sharded_safetensors(shapes([1, 1]), 100).files] == ["model.safetensors"]
    assert [file.name for file in plan.sharded_safetensors(shapes([1, 1]), 8).files] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


@pytest.mark.parametrize("limit", [0, -1])
def test_shards_that_hold_nothing(limit: int) -> None:
    with pytest.raises(errors.UsageError):
        plan.sharded_safetensors(shapes([1]), limit)


def test_blocks_are_counted_in_bytes() -> None:
    """As a file's planner of block types will place them: behind each other, none cut."""
    tensor = plan.TensorPlan("t", DType.Q4_K, (8, 3, 512), "x", 0)
    assert tensor.row_bytes == 2 * 144
    assert tensor.nbytes == 8 * 3 * 2 * 144
