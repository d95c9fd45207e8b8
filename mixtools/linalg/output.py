"""What dropping singular directions costs at the layer's output, for every rank from one pass.

For inputs X [in, tokens] and C = X Xᵀ, an approximation W_k that drops the directions i >= k of W errs at the output
by exactly ‖(W - W_k)X‖² = Σ_{i>=k} s_i² v_iᵀ C v_i = Σ_{i>=k} u_iᵀ (W C Wᵀ) u_i, out of tr(W C Wᵀ) in all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..errors import TensorError
from .gram import long_blocks
from .spectrum import Decomposition, FloatArray, shares_lost


@dataclass(frozen=True)
class Covariance:
    """Σ x xᵀ over the tokens that reach a linear: of its inputs [in, in] or of its outputs [out, out].

    Any real dtype, symmetric. The side with fewer features is the cheaper one: for w2 of 8x7B the outputs' 128 MiB
    in fp64 say as much here as the inputs' 1.5 GiB. `power` is the mean of the inputs' diagonal, which the outputs do
    not tell; `tokens` how many there were. None: not known.
    """

    matrix: Tensor
    side: Literal["in", "out"] = "in"
    power: float | None = None
    tokens: int | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing came in: no token, or zeros alone."""
        power = self.power if self.power is not None else float(self.matrix.diagonal().abs().sum())
        return self.tokens == 0 or power == 0


def output_errors(decomposition: Decomposition, covariance: Covariance) -> FloatArray:
    """Share of the output's energy that rank k loses: [min(m, n) + 1] fp64 for k = 0, 1, ..., from 1 down to 0.

    All zeros if no energy comes out at all. Raises TensorError for a covariance of another shape, or one with NaN.
    """
    check_covariance(covariance, decomposition.shape)
    p = len(decomposition.values)
    basis = decomposition.vectors(0, p)  # [p, p], of the short side
    if decomposition.is_wide == (covariance.side == "out"):
        gains = quadratic(basis, covariance.matrix)
        if covariance.side == "in":
            gains *= np.square(decomposition.values)
    elif covariance.side == "in":  # wide: s_i v_i = Wᵀ u_i
        gains = quadratic(_image(decomposition, basis), covariance.matrix)
    else:  # tall: u_i = W v_i / s_i
        scale = np.square(np.where(decomposition.values > decomposition.floor, decomposition.values, np.inf))
        gains = quadratic(_image(decomposition, basis), covariance.matrix) / scale
    if not np.isfinite(gains).all():
        raise TensorError("the sums over the covariance overflow")
    return shares_lost(gains.clip(min=0))


def check_covariance(covariance: Covariance, shape: tuple[int, int]) -> None:
    """Raises TensorError for a covariance that does not fit a weight of this shape, or holds NaN or infinity."""
    side = shape[0] if covariance.side == "out" else shape[1]
    if tuple(covariance.matrix.shape) != (side, side):
        raise TensorError(
            f"covariance of the {covariance.side}puts does not fit the weight",
            expected=[side, side],
            found=list(covariance.matrix.shape),
        )
    low, high = torch.aminmax(covariance.matrix)  # both are NaN if any element is
    if not bool(torch.isfinite(low) & torch.isfinite(high)):
        raise TensorError("covariance holds NaN or infinity")


def quadratic(vectors: Tensor, matrix: Tensor, block: int = 1024) -> FloatArray:
    """v_iᵀ M v_i for the columns of `vectors` [d, k]: [k]."""
    total = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, len(vectors), block):
        rows = matrix[start : start + block].to(vectors.device).double()
        total += (vectors[start : start + block] * (rows @ vectors)).sum(0)
    result: FloatArray = total.cpu().numpy()
    return result


def _image(decomposition: Decomposition, basis: Tensor) -> Tensor:
    """The long side's vectors times their singular values: [max(m, n), p] fp64."""
    weight = decomposition.weight
    pieces = []
    for index in long_blocks(weight):
        block = weight[index].to(basis.device).double()
        pieces.append((block.T if decomposition.is_wide else block) @ basis)
    return torch.cat(pieces)
