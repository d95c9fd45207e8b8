"""What lies in a mapped file may end where the file does: behind it there is no memory to read."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest

from mixtools.ops.cpu import NATIVE
from mixtools.ops.decode import decode
from mixtools.ops.multiply import Product, multiply_all
from mixtools.ops.repack import INT8_ROW, NF4, Type, grouped
from mixtools.storage.dtypes import DType

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # random bytes are any numbers
]
KINDS = [*sorted(NATIVE, key=str), NF4, INT8_ROW, *(grouped(256, bits, 64) for bits in (3, 4, 8))]


def at_the_end(blocks: np.ndarray) -> np.ndarray:
    """A copy whose first and last bytes have memory before and behind them that nobody may look at."""
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    system.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = mmap.PAGESIZE
    whole = -(-blocks.nbytes // page) * page
    first = system.mmap(None, whole + 2 * page, 3, 0x22, -1, 0)  # to read and write, of no file
    assert system.mprotect(first + page + whole, page, 0) == 0
    place = (ctypes.c_uint8 * blocks.nbytes).from_address(first + page + whole - blocks.nbytes)
    made = np.frombuffer(place, np.uint8).reshape(blocks.shape)
    made[:] = blocks
    return made


@pytest.mark.parametrize("type", KINDS, ids=str)
def test_nothing_behind_a_matrix_is_read(isa, type: Type) -> None:
    random = np.random.default_rng(0)
    for columns in (type.block, 2 * type.block, 5 * type.block):
        if columns % type.block or (columns > type.block and type in [*KINDS[-3:], INT8_ROW]):
            continue
        for rows in (1, 2, 3, 5, 8, 17):
            blocks = random.integers(0, 256, (rows, type.row_bytes(columns)), np.uint8)
            last = at_the_end(blocks)
            for count in (1, 2, 3, 4, 5, 16):
                x = random.standard_normal((count, columns)).astype(np.float32)
                for narrow in (False, True):
                    found, expected = (
                        multiply_all([Product(x, where, type)], narrow=narrow, threads=1)[0] for where in (last, blocks)
                    )
                    assert found.tobytes() == expected.tobytes()
            for to in (DType.F32, DType.BF16, DType.F16):
                assert decode(last, type, to, threads=1).tobytes() == decode(blocks, type, to, threads=1).tobytes()
