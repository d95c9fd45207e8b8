"""Progress as the workers see it; cli/ draws it."""

from __future__ import annotations

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
