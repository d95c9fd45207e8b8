"""Which blocks hold a matrix of another format than ggml's, and how they are made of its parts.

    GPTQ, AWQ, compressed-tensors ─► codes, scales, zeros ┐
    nf4, twice quantized or not   ─► codes, absmax        ├─► ops/repack.py ─► the same values in blocks
    int8                          ─► codes, SCB           ┘

Columns whose groups do not follow one another (GPTQ's activation order) are sorted by them, and x with them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..formats import Awq, Format, Gptq, Int8, Nf4, Packed, PackedInts
from ..formats.groups import Grid
from ..ops import repack
from ..ops.repack import Kind
from ..storage.dtypes import DType

_NF4_BLOCK = 64  # columns for which a block of ours has a scale


def kind_of(format: Format, shape: tuple[int, ...]) -> Kind | None:
    """Of the blocks of a matrix [out, in]; None for a format that stays as it is or is decoded."""
    if len(shape) != 2:
        return None
    columns = shape[1]
    if isinstance(format, Gptq | Awq | PackedInts):
        # scales of fp32 may have more digits than a block's word
        return None if format.dtype is DType.F32 else repack.grouped(columns, format.bits, format.group)
    if columns % repack.NF4.block:
        return None
    if isinstance(format, Nf4):
        return None if columns % format.block or format.block % _NF4_BLOCK else repack.NF4
    return repack.INT8_ROW if isinstance(format, Int8) else None


def blocks_of(packed: Packed) -> tuple[Tensor, Tensor | None] | None:
    """The blocks uint8 [out, bytes of a row] of a matrix that `kind_of` has a kind for, and which of its columns come
    one after the other there [in], None for all in order.

    None if they cannot hold it after all: where groups do not divide its columns evenly. Raises what decoding raises.
    """
    format, parts = packed
    if isinstance(format, Nf4):
        codes, absmax = format.codes(parts)
        each = absmax.view(len(codes), -1).repeat_interleave(format.block // _NF4_BLOCK, 1)
        return torch.from_numpy(repack.pack_nf4(codes, each.numpy())), None
    if isinstance(format, Int8):
        values, scales = format.codes(parts)
        return torch.from_numpy(repack.pack_int8(values.numpy(), scales.numpy())), None
    if isinstance(format, Gptq | Awq | PackedInts):
        return _grouped(format.grid(parts), format.bits, format.group)
    return None


def _grouped(grid: Grid, bits: int, length: int) -> tuple[Tensor, Tensor | None] | None:
    codes, scales, zeros, group = grid
    order = None
    if isinstance(group, Tensor):
        if bool((torch.bincount(group, minlength=scales.shape[1]) != length).any()):
            return None
        order = group.argsort(stable=True)
        codes = np.take(codes, order.numpy(), axis=1)
    return torch.from_numpy(repack.pack_grouped(codes, scales.float().numpy(), zeros.numpy(), bits, length)), order
