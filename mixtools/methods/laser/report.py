"""laser-report.json, .csv and .html: what was found in each matrix and what was kept of it.

Nothing here knows the time or the machine: the same run gives the same bytes. The page needs nothing but itself.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...linalg.bulk import singular_value_density
from ...linalg.spectrum import FloatArray
from ...linalg.weighted import STARVED
from ...names import Slot
from ...pages import LEAST, Cell, csv_text, heat_map, render
from ...version import __version__
from .figures import OUTPUT, WEIGHTS, Report

NAME = "laser-report"
TEMPLATE = Path(__file__).with_name("report.html")
BINS = 64
SHOWN = 12  # spectra drawn, and curves
_WIDTH, _HEIGHT, _FOOT, _HEAD = 420, 210, 24, 62  # of a drawing, in its own units; the page shrinks them by a quarter
_DECADES = 5  # of loss that are drawn, down to LEAST
_MARKS = (
    ("edge", "edge", "MP edge"), ("gavish_donoho", "gavish", "Gavish-Donoho"),
    ("laserrmt_threshold", "laserrmt", "laserrmt"), ("smallest_kept", "kept", "kept from here"),
)  # fmt: skip
_COLUMNS = (
    "tensor", "layer", "expert", "target", "rows", "columns", "rank", "of", "share", "energy", "snr_laserrmt", "snr_mp",
    "sigma", "edge", "gavish_donoho", "laserrmt_threshold", "norm", "damping", "layer_error", "tokens", "break_even",
    "delta_nll", "delta_nll_stderr", "accepted", "already_low_rank", "note",
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
    # those that no token reached have the next remark to themselves
    if starved := [row for row in rows if row["starved"] and (norm != OUTPUT or row["norm"] == OUTPUT)]:
        fewest = min(starved, key=lambda row: int(row["tokens"]))
        weighted = any(row["norm"] == OUTPUT for row in starved)
        found.append(
            f"{_matrices(starved)} saw fewer calibration tokens than there are directions (fewest {fewest['tokens']}, "
            f"{fewest['tensor']}): their layer errors look smaller than they are"
            f"{f', though damped {STARVED:g} times as much' if weighted else ''}; take a longer text, or more --samples"
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
        f"{NAME}.csv": csv_text(_COLUMNS, _lines(report["matrices"])).encode(),
        f"{NAME}.html": html(report).encode(),
    }


def _lines(rows: Sequence[Row]) -> Iterator[Row]:
    """For a spreadsheet: single figures only."""
    return ({**row, "rows": row["shape"][0], "columns": row["shape"][1]} for row in rows)


# --- the page ---


def html(report: Mapping[str, Any]) -> str:
    """The page."""
    rows, options = report["matrices"], report["laser"]
    drawn = by_loss(rows)
    return render(
        TEMPLATE,
        report=report,
        options=options,
        rows=[{**dict.fromkeys(_COLUMNS), **row} for row in rows],
        measured=measured_in(rows),
        search=report.get("search"),
        cards=by_target(rows),
        maps=heat_maps(rows),
        spectra=[draw(row) for row in chosen(rows)],
        curves=[draw_curves(row) for row in chosen(drawn)],
        could_be_drawn=len(drawn),
        choices=rank_choices(rows),
        weighted=options["norm"] == OUTPUT,
        damped=any(row["damping"] not in (None, options.get("damping")) for row in rows),
    )


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Of many matrices the ones to draw, spread evenly from the first to the last."""
    count = min(len(rows), SHOWN)
    return [rows[round(i * (len(rows) - 1) / max(1, count - 1))] for i in range(count)]


def by_loss(rows: Sequence[Row]) -> list[Row]:
    """From the one that loses most; without those that a budget leaves whole, unless there are no others."""
    reduced, measured = [row for row in rows if row["rank"] < row["of"]] or rows, measured_in(rows)
    return sorted(reduced, key=lambda row: -(lost(row, row["norm"], measured) or 0.0))


# --- losses ---


def measured_in(rows: Sequence[Row]) -> str:
    """What losses are told of: the output's energy where a text gave it."""
    return OUTPUT if any(row["layer_error"] is not None for row in rows) else WEIGHTS


def lost(row: Row, best: str, measured: str, rank: int | None = None) -> float | None:
    """Share of the energy that a rank, or the kept one, loses, best in either norm; None where that is not known.

    Of other ranks and norms read off a curve: between two of its points along a straight line on a log scale.
    """
    rank = row["rank"] if rank is None else rank
    if best == row["norm"] and rank == row["rank"]:
        exact = max(0.0, 1.0 - row["energy"]) if measured == WEIGHTS else row["layer_error"]
        return None if exact is None else float(exact)
    curve, ranks = row["curves"].get(best, {}).get(measured), row["curves"]["ranks"]
    if curve is None:
        return None
    after = bisect_left(ranks, rank)
    if ranks[after] == rank:
        return float(curve[after])
    high, low = float(curve[after - 1]), float(curve[after])
    part = (rank - ranks[after - 1]) / (ranks[after] - ranks[after - 1])
    return float(high ** (1 - part) * low**part) if low > 0 else high * (1 - part)


def by_target(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What the kept ranks lose, a card for each target, with a bar for either norm as far as it is known."""
    measured, cards = measured_in(rows), []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        ranks = sorted(row["rank"] for row in mine if row["rank"] < row["of"])
        cards.append({
            "target": target, "matrices": len(mine), "of": mine[0]["of"], "whole": len(mine) - len(ranks),
            "ranks": ranks and (f"{ranks[0]}" if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}"),
            "bars": [bar for best in (OUTPUT, WEIGHTS) if (bar := _bar(mine, best, measured))],
            "weights_lost": sum(1.0 - row["energy"] for row in mine) / len(mine),
            "starved": sum(bool(row["starved"] and row["tokens"]) for row in mine),
            "unseen": sum(row["layer_error"] is None for row in mine) if measured == OUTPUT else 0,
        })  # fmt: skip
    bars = [bar for card in cards for bar in card["bars"]]
    most = max([LEAST, *(bar["mean"] for bar in bars)])
    for bar in bars:
        bar["width"] = round(100 * bar["mean"] / most, 2)
    return cards


def _bar(rows: Sequence[Row], best: str, measured: str) -> dict[str, Any] | None:
    known = [(share, row) for row in rows if (share := lost(row, best, measured)) is not None]
    worst, where = max(known, key=lambda pair: pair[0], default=(0.0, None))
    if where is None:
        return None
    return {"best": best, "mean": sum(share for share, _ in known) / len(known), "worst": worst, "where": where}


def rank_choices(rows: Sequence[Row]) -> dict[str, Any]:
    """What each rule would keep, in either norm, a column each; its size as factors, and what it loses on average."""
    every = ((norm, rule) for row in rows for norm, ranks in row["choices"].items() for rule in ranks)
    columns = list(dict.fromkeys(every))
    columns.sort(key=lambda column: column[0] == OUTPUT)
    measured, sizes, losses = measured_in(rows), [], []
    for norm, rule in columns:
        know = [(row, ranks[rule]) for row in rows if rule in (ranks := row["choices"].get(norm, {}))]
        whole = sum(row["shape"][0] * row["shape"][1] for row, _ in know)
        sizes.append(sum(_kept_numbers({**row, "rank": rank}) for row, rank in know) / whole)
        shares = [share for row, rank in know if (share := lost(row, norm, measured, rank)) is not None]
        losses.append(sum(shares) / len(shares) if shares else None)
    kept = [share for row in rows if (share := lost(row, row["norm"], measured)) is not None]
    return {
        "columns": columns, "norms": Counter(norm for norm, _ in columns), "sizes": sizes, "losses": losses,
        "kept_loss": sum(kept) / len(kept) if kept else None,
        "lines": [(row, [row["choices"].get(norm, {}).get(rule) for norm, rule in columns]) for row in rows],
    }  # fmt: skip


# --- drawings ---


def heat_maps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Of each target, the share of the rank that is kept, where it differs, and the loss, as far as it is drawn."""
    measured, maps = measured_in(rows), []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        losses = [share if (share := lost(row, row["norm"], measured) or 0.0) >= LEAST else None for row in mine]
        if len({row["share"] for row in rows}) > 1:
            maps.append(_map([(row, row["share"]) for row in mine]))
        if any(losses):
            maps.append(_map(list(zip(mine, losses, strict=True)), of_loss=True))
    return maps


def _map(found: Sequence[tuple[Row, float | None]], *, of_loss: bool = False) -> dict[str, Any]:
    """Of one target, experts from top to bottom: of 5 points of rank at least, or of a factor of 3 of loss."""
    experts = sorted({_line(row) for row, _ in found})
    return heat_map(
        [Cell(row["layer"], _line(row), share, row) for row, share in found],
        {expert: "" if expert < 0 else f"e{expert}" for expert in experts},
        kind="loss" if of_loss else "rank", target=found[0][0]["target"],
        logarithmic=of_loss, span=math.log(3) if of_loss else 0.05,
    )  # fmt: skip


def _line(row: Row) -> int:
    return -1 if row["expert"] is None else int(row["expert"])


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
    return {
        "row": row, "width": _WIDTH, "height": _HEIGHT, "floor": floor, "bars": bars, "marks": _marks(row, high),
        "high": high, "law": " ".join(points) if law.any() else "", "beyond": bins["largest"] > high * (1 + 1e-9),
    }  # fmt: skip


def _marks(row: Row, high: float) -> list[dict[str, Any]]:
    """Thresholds from left to right, each label in a line of its own: the line of a mark begins at its label."""
    texts = {kind: text for _, kind, text in _MARKS}
    if row["norm"] == OUTPUT:  # other directions are kept than these values have
        texts["kept"] = f"rank {row['rank']}"
    marks: list[dict[str, Any]] = [
        {"x": round(_WIDTH * row[name] / high, 1), "kind": kind, "text": texts[kind]} for name, kind, _ in _MARKS
        if row[name] is not None and 0 < row[name] <= high and (kind != "kept" or row["rank"] < row["of"])
    ]  # fmt: skip
    ends = 0.6 * _WIDTH  # from here on, labels end at their line; none crosses the line of the next one
    marks.sort(key=lambda mark: (mark["x"] > ends, -mark["x"] if mark["x"] > ends else mark["x"]))
    for number, mark in enumerate(marks):
        anchor, shift = ("end", -3) if mark["x"] > ends else ("start", 3)
        mark |= {"y": 12 + 15 * number, "anchor": anchor, "label_x": mark["x"] + shift}
    return marks


_LINES = ((WEIGHTS, WEIGHTS), (WEIGHTS, OUTPUT), (OUTPUT, OUTPUT))  # best in, measured in
_POINTS = 128  # of a curve, about
_AXIS, _TOP = 64, 8  # left of a curve and above it


def draw_curves(row: Row) -> dict[str, Any]:
    """What each rank loses, on a log scale: of the weights' energy and of the output's, best in either norm."""
    curves, floor = row["curves"], _HEIGHT - _FOOT
    lines = [
        {"kind": f"{best}-{measured}", "path": _path(curves["ranks"], curves[best][measured], floor)}
        for best, measured in _LINES if measured in curves.get(best, {})
    ]  # fmt: skip
    step = (floor - _TOP) / _DECADES
    grid = [{"y": round(_TOP + step * i, 1), "text": f"{100 * 10.0**-i:g} %"} for i in range(_DECADES + 1)]
    x = round(_AXIS + (_WIDTH - _AXIS) * row["rank"] / row["of"], 1)
    at = {"start": x < _AXIS + 48, "end": x > _WIDTH - 66}  # its label would lie over that end's
    return {
        "row": row, "width": _WIDTH, "height": _HEIGHT, "floor": floor, "left": _AXIS, "top": _TOP, "lines": lines,
        "grid": grid, "x": x, "at": at, "lost": lost(row, row["norm"], OUTPUT),
        "lost_otherwise": lost(row, WEIGHTS, OUTPUT) if row["norm"] == OUTPUT else None,
    }  # fmt: skip


def _path(ranks: Sequence[int], curve: Sequence[float], floor: float) -> str:
    """Down to the last decade that is drawn: along the floor it would look as if the loss stayed there."""
    width, points = _WIDTH - _AXIS, list[tuple[float, float]]()
    chosen = sorted({*range(0, len(ranks), max(1, len(ranks) // _POINTS)), len(ranks) - 1})
    for i in chosen:
        down = -math.log10(max(curve[i], 10.0 ** (-2 * _DECADES)))
        x, y = _AXIS + width * ranks[i] / ranks[-1], _TOP + (floor - _TOP) * down / _DECADES
        if y > floor:
            before_x, before_y = points[-1] if points else (x, 0.0)
            points.append((before_x + (x - before_x) * (floor - before_y) / (y - before_y), floor))
            break
        points.append((x, y))
    return "M" + " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
