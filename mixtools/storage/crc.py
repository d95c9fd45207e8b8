"""CRC-32 of a whole from the CRC-32 of its pieces, whatever the order they were read in."""

from __future__ import annotations

import zlib
from bisect import insort

_POLYNOMIAL = 0xEDB88320  # of zip, reflected; x^0 is the top bit


def _multiply(a: int, b: int) -> int:
    """a * b modulo the polynomial, both reflected."""
    product = 0
    bit = 1 << 31
    while bit:
        if a & bit:
            product ^= b
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
        bit >>= 1
    return product


def combine(first: int, second: int, second_size: int) -> int:
    """CRC-32 of A+B from those of A and B: crc(A) * x^(8*len(B)) + crc(B).

    Source: zlib's crc32_combine, as described by Mark Adler, https://stackoverflow.com/a/23126768
    """
    power, square, exponent = 1 << 31, 1 << 30, 8 * second_size  # x^0, x^1
    while exponent:
        if exponent & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        exponent >>= 1
    return _multiply(power, first) ^ second


class Ledger:
    """CRCs of disjoint pieces of a record; once they cover it, the record's own."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._pieces: list[tuple[int, int, int]] = []  # start, stop, crc; sorted, disjoint

    def add(self, start: int, stop: int, crc: int) -> None:
        """Note one piece; a piece that overlaps an earlier one is not needed and left out."""
        if start < stop and not any(a < stop and start < b for a, b, _ in self._pieces):
            insort(self._pieces, (start, stop, crc))

    def gaps(self) -> list[tuple[int, int]]:
        """What no piece covers."""
        edges = [0, *(edge for a, b, _ in self._pieces for edge in (a, b)), self.size]
        return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]

    def total(self) -> int | None:
        """CRC of the whole record, or None while pieces are missing."""
        if self.gaps():
            return None
        crc = zlib.crc32(b"")
        for start, stop, piece in self._pieces:
            crc = combine(crc, piece, stop - start)
        return crc
