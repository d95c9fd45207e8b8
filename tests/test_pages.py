"""What reports share: maps, numbers, tables for a spreadsheet."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

import jinja2
import pytest

from mixtools import pages
from mixtools.pages import Cell


def test_a_map_lies_as_its_layers_and_lines_do() -> None:
    cells = [Cell(layer, line, float(layer + line), {}, "x" * (layer == 7)) for line in (2, 0) for layer in (7, 30, 8)]
    found = pages.heat_map(cells, {0: "e0", 2: "e2"}, kind="k", target="t")
    where = {(cell["x"], cell["y"]): cell["strength"] for cell in found["cells"]}
    assert where == {(30, 0): 0.0, (52, 0): 0.04, (74, 0): 0.92, (30, 22): 0.08, (52, 22): 0.12, (74, 22): 1.0}
    assert [(column["x"], column["text"]) for column in found["columns"]] == [(40, 7), (62, 8), (84, 30)]
    assert [(line["y"], line["text"]) for line in found["lines"]] == [(14, "e0"), (36, "e2")]
    assert (found["width"], found["height"], found["low"], found["high"]) == (96, 60, 7.0, 32.0)
    assert [cell["mark"] for cell in found["cells"]] == ["x", "", ""] * 2


@pytest.mark.parametrize(
    ("values", "how", "strengths"),
    [
        ([1.0, 10.0, 100.0, None], {"logarithmic": True}, [0.0, 0.5, 1.0, None]),
        ([1.0, 1.0], {"span": 0.5}, [0.5, 0.5]),
        ([1.0, 1.1], {"span": 0.2}, [0.25, 0.75]),
        ([2.0, 2.0], {"logarithmic": True, "span": math.log(3)}, [0.5, 0.5]),
        ([0.25, 0.5, None], {"ends": (0.0, 1.0)}, [0.25, 0.5, None]),
    ],
)
def test_colours_of_a_map(values: list[float | None], how: dict[str, object], strengths: list[float | None]) -> None:
    cells = [Cell(layer, 0, value, {}) for layer, value in enumerate(values)]
    found = pages.heat_map(cells, {0: ""}, kind="k", target="t", **how)  # type: ignore[arg-type]
    assert [cell["strength"] for cell in found["cells"]] == strengths


def test_numbers_as_a_person_reads_them() -> None:
    assert [pages.loss(value) for value in (None, 0.0, 1e-9, 1e-5, 0.123456)] == [
        "–", "0 %", "< 0.001 %", "0.001 %", "12.3 %"
    ]  # fmt: skip
    assert pages.loss(1e-9, 0.0) == "1e-07 %"
    assert [pages.percent(None), pages.percent(0.5)] == ["–", "50.00 %"]
    assert [pages.significant(value) for value in (None, 0.0, 12.34567, 1e-5)] == ["–", "0", "12.35", "1.00e-05"]
    rows = ({"layer": 1, "expert": 2, "target": "w1"}, {"layer": 0, "expert": None, "target": "q"},
            {"layer": None, "expert": None, "target": "head"})  # fmt: skip
    assert [pages.label(row) for row in rows] == ["layer 1, expert 2, w1", "layer 0, q", "head"]


def test_a_spreadsheet_reads_what_was_written() -> None:
    rows = [{"a": 'x,"y"\nz', "b": None, "more": 1}, {"a": 0.1}]
    text = pages.csv_text(("a", "b"), rows)
    assert list(csv.reader(io.StringIO(text))) == [["a", "b"], ['x,"y"\nz', ""], ["0.1", ""]]


def test_a_template_gets_what_it_asks_for_and_escapes_it(tmp_path: Path) -> None:
    template = tmp_path / "page.html"
    template.write_text('{% import "pages.html" as pages %}{{ name }} {{ share|loss }}{{ pages.sorting() }}')
    made = pages.render(template, name="<b>&", share=0.5)
    assert made.startswith("&lt;b&gt;&amp; 50 %<script>") and made.endswith("</script>\n")
    with pytest.raises(jinja2.UndefinedError, match="share"):
        pages.render(template, name="")
