"""The tokenizer in a GGUF's metadata as the files that a folder has, from which Tokenizer.from_folder makes it again.

    tokens up to the last piece ─► tokenizer.model ─► hf_files_of ─┐
    those after it, which a fine-tune added ────────────────────┴► tokenizer.json, tokenizer_config.json
    ids, templates ─► tokenizer_config.json, special_tokens_map.json, generation_config.json

What converters of different years make of the same tokenizer, and what is read out of it (llama-vocab.cpp and
conversion/base.py of https://github.com/ggml-org/llama.cpp, convert.py of December 2023):
- An added token has the score -1000. Of those that are not CONTROL old converters did not know better: one that is BOS,
  EOS or the like is special all the same.
- Holes are UNUSED, or called [PADn] by their own id. At the end they are no tokens. Amid others an id must be kept, and
  becomes a special token that prints nothing; so does a token that is no UTF-8, which no text can become either.
- SentencePiece's user-defined pieces come as NORMAL ones of score 0 before the first byte, and <unk> as CONTROL.
- All pieces of one score: there was no tokenizer.model. Then the merges tell, if they are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..storage.gguf_values import Kind as Type
from ..storage.gguf_values import Metadata
from . import gguf_keys as keys
from .chat import MARKER
from .declared import CONFIG_FILE
from .model_bytes import encode_model
from .pieces import JSON_FILE, MODEL_FILE, Kind, Piece, Pieces, read_pieces
from .tokenizer_files import hf_files_of, own_template

_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_DEFAULTS = {"bos_token": 1, "eos_token": 2, "unk_token": 0}  # llama.cpp's, of such a tokenizer
_LONGEST = 1 << 14  # characters of a token; runs of blanks in use have some hundreds
_NEITHER = ("none", "no_vocab")


@dataclass(frozen=True)
class _Vocabulary:
    """`base`: the pieces of tokenizer.model. `texts`: of all tokens, but for holes at the end.

    `looked_for`: whether a token that is searched in a text is special, by id. `ids`: of "bos_token" and the like.
    """

    base: Pieces
    texts: tuple[str, ...]
    looked_for: Mapping[int, bool]
    ids: Mapping[str, int]
    ends: tuple[int, ...]


def documents(metadata: Metadata, file: Path) -> dict[str, bytes]:
    """The content of tokenizer.json, tokenizer_config.json, special_tokens_map.json, generation_config.json and, for a
    tokenizer that puts a blank before each text, tokenizer.model.

    Raises TokenizerError for metadata without a tokenizer, with one of another kind than SentencePiece's BPE, and with
    one that is damaged (arrays of different lengths, ids outside) or cannot be converted (read_pieces, hf_files_of).
    """
    model = _value(metadata, keys.MODEL, Type.STRING, file)
    if model != "llama":
        what = f"holds no tokenizer ({model})" if model in _NEITHER else f"has a tokenizer of the kind {model!r}"
        raise TokenizerError(f"{what}; read is 'llama', SentencePiece's BPE, as every Mixtral's is", file=file)
    found = _read(metadata, file)
    dummy_blank = bool(_value(metadata, keys.ADD_PREFIX, Type.BOOL, file, True))
    bos = (found.ids["bos_token"],) if _value(metadata, keys.ADD_BOS, Type.BOOL, file, True) else ()
    eos = (found.ids["eos_token"],) if _value(metadata, keys.ADD_EOS, Type.BOOL, file, False) else ()
    made = hf_files_of(encode_model(found.base.all), file)
    added = _added_tokens(found)
    names = {name: found.texts[index] for name, index in found.ids.items() if index in found.looked_for}
    flags = {str(one["id"]): {key: value for key, value in one.items() if key != "id"} for one in added}
    config = {
        **json.loads(made[CONFIG_FILE]), **dict.fromkeys(("bos_token", "eos_token")), **names,
        "add_bos_token": bool(bos), "add_eos_token": bool(eos), "added_tokens_decoder": flags,
        "chat_template": _template(metadata, found.base, file),
    }  # fmt: skip
    document = json.loads(made[JSON_FILE])
    document["added_tokens"] = added
    document["model"]["vocab"] = {found.texts[index]: index for index in range(len(found.base.all))}
    document["post_processor"] = _post_processor(found, bos, eos)
    if not dummy_blank:
        _without(document["normalizer"]["normalizers"], "Prepend")
        _without(document["decoder"]["decoders"], "Strip")
    files = {
        JSON_FILE: json.dumps(document, ensure_ascii=False, indent=1).encode("utf-8"),
        CONFIG_FILE: _json({key: value for key, value in config.items() if value is not None}),
        "special_tokens_map.json": _json(names),
        "generation_config.json": _json(
            {
                "bos_token_id": found.ids["bos_token"],
                "eos_token_id": [*found.ends] if len(found.ends) > 1 else found.ends[0],
            }
        ),
    }
    return {**files, MODEL_FILE: made[MODEL_FILE]} if dummy_blank else files


# --- the tokens ---


def _read(metadata: Metadata, file: Path) -> _Vocabulary:
    texts, kinds, scores = _arrays(metadata, file)
    _correct(metadata, texts, kinds, scores, file)
    ids = {
        name: index
        for name, key in keys.IDS.items()
        if (index := _id(metadata, key, _DEFAULTS.get(name), len(texts), file)) is not None
    }
    others = (_id(metadata, key, None, len(texts), file) for key in keys.MORE_ENDS)
    ends = dict.fromkeys([ids["eos_token"], *(index for index in others if index is not None)])
    if Kind.UNKNOWN not in kinds and kinds[ids["unk_token"]] is Kind.CONTROL:
        kinds[ids["unk_token"]] = Kind.UNKNOWN
    named = {*ids.values(), *ends}
    holes = {index for index in range(len(texts)) if _is_hole(index, texts[index], kinds[index], index in named)}
    size = 1 + max((index for index in range(len(texts)) if index not in holes), default=-1)
    texts = [keys.hole(index) if index in holes else text for index, text in enumerate(texts[:size])]
    _expect_unique(texts, file)
    pieces: list[Piece] = []
    looked_for: dict[int, bool] = {}
    for index, (text, kind, score) in enumerate(zip(texts, kinds, scores, strict=False)):
        added = kind is Kind.USER_DEFINED and score == keys.ADDED_SCORE
        if index in holes or added or kind in (Kind.CONTROL, Kind.UNKNOWN, Kind.UNUSED):
            looked_for[index] = not added or index in named | holes
            pieces.append(Piece(text, 0.0, kind if kind is Kind.UNKNOWN else Kind.CONTROL))
        else:
            pieces.append(Piece(text, score, kind))
    while pieces and pieces[-1].kind is Kind.CONTROL:
        pieces.pop()
    _name_ends(pieces, ids)
    base = read_pieces(encode_model(pieces), file)
    return _Vocabulary(base, tuple(texts), looked_for, ids, tuple(ends))


def _arrays(metadata: Metadata, file: Path) -> tuple[list[str], list[Kind], list[float]]:
    texts: list[str] = _array(metadata, keys.TOKENS, (Type.STRING,), file)
    numbers: list[int] = _array(metadata, keys.KINDS, (Type.INT32, Type.UINT32), file)
    scores: list[float] = [0.0] * len(texts)
    if keys.SCORES in metadata:
        scores = list(_array(metadata, keys.SCORES, (Type.FLOAT32, Type.INT32), file))
    for key, found in ((keys.KINDS, len(numbers)), (keys.SCORES, len(scores))):
        if found != len(texts):
            raise TokenizerError(
                f"{key} has not as many entries as tokens", file=file, expected=len(texts), found=found
            )
    if not texts:
        raise TokenizerError("has a tokenizer without tokens", file=file)
    longest = max(range(len(texts)), key=lambda index: len(texts[index]))
    if len(texts[longest]) > _LONGEST:
        raise TokenizerError(f"token {longest} has {len(texts[longest])} characters; it is damaged", file=file)
    try:
        kinds = [Kind(number) for number in numbers]
    except ValueError as error:
        index = next(index for index, number in enumerate(numbers) if number not in set(Kind))
        raise TokenizerError(f"token {index}, {texts[index]!r}, is of no known kind ({error})", file=file) from None
    return texts, kinds, scores


def _correct(metadata: Metadata, texts: list[str], kinds: list[Kind], scores: list[float], file: Path) -> None:
    """Scores that tell nothing become those of the merges, and user-defined pieces are called so."""
    normal = [index for index, kind in enumerate(kinds) if kind is Kind.NORMAL]
    merged: dict[str, int] = {}
    if len(normal) > 1 and len({scores[index] for index in normal}) == 1:
        if keys.MERGES not in metadata:
            raise TokenizerError(
                "gives all pieces one score and holds no merges: it was made without tokenizer.model, and llama.cpp, "
                "too, encodes texts wrongly with it; make it anew from the original model",
                file=file,
            )
        merged = keys.ranks(_array(metadata, keys.MERGES, (Type.STRING,), file))
        for index in normal:
            scores[index] = -float(merged.get(texts[index], len(merged) + 1 + index))
    first = kinds.index(Kind.BYTE) if Kind.BYTE in kinds else 0
    for index in normal:
        unmade = scores[index] == 0.0 or (merged and texts[index] not in merged)
        if index < first and len(texts[index]) > 1 and unmade:
            kinds[index] = Kind.USER_DEFINED


def _is_hole(index: int, text: str, kind: Kind, named: bool) -> bool:
    """Whether nothing is made of an id: no token has it, or one that is no text. `named`: it is BOS or the like."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return True
    called = kind is Kind.USER_DEFINED and text == keys.hole(index)
    return not text or (not named and (kind is Kind.UNUSED or called))


def _expect_unique(texts: Sequence[str], file: Path) -> None:
    places: dict[str, int] = {}
    for index, text in enumerate(texts):
        if (other := places.setdefault(text, index)) != index:
            raise TokenizerError(f"token {index} repeats token {other}, {text!r}", file=file)


def _name_ends(pieces: list[Piece], ids: Mapping[str, int]) -> None:
    """A fine-tune may have put <|im_end|> in the place of </s>: tokenizer.model calls it as it was."""
    for name, text in (("bos_token", "<s>"), ("eos_token", "</s>")):
        index = ids[name]
        if index < len(pieces) and pieces[index].kind is Kind.CONTROL and text not in {piece.text for piece in pieces}:
            pieces[index] = pieces[index]._replace(text=text)


# --- the files ---


def _added_tokens(found: _Vocabulary) -> list[dict[str, Any]]:
    """tokenizer.json's added_tokens, by id."""
    return [
        {"id": index, "content": found.texts[index], **_FLAGS, "special": special}
        for index, special in sorted(found.looked_for.items())
    ]


def _post_processor(found: _Vocabulary, before: tuple[int, ...], after: tuple[int, ...]) -> dict[str, Any] | None:
    """What puts `before` and `after` round each text."""

    def one(name: str) -> list[dict[str, Any]]:
        type_id = "AB".index(name)
        marks = [
            [{"SpecialToken": {"id": found.texts[token], "type_id": type_id}} for token in side] for side in around
        ]
        return [*marks[0], {"Sequence": {"id": name, "type_id": type_id}}, *marks[1]]

    around = (before, after)
    if not before and not after:
        return None
    texts = {index: found.texts[index] for index in (*before, *after)}
    tokens = {text: {"id": text, "ids": [index], "tokens": [text]} for index, text in texts.items()}
    pair = one("A") + one("B")
    return {"type": "TemplateProcessing", "single": one("A"), "pair": pair, "special_tokens": tokens}


def _without(parts: list[dict[str, Any]], kind: str) -> None:
    parts[:] = [part for part in parts if part["type"] != kind]


def _template(metadata: Metadata, base: Pieces, file: Path) -> str | list[dict[str, str]] | None:
    """For tokenizer_config.json: a template, several by name, or none."""
    told = {"default": keys.TEMPLATE} if keys.TEMPLATE in metadata else {}
    told |= {key.removeprefix(f"{keys.TEMPLATE}."): key for key in metadata if key.startswith(f"{keys.TEMPLATE}.")}
    found = {name: str(_value(metadata, key, Type.STRING, file)) for name, key in told.items()}
    own = own_template(base)
    named = [
        {"name": name, "template": own if text == own.replace(MARKER, keys.BREAK) else text}
        for name, text in found.items()
    ]
    if found.keys() == {"default"}:
        return named[0]["template"]
    return named or None


def _json(document: object) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode("ascii")


# --- the metadata ---


def _value(metadata: Metadata, key: str, kind: Type, file: Path, usual: object = None) -> object:
    """Raises TokenizerError for a value of another kind, and for one that is missing and has no usual one."""
    value = metadata.get(key)
    if value is None and usual is not None:
        return usual
    if value is None or value.kind is not kind:
        raise TokenizerError(f"lacks {key}" if value is None else f"{key} is no {kind.name.lower()}", file=file)
    return value.value


def _array(metadata: Metadata, key: str, items: tuple[Type, ...], file: Path) -> list[Any]:
    found: Any = _value(metadata, key, Type.ARRAY, file)
    if metadata[key].item not in items:
        raise TokenizerError(f"{key} is no array of {items[0].name.lower()}", file=file)
    return list(found)


def _id(metadata: Metadata, key: str, usual: int | None, count: int, file: Path) -> int | None:
    if key not in metadata and usual is None:
        return None
    index = metadata[key].value if key in metadata else usual
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise TokenizerError(f"{key} is {index!r}, not an id of its {count} tokens", file=file)
    return index
