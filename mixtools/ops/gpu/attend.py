"""Attention of a few new tokens over a cache, in two kernels: parts of the cache side by side, then their sum in order.

    a program of `attend`: one key-value head, one token, CHUNK columns of the cache ─► largest score, sum, mixture fp32
    a program of `combine`: one query ─► the parts of all chunks, from the first column on, under one softmax

Which columns are seen stands in memory, so that the same launch goes on as they become more: programs of chunks that
nobody sees end at once. Chunks are cut at multiples of CHUNK and summed in order: a result does not depend on what else
runs. The queries that share a key-value head share what is loaded of it. Softmax and sums are fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def attend(q, keys, values, seen, largest, totals, mixtures, capacity, chunks, scale, HEADS: tl.constexpr,
           GROUPS: tl.constexpr, QUERIES: tl.constexpr, TOKENS: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
           TOGETHER: tl.constexpr):  # fmt: skip
    """q [B, HEADS, TOKENS, SIZE], keys and values [B, GROUPS, capacity, SIZE], seen [B, 2]: the first column that is
    seen and the one after the last, of which the last TOKENS are the queries' own -> largest and totals
    [B, HEADS, TOKENS, chunks], mixtures [.., SIZE], of the chunks that have a column that is seen.
    QUERIES: the power of two from HEADS / GROUPS on. Programs: B * GROUPS, TOKENS, chunks."""
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
    query = tl.minimum(tl.arange(0, QUERIES), PER_GROUP - 1)
    row = (group * PER_GROUP + query) * TOKENS + token  # of q and of what is stored
    asked = tl.load(q + row[:, None] * SIZE + place[None, :]).to(tl.float32) * scale
    lines = group.to(tl.int64) * capacity * SIZE
    most = tl.full((QUERIES,), -float("inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixture = tl.zeros((QUERIES, SIZE), tl.float32)
    for start in range(first, end, TOGETHER):
        column = start + tl.arange(0, TOGETHER)
        there = column < end
        at = lines + column[:, None] * SIZE + place[None, :]
        key = tl.load(keys + at, mask=there[:, None], other=0.0).to(tl.float32)
        score = tl.sum(asked[:, None, :] * key[None, :, :], 2)
        score = tl.where(there[None, :], score, -float("inf"))
        above = tl.maximum(most, tl.max(score, 1))  # finite: the first column of a turn is seen
        share = tl.exp(score - above[:, None])
        shrunk = tl.exp(most - above)
        value = tl.load(values + at, mask=there[:, None], other=0.0).to(tl.float32)
        total = total * shrunk + tl.sum(share, 1)
        mixture = mixture * shrunk[:, None] + tl.sum(share[:, :, None] * value[None, :, :], 1)
        most = above
    part = row * chunks + chunk
    known = tl.arange(0, QUERIES) < PER_GROUP
    tl.store(largest + part, most, mask=known)
    tl.store(totals + part, total, mask=known)
    tl.store(mixtures + part[:, None] * SIZE + place[None, :], mixture, mask=known[:, None])


@triton.jit
def combine(largest, totals, mixtures, seen, out, chunks, HEADS: tl.constexpr, TOKENS: tl.constexpr,
            SIZE: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """out [B, HEADS, TOKENS, SIZE] of the parts [.., chunks] that `attend` makes. Programs: one for each query."""
    row = tl.program_id(0)
    batch = row // (HEADS * TOKENS)
    first = tl.load(seen + batch * 2) // CHUNK
    end = tl.load(seen + batch * 2 + 1) - TOKENS + row % TOKENS + 1
    place = tl.arange(0, SIZE)
    most = tl.load(largest + row * chunks + first)
    total = tl.load(totals + row * chunks + first)
    mixture = tl.load(mixtures + (row * chunks + first) * SIZE + place)
    for chunk in range(first + 1, (end + CHUNK - 1) // CHUNK):
        part = row * chunks + chunk
        other = tl.load(largest + part)
        above = tl.maximum(most, other)
        shrunk = tl.exp(most - above)
        share = tl.exp(other - above)
        total = total * shrunk + tl.load(totals + part) * share
        mixture = mixture * shrunk + tl.load(mixtures + part * SIZE + place) * share
        most = above
    tl.store(out + row * SIZE + place, (mixture / total).to(out.dtype.element_ty))
