"""What a run takes, told before anything is done."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ...layouts.checkpoint import Checkpoint
from ...names import Slot
from ...storage.dtypes import DType
from .figures import OUTPUT
from .method import Options


def memory_bytes(source: Checkpoint, slots: Sequence[Slot], method: Options, calibrated: bool = False) -> int:
    """What decomposing and rebuilding the largest chosen matrix takes at most, beside the interpreter."""
    most = 0
    for slot in slots:
        shape, dtype = source.spec(slot)
        most = max(most, _matrix_bytes(shape, dtype, _squares(method, calibrated), method.factored))
    return most


def _squares(method: Options, calibrated: bool) -> int:
    """Matrices [p, p] of fp64 at once."""
    if method.norm == OUTPUT:
        return 8
    # reflectors, their copy, and half of all vectors three times over (all vectors with a covariance)
    return 6 if calibrated else 4


def _matrix_bytes(shape: Sequence[int], dtype: DType, squares: int, factored: bool) -> int:
    p, q = sorted(shape)
    # the weight, the same before it was permuted or transposed, and rebuilt
    weights = 3 * p * q * dtype.itemsize
    there = 8 * q * (p * q // (p + q)) if factored else 0  # the factors, in fp64 until they are whole
    return weights + 8 * p * p * squares + there + 4 * 8 * p * 1024


def flop(shape: Sequence[int], rebuild: bool, norm: str) -> float:
    """Gram by symmetry, tridiagonal form, and, to rebuild, an eighth of the vectors and two products with them.

    In the output's norm the form twice, and Cholesky with two products by halves.
    """
    p, q = sorted(shape)
    kept = p / 8 if rebuild else 0
    form = 3 * 4 / 3 * p**3  # three times as slow as a product
    weighted = form + 4 / 3 * p**3 if norm == OUTPUT else 0
    return float(p * p * q + form + weighted + 2 * p * p * kept + 4 * p * q * kept)


def forecast_seconds(
    source: Checkpoint, slots: Sequence[Slot], rebuild: bool, norm: str, clock: Callable[[], float]
) -> float:
    """From the shapes and this machine's rate in one small product."""
    side = 768
    matrix = torch.ones(side, side, dtype=torch.float64)
    matrix @ matrix
    began = clock()
    for _ in range(3):
        matrix @ matrix
    rate = 3 * 2 * side**3 / max(clock() - began, 1e-9)
    return sum(flop(source.spec(slot).shape, rebuild, norm) for slot in slots) / rate
