"""Second-order rounding of blocks of columns (ops/feedback.py): a lane a row, a few columns at a time in registers.

    a program: LANES rows of a matrix ─► targets of TILE columns, and all that rounding them reads
               ─► what the columns before them changed, each times its feedback, in the order of those columns
               ─► column by column: rounded, stored, its change fed to the rest of the tile and kept in `deltas`

Sums are those of a loop that feeds each column into all that follow: the bits of the CPU's kernel, since no product is
fused with a sum. One row a lane makes the most programs, and a matrix has fewer of them than a large GPU has
schedulers: what counts is how soon a program is done. A lane reads from `deltas` only what it has written there itself,
so that nothing waits for another lane. Columns of a tile are a tuple: registers have no index.
"""

from __future__ import annotations

import triton
import triton.language as tl

# 1.5 * 2^23, about which the numbers of fp32 are the integers: what is added to it is rounded, half to even
_INTEGERS = tl.constexpr(12582912.0)
# A lane loads one number at a time: code for sizes that are multiples of 16 would be no faster, only compiled anew.
_SIZES = ["columns", "rows"] + [
    f"{name}_{way}"
    for name in ("targets", "weights", "errors", "codes", "scales", "mins", "feedback")
    for way in ("line", "next")
]


@triton.jit
def _factors(at, left, COUNT: tl.constexpr, WHOLE: tl.constexpr):
    """COUNT numbers of the feedback from `at` on, side by side; zeros after the first `left`, unless all are WHOLE."""
    found = ()
    for c in tl.static_range(COUNT):
        found = found + (tl.load(at + c) if WHOLE else tl.load(at + c, mask=c < left, other=0.0),)
    return found


@triton.jit
def _feed(sums, delta, factors, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """COUNT columns' sums from column FIRST on, with delta times each one's factor added."""
    made = ()
    for c in tl.static_range(COUNT):
        made = made + (sums[FIRST + c] + delta * factors[c],)
    return made


@triton.jit
def _nearest(wanted, numbers, low, high, BITS: tl.constexpr):
    """The nearest level, and its code. BITS: of a table's codes; -1 where levels are the integers from `low` to `high`.
    `numbers`: 2^BITS levels, then each one's limit: what is greater is nearer to it than to the one before."""
    if BITS < 0:
        level = (tl.minimum(tl.maximum(wanted, low), high) + _INTEGERS) - _INTEGERS
        return level, (level - low).to(tl.int32)
    code = tl.zeros(wanted.shape, tl.int32)
    for bit in tl.static_range(BITS):
        further = code + (1 << (BITS - 1 - bit))
        code = tl.where(tl.load(numbers + (1 << BITS) + further) < wanted, further, code)
    return tl.load(numbers + code), code


@triton.jit
def _rounded(target, weight, scale, least, numbers, low, high, BITS: tl.constexpr):
    """The code of a target, and the error of the weight that gets it."""
    quotient = tl.div_rn(target - least, scale)
    # a scale of zero, or sums beyond all bounds: the level nearest to zero
    known = (tl.abs(scale) > 0) & (tl.abs(quotient) <= float("inf"))
    level, code = _nearest(tl.where(known, quotient, 0.0), numbers, low, high, BITS)
    return code, weight - (scale * level + least)


@triton.jit(do_not_specialize=_SIZES)
def round_blocks(
    targets, weights, errors, codes, scales, mins, group_of, feedback, deltas, numbers,
    targets_line, weights_line, errors_line, codes_line, scales_line, mins_line, feedback_line,
    targets_next, weights_next, errors_next, codes_next, scales_next, mins_next, feedback_next,
    columns, rows, low, high, LANES: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Matrices of `columns` lines of `rows` items: of each tensor, the items from line to line and from matrix to
    matrix. group_of int32 [matrices, columns] is dense, and so is deltas fp32 [matrices, columns, rows], its columns
    filled up to whole tiles and its rows to whole programs. WHOLE: there are no columns but those of whole tiles.
    Programs: parts of the rows, matrices."""
    matrix = tl.program_id(1).to(tl.int64)
    nought = matrix - matrix  # what is added to it has 64 bits: offsets may need them
    first = (nought + tl.program_id(0)) * LANES
    padded = tl.num_programs(0) * LANES
    row = first + tl.arange(0, LANES)
    targets += matrix * targets_next + row
    weights += matrix * weights_next + row
    errors += matrix * errors_next + row
    codes += matrix * codes_next + row
    scales += matrix * scales_next + row
    mins += matrix * mins_next + row
    deltas += matrix * ((columns + TILE - 1) // TILE * TILE) * padded + row
    feedback += matrix * feedback_next
    group_of += matrix * columns
    for start in range(0, columns, TILE):
        col = nought + start
        sums = ()
        weight = ()
        before = ()
        scale = ()
        least = ()
        for c in tl.static_range(TILE):
            there = row < (rows if WHOLE else tl.where(col + c < columns, rows, 0))
            group = nought + tl.load(group_of + (col + c if WHOLE else tl.minimum(col + c, columns - 1)))
            sums = sums + (tl.load(targets + (col + c) * targets_line, mask=there, other=0.0),)
            weight = weight + (tl.load(weights + (col + c) * weights_line, mask=there, other=0.0),)
            before = before + (tl.load(errors + (col + c) * errors_line, mask=there, other=0.0),)
            scale = scale + (tl.load(scales + group * scales_line, mask=there, other=0.0),)
            least = least + (tl.load(mins + group * mins_line, mask=there, other=0.0),)
        for earlier in range(0, start, TILE):
            for i in tl.static_range(TILE):
                delta = tl.load(deltas + (nought + earlier + i) * padded)
                at = feedback + (nought + earlier + i) * feedback_line + col
                sums = _feed(sums, delta, _factors(at, columns - start, TILE, WHOLE), 0, TILE)
        for c in tl.static_range(TILE):
            there = row < (rows if WHOLE else tl.where(col + c < columns, rows, 0))
            # read before anything is written, past which no compiler may move it
            at = feedback + (col + c) * feedback_line + col + c + 1
            factors = _factors(at, columns - start - c - 1, TILE - 1 - c, WHOLE)
            code, error = _rounded(sums[0], weight[c], scale[c], least[c], numbers, low, high, BITS)
            delta = error - before[c]
            tl.store(targets + (col + c) * targets_line, sums[0], mask=there)
            tl.store(errors + (col + c) * errors_line, error, mask=there)
            tl.store(codes + (col + c) * codes_line, code.to(tl.uint8), mask=there)
            tl.store(deltas + (col + c) * padded, delta)
            sums = _feed(sums, delta, factors, 1, TILE - 1 - c)
