"""GPTQ's format, as auto-gptq and GPTQModel store it: codes packed along the input, eight of 4 bits in a word.

    qweight [in * bits / 32, out]   qzeros [groups, out * bits / 32]   scales [groups, out]   g_idx [in]

Its first version stores each zero less one, so that a zero of 0 does not exist there; "gptq_v2" stores it as it is.
`g_idx` tells the group of each column. What is written has them in sequence (activation order is made with static
groups: vLLM passes g_idx over); files of others, made with desc_act, have them in any.

Source: https://github.com/AutoGPTQ/AutoGPTQ (auto_gptq/nn_modules/qlinear), 0.7.1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..errors import TensorError
from ..ops import cpu
from ..storage.dtypes import DType
from . import groups
from .base import Packed, Part, Stored
from .bits import BITS, pack, unpack, words_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Gptq:
    """`bits` 2, 3, 4 or 8; `group` columns, -1 for the whole row; `dtype` of the scales and of the dense matrix.

    `symmetric`: every zero is 2^(bits-1); it is told in config.json, where loaders choose their kernel by it. `v2`:
    zeros are stored as they are. `indexed`: g_idx is there, as in all files but AutoRound's own.
    """

    bits: int
    group: int
    dtype: DType = DType.F16
    symmetric: bool = True
    v2: bool = False
    indexed: bool = True

    name: ClassVar[str] = "gptq"
    suffixes: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")

    @property
    def kind(self) -> str:
        return groups.kind(self.name, self.bits)

    @property
    def about(self) -> str:
        return groups.about(self.bits, self.group, self.symmetric) + (", gptq_v2" if self.v2 else "")

    def to(self, dtype: DType) -> Gptq:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        rows, columns = groups.expect_matrix(shape)
        count = groups.count(columns, self.group)
        parts = (
            Part("qweight", DType.I32, (words_of(columns, self.bits), rows)),
            Part("qzeros", DType.I32, (count, words_of(rows, self.bits))),
            Part("scales", self.dtype, (count, rows)),
            Part("g_idx", DType.I32, (columns,)),
        )
        return parts if self.indexed else parts[:3]

    def encode(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
        """From uint8 codes [out, in], scales [out, groups] (fp32 that holds values of `dtype`) and zeros [out, groups].

        Codes are packed where they lie, and quickest where those of a column lie side by side; the parts are on the
        CPU. Raises TensorError for what the format cannot hold: a zero of 0 in its first version, a zero other than
        2^(bits-1) where it is symmetric, a code that is too large, a scale that is no finite value of `dtype`, rows or
        columns that do not fill words or groups.
        """
        import torch

        from ..ops import library

        rows, columns = codes.shape
        groups.expect_multiple("rows", rows, 32)
        groups.expect_multiple("columns", columns, 32)
        groups.expect_whole(columns, self.group)
        groups.expect_grid(codes, scales, zeros, self.group)
        zeros = zeros.cpu()
        self._expect_zeros(zeros)
        stored = zeros.to(torch.uint8) - (0 if self.v2 else 1)
        parts = (
            pack(codes.T, self.bits).cpu(),
            library.turned(pack(stored, self.bits)),
            groups.stored_scales(scales.cpu(), self.dtype).T.contiguous(),
            self._sequence(columns),
        )
        return Packed(self, parts if self.indexed else parts[:3])

    def _expect_zeros(self, zeros: Tensor) -> None:
        if self.symmetric:
            middle = 1 << self.bits - 1
            groups.expect_zeros(zeros, middle, middle, "a symmetric grid has its zero in the middle")
        version = "gptq_v2 holds codes" if self.v2 else "the format's first version holds a zero less one"
        groups.expect_zeros(zeros, 0 if self.v2 else 1, (1 << self.bits) - 1, version)

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Raises as `grid`."""
        return groups.values(self.grid(parts), self.dtype)

    def grid(self, parts: Sequence[Tensor]) -> groups.Grid:
        """Raises TensorError for a g_idx that names groups which are not there, or for zeros of another version.

        There are files with the zeros of gptq_v2 that say "gptq" (https://github.com/vllm-project/vllm/pull/38966):
        each weight would be off by a scale. A symmetric one gives itself away.
        """
        import torch

        qweight, qzeros, scales = parts[:3]
        columns, (count, rows) = qweight.shape[0] * 32 // self.bits, scales.shape
        codes = unpack(cpu.transpose(qweight.numpy().view("u4")), self.bits, columns)
        zeros = torch.from_numpy(unpack(qzeros.numpy().view("u4"), self.bits, rows)).T.int() + (0 if self.v2 else 1)
        if self.symmetric and not bool((zeros == 1 << self.bits - 1).all()):
            said, other = ("gptq_v2", "gptq") if self.v2 else ("gptq", "gptq_v2")
            why = (
                f"is symmetric by its configuration, but not with the zeros of checkpoint_format {said}; is it {other}?"
            )
            raise TensorError(why, expected=1 << self.bits - 1, found=int(zeros.flatten()[0]))
        group: int | Tensor = self.group
        if self.indexed and not torch.equal(parts[3], self._sequence(columns)):
            group = groups.expect_index(parts[3], count)
        return groups.Grid(codes, scales.T, zeros, group)

    def _sequence(self, columns: int) -> Tensor:
        import torch

        return torch.arange(columns, dtype=torch.int32) // (columns if self.group == groups.WHOLE_ROW else self.group)

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """The words turned, their codes, and a run in fp32."""
        rows, columns = shape
        return DType.I32.nbytes((rows, words_of(columns, self.bits))) + rows * columns + groups.DECODING

    def fragment(self) -> Mapping[str, Any]:
        """What quantize_config.json tells, in config.json."""
        return {"quantization_config": quantize_config(self)}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Gptq | None:
        """Bits and groups follow from the shapes where g_idx is there, the rest from the configuration."""
        if "qweight" not in stored or (not cls.claims(quantization) and "g_idx" not in stored):
            return None
        packed = stored["qweight"].shape
        dtype, scales = stored.get("scales", Stored(DType.F16, ()))
        bits, group = quantization.get("bits"), quantization.get("group_size")
        bits = bits if bits in BITS else 4
        group = group if isinstance(group, int) and group > 0 else groups.WHOLE_ROW
        if "g_idx" in stored and len(packed) == len(scales) == 2:  # single modules may differ from the rest
            (columns,) = stored["g_idx"].shape or (1,)
            bits = packed[0] * 32 // columns if packed[0] * 32 // columns in BITS else bits
            if groups.count(columns, group) != scales[0]:
                group = groups.WHOLE_ROW if scales[0] == 1 else -(-columns // max(1, scales[0]))
        symmetric = quantization.get("sym") is True
        return cls(bits, group, dtype, symmetric, _version(quantization) == "gptq_v2", "g_idx" in stored)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        """auto-gptq's and GPTQModel's own, and AutoRound's where it packs as they do."""
        if quantization.get("pack_dtype", "int32") != "int32" or quantization.get("is_marlin_format"):
            return False
        if quantization.get("quant_method") in AUTO_ROUND:
            return "gptq" in packing(quantization)
        return quantization.get("quant_method") == cls.name and _version(quantization) in ("gptq", "gptq_v2")


AUTO_ROUND = ("auto-round", "intel/auto-round")


def packing(quantization: Mapping[str, Any]) -> str:
    """Which format AutoRound says that it wrote: "auto_round:auto_gptq", "auto_round:auto_awq", ..."""
    return str(quantization.get("packing_format") or quantization.get("backend") or "")


def _version(quantization: Mapping[str, Any]) -> str:
    found = quantization.get("checkpoint_format") or quantization.get("format") or "gptq"
    return str(found).lower() if quantization.get("quant_method") == Gptq.name else "gptq"


def quantize_config(format: Gptq) -> dict[str, Any]:
    """quantize_config.json, which auto-gptq opens without asking whether it is there.

    The keys of its 0.7.1, and checkpoint_format, which later programs read and it passes over. How the codes were
    chosen (damping, order) is not told: no loader acts on it.
    """
    return {
        "bits": format.bits,
        "group_size": format.group,
        "desc_act": False,
        "static_groups": False,
        "sym": format.symmetric,
        "true_sequential": True,
        "model_name_or_path": None,
        "model_file_base_name": "model",
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2" if format.v2 else "gptq",
    }
