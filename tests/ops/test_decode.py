"""The decoders of ggml's blocks, on each instruction set, against those that others wrote.

The oracles are the numpy decoders of the gguf package and, where it is installed, ggml itself (libggml-python); torch
rounds what they give to bf16 and f16.
"""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from ggml_oracle import traits_of

from mixtools.errors import MixtoolsError
from mixtools.ops import cpu
from mixtools.ops import decode as module
from mixtools.ops.decode import NATIVE, decode
from mixtools.storage.dtypes import ELEMENTS, DType

TYPES = [dtype for dtype in DType if dtype not in ELEMENTS]
OURS = [dtype for dtype in TYPES if dtype in NATIVE]
THEIRS = [dtype for dtype in TYPES if dtype not in NATIVE]
TARGETS = [DType.F32, DType.BF16, DType.F16]
# where the f16 scales of a block lie; IQ1_M spreads the bits of its own over four bytes, MXFP4 has an exponent
SCALES = {
    DType.Q4_0: [0], DType.Q4_1: [0, 2], DType.Q5_0: [0], DType.Q5_1: [0, 2], DType.Q8_0: [0], DType.Q2_K: [80, 82],
    DType.Q3_K: [108], DType.Q4_K: [0, 2], DType.Q5_K: [0, 2], DType.Q6_K: [208], DType.IQ1_S: [0], DType.IQ1_M: [],
    DType.IQ2_XXS: [0], DType.IQ2_XS: [0], DType.IQ2_S: [0], DType.IQ3_XXS: [0], DType.IQ3_S: [0], DType.IQ4_NL: [0],
    DType.IQ4_XS: [0], DType.MXFP4: [],
}  # fmt: skip
# f16 bits: usual ones on both sides of the smallest normal one, 0, -0, the least and the largest
USUAL = [*range(0x0040, 0x2C00, 7), *range(0x8040, 0xAC00, 7)]
EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x8400, 0x7BFF, 0xFBFF, 0x3C00]
NOT_FINITE = [0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01, 0xFD55]


def ggml(dtype: DType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[dtype.value]


def block_of(dtype: DType) -> tuple[int, int]:
    """Values and bytes."""
    return gguf.GGML_QUANT_SIZES[ggml(dtype)]


def random_blocks(dtype: DType, rows: int, count: int, scales: list[int] = USUAL, seed: int = 0) -> np.ndarray:
    """[rows, count blocks], any bytes but for the scales."""
    random, size = np.random.default_rng(seed), block_of(dtype)[1]
    blocks = random.integers(0, 256, (rows * count, size), np.uint8)
    for at in SCALES[dtype]:
        blocks[:, at : at + 2] = random.choice(np.array(scales, np.uint16), rows * count).view(np.uint8).reshape(-1, 2)
    if dtype is DType.IQ1_M:  # the upper halves of the bytes 49, 51, 53 and 55 are the scale: here a small one
        blocks[:, 55] = blocks[:, 55] & 0x0F | 0x10
    return blocks.reshape(rows, count * size)


def by_gguf(blocks: np.ndarray, dtype: DType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(np.ascontiguousarray(blocks), ggml(dtype))


def rounded(values: np.ndarray, to: DType) -> np.ndarray:
    """Bit patterns, by torch."""
    if to is DType.F32:
        return values.view(np.uint32)
    return torch.from_numpy(values).to(to.torch()).view(torch.int16).numpy().view(np.uint16)


def assert_same(bits: np.ndarray, expected: np.ndarray, to: DType) -> None:
    """The same bits; of a NaN, that it is one."""
    exponent = {DType.F32: 0x7F800000, DType.BF16: 0x7F80, DType.F16: 0x7C00}[to]
    sign = 1 << (8 * bits.itemsize - 1)
    nan, expected_nan = (bits & (sign - 1)) > exponent, (expected & (sign - 1)) > exponent
    np.testing.assert_array_equal(nan, expected_nan)
    np.testing.assert_array_equal(np.where(nan, 0, bits), np.where(nan, 0, expected))


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """The same array, dense, `offset` bytes after the start of a cache line."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    moved = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
@pytest.mark.parametrize("dtype", OURS, ids=lambda dtype: dtype.value)
@pytest.mark.parametrize(("rows", "count"), [(1, 1), (3, 1), (2, 3), (7, 5), (33, 11)])
def test_values_are_those_of_gguf(isa, dtype, to, rows, count):
    blocks = random_blocks(dtype, rows, count, [*USUAL, *EDGES], seed=rows)
    bits = decode(blocks, dtype, to)
    assert bits.shape == (rows, count * block_of(dtype)[0])
    np.testing.assert_array_equal(bits, rounded(by_gguf(blocks, dtype), to))


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
@pytest.mark.parametrize("dtype", THEIRS, ids=lambda dtype: dtype.value)
def test_other_types_go_through_gguf(dtype, to, monkeypatch):
    blocks = random_blocks(dtype, 5, 7)
    expected = rounded(by_gguf(blocks, dtype), to)
    np.testing.assert_array_equal(decode(blocks, dtype, to), expected)
    for run in (100, 300, 1000, 256 * 7 * 2 + 1):  # within a row, across rows, with a rest in either
        monkeypatch.setattr(module, "_RUN", run)
        np.testing.assert_array_equal(decode(blocks[::-1], dtype, to), expected[::-1])


def test_every_type_is_decoded_by_someone():
    assert len(OURS) == 13 and not set(NATIVE) - set(TYPES)
    for dtype in TYPES:
        assert decode(random_blocks(dtype, 1, 2), dtype, DType.BF16).shape == (1, 2 * block_of(dtype)[0])
    assert set(SCALES) == set(TYPES)


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
def test_every_scale_and_every_tie(isa, to):
    """Each f16 times each code of a byte: with 18 digits, values lie between two of bf16 or f16, also halfway."""
    codes = np.arange(256, dtype=np.uint8).reshape(8, 1, 32).repeat(1 << 16, axis=1)
    scales = np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(1, -1, 2).repeat(8, axis=0)
    blocks = np.concatenate([scales, codes], axis=2).reshape(8, -1)
    expected = by_gguf(blocks, DType.Q8_0)
    assert_same(decode(blocks, DType.Q8_0, to), rounded(expected, to), to)


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
def test_every_exponent_of_mxfp4(isa, to):
    blocks = np.empty((256, 17), np.uint8)
    blocks[:, 0] = np.arange(256)  # from denormals of fp32 to what is infinite in it
    blocks[:, 1:] = np.arange(16) * 17
    values = by_gguf(blocks, DType.MXFP4)
    assert 0 < np.abs(values[values != 0]).min() < 2.0**-126 and np.isinf(values).any()
    np.testing.assert_array_equal(decode(blocks, DType.MXFP4, to), rounded(values, to))


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.value)
def test_scales_that_are_not_finite(isa, dtype, to):
    scales = [*NOT_FINITE, *NOT_FINITE, *EDGES, *USUAL[::400]]
    blocks = random_blocks(dtype, 9, 40, scales)
    if dtype is DType.IQ1_M:
        blocks = np.random.default_rng(0).integers(0, 256, blocks.shape, np.uint8)
    bits = decode(blocks, dtype, to)
    values = by_gguf(blocks, dtype)
    assert_same(bits, rounded(values, to), to)
    nan = {DType.F32: 0x7FC00000, DType.BF16: 0x7FC0, DType.F16: 0x7E00}[to]
    assert set(bits[np.isnan(values)].tolist()) == ({nan} if dtype is not DType.MXFP4 else set())


def test_f16_overflows_to_infinity(isa):
    blocks = np.frombuffer(np.float16(60000).tobytes() + bytes([1, 2, 255, 128] * 8), np.uint8).reshape(1, 34)
    values = decode(blocks, DType.Q8_0, DType.F16).view(np.float16)[0, :4]
    assert values.tolist() == [60000, np.inf, -60000, -np.inf]


def test_denormal_scales_where_torch_flushes_them(isa):
    blocks = random_blocks(DType.Q8_0, 4, 9, [0x0001, 0x0003, 0x83FF])
    expected = by_gguf(blocks, DType.Q8_0).view(np.uint32)
    assert torch.set_flush_denormal(True) or isa is cpu.Isa.PLAIN
    try:
        np.testing.assert_array_equal(decode(blocks, DType.Q8_0, DType.F32), expected)
    finally:
        torch.set_flush_denormal(False)


def by_ggml(blocks: np.ndarray, dtype: DType) -> np.ndarray:
    rows, row_bytes = blocks.shape
    values, size = block_of(dtype)
    result = np.empty((rows, row_bytes // size * values), np.float32)
    traits_of(dtype).to_float(blocks.ctypes.data, result.ctypes.data, result.size)
    return result


@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.value)
def test_values_are_those_of_ggml(isa, dtype):
    blocks = random_blocks(dtype, 6, 50, [*USUAL, *EDGES], seed=3)
    bits = decode(blocks, dtype, DType.F32)
    np.testing.assert_array_equal(bits, by_ggml(blocks, dtype).view(np.uint32))
    blocks = random_blocks(dtype, 6, 50, [*NOT_FINITE, *USUAL[::200]], seed=4)
    assert_same(decode(blocks, dtype, DType.F32), by_ggml(blocks, dtype).view(np.uint32), DType.F32)


@pytest.mark.parametrize("dtype", OURS, ids=lambda dtype: dtype.value)
def test_values_of_ggmls_own_encodings(isa, dtype):
    weights = np.random.default_rng(1).normal(0, 0.02, (6, 512)).astype(np.float32)
    weights[1] *= 1e-4  # scales below the normal f16
    weights[2, 100] = 50
    weights[3], weights[4] = 0, 0.01
    values, size = block_of(dtype)
    blocks = np.empty((6, 512 // values * size), np.uint8)
    traits_of(dtype).from_float_ref(weights.ctypes.data, blocks.ctypes.data, weights.size)
    expected = by_ggml(blocks, dtype)
    assert np.abs(expected[0] - weights[0]).max() < 0.02
    for to in TARGETS:
        np.testing.assert_array_equal(decode(blocks, dtype, to), rounded(expected, to))


@pytest.mark.parametrize("to", [DType.BF16, DType.F32], ids=lambda to: to.value)
@pytest.mark.parametrize("dtype", [DType.Q4_K, DType.Q6_K, DType.Q8_0], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_on_any_number_of_threads(isa, dtype, to, threads):
    # over a MiB, written past the caches, and several pieces for each thread, which end inside rows
    blocks = random_blocks(dtype, 37, 70 * 256 // block_of(dtype)[0])
    expected = rounded(by_gguf(blocks, dtype), to)
    assert expected.nbytes > 1 << 20
    np.testing.assert_array_equal(decode(blocks, dtype, to, threads=threads), expected)
    for offset in (2, 16, 32):
        out = at_offset(np.zeros_like(expected), offset)
        assert decode(blocks, dtype, to, out=out, threads=threads) is out
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [*OURS, DType.IQ3_S], ids=lambda dtype: dtype.value)
def test_at_any_address(isa, dtype):
    blocks = random_blocks(dtype, 4, 6)
    expected = rounded(by_gguf(blocks, dtype), DType.BF16)
    for offset in (0, 1, 2, 3, 4, 7, 16, 33, 63):
        out = at_offset(np.zeros_like(expected), 64 - offset)
        decode(at_offset(blocks, offset), dtype, DType.BF16, out=out)
        np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("dtype", [DType.Q4_K, DType.Q5_0, DType.IQ2_S], ids=lambda dtype: dtype.value)
@pytest.mark.parametrize("rows", [np.s_[::2], np.s_[::-1], np.s_[1:20:7]], ids=["step", "reversed", "seventh"])
def test_any_row_stride(isa, dtype, rows):
    size, values = block_of(dtype)[1], block_of(dtype)[0]
    blocks = random_blocks(dtype, 24, 9)
    expected = rounded(by_gguf(blocks, dtype), DType.F16)
    np.testing.assert_array_equal(decode(blocks[rows], dtype, DType.F16), expected[rows])
    band = blocks[rows, size * 2 : size * 7]
    out = np.zeros_like(expected)
    decode(band, dtype, DType.F16, out=out[rows, values : values * 6])
    np.testing.assert_array_equal(out[rows, values : values * 6], expected[rows, values * 2 : values * 7])
    assert not out[rows, :values].any() and not out[rows, values * 6 :].any()
    repeated = np.broadcast_to(blocks[3], (5, blocks.shape[1]))  # row stride 0
    np.testing.assert_array_equal(decode(repeated, dtype, DType.F16), np.broadcast_to(expected[3], (5, 9 * values)))


@pytest.mark.parametrize("beside", [0, 8, 32])
@pytest.mark.parametrize("rows", [np.s_[::2], np.s_[-2::-2]], ids=["step", "reversed"])
def test_rows_apart_written_past_the_caches(isa, rows, beside):
    """Each second row of a wider matrix, over a MiB, the first at a line's start and, after 8, the others not."""
    blocks = random_blocks(DType.Q6_K, 80, 60)
    expected = rounded(by_gguf(blocks, DType.Q6_K), DType.BF16)
    out = cpu.aligned_empty((160, 60 * 256 + beside), np.dtype(np.uint16))
    out[:] = 7
    decode(blocks, DType.Q6_K, DType.BF16, out=out[rows, : 60 * 256])
    np.testing.assert_array_equal(out[rows, : 60 * 256], expected)
    assert (out[1::2] == 7).all() and (out[:, 60 * 256 :] == 7).all()


@pytest.fixture
def fenced():
    """A page that can be used, between two where each access is a fault."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 3 * page)
    array = np.frombuffer(memory, np.uint8)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    for fence in (0, 2):
        address = ctypes.c_void_p(array.ctypes.data + fence * page)
        assert protect(address, ctypes.c_size_t(page), ctypes.c_int(0)) == 0
    yield array[page : 2 * page]
    for fence in (0, 2):
        address = ctypes.c_void_p(array.ctypes.data + fence * page)
        protect(address, ctypes.c_size_t(page), ctypes.c_int(mmap.PROT_READ | mmap.PROT_WRITE))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fences memory as Linux does")
@pytest.mark.parametrize("dtype", OURS, ids=lambda dtype: dtype.value)
def test_nothing_is_read_beside_the_blocks(isa, dtype, fenced):
    blocks = random_blocks(dtype, 1, 3)
    expected = rounded(by_gguf(blocks, dtype), DType.BF16)
    for window in (fenced[: blocks.size], fenced[fenced.size - blocks.size :]):
        window[:] = blocks[0]
        np.testing.assert_array_equal(decode(window[None], dtype, DType.BF16), expected)


@pytest.mark.parametrize("to", TARGETS, ids=lambda to: to.value)
@pytest.mark.parametrize("dtype", TYPES, ids=lambda dtype: dtype.value)
def test_nothing_is_written_beside_the_result(isa, dtype, to):
    blocks = random_blocks(dtype, 3, 2, [*NOT_FINITE, *USUAL[::100]])
    raw = np.full(8192, 0xA5, np.uint8)
    size = 3 * 2 * block_of(dtype)[0] * to.itemsize
    start = -raw.ctypes.data % 64 + 64
    out = raw[start : start + size].view(f"u{to.itemsize}").reshape(3, -1)
    decode(blocks, dtype, to, out=out)
    raw[start : start + size] = 0xA5
    assert (raw == 0xA5).all()


def test_memory_stays_bounded_with_gguf():
    blocks = random_blocks(DType.IQ3_S, 16, 1024)  # 4 Mi values
    out = np.empty((16, 1024 * 256), np.uint16)
    decode(blocks[:1, :110], DType.IQ3_S, DType.BF16)  # what is made once
    tracemalloc.start()
    try:
        decode(blocks, DType.IQ3_S, DType.BF16, out=out)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 12 << 20


def test_empty():
    for dtype in (DType.Q4_K, DType.IQ1_S):
        assert decode(np.empty((0, 2 * block_of(dtype)[1]), np.uint8), dtype, DType.F32).shape == (0, 512)
        assert decode(np.empty((5, 0), np.uint8), dtype, DType.BF16).shape == (5, 0)


def test_what_cannot_be_decoded_is_named():
    blocks = random_blocks(DType.Q4_K, 2, 2)
    refused = [
        ({"type": DType.BF16}, "no decoder makes F32 of BF16"),
        ({"to": DType.Q4_K}, "no decoder makes Q4_K of Q4_K"),
        ({"to": DType.I32}, "no decoder makes I32 of Q4_K"),
        ({"blocks": blocks.view(np.int8)}, "matrix of bytes, not from int8"),
        ({"blocks": blocks[0]}, "matrix of bytes, not from uint8 .288."),
        ({"blocks": blocks[:, :-1]}, "rows of 287 bytes are no multiple of Q4_K's blocks of 144 bytes"),
        ({"blocks": blocks, "type": DType.Q8_0}, "rows of 288 bytes are no multiple of Q8_0's blocks of 34 bytes"),
        ({"blocks": blocks[:, ::2]}, "dense rows"),
        ({"out": np.empty((2, 511), np.uint32)}, "2 rows of 512 values of F32 do not fit into uint32 .2, 511."),
        ({"out": np.empty((2, 512), np.float32)}, "do not fit into float32"),
        ({"out": np.empty((2, 512), np.uint32), "to": DType.BF16}, "do not fit into uint32"),
        ({"out": np.broadcast_to(np.uint32(0), (2, 512))}, "do not fit"),  # read-only
        ({"out": np.empty((2, 1024), np.uint32)[:, ::2]}, "dense rows"),
        ({"threads": 0}, "0 threads"),
    ]
    for changed, message in refused:
        arguments = {"blocks": blocks, "type": DType.Q4_K, "to": DType.F32, **changed}
        with pytest.raises(MixtoolsError, match=message):
            decode(**arguments)
    memory = np.zeros(8192, np.uint8)
    with pytest.raises(MixtoolsError, match="overlaps"):
        decode(memory[:144][None], DType.Q4_K, DType.F32, out=memory[100:1124].view(np.uint32)[None])


def test_the_kernel_refuses_numbers_that_it_does_not_know():
    blocks, out = random_blocks(DType.Q4_K, 1, 1), np.zeros((1, 256), np.uint32)
    call = cpu.kernels().mixtools_decode
    for number, to, isa in ((16, 0, 0), (12, 2, 0), (12, 0, 9), (-1, 0, 0)):
        assert call(blocks.ctypes.data, 144, out.ctypes.data, 1024, 1, 1, number, to, 1, isa) == -2
    assert not out.any()


def test_our_decoders_need_neither_torch_nor_gguf():
    code = """
import sys
import numpy as np
from mixtools.ops.decode import decode
from mixtools.storage.dtypes import DType
decode(np.zeros((1, 144), np.uint8), DType.Q4_K, DType.BF16)
print({"torch", "gguf"} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
