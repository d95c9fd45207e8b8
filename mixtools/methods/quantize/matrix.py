"""One matrix, or several that read the same inputs: grid, factor, rounding, and what it cost.

weights [in, out] ─► grid ─► codes ─► sweeps ─► Packed, values, errors
Hessian [in, in] ─► factor ─┘
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import SpectrumError
from ...linalg.few import Few, Hessian
from ...linalg.ldl import Factor, factor
from . import rounding
from .grid import Scheme
from .rounding import Rounded

ROUNDINGS = ("nearest", "second-order")
DAMPING = 0.05
SWEEPS = 1
NOT_FINITE = "comes out as NaN or Inf: its scales are beyond what the format can hold"


@dataclass(frozen=True)
class Options:
    """How a matrix is rounded. `damping`: a share of the mean of the Hessian's diagonal. `block`: of w2's Hessian, in
    columns, of which only blocks along the diagonal are kept; None keeps all of it.
    """

    rounding: str = "second-order"
    damping: float = DAMPING
    sweeps: int = SWEEPS
    block: int | None = None


def scaled(hessian: Hessian, scale: Tensor) -> Hessian:
    """Of inputs divided by `scale` [in]."""
    return hessian.divided(scale) if isinstance(hessian, Few) else (hessian / scale[:, None]).div_(scale)


def scaled_(hessian: Hessian, scale: Tensor) -> Hessian:
    """The same, in place where it is a matrix: the largest is 0.8 GB."""
    return hessian.divided(scale) if isinstance(hessian, Few) else hessian.div_(scale[:, None]).div_(scale)


def prepared(hessian: Hessian, options: Options) -> Factor | None:
    """The factor, or None where rounding needs none. Raises SpectrumError as linalg.ldl.factor."""
    if options.rounding == "nearest" or not bool((hessian.diagonal() > 0).any()):
        return None
    return factor(hessian, options.damping)


def quantize(
    weights: Tensor, power: Tensor, scheme: Scheme, options: Options, found: Factor | None, *,
    hessian: Hessian | None = None,
) -> Rounded:  # fmt: skip
    """Weights [in, out], fp32, whose columns weigh `power` [in]; with `hessian` [in, in] the codes are swept, too.

    Without a factor it is no Few: rounding to nearest looks at a group's own Hessian. Raises SpectrumError for a result
    that is not finite.
    """
    if not bool((power > 0).any()):
        power, hessian = torch.ones_like(power), None
    assert found is not None or not isinstance(hessian, Few)
    grid = scheme.grid(weights, power, hessian if found is None and not isinstance(hessian, Few) else None)
    if found is None:
        made = rounding.nearest(weights, grid)
    else:
        made = rounding.second_order(weights, grid, found)
        for _ in range(options.sweeps):
            if hessian is None:
                break
            made = rounding.sweep(weights, made, hessian, found.damping, scheme)
    if not bool(torch.isfinite(made.errors).all()):
        raise SpectrumError(NOT_FINITE)
    return made
