"""KL divergence of quantized models from their source: mixtools and the packages people use, on the same calibration.

    python scripts/bench/quality.py peers --models DIR --texts DIR [--environments DIR]... [--only WORD]... [--slow]
    python scripts/bench/quality.py ours --models DIR --texts DIR [--only WORD]... [--model NAME]...
    python scripts/bench/quality.py table

The cut of the calibration text alone moves any method by up to 20 %, so every method has three, of 64 windows of 256
tokens (BOS and 255 of the text): side by side from the text's start, spread evenly over it, and from seeded random
places. The judge is ours, in fp32, on 23 windows (tiny: 15) from the start of eval_en.txt and eval_de.txt, side by side
likewise. A package runs in its own environment, DIR/NAME/bin/python, through a driver of quality_peers/, on the model
widened to fp32, and gives back its own values as a dense model. `--models` holds MODEL/torrent, `--texts` those texts.

Figures are added to results/quality-peers.json and quality.json as they come, and what is there is not done again: to
measure anew, delete the file. A few minutes a package and model, ten where it optimises by gradients. Run it alone.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from _bench import RESULTS, write_result
from safetensors.torch import load_file, save_file
from torch import Tensor

import mixtools
from mixtools.checking import parity
from mixtools.checking.perplexity import Windows
from mixtools.hub.opening import open_model
from mixtools.inference import calibrate
from mixtools.inference.stream import Stream
from mixtools.linalg import ldl
from mixtools.methods.quantize import collect, grid, importance
from mixtools.text.tokenizer import Tokenizer

HERE = Path(__file__).resolve().parent
MODELS = {"nano-mixtral": 23, "nano-outlier": 23, "tiny-mixtral": 15}  # and how many windows judge it
LANGUAGES = ("en", "de")
CUTS = ("start", "spread", "random")
SAMPLES, SEQ_LEN, SEED = 64, 256, 0
GGUF_TYPES = ("Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K")
PEERS = (  # environment, and method of its driver; the most telling first
    ("gptqmodel", "gptq-sym"), ("llmcompressor", "gptq-sym"), ("llmcompressor", "gptq-asym"),
    ("llmcompressor", "awq-asym"), ("autogptq", "gptq-sym"), ("autogptq", "gptq-sym-static"), ("autoround", "sym-200"),
    ("autoround", "asym-200"), ("gptqmodel", "awq-asym"), ("autoawq", "awq-asym"),
)  # fmt: skip
SLOW = (("autoround", "sym-1000"), ("autoround", "asym-1000"))
OURS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"},
    "awq": {"method": "awq"},
    "awq, nearest": {"method": "awq", "rounding": "nearest"},
    **{type: {"method": "gguf", "type": type} for type in GGUF_TYPES},
}
WITHOUT: dict[str, dict[str, Any]] = {  # one ingredient each; those without an option are switched off in `patches`
    "smoothing": {"smooth": "off"},
    "second order": {"rounding": "nearest"},
    "sweeps": {"sweeps": 0},
    "damping of 0.05, but 0.01": {"damping": 0.01},
    "inputs through quantized layers": {"sequential": False},
    "activation order": {},
    "clipping": {},
    "the router's scales": {},
}
ALONE = {  # whose ingredients are switched off, and which of them there are
    "gptq": [*WITHOUT],
    "awq": [*WITHOUT],
    "awq, nearest": ["smoothing", "clipping", "the router's scales"],
    "Q4_K_M": ["smoothing", "second order", "sweeps", "inputs through quantized layers"],
}
RIVALS = {  # of ours: who writes what loads in the same place, by the words in their names
    "gptq": ("gptq-sym", " sym-"),
    "awq": ("asym",),
    "awq, nearest": ("awq-asym", "nearest asym"),
    **{type: (f"llama-quantize {type}",) for type in GGUF_TYPES},
}
ROUTER = ".block_sparse_moe.gate.weight"
Row = dict[str, Any]


class Model:
    """A model to quantize, and the judge of what comes of it."""

    def __init__(self, name: str, models: Path, texts: Path, work: Path) -> None:
        self.name, self.texts, self.work = name, texts, work
        self.source = models / name / "torrent"
        self.checkpoint = open_model(self.source)
        self.tokenizer = Tokenizer.from_folder(self.checkpoint.beside)

    @cached_property
    def folder(self) -> Path:
        """In the layout that packages read."""
        out = self.work / self.name
        mixtools.convert(self.source, out, "hf")
        return out

    def ids(self, file: str) -> list[int]:
        """Of a text, without BOS."""
        ids = self.tokenizer.encode((self.texts / file).read_text("utf-8"))
        return ids[1:] if ids[0] == self.tokenizer.bos_id else ids

    def calibration(self, cut: str) -> Tensor:
        """[SAMPLES, SEQ_LEN], BOS first in each."""
        ids, bos = self.ids("calibration.txt"), self.tokenizer.bos_id
        return torch.stack(calibrate.cut(ids, SAMPLES, SEQ_LEN, bos, **sampling(cut)).sequences)

    def divergence(self, output: Path) -> Row:
        """Mean KL divergence by language, its standard error, and how often the best token is the same."""
        found: Row = {}
        for language in LANGUAGES:
            text, length, bos = self.ids(f"eval_{language}.txt"), SEQ_LEN - 1, self.tokenizer.bos_id
            starts = range(0, MODELS[self.name] * length, length)
            sequences = tuple(torch.tensor([bos, *text[start : start + length]]) for start in starts)
            streams = [Stream(open_model(model), dtype=torch.float32) for model in (self.checkpoint, output)]
            figures, _ = parity.compare(*streams, Windows("gptq", SEQ_LEN, sequences, (0,) * len(sequences)))
            assert figures is not None
            document = figures.document()
            found |= {
                language: round(document["kld"]["mean"], 6),
                f"{language}_stderr": round(document["kld"]["stderr"], 6),
                f"{language}_same_top": round(document["same_top"], 4),
            }
        return found


def sampling(cut: str) -> dict[str, Any]:
    """As the options of mixtools that make this cut."""
    return {"sampling": cut, "seed": SEED if cut == "random" else None}


# --- figures, as they come ---


@dataclass
class Rows:
    """Of one file in results/: a row for each model, method and cut."""

    name: str
    rows: list[Row] = field(default_factory=list)

    @classmethod
    def load(cls, name: str) -> Rows:
        path = RESULTS / f"{name}.json"
        return cls(name, json.loads(path.read_text("utf-8"))["results"]["rows"] if path.exists() else [])

    def has(self, *key: str) -> bool:
        """Of model, method and cut."""
        return any((row["model"], row["method"], row["cut"]) == key for row in self.rows)

    def add(self, model: str, method: str, cut: str, row: Row) -> None:
        self.rows = [*self.load(self.name).rows, {"model": model, "method": method, "cut": cut, **row}]
        protocol = {"samples": SAMPLES, "seq_len": SEQ_LEN, "seed": SEED, "judged_windows": MODELS}
        write_result(self.name, {"protocol": protocol, "rows": self.rows})
        print(f"{model:12} {method:28} {cut:7} {row['en']:.4f} / {row['de']:.4f}", flush=True)


# --- the packages ---


def run_peers(model: Model, rows: Rows, args: argparse.Namespace) -> None:
    if wanted("nearest asym", args) and not rows.has(model.name, "nearest asym", "none"):
        with tempfile.TemporaryDirectory() as work:
            rows.add(model.name, "nearest asym", "none", nearest(model, Path(work) / "out"))
    for cut in CUTS:
        methods = [f"llama-quantize {type}" for type in GGUF_TYPES]
        if wanted("llama-quantize", args) and not all(rows.has(model.name, method, cut) for method in methods):
            with tempfile.TemporaryDirectory() as work:
                for method, row in by_imatrix(model, model.calibration(cut), Path(work)):
                    rows.add(model.name, method, cut, row)
    for package, method in (*PEERS, *(SLOW if args.slow else ())):
        if wanted(f"{package} {method}", args):
            run_package(model, package, method, rows, args.environments)


def run_package(model: Model, package: str, method: str, rows: Rows, environments: list[Path]) -> None:
    """All cuts of a package's method. What goes wrong is told, and the rest of them left out."""
    pythons = [folder / package / "bin" / "python" for folder in environments]
    python = next((python for python in pythons if python.exists()), None)
    name = f"{package} {method}"
    for cut in [cut for cut in CUTS if not rows.has(model.name, name, cut)]:
        if python is None:
            print(f"{name}: no environment {package}", flush=True)
            return
        try:
            with tempfile.TemporaryDirectory() as work:
                rows.add(model.name, name, cut, peer(model, python, (package, method), cut, Path(work)))
        except RuntimeError as error:
            print(f"{model.name}, {name}: {error}", flush=True)
            return


def peer(model: Model, python: Path, names: tuple[str, str], cut: str, work: Path) -> Row:
    """What a package's method leaves. Raises RuntimeError where it fails, with the last that it said."""
    package, method = names
    ids, out = work / "ids.npy", work / "out"
    np.save(ids, model.calibration(cut).numpy())
    command = [python, HERE / "quality_peers" / f"with_{package}.py", model.folder, ids, out, method]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    versions = json.loads((out / "versions.json").read_text("utf-8"))
    return {"seconds": round(time.monotonic() - began, 1), "versions": versions, **model.divergence(out)}


def nearest(model: Model, out: Path) -> Row:
    """Round to nearest in asymmetric groups: no calibration."""
    sys.path.insert(0, str(HERE / "quality_peers"))
    import dense

    tensors = load_file(model.folder / "model.safetensors")
    for name in filter(dense.LINEAR.search, tensors):
        groups = tensors[name].float().reshape(-1, dense.GROUP)
        low, high = groups.amin(1, keepdim=True).clamp(max=0), groups.amax(1, keepdim=True).clamp(min=0)
        scale = (high - low) / (2**dense.BITS - 1)
        zero = (-low / scale).round()
        codes = ((groups / scale).round() + zero).clamp(0, 2**dense.BITS - 1)
        tensors[name] = ((codes - zero) * scale).reshape(tensors[name].shape)
    dense.write(model.folder, out, tensors)
    return model.divergence(out)


def by_imatrix(model: Model, ids: Tensor, work: Path) -> Iterator[tuple[str, Row]]:
    """llama-quantize with llama-imatrix: our bytes are theirs, and our sums, but that it cuts a text its own way."""
    sums, counts = collect.collect(Stream(model.checkpoint, dtype=torch.float32), tuple(ids))
    matrix = work / "imatrix.gguf"
    matrix.write_bytes(importance.encode(importance.Importance(sums, counts, ("text",), *ids.shape, matrix)))
    made = mixtools.quantize(model.source, work / "gguf", type=[*GGUF_TYPES], imatrix=matrix)
    for row in made.rows:
        yield f"llama-quantize {row.type}", model.divergence(made.output / row.file)


# --- ours ---


def run_ours(model: Model, rows: Rows, args: argparse.Namespace) -> None:
    asked = [(name, "") for name in OURS]
    asked += [(name, without) for name, ingredients in ALONE.items() for without in ingredients if not args.whole]
    for name, ingredient in asked:
        method = f"{name} without {ingredient}" if ingredient else name
        for cut in CUTS if wanted(method, args) else ():
            if not rows.has(model.name, method, cut):
                with tempfile.TemporaryDirectory() as work:
                    rows.add(model.name, method, cut, ours(model, name, ingredient, cut, Path(work)))


def ours(model: Model, name: str, ingredient: str, cut: str, work: Path) -> Row:
    """What mixtools makes; without an ingredient, if one is named."""
    options = OURS[name] | WITHOUT.get(ingredient, {})
    out = work / ("out.gguf" if options["method"] == "gguf" else "out")
    if options["method"] != "gguf":
        options |= {"bits": 4, "group_size": 128}
    began = time.monotonic()
    with patches(ingredient):
        mixtools.quantize(
            model.source, out, calibration=model.texts / "calibration.txt", samples=SAMPLES, seq_len=SEQ_LEN, **options,
            **sampling(cut),
        )  # fmt: skip
    seconds = round(time.monotonic() - began, 1)
    if ingredient == "the router's scales":
        leave_router(model, out)
    return {"seconds": seconds, **model.divergence(out)}


@contextlib.contextmanager
def patches(ingredient: str) -> Iterator[None]:
    """Off with what has no option, since nobody would switch it off but to measure it."""
    with contextlib.ExitStack() as stack:
        if ingredient == "activation order":
            stack.enter_context(mock.patch.object(ldl, "by_activation", lambda hessian: torch.arange(len(hessian))))
        if ingredient == "clipping":
            fit = grid.Groups.grid
            whole = lambda self, *inputs: fit(dataclasses.replace(self, clips=(1.0,)), *inputs)  # noqa: E731
            stack.enter_context(mock.patch.object(grid.Groups, "grid", whole))
        yield


def leave_router(model: Model, out: Path) -> None:
    """As autoawq and GPTQModel leave it: the norm before it divided, its own columns not multiplied."""
    source = load_file(model.folder / "model.safetensors")
    (file,) = out.glob("*.safetensors")
    tensors = load_file(file)
    names = [name for name in tensors if name.endswith(ROUTER)]
    assert names
    for name in names:
        tensors[name] = source[name].to(tensors[name].dtype)
    save_file(tensors, file, metadata={"format": "pt"})
    (out / "mixtools.json").unlink()  # it would say that the file was changed since


# --- the table ---


def means(rows: list[Row], model: str, method: str, language: str) -> tuple[float, float, float] | None:
    """Mean, least and most over the cuts."""
    found = [row[language] for row in rows if (row["model"], row["method"]) == (model, method)]
    return (statistics.mean(found), min(found), max(found)) if found else None


def told(rows: list[Row], model: str, method: str) -> str:
    cells = []
    for language in LANGUAGES:
        if (found := means(rows, model, method, language)) is None:
            return ""
        mean, least, most = found
        cells.append(f"{mean:.4f} ({least:.4f}-{most:.4f})" if most > least else f"{mean:.4f}")
    return " / ".join(cells)


def table() -> Iterator[str]:
    """Markdown: each method by model, then ours against the best peer of each language."""
    peers, own = Rows.load("quality-peers").rows, Rows.load("quality").rows
    yield from ("| KLD en / de, mean of the cuts (least-most) | " + " | ".join(MODELS) + " |", "|---|---|---|---|")
    for rows in (peers, own):
        for method in dict.fromkeys(row["method"] for row in rows):
            yield f"| {method} | " + " | ".join(told(rows, model, method) for model in MODELS) + " |"
    yield from ("", "| ours | model | best peer | its mean | our mean | ours / its |", "|---|---|---|---|---|---|")
    for name, words in RIVALS.items():
        methods = {row["method"] for row in peers if any(word in f" {row['method']}" for word in words)}
        for model in MODELS:
            for language in LANGUAGES:
                found = {method: means(peers, model, method, language) for method in methods}
                there = {method: figures[0] for method, figures in found.items() if figures}
                if (mine := means(own, model, name, language)) and there:
                    best = min(there, key=there.__getitem__)
                    ratio = f"{mine[0] / there[best]:.2f}"
                    yield f"| {name} | {model} {language} | {best} | {there[best]:.4f} | {mine[0]:.4f} | {ratio} |"


# --- the command ---


def wanted(method: str, args: argparse.Namespace) -> bool:
    return not args.only or any(word in method for word in args.only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("peers", "ours", "table"))
    parser.add_argument("--models", type=Path)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--environments", type=Path, action="append", default=[])
    parser.add_argument("--only", action="append", default=[], help="methods whose name holds this word")
    parser.add_argument("--model", action="append", default=[], choices=MODELS)
    parser.add_argument("--slow", action="store_true", help="AutoRound's 1000 steps, too")
    parser.add_argument("--whole", action="store_true", help="ours, without switching ingredients off")
    args = parser.parse_args()
    if args.what == "table":
        print(*table(), sep="\n")
        return
    if args.models is None or args.texts is None:
        parser.error("--models and --texts are needed")
    args.environments = [*args.environments, HERE.parents[1] / ".venv-peers"]
    run, name = (run_peers, "quality-peers") if args.what == "peers" else (run_ours, "quality")
    rows = Rows.load(name)
    with tempfile.TemporaryDirectory() as work:
        for model in args.model or MODELS:
            run(Model(model, args.models, args.texts, Path(work)), rows, args)


if __name__ == "__main__":
    main()
