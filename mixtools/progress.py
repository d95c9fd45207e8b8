"""Progress as the workers see it; cli/ draws it, and a caller of the API may take it as a function."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol


class Progress(Protocol):
    """Told of work in units of its own choosing; bytes unless `unit` says otherwise."""

    def start(self, label: str, total: int, unit: str = "B") -> None: ...

    def advance(self, amount: int) -> None: ...

    def finish(self) -> None: ...


class Silent:
    """Shows nothing."""

    def start(self, label: str, total: int, unit: str = "B") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def finish(self) -> None:
        pass


Callback = Callable[[str, int, int, str], None]  # label, done, total, unit


class Calling:
    """Hands each advance to a function, one at a time, whatever thread it comes from."""

    def __init__(self, callback: Callback) -> None:
        self._callback, self._lock = callback, threading.Lock()
        self._label, self._done, self._total, self._unit = "", 0, 0, "B"

    def start(self, label: str, total: int, unit: str = "B") -> None:
        with self._lock:
            self._label, self._done, self._total, self._unit = label, 0, total, unit
            self._callback(label, 0, total, unit)

    def advance(self, amount: int) -> None:
        with self._lock:
            self._done += amount
            self._callback(self._label, self._done, self._total, self._unit)

    def finish(self) -> None:
        pass


def watched(progress: Progress | Callback | None) -> Progress:
    """What the API's `progress` argument stands for: an object, a function, or nobody."""
    if progress is None:
        return Silent()
    return Calling(progress) if callable(progress) else progress
