"""The Gram matrix of a weight on its short side, computed once per pair of rows.

A weight [m, n] with p = min(m, n) has the p eigenvalues s_i² of W Wᵀ (m <= n) or WᵀW (m > n). A product of two bf16
or f16 numbers is exact in fp64, so the only error is that of the sum: an eigenvalue is known to about
p·2⁻⁵³·s_1², a singular value to s_1·(s_1/s_i)·p·2⁻⁵⁴ (`resolution` below states where that leaves nothing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from scipy.linalg import blas
from torch import Tensor

_BLOCK = 1024  # of the long side: 4096 x 1024 in fp64 is 32 MiB, so a bf16 weight is never whole in fp64
_EXACT_BLOCK = 256  # products of two integers of 8 bits and a sign: their sum stays within 2^24, exact in fp32
_SLICE_BITS = 8


def resolution(short_side: int) -> float:
    """Singular values below this share of the largest one are lost in a Gram matrix's rounding: sqrt(p·2⁻⁵²)."""
    return math.sqrt(short_side * float(np.finfo(np.float64).eps))


def gram(weight: Tensor) -> Tensor:
    """W Wᵀ or WᵀW of `weight` [m, n] on its short side: [p, p] fp64, of which only the lower triangle is meant.

    On the CPU and on MPS the result lies on the CPU, on CUDA it stays there. The upper triangle holds zeros or the
    mirror image, as the device gives it cheaper.
    """
    match weight.device.type:
        case "cpu":
            return _gram_cpu(weight)
        case "mps":  # has no fp64
            return gram_sliced(weight)
        case _:
            return _gram_device(weight)


def long_blocks(weight: Tensor, size: int = _BLOCK) -> Iterator[tuple[slice, slice]]:
    """Index pairs that cut `weight` along its long side."""
    rows, cols = weight.shape
    everything = slice(None)
    for start in range(0, max(rows, cols), size):
        piece = slice(start, start + size)
        yield (everything, piece) if rows <= cols else (piece, everything)


def _gram_cpu(weight: Tensor) -> Tensor:
    rows, cols = weight.shape
    total = np.zeros((min(rows, cols),) * 2, order="F")
    for index in long_blocks(weight):
        block = weight[index].double().contiguous().numpy()
        # a row-major [p, k] is BLAS's [k, p]: no copy on the way
        total = blas.dsyrk(1.0, block.T, beta=1.0, c=total, trans=rows <= cols, lower=1, overwrite_c=1)
    return torch.from_numpy(total)


def _gram_device(weight: Tensor) -> Tensor:
    """By gemm: a CUDA card's fp64 rate makes the saved half cheaper than the launches that save it."""
    rows, cols = weight.shape
    total = torch.zeros((min(rows, cols),) * 2, dtype=torch.float64, device=weight.device)
    for index in long_blocks(weight, 4 * _BLOCK):
        block = weight[index].double()
        left, right = (block, block.T) if rows <= cols else (block.T, block)
        total.addmm_(left, right)
    return total


def gram_sliced(weight: Tensor, slices: int = 4) -> Tensor:
    """The Gram matrix to nearly fp64, by a device that multiplies in fp32 alone; [p, p] fp64 on the CPU.

    Rows are scaled by powers of two into [-1, 1] and cut into `slices` integers of 8 bits. A block of 256 products
    of two such slices stays within 2^24, so fp32 sums it without any rounding, whatever the order; the blocks are
    added as pairs of fp32 by TwoSum. With 4 slices, the 32 bits below a row's largest element are seen: all of a
    bf16 that is not smaller than that element by 2^24. Error-free splitting: Ozaki et al., Numer. Algorithms 59 (2012).
    """
    wide = weight if weight.shape[0] <= weight.shape[1] else weight.T  # [p, q]
    p = wide.shape[0]
    largest = wide.abs().amax(dim=1, keepdim=True).float().cpu()
    exponent = torch.where(largest > 0, torch.frexp(largest).exponent, 0)  # [p, 1]
    high = torch.zeros(p, p, dtype=torch.float32, device=weight.device)
    low = torch.zeros_like(high)
    for start in range(0, wide.shape[1], _EXACT_BLOCK):
        block = _ldexp(wide[:, start : start + _EXACT_BLOCK].float(), -exponent)
        pieces = list(_slices(block, slices))
        for i, left in enumerate(pieces):
            for j, right in enumerate(pieces[: i + 1]):
                if i + j < slices:  # further down, a product is below the last slice's own rounding
                    product = (left @ right.T).mul_(2.0 ** -(_SLICE_BITS * (i + j + 2)))
                    high, low = _two_sum(high, low, product if i == j else product + product.T)
    total = high.cpu().double() + low.cpu().double()
    scale = _power_of_two(exponent)
    return total * scale * scale.T


def _slices(block: Tensor, count: int) -> Iterator[Tensor]:
    """Integers, the first in [-256, 256], the others in [-128, 128]: block = Σ slice_i · 2^(-8(i+1)) + a rest."""
    for _ in range(count):
        block = block * 2.0**_SLICE_BITS
        whole = block.round()
        yield whole
        block = block - whole


def _ldexp(block: Tensor, exponent: Tensor) -> Tensor:
    """block · 2^exponent, in two steps: 2^-exponent alone may leave fp32's range."""
    half = exponent // 2
    for part in (half, exponent - half):
        block = block * _power_of_two(part).float().to(block.device)
    return block


def _power_of_two(exponent: Tensor) -> Tensor:
    return torch.from_numpy(np.ldexp(1.0, exponent.numpy()))  # torch's own goes through fp32, which ends below 2^128


def _two_sum(high: Tensor, low: Tensor, addend: Tensor) -> tuple[Tensor, Tensor]:
    """(high + low) + addend with the rounding error of the larger sum kept in `low` (Knuth, TAOCP 2, 4.2.2)."""
    total = high + addend
    back = total - high
    return total, low + ((high - (total - back)) + (addend - back))
