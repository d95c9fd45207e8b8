"""Where noise ends: thresholds that a matrix's own singular values give.

A p x q matrix (p <= q, beta = p/q) of independent entries with variance sigma² has singular values s whose
s²/(q·sigma²) follow the law of Marchenko and Pastur (Math. USSR Sb. 1, 1967) on [(1-sqrt(beta))², (1+sqrt(beta))²].
What lies above sigma·sqrt(q)·(1+sqrt(beta)) is not such noise. sigma comes from the median, which a few large values
do not move: median(s)² = q·sigma²·(median of the law) (Gavish and Donoho, IEEE Trans. Inf. Theory 60, 2014, III.E).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq

from .spectrum import FloatArray, Spectrum


def mp_density(x: FloatArray, beta: float) -> FloatArray:
    """Marchenko-Pastur density of eigenvalues x = s²/(q·sigma²), for 0 < beta = p/q <= 1."""
    low, high = _support(beta)
    inside = (x > low) & (x < high)
    safe = np.where(inside, x, (low + high) / 2)
    density = np.sqrt((high - safe) * (safe - low)) / (2 * math.pi * beta * safe)
    return np.where(inside, density, 0.0)


def singular_value_density(s: FloatArray, shape: tuple[int, int], sigma: float) -> FloatArray:
    """The same law for singular values s of a matrix of this shape: integrates to 1 over s; for plots."""
    p, q = sorted(shape)
    scale = q * sigma**2
    return mp_density(np.square(s) / scale, p / q) * 2 * s / scale


@lru_cache(maxsize=256)
def mp_median(beta: float) -> float:
    """Median of the law, from the integral of its density."""
    low, high = _support(beta)
    centre, radius = (low + high) / 2, (high - low) / 2
    if radius == 0:
        return centre

    def mass_below(angle: float) -> float:
        # x = centre - radius·cos(t) takes the square roots at both ends out of the integrand
        def integrand(t: float) -> float:
            return (radius * math.sin(t)) ** 2 / (2 * math.pi * beta * (centre - radius * math.cos(t)))

        return float(quad(integrand, 0.0, angle, epsabs=1e-13, epsrel=1e-12, limit=200)[0])

    angle = brentq(lambda t: mass_below(t) - 0.5, 0.0, math.pi, xtol=1e-13)
    return float(centre - radius * math.cos(angle))


def mp_edge_over_median(shape: tuple[int, int]) -> float:
    """The law's upper edge over its median, both as singular values: 2.475 for a square matrix."""
    beta = _beta(shape)
    return (1 + math.sqrt(beta)) / math.sqrt(mp_median(beta))


def gavish_donoho_over_median(shape: tuple[int, int]) -> float:
    """Optimal hard threshold for unknown noise over median(s): 2.858 for a square matrix (equations 11 and 15)."""
    beta = _beta(shape)
    known = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta * beta + 14 * beta + 1)))
    return known / math.sqrt(mp_median(beta))


def laserrmt_threshold(values: FloatArray, shape: tuple[int, int]) -> float:
    """LaserRMT's own threshold: IQR(s)/1.349 · sqrt((1+sqrt(beta))²).

    Not the Marchenko-Pastur edge: it spreads singular values, not entries, and lacks sqrt(q). On pure Gaussian noise
    it keeps between a quarter and all of the values. Published models were made with it.
    """
    upper, lower = np.percentile(values, [75, 25])
    return float(upper - lower) / 1.349 * (1 + math.sqrt(_beta(shape)))


@dataclass(frozen=True)
class Bulk:
    """Noise level and thresholds of one spectrum, in the units of its singular values (sigma: of its entries)."""

    sigma: float
    edge: float
    edge_with_margin: float
    gavish_donoho: float
    laserrmt: float

    @classmethod
    def of(cls, spectrum: Spectrum) -> Bulk:
        values, shape = spectrum.values, spectrum.shape
        p, q = sorted(shape)
        median = float(np.median(values))
        edge = median * mp_edge_over_median(shape)
        return cls(
            sigma=median / math.sqrt(q * mp_median(p / q)),
            edge=edge,
            # of a finite matrix the largest value reaches past the edge by a share of about p^(-2/3) (Tracy, Widom)
            edge_with_margin=edge * (1 + p ** (-2 / 3)),
            gavish_donoho=median * gavish_donoho_over_median(shape),
            laserrmt=laserrmt_threshold(values, shape),
        )


def signal_to_noise(values: FloatArray, threshold: float) -> float:
    """LaserRMT's SNR: Σ of the values above a threshold over Σ of the others; inf where nothing is below."""
    above = values > threshold
    noise = float(values[~above].sum())
    return float(values[above].sum()) / noise if noise > 0 else math.inf


def _beta(shape: tuple[int, int]) -> float:
    return min(shape) / max(shape)


def _support(beta: float) -> tuple[float, float]:
    root = math.sqrt(beta)
    return (1 - root) ** 2, (1 + root) ** 2
