"""compressed-tensors' pack-quantized format, as llm-compressor stores it: integers packed along the input.

    weight_packed [out, in * bits / 32]   weight_scale [out, groups]   weight_zero_point [out * bits / 32, groups]
    weight_shape [2]

Codes and zeros are signed there and stored with 2^(bits-1) added, so that words hold what other formats hold; zeros
are packed along the output. A symmetric matrix stores none.

Source: https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized), 0.14.
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

_FORMAT = "pack-quantized"


@dataclass(frozen=True)
class PackedInts:
    """`bits` 2, 3, 4 or 8; `group` columns, -1 for the whole row; `dtype` of the scales and of the dense matrix.

    `symmetric`: no zeros are stored, each is 2^(bits-1). `indexed`: weight_g_idx tells the group of each column, as
    files made with activation order have it.
    """

    bits: int
    group: int
    dtype: DType = DType.F16
    symmetric: bool = True
    indexed: bool = False

    name: ClassVar[str] = "compressed-tensors"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape",
    )  # fmt: skip

    @property
    def kind(self) -> str:
        return groups.kind(self.name, self.bits)

    @property
    def about(self) -> str:
        return groups.about(self.bits, self.group, self.symmetric)

    def to(self, dtype: DType) -> PackedInts:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        rows, columns = groups.expect_matrix(shape)
        count = groups.count(columns, self.group)
        parts = [
            Part("weight_packed", DType.I32, (rows, words_of(columns, self.bits))),
            Part("weight_scale", self.dtype, (rows, count)),
        ]
        if not self.symmetric:
            parts.append(Part("weight_zero_point", DType.I32, (words_of(rows, self.bits), count)))
        if self.indexed:
            parts.append(Part("weight_g_idx", DType.I32, (columns,)))
        return (*parts, Part("weight_shape", DType.I64, (2,)))

    def encode(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> Packed:
        """From uint8 codes [out, in], scales [out, groups] (fp32 that holds values of `dtype`) and zeros [out, groups].

        Raises TensorError for what the format cannot hold: a code or zero that is too large, a zero other than
        2^(bits-1) where it is symmetric, a scale that is no finite value of `dtype`, columns that groups do not divide.
        """
        import torch

        from ..ops import library

        if self.indexed:
            raise TensorError("columns are written in sequence, without weight_g_idx")
        rows, columns = codes.shape
        groups.expect_whole(columns, self.group)
        groups.expect_grid(codes, scales, zeros, self.group)
        zeros = zeros.cpu()
        middle = 1 << self.bits - 1
        if self.symmetric:
            groups.expect_zeros(zeros, middle, middle, "a symmetric grid has its zero in the middle")
        groups.expect_zeros(zeros, 0, (1 << self.bits) - 1, f"zeros have {self.bits} bits")
        parts = [library.turned(pack(codes.T, self.bits)).cpu(), groups.stored_scales(scales.cpu(), self.dtype)]
        if not self.symmetric:
            parts.append(pack(zeros.to(torch.uint8), self.bits))
        return Packed(self, (*parts, torch.tensor([rows, columns])))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """Raises as `grid`."""
        return groups.values(self.grid(parts), self.dtype)

    def grid(self, parts: Sequence[Tensor]) -> groups.Grid:
        """Raises TensorError where the stored shape is not that of the words, or weight_g_idx names no group."""
        import torch

        named = dict(zip([part.suffix for part in self.parts((1, 0))], parts, strict=True))
        packed, scales = named["weight_packed"], named["weight_scale"]
        rows, columns = (int(size) for size in named["weight_shape"])
        if rows != packed.shape[0] or words_of(columns, self.bits) != packed.shape[1]:
            raise TensorError("weight_shape is another", expected=list(packed.shape), found=[rows, columns])
        zeros = torch.full(scales.shape, 1 << self.bits - 1)
        if not self.symmetric:
            words = cpu.transpose(named["weight_zero_point"].numpy().view("u4"))
            zeros = torch.from_numpy(unpack(words, self.bits, rows)).T
        group: int | Tensor = self.group
        if self.indexed and not bool((named["weight_g_idx"] == -1).all()):  # -1 throughout: in sequence after all
            group = groups.expect_index(named["weight_g_idx"], scales.shape[1])
        codes = unpack(packed.numpy().view("u4"), self.bits, columns)
        return groups.Grid(codes, scales, zeros, group)

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """The codes, and a run in fp32."""
        rows, columns = shape
        return rows * columns + groups.DECODING

    def fragment(self) -> Mapping[str, Any]:
        """What llm-compressor 0.14 writes, but for keys that older programs refuse.

        `ignore` is to name every linear module that stays plain (formats.naming).
        """
        whole = self.group == groups.WHOLE_ROW
        weights: dict[str, Any] = {
            "actorder": None,
            "block_structure": None,
            "dynamic": False,
            "group_size": None if whole else self.group,
            "num_bits": self.bits,
            "observer": "minmax",
            "observer_kwargs": {},
            "strategy": "channel" if whole else "group",
            "symmetric": self.symmetric,
            "type": "int",
        }
        group = {"format": _FORMAT, "input_activations": None, "output_activations": None, "targets": ["Linear"]}
        about = {
            "config_groups": {"group_0": {**group, "weights": weights}},
            "format": _FORMAT,
            "global_compression_ratio": None,
            "ignore": ["lm_head"],
            "kv_cache_scheme": None,
            "quant_method": self.name,
            "quantization_status": "compressed",
        }
        return {"quantization_config": about}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> PackedInts | None:
        """Bits and group size stand in the configuration alone."""
        if "weight_packed" not in stored:
            return None
        weights = _weights(quantization)
        bits, group = weights.get("num_bits"), weights.get("group_size")
        if not isinstance(group, int) or group <= 0:
            group = groups.WHOLE_ROW
        symmetric = weights.get("symmetric") is not False and "weight_zero_point" not in stored
        bits = bits if bits in BITS else 4
        dtype = stored["weight_scale"].dtype if "weight_scale" in stored else DType.F16
        return cls(bits, group, dtype, symmetric, "weight_g_idx" in stored)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        weights = _weights(quantization)
        known = weights.get("type", "int") == "int" and weights.get("num_bits") in BITS
        known = known and weights.get("strategy") in ("group", "channel")
        return quantization.get("quant_method") == cls.name and quantization.get("format") == _FORMAT and known


def _weights(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """How matrices are quantized, the same in all groups of the configuration; empty if they differ."""
    schemes = quantization.get("config_groups")
    if not isinstance(schemes, Mapping):
        return {}
    found = [scheme.get("weights") if isinstance(scheme, Mapping) else None for scheme in schemes.values()]
    first = found[0] if found else None
    return first if isinstance(first, Mapping) and all(weights == first for weights in found) else {}
