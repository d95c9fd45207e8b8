"""Folders of quantized Mixtrals as other programs write them, packed here value by value, in plain loops.

    Model(tmp / "gptq", Kind.GPTQ).write()            auto-gptq's names and documents
    ...(spelling="v5")                                GPTQModel's expert names

`dense` holds what each matrix stands for: (code - zero) * scale in fp16, as the packages compute it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from layouts import make
from safetensors.torch import save_file

DIMS = make.Dims(d=64, f=96, layers=2, heads=4, kv=2, hd=16, vocab=40, experts=3)
GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
V5 = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def words(codes: list[int], bits: int) -> list[int]:
    """Codes as signed 32-bit words, low bits first."""
    long = sum(code << bits * at for at, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    return [((long >> 32 * at & 0xFFFFFFFF) ^ 1 << 31) - (1 << 31) for at in range(count)]


def packed(codes: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """Along one dimension of a matrix."""
    lines = codes if dim == 1 else codes.T
    found = torch.tensor([words(line, bits) for line in lines.tolist()], dtype=torch.int32)
    return (found if dim == 1 else found.T).contiguous()


def awq(codes: torch.Tensor) -> torch.Tensor:
    """[in, out] -> [in, out / 8] in AWQ's order."""
    at = [8 * block + AWQ_ORDER[place] for block in range(codes.shape[1] // 8) for place in range(8)]
    return packed(codes[:, at], 4, 1)


@dataclass(frozen=True)
class Grid:
    """A matrix [out, in] on a grid: codes [out, in], scales and zeros [out, groups], the group of each column."""

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    index: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, bits: int, group: int, *, symmetric: bool, shuffled: bool = False) -> Grid:
        columns = weight.shape[1]
        length = columns if group == -1 else group
        index = torch.arange(columns) // length
        if shuffled:
            index = index[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        groups = int(index.max()) + 1
        wide, most = weight.float(), (1 << bits) - 1
        low = torch.stack([wide[:, index == g].amin(1) for g in range(groups)], 1)
        high = torch.stack([wide[:, index == g].amax(1) for g in range(groups)], 1)
        if symmetric:
            high = torch.maximum(high, -low)
            low = -high
        scales = ((high - low) / most).clamp(min=1e-4).half()
        zeros = (-low / scales.float()).round().clamp(1, most)
        zeros = torch.full_like(zeros, 1 << bits - 1) if symmetric else zeros
        codes = (wide / scales.float()[:, index] + zeros[:, index]).round().clamp(0, most)
        return cls(bits, codes.long(), scales, zeros.long(), index)

    @property
    def dense(self) -> torch.Tensor:
        return self.scales[:, self.index] * (self.codes - self.zeros[:, self.index]).half()

    def gptq(self, minus: int = 1) -> dict[str, torch.Tensor]:
        return {
            "qweight": packed(self.codes.T, self.bits, 0), "qzeros": packed(self.zeros.T - minus, self.bits, 1),
            "scales": self.scales.T.contiguous(), "g_idx": self.index.int(),
        }  # fmt: skip

    def awq(self) -> dict[str, torch.Tensor]:
        return {"qweight": awq(self.codes.T), "qzeros": awq(self.zeros.T), "scales": self.scales.T.contiguous()}

    def compressed(self, *, symmetric: bool) -> dict[str, torch.Tensor]:
        zeros = {} if symmetric else {"weight_zero_point": packed(self.zeros, self.bits, 0)}
        return {
            "weight_packed": packed(self.codes, self.bits, 1), "weight_scale": self.scales, **zeros,
            "weight_shape": torch.tensor(self.codes.shape),
        }  # fmt: skip


Parts = Callable[[Grid], dict[str, torch.Tensor]]


@dataclass
class Model:
    """A random one in `kind`: "gptq", "awq" or "compressed-tensors"; `about` replaces keys of its description.

    `spelling`: "legacy", "v5" or "hybrid". `dense`: tensors as a reader must see them, by the names of make.HF_NAMES.
    """

    kind: str = "gptq"
    bits: int = 4
    group: int = GROUP
    symmetric: bool = True
    shuffled: bool = False
    spelling: str = "legacy"
    about: Mapping[str, Any] = field(default_factory=dict)
    dims: make.Dims = DIMS
    stored: dict[str, torch.Tensor] = field(default_factory=dict)
    dense: dict[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, tensor in make.hf(make.torrent(self.dims), self.dims).items():
            if not name.startswith("model.layers.") or tensor.ndim < 2 or name.endswith(".gate.weight"):
                self.dense[name] = self.stored[self.spelled(name)] = tensor.half()
                continue
            grid = Grid.of(tensor, self.bits, self.group, symmetric=self.symmetric, shuffled=self.shuffled)
            self.dense[name] = grid.dense
            stem = self.spelled(name).removesuffix("weight")
            self.stored |= {stem + suffix: part for suffix, part in self.parts(grid).items()}

    def parts(self, grid: Grid) -> dict[str, torch.Tensor]:
        if self.kind == "gptq":
            return grid.gptq(0 if self.about.get("checkpoint_format") == "gptq_v2" else 1)
        return grid.awq() if self.kind == "awq" else grid.compressed(symmetric=self.symmetric)

    def spelled(self, name: str) -> str:
        if self.spelling == "v5":
            name = name.replace("block_sparse_moe", "mlp")
        if self.spelling != "legacy":
            for old, new in V5.items():
                name = name.replace(f".{old}.", f".{new}.")
        return name

    @property
    def quantization(self) -> dict[str, Any]:
        """As each package writes it."""
        if self.kind == "gptq":
            told = {
                "bits": self.bits, "group_size": self.group, "desc_act": self.shuffled, "sym": self.symmetric,
                "damp_percent": 0.01, "true_sequential": True, "static_groups": False, "quant_method": "gptq",
                "checkpoint_format": "gptq", "model_name_or_path": None, "model_file_base_name": None,
            }  # fmt: skip
        elif self.kind == "awq":
            told = {
                "quant_method": "awq", "zero_point": not self.symmetric, "group_size": self.group, "bits": 4,
                "version": "gemm", "modules_to_not_convert": ["gate"],
            }  # fmt: skip
        else:
            weights = {
                "num_bits": self.bits, "type": "int", "symmetric": self.symmetric, "strategy": "group",
                "group_size": self.group, "actorder": None, "dynamic": False,
            }  # fmt: skip
            if self.group == -1:
                weights |= {"strategy": "channel", "group_size": None}
            routers = [f"model.layers.{i}.block_sparse_moe.gate.weight" for i in range(self.dims.layers)]
            told = {
                "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
                "ignore": [*(self.spelled(name).removesuffix(".weight") for name in routers), "lm_head"],
            }  # fmt: skip
        return {**told, **self.about}

    def write(
        self, folder: Path, file: str = "model.safetensors", *, beside: bool = False, inside: bool = True
    ) -> Path:
        """`inside`: config.json tells of the quantization; `beside`: the package's own document does."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.stored, folder / file, {"format": "pt"})
        config = {**self.dims.config(), "torch_dtype": "float16"}
        told = {"quantization_config": self.quantization} if inside else {}
        make.write_json(folder / "config.json", {**config, **told})
        if beside:
            name = "quant_config.json" if self.kind == "awq" else "quantize_config.json"
            make.write_json(folder / name, self.quantization)
        return folder

    def write_shards(self, folder: Path, shards: int = 3) -> Path:
        self.write(folder)
        (folder / "model.safetensors").unlink()
        names = sorted(self.stored)
        weight_map = {}
        for at in range(shards):
            file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
            mine = names[at::shards]
            save_file({name: self.stored[name] for name in mine}, folder / file, {"format": "pt"})
            weight_map |= dict.fromkeys(mine, file)
        index = {"metadata": {"total_size": 1, "made_by": "another"}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / make.INDEX).write_text(json.dumps(index), "utf-8")
        return folder
