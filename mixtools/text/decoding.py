"""Ids to text, one by one: the pieces of text joined are what all ids give at once.

Two ways of spelling text are in use: SentencePiece's (U+2581 for blanks, bytes as pieces of their own, a blank before
the first word that is not there) and the byte-level one of GPT-2 and Llama 3 (every byte as a printable character).
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Protocol

from ..errors import TokenizerError
from .pieces import BLANK

_REPLACEMENT = "\ufffd"

# what an id stands for: text with U+2581 for blanks, a byte, bytes, or nothing that is ever printed (a control token)
Meaning = str | int | bytes | None


class Decoder(Protocol):
    """Takes one id at a time."""

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty. Raises TokenizerError if it is not in the vocabulary."""
        ...

    def finish(self) -> str:
        """What is left: bytes that wait for more."""
        ...


def meaning(meanings: Sequence[Meaning], token: int) -> Meaning:
    """What `token` stands for. Raises TokenizerError if it is not in the vocabulary."""
    if not 0 <= token < len(meanings):
        raise TokenizerError(f"id {token} is not in the vocabulary of {len(meanings)}")
    return meanings[token]


class StreamDecoder:
    """For SentencePiece's spelling; `strip`: the blank of the first word is not text.

    A character spread over byte pieces comes out when its last byte is there; bytes that are no UTF-8 come out as
    U+FFFD, one for each, as in SentencePiece.
    """

    def __init__(self, meanings: Sequence[Meaning], strip: bool = True) -> None:
        self._meanings = meanings
        self._bytes = bytearray()
        self._at_start = strip

    def push(self, token: int) -> str:
        found = meaning(self._meanings, token)
        if isinstance(found, int):
            self._bytes.append(found)
            return self._drain(final=False)
        text = self._drain(final=True)
        if not isinstance(found, str):
            return text
        if self._at_start and found.startswith(BLANK):
            found = found[1:]
            self._at_start = False
        self._at_start &= not found
        return text + found.replace(BLANK, " ")

    def finish(self) -> str:
        return self._drain(final=True)

    def _drain(self, final: bool) -> str:
        text = ""
        while self._bytes:
            lead = self._bytes[0]
            size = 1 if lead < 0x80 else 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4
            if lead < 0xF5 and len(self._bytes) < size and not final:
                break
            try:
                text += self._bytes[:size].decode("utf-8")
            except UnicodeDecodeError:
                size = 1
                text += _REPLACEMENT
            del self._bytes[:size]
        self._at_start &= not text
        return text


class ByteStreamDecoder:
    """For the byte-level spelling. Bytes that are no UTF-8 come out as U+FFFD, one for each cut-short character."""

    def __init__(self, meanings: Sequence[Meaning]) -> None:
        self._meanings = meanings
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        found = meaning(self._meanings, token)
        return self._decoder.decode(found) if isinstance(found, bytes) else ""

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def byte_alphabet() -> Mapping[str, int]:
    """Character -> byte of the byte-level spelling.

    A byte that is a printable character of Latin-1 is spelled by it, the others in order by U+0100 and on. Source:
    bytes_to_unicode in https://github.com/openai/gpt-2/blob/master/src/encoder.py.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def spelled_bytes(token: str, alphabet: Mapping[str, int]) -> bytes:
    """The bytes of a byte-level token; an added token with other characters in it stands for itself."""
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return token.encode("utf-8")
