"""Bit patterns of one weight dtype as those of another, in numpy: copying and quantizing need no torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import TensorError
from .dtypes import DType
from .store import Bits

CAST_BYTES = 16  # that `cast` takes at most for each value, beside the bits themselves
_INFINITY = {DType.F16: 0x7C00, DType.BF16: 0x7F80}  # but for the sign


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
    found = rounded(values, target)
    if target is not DType.F32:
        infinite = (found & 0x7FFF) == _INFINITY[target]
        if infinite.any() and (beyond := values[infinite & np.isfinite(values)]).size:
            wider = "bf16 or f32" if target is DType.F16 else "f32"
            raise TensorError(f"{beyond[0]:g} does not fit {target.torch_name}; use {wider}", tensor=str(tensor))
    return found


def rounded(values: npt.NDArray[np.float32], target: DType) -> Bits:
    """fp32 as bit patterns of BF16, F16 or F32, to nearest even; what does not fit becomes infinity, NaN stays NaN."""
    bits = values.view(np.uint32)
    if target is DType.F32:
        return bits
    if target is DType.F16:
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    nearest = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, nearest).astype(np.uint16)
