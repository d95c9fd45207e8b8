"""A rank from a rule. Each rule is its parameters; `parse_rule` reads the command line's spelling."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ..errors import UsageError
from .bulk import Bulk
from .spectrum import FloatArray, Spectrum


class RankRule(ABC):
    """Chooses how many singular values stay."""

    name: ClassVar[str]
    needs_covariance: ClassVar[bool] = False

    @abstractmethod
    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        """0 to min(m, n). `lost` is output_errors(): only rules with `needs_covariance` read it."""

    def require(self, has_covariance: bool) -> None:
        """Raises UsageError if the rule cannot do without a covariance and there is none."""
        if self.needs_covariance and not has_covariance:
            raise UsageError(f"rank rule {self} weighs directions by the layer's inputs: give it a calibration text")


class ThresholdRule(RankRule):
    """Keeps what lies above a threshold, and above what rounding alone could be."""

    @abstractmethod
    def threshold(self, bulk: Bulk) -> float: ...

    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        return int((spectrum.values > max(self.threshold(bulk), spectrum.floor, spectrum.rounding)).sum())

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class MarchenkoPastur(ThresholdRule):
    """Keeps what no noise of the bulk's level reaches: the edge, and a margin for the matrix being finite."""

    name: ClassVar[str] = "mp"

    def threshold(self, bulk: Bulk) -> float:
        return bulk.edge_with_margin


@dataclass(frozen=True)
class GavishDonoho(ThresholdRule):
    """Keeps what lowers the mean squared error of a noisy matrix whose noise level is unknown."""

    name: ClassVar[str] = "gavish-donoho"

    def threshold(self, bulk: Bulk) -> float:
        return bulk.gavish_donoho


@dataclass(frozen=True)
class LaserRmt(ThresholdRule):
    """LaserRMT's threshold, by which published models were made; see bulk.laserrmt_threshold."""

    name: ClassVar[str] = "laserrmt"

    def threshold(self, bulk: Bulk) -> float:
        return bulk.laserrmt


@dataclass(frozen=True)
class Activation(RankRule):
    """The smallest rank that loses at most this share of the output's energy over the calibration tokens."""

    share: float
    name: ClassVar[str] = "activation"
    needs_covariance: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _between("activation", self.share, 0.0, 1.0)

    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        self.require(lost is not None)
        return int(np.argmax(np.asarray(lost) <= self.share))  # `lost` ends in 0

    def __str__(self) -> str:
        return f"{self.name}={self.share:g}"


@dataclass(frozen=True)
class Energy(RankRule):
    """The smallest rank whose squared singular values sum to this share of the whole."""

    share: float
    name: ClassVar[str] = "energy"

    def __post_init__(self) -> None:
        _between("energy", self.share, 0.0, 1.0)

    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        # from the small end: the last values would vanish in a running sum that starts with the large ones
        dropped = np.append(np.cumsum(np.square(spectrum.values[::-1]))[::-1], 0.0)
        return int(np.argmax(dropped <= (1.0 - self.share) * dropped[0]))

    def __str__(self) -> str:
        return f"{self.name}={self.share:g}"


@dataclass(frozen=True)
class Rho(RankRule):
    """This share of all singular values, rounded down, at least one (LASER's rho)."""

    share: float
    name: ClassVar[str] = "rho"

    def __post_init__(self) -> None:
        _between("rho", self.share, 0.0, 1.0)

    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        return max(1, math.floor(self.share * len(spectrum.values) + 1e-9))  # 0.29 · 100 is 28.999999999999996

    def __str__(self) -> str:
        return f"{self.name}={self.share:g}"


@dataclass(frozen=True)
class Fixed(RankRule):
    """This rank."""

    count: int
    name: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise UsageError(f"rank rule rank={self.count}: a rank is at least 1")

    def rank(self, spectrum: Spectrum, bulk: Bulk, lost: FloatArray | None = None) -> int:
        p = len(spectrum.values)
        if self.count > p:
            rows, cols = spectrum.shape
            raise UsageError(f"rank rule rank={self.count}: a {rows}x{cols} matrix has rank {p} at most")
        return self.count

    def __str__(self) -> str:
        return f"{self.name}={self.count}"


_PLAIN: dict[str, RankRule] = {rule.name: rule for rule in (MarchenkoPastur(), GavishDonoho(), LaserRmt())}
_SHARES = {rule.name: rule for rule in (Activation, Energy, Rho)}
SPELLINGS = "mp, gavish-donoho, laserrmt, activation=0.01, energy=0.99, rho=0.1 or rank=512"


def parse_rule(text: str) -> RankRule:
    """Read one of SPELLINGS, with any number. Raises UsageError for anything else."""
    name, equals, value = text.strip().partition("=")
    try:
        if not equals and name in _PLAIN:
            return _PLAIN[name]
        if equals and name in _SHARES:
            return _SHARES[name](float(value))
        if equals and name == Fixed.name:
            return Fixed(int(value))
    except ValueError:
        pass
    raise UsageError(f"rank rule {text!r} is not one of {SPELLINGS}")


def _between(name: str, value: float, low: float, high: float) -> None:
    if not low < value < high:
        raise UsageError(f"rank rule {name}={value:g}: the share lies between {low:g} and {high:g}")
