"""Vectors times matrices that stay in blocks. Free of torch: numpy arrays in and out.

    x [tokens, in] fp32, blocks [out, bytes of a row] ─► a row at a time, decoded in registers ─► [tokens, out] fp32

Blocks are ggml's or our own (repack.py), and values those of their format, bit for bit (decode.py); products and sums
are fp32, in an order that neither the instruction set nor the number of threads or tokens changes (kernels/multiply.h).
Where x is of bf16 and the machine has its dot product, sums of K-quants and of our groups of 3 and 4 bits run in
another order (kernels/narrow.h); with AVX2 or AVX-512 alone those of K-quants, and of 4 bits in groups of 64 and more,
are of integers within a block (kernels/slices.h). Threads and tokens do not change these either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import MixtoolsError
from .cpu import Array, describe, instruction_set, kernels, positive
from .repack import Type, native, number


class Product(NamedTuple):
    """`x` float32 [tokens, in] times `blocks` uint8 [out, bytes of a row] of `type`, transposed; see `multiply`."""

    x: Array
    blocks: Array
    type: Type


def multiply(x: Array, blocks: Array, type: Type, *, narrow: bool = False, threads: int = 1) -> Array:
    """`x` float32 [tokens, in] times `blocks` uint8 [out, bytes of a row], transposed -> float32 [tokens, out].

    `type` is one of cpu.NATIVE or of repack.KINDS; `narrow`: all of x are values of bf16, which some machines multiply
    faster. Rows of both may lie anywhere; the items of a row lie side by side. Raises MixtoolsError for arrays that are
    not so or do not fit each other.
    """
    (out,) = multiply_all([Product(x, blocks, type)], narrow=narrow, threads=threads)
    return out


def multiply_all(products: Sequence[Product], *, narrow: bool = False, threads: int = 1) -> list[Array]:
    """Each as `multiply`, the same bits, but threads are woken once for all of them."""
    positive(threads)
    for product in products:
        _check(product)
    outs = [np.empty((len(x), len(blocks)), np.float32) for x, blocks, _ in products]
    for out, product in zip(outs, products, strict=True):
        if not product.x.shape[1]:
            out[:] = 0
    table = np.array(
        [_row(product, out) for product, out in zip(products, outs, strict=True) if out.size and product.x.shape[1]],
        np.int64,
    )
    if len(table):
        status = kernels().mixtools_multiply(table.ctypes.data, len(table), narrow, threads, instruction_set())
        if status:
            types = ", ".join(sorted({product.type.value for product in products}))
            raise MixtoolsError(f"the kernel that multiplies blocks refused {types} (status {status})")
    return outs


def _check(product: Product) -> None:
    x, blocks, type = product
    if not native(type):
        raise MixtoolsError(f"no kernel multiplies {type.value}")
    if x.ndim != 2 or x.dtype != np.float32 or blocks.ndim != 2 or blocks.dtype != np.uint8:
        raise MixtoolsError(f"float32 rows are multiplied with bytes, not {describe(x)} with {describe(blocks)}")
    cols = x.shape[1]
    if cols % type.block or blocks.shape[1] != type.row_bytes(cols):
        raise MixtoolsError(f"rows of {cols} values are not those of {type.value} in {describe(blocks)}")
    if any(array.size and array.strides[1] != array.itemsize for array in (x, blocks)) or x.strides[0] % x.itemsize:
        raise MixtoolsError(f"products take dense rows, not {describe(x)} and {describe(blocks)}")


def _row(product: Product, out: Array) -> list[int]:
    """As kernels/multiply.h has a Product."""
    x, blocks, type = product
    return [
        blocks.ctypes.data, blocks.strides[0], len(blocks), x.shape[1] // type.block, number(type), x.ctypes.data,
        x.strides[0] // x.itemsize, len(x), out.ctypes.data, len(blocks),
    ]  # fmt: skip
