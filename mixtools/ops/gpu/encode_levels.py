"""The last step for blocks of 256: each value's level under its sub-block's rounded scale (and min), packed as
ggml-common.h of https://github.com/ggml-org/llama.cpp has it. Where a scale was rounded to zero, the levels of its fit
stay.

A program takes some blocks, 32 values of each at a time: the eighths of a block, whose levels share bytes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .encode_parts import nearest, values


@triton.jit
def _affine(v, parts, sub, subs, TOP: tl.constexpr):
    scale = tl.load(parts + sub)
    low = tl.load(parts + subs + sub)
    level_scale = tl.load(parts + 3 * subs + sub)
    level_low = tl.load(parts + 4 * subs + sub)
    wanted = tl.where(scale == 0, level_scale * (v - level_low), tl.div_rn(v + low, scale))
    return tl.minimum(tl.maximum(nearest(wanted), 0), TOP)


@triton.jit
def _symmetric(v, parts, sub, subs, TOP: tl.constexpr):
    """Raised by TOP; 0 for a level_scale of 0."""
    scale = tl.load(parts + sub)
    level_scale = tl.load(parts + 2 * subs + sub)
    wanted = tl.where(scale == 0, level_scale * v, tl.div_rn(v, scale))
    level = tl.minimum(tl.maximum(nearest(wanted), -TOP), TOP - 1) + TOP
    return tl.where((scale == 0) & (level_scale == 0), 0, level)


@triton.jit
def _swept(v, parts, swept, value, TOP: tl.constexpr):
    """The same where the levels of the fit are written down."""
    sub = value // 16
    scale = tl.load(parts + sub)
    kept = (tl.load(swept + sub * 2 + value // 8 % 2) >> (value % 8 * 4)) & 15
    level = tl.minimum(tl.maximum(nearest(tl.div_rn(v, scale)), -TOP), TOP - 1) + TOP
    return tl.where(scale == 0, kept, level)


@triton.jit
def levels(x, parts, swept, out, subs, blocks, KIND: tl.constexpr, BYTES: tl.constexpr, SWEPT: tl.constexpr,
           BLOCKS: tl.constexpr):  # fmt: skip
    """Of out [blocks, BYTES], uint8, all but scales. Programs: ceil(blocks / BLOCKS)."""
    index = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.minimum(index, blocks - 1)[:, None]
    i = tl.arange(0, 32)[None, :]
    level = ()
    for eighth in tl.static_range(8):
        value = block * 256 + eighth * 32 + i
        v = values(x, value)
        if KIND == "Q4_K":
            level = level + (_affine(v, parts, value // 32, subs, 15),)
        elif KIND == "Q5_K":
            level = level + (_affine(v, parts, value // 32, subs, 31),)
        elif KIND == "Q2_K":
            level = level + (_affine(v, parts, value // 16, subs, 3),)
        elif KIND == "Q6_K":
            level = level + (_symmetric(v, parts, value // 16, subs, 32),)
        elif SWEPT:
            level = level + (_swept(v, parts, swept, value, 4),)
        else:
            level = level + (_symmetric(v, parts, value // 16, subs, 4),)
    to = out + block.to(tl.int64) * BYTES + i
    inside = (index < blocks)[:, None] & (i < 32)
    if KIND == "Q4_K":
        _pack_nibbles(level, to + 16, inside)
    elif KIND == "Q5_K":
        _pack_high_bits(level, to + 16, inside, 4)
        _pack_nibbles(level, to + 48, inside)
    elif KIND == "Q2_K":
        _pack_pairs(level, to + 16, inside)
    elif KIND == "Q3_K":
        _pack_high_bits(level, to, inside, 2)
        _pack_pairs(level, to + 32, inside)
    else:
        tl.static_assert(KIND == "Q6_K")
        _pack_six_bits(level, to, inside)


@triton.jit
def _pack_nibbles(level, to, inside):
    """Of each two eighths the second atop the first."""
    for pair in tl.static_range(4):
        both = (level[2 * pair] & 15) | ((level[2 * pair + 1] & 15) << 4)
        tl.store(to + 32 * pair, both.to(tl.uint8), mask=inside)


@triton.jit
def _pack_high_bits(level, to, inside, PLACE: tl.constexpr):
    """A bit of each eighth, the first one's lowest."""
    made = level[0] >> PLACE
    for eighth in tl.static_range(1, 8):
        made = made | ((level[eighth] >> PLACE) << eighth)
    tl.store(to, made.to(tl.uint8), mask=inside)


@triton.jit
def _pack_pairs(level, to, inside):
    """The two low bits of four eighths."""
    for half in tl.static_range(2):
        made = level[4 * half] & 3
        for k in tl.static_range(1, 4):
            made = made | ((level[4 * half + k] & 3) << (2 * k))
        tl.store(to + 32 * half, made.to(tl.uint8), mask=inside)


@triton.jit
def _pack_six_bits(level, to, inside):
    """Of each half block the low nibbles of eighths 0 and 2, 1 and 3, and the high bits of all four."""
    for half in tl.static_range(2):
        a = level[4 * half]
        b = level[4 * half + 1]
        c = level[4 * half + 2]
        d = level[4 * half + 3]
        tl.store(to + 64 * half, ((a & 15) | ((c & 15) << 4)).to(tl.uint8), mask=inside)
        tl.store(to + 64 * half + 32, ((b & 15) | ((d & 15) << 4)).to(tl.uint8), mask=inside)
        high = (a >> 4) | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6)
        tl.store(to + 128 + 32 * half, high.to(tl.uint8), mask=inside)
