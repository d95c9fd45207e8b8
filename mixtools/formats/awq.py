"""AWQ's GEMM format, as autoawq stores it: codes of 4 bits packed along the output, eight in a word, in its own order.

    qweight [in, out / 8]   qzeros [groups, out / 8]   scales [groups, out]

Source: https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py), 0.2.9.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..storage.dtypes import DType
from . import groups
from .base import Packed, Part, Stored
from .bits import AWQ_ORDER, pack, unpack_awq
from .gptq import AUTO_ROUND, packing

if TYPE_CHECKING:
    from torch import Tensor

_A_WORD = 8  # codes


@dataclass(frozen=True)
class Awq:
    """`group` columns, -1 for the whole row; `dtype` of the scales and of the dense matrix.

    `symmetric`: every zero is 8; the format stores it all the same.
    """

    group: int
    dtype: DType = DType.F16
    symmetric: bool = False

    bits: ClassVar[int] = 4
    name: ClassVar[str] = "awq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales")

    @property
    def kind(self) -> str:
        return groups.kind(self.name, self.bits)

    @property
    def about(self) -> str:
        return groups.about(self.bits, self.group, self.symmetric)

    def to(self, dtype: DType) -> Awq:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        rows, columns = groups.expect_matrix(shape)
        count = groups.count(columns, self.group)
        return (
            Part("qweight", DType.I32, (columns, rows // _A_WORD)),
            Part("qzeros", DType.I32, (count, rows // _A_WORD)),
            Part("scales", self.dtype, (count, rows)),
        )

    def encode(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
        """From uint8 codes [out, in], scales [out, groups] (fp32 that holds values of `dtype`) and zeros [out, groups].

        Raises TensorError for what the format cannot hold: a code or zero above 15, a zero other than 8 where it is
        symmetric, a scale that is no finite value of `dtype`, rows or columns that do not fill words or groups.
        """
        import torch

        from ..ops import library

        rows, columns = codes.shape
        groups.expect_multiple("rows", rows, _A_WORD)
        groups.expect_whole(columns, self.group)
        groups.expect_grid(codes, scales, zeros, self.group)
        zeros = zeros.cpu()
        if self.symmetric:
            groups.expect_zeros(zeros, 8, 8, "a symmetric grid has its zero in the middle")
        groups.expect_zeros(zeros, 0, 15, "zeros have 4 bits")
        parts = (
            library.turned(pack(codes, self.bits, AWQ_ORDER)).cpu(),
            library.turned(pack(zeros.to(torch.uint8), self.bits, AWQ_ORDER)),
            groups.stored_scales(scales.cpu(), self.dtype).T.contiguous(),
        )
        return Packed(self, parts)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        return groups.values(self.grid(parts), self.dtype)

    def grid(self, parts: Sequence[Tensor]) -> groups.Grid:
        """Codes, scales and zeros as `encode` takes them."""
        import torch

        qweight, qzeros, scales = parts
        zeros = torch.from_numpy(unpack_awq(qzeros.numpy().view("u4")))
        return groups.Grid(unpack_awq(qweight.numpy().view("u4")), scales.T, zeros, self.group)

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """The words turned, their codes, and a run in fp32."""
        rows, columns = shape
        return DType.I32.nbytes((rows // _A_WORD, columns)) + rows * columns + groups.DECODING

    def fragment(self) -> Mapping[str, Any]:
        """As autoawq 0.2.9 writes it for a Mixtral: without "gate" it would look for a packed router."""
        about = {
            "quant_method": "awq",
            "zero_point": not self.symmetric,
            "group_size": self.group,
            "bits": 4,
            "version": "gemm",
            "modules_to_not_convert": ["gate"],
        }
        return {"quantization_config": about}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Awq | None:
        """GPTQ's parts have the same names; which of the two it is stands in the configuration alone."""
        if "qweight" not in stored or "g_idx" in stored or not cls.claims(quantization):
            return None
        group = quantization.get("group_size")
        group = group if isinstance(group, int) and group > 0 else groups.WHOLE_ROW
        dtype = stored["scales"].dtype if "scales" in stored else DType.F16
        return cls(group, dtype, quantization.get("zero_point") is False)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        """Of autoawq's versions GEMM; its others (gemv, exllama, marlin) lie otherwise."""
        if quantization.get("bits", 4) != 4:
            return False
        if quantization.get("quant_method") in AUTO_ROUND:
            return "awq" in packing(quantization)
        version = quantization.get("version") or quantization.get("format") or "gemm"
        return quantization.get("quant_method") == cls.name and str(version).lower() == "gemm"
