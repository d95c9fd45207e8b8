"""A symmetric eigenproblem in two halves: all eigenvalues first, then vectors, for a chosen range alone.

Both halves share one tridiagonal form T = QᵀGQ: eigenvalues of T in O(p²), chosen vectors of T in O(p) each, then Q
applied to those alone. On the CPU by LAPACK (dsytrd, nine tenths of the work; dsterf; dstemr; dormqr); where only
eigenvalues are wanted, torch's LAPACK does the whole in two thirds of the time, but keeps Q to itself. On a GPU by
kernels of ours for as many matrices as are given together (ops/gpu/tridiagonal.py): torch's own solver there takes
matrices of more than 32 columns one by one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor

from ..errors import SpectrumError
from ..ops.gpu import able

_LAPACK_BLOCK = 64  # columns worked on together; LAPACK's own choice is 32, and its workspace grows with it
_REFLECTORS = 128  # that a GPU applies in one product
# Vectors whose products with each other are no larger are made orthogonal by two steps that each square what is left.
_LEANING = 1e-5


class Eigen(Protocol):
    """Eigenvalues of a symmetric matrix, ascending, and its vectors in the same order."""

    @property
    def values(self) -> Tensor:
        """[p] fp64, ascending, on the CPU."""
        ...

    def vectors(self, start: int, stop: int) -> Tensor:
        """Unit eigenvectors of values[start:stop]: [p, stop - start] fp64, on the matrix's device."""
        ...


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues of `matrix` [p, p] fp64, of which the lower triangle is read: [p], ascending, on the CPU."""
    if has_kernels(matrix.device):
        return decompose(matrix.clone()).values
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.cpu()


def decompose(matrix: Tensor) -> Eigen:
    """Reduce `matrix` [p, p] fp64, of which the lower triangle is read, and whose memory is used up."""
    return decompose_batch(matrix[None])[0]


def decompose_batch(matrices: Tensor) -> list[Eigen]:
    """As `decompose` for [b, p, p], which a GPU takes together, each to the bits that it has alone."""
    if has_kernels(matrices.device):
        return on_card(matrices)
    if matrices.device.type == "cpu":
        return [Tridiagonal(matrix) for matrix in matrices]
    return [Whole(*torch.linalg.eigh(matrix)) for matrix in matrices]


def on_card(matrices: Tensor) -> list[Eigen]:
    """Of [b, p, p], by the kernels for a GPU, which tests run elsewhere, too."""
    from ..ops.gpu import symmetric  # a CPU never asks for it

    for matrix in matrices:
        above = matrix.tril(-1).T
        matrix.tril_().add_(above)
    matrices = matrices.mT if matrices.mT.is_contiguous() else matrices.contiguous()  # which is the same now
    parts = symmetric.gpu_tridiagonal(matrices)
    values = symmetric.gpu_tridiagonal_values(*parts[:2])
    return [*map(Reduced, matrices, *parts, values)]


def has_kernels(device: torch.device) -> bool:
    """Whether matrices there are solved together."""
    return device.type != "cpu" and able.problem(device) is None


class Whole:
    """All vectors at once, of a GPU that has only torch's own solver."""

    def __init__(self, values: Tensor, vectors: Tensor) -> None:
        self.values, self._vectors = values.cpu(), vectors

    def vectors(self, start: int, stop: int) -> Tensor:
        return self._vectors[:, start:stop]


class Tridiagonal:
    """LAPACK's tridiagonal form of a symmetric matrix, kept so that vectors can be asked for later."""

    def __init__(self, matrix: Tensor) -> None:
        lower = np.asfortranarray(matrix.numpy())
        p = len(lower)
        if p > 1:
            work = int(lapack.dsytrd_lwork(p, lower=1)[0])
            self._reflectors, d, e, self._tau, info = lapack.dsytrd(lower, lower=1, lwork=work, overwrite_a=1)
            _check("dsytrd", info)
        else:
            d, e = lower.diagonal().copy(), np.zeros(0)
        self._d, self._e = d, e
        self.values = torch.from_numpy(eigvalsh_tridiagonal(d, e, lapack_driver="sterf") if p > 1 else d)

    def vectors(self, start: int, stop: int) -> Tensor:
        p = len(self._d)
        if start >= stop:
            return torch.zeros(p, 0, dtype=torch.float64)
        if p == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        vectors = _vectors(self._d, self._e, start, stop)
        # Q = H(1)...H(p-1) leaves the first row alone and is dgeqrf's kind of product on the others
        rest = np.asfortranarray(vectors[1:])
        reflectors = np.asfortranarray(self._reflectors[1:, :-1])
        work = _LAPACK_BLOCK * (vectors.shape[1] + _LAPACK_BLOCK + 1)
        turned, _, info = lapack.dormqr("L", "N", reflectors, self._tau, rest, work, overwrite_c=1)
        _check("dormqr", info)
        return torch.from_numpy(np.concatenate([vectors[:1], turned]))


class Reduced:
    """The same on a GPU."""

    def __init__(self, reflectors: Tensor, d: Tensor, e: Tensor, tau: Tensor, values: Tensor) -> None:
        """As symmetric.gpu_tridiagonal gives them, of one matrix."""
        self._reflectors, self._d, self._e, self._tau, self._values = reflectors, d, e, tau, values
        self.values = values.cpu()

    def vectors(self, start: int, stop: int) -> Tensor:
        from ..ops.gpu import symmetric

        vectors = symmetric.gpu_tridiagonal_vectors(self._d, self._e, self._values[start:stop])
        one = torch.eye(stop - start, dtype=vectors.dtype, device=vectors.device)
        if start < stop and not float((vectors.T @ vectors - one).abs().max()) <= _LEANING:
            # values that are one to the last bits: LAPACK's way tells their vectors apart
            d, e = self._d.cpu().numpy(), self._e.cpu().numpy()
            vectors = torch.from_numpy(_vectors(d, e, start, stop)).to(vectors.device)
        for _ in range(2):  # towards the nearest that are orthogonal (Newton and Schulz)
            vectors = vectors @ (1.5 * one - 0.5 * (vectors.T @ vectors))
        return self._turned(vectors)

    def _turned(self, vectors: Tensor) -> Tensor:
        """Q times them: I - Vᵀ S V for some reflectors together, the last first (Schreiber and Van Loan, 1989)."""
        for start in range((len(self._tau) - 1) // _REFLECTORS * _REFLECTORS, -1, -_REFLECTORS):
            tau = self._tau[start : start + _REFLECTORS]
            lines = self._reflectors[start : start + len(tau)].triu(start + 1)
            lines[tau == 0] = 0.0  # which turns nothing
            inner = (lines @ lines.T).triu_(1)
            inner.diagonal().copy_(torch.where(tau == 0, 1.0, 1 / tau))
            vectors = vectors - lines.T @ torch.linalg.solve_triangular(inner, lines @ vectors, upper=True)
        return vectors


def _vectors(d: npt.NDArray[np.float64], e: npt.NDArray[np.float64], start: int, stop: int) -> npt.NDArray[np.float64]:
    """Of a tridiagonal matrix, by dstemr."""
    chosen = (start, stop - 1)
    _, vectors = eigh_tridiagonal(d, e, select="i", select_range=chosen, lapack_driver="stemr", check_finite=False)
    return np.asarray(vectors, np.float64)


def _check(routine: str, info: int) -> None:
    if info:
        raise SpectrumError(f"LAPACK's {routine} did not finish (info {info})")
