"""One matrix, or several that read the same inputs: grid, factor, rounding, and what it cost.

weights [in, out] ─► grid ─► codes ─► sweeps ─► Packed, values, errors
Hessian [in, in] ─► factor ─┘
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...errors import SpectrumError
from ...linalg.few import Few, Hessian
from ...linalg.ldl import Factor, factor
from . import rounding
from .grid import Grid, Scheme
from .rounding import Given, Rounded

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


class Case(NamedTuple):
    """A matrix's weights [in, out], fp32, what its columns weigh [in], its Hessian and that Hessian's factor."""

    weights: Tensor
    power: Tensor
    found: Factor | None
    hessian: Hessian | None = None


def quantize(
    weights: Tensor, power: Tensor, scheme: Scheme, options: Options, found: Factor | None, *,
    hessian: Hessian | None = None,
) -> Rounded:  # fmt: skip
    """Weights [in, out], fp32, whose columns weigh `power` [in]; with `hessian` [in, in] the codes are swept, too.

    Without a factor it is no Few: rounding to nearest looks at a group's own Hessian. Raises SpectrumError for a result
    that is not finite.
    """
    (made,) = quantize_all([Case(weights, power, found, hessian)], scheme, options)
    check(made)
    return made


def quantize_all(cases: Sequence[Case], scheme: Scheme, options: Options) -> list[Rounded]:
    """As `quantize`, of several matrices, in step where they are alike; `check` is left to the caller."""
    made: dict[int, Rounded] = {}
    alike: dict[tuple[object, ...], list[tuple[int, Given, Grid]]] = {}
    for number, (weights, heard, found, own) in enumerate(cases):
        seen = bool((heard > 0).any())
        power, hessian = (heard, own) if seen else (torch.ones_like(heard), None)
        assert found is not None or not isinstance(hessian, Few)
        grid = scheme.grid(weights, power, hessian if found is None and not isinstance(hessian, Few) else None)
        if found is None:
            made[number] = rounding.nearest(weights, grid)
        else:
            case = Given(weights, found, hessian)
            alike.setdefault((*case.kind, hessian is None), []).append((number, case, grid))
    for together in alike.values():
        given = [one for _, one, _ in together]
        rounded = rounding.second_order(given, [grid for *_, grid in together])
        for _ in range(options.sweeps if given[0].hessian is not None else 0):
            rounded = rounding.sweep(given, rounded, scheme)
        made |= {number: one for (number, *_), one in zip(together, rounded, strict=True)}
    return [made[number] for number in range(len(cases))]


def check(made: Rounded) -> None:
    """Raises SpectrumError for a matrix that is not finite."""
    if not bool(torch.isfinite(made.errors).all()):
        raise SpectrumError(NOT_FINITE)
