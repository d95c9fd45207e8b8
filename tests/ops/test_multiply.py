"""Products with matrices in ggml's blocks: against fp64, and the same bits however they are computed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ops.test_decode import NOT_FINITE, at_offset, random_blocks
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops import cpu, library
from mixtools.ops.decode import NATIVE, decode
from mixtools.ops.multiply import multiply
from mixtools.storage.dtypes import DType
from mixtools.storage.store import from_tensor

TYPES = sorted(NATIVE, key=lambda dtype: dtype.value)


def some_blocks(type: DType, rows: int, count: int, seed: int = 0) -> np.ndarray:
    """Of usual sizes: an exponent of MXFP4 reaches to infinity."""
    blocks = random_blocks(type, rows, count, seed=seed)
    if type is DType.MXFP4:
        exponents = blocks.reshape(rows * count, -1)[:, 0]
        exponents[:] = 110 + exponents % 20
    return blocks


def vectors(tokens: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tokens, columns), np.float32)


def columns_of(blocks: np.ndarray, type: DType) -> int:
    return blocks.shape[1] // type.row_bytes(type.block) * type.block


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.value)
@pytest.mark.parametrize(("rows", "count", "tokens"), [(1, 1, 1), (7, 3, 2), (33, 5, 4), (65, 2, 9), (3, 40, 5)])
def test_a_product_is_that_of_the_decoded_values(isa, type, rows, count, tokens):
    blocks = some_blocks(type, rows, count, seed=tokens)
    x = vectors(tokens, columns_of(blocks, type))
    values = decode(blocks, type, DType.F32).view(np.float32).astype(np.float64)
    found = multiply(x, blocks, type, threads=2)
    scale = np.abs(x).astype(np.float64) @ np.abs(values).T
    assert found.shape == (tokens, rows) and found.dtype == np.float32
    # 32 sums of one value each for each 32 columns, then 5 more: far below what a wrong scale would do
    assert np.all(np.abs(found - x.astype(np.float64) @ values.T) <= 2**-24 * (x.shape[1] / 32 + 8) * scale)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.value)
def test_neither_instruction_set_nor_threads_nor_company_change_a_bit(type, monkeypatch):
    blocks = some_blocks(type, 97, 3, seed=5)
    x = vectors(11, columns_of(blocks, type), 6)
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    expected = multiply(x, blocks, type).view(np.uint32)
    for isa in (isa for isa in cpu.Isa if isa <= cpu.best_instruction_set()):
        monkeypatch.setenv(cpu.ISA_VARIABLE, isa.name.lower())
        for threads in (1, 3):
            np.testing.assert_array_equal(multiply(x, blocks, type, threads=threads).view(np.uint32), expected)
        for token in range(len(x)):
            alone = multiply(x[token : token + 1], blocks, type).view(np.uint32)
            np.testing.assert_array_equal(alone, expected[token : token + 1])


K_QUANTS = [DType.Q2_K, DType.Q3_K, DType.Q4_K, DType.Q5_K, DType.Q6_K]


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.value)
@pytest.mark.parametrize(("rows", "count", "tokens"), [(1, 1, 1), (7, 3, 2), (33, 5, 4), (65, 2, 9), (3, 40, 5)])
def test_a_product_with_bf16_is_as_good(isa, type, rows, count, tokens):
    """Each instruction set has a way of its own; the dot product of bf16 adds to codes what costs some bits of fp32."""
    blocks = some_blocks(type, rows, count, seed=tokens)
    x = torch.from_numpy(vectors(tokens, columns_of(blocks, type))).bfloat16().float().numpy()
    values = decode(blocks, type, DType.F32).view(np.float32).astype(np.float64)
    found = multiply(x, blocks, type, narrow=True, threads=2)
    scale = np.abs(x).astype(np.float64) @ np.abs(values).T
    assert np.all(np.abs(found - x.astype(np.float64) @ values.T) <= 2**-15 * scale)
    for token in range(tokens):
        alone = multiply(x[token : token + 1], blocks, type, narrow=True)
        np.testing.assert_array_equal(alone, found[token : token + 1])
    if isa is cpu.Isa.PLAIN or type not in K_QUANTS:
        np.testing.assert_array_equal(found, multiply(x, blocks, type))


@pytest.mark.parametrize("type", K_QUANTS, ids=lambda type: type.value)
def test_each_scale_and_minimum_of_a_product_with_bf16(type):
    """x of one value at a time: each column by itself."""
    blocks = some_blocks(type, 4, 2, seed=8)
    x = np.eye(512, dtype=np.float32)
    values = decode(blocks, type, DType.F32).view(np.float32)
    found = multiply(x, blocks, type, narrow=True)
    # what is taken off again for the codes is 192 times a group's scale
    steps = np.abs(values).reshape(4, 32, 16).max(-1).repeat(16, -1)
    assert np.all(np.abs(found - values.T) <= 2**-13 * (steps.T + np.abs(values).max()))
    assert np.corrcoef(found.ravel(), values.T.ravel())[0, 1] > 1 - 1e-6


def narrow_of(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).bfloat16().float().numpy()


@pytest.mark.parametrize("type", K_QUANTS, ids=lambda type: type.value)
@pytest.mark.parametrize("largest", [1.0, 127.5, 2.0**12])
def test_small_values_beside_a_large_one_keep_their_digits(isa, type, largest):
    """An activation's outliers: all that is not one would be lost in a few bits of the largest."""
    blocks = some_blocks(type, 20, 3, seed=9)
    x = narrow_of(vectors(4, 768, 3) * np.float32(2**-4))
    x[np.arange(4), [5, 300, 301, 767]] = largest
    values = decode(blocks, type, DType.F32).view(np.float32).astype(np.float64)
    found = multiply(x, blocks, type, narrow=True)
    # what is rounded is as large as the largest value of a block, whose scale or minimum that tells
    spread = np.abs(x).reshape(4, 3, 256)
    parts = (spread.sum(-1) + 16 * spread.max(-1)) @ np.abs(values).reshape(20, 3, 256).max(-1).T
    bits = 14 if isa is cpu.Isa.AVX512_BF16 else 22
    assert np.all(np.abs(found - x.astype(np.float64) @ values.T) <= 2.0**-bits * parts)


@pytest.mark.parametrize(
    ("type", "halves"),
    [(DType.Q2_K, (80, 82)), (DType.Q3_K, (108,)), (DType.Q4_K, (0, 2)), (DType.Q5_K, (0, 2)), (DType.Q6_K, (208,))],
    ids=lambda part: getattr(part, "value", ""),
)
@pytest.mark.parametrize("bits", [0xFF, 0x7F, 0x80])
def test_the_largest_codes_and_scales_meet_the_largest_bytes(isa, type, halves, bits):
    """All of one sign: a sum of two products of bytes may be too large for 16 bits, which says nothing."""
    blocks = np.full((1, 2, type.row_bytes(256)), bits, np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = np.array([0x3C00], "<u2").view(np.uint8)  # 1.0
    blocks = blocks.reshape(1, -1)
    x = np.full((4, 512), 2.0**-14, np.float32)
    x[:, ::256] = 1  # the others then are 128 of the 2^22 that the largest may be: a byte of -128, and one above it
    x[1] = -x[1]
    x[2:] = np.array([[1.9921875], [-1.9921875]])
    values = decode(blocks, type, DType.F32).view(np.float32).astype(np.float64)
    found = multiply(x, blocks, type, narrow=True)
    bound = 2.0 ** (-14 if isa is cpu.Isa.AVX512_BF16 else -22) * np.abs(x).sum(1)[:, None] * np.abs(values).max()
    assert np.all(np.abs(found - x.astype(np.float64) @ values.T) <= bound)


@pytest.mark.parametrize("type", K_QUANTS, ids=lambda type: type.value)
@pytest.mark.parametrize("power", [-75, -40, 60, 100])
def test_powers_of_two_go_through(isa, type, power):
    blocks = some_blocks(type, 5, 2, seed=4)
    x = narrow_of(vectors(5, 512, 1))
    found = multiply(np.ldexp(x, power), blocks, type, narrow=True)
    np.testing.assert_array_equal(found, np.ldexp(multiply(x, blocks, type, narrow=True), power))


@pytest.mark.parametrize("type", K_QUANTS, ids=lambda type: type.value)
def test_nothing_and_next_to_nothing(isa, type):
    blocks = some_blocks(type, 5, 2, seed=4)
    x = np.zeros((2, 512), np.float32)
    np.testing.assert_array_equal(multiply(x, blocks, type, narrow=True), np.zeros((2, 5)))
    x[1] = np.ldexp(np.float32(1), -133)  # a denormal
    found = multiply(x, blocks, type, narrow=True)
    values = decode(blocks, type, DType.F32).view(np.float32)
    assert not found[0].any() and np.all(np.abs(found[1]) <= 2.0**-100 * np.abs(values).sum(1))


@pytest.mark.parametrize("type", K_QUANTS, ids=lambda type: type.value)
@pytest.mark.parametrize("strange", [np.inf, -np.inf, np.nan])
def test_x_that_is_no_number_stays_in_its_token(isa, type, strange):
    blocks = some_blocks(type, 5, 2, seed=4)
    x = narrow_of(vectors(6, 512, 1))
    x[4, 300] = strange
    found = multiply(x, blocks, type, narrow=True)
    assert not np.isfinite(found[4]).any() and np.isfinite(found[[0, 1, 2, 3, 5]]).all()
    if isa is not cpu.Isa.AVX512_BF16:  # no integer stands for it
        np.testing.assert_array_equal(found, multiply(x, blocks, type))


def test_rows_may_lie_anywhere():
    type = DType.Q4_K
    blocks = random_blocks(type, 12, 2)
    x = vectors(6, 512)
    expected = multiply(x, blocks, type)
    for offset in (1, 3):
        moved = at_offset(blocks, offset)
        np.testing.assert_array_equal(multiply(x, moved, type), expected)
    wide = np.zeros((12, blocks.shape[1] + 5), np.uint8)
    wide[:, 2:-3] = blocks
    np.testing.assert_array_equal(multiply(x, wide[:, 2:-3], type), expected)
    np.testing.assert_array_equal(multiply(x[::-1], blocks[::-1], type), expected[::-1, ::-1])
    spread = np.zeros((6, 600), np.float32)
    spread[:, 40:552] = x
    np.testing.assert_array_equal(multiply(spread[:, 40:552], blocks, type), expected)


def test_a_row_larger_than_what_a_thread_takes_at_a_time(isa):
    type = DType.Q6_K
    blocks = random_blocks(type, 5, 400)  # 84 KB a row
    x = vectors(1, 400 * 256)
    np.testing.assert_array_equal(multiply(x, blocks, type, threads=3)[0, 4:], multiply(x, blocks[4:], type)[0])


@pytest.mark.parametrize("type", [DType.Q4_K, DType.Q8_0, DType.Q2_K], ids=lambda type: type.value)
def test_what_is_no_number_stays_in_its_row(isa, type):
    blocks = random_blocks(type, 6, 2)
    blocks[2] = random_blocks(type, 1, 2, NOT_FINITE)[0]
    found = multiply(vectors(3, columns_of(blocks, type)), blocks, type)
    assert np.isfinite(found[:, [0, 1, 3, 4, 5]]).all() and not np.isfinite(found[:, 2]).any()


def test_nothing_gives_nothing():
    blocks = random_blocks(DType.Q8_0, 3, 2)
    assert multiply(np.empty((0, 64), np.float32), blocks, DType.Q8_0).shape == (0, 3)
    assert multiply(vectors(2, 64), blocks[:0], DType.Q8_0).shape == (2, 0)
    np.testing.assert_array_equal(multiply(vectors(2, 0), blocks[:, :0], DType.Q8_0), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("x", "blocks", "type", "said"),
    [
        (vectors(1, 64), random_blocks(DType.Q8_0, 2, 3), DType.Q8_0, "rows of 64 values are not those of Q8_0"),
        (vectors(1, 33), random_blocks(DType.Q8_0, 2, 1), DType.Q8_0, "rows of 33 values"),
        (vectors(1, 64).astype(np.float64), random_blocks(DType.Q8_0, 2, 2), DType.Q8_0, "float32 rows"),
        (vectors(1, 64)[0], random_blocks(DType.Q8_0, 2, 2), DType.Q8_0, "float32 rows"),
        (vectors(1, 64), random_blocks(DType.Q8_0, 2, 2).view(np.int8), DType.Q8_0, "bytes"),
        (vectors(1, 128)[:, ::2], random_blocks(DType.Q8_0, 2, 2), DType.Q8_0, "dense rows"),
        (vectors(1, 256), random_blocks(DType.IQ2_S, 2, 1), DType.IQ2_S, "no kernel multiplies IQ2_S"),
        (vectors(1, 64), np.zeros((2, 256), np.uint8), DType.F32, "no kernel multiplies F32"),
    ],
)
def test_what_does_not_fit_is_refused(x, blocks, type, said):
    with pytest.raises(MixtoolsError, match=said):
        multiply(x, blocks, type)
    with pytest.raises(MixtoolsError, match="threads"):
        multiply(vectors(1, 64), random_blocks(DType.Q8_0, 2, 2), DType.Q8_0, threads=0)


# --- as operations of torch ---


@pytest.mark.parametrize("type", [DType.Q4_K, DType.Q8_0], ids=lambda type: type.value)
def test_operations_are_well_formed_and_agree_with_plain_torch(type):
    blocks = torch.from_numpy(random_blocks(type, 9, 4))
    x = torch.from_numpy(vectors(3, columns_of(blocks.numpy(), type)))
    opcheck(library.multiply_blocks, (x, blocks, type.value, 2))
    found = library.multiply_blocks(x, blocks, type.value)
    expected = library.multiply_blocks_reference(x, blocks, type.value)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    for dtype, to in ((torch.float32, DType.F32), (torch.bfloat16, DType.BF16), (torch.float16, DType.F16)):
        opcheck(library.decode_blocks, (blocks, type.value, dtype))
        found = library.decode_blocks(blocks, type.value, dtype)
        assert found.dtype == dtype
        np.testing.assert_array_equal(from_tensor(found), decode(blocks.numpy(), type, to))
    with pytest.raises(MixtoolsError, match="not to torch.float64"):
        library.decode_blocks(blocks, type.value, torch.float64)


def test_operations_take_what_is_not_dense():
    blocks = torch.from_numpy(random_blocks(DType.Q8_0, 9, 4))
    x = torch.from_numpy(vectors(128, 3)).t()
    dense = library.multiply_blocks(x.contiguous(), blocks, "Q8_0")
    assert torch.equal(library.multiply_blocks(x, blocks, "Q8_0"), dense)
    turned = blocks.t().contiguous().t()
    assert torch.equal(library.multiply_blocks(x, turned, "Q8_0"), dense)
    values = library.decode_blocks(blocks, "Q8_0", torch.float32)
    assert torch.equal(library.decode_blocks(turned, "Q8_0", torch.float32), values)
