"""An Engine from tokenizer.model, by SentencePiece, and the tokens that a fine-tune added beside it.

SentencePiece encodes the stretches between added tokens one by one, each with its dummy blank; with `legacy: false` in
tokenizer_config.json only the text's very beginning has one. So did LlamaTokenizer of transformers 4, with which such
folders were made. (Version 5.23 reads a tokenizer.model alone without any dummy blank; no Mixtral was trained so.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import TokenizerError
from .declared import CONFIG_FILE, Added, Declared
from .decoding import Meaning, StreamDecoder
from .engine import Engine
from .pieces import Kind, read_model, read_pieces, sentencepiece_encoder

_NO_DUMMY_BLANK = b"\x1a\x02\x18\x00"  # normalizer_spec { add_dummy_prefix: false }; of two values the last holds


def read_tokenizer_model(file: Path, declared: Declared) -> Engine:
    """Raises TokenizerError if the file cannot be used (pieces.read_pieces), or lacks BOS or EOS."""
    data = read_model(file)
    pieces = read_pieces(data, file)
    meanings: list[Meaning] = []
    for piece in pieces.all:
        if piece.kind is Kind.BYTE:
            meanings.append(int(piece.text[3:5], 16))
        elif piece.kind is Kind.UNKNOWN:
            meanings.append(pieces.unk_surface)
        else:
            meanings.append(None if piece.kind is Kind.CONTROL else piece.text)
    ids = {piece.text: index for index, piece in enumerate(pieces.all)}
    special = {piece.text: index for index, piece in pieces.of_kind(Kind.CONTROL)}
    added, remarks = _added(declared, ids, file)
    looked_for = {piece.text: (index, Added(piece.text, True)) for index, piece in pieces.of_kind(Kind.CONTROL)}
    unknown = next(piece.text for _, piece in pieces.of_kind(Kind.UNKNOWN))
    for index, token in added:
        if index < len(meanings):
            ids.pop(pieces.all[index].text, None)
        else:
            meanings += [None] * (index + 1 - len(meanings))  # ids that nothing names print nothing
        ids[token.content] = index
        looked_for[token.content] = (index, token)
        if token.special and token.content != unknown:
            special[token.content] = index
        if token.content != unknown:
            meanings[index] = None if token.special else token.content
    names = {"bos_token": "<s>", "eos_token": "</s>", **declared.names}
    missing = [names[name] for name in ("bos_token", "eos_token") if names[name] not in ids]
    if missing:
        raise TokenizerError(f"lacks the control token {' and '.join(missing)}", file=file)
    config = declared.config
    return Engine(
        file, meanings, ids, special, _encoder(data, file, looked_for, bool(config.get("legacy", True))),
        before=(ids[names["bos_token"]],) if config.get("add_bos_token", True) else (),
        after=(ids[names["eos_token"]],) if config.get("add_eos_token", False) else (),
        stream=lambda: StreamDecoder(meanings), remarks=tuple(remarks),
    )  # fmt: skip


def _added(declared: Declared, ids: dict[str, int], file: Path) -> tuple[list[tuple[int, Added]], list[str]]:
    """The added tokens by id, with those special ones that have a name and no id: they come at the end."""
    added = dict(declared.added)
    spelled = {index: text for text, index in ids.items()}
    remarks = [
        f"{declared.folder / CONFIG_FILE} calls id {index} {token.content!r}, {file.name} {spelled[index]!r}; "
        "the former holds"
        for index, token in added.items()
        if index in spelled and spelled[index] != token.content
    ]
    if any(index < 0 for index in added):
        raise TokenizerError("gives an added token an id below 0", file=declared.folder / CONFIG_FILE)
    known = {*ids, *(token.content for token in added.values())}
    following = max([*ids.values(), *added]) + 1
    for text in dict.fromkeys([*declared.names.values(), *declared.extra]):
        if text not in known:
            added[following] = Added(text, special=True)
            following += 1
    return sorted(added.items()), remarks


def _encoder(
    data: bytes, file: Path, looked_for: dict[str, tuple[int, Added]], legacy: bool
) -> Callable[[str, bool], list[int]]:
    first = sentencepiece_encoder(data, file)
    later = first if legacy else sentencepiece_encoder(data + _NO_DUMMY_BLANK, file)
    tokens = list(looked_for.values())
    patterns = {parse: pattern(token for _, token in tokens if parse or not token.special) for parse in (False, True)}

    def encode(text: str, parse_special: bool) -> list[int]:
        found, ids = patterns[parse_special], []
        for at, stretch, token in stretches(text, found):
            ids += (later if at else first)(stretch) if stretch else []
            ids += [looked_for[token][0]] if token else []
        return ids

    return encode


def pattern(tokens: Iterable[Added]) -> re.Pattern[str] | None:
    """One that finds any of `tokens`, of two at one place the longer; its group is the token itself."""
    parts = []
    for place, token in enumerate(sorted(tokens, key=lambda token: -len(token.content))):
        left = (r"\s*" if token.lstrip else "") + (r"(?<!\w)" if token.single_word else "")
        right = (r"(?!\w)" if token.single_word else "") + (r"\s*" if token.rstrip else "")
        if token.content:
            parts.append(f"{left}(?P<t{place}>{re.escape(token.content)}){right}")
    return re.compile("|".join(parts)) if parts else None


def stretches(text: str, found: re.Pattern[str] | None) -> Iterator[tuple[int, str, str]]:
    """(where it starts, text without added tokens, the token after it or ""), to the end of `text`."""
    at = 0
    for match in found.finditer(text) if found else ():
        yield at, text[at : match.start()], match[match.lastgroup]  # type: ignore[index]  # one group matched
        at = match.end()
    yield at, text[at:], ""
