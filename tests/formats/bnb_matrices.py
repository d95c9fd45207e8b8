"""Matrices that nf4 and int8 are tried on: the same numbers everywhere, as fp64 computes them or as stored."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

GOLDEN = Path(__file__).parents[1] / "golden" / "bnb.safetensors"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def spread(rows: int, columns: int) -> np.ndarray:
    """[rows, columns] in (-1.5, 1.5), most of them near 0: sums of multiples of irrational numbers, without wholes."""
    count = np.arange(1, rows * columns + 1, dtype=np.float64)
    parts = [count * np.sqrt(prime) % 1.0 for prime in (2.0, 3.0, 7.0)]
    return (parts[0] + parts[1] + parts[2] - 1.5).reshape(rows, columns)


def matrices() -> dict[str, torch.Tensor]:
    """By name. Blocks run over the rows' ends where a row is no multiple of 64 values, and may end short."""
    odd = spread(5, 77)
    odd[0] = 0.0  # a block of zeros
    odd[1] = 2.5
    odd[2] *= 1e4
    odd[3] *= 1e-40  # denormal
    odd[4, ::3] = 1e-3  # equal to nothing but itself
    half = spread(4, 128)
    half[1] *= 2e-7  # denormal in fp16
    half[2] *= 4e4
    half[3] = -0.5
    ends = spread(3, 43)
    ends[2, -1] = 0.0  # alone in the last block
    many = spread(270, 64) ** 5  # blocks enough for two of blocks
    many[7] = 0.0
    many[100:140] *= 1e-3
    huge = spread(6, 64) * 1e37
    huge[3] *= 1e-30
    with safe_open(GOLDEN, "pt") as file:  # found by a search: see tests/golden/bnb.md
        edges = {name: file.get_tensor(f"{name}/input") for name in ("edges", "edges-half")}
    return {
        **edges,
        "plain": torch.from_numpy(spread(6, 128) * 0.02).to(BF16),
        "odd": torch.from_numpy(odd).to(FP32),
        "half": torch.from_numpy(half).to(FP16),
        "ends": torch.from_numpy(ends).to(FP32),
        "few": torch.from_numpy(spread(1, 3)).to(BF16),
        "many": torch.from_numpy(many).to(BF16),
        "huge": torch.from_numpy(huge).to(BF16),
        "steps": torch.from_numpy(np.round(spread(3, 128) * 8) / 8).to(FP16),  # ties, and the same value often
        "zeros": torch.zeros(3, 50, dtype=BF16),
    }


BEYOND_FP16 = ("huge",)  # which int8 cannot hold
