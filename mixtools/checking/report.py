"""report.json and report.html, and the lines of a terminal: the check for a script and for a person.

The page needs nothing but itself. An output that no gate judges is told by its change first: what it lost in perplexity
is the news of it, not that its bytes are whole.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from torch import Tensor

from ..errors import OutputError
from ..text.tokenizer import Tokenizer
from . import gates
from .judge import Check, Verdict
from .parity import Figures, Generation

TEMPLATE = Path(__file__).with_name("report.html")
TITLES: dict[Verdict, str] = {"passed": "Passed", "intact": "Intact, not judged", "failed": "Failed"}
_ON_A_TERMINAL: dict[Verdict, str] = {"passed": "passed", "intact": "intact, not judged", "failed": "FAILED"}
_NOT_MEASURED = "change of perplexity not measured: give a text with --text FILE"
_WIDTH, _HEIGHT, _FOOT = 620, 140, 22  # of a histogram, in its own units
_SHOWN_BESIDE = 4  # on a terminal; the document has all
_MARGIN_CLEAR = 1.0  # nats: above, the source preferred its token by more than e to 1


@dataclass(frozen=True)
class Word:
    """One token of a continuation as it is shown; `other` what the output would say in its place."""

    text: str
    other: str | None = None
    margin: float = 0.0

    @property
    def clear(self) -> bool:
        return self.other is not None and self.margin >= _MARGIN_CLEAR


def write(check: Check, folder: Path) -> list[Path]:
    """Write report.json and report.html into `folder`, which is made. Raises OutputError if it cannot be written."""
    files = {
        "report.json": json.dumps(check.document, indent=1, allow_nan=False) + "\n",
        "report.html": html(check),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text, "utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", file=folder) from None
    return [folder / name for name in files]


def html(check: Check) -> str:
    """The page. What comes from files (names, prompts, messages) is escaped by the template."""
    document = check.document
    return _template().render(
        check=document,
        title=TITLES[check.verdict],
        change=list(_change(document, "→")) if check.verdict == "intact" else [],
        reason=_reason(document),
        gates=[{**gate, "about": gates.NAMES[gate["name"]], "at_least": gate["name"] in gates.AT_LEAST}
               for gate in document["gates"]],
        histograms=_histograms(check.figures),
        prompts=_prompts(check.generation, check.tokenizer),
    )  # fmt: skip


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"sig": _significant, "found": _found, "percent": _percent, "bytes": _bytes, "time": _time}
    return environment.from_string(TEMPLATE.read_text("utf-8"))


# --- words ---


def lines(document: dict[str, Any], folder: Path | None) -> Iterator[str]:
    """What a terminal shows. `folder`: where the report was written, if it was."""
    for problem in document["integrity"]["problems"]:
        yield f"problem: {problem['message']}"
    yield from _change(document, "->")
    for gate in document["gates"]:
        held = "passed" if gate["passed"] else "FAILED"
        yield f"gate {gate['name']}: {_found(gate['value'])}, limit {gate['limit']:g}: {held}"
    for title, lost in (("changed, as meant", False), ("lost, since the output's layout has no place for it", True)):
        if told := list(_beside(document, lost)):
            more = f" and {len(told) - _SHOWN_BESIDE} more" if len(told) > _SHOWN_BESIDE else ""
            yield f"{title}: {'; '.join(told[:_SHOWN_BESIDE])}{more}"
    for remark in document["remarks"]:
        yield f"note: {remark}"
    if folder is not None:
        yield f"report: {folder / 'report.html'}"
    yield f"checked: {_ON_A_TERMINAL[document['verdict']]}. {headline(document)}"


def _beside(document: dict[str, Any], lost: bool) -> Iterator[str]:
    """Differences that are no faults; a file that is made for who has none is no news."""
    for part in ("configuration", "tokenizer"):
        for one in document[part]["differences"]:
            if one["expected"] and one["output"] != "there" and lost == one["lost"]:
                change = f"{one['source']}" if lost else f"{one['source']} -> {one['output']}"
                yield " ".join(filter(None, (one["file"], one["key"], "" if change == "there" else change)))


def headline(document: dict[str, Any]) -> str:
    """The verdict's reason in a sentence or two; the change before it where nothing judged that."""
    if document["verdict"] != "intact":
        return _reason(document)
    if (ppl := document["perplexity"]) is None:
        return f"{_NOT_MEASURED}. {_reason(document)}"
    kld = _significant(document["kld"]["mean"], 3)
    return f"{_perplexity(ppl, '->')} ({_relative(ppl['ln_ratio'])}), mean KL divergence {kld}. {_reason(document)}"


def _reason(document: dict[str, Any]) -> str:
    problems = document["integrity"]["problems"]
    failed = [gate for gate in document["gates"] if not gate["passed"]]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        return f"The output is damaged: {problems[0]['message']}{more}."
    if failed:
        named = ", ".join(f"{gate['name']} is {_found(gate['value'])}, limit {gate['limit']:g}" for gate in failed)
        return f"{len(failed)} of {len(document['gates'])} gates failed: {named}."
    if document["verdict"] == "failed":
        return "Perplexity or divergence is not finite: the output cannot be judged."
    different, cast = document["integrity"]["different"], document["integrity"]["cast"]
    tensors = f"{document['integrity']['tensors']} tensors were read to the last byte"
    same = "every one is its source's" + (", or an exact cast of it" if cast else ", bit for bit")
    if document["verdict"] == "intact":
        whole = f"none is damaged, {different} changed" if different else same
        kind = f"No gate judges this kind of output ({document['kind']}); --gate NAME=VALUE sets a limit."
        return f"{tensors}; {whole}. {kind}"
    if different == 0:
        return f"{tensors}; {same}."
    return f"{tensors}; all {len(document['gates'])} gates passed."


def _change(document: dict[str, Any], arrow: str) -> Iterator[str]:
    """How far the output is from its source, as far as it was measured: perplexity first."""
    if (ppl := document["perplexity"]) is not None:
        error = f"ln ratio {_significant(ppl['ln_ratio'], 3)} ± {_significant(ppl['ln_ratio_stderr'], 2)}"
        over = f"{ppl['tokens']:,} tokens, {ppl['protocol']}, ctx {ppl['ctx']}"
        yield f"{_perplexity(ppl, arrow)}, {_relative(ppl['ln_ratio'])} ({error})"
        kld = {name: _significant(value) for name, value in document["kld"].items()}
        yield (
            f"KL divergence: mean {kld['mean']}, median {kld['median']}, 99 % {kld['p99']}, largest {kld['max']}; "
            f"same top token {_percent(document['same_top'])} ({over})"
        )
    elif document["verdict"] == "intact":
        yield _NOT_MEASURED
    if (said := document["generation"]) is not None:
        yield (
            f"continuations ({said['forced_on']}): agreement {_percent(said['teacher_forced_agreement'])}, "
            f"{said['identical']} of {said['prompts']} prompts identical"
        )


def _perplexity(ppl: dict[str, Any], arrow: str) -> str:
    return f"perplexity {_significant(ppl['source'])} {arrow} {_significant(ppl['output'])}"


def _relative(ln_ratio: float | None) -> str:
    """The change of perplexity in percent; as a factor where percents no longer say anything."""
    if not ln_ratio:
        return "unchanged" if ln_ratio == 0 else "change not finite"
    ratio = math.exp(min(ln_ratio, 700.0))
    if ratio >= 10:
        return f"{_significant(ratio, 3)} times as high"
    percent = 100 * math.expm1(ln_ratio)
    return f"{percent:+.0f} %" if abs(percent) >= 10 else f"{percent:+.2g} %"


def _found(value: float | None) -> str:
    """Of a gate, as fine as its limit is told. What was not measured and what is not finite judge alike."""
    return "no figure" if value is None else f"{value:.6g}"


# --- histograms ---


def _histograms(figures: Figures | None) -> list[dict[str, Any]]:
    if figures is None or not float(figures.kld.abs().max()):  # nothing measured, or nothing changed
        return []
    ratio = figures.output_nll - figures.source_nll
    return [
        {
            "title": "KL divergence per token",
            "about": "How far the output's next-token distribution lies from the source's. The scale is logarithmic: "
            "a long tail at the right means that a few tokens suffer.",
            **_histogram(_logarithm(figures.kld), "1e{:.0f}", [("mean", _log10(float(figures.kld.mean())))]),
        },
        {
            "title": "Change of -ln p per token",
            "about": "Right of 0 the output finds the text's own token less likely than the source does. "
            "The mean is the ln ratio of the perplexities. The outermost bars hold all beyond.",
            **_histogram(_clipped(ratio), "{:+.2g}", [("mean", float(ratio.mean())), ("", 0.0)]),
        },
    ]


def _log10(value: float) -> float:
    return math.log10(max(value, 1e-12))


def _logarithm(values: Tensor) -> np.ndarray[Any, Any]:
    return np.asarray(np.log10(np.maximum(values.numpy(), 1e-12)))


def _clipped(values: Tensor) -> np.ndarray[Any, Any]:
    """To where 99 % lie, symmetric about 0."""
    found = np.nan_to_num(values.numpy())
    bound = max(float(np.quantile(np.abs(found), 0.99)), 1e-6)
    return np.asarray(np.clip(found, -bound, bound))


def _histogram(
    values: np.ndarray[Any, Any], label: str, marks: Sequence[tuple[str, float]], bins: int = 62
) -> dict[str, Any]:
    """Bars, ticks and marks of an SVG of _WIDTH by _HEIGHT."""
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    counts, edges = np.histogram(values, bins, (low, high))
    floor, step = _HEIGHT - _FOOT, _WIDTH / bins

    def place(value: float) -> float:
        return round(_WIDTH * (min(max(value, low), high) - low) / (high - low), 1)

    tallest = max(1, int(counts.max()))
    heights = [round((floor - 12) * int(count) / tallest, 1) for count in counts]
    bars = [
        {"x": round(i * step, 1), "y": round(floor - height, 1), "width": round(step - 1, 1), "height": height,
         "title": f"{count} tokens, {label.format(edges[i])} to {label.format(edges[i + 1])}"}
        for i, (height, count) in enumerate(zip(heights, counts.tolist(), strict=True)) if count
    ]  # fmt: skip
    ticks = [
        {"x": place(value), "text": label.format(value) if value or "e" in label else "0"}
        for value in _ticks(low, high, whole="e" in label)
    ]
    lines = [{"x": place(value), "text": name} for name, value in marks if math.isfinite(value)]
    return {"width": _WIDTH, "height": _HEIGHT, "floor": floor, "bars": bars, "ticks": ticks, "marks": lines}


def _ticks(low: float, high: float, whole: bool) -> list[float]:
    """Round values within; whole numbers where the scale is one of powers."""
    if whole:
        first, last = math.ceil(low), math.floor(high)
        step = max(1, (last - first) // 7 + 1)
        return [float(value) for value in range(first, last + 1, step)]
    raw = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(raw))
    width = unit * min((factor for factor in (1, 2, 5, 10) if factor * unit >= raw), default=10)
    return [i * width for i in range(math.ceil(low / width), math.floor(high / width) + 1)]


# --- continuations ---


def _prompts(generation: Generation | None, tokenizer: Tokenizer | None) -> list[dict[str, Any]]:
    """Each prompt with its continuation, word by word, and what the output would say where it differs."""
    if generation is None or tokenizer is None:
        return []
    shown = []
    forced = generation.forced
    for number, (prompt, continuation) in enumerate(zip(forced.prompts, forced.continuations, strict=True)):
        pieces = _pieces(tokenizer, [*prompt, *continuation])[len(prompt) :]
        words = []
        for position, piece in enumerate(pieces):
            ours, theirs = generation.source_top[number][position], generation.output_top[number][position]
            before = [*prompt, *continuation][: len(prompt) + position]
            other = _pieces(tokenizer, [*before[-1:], theirs])[-1] if ours != theirs else None
            words.append(Word(piece, other, generation.margins[number][position]))
        differing = [position for position, word in enumerate(words) if word.other is not None]
        shown.append(
            {"prompt": tokenizer.decode(prompt), "words": words, "first": differing[0] if differing else None,
             "differing": len(differing)}
        )  # fmt: skip
    return shown


def _pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each id adds; a byte that waits for more shows as a middle dot."""
    decoder = tokenizer.stream()
    return [decoder.push(token) or "·" for token in ids]


# --- numbers as a person reads them ---


def _significant(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "not finite"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits}g}"
    return f"{value:.2e}"


def _percent(value: float | None) -> str:
    return "not finite" if value is None else f"{100 * value:.2f} %"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _time(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
