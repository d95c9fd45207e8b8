"""Operations on torch tensors that have a kernel of ours, as `torch.ops.mixtools.*`.

Each has a schema with a shape function, a CPU kernel, and beside them the same in plain torch: what the kernel is
tested against, and what a reader may take as its definition.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, library

from ..errors import MixtoolsError
from ..storage.dtypes import WEIGHT_DTYPES, DType
from ..storage.store import to_tensor
from . import cpu, decode, multiply

_WEIGHTS = {dtype.torch(): dtype for dtype in WEIGHT_DTYPES}
_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows these, but not bfloat16


def transpose_reference(weight: Tensor) -> Tensor:
    """[rows, cols] -> [cols, rows], contiguous."""
    return weight.t().clone(memory_format=torch.contiguous_format)


@library.custom_op("mixtools::transpose", mutates_args=(), device_types="cpu")
def transpose(weight: Tensor, threads: int = 1) -> Tensor:
    """`weight` [rows, cols], real, any strides -> its transpose [cols, rows], contiguous, bit for bit.

    A matrix whose rows are not dense is copied first. Raises MixtoolsError for what is no real matrix.
    """
    return _transposed(weight, threads)


def _transposed(weight: Tensor, threads: int) -> Tensor:
    _check_matrix(weight)
    result = weight.new_empty(weight.shape[::-1])
    rows = weight if weight.stride(1) == 1 else weight.contiguous()
    bits = _INTEGER[weight.itemsize]
    cpu.transpose(rows.detach().view(bits).numpy(), out=result.view(bits).numpy(), threads=threads)
    return result


@transpose.register_fake
def _(weight: Tensor, threads: int = 1) -> Tensor:
    _check_matrix(weight)
    return weight.new_empty((weight.shape[1], weight.shape[0]))


def turned(matrix: Tensor) -> Tensor:
    """A matrix's transpose, contiguous, made where it lies; of bytes on a CPU in less than half of torch's own time.

    Not by way of the operation, whose first call takes more than a second: torch then imports its compiler.
    """
    if matrix.device.type != "cpu":
        return matrix.T.contiguous()
    return _transposed(matrix, torch.get_num_threads())


def dense(matrix: Tensor) -> Tensor:
    """The matrix itself where it is contiguous, else a copy that is; best of a transposed one."""
    return matrix if matrix.is_contiguous() else turned(matrix.T)


def first_nonfinite_reference(values: Tensor) -> Tensor:
    """Index of the first NaN or infinity in `values`, counted row by row, or -1: a scalar, int64."""
    found = values.reshape(-1).isfinite().logical_not().nonzero()
    return found[0, 0] if len(found) else torch.tensor(-1)


@library.custom_op("mixtools::first_nonfinite", mutates_args=(), device_types="cpu")
def first_nonfinite(values: Tensor, threads: int = 1) -> Tensor:
    """Index of the first NaN or infinity in `values`, counted row by row, or -1: a scalar, int64.

    bfloat16, float16 or float32 of any shape; copied first if not contiguous. Raises MixtoolsError for other dtypes.
    """
    return torch.tensor(nonfinite(values, threads))


def nonfinite(values: Tensor, threads: int) -> int:
    """The same as a number, and not by way of the operation (see `turned`)."""
    dtype = _check_weights(values)
    data = values.detach().contiguous().view(-1).view(torch.uint8).numpy()
    index = cpu.first_nonfinite(data, dtype, threads=threads)
    return -1 if index is None else index


@first_nonfinite.register_fake
def _(values: Tensor, threads: int = 1) -> Tensor:
    _check_weights(values)
    return values.new_empty((), dtype=torch.int64)


def multiply_blocks_reference(x: Tensor, blocks: Tensor, type: str) -> Tensor:
    """x [tokens, in] fp32 times the values of `blocks` [out, bytes of a row], transposed, in fp64 until the end."""
    values = torch.from_numpy(decode.decode(blocks.numpy(), DType[type], DType.F32).view(np.float32))
    return (x.double() @ values.double().T).float()


@library.custom_op("mixtools::multiply_blocks", mutates_args=(), device_types="cpu")
def multiply_blocks(x: Tensor, blocks: Tensor, type: str, threads: int = 1) -> Tensor:
    """`x` [tokens, in], fp32 or bf16, times ggml's `blocks` uint8 [out, bytes of a row], transposed -> [tokens, out].

    Raises MixtoolsError for what does not fit.
    """
    dense = (one if one.stride(1) == 1 else one.contiguous() for one in (x.detach().float(), blocks))
    rows, matrix = (one.numpy() for one in dense)
    narrow = x.dtype == torch.bfloat16
    return torch.from_numpy(multiply.multiply(rows, matrix, DType[type], narrow=narrow, threads=threads))


@multiply_blocks.register_fake
def _(x: Tensor, blocks: Tensor, type: str, threads: int = 1) -> Tensor:
    return x.new_empty((len(x), len(blocks)), dtype=torch.float32)


@library.custom_op("mixtools::decode_blocks", mutates_args=(), device_types="cpu")
def decode_blocks(blocks: Tensor, type: str, dtype: torch.dtype, threads: int = 1) -> Tensor:
    """ggml's `blocks` uint8 [rows, bytes of a row] of `type` -> their values [rows, columns], rounded once to `dtype`.

    bfloat16, float16 or float32. Raises MixtoolsError for what is no such thing.
    """
    to = _known(dtype)
    rows = blocks if blocks.stride(1) == 1 else blocks.contiguous()
    return to_tensor(decode.decode(rows.numpy(), DType[type], to, threads=threads), to)


@decode_blocks.register_fake
def _(blocks: Tensor, type: str, dtype: torch.dtype, threads: int = 1) -> Tensor:
    kind = DType[type]
    return blocks.new_empty((len(blocks), blocks.shape[1] // kind.row_bytes(kind.block) * kind.block), dtype=dtype)


def _check_matrix(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.is_complex() or weight.is_quantized:
        raise MixtoolsError(f"transpose takes a real matrix, not {weight.dtype} {list(weight.shape)}")


def _check_weights(values: Tensor) -> DType:
    if values.dtype not in _WEIGHTS:
        names = ", ".join(str(dtype) for dtype in _WEIGHTS)
        raise MixtoolsError(f"NaN and infinity are sought in {names}, not {values.dtype}")
    return _WEIGHTS[values.dtype]


def _known(dtype: torch.dtype) -> DType:
    if dtype not in _WEIGHTS:
        raise MixtoolsError(f"blocks are decoded to {', '.join(map(str, _WEIGHTS))}, not to {dtype}")
    return _WEIGHTS[dtype]
