"""What nf4 and int8 share: how config.json tells of them, in the words of transformers' BitsAndBytesConfig.

Loaders turn every linear module into a quantized one but those on a list, which takes the place of their own default:
so it names the head beside the router. Both are names of modules, the same in each spelling of the experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import TensorError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PLAIN_MODULES = ("gate", "lm_head")


def quantization_config(bits: int, *, double: bool = False, compute: str = "float32") -> Mapping[str, Any]:
    """All keys that transformers 4.57 writes. `compute`: the dtype that a loader multiplies 4-bit weights in."""
    four = bits == 4
    return {
        "_load_in_4bit": four,
        "_load_in_8bit": not four,
        "bnb_4bit_compute_dtype": compute,
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "nf4" if four else "fp4",  # the default, which says nothing beside load_in_8bit
        "bnb_4bit_use_double_quant": double,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_skip_modules": list(PLAIN_MODULES),
        "llm_int8_threshold": 6.0,
        "load_in_4bit": four,
        "load_in_8bit": not four,
        "quant_method": "bitsandbytes",
    }


def claims(quantization: Mapping[str, Any], bits: int) -> bool:
    """Whether a configuration is that of so many bits; those of before transformers 4.35 name no method."""
    named = quantization.get("quant_method", "bitsandbytes") == "bitsandbytes"
    return named and quantization.get(f"load_in_{bits}bit") is True


def expect_finite(scales: Tensor, why: str) -> None:
    """Raises TensorError for scales that NaN or infinity is among."""
    import torch

    if not torch.isfinite(scales).all():
        raise TensorError(why)


def expect_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype, count: int) -> None:
    """Raises TensorError for codes and scales that do not belong together."""
    import torch

    if codes.dtype is not dtype:
        raise TensorError("codes of a wrong dtype", expected=dtype, found=codes.dtype)
    if scales.dtype is not torch.float32 or tuple(scales.shape) != (count,):
        found = f"{scales.dtype} {list(scales.shape)}"
        raise TensorError("scales do not fit the codes", expected=f"torch.float32 {[count]}", found=found)
    expect_finite(scales, "a scale is NaN or infinite")
