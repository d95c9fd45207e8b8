"""autoawq, as it comes: GEMM, zero points, its clipping."""

from __future__ import annotations

from collections.abc import Mapping

import dense
import torch
from awq import AutoAWQForCausalLM
from torch import Tensor, nn
from transformers import AutoTokenizer

_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word the columns lie


def quantized(asked: dense.Asked) -> Mapping[str, Tensor]:
    made = AutoAWQForCausalLM.from_pretrained(
        str(asked.model), torch_dtype=torch.float32, device_map=None if torch.cuda.is_available() else "cpu"
    )
    samples, seq_len = asked.ids.shape
    made.quantize(
        AutoTokenizer.from_pretrained(asked.model),
        quant_config={"zero_point": True, "q_group_size": dense.GROUP, "w_bit": dense.BITS, "version": "GEMM"},
        calib_data=asked.ids.tolist(), max_calib_samples=samples, max_calib_seq_len=seq_len,
    )  # fmt: skip
    found = dict(made.model.named_parameters())
    for name, module in made.model.named_modules():
        if hasattr(module, "qweight"):
            found[f"{name}.weight"] = weight(module)
    return found


def weight(linear: nn.Module) -> Tensor:
    """[out, in], from the file format: codes and zeros along out, in autoawq's order."""
    codes, zeros = (
        dense.unpack(packed).reshape(len(packed), -1, 8)[..., _ORDER].reshape(len(packed), -1)
        for packed in (linear.qweight.cpu(), linear.qzeros.cpu())
    )
    group = torch.arange(len(codes)) // dense.GROUP
    return ((codes - zeros[group]).float() * linear.scales.cpu()[group].float()).T


if __name__ == "__main__":
    dense.run({"awq-asym": quantized}, "autoawq")
