"""Q4_K, Q5_K and Q2_K: value = scale * level - min in sub-blocks of 32 or 16, as kernels/affine_fit.h and
kernels/encode_affine.h have it, operation by operation.

    fit: a lane for each sub-block ─► round_scales: for each block's scales, and its mins ─► pack_scales: for each block
        ─► encode_levels.py: for each value

What one finds lies in `parts` [5, sub-blocks], fp32, for the next: scale, min, weight, level_scale, level_low; the
first two as they were fitted, then their levels, then what a decoder makes of these.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_parts import MAGIC, half_bits, least, loaded, most, nearest, of_half_bits, stored


@triton.jit
def _find_levels(x, weight, low, level_scale, N: tl.constexpr, TOP: tl.constexpr):
    """N levels, min(max(nearest(level_scale * (value - low)), 0), TOP) as fp32, and the weighted sums of level, level^2
    and level * value."""
    levels = ()
    sum_l = tl.zeros_like(low)
    sum_l2 = sum_l
    sum_xl = sum_l
    for j in tl.static_range(N):
        # as `nearest_level` has it, and faster: a NaN becomes -inf, whose low bits are those of a negative number, too
        wanted = tl.maximum(level_scale * (x[j] - low), float("-inf"))
        bits = (wanted + MAGIC).to(tl.int32, bitcast=True)
        wrapped = ((bits & 0x7FFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
        level = tl.minimum(tl.maximum(wrapped, MAGIC), MAGIC + TOP) - MAGIC
        levels = levels + (level,)
        wl = weight[j] * level
        sum_l = sum_l + wl
        sum_l2 = sum_l2 + wl * level
        sum_xl = sum_xl + wl * x[j]
    return levels, sum_l, sum_l2, sum_xl


@triton.jit
def _sum_errors(x, weight, levels, scale, low, N: tl.constexpr, ABSOLUTE: tl.constexpr):
    error = tl.zeros_like(low)
    for j in tl.static_range(N):
        difference = scale * levels[j] + low - x[j]
        error = error + weight[j] * (tl.abs(difference) if ABSOLUTE else difference * difference)
    return error


@triton.jit
def _begin(x, weight, N: tl.constexpr):
    lowest = x[0]
    high = x[0]
    sum_weight = weight[0]
    sum_x = weight[0] * x[0]
    for j in tl.static_range(1, N):
        lowest = least(x[j], lowest)
        high = most(x[j], high)
        sum_weight = sum_weight + weight[j]
        sum_x = sum_x + weight[j] * x[j]
    return tl.where(lowest > 0, 0.0, lowest), high, sum_weight, sum_x


@triton.jit
def _search(x, weight, N: tl.constexpr, TOP: tl.constexpr, STEPS: tl.constexpr, FIRST: tl.constexpr,
            STEP: tl.constexpr, ABSOLUTE: tl.constexpr):  # fmt: skip
    """Least squares over candidates 0 .. STEPS, each of which starts from the least value that the best one found. The
    one before them is no fit, but the whole range over TOP levels. It goes through the same text, since Triton takes
    four times as long for twice as long a text."""
    low, high, sum_weight, sum_x = _begin(x, weight, N)
    flat = high == low
    level_low = low
    level_scale = tl.zeros_like(low)
    scale = level_scale
    error = level_scale
    for number in range(-1, STEPS + 1):
        first = number < 0
        spread = tl.where(first, 1.0 * TOP, tl.full((), number, tl.float32) * STEP + FIRST + TOP)
        new_level_scale = tl.where(flat, 0.0, tl.div_rn(spread, high - low))
        levels, sum_l, sum_l2, sum_xl = _find_levels(x, weight, low, new_level_scale, N, TOP)
        determinant = sum_weight * sum_l2 - sum_l * sum_l
        new_low = tl.div_rn(sum_l2 * sum_x - sum_l * sum_xl, determinant)
        above = new_low > 0
        new_low = tl.where(first, low, tl.where(above, 0.0, new_low))
        # one division for all three: where the min would be above zero, the scale alone is fitted
        dividend = tl.where(above, sum_xl, sum_weight * sum_xl - sum_x * sum_l)
        divisor = tl.where(above, sum_l2, determinant)
        new_scale = tl.div_rn(tl.where(first, 1.0, dividend), tl.where(first, new_level_scale, divisor))
        new_scale = tl.where(first & flat, 0.0, new_scale)
        new_error = _sum_errors(x, weight, levels, new_scale, new_low, N, ABSOLUTE)
        better = first | ((determinant > 0) & (new_error < error))
        level_scale = tl.where(better, new_level_scale, level_scale)
        level_low = tl.where(better, low, level_low)
        error = tl.where(better, new_error, error)
        scale = tl.where(better, new_scale, scale)
        low = tl.where(better, new_low, low)
    return scale, low, sum_weight, level_scale, level_low


@triton.jit
def fit(x, importance, squares, parts, subs, subs_in_row, N: tl.constexpr, TOP: tl.constexpr, STEPS: tl.constexpr,
        FIRST: tl.constexpr, STEP: tl.constexpr, ABSOLUTE: tl.constexpr, MEAN_SQUARE: tl.constexpr,
        WEIGHTED: tl.constexpr, SOURCE: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """parts [5, subs] of x [subs, N], as words. WEIGHTED: by importance [columns] and squares [blocks]; otherwise by a
    value's size, and, MEAN_SQUARE, the root of its sub-block's mean square. Programs: ceil(subs / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    sub = tl.minimum(index, subs - 1)
    v = loaded(x, sub * (N if SOURCE == "fp32" else N // 2), N, SOURCE)
    weight = ()
    if WEIGHTED:
        variance = tl.load(squares + sub // (256 // N))
        of_columns = loaded(importance, sub % subs_in_row * N, N, "fp32")
        for j in tl.static_range(N):
            weight = weight + (of_columns[j] * tl.sqrt_rn(variance + v[j] * v[j]),)
    else:
        base = tl.zeros_like(v[0])
        if MEAN_SQUARE:
            for j in tl.static_range(N):
                base = base + v[j] * v[j]
            base = tl.sqrt_rn(base * (1.0 / N))
        for j in tl.static_range(N):
            weight = weight + (base + tl.abs(v[j]) if MEAN_SQUARE else tl.abs(v[j]),)
    scale, low, sum_weight, level_scale, level_low = _search(v, weight, N, TOP, STEPS, FIRST, STEP, ABSOLUTE)
    found = (scale, -low, sum_weight, level_scale, level_low)
    for part in tl.static_range(5):
        tl.store(parts + part * subs + index, found[part], mask=index < subs)


@triton.jit
def _byte_level(v, TOP: tl.constexpr):
    return tl.minimum(nearest(v), TOP)


@triton.jit
def _try_levels(x, weight, inverse, wraps, COUNT: tl.constexpr, TOP: tl.constexpr):
    """The weighted squares of what levels nearest(inverse * x) miss, which wrap as bytes, or else are TOP at most."""
    error = tl.zeros_like(inverse)
    scale = tl.div_rn(1.0, inverse)
    for i in tl.static_range(COUNT):
        level = nearest(inverse * x[i])
        level = tl.where(wraps, level & 255, tl.minimum(level, TOP))
        difference = x[i] - scale * level.to(tl.float32)
        error = error + weight[i] * difference * difference
    return error


@triton.jit
def _fit_levels(x, weight, COUNT: tl.constexpr, TOP: tl.constexpr):
    """The scale and the levels 0 .. TOP, bytes, of COUNT numbers: by candidates, then by moving one level at a time."""
    largest = tl.zeros_like(x[0])
    for i in tl.static_range(COUNT):
        largest = most(largest, x[i])
    nothing = largest < 1e-15
    inverse = tl.zeros_like(largest)
    best = inverse
    for index in range(9):
        first = index == 0  # with which the largest becomes TOP
        step = tl.full((), index, tl.float32)
        step = tl.where(first, 0.0, tl.where(step < 5, step - 5.0, step - 4.0))  # then -4 .. 4 without 0
        candidate = tl.div_rn(step * 0.1 + TOP, largest)
        error = _try_levels(x, weight, candidate, first, COUNT, TOP)
        better = first | (error < best)
        best = tl.where(better, error, best)
        inverse = tl.where(better, candidate, inverse)
    levels = ()
    sum_lx = tl.zeros_like(largest)
    sum_l2 = sum_lx
    for i in tl.static_range(COUNT):
        level = _byte_level(inverse * x[i], TOP)
        levels = levels + (level & 255,)
        level = level.to(tl.float32)
        sum_lx = sum_lx + weight[i] * x[i] * level
        sum_l2 = sum_l2 + weight[i] * level * level
    for _ in range(5):
        levels, sum_lx, sum_l2 = _move_levels(x, weight, levels, sum_lx, sum_l2, COUNT, TOP)
    kept = ()
    for i in tl.static_range(COUNT):
        kept = kept + (tl.where(nothing, 0, levels[i]),)
    return tl.where(nothing | ~(sum_l2 > 0), 0.0, tl.div_rn(sum_lx, sum_l2)), kept


@triton.jit
def _move_levels(x, weight, levels, sum_lx, sum_l2, COUNT: tl.constexpr, TOP: tl.constexpr):
    """One round: each level to where the others want it, where that is better. A round that moves none changes nothing,
    and neither do those after it."""
    moved = ()
    for i in tl.static_range(COUNT):
        old = levels[i].to(tl.float32)
        wx = weight[i] * x[i]
        lx = sum_lx - wx * old
        l2 = sum_l2 - weight[i] * old * old
        positive = (lx > 0) & (l2 > 0)
        wanted = _byte_level(tl.div_rn(x[i] * l2, lx), TOP)
        new = wanted.to(tl.float32)
        lx = lx + wx * new
        l2 = l2 + weight[i] * new * new
        better = positive & (wanted != levels[i]) & (sum_lx * sum_lx * l2 < lx * lx * sum_l2)
        moved = moved + (tl.where(better, wanted & 255, levels[i]),)
        sum_lx = tl.where(better, lx, sum_lx)
        sum_l2 = tl.where(better, l2, sum_l2)
    return moved, sum_lx, sum_l2


@triton.jit
def _round_levels(x, COUNT: tl.constexpr, TOP: tl.constexpr):
    """Plainly: the largest becomes TOP."""
    largest = tl.zeros_like(x[0])
    for i in tl.static_range(COUNT):
        largest = most(x[i], largest)
    inverse = tl.where(largest > 0, tl.div_rn(1.0 * TOP, largest), 0.0)
    levels = ()
    for i in tl.static_range(COUNT):
        levels = levels + (nearest(inverse * x[i]) & 255,)
    return tl.div_rn(largest, 1.0 * TOP), levels


@triton.jit
def _pack_eight(scale, low):
    """Q4_K's and Q5_K's scales and mins of 6 bits in 3 words, and what a decoder finds there."""
    words = (tl.zeros_like(scale[0]), tl.zeros_like(scale[0]), tl.zeros_like(scale[0]))
    first = ()
    second = ()
    first_low = ()
    second_low = ()
    for i in tl.static_range(4):
        a = scale[i] | (((scale[i + 4] >> 4) << 6) & 255)
        b = low[i] | (((low[i + 4] >> 4) << 6) & 255)
        c = (scale[i + 4] & 15) | ((low[i + 4] & 15) << 4)
        first = first + (a & 63,)
        second = second + ((c & 15) | ((a >> 6) << 4),)
        first_low = first_low + (b & 63,)
        second_low = second_low + ((c >> 4) | ((b >> 6) << 4),)
        words = (words[0] | (a << (8 * i)), words[1] | (b << (8 * i)), words[2] | (c << (8 * i)))
    return words, first + second, first_low + second_low


@triton.jit
def _pack_sixteen(scale, low):
    """Q2_K's scales and mins of 4 bits in 4 words, and what a decoder finds there."""
    words = ()
    scales = ()
    lows = ()
    for i in tl.static_range(4):
        word = tl.zeros_like(scale[0])
        for k in tl.static_range(4):
            both = scale[4 * i + k] | ((low[4 * i + k] << 4) & 255)
            scales = scales + (both & 15,)
            lows = lows + (both >> 4,)
            word = word | (both << (8 * k))
        words = words + (word,)
    return words, scales, lows


@triton.jit
def round_scales(parts, units, subs, blocks, SUBS: tl.constexpr, TOP: tl.constexpr, WEIGHTED: tl.constexpr,
                 CLIPPED: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of parts the scales and mins, each made a level of units [2, blocks]. A lane has either of a block. Programs:
    ceil(2 * blocks / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = index < 2 * blocks
    either = tl.minimum(index, 2 * blocks - 1)
    block = either % blocks
    place = either // blocks * subs + block * SUBS
    x = loaded(parts, place, SUBS, "fp32")
    if WEIGHTED:
        unit, level = _fit_levels(x, loaded(parts + 2 * subs, block * SUBS, SUBS, "fp32"), SUBS, TOP)
    else:
        unit, level = _round_levels(x, SUBS, TOP)
    made = ()
    for i in tl.static_range(SUBS):
        made = made + ((tl.minimum(level[i], TOP) if CLIPPED else level[i]).to(tl.float32),)
    tl.store(units + index, unit, mask=inside)
    stored(parts + place, made, SUBS, inside)


@triton.jit
def pack_scales(parts, units, out, subs, blocks, SUBS: tl.constexpr, WORDS: tl.constexpr, UNITS_AT: tl.constexpr,
                SCALES_AT: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """Of out [blocks, WORDS], int32, the units of the scales and mins, and these themselves; of parts what a decoder
    makes of both. A lane has a block. Programs: ceil(blocks / LANES)."""
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    inside = index < blocks
    block = tl.minimum(index, blocks - 1)
    place = block * SUBS
    found = loaded(parts, place, SUBS, "fp32")
    found_low = loaded(parts + subs, place, SUBS, "fp32")
    scale = ()
    low = ()
    for i in tl.static_range(SUBS):
        scale = scale + (found[i].to(tl.int32),)
        low = low + (found_low[i].to(tl.int32),)
    words, scale, low = _pack_eight(scale, low) if SUBS == 8 else _pack_sixteen(scale, low)
    half = half_bits(tl.load(units + block))
    low_half = half_bits(tl.load(units + blocks + block))
    to = out + block * WORDS
    tl.store(to + UNITS_AT, half | (low_half << 16), mask=inside)
    for i in tl.static_range(len(words)):
        tl.store(to + SCALES_AT + i, words[i], mask=inside)
    scales = ()
    lows = ()
    for i in tl.static_range(SUBS):
        scales = scales + (of_half_bits(half) * scale[i].to(tl.float32),)
        lows = lows + (of_half_bits(low_half) * low[i].to(tl.float32),)
    stored(parts + place, scales, SUBS, inside)
    stored(parts + subs + place, lows, SUBS, inside)
