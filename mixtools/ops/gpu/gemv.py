"""Rows of planes times a few x, and what a mixture of experts makes of it: one text for every kind of planes.

    a program: ROWS rows ─► 16 bytes of each row a thread, threads side by side along it ─► numbers (decoders.py)
               times the x of those columns, which all rows share ─► fp32 sums a thread ─► one sum a row, over threads

No atomics and no split of a row over programs: sums are taken in one order, whatever else runs. Where rows are no
multiple of ROWS the last program takes ROWS all the same, some of which another has taken, too: both store the same
(so what is added must not lie where the result goes).
Units beyond the last are read as the last one and multiplied with zero. Nothing is read outside the planes.
PLAN says how these are read (launch.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decoders import load, value


@triton.jit
def _more(sums, weight, parts, TOKENS: tl.constexpr):
    """The sums, and to each token's its part [units, wide] times weight [R, units, wide] added."""
    made = ()
    for token in tl.static_range(TOKENS):
        made = made + (tl.fma(weight, parts[token].to(tl.float32)[None, :, :], sums[token]),)
    return made


@triton.jit
def products(x, tokens, planes, row, nought, TOKENS: tl.constexpr, PLAN: tl.constexpr):
    """Rows [R] (int64) of the planes times x [tokens, in] -> TOKENS sums, fp32 [R, units taken together, wide] each;
    those from `tokens` on are the last one's again."""
    UNIT: tl.constexpr = PLAN.unit
    UNITS: tl.constexpr = PLAN.units
    TOGETHER: tl.constexpr = PLAN.together
    WHOLE: tl.constexpr = UNITS % TOGETHER == 0 and not PLAN.ragged
    # x of 16 bits comes in 16 bytes a thread, too: the columns of two codes of a word
    STEP: tl.constexpr = 8 if x.dtype.element_ty.primitive_bitwidth == 16 and UNIT > 8 else PLAN.wide
    KIND: tl.constexpr = PLAN.kind  # by name: Triton before 3.7 passes no attribute on as a constant
    WIDE: tl.constexpr = PLAN.wide
    place = tl.arange(0, STEP)[None, :]
    none = tl.zeros((row.shape[0], TOGETHER, WIDE), tl.float32)
    sums = (none,) * TOKENS
    for start in range(0, UNITS, TOGETHER):
        unit = start + tl.arange(0, TOGETHER)
        loaded = load(planes, row, unit if WHOLE else tl.minimum(unit, UNITS - 1), PLAN)
        for j in tl.static_range(UNIT // STEP):
            column = (unit * UNIT + j * STEP)[:, None] + place
            parts = ()
            for token in tl.static_range(TOKENS):
                line = x + tl.minimum(token, tokens - 1) * PLAN.columns
                if WHOLE:
                    part = tl.load(line + column)
                else:
                    part = tl.load(line + column, mask=column < PLAN.columns, other=0.0)
                parts = parts + (part,)
            if PLAN.wide == STEP:
                sums = _more(sums, value(loaded, nought, KIND, j), parts, TOKENS)
            else:
                firsts = ()
                seconds = ()
                for token in tl.static_range(TOKENS):
                    first, second = tl.split(tl.permute(tl.reshape(parts[token], (TOGETHER, 2, 4)), (0, 2, 1)))
                    firsts = firsts + (first,)
                    seconds = seconds + (second,)
                sums = _more(sums, value(loaded, nought, KIND, 2 * j), firsts, TOKENS)
                sums = _more(sums, value(loaded, nought, KIND, 2 * j + 1), seconds, TOKENS)
    return sums


@triton.jit
def total(sums):
    """fp32 [R, units, wide] -> [R]"""
    return tl.sum(tl.sum(sums, 2), 1)


@triton.jit(do_not_specialize=["tokens"])
def gemv(x, before, out, tokens, rows, p0, p1, p2, p3, p4, ROWS: tl.constexpr, TOKENS: tl.constexpr,
         ADDS: tl.constexpr, PLAN: tl.constexpr):  # fmt: skip
    """out [tokens, rows] = x [tokens, in] times the planes' rows, and `before` [tokens, rows] where it ADDS that.
    TOKENS: the power of two from `tokens` on. Programs: ceil(rows / ROWS)."""
    row = tl.minimum(tl.program_id(0) * ROWS, rows - ROWS).to(tl.int64) + tl.arange(0, ROWS)
    sums = products(x, tokens, (p0, p1, p2, p3, p4), row, rows >> 31, TOKENS, PLAN)
    for token in tl.static_range(TOKENS):
        made = total(sums[token])
        if token < tokens:
            if ADDS:
                made += tl.load(before + token * rows + row).to(tl.float32)
            tl.store(out + token * rows + row, made.to(out.dtype.element_ty))


@triton.jit
def gate_up(x, experts, out, inner, p0, p1, p2, p3, p4, CHOICES: tl.constexpr, ROWS: tl.constexpr, PLAN: tl.constexpr):
    """out [T, CHOICES, inner] = silu(gate(x)) * up(x) of x [T, in], by each token's experts [T, CHOICES], whose planes
    have `inner` rows of gate and then of up. Programs: T * CHOICES, ceil(inner / (ROWS / 2)); those of two tokens at
    one expert run side by side, and the second finds the rows in the cache."""
    choice = tl.program_id(0)
    first = tl.minimum(tl.program_id(1) * (ROWS // 2), inner - ROWS // 2)
    index = tl.arange(0, ROWS)  # gate and up by turns
    row = tl.load(experts + choice).to(tl.int64) * (2 * inner) + first + (index % 2 * inner + index // 2)
    sums = products(x + choice // CHOICES * PLAN.columns, 1, (p0, p1, p2, p3, p4), row, inner >> 31, 1, PLAN)
    gate, up = tl.split(tl.reshape(total(sums[0]), (ROWS // 2, 2)))
    shrunk = tl.exp(-tl.abs(gate))
    made = gate * tl.where(gate < 0, shrunk, 1.0) / (1 + shrunk) * up  # silu, without an overflow on either side
    tl.store(out + choice * inner + first + tl.arange(0, ROWS // 2), made.to(out.dtype.element_ty))


@triton.jit
def down(x, experts, weights, before, out, rows, p0, p1, p2, p3, p4, CHOICES: tl.constexpr, ROWS: tl.constexpr,
         ADDS: tl.constexpr, PLAN: tl.constexpr):  # fmt: skip
    """out [T, rows] = the sum over a token's CHOICES, in their order, of weights [T, CHOICES] times the product of
    x [T, CHOICES, in] with the planes of experts [T, CHOICES]; and `before` [T, rows], last, where it ADDS that.
    Programs: T, ceil(rows / ROWS)."""
    token = tl.program_id(0)
    first = tl.minimum(tl.program_id(1) * ROWS, rows - ROWS)
    index = tl.arange(0, ROWS)
    made = tl.zeros((ROWS,), tl.float32)
    for choice in range(token * CHOICES, token * CHOICES + CHOICES):
        row = tl.load(experts + choice).to(tl.int64) * rows + first + index
        sums = products(x + choice * PLAN.columns, 1, (p0, p1, p2, p3, p4), row, rows >> 31, 1, PLAN)
        made += tl.load(weights + choice) * total(sums[0])
    if ADDS:
        made += tl.load(before + token * rows + first + index).to(tl.float32)
    tl.store(out + token * rows + first + index, made.to(out.dtype.element_ty))


@triton.jit
def unpack(out, rows, p0, p1, p2, p3, p4, ROWS: tl.constexpr, PLAN: tl.constexpr):
    """out [rows, in] = the planes' values, for products of many tokens. Programs: ceil(rows / ROWS), then a row's runs
    of units taken together."""
    row = tl.minimum(tl.program_id(0) * ROWS, rows - ROWS).to(tl.int64) + tl.arange(0, ROWS)
    TOGETHER: tl.constexpr = PLAN.together
    KIND: tl.constexpr = PLAN.kind
    unit = tl.program_id(1) * TOGETHER + tl.arange(0, TOGETHER)
    loaded = load((p0, p1, p2, p3, p4), row, tl.minimum(unit, PLAN.units - 1), PLAN)
    # two runs of columns at a time where they are of four: 16 bytes of 16-bit values a thread
    STEP: tl.constexpr = 8 if PLAN.wide == 4 and PLAN.unit > 4 else PLAN.wide
    for j in tl.static_range(PLAN.unit // STEP):
        if PLAN.wide == STEP:
            made = value(loaded, rows >> 31, KIND, j).to(out.dtype.element_ty)
        else:
            first = value(loaded, rows >> 31, KIND, 2 * j).to(out.dtype.element_ty)
            second = value(loaded, rows >> 31, KIND, 2 * j + 1).to(out.dtype.element_ty)
            made = tl.permute(tl.join(first, second), (0, 1, 3, 2))
            made = tl.reshape(made, (ROWS, TOGETHER, STEP))
        column = (unit * PLAN.unit + j * STEP)[None, :, None] + tl.arange(0, STEP)[None, None, :]
        tl.store(out + (row * PLAN.columns)[:, None, None] + column, made, mask=column < PLAN.columns)
