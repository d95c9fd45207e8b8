"""Q3_K and Q6_K: value = scale * level in sub-blocks of 16, as kernels/symmetric_fit.h and kernels/encode_symmetric.h
have it, operation by operation.

    fit or sweep: a lane for each sub-block ─► round_scales: for each block ─► encode_levels.py: for each value

What one finds lies in `parts` [3, sub-blocks], fp32, for the next: scale, weight and level_scale. The scale is as it
was fitted, and then what a decoder makes of its level; a level_scale is 0 where all levels are to be 0.
`sweep` finds levels that no level_scale gives: eight of them lie in each word of `swept` [sub-blocks, 2].
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_parts import (
    first_extreme,
    fit_scale,
    half_bits,
    loaded,
    nearest,
    nearest_level,
    of_half_bits,
    small_level,
    stored,
)


@triton.jit
def fit(x, importance, squares, parts, subs, subs_in_row, N: tl.constexpr, TOP: tl.constexpr,
        WEIGHTED: tl.constexpr, WIDENED: tl.constexpr, SOURCE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """parts [3, subs] of x [subs, N], as words. WEIGHTED: by importance [columns], WIDENED by squares [blocks]; or else
    by the values' squares. Programs: ceil(subs / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sub = tl.minimum(index, subs - 1)
    v = loaded(x, sub * (N if SOURCE == "fp32" else N // 2), N, SOURCE)
    weight = ()
    sum_weight = tl.zeros_like(v[0])
    if WEIGHTED:
        of_columns = loaded(importance, sub % subs_in_row * N, N, "fp32")
        for j in tl.static_range(N):
            of_this = of_columns[j]
            if WIDENED:
                of_this = of_this * tl.sqrt_rn(tl.load(squares + sub // (256 // N)) + v[j] * v[j])
            weight = weight + (of_this,)
            sum_weight = sum_weight + of_this
    else:
        for j in tl.static_range(N):
            weight = weight + (v[j] * v[j],)
    scale, level_scale, _ = fit_scale(v, weight, N, TOP, True)
    found = (scale, sum_weight, level_scale)
    for part in tl.static_range(3):
        tl.store(parts + part * subs + index, found[part], mask=index < subs)


@triton.jit
def _sweep_once(x, levels, sum_xl, sum_l2, N: tl.constexpr, TOP: tl.constexpr):
    """Each level to where the others want it, where that is better. A round that moves none changes nothing, and
    neither do those after it."""
    moved = ()
    for j in tl.static_range(N):
        weight = x[j] * x[j]
        wx = weight * x[j]
        old = levels[j]
        xl = sum_xl - wx * old
        l2 = sum_l2 - weight * old * old
        better = xl > 0
        wanted = nearest_level(tl.div_rn(x[j] * l2, xl), -TOP, TOP - 1)
        xl = xl + wx * wanted
        l2 = l2 + weight * wanted * wanted
        better = better & (wanted != old) & (l2 > 0) & (sum_xl * sum_xl * l2 < xl * xl * sum_l2)
        moved = moved + (tl.where(better, wanted, old),)
        sum_xl = tl.where(better, xl, sum_xl)
        sum_l2 = tl.where(better, l2, sum_l2)
    return moved, sum_xl, sum_l2


@triton.jit
def sweep(x, parts, swept, subs, N: tl.constexpr, TOP: tl.constexpr, SOURCE: tl.constexpr, LANES: tl.constexpr):
    """Scales, the first of parts [3, subs], and levels raised by TOP, swept [subs, 2], of x [subs, N], as words. The
    values' squares are the weights. Programs: ceil(subs / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = index < subs
    v = loaded(x, tl.minimum(index, subs - 1) * (N if SOURCE == "fp32" else N // 2), N, SOURCE)
    extreme, size = first_extreme(v, N)
    nothing = size < 1e-15
    level_scale = tl.div_rn(-1.0 * TOP, extreme)
    levels = ()
    sum_xl = tl.zeros_like(size)
    sum_l2 = sum_xl
    for j in tl.static_range(N):
        level = small_level(level_scale * v[j], -TOP, TOP - 1)
        weight = v[j] * v[j]
        levels = levels + (level,)
        sum_xl = sum_xl + weight * v[j] * level
        sum_l2 = sum_l2 + weight * level * level
    for _ in range(5):
        levels, sum_xl, sum_l2 = _sweep_once(v, levels, sum_xl, sum_l2, N, TOP)
    scale = tl.where(~nothing & (sum_l2 > 0), tl.div_rn(sum_xl, sum_l2), 0.0)
    tl.store(parts + index, scale, mask=inside)
    for half in tl.static_range(2):
        word = tl.zeros_like(index)
        for j in tl.static_range(8):
            word = word | ((nearest(levels[8 * half + j]) + TOP) << (4 * j))
        tl.store(swept + index * 2 + half, tl.where(nothing, 0, word), mask=inside)


@triton.jit
def _round_to_six(x):
    """16 scales as Q3_K has them without importance: levels -32 .. 31, and their unit."""
    extreme, _ = first_extreme(x, 16)
    inverse = tl.div_rn(-32.0, extreme)
    nothing = extreme == 0
    levels = ()
    for i in tl.static_range(16):
        level = tl.minimum(tl.maximum(nearest(inverse * x[i]), -32), 31)
        levels = levels + (tl.where(nothing, -32, level),)
    return tl.where(nothing, 0.0, tl.div_rn(1.0, inverse)), levels


@triton.jit
def _fit_to_six(x, weight):
    """The same with importance, which the scales are fitted by as well."""
    unit, level_scale, nothing = fit_scale(x, weight, 16, 32, False)
    levels = ()
    for i in tl.static_range(16):
        level = tl.minimum(tl.maximum(nearest(level_scale * x[i]), -32), 31)
        levels = levels + (tl.where(nothing, -32, level),)
    return unit, levels


@triton.jit
def _round_to_eight(x):
    """16 scales as Q6_K has them: levels of 8 bits, their unit, and whether the block is to be all zeros."""
    extreme, size = first_extreme(x, 16)
    inverse = tl.div_rn(-128.0, extreme)
    empty = size < 1e-15
    levels = ()
    for i in tl.static_range(16):
        levels = levels + (tl.where(empty, 0, tl.minimum(nearest(inverse * x[i]), 127)),)
    return tl.where(empty, 0.0, tl.div_rn(1.0, inverse)), levels, empty


@triton.jit
def _six_bits(levels):
    """The 12 bytes of Q3_K's scales: raised by 32, 4 bits of the first 8 below those of the others, then the 2 high
    bits of every fourth in a byte."""
    made = ()
    for i in tl.static_range(8):
        made = made + (((levels[i] + 32) & 15) | (((levels[i + 8] + 32) & 15) << 4),)
    for i in tl.static_range(4):
        byte = (levels[i] + 32) >> 4
        for k in tl.static_range(1, 4):
            byte = byte | (((levels[4 * k + i] + 32) >> 4) << (2 * k))
        made = made + (byte,)
    return made


@triton.jit
def round_scales(parts, out, subs, blocks, TOP: tl.constexpr, WEIGHTED: tl.constexpr, HALVES: tl.constexpr,
                 UNIT_AT: tl.constexpr, SCALES_AT: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of out [blocks, HALVES], int16, the scales and their unit. Programs: ceil(blocks / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = index < blocks
    block = tl.minimum(index, blocks - 1)
    place = block * 16
    to = out + block * HALVES
    scales = loaded(parts, place, 16, "fp32")
    if TOP == 32:
        unit, levels, empty = _round_to_eight(scales)
        none = (tl.zeros_like(unit),) * 16  # levels of 0 where the block is empty
        stored(parts + 2 * subs + place, none, 16, inside & empty)
        for i in tl.static_range(8):
            both = (levels[2 * i] & 255) | ((levels[2 * i + 1] & 255) << 8)
            tl.store(to + SCALES_AT + i, both.to(tl.int16), mask=inside)
    else:
        if WEIGHTED:
            unit, levels = _fit_to_six(scales, loaded(parts + subs, place, 16, "fp32"))
        else:
            unit, levels = _round_to_six(scales)
        packed = _six_bits(levels)
        for i in tl.static_range(6):
            both = packed[2 * i] | (packed[2 * i + 1] << 8)
            tl.store(to + SCALES_AT + i, both.to(tl.int16), mask=inside)
    half = half_bits(unit)
    tl.store(to + UNIT_AT, half.to(tl.int16), mask=inside)
    scales = ()
    for i in tl.static_range(16):
        scales = scales + (of_half_bits(half) * levels[i].to(tl.float32),)
    stored(parts + place, scales, 16, inside)
