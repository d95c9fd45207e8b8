"""LASER: a weight matrix replaced by its best approximation of lower rank.

Sharma, Ash and Misra, "The Truth is in There" (arXiv 2312.13558). Ranks chosen by random matrix theory: LaserRMT.
Best in the norm of the weights, as they have it, or of the layer's output over a text (linalg/weighted.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from ...errors import UsageError
from ...formats import Factored, Packed, Plain
from ...linalg.bulk import Bulk
from ...linalg.output import Covariance, output_errors
from ...linalg.rules import MarchenkoPastur, RankRule, ThresholdRule, parse_rule
from ...linalg.spectrum import Decomposition, FloatArray, Spectrum, decompose, spectrum
from ...linalg.weighted import DAMPING, Weighted, WeightedSpectrum, decompose_weighted, weighted_spectrum
from ...storage.dtypes import DType
from .figures import NORMS, OUTPUT, WEIGHTS, Curves, Report, break_even, figures

__all__ = [
    "Analysis", "Covariance", "Curves", "Options", "Report", "Result", "analyse", "break_even", "encode", "look",
    "scan", "spectrum_in_norm",
]  # fmt: skip

LEAST_DAMPING = 1e-8  # what is taken from what λ is a part of is known to 2⁻⁵²/λ
DEFAULT_RULES = {WEIGHTS: "mp", OUTPUT: "activation=0.01"}


@dataclass(frozen=True)
class Options:
    """rank_rule: which singular values stay, a rule or its spelling on the command line. factored: store A and B with
    W = A·B instead of W, where that is smaller. exact: a full SVD instead of the Gram matrix (see linalg.spectrum).
    norm: `weights`, or `output`, which takes a covariance, and `damping` of its mean diagonal (see linalg.weighted).
    """

    rank_rule: RankRule = field(default_factory=MarchenkoPastur)
    factored: bool = False
    exact: bool = False
    norm: str = WEIGHTS
    damping: float = DAMPING

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be."""
        if self.norm not in NORMS:
            raise UsageError(f"norm {self.norm!r} is not one of {', '.join(NORMS)}")
        if not LEAST_DAMPING <= self.damping <= 1.0:
            raise UsageError(f"damping {self.damping:g} is a share of the inputs' mean square, {LEAST_DAMPING:g} to 1")
        if self.norm == OUTPUT and isinstance(self.rank_rule, ThresholdRule):
            raise UsageError(
                f"rank rule {self.rank_rule} finds noise in the weights, which the output's norm does not see: take "
                "activation=0.01, energy=0.99, rho=0.1 or rank=512, or --norm weights"
            )
        if self.norm == OUTPUT and self.exact:
            raise UsageError("the output's norm is made of sums of squares: leave out --exact, which adds nothing")

    @classmethod
    def parse(
        cls, rank_rule: str, factored: bool = False, exact: bool = False, norm: str = WEIGHTS, damping: float = DAMPING
    ) -> Options:
        """Raises UsageError for a rule that there is not."""
        return cls(parse_rule(rank_rule), factored, exact, norm, damping)

    @property
    def fixed_rank(self) -> int | None:
        """Of a rule that needs no look at the matrix."""
        return getattr(self.rank_rule, "count", None)

    def require(self, has_covariance: bool) -> None:
        """Raises UsageError if there is no covariance and these options cannot do without."""
        if self.norm == OUTPUT and not has_covariance:
            raise UsageError("the output's norm is that over a calibration text: give it one")
        self.rank_rule.require(has_covariance)


@dataclass(frozen=True)
class Result:
    """`stored` is the rebuilt weight [out, in] in its dtype, or its factors."""

    report: Report
    stored: Packed

    @property
    def dense(self) -> Tensor:
        """The weight that a reader sees."""
        return self.stored.dense


class Analysis:
    """One matrix decomposed once, from which any rank can be chosen, reported and encoded.

    `asked` is the norm that was asked for: where no token gives the output's, the weights' stands in.
    """

    def __init__(
        self, best: Decomposition | Weighted, covariance: Covariance | None = None, asked: str = WEIGHTS
    ) -> None:
        self.best, self.covariance, self.asked = best, covariance, asked
        self.weight = best.weight
        self.own: Spectrum = best.own if isinstance(best, Weighted) else best
        self.bulk = Bulk.of(self.own)

    @property
    def dtype(self) -> DType:
        return DType.of(self.weight.dtype)

    @property
    def numerical_rank(self) -> int:
        """Singular values of the weight that are more than rounding."""
        return int((self.own.values > max(self.own.floor, self.own.rounding)).sum())

    @cached_property
    def lost(self) -> FloatArray | None:
        """Share of the output's energy that each rank from 0 loses, damped where that decides; may take all vectors.

        Raises TensorError for a covariance that does not fit.
        """
        if isinstance(self.best, Weighted) or self.asked == OUTPUT:
            # without a token, its own energy stands for the output's
            return self.best.tail
        return None if self.covariance is None else output_errors(self.best, self.covariance)

    def rank(self, rule: RankRule) -> int:
        """By the rule; the full one where it asks for inputs, in the weights' norm, and no token came.

        Raises UsageError for a rank above the matrix's, or a rule that lacks its covariance.
        """
        unseen = self.covariance is not None and self.covariance.empty
        if rule.needs_covariance and unseen and self.asked != OUTPUT:
            return len(self.best.values)
        return rule.rank(self.best, self.bulk, self.lost if rule.needs_covariance else None)

    def layer_error(self, rank: int) -> float | None:
        """Share of the output's energy, undamped, that this rank loses; None without a token."""
        if isinstance(self.best, Weighted):
            return self.best.error(rank)
        return None if self.asked == OUTPUT or self.lost is None else float(self.lost[rank])

    def report(self, rank: int) -> Report:
        if isinstance(self.best, Weighted):
            known = figures(self.own, self.bulk, rank, None, weighted=self.best)
            known = replace(known, energy=1.0 - self.best.weight_error(rank))
        else:
            known = figures(self.own, self.bulk, rank, None if self.asked == OUTPUT else self.lost)
        return replace(known, layer_error=self.layer_error(rank))

    def project(self, rank: int) -> Tensor:
        """The weight at this rank, [out, in] in its dtype; at full rank as it was, bit for bit."""
        return self.best.project(rank)

    def dense(self, rank: int) -> Result:
        """At full rank, the weight as it was, bit for bit."""
        weight = self.project(rank)
        return Result(self.report(rank), Packed(Plain(self.dtype), (weight,)))

    def factored(self, rank: int) -> Result:
        """Raises UsageError where the factors are not smaller than the matrix. Rank 0 is stored as one zero column."""
        rows, cols = self.weight.shape
        check_factors((rows, cols), rank)
        if rank == 0:
            A, B = self.weight.new_zeros(rows, 1), self.weight.new_zeros(1, cols)
        else:
            A, B = self.best.factors(rank)
        return Result(self.report(rank), Packed(factored(self.dtype, rank), (A, B)))


def encode(weight: Tensor, options: Options, covariance: Covariance | None = None) -> Result:
    """The best approximation of `weight` [out, in] at the rank that `options.rank_rule` chooses (Eckart-Young, 1936).

    Works where the weight lies: CPU, CUDA, or MPS. `covariance` is Σ x xᵀ over the linear's calibration tokens.
    Raises SpectrumError for NaN or Inf; UsageError for a rank above the matrix's, for `activation` or the output's norm
    without a covariance, and for factors that would not be smaller; TensorError for a covariance that does not fit.
    """
    options.require(covariance is not None)  # before minutes are spent
    analysis = analyse(weight, options, covariance)
    rank = analysis.rank(options.rank_rule)
    return analysis.factored(rank) if options.factored else analysis.dense(rank)


def analyse(weight: Tensor, options: Options, covariance: Covariance | None = None) -> Analysis:
    """In the norm of `options`; in that of the weights if no token gives the output's. Raises as `encode`."""
    if options.norm == OUTPUT and (seen := _with_tokens(covariance)) is not None:
        return Analysis(decompose_weighted(weight, seen, options.damping), seen, OUTPUT)
    return Analysis(decompose(weight, exact=options.exact), covariance, options.norm)


def spectrum_in_norm(weight: Tensor, options: Options, covariance: Covariance | None = None) -> Spectrum:
    """Of the norm of `options`, the values alone, without vectors; in that of the weights where no token came."""
    if options.norm == OUTPUT and (seen := _with_tokens(covariance)) is not None:
        return weighted_spectrum(weight, seen, options.damping)
    return spectrum(weight, exact=options.exact)


def _with_tokens(covariance: Covariance | None) -> Covariance | None:
    return None if covariance is None or covariance.empty else covariance


def scan(weight: Tensor, options: Options) -> Report:
    """The report alone, from singular values without vectors. Raises as `encode`; always for `activation`."""
    options.require(has_covariance=False)
    return report_of(spectrum(weight, exact=options.exact), options)


def report_of(found: Spectrum, options: Options, rank: int | None = None) -> Report:
    """What `spectrum_in_norm` gave, at a rank, or that of the rule.

    Without vectors no output's error is known but the damped curve, and at full rank, where nothing is lost.
    """
    weighted = found if isinstance(found, WeightedSpectrum) else None
    own = weighted.own if weighted else found
    bulk, lost = Bulk.of(own), found.tail if options.norm == OUTPUT else None
    rank = options.rank_rule.rank(found, bulk, lost) if rank is None else rank
    report = figures(own, bulk, rank, None, weighted=weighted)
    return replace(report, layer_error=0.0) if weighted and rank == report.of else report


def look(weight: Tensor, options: Options, covariance: Covariance) -> Report:
    """Both norms in full: every rank's error of either approximation in either norm, and each rule's choice.

    `options` are of the output's norm. Raises as `encode`.
    """
    if covariance.empty:
        analysis = analyse(weight, options, covariance)
        return analysis.report(analysis.rank(options.rank_rule))
    own = decompose(weight)
    by_own = {WEIGHTS: own.tail, OUTPUT: output_errors(own, covariance)}
    del own  # its vectors are as large as what comes
    best = decompose_weighted(weight, covariance, options.damping)
    by_best = {WEIGHTS: best.weight_errors(), OUTPUT: best.errors()}
    analysis = Analysis(best, covariance, OUTPUT)
    rank = analysis.rank(options.rank_rule)
    found = figures(best.own, analysis.bulk, rank, by_own[OUTPUT], weighted=best)
    curves = Curves(tuple(range(found.of + 1)), {WEIGHTS: by_own, OUTPUT: by_best})
    energy, error = 1.0 - float(by_best[WEIGHTS][rank]), float(by_best[OUTPUT][rank])
    return replace(found, energy=energy, layer_error=error, curves=curves)


def factored(dtype: DType, rank: int) -> Factored:
    """The format of factors of this rank: rank 0 is one column of zeros."""
    return Factored(dtype, max(rank, 1))


def check_factors(shape: tuple[int, int], rank: int) -> None:
    """Raises UsageError where factors of this rank are not smaller than the matrix."""
    rows, cols = shape
    if rank * (rows + cols) >= rows * cols:
        raise UsageError(
            f"factors of rank {rank} hold {rank * (rows + cols):,} numbers, the {rows}x{cols} matrix "
            f"{rows * cols:,}: they save only below rank {math.ceil(rows * cols / (rows + cols))}; "
            "choose a lower rank or leave out --factored"
        )
