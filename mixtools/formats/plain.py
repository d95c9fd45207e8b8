"""Plain: the matrix itself, one number after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..storage.dtypes import DType
from ..storage.store import Bits
from .base import Part, Stored

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Plain:
    """One tensor of the matrix's own shape."""

    dtype: DType

    name: ClassVar[str] = "plain"
    suffixes: ClassVar[tuple[str, ...]] = ("weight",)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("weight", self.dtype, shape),)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[0]

    def decode_rows(self, bits: Bits) -> Bits:
        return bits

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        return 0

    def fragment(self) -> Mapping[str, Any]:
        return {}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Plain | None:
        return cls(stored["weight"].dtype) if "weight" in stored else None

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return False
