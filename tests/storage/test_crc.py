"""CRCs put together, against zlib's CRC of the whole."""

from __future__ import annotations

import itertools
import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from mixtools.storage.crc import Ledger, combine


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combine(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


@given(st.binary(max_size=40), st.integers(0, 1 << 20))
def test_combine_with_many_zeros(first: bytes, count: int) -> None:
    zeros = bytes(count)
    assert combine(zlib.crc32(first), zlib.crc32(zeros), count) == zlib.crc32(first + zeros)


@given(st.binary(max_size=200), st.data())
def test_ledger_of_pieces_in_any_order(data: bytes, draw: st.DataObject) -> None:
    cuts = sorted(draw.draw(st.sets(st.integers(0, len(data)))) | {0, len(data)})
    pieces = draw.draw(st.permutations(list(itertools.pairwise(cuts))))
    ledger = Ledger(len(data))
    for number, (start, stop) in enumerate(pieces):
        left = pieces[number:]
        covered = {i for i in range(len(data)) if not any(a <= i < b for a, b in left)}
        gaps = ledger.gaps()
        assert {i for a, b in gaps for i in range(a, b)} == set(range(len(data))) - covered
        assert ledger.total() is None
        ledger.add(start, stop, zlib.crc32(data[start:stop]))
    assert ledger.gaps() == []
    assert ledger.total() == zlib.crc32(data)


def test_ledger_of_overlapping_pieces() -> None:
    """Pieces read twice or across one another never give a wrong sum; what they leave open is told."""
    data = random.Random(0).randbytes(100)
    chance = random.Random(1)
    for _ in range(200):
        ledger = Ledger(len(data))
        for _ in range(chance.randrange(12)):
            start, stop = sorted(chance.choices(range(101), k=2))
            ledger.add(start, stop, zlib.crc32(data[start:stop]))
        for start, stop in ledger.gaps():
            ledger.add(start, stop, zlib.crc32(data[start:stop]))
        assert ledger.total() == zlib.crc32(data)


def test_wrong_piece_shows() -> None:
    ledger = Ledger(4)
    ledger.add(0, 2, zlib.crc32(b"ab"))
    ledger.add(2, 4, zlib.crc32(b"cx"))
    assert ledger.total() != zlib.crc32(b"abcd")
