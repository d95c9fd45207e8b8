"""ggml's block types as grids: what their scales and minima are, and the same blocks with other codes or other scales.

    value = scale * levels(type)[code] + min, in fp32, each operation rounded on its own: ggml's own value, bit for bit
    scale = d * sub-scale, min = -(dmin * sub-minimum): d and dmin per super-block, the small integers per group

A code counts from the lowest level up, whatever bits the type stores for it. Scales may be negative, and zero; types
without a minimum have -0 for one, which leaves every sum as it is, the sign of a zero included. Layouts are those of
ggml-common.h and dequantize_row_* in ggml-quants.c of https://github.com/ggml-org/llama.cpp. Codes are put in by torch,
where they lie; all else is free of it, takes one thread, and releases Python's lock while numpy works.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import MixtoolsError, TensorError
from ..ops import cpu
from ..storage.dtypes import DType

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]

_STRIP = 1 << 18  # values worked on at a time: with their blocks, and what is between, within a core's cache


class Supers(NamedTuple):
    """What the scales and minima of blocks are products of; `dmin` and `mins` are None where there is no minimum.

    Types of one group per block have sub-scales of 1. Q4_1 and Q5_1, which add their minimum, have sub-minima of -1.
    """

    d: Array  # fp32 [rows, supers]; f16 as stored, of MXFP4 a power of two
    dmin: Array | None  # fp32 [rows, supers]
    scales: Array  # int8 [rows, groups]
    mins: Array | None  # int8 [rows, groups]

    def grid(self) -> tuple[Array, Array]:
        """Scale and minimum of each group, as `grid`."""
        with np.errstate(all="ignore"):
            scale = _each_group(self.d, self.scales)
            if self.dmin is None or self.mins is None:
                return scale, np.full_like(scale, -0.0)
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


def levels(type: DType) -> Array:
    """What the codes stand for before they are scaled: fp32 [levels], each above the one before it."""
    return np.array(_kind(type).levels, np.float32)


def codes(type: DType, blocks: Array) -> Array:
    """The codes in `blocks` uint8 [rows, bytes]: uint8 [rows, columns].

    Rows may lie anywhere. Raises MixtoolsError for blocks of another shape or dtype, as all below.
    """
    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    order = np.array(kind.order, np.uint8)
    out = np.empty((rows, cols), np.uint8)
    for strip in _strips(rows, cols):
        items = _unpack(kind.codes, _cut(blocks[strip], _size(type)), type.block)
        _cut(out[strip], type.block)[...] = np.take(order, items) if kind.order else items
    return out


def with_codes(type: DType, blocks: Array, codes: Tensor) -> Array:
    """New blocks: the scales and minima of `blocks` uint8 [rows, bytes], and `codes` uint8 [rows, columns].

    Codes are joined where they lie, on a GPU too, and quickest where those of a column lie side by side. Raises
    MixtoolsError for codes of another shape or dtype, or above the last.
    """
    import torch

    from ..ops import library

    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if codes.shape != (rows, cols) or codes.dtype != torch.uint8:
        raise MixtoolsError(f"{rows} rows of {cols} codes are as many uint8, not {codes.dtype} {[*codes.shape]}")
    lines, supers = library.dense(codes.T), cols // type.block
    if lines.numel() and (most := int(lines.max())) >= len(kind.levels):
        raise MixtoolsError(f"{type.value} has {len(kind.levels)} codes, and none is {most}")
    items = lines.view(supers, type.block, rows)
    joined = lines.new_empty((supers, _bytes(kind.codes), rows))
    stored = [kind.order.index(code) for code in range(len(kind.levels))] if kind.order else []
    table = torch.tensor(stored, dtype=torch.uint8).to(lines.device)
    step = max(1, _STRIP // max(1, type.block * rows)) if lines.device.type == "cpu" else max(1, supers)
    for at in range(0, supers, step):
        strip = items[at : at + step]
        if stored:
            strip = table.index_select(0, strip.flatten().int()).view(strip.shape)
        _pack(kind.codes, strip, joined[at : at + step])
    out = np.array(blocks, order="C")
    _put(kind.codes, library.turned(joined.flatten(0, 1)).cpu().numpy(), _cut(out, _size(type)))
    return out


def grid(type: DType, blocks: Array) -> tuple[Array, Array]:
    """Scale and minimum of each group in `blocks` uint8 [rows, bytes]: both fp32 [rows, groups].

    What is no number in them is no number in ggml's values either; the caller looks for it.
    """
    return supers(type, blocks).grid()


def supers(type: DType, blocks: Array) -> Supers:
    """The factors of scales and minima in `blocks` uint8 [rows, bytes]."""
    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    each = blocks.reshape(rows, cols // type.block, _size(type))
    d = _POWERS[each[..., kind.d]] if type is DType.MXFP4 else _halves(each, kind.d)
    dmin = None if kind.dmin is None else _halves(each, kind.dmin)
    shape = rows, cols // kind.group
    if not kind.subs:
        mins = None if dmin is None else np.full(shape, kind.bounds[0], np.int8)
        return Supers(d, dmin, np.full(shape, kind.bounds[1], np.int8), mins)
    subs = _unpack(kind.subs, _cut(blocks, _size(type)), type.block // kind.group * (1 if dmin is None else 2))
    integers = subs.view(np.int8) - np.int8(kind.bias)
    if dmin is None:
        return Supers(d, None, integers.reshape(shape), None)
    return Supers(d, dmin, *(half.reshape(shape) for half in np.split(integers, 2, axis=1)))


def with_supers(type: DType, blocks: Array, d: Array, dmin: Array | None = None) -> Array:
    """New blocks: `blocks` uint8 [rows, bytes] with other super-scales `d`, and `dmin` where the type has minima.

    Both are floats [rows, supers], rounded to nearest f16, ties to even; d of MXFP4 to the nearest power of two, ties
    up, and the least there is for what is below. Raises TensorError for NaN and for what would be rounded beyond the
    largest (f16: 65504; MXFP4, which has no sign either: 2^126), MixtoolsError for another shape, or a dmin missing or
    not wanted.
    """
    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if (dmin is None) != (kind.dmin is None):
        raise MixtoolsError(f"{type.value} has {'no dmin' if kind.dmin is None else 'a dmin beside its d'}")
    out = np.array(blocks, order="C")
    each = out.reshape(rows, cols // type.block, _size(type))
    for name, at, values in (("d", kind.d, d), ("dmin", kind.dmin, dmin)):
        if at is None or values is None:
            continue
        if values.shape != each.shape[:2] or values.dtype.kind != "f":
            found = f"{values.dtype} {[*values.shape]}"
            raise MixtoolsError(f"{name} of {type.value} is floats {[*each.shape[:2]]} here, not {found}")
        if type is DType.MXFP4:
            each[..., at] = _exponents(values)
        else:
            each[..., at : at + 2] = _rounded(name, values, type).view(np.uint8).reshape(*values.shape, 2)
    return out


def with_subs(type: DType, blocks: Array, scales: Array, mins: Array | None = None) -> Array:
    """New blocks: `blocks` uint8 [rows, bytes] with other sub-scales, and sub-minima where the type has them.

    Both are integers [rows, groups], in Q2_K from 0 to 15, in Q4_K and Q5_K from 0 to 63, in Q3_K and IQ4_XS from -32
    to 31, in Q6_K from -128 to 127. Raises MixtoolsError for others, for minima missing or not wanted, and for a type
    without sub-scales.
    """
    import torch

    kind = _kind(type)
    rows, cols = _shape(type, blocks)
    if not kind.subs:
        raise MixtoolsError(f"{type.value} has one group per block, and no sub-scales")
    if (mins is None) != (kind.dmin is None):
        raise MixtoolsError(f"{type.value} has {'no sub-minima' if kind.dmin is None else 'sub-minima too'}")
    parts, low, high = [], *kind.bounds
    for part in (scales,) if mins is None else (scales, mins):
        if part.shape != (rows, cols // kind.group) or part.dtype.kind not in "iu":
            found = f"{part.dtype} {[*part.shape]}"
            raise MixtoolsError(f"sub-scales are integers {[rows, cols // kind.group]} here, not {found}")
        if part.size and (part.min() < low or part.max() > high):
            raise MixtoolsError(f"sub-scales of {type.value} are from {low} to {high}: {part.min()} to {part.max()}")
        parts.append((part.astype(np.int16) + kind.bias).astype(np.uint8).reshape(-1, type.block // kind.group))
    out = np.array(blocks, order="C")
    items = torch.from_numpy(np.concatenate(parts, axis=1))[..., None]
    joined = items.new_empty((len(items), _bytes(kind.subs), 1))
    _pack(kind.subs, items, joined)
    _put(kind.subs, joined.numpy(), _cut(out, _size(type)))
    return out


def _kind(type: DType) -> _Kind:
    if type not in _KINDS:
        raise MixtoolsError(f"{type.value} is no grid here: {', '.join(known.value for known in _KINDS)}")
    return _KINDS[type]


def _size(type: DType) -> int:
    return type.row_bytes(type.block)


def _shape(type: DType, blocks: Array) -> tuple[int, int]:
    """Rows, columns."""
    if blocks.ndim != 2 or blocks.dtype != np.uint8:
        raise MixtoolsError(f"blocks are a matrix of bytes, not {blocks.dtype} {[*blocks.shape]}")
    count, rest = divmod(blocks.shape[1], _size(type))
    if rest:
        raise MixtoolsError(
            f"rows of {blocks.shape[1]} bytes are no multiple of {type.value}'s blocks of {_size(type)}"
        )
    return len(blocks), count * type.block


def _strips(rows: int, cols: int) -> Iterator[slice]:
    high = max(1, _STRIP // max(1, cols))
    return (slice(row, row + high) for row in range(0, rows if cols else 0, high))


def _cut(rows: Array, width: int) -> Array:
    """[rows, n * width] -> [rows * n, width], where it lies if it is dense."""
    return np.ascontiguousarray(rows).reshape(-1, width)


def _bytes(fields: tuple[_Field, ...]) -> int:
    return sum(field.runs * field.run for field in fields)


def _unpack(fields: tuple[_Field, ...], blocks: Array, count: int) -> Array:
    """`blocks` [n, bytes] -> items [n, count]; turned on the way, as runs of a few bytes are no work for numpy."""
    first, last = min(field.at for field in fields), max(field.at + field.runs * field.run for field in fields)
    lines, items = cpu.transpose(blocks[:, first:last]), np.empty((count, len(blocks)), np.uint8)
    for at, runs, run, parts in fields:
        stretches = items.reshape(runs, count // runs, len(blocks))
        source = lines[at - first : at - first + runs * run].reshape(runs, run, len(blocks))
        for shift, bits, left, to in parts:
            part = source >> np.uint8(shift)
            part &= np.uint8((1 << bits) - 1)
            target = stretches[:, to : to + run]
            if left:
                part <<= np.uint8(left)
                target |= part
            else:
                target[...] = part
    return cpu.transpose(items)


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


def _put(fields: tuple[_Field, ...], joined: Array, blocks: Array) -> None:
    """What `_pack` made of each of n blocks into `blocks` [n, bytes], whose other bytes stay."""
    joined, first = joined.reshape(len(blocks), _bytes(fields)), 0
    for at, runs, run, _ in fields:
        blocks[:, at : at + runs * run] = joined[:, first : first + runs * run]
        first += runs * run


def _each_group(factors: Array, integers: Array) -> Array:
    """`factors` [rows, supers] times `integers` [rows, groups]: fp32 [rows, groups], exact, as both have few bits."""
    rows, supers = factors.shape
    products = factors[..., None] * integers.reshape(rows, supers, integers.shape[1] // max(1, supers))
    return np.asarray(products, np.float32).reshape(integers.shape)


def _halves(blocks: Array, at: int) -> Array:
    """The f16 at a byte of each of `blocks` [rows, supers, bytes], fp32 [rows, supers]."""
    with np.errstate(invalid="ignore"):  # some builds of numpy warn of a signalling NaN
        return np.ascontiguousarray(blocks[..., at : at + 2]).view("<f2")[..., 0].astype(np.float32)


def _rounded(name: str, values: Array, type: DType) -> Array:
    with np.errstate(all="ignore"):
        halves = values.astype("<f2")
    if not np.isfinite(halves).all():
        worst = values[~np.isfinite(halves)][0]
        raise TensorError(f"{name} of {type.value} blocks is beyond f16, or no number: {worst}")
    return halves


def _exponents(d: Array) -> Array:
    """Of the powers of two nearest to `d`."""
    digits, powers = np.frexp(d)  # d = digits * 2^powers, digits from 1/2 up to 1
    nearest = np.maximum(powers + (digits >= 0.75) - 1 + 128, 0)
    wrong = ~np.isfinite(d) | (d < 0) | (nearest > 254)  # 255 is no number outside ggml
    if wrong.any():
        raise TensorError(f"d of MXFP4 blocks is negative, beyond 2^126, or no number: {d[wrong][0]}")
    return np.where(d == 0, 0, nearest).astype(np.uint8)
