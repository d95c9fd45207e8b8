"""What a calibrated layer takes, by stage, beside GPTQModel on the same model and the same tokens, in one run.

    python scripts/bench/layer.py MODEL --text FILE [--peer-python PYTHON] [--samples 16 --seq-len 512]

MODEL is a folder of Hugging Face's with a tokenizer (scripts/make_checkpoint --preset 8x7b --layers 1 --layout hf). The
peer is loaded before its time begins; ours reads the layer within. Both have OMP_NUM_THREADS' threads.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import write_result

import mixtools
from mixtools.inference.corpus import sequences

GOALS = {"peer_ratio": 2.0, "rounding_share": 1 / 3, "peak_bytes": 12_000_000_000}
MIXTOOLS = Path(sys.executable).with_name("mixtools")
PEER = Path(__file__).parent / "quality_peers" / "time_gptqmodel.py"


def product_rate(side: int = 4096) -> float:
    """Operations a second of a square product in fp32, on all threads."""
    one, other = torch.randn(side, side), torch.randn(side, side)
    one @ other
    began = time.perf_counter()
    for _ in range(3):
        one @ other
    return 3 * 2 * side**3 / (time.perf_counter() - began)


def ours(args: argparse.Namespace, work: Path, *more: str) -> dict[str, Any]:
    out = work / "ours"
    command = [
        MIXTOOLS, "quantize", args.model, out, "--method", "gptq", "--calibration", args.text, "--samples",
        args.samples, "--seq-len", args.seq_len, "--overwrite", "--json", "--quiet", *more,
    ]  # fmt: skip
    done = json.loads(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)
    report = json.loads((out / "quantize-report.json").read_text("utf-8"))
    stages, layers = report["seconds"]["stages"], len(report["seconds"]["layers"])
    return {
        "seconds_a_layer": report["seconds"]["total"] / layers, "stages": stages,
        "rounding_share": stages["rounding"] / report["seconds"]["total"], "peak_bytes": done["peak_memory_bytes"],
    }  # fmt: skip


def peer(args: argparse.Namespace, work: Path, layers: int) -> dict[str, Any]:
    found = sequences(args.text, mixtools.open(args.model), samples=args.samples, seq_len=args.seq_len)
    np.save(work / "ids.npy", np.stack([ids.numpy() for ids in found.sequences]))
    command = [args.peer_python, PEER, args.model, work / "ids.npy"]
    paths = [str(Path(word).absolute()) if Path(word).exists() else str(word) for word in command]
    told = subprocess.run(paths, check=True, capture_output=True, text=True, cwd=work).stdout.splitlines()
    done = json.loads(told[-1])
    return {**done, "seconds_a_layer": done["seconds"] / layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--peer-python")
    args = parser.parse_args()
    layers = mixtools.open(args.model).config.num_layers
    results: dict[str, Any] = {
        "goals": GOALS, "layers": layers, "samples": args.samples, "seq_len": args.seq_len,
        "threads": os.environ.get("OMP_NUM_THREADS"), "product_rate": product_rate(),
    }  # fmt: skip
    with tempfile.TemporaryDirectory(dir=Path(args.model).parent) as folder:
        work = Path(folder)
        results["ours"] = ours(args, work)
        print(results["ours"], flush=True)
        if args.peer_python:
            results["peer"] = peer(args, work, layers)
            results["peer_ratio"] = results["peer"]["seconds_a_layer"] / results["ours"]["seconds_a_layer"]
            print(results["peer"], results["peer_ratio"], flush=True)
        results["without_sweeps"] = ours(args, work, "--sweeps", "0")
    print(write_result("layer", results))


if __name__ == "__main__":
    sys.exit(main())
