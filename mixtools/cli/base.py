"""What all commands share: options, printing, progress, errors, sizes, models by name."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError, UsageError
from ..progress import Progress, Silent

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.", show_default=False)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show a traceback on errors.", show_default=False)]
Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, weight file in it, or org/name[@revision].")]
Source = Annotated[str, typer.Argument(metavar="SRC", help="Folder, weight file in it, or org/name[@revision].")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write; it must be new or empty.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Tell sizes, memory, time and disk; write nothing.")]
Resume = Annotated[bool, typer.Option("--resume/--no-resume", help="Continue an interrupted run found in OUT.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint in OUT once the new one is whole.")
]
Jobs = Annotated[int, typer.Option("--jobs", min=1, max=64, help="Threads that read, transform and write.")]
MaxMemory = Annotated[str | None, typer.Option("--max-memory", metavar="SIZE", help="Stay below this, e.g. 16GB.")]
Device = Annotated[str, typer.Option("--device", metavar="auto|cpu|cuda[:N]|mps", help="Where to compute.")]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(text: str, option: str) -> int:
    """Bytes of "800MB", "5GB", "1.5GiB" or "4096". Raises UsageError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?|)b?\s*", text.lower())
    if match is None:
        raise UsageError(f"{option}: {text!r} is not a size; write 800MB, 5GB or 1.5GiB")
    return int(float(match[1]) * (_UNITS | _BINARY)[match[2]])


def max_memory_bytes(text: str | None) -> int | None:
    return None if text is None else parse_size(text, "--max-memory")


def human_bytes(count: float) -> str:
    """Decimal units, as disks and the Hub count them: 93.41 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def find_model(name: str) -> Path:
    """A path that exists, or a model of the Hub, downloaded into huggingface-hub's cache.

    Raises InputError for a path that does not exist and cannot be a Hub name, HubError if the Hub refuses.
    """
    path = Path(name)
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", name) and not path.parent.exists():
        from ..hub import fetch

        return fetch.snapshot(*name.partition("@")[::2])
    raise InputError("does not exist", file=name)


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


def check_device(name: str) -> None:
    """Raises UsageError unless the name has a device's form; whether it is there, torch tells later."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name) is None:
        raise UsageError(f"--device: {name!r} is none of auto, cpu, cuda, cuda:N, mps")


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes."""
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def find_device(name: str) -> torch.device:
    """The torch device of a --device value; "auto" takes CUDA, then MPS, then the CPU.

    Raises UsageError if the name has no device's form or the device is not there.
    """
    import torch

    check_device(name)
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: no {name} here; `mixtools doctor` lists what there is")
    if device.type == "mps" and not mps:
        raise UsageError("--device: no mps here; `mixtools doctor` lists what there is")
    return device


def available_memory() -> int | None:
    """Bytes that this machine can still give (Linux); None where it does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
