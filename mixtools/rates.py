"""How fast this machine is at what mixtools asks of it: the limits that its figures are held against."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .inference.blocks import Blocks
from .storage.dtypes import DType

_SECONDS = 0.4  # that each measurement goes on for, after a first run
_SIDE = {"cpu": 2048, "cuda": 8192}
_BYTES = {"cpu": 1 << 28, "cuda": 1 << 31}
_BLOCKS = (DType.Q8_0, DType.Q6_K, DType.Q4_K, DType.Q2_K)


def measure(device: torch.device) -> dict[str, Any]:
    """Bytes a second that a copy moves (read and written), operations a second of a square product, and on a CPU bytes
    of blocks a second in a product with one token.
    """
    side, size = _SIDE.get(device.type, 2048), _BYTES.get(device.type, 1 << 28)
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    found: dict[str, Any] = {
        "copy_bytes_per_second": 2 * size / _best(lambda: target.copy_(source), device),
        "products_per_second": {
            str(dtype).removeprefix("torch."): _products(side, device, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    if device.type == "cpu":
        found["blocks_bytes_per_second"] = {type.value: _blocks(type) for type in _BLOCKS}
    return found


def _products(side: int, device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions, each counted."""
    one, other = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best(lambda: one @ other, device)


def _blocks(type: DType, rows: int = 14336, columns: int = 4096) -> float:
    """Of a matrix of 8x7B's size, larger than a core's caches; what the bytes say does not change the time."""
    data = torch.from_numpy(np.zeros((rows, type.row_bytes(columns)), np.uint8))
    x = torch.randn(1, columns)
    weight = Blocks(data, type)
    return data.nbytes / _best(lambda: weight.product(x), torch.device("cpu"))


def _best(run: Callable[[], object], device: torch.device) -> float:
    """Least seconds of a run."""

    def done() -> None:
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    done()
    best, end = float("inf"), time.perf_counter() + _SECONDS
    while True:
        began = time.perf_counter()
        done()
        now = time.perf_counter()
        best = min(best, now - began)
        if now >= end:
            return best
