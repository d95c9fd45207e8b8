"""H = U D Uᵀ of a damped Hessian, with U unit upper triangular: what rounding one column asks of those behind it.

For an error row e, e H eᵀ = Σ_k D_k (e_k + Σ_{i<k} e_i U_ik)²: with the columns before it rounded, column k is best
rounded from its weight plus Σ_{i<k} e_i U_ik. That is GPTQ (arXiv 2210.17323) without an inverse, as QuIP shows (arXiv
2307.13304, theorem 6): one Cholesky factorisation of the matrix turned round.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SpectrumError

LARGEST_DAMPING = 10.0  # with ten times the mean added to it, a sum of squares is positive definite
_STEP = 10.0


class Factor(NamedTuple):
    """`feedback` [n, n] is U and `pivots` [n] is D, both in the order in which columns are rounded: `order` [n] names
    them. `damping`: the share of the mean of H's diagonal that was added to it.
    """

    order: Tensor
    feedback: Tensor
    pivots: Tensor
    damping: float


def by_activation(hessian: Tensor) -> Tensor:
    """Columns [n] from the most to the least active, as GPTQ's act_order; of equals the first."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def factor(hessian: Tensor, damping: float, order: Tensor | None = None) -> Factor:
    """Of a Hessian [n, n], symmetric, of any scale; `order` by default by_activation's.

    What is not positive definite in fp32 is damped ten times as much, until it is. Takes three matrices of its size.
    Raises SpectrumError for one that holds NaN or Inf, or nothing but zeros.
    """
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    if not 0 < mean < float("inf"):
        raise SpectrumError(f"a Hessian whose diagonal has a mean of {mean:g} cannot be factored")
    order = by_activation(hessian) if order is None else order
    backwards = order.flip(0)
    while True:
        turned = hessian[backwards[:, None], backwards[None]]
        turned.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(turned)
        del turned
        if not int(info) and bool(torch.isfinite(lower.diagonal()).all()):
            break
        if damping >= LARGEST_DAMPING:
            raise SpectrumError("a Hessian cannot be factored, however much it is damped: it holds NaN or Inf")
        damping = min(LARGEST_DAMPING, max(damping, 1e-4) * _STEP)
    upper = lower.flip(0, 1)
    del lower
    upper = upper.contiguous()  # LAPACK's lie by columns
    roots = upper.diagonal().clone()
    return Factor(order, upper.div_(roots), roots.square(), damping)


def rescaled(found: Factor, scale: Tensor) -> Factor:
    """The factor of S H S, S being the diagonal matrix of `scale` [n] > 0: the same order, the damping scaled along."""
    by_order = scale[found.order]
    feedback = found.feedback * by_order[:, None] / by_order
    return Factor(found.order, feedback, found.pivots * by_order.square(), found.damping)
