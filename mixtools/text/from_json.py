"""An Engine from tokenizer.json, by the tokenizers package, as transformers sets it up.

SentencePiece's kind (BPE with byte fallback) and the byte-level kind of Llama 3 and GPT-2. What tokenizer_config.json
adds is added as transformers 5 does it: `added_tokens_decoder` with its flags, then special tokens that are not known
as such. Whether a text begins with BOS is the post-processor's decision; add_bos_token counts for tokenizer.model only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from .declared import CONFIG_FILE, Declared
from .decoding import ByteStreamDecoder, Decoder, Meaning, StreamDecoder, byte_alphabet, spelled_bytes
from .engine import Engine
from .pieces import read_model

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def read_tokenizer_json(file: Path, declared: Declared) -> Engine:
    """Raises TokenizerError if the file is damaged, or of another kind than those two."""
    import tokenizers

    try:
        text = read_model(file).decode("utf-8")
        document = json.loads(text)
        model = document["model"]
        byte_level = "ByteLevel" in _types(document.get("decoder"))
        if model.get("type", "BPE") != "BPE" or not (byte_level or model.get("byte_fallback")):
            raise TokenizerError("is not BPE with byte fallback, as a Mixtral's is, nor byte-level BPE", file=file)
        backend: Any = tokenizers.Tokenizer.from_str(text)
        backend.no_truncation()  # what somebody saved with it is no property of the model
        backend.no_padding()
        _add(backend, declared)
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
        unknown = None if byte_level else str(model.get("unk_token"))
        before, after = _around(backend)
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"is damaged or no tokenizer ({error})", file=file) from None
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise TokenizerError("its ids have gaps or repeat", file=file)
    meanings: list[Meaning] = [None] * len(vocabulary)
    alphabet = byte_alphabet()
    for piece, index in vocabulary.items():
        if piece == unknown:
            meanings[index] = " ⁇ "  # SentencePiece's word for it
        elif piece not in special:
            byte = None if byte_level else _BYTE.fullmatch(piece)
            meanings[index] = spelled_bytes(piece, alphabet) if byte_level else int(byte[1], 16) if byte else piece

    def encode(text: str, parse_special: bool) -> list[int]:
        backend.encode_special_tokens = not parse_special
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    strip = not _types(document.get("decoder")).isdisjoint(("Strip", "Metaspace"))

    def stream() -> Decoder:
        return ByteStreamDecoder(meanings) if byte_level else StreamDecoder(meanings, strip)

    return Engine(
        file, meanings, vocabulary, {piece: vocabulary[piece] for piece in special - {unknown}}, encode, before, after,
        stream, tuple(_remarks(declared, vocabulary, file, before)),
    )  # fmt: skip


def _types(part: Any) -> set[str]:
    """The types of a decoder and of all that it is made of."""
    if not isinstance(part, dict):
        return set()
    return {str(part.get("type"))}.union(*map(_types, part.get("decoders") or ()))


def _add(backend: Any, declared: Declared) -> None:
    from tokenizers import AddedToken

    named = {*declared.names.values(), *declared.extra}
    known = backend.get_added_tokens_decoder()
    # without added_tokens_decoder, tokenizer.json's own tokens go before those of added_tokens.json
    tokens = [
        AddedToken(
            token.content, single_word=token.single_word, lstrip=token.lstrip, rstrip=token.rstrip,
            normalized=token.normalized, special=token.special or token.content in named,
        )
        for index, token in declared.added.items()
        if "added_tokens_decoder" in declared.config or index not in known
    ]  # fmt: skip
    backend.add_tokens(tokens)
    known = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    missing = [text for text in (*declared.names.values(), *declared.extra) if text not in known]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in dict.fromkeys(missing)])
    for text in named & known.keys():
        if not known[text].special:
            known[text].special = True
            backend.add_special_tokens([known[text]])


def _around(backend: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor puts before and after a text."""
    bare, whole = (backend.encode("a", add_special_tokens=add).ids for add in (False, True))
    at = next(at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return tuple(whole[:at]), tuple(whole[at + len(bare) :])


def _remarks(declared: Declared, vocabulary: dict[str, int], file: Path, before: tuple[int, ...]) -> Iterator[str]:
    for index, token in declared.added.items():
        found = vocabulary.get(token.content)
        if found != index:
            place = f"gives it {found}" if found is not None else "does not have it"
            yield f"{file.parent}: added token {token.content!r} should have the id {index}, {file.name} {place}"
    wanted = declared.config.get("add_bos_token")
    if isinstance(wanted, bool) and wanted != bool(before):
        yield (
            f"{declared.folder / CONFIG_FILE} says add_bos_token {str(wanted).lower()}, {file.name} puts "
            f"{'BOS' if before else 'no BOS'} before a text; the latter holds, as in transformers 5"
        )
