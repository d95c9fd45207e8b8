"""GPTQModel: GPTQ and AWQ with its defaults, read back from the folder that it writes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import dense
import torch
from safetensors import safe_open
from torch import Tensor

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # with one it does not start

from gptqmodel import GPTQModel
from gptqmodel.quantization.config import AWQConfig, GPTQConfig

PARTS = (".qweight", ".qzeros", ".scales", ".g_idx")
_ORDER = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])  # where in a word of AWQ's GEMM the columns lie


def gptq(asked: dense.Asked) -> Mapping[str, Tensor]:
    return quantized(asked, GPTQConfig(bits=dense.BITS, group_size=dense.GROUP))


def awq(asked: dense.Asked) -> Mapping[str, Tensor]:
    return quantized(asked, AWQConfig(bits=dense.BITS, group_size=dense.GROUP, sym=False))


def quantized(asked: dense.Asked, config: GPTQConfig | AWQConfig) -> Mapping[str, Tensor]:
    accelerator = {} if torch.cuda.is_available() else {"device": "cpu"}
    dtype = torch.bfloat16 if isinstance(config, AWQConfig) else torch.float32  # its AWQ does not pack from fp32
    model = GPTQModel.load(str(asked.model), config, dtype=dtype, **accelerator)
    model.quantize([{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in asked.ids], batch_size=1)
    with tempfile.TemporaryDirectory() as folder:
        model.save(folder)
        return unpacked(Path(folder), isinstance(config, AWQConfig))


def unpacked(folder: Path, awq: bool) -> dict[str, Tensor]:
    """Each linear [out, in] of fp32; the rest as it is."""
    stored: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            stored |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    found = {name: tensor for name, tensor in stored.items() if not name.endswith(PARTS)}
    for name in [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]:
        parts = (stored[name + part] for part in PARTS[:3])
        found[f"{name}.weight"] = _gemm(*parts) if awq else _v1(*parts, stored[f"{name}.g_idx"])
    return found


def _v1(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    """Codes packed along in, zeros along out and one less than they are."""
    zero = dense.unpack(zeros) + 1
    return ((dense.unpack(codes.T).T - zero[group.long()]).float() * scales[group.long()].float()).T


def _gemm(codes: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """Codes and zeros packed along out."""
    code, zero = (dense.unpack(p).reshape(len(p), -1, 8)[..., _ORDER].reshape(len(p), -1) for p in (codes, zeros))
    group = torch.arange(len(code)) // dense.GROUP
    return ((code - zero[group]).float() * scales[group].float()).T


if __name__ == "__main__":
    dense.run({"gptq-sym": gptq, "awq-asym": awq}, "gptqmodel")
