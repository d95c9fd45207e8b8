"""The kernels as `torch.ops.mixtools.gpu_*`: schema and shape function of each; reference.py has them in plain torch.

An operation takes tensors and numbers, so planes come as their parts and what else they are, in the order in which
`arguments` gives them. On CPU tensors the kernels run in Triton's interpreter alone (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import torch
from torch import Tensor, library

from ...errors import MixtoolsError
from . import able, launch
from .planes import Kind, Planes


def gemv(x: Tensor, planes: Planes, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, in] times planes of [out, in] -> [T, out], of x's dtype unless told otherwise. T at most 8."""
    out: Tensor = gpu_gemv(x, *arguments(planes), dtype or x.dtype)
    return out


def gate_up(x: Tensor, experts: Tensor, planes: Planes, inner: int, dtype: torch.dtype | None = None) -> Tensor:
    """x [T, D], experts int64 [T, K] and planes of [E, 2 inner, D] -> silu(gate(x)) * up(x) [T, K, inner]."""
    out: Tensor = gpu_gate_up(x, experts, *arguments(planes), inner, dtype or x.dtype)
    return out


def down(
    x: Tensor, experts: Tensor, weights: Tensor, planes: Planes, rows: int, dtype: torch.dtype | None = None
) -> Tensor:
    """x [T, K, F], experts int64 and weights fp32 [T, K], planes of [E, rows, F] -> [T, rows]: a token's K products
    times its weights, summed in the order of its experts."""
    out: Tensor = gpu_down(x, experts, weights, *arguments(planes), rows, dtype or x.dtype)
    return out


def route(x: Tensor, norm: Tensor, router: Tensor, eps: float, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], norm [D] of its dtype and router fp32 [E, D] -> x normalised, weights fp32 and experts int64 [T, K]."""
    normed, weights, experts = gpu_route(x, norm, router, eps, choices)
    return normed, weights, experts


def normalise(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    """x [T, D] over its root mean square, rounded, times norm [D] of its dtype."""
    out: Tensor = gpu_normalise(x, norm, eps)
    return out


def turn(
    heads: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], seen: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """`heads` q [B, H, hd], k and v [B, G, hd] of a new token of each text -> q turned; k, turned, and v go to the last
    column seen of keys and values [B, G, capacity, hd]. `tables`: cosines and sines [B or 1, capacity, hd / 2]."""
    out: Tensor = gpu_turn(*heads, *tables, seen, keys, values)
    return out


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """q [B, H, T, hd] over the columns of keys and values [B, G, capacity, hd] that `seen` int32 [B, 2] names, the
    first and the one after the last, the last T of them q's own: softmax(q k' / sqrt(hd)) v, [B, H, T, hd]. hd a power
    of two."""
    out: Tensor = gpu_attend(q, keys, values, seen)
    return out


def unpack(planes: Planes, dtype: torch.dtype) -> Tensor:
    """The matrix [rows, in] that planes hold, its values rounded once."""
    out: Tensor = gpu_unpack(*arguments(planes), dtype)
    return out


def arguments(planes: Planes) -> tuple[list[Tensor], str, int, int]:
    """Planes as operations take them."""
    return [*planes.parts], planes.kind.spelled, planes.columns, planes.matrix_rows


def _planes(parts: list[Tensor], kind: str, columns: int, matrix_rows: int) -> Planes:
    known = Kind.parse(kind)
    first = parts[0]
    return Planes(known, len(first), columns, matrix_rows, tuple(parts))


@library.custom_op("mixtools::gpu_gemv", mutates_args=())
def gpu_gemv(x: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int, dtype: torch.dtype) -> Tensor:
    planes = _planes(parts, kind, columns, matrix_rows)
    _check_x(x, 2, columns, dtype)
    if not 0 < len(x) <= launch.MOST_TOKENS:
        raise MixtoolsError(f"the kernel takes 1 to {launch.MOST_TOKENS} tokens, not {len(x)}")
    out = x.new_empty((len(x), planes.rows), dtype=dtype)
    launch.gemv(x.contiguous(), planes, out).run()
    return out


@gpu_gemv.register_fake
def _(x: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((len(x), len(parts[0])), dtype=dtype)


@library.custom_op("mixtools::gpu_gate_up", mutates_args=())
def gpu_gate_up(
    x: Tensor, experts: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int, inner: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    planes = _planes(parts, kind, columns, matrix_rows)
    _check_x(x, 2, columns, dtype)
    _check_choices(experts, x)
    if planes.rows % (2 * inner):
        raise MixtoolsError(f"{planes.rows} rows are no experts of twice {inner}")
    out = x.new_empty((*experts.shape, inner), dtype=dtype)
    launch.gate_up(x.contiguous(), experts.contiguous(), planes, out).run()
    return out


@gpu_gate_up.register_fake
def _(
    x: Tensor, experts: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int, inner: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((*experts.shape, inner), dtype=dtype)


@library.custom_op("mixtools::gpu_down", mutates_args=())
def gpu_down(
    x: Tensor, experts: Tensor, weights: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int,
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    planes = _planes(parts, kind, columns, matrix_rows)
    _check_x(x, 3, columns, dtype)
    _check_choices(experts, x)
    if weights.dtype != torch.float32 or weights.shape != experts.shape or x.shape[:2] != experts.shape:
        raise MixtoolsError(f"weights {weights.dtype} {list(weights.shape)} do not fit experts {list(experts.shape)}")
    if planes.rows % rows:
        raise MixtoolsError(f"{planes.rows} rows are no experts of {rows}")
    out = x.new_empty((len(x), rows), dtype=dtype)
    launch.down(x.contiguous(), experts.contiguous(), weights.contiguous(), planes, out).run()
    return out


@gpu_down.register_fake
def _(
    x: Tensor, experts: Tensor, weights: Tensor, parts: list[Tensor], kind: str, columns: int, matrix_rows: int,
    rows: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x.new_empty((len(x), rows), dtype=dtype)


@library.custom_op("mixtools::gpu_unpack", mutates_args=())
def gpu_unpack(parts: list[Tensor], kind: str, columns: int, matrix_rows: int, dtype: torch.dtype) -> Tensor:
    planes = _planes(parts, kind, columns, matrix_rows)
    able.check(parts[0])
    out = parts[0].new_empty((planes.rows, columns), dtype=dtype)
    launch.unpack(planes, out).run()
    return out


@gpu_unpack.register_fake
def _(parts: list[Tensor], kind: str, columns: int, matrix_rows: int, dtype: torch.dtype) -> Tensor:
    return parts[0].new_empty((len(parts[0]), columns), dtype=dtype)


@library.custom_op("mixtools::gpu_route", mutates_args=())
def gpu_route(x: Tensor, norm: Tensor, router: Tensor, eps: float, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    _check_x(x, 2, router.shape[-1], x.dtype)
    if norm.dtype != x.dtype or norm.shape != x.shape[1:] or router.dtype != torch.float32 or router.ndim != 2:
        raise MixtoolsError(f"norm {norm.dtype} {list(norm.shape)} or router {router.dtype} do not fit x {x.dtype}")
    if not 0 < choices <= len(router):
        raise MixtoolsError(f"{choices} of {len(router)} experts cannot be chosen")
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    weights = x.new_empty((len(x), choices), dtype=torch.float32)
    experts = x.new_empty((len(x), choices), dtype=torch.int64)
    of_x, of_norm, of_router = (one.contiguous() for one in (x, norm, router))
    launch.route(of_x, of_norm, of_router, eps, normed, weights, experts).run()
    return normed, weights, experts


@gpu_route.register_fake
def _(x: Tensor, norm: Tensor, router: Tensor, eps: float, choices: int) -> tuple[Tensor, Tensor, Tensor]:
    weights = x.new_empty((len(x), choices), dtype=torch.float32)
    normed = torch.empty_like(x, memory_format=torch.contiguous_format)
    return normed, weights, x.new_empty((len(x), choices), dtype=torch.int64)


@library.custom_op("mixtools::gpu_normalise", mutates_args=())
def gpu_normalise(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    _check_x(x, 2, norm.numel(), x.dtype)
    if norm.dtype != x.dtype or norm.ndim != 1:
        raise MixtoolsError(f"norm {norm.dtype} {list(norm.shape)} does not fit x {x.dtype}")
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    launch.normalise(x.contiguous(), norm.contiguous(), eps, out).run()
    return out


@gpu_normalise.register_fake
def _(x: Tensor, norm: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@library.custom_op("mixtools::gpu_turn", mutates_args=("keys", "values"))
def gpu_turn(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    same = keys.shape == values.shape and k.shape == v.shape and cos.shape == sin.shape
    if not (
        same and q.ndim == k.ndim == cos.ndim == 3 and keys.ndim == 4 and _powers(q.shape[-1])
        and q.dtype == k.dtype == v.dtype == keys.dtype == values.dtype and cos.dtype == sin.dtype == torch.float32
        and k.shape == (len(q), keys.shape[1], q.shape[2]) and (len(keys), keys.shape[3]) == (len(q), q.shape[2])
        and cos.shape[1:] == (keys.shape[2], q.shape[2] // 2) and len(cos) in (1, len(q))
        and keys.is_contiguous() and values.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    ):  # fmt: skip
        told = f"{q.dtype} {list(q.shape)} and {list(k.shape)} by tables {list(cos.shape)}"
        raise MixtoolsError(f"no kernel turns {told} into a cache of {keys.dtype} {list(keys.shape)}")
    _check_seen(seen, len(q))
    able.check(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads = tuple(one if one.stride()[1:] == (one.shape[2], 1) else one.contiguous() for one in (q, k, v))
    launch.turn((heads[0], heads[1], heads[2]), (cos, sin), seen.contiguous(), out, keys, values).run()
    return out


@gpu_turn.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, seen: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


@library.custom_op("mixtools::gpu_attend", mutates_args=())
def gpu_attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    whole = q.ndim == keys.ndim == 4 and keys.shape == values.shape and _powers(q.shape[-1])
    if not (
        whole
        and q.dtype == keys.dtype == values.dtype
        and (q.shape[0], q.shape[-1]) == (keys.shape[0], keys.shape[-1])
        and q.shape[1] % keys.shape[1] == 0
        and 0 < q.shape[2] <= keys.shape[2]
    ):
        told = f"{q.dtype} {list(q.shape)} over {keys.dtype} {list(keys.shape)}"
        raise MixtoolsError(f"no kernel computes the attention of {told} and {values.dtype} {list(values.shape)}")
    _check_seen(seen, len(q))
    able.check(q)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    cache = keys.contiguous(), values.contiguous()
    for started in launch.attend(q.contiguous(), *cache, seen.contiguous(), out):
        started.run()
    return out


@gpu_attend.register_fake
def _(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _powers(size: int) -> bool:
    return size > 1 and size & (size - 1) == 0


def _check_seen(seen: Tensor, texts: int) -> None:
    """What the numbers are stays on the card."""
    if seen.dtype != torch.int32 or seen.shape != (texts, 2):
        raise MixtoolsError(
            f"columns seen by {texts} texts are int32 [{texts}, 2], not {seen.dtype} {list(seen.shape)}"
        )


def _check_x(x: Tensor, dimensions: int, columns: int, dtype: torch.dtype) -> None:
    known = (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype not in known or x.ndim != dimensions or x.shape[-1] != columns:
        raise MixtoolsError(f"x {x.dtype} {list(x.shape)} does not fit rows of {columns} columns")
    if dtype not in (x.dtype, torch.float32):
        raise MixtoolsError(f"results are of x's {x.dtype} or fp32, not {dtype}")
    able.check(x)


def _check_choices(experts: Tensor, x: Tensor) -> None:
    if experts.dtype != torch.int64 or experts.ndim != 2 or len(experts) != len(x):
        raise MixtoolsError(f"experts {experts.dtype} {list(experts.shape)} are not those of {len(x)} tokens")
