"""What the model is held against: the nano model read by a path of its own, and transformers' Mixtral."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from mixtools.config import MixtralConfig, from_document, load_json
from mixtools.layouts.memory import MemoryReader
from mixtools.layouts.reader import Reader
from mixtools.names import Role, Slot

DATA = Path(__file__).parent / "data"
NANO = DATA / "nano-mixtral"

# head size other than D/H and one expert a token; as many key-value heads as heads; a single key-value head
SHAPES = {
    "top1": MixtralConfig(48, 40, 2, 4, 2, 16, 97, num_experts=4, experts_per_token=1),
    "top3": MixtralConfig(64, 24, 2, 4, 4, 16, 50, num_experts=8, experts_per_token=3, rope_theta=1e4),
    "mqa": MixtralConfig(40, 96, 3, 6, 1, 8, 64, num_experts=3, rms_norm_eps=1e-6),
}


def read_nano() -> MemoryReader:
    """torch.load and the torrent's names, spelled out here."""
    config = from_document(load_json(NANO / "params.json"), NANO / "params.json")
    stored = torch.load(NANO / "consolidated.00.pth", weights_only=True)
    names = {
        Role.EMBED: "tok_embeddings", Role.NORM: "norm", Role.HEAD: "output",
        Role.ATTENTION_NORM: "layers.{0}.attention_norm", Role.FFN_NORM: "layers.{0}.ffn_norm",
        Role.Q: "layers.{0}.attention.wq", Role.K: "layers.{0}.attention.wk",
        Role.V: "layers.{0}.attention.wv", Role.O: "layers.{0}.attention.wo",
        Role.ROUTER: "layers.{0}.feed_forward.gate", Role.GATE: "layers.{0}.feed_forward.experts.{1}.w1",
        Role.DOWN: "layers.{0}.feed_forward.experts.{1}.w2", Role.UP: "layers.{0}.feed_forward.experts.{1}.w3",
    }  # fmt: skip
    tensors = {}
    for slot in config.slots():
        weight = stored[names[slot.role].format(slot.layer, slot.expert) + ".weight"]
        if slot.role in (Role.Q, Role.K):  # from interleaved pairs to halves
            pairs = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        tensors[slot] = weight
    return MemoryReader(config, tensors)


def transformers_model(reader: Reader, dtype: torch.dtype = torch.float32) -> transformers.MixtralForCausalLM:
    """The same weights in transformers. Parameters alone are cast: casting the rotary table too changes logits."""
    config = transformers.MixtralConfig(**reader.config.to_hf("float32"), attn_implementation="sdpa")
    model = transformers.MixtralForCausalLM(config).eval()
    names = {
        Role.EMBED: "model.embed_tokens", Role.NORM: "model.norm", Role.HEAD: "lm_head",
        Role.ATTENTION_NORM: "input_layernorm", Role.FFN_NORM: "post_attention_layernorm",
        Role.Q: "self_attn.q_proj", Role.K: "self_attn.k_proj", Role.V: "self_attn.v_proj", Role.O: "self_attn.o_proj",
        Role.ROUTER: "mlp.gate",
    }  # fmt: skip
    state = {}
    for slot in reader.slots():
        if slot.expert is None:
            prefix = "" if slot.layer is None else f"model.layers.{slot.layer}."
            state[f"{prefix}{names[slot.role]}.weight"] = reader.read(slot)
    experts = range(reader.config.num_experts)
    for layer in range(reader.config.num_layers):
        both = [torch.cat([reader.read(Slot(role, layer, e)) for role in (Role.GATE, Role.UP)]) for e in experts]
        state[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.stack(both)
        down = [reader.read(Slot(Role.DOWN, layer, e)) for e in experts]
        state[f"model.layers.{layer}.mlp.experts.down_proj"] = torch.stack(down)
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, strict=True)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def greedy(reader: Reader, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
    """What transformers continues each prompt with, one by one, each by a model that has seen no other text."""
    how = transformers.GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=2, pad_token_id=0)
    found = []
    for prompt in prompts:
        row = torch.tensor([prompt])
        new = transformers_model(reader).generate(row, attention_mask=torch.ones_like(row), generation_config=how)
        found.append(new[0, len(prompt) :].tolist())
    return found


def of_range(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the range of what was expected."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))
