"""Singular values of a weight matrix, and the matrix rebuilt from some of them.

With U the eigenvectors of W Wᵀ that are kept (or, if fewer, dropped), the best rank-k approximation is U Uᵀ W (or
W - U Uᵀ W): neither singular values nor the other side's vectors enter, so nothing is divided by a small number.
Eckart and Young, Psychometrika 1 (1936).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import SpectrumError
from . import eigen
from .gram import gram, long_blocks, resolution

FloatArray = npt.NDArray[np.float64]

# rms of rounding over the value, for values spread evenly on a log scale: eps · sqrt(3/(8·ln 2)/12)
_ROUNDING_RMS = math.sqrt(3 / (8 * math.log(2)) / 12)


class Spectrum:
    """All singular values of a matrix [m, n], without vectors.

    `values` is [min(m, n)] fp64, descending. Those below `floor` are rounding errors of the computation: nothing is
    known of them but that bound. Those below `rounding` may be no more than the rounding of the weight to its dtype.
    """

    def __init__(self, shape: tuple[int, int], values: FloatArray, relative_floor: float, rounding: float) -> None:
        self.shape = shape
        self.values = values
        self.floor = relative_floor * float(values[0])
        self.rounding = rounding

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(np.square(self.values).sum())

    @property
    def tail(self) -> FloatArray:
        """Share of the energy that rank k loses: [min(m, n) + 1] for k = 0, 1, ..., from 1 down to 0."""
        return shares_lost(np.square(self.values))

    @property
    def numerical_rank(self) -> int:
        return int((self.values > self.floor).sum())


class Decomposition(Spectrum):
    """A spectrum that can give vectors, projections and factors; holds its weight, not a copy.

    Blocks of the weight are moved, then widened, and results narrowed, then moved: fp64 never stands on an MPS device.
    """

    def __init__(self, weight: Tensor, vectors: eigen.Eigen, values: FloatArray, relative_floor: float) -> None:
        rows, cols = weight.shape
        super().__init__((rows, cols), values, relative_floor, rounding_norm(weight))
        self.weight = weight
        self._eigen = vectors

    @property
    def is_wide(self) -> bool:
        """Whether the vectors at hand are those of the rows (left) rather than of the columns (right)."""
        return self.shape[0] <= self.shape[1]

    def vectors(self, start: int, stop: int) -> Tensor:
        """Singular vectors number start to stop (descending) of the short side: [min(m, n), stop - start] fp64."""
        p = len(self.values)
        return self._eigen.vectors(p - stop, p - start).flip(1)

    def project(self, rank: int, dtype: torch.dtype | None = None) -> Tensor:
        """The best approximation of the weight by `rank`: [m, n], rounded once from fp64 to `dtype` (the weight's)."""
        p = len(self.values)
        dtype = dtype or self.weight.dtype
        if rank == p:
            return self.weight.to(dtype, copy=True)
        result = torch.zeros(self.shape, dtype=dtype, device=self.weight.device)
        if rank == 0:
            return result
        keeps = rank <= p - rank
        basis = self.vectors(0, rank) if keeps else self.vectors(rank, p)
        for index in long_blocks(self.weight):
            block = self.weight[index].to(basis.device).double()
            part = basis @ (basis.T @ block) if self.is_wide else (block @ basis) @ basis.T
            result[index] = (part if keeps else block - part).to(dtype).to(result.device)
        return result

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """A [m, rank] and B [rank, n] in the weight's dtype: A @ B is the best approximation, sqrt(s) in each.

        Directions whose singular value is below `floor` come out as zeros.
        """
        kept = self.values[:rank]
        known = torch.from_numpy(np.where(kept > self.floor, np.sqrt(kept), np.inf))
        basis = self.vectors(0, rank)  # [p, rank]
        known = known.to(basis.device)
        root = torch.where(known.isinf(), 0.0, known)
        rows, cols = self.shape
        here = (basis * root).to(self.weight.dtype).to(self.weight.device).contiguous()
        there = torch.empty(max(rows, cols), rank, dtype=self.weight.dtype, device=self.weight.device)
        for index in long_blocks(self.weight):
            block = self.weight[index].to(basis.device).double()
            image = block.T @ basis if self.is_wide else block @ basis  # [block, rank] = the other side's vectors · s
            there[index[1] if self.is_wide else index[0]] = (image / known).to(there.dtype).to(there.device)
        return (here, there.T.contiguous()) if self.is_wide else (there, here.T.contiguous())


def spectrum(weight: Tensor, *, exact: bool = False) -> Spectrum:
    """Singular values alone of `weight` [m, n], real, finite: the cheapest way to all of them.

    `exact` takes the SVD instead of the Gram matrix: singular values down to s_1·p·2⁻⁵² instead of s_1·sqrt(p·2⁻⁵²),
    for many times the work; only fp32 weights can hold anything there. Raises SpectrumError for NaN or Inf.
    """
    check(weight)
    if exact:
        values = torch.linalg.svdvals(_fp64(weight)).cpu().numpy()
        return Spectrum(_shape(weight), values, _svd_floor(weight), rounding_norm(weight))
    values = roots(eigen.eigenvalues(gram(weight)))
    return Spectrum(_shape(weight), values, resolution(min(weight.shape)), rounding_norm(weight))


def decompose(weight: Tensor, *, exact: bool = False) -> Decomposition:
    """As `spectrum`, ready to give vectors; it costs about a quarter more. Raises SpectrumError for NaN or Inf."""
    check(weight)
    if exact:
        solved = ExactEigen(weight)
        return Decomposition(weight, solved, roots(solved.values), _svd_floor(weight))
    return _from_eigen(weight, eigen.decompose(gram(weight)))


def decompose_batch(weights: Sequence[Tensor]) -> list[Decomposition]:
    """`decompose` for the matrices of an expert or a layer, whose short sides are equal: a GPU takes them together.

    Takes memory for all Gram matrices at once, and keeps it: 128 MiB for each expert matrix of 8x7B.
    """
    for weight in weights:
        check(weight)
    first = gram(weights[0])  # put in place one by one: a stack of them all would be there twice
    grams = first.new_empty(len(weights), *first.shape)
    grams[0] = first
    del first
    for index, weight in enumerate(weights[1:], 1):
        grams[index] = gram(weight)
    solved = eigen.decompose_batch(grams)
    return [_from_eigen(*pair) for pair in zip(weights, solved, strict=True)]


class ExactEigen:
    """The short side's singular vectors from an SVD in fp64, in the form of an eigenproblem."""

    def __init__(self, weight: Tensor) -> None:
        left, singular, right = torch.linalg.svd(_fp64(weight), full_matrices=False)
        self._vectors = (left if weight.shape[0] <= weight.shape[1] else right.T).flip(1)
        self.values = singular.flip(0).square().cpu()

    def vectors(self, start: int, stop: int) -> Tensor:
        chosen: Tensor = self._vectors[:, start:stop]
        return chosen


def check(weight: Tensor) -> None:
    """Raises SpectrumError unless `weight` is a real, finite matrix with elements."""
    if weight.ndim != 2 or not weight.is_floating_point() or not weight.numel():
        raise SpectrumError(f"is no real matrix: shape {list(weight.shape)}, {weight.dtype}")
    low, high = torch.aminmax(weight)  # both are NaN if any element is
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        where = (~torch.isfinite(weight)).nonzero()[0].tolist()
        raise SpectrumError(f"holds {float(weight[tuple(where)])} at {where}; a spectrum needs finite numbers")


def rounding_norm(weight: Tensor) -> float:
    """About the largest singular value that rounding to the weight's dtype leaves in a matrix like it.

    Rounding errs by `_ROUNDING_RMS` of each entry. A random matrix whose entries differ in spread has a norm of about
    its largest row's plus its largest column's (Bandeira and van Handel, Annals of Probability 44, 2016).
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rows, cols = (torch.zeros(side, dtype=dtype, device=weight.device) for side in weight.shape)
    for index in long_blocks(weight):
        block = weight[index].to(dtype)
        rows[index[0]] = torch.hypot(rows[index[0]], torch.linalg.vector_norm(block, dim=1))
        cols[index[1]] = torch.hypot(cols[index[1]], torch.linalg.vector_norm(block, dim=0))
    return _ROUNDING_RMS * torch.finfo(weight.dtype).eps * (float(rows.max()) + float(cols.max()))


def _from_eigen(weight: Tensor, solved: eigen.Eigen) -> Decomposition:
    return Decomposition(weight, solved, roots(solved.values), resolution(min(weight.shape)))


def shares_lost(energies: FloatArray) -> FloatArray:
    """Of energies [p], what goes where the first k stay: [p + 1], from 1 down to 0; zeros where there is none."""
    # from the small end: the last would vanish in a running sum that starts with the large ones
    lost = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    return lost / lost[0] if lost[0] > 0 else lost


def roots(eigenvalues: Tensor) -> FloatArray:
    """Singular values, descending; a rounding error below zero is a zero."""
    values: FloatArray = eigenvalues.flip(0).clamp_min(0).sqrt().numpy()
    return values


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]


def _fp64(weight: Tensor) -> Tensor:
    return (weight.cpu() if weight.device.type == "mps" else weight).to(torch.float64)  # MPS has none


def _svd_floor(weight: Tensor) -> float:
    return min(weight.shape) * float(np.finfo(np.float64).eps)
