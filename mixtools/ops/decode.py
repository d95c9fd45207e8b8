"""Blocks of ggml, and our own, to numbers. Free of torch: numpy arrays in and out.

A row of blocks becomes a row of bit patterns of BF16, F16 or F32: ggml's own value in fp32, bit for bit, rounded once
to nearest even. Our kernels (kernels/decode.h) know the types in NATIVE and those of repack.py, on each instruction
set with the same bytes; the others go through the numpy decoders of the gguf package, which are about a hundred times
slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..errors import MixtoolsError
from ..storage.casting import rounded
from ..storage.dtypes import ELEMENTS, GGML, DType
from .cpu import NATIVE, Array, aligned_empty, describe, instruction_set, kernels, positive
from .repack import Kind, Type, number

_BITS: dict[DType, np.dtype[Any]] = {
    DType.F32: np.dtype(np.uint32), DType.F16: np.dtype(np.uint16), DType.BF16: np.dtype(np.uint16),
}  # fmt: skip
_RUN = 1 << 18  # values that the gguf package decodes at a time; it takes some 20 bytes for each


def decode(blocks: Array, type: Type, to: DType, *, out: Array | None = None, threads: int = 1) -> Array:
    """`blocks` uint8 [rows, bytes of a row] of block type `type` -> bit patterns [rows, cols] of `to`.

    BF16 and F16 come as uint16, F32 as uint32. What F16 cannot hold becomes infinity, and scales that are no numbers
    make NaN (always the same: quiet, positive); the caller looks for both. Rows may lie anywhere (any stride, any
    alignment); the items of a row lie side by side. `out`, if given, is filled and returned: of the right shape and
    dtype, apart from `blocks`. Types that are not NATIVE take one thread.
    Raises MixtoolsError for an array or a type that is not so, and where a row ends inside a block.
    """
    if type in ELEMENTS or to not in _BITS:
        raise MixtoolsError(f"no decoder makes {to.value} of {type.value}")
    if blocks.ndim != 2 or blocks.dtype != np.uint8:
        raise MixtoolsError(f"blocks are decoded from a matrix of bytes, not from {describe(blocks)}")
    rows, cols = len(blocks), _columns(blocks.shape[1], type)
    if out is None:
        out = aligned_empty((rows, cols), _BITS[to])
    elif out.shape != (rows, cols) or out.dtype != _BITS[to] or not out.flags.writeable:
        raise MixtoolsError(f"{rows} rows of {cols} values of {to.value} do not fit into {describe(out)}")
    elif np.may_share_memory(blocks, out):
        raise MixtoolsError("decoding cannot work in place: the result overlaps the blocks")
    positive(threads)
    if out.size == 0:
        return out
    if blocks.strides[1] != 1 or out.strides[1] != out.itemsize:
        raise MixtoolsError(f"decoding takes dense rows, not {describe(blocks)} to {describe(out)}")
    if isinstance(type, Kind) or type in NATIVE:
        _decode_natively(blocks, type, to, out, threads)
    else:
        _decode_by_gguf(blocks, type, to, out)
    return out


def _columns(row_bytes: int, type: Type) -> int:
    values = type.block
    size = type.row_bytes(values)
    count, rest = divmod(row_bytes, size)
    if rest:
        raise MixtoolsError(f"rows of {row_bytes} bytes are no multiple of {type.value}'s blocks of {size} bytes")
    return count * values


def _decode_natively(blocks: Array, type: Type, to: DType, out: Array, threads: int) -> None:
    rows, cols = out.shape
    source, target = (blocks.ctypes.data, blocks.strides[0]), (out.ctypes.data, out.strides[0])
    status = kernels().mixtools_decode(
        *source, *target, rows, cols // type.block, number(type), GGML[to], threads, instruction_set()
    )
    if status:
        raise MixtoolsError(f"the kernel that decodes blocks refused {type.value} to {to.value} (status {status})")


def _decode_by_gguf(blocks: Array, type: DType, to: DType, out: Array) -> None:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # NaN and infinity are the caller's
        for rows, first, last in _runs(len(out), out.shape[1], type.block):
            run = blocks[rows, type.row_bytes(first) : type.row_bytes(last)]
            # given as one row, since dequantize takes 16 rows at a time
            decoded = dequantize(np.ascontiguousarray(run).reshape(1, -1), GGMLQuantizationType(GGML[type]))
            decoded[np.isnan(decoded)] = np.nan  # there is one NaN, here as in the kernels
            out[rows, first:last] = rounded(decoded.reshape(len(run), last - first), to)


def _runs(rows: int, cols: int, values: int) -> Iterator[tuple[slice, int, int]]:
    """Rows, first and last column of runs of about _RUN values, cut between blocks of `values`."""
    high, wide = max(1, _RUN // cols), min(cols, max(values, _RUN // values * values))
    for row in range(0, rows, high):
        for first in range(0, cols, wide):
            yield slice(row, row + high), first, min(cols, first + wide)
