"""How large a launch of a kernel is, and what it is compiled for: told from shapes alone, so that it can be compiled
ahead of time for a GPU that is not there (tests/gpu, scripts/bench/gpu_compiled.py)."""

from __future__ import annotations

import contextlib
import importlib
import threading
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import MixtoolsError
from .planes import Planes

Arguments = dict[str, Tensor | int | float]
_ONE = threading.Lock()  # Triton compiles, and interprets, for one thread at a time
MOST_TOKENS = 8
LANES = 64 if torch.version.hip else 32  # threads of a warp
CHUNK = 64  # columns of a cache that one program of `attend` takes
# Rows that a program takes, by the number of tokens it is compiled for: x is loaded once for all of them, and each has
# four sums or eight a thread and token.
_ROWS = {1: 4, 2: 4, 4: 4, 8: 2}
_ROUTED_COLUMNS, _ROUTING_WARPS = 2048, 16  # one program a token: it waits for memory once for as many columns
_PARTS_TOGETHER, _ATTENDING_WARPS = 16, 4
_BUSY = 4096  # warps that have enough on its way to keep the memory of a large card busy
_ALONE = ("q5_k",)  # kinds whose kernels would spill on sm_100 if another warp was in the program


@dataclass(frozen=True)
class Plan:
    """What a kernel must know of planes when it is compiled. `together`: units of a row that are taken at a time;
    `matrix_rows`: 0 where it need not, so that matrices of other heights share what is compiled.
    """

    kind: str
    columns: int
    unit: int
    wide: int
    together: int
    matrix_rows: int
    group: int
    zero: int
    has_zeros: bool
    nested: bool

    @property
    def units(self) -> int:
        return -(-self.columns // self.unit)

    @property
    def ragged(self) -> bool:
        """A row ends inside a unit, as only dense ones may."""
        return self.columns % self.unit != 0

    @property
    def stride(self) -> int:
        """Items of the first plane from row to row."""
        return self.columns if self.ragged else self.units * self.wide


@dataclass(frozen=True)
class Launch:
    """A kernel with all that it is started with. `module`: the file here that has it."""

    kernel: str
    grid: tuple[int, ...]
    arguments: Arguments
    constants: dict[str, Any]
    module: str = "gemv"
    warps: int = 1  # with one no thread waits for another

    @property
    def function(self) -> Any:
        """Raises MixtoolsError where there is no Triton."""
        return getattr(kernels(self.module), self.kernel)

    @property
    def options(self) -> dict[str, Any]:
        """Of the compiler. Products and sums are rounded each by itself, but where the text asks for both at once."""
        return {"num_warps": self.warps, "enable_fp_fusion": False}

    def run(self) -> None:
        """Raises MixtoolsError where there is no Triton."""
        device = next(one.device for one in self.arguments.values() if isinstance(one, Tensor))
        with _ONE, torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            self.function[self.grid](**self.arguments, **self.constants, **self.options)


def gemv(x: Tensor, planes: Planes, out: Tensor, before: Tensor | None = None, lanes: int = LANES) -> Launch:
    """out [T, rows] of x [T, in], added to `before` if that is given; T at most MOST_TOKENS."""
    tokens = power_of_two(len(x))
    rows = _rows(tokens, planes.rows)
    programs = -(-planes.rows // rows)
    warps = _warps(programs, planes, lanes)
    arguments: Arguments = {
        "x": x, **_added(before, out), "out": out, "tokens": len(x), "rows": planes.rows, **_planes(planes)
    }  # fmt: skip
    constants = {"ROWS": rows, "TOKENS": tokens, "ADDS": before is not None, "PLAN": plan(planes, warps * lanes)}
    return Launch("gemv", (programs,), arguments, constants, warps=warps)


def gate_up(x: Tensor, experts: Tensor, planes: Planes, out: Tensor, lanes: int = LANES) -> Launch:
    """out [T, K, F] of x [T, D] and experts [T, K]."""
    tokens, choices, inner = out.shape
    rows = _rows(1, 2 * inner)
    arguments: Arguments = {"x": x, "experts": experts, "out": out, "inner": inner, **_planes(planes)}
    constants = {"CHOICES": choices, "ROWS": rows, "PLAN": plan(planes, lanes)}
    return Launch("gate_up", (tokens * choices, -(-inner // (rows // 2))), arguments, constants)


def down(
    x: Tensor, experts: Tensor, weights: Tensor, planes: Planes, out: Tensor, before: Tensor | None = None,
    lanes: int = LANES,
) -> Launch:  # fmt: skip
    """out [T, D] of x [T, K, F], experts and weights [T, K], added to `before` if that is given."""
    tokens, rows = out.shape
    arguments: Arguments = {
        "x": x, "experts": experts, "weights": weights, **_added(before, out), "out": out, "rows": rows,
        **_planes(planes),
    }  # fmt: skip
    at_once = _rows(1, rows)
    programs = -(-rows // at_once)
    warps = _warps(programs, planes, lanes)
    constants = {
        "CHOICES": experts.shape[1], "ROWS": at_once, "ADDS": before is not None, "PLAN": plan(planes, warps * lanes)
    }  # fmt: skip
    return Launch("down", (tokens, programs), arguments, constants, warps=warps)


def unpack(planes: Planes, out: Tensor, lanes: int = LANES) -> Launch:
    """out [rows, in], in any dtype."""
    told = plan(planes, lanes)
    arguments: Arguments = {"out": out, "rows": planes.rows, **_planes(planes)}
    rows = _rows(1, planes.rows)
    grid = (-(-planes.rows // rows), -(-told.units // told.together))
    return Launch("unpack", grid, arguments, {"ROWS": rows, "PLAN": told})


def route(
    x: Tensor, norm: Tensor, router: Tensor, eps: float, normed: Tensor, weights: Tensor, experts: Tensor
) -> Launch:
    """normed [T, D], weights and experts [T, K] of x [T, D], norm [D] and router [E, D]."""
    count, columns = router.shape
    choices = weights.shape[1]
    arguments: Arguments = {
        "x": x, "norm": norm, "router": router, "normed": normed, "weights": weights, "experts": experts, "eps": eps,
    }  # fmt: skip
    constants = {
        "COLUMNS": columns, "EXPERTS": count, "PADDED": power_of_two(count), "CHOICES": choices,
        "MANY": power_of_two(choices), "TOGETHER": _ROUTED_COLUMNS,
    }  # fmt: skip
    return Launch("route", (len(x),), arguments, constants, "routing", _ROUTING_WARPS)


def normalise(x: Tensor, norm: Tensor, eps: float, out: Tensor) -> Launch:
    """out [T, D] of x [T, D] and norm [D]."""
    arguments: Arguments = {"x": x, "norm": norm, "out": out, "eps": eps}
    constants = {"COLUMNS": x.shape[1], "TOGETHER": _ROUTED_COLUMNS}
    return Launch("normalise", (len(x),), arguments, constants, "routing", _ROUTING_WARPS)


def turn(
    heads: tuple[Tensor, Tensor, Tensor], tables: tuple[Tensor, Tensor], seen: Tensor, out: Tensor, keys: Tensor,
    values: Tensor,
) -> Launch:  # fmt: skip
    """Of `heads` q [B, H, hd], k and v [B, G, hd], those of a text side by side, and `tables` cos and sin
    [B or 1, capacity, hd / 2]: out [B, H, hd], and the last column that is seen [B, 2] of keys and values."""
    q, k, v = heads
    cos, sin = tables
    arguments: Arguments = {
        "q": q, "k": k, "v": v, "cos": cos, "sin": sin, "seen": seen, "out": out, "keys": keys, "values": values,
        "of_q": q.stride(0), "of_k": k.stride(0), "of_v": v.stride(0),
        "of_table": cos.stride(0) if len(cos) > 1 else 0, "capacity": keys.shape[2],
    }  # fmt: skip
    constants = {"HEADS": q.shape[1], "GROUPS": k.shape[1], "SIZE": q.shape[2]}
    return Launch("turn", (len(q), q.shape[1] + 2 * k.shape[1]), arguments, constants, "turn")


def attend(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, out: Tensor) -> tuple[Launch, Launch]:
    """out [B, H, T, hd] of q and the columns of keys and values [B, G, capacity, hd] that `seen` [B, 2] names: the
    first, and the one after the last token's own. Two launches."""
    batch, heads, tokens, size = q.shape
    groups, capacity = keys.shape[1:3]
    chunks = -(-capacity // CHUNK)
    largest, totals = q.new_empty((2, batch, heads, tokens, chunks), dtype=torch.float32)
    mixtures = q.new_empty((batch, heads, tokens, chunks, size), dtype=torch.float32)
    parts: Arguments = {"seen": seen, "largest": largest, "totals": totals, "mixtures": mixtures, "chunks": chunks}
    arguments: Arguments = {"q": q, "keys": keys, "values": values, "capacity": capacity, "scale": size**-0.5}
    constants = {"HEADS": heads, "TOKENS": tokens, "SIZE": size, "CHUNK": CHUNK}
    grid, arguments = (batch * groups, tokens, chunks), {**arguments, **parts}
    first = Launch("attend", grid, arguments, {**constants, "GROUPS": groups}, "attend", _ATTENDING_WARPS)
    constants |= {"TOGETHER": _PARTS_TOGETHER}
    last = Launch("combine", (batch * heads * tokens,), {**parts, "out": out}, constants, "attend", _ATTENDING_WARPS)
    return first, last


def power_of_two(least: int) -> int:
    """The first power of two from there on."""
    return 1 << (least - 1).bit_length()


def plan(planes: Planes, lanes: int) -> Plan:
    kind = planes.kind
    wide = 16 // planes.parts[0].itemsize
    matrix_rows = planes.matrix_rows if kind.nested else 0
    return Plan(kind.name, planes.columns, planes.unit, wide, lanes, matrix_rows, kind.group, kind.zero,
                kind.has_zeros, kind.nested)  # fmt: skip


def _warps(programs: int, planes: Planes, lanes: int) -> int:
    """Of a program: with few programs several, that share a row's units evenly and still have some turns each."""
    turns, rest = divmod(-(-planes.columns // planes.unit), lanes)
    warps = 1
    while warps < 4 and programs * warps < _BUSY and rest == 0 and turns % (2 * warps) == 0 and turns >= 14 * warps:
        warps *= 2
    return 1 if planes.kind.name in _ALONE else warps


def _rows(tokens: int, most: int) -> int:
    """Of a program: a power of two, and no more than there are."""
    rows = _ROWS[tokens]
    while rows > most:
        rows //= 2
    return rows


def _added(before: Tensor | None, out: Tensor) -> Arguments:
    """What is not added is not looked at. Raises MixtoolsError where it lies where the result goes."""
    if before is not None and (before.shape != out.shape or before.data_ptr() == out.data_ptr() != 0):
        shapes = f"{list(before.shape)} to {list(out.shape)}"
        raise MixtoolsError(f"what is added has the result's shape and lies apart, not {shapes}")
    return {"before": out if before is None else before}


def _planes(planes: Planes) -> Arguments:
    """Five at most; what a kind lacks is not looked at."""
    return {f"p{index}": planes.parts[min(index, len(planes.parts) - 1)] for index in range(5)}


@cache
def kernels(module: str = "gemv") -> ModuleType:
    """Raises MixtoolsError where there is no Triton."""
    try:
        return importlib.import_module(f"{__package__}.{module}")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        raise MixtoolsError(f"GPU kernels need Triton, which is not installed ({error}): pip install triton") from None
