"""The compiled kernels against numpy and torch, on each instruction set, wherever the bytes lie."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import mixtools
from mixtools.errors import MixtoolsError, UsageError
from mixtools.ops import cpu
from mixtools.storage.dtypes import DType

TYPES = [np.uint8, np.uint16, np.uint32, np.uint64]
# around a tile (64 bytes a side), around a block (24 tiles down, 64 across), thin, single, and empty
SHAPES = [
    (0, 0), (0, 5), (5, 0), (1, 1), (1, 300), (300, 1), (3, 5), (8, 8), (16, 16), (31, 33), (32, 32), (33, 31),
    (64, 64), (65, 127), (200, 136), (770, 40), (40, 2100), (776, 2056),
]  # fmt: skip


def random_items(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape).copy()


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """The same array, dense, `offset` bytes after the start of a cache line."""
    raw = np.empty(array.nbytes + 128, np.uint8)
    start = -raw.ctypes.data % 64 + offset
    moved = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    moved[...] = array
    return moved


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transpose_equals_numpy(isa, dtype, shape):
    array = random_items(shape, dtype)
    result = cpu.transpose(array)
    assert result.flags.c_contiguous
    assert result.dtype == array.dtype
    np.testing.assert_array_equal(result, array.T)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
@pytest.mark.parametrize("offset", [0, 1, 2, 8, 16, 36, 63])
def test_transpose_at_any_address(isa, dtype, offset):
    array = random_items((160, 192), dtype)  # rows of the source and of the result are whole lines
    source = at_offset(array, offset)
    for out_offset in (0, 1, 4, 16, 62):
        out = at_offset(np.zeros((192, 160), dtype), out_offset)
        assert cpu.transpose(source, out=out) is out
        np.testing.assert_array_equal(out, array.T)


@pytest.mark.parametrize("shape", [(1024, 5000), (1000, 5003), (4100, 1024)])
@pytest.mark.parametrize("out_offset", [0, 16, 2])
def test_transpose_past_the_caches(isa, shape, out_offset):
    array = random_items(shape, np.uint16)  # over 8 MiB: written with stores that bypass the caches
    out = at_offset(np.zeros(shape[::-1], np.uint16), out_offset)
    cpu.transpose(array, out=out)
    np.testing.assert_array_equal(out, array.T)


def test_transpose_writes_nothing_beside_its_result(isa):
    raw = np.full((100, 100), 7, np.uint16)
    out = raw[20:80].reshape(-1)[10 : 10 + 70 * 80].reshape(70, 80)
    cpu.transpose(random_items((80, 70), np.uint16), out=out)
    raw[20:80].reshape(-1)[10 : 10 + 70 * 80] = 7
    assert (raw == 7).all()


@pytest.mark.parametrize(
    "rows",
    [np.s_[::2], np.s_[::-1], np.s_[3:100:7], np.s_[:, 5:101], np.s_[::-3, 1:]],
    ids=["step", "reversed", "seventh", "band", "both"],
)
def test_transpose_takes_any_row_stride(isa, rows):
    view = random_items((120, 150), np.uint16)[rows]
    np.testing.assert_array_equal(cpu.transpose(view), view.T)


def test_transpose_of_a_repeated_row(isa):
    view = np.broadcast_to(random_items((90,), np.uint32), (70, 90))  # row stride 0
    np.testing.assert_array_equal(cpu.transpose(view), view.T)


def test_transpose_of_rows_far_apart(isa):
    # rows 8 MiB apart, as a column band of a huge matrix has them; untouched pages cost nothing
    base = np.zeros((70, 4 << 20), np.uint16)
    base[:, -90:] = random_items((70, 90), np.uint16)
    view = base[:, -90:]
    np.testing.assert_array_equal(cpu.transpose(view), view.T)


def test_transpose_keeps_every_bit(isa):
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)  # each f16: NaN payloads, -0, denormals
    result = cpu.transpose(bits.view(np.float16))
    assert result.dtype == np.float16
    np.testing.assert_array_equal(result.view(np.uint16), bits.T)


@pytest.mark.parametrize("threads", [1, 2, 3, 7, 64])
def test_transpose_is_the_same_on_any_number_of_threads(isa, threads):
    array = random_items((3000, 2100), np.uint16)
    np.testing.assert_array_equal(cpu.transpose(array, threads=threads), array.T)


def test_transpose_names_what_it_cannot_take():
    matrix = random_items((4, 6), np.uint16)
    for wrong in (matrix[0], matrix[None], matrix.astype(np.complex128), matrix.astype(object)):
        with pytest.raises(MixtoolsError, match="takes a matrix of plain items"):
            cpu.transpose(wrong)
    for wrong in (matrix.T, matrix[:, ::2]):
        with pytest.raises(MixtoolsError, match="side by side, not strides"):
            cpu.transpose(wrong)
    read_only = np.zeros((6, 4), np.uint16)
    read_only.flags.writeable = False
    for out in (np.zeros((4, 6), np.uint16), np.zeros((6, 4), np.int16), np.zeros((4, 6), np.uint16).T, read_only):
        with pytest.raises(MixtoolsError, match="does not fit into"):
            cpu.transpose(matrix, out=out)
    square = random_items((4, 4), np.uint16)
    with pytest.raises(MixtoolsError, match="overlaps"):
        cpu.transpose(square, out=square)
    with pytest.raises(MixtoolsError, match="0 threads"):
        cpu.transpose(square, threads=0)


FLOATS = [DType.F16, DType.BF16, DType.F32]
BITS = {DType.F16: np.uint16, DType.BF16: np.uint16, DType.F32: np.uint32}
EXPONENT = {DType.F16: 0x7C00, DType.BF16: 0x7F80, DType.F32: 0x7F800000}
SIGN = {DType.F16: 0x8000, DType.BF16: 0x8000, DType.F32: 0x80000000}


def finite_bits(dtype: DType, count: int) -> np.ndarray:
    """Random finite values, and every kind of finite one at the ends of the exponent range."""
    bits = random_items((count,), BITS[dtype])
    lowest = EXPONENT[dtype] & -EXPONENT[dtype]
    bits[(bits & EXPONENT[dtype]) == EXPONENT[dtype]] ^= BITS[dtype](lowest)
    special = [0, SIGN[dtype], 1, SIGN[dtype] | 1, lowest - 1, EXPONENT[dtype] - 1, SIGN[dtype] | (EXPONENT[dtype] - 1)]
    bits[: min(count, 7)] = special[:count]
    return bits


@pytest.mark.parametrize("dtype", [DType.F16, DType.BF16])
def test_nonfinite_equals_torch_on_every_16_bit_value(isa, dtype):
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = torch.from_numpy(bits.view(np.int16)).view(dtype.torch()).isfinite().numpy()
    found = [cpu.first_nonfinite(bits[i : i + 1], dtype) is None for i in range(1 << 16)]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("count", [0, 1, 7, 31, 1000, 1024, 1025, 5000])
def test_nonfinite_finds_the_first_of_several(isa, dtype, count):
    bits = finite_bits(dtype, count)
    assert cpu.first_nonfinite(bits, dtype) is None
    quiet, loud, infinity = (
        EXPONENT[dtype] | (EXPONENT[dtype] & -EXPONENT[dtype]) >> 1,
        EXPONENT[dtype] | 1,
        EXPONENT[dtype],
    )
    for where in sorted({0, 1, 30, 31, 32, count // 2, 1023, 1024, count - 1} & set(range(count))):
        for value in (quiet, loud, infinity, infinity | SIGN[dtype], quiet | SIGN[dtype]):
            spoilt = bits.copy()
            spoilt[[where, count - 1]] = value
            assert cpu.first_nonfinite(spoilt, dtype) == where
            as_torch = torch.from_numpy(spoilt.view(f"i{dtype.itemsize}")).view(dtype.torch())
            assert int((~as_torch.isfinite()).nonzero()[0]) == where


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("offset", [1, 2, 3, 4, 31, 63])
def test_nonfinite_at_any_address(isa, dtype, offset):
    bits = finite_bits(dtype, 3000)
    # a value that is not finite stands right before and right behind: neither is ours
    raw = np.full(bits.nbytes + 192, 0xFF, np.uint8)
    start = -raw.ctypes.data % 64 + 64 + offset
    raw[start : start + bits.nbytes] = bits.view(np.uint8)
    window = memoryview(raw)[start : start + bits.nbytes]
    assert cpu.first_nonfinite(window, dtype) is None
    assert cpu.first_nonfinite(memoryview(raw)[start:][: bits.nbytes + dtype.itemsize], dtype) == 3000


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("dtype", [DType.BF16, DType.F32])
def test_nonfinite_is_the_same_on_any_number_of_threads(isa, dtype, threads):
    bits = finite_bits(dtype, 2_000_001)  # several chunks
    assert cpu.first_nonfinite(bits, dtype, threads=threads) is None
    for where in (2_000_000, 1_900_000, 262_144, 262_143, 5):
        bits[where] = EXPONENT[dtype]
        for _ in range(5):
            assert cpu.first_nonfinite(bits, dtype, threads=threads) == where


def test_nonfinite_takes_buffers_and_names_what_it_cannot_take():
    one, nan = np.float32(1).tobytes(), np.float32("nan").tobytes()
    assert cpu.first_nonfinite(one + one + nan, DType.F32) == 2
    assert cpu.first_nonfinite(bytearray(one), DType.F32) is None
    assert cpu.first_nonfinite(np.array([[1, 2], [np.inf, 3]], np.float16), DType.F16) == 2
    with pytest.raises(MixtoolsError, match="5 bytes do not hold a whole number of F32"):
        cpu.first_nonfinite(one + b"x", DType.F32)
    with pytest.raises(MixtoolsError, match="not I32"):
        cpu.first_nonfinite(one, DType.I32)
    with pytest.raises(MixtoolsError, match="contiguous memory"):
        cpu.first_nonfinite(np.zeros((4, 4), np.float32)[:, 1:], DType.F32)
    with pytest.raises(MixtoolsError, match="-1 threads"):
        cpu.first_nonfinite(one, DType.F32, threads=-1)


def test_instruction_set_is_the_best_unless_asked(monkeypatch):
    best = cpu.best_instruction_set()
    monkeypatch.delenv(cpu.ISA_VARIABLE, raising=False)
    assert cpu.instruction_set() is best
    monkeypatch.setenv(cpu.ISA_VARIABLE, "plain")
    assert cpu.instruction_set() is cpu.Isa.PLAIN
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(UsageError, match=r"MIXTOOLS_ISA=sse9: this machine runs plain"):
        cpu.transpose(np.zeros((2, 2), np.uint16))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="needs the system's own list of features")
def test_best_instruction_set_agrees_with_the_system():
    flags = Path("/proc/cpuinfo").read_text().split()
    assert (cpu.best_instruction_set() >= cpu.Isa.AVX2) == ("avx2" in flags)
    assert (cpu.best_instruction_set() >= cpu.Isa.AVX512) == ({"avx512f", "avx512bw"} <= set(flags))
    assert (cpu.best_instruction_set() >= cpu.Isa.AVX512_BF16) == ({"avx512f", "avx512bw", "avx512_bf16"} <= set(flags))


def test_a_missing_library_says_how_to_build_it(monkeypatch, tmp_path):
    monkeypatch.setattr("mixtools.__path__", [str(tmp_path)])
    with pytest.raises(MixtoolsError, match=r"_kernels.so\) are missing: build it with `pip install"):
        cpu.kernels.__wrapped__()


def test_a_library_that_does_not_load_is_named(tmp_path):
    damaged = tmp_path / "_kernels.so"
    damaged.write_bytes(b"not a library")
    with pytest.raises(MixtoolsError, match=r"_kernels.so: the compiled kernels do not load"):
        cpu._load(damaged)
    other = Path(sys.modules["_ctypes"].__file__)
    with pytest.raises(MixtoolsError, match="do not load"):  # a library, but not ours
        cpu._load(other)


def test_a_library_of_another_version_is_refused(monkeypatch):
    path = next(Path(folder) / cpu.LIBRARY for folder in mixtools.__path__ if (Path(folder) / cpu.LIBRARY).exists())
    monkeypatch.setattr(cpu, "ABI_VERSION", cpu.ABI_VERSION + 1)
    with pytest.raises(MixtoolsError, match="another version") as caught:
        cpu._load(path)
    assert (caught.value.expected, caught.value.found) == (f"ABI {cpu.ABI_VERSION}", f"ABI {cpu.ABI_VERSION - 1}")


def test_calls_from_many_python_threads_do_not_mix():
    arrays = [random_items((1500, 1100 + i), np.uint16, seed=i) for i in range(12)]
    with ThreadPoolExecutor(6) as executor:
        results = executor.map(lambda array: cpu.transpose(array, threads=3), arrays)
        for array, result in zip(arrays, results, strict=True):
            np.testing.assert_array_equal(result, array.T)


FORK = """
import os
import numpy as np
import mixtools
from mixtools.ops import cpu
array = np.arange(3_000_000, dtype=np.uint32).reshape(1500, 2000)
cpu.transpose(array, threads=3)  # the pool has helpers now
child = os.fork()
if child == 0:
    os._exit(0 if (cpu.transpose(array, threads=3) == array.T).all() else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
assert (cpu.transpose(array, threads=3) == array.T).all()
"""


@pytest.mark.skipif(not hasattr(ctypes.pythonapi, "PyOS_AfterFork_Child"), reason="no fork on this system")
def test_a_forked_child_has_threads_of_its_own():
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "0\n"


def test_native_needs_no_torch():
    code = "import sys; from mixtools.ops import cpu; cpu.instruction_set(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
