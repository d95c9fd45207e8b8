"""Matrices of other formats than ggml's as blocks that the CPU's kernels multiply. Free of torch: numpy in and out.

    codes [out, in], a byte each, with their scales ─► blocks of 256 values, side by side ─► [out, bytes of a row]

A block holds for each group a word, a scale that is exact and its zero, and then its codes, in an order that suits the
kernels (kernels/grouped.h). It takes at most 5 percent more than what GPTQ and AWQ store (of 3 bits 6), and no value
changes by a bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ..errors import TensorError
from ..storage.dtypes import GGML, DType
from .cpu import NATIVE, Array, aligned_empty

WHOLE_ROW = -1  # as a group's length
GROUPED_BITS = (3, 4, 8)
_VALUES = 256
_SMALLEST_GROUP = 32
_LOST = np.uint32(0x1FFF)  # digits of an fp32 that a scale must not have: neither f16 nor bf16 has them
_RUN = 1 << 18  # codes at once, which stay in a core's cache


@dataclass(frozen=True)
class Kind:
    """A type of block: `number` is its TYPE in kernels/grouped.h, `size` its bytes, `value` what a user may call it."""

    value: str
    number: int
    size: int

    block: ClassVar[int] = _VALUES

    def row_bytes(self, columns: int) -> int:
        """Raises ValueError where a block would be cut."""
        count, rest = divmod(columns, _VALUES)
        if rest:
            raise ValueError(f"rows of {columns} values are no multiple of {self.value}'s blocks of {_VALUES}")
        return count * self.size

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a matrix. Raises ValueError as row_bytes."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1])


NF4 = Kind("nf4", 512, 4 * 4 + 128)
INT8_ROW = Kind("int8", 513, 4 + 256)


def grouped(columns: int, bits: int, group: int) -> Kind | None:
    """Of rows of so many codes, `group` of which share a scale; None where no block holds them."""
    length = columns if group == WHOLE_ROW else group
    if bits not in GROUPED_BITS or columns % _VALUES or length < _SMALLEST_GROUP or columns % length:
        return None
    share = math.gcd(length, _VALUES)
    return _grouped(bits, _VALUES // share) if share >= _SMALLEST_GROUP else None


def _grouped(bits: int, count: int) -> Kind:
    return Kind(f"int{bits} in groups of {_VALUES // count}", 256 + 16 * bits + count, _word(bits) * count + 32 * bits)


def _word(bits: int) -> int:
    """Bytes of a group's word."""
    return 4 if bits == 8 else 3


KINDS = frozenset({NF4, INT8_ROW, *(_grouped(bits, count) for bits in GROUPED_BITS for count in (1, 2, 4, 8))})


Type = DType | Kind  # of blocks


def native(type: Type) -> bool:
    """Whether the kernels know it."""
    return type in (KINDS if isinstance(type, Kind) else NATIVE)


def number(type: Type) -> int:
    """By which they do."""
    return type.number if isinstance(type, Kind) else GGML[type]


def pack_grouped(codes: Array, scales: Array, zeros: Array, bits: int, group: int) -> Array:
    """Of uint8 `codes` [out, in], fp32 `scales` and integer `zeros` [out, groups]; a value is (code - zero) * scale.

    Raises TensorError where no block holds rows of so many codes, for a scale that is neither an f16 nor a bf16, and
    for a zero of less than 0 or more than 2^bits.
    """
    rows, columns = codes.shape
    if (kind := grouped(columns, bits, group)) is None:
        raise TensorError(f"no block holds {bits} bits in rows of {columns} columns in groups of {group}")
    scale_bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    if (scale_bits & _LOST).any():
        raise TensorError("a scale is neither an f16 nor a bf16")
    if zeros.size and not 0 <= int(zeros.min()) <= int(zeros.max()) <= 1 << bits:
        raise TensorError(f"a zero is beyond {bits} bits")
    size = _word(bits)
    words = (scale_bits >> np.uint32(8 * (4 - size))) | zeros.astype(np.uint32)
    count = (kind.size - 32 * bits) // size  # of a block's words
    at = np.arange(columns // _VALUES * count) * (_VALUES // count) // (columns if group == WHOLE_ROW else group)
    out = aligned_empty((rows, kind.row_bytes(columns)), np.dtype(np.uint8))
    blocks = out.reshape(rows, -1, kind.size)
    for run in _runs(rows, columns):
        of_blocks = np.take(words[run], at, axis=1).view(np.uint8).reshape(-1, blocks.shape[1], count, 4)
        blocks[run, :, : size * count] = of_blocks[..., :size].reshape(*of_blocks.shape[:2], -1)
        blocks[run, :, size * count :] = _PACKED[bits](codes[run].reshape(-1, blocks.shape[1], _VALUES))
    return out


def pack_nf4(codes: Array, absmax: Array) -> Array:
    """Of uint8 `codes` [out, in] and fp32 `absmax` [out, in / 64]. Raises TensorError where a row ends in a block."""
    blocks, out = _blocks(codes, NF4)
    scales = np.ascontiguousarray(absmax, np.float32).view(np.uint8).reshape(*blocks.shape[:2], 16)
    for run in _runs(*codes.shape):
        blocks[run, :, :16] = scales[run]
        blocks[run, :, 16:] = _four(codes[run].reshape(-1, blocks.shape[1], _VALUES))
    return out


def pack_int8(codes: Array, scales: Array) -> Array:
    """Of int8 `codes` [out, in] and fp32 `scales` [out], 127 being the code of a row's scale.

    Raises TensorError where a row ends in a block.
    """
    blocks, out = _blocks(codes, INT8_ROW)
    blocks[:, :, :4] = np.ascontiguousarray(scales, np.float32).view(np.uint8).reshape(-1, 1, 4)
    blocks[:, :, 4:] = codes.view(np.uint8).reshape(*blocks.shape[:2], _VALUES)
    return out


def _blocks(codes: Array, kind: Kind) -> tuple[Array, Array]:
    """Room for the blocks of codes [out, in]: [out, blocks, bytes], and the same as [out, bytes]."""
    rows, columns = codes.shape
    if columns % _VALUES:
        raise TensorError(f"no block holds rows of {columns} columns: {_VALUES} make one")
    out = aligned_empty((rows, kind.row_bytes(columns)), np.dtype(np.uint8))
    return out.reshape(rows, -1, kind.size), out


def _runs(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _RUN // max(1, columns))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


# --- codes [rows, blocks, 256] -> [rows, blocks, bytes] ---------------------------------------------------------------

_Codes = npt.NDArray[np.uint8]


def _four(codes: _Codes) -> _Codes:
    """Of each 128, 16 words, each of the codes that lie 16 apart; their first half in the low bits of its bytes."""
    runs = codes.reshape(*codes.shape[:2], 2, 2, 4, 16)
    pairs = np.left_shift(runs[:, :, :, 1], 4, dtype=np.uint8)
    pairs |= runs[:, :, :, 0]
    words = pairs[:, :, :, 0].astype("<u4")
    for place in range(1, 4):
        words |= pairs[:, :, :, place].astype("<u4") << np.uint32(8 * place)
    return words.view(np.uint8).reshape(*codes.shape[:2], 128)


def _three(codes: _Codes) -> _Codes:
    """Of each 128 the low two bits, the first 32 lowest; then the highest bits, of each 32 in a place of their own."""
    groups = codes.reshape(*codes.shape[:2], 8, 32)
    low = np.zeros((*codes.shape[:2], 2, 32), np.uint8)
    high = np.zeros((*codes.shape[:2], 32), np.uint8)
    for group in range(8):
        low[:, :, group // 4] |= (groups[:, :, group] & 3) << 2 * (group % 4)
        high |= groups[:, :, group] >> 2 << group
    return np.concatenate((low.reshape(*codes.shape[:2], 64), high), -1)


def _eight(codes: _Codes) -> _Codes:
    """Less 128."""
    return np.bitwise_xor(codes, 128, dtype=np.uint8)


_PACKED: dict[int, Callable[[_Codes], _Codes]] = {3: _three, 4: _four, 8: _eight}
