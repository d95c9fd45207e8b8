"""Random matrices in every kind of planes, each with the bytes that it was made of and the values that these mean.

The values are those of the formats' own decoders on the CPU, or of the bits themselves: none comes from the planes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from ops.test_decode import random_blocks
from torch import Tensor

from mixtools.formats import nested
from mixtools.formats.awq import Awq
from mixtools.formats.gptq import Gptq
from mixtools.formats.nf4 import Nf4, levels
from mixtools.ops.decode import decode
from mixtools.ops.gpu import planes
from mixtools.ops.gpu.planes import Planes
from mixtools.storage.dtypes import DType

BLOCKS = [DType.Q4_0, DType.Q8_0, DType.Q2_K, DType.Q3_K, DType.Q4_K, DType.Q5_K, DType.Q6_K]


class Made(NamedTuple):
    planes: Planes
    values: Tensor  # fp32 [out, in]
    stored: int  # bytes


def dense(rows: int, columns: int, seed: int, *, dtype: torch.dtype) -> Made:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).to(dtype)
    return Made(planes.dense(weight), weight.float(), weight.numel() * weight.itemsize)


def ggml(rows: int, columns: int, seed: int, *, type: DType) -> Made:
    blocks = random_blocks(type, rows, columns // type.block, seed=seed)
    values = torch.from_numpy(decode(blocks, type, DType.F32).view(np.float32))
    return Made(planes.ggml(torch.from_numpy(blocks), type), values, blocks.nbytes)


def _grid(rows: int, columns: int, group: int, seed: int, zeros: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    groups = 1 if group == -1 else columns // group
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    scales = (torch.rand(rows, groups, generator=random) * 0.02 + 1e-5).half().float()
    return codes, scales, torch.randint(zeros[0], zeros[1] + 1, (rows, groups), generator=random)


def gptq(rows: int, columns: int, seed: int, *, group: int, symmetric: bool = False, v2: bool = False) -> Made:
    made = Gptq(4, group, symmetric=symmetric, v2=v2)
    zeros = (8, 8) if symmetric else (0 if v2 else 1, 15)
    stored = made.encode(*_grid(rows, columns, group, seed, zeros)).parts
    qweight, qzeros, scales, g_idx = stored
    if not symmetric and not v2:
        qzeros = qzeros.clone()
        qzeros[0, 0] = -1  # eight stored zeros of 15, which mean 16: no encoder of ours makes them, others may
        stored = (qweight, qzeros, scales, g_idx)
    ours = planes.gptq(qweight, qzeros, scales, g_idx, group=group, symmetric=symmetric, v2=v2)
    return Made(ours, made.to(DType.F32).decode(stored).float(), sum(p.numel() * p.itemsize for p in stored[:3]))


def awq(rows: int, columns: int, seed: int, *, group: int, symmetric: bool = False) -> Made:
    made = Awq(group, symmetric=symmetric)
    stored = made.encode(*_grid(rows, columns, group, seed, (8, 8) if symmetric else (0, 15))).parts
    ours = planes.awq(*stored, group=group, symmetric=symmetric)
    return Made(ours, made.to(DType.F32).decode(stored).float(), sum(p.numel() * p.itemsize for p in stored))


def nf4(rows: int, columns: int, seed: int, *, double: bool = False) -> Made:
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (rows, columns), generator=random, dtype=torch.uint8)
    absmax = torch.rand(rows * columns // 64, generator=random) * 0.1 + 1e-3
    made = Nf4(DType.F32, double=double)
    stored = made.encode_codes(codes, absmax).parts
    if double:
        _, _, _, mean = nested.encode(absmax)
        of = (stored[2], stored[3], float(mean))
        ours = planes.nf4(stored[0], stored[1], levels(), (rows, columns), nested=of)
    else:
        ours = planes.nf4(stored[0], stored[1], levels(), (rows, columns))
    return Made(ours, made.decode(stored), sum(part.numel() * part.itemsize for part in stored))


# by name: how to make one, and the columns that its rows are a multiple of
KINDS: dict[str, tuple[Callable[[int, int, int], Made], int]] = {
    "bf16": (partial(dense, dtype=torch.bfloat16), 1),
    "fp16": (partial(dense, dtype=torch.float16), 1),
    "fp32": (partial(dense, dtype=torch.float32), 1),
    **{type.value: (partial(ggml, type=type), type.block) for type in BLOCKS},
    "gptq": (partial(gptq, group=32), 32),
    "gptq sym": (partial(gptq, group=64, symmetric=True), 64),
    "gptq v2": (partial(gptq, group=128, v2=True), 128),
    "gptq row": (partial(gptq, group=-1), 32),
    "awq": (partial(awq, group=32), 32),
    "awq sym": (partial(awq, group=64, symmetric=True), 64),
    "nf4": (nf4, 64),
    "nf4 double": (partial(nf4, double=True), 64),
}


def make(name: str, rows: int, blocks: int, seed: int = 0) -> Made:
    """A matrix of so many rows (a multiple of 32 for gptq) of so many of the kind's least columns."""
    maker, least = KINDS[name]
    return maker(rows, blocks * least, seed)
