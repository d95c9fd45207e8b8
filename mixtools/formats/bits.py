"""Codes of a few bits in 32-bit words: dense, low bits first, a value of 3 bits straddling where a word ends.

    codes [rows, n], a byte each ─► pack ─► words [rows, n * bits / 32] ─► unpack ─► codes

A layer of 8x7B has 1.4 G codes, so neighbours are joined in wide words, in runs that stay in a core's cache: each pass
there moves as many codes at once as a register holds, and main memory sees a code once on each side. Words are
little-endian, as safetensors and torch store them; numpy computes here on nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..errors import TensorError
from ..ops import cpu

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies in a word's lowest four bits, and so on upwards
_RUN = 1 << 19  # codes at once
# how neighbours come together: the words that hold them, then by how much to shift and what to keep, one step each
_STEPS: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {
    2: ("<u4", ((6, 0x000F000F), (12, 0x000000FF))),
    3: ("<u8", ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0x0000000000FFFFFF))),
    4: ("<u2", ((4, 0x00FF),)),
}
_APART = {2: 0x03030303, 3: 0x0707070707070707, 4: 0x0F0F}  # the same words with one code a byte


def words_of(count: int, bits: int) -> int:
    """Words that hold so many codes of `bits`; the last may be filled in part."""
    return -(-count * bits // 32)


def pack(codes: Codes, bits: int) -> Words:
    """Codes [rows, n] -> words [rows, words_of(n)]; what is left of the last word is zero.

    Raises TensorError for a code that `bits` cannot hold.
    """
    rows, count = codes.shape
    words = np.empty((rows, words_of(count, bits)), np.uint32)
    for run in _runs(rows, count):
        part = _filled(codes[run], words.shape[1] * 32 // bits if bits != 3 else -(-count // 32) * 32)
        _expect_small(part, bits)
        words[run] = _joined(part, bits).view(np.uint32)[:, : words.shape[1]]
    return words


def unpack(words: Words, bits: int, count: int) -> Codes:
    """Words [rows, words_of(count)] -> codes [rows, count]: the inverse of `pack`."""
    rows = len(words)
    codes = np.empty((rows, count), np.uint8)
    for run in _runs(rows, count):
        part = np.ascontiguousarray(words[run])
        if bits == 3 and part.shape[1] % 3:
            part = np.pad(part, ((0, 0), (0, -part.shape[1] % 3)))
        codes[run] = _parted(part.view(np.uint8), bits)[:, :count]
    return codes


def pack_awq(codes: Codes) -> Words:
    """Codes of 4 bits [out, n] -> words [n, out / 8], each of eight neighbours along `out` in AWQ's order.

    Raises TensorError for a code that 4 bits cannot hold, or an `out` that is no multiple of 8.
    """
    rows, count = codes.shape
    if rows % 8:
        raise TensorError(f"AWQ packs 8 rows in a word; {rows} rows are no multiple of it")
    words = np.empty((rows // 8, count), np.uint32)
    for run in _runs(rows // 8, 8 * count):
        part = codes[8 * run.start : 8 * run.stop].reshape(-1, 8, count)
        _expect_small(part, 4)
        halves = [part[:, low] | part[:, high] << 4 for low, high in zip(AWQ_ORDER[::2], AWQ_ORDER[1::2], strict=True)]
        words[run] = halves[3]
        for half in halves[2::-1]:
            words[run] <<= 8
            words[run] |= half
    return cpu.transpose(words)


def unpack_awq(words: Words) -> Codes:
    """Words [n, out / 8] -> codes [out, n]: the inverse of `pack_awq`."""
    turned: Words = cpu.transpose(np.ascontiguousarray(words))
    eighths, count = turned.shape
    codes = np.empty((eighths, 8, count), np.uint8)
    for run in _runs(eighths, 8 * count):
        rest = turned[run].copy()
        for row in AWQ_ORDER:
            np.bitwise_and(rest, 15, out=codes[run, row], casting="unsafe")
            rest >>= 4
    return codes.reshape(8 * eighths, count)


def _runs(rows: int, count: int) -> Iterator[slice]:
    step = max(1, _RUN // max(1, count))
    return (slice(at, min(at + step, rows)) for at in range(0, rows, step))


def _filled(codes: Codes, count: int) -> Codes:
    """Contiguous, with zeros up to `count` columns."""
    if count == codes.shape[1]:
        return np.ascontiguousarray(codes)
    return np.pad(codes, ((0, 0), (0, count - codes.shape[1])))


def _expect_small(codes: Codes, bits: int) -> None:
    if bits < 8 and codes.size and (most := int(codes.max())) >> bits:
        raise TensorError(f"code {most} does not fit into {bits} bits")


def _joined(codes: Codes, bits: int) -> Codes:
    """Codes [rows, n] with n a whole number of words (of three words for 3 bits) -> bytes [rows, n * bits / 8]."""
    if bits == 8:
        return codes
    kind, steps = _STEPS[bits]
    words = codes.view(kind)
    for shift, kept in steps:  # a pair of neighbours, then a pair of pairs, ...
        words = words | words >> shift
        words &= kept
    if bits == 3:
        return np.ascontiguousarray(words.view(np.uint8).reshape(len(codes), -1, 8)[..., :3]).reshape(len(codes), -1)
    return words.astype(np.uint8)


def _parted(packed: Codes, bits: int) -> Codes:
    """The inverse of `_joined`."""
    if bits == 8:
        return packed
    kind, steps = _STEPS[bits]
    if bits == 3:
        words = np.zeros((len(packed), packed.shape[1] // 3), kind)
        words.view(np.uint8).reshape(len(packed), -1, 8)[..., :3] = packed.reshape(len(packed), -1, 3)
    else:
        words = packed.astype(kind)
    kept = [*(mask for _, mask in steps[-2::-1]), _APART[bits]]
    for (shift, _), mask in zip(reversed(steps), kept, strict=True):
        words |= words << shift
        words &= mask
    return words.view(np.uint8)
