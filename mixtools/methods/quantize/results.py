"""What quantize answers: the table of files, as a document and as lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...machine import human_bytes, human_threads, human_time
from ...verbs import Result

BESIDE_WEIGHTS = 2_500_000_000  # of memory, when a model runs: the allowance of the cards that users know


class Row(NamedTuple):
    """A file; of a split one the first part's name, and the bytes of all."""

    file: str
    type: str
    bytes: int
    bits_per_weight: float
    parts: int = 1

    def document(self) -> dict[str, Any]:
        return {
            "file": self.file, "type": self.type, "bytes": self.bytes,
            "bits_per_weight": round(self.bits_per_weight, 4), "max_ram_bytes": self.bytes + BESIDE_WEIGHTS,
            **({"parts": self.parts} if self.parts > 1 else {}),
        }  # fmt: skip


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Type, bits per weight, size and the memory that running takes, as on a model card."""
    names = [row.file + (f" (of {row.parts})" if row.parts > 1 else "") for row in rows]
    width = max(map(len, [*names, "file"]))
    yield f"{'file':{width}}  {'type':9} {'bits':>6} {'size':>10} {'max RAM':>10}"
    for row, name in zip(rows, names, strict=True):
        size, ram = human_bytes(row.bytes), human_bytes(row.bytes + BESIDE_WEIGHTS)
        yield f"{name:{width}}  {row.type:9} {row.bits_per_weight:6.3f} {size:>10} {ram:>10}"


@dataclass(frozen=True)
class Quantized(Result):
    """Files that were written. `resumed_bytes`: those that an interrupted run had written."""

    output: Path
    source: Path
    rows: tuple[Row, ...]
    tensors: int
    bytes: int
    resumed_bytes: int
    missing: tuple[str, ...]
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()
    folder: bool = False  # the output is all of the folder
    said: tuple[str, ...] = ()  # of a calibrated run, on what it did

    @property
    def document(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "files": [row.document() for row in self.rows], "tensors": self.tensors,
            "bytes": self.bytes, "resumed_bytes": self.resumed_bytes, "missing": list(self.missing),
            "notes": list(self.notes), "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield from table(self.rows)
        peak = human_bytes(self.peak_memory_bytes)
        yield f"wrote {human_bytes(self.bytes)} in {human_time(self.seconds)} (peak memory {peak})"
        if self.resumed_bytes:
            yield f"{human_bytes(self.resumed_bytes)} were there already, from the interrupted run"
        yield from self.said
        yield from lacking(self.missing)
        made = self.output if self.folder else self.output / self.rows[0].file
        yield f"Check it with: mixtools check {made} --against {self.source}"


def lacking(missing: Iterable[str]) -> Iterator[str]:
    if missing:
        yield "note: the source has no tokenizer; the files have none either, and other programs take ids alone"


@dataclass(frozen=True)
class Planned(Result):
    """Of a dry run: nothing was written. `seconds` is None where there is nothing to measure with."""

    output: Path
    rows: tuple[Row, ...]
    missing: tuple[str, ...]
    jobs: int
    peak_memory_bytes: int
    disk_free_bytes: int
    seconds: float | None
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        return {
            "dry_run": True, "output": str(self.output), "files": [row.document() for row in self.rows],
            "bytes": sum(row.bytes for row in self.rows), "missing": list(self.missing), "jobs": self.jobs,
            "notes": list(self.notes), "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
            "disk_free_bytes": self.disk_free_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield from table(self.rows)
        total, free = sum(row.bytes for row in self.rows), self.disk_free_bytes
        yield f"would write {human_bytes(total)} ({human_bytes(free)} free)"
        about = f"; about {human_time(self.seconds)}" if self.seconds is not None else ""
        yield f"memory at most {human_bytes(self.peak_memory_bytes)} with {human_threads(self.jobs)}{about}"
        yield from lacking(self.missing)
