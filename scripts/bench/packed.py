"""Products with ggml's blocks as they lie, and with our own of other formats, against the machine's memory, its own
decoder and the same matrix in bf16; generation from a GGUF against llama.cpp on the same file and threads, in one run.

    python scripts/bench/packed.py [MODEL.gguf ... --peer-python PYTHON] [--tokens 32] [--models-only]

For a peer, PYTHON has llama-cpp-python. The two take turns, `--rounds` times each; the best of each counts, and the
ratio of each pair is told. Both have OMP_NUM_THREADS' threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _bench import best_seconds, write_result

import mixtools
from mixtools.inference import blocks, host
from mixtools.inference.blocks import Blocks
from mixtools.inference.generate import Options, stream
from mixtools.inference.model import Mixtral
from mixtools.inference.products import linear
from mixtools.machine import peak_memory
from mixtools.ops import repack
from mixtools.ops.cpu import NATIVE
from mixtools.ops.decode import decode
from mixtools.ops.repack import Kind, Type
from mixtools.storage.dtypes import DType

GOALS = {"peer_ratio": 0.5}
PEER = Path(__file__).parent / "quality_peers" / "time_llama.py"
OUT, IN = 14336, 4096  # w1 of 8x7B
ROWS = (1, 2, 4, 8, 16, 32, 64)


def some_blocks(type: Type) -> np.ndarray:
    from ops.test_decode import random_blocks

    if isinstance(type, DType):
        return random_blocks(type, OUT, IN // type.block)
    # any bytes below 128 are numbers: no scale is infinite, few are too small to be usual
    return np.random.default_rng(0).integers(1, 127, (OUT, type.row_bytes(IN)), dtype=np.uint8)


def kinds() -> list[Kind]:
    """Of our own blocks, those of what files usually are."""
    usual = ((4, 128), (4, 32), (4, repack.WHOLE_ROW), (3, 128), (8, 128))
    found = [repack.grouped(IN, bits, group) for bits, group in usual]
    return [*(kind for kind in found if kind is not None), repack.NF4, repack.INT8_ROW]


def widened() -> dict[int, float]:
    """Seconds of the same products with a matrix of bf16."""
    weight = host.empty((OUT, IN), torch.device("cpu"), torch.bfloat16).normal_()
    xs = {rows: torch.randn(rows, IN).bfloat16() for rows in ROWS}
    return {rows: best_seconds(lambda x=x: linear(x, weight), rounds=5) for rows, x in xs.items()}


def products(type: Type) -> dict[str, Any]:
    """Bytes of blocks a second, of one x and of several; and how many rows are faster decoded first."""
    data = torch.from_numpy(some_blocks(type))
    weight, rates = Blocks(data, type), {}
    for rows in ROWS:
        x = torch.randn(rows, IN, dtype=torch.bfloat16)
        seconds = {}
        for way, few in (("registers", rows), ("decoded", 0)):
            blocks.FEW_ROWS = few
            seconds[way] = best_seconds(lambda x=x: weight.product(x), rounds=5)
        rates[rows] = {way: data.nbytes / taken for way, taken in seconds.items()}
    values = decode(data.numpy(), type, DType.BF16)
    threads = torch.get_num_threads()
    decoding = best_seconds(lambda: decode(data.numpy(), type, DType.BF16, out=values, threads=threads), rounds=5)
    return {"bytes": data.nbytes, "rates": rates, "decoding": data.nbytes / decoding}


def reading(size: int = 1 << 30) -> float:
    """Bytes a second that a sum over memory reads."""
    memory = torch.ones(size // 4)
    return size / best_seconds(memory.sum, rounds=5)


def ours(file: Path, prompt: list[int], tokens: int) -> dict[str, float]:
    checkpoint = mixtools.open(file)
    model = Mixtral.load(checkpoint)
    began = time.perf_counter()
    steps = stream(model, [prompt], Options(max_new_tokens=tokens, stop=()))
    next(steps)
    first = time.perf_counter()
    count = sum(1 for _ in steps)
    done = time.perf_counter()
    return {"prompt_seconds": first - began, "tokens_per_second": count / (done - first), "peak_bytes": peak_memory()}


def peer(python: str, file: Path, prompt: list[int], tokens: int) -> dict[str, float]:
    command = [python, PEER, file, json.dumps(prompt), tokens, torch.get_num_threads()]
    told = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def alone(file: Path, prompt: list[int], tokens: int) -> dict[str, float]:
    """Ours in a process of its own, as the peer is."""
    command = [sys.executable, __file__, "--one", file, json.dumps(prompt), tokens]
    told = subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def beside(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    prompt = np.random.default_rng(0).integers(3, 2000, args.prompt).tolist()
    found: dict[str, Any] = {"bytes": file.stat().st_size, "ours": [], "peer": []}
    for _ in range(args.rounds):
        found["ours"].append(alone(file, prompt, args.tokens))
        if args.peer_python:
            found["peer"].append(peer(args.peer_python, file, prompt, args.tokens))
        print(file.name, found["ours"][-1], found["peer"][-1:], flush=True)
    if found["peer"]:
        pairs = [one["tokens_per_second"] / other["tokens_per_second"]
                 for one, other in zip(found["ours"], found["peer"], strict=True)]  # fmt: skip
        found["ratios"], found["peer_ratio"] = pairs, statistics.median(pairs)
        prompts = [other["prompt_seconds"] / one["prompt_seconds"]
                   for one, other in zip(found["ours"], found["peer"], strict=True)]  # fmt: skip
        found["prompt_ratio"] = statistics.median(prompts)
    return found


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        file, prompt, tokens = sys.argv[2:]
        print(json.dumps(ours(Path(file), json.loads(prompt), int(tokens))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--peer-python")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models-only", action="store_true", help="no products of single matrices")
    args = parser.parse_args()
    results: dict[str, Any] = {"goals": GOALS, "reading": reading(), "models": {}}
    if not args.models_only:
        results |= {"shape": [OUT, IN], "widened": widened(), "types": {}}
    for type in [] if args.models_only else [*sorted(NATIVE, key=lambda type: type.value), *kinds()]:
        results["types"][type.value] = products(type)
        print(type.value, {n: f"{r['registers'] / 1e9:.1f}" for n, r in results["types"][type.value]["rates"].items()},
              flush=True)  # fmt: skip
    for file in args.models:
        results["models"][file.name] = beside(file, args)
    print(write_result("packed", results))


if __name__ == "__main__":
    main()
