"""Element types on disk, free of torch: copying a checkpoint needs only their names and sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class DType(Enum):
    """The value is the spelling of safetensors; of a block type, that of ggml.

    A block type packs so many values of one row into so many bytes: its rows have a length in bytes, its elements not.
    """

    F64 = "F64"
    F32 = "F32"
    F16 = "F16"
    BF16 = "BF16"
    I64 = "I64"
    I32 = "I32"
    I16 = "I16"
    I8 = "I8"
    U8 = "U8"
    BOOL = "BOOL"
    Q4_0 = "Q4_0"
    Q4_1 = "Q4_1"
    Q5_0 = "Q5_0"
    Q5_1 = "Q5_1"
    Q8_0 = "Q8_0"
    Q2_K = "Q2_K"
    Q3_K = "Q3_K"
    Q4_K = "Q4_K"
    Q5_K = "Q5_K"
    Q6_K = "Q6_K"
    IQ1_S = "IQ1_S"
    IQ1_M = "IQ1_M"
    IQ2_XXS = "IQ2_XXS"
    IQ2_XS = "IQ2_XS"
    IQ2_S = "IQ2_S"
    IQ3_XXS = "IQ3_XXS"
    IQ3_S = "IQ3_S"
    IQ4_NL = "IQ4_NL"
    IQ4_XS = "IQ4_XS"
    MXFP4 = "MXFP4"

    @property
    def itemsize(self) -> int:
        """Bytes of one element. Raises ValueError for a block type, which has none: see nbytes."""
        if self in _BLOCKS:
            raise ValueError(f"{self.value} packs {_BLOCKS[self][0]} values into {_BLOCKS[self][1]} bytes")
        return _SIZE[self]

    @property
    def block(self) -> int:
        """Values that are stored together: 1, or those of a block."""
        return _BLOCKS.get(self, (1, 0))[0]

    @property
    def word(self) -> int:
        """Bytes of the words that its bit patterns are seen in: elements, or single bytes of blocks."""
        return 1 if self in _BLOCKS else _SIZE[self]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of so many values. Raises ValueError where a block would be cut."""
        values, size = _BLOCKS.get(self) or (1, _SIZE[self])
        blocks, rest = divmod(columns, values)
        if rest:
            raise ValueError(f"rows of {columns} values are no multiple of {self.value}'s blocks of {values}")
        return blocks * size

    def nbytes(self, shape: Sequence[int]) -> int:
        """Bytes of a tensor of this shape, its last dimension the row. Raises ValueError as row_bytes."""
        return math.prod(shape[:-1]) * self.row_bytes(shape[-1] if shape else 1)

    @classmethod
    def of(cls, dtype: torch.dtype) -> DType:
        """Of a torch dtype. Raises KeyError for one that no checkpoint stores."""
        return _OF_TORCH[str(dtype).removeprefix("torch.")]

    @property
    def torch_name(self) -> str:
        return _TORCH[self]

    def torch(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.torch_name)
        return dtype


_SIZE = {
    DType.F64: 8, DType.F32: 4, DType.F16: 2, DType.BF16: 2, DType.I64: 8,
    DType.I32: 4, DType.I16: 2, DType.I8: 1, DType.U8: 1, DType.BOOL: 1,
}  # fmt: skip
_BLOCKS = {  # values, bytes: ggml-common.h of https://github.com/ggml-org/llama.cpp
    DType.Q4_0: (32, 18), DType.Q4_1: (32, 20), DType.Q5_0: (32, 22), DType.Q5_1: (32, 24), DType.Q8_0: (32, 34),
    DType.Q2_K: (256, 84), DType.Q3_K: (256, 110), DType.Q4_K: (256, 144), DType.Q5_K: (256, 176),
    DType.Q6_K: (256, 210), DType.IQ1_S: (256, 50), DType.IQ1_M: (256, 56), DType.IQ2_XXS: (256, 66),
    DType.IQ2_XS: (256, 74), DType.IQ2_S: (256, 82), DType.IQ3_XXS: (256, 98), DType.IQ3_S: (256, 110),
    DType.IQ4_NL: (32, 18), DType.IQ4_XS: (256, 136), DType.MXFP4: (32, 17),
}  # fmt: skip
_TORCH = {
    DType.F64: "float64", DType.F32: "float32", DType.F16: "float16", DType.BF16: "bfloat16", DType.I64: "int64",
    DType.I32: "int32", DType.I16: "int16", DType.I8: "int8", DType.U8: "uint8", DType.BOOL: "bool",
}  # fmt: skip
_OF_TORCH = {name: dtype for dtype, name in _TORCH.items()}
GGML = {  # enum ggml_type of ggml.h there
    DType.F32: 0, DType.F16: 1, DType.Q4_0: 2, DType.Q4_1: 3, DType.Q5_0: 6, DType.Q5_1: 7, DType.Q8_0: 8,
    DType.Q2_K: 10, DType.Q3_K: 11, DType.Q4_K: 12, DType.Q5_K: 13, DType.Q6_K: 14, DType.IQ2_XXS: 16,
    DType.IQ2_XS: 17, DType.IQ3_XXS: 18, DType.IQ1_S: 19, DType.IQ4_NL: 20, DType.IQ3_S: 21, DType.IQ2_S: 22,
    DType.IQ4_XS: 23, DType.I8: 24, DType.I16: 25, DType.I32: 26, DType.I64: 27, DType.F64: 28, DType.IQ1_M: 29,
    DType.BF16: 30, DType.MXFP4: 39,
}  # fmt: skip
ELEMENTS = tuple(_SIZE)  # all but the block types: what safetensors and torch can store
WEIGHT_DTYPES = (DType.BF16, DType.F16, DType.F32)
