"""ggml's block types as grids: what their scales and minima are, and the same blocks with other codes or other scales.

    value = scale * levels(type)[code] + min, in fp32, each operation rounded on its own: ggml's own value, bit for bit
    scale = d * sub-scale, min = -(dmin * sub-minimum): d and dmin per super-block, the small integers per group

A code counts from the lowest level up, whatever bits the type stores for it. Scales may be negative, and zero; types
without a minimum have -0 for one, which leaves every sum as it is, the sign of a zero included. Layouts are those of
ggml-common.h and dequantize_row_* in ggml-quants.c of https://github.com/ggml-org/llama.cpp.

Blocks are uint8 [rows, bytes]; what is in them comes and goes in lines, [columns or groups, rows]. All is done by torch
where the blocks lie, on a GPU too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import MixtoolsError, TensorError
from ..storage.dtypes import DType

if TYPE_CHECKING:
    from torch import Tensor

_STRIP = 1 << 18  # values worked on at a time on a CPU: with their blocks, and what is between, within a core's cache


class Supers(NamedTuple):
    """What the scales and minima of blocks are products of; `dmin` and `mins` are None where there is no minimum.

    Types of one group per block have sub-scales of 1. Q4_1 and Q5_1, which add their minimum, have sub-minima of -1.
    """

    d: Tensor  # fp32 [supers, rows]; f16 as stored, of MXFP4 a power of two
    dmin: Tensor | None  # fp32 [supers, rows]
    scales: Tensor  # int8 [groups, rows]
    mins: Tensor | None  # int8 [groups, rows]

    def grid(self) -> tuple[Tensor, Tensor]:
        """Scale and minimum of each group: fp32 [groups, rows]. What is no number in them is none in ggml's values
        either; the caller looks for it."""
        scale = _each_group(self.d, self.scales)
        if self.dmin is None or self.mins is None:
            return scale, scale.new_full(scale.shape, -0.0)
        return scale, -_each_group(self.dmin, self.mins)


class _Part(NamedTuple):
    """`bits` bits of each byte, from `shift` on, are those of an item from `left` on: of the items from `to` on."""

    shift: int
    bits: int
    left: int = 0
    to: int = 0


class _Field(NamedTuple):
    """Bytes of a block, `runs` runs of `run` from `at` on, and what is in them.

    The items (codes, or sub-scales and sub-minima) are as many stretches, one a run. Each bit of the bytes belongs to
    an item, and an item's lowest bits come first: they overwrite it, what follows is added.
    """

    at: int
    runs: int
    run: int
    parts: tuple[_Part, ...]


@dataclass(frozen=True)
class _Kind:
    """A block type."""

    levels: tuple[int, ...]
    group: int
    codes: tuple[_Field, ...]
    d: int  # byte at which the super-scale lies
    dmin: int | None = None
    subs: tuple[_Field, ...] = ()  # of the sub-scales, and then of as many sub-minima if there is a dmin
    bias: int = 0  # stored sub-scales are that much higher
    bounds: tuple[int, int] = (1, 1)  # of sub-scales and sub-minima
    order: tuple[int, ...] = ()  # the code that each stored one is, where they are not the same


def _nibbles(at: int, runs: int, run: int) -> _Field:
    """A byte's low four bits are of one item, its high ones of that `run` further on."""
    return _Field(at, runs, run, (_Part(0, 4), _Part(4, 4, to=run)))


def _pairs(at: int, runs: int, run: int, left: int = 0) -> _Field:
    """The same with four times two bits."""
    return _Field(at, runs, run, tuple(_Part(2 * i, 2, left, i * run) for i in range(4)))


def _singles(at: int, runs: int, run: int, left: int) -> _Field:
    """The same with eight single bits."""
    return _Field(at, runs, run, tuple(_Part(i, 1, left, i * run) for i in range(8)))


_6_BITS = (  # of Q4_K and Q5_K: 8 sub-scales and 8 sub-minima in 12 bytes
    _Field(12, 1, 4, (_Part(0, 4, to=4), _Part(4, 4, to=12))),
    _Field(4, 1, 4, (_Part(0, 6, to=0), _Part(6, 2, left=4, to=4))),
    _Field(8, 1, 4, (_Part(0, 6, to=8), _Part(6, 2, left=4, to=12))),
)
_BYTE = (_Part(0, 8),)
_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_E2M1 = (-12, -8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8, 12)  # doubled, and the scale halved
_SIGN_FIRST = (*range(7, 15), *range(7, -1, -1))  # both zeros are one: stored as the positive one, decoded alike


def _steps(first: int, count: int) -> tuple[int, ...]:
    return tuple(range(first, first + count))


_KINDS = {
    DType.Q4_0: _Kind(_steps(-8, 16), 32, (_nibbles(2, 1, 16),), d=0),
    DType.Q4_1: _Kind(_steps(0, 16), 32, (_nibbles(4, 1, 16),), d=0, dmin=2, bounds=(-1, 1)),
    DType.Q5_0: _Kind(_steps(-16, 32), 32, (_nibbles(6, 1, 16), _singles(2, 4, 1, 4)), d=0),
    DType.Q5_1: _Kind(_steps(0, 32), 32, (_nibbles(8, 1, 16), _singles(4, 4, 1, 4)), d=0, dmin=2, bounds=(-1, 1)),
    DType.Q8_0: _Kind(_steps(-128, 256), 32, (_Field(2, 1, 32, _BYTE),), d=0, order=(*range(128, 256), *range(128))),
    DType.Q2_K: _Kind(_steps(0, 4), 16, (_pairs(16, 2, 32),), 80, 82, (_nibbles(0, 1, 16),), bounds=(0, 15)),
    DType.Q3_K: _Kind(
        _steps(-4, 8), 16, (_pairs(32, 2, 32), _singles(0, 1, 32, 2)),
        108, None, (_nibbles(96, 1, 8), _pairs(104, 1, 4, 4)), 32, (-32, 31),
    ),
    DType.Q4_K: _Kind(_steps(0, 16), 32, (_nibbles(16, 4, 32),), 0, 2, _6_BITS, bounds=(0, 63)),
    DType.Q5_K: _Kind(
        _steps(0, 32), 32, (_nibbles(48, 4, 32), _singles(16, 1, 32, 4)), 0, 2, _6_BITS, bounds=(0, 63)
    ),
    DType.Q6_K: _Kind(
        _steps(-32, 64), 16, (_nibbles(0, 2, 64), _pairs(128, 2, 32, 4)),
        208, None, (_Field(192, 1, 16, _BYTE),), bounds=(-128, 127),
    ),
    DType.IQ4_NL: _Kind(_IQ4, 32, (_nibbles(2, 1, 16),), d=0),
    DType.IQ4_XS: _Kind(
        _IQ4, 32, (_nibbles(8, 8, 16),), 0, None, (_nibbles(4, 4, 1), _pairs(2, 2, 1, 4)), 32, (-32, 31)
    ),
    DType.MXFP4: _Kind(_E2M1, 32, (_nibbles(1, 1, 16),), d=0, order=_SIGN_FIRST),
}  # fmt: skip
_POWERS = np.ldexp(np.float32(1), np.arange(256) - 128)  # what MXFP4's exponents stand for, halved


def group(type: DType) -> int:
    """Columns that share a scale and a minimum. Raises MixtoolsError for a type that is no grid here, as all below."""
    return _kind(type).group


def levels(type: DType) -> npt.NDArray[Any]:
    """What the codes stand for before they are scaled: fp32 [levels], each above the one before it."""
    return np.array(_kind(type).levels, np.float32)


def codes(type: DType, blocks: Tensor) -> Tensor:
    """The codes in `blocks` uint8 [rows, bytes]: uint8 [columns, rows].

    Raises MixtoolsError for blocks of another shape or dtype, as all below.
    """
    kind = _kind(type)
    items = _unpack(type, kind.codes, blocks, type.block).flatten(0, 1)
    return _looked_up(kind.order, items) if kind.order else items


def with_codes(type: DType, blocks: Tensor, codes: Tensor) -> Tensor:
    """New blocks: the scales and minima of `blocks` uint8 [rows, bytes], and `codes` uint8 [columns, rows].

    Raises MixtoolsError for codes of another shape or dtype, or above the last.
    """
    import torch

    from ..ops import library

    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if codes.shape != (cols, rows) or codes.dtype != torch.uint8:
        raise MixtoolsError(f"{rows} rows of {cols} codes are as many uint8, not {codes.dtype} {[*codes.shape]}")
    if codes.numel() and (most := int(codes.max())) >= len(kind.levels):
        raise MixtoolsError(f"{type.value} has {len(kind.levels)} codes, and none is {most}")
    supers = cols // type.block
    items = library.dense(codes).view(supers, type.block, rows)
    joined = items.new_empty((supers, _bytes(kind.codes), rows))
    stored = [kind.order.index(code) for code in range(len(kind.levels))] if kind.order else []
    step = max(1, _STRIP // max(1, type.block * rows)) if items.device.type == "cpu" else max(1, supers)
    for at in range(0, supers, step):
        strip = items[at : at + step]
        _pack(kind.codes, _looked_up(stored, strip) if stored else strip, joined[at : at + step])
    out = library.dense(blocks).clone()
    each, first = out.view(rows, supers, _size(type)), 0
    turned = library.turned(joined.flatten(0, 1)).view(rows, supers, _bytes(kind.codes))
    for at, runs, run, _ in kind.codes:
        each[..., at : at + runs * run] = turned[..., first : first + runs * run]
        first += runs * run
    return out


def supers(type: DType, blocks: Tensor) -> Supers:
    """The factors of scales and minima in `blocks` uint8 [rows, bytes]."""
    import torch

    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if type is DType.MXFP4:
        (exponents,) = _lines(type, blocks, kind.d, 1).unbind(1)
        d = torch.from_numpy(_POWERS).to(blocks.device)[exponents.int()]
    else:
        d = _halves(_lines(type, blocks, kind.d, 2))
    dmin = None if kind.dmin is None else _halves(_lines(type, blocks, kind.dmin, 2))
    shape = cols // kind.group, rows
    if not kind.subs:
        low, high = (blocks.new_full(shape, one, dtype=torch.int8) for one in kind.bounds)
        return Supers(d, dmin, high, None if dmin is None else low)
    each = type.block // kind.group
    subs = _unpack(type, kind.subs, blocks, each if dmin is None else 2 * each).view(torch.int8) - kind.bias
    if dmin is None:
        return Supers(d, None, subs.view(shape), None)
    return Supers(d, dmin, *(half.reshape(shape) for half in torch.split(subs, each, 1)))


def with_supers(type: DType, blocks: Tensor, d: Tensor, dmin: Tensor | None = None) -> Tensor:
    """New blocks: `blocks` uint8 [rows, bytes] with other super-scales `d`, and `dmin` where the type has minima.

    Both are fp32 [supers, rows], rounded to nearest f16, ties to even; d of MXFP4 to the nearest power of two, ties
    up, and the least there is for what is below. Raises TensorError for NaN and for what would be rounded beyond the
    largest (f16: 65504; MXFP4, which has no sign either: 2^126), MixtoolsError for another shape, or a dmin missing or
    not wanted.
    """
    import torch

    from ..ops import library

    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if (dmin is None) != (kind.dmin is None):
        raise MixtoolsError(f"{type.value} has {'no dmin' if kind.dmin is None else 'a dmin beside its d'}")
    out = library.dense(blocks).clone()
    each = out.view(rows, cols // type.block, _size(type))
    for name, at, values in (("d", kind.d, d), ("dmin", kind.dmin, dmin)):
        if at is None or values is None:
            continue
        if values.shape != each.shape[1::-1] or values.dtype != torch.float32:
            found = f"{values.dtype} {[*values.shape]}"
            raise MixtoolsError(f"{name} of {type.value} is torch.float32 {[*each.shape[1::-1]]} here, not {found}")
        if type is DType.MXFP4:
            each[..., at] = _exponents(values).T
        else:
            bits = _rounded(name, values, type).view(torch.int16).T
            each[..., at], each[..., at + 1] = bits & 255, (bits >> 8) & 255
    return out


def _kind(type: DType) -> _Kind:
    if type not in _KINDS:
        raise MixtoolsError(f"{type.value} is no grid here: {', '.join(known.value for known in _KINDS)}")
    return _KINDS[type]


def _size(type: DType) -> int:
    return type.row_bytes(type.block)


def _shape(type: DType, blocks: Tensor) -> tuple[int, int]:
    """Rows, columns."""
    import torch

    if blocks.ndim != 2 or blocks.dtype != torch.uint8:
        raise MixtoolsError(f"blocks are a matrix of bytes, not {blocks.dtype} {[*blocks.shape]}")
    count, rest = divmod(blocks.shape[1], _size(type))
    if rest:
        raise MixtoolsError(
            f"rows of {blocks.shape[1]} bytes are no multiple of {type.value}'s blocks of {_size(type)}"
        )
    return len(blocks), count * type.block


def _bytes(fields: tuple[_Field, ...]) -> int:
    return sum(field.runs * field.run for field in fields)


def _lines(type: DType, blocks: Tensor, first: int, count: int) -> Tensor:
    """`count` bytes of each block from byte `first` on: [supers, count, rows]."""
    from ..ops import library

    rows, cols = _shape(type, blocks)
    supers = cols // type.block
    part = blocks.reshape(rows, supers, _size(type))[..., first : first + count].reshape(rows, supers * count)
    return library.turned(part).view(supers, count, rows)


def _unpack(type: DType, fields: tuple[_Field, ...], blocks: Tensor, count: int) -> Tensor:
    """`count` items of each block of `blocks` [rows, bytes]: [supers, count, rows]."""
    first = min(field.at for field in fields)
    lines = _lines(type, blocks, first, max(field.at + field.runs * field.run for field in fields) - first)
    supers, _, rows = lines.shape
    items = lines.new_empty((supers, count, rows))
    for at, runs, run, parts in fields:
        stretches = items.view(supers, runs, count // runs, rows)
        source = lines[:, at - first : at - first + runs * run].view(supers, runs, run, rows)
        for shift, bits, left, to in parts:
            part = (source >> shift) & (1 << bits) - 1
            target = stretches[:, :, to : to + run]
            target[...] = target | part << left if left else part
    return items


def _pack(fields: tuple[_Field, ...], items: Tensor, out: Tensor) -> None:
    """`items` [n, count, rows] -> into `out` [n, bytes, rows], the fields' bytes one behind the other."""
    first = 0
    for _, runs, run, parts in fields:
        stretches = items.view(len(items), runs, items.shape[1] // runs, items.shape[2])
        target = out[:, first : first + runs * run].view(len(out), runs, run, out.shape[2])
        for number, (shift, bits, left, to) in enumerate(parts):
            part = stretches[:, :, to : to + run]
            if left:
                part = part >> left
            if shift + bits < 8:
                part = part & (1 << bits) - 1
            if shift:
                part = part << shift
            target[...] = target | part if number else part
        first += runs * run


def _looked_up(order: Sequence[int], items: Tensor) -> Tensor:
    """What `order` has for each item."""
    import torch

    table = torch.tensor(order, dtype=torch.uint8).to(items.device)
    return table.index_select(0, items.flatten().int()).view(items.shape)


def _each_group(factors: Tensor, integers: Tensor) -> Tensor:
    """`factors` [supers, rows] times `integers` [groups, rows]: fp32 [groups, rows], exact, as both have few bits."""
    supers, rows = factors.shape
    return (factors[:, None] * integers.view(supers, len(integers) // max(1, supers), rows)).view(integers.shape)


def _halves(lines: Tensor) -> Tensor:
    """The f16 that two bytes of each block are, [supers, 2, rows]: fp32 [supers, rows]."""
    import torch

    low, high = lines.int().unbind(1)
    return (high << 8 | low).short().view(torch.float16).float()


def _rounded(name: str, values: Tensor, type: DType) -> Tensor:
    import torch

    halves = values.to(torch.float16)
    if not bool((known := halves.isfinite()).all()):
        raise TensorError(f"{name} of {type.value} blocks is beyond f16, or no number: {float(values[~known][0])}")
    return halves


def _exponents(d: Tensor) -> Tensor:
    """Of the powers of two nearest to `d`."""
    import torch

    digits, powers = torch.frexp(d)  # d = digits * 2^powers, digits from 1/2 up to 1
    nearest = (powers + (digits >= 0.75).int() - 1 + 128).clamp(min=0)
    wrong = ~torch.isfinite(d) | (d < 0) | (nearest > 254)  # 255 is no number outside ggml
    if bool(wrong.any()):
        raise TensorError(f"d of MXFP4 blocks is negative, beyond 2^126, or no number: {float(d[wrong][0])}")
    return torch.where(d == 0, 0, nearest).to(torch.uint8)
