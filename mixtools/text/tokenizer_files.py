"""tokenizer.model to the files that Hugging Face's loaders read, with SentencePiece's ids.

Where the two engines differ, and what is done about it:
- SentencePiece merges the neighbours whose joined piece scores best, and of equals the leftmost. tokenizers ranks
  pairs. So pairs are listed by their piece's score. Among equals the longer piece comes first: that is how a run of one
  character grows from the left, and Mixtral's runs of blanks all have one score. No ranking of pairs can stand for
  "leftmost" where other pieces are equal, so such a vocabulary is refused. The order of pairs that make one piece was
  not seen to matter; it is fixed for the bytes' sake.
- tokenizers would start merging inside a user-defined piece. So such pieces are split off, and a stretch that is in the
  vocabulary as a whole is taken whole (ignore_merges). That would also take a control token or byte piece that somebody
  typed right after one, so those are split once more, where SentencePiece has a boundary anyway.
- Every stretch of text between control tokens gets its own dummy blank, as in mistral-common's conversations.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from . import chat
from .pieces import BLANK, JSON_FILE, MODEL_FILE, Kind, Pieces, read_model, read_pieces, sentencepiece_encoder

_LONGEST_RUN = 70  # of one character, in the check; the longest piece of such has 16 to 64


def hf_files(model: Path) -> dict[str, bytes]:
    """The content of tokenizer.json, tokenizer_config.json, special_tokens_map.json and tokenizer.model, by name.

    The same tokenizer.model gives the same bytes. Each piece, and runs of each character that pieces repeat, are
    encoded with the result and with SentencePiece before it is returned. Raises TokenizerError if the file cannot be
    read or converted (pieces.read_pieces tells what can), or if an id differs.
    """
    return hf_files_of(read_model(model), model)


def hf_files_of(data: bytes, model: Path) -> dict[str, bytes]:
    """The same of the bytes of a tokenizer.model; `model` is for messages."""
    pieces = read_pieces(data, model)
    control = [piece.text for _, piece in pieces.of_kind(Kind.CONTROL)]
    for name in ("<s>", "</s>"):
        if name not in control:
            raise TokenizerError(f"lacks the control token {name}", file=model)
    try:
        own_template(pieces)
    except TokenizerError as error:
        raise TokenizerError(error.message, file=model) from None
    _check_ties(pieces, model)
    document = _tokenizer_json(pieces, model, data)
    text = json.dumps(document, ensure_ascii=False, indent=1)
    _check(text, pieces, data, model)
    names = {f"{key}_token": name for key, name in (("bos", "<s>"), ("eos", "</s>"), ("unk", _unknown(pieces)))}
    config = {
        **names,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {key: value for key, value in token.items() if key != "id"}
            for token in document["added_tokens"]
        },
        "chat_template": own_template(pieces),
        "clean_up_tokenization_spaces": False,  # old versions default to True, which eats blanks before punctuation
        "model_input_names": ["input_ids", "attention_mask"],  # a Mixtral takes no token_type_ids
        "padding_side": "left",
        # not LlamaTokenizer: version 5 would rebuild the normalizer by its own lights and ignore tokenizer.json's
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return {
        JSON_FILE: text.encode("utf-8"),
        "tokenizer_config.json": (json.dumps(config, indent=2) + "\n").encode("ascii"),
        "special_tokens_map.json": (json.dumps(names, indent=2) + "\n").encode("ascii"),
        MODEL_FILE: data,
    }


def own_template(pieces: Pieces) -> str:
    """The chat template of mistral's own format for these pieces. Raises TokenizerError as chat.style_of does."""
    control = [piece.text for _, piece in pieces.of_kind(Kind.CONTROL)]
    return chat.template(chat.style_of(control), [_unknown(pieces), *control])


def _unknown(pieces: Pieces) -> str:
    return next(piece.text for _, piece in pieces.of_kind(Kind.UNKNOWN))


def _tokenizer_json(pieces: Pieces, file: Path, data: bytes) -> dict[str, Any]:
    """The document; format: https://docs.rs/tokenizers (its serde structures)."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [
        {"id": index, "content": piece.text, **flags} for index, piece in pieces.of_kind(Kind.UNKNOWN, Kind.CONTROL)
    ]
    bos = pieces.id_of("<s>", Kind.CONTROL)

    def start(type_id: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": "<s>", "type_id": type_id}},
            {"Sequence": {"id": "AB"[type_id], "type_id": type_id}},
        ]

    split = _split(pieces, file, data)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [_replace(chat.MARKER, ""), {"type": "Prepend", "prepend": BLANK}, _replace(" ", BLANK)],
        },
        "pre_tokenizer": split,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": start(0),
            "pair": start(0) + start(1),
            "special_tokens": {"<s>": {"id": "<s>", "ids": [bos], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                _replace(BLANK, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": _unknown(pieces),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": split is not None,
            "vocab": {piece.text: index for index, piece in enumerate(pieces.all)},
            "merges": _merges(pieces),
        },
    }


def _replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": pattern}, "content": content}


def _merges(pieces: Pieces) -> list[str]:
    """Every pair of pieces that joins to a piece, best first; "left right", the spelling that old versions read too."""
    scores = {piece.text: piece.score for _, piece in pieces.of_kind(Kind.NORMAL)}
    ranked = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in scores and right in scores:
                ranked.append((-score, -len(text), -cut, text, f"{left} {right}"))
    return [merge for *_, merge in sorted(ranked)]


def _check_ties(pieces: Pieces, file: Path) -> None:
    """Refuse pieces of equal score, unless they are runs of one character. Single characters are not merged."""
    first: dict[float, str] = {}
    for index, piece in pieces.of_kind(Kind.NORMAL):
        if len(piece.text) == 1:
            continue
        other = first.setdefault(piece.score, piece.text)
        if other != piece.text and (len(set(other)) > 1 or len(set(piece.text)) > 1):
            raise TokenizerError(
                f"piece {index}, {piece.text!r}, has the score of {other!r}, {piece.score}; ties cannot be converted",
                file=file,
            )


def _split(pieces: Pieces, file: Path, data: bytes) -> dict[str, Any] | None:
    """The pre-tokenizer that isolates user-defined pieces, longest first; None where there are none."""
    texts = (piece.text for _, piece in pieces.of_kind(Kind.USER_DEFINED))
    defined = sorted(texts, key=lambda text: (-len(text), text))
    if not defined:
        return None
    encode = sentencepiece_encoder(data, file)
    frozen = encode(defined[0])  # the dummy blank and the piece: what follows them is encoded by itself
    heads: dict[str, list[str]] = {}
    for index, piece in enumerate(pieces.all):
        found = encode(defined[0] + piece.text)[len(frozen) :]
        if piece.kind is Kind.NORMAL and found != [index]:
            raise TokenizerError(
                f"piece {index}, {piece.text!r}, is never made; with user-defined pieces that cannot be converted",
                file=file,
            )
        if piece.kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.BYTE):
            first = pieces.all[found[0]]
            head = piece.text[0] if first.kind is Kind.BYTE else first.text
            heads.setdefault(head, []).append(piece.text[len(head) :])
    typed = "|".join(rf"\A{_quote(head)}(?=(?:{'|'.join(map(_quote, rests))})\z)" for head, rests in heads.items())
    patterns = ("|".join(map(_quote, defined)), typed)
    return {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
            for pattern in patterns
        ],
    }


def _quote(text: str) -> str:
    """`text` as an Oniguruma regular expression."""
    return re.sub(r"[^\w<>/ ]", lambda match: rf"\x{{{ord(match[0]):x}}}", text)


def _check(document: str, pieces: Pieces, data: bytes, file: Path) -> None:
    import tokenizers

    backend: Any = tokenizers.Tokenizer.from_str(document)
    backend.encode_special_tokens = True
    probes = list(_probes(pieces))
    encode: Any = sentencepiece_encoder(data, file)
    encodings = backend.encode_batch(probes, add_special_tokens=False)
    for probe, want, found in zip(probes, encode(probes), encodings, strict=True):
        if want != found.ids:
            raise TokenizerError(
                f"cannot be converted: tokenizer.json would encode {probe!r} otherwise",
                file=file,
                expected=want,
                found=found.ids,
            )


def _probes(pieces: Pieces) -> Iterator[str]:
    texts = [piece.text.replace(BLANK, " ") for piece in pieces.all]
    yield from texts
    for first, second in itertools.pairwise(texts):
        yield second + first
    repeated = sorted({text[0] for text in texts if len(text) > 1 and len(set(text)) == 1})
    for character in repeated:
        for length in range(1, _LONGEST_RUN):
            yield f"a{character * length}b{character * length}"
