"""What laser and spectrum answer, as documents and as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...machine import human_bytes, human_time
from ...verbs import Result

SHOWN = 20  # lines of the table on the terminal


@dataclass(frozen=True)
class Reduced(Result):
    """`report` is laser-report.json: options, remarks, and a row for each matrix."""

    output: Path
    source: Path
    report: Mapping[str, Any]
    done: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        return {"output": str(self.output), **self.report, **self.done}

    def lines(self) -> Iterator[str]:
        from ...job import told

        document = self.document
        if document["matrices"]:
            yield from _table(document["matrices"])
        yield from (f"note: {remark}" for remark in document["remarks"])
        if "budget" in document:
            budget = document["budget"]
            size, before = human_bytes(budget["bytes"]), human_bytes(budget["of_bytes"])
            yield (
                f"as factors {size} of {before} ({100 * budget['share']:.2f}%), {budget['whole']} of "
                f"{len(document['matrices'])} matrices whole; mean error {100 * budget['mean_error']:.3f}%"
            )
        if "search" in document:
            figure, chosen = document["search"]["held_out"], document["search"]
            yield f"accepted {chosen['accepted']} of {len(chosen['candidates'])} candidates"
            ratio = f"ln ratio {figure['ln_ratio']:+.5f} ± {figure['stderr']:.5f}"
            before, after = figure["perplexity_before"], figure["perplexity_after"]
            yield f"perplexity of the held-out text: {before:.4f} -> {after:.4f} ({ratio})"
        yield from told(document)
        yield f"report: {self.output / 'laser-report.html'}"
        if document["laser"]["factored"]:
            yield f"Other programs need it dense: mixtools convert to-hf {self.output} DENSE"
        yield f"Check it with: mixtools check {self.output} --against {self.source}"


@dataclass(frozen=True)
class Seen(Result):
    """Spectra: `report` as `laser` would write it, nothing reduced. `output`: where it lies, if anywhere."""

    output: Path | None
    report: Mapping[str, Any]
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        return {
            "output": None if self.output is None else str(self.output), **self.report,
            "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield from _table(self.report["matrices"])
        yield from (f"note: {remark}" for remark in self.report["remarks"])
        if self.output is not None:
            yield f"report: {self.output / 'laser-report.html'}"


def tell_forecast(document: dict[str, Any]) -> Iterator[str]:
    targets = ", ".join(f"{n} {name}" for name, n in document["targets"].items())
    most = "at most " if document["laser"]["factored"] else ""
    written = f", and write {most}{human_bytes(document['bytes'])}" if document["bytes"] else ""
    options = document["laser"]
    how = options["rank_rule"] or f"a budget of {options['budget']:g} of their bytes"
    norm = ", in the output's norm" if options["norm"] == "output" else ""
    yield f"would decompose {document['matrices']} matrices ({targets}) by {how}{norm}{written}"
    memory, seconds = human_bytes(document["peak_memory_bytes"]), human_time(document["seconds"])
    yield f"memory at most {memory}; about {seconds} of arithmetic"
    if document["search"]:
        yield f"a search ({document['search']}) comes first: its passes over the text are not counted here"
    if "calibration" in document:
        passes = document["calibration_passes"]
        often = {1: "", 2: " twice: for the ranks, then for the weights"}[passes]
        yield f"before that, {document['calibration']['tokens']} calibration tokens go through the layers{often}"


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    measured = any(row["layer_error"] is not None for row in rows)
    width = max(len(row["tensor"]) for row in rows[:SHOWN])
    yield f"{'tensor':<{width}}  {'rank':>11}  {'energy':>8}  {'SNR mp':>8}" + ("  layer error" if measured else "")
    for row in rows[:SHOWN]:
        snr = "-" if row["snr_mp"] is None else f"{row['snr_mp']:.3g}"
        line = f"{row['tensor']:<{width}}  {row['rank']:>5} /{row['of']:>5}  {100 * row['energy']:>7.2f}%  {snr:>8}"
        yield line + (f"  {100 * (row['layer_error'] or 0):>10.3f}%" if measured else "")
    if len(rows) > SHOWN:
        yield f"... and {len(rows) - SHOWN} more in the report"
