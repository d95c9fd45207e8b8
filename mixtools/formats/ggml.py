"""ggml: a matrix in blocks, each a run of one row's values with scales of its own (ggml-common.h of llama.cpp).

A stored row decodes by itself, so a matrix is read in runs of rows. ggml computes a value in fp32; the dense matrix is
that, rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..storage.dtypes import ELEMENTS, DType
from ..storage.store import Bits, to_tensor
from .base import Part, Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Ggml:
    """Blocks of one type. `dtype`: of the dense matrix; bf16 unless a reader asks for another."""

    type: DType
    dtype: DType = DType.BF16

    name: ClassVar[str] = "ggml"
    suffixes: ClassVar[tuple[str, ...]] = ("weight",)

    @property
    def kind(self) -> str:
        return self.type.value

    @property
    def about(self) -> str:
        return f"blocks of {self.type.block}"

    def to(self, dtype: DType) -> Ggml:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("weight", self.type, shape),)

    def decode_rows(self, bits: Bits, out: Bits | None = None) -> Bits:
        """Stored rows [rows, bytes] -> [rows, columns] of `dtype`."""
        from ..ops.decode import decode  # numpy's decoders of the rarer types take a while to import

        return decode(bits, self.type, self.dtype, out=out)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """The part is uint8 [..., bytes of a row]."""
        (blocks,) = parts
        rows = self.decode_rows(blocks.reshape(-1, blocks.shape[-1]).numpy())
        return to_tensor(rows, self.dtype).reshape(*blocks.shape[:-1], rows.shape[-1])

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        return 0

    def fragment(self) -> Mapping[str, Any]:
        """A GGUF has no config.json."""
        return {}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Ggml | None:
        found = stored.get("weight")
        return cls(found.dtype) if found is not None and found.dtype not in ELEMENTS else None

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return False
