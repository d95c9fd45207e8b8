"""The compiled kernels, by ctypes. Free of torch: numpy arrays and buffers in and out.

Each function gives the same bytes on every instruction set and with every number of threads. The instruction set is
the best that the machine has; the environment variable MIXTOOLS_ISA (plain, avx2, avx512 or avx512_bf16) asks for a
lesser one. The calls release Python's lock while they compute.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from ..errors import MixtoolsError, UsageError
from ..storage.dtypes import DType

if TYPE_CHECKING:
    from typing_extensions import Buffer

ABI_VERSION = 3  # of kernels/cpu.cpp; raised there and here with every change to a signature
LIBRARY = "_kernels.so"
ISA_VARIABLE = "MIXTOOLS_ISA"
_LINE = 64  # bytes; results that start at a line are written past the caches
_BUILD = "build it with `pip install .` (or `pip install -e .`) in mixtools' source tree; that needs a C++17 compiler"

_pointer, _int, _int64, _uint32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_uint32
_lines = [_pointer, _int64]  # and how far apart they lie
_SIGNATURES: dict[str, tuple[type[Any], list[type[Any]]]] = {
    "mixtools_abi_version": (_int, []),
    "mixtools_best_isa": (_int, []),
    "mixtools_transpose": (_int, [_pointer, _int64, _pointer, _int64, _int64, _int, _int64, _int]),
    "mixtools_first_nonfinite": (_int64, [_pointer, _int64, _int, _uint32, _int64, _int]),
    "mixtools_encode": (
        _int,
        [_pointer, _int64, _int, _int64, _int64, _pointer, _int, _pointer, _int64, _int],
    ),
    "mixtools_decode": (_int, [_pointer, _int64, _pointer, _int64, _int64, _int64, _int, _int, _int64, _int]),
    "mixtools_multiply": (_int, [_pointer, _int64, _int, _int64, _int]),
    "mixtools_round_block": (
        _int,
        [_int64, _int64, *_lines * 6, _pointer, *_lines, _pointer, _pointer, _int, _int, _int64, _int],
    ),
}
_EXPONENT = {DType.F16: 0x7C00, DType.BF16: 0x7F80, DType.F32: 0x7F800000}  # all set: NaN or infinity
NATIVE = frozenset({  # the block types of ggml that the kernels encode and decode
    DType.Q4_0, DType.Q4_1, DType.Q5_0, DType.Q5_1, DType.Q8_0, DType.Q2_K, DType.Q3_K, DType.Q4_K, DType.Q5_K,
    DType.Q6_K, DType.IQ4_NL, DType.IQ4_XS, DType.MXFP4,
})  # fmt: skip

Array = npt.NDArray[Any]


class Isa(IntEnum):
    """Instruction sets, each a superset of the one before it; the numbers are those of kernels/common.h."""

    PLAIN = 0
    AVX2 = 1
    AVX512 = 2
    AVX512_BF16 = 3


def best_instruction_set() -> Isa:
    """The best that both this machine and the kernels know."""
    return Isa(kernels().mixtools_best_isa())


def instruction_set() -> Isa:
    """The one in use: the best, or what MIXTOOLS_ISA asks for.

    Raises UsageError if MIXTOOLS_ISA names none, or one that this machine lacks.
    """
    asked = os.environ.get(ISA_VARIABLE)
    return _named(asked) if asked else best_instruction_set()


@functools.cache
def _named(asked: str) -> Isa:
    names = {isa.name.lower(): isa for isa in Isa if isa <= best_instruction_set()}
    if asked not in names:
        raise UsageError(f"{ISA_VARIABLE}={asked}: this machine runs {', '.join(names)}")
    return names[asked]


def transpose(array: Array, *, out: Array | None = None, threads: int = 1) -> Array:
    """`array` [rows, cols] -> its transpose [cols, rows], dense and row-major, bit for bit.

    Items of 1, 2, 4 or 8 bytes. Rows may lie anywhere (any stride, any alignment); the items of a row lie side by
    side. `out`, if given, is filled and returned: dense, of the right shape and dtype, apart from `array`.
    Raises MixtoolsError for an array that is not so.
    """
    if array.ndim != 2 or array.itemsize not in (1, 2, 4, 8) or array.dtype.hasobject:
        raise MixtoolsError(f"transpose takes a matrix of plain items of 1, 2, 4 or 8 bytes, not {describe(array)}")
    rows, cols = array.shape
    if out is None:
        out = aligned_empty((cols, rows), array.dtype)
    elif out.shape != (cols, rows) or out.dtype != array.dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise MixtoolsError(f"transpose of {describe(array)} does not fit into {describe(out)}")
    elif np.may_share_memory(array, out):
        raise MixtoolsError("transpose cannot work in place: the result overlaps the source")
    if array.size == 0:
        return out
    if cols > 1 and array.strides[1] != array.itemsize:
        raise MixtoolsError(f"transpose takes rows whose items lie side by side, not strides {array.strides}")
    source, target = array.ctypes.data, out.ctypes.data
    status = kernels().mixtools_transpose(
        source, array.strides[0], target, rows, cols, array.itemsize, positive(threads), instruction_set()
    )
    if status:
        raise MixtoolsError(f"the transpose kernel refused {describe(array)} (status {status})")
    return out


def first_nonfinite(buffer: Buffer | Array, dtype: DType, *, threads: int = 1) -> int | None:
    """Index of the first NaN or infinity among the values of `dtype` (F16, BF16 or F32) in `buffer`, or None.

    The buffer is contiguous and may start at any address. Raises MixtoolsError for one that is not contiguous, that
    ends inside a value, or for another dtype.
    """
    view = memoryview(cast("Buffer", buffer))  # numpy's stubs call arrays buffers from Python 3.12 on
    if dtype not in _EXPONENT:
        known = ", ".join(known.value for known in _EXPONENT)
        raise MixtoolsError(f"NaN and infinity are sought in {known}, not {dtype.value}")
    if not view.c_contiguous:
        raise MixtoolsError(f"NaN and infinity are sought in contiguous memory, not in strides {view.strides}")
    count, rest = divmod(view.nbytes, dtype.itemsize)
    if rest:
        raise MixtoolsError(f"{view.nbytes} bytes do not hold a whole number of {dtype.value} values")
    if count == 0:
        return None
    data = np.frombuffer(view, np.uint8)
    index: int = kernels().mixtools_first_nonfinite(
        data.ctypes.data, count, dtype.itemsize, _EXPONENT[dtype], positive(threads), instruction_set()
    )
    if index < -1:
        raise MixtoolsError(f"the kernel that seeks NaN and infinity refused {dtype.value} (status {index})")
    return None if index < 0 else index


def _folders() -> list[str]:
    """Of the package: where it is installed, and where its sources lie if that is elsewhere."""
    return [*sys.modules[__name__.partition(".")[0]].__path__]


@functools.cache
def kernels() -> ctypes.CDLL:
    path = next(filter(Path.is_file, (Path(folder) / LIBRARY for folder in _folders())), None)
    if path is None:
        raise MixtoolsError(f"the compiled kernels ({LIBRARY}) are missing: {_BUILD}")
    return _load(path)


def _load(path: Path) -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:  # not a library of this machine; or one of another version
        raise MixtoolsError(f"the compiled kernels do not load ({error}): {_BUILD}", file=path) from error
    if (found := library.mixtools_abi_version()) != ABI_VERSION:
        message = f"the compiled kernels are of another version; {_BUILD}"
        raise MixtoolsError(message, file=path, expected=f"ABI {ABI_VERSION}", found=f"ABI {found}")
    return library


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _LINE, np.uint8)
    start = -raw.ctypes.data % _LINE
    return raw[start : start + size].view(dtype).reshape(shape)


def positive(threads: int) -> int:
    if threads < 1:
        raise MixtoolsError(f"{threads} threads cannot do anything; at least one can")
    return threads


def describe(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)} with strides {list(array.strides)}"
