"""The report of calibrated quantization, from notes made up for it: what it says, and that it can be read anywhere."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mixtools.errors import MixtoolsError
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import report
from mixtools.storage.output import Output

NANO = Path(__file__).parents[2] / "data" / "nano-mixtral"
RECORD = {
    "method": "gptq", "format": "auto-gptq", "bits": 4, "group_size": 128, "rounding": "second-order", "damping": 0.05,
    "sweeps": 1, "block": None, "smooth": True, "calibration": {"samples": 64, "text": "8f31c2aa", "tokens": 16384},
}  # fmt: skip
STAGES = ("packing", "forward", "hessian", "rounding", "reading")
VOID = {"meta", "line", "rect", "polyline", "br"}
Notes = dict[str, Any]


def model(layers: int = 2, experts: int = 8) -> Checkpoint:
    """A model of nano's shape; the report asks for nothing but the configuration."""
    config = replace(open_checkpoint(NANO).config, num_layers=layers, num_experts=experts)
    return cast(Checkpoint, SimpleNamespace(config=config))


def norm(exponent: float = 0.0, **errors: float) -> dict[str, Any]:
    return {"exponent": exponent, "errors": {"0.0": 8.0, "0.25": 6.0, "0.5": 9.0, **errors}}


def make_notes(layers: int = 2, experts: int = 8, seed: int = 1) -> Notes:
    """As a run leaves them, later layers first; nothing smoothed, starved or damped further."""
    chance, notes = random.Random(seed), Notes(states={"layer": layers, "crc32": 7})
    for layer in reversed(range(layers)):

        def row(role: str, expert: int | None = None, layer: int = layer, **more: Any) -> dict[str, Any]:
            nearest = chance.uniform(1e-3, 1e-2)
            return {
                "slot": [role, layer, expert], "tokens": 512, "damping": 0.05, "clip": chance.uniform(0.8, 1.0),
                "nearest": nearest, "error": nearest * chance.uniform(0.3, 0.9), **more,
            }  # fmt: skip

        rows = [row(role) for role in "qkvo"]
        for expert in range(experts):
            tokens = chance.randrange(200, 400)
            rows += [row(role, expert, tokens=tokens, shown=tokens, **more) for role, more in (
                ("w1", {}), ("w2", {"exponent": 0.0}), ("w3", {}))]  # fmt: skip
        told = {"attention_norm": norm(), "ffn_norm": norm(), "rerouted": 0, "tokens": 512}
        seconds = {stage: round(chance.uniform(0.1, 9.0), 4) for stage in STAGES}
        notes[f"quantized.{layer}"] = {"rows": rows, "told": told, "seconds": seconds}
    return notes


def made(
    notes: Notes, source: Checkpoint | None = None, record: dict[str, Any] | None = None, stem: str | None = None
) -> dict[str, str]:
    """The files by name."""
    output = cast(Output, SimpleNamespace(notes=notes, folder=Path("out")))
    files = report.documents(source or model(), RECORD if record is None else record, stem)(output)
    assert tuple(files) == report.names(stem)
    return {name: data.decode() for name, data in files.items()}


def parsed(files: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, str]], Page]:
    """JSON without what only Python takes for it, the lines of the CSV, the page."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    text, table, page = files.values()
    return json.loads(text, parse_constant=refuse), list(csv.DictReader(io.StringIO(table))), Page(page)


class Page(HTMLParser):
    """`text` that is read, `tables` by heading with their rows of cells, rects by class; tags must close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source, self.open, self.words = source, list[str](), list[str]()
        self.tables: dict[str, list[list[str]]] = {}
        self.classes: list[str] = []
        self.titles = 0
        self._heading = ""
        self.feed(source)
        self.close()
        assert not self.open
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        assert not names.keys() & {"src", "href", "onclick", "onload"} and tag not in ("link", "iframe", "img")
        self.classes.append(f"{tag}: {names.get('class', '')}")
        if tag == "h2":
            self._heading = ""
        if tag == "tr":
            self.tables.setdefault(self._heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self._heading][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" in self.open or "script" in self.open:
            return
        self.words.append(data)
        if "h2" in self.open:
            self._heading += data
        elif {"td", "th"} & set(self.open):
            self.tables[self._heading][-1][-1] += data


def share(text: str) -> float:
    """What the page's own sorting reads: the number that a cell begins with."""
    found = re.match(r"[-+]?[0-9]*\.?[0-9]+(e[-+]?[0-9]+)?", text)
    assert found, text
    return float(found[0])


# --- three files ---


@pytest.mark.parametrize("experts", [1, 8])
@pytest.mark.parametrize("layers", [1, 2, 32])
def test_the_three_files_tell_the_same(layers: int, experts: int) -> None:
    notes = make_notes(layers, experts)
    found = [row for layer in range(layers) for row in notes[f"quantized.{layer}"]["rows"]]
    for layer in range(layers):  # in the order of the work, whatever that is
        notes[f"quantized.{layer}"]["rows"] = sorted(found[layer * (4 + 3 * experts) :][: 4 + 3 * experts], key=str)
    before = copy.deepcopy(notes)
    document, lines, page = parsed(made(notes, model(layers, experts)))
    assert notes == before
    head, *cells = page.tables["Every matrix"]
    assert len(document["matrices"]) == len(lines) == len(cells) == len(found) == layers * (4 + 3 * experts)
    column = {name: head.index(name) for name in head}
    for row, line, cell, (role, layer, expert), told in zip(
        document["matrices"], lines, cells, [row["slot"] for row in found], found, strict=True
    ):
        name = f"model.layers.{layer}." + (
            f"self_attn.{role}_proj.weight" if expert is None else f"block_sparse_moe.experts.{expert}.{role}.weight"
        )
        assert row["tensor"] == line["tensor"] == cell[0] == name
        assert (row["layer"], row["expert"], row["target"]) == (layer, expert, role)
        assert line["expert"] == ("" if expert is None else str(expert))
        for key, shown in (("nearest", "to nearest"), ("error", "as made"), ("clip", "clip")):
            assert row[key] == told[key] == float(line[key])
            assert share(cell[column[shown]]) == pytest.approx(100 * told[key], rel=5e-3)
        assert row["tokens"] == int(line["tokens"]) == int(cell[column["tokens"]]) == told["tokens"]
        assert len(cell) == len(head)
    errors = [row["error"] for row in found]
    assert document["summary"]["error"]["mean"] == pytest.approx(math.fsum(errors) / len(errors))
    assert document["summary"]["error"]["worst"] == max(errors)
    assert document["quantize"] == RECORD and document["mixtools"]
    assert page.source.count("http") == 0


def test_a_gguf_has_its_own_names_and_a_head() -> None:
    notes = make_notes()
    row = {"slot": ["head", None, None], "tokens": 512, "damping": 0.05, "clip": None, "nearest": 0.5, "error": 0.25}
    notes["quantized.head"] = {"rows": [row], "told": {"norm": norm(0.25)}, "seconds": {"rounding": 1.0}}
    record = {"name": "Q4_K_M", "damping": 0.05}
    document, lines, page = parsed(files := made(notes, record=record, stem="nano.Q4_K_M"))
    assert list(files) == [f"nano.Q4_K_M.quantize-report.{kind}" for kind in ("json", "csv", "html")]
    assert lines[5]["tensor"] == "blk.0.ffn_down_exps.weight" and lines[5]["expert"] == "0"
    assert lines[0]["tensor"] == "blk.0.attn_q.weight"
    assert lines[-1] == lines[-1] | {
        "tensor": "output.weight",
        "layer": "",
        "expert": "",
        "exponent": "0.25",
        "clip": "",
    }
    assert document["summary"]["error"] == {"mean": pytest.approx(document["summary"]["error"]["mean"]), "worst": 0.25,
                                            "tensor": "output.weight", "where": "head"}  # fmt: skip
    assert document["layers"][-1]["layer"] is None and document["layers"][-1]["norm"]["exponent"] == 0.25
    assert page.text.count("GGUF Q4_K_M") == 2  # the title, and the heading
    assert page.tables["Time"][-2][0] == "head"


# --- what it says ---


def test_what_came_out_is_said_in_words() -> None:
    notes = make_notes()
    first, second = notes["quantized.0"], notes["quantized.1"]
    for row in first["rows"][4 + 3 * 2 : 4 + 3 * 3]:  # expert 2
        row |= {"tokens": 9, "shown": 521}
    first["rows"][4 + 3 * 2 + 1]["exponent"] = 0.5
    second["rows"][4]["damping"] = 0.5
    second["rows"][7]["damping"] = None
    second["told"] |= {"ffn_norm": norm(0.25) | {"bounded": 3}, "rerouted": 3}
    first["rows"][4 + 3 * 2 + 1]["bounded"] = 2
    document, lines, page = parsed(made(notes))
    found = document["summary"]
    assert found["starved"] == [{"where": "layer 0, expert 2", "tokens": 9, "shown": 521}]
    assert [row["tensor"] for row in found["damped_more"]] == ["model.layers.1.block_sparse_moe.experts.0.w1.weight"]
    assert [row["where"] for row in found["without_inputs"]] == ["layer 1, expert 1, w1"]
    assert found["rerouted"] == {"tokens": 3, "of": 1024}
    assert found["smoothing"] == {
        "tried": True, "norms": {"of": 4, "smoothed": 1, "exponents": {"0.25": 1}},
        "w2": {"of": 16, "smoothed": 1, "exponents": {"0.5": 1}}, "bounded": 5,
    }  # fmt: skip
    for words in (
        "1 expert saw too few tokens and was shown those of others, too: layer 0, expert 2 (9 of 521 its own).",
        "1 matrix needed more damping than the 0.05 that was asked for, up to 0.5: layer 1, expert 0, w1.",
        "inputs of 1 matrix, which were rounded to nearest: layer 1, expert 1, w1.",
        "1 of 4 norms with what reads them (1 with 0.25 as exponent), and w3 with w2 in 1 of 16 experts (1 with 0.5",
        "5 scales were held at their bound.",
        "3 of 1,024 tokens go to other experts, as the router is stored (0.293 %)",
    ):
        assert words in page.text, words
    # w1 and w3 read the ffn norm, q, k and v the attention norm, w2 its own; nothing scales what o reads
    exponents = {(line["layer"], line["target"], line["expert"]): line["exponent"] for line in lines}
    assert exponents["1", "w1", "0"] == exponents["1", "w3", "7"] == "0.25" and exponents["0", "w1", "0"] == "0.0"
    assert exponents["1", "q", ""] == "0.0" and exponents["1", "o", ""] == "" and exponents["0", "w2", "2"] == "0.5"
    starved = [line["target"] for line in lines if line["starved"] == "True"]
    assert starved == ["w1", "w2", "w3"]
    # a cell for each expert in maps of w1, w2, w3, of tokens and of exponents; 8 of attention
    assert sum(name.startswith("rect: cell") for name in page.classes) == 5 * 16 + 8
    assert sum(name.endswith(" starved") for name in page.classes) == 5
    places = re.findall(r'<rect class="cell \S+(?: starved)?" x="(\d+)" y="(\d+)"', page.source)
    attention = {(x, y) for x in ("30", "52") for y in ("0", "22", "44", "66")}
    assert set(places[:8]) == attention and len(set(places[-16:])) == 16  # none lies on another
    assert "exponent of w3 and w20 to 0.5" in page.text and "tokens of each expert9 to " in page.text
    assert report.told(notes)[1:] == [
        "smoothed: 1 of 4 norms, and w3 with w2 in 1 of 16 experts",
        "smoothing: 5 scales were held at their bound, a factor of 128 either way",
        "starved experts, which were shown others' tokens, too: 1 (layer 0, expert 2)",
        "rerouted by the router as stored: 3 of 1,024 tokens (0.293%)",
    ]


def test_lines_of_a_terminal() -> None:
    notes = make_notes(1, 1)
    for row in notes["quantized.0"]["rows"]:
        row |= {"nearest": 0.02, "error": 0.01}
    notes["quantized.0"]["rows"][5]["error"] = 0.08
    assert report.told(notes) == [
        "7 matrices: outputs lose 2% of their energy on average (rounded to nearest 2%), "
        "at most 8% (layer 0, expert 0, w2)",
        "smoothing: tried, and left out everywhere",
        "rerouted by the router as stored: 0 of 512 tokens (0%)",
    ]
    assert report.told({"states": 1}) == []


def test_many_starved_experts_are_named_in_part() -> None:
    notes = make_notes()
    for layer in (0, 1):
        for row in notes[f"quantized.{layer}"]["rows"][4:]:
            row |= {"tokens": 0, "shown": 512}
    document, _, page = parsed(made(notes))
    assert len(document["summary"]["starved"]) == 16
    assert "layer 1, expert 3 (0 of 512 its own) and 4 more." in page.text
    assert report.told(notes)[2].endswith("16 (layer 0, expert 0; layer 0, expert 1; layer 0, expert 2 and 13 more)")
    assert "tokens of each expert" not in page.text  # nothing to draw


def test_smoothing_that_was_off_and_rounding_to_nearest() -> None:
    notes = make_notes()
    for layer in (0, 1):
        note = notes[f"quantized.{layer}"]
        note["told"] |= {"attention_norm": {"exponent": 0.0, "errors": {}}, "ffn_norm": {"exponent": 0.0, "errors": {}}}
        for row in note["rows"]:
            row |= {"damping": None, "clip": None}
    document, _, page = parsed(made(notes, record=RECORD | {"rounding": "nearest"}))
    assert "Smoothing was off." in page.text and "Smoothing" not in page.tables
    assert report.told(notes)[1] == "smoothing: off"
    assert document["summary"]["without_inputs"] == document["summary"]["damped_more"] == []
    assert "damping" not in page.tables["Every matrix"][0] and "clip" not in page.tables["Every matrix"][0]


def test_candidates_stand_as_shares_of_the_error_without() -> None:
    notes = make_notes(12)
    notes["quantized.1"]["told"]["ffn_norm"] = norm(0.25, **{"1.0": 16.0})
    _, _, page = parsed(made(notes, model(12)))
    head, *rows = page.tables["Smoothing"]
    assert head == ["norm", "exponent", "0.0", "0.25", "0.5", "1.0", "rerouted"]
    assert [row[0] for row in rows[:4]] == [f"layer {i}, {name}_norm" for i in (0, 1) for name in ("attention", "ffn")]
    assert rows[3] == ["layer 1, ffn_norm", "0.25", "100.00 %", "75.00 %", "112.50 %", "200.00 %", "0 of 512"]
    assert rows[2][5:] == ["–", "–"]
    assert page.source.count("<b>75.00 %</b>") == 1 and page.source.count("<b>100.00 %</b>") == 23


def test_times_by_stage_and_layer_and_nothing_else_varies() -> None:
    notes = make_notes()
    notes["quantized.0"]["seconds"]["unheard"] = 2.0
    document, _, page = parsed(made(notes))
    seconds = document["seconds"]
    assert list(seconds["stages"]) == ["reading", "forward", "hessian", "rounding", "packing", "unheard"]
    both = [notes[f"quantized.{layer}"]["seconds"] for layer in (0, 1)]
    assert seconds["layers"] == [{"layer": i, "unheard": 0.0, **found} for i, found in enumerate(both)]
    for stage in STAGES:
        assert seconds["stages"][stage] == pytest.approx(sum(found[stage] for found in both))
    assert seconds["total"] == pytest.approx(sum(map(sum, (found.values() for found in both))))
    head, *rows, foot = page.tables["Time"]
    for row, found in zip(rows, both, strict=True):
        assert [float(cell) for cell in row[3:]] == pytest.approx(
            [found.get(name, 0.0) for name in head[3:]], abs=0.006
        )
        assert float(row[2]) == pytest.approx(sum(found.values()), abs=0.006)
    assert float(foot[2]) == pytest.approx(seconds["total"], abs=0.006)
    bars = re.findall(r'<div class="stack(?: whole)?">(.*?)</div>', page.source)
    widths = [sum(map(float, re.findall(r"width:([0-9.]+)%", bar))) for bar in bars]
    longest = max(sum(found.values()) for found in both)
    assert widths == pytest.approx([100, *(100 * sum(found.values()) / longest for found in both)], abs=0.1)
    for note in notes.values():
        note.get("seconds", {}).update(reading=77.0)
    other, _, _ = parsed(made(notes))
    assert other.pop("seconds") != document.pop("seconds") and other == document


# --- what could go wrong ---


@pytest.mark.parametrize(("gone", "words"), [({1}, "layer 1,"), ({0, 2, 3}, "layer 0 and 2 more,")])
def test_a_layer_without_a_note_is_named(gone: set[int], words: str) -> None:
    notes = make_notes(5)
    for layer in gone:
        del notes[f"quantized.{layer}"]
    with pytest.raises(MixtoolsError, match=rf"^out: nothing is noted of {words} .*--no-resume"):
        made(notes, model(5))
    assert report.told(notes)[0].startswith(f"{(5 - len(gone)) * 28} matrices")


def test_a_record_without_damping_fails_before_the_work() -> None:
    with pytest.raises(KeyError, match="damping"):
        report.documents(model(), {"layout": "gguf", "quantize": RECORD})


def test_what_is_no_number_is_no_figure() -> None:
    """Bare NaN and Infinity leave a JSON that no browser reads; words that look like them are words."""
    notes = make_notes()
    first = notes["quantized.0"]
    first["told"]["ffn_norm"] = norm(0.0, **{"0.25": math.inf, "0.0": math.nan})
    first["rows"][0] |= {"nearest": math.inf, "error": math.nan}
    known = [row["error"] for layer in (0, 1) for row in notes[f"quantized.{layer}"]["rows"][1 - layer :]]
    document, lines, page = parsed(made(notes, record=RECORD | {"text": "NaN", "limit": -math.inf}))
    assert document["layers"][0]["ffn_norm"]["errors"] == {"0.0": None, "0.25": None, "0.5": 9.0}
    assert document["matrices"][0]["error"] is None and lines[0]["error"] == ""
    assert document["quantize"]["text"] == "NaN" and document["quantize"]["limit"] is None
    assert document["summary"]["error"]["mean"] == pytest.approx(math.fsum(known) / len(known))
    assert page.tables["Every matrix"][1][-3:] == ["–", "–", "–"]
    assert page.tables["Smoothing"][2][2:5] == ["–", "–", "–"]
    for row in [*first["rows"], *notes["quantized.1"]["rows"]]:
        row |= {"nearest": math.nan, "error": math.nan}
    _, _, page = parsed(made(notes))
    assert "4 bits in groups of 128: 56 matrices" in page.text and not re.search(r"\bnan\b|\binf\b", page.text)
    assert "outputs lose –" in report.told(notes)[0]


def test_zeros_divide_nothing() -> None:
    notes = make_notes(1, 1)
    for row in notes["quantized.0"]["rows"]:
        row |= {"nearest": 0.0, "error": 0.0, "tokens": 0, "shown": 0}
    notes["quantized.0"]["told"] |= {"ffn_norm": norm(0.0, **{"0.0": 0.0}), "tokens": 0}
    notes["quantized.0"]["seconds"] = {"forward": 0.0}
    _, _, page = parsed(made(notes, model(1, 1)))
    assert "outputs lose 0 % of their energy" in page.text and "rerouted" not in page.text
    assert "Layer by layer" not in page.tables and "times as much" not in page.text


def test_very_small_errors_keep_their_digits() -> None:
    """Of 8 bits: the sorting reads a number with an exponent as well."""
    notes = make_notes()
    for number, row in enumerate(notes["quantized.0"]["rows"]):
        row["error"] = 1.23e-5 / 10**number
    _, _, page = parsed(made(notes))
    column = page.tables["Every matrix"][0].index("as made")
    for number, row in enumerate(page.tables["Every matrix"][1:29]):
        assert share(row[column]) == pytest.approx(1.23e-3 / 10**number, rel=1e-9)


def test_what_users_name_is_text() -> None:
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;'
    record = RECORD | {"method": evil, evil: 1, "calibration": {"file": evil, "listed": [evil]}}
    document, _, page = parsed(made(make_notes(), record=record))  # Page knows of no img
    assert page.source.count("<script>") == 1 and page.source.count("alert") == 6 * 2  # title, heading, options
    assert evil in page.text and document["quantize"]["method"] == evil
