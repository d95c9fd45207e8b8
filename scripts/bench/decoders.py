"""Blocks of ggml decoded: every type of ours on each instruction set, to bf16 and to fp32, on one thread.

    pip install libggml-python; python scripts/bench/decoders.py

One expert's w2 of 8x7B, [4096, 14336], as ggml itself encodes normal weights. Each way decodes 2 MiB of blocks after
the other into memory that is there already. The peers are ggml (C, fp32) and the gguf package (numpy, fp32); the limit
is memcpy of what bf16 comes to. Then a layer's filling: blocks read from the page cache and decoded to bf16, beside
bf16 read from the page cache to the same place. The ways take turns, and the median of their processor times counts:
one thread does all of the work, and what else the machine has to do is not in it.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from _bench import write_result
from ggml_oracle import traits_of

from mixtools.ops import cpu
from mixtools.ops.decode import NATIVE, decode
from mixtools.storage.dtypes import DType

VALUES = 4096 * 14336
SAMPLE = 1 << 20  # values that are encoded, again and again in the matrix
CHUNK = 2 << 20  # bytes of blocks that are read and decoded at a time
ROUNDS = 7
ISAS = [isa for isa in cpu.Isa if isa <= cpu.best_instruction_set()]


def encoded(dtype: DType) -> np.ndarray:
    """[blocks, bytes of a block]"""
    weights = np.random.default_rng(0).normal(0, 0.02, SAMPLE).astype(np.float32)
    traits = traits_of(dtype)
    blocks = np.empty((SAMPLE // traits.values, traits.size), np.uint8)
    traits.from_float_ref(weights.ctypes.data, blocks.ctypes.data, SAMPLE)
    return np.resize(blocks, (VALUES // traits.values, traits.size))


def medians(ways: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Processor seconds of each way."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(ROUNDS + 1):
        for way, run in ways.items():
            start = time.thread_time()
            run()
            if turn:  # the first meets cold pages
                seconds[way].append(time.thread_time() - start)
    return {way: statistics.median(times) for way, times in seconds.items()}


class Matrix:
    """One type's blocks and the memory that they are decoded into."""

    def __init__(self, dtype: DType, memory: np.ndarray, folder: Path) -> None:
        self.dtype, self.memory = dtype, memory
        self.blocks = encoded(dtype)
        self.values = traits_of(dtype).values
        self.step = CHUNK // self.blocks.shape[1]
        self.file = folder / dtype.value
        self.blocks.tofile(self.file)

    def chunks(self):
        return (slice(first, first + self.step) for first in range(0, len(self.blocks), self.step))

    def ours(self, to: DType, isa: cpu.Isa) -> None:
        os.environ[cpu.ISA_VARIABLE] = isa.name.lower()
        out = self.memory.view(f"u{to.itemsize}")[:VALUES].reshape(-1, self.values)
        for chunk in self.chunks():
            decode(self.blocks[chunk].reshape(1, -1), self.dtype, to, out=out[chunk].reshape(1, -1))

    def ggml(self) -> None:
        out, to_float = self.memory.view(np.float32)[:VALUES].reshape(-1, self.values), traits_of(self.dtype).to_float
        for chunk in self.chunks():
            part = out[chunk]
            to_float(self.blocks[chunk].ctypes.data, part.ctypes.data, part.size)

    def numpy(self) -> None:
        gguf.quants.dequantize(
            self.blocks[: SAMPLE // self.values].reshape(16, -1), gguf.GGMLQuantizationType[self.dtype.value]
        )

    def fill(self, isa: cpu.Isa) -> None:
        os.environ[cpu.ISA_VARIABLE] = isa.name.lower()
        out = self.memory.view(np.uint16)[:VALUES].reshape(-1, self.values)
        buffer = np.empty(self.step * self.blocks.shape[1], np.uint8)
        with self.file.open("rb", buffering=0) as file:
            for chunk in self.chunks():
                part = out[chunk].reshape(1, -1)
                size = part.size // self.values * self.blocks.shape[1]
                file.readinto(memoryview(buffer)[:size])
                decode(buffer[None, :size], self.dtype, DType.BF16, out=part)


def read(file: Path, into: np.ndarray) -> None:
    with file.open("rb", buffering=0) as source:
        for first in range(0, into.nbytes, CHUNK):
            source.readinto(memoryview(into)[first : first + CHUNK])


def measure(matrix: Matrix, bf16: Path) -> dict[str, object]:
    """Gvalues/s of each way."""
    size = 2 * VALUES
    target, source = matrix.memory[:size], matrix.memory[size : 2 * size]
    ways: dict[str, Callable[[], object]] = {}
    for to in (DType.BF16, DType.F32):
        for isa in ISAS:
            ways[f"{to.value} {isa.name.lower()}"] = lambda to=to, isa=isa: matrix.ours(to, isa)
    ways["F32 ggml"], ways["F32 gguf"] = matrix.ggml, matrix.numpy
    ways["BF16 memcpy"] = lambda: ctypes.memmove(target.ctypes.data, source.ctypes.data, size)
    for isa in ISAS:
        ways[f"fill {isa.name.lower()}"] = lambda isa=isa: matrix.fill(isa)
    ways["fill from bf16"] = lambda: read(bf16, target)
    return {way: (SAMPLE if way == "F32 gguf" else VALUES) / s / 1e9 for way, s in medians(ways).items()}


def main() -> None:
    memory = cpu.aligned_empty((4 * VALUES,), np.dtype(np.uint8))
    memory[:] = 1
    best, results = ISAS[-1].name.lower(), []
    with tempfile.TemporaryDirectory() as folder:
        bf16 = Path(folder) / "bf16"
        memory[: 2 * VALUES].tofile(bf16)
        for dtype in (dtype for dtype in DType if dtype in NATIVE):
            matrix = Matrix(dtype, memory, Path(folder))
            speed = measure(matrix, bf16)
            results.append({"type": dtype.value, "gigavalues_per_second": speed})
            matrix.file.unlink()
            ours = "  ".join(
                f"{to} " + " ".join(f"{speed[f'{to} {isa.name.lower()}']:.1f}" for isa in ISAS)
                for to in ("BF16", "F32")
            )
            print(
                f"{dtype.value:6} Gvalues/s   {ours}   ggml {speed['F32 ggml']:.2f}   gguf {speed['F32 gguf']:.3f}   "
                f"memcpy {speed['BF16 memcpy']:.1f}   filled {speed[f'fill {best}']:.1f}, "
                f"{speed[f'fill {best}'] / speed['fill from bf16']:.2f}x of bf16's {speed['fill from bf16']:.1f}",
                flush=True,
            )
    os.environ.pop(cpu.ISA_VARIABLE)
    print(write_result("decoders", results))


if __name__ == "__main__":
    main()
