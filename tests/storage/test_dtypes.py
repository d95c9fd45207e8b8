"""Names and sizes against torch and safetensors."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mixtools.errors import FormatError
from mixtools.storage import plan
from mixtools.storage.dtypes import ELEMENTS, DType


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_names_and_sizes(dtype: DType) -> None:
    tensor = torch.zeros(3, dtype=dtype.torch())
    assert tensor.element_size() == dtype.itemsize
    assert str(tensor.dtype) == f"torch.{dtype.torch_name}"
    raw = safetensors.torch.save({"x": tensor})
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["x"]["dtype"] == dtype.value


BLOCKS = [dtype for dtype in DType if dtype not in ELEMENTS]


@pytest.mark.parametrize("dtype", BLOCKS)
def test_block_types_are_ggmls(dtype: DType) -> None:
    values, size = GGML_QUANT_SIZES[GGMLQuantizationType[dtype.value]]
    assert dtype.row_bytes(3 * values) == 3 * size
    assert dtype.nbytes((5, 7, 2 * values)) == 5 * 7 * 2 * size
    assert dtype.nbytes((0, values)) == dtype.nbytes((4, 0)) == 0
    assert dtype.word == 1


@pytest.mark.parametrize("dtype", BLOCKS)
def test_a_cut_block_has_no_size(dtype: DType) -> None:
    values, _ = GGML_QUANT_SIZES[GGMLQuantizationType[dtype.value]]
    for columns in (1, values - 1, values + 1):
        with pytest.raises(ValueError, match=f"no multiple of {dtype.value}'s blocks of {values}"):
            dtype.nbytes((2, columns))
    with pytest.raises(ValueError, match=f"packs {values} values"):
        _ = dtype.itemsize


@pytest.mark.parametrize("dtype", BLOCKS[:2])
def test_only_ggufs_hold_block_types(dtype: DType) -> None:
    with pytest.raises(FormatError, match=f"safetensors has no {dtype.value}") as caught:
        plan.single_safetensors("x.safetensors", [("t", dtype, (2, 256))])
    assert caught.value.tensor == "t"
    with pytest.raises(FormatError, match=f"torch has no {dtype.value}"):
        plan.torch_zips({"x.pth": [("t", dtype, (2, 256))]})


@pytest.mark.parametrize("dtype", ELEMENTS)
def test_plain_sizes(dtype: DType) -> None:
    assert dtype.nbytes((3, 5)) == torch.zeros(3, 5, dtype=dtype.torch()).nbytes
    assert dtype.nbytes(()) == dtype.word == dtype.itemsize
    assert DType.of(dtype.torch()) is dtype


def test_copying_needs_no_torch() -> None:
    rooms = ("dtypes", "store", "plan", "safetensors", "torchzip", "output", "manifest")
    code = "import sys; from mixtools.storage import " + ", ".join(rooms)
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "False\n"
