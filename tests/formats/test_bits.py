"""Packing, against words made of Python's own long integers."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from card import Card, OnCard
from hypothesis import given
from hypothesis import strategies as st

from mixtools.errors import TensorError
from mixtools.formats import bits
from mixtools.formats.bits import BITS, Codes

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # awq's, spelled out once more
Words = npt.NDArray[np.uint32]


def some(rows: int, count: int, width: int, seed: int = 0) -> Codes:
    return np.random.default_rng(seed).integers(0, 1 << width, (rows, count), dtype=np.uint8)


def packed(codes: Codes, width: int) -> Words:
    """Words [rows, ...] of codes [rows, n]."""
    return np.ascontiguousarray(bits.pack(torch.from_numpy(codes).T, width).T.numpy().view(np.uint32))


def packed_awq(codes: Codes) -> Words:
    """Words [n, out / 8] of codes [out, n]."""
    return np.ascontiguousarray(bits.pack(torch.from_numpy(codes), 4, bits.AWQ_ORDER).T.numpy().view(np.uint32))


def plainly(codes: Codes, width: int) -> Words:
    lines = [sum(int(code) << width * at for at, code in enumerate(line)) for line in codes]
    count = -(-codes.shape[1] * width // 32)
    return np.array([[line >> 32 * at & 0xFFFFFFFF for at in range(count)] for line in lines], np.uint32).reshape(
        len(codes), count
    )


@given(st.sampled_from(BITS), st.integers(0, 6), st.integers(1, 140), st.integers(0, 99))
def test_dense_low_bits_first_and_back(width: int, rows: int, count: int, seed: int) -> None:
    codes = some(rows, count, width, seed)
    words = packed(codes, width)
    assert np.array_equal(words, plainly(codes, width)) and words.dtype == np.uint32
    assert words.shape[1] == bits.words_of(count, width)
    assert np.array_equal(bits.unpack(words, width, count), codes)


@pytest.mark.parametrize("width", BITS)
def test_more_than_one_run(width: int) -> None:
    codes = some(300, 4096, width)
    words = packed(codes, width)
    assert np.array_equal(words[::37], plainly(codes[::37], width))
    assert np.array_equal(bits.unpack(words, width, 4096), codes)


def test_three_bits_straddle_at_the_tenth_and_the_twenty_first() -> None:
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 10], codes[0, 21] = 0b101, 0b110
    assert packed(codes, 3).tolist() == [[0b01 << 30, 0b1 | 0b0 << 31, 0b11]]


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 99))
def test_awq_s_order(eighths: int, count: int, seed: int) -> None:
    codes = some(8 * eighths, count, 4, seed)
    words = packed_awq(codes)
    expected = [
        [
            sum(int(codes[8 * block + row, at]) << 4 * place for place, row in enumerate(ORDER))
            for block in range(eighths)
        ]
        for at in range(count)
    ]
    assert words.tolist() == expected
    assert np.array_equal(bits.unpack_awq(words), codes)


def test_awq_in_more_than_one_run() -> None:
    codes = some(512, 4096, 4)
    words = packed_awq(codes)
    turned = codes.reshape(-1, 8, 4096)[:, ORDER].transpose(2, 0, 1)
    assert np.array_equal(words, plainly(np.ascontiguousarray(turned).reshape(-1, 8), 4).reshape(4096, 64))
    assert np.array_equal(bits.unpack_awq(words), codes)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_a_code_that_is_too_large(width: int) -> None:
    codes = some(3, 32, width)
    codes[2, 31] = 1 << width
    with pytest.raises(TensorError, match=f"code {1 << width} does not fit into {width} bits"):
        packed(codes, width)
    if width == 4:
        with pytest.raises(TensorError, match="code 16 does not fit"):
            packed_awq(np.ascontiguousarray(codes.T))


@pytest.mark.parametrize("width", BITS)
@pytest.mark.parametrize("lines", [1, 2000, 1 << 21])
def test_runs_of_lines_and_where_they_lie_do_not_matter(
    width: int, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The highest bit of words is set by some; on a card, the maximum is all that anybody waits for."""
    codes = torch.from_numpy(some(200, 24, width, seed=4))  # 200 codes of 24 rows
    expected = plainly(np.ascontiguousarray(codes.numpy().T), width).T
    assert (expected >> 31).any()
    monkeypatch.setattr(bits, "_IN_LINES", lines)
    wide = torch.full((200, 30), 255, dtype=torch.uint8)
    wide[:, 3:27] = codes
    for lying in (codes, codes.T.contiguous().T, wide[:, 3:27]):
        words = bits.pack(lying, width)
        assert words.is_contiguous() and np.array_equal(words.numpy().view(np.uint32), expected)
    with Card() as card:
        there = codes.to("cuda")
        card.waits.clear()
        words = bits.pack(there, width)
        assert isinstance(words, OnCard) and sum(card.waits.values()) == (width < 8)
    assert np.array_equal(words.as_subclass(torch.Tensor).numpy().view(np.uint32), expected)


def test_a_view_of_a_larger_array_is_packed_as_what_it_is() -> None:
    codes = some(8, 128, 4)
    assert np.array_equal(packed(codes[::2, 32:96], 4), plainly(codes[::2, 32:96], 4))
    words = packed(codes, 4)
    assert np.array_equal(bits.unpack(words[::2, 4:12], 4, 64), codes[::2, 32:96])
