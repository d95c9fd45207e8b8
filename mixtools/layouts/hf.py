"""Hugging Face's names: layouts D (safetensors), E (older, pickled) and F (transformers 5, fused experts).

Experts have had four spellings: Mistral's w1, w2, w3; the same below `mlp`, as transformers 5 renames on its way in;
gate_proj, down_proj, up_proj there, which transformers 5 has in memory and GPTQModel writes, an expert at a time; and
these below `block_sparse_moe`, as llm-compressor and AutoRound write them.
"""

from __future__ import annotations

from ..names import Role
from .table import Layout, Rule

_ROOT = "model."
_LAYER = _ROOT + "layers.{layer}."
_MLP = _LAYER + "mlp."
_COMMON = {
    Role.EMBED: Rule(_ROOT + "embed_tokens.weight"),
    Role.ATTENTION_NORM: Rule(_LAYER + "input_layernorm.weight"),
    Role.Q: Rule(_LAYER + "self_attn.q_proj.weight"),
    Role.K: Rule(_LAYER + "self_attn.k_proj.weight"),
    Role.V: Rule(_LAYER + "self_attn.v_proj.weight"),
    Role.O: Rule(_LAYER + "self_attn.o_proj.weight"),
    Role.FFN_NORM: Rule(_LAYER + "post_attention_layernorm.weight"),
    Role.NORM: Rule(_ROOT + "norm.weight"),
    Role.HEAD: Rule("lm_head.weight"),
}
_PLAIN = {
    **_COMMON,
    Role.ROUTER: Rule(_LAYER + "block_sparse_moe.gate.weight"),
    Role.GATE: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w1.weight"),
    Role.DOWN: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w2.weight"),
    Role.UP: Rule(_LAYER + "block_sparse_moe.experts.{expert}.w3.weight"),
}
_MIXED = {
    **_COMMON,
    Role.ROUTER: Rule(_MLP + "gate.weight"),
    Role.GATE: Rule(_MLP + "experts.{expert}.w1.weight"),
    Role.DOWN: Rule(_MLP + "experts.{expert}.w2.weight"),
    Role.UP: Rule(_MLP + "experts.{expert}.w3.weight"),
}
_V5 = {
    **_COMMON,
    Role.ROUTER: Rule(_MLP + "gate.weight"),
    Role.GATE: Rule(_MLP + "experts.{expert}.gate_proj.weight"),
    Role.DOWN: Rule(_MLP + "experts.{expert}.down_proj.weight"),
    Role.UP: Rule(_MLP + "experts.{expert}.up_proj.weight"),
}
_HYBRID = {
    **_COMMON,
    Role.ROUTER: Rule(_LAYER + "block_sparse_moe.gate.weight"),
    Role.GATE: Rule(_LAYER + "block_sparse_moe.experts.{expert}.gate_proj.weight"),
    Role.DOWN: Rule(_LAYER + "block_sparse_moe.experts.{expert}.down_proj.weight"),
    Role.UP: Rule(_LAYER + "block_sparse_moe.experts.{expert}.up_proj.weight"),
}
_FUSED = {
    **_COMMON,
    Role.ROUTER: Rule(_MLP + "gate.weight"),
    Role.GATE: Rule(_MLP + "experts.gate_up_proj", stack=2, part=0),
    Role.UP: Rule(_MLP + "experts.gate_up_proj", stack=2, part=1),
    Role.DOWN: Rule(_MLP + "experts.down_proj", stack=1),
}
_BUFFERS = ("rotary_emb.inv_freq",)

HF = Layout("D", "hf", "Hugging Face (safetensors)", _PLAIN, _BUFFERS, _ROOT)
HF_MIXED = Layout("D", "hf-mixed", "Hugging Face (experts as mlp.experts.X.w1)", _MIXED, _BUFFERS, _ROOT)
HF_V5 = Layout("D", "hf-v5", "Hugging Face (experts as mlp.experts.X.gate_proj)", _V5, _BUFFERS, _ROOT)
HF_HYBRID = Layout(
    "D", "hf-hybrid", "Hugging Face (experts as block_sparse_moe.experts.X.gate_proj)", _HYBRID, _BUFFERS, _ROOT
)
HF_BIN = Layout("E", "hf-bin", "older Hugging Face (pytorch_model.bin)", _PLAIN, _BUFFERS, _ROOT)
HF_FUSED = Layout("F", "hf-fused", "Hugging Face, transformers 5 (fused experts)", _FUSED, _BUFFERS, _ROOT)
