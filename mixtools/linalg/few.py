"""A Hessian of few inputs, held as the inputs themselves: Σ x xᵀ of k rows has rank k, maybe far below its width.

With X [k, n] and damping a, the columns that are still to be rounded, F, follow an error S = X_done e_done by

    X_Fᵀ (a I + X_F X_Fᵀ)⁻¹ S        (k x k where the formula of ldl.py has n x n)

so that no matrix [n, n] is ever made or factored: panels of columns are, and a k x k matrix for each.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_RATIO = 4  # of width to rows: with more rows n x n costs no more


class Few:
    """Σ x xᵀ over the rows x of `rows` [k, n], fp32."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows
        self._diagonal: Tensor | None = None

    def __len__(self) -> int:
        """The width n."""
        return self.rows.shape[1]

    def __matmul__(self, other: Tensor) -> Tensor:
        """[n, m] -> [n, m]."""
        return self.rows.T @ (self.rows @ other)

    def diagonal(self) -> Tensor:
        """[n]"""
        if self._diagonal is None:
            self._diagonal = torch.linalg.vector_norm(self.rows, dim=0).square_()
        return self._diagonal

    def near(self, columns: slice) -> Tensor:
        """The Hessian of some columns among themselves."""
        part = self.rows[:, columns]
        return part.T @ part

    def divided(self, scale: Tensor) -> Few:
        """Of inputs divided by `scale` [n]."""
        return Few(self.rows / scale)


Hessian = Tensor | Few


def near(hessian: Hessian, columns: slice) -> Tensor:
    """The Hessian [b, b] of some columns among themselves, a copy."""
    return hessian.near(columns) if isinstance(hessian, Few) else hessian[columns, columns].clone()


def energy(hessian: Hessian, errors: Tensor) -> float:
    """Σ over rows e of e H eᵀ; `errors` [n, out] holds them as columns."""
    if isinstance(hessian, Few):
        return float((hessian.rows @ errors).square_().sum(dtype=torch.float64))
    return float((errors * (hessian @ errors)).sum(dtype=torch.float64))
