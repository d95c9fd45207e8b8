"""Factored: a matrix of low rank as two, W = A·B, with A [out, rank] and B [rank, in].

A has the name of the matrix itself, though not its shape, so that every loader stops: programs pass over a
quantization_config that they do not know, and over tensors of unknown names, and fill what is missing at random.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TensorError
from ..storage.dtypes import DType
from .base import Part, Stored

if TYPE_CHECKING:
    from torch import Tensor

_ID = "mixtools-factored"


@dataclass(frozen=True)
class Factored:
    """`rank` columns of A and rows of B, at least one: rank 0 is stored as a column and a row of zeros.

    `a`: the suffix of A; "weight_a" in outputs of old.
    """

    dtype: DType
    rank: int
    a: str = "weight"

    name: ClassVar[str] = "factored"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "weight_a", "weight_b")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        if len(shape) != 2:
            raise TensorError(f"only a matrix has two factors, not a tensor of shape {list(shape)}")
        rows, cols = shape
        return (Part(self.a, self.dtype, (rows, self.rank)), Part("weight_b", self.dtype, (self.rank, cols)))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Multiplied whole in fp32 and rounded once: a product in runs of rows could differ in its last bit."""
        a, b = parts
        return (a.float() @ b.float()).to(self.dtype.torch())

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """The product, and both factors, in fp32."""
        rows, cols = shape
        return DType.F32.nbytes(shape) + DType.F32.nbytes((rows + cols, self.rank))

    def fragment(self) -> Mapping[str, Any]:
        """Without a quant_method, at which transformers 5 stops; one that it does not know it would pass over."""
        about = "some matrices are stored as factors weight, weight_b; `mixtools convert to-hf` multiplies them"
        return {"quantization_config": {"format": _ID, "about": about}}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Factored | None:
        a = "weight" if "weight" in stored else "weight_a"
        if a not in stored or ("weight_b" not in stored and a == "weight"):
            return None
        dtype, shape = stored[a]
        return cls(dtype, shape[1] if len(shape) == 2 else 0, a)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return quantization.get("format") == _ID
