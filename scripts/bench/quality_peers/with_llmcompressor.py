"""llm-compressor: GPTQModifier and AWQModifier, their defaults, on experts as linears of their own."""

from __future__ import annotations

from collections.abc import Mapping

import dense
import torch
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modeling.moe.linearize import load_quantizable_moe
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

IGNORE = ["lm_head", "re:.*gate$"]
RECIPES = {
    "gptq-sym": lambda: [GPTQModifier(scheme="W4A16", targets="Linear", ignore=IGNORE)],
    "gptq-asym": lambda: [GPTQModifier(scheme="W4A16_ASYM", targets="Linear", ignore=IGNORE)],
    "awq-asym": lambda: [
        AWQModifier(),
        QuantizationModifier(scheme="W4A16_ASYM", targets="Linear", ignore=IGNORE),
    ],
}


def quantized(asked: dense.Asked) -> Mapping[str, Tensor]:
    if not torch.cuda.is_available():
        IntermediatesCache.pin_memory = lambda *_, **__: None  # pinning asks for an accelerator
    with load_quantizable_moe():
        model = AutoModelForCausalLM.from_pretrained(asked.model, dtype=torch.float32)
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in asked.ids]
    oneshot(model=model, dataset=DataLoader(rows, batch_size=1), recipe=RECIPES[asked.method]())
    found = {}
    for name, module in model.named_modules():
        scheme = getattr(module, "quantization_scheme", None)
        for key, parameter in module.named_parameters(recurse=False):
            if key in ("weight_scale", "weight_zero_point", "weight_g_idx"):
                continue
            zero = getattr(module, "weight_zero_point", None)
            found[f"{name}.{key}"] = (
                fake_quantize(parameter, module.weight_scale, zero, scheme.weights)
                if scheme is not None and key == "weight"
                else parameter
            )
    return found


if __name__ == "__main__":
    dense.run(dict.fromkeys(RECIPES, quantized), "llmcompressor")
