"""Mistral's own names: layouts A (torrent), A' (split), C (consolidated safetensors), and B (stacked experts)."""

from __future__ import annotations

from ..names import Role
from .table import Layout, Op, Rule

_COMMON = {
    Role.EMBED: Rule("tok_embeddings.weight"),
    Role.ATTENTION_NORM: Rule("layers.{layer}.attention_norm.weight"),
    Role.Q: Rule("layers.{layer}.attention.wq.weight", Op.ROTARY),
    Role.K: Rule("layers.{layer}.attention.wk.weight", Op.ROTARY),
    Role.V: Rule("layers.{layer}.attention.wv.weight"),
    Role.O: Rule("layers.{layer}.attention.wo.weight"),
    Role.FFN_NORM: Rule("layers.{layer}.ffn_norm.weight"),
    Role.NORM: Rule("norm.weight"),
    Role.HEAD: Rule("output.weight"),
}
_PLAIN = {
    **_COMMON,
    Role.ROUTER: Rule("layers.{layer}.feed_forward.gate.weight"),
    Role.GATE: Rule("layers.{layer}.feed_forward.experts.{expert}.w1.weight"),
    Role.DOWN: Rule("layers.{layer}.feed_forward.experts.{expert}.w2.weight"),
    Role.UP: Rule("layers.{layer}.feed_forward.experts.{expert}.w3.weight"),
}
_STACKED = {
    **_COMMON,
    Role.ROUTER: Rule("layers.{layer}.block_sparse_moe.gate.weight"),
    Role.GATE: Rule("layers.{layer}.block_sparse_moe.w1", stack=1, folded=True),
    # the stored slice is [F, D]: a reshape to [D, F] would pass every shape check and be wrong
    Role.DOWN: Rule("layers.{layer}.block_sparse_moe.w2", Op.TRANSPOSE, stack=1, folded=True),
    Role.UP: Rule("layers.{layer}.block_sparse_moe.w3", stack=1, folded=True),
}

_BUFFERS = ("rope.freqs",)

TORRENT = Layout("A", "torrent", "original torrent (consolidated.00.pth)", _PLAIN, _BUFFERS)
SPLIT = Layout("A'", "torrent-split", "mirrored torrent (consolidated.00.pth-split*)", _PLAIN, _BUFFERS)
STACKED = Layout("B", "stacked", "December 2023 repository (consolidated.*.pt, stacked experts)", _STACKED, _BUFFERS)
CONSOLIDATED = Layout("C", "consolidated", "consolidated safetensors", _PLAIN, _BUFFERS)
