"""The best approximations of a weight for its output, and what any loses, by scipy and by direct measurement."""

from __future__ import annotations

from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import scipy.linalg
import torch
from torch import Tensor

from mixtools.linalg.output import Covariance
from mixtools.linalg.weighted import DAMPING

Matrix: TypeAlias = npt.NDArray[np.float64]
Side: TypeAlias = Literal["in", "out"]


def seen(weight: Tensor, X: Tensor, side: Side = "in", tokens: int | None = None) -> Covariance:
    """What a calibration over X would hold."""
    if side == "in":
        return Covariance(X @ X.T, "in", tokens=tokens)
    Y = weight.double() @ X
    return Covariance(Y @ Y.T, "out", float((X @ X.T).diagonal().mean()), tokens)


def damped(X: Tensor, damping: float = DAMPING) -> Matrix:
    C = (X @ X.T).numpy()
    return C + damping * np.trace(C) / len(C) * np.eye(len(C))


def truth(weight: Tensor, X: Tensor, damping: float = DAMPING) -> tuple[Matrix, Matrix]:
    """Left singular vectors and singular values of W L, with C + λI = L Lᵀ."""
    product = weight.double().numpy() @ np.linalg.cholesky(damped(X, damping))
    left, values, _ = scipy.linalg.svd(product, full_matrices=False, lapack_driver="gesvd")
    return left, values


def best(weight: Tensor, X: Tensor, rank: int, damping: float = DAMPING) -> Matrix:
    left = truth(weight, X, damping)[0][:, :rank]
    result: Matrix = left @ (left.T @ weight.double().numpy())
    return result


def plain(weight: Tensor, rank: int) -> Matrix:
    left, values, right = scipy.linalg.svd(weight.double().numpy(), full_matrices=False, lapack_driver="gesvd")
    result: Matrix = left[:, :rank] * values[:rank] @ right[:rank]
    return result


def lost(weight: Tensor, other: Tensor | Matrix, X: Tensor | None = None) -> float:
    """Share of ‖W X‖² that goes with W - other; of ‖W‖² without inputs."""
    W = weight.double()
    rest = W - torch.as_tensor(other).double()
    if X is not None:
        W, rest = W @ X, rest @ X
    return float(rest.square().sum() / W.square().sum())
