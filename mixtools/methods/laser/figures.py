"""What is told of one matrix: thresholds, errors of every rank in either norm, the rank of each rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...linalg.bulk import Bulk, signal_to_noise
from ...linalg.rules import ThresholdRule, parse_rule
from ...linalg.spectrum import FloatArray, Spectrum
from ...linalg.weighted import WeightedSpectrum

WEIGHTS, OUTPUT = NORMS = "weights", "output"
TOLD_RULES = ("mp", "gavish-donoho", "laserrmt", "energy=0.9", "energy=0.99", "activation=0.01", "activation=0.1")
_SAMPLED = 64  # steps of a curve in a report


@dataclass(frozen=True)
class Curves:
    """What ranks lose: lost[best in][measured in], a share of ‖W‖² ("weights") or of the output's energy ("output").

    `ranks` are those that are told, from 0 to the full one. `damped`: in lost["output"]["output"] the damping counts.
    """

    ranks: tuple[int, ...]
    lost: dict[str, dict[str, FloatArray]]
    damped: bool = False

    def document(self) -> dict[str, Any]:
        """Five digits: for drawing and comparing."""
        lost = {
            best: {norm: [float(f"{share:.5g}") for share in curve] for norm, curve in measured.items()}
            for best, measured in self.lost.items()
        }
        return {"ranks": list(self.ranks), "damped": self.damped, **lost}


@dataclass(frozen=True)
class Report:
    """What was found in one matrix and what was kept of it: a row of laser-report.json.

    `norm` is the one in which the matrix was approximated, `damping` that of the output's. `energy` is the share of the
    squared Frobenius norm that is kept, `layer_error` the share of the output's energy that is lost over the
    calibration tokens, undamped (None without them). `choices` tells the rank that each rule would choose, in either
    norm as far as it is known. Thresholds are in units of singular values, `sigma` in those of the weight's entries.
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
    norm: str
    damping: float | None
    layer_error: float | None
    spectrum: FloatArray
    curves: Curves
    choices: dict[str, dict[str, int]]
    output_spectrum: FloatArray | None = None

    @property
    def share(self) -> float:
        return self.rank / self.of

    def document(self, *, spectra: bool = True) -> dict[str, Any]:
        """Ready for JSON; infinities become None. Without `spectra`, no list is as long as the matrix is wide."""
        row: dict[str, Any] = {name: getattr(self, name) for name in _FIGURES}
        row = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        row |= {"shape": list(self.shape), "choices": self.choices, "curves": self.curves.document()}
        if spectra:
            row["spectrum"] = self.spectrum.tolist()
            row["output_spectrum"] = None if self.output_spectrum is None else self.output_spectrum.tolist()
        return row


_FIGURES = (
    "shape", "rank", "of", "share", "energy", "snr_laserrmt", "snr_mp", "sigma", "edge", "gavish_donoho",
    "laserrmt_threshold", "norm", "damping", "layer_error", "break_even", "already_low_rank", "note",
)  # fmt: skip


def break_even(shape: tuple[int, int]) -> int:
    """The largest rank at which factors are no larger than the matrix."""
    rows, cols = shape
    return rows * cols // (rows + cols)


def largest_saving(shape: tuple[int, int]) -> int:
    """The largest rank at which factors are smaller than the matrix."""
    rows, cols = shape
    return (rows * cols - 1) // (rows + cols)


def figures(
    found: Spectrum, bulk: Bulk, rank: int, lost: FloatArray | None, *, weighted: WeightedSpectrum | None = None
) -> Report:
    """The report of one matrix at a rank. `found`: its own spectrum; `lost`: its output errors by rank; `weighted`: the
    output's norm, where that is the one asked for. `energy` is that of the weights' own best, `layer_error` not known:
    who has vectors puts them in.
    """
    energies = found.tail
    note = _low_rank_note(found)
    measured = {WEIGHTS: {WEIGHTS: energies, **({} if lost is None else {OUTPUT: lost})}}
    if weighted is not None:
        measured[OUTPUT] = {OUTPUT: weighted.tail}
    of = len(found.values)
    ranks = tuple(dict.fromkeys(round(i * of / _SAMPLED) for i in range(_SAMPLED + 1)))
    sampled = {best: {norm: curve[[*ranks]] for norm, curve in each.items()} for best, each in measured.items()}
    return Report(
        shape=found.shape,
        rank=rank,
        of=of,
        energy=1.0 - float(energies[rank]),
        snr_laserrmt=signal_to_noise(found.values, max(bulk.laserrmt, found.floor)),
        snr_mp=signal_to_noise(found.values, max(bulk.edge, found.floor)),
        sigma=bulk.sigma,
        edge=bulk.edge,
        gavish_donoho=bulk.gavish_donoho,
        laserrmt_threshold=bulk.laserrmt,
        break_even=break_even(found.shape),
        already_low_rank=note is not None,
        note=note,
        norm=WEIGHTS if weighted is None else OUTPUT,
        damping=None if weighted is None else weighted.damping,
        layer_error=None,
        spectrum=found.values,
        curves=Curves(ranks, sampled, damped=weighted is not None),
        choices=_choices(found, bulk, lost, weighted),
        output_spectrum=None if weighted is None else weighted.values,
    )


def _choices(
    found: Spectrum, bulk: Bulk, lost: FloatArray | None, weighted: WeightedSpectrum | None
) -> dict[str, dict[str, int]]:
    """The rank that each rule would choose: in the weights' norm those that need no text, or all with it."""
    rules = {spelling: parse_rule(spelling) for spelling in TOLD_RULES}
    chosen = {
        WEIGHTS: {
            name: rule.rank(found, bulk, lost) for name, rule in rules.items()
            if not rule.needs_covariance or lost is not None
        }
    }  # fmt: skip
    if weighted is not None:
        chosen[OUTPUT] = {
            name: rule.rank(weighted, bulk, weighted.tail) for name, rule in rules.items()
            if not isinstance(rule, ThresholdRule)
        }  # fmt: skip
    return chosen


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
