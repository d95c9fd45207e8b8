"""auto-gptq, in column order (desc_act off, as vLLM wants it) and with its activation order in static groups."""

from __future__ import annotations

from collections.abc import Mapping

import auto_gptq.modeling._base as base
import dense
import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling.mixtral import MixtralGPTQForCausalLM
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

ORDERED = {"gptq-sym": False, "gptq-sym-static": True}


def quantized(asked: dense.Asked) -> Mapping[str, Tensor]:
    if not torch.cuda.is_available():
        base.CUDA_0 = torch.device("cpu")
        torch.cuda.synchronize = lambda *_: None
    ordered = ORDERED[asked.method]
    config = BaseQuantizeConfig(
        bits=dense.BITS, group_size=dense.GROUP, desc_act=ordered, static_groups=ordered, sym=True
    )
    model = AutoModelForCausalLM.from_pretrained(asked.model, torch_dtype=torch.float32)
    made = MixtralGPTQForCausalLM(model, False, config)
    made.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in asked.ids])
    found = dict(made.model.named_parameters())
    for name, module in made.model.named_modules():
        if hasattr(module, "qweight"):
            found[f"{name}.weight"] = weight(module)
    return {name: tensor for name, tensor in found.items() if not name.endswith(".bias")}


def weight(linear: nn.Module) -> Tensor:
    """[out, in], from the file format: codes along in, zeros along out and one less than they are."""
    codes = dense.unpack(linear.qweight.T).T  # [in, out]
    zeros = dense.unpack(linear.qzeros) + 1
    group = linear.g_idx.long()
    return ((codes - zeros[group]).float() * linear.scales[group].float()).T


if __name__ == "__main__":
    dense.run(dict.fromkeys(ORDERED, quantized), "auto-gptq")
