"""From planes (planes.py) to numbers, in registers: for each kind what is loaded of a unit, and its codes' values.

Each gives the format's own value in fp32, bit for bit: ggml's, bitsandbytes', or (code - zero) * scale. Where a product
is exact in fp32 (a scale of 11 digits times a code) one rounding follows, wherever it stands in an expression.

A code of a few bits becomes a number without a conversion: put among the digits of a float whose exponent makes the
lowest of them count one, it stands for 2^(23 - place) + code.
"""

from __future__ import annotations

import triton
import triton.language as tl

TABLE = tl.constexpr(16 + 256 + 1)  # numbers beside a matrix in nf4 whose scales are bytes
LEVELS = tl.constexpr(16)


@triton.jit
def _among_digits(bits, nought, PLACE: tl.constexpr):
    """`bits`, zero but for those of a code at `PLACE` upwards -> 2^(23 - PLACE) + code."""
    return (bits | (((150 - PLACE) << 23) + nought)).to(tl.float32, bitcast=True)


@triton.jit
def _half(bits):
    """The f16 in the low 16 bits."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _load_int4(scales, zeros, row, unit, PLAN: tl.constexpr):
    """scale [R, C], and it times 2^11 + zero and 2^7 + zero: exact, since they have 12 and 8 digits"""
    GROUPS: tl.constexpr = PLAN.columns // PLAN.group
    place = row[:, None] * GROUPS + (unit * 32 // PLAN.group)[None, :]
    scale = tl.load(scales + place).to(tl.float32)
    if PLAN.has_zeros:
        both = tl.load(zeros + place // 2).to(tl.int32)
        zero = ((both >> (place % 2 * 4).to(tl.int32)) & 15) + PLAN.zero
        return scale, (2048 + zero).to(tl.float32) * scale, (128 + zero).to(tl.float32) * scale
    else:
        return scale, (2048.0 + PLAN.zero) * scale, (128.0 + PLAN.zero) * scale


@triton.jit
def _int4(words, scale, at_12, at_16, nought, J: tl.constexpr):
    """Codes 0, 2, 3, 5 are brought to bit 12, their neighbours with them to bit 16; 7 by itself."""
    if J < 2:
        moved = words << 12
    elif J == 2:
        moved = words << 4
    elif J < 5:
        moved = words
    elif J < 7:
        moved = words >> 8
    else:
        moved = words >> 12
    if J == 0 or J == 2 or J == 3 or J == 5:
        return tl.fma(_among_digits(moved & (15 << 12), nought, 12), scale[:, :, None], -at_12[:, :, None])
    else:
        return tl.fma(_among_digits(moved & (15 << 16), nought, 16), scale[:, :, None], -at_16[:, :, None])


@triton.jit
def _load_nf4(absmax, tables, largest, row, unit, PLAN: tl.constexpr):
    """absmax [R, C]"""
    BLOCKS: tl.constexpr = PLAN.columns // PLAN.group
    block = (unit * 32 // PLAN.group)[None, :]
    found = tl.load(absmax + row[:, None] * BLOCKS + block)
    if PLAN.nested:
        RUNS: tl.constexpr = (PLAN.matrix_rows * BLOCKS + 255) // 256  # of one matrix
        table = tables + (row // PLAN.matrix_rows * TABLE)[:, None]
        run = (row // PLAN.matrix_rows * RUNS)[:, None] + ((row % PLAN.matrix_rows)[:, None] * BLOCKS + block) // 256
        return tl.load(table + LEVELS + found.to(tl.int32)) * tl.load(largest + run) + tl.load(table + (TABLE - 1))
    else:
        return found


@triton.jit
def _nf4(words, absmax, levels, J: tl.constexpr):
    return tl.load(levels + ((words >> (4 * J)) & 15)) * absmax[:, :, None]


@triton.jit
def _q8_0(words, d, nought, J: tl.constexpr):
    """Bytes are brought to bit 15: 2^8 + code + 128 has 9 digits."""
    if J == 0:
        moved = words << 15
    elif J == 1:
        moved = words << 7
    else:
        moved = words >> (8 * J - 15)
    return tl.fma(_among_digits(moved & (255 << 15), nought, 15), d[:, :, None], -(d * 384)[:, :, None])


@triton.jit
def _load_minima(factors, lows, highs, row, unit, UNITS: tl.constexpr):
    """Of Q4_K's and Q5_K's groups of 32: scale and minimum [R, C]"""
    both = tl.load(factors + row[:, None] * (UNITS // 8) + (unit // 8)[None, :])
    low = tl.load(lows + row[:, None] * UNITS + unit[None, :]).to(tl.int32)
    high = tl.load(highs + row[:, None] * (UNITS // 2) + (unit // 2)[None, :]).to(tl.int32) >> (unit % 2 * 4)[None, :]
    scale = (low & 15) | ((high & 3) << 4)
    minimum = (low >> 4) | ((high & 12) << 2)
    return _half(both) * scale.to(tl.float32), _half(both >> 16) * minimum.to(tl.float32)


@triton.jit
def _q4_k(words, scale, minimum, nought, J: tl.constexpr):
    PLACE: tl.constexpr = 4 * J if J < 5 else 4 * J - 12
    moved = words if J < 5 else words >> 12
    code = _among_digits(moved & (15 << PLACE), nought, PLACE) - (1 << (23 - PLACE))
    return tl.fma(code, scale[:, :, None], -minimum[:, :, None])


@triton.jit
def _of_bytes(even, odd, nought, BITS: tl.constexpr, LESS: tl.constexpr, J: tl.constexpr):
    """Codes of five or six bits less `LESS`, when each lies in a byte: those of even and of odd J in a word each."""
    moved = (even if J % 2 == 0 else odd) >> (0 if J < 6 else 8)
    PLACE: tl.constexpr = J // 2 * 8 - (0 if J < 6 else 8)
    bits = moved & (((1 << BITS) - 1) << PLACE)
    return _among_digits(bits, nought, PLACE) - ((1 << (23 - PLACE)) + LESS)


@triton.jit
def _five_bits(words, fifth):
    """The fifth bit of word c's code J is bit 4 J + c of `fifth`."""
    c = tl.arange(0, 4)[None, None, :]
    even = (words & 0x0F0F0F0F) | ((fifth[:, :, None] << (4 - c)) & 0x10101010)
    odd = ((words >> 4) & 0x0F0F0F0F) | ((fifth[:, :, None] >> c) & 0x10101010)
    return even, odd


@triton.jit
def _six_bits(words, high):
    """The high bits are in the order of planes.HIGH_BITS_OF_8."""
    even = (words & 0x0F0F0F0F) | ((high << 4) & 0x3030) | ((high << 18) & 0x30300000)
    odd = ((words >> 4) & 0x0F0F0F0F) | (high & 0x3030) | ((high << 14) & 0x30300000)
    return even, odd


@triton.jit
def _q5_k(even, odd, scale, minimum, nought, J: tl.constexpr):
    return tl.fma(_of_bytes(even, odd, nought, 5, 0, J), scale[:, :, None], -minimum[:, :, None])


@triton.jit
def _q6_k(even, odd, first, second, nought, J: tl.constexpr):
    return _of_bytes(even, odd, nought, 6, 32, J) * (first if J < 4 else second)[:, :, None]


@triton.jit
def _q2_k(words, both, groups, nought, J: tl.constexpr):
    PLACE: tl.constexpr = 2 * J if J < 11 else 2 * J - 12
    moved = words if J < 11 else words >> 12
    scale = _half(both) * ((groups >> (J // 4 * 8)) & 15).to(tl.float32)
    minimum = _half(both >> 16) * ((groups >> (J // 4 * 8 + 4)) & 15).to(tl.float32)
    code = _among_digits(moved & (3 << PLACE), nought, PLACE) - (1 << (23 - PLACE))
    return tl.fma(code, scale[:, :, None], -minimum[:, :, None])


@triton.jit
def _three_bits(words, high):
    """A code in four bits each, of even and of odd J. The high bits are in the order of planes.HIGH_BITS_OF_16."""
    even = (words & 0x33333333) | ((high << 2) & 0x4444) | ((high << 17) & 0x44440000)
    odd = ((words >> 2) & 0x33333333) | (high & 0x4444) | ((high << 15) & 0x44440000)
    return even, odd


@triton.jit
def _q3_k(even, odd, d, low_scales, high_scales, nought, J: tl.constexpr):
    moved = (even if J % 2 == 0 else odd) >> (0 if J < 12 else 16)
    PLACE: tl.constexpr = J // 2 * 4 - (0 if J < 12 else 16)
    scale = ((low_scales >> (J // 4 * 4)) & 15) | (((high_scales >> (J // 4 * 2)) & 3) << 4)
    code = _among_digits(moved & (7 << PLACE), nought, PLACE) - ((1 << (23 - PLACE)) + 4)
    return code * (d * (scale - 32).to(tl.float32))[:, :, None]


@triton.jit
def load(planes, row, unit, PLAN: tl.constexpr):
    """Rows [R] (int64), units [C] -> what `value` makes numbers of: 16 bytes of each unit, and what belongs to them."""
    KIND: tl.constexpr = PLAN.kind
    UNITS: tl.constexpr = PLAN.units
    line = (row * PLAN.stride)[:, None, None]
    column = (unit * PLAN.wide)[None, :, None] + tl.arange(0, PLAN.wide)[None, None, :]
    if PLAN.ragged:
        column = tl.minimum(column, PLAN.columns - 1)
    words = tl.load(planes[0] + line + column)
    # Of neighbours a thread would load several at once, to pass most of them on through shared memory: this hides
    # that units are neighbours, and each thread loads what its own needs.
    unit = unit & 0x7FFFFFFF
    each, block = row[:, None] * UNITS + unit[None, :], unit[None, :]
    if KIND == "dense":
        return (words,)
    elif KIND == "int4":
        scale, at_12, at_16 = _load_int4(planes[1], planes[2], row, unit, PLAN)
        return words, scale, at_12, at_16
    elif KIND == "nf4":
        return words, _load_nf4(planes[1], planes[2], planes[3], row, unit, PLAN), planes[2]
    elif KIND == "q8_0":
        return words, tl.load(planes[1] + row[:, None] * (UNITS // 2) + block // 2).to(tl.float32)
    elif KIND == "q4_k" or KIND == "q5_k":
        scale, minimum = _load_minima(planes[1], planes[2], planes[3], row, unit, UNITS)
        if KIND == "q4_k":
            return words, scale, minimum
        else:
            even, odd = _five_bits(words, tl.load(planes[4] + each))
            return even, odd, scale, minimum
    elif KIND == "q6_k":
        high = tl.load(planes[1] + line + column).to(tl.int32)
        d = tl.load(planes[3] + row[:, None] * (UNITS // 8) + block // 8).to(tl.float32)
        both = tl.load(planes[2] + each).to(tl.int32)
        even, odd = _six_bits(words, high)
        return even, odd, d * ((both << 24) >> 24).to(tl.float32), d * (both >> 8).to(tl.float32)
    elif KIND == "q2_k":
        return words, tl.load(planes[1] + row[:, None] * (UNITS // 4) + block // 4), tl.load(planes[2] + each)
    else:
        tl.static_assert(KIND == "q3_k")
        high = tl.load(planes[1] + line + column).to(tl.int32)
        d = tl.load(planes[2] + row[:, None] * (UNITS // 4) + block // 4).to(tl.float32)
        even, odd = _three_bits(words, high)
        return even, odd, d, tl.load(planes[3] + each).to(tl.int32), tl.load(planes[4] + each).to(tl.int32)


@triton.jit
def value(loaded, nought, KIND: tl.constexpr, J: tl.constexpr):
    """fp32 [R, C, wide]: of each unit the values of columns wide * J and on."""
    if KIND == "dense":
        return loaded[0].to(tl.float32)
    elif KIND == "int4":
        return _int4(loaded[0], loaded[1], loaded[2], loaded[3], nought, J)
    elif KIND == "nf4":
        return _nf4(loaded[0], loaded[1], loaded[2], J)
    elif KIND == "q8_0":
        return _q8_0(loaded[0], loaded[1], nought, J)
    elif KIND == "q4_k":
        return _q4_k(loaded[0], loaded[1], loaded[2], nought, J)
    elif KIND == "q5_k":
        return _q5_k(loaded[0], loaded[1], loaded[2], loaded[3], nought, J)
    elif KIND == "q6_k":
        return _q6_k(loaded[0], loaded[1], loaded[2], loaded[3], nought, J)
    elif KIND == "q2_k":
        return _q2_k(loaded[0], loaded[1], loaded[2], nought, J)
    else:
        return _q3_k(loaded[0], loaded[1], loaded[2], loaded[3], loaded[4], nought, J)
