"""Hugging Face's names: layouts D (safetensors), E (older, pickled) and F (transformers 5, fused experts)."""

from __future__ import annotations

from ..names import Role
from .table import Layout, Rule

_LAYER = "model.layers.{layer}."
_COMMON = {
    Role.EMBED: Rule("model.embed_tokens.weight"),
    Role.ATTENTION_NORM: Rule(_LAYER + "input_layernorm.weight"),
    Role.Q: Rule(_LAYER + "self_attn.q_proj.weight"),
    Role.K: Rule(_LAYER + "self_attn.k_proj.weight"),
    Role.V: Rule(_LAYER + "self_attn.v_proj.weight"),
    Role.O: Rule(_LAYER + "self_attn.o_proj.weight"),
    Role.FFN_NORM: Rule(_LAYER + "post_attention_layernorm.weight"),
    Role.NORM: Rule("model.norm.weight"),
    Role.HEAD: Rule("lm_head.weight"),
}
_PLAIN = {
    **_COMMON,
    Role.ROUTER: Rule(_LAYER + "block_sparse_moe.gate.weight"),
    Role.GATE: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w1.weight"),
    Role.DOWN: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w2.weight"),
    Role.UP: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w3.weight"),
}
_FUSED = {
    **_COMMON,
    Role.ROUTER: Rule(_LAYER + "mlp.gate.weight"),
    Role.GATE: Rule(_LAYER + "mlp.experts.gate_up_proj", stack=2, part=0),
    Role.UP: Rule(_LAYER + "mlp.experts.gate_up_proj", stack=2, part=1),
    Role.DOWN: Rule(_LAYER + "mlp.experts.down_proj", stack=1),
}
_BUFFERS = ("rotary_emb.inv_freq",)

HF = Layout("D", "hf", "Hugging Face (safetensors)", _PLAIN, _BUFFERS)
HF_BIN = Layout("E", "hf-bin", "older Hugging Face (pytorch_model.bin)", _PLAIN, _BUFFERS)
HF_FUSED = Layout("F", "hf-fused", "Hugging Face, transformers 5 (fused experts)", _FUSED, _BUFFERS)
