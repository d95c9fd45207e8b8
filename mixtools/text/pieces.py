"""The pieces of a SentencePiece tokenizer.model, read from its bytes.

The file is a protocol buffer, sentencepiece_model.proto of https://github.com/google/sentencepiece. Five messages and
a dozen fields of it matter here, so it is read directly: the sentencepiece package does not tell a user-defined piece
from a normal one, nor the normalizer's settings, and both decide whether a tokenizer.json can be exact.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

from ..errors import TokenizerError

MODEL_FILE = "tokenizer.model"
JSON_FILE = "tokenizer.json"
BLANK = "▁"  # U+2581: SentencePiece's spelling of a blank
MAX_MODEL_BYTES = 1 << 26  # the largest tokenizer.model in use has 5 MB
_BPE = 2  # TrainerSpec.ModelType
_LFS_POINTER = b"version https://git-lfs"


class Kind(IntEnum):
    """ModelProto.SentencePiece.Type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class Piece(NamedTuple):
    text: str
    score: float
    kind: Kind


@dataclass(frozen=True)
class Pieces:
    """The vocabulary of a tokenizer.model; the index of a piece is its id."""

    all: tuple[Piece, ...]
    unk_surface: str  # what SentencePiece prints for the unknown piece

    def of_kind(self, *kinds: Kind) -> Iterator[tuple[int, Piece]]:
        return ((index, piece) for index, piece in enumerate(self.all) if piece.kind in kinds)

    def id_of(self, text: str, kind: Kind) -> int | None:
        return next((index for index, piece in self.of_kind(kind) if piece.text == text), None)


def read_model(model: Path) -> bytes:
    """The bytes of a tokenizer's file. Raises TokenizerError if it is missing, unreadable, far too large, or what Git
    LFS leaves in its place (https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md)."""
    try:
        if model.stat().st_size > MAX_MODEL_BYTES:
            raise TokenizerError(f"is larger than {MAX_MODEL_BYTES} bytes; not a tokenizer", file=model)
        data = model.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot be read ({error.strerror})", file=model) from None
    if data.startswith(_LFS_POINTER):
        raise TokenizerError("is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`", file=model)
    return data


def sentencepiece_encoder(data: bytes, file: Path) -> Callable[[str], list[int]]:
    """SentencePiece's own encoder of a tokenizer.model. Raises TokenizerError if the package refuses the bytes."""
    import sentencepiece

    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except RuntimeError as error:
        raise TokenizerError(f"SentencePiece refuses it ({error})", file=file) from None
    encode: Callable[[str], list[int]] = processor.encode
    return encode


def read_pieces(data: bytes, file: str | Path) -> Pieces:
    """The pieces of `data`, the content of a tokenizer.model; `file` is for messages.

    Raises TokenizerError if the bytes are damaged or cut short, if the model is not BPE, or if it normalizes text: what
    follows holds for tokenizers like Mixtral's only (BPE, byte fallback, dummy prefix, no normalization).
    """
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] | None = None
    normalizer: dict[int, int | bytes] | None = None
    try:
        for number, value in _fields(data):
            if number == 1:
                pieces.append(_piece(_bytes(value)))
            elif number == 2:
                trainer = dict(_fields(_bytes(value)))
            elif number == 3:
                normalizer = dict(_fields(_bytes(value)))
            elif number == 5 and dict(_fields(_bytes(value))).get(2):
                raise TokenizerError("rewrites text when it decodes; it cannot be converted", file=file)
    except (ValueError, IndexError, struct.error) as error:
        raise TokenizerError(f"is damaged or no SentencePiece model ({error}); fetch it again", file=file) from None
    if not pieces or trainer is None or normalizer is None:
        raise TokenizerError("is cut short or no SentencePiece model; fetch it again", file=file)
    _check_model(trainer, normalizer, file)
    _check_pieces(pieces, file)
    surface = trainer.get(44, " ⁇ ".encode())
    return Pieces(tuple(pieces), _bytes(surface).decode("utf-8", "replace"))


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    text = _bytes(fields[1]).decode("utf-8") if 1 in fields else ""
    score = struct.unpack("<f", _bytes(fields[2]))[0] if 2 in fields else 0.0
    return Piece(text, score, Kind(_int(fields.get(3, Kind.NORMAL))))


def _check_model(trainer: dict[int, int | bytes], normalizer: dict[int, int | bytes], file: str | Path) -> None:
    """The proto's defaults are: unigram, add_dummy_prefix, remove_extra_whitespaces, escape_whitespaces."""
    if (kind := trainer.get(3, 1)) != _BPE:
        names = {1: "unigram", 3: "word", 4: "char"}
        name = names.get(_int(kind), str(kind))
        raise TokenizerError("only BPE models can be converted", file=file, expected="BPE", found=name)
    refused = {
        "has no byte fallback": not trainer.get(35, 0),
        "puts blanks at the end of words": bool(trainer.get(24, 0)),
        "normalizes text by a rule table": bool(normalizer.get(2, b"")),
        "adds no dummy prefix": not normalizer.get(3, 1),
        "removes extra blanks": bool(normalizer.get(4, 1)),
        "does not escape blanks": not normalizer.get(5, 1),
    }
    for reason, holds in refused.items():
        if holds:
            raise TokenizerError(f"{reason}, which no Mixtral's tokenizer does; it cannot be converted", file=file)


def _check_pieces(pieces: list[Piece], file: str | Path) -> None:
    seen: dict[str, int] = {}
    for index, piece in enumerate(pieces):
        if seen.setdefault(piece.text, index) != index:
            raise TokenizerError(f"piece {index} repeats piece {seen[piece.text]}, {piece.text!r}", file=file)
        if not math.isfinite(piece.score):
            raise TokenizerError(f"piece {index}, {piece.text!r}, has the score {piece.score}", file=file)
        if piece.kind is Kind.UNUSED:
            raise TokenizerError(f"piece {index}, {piece.text!r}, is switched off; it cannot be converted", file=file)
        if piece.kind is Kind.USER_DEFINED and (" " in piece.text or BLANK in piece.text):
            raise TokenizerError(f"user-defined piece {index}, {piece.text!r}, holds a blank", file=file)
        if piece.kind is Kind.NORMAL and BLANK in piece.text.lstrip(BLANK):
            raise TokenizerError(f"piece {index}, {piece.text!r}, reaches over a blank between words", file=file)
        if len(piece.text) < 2 and (not piece.text or piece.kind in (Kind.CONTROL, Kind.UNKNOWN)):
            raise TokenizerError(f"piece {index}, {piece.text!r}, is too short for its kind", file=file)
    expected = [f"<0x{byte:02X}>" for byte in range(256)]
    if [piece.text for piece in pieces if piece.kind is Kind.BYTE] != expected:
        raise TokenizerError("lacks a byte piece, or has them out of order", file=file)
    if sum(piece.kind is Kind.UNKNOWN for piece in pieces) != 1:
        raise TokenizerError("must have exactly one unknown piece", file=file)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of one protocol buffer message: an int for a varint, else the bytes.

    Format: https://protobuf.dev/programming-guides/encoding. Raises ValueError or IndexError if the message is cut.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire = tag & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        if at + size > len(data):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError(f"a number longer than 64 bits at byte {at}")


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a number where bytes should be")
    return value


def _int(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("bytes where a number should be")
    return int(value)
