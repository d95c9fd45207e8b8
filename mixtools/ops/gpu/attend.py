"""Attention of a few new tokens over a cache, in two kernels: parts of the cache side by side, then their sum in order.

    a program of `attend`: one key-value head, one token, CHUNK columns of the cache ─► largest score, sum, mixture fp32
    a program of `combine`: one query ─► the parts of all chunks, TOGETHER at a time, from the first on, one softmax

A program waits for memory once: the keys and values of its columns are loaded together, for all queries that share
them.

Which columns are seen stands in memory, so that the same launch goes on as they become more: programs of chunks that
nobody sees end at once. Chunks are cut at multiples of CHUNK and summed in order: a result does not depend on what else
runs. Softmax and sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["capacity", "chunks"])
def attend(q, keys, values, seen, largest, totals, mixtures, capacity, chunks, scale, HEADS: tl.constexpr,
           GROUPS: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """q [B, HEADS, TOKENS, SIZE], keys and values [B, GROUPS, capacity, SIZE], seen [B, 2]: the first column that is
    seen and the one after the last, of which the last TOKENS are the queries' own -> largest and totals
    [B, HEADS, TOKENS, chunks], mixtures [.., SIZE], of the chunks that have a column that is seen.
    Programs: B * GROUPS, TOKENS, chunks."""
    PER_GROUP: tl.constexpr = HEADS // GROUPS
    group = tl.program_id(0)
    token = tl.program_id(1)
    chunk = tl.program_id(2)
    first = tl.load(seen + group // GROUPS * 2)
    end = tl.load(seen + group // GROUPS * 2 + 1) - TOKENS + token + 1
    first = tl.maximum(first, chunk * CHUNK)
    end = tl.minimum(end, chunk * CHUNK + CHUNK)
    if first >= end:
        return
    place = tl.arange(0, SIZE)
    column = chunk * CHUNK + tl.arange(0, CHUNK)
    there = (column >= first) & (column < end)
    at = group.to(tl.int64) * capacity * SIZE + column[:, None] * SIZE + place[None, :]
    key = tl.load(keys + at, mask=there[:, None], other=0.0)
    value = tl.load(values + at, mask=there[:, None], other=0.0)
    for query in tl.static_range(PER_GROUP):
        row = (group * PER_GROUP + query) * TOKENS + token  # of q and of what is stored
        asked = tl.load(q + row * SIZE + place).to(tl.float32) * scale
        score = tl.sum(key.to(tl.float32) * asked[None, :], 1)
        score = tl.where(there, score, -float("inf"))
        most = tl.max(score, 0)
        share = tl.exp(score - most)
        part = row * chunks + chunk
        tl.store(largest + part, most)
        tl.store(totals + part, tl.sum(share, 0))
        tl.store(mixtures + part * SIZE + place, tl.sum(share[:, None] * value.to(tl.float32), 0))


@triton.jit(do_not_specialize=["chunks"])
def combine(largest, totals, mixtures, seen, out, chunks, HEADS: tl.constexpr, TOKENS: tl.constexpr,
            SIZE: tl.constexpr, CHUNK: tl.constexpr, TOGETHER: tl.constexpr):  # fmt: skip
    """out [B, HEADS, TOKENS, SIZE] of the parts [.., chunks] that `attend` makes. Programs: one for each query."""
    row = tl.program_id(0)
    batch = row // (HEADS * TOKENS)
    first = tl.load(seen + batch * 2) // CHUNK
    end = tl.load(seen + batch * 2 + 1) - TOKENS + row % TOKENS + 1
    end = (end + CHUNK - 1) // CHUNK
    place = tl.arange(0, SIZE)
    most = -float("inf")
    total = 0.0
    mixture = tl.zeros((SIZE,), tl.float32)
    for start in range(first, end, TOGETHER):
        chunk = start + tl.arange(0, TOGETHER)
        there = chunk < end
        part = row * chunks + chunk
        other = tl.load(largest + part, mask=there, other=-float("inf"))
        sums = tl.load(totals + part, mask=there, other=0.0)
        mixed = tl.load(mixtures + part[:, None] * SIZE + place[None, :], mask=there[:, None], other=0.0)
        above = tl.maximum(most, tl.max(other, 0))  # finite: the first chunk of a turn is seen
        share = tl.exp(other - above)
        shrunk = tl.exp(most - above)
        total = total * shrunk + tl.sum(sums * share, 0)
        mixture = mixture * shrunk + tl.sum(mixed * share[:, None], 0)
        most = above
    tl.store(out + row * SIZE + place, (mixture / total).to(out.dtype.element_ty))
