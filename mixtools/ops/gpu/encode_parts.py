"""What the encoders share: numbers as the CPU's kernels see them (kernels/lanes.h), sums in sequence, and the search
for one scale (kernels/symmetric_fit.h).

A GPU makes other NaNs than a CPU, and other integers of numbers that do not fit one: wherever bytes depend on either,
it is said here what they become. Of two numbers that are equal (zeros of both signs) or one of which is no number, the
CPU's minimum and maximum give the second one: so do `least` and `most` of them here, which the faster tl.minimum does
not promise.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGIC = tl.constexpr(12582912.0)  # 3 * 2^22: the low bits of it and a number below 2^22 are the nearest integer


@triton.jit
def least(a, b):
    return tl.where(a < b, a, b)


@triton.jit
def most(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def values(x, place):
    """Those of fp32, fp16, or bf16 as int16 (the interpreter makes zeros of bf16's denormals), in fp32."""
    found = tl.load(x + place)
    if found.dtype == tl.int16:
        return (found.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return found.to(tl.float32)


@triton.jit
def nearest(v):
    """The nearest integer, half to even; wraps beyond 22 bits, and makes 0 of a NaN."""
    bits = (tl.where(v == v, v, 0.0) + MAGIC).to(tl.int32, bitcast=True)  # noqa: PLR0124 (a NaN is not itself)
    return (bits & 0x7FFFFF) - 0x400000


@triton.jit
def nearest_level(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """min(max(nearest(v), LOW), HIGH) as fp32, without a conversion."""
    bits = (tl.where(v == v, v, 0.0) + MAGIC).to(tl.int32, bitcast=True)  # noqa: PLR0124 (a NaN is not itself)
    wrapped = ((bits & 0x7FFFFF) | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.minimum(tl.maximum(wrapped, MAGIC + LOW), MAGIC + HIGH) - MAGIC


@triton.jit
def small_level(v, LOW: tl.constexpr, HIGH: tl.constexpr):
    """The same of what is known to be a number below 2^22."""
    return tl.minimum(tl.maximum(v + MAGIC, MAGIC + LOW), MAGIC + HIGH) - MAGIC


@triton.jit
def truncated(v):
    """Toward zero; what does not fit, or is a NaN, becomes the least int32."""
    fits = tl.abs(v) < 2147483648.0
    return tl.where(fits, tl.where(fits, v, 0.0).to(tl.int32), -2147483648)


@triton.jit
def half_bits(v):
    """The nearest IEEE half, ties to even, in the low 16 bits. A NaN is ggml's, of the sign that x86 gives to one."""
    bits = v.to(tl.int32, bitcast=True)
    positive = bits & 0x7FFFFFFF
    exponent = tl.minimum(tl.maximum(positive & 0x7F800000, 113 << 23), 142 << 23)
    shift = (exponent + (13 << 23)).to(tl.float32, bitcast=True)  # adding it rounds away the 13 bits too many
    rounded = (positive.to(tl.float32, bitcast=True) + shift).to(tl.int32, bitcast=True)
    half = ((exponent - (113 << 23)) >> 13) + (rounded - shift.to(tl.int32, bitcast=True))
    half = tl.where(positive < (143 << 23), half, 0x7C00)
    return tl.where(v == v, half | ((bits >> 16) & 0x8000), 0xFE00)  # noqa: PLR0124 (a NaN is not itself)


@triton.jit
def of_half_bits(half):
    """The value of an IEEE half in the low 16 bits (the high ones zero)."""
    positive = half & 0x7FFF
    finite = ((positive << 13).to(tl.float32, bitcast=True) * 5.192296858534828e33).to(tl.int32, bitcast=True)  # 2^112
    found = tl.where(positive < 0x7C00, finite, (positive << 13) | 0x7F800000)
    return (found | ((half & 0x8000) << 16)).to(tl.float32, bitcast=True)


@triton.jit
def loaded(x, place, N: tl.constexpr, SOURCE: tl.constexpr):
    """N numbers of each lane, side by side in memory: words at `place`, of two numbers each where SOURCE is of 16 bits.

    A thread loads 16 bytes at a time. (With a load for each number, Triton takes half a minute for a kernel.)"""
    made = ()
    for start in tl.static_range(0, N if SOURCE == "fp32" else N // 2, 4):
        four = tl.load(x + (place + start)[:, None] + tl.arange(0, 4)[None, :])
        even, odd = tl.split(tl.reshape(four, (four.shape[0], 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        words = (first, second, third, fourth)
        for i in tl.static_range(4):
            if SOURCE == "fp32":
                made = made + (words[i],)
            elif SOURCE == "fp16":
                low = words[i].to(tl.int16).to(tl.float16, bitcast=True)
                high = (words[i] >> 16).to(tl.int16).to(tl.float16, bitcast=True)
                made = made + (low.to(tl.float32), high.to(tl.float32))
            else:
                tl.static_assert(SOURCE == "bf16")
                low = (words[i] << 16).to(tl.float32, bitcast=True)
                made = made + (low, (words[i] & -65536).to(tl.float32, bitcast=True))
    return made


@triton.jit
def stored(to, numbers, N: tl.constexpr, inside):
    """The reverse: N numbers of each lane, side by side at `to`."""
    for start in tl.static_range(0, N, 4):
        even = tl.join(numbers[start], numbers[start + 2])
        odd = tl.join(numbers[start + 1], numbers[start + 3])
        four = tl.reshape(tl.join(even, odd), (even.shape[0], 4))
        tl.store((to + start)[:, None] + tl.arange(0, 4)[None, :], four, mask=inside[:, None])


@triton.jit
def sum_squares(x, sums, count, columns, over, FACTOR: tl.constexpr, SOURCE: tl.constexpr, LANES: tl.constexpr):
    """sums [count] = FACTOR * the sum of the squares of a row, one after the other, / over. A lane has a row of x
    [count, columns], as words. Programs: ceil(count / LANES)."""
    PER_WORD: tl.constexpr = 1 if SOURCE == "fp32" else 2
    index = tl.program_id(0) * LANES + tl.arange(0, LANES)
    place = tl.minimum(index, count - 1) * (columns // PER_WORD)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, columns, 8):
        v = loaded(x, place + start // PER_WORD, 8, SOURCE)
        for j in tl.static_range(8):
            total = total + v[j] * v[j]
    tl.store(sums + index, tl.div_rn(total * FACTOR, over), mask=index < count)


@triton.jit
def first_extreme(x, N: tl.constexpr):
    """Of N values the first one of the greatest size, and that size."""
    extreme = tl.zeros_like(x[0])
    size = extreme
    for j in tl.static_range(N):
        of_this = tl.abs(x[j])
        extreme = tl.where(size < of_this, x[j], extreme)
        size = most(of_this, size)
    return extreme, size


@triton.jit
def _sum_levels(x, weight, level_scale, N: tl.constexpr, TOP: tl.constexpr, SMALL: tl.constexpr):
    """Weighted sums of level * value and level^2 over N levels nearest(level_scale * value)."""
    sum_xl = tl.zeros_like(x[0])
    sum_l2 = sum_xl
    for j in tl.static_range(N):
        if SMALL:
            level = tl.minimum(tl.maximum(level_scale * x[j] + MAGIC, MAGIC - TOP), MAGIC + (TOP - 1)) - MAGIC
        else:
            level = nearest_level(level_scale * x[j], -TOP, TOP - 1)
        sum_xl = sum_xl + weight[j] * x[j] * level
        sum_l2 = sum_l2 + weight[j] * level * level
    return sum_xl, sum_l2


@triton.jit
def fit_scale(x, weight, N: tl.constexpr, TOP: tl.constexpr, SMALL: tl.constexpr):
    """The best of 19 scales by weighted squares, what values are multiplied with for their levels -TOP .. TOP - 1, and
    where there is nearly nothing: both are 0 there, and the second one nowhere else. SMALL: x are finite."""
    extreme, size = first_extreme(x, N)
    nothing = size < 1e-15
    scale = tl.zeros_like(extreme)
    best = scale
    level_scale = scale
    for index in range(19):
        first = index == 0  # with which the extreme becomes -TOP
        step = tl.full((), index, tl.float32)
        step = tl.where(first, 0.0, tl.where(step < 10, step - 10.0, step - 9.0))  # then -9 .. 9 without 0
        candidate = tl.div_rn(-(step * 0.1 + TOP), extreme)
        sum_xl, sum_l2 = _sum_levels(x, weight, candidate, N, TOP, SMALL)
        better = first | ((sum_l2 > 0) & (best * sum_l2 < sum_xl * sum_xl))
        new_scale = tl.where(first & (sum_l2 == 0), 0.0, tl.div_rn(sum_xl, sum_l2))
        scale = tl.where(better, new_scale, scale)
        best = tl.where(better, new_scale * sum_xl, best)
        level_scale = tl.where(better, candidate, level_scale)
    return tl.where(nothing, 0.0, scale), tl.where(nothing, 0.0, level_scale), nothing
