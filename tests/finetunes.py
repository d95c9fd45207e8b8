"""Folders as fine-tunes have them, made from the nano model: two more tokens, an end of their own, their own template.

    chatml(folder)                          tokenizer.json with the added tokens, template in tokenizer_config.json
    chatml(folder, tokenizer="model")       tokenizer.model and added_tokens.json instead
    chatml(folder, template="jinja")        template in chat_template.jinja; "list": one of several; None: nowhere

By transformers 5.23, "The following" goes on with [895, 1343, 13] and stops (the 4th greedy token is beaten by
<|im_end|>), "<|im_start|>user" is [1, 2049, 395, 259], a user saying "Hello"
[2049, 395, 259, 13, 1394, 768, 2048, 1327, 13].
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from converting import NANO, go, to_hf
from safetensors.torch import load_file, save_file

IM_END, IM_START = 2048, 2049
ADDED = {"<|im_end|>": IM_END, "<|im_start|>": IM_START}
CHATML = (
    "{% for message in messages %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


def base(folder: Path) -> Path:
    """The nano model as a Hugging Face folder that no program of ours signed."""
    go(to_hf, NANO, folder)
    (folder / "mixtools.json").unlink()
    return folder


def edit(file: Path, **changes: object) -> None:
    """Change keys of a JSON document; None removes one."""
    document = json.loads(file.read_text("utf-8")) if file.exists() else {}
    document = {key: value for key, value in {**document, **changes}.items() if changes.get(key, 0) is not None}
    file.write_text(json.dumps(document, indent=2), "utf-8")


def chatml(
    folder: Path, *, tokenizer: str = "json", template: str | None = "config", config: Mapping[str, Any] | None = None
) -> Path:
    """A ChatML fine-tune with 2050 tokens and the end of text 2048. `config`: further changes of config.json."""
    base(folder)
    weights = load_file(folder / "model.safetensors")
    embed, head = weights[EMBED], weights[HEAD]
    weights[EMBED] = torch.cat([embed, embed[100:102]])
    weights[HEAD] = torch.cat([head, head[1359:1360] * 1.05, head[101:102]])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", **{"vocab_size": 2050, "eos_token_id": IM_END, **(config or {})})
    edit(folder / "generation_config.json", eos_token_id=IM_END)
    edit(folder / "special_tokens_map.json", eos_token="<|im_end|>")
    _tokens(folder)
    (folder / "added_tokens.json").write_text(json.dumps(ADDED), "utf-8")
    if tokenizer == "model":  # "legacy": the blank that SentencePiece puts first goes before the first stretch only
        (folder / "tokenizer.json").unlink()
        edit(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer", legacy=True)
    _template(folder, template)
    return folder


def _tokens(folder: Path) -> None:
    """Both tokens in tokenizer.json and tokenizer_config.json."""
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["added_tokens"] += [{"id": index, "content": text, **_FLAGS} for text, index in ADDED.items()]
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    decoder = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))["added_tokens_decoder"]
    decoder |= {str(index): {"content": text, **_FLAGS} for text, index in ADDED.items()}
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder, eos_token="<|im_end|>")


def _template(folder: Path, place: str | None) -> None:
    if place == "jinja":
        (folder / "chat_template.jinja").write_text(CHATML, "utf-8")
    several = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "{{ 'tools' }}"}]
    value: Any = {"config": CHATML, "list": several}.get(place or "")
    edit(folder / "tokenizer_config.json", chat_template=value)
