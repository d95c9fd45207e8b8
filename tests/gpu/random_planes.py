"""Planes of random bits in every kind, made on the device where they are to lie. Needs torch alone.

What the bits mean is told by ops/gpu/reference.py, which tests/gpu/test_planes.py and test_gemv.py hold against the
formats' own decoders; here any bits will do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from mixtools.formats.nf4 import levels
from mixtools.ops.gpu import planes
from mixtools.ops.gpu.planes import Planes
from mixtools.storage.dtypes import DType

HALVES = {  # where the f16 numbers of a block lie
    DType.Q4_0: [0], DType.Q8_0: [0], DType.Q2_K: [80, 82], DType.Q3_K: [108], DType.Q4_K: [0, 2], DType.Q5_K: [0, 2],
    DType.Q6_K: [208],
}  # fmt: skip
_SMALL = {DType.Q8_0: 3e-4, DType.Q4_0: 4e-3, DType.Q6_K: 2e-5, DType.Q3_K: 3e-4, DType.Q2_K: 2e-3}  # else 1e-4


def _bits(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    size = torch.Size(shape).numel() * dtype.itemsize
    made = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=random)
    return made.view(dtype).view(shape)


def _uniform(shape: tuple[int, ...], device: torch.device, random: torch.Generator) -> Tensor:
    return torch.rand(shape, device=device, generator=random) + 0.5


def _dense(rows: int, columns: int, device: torch.device, random: torch.Generator, *, dtype: torch.dtype) -> Planes:
    return planes.dense(torch.randn(rows, columns, device=device, generator=random).mul_(0.02).to(dtype))


def _ggml(rows: int, columns: int, device: torch.device, random: torch.Generator, *, type: DType) -> Planes:
    size = type.row_bytes(type.block)
    blocks = _bits((rows, columns // type.block, size), device, torch.uint8, random)
    for at in HALVES[type]:
        small = _uniform((rows, columns // type.block), device, random) * _SMALL.get(type, 1e-4)
        blocks[:, :, at : at + 2] = small.half()[..., None].view(torch.uint8)
    return planes.ggml(blocks.view(rows, -1), type)


def _int4(
    rows: int, columns: int, device: torch.device, random: torch.Generator, *, group: int, symmetric: bool
) -> Planes:
    groups = columns // group
    words = _bits((columns // 8, rows), device, torch.int32, random)
    scales = (_uniform((groups, rows), device, random) * 4e-3).half()
    zeros = torch.full((groups, rows // 8), 0x77777777, dtype=torch.int32, device=device)
    if not symmetric:
        zeros = _bits((groups, rows // 8), device, torch.int32, random)
    return planes.gptq(words, zeros, scales, None, group=group, symmetric=symmetric, v2=False)


def _nf4(rows: int, columns: int, device: torch.device, random: torch.Generator, *, double: bool) -> Planes:
    blocks = rows * columns // 64
    weight = _bits((rows * columns // 2, 1), device, torch.uint8, random)
    if not double:
        return planes.nf4(weight, _uniform((blocks,), device, random) * 0.04, levels(), (rows, columns))
    largest = _uniform((-(-blocks // 256),), device, random) * 0.02
    nested = largest, torch.linspace(-1, 1, 256, device=device), 0.05
    return planes.nf4(weight, _bits((blocks,), device, torch.uint8, random), levels(), (rows, columns), nested=nested)


Make = Callable[[int, int, torch.device, torch.Generator], Planes]
KINDS: dict[str, Make] = {
    "bf16": partial(_dense, dtype=torch.bfloat16),
    "fp16": partial(_dense, dtype=torch.float16),
    **{type.value: partial(_ggml, type=type) for type in HALVES},
    "int4 g128": partial(_int4, group=128, symmetric=True),
    "int4 g128 asym": partial(_int4, group=128, symmetric=False),
    "nf4": partial(_nf4, double=False),
    "nf4 double": partial(_nf4, double=True),
}


def make(kind: str, rows: int, columns: int, device: torch.device | str, *, matrices: int = 1, seed: int = 0) -> Planes:
    """`matrices` of [rows, columns], one below the other."""
    random = torch.Generator(device).manual_seed(seed)
    one = (KINDS[kind](rows, columns, torch.device(device), random) for _ in range(matrices))
    return next(one) if matrices == 1 else planes.stack(one, matrices)
