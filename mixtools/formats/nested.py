"""nf4's scales quantized once more: their mean, and what each is beside it in bytes of a dynamic exponent.

    absmax fp32 [blocks] ─► less the mean ─► in blocks of 256, over the largest ─► the nearest of 256 values, a byte

As bitsandbytes 0.50.2 does on a CPU, which looks the nearest up in a table of 65536 steps from -1 to 1: between two
steps it may take the next but one. The values (https://arxiv.org/abs/1511.04561) are as torch makes them with AVX2;
they lie in the file and are read from there. Source: create_dynamic_map in bitsandbytes/functional.py, and
csrc/cpu_ops.cpp of https://github.com/bitsandbytes-foundation/bitsandbytes.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = VALUES = 256  # scales of a block, and what a byte can mean
_STEPS = 1 << 16
# the middle of each of 2^i equal parts between a tenth of 10^(i-6) and 10^(i-6), for i from 0 to 6
_POSITIVE = """
    5.5000004e-07 3.2500002e-06 7.75e-06 2.1249998e-05 4.375e-05 6.625e-05 8.875e-05 0.00015625001 0.00026875004
    0.00038125002 0.00049375003 0.0006062501 0.00071875006 0.00083125 0.0009437501 0.0012812499 0.00184375
    0.00240625 0.00296875 0.0035312497 0.00409375 0.0046562497 0.0052187503 0.00578125 0.00634375 0.00690625
    0.00746875 0.00803125 0.00859375 0.009156249 0.00971875 0.01140625 0.01421875 0.01703125 0.019843752 0.02265625
    0.02546875 0.028281251 0.03109375 0.03390625 0.036718752 0.03953125 0.042343747 0.04515625 0.04796875 0.05078125
    0.05359375 0.05640625 0.059218753 0.06203125 0.06484375 0.067656256 0.070468746 0.07328125 0.07609375 0.07890625
    0.08171876 0.08453125 0.08734375 0.09015625 0.092968754 0.09578126 0.09859375 0.107031256 0.12109375 0.13515624
    0.14921875 0.16328125 0.17734376 0.19140625 0.20546874 0.21953125 0.23359375 0.24765624 0.26171875 0.27578127
    0.28984374 0.30390626 0.31796873 0.33203125 0.34609374 0.36015624 0.37421876 0.38828123 0.40234375 0.41640624
    0.43046874 0.44453126 0.45859373 0.47265625 0.4867187 0.50078124 0.5148437 0.5289062 0.54296875 0.5570313
    0.5710938 0.58515626 0.5992187 0.61328125 0.6273438 0.6414063 0.65546876 0.6695312 0.68359375 0.6976563
    0.7117188 0.72578126 0.7398437 0.75390625 0.7679688 0.78203124 0.79609376 0.8101562 0.82421875 0.8382813
    0.85234374 0.86640626 0.8804687 0.89453125 0.9085938 0.92265624 0.93671876 0.9507812 0.96484375 0.9789063
    0.99296874
"""


def blocks(count: int) -> int:
    """Blocks of so many scales."""
    return -(-count // BLOCK)


def encode(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """fp32 [n] -> uint8 [n], fp32 largest values [blocks(n)], fp32 [256] what the bytes mean, the mean []."""
    import torch

    # torch's sum over all of a tensor depends on the threads, the sums over two rows do not
    mean = torch.stack((absmax, absmax)).mean(1)[0]
    rest = torch.nn.functional.pad(absmax - mean, (0, -len(absmax) % BLOCK)).view(-1, BLOCK).numpy()
    largest = np.abs(rest).max(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        over = np.clip(rest * (np.float32(1) / largest), np.float32(-1), np.float32(1))
        # the product and the sum are rounded once there, as they are on the way through fp64
        steps = (((over + np.float32(1)) * np.float32(0.5)).astype("f8") * (_STEPS - 1) + 0.5).astype("f4")
    nearest = _table()[np.where(np.isnan(steps), 0, steps).astype("i4")]
    codes = np.where(largest == 0, np.uint8(0), nearest).reshape(-1)[: len(absmax)]
    return torch.from_numpy(codes), torch.from_numpy(largest[:, 0]), torch.from_numpy(_values().copy()), mean


def decode(codes: Tensor, largest: Tensor, values: Tensor, mean: Tensor) -> Tensor:
    """The absmax fp32 [n] that a reader sees, from what `encode` gives."""
    each = largest[:, None].expand(-1, BLOCK).reshape(-1)[: len(codes)]
    return values.index_select(0, codes.int()).mul_(each).add_(mean)


@cache
def _values() -> npt.NDArray[np.float32]:
    """What the bytes mean, in order."""
    positive = np.array(_POSITIVE.split(), "f4")
    return np.concatenate((-positive[::-1], np.zeros(1, "f4"), positive, np.ones(1, "f4")))


@cache
def _table() -> npt.NDArray[np.uint8]:
    """The byte next to each step from -1 to 1; at a midpoint the lower."""
    values = _values()
    steps = np.float32(-1) + np.float32(2) * np.arange(_STEPS, dtype="f4") / np.float32(_STEPS - 1)
    nearest: npt.NDArray[np.uint8] = np.searchsorted(np.float32(0.5) * (values[:-1] + values[1:]), steps).astype("u1")
    return nearest
