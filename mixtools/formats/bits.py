"""Codes of a few bits in 32-bit words: dense, low bits first, a value of 3 bits straddling where a word ends.

    codes [n, rows], a byte each ─► pack ─► words [n * bits / 32, rows]
    words [rows, n * bits / 32] ─► unpack ─► codes [rows, n]

A layer of 8x7B has 1.4 G codes. They are packed in lines, where they lie: whole lines are shifted into each other, and
what goes on is a fraction of them. On their way back neighbours are parted in wide words, in runs that stay in a core's
cache: each pass moves as many codes at once as a register holds, and main memory sees a code once on each side. Words
are little-endian, as safetensors and torch store them; numpy and torch compute here on nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..errors import TensorError
from ..ops import cpu

if TYPE_CHECKING:
    from torch import Tensor

Codes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

BITS = (2, 3, 4, 8)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight neighbours lies in a word's lowest four bits, and so on upwards
_RUN = 1 << 19  # codes at once
_IN_LINES = 1 << 21  # the same on their way into words, where each step looks at an eighth of them at most
# how neighbours come apart, from the last step to the first: the words that hold them, then how far apart they were and
# what was kept of them
_STEPS: dict[int, tuple[str, tuple[tuple[int, int], ...]]] = {
    2: ("<u4", ((6, 0x000F000F), (12, 0x000000FF))),
    3: ("<u8", ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0x0000000000FFFFFF))),
    4: ("<u2", ((4, 0x00FF),)),
}
_APART = {2: 0x03030303, 3: 0x0707070707070707, 4: 0x0F0F}  # the same words with one code a byte


def words_of(count: int, bits: int) -> int:
    """Words that hold so many codes of `bits`; the last may be filled in part."""
    return -(-count * bits // 32)


def pack(lines: Tensor, bits: int, order: Sequence[int] = range(8)) -> Tensor:
    """Codes uint8 [n, rows] -> int32 words [words_of(n), rows], each row by itself, on the codes' device.

    What is left of the last word is zero. `order`: which of eight neighbours comes first, and so on. Raises TensorError
    for a code that `bits` cannot hold.
    """
    import torch

    from ..ops import library

    lines, (count, rows) = library.dense(lines), lines.shape
    if bits < 8 and lines.numel() and (most := int(lines.max())) >> bits:
        raise TensorError(f"code {most} does not fit into {bits} bits")
    period = 4 // math.gcd(bits, 4)  # eights of codes that fill whole words
    number = -(-count // (8 * period))
    if missing := 8 * period * number - count:
        lines = torch.nn.functional.pad(lines, (0, 0, 0, missing))
    eights = lines.view(number, period, 8, rows)
    words = lines.new_empty((number * period * bits // 4, rows), dtype=torch.int32)
    # byte by byte: whatever a word's highest bit is, nothing here has a sign
    places = words.view(torch.uint8).view(number, period * bits // 4, rows, 4)
    step = max(1, _IN_LINES // max(1, 8 * period * rows)) if lines.device.type == "cpu" else max(1, number)
    for at in range(0, number, step):
        run = slice(at, at + step)
        for byte in range(period * bits):
            eight, inside = divmod(byte, bits)
            places[run, byte // 4, :, byte % 4] = _byte(eights[run, eight], bits, inside, order)
    return words[: words_of(count, bits)]


def _byte(eight: Tensor, bits: int, number: int, order: Sequence[int]) -> Tensor:
    """The byte of that number among those that codes [n, 8, rows] fill: [n, rows]."""
    shifts = {place: bits * at - 8 * number for at, place in enumerate(order) if -bits < bits * at - 8 * number < 8}
    return reduce(or_, (eight[:, place] << by if by >= 0 else eight[:, place] >> -by for place, by in shifts.items()))


def unpack(words: Words, bits: int, count: int) -> Codes:
    """Words [rows, words_of(count)] -> codes [rows, count]: the inverse of `pack`, on turned matrices."""
    rows = len(words)
    codes = np.empty((rows, count), np.uint8)
    for run in _runs(rows, count):
        part = np.ascontiguousarray(words[run])
        if bits == 3 and part.shape[1] % 3:
            part = np.pad(part, ((0, 0), (0, -part.shape[1] % 3)))
        codes[run] = _parted(part.view(np.uint8), bits)[:, :count]
    return codes


def unpack_awq(words: Words) -> Codes:
    """Words [n, out / 8], each of eight neighbours in AWQ's order -> codes [out, n]."""
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


def _parted(packed: Codes, bits: int) -> Codes:
    """Bytes [rows, n * bits / 8], a whole number of words (of three words for 3 bits) -> codes [rows, n]."""
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
