"""H = U D Uᵀ of a damped Hessian, with U unit upper triangular: what rounding one column asks of those behind it.

For an error row e, e H eᵀ = Σ_k D_k (e_k + Σ_{i<k} e_i U_ik)²: with the columns before it rounded, column k is best
rounded from its weight plus Σ_{i<k} e_i U_ik. That is GPTQ (arXiv 2210.17323) without an inverse, as QuIP shows (arXiv
2307.13304, theorem 6): one Cholesky factorisation of the matrix turned round.

Of a Hessian of few inputs (few.py) only U's panels along its diagonal are made; what a panel asks of those behind it
goes through the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import SpectrumError
from .few import Few, Hessian

LARGEST_DAMPING = 10.0  # with ten times the mean added to it, a sum of squares is positive definite
PANEL = 1024  # columns of U that are made at once, of few inputs
_STEP = 10.0


class Panel(NamedTuple):
    """Columns from `start` on. `feedback` [b, b]: U among them.

    Of few inputs, `inputs` [k, b] are theirs and `gain` [k, b] is (damping + X Xᵀ of the columns behind)⁻¹ times that:
    a panel's columns begin at weight + inputsᵀ T, and behind it T has grown by gain times what they differ from that.
    """

    start: int
    feedback: Tensor
    inputs: Tensor | None = None
    gain: Tensor | None = None


class Factor(NamedTuple):
    """`panels` of U, one of all columns but for few inputs, and `pivots` [n], which is D, in the order in which columns
    are rounded: `order` [n] names them. `damping`: the share of the mean of H's diagonal that was added to it.
    """

    order: Tensor
    panels: tuple[Panel, ...]
    pivots: Tensor
    damping: float

    @property
    def feedback(self) -> Tensor:
        """U [n, n], where it is whole."""
        (panel,) = self.panels
        return panel.feedback


def by_activation(hessian: Hessian) -> Tensor:
    """Columns [n] from the most to the least active, as GPTQ's act_order; of equals the first."""
    return torch.argsort(hessian.diagonal(), descending=True, stable=True)


def factor(hessian: Hessian, damping: float, order: Tensor | None = None) -> Factor:
    """Of a Hessian [n, n], symmetric, of any scale; `order` by default by_activation's.

    What is not positive definite in fp32 is damped ten times as much, until it is. Takes three matrices of its size, or
    twice its inputs. Raises SpectrumError for one that holds NaN or Inf, or nothing but zeros.
    """
    mean = float(hessian.diagonal().mean(dtype=torch.float64))
    if not 0 < mean < float("inf"):
        raise SpectrumError(f"a Hessian whose diagonal has a mean of {mean:g} cannot be factored")
    order = by_activation(hessian) if order is None else order
    while (found := _factor(hessian, order, damping * mean)) is None:
        if damping >= LARGEST_DAMPING:
            raise SpectrumError("a Hessian cannot be factored, however much it is damped: it holds NaN or Inf")
        damping = min(LARGEST_DAMPING, max(damping, 1e-4) * _STEP)
    panels, pivots = found
    return Factor(order, panels, pivots, damping)


def _factor(hessian: Hessian, order: Tensor, added: float) -> tuple[tuple[Panel, ...], Tensor] | None:
    """None where it is not positive definite."""
    return _panels(hessian, order, added) if isinstance(hessian, Few) else _whole(hessian, order, added)


def _whole(hessian: Tensor, order: Tensor, added: float) -> tuple[tuple[Panel, ...], Tensor] | None:
    backwards = order.flip(0)
    turned = hessian[backwards[:, None], backwards[None]]
    turned.diagonal().add_(added)
    found = _of_turned(turned)
    return None if found is None else ((Panel(0, found[0]),), found[1])


def _panels(hessian: Few, order: Tensor, added: float) -> tuple[tuple[Panel, ...], Tensor] | None:
    """From the last columns to the first; `behind` is the damped X Xᵀ of those that were done."""
    rows = hessian.rows[:, order]
    behind = torch.eye(len(rows), dtype=rows.dtype, device=rows.device) * added
    panels, pivots = [], torch.empty(len(order), dtype=rows.dtype, device=rows.device)
    for start in reversed(range(0, len(order), PANEL)):
        inputs = rows[:, start : start + PANEL]
        lower, info = torch.linalg.cholesky_ex(behind)
        if int(info):
            return None
        gain = torch.cholesky_solve(inputs, lower)
        # what is left of the Hessian of these columns, once those behind them have followed
        left = (inputs.T @ gain).mul_(added)
        left = (left + left.T).mul_(0.5)
        left.diagonal().add_(added)
        found = _of_turned(left.flip(0, 1))
        if found is None:
            return None
        feedback, pivots[start : start + PANEL] = found
        panels.append(Panel(start, feedback, inputs, gain))
        behind.addmm_(inputs, inputs.T)
    return tuple(reversed(panels)), pivots


def _of_turned(turned: Tensor) -> tuple[Tensor, Tensor] | None:
    """U and D of the matrix whose columns and rows run backwards in `turned`; None if it is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(turned)
    del turned
    if int(info) or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    upper = lower.flip(0, 1)
    del lower
    upper = upper.contiguous()  # LAPACK's lie by columns
    roots = upper.diagonal().clone()
    return upper.div_(roots), roots.square()
