"""x Wᵀ for 16-bit weights on a CPU: by the machine's own 16-bit instructions, or widened to fp32 a block at a time.

    weight [out, in] ─► a block of its rows, fp32, in the cache ─► x (fp32) · blockᵀ ─► rounded once ─► [.., out]

A product of two bf16 or fp16 values is exact in fp32, and sums are fp32 either way: both ways round the same sums at
the same place. Which is taken depends on the machine and on the number of rows of x alone.
"""

from __future__ import annotations

import functools
import math
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

from . import host

# Measured on an AMD EPYC with AVX2, one expert of 8x7B: torch's own bf16 product does 10 GFLOP/s whatever the rows,
# a widened one 22 from 8 rows and 80 from 512. With so few rows as this, widening costs more than it saves.
FEW_ROWS = 4
BLOCK = 1 << 22  # weights widened at a time, at most: 16 MB, which stay in the last cache until they are used
BLOCK_ROWS = 512  # and no more rows than that: with more, a product of few rows of x waits for memory
_STEP = 64  # a block has a multiple of so many rows, unless the matrix ends


@functools.cache
def native(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies `dtype` by instructions of its own, and torch uses them.

    AVX-512 BF16 or AMX for bf16, AVX-512 FP16 or AMX FP16 for fp16. True for anything but x86, where nothing was
    measured, and for a torch too old to tell: torch's own way is right everywhere.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return True
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is None or platform.machine().lower() not in ("x86_64", "amd64"):
        return True
    can = tell()
    wanted = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(can.get(name, False) for name in wanted)


def widens(x: Tensor, weight: Tensor) -> bool:
    """Whether x [.., in] times `weight` goes the widened way, told from device, dtype and rows."""
    if weight.device.type != "cpu" or native(weight.dtype):
        return False
    return math.prod(x.shape[:-1]) > FEW_ROWS


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., in] times weight [out, in], both of one dtype -> [.., out] of that dtype, rounded once from fp32 sums.

    Beside the result it takes at most `token_bytes` for each row of x, and `block_bytes`.
    """
    if not widens(x, weight):
        return F.linear(x, weight)
    out = torch.empty((*x.shape[:-1], len(weight)), dtype=x.dtype)
    _widened(x, weight, out)
    return out


def linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x [.., in] times weight [out, in], both of one dtype -> [.., out] fp32: the sums as they are.

    Memory as `linear`. On any device and machine: 16-bit weights are widened a block at a time.
    """
    if weight.dtype == torch.float32:
        return F.linear(x, weight)
    out = host.empty((*x.shape[:-1], len(weight)), x.device, torch.float32)
    if native(weight.dtype):
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
