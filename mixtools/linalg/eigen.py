"""A symmetric eigenproblem in two halves: all eigenvalues first, then vectors, for a chosen range alone.

On the CPU both halves share one tridiagonal form T = QᵀGQ (LAPACK dsytrd, nine tenths of the work): eigenvalues of T
by dsterf in O(p²), chosen vectors of T by dstemr in O(p) each, then Q applied to those alone. Where only eigenvalues
are wanted, torch's LAPACK does the whole in two thirds of the time, but keeps Q to itself.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal, eigvalsh_tridiagonal, lapack
from torch import Tensor

from ..errors import SpectrumError

_LAPACK_BLOCK = 64  # columns worked on together; LAPACK's own choice is 32, and its workspace grows with it


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
    values: Tensor = torch.linalg.eigvalsh(matrix)
    return values.cpu()


def decompose(matrix: Tensor) -> Eigen:
    """Reduce `matrix` [p, p] fp64, of which the lower triangle is read. On the CPU its memory is used up."""
    return Tridiagonal(matrix) if matrix.device.type == "cpu" else Whole(*torch.linalg.eigh(matrix))


def decompose_batch(matrices: Tensor) -> list[Eigen]:
    """As `decompose` for [b, p, p], in one call of the device's solver."""
    values, vectors = torch.linalg.eigh(matrices)
    return [Whole(*pair) for pair in zip(values, vectors, strict=True)]


class Whole:
    """All vectors at once: on a GPU, choosing some of them saves less than it costs."""

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
        _, vectors = eigh_tridiagonal(
            self._d, self._e, select="i", select_range=(start, stop - 1), lapack_driver="stemr", check_finite=False
        )
        # Q = H(1)...H(p-1) leaves the first row alone and is dgeqrf's kind of product on the others
        rest = np.asfortranarray(vectors[1:])
        reflectors = np.asfortranarray(self._reflectors[1:, :-1])
        work = _LAPACK_BLOCK * (vectors.shape[1] + _LAPACK_BLOCK + 1)
        turned, _, info = lapack.dormqr("L", "N", reflectors, self._tau, rest, work, overwrite_c=1)
        _check("dormqr", info)
        return torch.from_numpy(np.concatenate([vectors[:1], turned]))


def _check(routine: str, info: int) -> None:
    if info:
        raise SpectrumError(f"LAPACK's {routine} did not finish (info {info})")
