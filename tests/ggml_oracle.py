"""ggml's encoders and decoders: libggml-python brings its compiled library, libgguf is another program."""

from __future__ import annotations

import ctypes
from pathlib import Path

import gguf
import libggml
import libgguf
import numpy as np

from mixtools.storage.dtypes import DType


class Traits(ctypes.Structure):
    """ggml_type_traits of ggml.h."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("values", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("size", ctypes.c_size_t),
        ("quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
        ("from_float_ref", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def _library() -> ctypes.CDLL:
    folder = Path(libggml.__file__).parent / "lib64"
    library = ctypes.CDLL(str(folder / "libggml-base.so"))
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, int64, int64, int64, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    return library


LIBRARY = _library()


def number(type: DType) -> int:
    """Of a type, in ggml's enumeration."""
    return int(gguf.GGMLQuantizationType[type.value])


def traits_of(type: DType) -> Traits:
    """How ggml itself decodes and encodes rows of the type."""
    traits: Traits = LIBRARY.ggml_get_type_traits(number(type)).contents
    assert (traits.name.decode().upper(), traits.values) == (type.value, type.block)
    return traits


def by_ggml(rows: np.ndarray, type: DType, importance: np.ndarray | None = None) -> np.ndarray:
    """`rows` [rows, columns] float32 -> [rows, bytes] by ggml_quantize_chunk."""
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((rows.shape[0], type.row_bytes(rows.shape[1])), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    at = None if weights is None else weights.ctypes.data
    size = LIBRARY.ggml_quantize_chunk(number(type), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, at)
    assert size == out.nbytes
    return out


def by_libgguf(rows: np.ndarray, type: DType, importance: np.ndarray | None = None) -> np.ndarray:
    """The same by libgguf."""
    out = libgguf.quantize_rows(np.ascontiguousarray(rows, np.float32), number(type), importance)
    return np.asarray(out).view(np.uint8).reshape(rows.shape[0], -1)
