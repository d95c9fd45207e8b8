"""quantize-report.json, .csv and .html: what rounding cost each matrix, and what was done to make that little.

    notes of the layers (passage.py) ─► rows, summary ─► three files, and the lines of a terminal

Times vary from run to run: they stand in the report alone, never in what decides bytes, and two runs' reports differ in
nothing else. Errors are shares of the energy of a matrix' outputs over the calibration text, of some of its rows. The
page needs nothing but itself.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import MixtoolsError
from ...layouts.checkpoint import Checkpoint
from ...layouts.gguf import GGUF
from ...layouts.hf import HF
from ...names import ATTENTION, EXPERT, Role, Slot
from ...pages import Cell, csv_text, heat_map, label, loss, render
from ...storage.output import Output
from ...version import __version__
from .smoothing import SPAN

NAME = "quantize-report"
NAMES = tuple(f"{NAME}.{kind}" for kind in ("json", "csv", "html"))
TEMPLATE = Path(__file__).with_name("report.html")
_COLUMNS = (
    "tensor", "layer", "expert", "target", "tokens", "shown", "starved", "exponent", "damping", "damped_more", "clip",
    "nearest", "error",
)  # fmt: skip
_NOTE = "quantized."
_READ = {Role.Q: "attention_norm", Role.K: "attention_norm", Role.V: "attention_norm", Role.GATE: "ffn_norm",
         Role.UP: "ffn_norm", Role.HEAD: "norm"}  # whose smoothing scales their columns  # fmt: skip
_NORMS = ("attention_norm", "ffn_norm", "norm")
_ROLES = [role.value for role in Role]
_STAGES = ("reading", "forward", "hessian", "factor", "smoothing", "rounding", "packing", "report")
_NAMED = 12  # of a list of matrices or experts; the table has all
Row = dict[str, Any]


class Part(NamedTuple):
    """What one layer's note says, numbers that are none left out; the head has no layer."""

    layer: int | None
    rows: Sequence[Row]
    told: Mapping[str, Any]
    seconds: Mapping[str, float]

    @property
    def title(self) -> str:
        return "head" if self.layer is None else f"layer {self.layer}"

    def norms(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        return ((norm, self.told[norm]) for norm in _NORMS if norm in self.told)


def names(stem: str | None) -> tuple[str, ...]:
    """Of the files: for a GGUF that lies beside others, as its own, `stem`, begins."""
    return NAMES if stem is None else tuple(f"{stem}.{name}" for name in NAMES)


def documents(
    source: Checkpoint, record: Mapping[str, Any], stem: str | None = None
) -> Callable[[Output], Mapping[str, bytes]]:
    """What makes the three files, by name, once all weights are written; matrices are named as there: as in a GGUF if
    there is a `stem`. `record`: the method's options, flat but for the text's; `damping` must be among them.

    What it gives raises MixtoolsError where a layer's note is missing.
    """
    layout, config = HF if stem is None else GGUF, source.config
    damping = record["damping"]  # missed now, not after hours of work

    def make(output: Output) -> Mapping[str, bytes]:
        parts = _parts(output.notes)
        there = {part.layer for part in parts}
        if missing := [layer for layer in range(config.num_layers) if layer not in there]:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise MixtoolsError(
                f"nothing is noted of layer {missing[0]}{more}, though its weights are written: the journal is not "
                "whole; run again with --no-resume", file=output.folder,
            )  # fmt: skip
        report = document(parts, _finite(record), damping, lambda slot: layout.piece(slot, config).name)
        made = (
            (json.dumps(report, indent=1, allow_nan=False) + "\n").encode(),
            csv_text(_COLUMNS, report["matrices"]).encode(),
            html(report).encode(),
        )
        return dict(zip(names(stem), made, strict=True))

    return make


def told(notes: Mapping[str, Any]) -> list[str]:
    """What a terminal shows, in two to four lines, of the notes that there are; of none nothing."""
    parts = _parts(notes)
    rows = _rows(parts, str)
    if not rows:
        return []
    found = summary(parts, rows)
    error, nearest, smoothing = found["error"], found["nearest"], found["smoothing"]
    lines = [
        f"{len(rows)} matrices: outputs lose {_short(error['mean'])} of their energy on average "
        f"(rounded to nearest {_short(nearest['mean'])}), at most {_short(error['worst'])} ({error['where']})"
    ]
    norms, inner = smoothing["norms"], smoothing["w2"]
    if not smoothing["tried"]:
        lines.append("smoothing: off")
    elif not norms["smoothed"] and not inner["smoothed"]:
        lines.append("smoothing: tried, and left out everywhere")
    else:
        lines.append(
            f"smoothed: {norms['smoothed']} of {norms['of']} norms, and w3 with w2 in {inner['smoothed']} of "
            f"{inner['of']} experts"
        )
    if bounded := smoothing["bounded"]:
        lines.append(f"smoothing: {bounded:,} scales were held at their bound, a factor of {SPAN:g} either way")
    if starved := found["starved"]:
        where = _listed([expert["where"] for expert in starved], 3)
        lines.append(f"starved experts, which were shown others' tokens, too: {len(starved)} ({where})")
    if of := found["rerouted"]["of"]:
        moved = found["rerouted"]["tokens"]
        lines.append(f"rerouted by the router as stored: {moved:,} of {of:,} tokens ({_short(moved / of)})")
    return lines


def document(
    parts: Sequence[Part], record: Mapping[str, Any], damping: float, name: Callable[[Slot], str]
) -> dict[str, Any]:
    """The whole report, ready for JSON. `damping`: what was asked for; `name`: of a matrix in the output."""
    rows = _rows(parts, name, damping)
    return {
        "mixtools": __version__,
        "quantize": record,
        "summary": summary(parts, rows),
        "layers": [_layer(part, rows) for part in parts],
        "matrices": rows,
        "seconds": _seconds(parts),
    }


# --- what was found ---


def _parts(notes: Mapping[str, Any]) -> list[Part]:
    """In order, the head last."""
    parts = []
    for key, note in notes.items():
        if key.startswith(_NOTE):
            layer = key.removeprefix(_NOTE)
            kept = _finite(note)
            parts.append(Part(None if layer == "head" else int(layer), kept["rows"], kept["told"], kept["seconds"]))
    return sorted(parts, key=lambda part: (part.layer is None, part.layer or 0))


def _finite(value: Any) -> Any:
    """Without what JSON cannot hold: an error that overflowed is no figure."""
    if isinstance(value, Mapping):
        return {str(key): _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _in_layer(row: Row) -> tuple[int, int]:
    """Attention, then expert by expert, as a layer's slots lie; a note has them as they were done."""
    role, _, expert = row["slot"]
    return (-1 if expert is None else expert), _ROLES.index(role)


def _rows(parts: Sequence[Part], name: Callable[[Slot], str], damping: float | None = None) -> list[Row]:
    """A matrix each. `damping`: what was asked for."""
    most = math.inf if damping is None else damping * 1.001
    found = []
    for part in parts:
        for row in sorted(part.rows, key=_in_layer):
            role, layer, expert = row["slot"]
            slot, tokens = Slot(Role(role), layer, expert), row["tokens"]
            shown = row.get("shown", tokens)
            norm = part.told.get(_READ.get(slot.role, ""), {})
            found.append({
                "tensor": name(slot), "layer": layer, "expert": expert, "target": role, "tokens": tokens,
                "shown": shown, "starved": shown > tokens, "exponent": row.get("exponent", norm.get("exponent")),
                "damping": row["damping"], "damped_more": (row["damping"] or 0.0) > most, "clip": row["clip"],
                "nearest": row["nearest"], "error": row["error"],
            })  # fmt: skip
    return found


def summary(parts: Sequence[Part], rows: Sequence[Row]) -> dict[str, Any]:
    """Of all matrices together."""
    norms = [norm for part in parts for _, norm in part.norms()]
    routed = [part.told for part in parts if "rerouted" in part.told]
    second_order = any(row["damping"] is not None for row in rows)
    return {
        "matrices": len(rows),
        "error": _spread(rows, "error"),
        "nearest": _spread(rows, "nearest"),
        "smoothing": {
            "tried": any(norm["errors"] for norm in norms),
            "norms": _exponents([norm["exponent"] for norm in norms]),
            "w2": _exponents([row["exponent"] for row in rows if row["target"] == Role.DOWN.value]),
            "bounded": sum(one.get("bounded", 0) for one in (*norms, *(row for part in parts for row in part.rows))),
        },
        "starved": [
            {"where": f"layer {row['layer']}, expert {row['expert']}", "tokens": row["tokens"], "shown": row["shown"]}
            for row in rows if row["starved"] and row["target"] == Role.DOWN.value
        ],
        "rerouted": {"tokens": sum(one["rerouted"] for one in routed), "of": sum(one["tokens"] for one in routed)},
        "damped_more": [_place(row) | {"damping": row["damping"]} for row in rows if row["damped_more"]],
        "without_inputs": [_place(row) for row in rows if second_order and row["damping"] is None],
    }  # fmt: skip


def _place(row: Row) -> dict[str, Any]:
    return {"tensor": row["tensor"], "where": label(row)}


def _spread(rows: Sequence[Row], name: str) -> dict[str, Any]:
    """Mean of the matrices, and the worst of them."""
    known = [row for row in rows if row[name] is not None]
    if not known:
        return {"mean": None, "worst": None, "tensor": None, "where": None}
    worst = max(known, key=lambda row: float(row[name]))
    return {"mean": sum(row[name] for row in known) / len(known), "worst": worst[name], **_place(worst)}


def _exponents(chosen: Sequence[float | None]) -> dict[str, Any]:
    counts = Counter(exponent for exponent in chosen if exponent)
    return {
        "of": len(chosen), "smoothed": counts.total(),
        "exponents": {f"{exponent:g}": counts[exponent] for exponent in sorted(counts)},
    }  # fmt: skip


def _layer(part: Part, rows: Sequence[Row]) -> dict[str, Any]:
    mine = [row for row in rows if row["layer"] == part.layer]
    return {
        "layer": part.layer, "nearest": _spread(mine, "nearest")["mean"], "error": _spread(mine, "error")["mean"],
        "starved": sorted({row["expert"] for row in mine if row["starved"]}), **part.told,
    }  # fmt: skip


def _seconds(parts: Sequence[Part]) -> dict[str, Any]:
    """By stage and by layer; stages in the order of the work."""
    found = dict.fromkeys(stage for part in parts for stage in part.seconds)
    stages = [stage for stage in _STAGES if stage in found] + [stage for stage in found if stage not in _STAGES]
    layers = [{"layer": part.layer, **{stage: part.seconds.get(stage, 0.0) for stage in stages}} for part in parts]
    totals = {stage: round(sum(layer[stage] or 0.0 for layer in layers), 4) for stage in stages}
    return {"total": round(sum(totals.values()), 4), "stages": totals, "layers": layers}


def _short(share: float | None) -> str:
    return loss(share, 0.0).replace(" %", "%")


def _listed(found: Sequence[str], most: int = _NAMED) -> str:
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return "; ".join(found[:most]) + more


# --- the page ---


def html(report: Mapping[str, Any]) -> str:
    """The page."""
    return render(
        TEMPLATE, report=report, title=_title(report["quantize"]), asked=list(_asked(report["quantize"])),
        found=report["summary"], rows=report["matrices"], cards=_by_target(report["matrices"]),
        maps=_maps(report["matrices"]), norms=list(_norms(report["layers"])), exponents=_candidates(report["layers"]),
        times=_times(report["seconds"]), listed=_listed,
    )  # fmt: skip


def _title(record: Mapping[str, Any]) -> str:
    """What was made: gptq, 4 bits in groups of 128."""
    if "bits" not in record:
        return f"GGUF {record.get('name', '')}".strip()
    group = record.get("group_size") or -1
    scales = f"in groups of {group}" if group > 0 else "with a scale a row"
    return f"{record.get('method', 'quantized')}, {record['bits']} bits {scales}"


def _asked(record: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Options, one by one."""
    for key, value in record.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(value, Mapping):
            yield from _asked(value, f"{name}: ")
        elif isinstance(value, bool) or value is None:
            yield name, {True: "yes", False: "no", None: "–"}[value]
        else:
            yield name, json.dumps(value) if isinstance(value, list | tuple) else str(value)


def _by_target(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """A card for each kind of matrix: mean error to nearest and as made, on one scale for all."""
    cards = []
    for target in dict.fromkeys(row["target"] for row in rows):
        mine = [row for row in rows if row["target"] == target]
        found = {name: _spread(mine, name) for name in ("nearest", "error")}
        cards.append({"target": target, "matrices": len(mine), **found})
    most = max((card[name]["mean"] or 0.0 for card in cards for name in ("nearest", "error")), default=0.0)
    for card in cards:
        for name in ("nearest", "error"):
            card[name]["width"] = round(100 * (card[name]["mean"] or 0.0) / (most or 1.0), 2)
    return cards


def _maps(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Errors of attention and of w1, w2, w3, on a log scale; tokens of the experts; exponents of w2. None of zeros."""
    kinds = [role.value for role in ATTENTION]
    experts = {row["expert"]: f"e{row['expert']}" for row in rows if row["expert"] is not None}

    def of(target: Role, name: str) -> list[Cell]:
        mine = [row for row in rows if row["target"] == target.value]
        return [Cell(row["layer"], row["expert"], row[name] or None, row, " starved" * row["starved"]) for row in mine]

    attention = [
        Cell(row["layer"], kinds.index(row["target"]), row["error"] or None, row)
        for row in rows if row["target"] in kinds
    ]  # fmt: skip
    errors = [("attention", attention, dict(enumerate(kinds)))]
    errors += [(role.value, of(role, "error"), experts) for role in EXPERT]
    tokens, exponents = of(Role.GATE, "tokens"), of(Role.DOWN, "exponent")
    most = max((cell.value or 0.0 for cell in tokens), default=0.0)
    maps = [
        heat_map(cells, lines, kind="loss", target=f"{target}: share lost", logarithmic=True, span=math.log(3))
        for target, cells, lines in errors if _any(cells)
    ]  # fmt: skip
    for kind, target, cells, end in (
        ("tokens", "tokens of each expert", tokens, most), ("exponent", "exponent of w3 and w2", exponents, 1.0),
    ):  # fmt: skip
        if _any(cells):
            least = min(cell.value or 0 for cell in cells)
            maps.append(heat_map(cells, experts, kind=kind, target=target, ends=(0.0, end)) | {"low": least})
    return maps


def _any(cells: Sequence[Cell]) -> bool:
    return any(cell.value for cell in cells)


def _candidates(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Exponents that were tried at a norm, as their notes spell them."""
    tried = {exponent for layer in layers for norm in _NORMS for exponent in layer.get(norm, {}).get("errors", {})}
    return sorted(tried, key=float)


def _norms(layers: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each norm with its candidates' errors, as shares of the error without smoothing."""
    for layer in layers:
        for norm in (name for name in _NORMS if name in layer):
            errors = layer[norm]["errors"]
            plain = next((error for exponent, error in errors.items() if float(exponent) == 0.0), None)
            shares = {
                exponent: None if not plain or error is None else error / plain for exponent, error in errors.items()
            }
            chosen = layer[norm]["exponent"]
            yield {
                "layer": layer["layer"],
                "norm": norm,
                "exponent": chosen,
                "shares": shares,
                "rerouted": layer.get("rerouted") if norm == "ffn_norm" else None,
                "tokens": layer.get("tokens"),
            }


def _times(seconds: Mapping[str, Any]) -> dict[str, Any]:
    """A line for each layer, its stages beside each other; the longest layer is as wide as the page lets it be."""
    stages, lines = list(seconds["stages"]), []
    longest = max((sum(layer[stage] for stage in stages) for layer in seconds["layers"]), default=0.0) or 1.0
    for layer in seconds["layers"]:
        widths = {stage: round(100 * layer[stage] / longest, 2) for stage in stages}
        lines.append({**layer, "total": sum(layer[stage] for stage in stages), "widths": widths})
    total = seconds["total"] or 1.0
    whole = {stage: round(100 * spent / total, 2) for stage, spent in seconds["stages"].items()}
    return {"stages": stages, "lines": lines, "whole": whole}
