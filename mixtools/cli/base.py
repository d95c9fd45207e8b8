"""What all commands share: printing, progress."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..machine import human_bytes, human_time
from ..progress import Progress, Silent
from ..verbs import Result

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", show_default=False)]


class Screen:
    """The only way out: results to stdout, notes and progress to stderr."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def result(self, document: dict[str, Any], lines: Callable[[], Iterable[str]]) -> None:
        """One JSON document, or the same told in lines."""
        if self.as_json:
            print(json.dumps(document, indent=1))
        else:
            for line in lines():
                print(line)

    def tell(self, result: Result) -> None:
        """A verb's answer, its notes first."""
        for note in result.notes:
            self.note(f"note: {note}")
        self.result(result.document, result.lines)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=sys.stderr)

    def progress(self) -> Progress:
        if self.quiet:
            return Silent()
        return DrawnProgress() if sys.stderr.isatty() else LineProgress()


class DrawnProgress:
    """A bar on a terminal: bytes, rate and time left."""

    def __init__(self) -> None:
        self._bar: Bar | None = None
        self._task: TaskID | None = None

    def start(self, label: str, total: int, unit: str = "B") -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        self.finish()
        amount = [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn(), TextColumn(unit)]
        columns = (TextColumn("{task.description}"), BarColumn(), *amount, TimeRemainingColumn())
        self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task(label, total=total)
        self._bar.start()

    def advance(self, amount: int) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.advance(self._task, amount)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class LineProgress:
    """For logs: a line every 15 seconds."""

    INTERVAL = 15.0

    def start(self, label: str, total: int, unit: str = "B") -> None:
        self._label, self._total, self._unit, self._done = label, total, unit, 0
        self._began = self._said = time.monotonic()

    def advance(self, amount: int) -> None:
        self._done += amount
        now = time.monotonic()
        if now - self._said >= self.INTERVAL and self._done:
            self._said = now
            left = (now - self._began) * (self._total - self._done) / self._done
            counts = (human_bytes(n) if self._unit == "B" else str(n) for n in (self._done, self._total))
            unit = "" if self._unit == "B" else f" {self._unit}"
            print(f"{self._label}: {' of '.join(counts)}{unit}, {human_time(left)} left", file=sys.stderr)

    def finish(self) -> None:
        pass
