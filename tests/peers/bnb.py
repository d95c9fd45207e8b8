"""bitsandbytes: what it stores of a matrix, and what it reads from what is stored."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit

Stored = dict[str, torch.Tensor]
KINDS = ("nf4", "nf4-double", "int8")


def layer(kind: str, shape: tuple[int, ...]) -> Linear4bit | Linear8bitLt:
    """Not yet quantized."""
    rows, columns = shape
    if kind == "int8":
        return Linear8bitLt(columns, rows, bias=False, has_fp16_weights=False)
    return Linear4bit(columns, rows, bias=False, quant_type="nf4", compress_statistics=kind == "nf4-double")


def serialized(weight: torch.Tensor, kind: str) -> Stored:
    """By suffix, as a state dict has it before any forward pass."""
    made, weight = layer(kind, tuple(weight.shape)), weight.clone()
    if kind == "int8":
        made.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        double = kind == "nf4-double"
        made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=double, module=made)
    return dict(made.to("cpu").state_dict())


def loaded(stored: Mapping[str, torch.Tensor], kind: str, shape: tuple[int, ...]) -> Linear4bit | Linear8bitLt:
    """A layer that has read what is stored, as transformers has it read."""
    made = layer(kind, shape)
    if kind == "int8":
        made.to("cpu")  # makes the buffers that a state dict is read into
        made.weight.SCB = torch.zeros(shape[0])
        made.weight.data = torch.zeros(shape, dtype=torch.int8)
        assert made.load_state_dict(dict(stored)) == ([], [])
    else:
        parts = {suffix: tensor for suffix, tensor in stored.items() if suffix != "weight"}
        made.weight = Params4bit.from_prequantized(stored["weight"], parts, device="cpu", module=made)
    return made


def weights(layer: Linear4bit | Linear8bitLt) -> torch.Tensor:
    """[out, in]: in the dtype that the layer was made of, of int8 in fp32."""
    if isinstance(layer, Linear4bit):
        found = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return found.reshape(layer.weight.quant_state.shape)  # of a single byte it gives the transpose
    scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
    return functional.int8_vectorwise_dequant(layer.weight.data, scales)
