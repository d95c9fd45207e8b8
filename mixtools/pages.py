"""What the reports of methods share: a page that needs nothing but itself, maps of layers, numbers as a person reads
them, a table for a spreadsheet.

pages.html beside this file holds the parts of a page: its look, a map, a script that sorts tables. Nobody needs the
script to read a page.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .machine import human_bytes, human_time

LEAST = 1e-5  # of a share that is lost: what is less is told as less
_CELL, _LEFT, _FOOT = 22, 30, 16  # of a map, in pixels
Row = Mapping[str, Any]


def render(template: Path, **values: Any) -> str:
    """A page from its template; what comes from files is escaped, and a value that is not given is an error."""
    return str(_environment(template.parent).get_template(template.name).render(**values))


@cache
def _environment(folder: Path) -> Any:
    """It keeps its templates compiled, which takes most of a page's time."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, Path(__file__).parent]), autoescape=True,
        undefined=jinja2.StrictUndefined, trim_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "sig": significant, "percent": percent, "loss": loss, "size": human_bytes, "time": human_time, "label": label,
    }  # fmt: skip
    return environment


def csv_text(columns: Sequence[str], rows: Iterable[Row]) -> str:
    """A line for each row; what it does not know is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


# --- words and numbers ---


def label(row: Row) -> str:
    """Of a matrix, short enough for a heading: a tensor's name is as wide as a drawing."""
    layer = "" if row["layer"] is None else f"layer {row['layer']}, "
    expert = "" if row["expert"] is None else f"expert {row['expert']}, "
    return f"{layer}{expert}{row['target']}"


def significant(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2e}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def loss(value: float | None, least: float = LEAST) -> str:
    """A share as percent to three digits: losses differ by decades, and 0 % is none at all."""
    if value is not None and 0 < value < least:
        return f"< {100 * least:g} %"
    return "–" if value is None else f"{100 * value:.3g} %"


# --- maps ---


class Cell(NamedTuple):
    """Of a map: its column and line, what colours it (None: nothing does), and what it is of. `mark`: its class."""

    layer: int
    line: int
    value: float | None
    row: Row
    mark: str = ""


def heat_map(
    cells: Sequence[Cell], lines: Mapping[int, str], *, kind: str, target: str, logarithmic: bool = False,
    span: float = 0.0, ends: tuple[float, float] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Layers from left to right, `lines` from top to bottom, coloured from the least value to the most.

    What hardly differs shall not look as if it did: colours span `span` at least (of a logarithmic map, of logarithms),
    or all between `ends`.
    """
    layers = sorted({cell.layer for cell in cells})
    line_of = {line: _CELL * i for i, line in enumerate(lines)}
    values = [cell.value for cell in cells if cell.value is not None]
    height = math.log if logarithmic else float
    bottom, top = map(height, ends or (min(values), max(values)))
    wide = max(top - bottom, span)
    bottom = (bottom + top - wide) / 2
    return {
        "target": target, "kind": kind, "size": _CELL - 2, "low": min(values), "high": max(values),
        "width": _LEFT + _CELL * len(layers), "height": _CELL * len(lines) + _FOOT,
        "cells": [
            {"x": _LEFT + _CELL * layers.index(cell.layer), "y": line_of[cell.line], "row": cell.row, "mark": cell.mark,
             "strength": None if cell.value is None else round((height(cell.value) - bottom) / wide, 3)}
            for cell in cells
        ],
        "columns": [{"x": _LEFT + _CELL * i + 10, "text": layer} for i, layer in enumerate(layers)],
        "lines": [{"y": y + 14, "text": lines[line]} for line, y in line_of.items()],
    }  # fmt: skip
