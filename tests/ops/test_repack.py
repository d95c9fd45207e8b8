"""Blocks of our own, made of codes and scales: their values bit for bit, and products with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest

from mixtools.errors import MixtoolsError, TensorError
from mixtools.formats.nf4 import LEVELS
from mixtools.ops import cpu, repack
from mixtools.ops.decode import decode
from mixtools.ops.multiply import multiply
from mixtools.ops.repack import Kind
from mixtools.storage.casting import rounded
from mixtools.storage.dtypes import DType


class Made(NamedTuple):
    blocks: np.ndarray
    kind: Kind
    values: np.ndarray  # fp32 [out, in], as the format's own decoder computes them
    steps: np.ndarray  # [out, in]: a code's worth


def grouped(rows: int, blocks: int, seed: int = 0, *, bits: int, group: int, wide: bool = False) -> Made:
    """`wide`: scales of bf16, not f16."""
    random = np.random.default_rng(seed)
    columns = 256 * blocks
    length = columns if group == -1 else group
    codes = random.integers(0, 1 << bits, (rows, columns), dtype=np.uint8)
    zeros = random.integers(0, (1 << bits) + 1, (rows, columns // length))
    scales = (random.standard_normal(zeros.shape) * 10.0 ** random.integers(-4, 1, zeros.shape)).astype(np.float32)
    scales = (scales.view(np.uint32) & 0xFFFF0000).view(np.float32) if wide else scales.astype("f2").astype("f4")
    each = scales.repeat(length, 1)
    values = each * (codes.astype("f4") - zeros.repeat(length, 1).astype("f4"))
    kind = repack.grouped(columns, bits, group)
    assert kind is not None
    return Made(repack.pack_grouped(codes, scales, zeros, bits, group), kind, values, np.abs(each))


def nf4(rows: int, blocks: int, seed: int = 0) -> Made:
    random = np.random.default_rng(seed)
    codes = random.integers(0, 16, (rows, 256 * blocks), dtype=np.uint8)
    absmax = random.random((rows, 4 * blocks), np.float32) * 0.1 + 1e-3
    each = absmax.repeat(64, 1)
    return Made(repack.pack_nf4(codes, absmax), repack.NF4, np.array(LEVELS, "f4")[codes] * each, each)


def int8(rows: int, blocks: int, seed: int = 0) -> Made:
    random = np.random.default_rng(seed)
    codes = random.integers(-128, 128, (rows, 256 * blocks), dtype=np.int8)
    scales = random.random(rows, np.float32) + np.float32(1e-3)
    each = scales[:, None].repeat(256 * blocks, 1)
    values = codes.astype("f4") * each * np.float32(1 / 127)
    return Made(repack.pack_int8(codes, scales), repack.INT8_ROW, values, each)


GROUPED = [(bits, group) for bits in (3, 4, 8) for group in (32, 64, 128, 256, -1)]
MAKERS: dict[str, Callable[..., Made]] = {
    **{f"int{bits} {group}": partial(grouped, bits=bits, group=group) for bits, group in GROUPED},
    "int4 96": partial(grouped, bits=4, group=96),
    "int4 bf16": partial(grouped, bits=4, group=128, wide=True),
    "int8 bf16": partial(grouped, bits=8, group=64, wide=True),
    "nf4": nf4,
    "int8": int8,
}
SHAPES = [(1, 3, 1), (7, 3, 2), (33, 6, 4), (65, 3, 9), (3, 39, 16), (2, 3, 21)]


def vectors(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, columns), np.float32)


def narrowed(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) & 0xFFFF0000).view(np.float32)


@pytest.fixture(params=MAKERS, ids=lambda name: name.replace(" ", "-"))
def make(request: pytest.FixtureRequest) -> Callable[..., Made]:
    return MAKERS[request.param]


@pytest.mark.parametrize("to", [DType.F32, DType.F16, DType.BF16], ids=lambda to: to.value)
def test_values_are_those_of_codes_and_scales_bit_for_bit(isa, make, to):
    blocks, kind, values, _ = make(5, 6)
    np.testing.assert_array_equal(decode(blocks, kind, DType.F32).view("f4"), values)
    with np.errstate(over="ignore"):
        expected = rounded(values + np.float32(0), to)  # without a zero's sign
    found = decode(blocks, kind, to, threads=2)
    zero = expected.dtype.type(1 << 8 * expected.itemsize - 1)
    np.testing.assert_array_equal(np.where(found == zero, 0, found), np.where(expected == zero, 0, expected))


@pytest.mark.parametrize(("rows", "count", "tokens"), SHAPES)
def test_a_product_is_that_of_the_values(isa, make, rows, count, tokens):
    blocks, kind, values, _ = make(rows, count, tokens)
    x = vectors(tokens, values.shape[1])
    found = multiply(x, blocks, kind, threads=2)
    wide = values.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.abs(wide).T
    assert found.shape == (tokens, rows) and found.dtype == np.float32
    assert np.all(np.abs(found - x.astype(np.float64) @ wide.T) <= 2**-24 * (x.shape[1] / 32 + 8) * scale)


def test_neither_instruction_set_nor_threads_nor_company_change_a_bit(make, monkeypatch):
    blocks, kind, values, _ = make(97, 3, 5)
    x = vectors(11, values.shape[1], 6)
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    expected = multiply(x, blocks, kind).view(np.uint32)
    for isa in (isa for isa in cpu.Isa if isa <= cpu.best_instruction_set()):
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa.name.lower())
        for threads in (1, 3):
            np.testing.assert_array_equal(multiply(x, blocks, kind, threads=threads).view(np.uint32), expected)
        for token in range(len(x)):
            alone = multiply(x[token : token + 1], blocks, kind).view(np.uint32)
            np.testing.assert_array_equal(alone, expected[token : token + 1])


@pytest.mark.parametrize(("rows", "count", "tokens"), SHAPES)
def test_a_product_with_bf16_is_as_good(isa, make, rows, count, tokens):
    """See the same of ggml's blocks: what is added to codes, and taken off again, costs some bits of fp32."""
    blocks, kind, values, steps = make(rows, count, tokens)
    x = narrowed(vectors(tokens, values.shape[1]))
    found = multiply(x, blocks, kind, narrow=True, threads=2)
    wide = values.astype(np.float64)
    scale = np.abs(x).astype(np.float64) @ np.maximum(np.abs(wide), steps).T
    assert np.all(np.abs(found - x.astype(np.float64) @ wide.T) <= 2**-15 * scale)
    for threads in (1, 3):
        np.testing.assert_array_equal(multiply(x, blocks, kind, narrow=True, threads=threads), found)
    for token in range(tokens):
        np.testing.assert_array_equal(multiply(x[token : token + 1], blocks, kind, narrow=True)[0], found[token])
    integers = (
        isa in (cpu.Isa.AVX2, cpu.Isa.AVX512) and kind.value.startswith("int4") and not kind.value.endswith(" 32")
    )
    if not integers and (isa is not cpu.Isa.AVX512_BF16 or kind.value.startswith(("int8", "nf4"))):
        np.testing.assert_array_equal(found, multiply(x, blocks, kind))


def test_each_code_scale_and_zero_of_a_product(isa, make):
    """x of one value at a time: each column by itself, with bf16 and without."""
    blocks, kind, values, steps = make(4, 3, 8)
    x = np.eye(values.shape[1], dtype=np.float32)
    np.testing.assert_array_equal(multiply(x, blocks, kind), values.T)
    found = multiply(x, blocks, kind, narrow=True)
    assert np.all(np.abs(found - values.T) <= 2**-15 * steps.T)


def test_small_values_beside_a_large_one_keep_their_digits(isa, make):
    """See the same of ggml's blocks."""
    blocks, kind, values, steps = make(20, 3, 9)
    x = narrowed(vectors(4, 768, 3) * np.float32(2**-4))
    x[np.arange(4), [5, 300, 301, 767]] = 127.5
    found = multiply(x, blocks, kind, narrow=True)
    spread = np.abs(x).reshape(4, 3, 256)
    largest = np.maximum(np.abs(values), 16 * steps).reshape(20, 3, 256).max(-1)
    bits = 14 if isa is cpu.Isa.AVX512_BF16 else 22
    bound = 2.0**-bits * (spread.sum(-1) + 16 * spread.max(-1)) @ largest.T
    assert np.all(np.abs(found - x.astype(np.float64) @ values.astype(np.float64).T) <= bound)


@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_the_largest_codes_meet_the_largest_bytes(isa, group):
    """See the same of ggml's blocks; here pairs of a whole group are added in 16 bits."""
    codes, scales = np.full((1, 512), 15, np.uint8), np.ones((1, 1 if group == -1 else 512 // group), "f4")
    blocks, kind = (
        repack.pack_grouped(codes, scales, np.zeros(scales.shape, int), 4, group),
        repack.grouped(512, 4, group),
    )
    x = np.full((4, 512), 2.0**-14, np.float32)
    x[:, ::256] = 1
    x[1] = -x[1]
    x[2:] = np.array([[1.9921875], [-1.9921875]])
    found = multiply(x, blocks, kind, narrow=True)
    bound = 2.0 ** (-14 if isa is cpu.Isa.AVX512_BF16 else -22) * 15 * np.abs(x).sum(1)[:, None]
    assert np.all(np.abs(found - 15 * x.astype(np.float64).sum(1)[:, None]) <= bound)


def test_scales_next_to_nothing_are_scales(isa):
    """Of bf16: in the products of such a scale with a unit of x digits could be lost."""
    codes = np.random.default_rng(0).integers(0, 16, (3, 256), dtype=np.uint8)
    scales, zeros = np.array([[1.3828125 * 2.0**-126], [2.0**-120], [2.0**100]], "f4"), np.full((3, 1), 7)
    blocks, kind = repack.pack_grouped(codes, scales, zeros, 4, -1), repack.grouped(256, 4, -1)
    x = narrowed(vectors(5, 256))
    expected = x.astype(np.float64) @ ((codes.astype(np.float64) - 7) * scales).T
    found = multiply(x, blocks, kind, narrow=True)
    assert np.all(np.abs(found - expected) <= 2.0**-12 * np.abs(x).sum(1)[:, None] * scales.T)


def test_scales_that_are_no_usual_numbers(isa):
    """Denormal, zero, of the greatest; infinite and NaN stay in their row."""
    codes = np.full((6, 256), 15, np.uint8)
    codes[:, ::3] = 2
    scales = np.array([2.0**-24, 0.0, 65504.0, np.inf, np.nan, 1.0], "f4")[:, None]
    zeros = np.full((6, 1), 8)
    blocks, kind = repack.pack_grouped(codes, scales, zeros, 4, -1), repack.grouped(256, 4, -1)
    values = (codes.astype("f4") - 8) * scales
    found = decode(blocks, kind, DType.F32).view("f4")
    np.testing.assert_array_equal(found[[0, 1, 2, 5]], values[[0, 1, 2, 5]])
    assert not np.isfinite(found[[3, 4]]).any()
    found = multiply(vectors(3, 256), blocks, kind, narrow=True)
    assert np.isfinite(found[:, [0, 1, 2, 5]]).all() and not np.isfinite(found[:, [3, 4]]).any()
    tiny = np.array([[2.0**-130]], "f4")  # a denormal bf16
    for bits in (4, 8):
        blocks = repack.pack_grouped(codes[:1], tiny, zeros[:1], bits, -1)
        found = decode(blocks, repack.grouped(256, bits, -1), DType.F32).view("f4")
        np.testing.assert_array_equal(found, (codes[:1].astype("f4") - 8) * tiny)


def test_levels_and_rows_that_are_no_usual_numbers(isa):
    codes = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)
    scales = np.array([1e-38, 0.0, np.inf, np.nan], "f4")
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.array(LEVELS, "f4")[codes % 16] * scales[:, None]
        rows = codes.view(np.int8).astype("f4") * scales[:, None] * np.float32(1 / 127)
    found = decode(repack.pack_nf4(codes % 16, scales[:, None].repeat(4, 1)), repack.NF4, DType.F32).view("f4")
    np.testing.assert_array_equal(found, levels)
    found = decode(repack.pack_int8(codes.view(np.int8), scales), repack.INT8_ROW, DType.F32).view("f4")
    np.testing.assert_array_equal(found, rows)


@pytest.mark.parametrize("bits", repack.GROUPED_BITS)
@pytest.mark.parametrize("group", [32, 64, 128, 1024, -1])
def test_blocks_take_little_more_than_what_is_stored(bits, group):
    kind = repack.grouped(4096, bits, group)
    groups = 1 if group == -1 else 4096 // group
    stored = 4096 * bits / 8 + groups * (2 + bits / 8)  # a row's codes, scales and zeros
    assert kind is not None and stored < kind.row_bytes(4096) <= (1.05 if bits > 3 else 1.06) * stored
    assert kind.nbytes((10, 4096)) == 10 * kind.row_bytes(4096)
    with pytest.raises(ValueError, match="no multiple of int. in groups of"):
        kind.row_bytes(4000)


def test_a_row_larger_than_what_a_thread_takes_at_a_time():
    blocks, kind, values, _ = grouped(5, 600, bits=4, group=128)  # 80 KB a row
    x = vectors(1, values.shape[1])
    np.testing.assert_array_equal(multiply(x, blocks, kind, threads=3)[0, 4:], multiply(x, blocks[4:], kind)[0])


@pytest.mark.parametrize(
    ("columns", "bits", "group"),
    [(4096, 2, 128), (4096, 4, 16), (4000, 4, 32), (128, 4, 64), (4096, 4, 48), (4096, 5, 64), (4096, 4, 8192)],
)
def test_what_no_block_holds(columns, bits, group):
    assert repack.grouped(columns, bits, group) is None
    codes, scales = np.zeros((1, columns), np.uint8), np.ones((1, max(1, columns // group)), "f4")
    with pytest.raises(TensorError, match="no block holds"):
        repack.pack_grouped(codes, scales, np.zeros(scales.shape, int), bits, group)


def test_what_cannot_be_exact_is_refused():
    codes, one = np.zeros((1, 256), np.uint8), np.ones((1, 1), "f4")
    with pytest.raises(TensorError, match="neither an f16 nor a bf16"):
        repack.pack_grouped(codes, one + np.float32(2**-12), np.zeros((1, 1), int), 4, -1)
    for zero in (-1, 17):
        with pytest.raises(TensorError, match="a zero is beyond 4 bits"):
            repack.pack_grouped(codes, one, np.full((1, 1), zero), 4, -1)
    for pack in (repack.pack_nf4, repack.pack_int8):
        with pytest.raises(TensorError, match="rows of 96 columns"):
            pack(np.zeros((2, 96), np.int8), one[0])


def test_unknown_kinds_are_refused():
    unknown = Kind("int5", 256 + 5 * 16 + 2, 166)
    with pytest.raises(MixtoolsError, match="no kernel multiplies int5"):
        multiply(vectors(1, 256), np.zeros((2, 166), np.uint8), unknown)
    with pytest.raises(MixtoolsError, match="refused int5"):
        decode(np.zeros((2, 166), np.uint8), unknown, DType.F32)
    blocks, kind, _, _ = grouped(2, 1, bits=4, group=128)
    with pytest.raises(MixtoolsError, match="rows of 512 values are not those of int4 in groups of 128"):
        multiply(vectors(1, 512), blocks, kind)
