"""A symmetric matrix's tridiagonal form, its eigenvalues and some of its vectors, in fp64, for many matrices at once.

    matrix ─► column by column: `form`, `reflect` ─► d, e ─► `bisect` ─► values ─► `twist` ─► vectors of the form

The form is that of LAPACK's dsytrd: columns are worked on a panel at a time, and what a panel changes in the rest is
one product of matrices behind it (symmetric.py). Within a panel each column takes the whole rest once, which is nearly
all of the time and bound by memory. What a launch computes of one matrix does not depend on the others beside it.

Dongarra, Sorensen and Hammarling, J. Comput. Appl. Math. 27 (1989); Demmel, Dhillon and Ren, "On the correctness of
some bisection-like parallel eigenvalue algorithms" (1995); Dhillon, thesis, UC Berkeley (1997), for twisted vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["column", "start", "parts"])
def form(
    matrix, panel, x, products, across, dots, squares, d, tau, column, start, parts, ORDER: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, LINES: tl.constexpr, PARTS: tl.constexpr, TOGETHER: tl.constexpr,
):  # fmt: skip
    """Column `column` of what is left of a matrix, after those of its panel, which begins at `start`.

    From what `reflect` left of the column before comes its w first. matrix [M, ORDER, ORDER]; panel [M, 2 WIDTH,
    ORDER]: v of its columns, then their w, which is stored; x [M, ORDER]: the column; products [M, ORDER + 2 WIDTH],
    across [M, PARTS, ORDER] and dots [M, PARTS] of `parts` programs of LINES rows; squares [M, programs]: sums of x²
    below the subdiagonal; d, tau [M, ORDER]. Programs: parts of the rows, from that on which `column` is; M."""
    part, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    matrix += one * ORDER * ORDER
    panel += one * 2 * WIDTH * ORDER
    products += one * (ORDER + 2 * WIDTH)
    across += one * PARTS * ORDER
    x += one * ORDER
    top = (column // ROWS + part) * ROWS
    row = top + tl.arange(0, ROWS)
    there = (row >= column) & (row < ORDER)
    item = tl.load(matrix + column.to(tl.int64) * ORDER + row, mask=there, other=0.0)
    last = column - start - 1  # of the panel's columns, the one whose w is made
    if last >= 0:
        line = tl.arange(0, 2 * WIDTH)
        other = (line + WIDTH) % (2 * WIDTH)  # of a v its w, of a w its v
        earlier = line % WIDTH < last
        seen = earlier[:, None] & there[None, :]
        lines = tl.load(panel + line[:, None] * ORDER + row[None, :], mask=seen, other=0.0)
        at_column = tl.load(panel + line * ORDER + column, mask=earlier, other=0.0)
        at_other = tl.load(panel + other * ORDER + column, mask=earlier, other=0.0)
        of_line = tl.load(products + ORDER + line, mask=earlier, other=0.0)
        of_other = tl.load(products + ORDER + other, mask=earlier, other=0.0)
        count = tl.arange(0, PARTS)
        whole = tl.sum(tl.load(dots + one * PARTS + count, mask=count < parts, other=0.0), 0)
        # v' (A - V W' - W V') v, of which each of the two is the other's mirror image
        whole -= tl.sum(of_line * of_other, 0)
        factor = tl.load(tau + one * ORDER + column - 1)
        half = 0.5 * factor * whole
        v = tl.load(panel + last.to(tl.int64) * ORDER + row, mask=there, other=0.0)
        made = tl.load(products + row, mask=there, other=0.0) - tl.sum(lines * of_other[:, None], 0)
        # of the rows below, which have this row's other half: those of its own program and of all after it
        own = (row - column) // LINES
        others = tl.zeros((TOGETHER, ROWS), tl.float64)
        for at in range(tl.maximum(top - column, 0) // LINES, parts, TOGETHER):
            under = at + tl.arange(0, TOGETHER)
            known = (under < parts)[:, None] & (under[:, None] >= own[None, :]) & there[None, :]
            others += tl.load(across + under[:, None] * ORDER + row[None, :], mask=known, other=0.0)
        made += tl.sum(others, 0)
        w = factor * (made - half * v)
        tl.store(panel + (WIDTH + last).to(tl.int64) * ORDER + row, w, mask=there)
        # v is 1 in the row of this column, below which are all the others
        here = tl.load(products + column) - tl.sum(at_column * of_other, 0)
        here += tl.sum(tl.load(across + count * ORDER + column, mask=count < parts, other=0.0), 0)
        w_here = factor * (here - half)
        item -= tl.sum(lines * at_other[:, None], 0) + v * w_here + w
    tl.store(x + row, item, mask=there)
    tl.store(d + one * ORDER + row, item, mask=row == column)
    below = tl.where(row > column + 1, item, 0.0)
    tl.store(squares + one * tl.num_programs(0) + part, tl.sum(below * below, 0))


@triton.jit
def _reflector(x, place, inside, after, scale):
    """Of a column x some items of v: 0 before `after`, 1 there, and then x times scale."""
    v = tl.load(x + place, mask=inside & (place > after), other=0.0) * scale
    return tl.where(place == after, 1.0, v)


@triton.jit
def _times(sums, lines, across, v_row, row, begin, end, x, after, scale, ORDER: tl.constexpr, COLUMNS: tl.constexpr,
           BELOW: tl.constexpr, CROSSES: tl.constexpr):  # fmt: skip
    """To the sums [ROWS, COLUMNS], columns `begin` (a multiple of COLUMNS) to `end` of `lines`, all finite, times v.
    BELOW: both are rows and columns of the rest, whose upper half stands in the lower one: across [ORDER] gets the
    lines below the diagonal, turned, times v_row. CROSSES: the diagonal is here."""
    for at in range(begin, end, COLUMNS):
        column = at + tl.arange(0, COLUMNS)
        inside = column < ORDER
        v = _reflector(x, column, inside, after, scale)
        if ORDER % COLUMNS == 0:
            part = tl.load(lines + column[None, :])
        else:
            part = tl.load(lines + column[None, :], mask=inside[None, :], other=0.0)
        if CROSSES:
            sums = tl.fma(tl.where(column[None, :] <= row[:, None], part, 0.0), v[None, :], sums)
            part = tl.where(column[None, :] < row[:, None], part, 0.0)
        else:
            sums = tl.fma(part, v[None, :], sums)
        if BELOW:
            tl.store(across + column, tl.sum(part * v_row[:, None], 0), mask=inside)
    return sums


@triton.jit(do_not_specialize=["column", "start", "parts"])
def reflect(
    matrix, panel, x, products, across, dots, squares, e, tau, column, start, parts, ORDER: tl.constexpr,
    WIDTH: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, SQUARES: tl.constexpr,
):  # fmt: skip
    """The reflector v of a column x, I - tau v v', which leaves e of it; and the rest of the matrix times v.

    Tensors as in `form`; squares [M, parts]; e [M, ORDER]; v is stored in the matrix, as its row `column`, and in the
    panel. The rest is read up to its diagonal: products are of its rows as far as that, then of the panel's lines;
    across [M, PARTS, ORDER]: of a program's rows, turned, before the diagonal; dots: of v times all of these. Programs:
    the rest's rows by LINES, the longest first, then the panel's 2 WIDTH lines by LINES; M."""
    turn, one = tl.program_id(0), tl.program_id(1).to(tl.int64)
    matrix += one * ORDER * ORDER
    panel += one * 2 * WIDTH * ORDER
    products += one * (ORDER + 2 * WIDTH)
    x += one * ORDER
    after = column + 1
    count = tl.arange(0, SQUARES)
    norm = tl.sum(tl.load(squares + one * parts + count, mask=count < parts, other=0.0), 0)
    alpha = tl.load(x + after)
    length = tl.sqrt(alpha * alpha + norm)
    beta = tl.where(norm > 0, tl.where(alpha > 0, -length, length), alpha)
    factor = tl.where(norm > 0, (beta - alpha) / tl.where(norm > 0, beta, 1.0), 0.0)
    scale = tl.where(norm > 0, 1.0 / tl.where(norm > 0, alpha - beta, 1.0), 0.0)
    first = after // COLUMNS * COLUMNS
    sums = tl.zeros((LINES, COLUMNS), tl.float64)
    of_rest = (ORDER - after + LINES - 1) // LINES
    if turn < of_rest:
        part = of_rest - 1 - turn
        top = after + part * LINES
        row = top + tl.arange(0, LINES)
        there = row < ORDER
        v = _reflector(x, row, there, after, scale)
        across += (one * PARTS + part) * ORDER
        lines = matrix + tl.minimum(row, ORDER - 1).to(tl.int64)[:, None] * ORDER
        middle = top // COLUMNS * COLUMNS
        sums = _times(sums, lines, across, v, row, first, middle, x, after, scale, ORDER, COLUMNS, True, False)
        end = tl.minimum(top + LINES, ORDER)
        sums = _times(sums, lines, across, v, row, middle, end, x, after, scale, ORDER, COLUMNS, True, True)
        made = tl.sum(sums, 1)
        own = tl.load(matrix + row.to(tl.int64) * (ORDER + 1), mask=there, other=0.0)
        tl.store(products + row, made, mask=there)
        tl.store(dots + one * PARTS + part, tl.sum(tl.where(there, (2.0 * made - own * v) * v, 0.0), 0))
        tl.store(matrix + column.to(tl.int64) * ORDER + row, v, mask=there)
        tl.store(panel + (column - start).to(tl.int64) * ORDER + row, v, mask=there)
        if part == 0:
            tl.store(e + one * ORDER + column, beta)
            tl.store(tau + one * ORDER + column, factor)
    else:
        line = (turn - of_rest) * LINES + tl.arange(0, LINES)
        there = (line < 2 * WIDTH) & (line % WIDTH < column - start)
        lines = panel + tl.where(there, line, 0).to(tl.int64)[:, None] * ORDER
        sums = _times(sums, lines, across, sums, line, first, ORDER, x, after, scale, ORDER, COLUMNS, False, False)
        tl.store(products + ORDER + line, tl.sum(sums, 1), mask=there)


@triton.jit
def _pivot(number, least):
    """Away from zero, at which what is divided by it would leave all bounds."""
    return tl.where(tl.abs(number) < least, -least, number)


@triton.jit(do_not_specialize=["order"])
def bisect(d, e, low, high, least, values, order, TURNS: tl.constexpr, LANES: tl.constexpr):
    """All eigenvalues of tridiagonal matrices, a lane each: between `low` and `high` [M] the place where so many are
    below as its number says, after as many halvings as there are TURNS. d, e, values [M, order] (of e the last does
    not matter); least [M]: a pivot is no nearer to zero. Programs: eigenvalues by LANES, M."""
    one = tl.program_id(1).to(tl.int64)
    d += one * order
    e += one * order
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    none = tl.load(least + one)
    below = tl.zeros((LANES,), tl.float64) + tl.load(low + one)
    above = tl.zeros((LANES,), tl.float64) + tl.load(high + one)
    for _ in range(TURNS):
        middle = below + (above - below) * 0.5
        pivot = _pivot(tl.load(d) - middle, none)
        count = (pivot < 0).to(tl.int32)
        for at in range(1, order):
            beside = tl.load(e + at - 1)
            pivot = _pivot(tl.load(d + at) - middle - (beside * beside) / pivot, none)
            count += (pivot < 0).to(tl.int32)
        under = count <= number
        below = tl.where(under, middle, below)
        above = tl.where(under, above, middle)
    tl.store(values + one * order + number, below + (above - below) * 0.5, mask=number < order)


@triton.jit(do_not_specialize=["order", "count"])
def twist(d, e, values, least, vectors, behind, order, count, LANES: tl.constexpr):
    """Vectors of one tridiagonal matrix, [order, count], of any length, to its eigenvalues [count].

    Two factorizations of T - value, from the first row on and from the last, meet in the row where together they are
    nearest to singular: there the vector is 1, and both ways from it each item follows from the one before. `behind`
    [order, count] is scratch. Programs: values by LANES."""
    number = tl.program_id(0) * LANES + tl.arange(0, LANES)
    there = number < count
    value = tl.load(values + number, mask=there, other=0.0)
    none = tl.load(least)
    vectors += number
    behind += number
    width = count.to(tl.int64)
    pivot = _pivot(tl.load(d) - value, none)
    tl.store(vectors, pivot, mask=there)
    for at in range(1, order):
        beside = tl.load(e + at - 1)
        pivot = _pivot(tl.load(d + at) - value - (beside * beside) / pivot, none)
        tl.store(vectors + at * width, pivot, mask=there)
    least_gap = tl.abs(pivot)
    middle = tl.zeros((LANES,), tl.int32) + (order - 1)
    pivot = _pivot(tl.load(d + order - 1) - value, none)
    tl.store(behind + (order - 1) * width, pivot, mask=there)
    for back in range(1, order):
        at = order - 1 - back
        beside = tl.load(e + at)
        square = (beside * beside) / pivot
        gap = tl.abs(tl.load(vectors + at * width, mask=there, other=1.0) - square)
        middle = tl.where(gap < least_gap, at, middle)
        least_gap = tl.minimum(gap, least_gap)
        pivot = _pivot(tl.load(d + at) - value - square, none)
        tl.store(behind + at * width, pivot, mask=there)
    item = tl.where(middle == order - 1, 1.0, 0.0).to(tl.float64)
    tl.store(vectors + (order - 1) * width, item, mask=there)
    for back in range(1, order):
        at = order - 1 - back
        last = tl.load(vectors + at * width, mask=there, other=1.0)
        item = tl.where(at == middle, 1.0, -(tl.load(e + at) / last) * item)
        tl.store(vectors + at * width, item, mask=there)
    item = tl.where(middle == 0, 1.0, 0.0).to(tl.float64)
    for at in range(1, order):
        last = tl.load(behind + at * width, mask=there, other=1.0)
        item = tl.where(at == middle, 1.0, -(tl.load(e + at - 1) / last) * item)
        tl.store(vectors + at * width, item, mask=there & (at > middle))
