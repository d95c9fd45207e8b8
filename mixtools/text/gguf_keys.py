"""Names that both ways between a folder's tokenizer and a GGUF's share.

Keys and numbers: gguf-py/gguf/constants.py of https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

MODEL = "tokenizer.ggml.model"
PRE = "tokenizer.ggml.pre"
TOKENS = "tokenizer.ggml.tokens"
SCORES = "tokenizer.ggml.scores"
KINDS = "tokenizer.ggml.token_type"  # pieces.Kind has the same numbers
MERGES = "tokenizer.ggml.merges"
ADD_BOS = "tokenizer.ggml.add_bos_token"
ADD_EOS = "tokenizer.ggml.add_eos_token"
ADD_PREFIX = "tokenizer.ggml.add_space_prefix"
TEMPLATE = "tokenizer.chat_template"
TEMPLATE_NAMES = "tokenizer.chat_templates"

# name in tokenizer_config.json -> key of its id
IDS: Mapping[str, str] = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "sep_token": "tokenizer.ggml.seperator_token_id",  # spelled so
    "pad_token": "tokenizer.ggml.padding_token_id",
    "mask_token": "tokenizer.ggml.mask_token_id",
}
MORE_ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")  # of a turn, of a message

BREAK = " "  # in a template for llama.cpp, in the place of chat.MARKER
ADDED_SCORE, HOLE_SCORE = -1000.0, -10000.0  # of a token that a fine-tune added, of an id without any


def hole(index: int) -> str:
    """What llama.cpp's converter calls an id that no token has."""
    return f"[PAD{index}]"


def ranks(merges: Iterable[str | list[str]]) -> dict[str, int]:
    """Piece -> the best of the merges that make it, from 1 on. `merges`: best first, "left right" or a pair."""
    found: dict[str, int] = {}
    for rank, merge in enumerate(merges, 1):
        left, _, right = merge.partition(" ") if isinstance(merge, str) else (merge[0], "", merge[1])
        found.setdefault(left + right, rank)
    return found
