"""Encoders of ggml's block types, by the compiled kernels: the bytes of ggml's own. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ..errors import MixtoolsError
from ..storage.dtypes import GGML, DType
from . import cpu
from .cpu import NATIVE, Array

_WORDS = {  # what numpy may call a value's bits
    DType.F32: ("float32", "uint32", "int32"),
    DType.F16: ("float16", "uint16", "int16"),
    DType.BF16: ("uint16", "int16"),
}


def encode(
    rows: Array,
    dtype: DType,
    type: DType,
    importance: Array | None = None,
    *,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """`rows` [rows, columns] -> their blocks of `type` (one of NATIVE) [rows, bytes], uint8.

    `rows` holds values of `dtype` (F32, F16, BF16) or their bit patterns, at any address and with any stride between
    rows, those of a row side by side. They are finite: what becomes of a block with a NaN or an infinity is not
    defined. `importance` [columns], float32, weighs the error of each column, as an importance
    matrix does in ggml_quantize_chunk. `out`, if given, is filled and returned: dense, of the right shape, apart from
    `rows`. Raises MixtoolsError for arrays that are not so, and for rows that would end inside a block.
    """
    _check_source(rows, dtype, type)
    shape = (rows.shape[0], _row_bytes(type, rows.shape[1]))
    weights = None if importance is None else _checked_importance(importance, rows.shape[1])
    if out is None:
        out = np.empty(shape, np.uint8)
    elif out.shape != shape or out.dtype != np.uint8 or not out.flags.c_contiguous or not out.flags.writeable:
        raise MixtoolsError(f"{type.value} of {cpu.describe(rows)} takes {list(shape)} uint8, not {cpu.describe(out)}")
    elif np.may_share_memory(rows, out):
        raise MixtoolsError("an encoder cannot work in place: the result overlaps the source")
    if out.size == 0:
        return out
    status = cpu.kernels().mixtools_encode(
        rows.ctypes.data, rows.strides[0], GGML[dtype], *rows.shape,
        None if weights is None else weights.ctypes.data,
        GGML[type], out.ctypes.data, cpu.positive(threads), cpu.instruction_set(),
    )  # fmt: skip
    if status:
        raise MixtoolsError(f"the encoder of {type.value} refused {cpu.describe(rows)} (status {status})")
    return out


def _check_source(rows: Array, dtype: DType, type: DType) -> None:
    if type not in NATIVE:
        raise MixtoolsError(f"there is no encoder of {type.value} here: {_names(NATIVE)}")
    if dtype not in _WORDS:
        raise MixtoolsError(f"{type.value} is encoded from {_names(_WORDS)}, not {dtype.value}")
    if rows.ndim != 2 or rows.dtype.name not in _WORDS[dtype] or not rows.dtype.isnative:
        words = " or ".join(_WORDS[dtype])
        raise MixtoolsError(f"rows of {dtype.value} are a matrix of {words}, not {cpu.describe(rows)}")
    if rows.size and rows.shape[1] > 1 and rows.strides[1] != rows.itemsize:
        raise MixtoolsError(f"an encoder takes rows whose items lie side by side, not strides {rows.strides}")


def _names(types: Iterable[DType]) -> str:
    return ", ".join(sorted(type.value for type in types))


def _row_bytes(type: DType, columns: int) -> int:
    try:
        return type.row_bytes(columns)
    except ValueError as error:
        raise MixtoolsError(str(error)) from error


def _checked_importance(importance: Array, columns: int) -> Array:
    if importance.shape != (columns,) or importance.dtype != np.float32:
        raise MixtoolsError(f"the importance of {columns} columns is as many float32, not {cpu.describe(importance)}")
    return np.ascontiguousarray(importance)
