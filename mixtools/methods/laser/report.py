"""laser-report.json, .csv and .html: what was found in each matrix and what was kept of it.

Nothing here knows the time or the machine: the same run gives the same bytes. The page needs nothing but itself.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...linalg.bulk import singular_value_density
from ...linalg.spectrum import FloatArray
from ...linalg.weighted import STARVED
from ...names import Slot
from ...version import __version__
from .figures import OUTPUT, WEIGHTS, Report

NAME = "laser-report"
TEMPLATE = Path(__file__).with_name("report.html")
BINS = 64
SHOWN = 12  # spectra drawn
_WIDTH, _HEIGHT, _FOOT, _HEAD = 420, 180, 20, 40  # of a drawn spectrum, in its own units
_CELL = 22
_MARKS = (
    ("edge", "MP edge"), ("gavish_donoho", "Gavish-Donoho"), ("laserrmt_threshold", "laserrmt"),
    ("smallest_kept", "kept from here"),
)  # fmt: skip
_COLUMNS = (
    "tensor", "layer", "expert", "target", "rows", "columns", "rank", "of", "share", "energy", "snr_laserrmt", "snr_mp",
    "sigma", "edge", "gavish_donoho", "laserrmt_threshold", "norm", "damping", "layer_error", "tokens", "break_even",
    "delta_nll",
    "delta_nll_stderr", "accepted", "already_low_rank", "note",
)  # fmt: skip
Row = dict[str, Any]


def row(slot: Slot, tensor: str, report: Report, tokens: int | None = None) -> Row:
    """One matrix, ready for JSON. `tensor`: its name in the output; `tokens`: how many calibrated it."""
    place = {"tensor": tensor, "layer": slot.layer, "expert": slot.expert, "target": slot.role.value}
    found = {**place, **report.document(spectra=False), "tokens": tokens, "histogram": histogram(report.spectrum)}
    found["smallest_kept"] = float(report.spectrum[report.rank - 1]) if report.rank else None
    found["already_low_rank"] = bool(found["already_low_rank"])
    found["starved"] = None if tokens is None else tokens < report.of
    return found


def histogram(values: FloatArray) -> dict[str, Any]:
    """Counts of singular values from 0 in BINS bins; those far above the rest are in the last one, and named."""
    top = float(np.quantile(values, 0.99)) * 1.6 if len(values) > BINS else float(values[0])
    high = min(float(values[0]), top) or 1.0
    counts, _ = np.histogram(np.minimum(values, high), BINS, (0.0, high))
    return {"high": high, "largest": float(values[0]), "smallest": float(values[-1]), "counts": counts.tolist()}


def document(layout: str, told: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """The whole report. `told`: the options, and where there were any, calibration and search."""
    before = sum(row["shape"][0] * row["shape"][1] for row in rows)
    factors = sum(_kept_numbers(row) for row in rows)
    return {
        "mixtools": __version__,
        "source": layout,
        **told,
        "summary": {
            "matrices": len(rows),
            "parameters": before,
            "parameters_as_factors": factors,
            "kept_whole": sum(row["rank"] == row["of"] for row in rows),
        },
        "remarks": remarks(rows, told["laser"]["norm"], told["laser"].get("damping")),
        "matrices": list(rows),
    }


def _kept_numbers(row: Row) -> int:
    """As factors where that is smaller."""
    rows, columns = row["shape"]
    return int(min(rows * columns, row["rank"] * (rows + columns)))


def remarks(rows: Sequence[Row], norm: str = WEIGHTS, damping: float | None = None) -> list[str]:
    """What a user should know before trusting the output. `norm`, `damping`: those that were asked for."""
    found = []
    if truncated := [row for row in rows if row["already_low_rank"]]:
        found.append(f"{_matrices(truncated)} had no noise left to cut: {truncated[0]['note']}")
    if empty := [row for row in rows if row["rank"] == 0 and not row["already_low_rank"]]:
        found.append(f"{_matrices(empty)} kept nothing: by this rule all of it is noise, and its output becomes zero")
    if starved := [row for row in rows if row["starved"]]:
        fewest = min(starved, key=lambda row: int(row["tokens"]))
        weighted = any(row["norm"] == OUTPUT for row in starved)
        found.append(
            f"{_matrices(starved)} saw fewer calibration tokens than there are directions (fewest {fewest['tokens']}, "
            f"{fewest['tensor']}){f': damped {STARVED:g} times as much' if weighted else ''}: take a longer text, or "
            "more --samples"
        )
    if norm == OUTPUT and (unseen := [row for row in rows if row["norm"] != OUTPUT]):
        found.append(f"no calibration token came to {_matrices(unseen)}: reduced in the norm of the weights")
    most = (damping or 0.0) * STARVED * 1.001
    if raised := [row for row in rows if (row["damping"] or 0.0) > most]:
        found.append(f"the sums over the inputs of {_matrices(raised)} needed more damping, {raised[0]['damping']:g}")
    return found


def _matrices(rows: Sequence[Row]) -> str:
    return rows[0]["tensor"] if len(rows) == 1 else f"{len(rows)} matrices ({rows[0]['tensor']}, ...)"


FILES = tuple(f"{NAME}.{kind}" for kind in ("json", "csv", "html"))


def documents(report: Mapping[str, Any]) -> dict[str, bytes]:
    """The three files by name."""
    return {
        f"{NAME}.json": (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(),
        f"{NAME}.csv": csv_text(report["matrices"]).encode(),
        f"{NAME}.html": html(report).encode(),
    }


def csv_text(rows: Sequence[Row]) -> str:
    """A line for each matrix, single figures only; what was not measured is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, _COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "rows": row["shape"][0], "columns": row["shape"][1]} for row in rows)
    return out.getvalue()


# --- the page ---


def html(report: Mapping[str, Any]) -> str:
    """The page; what comes from files is escaped by the template."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"sig": _significant, "percent": _percent}
    rows = report["matrices"]
    options = report["laser"]
    return environment.from_string(TEMPLATE.read_text("utf-8")).render(
        report=report,
        options=options,
        rows=[{**dict.fromkeys(_COLUMNS), **row} for row in rows],
        calibrated=any(row["layer_error"] is not None for row in rows),
        search=report.get("search"),
        maps=[heat_map(rows, target) for target in dict.fromkeys(row["target"] for row in rows)],
        spectra=[draw(row) for row in chosen(rows)],
        curves=[draw_curves(row) for row in chosen(rows)],
        choices=rank_choices(rows),
        weighted=options["norm"] == OUTPUT,
    )


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Of many matrices the ones to draw: spread evenly from the one that keeps most to the one that keeps least."""
    if len(rows) <= SHOWN:
        return list(rows)
    ordered = sorted(rows, key=lambda row: (-row["share"], row["tensor"]))
    return [ordered[round(i * (len(ordered) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def heat_map(rows: Sequence[Row], target: str) -> dict[str, Any]:
    """Layers by experts: what share of the ranks was kept, from the least to the most among them."""
    mine = [row for row in rows if row["target"] == target]
    layers = sorted({row["layer"] for row in mine})
    experts = sorted({row["expert"] if row["expert"] is not None else -1 for row in mine})
    shares = [row["share"] for row in mine]
    low, high = min(shares), max(shares)
    line_of = {expert: _CELL * i for i, expert in enumerate(experts)}
    cells = [
        {"x": 30 + _CELL * layers.index(row["layer"]), "y": line_of[-1 if row["expert"] is None else row["expert"]],
         "strength": round((row["share"] - low) / (high - low), 3) if high > low else 0.5,
         "title": f"{row['tensor']}: rank {row['rank']} of {row['of']}, {_percent(row['energy'])} of the energy"}
        for row in mine
    ]  # fmt: skip
    return {
        "target": target, "cells": cells, "size": _CELL - 2, "low": low, "high": high,
        "width": 30 + _CELL * len(layers), "height": _CELL * len(experts) + 16,
        "columns": [{"x": 30 + _CELL * i + 10, "text": layer} for i, layer in enumerate(layers)],
        "lines": [{"y": y + 14, "text": "" if expert < 0 else f"e{expert}"} for expert, y in line_of.items()],
    }  # fmt: skip


def draw(row: Row) -> dict[str, Any]:
    """A spectrum: bars, the law of Marchenko and Pastur at the estimated noise level, and the thresholds."""
    bins = row["histogram"]
    high, counts = bins["high"], bins["counts"]
    step, floor = _WIDTH / len(counts), _HEIGHT - _FOOT
    x = np.linspace(0, high, 240)
    law = singular_value_density(x, tuple(row["shape"]), row["sigma"]) if row["sigma"] > 0 else np.zeros_like(x)
    law = law * row["of"] * high / len(counts)  # as counts of a bin
    # the tallest bar decides, unless the law, narrow around a level of rounding, would leave the picture
    tallest = max(1.0, float(max(counts)))
    scale = (floor - _HEAD) / tallest
    points = [
        f"{_WIDTH * at / high:.1f},{max(0.0, floor - scale * value):.1f}"
        for at, value in zip(x.tolist(), law.tolist(), strict=True)
    ]
    bars = [
        {"x": round(i * step, 1), "y": round(floor - scale * n, 1), "width": round(max(step - 0.8, 0.5), 1),
         "height": round(scale * n, 1), "title": f"{n} values from {high * i / len(counts):.4g} on"}
        for i, n in enumerate(counts) if n
    ]  # fmt: skip
    marks = [
        {"x": round(_WIDTH * row[name] / high, 1), "text": text, "value": row[name]}
        for name, text in _MARKS if row[name] is not None and 0 < row[name] <= high
    ]  # fmt: skip
    marks.sort(key=lambda mark: mark["x"])
    for number, mark in enumerate(marks):
        mark["y"] = 9 + 10 * (number % 4)
        mark["anchor"] = "end" if mark["x"] > 0.6 * _WIDTH else "start"
        mark["label_x"] = mark["x"] + (-3 if mark["anchor"] == "end" else 3)
    return {
        "row": row, "width": _WIDTH, "height": _HEIGHT, "floor": floor, "bars": bars, "marks": marks, "high": high,
        "law": " ".join(points) if law.any() else "", "beyond": bins["largest"] > high * (1 + 1e-9),
    }  # fmt: skip


_LINES = (("weights", "weights"), ("weights", "output"), ("output", "output"))  # best in, measured in
_DECADES = 5  # of error that are drawn


def draw_curves(row: Row) -> dict[str, Any]:
    """What each rank loses, on a log scale: of the weights' energy and of the output's, best in either norm."""
    curves, floor = row["curves"], _HEIGHT - _FOOT
    ranks = curves["ranks"]

    def place(rank: int, share: float) -> str:
        down = min(_DECADES, -math.log10(max(share, 10.0**-_DECADES)))
        return f"{_WIDTH * rank / row['of']:.1f},{floor * down / _DECADES:.1f}"

    lines = [
        {"best": best, "measured": measured,
         "points": " ".join(place(*pair) for pair in zip(ranks, curves[best][measured], strict=True))}
        for best, measured in _LINES if measured in curves.get(best, {})
    ]  # fmt: skip
    grid = [{"y": round(floor * i / _DECADES, 1), "text": f"{10.0**-i:g}"} for i in range(1, _DECADES)]
    x = round(_WIDTH * row["rank"] / row["of"], 1)
    return {"row": row, "width": _WIDTH, "height": _HEIGHT, "floor": floor, "lines": lines, "grid": grid, "x": x}


def rank_choices(rows: Sequence[Row]) -> dict[str, Any]:
    """What each rule would keep, in either norm: a column each, in the order of the first row that knows it."""
    every = ((norm, rule) for row in rows for norm, ranks in row["choices"].items() for rule in ranks)
    columns = list(dict.fromkeys(every))
    columns.sort(key=lambda column: column[0] == OUTPUT)
    lines = [(row["tensor"], [row["choices"].get(norm, {}).get(rule) for norm, rule in columns]) for row in rows]
    return {"columns": columns, "lines": lines}


def _significant(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"
