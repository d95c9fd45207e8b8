"""What laser and spectrum answer, as documents and as lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...machine import human_bytes, human_time
from ...verbs import Result

SHOWN = 20  # matrices in the table on the terminal; of more, a line for each target


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
            yield from _table(document["matrices"], "each is in the report")
        yield from (f"note: {remark}" for remark in document["remarks"])
        if "budget" in document:
            yield from _budget(document)
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
        where = "each is in the report" if self.output else "--out DIR writes a report on each"
        yield from _table(self.report["matrices"], where)
        yield from (f"note: {remark}" for remark in self.report["remarks"])
        if self.output is not None:
            yield f"report: {self.output / 'laser-report.html'}"


def tell_forecast(document: dict[str, Any]) -> Iterator[str]:
    targets = ", ".join(f"{n} {name}" for name, n in document["targets"].items())
    most = "at most " if document["laser"]["factored"] else ""
    written = f", and write {most}{human_bytes(document['bytes'])}" if document["bytes"] else ""
    options = document["laser"]
    how = f"by {options['rank_rule']}"
    if document["search"]:  # it tries rules of its own
        how = f"for --search {document['search']}"
    elif "budget" in options:
        how = f"within {100 * options['budget']:g}% of their bytes"
    norm = ", in the output's norm" if options["norm"] == "output" else ""
    yield f"would decompose {document['matrices']} matrices ({targets}) {how}{norm}{written}"
    memory, seconds = human_bytes(document["peak_memory_bytes"]), human_time(max(document["seconds"], 0.1))
    yield f"memory at most {memory}; about {seconds} of arithmetic"
    if document["search"]:
        yield f"a search ({document['search']}) comes first: its passes over the text are not counted here"
    if "calibration" in document:
        passes = document["calibration_passes"]
        often = {1: "", 2: " twice: for the ranks, then for the weights"}[passes]
        yield f"before that, {document['calibration']['tokens']:,} calibration tokens go through the layers{often}"


def _budget(document: Mapping[str, Any]) -> Iterator[str]:
    budget, options = document["budget"], document["laser"]
    size, before = human_bytes(budget["bytes"]), human_bytes(budget["of_bytes"])
    energy = "output's energy, damping counted" if options["norm"] == "output" else "weights' energy"
    yield (
        f"as factors {size} of {before} ({100 * budget['share']:.2f}%), {budget['whole']} of "
        f"{len(document['matrices'])} matrices whole; mean error {_loss(budget['mean_error'])} of the {energy}"
    )
    if not options["factored"]:
        yield "stored dense, as large as before: --factored makes the output smaller"


def _table(rows: Sequence[dict[str, Any]], elsewhere: str) -> Iterator[str]:
    """A line for each matrix, or for each target of many. `elsewhere`: where those are then told one by one."""
    from .figures import OUTPUT, WEIGHTS
    from .report import by_target, lost

    measured = any(row["layer_error"] is not None for row in rows)
    weighted = any(row["norm"] == OUTPUT for row in rows)
    if len(rows) > SHOWN:
        yield from _by_target(by_target(rows), measured, OUTPUT if weighted else WEIGHTS)
        yield f"{len(rows)} matrices in all; {elsewhere}"
        return
    compared = weighted and any(lost(row, WEIGHTS, OUTPUT) is not None for row in rows)
    width = max(len(row["tensor"]) for row in rows)
    told = "" if weighted else f"  {'SNR mp':>8}"  # the output's norm sees no noise
    told += f"  {'layer error':>11}" if measured else ""
    yield f"{'tensor':<{width}}  {'rank':>12}  {'energy':>8}{told}" + ("  in weights' norm" if compared else "")
    for row in rows:
        rank = "whole" if row["rank"] == row["of"] else f"{row['rank']} / {row['of']}"
        told = "" if weighted else f"  {'-' if row['snr_mp'] is None else format(row['snr_mp'], '.3g'):>8}"
        told += f"  {_loss(row['layer_error']):>11}" if measured else ""
        told += f"  {_loss(lost(row, WEIGHTS, OUTPUT)):>16}" if compared else ""
        yield f"{row['tensor']:<{width}}  {rank:>12}  {100 * row['energy']:>7.2f}%{told}"


def _by_target(cards: Sequence[Mapping[str, Any]], measured: bool, norm: str) -> Iterator[str]:
    """Means over the matrices, and the worst of them."""
    from ...pages import label

    compared = any(len(card["bars"]) > 1 for card in cards)
    told = (f"  {'layer error':>11}" if measured else "") + ("  in weights' norm" if compared else "")
    yield f"target  matrices  whole  {'rank':>19}  {'energy':>8}{told}  {'worst loss':>10}"
    for card in cards:
        means = {bar["best"]: bar["mean"] for bar in card["bars"]}
        told = f"  {_loss(means.get(norm)):>11}" if measured else ""
        told += f"  {_loss(means.get('weights')):>16}" if compared else ""
        for bar in card["bars"][:1]:
            told += f"  {_loss(bar['worst']):>10}  {label(bar['where'])}"
        ranks = f"{card['ranks']} / {card['of']}" if card["ranks"] else "-"
        energy = f"{100 * (1 - card['weights_lost']):>7.2f}%"
        yield f"{card['target']:<6}  {card['matrices']:>8}  {card['whole']:>5}  {ranks:>19}  {energy}{told}"


def _loss(share: float | None) -> str:
    from ...pages import loss

    return "-" if share is None else loss(share).replace(" ", "")
