"""Smoothing: scales that move from one matrix of a layer to another, the layer's function staying what it is.

    norm / s  ─► router and w1, w3 of every expert (or q, k, v), their columns times s
    w3's rows / s  ─► w2's columns times s, by expert

AWQ's idea (arXiv 2306.00978), whole: everything that reads the norm is scaled, the router too. s = mean |x| ^ a of the
inputs, a from a grid that holds 0, which leaves the layer alone. Which a is best is told by the error of the rounding
that will be used, through the Hessian: inputs x / s have the Hessian S⁻¹ H S⁻¹, and no forward pass is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
MARGIN = 0.02  # of the error, that smoothing must save: small gains on a calibration text are that text's own
SPAN = 2.0**7  # no scale is further from 1 than this, either way: fp16 holds those of scales and norms


class Choice(NamedTuple):
    """The exponent, its scales [in] (ones for 0), and each exponent's error."""

    exponent: float
    scale: Tensor
    errors: dict[float, float]


def scale_of(magnitude: Tensor, exponent: float) -> Tensor:
    """s [in] > 0 of mean magnitudes [in], fp32, its largest and smallest values as far from 1; 1 where nothing came."""
    seen = magnitude > 0
    if not exponent or not bool(seen.any()):
        return torch.ones_like(magnitude)
    logarithm = torch.where(seen, magnitude, 1.0).log() * exponent
    middle = (logarithm[seen].max() + logarithm[seen].min()) / 2
    return torch.where(seen, (logarithm - middle).exp(), 1.0).clamp_(1 / SPAN, SPAN)


def bounded(scale: Tensor) -> int:
    """How many scales would have been further from 1."""
    return int(((scale == SPAN) | (scale == 1 / SPAN)).sum())


def on_norm(norm: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The norm [in] as it will be stored in `dtype`, and the scales that this really is: norm / stored.

    So no rounding of the norm is left in the layer. Where the stored one would be zero or no number, the scale is 1.
    """
    stored = (norm / scale).to(dtype)
    kept = stored.float()
    good = (kept != 0) & torch.isfinite(kept) & (norm != 0)
    exact = torch.where(good, norm / torch.where(good, kept, 1.0), 1.0)
    return torch.where(good, stored, norm.to(dtype)), exact


def choose(
    magnitude: Tensor, errors_of: Callable[[Tensor], Sequence[float]], exponents: Sequence[float] = EXPONENTS,
    margin: float = MARGIN,
) -> Choice:  # fmt: skip
    """The exponent whose scale has the least error; 0 unless another saves more than `margin` of its error.

    `errors_of`: of scales [exponents, in], each one's.
    """
    scales = torch.stack([scale_of(magnitude, exponent) for exponent in exponents])
    errors = dict(zip(exponents, errors_of(scales), strict=True))
    best = min(errors, key=errors.__getitem__)
    if errors[best] >= (1 - margin) * errors[0.0]:
        best = 0.0
    return Choice(best, scales[exponents.index(best)], errors)
