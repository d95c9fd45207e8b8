"""H = U D Uᵀ against scipy's ldl of the matrix turned round, and against GPTQ's own formulation with an inverse."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from mixtools import errors
from mixtools.linalg.ldl import LARGEST_DAMPING, by_activation, factor


def hessian(width: int, tokens: int, seed: int = 0) -> Tensor:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x *= torch.logspace(-1, 1, width, dtype=torch.float64)
    return (x.T @ x).float()


def damped(matrix: Tensor, damping: float) -> Tensor:
    return matrix.double() + damping * float(matrix.diagonal().double().mean()) * torch.eye(len(matrix))


@pytest.mark.parametrize("width", [1, 2, 17, 130])
def test_it_is_the_damped_hessian_in_its_order(width: int) -> None:
    matrix = hessian(width, 3 * width)
    found = factor(matrix, 0.01)
    assert torch.equal(found.order, by_activation(matrix))
    assert (matrix.diagonal()[found.order].diff() <= 0).all()
    assert torch.equal(found.feedback, found.feedback.triu()) and (found.feedback.diagonal() == 1).all()
    whole = found.feedback.double() * found.pivots.double() @ found.feedback.double().T
    expected = damped(matrix, 0.01)[found.order][:, found.order]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_scipys_ldl() -> None:
    matrix, order = hessian(24, 100), torch.arange(24)
    found = factor(matrix, 0.05, order)
    lower, pivots, _ = scipy.linalg.ldl(damped(matrix, 0.05).flip(0, 1).numpy(), lower=True)
    np.testing.assert_allclose(found.pivots.numpy(), np.diag(pivots)[::-1], rtol=1e-4)
    np.testing.assert_allclose(found.feedback.numpy(), lower[::-1, ::-1], rtol=0, atol=1e-4)


def test_gptqs_inverse_says_the_same() -> None:
    """Rows of the inverse's Cholesky factor, over their diagonal, carry a target's error on (arXiv 2210.17323,
    algorithm 1): its targets are those of the factor without an inverse.
    """
    matrix, rng = hessian(40, 200), np.random.default_rng(1)
    found = factor(matrix, 0.01)
    H = damped(matrix, 0.01)[found.order][:, found.order].numpy()
    upper = scipy.linalg.cholesky(np.linalg.inv(H), lower=False)
    weights = rng.standard_normal((5, 40))
    theirs, ours, errors_ = weights.copy(), np.zeros_like(weights), np.zeros_like(weights)
    feedback = found.feedback.double().numpy()
    for column in range(40):
        ours[:, column] = weights[:, column] + errors_[:, :column] @ feedback[:column, column]
        np.testing.assert_allclose(ours[:, column], theirs[:, column], rtol=0, atol=1e-4)
        value = np.round(ours[:, column] * 4) / 4
        errors_[:, column] = weights[:, column] - value
        theirs[:, column:] -= ((theirs[:, column] - value) / upper[column, column])[:, None] * upper[column, column:]


def test_what_is_not_positive_definite_is_damped_more() -> None:
    x = torch.ones(3, 20)
    matrix = x.T @ x
    matrix[3, 4] = matrix[4, 3] = 3.5  # no sum of squares any more
    found = factor(matrix, 1e-6)
    assert found.damping > 1e-6
    whole = found.feedback.double() * found.pivots.double() @ found.feedback.double().T
    expected = damped(matrix, found.damping)[found.order][:, found.order]
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-4)
    assert factor(hessian(8, 50), 1e-6).damping == 1e-6


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_nothing_to_factor(value: float) -> None:
    with pytest.raises(errors.SpectrumError, match="cannot be factored"):
        factor(torch.full((4, 4), value), 0.01)
    outside = torch.eye(4)
    outside[0, 1] = outside[1, 0] = float("nan")
    with pytest.raises(errors.SpectrumError, match="however much it is damped"):
        factor(outside, LARGEST_DAMPING)


def test_a_column_that_nothing_reached() -> None:
    matrix = hessian(6, 30)
    matrix[2] = 0
    matrix[:, 2] = 0
    found = factor(matrix, 0.01)
    assert found.order[-1] == 2
    assert (found.feedback[:-1, -1] == 0).all()  # its error moves nothing, and nothing moves it
