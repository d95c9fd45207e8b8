"""Q8_0 and Q4_0: value = scale * level in blocks of 32, as kernels/encode_small.h has it, operation by operation.

A program takes some blocks, a lane some values of one; in the search by importance, a lane has a block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_parts import fit_scale, half_bits, loaded, nearest, truncated, values


@triton.jit
def _inverse(scale):
    return tl.where(scale == 0, 0.0, tl.div_rn(1.0, scale))


@triton.jit
def _half_of(x, block, FIRST: tl.constexpr):
    """16 values of each block, from number FIRST on."""
    return values(x, block[:, None] * 32 + (FIRST + tl.arange(0, 16))[None, :])


@triton.jit
def _round_away(v):
    """To the nearest, halves away from zero: what rounds so is to add the greatest float below 1/2, and to truncate."""
    return truncated(v + tl.where(v < 0, -0.49999997, 0.49999997))


@triton.jit
def q8_0(x, out, blocks, BLOCKS: tl.constexpr):
    """out [blocks, 17], int16, of x [blocks, 32]. Programs: ceil(blocks / BLOCKS)."""
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.minimum(index, blocks - 1)
    inside = index < blocks
    v = values(x, block[:, None] * 32 + tl.arange(0, 32)[None, :])
    even, odd = tl.split(tl.reshape(v, (BLOCKS, 16, 2)))
    scale = tl.div_rn(tl.max(tl.maximum(tl.abs(even), tl.abs(odd)), 1), 127.0)
    inverse = _inverse(scale)[:, None]
    both = (_round_away(even * inverse) & 255) | ((_round_away(odd * inverse) & 255) << 8)
    to = out + block * 17
    tl.store(to, half_bits(scale).to(tl.int16), mask=inside)
    tl.store(to[:, None] + 1 + tl.arange(0, 16)[None, :], both.to(tl.int16), mask=inside[:, None])


@triton.jit
def _extreme(low, high):
    """Of each row's values, those of `low` before those of `high`, the first one of the greatest size."""
    size = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)[:, None]
    i = tl.arange(0, 16)[None, :]
    # the place of each, and below it whether it is positive: of the least sum the lowest bit tells the sign
    place_low = tl.where(tl.abs(low) == size, 2 * i + (low > 0).to(tl.int32), 64)
    place_high = tl.where(tl.abs(high) == size, 2 * i + 32 + (high > 0).to(tl.int32), 64)
    first = tl.min(tl.minimum(place_low, place_high), 1)
    size = tl.max(tl.maximum(tl.abs(low), tl.abs(high)), 1)
    return tl.where(first % 2 == 1, size, -size)


@triton.jit
def q4_0(x, out, blocks, BLOCKS: tl.constexpr):
    """out [blocks, 18], uint8, of x [blocks, 32]. Programs: ceil(blocks / BLOCKS)."""
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.minimum(index, blocks - 1)
    low = _half_of(x, block, 0)
    high = _half_of(x, block, 16)
    extreme = _extreme(low, high)
    scale = tl.where(extreme == 0, 0.0, extreme) * -0.125
    inverse = _inverse(scale)[:, None]
    first = tl.minimum(truncated(inverse * low + 8.5), 15)
    second = tl.minimum(truncated(inverse * high + 8.5), 15)
    _store_q4_0(out, block, half_bits(scale), first | (second << 4), index < blocks)


@triton.jit
def _store_q4_0(out, block, half, both, inside):
    to = out + block.to(tl.int64) * 18
    tl.store(to, half.to(tl.uint8), mask=inside)
    tl.store(to + 1, (half >> 8).to(tl.uint8), mask=inside)
    tl.store(to[:, None] + 2 + tl.arange(0, 16)[None, :], both.to(tl.uint8), mask=inside[:, None])


@triton.jit
def fit_q4_0(x, importance, squares, parts, subs, subs_in_row, N: tl.constexpr, SOURCE: tl.constexpr,
             LANES: tl.constexpr):  # fmt: skip
    """parts [2, subs], fp32, scale and level_scale, of blocks x [subs, N], as words, by importance [columns] and the
    mean squares of rows. Programs: ceil(subs / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sub = tl.minimum(index, subs - 1)
    v = loaded(x, sub * (N if SOURCE == "fp32" else N // 2), N, SOURCE)
    of_columns = loaded(importance, sub % subs_in_row * N, N, "fp32")
    mean_square = tl.load(squares + sub // subs_in_row)
    weight = ()
    for j in tl.static_range(N):
        weight = weight + (of_columns[j] * tl.sqrt_rn(mean_square + v[j] * v[j]),)
    scale, level_scale, _ = fit_scale(v, weight, N, 8, True)
    tl.store(parts + index, scale, mask=index < subs)
    tl.store(parts + subs + index, level_scale, mask=index < subs)


@triton.jit
def levels_q4_0(x, parts, out, blocks, BLOCKS: tl.constexpr):
    """out [blocks, 18], uint8, of x [blocks, 32] and what was fitted. Programs: ceil(blocks / BLOCKS)."""
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.minimum(index, blocks - 1)
    level_scale = tl.load(parts + blocks + block)[:, None]
    raised = tl.where(level_scale == 0, 0, 8)  # where there is nearly nothing, levels are 0 themselves
    first = tl.minimum(tl.maximum(nearest(level_scale * _half_of(x, block, 0)), -8), 7) + raised
    second = tl.minimum(tl.maximum(nearest(level_scale * _half_of(x, block, 16)), -8), 7) + raised
    _store_q4_0(out, block, half_bits(tl.load(parts + block)), first | (second << 4), index < blocks)
