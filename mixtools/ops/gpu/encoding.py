"""ggml's blocks made on a GPU, byte for byte as mixtools.ops.encode makes them: torch.ops.mixtools.gpu_encode_blocks.

rows, runs of them at a time ─► launches: one to five kernels, each of which finds what the next one needs
    Q4_K, Q5_K, Q2_K: encode_affine.py      Q6_K, Q3_K: encode_symmetric.py      Q8_0, Q4_0: encode_small.py
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, library

from ...errors import MixtoolsError
from ...storage.dtypes import DType
from . import launch
from .launch import Arguments, Launch

_RUN = 1 << 26  # values of the rows that are taken together: what is kept of them between kernels is below 64 MiB
_MOST_COLUMNS = 1 << 30  # a kernel counts in 32 bits
# Numbers that a program takes side by side, one a thread. Triton's interpreter takes as long for few as for many.
_LANES = 16384 if os.environ.get("TRITON_INTERPRET") == "1" else launch.LANES
_SOURCES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class _Affine:
    """As kernels/encode_affine.h tells them; `units_at` and `scales_at`: words in a block."""

    size: int  # of a sub-block
    top: int
    steps: int
    first: float
    step: float = 0.1
    absolute: bool = False
    mean_square: bool = True
    clipped: bool = True
    scale_top: int = 63
    units_at: int = 0
    scales_at: int = 1

    def search(self, weighted: bool) -> dict[str, Any]:
        """What the search for a sub-block's scale and min is compiled for."""
        plain = {"STEPS": self.steps, "FIRST": self.first, "STEP": self.step, "ABSOLUTE": self.absolute}
        by_importance = {"STEPS": 36, "FIRST": -0.9, "STEP": 0.05, "ABSOLUTE": False}
        return {"N": self.size, "TOP": self.top, "MEAN_SQUARE": self.mean_square,
                **(by_importance if weighted else plain)}  # fmt: skip

    def rounding(self, weighted: bool) -> dict[str, Any]:
        clipped = self.top == 31 if weighted else self.clipped
        return {"SUBS": 256 // self.size, "TOP": self.scale_top, "CLIPPED": clipped, "WEIGHTED": weighted}

    def packing(self, words: int) -> dict[str, Any]:
        return {"SUBS": 256 // self.size, "UNITS_AT": self.units_at, "SCALES_AT": self.scales_at, "WORDS": words}


@dataclass(frozen=True)
class _Symmetric:
    """As kernels/encode_symmetric.h tells them; `unit_at` and `scales_at`: pairs of bytes in a block."""

    top: int
    swept: bool
    widened: bool
    unit_at: int
    scales_at: int


_AFFINE = {
    DType.Q4_K: _Affine(32, 15, 20, -1.0),
    DType.Q5_K: _Affine(32, 31, 15, -0.5),
    DType.Q2_K: _Affine(16, 3, 15, -0.5, absolute=True, mean_square=False, clipped=False, scale_top=15, units_at=20,
                        scales_at=0),
}  # fmt: skip
_SYMMETRIC = {DType.Q6_K: _Symmetric(32, False, False, 104, 96), DType.Q3_K: _Symmetric(4, True, True, 54, 48)}
ENCODED = (DType.Q8_0, DType.Q4_0, *_AFFINE, *_SYMMETRIC)


def encode(rows: Tensor, type: DType, importance: Tensor | None = None) -> Tensor:
    """`rows` [rows, columns], bf16, fp16 or fp32 and finite -> their blocks of `type` (one of ENCODED) [rows, bytes],
    uint8. `importance` fp32 [columns] weighs the error of each column. Raises MixtoolsError for others."""
    out: Tensor = gpu_encode_blocks(rows, type.value, importance)
    return out


@library.custom_op("mixtools::gpu_encode_blocks", mutates_args=())
def gpu_encode_blocks(rows: Tensor, type: str, importance: Tensor | None) -> Tensor:
    known, size = _check(rows, type, importance)
    x, weights = _dense(rows), None if importance is None else _dense(importance)
    out = x.new_empty((len(x), size), dtype=torch.uint8)
    at_once = max(1, _RUN // max(1, x.shape[1]))
    for at in range(0, len(x) if size else 0, at_once):
        for started in launches(x[at : at + at_once], known, weights, out[at : at + at_once]):
            started.run()
    return out


@gpu_encode_blocks.register_fake
def _(rows: Tensor, type: str, importance: Tensor | None) -> Tensor:
    block = DType(type).block
    size = rows.shape[1] // block * DType(type).row_bytes(block)
    return rows.new_empty((rows.shape[0], size), dtype=torch.uint8)


def _check(rows: Tensor, type: str, importance: Tensor | None) -> tuple[DType, int]:
    """The type, and the bytes of a row."""
    known = next((one for one in ENCODED if one.value == type), None)
    if known is None:
        raise MixtoolsError(f"no kernel encodes {type} on a GPU; those of {', '.join(one.value for one in ENCODED)}")
    if rows.ndim != 2 or rows.dtype not in _SOURCES or rows.shape[1] > _MOST_COLUMNS:
        raise MixtoolsError(f"{type} is encoded from rows of bf16, fp16 or fp32, not {rows.dtype} {list(rows.shape)}")
    if rows.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MixtoolsError("kernels for a GPU take CPU tensors in Triton's interpreter alone (TRITON_INTERPRET=1)")
    try:
        size = known.row_bytes(rows.shape[1])
    except ValueError as error:
        raise MixtoolsError(str(error)) from error
    told = (torch.float32, rows.shape[1:], rows.device)
    if importance is not None and (importance.dtype, importance.shape, importance.device) != told:
        found = f"{importance.dtype} {list(importance.shape)} on {importance.device}"
        raise MixtoolsError(f"the importance of {rows.shape[1]} columns is as many fp32 on {rows.device}, not {found}")
    return known, size


def _dense(tensor: Tensor) -> Tensor:
    """From an address on that 16 bytes can be loaded from."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@dataclass(frozen=True)
class _Rows:
    """Dense rows as kernels take them, and what of theirs is told when these are compiled."""

    values: Tensor  # [rows, columns]; bf16 as int16
    words: Tensor  # fp32, or two numbers in an int32
    source: str
    weights: Tensor  # [columns], where they are weighted
    weighted: bool
    lanes: int

    def by_lanes(self, module: str, kernel: str, count: int, arguments: Arguments, constants: dict[str, Any]) -> Launch:
        """With a lane for each of `count`."""
        return Launch(kernel, (-(-count // self.lanes),), arguments, {**constants, "LANES": self.lanes}, module)

    def by_blocks(
        self, module: str, kernel: str, out: Tensor, block: int, arguments: Arguments, constants: dict[str, Any]
    ) -> Launch:
        """With some lanes for each block of so many values."""
        blocks, at_once = self.values.numel() // block, self.lanes * 32 // block  # 32 values a lane
        told: Arguments = {"x": self.values, "out": out, "blocks": blocks, **arguments}
        return Launch(kernel, (-(-blocks // at_once),), told, {**constants, "BLOCKS": at_once}, module)

    def fit(
        self, module: str, kernel: str, size: int, parts: Tensor, arguments: Arguments, constants: dict[str, Any]
    ) -> Launch:
        """With a lane for each sub-block."""
        told: Arguments = {"x": self.words, "parts": parts, "subs": parts.shape[1], **arguments}
        return self.by_lanes(module, kernel, parts.shape[1], told, {"N": size, "SOURCE": self.source, **constants})

    def weighing(self, squares: Tensor, size: int) -> Arguments:
        """What a search by importance takes besides."""
        return {"importance": self.weights, "squares": squares, "subs_in_row": self.values.shape[1] // size}

    def mean_squares(self, columns: int, factor: float) -> tuple[Launch, Tensor]:
        """factor * the mean square of each run of so many values."""
        count = self.values.numel() // columns
        sums = self.values.new_empty(count, dtype=torch.float32)
        arguments: Arguments = {"x": self.words, "sums": sums, "count": count, "columns": columns,
                                "over": float(columns)}  # fmt: skip
        constants = {"FACTOR": factor, "SOURCE": self.source}
        return self.by_lanes("encode_parts", "sum_squares", count, arguments, constants), sums


def launches(
    rows: Tensor, type: DType, importance: Tensor | None, out: Tensor, lanes: int = _LANES
) -> tuple[Launch, ...]:
    """For out [rows, bytes] of rows that are dense, and begin where 16 bytes can be loaded."""
    values = rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows
    words = rows if rows.dtype == torch.float32 else rows.view(torch.int32)
    weights = words if importance is None else importance
    given = _Rows(values, words, _SOURCES[rows.dtype], weights, importance is not None, lanes)
    if type in _AFFINE:
        return _affine(given, type, out)
    if type in _SYMMETRIC:
        return _symmetric(given, type, out)
    if type is DType.Q4_0 and importance is not None:
        return _q4_0(given, out)
    whole = out.view(torch.int16) if type is DType.Q8_0 else out
    return (given.by_blocks("encode_small", type.value.lower(), whole, 32, {}, {}),)


def _affine(rows: _Rows, type: DType, out: Tensor) -> tuple[Launch, ...]:
    told, weighted, blocks = _AFFINE[type], rows.weighted, rows.values.numel() // 256
    parts = rows.values.new_empty((5, rows.values.numel() // told.size), dtype=torch.float32)
    first, squares = rows.mean_squares(256, 2.0 if told.size == 32 else 1.0)
    constants = {**told.search(weighted), "WEIGHTED": weighted}
    fit = rows.fit("encode_affine", "fit", told.size, parts, rows.weighing(squares, told.size), constants)
    words = out.view(torch.int32)
    units = parts.new_empty((2, blocks))
    shared: Arguments = {"parts": parts, "units": units, "subs": parts.shape[1], "blocks": blocks}
    rounded = rows.by_lanes("encode_affine", "round_scales", 2 * blocks, shared, told.rounding(weighted))
    packing = told.packing(words.numel() // blocks)
    packed = rows.by_lanes("encode_affine", "pack_scales", blocks, {**shared, "out": words}, packing)
    return (*((first,) if weighted else ()), fit, rounded, packed, _levels(rows, type, parts, parts, out, False))


def _symmetric(rows: _Rows, type: DType, out: Tensor) -> tuple[Launch, ...]:
    told, weighted, blocks = _SYMMETRIC[type], rows.weighted, rows.values.numel() // 256
    swept, subs, module = told.swept and not weighted, rows.values.numel() // 16, "encode_symmetric"
    parts = rows.values.new_empty((3, subs), dtype=torch.float32)
    words = rows.values.new_empty((subs, 2), dtype=torch.int32) if swept else parts
    first, squares = rows.mean_squares(256, 2.0)
    constants: dict[str, Any] = {"TOP": told.top}
    if swept:
        fit = rows.fit(module, "sweep", 16, parts, {"swept": words}, constants)
    else:
        by = {**constants, "WEIGHTED": weighted, "WIDENED": told.widened}
        fit = rows.fit(module, "fit", 16, parts, rows.weighing(squares, 16), by)
    halves = out.view(torch.int16)
    arguments: Arguments = {"parts": parts, "subs": subs, "out": halves, "blocks": blocks}
    constants |= {"WEIGHTED": weighted, "HALVES": halves.numel() // blocks, "UNIT_AT": told.unit_at,
                  "SCALES_AT": told.scales_at}  # fmt: skip
    rounded = rows.by_lanes(module, "round_scales", blocks, arguments, constants)
    widened = weighted and told.widened
    return (*((first,) if widened else ()), fit, rounded, _levels(rows, type, parts, words, out, swept))


def _levels(rows: _Rows, type: DType, parts: Tensor, words: Tensor, out: Tensor, swept: bool) -> Launch:
    size = out.numel() // (rows.values.numel() // 256)
    arguments: Arguments = {"parts": parts, "swept": words, "subs": parts.shape[1]}
    constants = {"KIND": type.value, "BYTES": size, "SWEPT": swept}
    return rows.by_blocks("encode_levels", "levels", out, 256, arguments, constants)


def _q4_0(rows: _Rows, out: Tensor) -> tuple[Launch, ...]:
    parts = rows.values.new_empty((2, rows.values.numel() // 32), dtype=torch.float32)
    first, squares = rows.mean_squares(rows.values.shape[1], 1.0)
    fit = rows.fit("encode_small", "fit_q4_0", 32, parts, rows.weighing(squares, 32), {})
    return first, fit, rows.by_blocks("encode_small", "levels_q4_0", out, 32, {"parts": parts}, {})
