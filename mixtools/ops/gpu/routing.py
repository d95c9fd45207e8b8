"""From the stream to what reads it: RMSNorm alone, and with it the way to the experts: the router's products in fp32,
the best, their weights.

    a program: one token ─► sum of squares ─► x normalised, rounded, times the norm's weight ─► stored, and times each
               expert's row of the router ─► the largest CHOICES logits ─► softmax over them

A softmax over all experts, the best of them and their shares renormalised are the same numbers. Of equal logits the
first expert's goes first, whatever the hardware: torch.topk promises nothing there.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _scale(x, eps, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """One over the root mean square of x [COLUMNS]."""
    index = tl.arange(0, TOGETHER)
    squares = tl.zeros((TOGETHER,), tl.float32)
    for start in range(0, COLUMNS, TOGETHER):
        column = start + index
        wide = tl.load(x + column, mask=column < COLUMNS, other=0.0).to(tl.float32)
        squares = tl.fma(wide, wide, squares)
    return 1 / tl.sqrt_rn(tl.sum(squares, 0) / COLUMNS + eps)


@triton.jit
def _normed(x, norm, scale, column, there):
    """As x is rounded on its way: by itself, and times the norm's weight."""
    wide = tl.load(x + column, mask=there, other=0.0).to(tl.float32)
    whole = (wide * scale).to(x.dtype.element_ty).to(tl.float32)
    return (whole * tl.load(norm + column, mask=there, other=0.0).to(tl.float32)).to(x.dtype.element_ty)


@triton.jit
def normalise(x, norm, out, eps, COLUMNS: tl.constexpr, TOGETHER: tl.constexpr):
    """x [T, COLUMNS], norm [COLUMNS] -> out as x. Programs: T."""
    line = tl.program_id(0) * COLUMNS
    scale = _scale(x + line, eps, COLUMNS, TOGETHER)
    for start in range(0, COLUMNS, TOGETHER):
        column = start + tl.arange(0, TOGETHER)
        there = column < COLUMNS
        tl.store(out + line + column, _normed(x + line, norm, scale, column, there), mask=there)


@triton.jit
def route(x, norm, router, normed, weights, experts, eps, COLUMNS: tl.constexpr, EXPERTS: tl.constexpr,
          PADDED: tl.constexpr, CHOICES: tl.constexpr, MANY: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """x [T, COLUMNS], norm [COLUMNS], router fp32 [EXPERTS, COLUMNS] -> normed as x, weights fp32 and experts int64
    [T, CHOICES]. PADDED, MANY: powers of two not below EXPERTS and CHOICES. Programs: T."""
    token = tl.program_id(0)
    line = token * COLUMNS
    scale = _scale(x + line, eps, COLUMNS, TOGETHER)
    expert = tl.arange(0, PADDED)
    row = tl.minimum(expert, EXPERTS - 1) * COLUMNS
    sums = tl.zeros((PADDED, TOGETHER), tl.float32)
    for start in range(0, COLUMNS, TOGETHER):
        column = start + tl.arange(0, TOGETHER)
        there = column < COLUMNS
        made = _normed(x + line, norm, scale, column, there)
        tl.store(normed + line + column, made, mask=there)
        part = tl.load(router + row[:, None] + column[None, :], mask=there[None, :], other=0.0)
        sums = tl.fma(part, made.to(tl.float32)[None, :], sums)
    logits = tl.where(expert < EXPERTS, tl.sum(sums, 1), -float("inf"))
    place = tl.arange(0, MANY)
    best = tl.max(logits, 0)
    chosen = tl.zeros((MANY,), tl.int64)
    shares = tl.zeros((MANY,), tl.float32)
    for choice in tl.static_range(CHOICES):
        largest = tl.max(logits, 0)
        first = tl.min(tl.where(logits == largest, expert, EXPERTS - 1), 0)  # of NaN: one that there is
        chosen = tl.where(place == choice, first.to(tl.int64), chosen)
        shares = tl.where(place == choice, tl.exp(largest - best), shares)
        logits = tl.where(expert == first, -float("inf"), logits)
    tl.store(experts + token * CHOICES + place, chosen, mask=place < CHOICES)
    tl.store(weights + token * CHOICES + place, shares / tl.sum(shares, 0), mask=place < CHOICES)
