"""What a package made, as a dense fp32 folder that mixtools reads: its own values, judged by us.

    driver MODEL IDS OUT METHOD ─► package ─► state dict of fp32 ─► write() ─► OUT/model.safetensors, config.json

Runs in the environment of a package: torch, numpy and safetensors alone. A file that was not quantized, or in which an
expert is missing, must not be judged as if it were the package's: names and shapes are those of the source, and each
group of each linear has at most 2^bits values.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

BITS, GROUP = 4, 128
LINEAR = re.compile(r"\.(self_attn\.[qkvo]_proj|experts\.\d+\.w[123])\.weight$")
LEGACY = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
BESIDE = ("config.json", "tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


class Asked(NamedTuple):
    """What a driver is to do."""

    model: Path  # Hugging Face's layout, legacy names
    ids: Tensor  # [samples, seq_len], int64, BOS first
    out: Path
    method: str


def run(methods: Mapping[str, Callable[[Asked], Mapping[str, Tensor]]], package: str) -> None:
    """The driver's command: the method it is asked for, on the model and ids it is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("ids", type=Path, help="[samples, seq_len], .npy")
    parser.add_argument("out", type=Path)
    parser.add_argument("method", choices=sorted(methods))
    args = parser.parse_args()
    asked = Asked(args.model, torch.from_numpy(np.load(args.ids)).long(), args.out, args.method)
    torch.manual_seed(0)
    write(args.model, args.out, methods[args.method](asked))
    versions = {name: version(name) for name in (package, "torch", "transformers")}
    (args.out / "versions.json").write_text(json.dumps(versions), "utf-8")


def write(source: Path, out: Path, tensors: Mapping[str, Tensor]) -> None:
    """A folder beside the source's documents. Raises ValueError where it is not the source, quantized."""
    found = {}
    for name, tensor in tensors.items():
        found |= {ours: part.detach().float().contiguous().clone() for ours, part in renamed(name, tensor)}
    expected = shapes(source)
    if {name: tuple(tensor.shape) for name, tensor in found.items()} != expected:
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(f"not the source's tensors; missing {missing[:5]}, unexpected {extra[:5]}, or shapes differ")
    for name, tensor in found.items():
        if LINEAR.search(name) and (most := values(tensor)) > 2**BITS:
            raise ValueError(f"{name}: a group has {most} values; it was not quantized")
    out.mkdir(parents=True, exist_ok=True)
    for document in BESIDE:
        if (source / document).exists():
            shutil.copy(source / document, out / document)
    config = json.loads((source / "config.json").read_text("utf-8"))
    config.pop("dtype", None)
    (out / "config.json").write_text(json.dumps({**config, "torch_dtype": "float32"}, indent=1), "utf-8")
    save_file(found, out / "model.safetensors", metadata={"format": "pt"})


def renamed(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """By legacy names: `mlp` is block_sparse_moe, experts are their own linears, [out, in] each."""
    name = name.replace(".mlp.", ".block_sparse_moe.")
    if fused := re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name):
        parts = [("w1", "w3") if fused[2] == "gate_up_proj" else ("w2",)] * len(tensor)
        return [
            (f"{fused[1]}.{expert}.{role}.weight", part)
            for expert, roles in enumerate(parts)
            for role, part in zip(roles, tensor[expert].chunk(len(roles)), strict=True)
        ]
    return [(re.sub(r"(experts\.\d+\.)(\w+_proj)", lambda m: m[1] + LEGACY[m[2]], name), tensor)]


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def values(weight: Tensor) -> int:
    """How many different ones the richest group has: [out, in], groups along in. Differences of rounding count once."""
    groups = weight.reshape(-1, GROUP).double()
    step = (groups.amax(1) - groups.amin(1)).clamp(min=1e-30) / (2**BITS - 1)
    ordered = groups.sort(1).values
    return int((ordered.diff(dim=1) > step[:, None] * 1e-2).sum(1).max()) + 1


def unpack(packed: Tensor, bits: int = BITS) -> Tensor:
    """int32 [rows, n] -> codes [rows, n·32/bits], low bits first."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    codes = (packed[..., None] >> shifts) & (2**bits - 1)
    return codes.reshape(len(packed), -1)
