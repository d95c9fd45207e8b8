"""Transposition of one expert's w2 of 8x7B, [14336, 4096] in 2 bytes, and the search for NaN and infinity in it.

    python scripts/bench/transpose.py

The peer is torch, on the same number of threads. The limit of a transposition is memcpy of the same bytes, into
memory that is there already or fresh from the system. The search is set beside numpy's maximum, which
reads the same bytes once.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from _bench import best_seconds, write_result

from mixtools.ops import cpu
from mixtools.storage.dtypes import DType

ROWS, COLS = 14336, 4096


def aligned(size: int) -> np.ndarray:
    raw = np.zeros(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size]


def in_parts(function, threads: int, *arrays: np.ndarray) -> None:
    """function(part of each array) in so many threads: memcpy and numpy have no threads of their own."""
    parts = list(zip(*(np.array_split(array, threads) for array in arrays), strict=True))
    if threads == 1:
        function(*parts[0])
        return
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(lambda part: function(*part), parts))


def main() -> None:
    size = ROWS * COLS * 2
    source, target = aligned(size), aligned(size)
    values = np.random.default_rng(0).normal(0, 0.02, ROWS * COLS).astype(np.float32).view(np.uint32)
    source.view(np.uint16)[:] = values >> 16  # bf16, finite
    matrix, out = source.view(np.uint16).reshape(ROWS, COLS), target.view(np.uint16).reshape(COLS, ROWS)
    as_torch, torch_out = torch.from_numpy(matrix.view(np.int16)), torch.from_numpy(out.view(np.int16))
    bf16 = as_torch.view(torch.bfloat16)

    def memcpy(to: np.ndarray, of: np.ndarray) -> None:
        ctypes.memmove(to.ctypes.data, of.ctypes.data, to.nbytes)

    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs = {
            "transpose into touched memory": {
                "ours": lambda n=threads: cpu.transpose(matrix, out=out, threads=n),
                "torch": lambda: torch_out.copy_(as_torch.t()),
                "memcpy": lambda n=threads: in_parts(memcpy, n, target, source),
            },
            "transpose into fresh memory": {
                "ours": lambda n=threads: cpu.transpose(matrix, threads=n),
                "torch": lambda: as_torch.t().contiguous(),
                "memcpy": lambda n=threads: in_parts(memcpy, n, np.empty_like(source), source),
            },
            "first_nonfinite": {
                "ours": lambda n=threads: cpu.first_nonfinite(source, DType.BF16, threads=n),
                "torch": lambda: bf16.isfinite().all(),
                "numpy max": lambda n=threads: in_parts(np.max, n, source.view(np.uint64)),
            },
        }
        for name, ways in runs.items():
            speed = {way: size / best_seconds(run) / 1e9 for way, run in ways.items()}
            results.append({"name": name, "threads": threads, "gigabytes_per_second": speed})
            ours, torchs, limit = speed.values()
            print(
                f"{name} {ROWS}x{COLS} bf16, {threads} thread{'s'[: threads - 1]}   ours {ours:.1f} GB/s   "
                f"torch {torchs:.2f} GB/s   {ours / torchs:.1f}x   {ours / limit:.2f} of {[*ways][2]}, {limit:.1f} GB/s"
            )
    assert np.array_equal(cpu.transpose(matrix, out=out), matrix.T)
    print(write_result("transpose", results))


if __name__ == "__main__":
    main()
