"""GGUF's names: G (experts stacked, since April 2024) and G' (a tensor an expert, December 2023 to then).

Rows of q and k lie as in the torrent, rotary pairs adjacent: llama.cpp rotates neighbours. Source: tensor_mapping.py
and constants.py of gguf-py in https://github.com/ggml-org/llama.cpp; the old names are those of its commit 799a1cb.
"""

from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ..names import Role
from ..storage.gguf_values import Metadata, to_json
from .gguf_config import file_type_name, text
from .table import Layout, Op, Rule

KEPT = "gguf-metadata.json"  # beside what is made of a GGUF: all that it says and no other document has a place for
_ELSEWHERE = ("split.", "general.alignment", "tokenizer.ggml.tokens", "tokenizer.ggml.scores",
              "tokenizer.ggml.token_type", "tokenizer.ggml.merges", "tokenizer.chat_template")  # fmt: skip

_BLOCK = "blk.{layer}."
_COMMON = {
    Role.EMBED: Rule("token_embd.weight"),
    Role.ATTENTION_NORM: Rule(_BLOCK + "attn_norm.weight"),
    Role.Q: Rule(_BLOCK + "attn_q.weight", Op.ROTARY),
    Role.K: Rule(_BLOCK + "attn_k.weight", Op.ROTARY),
    Role.V: Rule(_BLOCK + "attn_v.weight"),
    Role.O: Rule(_BLOCK + "attn_output.weight"),
    Role.FFN_NORM: Rule(_BLOCK + "ffn_norm.weight"),
    Role.ROUTER: Rule(_BLOCK + "ffn_gate_inp.weight"),
    Role.NORM: Rule("output_norm.weight"),
    Role.HEAD: Rule("output.weight"),
}
_STACKED = {
    **_COMMON,
    Role.GATE: Rule(_BLOCK + "ffn_gate_exps.weight", stack=1),
    Role.DOWN: Rule(_BLOCK + "ffn_down_exps.weight", stack=1),
    Role.UP: Rule(_BLOCK + "ffn_up_exps.weight", stack=1),
}
_EACH = {
    **_COMMON,
    Role.GATE: Rule(_BLOCK + "ffn_gate.{expert}.weight"),
    Role.DOWN: Rule(_BLOCK + "ffn_down.{expert}.weight"),
    Role.UP: Rule(_BLOCK + "ffn_up.{expert}.weight"),
}

GGUF = Layout("G", "gguf", "GGUF", _STACKED)
GGUF_2023 = Layout("G'", "gguf-2023", "GGUF of before April 2024 (a tensor an expert)", _EACH)


@dataclass(eq=False)
class About:
    """What a GGUF says beside its weights. `document`: the config.json that its metadata stand for."""

    file: Path
    metadata: Metadata
    document: Mapping[str, Any]

    @property
    def file_type(self) -> str:
        """Q4_K_M, as the file calls itself."""
        value = self.metadata.get("general.file_type")
        return file_type_name(value.value if value is not None else None)

    @property
    def has_tokenizer(self) -> bool:
        """Whether it tells of one, right or wrong."""
        keys = [key for key in self.metadata if key.startswith("tokenizer.")]
        return bool(keys) and text(self.metadata, "tokenizer.ggml.model") not in ("none", "no_vocab")

    @cached_property
    def folder(self) -> Path:
        """A temporary folder of the documents that a folder of Hugging Face's has; it goes with this object.

        Raises TokenizerError for a vocabulary that cannot be, as from_gguf.documents does.
        """
        from ..text.from_gguf import documents

        files = documents(self.metadata, self.file) if self.has_tokenizer else {}
        folder = Path(mkdtemp(prefix="mixtools-gguf-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        rest = {key: value for key, value in self.metadata.items() if not key.startswith(_ELSEWHERE)}
        files |= {"config.json": json.dumps(self.document, indent=2).encode(), KEPT: to_json(rest)}
        for name, data in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(data)
        return folder
