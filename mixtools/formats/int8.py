"""int8: a code of 8 bits a value times the largest value of its row, as LLM.int8() has weights (Dettmers et al., 2022).

    weight int8 [out, in]   SCB fp32 [out]   weight_format uint8 [], 0 for rows as they are

value = code * SCB / 127. The bytes are those of bitsandbytes 0.50.2 on a CPU, which takes every weight through fp16
(Int8Params in https://github.com/bitsandbytes-foundation/bitsandbytes, bitsandbytes/nn/modules.py). Its programs round
activations to 8 bits as well: their logits are not quite those of these values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TensorError
from ..storage.dtypes import DType
from . import bnb, groups
from .base import Packed, Part, Stored

if TYPE_CHECKING:
    from torch import Tensor

_RUN = 1 << 18  # values at once: their fp32 stays in a core's cache
_PER_CODE = 1 / 127  # rounded to fp32 where it is multiplied with


@dataclass(frozen=True)
class Int8:
    """`dtype`: of the dense matrix, which the parts do not tell. `marked`: weight_format is there, as since 2023."""

    dtype: DType = DType.BF16
    marked: bool = True

    name: ClassVar[str] = "int8"
    kind: ClassVar[str] = "int8"
    about: ClassVar[str] = "8 bits, a scale a row"
    suffixes: ClassVar[tuple[str, ...]] = ("weight", "SCB", "weight_format")

    def to(self, dtype: DType) -> Int8:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        rows, columns = groups.expect_matrix(shape)
        parts = (Part("weight", DType.I8, (rows, columns)), Part("SCB", DType.F32, (rows,)))
        return (*parts, Part("weight_format", DType.U8, ())) if self.marked else parts

    def encode_codes(self, codes: Tensor, scales: Tensor) -> Packed:
        """From int8 codes [out, in] and fp32 scales [out], 127 being the code of a row's scale.

        Raises TensorError for codes and scales that do not belong together.
        """
        import torch

        bnb.expect_codes(codes, scales, torch.int8, codes.shape[0])
        parts = (codes.cpu().contiguous(), scales.cpu().contiguous())
        return Packed(self, (*parts, torch.zeros((), dtype=torch.uint8)) if self.marked else parts)

    def codes(self, parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """int8 [out, in] and the fp32 scales [out]. Raises TensorError for codes in another order."""
        if self.marked and int(parts[2]):
            raise TensorError("weight_format says that its rows lie in tiles of a GPU; bitsandbytes reads rows alone")
        return parts[0], parts[1]

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """bitsandbytes' int8_vectorwise_dequant, rounded once. Raises as `codes`."""
        import torch

        codes, scales = self.codes(parts)
        rows, columns = codes.shape
        out = torch.empty((rows, columns), dtype=self.dtype.torch())
        step = max(1, _RUN // max(1, columns))
        for at in range(0, rows, step):
            run = slice(at, min(at + step, rows))
            out[run] = (codes[run] * scales[run, None]).mul_(_PER_CODE)
        return out

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """A run, or a row that is longer, in fp32."""
        return DType.F32.nbytes((max(_RUN, shape[-1]) + 16,))

    def fragment(self) -> Mapping[str, Any]:
        return {"quantization_config": bnb.quantization_config(8)}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Int8 | None:
        if "weight" not in stored or not stored.keys() & set(cls.suffixes[1:]):
            return None
        return cls(marked="weight_format" in stored)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return bnb.claims(quantization, 8)


def int8(weight: Tensor) -> Packed:
    """`weight` [out, in], each value the nearest code of its row: bitsandbytes' own bytes.

    Raises TensorError for NaN, infinity, and what is beyond fp16's largest number, 65504, of which bitsandbytes makes
    rows of zeros and NaN without a word.
    """
    import torch

    rows, columns = groups.expect_matrix(tuple(weight.shape))
    codes, scales = torch.empty((rows, columns), dtype=torch.int8), torch.empty(rows)
    step = max(1, _RUN // max(1, columns))
    for at in range(0, rows, step):
        run = slice(at, min(at + step, rows))
        half = weight[run].half()
        scales[run] = half.abs().amax(1).float()
        bnb.expect_finite(scales[run], "a row holds NaN, or a number beyond those of fp16")
        # a row of zeros has no code but 0; the product with 127 / 0 would be NaN, and what that is cast to undefined
        per_code = torch.where(scales[run] > 0, 127.0 / scales[run], 0.0)
        codes[run] = (half * per_code[:, None]).round_().to(torch.int8)
    return Int8(DType.of(weight.dtype)).encode_codes(codes, scales)
