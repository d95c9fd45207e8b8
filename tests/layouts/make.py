"""Tiny Mixtrals in every layout, by the format's description and the libraries that others wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file

from mixtools.layouts.checkpoint import Checkpoint
from mixtools.names import Role, Slot

Tensors = dict[str, torch.Tensor]
INDEX = "model.safetensors.index.json"
HF_NAMES = {  # of canonical tensors, spelled out once more
    Role.EMBED: "model.embed_tokens.weight", Role.NORM: "model.norm.weight", Role.HEAD: "lm_head.weight",
    Role.ATTENTION_NORM: "model.layers.{0}.input_layernorm.weight",
    Role.FFN_NORM: "model.layers.{0}.post_attention_layernorm.weight",
    Role.Q: "model.layers.{0}.self_attn.q_proj.weight", Role.K: "model.layers.{0}.self_attn.k_proj.weight",
    Role.V: "model.layers.{0}.self_attn.v_proj.weight", Role.O: "model.layers.{0}.self_attn.o_proj.weight",
    Role.ROUTER: "model.layers.{0}.block_sparse_moe.gate.weight",
    Role.GATE: "model.layers.{0}.block_sparse_moe.experts.{1}.w1.weight",
    Role.DOWN: "model.layers.{0}.block_sparse_moe.experts.{1}.w2.weight",
    Role.UP: "model.layers.{0}.block_sparse_moe.experts.{1}.w3.weight",
}  # fmt: skip


class Dims(NamedTuple):
    """The default is odd wherever a Mixtral may be odd, with one key-value head and the least head size."""

    d: int = 7
    f: int = 10
    layers: int = 2
    heads: int = 3
    kv: int = 1
    hd: int = 2
    vocab: int = 11
    experts: int = 3

    def params(self) -> dict[str, Any]:
        """params.json as the torrent has it: without rope_theta."""
        return {
            "dim": self.d, "n_layers": self.layers, "head_dim": self.hd, "hidden_dim": self.f, "n_heads": self.heads,
            "n_kv_heads": self.kv, "norm_eps": 1e-5, "vocab_size": self.vocab,
            "moe": {"num_experts_per_tok": 2, "num_experts": self.experts},
        }  # fmt: skip

    def config(self) -> dict[str, Any]:
        """config.json as transformers 4 writes it."""
        return {
            "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": self.d,
            "intermediate_size": self.f, "num_hidden_layers": self.layers, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv, "head_dim": self.hd, "vocab_size": self.vocab, "rms_norm_eps": 1e-5,
            "num_local_experts": self.experts, "num_experts_per_tok": 2, "rope_theta": 1e6, "torch_dtype": "bfloat16",
            "max_position_embeddings": 32768,
        }  # fmt: skip


ODD = Dims()
NANO = Dims(d=256, f=256, layers=2, heads=4, kv=2, hd=64, vocab=2048, experts=8)


def torrent(dims: Dims, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A random model under the torrent's names."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    d, f, q, kv = dims.d, dims.f, dims.heads * dims.hd, dims.kv * dims.hd
    found = {"tok_embeddings.weight": weight(dims.vocab, d)}
    for layer in range(dims.layers):
        at = f"layers.{layer}."
        shapes = {"attention.wq": (q, d), "attention.wk": (kv, d), "attention.wv": (kv, d), "attention.wo": (d, q)}
        shapes |= {"attention_norm": (d,), "ffn_norm": (d,), "feed_forward.gate": (dims.experts, d)}
        for x in range(dims.experts):
            experts = f"feed_forward.experts.{x}."
            shapes |= {experts + "w1": (f, d), experts + "w2": (d, f), experts + "w3": (f, d)}
        found |= {f"{at}{name}.weight": weight(*shape) for name, shape in shapes.items()}
    return found | {"norm.weight": weight(d), "output.weight": weight(dims.vocab, d)}


def stacked(tensors: Tensors, dims: Dims) -> Tensors:
    """Layout B's names: experts folded into the rows, each w2 transposed."""
    found = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            found[name.replace("feed_forward", "block_sparse_moe")] = tensor
    for layer in range(dims.layers):
        for w in ("w1", "w2", "w3"):
            parts = [tensors[f"layers.{layer}.feed_forward.experts.{x}.{w}.weight"] for x in range(dims.experts)]
            parts = [part.T for part in parts] if w == "w2" else parts
            found[f"layers.{layer}.block_sparse_moe.{w}"] = torch.cat(parts).contiguous()
    return found


def hf(tensors: Tensors, dims: Dims) -> Tensors:
    """Canonical tensors under Hugging Face's names."""
    names = {
        "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
        "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
    }  # fmt: skip
    found = {}
    for name, tensor in tensors.items():
        short = name.removesuffix(".weight")
        if short in names:
            found[names[short] + ".weight"] = tensor
            continue
        _, layer, rest = short.split(".", 2)
        if rest in ("attention.wq", "attention.wk"):
            heads = dims.heads if rest.endswith("q") else dims.kv
            found[f"model.layers.{layer}.{names[rest]}.weight"] = (
                tensor.view(heads, dims.hd // 2, 2, dims.d).transpose(1, 2).reshape(heads * dims.hd, dims.d)
            )
            continue
        new = names.get(rest) or rest.replace("feed_forward", "block_sparse_moe")
        found[f"model.layers.{layer}.{new}.weight"] = tensor.contiguous()
    return found


def fused(canonical: Tensors, dims: Dims) -> Tensors:
    """Layout F's names, from canonical tensors: gate_up_proj holds w1's rows, then w3's."""
    found = {name.replace("block_sparse_moe", "mlp"): t for name, t in canonical.items() if ".experts." not in name}
    for layer in range(dims.layers):
        at = f"model.layers.{layer}."
        w1, w2, w3 = (
            [canonical[f"{at}block_sparse_moe.experts.{x}.{w}.weight"] for x in range(dims.experts)]
            for w in ("w1", "w2", "w3")
        )
        pairs = [torch.cat(pair) for pair in zip(w1, w3, strict=True)]
        found |= {at + "mlp.experts.gate_up_proj": torch.stack(pairs), at + "mlp.experts.down_proj": torch.stack(w2)}
    return found


def write_json(path: Path, document: object) -> None:
    path.write_text(json.dumps(document))


def write_a(folder: Path, dims: Dims = ODD, tensors: Tensors | None = None, **options: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", dims.params())
    torch.save(torrent(dims) if tensors is None else tensors, folder / "consolidated.00.pth", **options)
    return folder


def write_split(folder: Path, dims: Dims = ODD, tensors: Tensors | None = None, parts: int = 11) -> Path:
    raw = (write_a(folder, dims, tensors) / "consolidated.00.pth").read_bytes()
    (folder / "consolidated.00.pth").unlink()
    size = -(-len(raw) // parts)
    for part in range(parts):
        (folder / f"consolidated.00.pth-split{part}").write_bytes(raw[part * size : (part + 1) * size])
    return folder


def write_b(folder: Path, dims: Dims = ODD, tensors: Tensors | None = None, files: int = 8, turn: int = 0) -> Path:
    """Tensors dealt over `files` files like cards, beginning with file `turn`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", dims.params())
    found = stacked(torrent(dims) if tensors is None else tensors, dims)
    for file in range(files):
        mine = {name: tensor for i, (name, tensor) in enumerate(found.items()) if (i + turn) % files == file}
        torch.save(mine, folder / f"consolidated.{file:02}.pt")
    return folder


def write_c(folder: Path, dims: Dims = ODD, tensors: Tensors | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "params.json", dims.params())
    save_file(torrent(dims) if tensors is None else tensors, folder / "consolidated.safetensors")
    return folder


def shard(tensors: Tensors, stem: str, suffix: str, files: int) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Tensors by file name, dealt like cards, and the index document."""
    shards: dict[str, Tensors] = {f"{stem}-{i:05}-of-{files:05}.{suffix}": {} for i in range(1, files + 1)}
    names = list(shards)
    weight_map = {name: names[i % files] for i, name in enumerate(tensors)}
    for name, file in weight_map.items():
        shards[file][name] = tensors[name]
    total = sum(tensor.nbytes for tensor in tensors.values())
    return shards, {"metadata": {"total_size": total}, "weight_map": weight_map}


def write_hf(folder: Path, tensors: Tensors, dims: Dims = ODD, files: int = 3) -> Path:
    """Layout D or F, by the names of `tensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dims.config())
    shards, index = shard(tensors, "model", "safetensors", files)
    for name, mine in shards.items():
        save_file(mine, folder / name, metadata={"format": "pt"})
    write_json(folder / INDEX, index)
    return folder


def write_e(folder: Path, tensors: Tensors, dims: Dims = ODD, files: int = 3) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", dims.config())
    shards, index = shard(tensors, "pytorch_model", "bin", files)
    for name, mine in shards.items():
        torch.save(mine, folder / name)
    write_json(folder / "pytorch_model.bin.index.json", index)
    return folder


def hf_name(slot: Slot) -> str:
    return HF_NAMES[slot.role].format(slot.layer, slot.expert)


def read_all(checkpoint: Checkpoint) -> Tensors:
    """Every slot as read, under Hugging Face's name."""
    return {hf_name(slot): checkpoint.read(slot) for slot in checkpoint.slots()}


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape), name
        assert other.is_contiguous(), name
        assert bits(other) == bits(tensor), name


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
