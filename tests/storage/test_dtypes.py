"""Names and sizes against torch and safetensors."""

from __future__ import annotations

import json

import pytest
import safetensors.torch
import torch

from mixtools.storage.dtypes import DType


@pytest.mark.parametrize("dtype", list(DType))
def test_names_and_sizes(dtype: DType) -> None:
    tensor = torch.zeros(3, dtype=dtype.torch())
    assert tensor.element_size() == dtype.itemsize
    assert str(tensor.dtype) == f"torch.{dtype.torch_name}"
    raw = safetensors.torch.save({"x": tensor})
    assert json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["x"]["dtype"] == dtype.value
