"""Rows as a GGUF stores them: copied, cast, or encoded to blocks; ggml's own bytes in each case."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from ...errors import TensorError, UsageError
from ...names import Slot
from ...ops import cpu
from ...ops.cpu import NATIVE
from ...ops.encode import encode
from ...storage.casting import cast, widen
from ...storage.dtypes import GGML, DType
from ...storage.store import Bits, Entry, to_tensor
from .mixtures import DENSE

Weights = npt.NDArray[np.float32]
EXTRA = "libgguf"  # what makes the types that no kernel here does
_ONE_AT_A_TIME = threading.Lock()  # the package makes its tables in a call, and keeps Python's lock meanwhile anyway


Encode = Callable[[Bits, DType, DType, Weights | None], Bits]  # rows, of which dtype, to which, importance


def encoder_on(device: str) -> Encode:
    """The kernels of a GPU, where a --device value names one that has them, else the CPU's: the bytes are the same.

    Raises UsageError for a device that is not there.
    """
    if device == "cpu" or (device == "auto" and importlib.util.find_spec("triton") is None):
        return encode  # without torch, which takes a second to import
    from ...machine import find_device
    from ...ops.gpu import able

    where = find_device(device)
    if able.problem(where) is not None:
        return encode
    import torch

    from ...ops.gpu import encoding

    def there(bits: Bits, dtype: DType, target: DType, weights: Weights | None) -> Bits:
        if target not in encoding.ENCODED:
            return encode(bits, dtype, target, weights)
        found = None if weights is None else torch.from_numpy(weights).to(where)
        made: Bits = encoding.encode(to_tensor(bits, dtype).to(where), target, found).cpu().numpy()
        return made

    return there


def expect_encoder(types: set[DType]) -> None:
    """Raises UsageError for a type that needs a package which is not there."""
    left = sorted(dtype.value for dtype in types if dtype not in (*DENSE, *NATIVE))
    if left and importlib.util.find_spec(EXTRA) is None:
        raise UsageError(f"{', '.join(left)} is encoded by the package {EXTRA}: pip install '{EXTRA}', or mixtools[iq]")


def store(  # noqa: PLR0917 (a line of work, in its order)
    bits: Bits, dtype: DType, target: DType, weights: Weights | None, slot: Slot, encoded: Encode = encode
) -> Bits:
    """Finite rows [rows, columns] of `dtype` as those of `target`: bit patterns, or bytes of blocks [rows, bytes].

    `weights` [columns]: the importance of each column. Raises TensorError for a value that becomes infinite in a cast.
    """
    if target in DENSE:
        return cast(bits, dtype, target, slot)
    if target in NATIVE:
        return encoded(bits, dtype, target, weights)
    return _foreign(widen(bits, dtype), target, weights)


def checked(blocks: Iterable[Bits], dtype: DType, entry: Entry) -> Iterator[Bits]:
    """The same rows, stored in `entry`. Raises TensorError at the first NaN or infinity: no block holds one."""
    first = 0
    for block in blocks:
        bad = cpu.first_nonfinite(np.ascontiguousarray(block), dtype)
        if bad is not None:
            row, column = divmod(bad, block.shape[1])
            value = widen(block[row : row + 1], dtype)[0, column]
            why = f"holds {value} at [{first + row}, {column}]; it cannot be quantized"
            raise TensorError(why, file=entry.source.label, tensor=entry.name)
        first += len(block)
        yield block


def _foreign(values: npt.NDArray[np.float32], target: DType, weights: Weights | None) -> Bits:
    """By the package, whose results are ggml's byte for byte."""
    package: Any = importlib.import_module(EXTRA)
    rows, columns = values.shape
    with _ONE_AT_A_TIME:
        data = package.quantize_rows_raw(GGML[target], np.ascontiguousarray(values), rows, columns, weights)
    return np.frombuffer(data, np.uint8).reshape(rows, target.row_bytes(columns))
