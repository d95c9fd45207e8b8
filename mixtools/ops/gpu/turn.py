"""Rotary positions of one new token of each text, and its place in the cache, in one kernel.

    a program: one head of one token ─► of q: turned ─► out;  of k: turned ─► its column of keys;  of v ─► of values

Which column that is stands in memory: the last that is seen. Products and their difference are rounded each by itself,
as plain torch does it, so that a key is the same whichever way it came into the cache.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["capacity"])
def turn(q, k, v, cos, sin, seen, out, keys, values, of_q, of_k, of_v, of_table, capacity, HEADS: tl.constexpr,
         GROUPS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """q [B, HEADS, SIZE], k and v [B, GROUPS, SIZE], texts of_q, of_k, of_v items apart; cos and sin fp32 [B,
    capacity, SIZE / 2], texts of_table apart; seen [B, 2] -> out as q, and a column of keys and values
    [B, GROUPS, capacity, SIZE]. Programs: B, HEADS + 2 GROUPS."""
    text = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    column = tl.load(seen + text * 2 + 1) - 1
    HALF: tl.constexpr = SIZE // 2
    place = tl.arange(0, HALF)
    if head >= HEADS + GROUPS:
        group = head - HEADS - GROUPS
        to = values + ((text * GROUPS + group) * capacity + column) * SIZE + place
        tl.store(to, tl.load(v + text * of_v + group * SIZE + place))
        tl.store(to + HALF, tl.load(v + text * of_v + group * SIZE + HALF + place))
    else:
        turned_cos = tl.load(cos + text * of_table + column * HALF + place)
        turned_sin = tl.load(sin + text * of_table + column * HALF + place)
        if head < HEADS:
            source = q + text * of_q + head * SIZE + place
            to = out + (text * HEADS + head) * SIZE + place
        else:
            source = k + text * of_k + (head - HEADS) * SIZE + place
            to = keys + ((text * GROUPS + head - HEADS) * capacity + column) * SIZE + place
        first = tl.load(source).to(tl.float32)
        second = tl.load(source + HALF).to(tl.float32)
        tl.store(to, (first * turned_cos - second * turned_sin).to(out.dtype.element_ty))
        tl.store(to + HALF, (second * turned_cos + first * turned_sin).to(out.dtype.element_ty))
