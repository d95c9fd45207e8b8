"""What the kernels compute, in plain torch on any device: their definition, and what they are tested against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .planes import HIGH_BITS_OF_8, HIGH_BITS_OF_16, NESTED_BLOCK, Planes


def values(planes: Planes) -> Tensor:
    """fp32 [rows, in]: the format's own value of each code."""
    parts, kind = planes.parts, planes.kind
    if kind.name == "dense":
        return parts[0].float()
    return _DECODERS[kind.name](planes)


def gemv(x: Tensor, planes: Planes) -> Tensor:
    """x [T, in] -> fp64 [T, rows]."""
    return x.double() @ values(planes).double().T


def gate_up(x: Tensor, experts: Tensor, planes: Planes, inner: int) -> Tensor:
    """x [T, D], experts [T, K], planes of [E, 2 inner, D] -> fp64 [T, K, inner]: silu(gate(x)) * up(x)."""
    weights = values(planes).double().view(-1, 2 * inner, planes.columns)
    made: Tensor = torch.einsum("td,tkfd->tkf", x.double(), weights[experts])
    return F.silu(made[..., :inner]) * made[..., inner:]


def down(x: Tensor, experts: Tensor, weights: Tensor, planes: Planes, rows: int) -> Tensor:
    """x [T, K, F], experts and weights [T, K], planes of [E, rows, F] -> fp64 [T, rows]."""
    matrices = values(planes).double().view(-1, rows, planes.columns)
    return torch.einsum("tkf,tkdf,tk->td", x.double(), matrices[experts], weights.double())


def route(x: Tensor, norm: Tensor, router: Tensor, eps: float, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D] -> RMSNorm of it as x, weights fp32 and experts int64 [T, choices], the first of equals first."""
    normed = normalise(x, norm, eps)
    logits = F.linear(normed.float(), router)
    experts = logits.sort(descending=True, stable=True).indices[:, :choices]
    return normed, logits.gather(1, experts).softmax(-1), experts


def normalise(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x [T, D] -> RMSNorm of it as x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * norm.to(x.dtype)


def turn(
    heads: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], seen: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """q [B, H, hd], k and v [B, G, hd] -> q turned; k, turned, and v into keys and values [B, G, capacity, hd]."""
    q, k, v = heads
    text, column = torch.arange(len(q), device=q.device), seen[:, 1].long() - 1
    cos, sin = (table.expand(len(q), -1, -1)[text, column][:, None] for table in tables)  # [B, 1, hd/2]

    def turned(x: Tensor) -> Tensor:
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)

    keys[text, :, column], values[text, :, column] = turned(k), v
    return turned(q)


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q [B, H, T, hd], keys and values [B, G, capacity, hd] -> fp64 [B, H, T, hd]; a token sees all of seen [B, 2] up
    to itself."""
    tokens, shared = q.shape[2], q.shape[1] // keys.shape[1]
    first, end = (seen[:, which, None, None].long() for which in (0, 1))  # [B, 1, 1]
    column = torch.arange(keys.shape[2], device=q.device)
    own = end - tokens + torch.arange(tokens, device=q.device)[:, None]  # [B, T, 1]
    hidden = ((column > own) | (column < first))[:, None]
    filled = (column < end)[:, None, 0, :, None]
    k, v = (torch.where(filled, one.double(), 0).repeat_interleave(shared, 1) for one in (keys, values))
    scores = (q.double() @ k.transpose(2, 3) * q.shape[-1] ** -0.5).masked_fill(hidden, -torch.inf)
    out: Tensor = scores.softmax(-1) @ v
    return out


# --- planes to values ------------------------------------------------------------------------------------------------


def codes_of(words: Tensor, bits: int) -> Tensor:
    """Words [rows, n] of `bits` for each column -> codes int32 [rows, in]: word c of a unit has columns 4 j + c."""
    many = words.itemsize * 8 // bits
    wide = words.view(len(words), -1, 1, 4).int()
    shifts = torch.arange(many, device=words.device, dtype=torch.int32)[:, None] * bits
    return (wide >> shifts & (1 << bits) - 1).flatten(1)


def _spread(of_groups: Tensor, columns: int) -> Tensor:
    """[rows, groups] -> [rows, columns]"""
    return of_groups.repeat_interleave(columns // of_groups.shape[1], 1)


def _bits(words: Tensor, many: int, bits: int) -> Tensor:
    """[rows, n] -> int32 [rows, n * many], the low bits first."""
    shifts = torch.arange(many, device=words.device, dtype=torch.int32) * bits
    return (words.int()[..., None] >> shifts & (1 << bits) - 1).flatten(-2)


def _int4(planes: Planes) -> Tensor:
    words, scales, *zeros = planes.parts
    zero = torch.full_like(scales, planes.kind.zero, dtype=torch.float32)
    if zeros:
        zero += _bits(zeros[0], 2, 4).view(scales.shape)
    columns = planes.columns
    return (codes_of(words, 4) - _spread(zero, columns)) * _spread(scales.float(), columns)


def _nf4(planes: Planes) -> Tensor:
    words, absmax, tables, *largest = planes.parts
    if largest:
        matrices = planes.rows // planes.matrix_rows
        each = largest[0].view(matrices, -1).repeat_interleave(NESTED_BLOCK, 1)
        known = absmax.view(matrices, -1)
        scales = torch.stack([table[16:-1][found.long()] for table, found in zip(tables, known, strict=True)])
        scales.mul_(each[:, : known.shape[1]]).add_(tables[:, -1:])
        absmax = scales.view(planes.rows, -1)
    return tables[0, :16][codes_of(words, 4).long()] * _spread(absmax, planes.columns)


def _q8_0(planes: Planes) -> Tensor:
    words, d = planes.parts
    return (codes_of(words, 8) - 128) * _spread(d.float(), planes.columns)


def _affine(codes: Tensor, both: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """d * scale * code - dmin * minimum: three products and a difference, each rounded."""
    columns = codes.shape[1]
    d, least = both.view(torch.float16).float().view(len(both), -1, 2).unbind(-1)
    groups = scales.shape[1]
    scale, minimum = _spread(d, groups) * scales, _spread(least, groups) * minima
    return codes * _spread(scale, columns) - _spread(minimum, columns)


def _six_bits(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    tops = _bits(high, 2, 4)
    return (low & 15) + 16 * (tops & 3), (low >> 4) + 16 * (tops >> 2)


def _q4_k(planes: Planes) -> Tensor:
    words, both, low, high = planes.parts
    return _affine(codes_of(words, 4), both, *_six_bits(low, high))


def _q5_k(planes: Planes) -> Tensor:
    words, both, low, high, fifth = planes.parts
    return _affine(codes_of(words, 4) + 16 * _bits(fifth, 32, 1), both, *_six_bits(low, high))


def _q6_k(planes: Planes) -> Tensor:
    words, high, scales, d = planes.parts
    mixed = _in_order(codes_of(high, 2), HIGH_BITS_OF_8)
    scale = _spread(d.float(), 2 * scales.shape[1]) * scales.view(torch.int8)
    return _spread(scale, planes.columns) * (codes_of(words, 4) + 16 * mixed - 32)


def _q2_k(planes: Planes) -> Tensor:
    words, both, groups = planes.parts
    each = _bits(groups, 4, 8)
    return _affine(codes_of(words, 2), both, each & 15, each >> 4)


def _q3_k(planes: Planes) -> Tensor:
    words, high, d, low_scales, high_scales = planes.parts
    codes = codes_of(words, 2) + 4 * _in_order(codes_of(high, 1), HIGH_BITS_OF_16) - 4
    scales = _bits(low_scales, 4, 4) + 16 * _bits(high_scales, 4, 2) - 32
    return _spread(_spread(d.float(), scales.shape[1]) * scales, planes.columns) * codes


def _in_order(codes: Tensor, order: list[int]) -> Tensor:
    """Codes of words of as many as `order` has, which says whose each is -> by column."""
    apart = codes.view(len(codes), -1, len(order), 4)
    out = torch.empty_like(apart)
    out[:, :, order] = apart
    return out.flatten(1)


_DECODERS = {
    "int4": _int4, "nf4": _nf4, "q8_0": _q8_0, "q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k,
    "q6_k": _q6_k,
}  # fmt: skip


def tridiagonal(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Symmetric [p, p] -> d [p], e, tau [p - 1], and reflectors as the rows of [p - 1, p] (symmetric.gpu_tridiagonal),
    one column after the other."""
    rest, order = matrix.clone(), len(matrix)
    e, tau = matrix.new_zeros(2, order - 1)
    reflectors = matrix.new_zeros(order - 1, order)
    for column in range(order - 1):
        x = rest[column + 1 :, column]
        v, below = reflectors[column], float(x[1:].square().sum())
        e[column], v[column + 1] = x[0], 1.0
        if below > 0:
            e[column] = -torch.copysign(torch.sqrt(x[0] ** 2 + below), x[0])
            tau[column] = (e[column] - x[0]) / e[column]
            v[column + 2 :] = x[1:] / (x[0] - e[column])
        turned = rest - tau[column] * torch.outer(v, v @ rest)
        rest = turned - tau[column] * torch.outer(turned @ v, v)
    return rest.diagonal().clone(), e, tau, reflectors


def tridiagonal_whole(d: Tensor, e: Tensor) -> Tensor:
    """[p] and [p - 1] -> [p, p], of which the eigenvalues and vectors are meant."""
    return torch.diag(d) + torch.diag(e, 1) + torch.diag(e, -1)
