"""The encoders of ggml's block types beside ggml's own, both on one thread, in millions of values per second.

    python scripts/bench/encoders.py

The peer is ggml_quantize_chunk of libggml-python. Each round runs it and then each instruction set of ours on the same
rows, and the ratio is the median of the rounds'. ggml reads floats, ours the bf16 that they came from; the bytes are
compared first. Q8_0 and Q4_0 are bound by memory: on one expert's w2 of 8x7B they are set beside memcpy, by their share
of the bytes per second, read and written, that it moves.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from _bench import best_seconds, write_result
from ggml_oracle import LIBRARY, number

from mixtools.ops import cpu
from mixtools.ops.encode import encode
from mixtools.storage.dtypes import DType

ROWS, COLS = 14336, 4096
ROUNDS = 9
PEER_SECONDS = 0.1  # about what one run of the peer takes: its number of rows follows from its speed
ISAS = [isa for isa in cpu.Isa if isa <= cpu.best_instruction_set()]


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(type: DType, bits: np.ndarray, importance: np.ndarray | None) -> dict[str, Any]:
    """Medians over the rounds: values per second of ggml and of ours, and the ratio of each pair."""
    at = None if importance is None else importance.ctypes.data

    def theirs(rows: np.ndarray) -> np.ndarray:
        out = np.empty((len(rows), type.row_bytes(COLS)), np.uint8)
        LIBRARY.ggml_quantize_chunk(number(type), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, at)
        return out

    floats = (bits[:16].astype(np.uint32) << 16).view(np.float32)
    count = int(np.clip(16 * PEER_SECONDS / seconds(lambda: theirs(floats)), 16, 2048)) // 16 * 16
    bits = bits[:count]
    floats = (bits.astype(np.uint32) << 16).view(np.float32)
    expected, out = theirs(floats), np.empty((count, type.row_bytes(COLS)), np.uint8)
    speeds: dict[str, list[float]] = {way: [] for way in ("ggml", *(isa.name.lower() for isa in ISAS))}
    for _ in range(ROUNDS):
        speeds["ggml"].append(bits.size / seconds(lambda: theirs(floats)))
        for isa in ISAS:
            os.environ[cpu.ISA_VARIABLE] = name = isa.name.lower()
            out[...] = 0
            speeds[name].append(bits.size / seconds(lambda: encode(bits, DType.BF16, type, importance, out=out)))
            assert np.array_equal(out, expected), (type, name)
    ratios = {name: median(np.divide(speeds[name], speeds["ggml"])) for name in [*speeds][1:]}
    return {
        "type": type.value,
        "importance": importance is not None,
        "rows": count,
        "megavalues_per_second": {name: round(median(found) / 1e6, 1) for name, found in speeds.items()},
        "times_ggml": {name: round(float(ratio), 2) for name, ratio in ratios.items()},
    }


def measure_memory(type: DType, bits: np.ndarray) -> dict[str, Any]:
    """Bytes read and written per second by the best instruction set, and by memcpy."""
    os.environ.pop(cpu.ISA_VARIABLE, None)
    out = np.zeros((len(bits), type.row_bytes(COLS)), np.uint8)
    copy = np.zeros_like(bits)
    encoded = best_seconds(lambda: encode(bits, DType.BF16, type, out=out))
    copied = best_seconds(lambda: ctypes.memmove(copy.ctypes.data, bits.ctypes.data, bits.nbytes))
    ours, limit = (bits.nbytes + out.nbytes) / encoded, 2 * bits.nbytes / copied
    return {
        "type": type.value,
        "shape": [*bits.shape],
        "megavalues_per_second": round(bits.size / encoded / 1e6, 1),
        "gigabytes_per_second": round(ours / 1e9, 2),
        "memcpy_gigabytes_per_second": round(limit / 1e9, 2),
        "share_of_memcpy": round(ours / limit, 3),
    }


def main() -> None:
    random = np.random.default_rng(0)
    bits = np.empty((ROWS, COLS), np.uint16)
    for row in bits:
        row[:] = (random.standard_normal(COLS, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    importance = random.chisquare(1, COLS).astype(np.float32)  # a mean square of each column
    results = []
    for type in sorted(cpu.NATIVE, key=lambda type: type.value):
        for weights in (None, importance):
            found = measure(type, bits, weights)
            results.append(found)
            ours = "   ".join(
                f"{name} {found['megavalues_per_second'][name]:.1f} ({ratio:.1f}x)"
                for name, ratio in found["times_ggml"].items()
            )
            kind = "by importance" if weights is not None else "plain"
            print(f"{type.value:7}{kind:14} ggml {found['megavalues_per_second']['ggml']:.1f} M/s   {ours}", flush=True)
    memory = [measure_memory(type, bits) for type in (DType.Q8_0, DType.Q4_0)]
    for found in memory:
        print(
            f"{found['type']:7}{ROWS}x{COLS} bf16   {found['megavalues_per_second']:.0f} M/s   "
            f"{found['gigabytes_per_second']:.1f} GB/s, {found['share_of_memcpy']:.2f} of memcpy's "
            f"{found['memcpy_gigabytes_per_second']:.1f}"
        )
    print(write_result("encoders", {"threads": 1, "encoders": results, "memory": memory}))


if __name__ == "__main__":
    main()
