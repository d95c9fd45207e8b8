"""Tokens and their experts: sorted, either expert by expert (`segments`), or all by one grouped product (`mixture`).

    experts [N, K] ─► pairs sorted by expert ─► x of each pair ─► gate+up of all ─► down of all ─► pairs in order ─► sum

No atomics and no masks: a sum is taken in the order of a token's choices. On a GPU nothing waits for the CPU, which
does not learn how many tokens an expert has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor


def segments(weights: Tensor, experts: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Router's choice [N, K], twice -> per expert that has any: its number, its tokens [n], their weights [n].

    One sort of the pairs; scripts/bench/experts.py holds this against loops over masks, grouped and dense products.
    """
    if len(experts) == 1:  # nothing to sort
        for place, expert in enumerate(experts[0].tolist()):
            yield expert, torch.zeros_like(experts[0, :1]), weights[0, place : place + 1]
        return
    order, ends = _sorted(experts, num_experts)
    token_of, weight_of = order // experts.shape[1], weights.flatten()[order]
    start = 0
    for expert, end in enumerate(ends.tolist()):
        if end > start:
            yield expert, token_of[start:end], weight_of[start:end]
        start = end


def mixture(
    x: Tensor, weights: Tensor, experts: Tensor, gate_up: Callable[[], Tensor], down: Callable[[], Tensor]
) -> Tensor:
    """x [N, D], weights fp32 and experts [N, K] -> [N, D]. `gate_up` and `down` give the matrices [E, 2F, D] and
    [E, D, F] of x's dtype: each is asked for once, when it is needed, and not held."""
    matrices, count = gate_up(), experts.shape[1]
    order, ends = _sorted(experts, len(matrices))
    inner = grouped(x[order // count], matrices, ends)
    del matrices
    gate, up = inner.chunk(2, dim=-1)
    inner = F.silu(gate).mul_(up)
    del gate, up
    made = grouped(inner, down(), ends)
    pairs = torch.empty_like(made)
    pairs[order] = made
    of_tokens = pairs.view(len(x), count, -1)
    out = torch.zeros(x.shape, device=x.device, dtype=torch.float32)
    for choice in range(count):
        out.addcmul_(of_tokens[:, choice].float(), weights[:, choice, None])
    return out.to(x.dtype)


def _sorted(experts: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """The pairs [N*K] in their experts' order, and where each expert's end, int32 [E]."""
    expert_of, order = experts.flatten().sort(stable=True)
    numbers = torch.arange(1, num_experts + 1, device=experts.device)
    return order, torch.searchsorted(expert_of, numbers).int()


def grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows of x [M, in] up to ends[e] (from where e - 1 ends) times matrices [E, out, in], transposed -> [M, out]."""
    if _in_one(x):
        out: Tensor = torch._grouped_mm(x, matrices.transpose(1, 2), offs=ends)
        return out
    parts, start = [], 0
    for matrix, end in zip(matrices, ends.tolist(), strict=True):
        parts.append(F.linear(x[start:end], matrix))
        start = end
    return torch.cat(parts)


def _in_one(x: Tensor) -> bool:
    """Whether torch multiplies groups in one: bf16 on NVIDIA's cards from Hopper on, rows that are a multiple of 16
    bytes."""
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or x.shape[1] % 8 or not hasattr(torch, "_grouped_mm"):
        return False
    return torch.version.hip is None and torch.cuda.get_device_capability(x.device) >= (9, 0)
