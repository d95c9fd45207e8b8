"""Where a run's time goes, by stage."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """`seconds` by stage; a stage within another counts for itself alone.

    On a CUDA `device` a stage ends when what it asked of the card is done.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._card = device if device is not None and device.type == "cuda" else None
        self.seconds: dict[str, float] = {}
        self._stages: list[str] = []
        self._since = 0.0

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        self._count()
        self._stages.append(stage)
        try:
            yield
        finally:
            self._count()
            self._stages.pop()

    def _count(self) -> None:
        """What has gone by since the last change belongs to the innermost stage."""
        if self._card is not None:
            torch.cuda.synchronize(self._card)
        now = time.perf_counter()
        if self._stages:
            self.seconds[self._stages[-1]] = self.seconds.get(self._stages[-1], 0.0) + now - self._since
        self._since = now
