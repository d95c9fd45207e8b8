"""The best approximation of a weight in the norm of its output.

For inputs X [in, tokens] with C = X Xᵀ, the matrix B of rank k that errs least at the output, ‖(W - B)X‖, is
B = U Uᵀ W with U the k leading eigenvectors of W C Wᵀ: Eckart and Young (Psychometrika 1, 1936) applied to Y = W X.
Its error is the sum of the other eigenvalues. From the inputs' side the same matrix is (W L) V Vᵀ L⁻¹ with C = L Lᵀ and
V the leading right singular vectors of W L (SVD-LLM, arXiv 2403.07378). Whichever side is short is decomposed.

C + λI stands for C: directions that no token reached still count a little, so that they are not thrown away.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from ..errors import TensorError
from . import eigen
from .gram import gram, resolution
from .output import Covariance, check_covariance, quadratic
from .spectrum import FloatArray, Spectrum, check, roots, rounding_norm, shares_lost

DAMPING = 1e-4  # λ as a share of C's mean diagonal
STARVED = 10.0  # times as much where fewer tokens came than the matrix has directions
_BLOCK = 1024  # rows of a product that are fp64 at once


class WeightedSpectrum(Spectrum):
    """What the output's norm knows of a weight [m, n] without vectors.

    `values` are the singular values of W (C + λI)^½, [min(m, n)] fp64, descending: their squares' tail is the damped
    error. `damping` is λ over C's mean diagonal, `own` the weight's spectrum in its own norm.
    """

    def __init__(self, own: Spectrum, eigenvalues: Tensor, damping: float) -> None:
        # what rounding of the weight does in this norm is not known: no rule that asks for it makes sense here
        values = roots(eigenvalues)[: len(own.values)]
        super().__init__(own.shape, values, resolution(len(eigenvalues)), 0.0)
        self.own, self.damping = own, damping


class Weighted(WeightedSpectrum):
    """As WeightedSpectrum, ready to give errors, approximations and factors of any rank; holds its weight, no copy."""

    def __init__(self, weight: Tensor, side: _Side) -> None:
        self._side, self._eigen = side, eigen.decompose(side.matrix())
        super().__init__(side.own, self._eigen.values, side.damping)
        self.weight = weight
        self._last: tuple[tuple[int, int], _Directions] | None = None

    def errors(self) -> FloatArray:
        """As `tail`, of the output itself, without damping; takes all vectors."""
        gains = self._directions(0, len(self.values)).gains
        return shares_lost(gains.clip(min=0))

    def weight_errors(self) -> FloatArray:
        """Share of the weight's own energy ‖W‖² that rank k loses, as `errors`; takes all vectors."""
        energies = self._directions(0, len(self.values)).energies
        return shares_lost(energies.clip(min=0))

    def error(self, rank: int) -> float:
        """Share of the output's energy, undamped, that this rank loses."""
        return self._share_lost(rank, self._side.total, lambda found: found.gains)

    def weight_error(self, rank: int) -> float:
        """Share of ‖W‖² that this rank loses."""
        return self._share_lost(rank, self._side.weight_energy, lambda found: found.energies)

    def project(self, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        """The best approximation of the weight by `rank`: [m, n], rounded once from fp64 to `dtype` (the weight's)."""
        dtype = dtype or self.weight.dtype
        if rank == len(self.values):
            return self.weight.to(dtype, copy=True)
        result = torch.zeros(self.shape, dtype=dtype, device=self.weight.device)
        if rank == 0:
            return result
        keeps, found = self._fewer(rank)
        for index in self._side.blocks():
            block = self.weight[index].to(found.basis.device).double()
            part = self._side.part(block, found)
            result[index] = (part if keeps else block - part).to(dtype).to(result.device)
        return result

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [m, rank], orthonormal columns, and B [rank, n] in the weight's dtype: A @ B is the best approximation.

        A = U and B = Uᵀ W, so that nothing is inverted. A direction whose value is below `floor` adds nothing: its
        row of B is nothing but rounding, or it is zeros in both.
        """
        scale = np.where(self.values > self.floor, self.values, np.inf)[:rank]
        return self._side.factors(self._directions(0, rank), scale)

    def _fewer(self, rank: int) -> tuple[bool, _Directions]:
        """Whether the kept directions are fewer than those that go; and the fewer."""
        if rank <= len(self.values) - rank:
            return True, self._directions(0, rank)
        return False, self._directions(rank, len(self._eigen.values))  # m of a tall matrix seen from its outputs

    def _directions(self, start: int, stop: int) -> _Directions:
        """Numbers start to stop, strongest first."""
        if self._last is None or self._last[0] != (start, stop):
            self._last = None  # its memory first
            count = len(self._eigen.values)
            vectors = self._eigen.vectors(count - stop, count - start).flip(1)
            squares = self._eigen.values.flip(0)[start:stop].numpy()
            self._last = (start, stop), self._side.directions(vectors, squares)
        return self._last[1]

    def _share_lost(self, rank: int, total: float, of: Callable[[_Directions], FloatArray]) -> float:
        if total <= 0 or rank == len(self.values):
            return 0.0
        if rank == 0:
            return 1.0
        keeps, found = self._fewer(rank)
        # a tall matrix seen from its outputs has more directions than values: nothing is in the others
        part = float(of(found)[: rank if keeps else len(self.values) - rank].sum()) / total
        return min(1.0, max(0.0, 1.0 - part if keeps else part))


class _Directions(NamedTuple):
    """Some directions of a matrix, strongest first: `basis` spans them on the decomposed side, [side, k] fp64.

    `gains` [k] is the output's energy in each, undamped, `energies` [k] the weight's own. `back` [k, side] takes part
    of the weight back from them, where the basis alone does not (from the inputs' side).
    """

    basis: Tensor
    gains: FloatArray
    energies: FloatArray
    back: Tensor | None = None


class _Side(ABC):
    """The eigenproblem of one side, before it is solved.

    `total`: the output's energy, undamped; `weight_energy`: ‖W‖²; `own`: the weight's own spectrum.
    """

    total: float

    def __init__(self, weight: Tensor, inner: Tensor, damping: float) -> None:
        """`inner`: the weight's Gram matrix on this side, lower triangle."""
        self.weight, self.damping, self._inner = weight, damping, inner
        self.weight_energy = float(inner.diagonal().sum())
        rows, cols = weight.shape
        values = roots(eigen.eigenvalues(inner))[: min(rows, cols)]
        self.own = Spectrum((rows, cols), values, resolution(len(inner)), rounding_norm(weight))

    @abstractmethod
    def matrix(self) -> Tensor:
        """[side, side] fp64, lower triangle, whose eigenvalues are the damped energies; in the Gram matrix's memory."""

    @abstractmethod
    def directions(self, vectors: Tensor, squares: FloatArray) -> _Directions:
        """From eigenvectors of `matrix` [side, k] and their eigenvalues [k]."""

    @abstractmethod
    def part(self, block: Tensor, found: _Directions) -> Tensor:
        """What of a block of the weight lies in these directions."""

    @abstractmethod
    def factors(self, found: _Directions, scale: FloatArray) -> tuple[Tensor, Tensor]:
        """U [m, k], which spans the directions at the output, and Uᵀ W, in the weight's dtype.

        `scale` [k]: the directions' values, inf for those that are lost in rounding.
        """

    @abstractmethod
    def blocks(self) -> list[tuple[slice, slice]]:
        """Along the side that is not decomposed."""


class _Outputs(_Side):
    """From D = W C Wᵀ [m, m]: eigenvectors U of D + λ W Wᵀ; the part in them is U Uᵀ W."""

    def __init__(self, weight: Tensor, inner: Tensor, outputs: Tensor, power: float | None, damping: float) -> None:
        """`power`: C's mean diagonal; None takes that of inputs all alike whose outputs have this energy."""
        super().__init__(weight, inner, damping)
        self.total = float(outputs.diagonal().double().sum())
        if power is None and self.weight_energy > 0:
            power = self.total / self.weight_energy
        # sums in fp32 are not quite symmetric, which counts where gains are taken from what λ is a part of
        self._outputs = torch.tril(outputs) + torch.tril(outputs, -1).T
        self._lam = damping * _expect_energy(power)

    def matrix(self) -> Tensor:
        result = self._inner.mul_(self._lam)
        for start in range(0, len(result), _BLOCK):
            result[start : start + _BLOCK] += self._outputs[start : start + _BLOCK].to(result.device).double()
        del self._inner
        return result

    def directions(self, vectors: Tensor, squares: FloatArray) -> _Directions:
        gains = quadratic(vectors, self._outputs)
        return _Directions(vectors, gains, (squares - gains) / self._lam)

    def part(self, block: Tensor, found: _Directions) -> Tensor:
        return found.basis @ (found.basis.T @ block)

    def factors(self, found: _Directions, scale: FloatArray) -> tuple[Tensor, Tensor]:
        basis, weight = found.basis, self.weight
        there = weight.new_empty(basis.shape[1], weight.shape[1])
        for index in self.blocks():
            image = basis.T @ weight[index].to(basis.device).double()
            there[:, index[1]] = image.to(weight.dtype).to(weight.device)
        return basis.to(weight.dtype).to(weight.device).contiguous(), there

    def blocks(self) -> list[tuple[slice, slice]]:
        return [(slice(None), slice(start, start + _BLOCK)) for start in range(0, self.weight.shape[1], _BLOCK)]


class _Inputs(_Side):
    """From C [n, n] = L Lᵀ - λI: eigenvectors V of Lᵀ WᵀW L; the part in them is (W L V) (Vᵀ L⁻¹)."""

    def __init__(self, weight: Tensor, inner: Tensor, inputs: Tensor, damping: float) -> None:
        """`damping` grows tenfold while C, summed in fp32, is not positive definite with it."""
        power = _expect_energy(_mean_diagonal(inputs))
        while (root := _cholesky(inputs, damping * power)) is None:
            damping *= 10
        super().__init__(weight, inner, damping)
        self._root, self._lam = root, damping * power
        self.total = _inner_product(inputs, inner)

    def matrix(self) -> Tensor:
        inner = self._inner
        del self._inner
        return _congruent(inner, self._root)

    def directions(self, vectors: Tensor, squares: FloatArray) -> _Directions:
        back = torch.linalg.solve_triangular(self._root.T, vectors, upper=True).T  # Vᵀ L⁻¹
        # u = W L v / s has Wᵀu = s L⁻ᵀ v, and uᵀ W (C + λI) Wᵀ u = s²
        reach = back.square().sum(1).cpu().numpy()
        return _Directions(self._root @ vectors, squares * (1 - self._lam * reach), squares * reach, back)

    def part(self, block: Tensor, found: _Directions) -> Tensor:
        assert found.back is not None
        return (block @ found.basis) @ found.back

    def factors(self, found: _Directions, scale: FloatArray) -> tuple[Tensor, Tensor]:
        basis, weight = found.basis, self.weight
        basis = basis / torch.from_numpy(scale).to(basis.device)
        here = weight.new_empty(weight.shape[0], basis.shape[1])
        there = torch.zeros(basis.shape[1], weight.shape[1], dtype=torch.float64, device=basis.device)
        for index in self.blocks():
            block = weight[index].to(basis.device).double()
            image = block @ basis
            here[index[0]] = image.to(weight.dtype).to(weight.device)
            there += image.T @ block
        return here, there.to(weight.dtype).to(weight.device)

    def blocks(self) -> list[tuple[slice, slice]]:
        return [(slice(start, start + _BLOCK), slice(None)) for start in range(0, self.weight.shape[0], _BLOCK)]


def weighted_spectrum(weight: Tensor, covariance: Covariance, damping: float = DAMPING) -> WeightedSpectrum:
    """Values alone, the cheapest way to all of them. Raises as `decompose_weighted`."""
    side = _side(weight, covariance, damping)
    return WeightedSpectrum(side.own, eigen.eigenvalues(side.matrix()), side.damping)


def decompose_weighted(weight: Tensor, covariance: Covariance, damping: float = DAMPING) -> Weighted:
    """`weight` [m, n] in the norm of its output over the tokens of `covariance`.

    `damping` is a share of C's mean diagonal, times STARVED where fewer tokens came than min(m, n). Raises
    SpectrumError for a weight with NaN or Inf, TensorError for a covariance that does not fit, has NaN, or holds no
    energy: without a token there is no such norm.
    """
    return Weighted(weight, _side(weight, covariance, damping))


def _side(weight: Tensor, covariance: Covariance, damping: float) -> _Side:
    check(weight)
    rows, cols = weight.shape
    check_covariance(covariance, (rows, cols))
    if covariance.tokens is not None and covariance.tokens < min(rows, cols):
        damping *= STARVED
    if covariance.side == "in" and rows >= cols:
        inner = gram(weight if rows > cols else weight.T)  # of a square one on the inputs' side
        return _Inputs(weight, inner, covariance.matrix.to(inner.device), damping)
    outputs, power = covariance.matrix, covariance.power
    if covariance.side == "in":
        outputs, power = _outputs(weight, covariance.matrix), _mean_diagonal(covariance.matrix)
    inner = _outer_gram(weight) if rows > cols else gram(weight)
    return _Outputs(weight, inner, outputs.to(inner.device), power, damping)  # MPS has no fp64: there it is the CPU


def _expect_energy(power: float | None) -> float:
    if power is None or not (math.isfinite(power) and power > 0):
        raise TensorError(f"covariance has a mean diagonal of {power or 0:g}: no token came to give an output's norm")
    return power


def _mean_diagonal(matrix: Tensor) -> float:
    return float(matrix.diagonal().double().mean())


def _cholesky(matrix: Tensor, lam: float) -> Tensor | None:
    """L with matrix + λI = L Lᵀ, [n, n] fp64 lower; None if it is not positive definite."""
    if matrix.device.type == "cpu":
        damped = np.array(matrix.double().numpy(), order="F")
        damped[np.diag_indices(len(damped))] += lam
        lower, info = lapack.dpotrf(damped, lower=1, clean=1, overwrite_a=1)
        return torch.from_numpy(lower) if info == 0 else None
    there = matrix.to(torch.float64, copy=True)
    there.diagonal().add_(lam)
    root, failed = torch.linalg.cholesky_ex(there)
    return None if int(failed) else root


def _congruent(inner: Tensor, root: Tensor) -> Tensor:
    """Lᵀ G L, of both the lower triangle is meant: LAPACK's dsygst does half of the two products."""
    if inner.device.type == "cpu":
        result, _ = lapack.dsygst(np.asfortranarray(inner.numpy()), root.numpy(), itype=2, lower=1, overwrite_a=1)
        return torch.from_numpy(result)
    full = torch.tril(inner) + torch.tril(inner, -1).T
    return root.T @ full @ root


def _inner_product(inputs: Tensor, inner: Tensor) -> float:
    """tr(C G) = ‖W X‖², from G's lower triangle."""
    total = 0.0
    for start in range(0, len(inner), _BLOCK):
        rows = torch.tril(inner[start : start + _BLOCK], start - 1)
        total += 2 * float((rows * inputs[start : start + _BLOCK].double()).sum())
    return total + float((inner.diagonal() * inputs.diagonal().double()).sum())


def _outputs(weight: Tensor, inputs: Tensor) -> Tensor:
    """W C Wᵀ [m, m] fp64."""
    device = torch.device("cpu") if weight.device.type == "mps" else weight.device
    C = inputs.to(device).double()
    wide = weight.to(device).double()
    result: Tensor = wide @ C @ wide.T
    return result


def _outer_gram(weight: Tensor) -> Tensor:
    """W Wᵀ on the rows' side of a tall matrix, [m, m] fp64."""
    wide = (weight.cpu() if weight.device.type == "mps" else weight).double()
    return wide @ wide.T
