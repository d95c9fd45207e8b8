"""One matrix at a time, or on a GPU some: read, decomposed in the norm that was asked for, and told of."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...inference.calibrate import Calibration
from ...layouts.checkpoint import Checkpoint, located
from ...layouts.hf import HF
from ...linalg.output import Covariance
from ...linalg.spectrum import Spectrum
from ...names import Slot
from . import report as pages
from .figures import OUTPUT, Report
from .method import Analysis, Options, analyse, look, report_of, scan, spectrum_in_norm
from .together import Together, fits

Row = dict[str, Any]


class Worker:
    """Reads and decomposes matrices, one at a time whatever the number of threads: that bounds the memory."""

    def __init__(self, source: Checkpoint, method: Options, device: torch.device, calibration: Calibration | None):
        self.source, self.method, self.device, self.calibration = source, method, device, calibration
        self.turn = threading.Lock()
        self._together: Together | None = None

    def expect(self, slots: Iterable[Slot]) -> None:
        """That these will be asked for, each once, about in this order."""
        if self.calibration is None and fits(self.method, self.device):
            self._together = Together(self.source, slots, self.device)

    def analyse(self, slot: Slot) -> Analysis:
        """Raises SpectrumError, which names file and tensor, for NaN or Inf."""
        with located(self.source, slot):
            if self._together is not None:
                return Analysis(self._together.take(slot, self.weight))
            covariance = self.covariance(slot)  # a layer is in memory for it: the matrix comes after
            return analyse(self.weight(slot), self.method, covariance)

    def spectrum(self, slot: Slot) -> Spectrum:
        """Values alone, in the norm that was asked for. Raises as `analyse`."""
        with located(self.source, slot):
            if self._together is not None:
                return self._together.take(slot, self.weight)
            covariance = self.covariance(slot)
            return spectrum_in_norm(self.weight(slot), self.method, covariance)

    def scan(self, slot: Slot) -> Report:
        """Figures alone: with a text in full, without it the cheapest way."""
        with located(self.source, slot):
            if self._together is not None:
                return report_of(self._together.take(slot, self.weight), self.method)
            covariance = self.covariance(slot)
            if covariance is None:
                return scan(self.weight(slot), self.method)
            if self.method.norm == OUTPUT:
                return look(self.weight(slot), self.method, covariance)
        analysis = self.analyse(slot)
        return analysis.report(self.rank(slot, analysis))

    def rank(self, slot: Slot, analysis: Analysis) -> int:
        """By the rule. Raises as Analysis.rank."""
        with located(self.source, slot):
            return analysis.rank(self.method.rank_rule)

    def row(self, slot: Slot, report: Report) -> Row:
        """The report's row, with what the whole model knows of the matrix."""
        return pages.row(slot, HF.piece(slot, self.source.config).name, report, self.tokens(slot))

    def weight(self, slot: Slot) -> Tensor:
        return self.source.read(slot).to(self.device)

    def covariance(self, slot: Slot) -> Covariance | None:
        return self.calibration.covariance(slot) if self.calibration else None

    def tokens(self, slot: Slot) -> int | None:
        """That calibrated it, once they have."""
        return self.calibration.tokens[slot] if self.calibration else None
