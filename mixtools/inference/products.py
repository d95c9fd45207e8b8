"""x Wᵀ for 16-bit weights on a CPU: by the machine's own 16-bit instructions, or widened to fp32 a block at a time.

    weight [out, in] ─► a block of its rows, fp32, in the cache ─► x (fp32) · blockᵀ ─► rounded once ─► [.., out]

A product of two bf16 or fp16 values is exact in fp32, and sums are fp32 either way: both ways round the same sums at
the same place. Which is taken depends on the machine and on the number of rows of x alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import blocks, host
from .blocks import Blocks

Matrix = Tensor | Blocks  # of a product: a tensor, or what a file holds

# Measured on an AMD EPYC with AVX2, one expert of 8x7B: torch's own bf16 product does 10 GFLOP/s whatever the rows,
# a widened one 22 from 8 rows and 80 from 512. With so few rows as this, widening costs more than it saves.
FEW_ROWS = 4
BLOCK = 1 << 22  # weights widened at a time, at most: 16 MB, which stay in the last cache until they are used
BLOCK_ROWS = 512  # and no more rows than that: with more, a product of few rows of x waits for memory
_OUT_DTYPE = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # from there on torch.mm knows it
_STEP = 64  # a block has a multiple of so many rows, unless the matrix ends


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether x [.., in] times `weight` goes the widened way, told from device, dtype and rows."""
    if weight.device.type != "cpu" or host.native(weight.dtype):
        return False
    return math.prod(x.shape[:-1]) > FEW_ROWS


def linear(x: Tensor, weight: Matrix) -> Tensor:
    """x [.., in] times weight [out, in] -> [.., out] of x's dtype, rounded once from fp32 sums.

    A weight that is a tensor has x's dtype; beside the result such a product takes at most `token_bytes` for each row
    of x, and `block_bytes`.
    """
    if isinstance(weight, Blocks):
        return linear_all([(x, weight)])[0]
    if not widens(x, weight):
        return F.linear(x, weight)
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype)
    _widened(x, weight, out)
    return out


def linear_all(pairs: Sequence[tuple[Tensor, Matrix]]) -> list[Tensor]:
    """`linear` of each x and weight, all x of one dtype; those of matrices in blocks go together."""
    packed = [(x, weight) for x, weight in pairs if isinstance(weight, Blocks)]
    found = iter(blocks.products(packed, rounded=True) if packed else ())
    return [next(found).to(x.dtype) if isinstance(weight, Blocks) else linear(x, weight) for x, weight in pairs]


def rows(indices: Tensor, weight: Matrix, dtype: torch.dtype) -> Tensor:
    """Rows [..] of weight [out, in], which has that dtype if it is a tensor -> [.., in]."""
    return weight.rows(indices, dtype) if isinstance(weight, Blocks) else F.embedding(indices, weight)


def fp32_from_16_bits(x: Tensor) -> bool:
    """Whether torch.mm of such tensors gives fp32 sums by `out_dtype`."""
    return x.device.type == "cuda" and x.dtype.itemsize == 2 and torch.version.hip is None and _OUT_DTYPE


def linear_fp32(x: Tensor, weight: Matrix) -> Tensor:
    """x [.., in] times weight [out, in] -> [.., out] fp32: the sums as they are.

    Memory as `linear`. 16-bit weights are widened a block at a time, unless a card gives its sums as they are.
    """
    if isinstance(weight, Blocks):
        return weight.product(x)
    if weight.dtype == torch.float32:
        return F.linear(x, weight)
    if fp32_from_16_bits(weight):
        return torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32).view(*x.shape[:-1], -1)
    out = host.empty((*x.shape[:-1], len(weight)), x.device, torch.float32)
    if host.native(weight.dtype):
        with host.bf16_products(weight):
            _widened(x, weight, out)
    else:
        _widened(x, weight, out)
    return out


def block_rows(shape: tuple[int, ...]) -> int:
    """Rows of a weight [out, in] that are widened together."""
    rows, columns = shape
    return min(rows, BLOCK_ROWS, max(1, BLOCK // columns // _STEP) * _STEP)


def block_bytes(shape: tuple[int, ...]) -> int:
    """What a product with a weight [out, in] takes, however many rows x has."""
    return 4 * block_rows(shape) * shape[1]


def token_bytes(shape: tuple[int, ...]) -> int:
    """What it takes for each row of x beside that: the row and its part of the result, in fp32."""
    return 4 * (shape[1] + block_rows(shape))


def _widened(x: Tensor, weight: Tensor, out: Tensor) -> None:
    """Fill `out` [.., out], of any dtype."""
    wide, target = x.flatten(0, -2).float(), out.view(-1, len(weight))
    step = block_rows(tuple(weight.shape))
    # both are used again for each block: new memory would be touched for the first time, which costs more than widening
    block = torch.empty(step, weight.shape[1], device=x.device)
    sums = torch.empty(len(wide) * step, device=x.device)
    for start in range(0, len(weight), step):
        rows = weight[start : start + step]
        part = sums[: len(wide) * len(rows)].view(len(wide), len(rows))
        torch.mm(wide, block[: len(rows)].copy_(rows).t(), out=part)
        target[:, start : start + step] = part
