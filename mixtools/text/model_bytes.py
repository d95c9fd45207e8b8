"""Pieces to the bytes of a SentencePiece tokenizer.model: what pieces.read_pieces reads.

The messages and their fields are those of sentencepiece_model.proto in https://github.com/google/sentencepiece, the
encoding is that of https://protobuf.dev/programming-guides/encoding. Written are the pieces, and of the trainer's and
the normalizer's settings those that decide about ids.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from .pieces import Kind, Piece

_BPE = 2  # TrainerSpec.ModelType
_VARINT, _BYTES, _FIXED32 = 0, 2, 5  # wire types


def encode_model(pieces: Sequence[Piece], *, dummy_blank: bool = True) -> bytes:
    """A BPE model with byte fallback that rewrites no text. `dummy_blank`: it puts a blank before each text.

    A piece of kind UNKNOWN, and <s> and </s> where they are there, become the ids that SentencePiece gives such names.
    """
    places = {piece.text: index for index, piece in enumerate(pieces)}
    unknown = next((index for index, piece in enumerate(pieces) if piece.kind is Kind.UNKNOWN), 0)
    trainer = _number(3, _BPE) + _number(4, len(pieces)) + _number(35, 1) + _number(40, unknown)
    trainer += _number(41, places.get("<s>", -1)) + _number(42, places.get("</s>", -1))
    if pieces:
        trainer += _text(45, pieces[unknown].text)
    normalizer = _text(1, "identity") + _number(3, int(dummy_blank)) + _number(4, 0) + _number(5, 1)
    return b"".join(_field(1, _piece(piece)) for piece in pieces) + _field(2, trainer) + _field(3, normalizer)


def _piece(piece: Piece) -> bytes:
    raw = _text(1, piece.text) + _varint(2 << 3 | _FIXED32) + struct.pack("<f", piece.score)
    return raw if piece.kind is Kind.NORMAL else raw + _number(3, piece.kind)


def _text(number: int, value: str) -> bytes:
    return _field(number, value.encode("utf-8"))


def _field(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _BYTES) + _varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _varint(number << 3 | _VARINT) + _varint(value & (1 << 64) - 1)  # a negative one as its two's complement


def _varint(value: int) -> bytes:
    raw = bytearray()
    while value > 0x7F:
        raw.append(value & 0x7F | 0x80)
        value >>= 7
    raw.append(value)
    return bytes(raw)
