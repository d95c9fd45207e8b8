"""Bit patterns of one weight dtype as those of another, in numpy: copying and quantizing need no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import TensorError
from .dtypes import DType
from .store import Bits


def widen(bits: Bits, dtype: DType) -> npt.NDArray[np.float32]:
    """BF16, F16 or F32 as fp32, exactly."""
    if dtype is DType.BF16:
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype is DType.F16 else bits.view(np.float32)


def cast(bits: Bits, dtype: DType, target: DType, tensor: object) -> Bits:
    """Among BF16, F16 and F32, rounded to nearest even. `tensor` is for messages.

    Raises TensorError where a finite value would become infinite.
    """
    if dtype is target:
        return bits
    values = widen(bits, dtype)
    if target is DType.F32:
        return values.view(np.uint32)
    if target is DType.F16:
        with np.errstate(over="ignore"):
            rounded = values.astype(np.float16).view(np.uint16)
    else:
        whole = values.view(np.uint32)
        rounded = ((whole + (0x7FFF + ((whole >> 16) & 1))) >> 16).astype(np.uint16)
        rounded = np.where(np.isnan(values), (whole >> 16 | 0x40).astype(np.uint16), rounded)  # a NaN stays one
    overflow = np.isinf(widen(rounded, target)) & np.isfinite(values)
    if overflow.any():
        wider = "BF16 or F32" if target is DType.F16 else "F32"
        raise TensorError(f"{values[overflow][0]:g} does not fit {target.value}; use {wider}", tensor=str(tensor))
    return rounded
