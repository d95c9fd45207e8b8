"""What the output's norm costs a matrix of 8x7B, and what it is worth to a model.

    OMP_NUM_THREADS=1 python scripts/bench/output_norm.py cost
    python scripts/bench/output_norm.py worth --calibration TEXT --eval en=TEXT --eval de=TEXT MODEL...

`cost`: CPU seconds of the same rule in either norm, one after the other, beside the calibration's forward pass. The
weights' norm is timed with a covariance, as `laser --text` runs it (it tells every layer error, for which it needs all
vectors), and without. Expected before it was written: Cholesky and two half products (2.5 n³ at gemm's rate), a second
tridiagonal form for the weights' own spectrum (the report's), less all vectors: 1.3 of the run without a text, 0.8 of
that with one. Found: 1.2 to 1.6 of the run without a text, whose report lacks the output's half, and 0.6 to 1.15 of
that with one. What is lost to expectation is the second form: half of it is matrix times vector, at memory's speed.

`worth`: mean KL divergence from the source, by `check`, of all experts of all layers at one rank, and under a budget of
bytes. Expected, from a sketch: the output's norm at 0.7 of the weights' KLD on a model without outlier channels, at
0.35 to 0.5 on its twin with them.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import write_result
from laser import structured
from torch import Tensor

import mixtools
from mixtools.linalg.output import Covariance
from mixtools.methods.laser import method

SHAPES = {"w1": (14336, 4096), "w2": (4096, 14336), "q": (4096, 4096)}
TOKENS = 6000
RULES = ("rank=512", "activation=0.02")
RANKS = (102, 128, 160)
BUDGETS = (0.6, 0.8, 0.95)


def covariance(weight: Tensor) -> Covariance:
    """Of inputs whose features differ in size by 30 times, on the shorter side."""
    rows, cols = weight.shape
    x = torch.randn(TOKENS, cols, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 0.5, cols)
    if rows < cols:
        y = x @ weight.float().T
        return Covariance(y.T @ y, "out", float(x.square().sum() / cols), TOKENS)
    return Covariance(x.T @ x, "in", None, TOKENS)


def cpu_seconds(run: Callable[[], method.Result]) -> tuple[float, method.Result]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def cost(rounds: int) -> None:
    if "OMP_NUM_THREADS" not in os.environ:
        raise SystemExit("set OMP_NUM_THREADS: scipy's and torch's LAPACK each take their number of threads from it")
    rows = []
    for name, shape in SHAPES.items():
        weight = structured(shape) if shape[0] <= shape[1] else structured((shape[1], shape[0])).T.contiguous()
        given = covariance(weight)
        for rule in RULES:
            weights, output = method.Options.parse(rule), method.Options.parse(rule, norm="output")
            ways: dict[str, Callable[[], method.Result]] = {
                "output": lambda o=output, w=weight, c=given: method.encode(w, o, c),
                "weights, with a text": lambda o=weights, w=weight, c=given: method.encode(w, o, c),
            }
            if not weights.rank_rule.needs_covariance:
                ways["weights"] = lambda o=weights, w=weight: method.encode(w, o)
            runs = [{way: cpu_seconds(run) for way, run in ways.items()} for _ in range(rounds)]
            seconds = {way: min(run[way][0] for run in runs) for way in ways}
            found = {way: runs[0][way][1].report for way in ways}
            row: dict[str, Any] = {
                "matrix": name, "shape": list(shape), "rule": rule, "cpu_seconds": seconds,
                "of_weights": {way: seconds["output"] / other for way, other in seconds.items() if way != "output"},
                "rank": {way: report.rank for way, report in found.items()},
                "layer_error": {way: report.layer_error for way, report in found.items()},
            }  # fmt: skip
            rows.append(row)
            told = ", ".join(f"{share:.2f} of {way}" for way, share in row["of_weights"].items())
            print(
                f"{name} {shape[0]}x{shape[1]} {rule:16s} output's norm {seconds['output']:.1f} s: {told}", flush=True
            )
    print(write_result("laser-output-cost", {"threads": torch.get_num_threads(), "rounds": rounds, "rows": rows}))


def worth(models: list[Path], calibration: Path, texts: dict[str, Path]) -> None:
    rows = []
    for model in models:
        for rank in RANKS:
            rows.append(compare(model, calibration, texts, f"rank {rank}", {"rank_rule": f"rank={rank}"}))
        for budget in BUDGETS:
            rows.append(compare(model, calibration, texts, f"budget {budget:g}", {"budget": budget}))
    asked = {
        "calibration": calibration.name,
        "samples": 64,
        "seq_len": 256,
        "texts": {k: v.name for k, v in texts.items()},
    }
    print(write_result("laser-output-worth", {**asked, "rows": rows}))


def compare(model: Path, calibration: Path, texts: dict[str, Path], what: str, how: dict[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"model": model.parent.name, "what": what, "kld": {}, "ln_ratio": {}}
    for norm in ("weights", "output"):
        given = {"text": calibration, "samples": 64, "seq_len": 256, "norm": norm} if norm == "output" else {}
        with tempfile.TemporaryDirectory() as folder:
            made = mixtools.laser(model, Path(folder) / "out", layers="all", targets="w1,w2,w3", **how, **given)
            if "budget" in made.document:
                row.setdefault("share", {})[norm] = made.document["budget"]["share"]
                row.setdefault("whole", {})[norm] = made.document["budget"]["whole"]
            checked = {
                name: mixtools.check(Path(folder) / "out", model, text=text, ctx=256, new_tokens=0).document
                for name, text in texts.items()
            }
        row["kld"][norm] = {name: found["kld"]["mean"] for name, found in checked.items()}
        row["ln_ratio"][norm] = {name: found["perplexity"]["ln_ratio"] for name, found in checked.items()}
    figures = ["  ".join(f"{name} {x:.4f}" for name, x in row["kld"][norm].items()) for norm in ("weights", "output")]
    print(f"{row['model']:14s} {what:12s} KLD weights' norm: {figures[0]}   output's: {figures[1]}", flush=True)
    return row


def pair(text: str) -> tuple[str, Path]:
    name, _, file = text.partition("=")
    return name, Path(file)


def main() -> None:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    costs = commands.add_parser("cost")
    costs.add_argument("--rounds", type=int, default=2)
    worths = commands.add_parser("worth")
    worths.add_argument("models", nargs="+", type=Path)
    worths.add_argument("--calibration", type=Path, required=True)
    worths.add_argument("--eval", type=pair, action="append", required=True, metavar="NAME=TEXT")
    arguments = parser.parse_args()
    if arguments.command == "cost":
        cost(arguments.rounds)
    else:
        worth(arguments.models, arguments.calibration, dict(arguments.eval))


if __name__ == "__main__":
    main()
