"""Which way through the experts is fastest on a CPU: the measurement behind Layer.experts in inference/model.py.

    python scripts/bench/experts.py [--wide] [--threads 1 2]

Every way gets the same tokens, router weights and expert weights ([E, 2F, D] and [E, D, F]), in turn, round after
round; the best round counts, and the machine's load stands by it: above the thread count, others were at work.
Ratios are to `segments`, the model's way. --wide adds one layer of 8x7B (up to 6 GB).
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from _bench import best_seconds, write_result
from torch import Tensor

from mixtools.inference import mixture


@dataclass
class Case:
    """One problem: x [N, D], weights [N, K] fp32, experts [N, K], gate_up [E, 2F, D], down [E, D, F]."""

    name: str
    x: Tensor
    weights: Tensor
    experts: Tensor
    gate_up: Tensor
    down: Tensor


def swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)


def split_swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2)
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def masks(case: Case) -> Tensor:
    """The common loop: per expert, find its tokens in a mask, gather, run, scatter."""
    out = torch.zeros(case.x.shape)
    for expert in range(len(case.down)):
        rows, place = torch.where(case.experts == expert)
        if len(rows):
            y = swiglu(case.x[rows], case.gate_up[expert], case.down[expert])
            out.index_add_(0, rows, y * case.weights[rows, place, None])
    return out.to(case.x.dtype)


def sort_pairs(case: Case) -> tuple[list[int], Tensor, Tensor]:
    expert_of, order = case.experts.flatten().sort(stable=True)
    counts = torch.bincount(expert_of, minlength=len(case.down)).tolist()
    return counts, order, order // case.experts.shape[1]


def segments(case: Case, inner: Callable[[Tensor, Tensor, Tensor], Tensor] = swiglu) -> Tensor:
    """The model's: sort the pairs of token and expert once; gather and scatter per expert."""
    out = torch.zeros(case.x.shape)
    for expert, rows, share in mixture.segments(case.weights, case.experts, len(case.down)):
        out.index_add_(0, rows, inner(case.x[rows], case.gate_up[expert], case.down[expert]) * share[:, None])
    return out.to(case.x.dtype)


def segments_split(case: Case) -> Tensor:
    """`segments`, gate and up as two products."""
    return segments(case, split_swiglu)


def gathered(case: Case) -> Tensor:
    """Sort, gather all rows at once, run contiguous segments, unsort, and sum over K."""
    counts, order, token_of = sort_pairs(case)
    x = case.x[token_of]
    y, start = torch.empty_like(x), 0
    for expert, count in enumerate(counts):
        if count:
            part = slice(start, start + count)
            y[part] = swiglu(x[part], case.gate_up[expert], case.down[expert])
        start += count
    return combine(case, y, order)


def combine(case: Case, y: Tensor, order: Tensor) -> Tensor:
    pairs = torch.empty_like(y)
    pairs[order] = y
    return (pairs.view(*case.experts.shape, -1) * case.weights[..., None]).sum(1).to(case.x.dtype)


def grouped_mm(case: Case) -> Tensor:
    """torch._grouped_mm over the sorted rows."""
    counts, order, token_of = sort_pairs(case)
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    gate, up = torch._grouped_mm(case.x[token_of], case.gate_up.mT, offs=ends).chunk(2, dim=-1)
    return combine(case, torch._grouped_mm(F.silu(gate) * up, case.down.mT, offs=ends), order)


def dense(case: Case) -> Tensor:
    """Every expert on every token: E/K times the work, no gathering."""
    share = torch.zeros(len(case.x), len(case.down)).scatter_(1, case.experts, case.weights)
    x = case.x.expand(len(case.down), *case.x.shape)
    gate, up = torch.bmm(x, case.gate_up.mT).chunk(2, dim=-1)
    y = torch.bmm(F.silu(gate) * up, case.down.mT)  # [E, N, D]
    return torch.einsum("end,ne->nd", y.float(), share).to(case.x.dtype)


def pairs(case: Case) -> Tensor:
    """No sorting: one product per pair of token and expert."""
    rows = []
    for x, weights, experts in zip(case.x, case.weights.tolist(), case.experts.tolist(), strict=True):
        parts = [
            weight * swiglu(x, case.gate_up[expert], case.down[expert]).float()
            for weight, expert in zip(weights, experts, strict=True)
        ]
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows).to(case.x.dtype)


def gemv(case: Case) -> Tensor:
    """`pairs` with torch.mv."""
    rows = []
    for x, weights, experts in zip(case.x, case.weights.tolist(), case.experts.tolist(), strict=True):
        total = torch.zeros(x.shape)
        for weight, expert in zip(weights, experts, strict=True):
            gate, up = torch.mv(case.gate_up[expert], x).chunk(2)
            total.add_(torch.mv(case.down[expert], F.silu(gate) * up), alpha=weight)
        rows.append(total)
    return torch.stack(rows).to(case.x.dtype)


WAYS = (segments, segments_split, masks, gathered, grouped_mm, dense, pairs, gemv)


def make(name: str, tokens: int, dtype: torch.dtype, stored: tuple[Tensor, Tensor]) -> Case:
    gate_up, down = stored
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, down.shape[1], generator=generator).to(dtype)
    scores = torch.randn(tokens, len(down), generator=generator).softmax(-1)
    weights, experts = scores.topk(2, dim=-1)
    return Case(name, x, weights / weights.sum(-1, keepdim=True), experts, gate_up, down)


def stored_weights(wide: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    experts, d, f = (8, 4096, 14336) if wide else (8, 256, 256)
    gate_up, down = torch.empty(experts, 2 * f, d, dtype=dtype), torch.empty(experts, d, f, dtype=dtype)
    # uniform, in place: a wide layer in fp32 is 5.6 GB and wants no second copy
    gate_up.uniform_(-(d**-0.5), d**-0.5)
    down.uniform_(-(f**-0.5), f**-0.5)
    return gate_up, down


def applies(way: Callable[[Case], Tensor], case: Case, wide: bool) -> bool:
    tokens = len(case.x)
    if way in (pairs, gemv):
        return tokens <= 8
    return way is not dense or not wide or tokens == 1


def measure(case: Case, wide: bool, seconds: float) -> dict[str, float]:
    """Best seconds of each way; each must give the result of `masks`."""
    expected = masks(case).float()
    best = {}
    ways = [way for way in WAYS if applies(way, case, wide)]
    for way in ways:
        found = way(case).float()
        bound = 1e-4 if case.x.dtype == torch.float32 else 3e-2
        if (found - expected).abs().max() > bound * expected.abs().max():
            raise SystemExit(f"{way.__name__} gives another result in {case.name}")
        best[way.__name__] = float("inf")
    end, rounds = time.perf_counter() + seconds, 0
    while time.perf_counter() < end or rounds < 2:
        for way in ways[:: 1 if rounds % 2 else -1]:  # to and fro: none always finds the caches its neighbour left
            start = time.perf_counter()
            way(case)
            best[way.__name__] = min(best[way.__name__], time.perf_counter() - start)
        rounds += 1
    return best


def show(case: Case, best: dict[str, float]) -> None:
    tokens, used = len(case.x), len(case.experts.unique())
    weight_bytes = (case.gate_up[0].nbytes + case.down[0].nbytes) * used
    flops = 2 * tokens * 2 * (case.gate_up[0].numel() + case.down[0].numel())
    ours = best["segments"]
    print(f"{case.name}: {used} experts used; segments {weight_bytes / ours / 1e9:.1f} GB/s, {flops / ours / 1e9:.0f} "
          "GFLOP/s")  # fmt: skip
    for name, seconds in sorted(best.items(), key=lambda item: item[1]):
        print(f"  {name:16} {seconds * 1e6:12.0f} us  {seconds / ours:6.2f}x")


def orientation(stored: tuple[Tensor, Tensor], tokens: int, rounds: int) -> dict[str, float]:
    """One expert's gate and up, [2F, D] as stored or copied as [D, 2F]: best seconds of x through each."""
    weight = stored[0][0]
    turned = weight.t().contiguous()
    x = torch.randn(tokens, weight.shape[1]).to(weight.dtype)
    ways = {"stored_out_in": lambda: F.linear(x, weight), "stored_in_out": lambda: x @ turned}
    return {name: best_seconds(way, rounds=rounds) for name, way in ways.items()}


def run(wide: bool, dtype: torch.dtype, threads: int, stored: tuple[Tensor, Tensor]) -> list[dict[str, object]]:
    """All token counts for one set of weights."""
    torch.set_num_threads(threads)
    size = "8x7B" if wide else "nano"
    title = f"{size} {str(dtype).removeprefix('torch.')}, {threads} thread{'s'[: threads - 1]}"
    results: list[dict[str, object]] = []
    for tokens in (1, 8, 512):
        case = make(f"{title}, {tokens} token{'s'[: tokens - 1]}", tokens, dtype, stored)
        best = measure(case, wide, 4.0 if wide else 1.5)
        show(case, best)
        results.append({"name": case.name, "load": round(os.getloadavg()[0], 2), "seconds": best})
        turned = orientation(stored, max(1, tokens // 4), 5 if wide else 200)
        print(f"  one expert's gate and up: [out, in] as stored {turned['stored_out_in'] * 1e6:.0f} us, "
              f"[in, out] {turned['stored_in_out'] / turned['stored_out_in']:.2f}x")  # fmt: skip
        results.append({"name": f"{case.name}: orientation", "seconds": turned})
    return results


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wide", action="store_true", help="add one layer of 8x7B")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="more than one needs a quiet machine")
    options = parser.parse_args()
    results = []
    for wide in (False, True)[: 1 + options.wide]:
        for dtype in (torch.bfloat16, torch.float32):
            stored = stored_weights(wide, dtype)
            for threads in options.threads:
                results += run(wide, dtype, threads, stored)
            del stored
    print(write_result("experts", results))


if __name__ == "__main__":
    main()
