"""The encoders for a GPU, in Triton's interpreter, against the CPU's, whose bytes are ggml's.

The interpreter takes 0.2 ms for each operation on however many numbers: all kinds of rows are encoded at once.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from ops.test_encode import COLS, rows_of_all_kinds
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops import encode as cpu
from mixtools.ops.gpu import encode_affine, encode_parts, encode_small, encoding
from mixtools.storage.dtypes import DType

KINDS, ROWS = rows_of_all_kinds()
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    *((type, weighted, dtype) for type in (DType.Q8_0,) for weighted in (False, True) for dtype in (BF16, FP16, FP32)),
    (DType.Q4_0, False, BF16), (DType.Q4_0, False, FP16), (DType.Q4_0, False, FP32), (DType.Q4_0, True, BF16),
    (DType.Q4_K, False, BF16), (DType.Q4_K, False, FP16), (DType.Q4_K, True, BF16),
    (DType.Q5_K, False, BF16), (DType.Q5_K, True, FP32),
    (DType.Q6_K, False, BF16), (DType.Q6_K, False, FP32), (DType.Q6_K, True, FP16),
    (DType.Q2_K, False, FP32), (DType.Q2_K, True, BF16),
    (DType.Q3_K, False, BF16), (DType.Q3_K, False, FP32), (DType.Q3_K, True, FP32),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet():
    """In the interpreter numpy computes, and says where a lane divides by zero whose result no one takes."""
    with np.errstate(all="ignore"):
        yield


@functools.cache
def rows_of(dtype: torch.dtype) -> Tensor:
    """All kinds of finite rows [rows, COLS]."""
    rows = torch.from_numpy(ROWS)
    if dtype == BF16:
        return (rows.view(torch.int32) >> 16).to(torch.int16).view(BF16)  # not rounded, which might overflow
    if dtype == FP32:
        return rows
    bits = torch.from_numpy(np.random.default_rng(2).integers(-(1 << 15), 1 << 15, (8, COLS), dtype=np.int16))
    halves = torch.cat((rows.clamp(-65504, 65504).half(), bits.view(FP16)))
    return torch.where(halves.isfinite(), halves, 0)


def importance(columns: int = COLS) -> Tensor:
    """As different as it gets: plain, with zeros, of all sizes, next to nothing; and none over a sub-block."""
    random = np.random.default_rng(3)
    made = random.random(columns, np.float32)
    made[random.random(columns) < 0.2] = 0
    third = columns // 3
    made[third : 2 * third] = np.exp(random.uniform(-20, 20, third))
    made[32:64] = 0
    made[columns - columns // 6 :] *= np.float32(1e-25)
    return torch.from_numpy(made)


def by_cpu(rows: Tensor, type: DType, weights: Tensor | None = None) -> Tensor:
    dtype = DType.of(rows.dtype)
    bits = rows.view(torch.uint16) if dtype is DType.BF16 else rows
    return torch.from_numpy(cpu.encode(bits.numpy(), dtype, type, None if weights is None else weights.numpy()))


def check(rows: Tensor, type: DType, weights: Tensor | None = None) -> None:
    got, wanted = encoding.encode(rows, type, weights), by_cpu(rows.contiguous(), type, weights)
    assert got.dtype == torch.uint8 and got.shape == wanted.shape
    differ = (got != wanted).any(1)
    assert not differ.any(), sorted({(*KINDS, *["more"] * 8)[row] for row in differ.nonzero().flatten().tolist()})


@pytest.mark.parametrize(
    ("type", "weighted", "dtype"), CASES, ids=lambda value: getattr(value, "value", str(value)).removeprefix("torch.")
)
def test_bytes_are_the_cpus(type, weighted, dtype):
    check(rows_of(dtype), type, importance() if weighted else None)


def test_a_block_that_no_column_of_matters():
    """And one whose importance overflows."""
    check(rows_of(FP32)[:, :512], DType.Q4_K, torch.cat((torch.zeros(256), torch.full((256,), 1e37))))


@pytest.mark.parametrize(
    ("type", "blocks", "weighted"),
    [
        (DType.Q8_0, 33, False),
        (DType.Q4_0, 33, True),
        (DType.Q6_K, 3, False),
        (DType.Q3_K, 3, False),
        (DType.Q4_K, 5, False),
    ],
    ids=str,
)
def test_programs_as_a_gpu_has_them(type, blocks, weighted):
    """The last of some is not full, and nothing around the result is touched."""
    rows = torch.from_numpy(ROWS.reshape(-1, 256)[:: len(ROWS) // 7][: -(-blocks * type.block // 256)].copy())
    rows = rows.reshape(-1, type.block)[:blocks].contiguous()
    weights = importance(768)[: type.block].contiguous() if weighted else None
    size = type.row_bytes(type.block)
    poisoned = torch.full((blocks + 16, size), 0xA5, dtype=torch.uint8)
    started = encoding.launches(rows, type, weights, poisoned[8:-8], lanes=32)
    assert max(one.grid[0] for one in started) == 2
    for one in started:
        one.run()
    assert torch.equal(poisoned[8:-8], by_cpu(rows, type, weights))
    assert (poisoned[:8] == 0xA5).all() and (poisoned[-8:] == 0xA5).all()


@pytest.mark.parametrize(("type", "weighted"), [(DType.Q8_0, False), (DType.Q4_0, True), (DType.Q6_K, True)], ids=str)
def test_runs_of_rows_make_the_same_bytes(type, weighted, monkeypatch):
    monkeypatch.setattr(encoding, "_RUN", 200 * COLS + 1)
    check(rows_of(BF16), type, importance() if weighted else None)


def test_rows_lie_anywhere():
    rows = rows_of(BF16)
    check(rows.T.contiguous().T, DType.Q8_0)
    check(rows[:, 32:288], DType.Q4_0)
    odd = torch.cat((rows.flatten()[:1], rows.flatten()))[1:].view(rows.shape)
    assert odd.data_ptr() % 16
    check(odd, DType.Q6_K)
    check(rows[::3], DType.Q8_0, torch.stack((importance(), importance()), 1)[:, 0])


def test_no_rows_have_no_blocks():
    for type in encoding.ENCODED:
        assert encoding.encode(torch.empty(0, 512), type).shape == (0, type.row_bytes(512))
        assert encoding.encode(torch.empty(3, 0), type, torch.empty(0)).shape == (3, 0)


def test_encoding_is_a_well_formed_operation():
    rows = rows_of(BF16)[:4, :64]
    for weights in (None, importance(64)):
        opcheck(encoding.gpu_encode_blocks, (rows, "Q8_0", weights))


def test_what_is_not_encoded_is_refused(monkeypatch):
    rows = rows_of(BF16)
    with pytest.raises(MixtoolsError, match="no kernel encodes Q5_1 on a GPU; those of Q8_0, Q4_0, Q4_K"):
        encoding.encode(rows, DType.Q5_1)
    with pytest.raises(MixtoolsError, match="not torch.float64 \\[4, 256\\]"):
        encoding.encode(torch.zeros(4, 256, dtype=torch.float64), DType.Q4_K)
    with pytest.raises(MixtoolsError, match="not torch.float32 \\[256\\]"):
        encoding.encode(torch.zeros(256), DType.Q4_K)
    with pytest.raises(MixtoolsError, match="1073741825"):
        encoding.encode(torch.zeros(1, dtype=BF16).expand(1, (1 << 30) + 1), DType.Q4_K)
    with pytest.raises(MixtoolsError, match="rows of 255 values are no multiple of Q6_K's blocks of 256"):
        encoding.encode(rows[:, :255], DType.Q6_K)
    for wrong in (importance()[:-1], importance().double(), importance()[None]):
        with pytest.raises(MixtoolsError, match="the importance of 768 columns is as many fp32 on cpu"):
            encoding.encode(rows, DType.Q8_0, wrong)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(MixtoolsError, match="TRITON_INTERPRET=1"):
        encoding.encode(rows, DType.Q8_0)


# --- where a GPU's NaNs and integers are not the CPU's ---------------------------------------------------------------


@triton.jit
def _odd(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i).to(tl.float32, bitcast=True)
    none = tl.zeros_like(v)
    levels, _, _, _ = encode_affine._find_levels((v, v), (none, none), none, none + 1.0, 2, 15)
    tl.store(out + i, encode_parts.nearest(v))
    tl.store(out + N + i, encode_parts.nearest_level(v, -4, 3).to(tl.int32))
    tl.store(out + 2 * N + i, levels[0].to(tl.int32))
    tl.store(out + 3 * N + i, encode_parts.half_bits(v))
    tl.store(out + 4 * N + i, encode_parts.truncated(v))
    tl.store(out + 5 * N + i, encode_small._round_away(v))


def test_nans_of_every_maker():
    """NVIDIA's has all bits but the sign, AMD's and x86's the first digit alone, x86's the sign as well."""
    found = torch.tensor([0x7FFFFFFF, 0x7FC00000, -0x400000, -1], dtype=torch.int64).to(torch.int32)
    out = torch.zeros(6, 4, dtype=torch.int32)
    _odd[(1,)](found, out, 4)
    least = -(1 << 31)
    assert out[:, 0].tolist() == [0, 0, 0, 0xFE00, least, least]
    assert (out == out[:, :1]).all()


def test_numbers_that_do_not_fit():
    numbers = torch.tensor([torch.inf, -torch.inf, 3e9, -3e9, 2.5, 3.5, -2.5, 65519.99, 65520, 2**-25, 3 * 2**-25, 6e-8,
                            0.49999997, -0.0, 4194303, 1e-45])  # fmt: skip
    out = torch.zeros(6, 16, dtype=torch.int32)
    _odd[(1,)](numbers.view(torch.int32), out, 16)
    halves = torch.from_numpy(numbers.numpy().astype(np.float16).view(np.uint16).astype(np.int32))
    assert torch.equal(out[3], halves)
    assert out[0, 4:].tolist() == [2, 4, -2, 65520, 65520, 0, 0, 0, 0, 0, 4194303, 0]
    assert out[1, 4:8].tolist() == [2, 3, -2, 3] and out[2, 4:8].tolist() == [2, 4, 0, 15]
    assert out[4, :8].tolist() == [-(1 << 31)] * 4 + [2, 3, -2, 65519]
    assert out[5, 4:7].tolist() == [3, 4, -3] and out[5, 12:].tolist() == [0, 0, 4194303, 0]


@triton.jit
def _missed(x, out, N: tl.constexpr):
    pair = (tl.load(x + tl.arange(0, N)), tl.load(x + N + tl.arange(0, N)))
    one = tl.full((N,), 1.0, tl.float32)
    tl.store(out + tl.arange(0, N), encode_affine._try_levels(pair, (one, one), one, True, 2, 63))
    tl.store(out + N + tl.arange(0, N), encode_affine._try_levels(pair, (one, one), one, False, 2, 63))


def test_scales_below_zero_wrap_as_bytes():
    """A fit hardly ever makes one. ggml's bytes of it are large numbers, and it clips them for some types."""
    for clipped, wanted in ((False, [63, 255, 254, 0, 1, 2, 3, 4]), (True, [63, 63, 63, 0, 1, 2, 3, 4])):
        parts = torch.zeros(5, 8)
        parts[0] = torch.tensor([63.0, -1, -2, 0, 1, 2, 3, 4])
        units = torch.zeros(2, 1)
        constants = {"SUBS": 8, "TOP": 63, "WEIGHTED": False, "CLIPPED": clipped, "LANES": 4}
        encode_affine.round_scales[(1,)](parts, units, 8, 1, **constants)
        assert parts[0].tolist() == wanted and units.tolist() == [[1], [0]] and not parts[1:].any()
    out = torch.zeros(2, 2)
    _missed[(1,)](torch.tensor([[-1.0, 300], [2, 64]]), out, 2)
    assert out.tolist() == [[256.0**2, 256.0**2], [0, 237.0**2 + 1]]
