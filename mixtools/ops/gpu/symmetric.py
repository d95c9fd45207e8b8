"""Eigenvalues and vectors of symmetric matrices, many at once, by the kernels of tridiagonal.py: how they are started.

As operations with schema and shape function: `gpu_tridiagonal`, `gpu_tridiagonal_values`, `gpu_tridiagonal_vectors`.
reference.py has them in plain torch. Nothing here imports Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, library

from ...errors import MixtoolsError
from . import able, launch
from .launch import Arguments, Launch, power_of_two

_EPSILON = torch.finfo(torch.float64).eps
# Halvings of the place where eigenvalues may lie: as wide as twice the largest, it becomes half a unit of its last.
_TURNS = 56
_THREADS = 128  # of a program of `form` and `reflect`: those that load 256 columns of a row by 16 bytes


@dataclass(frozen=True)
class Sizes:
    """Of what a program works on; small ones are for tests. `width`: columns of a panel, whose lines a program of
    `form` has in registers; `rows`: a program's, there; `lines`, `columns`: of the rest, in `reflect`, at a time;
    `together`: programs of that whose results `form` adds at a time."""

    width: int = 32
    rows: int = 32
    lines: int = 8
    columns: int = 256
    together: int = 64


class Reduction:
    """Matrices [M, p, p] on their way to tridiagonal form, in their own memory."""

    def __init__(self, matrices: Tensor, sizes: Sizes | None = None, lanes: int = launch.LANES) -> None:
        """`matrices`: fp64, dense, all of each."""
        self.matrices, self.sizes = matrices, sizes or Sizes()
        self._warps = _THREADS // lanes
        count, order = matrices.shape[:2]
        self.order, width = order, self.sizes.width
        parts = power_of_two(-(-order // self.sizes.lines))
        self.d, self.e, self.tau = (matrices.new_zeros(count, order) for _ in range(3))
        self.panel = matrices.new_zeros(count, 2 * width, order)
        self._x = matrices.new_zeros(count, order)
        self._products = matrices.new_zeros(count, order + 2 * width)
        self._dots, self._across = matrices.new_zeros(count, parts), matrices.new_empty(count, parts, order)
        self._squares = matrices.new_zeros(count, -(-order // self.sizes.rows))

    def run(self) -> None:
        width, start = self.sizes.width, 0
        self.form(0, 0).run()
        for column in range(self.order - 1):
            self.reflect(column, start).run()
            self.form(column + 1, start).run()
            if column + 1 == start + width:
                start += width
                self._spread(start)

    def _spread(self, start: int) -> None:
        """What a full panel changes in the rest: a matrix at a time, for then no sum's order depends on the others."""
        for matrix, panel in zip(self.matrices, self.panel, strict=True):
            rest, lines = matrix[start:, start:], panel[:, start:]
            rest.addmm_(lines.T, lines.roll(self.sizes.width, 0), alpha=-1)

    def form(self, column: int, start: int) -> Launch:
        rows, order = self.sizes.rows, self.order
        arguments = self._given(column, start) | {
            "d": self.d, "parts": -(-(order - column) // self.sizes.lines)
        }  # fmt: skip
        constants = {
            "ORDER": order, "WIDTH": self.sizes.width, "ROWS": rows, "LINES": self.sizes.lines,
            "PARTS": self._dots.shape[1], "TOGETHER": self.sizes.together,
        }  # fmt: skip
        grid = (-(-order // rows) - column // rows, len(self.matrices))
        return Launch("form", grid, arguments, constants, "tridiagonal", self._warps)

    def reflect(self, column: int, start: int) -> Launch:
        rows, lines, width, order = self.sizes.rows, self.sizes.lines, self.sizes.width, self.order
        arguments = self._given(column, start) | {"e": self.e, "parts": -(-order // rows) - column // rows}
        constants = {
            "ORDER": order, "WIDTH": width, "LINES": lines, "COLUMNS": self.sizes.columns,
            "PARTS": self._dots.shape[1], "SQUARES": power_of_two(self._squares.shape[1]),
        }  # fmt: skip
        grid = (-(-(order - column - 1) // lines) + -(-2 * width // lines), len(self.matrices))
        return Launch("reflect", grid, arguments, constants, "tridiagonal", self._warps)

    def _given(self, column: int, start: int) -> Arguments:
        return {
            "matrix": self.matrices, "panel": self.panel, "x": self._x, "products": self._products,
            "across": self._across, "dots": self._dots, "squares": self._squares, "tau": self.tau,
            "column": column, "start": start,
        }  # fmt: skip


def bisect(
    d: Tensor, e: Tensor, bounds: tuple[Tensor, Tensor], least: Tensor, values: Tensor, lanes: int = launch.LANES
) -> Launch:
    """Of d, e and values [M, p]; of e the last does not matter."""
    (count, order), (low, high) = d.shape, bounds
    arguments: Arguments = {
        "d": d, "e": e, "low": low, "high": high, "least": least, "values": values, "order": order
    }  # fmt: skip
    constants = {"TURNS": _TURNS, "LANES": lanes}
    return Launch("bisect", (-(-order // lanes), count), arguments, constants, "tridiagonal")


def twist(
    d: Tensor, e: Tensor, values: Tensor, least: Tensor, vectors: Tensor, behind: Tensor, lanes: int = launch.LANES
) -> Launch:
    """vectors [p, k] of d and e [p], of which the last does not matter, and values [k]; `behind` as vectors."""
    order, count = vectors.shape
    arguments: Arguments = {
        "d": d, "e": e, "values": values, "least": least, "vectors": vectors, "behind": behind, "order": order,
        "count": count,
    }  # fmt: skip
    return Launch("twist", (-(-count // lanes),), arguments, {"LANES": lanes}, "tridiagonal")


@library.custom_op("mixtools::gpu_tridiagonal", mutates_args=("matrices",))
def gpu_tridiagonal(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Symmetric `matrices` fp64 [M, p, p], dense and whole -> d [M, p], e and tau [M, p - 1] of Q' A Q = T.

    Row j of each matrix is, from column j + 1 on, afterwards the reflector v of Q = H(0) H(1) ..., H = I - tau v v',
    with its leading 1: turned, LAPACK's form. Raises MixtoolsError for what is no such thing.
    """
    _check(matrices, 3)
    if matrices.shape[1] != matrices.shape[2] or not matrices.is_contiguous():
        raise MixtoolsError(f"no square matrices side by side: {list(matrices.shape)}")
    made = Reduction(matrices)
    made.run()
    return made.d, made.e[:, :-1].clone(), made.tau[:, :-1].clone()


@gpu_tridiagonal.register_fake
def _(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, order = matrices.shape[:2]
    e, tau = (matrices.new_empty(count, order - 1) for _ in range(2))
    return matrices.new_empty(count, order), e, tau


@library.custom_op("mixtools::gpu_tridiagonal_values", mutates_args=())
def gpu_tridiagonal_values(d: Tensor, e: Tensor) -> Tensor:
    """Eigenvalues, ascending, of matrices with diagonals d [M, p] and beside them e [M, p - 1], fp64 -> [M, p].

    To half a unit in the last place of the largest, as counted by signs of pivots.
    """
    _check_form(d, e)
    low, high, least = _bounds(d, e)
    values = torch.empty_like(d, memory_format=torch.contiguous_format)
    bisect(d.contiguous(), torch.nn.functional.pad(e, (0, 1)), (low, high), least, values).run()
    return values


@gpu_tridiagonal_values.register_fake
def _(d: Tensor, e: Tensor) -> Tensor:
    return torch.empty_like(d)


@library.custom_op("mixtools::gpu_tridiagonal_vectors", mutates_args=())
def gpu_tridiagonal_vectors(d: Tensor, e: Tensor, values: Tensor) -> Tensor:
    """Unit vectors [p, k] of a matrix with diagonal d [p] and beside it e [p - 1], to its eigenvalues [k]; all fp64.

    Each by itself: to values that are nearly one they may be the same, or lean towards each other.
    """
    _check_form(d[None], e[None])
    _check(values, 1)
    _, _, least = _bounds(d[None], e[None])
    vectors, behind = (d.new_empty(len(d), len(values)) for _ in range(2))
    if len(values):
        beside = torch.nn.functional.pad(e, (0, 1))
        twist(d.contiguous(), beside, values.contiguous(), least, vectors, behind).run()
    vectors /= torch.linalg.vector_norm(vectors, dim=0)
    return vectors


@gpu_tridiagonal_vectors.register_fake
def _(d: Tensor, e: Tensor, values: Tensor) -> Tensor:
    return d.new_empty(len(d), len(values))


def _bounds(d: Tensor, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Between which all eigenvalues lie (Gershgorin), and the least pivot: [M] each."""
    reach = torch.nn.functional.pad(e.abs(), (0, 1)) + torch.nn.functional.pad(e.abs(), (1, 0))
    low, high = (d - reach).amin(1), (d + reach).amax(1)
    largest = torch.maximum(low.abs(), high.abs())
    # a matrix of zeros alone has any
    return low, high, torch.where(largest > 0, largest * _EPSILON**2, 1.0)


def _check_form(d: Tensor, e: Tensor) -> None:
    _check(d, 2)
    _check(e, 2)
    if len(d) != len(e) or d.shape[1] != e.shape[1] + 1:
        raise MixtoolsError(f"no tridiagonal matrices: {list(d.shape)} and {list(e.shape)}")


def _check(tensor: Tensor, dimensions: int) -> None:
    if tensor.dtype != torch.float64 or tensor.ndim != dimensions or 0 in tensor.shape[:-1]:
        raise MixtoolsError(f"eigenproblems are solved in fp64 here, not {tensor.dtype} {list(tensor.shape)}")
    able.check(tensor)
