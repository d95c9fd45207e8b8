"""LASER: a weight matrix replaced by its best approximation of lower rank.

Sharma, Ash and Misra, "The Truth is in There" (arXiv 2312.13558). Ranks chosen by random matrix theory: LaserRMT.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import UsageError
from ...formats import Factored, Packed, Plain
from ...linalg.bulk import Bulk, signal_to_noise
from ...linalg.output import Covariance, output_errors
from ...linalg.rules import MarchenkoPastur, RankRule, parse_rule
from ...linalg.spectrum import Decomposition, FloatArray, Spectrum, decompose, spectrum
from ...storage.dtypes import DType

__all__ = ["Analysis", "Covariance", "Options", "Report", "Result", "break_even", "encode", "scan"]


@dataclass(frozen=True)
class Options:
    """rank_rule: which singular values stay, a rule or its spelling on the command line. factored: store A and B with
    W = A·B instead of W, where that is smaller. exact: a full SVD instead of the Gram matrix (see linalg.spectrum).
    """

    rank_rule: RankRule = field(default_factory=MarchenkoPastur)
    factored: bool = False
    exact: bool = False

    @classmethod
    def parse(cls, rank_rule: str, factored: bool = False, exact: bool = False) -> Options:
        """Raises UsageError for a rule that there is not."""
        return cls(parse_rule(rank_rule), factored, exact)


@dataclass(frozen=True)
class Report:
    """What was found in one matrix and what was kept of it: a row of laser-report.json.

    `energy` is the share of the squared Frobenius norm that is kept, `layer_error` the share of the output's energy
    that is lost over the calibration tokens (None without them), `layer_errors` that share for each rank from 0.
    Thresholds are in units of singular values, `sigma` in those of the weight's entries.
    """

    shape: tuple[int, int]
    rank: int
    of: int
    energy: float
    snr_laserrmt: float
    snr_mp: float
    sigma: float
    edge: float
    gavish_donoho: float
    laserrmt_threshold: float
    break_even: int
    already_low_rank: bool
    note: str | None
    layer_error: float | None
    spectrum: FloatArray
    layer_errors: FloatArray | None = None

    @property
    def share(self) -> float:
        return self.rank / self.of

    def document(self, *, curves: bool = True) -> dict[str, Any]:
        """Ready for JSON; infinities become None. Without `curves`, only single figures."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _FIGURES}
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row["shape"] = list(self.shape)
        if curves:
            row["spectrum"] = self.spectrum.tolist()
            row["layer_errors"] = None if self.layer_errors is None else self.layer_errors.tolist()
        return row


_FIGURES = (
    "shape", "rank", "of", "share", "energy", "snr_laserrmt", "snr_mp", "sigma", "edge", "gavish_donoho",
    "laserrmt_threshold", "layer_error", "break_even", "already_low_rank", "note",
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """`stored` is the rebuilt weight [out, in] in its dtype, or its factors, the singular values' roots in either."""

    report: Report
    stored: Packed

    @property
    def dense(self) -> Tensor:
        """The weight that a reader sees."""
        return self.stored.dense


class Analysis:
    """One matrix decomposed once, from which any rank can be chosen, reported and encoded."""

    def __init__(self, decomposition: Decomposition, covariance: Covariance | None = None) -> None:
        self.weight = decomposition.weight
        self.decomposition = decomposition
        self.covariance = covariance
        self.bulk = Bulk.of(decomposition)

    @property
    def dtype(self) -> DType:
        return DType.of(self.weight.dtype)

    @cached_property
    def lost(self) -> FloatArray | None:
        """Share of the output's energy that each rank from 0 loses; takes all vectors.

        Raises TensorError for a covariance that does not fit.
        """
        return None if self.covariance is None else output_errors(self.decomposition, self.covariance)

    def rank(self, rule: RankRule) -> int:
        """Raises UsageError for a rank above the matrix's, or a rule that lacks its covariance."""
        return rule.rank(self.decomposition, self.bulk, self.lost if rule.needs_covariance else None)

    def report(self, rank: int) -> Report:
        return _report(self.decomposition, self.bulk, rank, self.lost)

    def dense(self, rank: int) -> Result:
        """At full rank, the weight as it was, bit for bit."""
        return Result(self.report(rank), Packed(Plain(self.dtype), (self.decomposition.project(rank),)))

    def factored(self, rank: int) -> Result:
        """Raises UsageError where the factors are not smaller than the matrix. Rank 0 is stored as one zero column."""
        rows, cols = self.weight.shape
        check_factors((rows, cols), rank)
        if rank == 0:
            A, B = self.weight.new_zeros(rows, 1), self.weight.new_zeros(1, cols)
        else:
            A, B = self.decomposition.factors(rank)
        return Result(self.report(rank), Packed(factored(self.dtype, rank), (A, B)))


def encode(weight: Tensor, options: Options, covariance: Covariance | None = None) -> Result:
    """The best approximation of `weight` [out, in] at the rank that `options.rank_rule` chooses (Eckart-Young, 1936).

    Works where the weight lies: CPU, CUDA, or MPS. `covariance` is Σ x xᵀ over the linear's calibration tokens.
    Raises SpectrumError for NaN or Inf; UsageError for a rank above the matrix's, for `activation` without a
    covariance, and for factors that would not be smaller.
    """
    options.rank_rule.require(covariance is not None)  # before minutes are spent
    analysis = Analysis(decompose(weight, exact=options.exact), covariance)
    rank = analysis.rank(options.rank_rule)
    return analysis.factored(rank) if options.factored else analysis.dense(rank)


def scan(weight: Tensor, options: Options) -> Report:
    """The report alone, from singular values without vectors. Raises as `encode`; always for `activation`."""
    options.rank_rule.require(has_covariance=False)
    found = spectrum(weight, exact=options.exact)
    bulk = Bulk.of(found)
    return _report(found, bulk, options.rank_rule.rank(found, bulk), None)


def factored(dtype: DType, rank: int) -> Factored:
    """The format of factors of this rank: rank 0 is one column of zeros."""
    return Factored(dtype, max(rank, 1))


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which factors are no larger than the matrix."""
    rows, cols = shape
    return rows * cols // (rows + cols)


def check_factors(shape: tuple[int, int], rank: int) -> None:
    """Raises UsageError where factors of this rank are not smaller than the matrix."""
    rows, cols = shape
    if rank * (rows + cols) >= rows * cols:
        raise UsageError(
            f"factors of rank {rank} hold {rank * (rows + cols):,} numbers, the {rows}x{cols} matrix "
            f"{rows * cols:,}: they save only below rank {math.ceil(rows * cols / (rows + cols))}; "
            "choose a lower rank or leave out --factored"
        )


def _report(found: Spectrum, bulk: Bulk, rank: int, lost: FloatArray | None) -> Report:
    values, energy = found.values, found.energy
    note = _low_rank_note(found)
    return Report(
        shape=found.shape,
        rank=rank,
        of=len(values),
        energy=float(np.square(values[:rank]).sum()) / energy if energy > 0 else 1.0,
        snr_laserrmt=signal_to_noise(values, max(bulk.laserrmt, found.floor)),
        snr_mp=signal_to_noise(values, max(bulk.edge, found.floor)),
        sigma=bulk.sigma,
        edge=bulk.edge,
        gavish_donoho=bulk.gavish_donoho,
        laserrmt_threshold=bulk.laserrmt,
        break_even=break_even(found.shape),
        already_low_rank=note is not None,
        note=note,
        layer_error=None if lost is None else float(lost[rank]),
        spectrum=values,
        layer_errors=lost,
    )


def _low_rank_note(found: Spectrum) -> str | None:
    """Said of a matrix whose bulk is gone: its median is zero, or what rounding to its dtype leaves."""
    if found.energy == 0:
        return "the matrix is zero"
    rounding = max(found.floor, found.rounding)
    if np.median(found.values) > rounding:
        return None
    above = int((found.values > rounding).sum())
    return (
        f"already truncated: beyond rank {above} of {len(found.values)} only rounding is left, "
        "no noise to estimate a level from"
    )
