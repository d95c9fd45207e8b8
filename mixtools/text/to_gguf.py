"""A folder's tokenizer as the tokenizer.* keys of a GGUF, as llama.cpp's converter writes them.

    tokenizer.model, or the vocabulary and merges of tokenizer.json ─► pieces with scores ─┐
    the tokens that a fine-tune added ─────────────────────────────────────────────────────┴► tokens, scores, kinds
    tokenizer_config.json and its kin ─► ids of BOS, EOS and the like, templates

After convert_hf_to_gguf.py and gguf-py/gguf/vocab.py of https://github.com/ggml-org/llama.cpp (0.3.36 of
llama-cpp-python). What is done otherwise, and why:
- Where there is no tokenizer.model the converter gives every piece the score -1000, and llama.cpp, which merges by
  score alone, then finds ids that the model was not trained on. Here the ranks of the merges are the scores.
- Pieces that SentencePiece calls user-defined ([REFERENCE_DOC_3] of tokenizer v3) are USER_DEFINED, not NORMAL, which
  nothing in a text would ever become. llama.cpp has no blank before and one more after such a piece.
- An added token is CONTROL if it is special, whatever its name looks like; tokens of tokenizer.json count too.
- A second and third end of generation are told (eot, eom); a template in chat_template.jinja goes before others.
- The template that mistral's own folders mean (chat.py) breaks up a special token that a user typed by two characters
  that tokenizer.json deletes again. Nothing deletes them in llama.cpp: there each would become three bytes that no
  model has seen. So they are a blank here. "</s>" in a message is then read as "< /s>", which is close, and cannot
  end the turn; left whole it would, since llama.cpp takes every special token in a rendered prompt for itself.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import TokenizerError
from ..storage.gguf_values import Kind as Type
from ..storage.gguf_values import Value, array, boolean, string, uint32
from . import from_model
from . import gguf_keys as keys
from .chat import MARKER
from .declared import TEMPLATE_FILE, TEMPLATES, Added, Declared, model_file
from .engine import Engine
from .from_json import read_tokenizer_json
from .from_model import read_tokenizer_model
from .model_bytes import encode_model
from .pieces import BLANK, JSON_FILE, Kind, Piece, Pieces, read_model, read_pieces, sentencepiece_encoder
from .tokenizer import Tokenizer
from .tokenizer_files import own_template

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_LONGEST_RUN = 70  # of one character, in the check


@dataclass(frozen=True)
class _Source:
    """`base`: what a tokenizer.model holds or would hold; `tokens`: all of them by id, as a GGUF has them.

    `dummy_blank`: a text begins with a blank that is not there.
    """

    declared: Declared
    engine: Engine
    base: tuple[Piece, ...]
    tokens: Mapping[int, Piece]
    dummy_blank: bool = True


class Vocabulary(NamedTuple):
    """`remarks`: where llama.cpp will do otherwise than the folder's own tokenizer, a GGUF having no place for why."""

    metadata: dict[str, Value]
    remarks: tuple[str, ...]


def vocabulary(folder: Path, vocab_size: int) -> Vocabulary:
    """All tokenizer.* keys of the tokenizer in `folder`, for a model whose embedding has `vocab_size` rows.

    Ids that no token has become holes ([PADn], UNUSED); tokens that a fine-tune added beyond the rows are left out,
    with a remark. Raises TokenizerError for a tokenizer that llama.cpp has no form for (byte-level ones, those
    whose merges no scores stand for), for pieces, BOS or EOS beyond the rows, and what Tokenizer.from_folder raises.
    """
    source = _read(folder)
    return Vocabulary(_keys(source, vocab_size), tuple(_remarks(source, folder, vocab_size)))


def _keys(source: _Source, vocab_size: int) -> dict[str, Value]:
    tokens = _fitted(source, vocab_size)
    told = {
        keys.MODEL: string("llama"),
        keys.PRE: string("default"),
        keys.TOKENS: array(Type.STRING, [token.text for token in tokens]),
        keys.SCORES: array(Type.FLOAT32, [token.score for token in tokens]),
        keys.KINDS: array(Type.INT32, [int(token.kind) for token in tokens]),
    }
    told |= {key: uint32(index) for key, index in _ids(source, vocab_size).items()}
    told |= dict(_around(source))
    return told | dict(_templates(source))


def _remarks(source: _Source, folder: Path, vocab_size: int) -> Iterator[str]:
    if left := [token.text for index, token in sorted(source.tokens.items()) if index >= vocab_size]:
        yield f"{folder}: the model has {vocab_size} rows; left out are the added tokens {', '.join(left)}"
    tokenizer = Tokenizer(source.engine, source.declared)
    if others := [end for end in tokenizer.end_ids if end != tokenizer.eos_id][len(keys.MORE_ENDS) :]:
        yield f"{folder}: of the ids that end generation a GGUF has no place for {', '.join(map(str, others))}"
    llama = _llama_encoder(source, folder)
    for text in _strange(source):
        ours, theirs = source.engine.encode(text, True), llama(text)
        if ours != theirs:
            yield (
                f"{source.engine.file}: llama.cpp will give other ids for {text!r}, {theirs} and not {ours}: there "
                "each stretch between special tokens has a blank put before it, and no token takes blanks with it"
            )
            return


# --- the tokens ---


def _read(folder: Path) -> _Source:
    declared, model = Declared.of(folder), model_file(folder)
    if (document := folder / JSON_FILE).exists():
        return _read_json(document, model, declared)
    if model is None:
        raise TokenizerError(f"holds no tokenizer: neither {JSON_FILE} nor tokenizer.model", file=folder)
    engine = read_tokenizer_model(model, declared)
    base = read_pieces(read_model(model), model).all
    added = {index for text, index in engine.ids.items() if index >= len(base) or base[index].text != text}
    return _Source(declared, engine, base, _tokens(engine, base, added | declared.added.keys()))


def _read_json(file: Path, model: Path | None, declared: Declared) -> _Source:
    engine = read_tokenizer_json(file, declared)
    if any(isinstance(meaning, bytes) for meaning in engine.meanings):
        raise TokenizerError(
            "is byte-level BPE, of the kind of GPT-2 and Llama 3, which a GGUF names after the model it was made for; "
            "written is SentencePiece's kind alone, Mixtral's own: tokenizer.model, or BPE with byte fallback",
            file=file,
        )
    document = json.loads(read_model(file))
    listed = {token["content"] for token in document.get("added_tokens") or ()}
    listed |= {token.content for token in declared.added.values()} | engine.special.keys()
    added = {engine.ids[text] for text in listed & engine.ids.keys()}
    first = next(iter(engine.encode("a", False)), -1)
    dummy_blank = _spelled(engine).get(first, "").startswith(BLANK)
    base = _pieces_of_model(engine, added, model)
    if base is None or _difference(base, engine, added, dummy_blank):
        unknown = document["model"].get("unk_token") or declared.names.get("unk_token") or "<unk>"
        base = _pieces_of_merges(engine, added, unknown, keys.ranks(document["model"].get("merges") or ()))
        if differs := _difference(base, engine, added, dummy_blank):
            probe, want, found = differs
            raise TokenizerError(
                f"has merges that no scores stand for, and llama.cpp merges by scores: {probe!r} would get other ids",
                file=file, expected=want, found=found,
            )  # fmt: skip
    return _Source(declared, engine, base, _tokens(engine, base, added), dummy_blank)


def _spelled(engine: Engine) -> dict[int, str]:
    return {index: text for text, index in engine.ids.items()}


def _pieces_of_model(engine: Engine, added: set[int], model: Path | None) -> tuple[Piece, ...] | None:
    """Those of the tokenizer.model that lies beside tokenizer.json; None without one that has the same pieces."""
    if model is None:
        return None
    try:
        found = read_pieces(read_model(model), model).all
    except TokenizerError:  # it is not what the folder's tokenizer is made from
        return None
    spelled = _spelled(engine)
    same = all(index in added or spelled.get(index) == piece.text for index, piece in enumerate(found))
    return found if same and all(index < len(found) for index in spelled.keys() - added) else None


def _pieces_of_merges(engine: Engine, added: set[int], unknown: str, merged: Mapping[str, int]) -> tuple[Piece, ...]:
    """What the better merge makes has the higher score, and what none makes the lowest."""
    spelled = _spelled(engine)
    size = 1 + max(index for index, text in spelled.items() if index not in added or text == unknown)
    pieces = []
    for index in range(size):
        text = spelled[index]
        if text == unknown:
            pieces.append(Piece(text, 0.0, Kind.UNKNOWN))
        elif index in added:
            pieces.append(Piece(text, 0.0, Kind.CONTROL))
        elif _BYTE.fullmatch(text):
            pieces.append(Piece(text, 0.0, Kind.BYTE))
        elif len(text) > 1 and text not in merged and index in engine.encode(text, False):
            pieces.append(Piece(text, 0.0, Kind.USER_DEFINED))  # found as a whole: by a pre-tokenizer
        else:
            pieces.append(Piece(text, -float(merged.get(text, len(merged) + 1 + index)), Kind.NORMAL))
    return tuple(pieces)


def _tokens(engine: Engine, base: Sequence[Piece], added: set[int]) -> dict[int, Piece]:
    """By id. `added`: ids of tokens that are not the base's, or that documents list beside it."""
    tokens: dict[int, Piece] = {}
    for text, index in engine.ids.items():
        own = base[index] if index < len(base) and base[index].text == text else None
        if own is not None and (own.kind is Kind.UNKNOWN or index not in added):
            tokens[index] = own
        elif text in engine.special:
            tokens[index] = Piece(text, keys.ADDED_SCORE, Kind.CONTROL)
        else:
            tokens[index] = Piece(text.replace(BLANK, " "), keys.ADDED_SCORE, Kind.USER_DEFINED)
    return tokens


def _fitted(source: _Source, vocab_size: int) -> list[Piece]:
    """One for each row. Raises TokenizerError for pieces beyond the rows, and tokens that llama.cpp would refuse."""
    file = source.engine.file
    if len(source.base) > vocab_size:
        raise TokenizerError(
            f"has {len(source.base)} pieces, and the model {vocab_size} rows: the tokenizer of another model", file=file
        )
    found = [
        source.tokens.get(index) or Piece(keys.hole(index), keys.HOLE_SCORE, Kind.UNUSED) for index in range(vocab_size)
    ]
    places: dict[str, int] = {}
    for index, token in enumerate(found):
        if not token.text:
            raise TokenizerError(f"token {index} is empty", file=file)
        if places.setdefault(token.text, index) != index:
            other = places[token.text]
            raise TokenizerError(f"token {index}, {token.text!r}, repeats token {other}; llama.cpp stops", file=file)
    return found


# --- what the ids are checked against ---


def _difference(
    base: Sequence[Piece], engine: Engine, added: set[int], dummy_blank: bool
) -> tuple[str, list[int], list[int]] | None:
    """A text that `base` encodes otherwise than `engine`, with the ids of the latter and the former.

    Tried are each piece, neighbours, and runs of each character that pieces repeat; no blanks at a text's beginning,
    since some tokenizers put none before those. Raises TokenizerError for a base that cannot be.
    """
    pieces = read_pieces(encode_model(base), engine.file)
    encode: Any = sentencepiece_encoder(encode_model(base, dummy_blank=dummy_blank), engine.file)
    spelled = _spelled(engine)
    meant = [spelled[index] for index in added if spelled[index] not in engine.special]
    probes = [probe for probe in _probes(pieces) if not any(text in probe for text in meant)]
    for probe, found in zip(probes, encode(probes), strict=True):
        if (want := engine.encode(probe, False)) != found:
            return probe, want, found
    return None


def _probes(pieces: Pieces) -> Iterator[str]:
    texts = [piece.text.replace(BLANK, " ") for piece in pieces.all]
    yield from map(_begun, texts)
    for first, second in itertools.pairwise(texts):
        yield _begun(second + first)
    for character in sorted({text[0] for text in texts if len(text) > 1 and len(set(text)) == 1}):
        for length in range(1, _LONGEST_RUN):
            yield f"a{character * length}b{character * length}"


def _begun(text: str) -> str:
    return f"a{text}" if text.startswith(" ") else text


def _llama_encoder(source: _Source, folder: Path) -> Callable[[str], list[int]]:
    """llama.cpp's ids of a text in which special tokens are meant, without BOS."""
    data = encode_model(source.base, dummy_blank=source.dummy_blank)
    encode: Any = sentencepiece_encoder(data, folder)
    kinds = (Kind.CONTROL, Kind.USER_DEFINED)
    ids = {token.text: index for index, token in source.tokens.items() if token.kind in kinds}
    found = from_model.pattern(Added(text, special=True) for text in ids)

    def llama(text: str) -> list[int]:
        made: list[int] = []
        for _, stretch, token in from_model.stretches(text, found):
            made += encode(stretch) if stretch else []
            made += [ids[token]] if token else []
        return made

    return llama


def _strange(source: _Source) -> Iterator[str]:
    """A text that begins with a blank, and each added or special token amid others."""
    yield " a"
    own = {piece.text for piece in source.base if piece.kind is Kind.USER_DEFINED}
    for token in source.tokens.values():
        if token.kind in (Kind.CONTROL, Kind.USER_DEFINED) and token.text not in own:
            yield f"a{token.text}b {token.text} c"


# --- ids, what goes round a text, templates ---


def _ids(source: _Source, vocab_size: int) -> dict[str, int]:
    """Key -> id. Raises TokenizerError for BOS or EOS beyond the rows."""
    engine, tokenizer = source.engine, Tokenizer(source.engine, source.declared)
    named = {name: engine.ids.get(text) for name, text in source.declared.names.items() if name in keys.IDS}
    unknown = next((index for index, piece in enumerate(source.base) if piece.kind is Kind.UNKNOWN), None)
    ends = tokenizer.end_ids
    eos = ends[0] if tokenizer.eos_id is None and ends else tokenizer.eos_id
    named |= {"bos_token": tokenizer.bos_id, "eos_token": eos, "unk_token": unknown}
    for name in ("bos_token", "eos_token"):
        index = named[name]
        if index is not None and not 0 <= index < vocab_size:
            raise TokenizerError(
                f"{name} {_spelled(engine).get(index, '')!r} has the id {index}, and the model has {vocab_size} rows: "
                "a token that was added without training it",
                file=engine.file,
            )
    found = {keys.IDS[name]: index for name, index in named.items() if index is not None}
    found |= zip(keys.MORE_ENDS, [end for end in ends if end != eos], strict=False)
    return {key: index for key, index in found.items() if 0 <= index < vocab_size}


def _around(source: _Source) -> Iterator[tuple[str, Value]]:
    """Whether BOS and EOS go round a text, and the blank that is not there."""
    engine, tokenizer = source.engine, Tokenizer(source.engine, source.declared)
    for key, found, own in (
        (keys.ADD_BOS, engine.before, tokenizer.bos_id),
        (keys.ADD_EOS, engine.after, tokenizer.eos_id),
    ):
        if found not in ((), (own,)):
            raise TokenizerError(f"puts the ids {list(found)} round a text, which a GGUF cannot say", file=engine.file)
        yield key, boolean(bool(found))
    if not source.dummy_blank or source.declared.config.get("add_prefix_space") is not None:
        yield keys.ADD_PREFIX, boolean(source.dummy_blank)


def _templates(source: _Source) -> Iterator[tuple[str, Value]]:
    """The default under its key, the others under their names."""
    declared = source.declared
    listed = declared.config.get("chat_template")
    others: dict[str, str] = {}
    if (declared.folder / TEMPLATE_FILE).exists():
        others = dict(map(_read_template, (declared.folder / TEMPLATES).glob("*.jinja")))
        default = declared.template()
    elif isinstance(listed, list) and (found := _named(listed)) is not None:
        default = found.pop("default", None)
        others = found
    elif (default := declared.template()) is None and declared.is_mistrals:
        default = _own_template(source)
    others = {re.sub(r"[^A-Za-z0-9]", "_", name): text for name, text in sorted(others.items())}
    if others:
        yield keys.TEMPLATE_NAMES, array(Type.STRING, list(others))
    for name, text in others.items():
        yield f"{keys.TEMPLATE}.{name}", string(text)
    if default is not None:
        yield keys.TEMPLATE, string(default.replace(MARKER, keys.BREAK))


def _own_template(source: _Source) -> str:
    try:
        return own_template(Pieces(source.base, ""))
    except TokenizerError as error:
        raise TokenizerError(error.message, file=source.engine.file) from None


def _read_template(path: Path) -> tuple[str, str]:
    try:
        return path.stem, path.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise TokenizerError(f"cannot be read ({error})", file=path) from None


def _named(listed: Sequence[Any]) -> dict[str, str] | None:
    """Templates by name; None for a list of anything else."""
    if all(isinstance(one, dict) and isinstance(one.get("template"), str) and one.get("name") for one in listed):
        return {str(one["name"]): one["template"] for one in listed}
    return None
