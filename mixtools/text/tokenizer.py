"""Tokenizer: text to ids and back, conversations to ids, and the files that Hugging Face's loaders read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import TokenizerError
from . import chat
from .pieces import BLANK, JSON_FILE, MODEL_FILE, Kind, read_model, read_pieces, sentencepiece_encoder
from .tokenizer_files import hf_files

if TYPE_CHECKING:
    from ..config import MixtralConfig

__all__ = ["StreamDecoder", "Tokenizer", "hf_files"]

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd"

# what an id stands for: text with U+2581 for blanks, a byte, or nothing that is ever printed (a control token)
Meaning = str | int | None


class Tokenizer:
    """A Mixtral's tokenizer: SentencePiece's where tokenizer.model is there, else tokenizer.json's."""

    def __init__(
        self,
        file: Path,
        meanings: Sequence[Meaning],
        control: Mapping[str, int],
        encode: Callable[[str], list[int]],
    ) -> None:
        """`meanings`: one for each id. `control`: ids of the control tokens. `encode`: text to ids, without BOS."""
        self.file = file
        self._meanings = meanings
        self._control = control
        self._encode = encode
        missing = {"<s>", "</s>"} - control.keys()
        if missing:
            raise TokenizerError(f"lacks the control token {' and '.join(sorted(missing))}", file=file)
        self.bos_id = control["<s>"]
        self.eos_id = control["</s>"]

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a model folder. Raises TokenizerError if there is none, or it is damaged or not BPE."""
        folder = Path(folder)
        if (model := folder / MODEL_FILE).exists():
            return _from_model(model)
        if (document := folder / JSON_FILE).exists():
            return _from_json(document)
        raise TokenizerError(f"holds neither {MODEL_FILE} nor {JSON_FILE}", file=folder)

    @property
    def vocab_size(self) -> int:
        return len(self._meanings)

    def check_vocab(self, config: MixtralConfig) -> str | None:
        """Compare with the model's vocabulary: None if equal, a remark if the model's is padded.

        Raises TokenizerError if the model is smaller: it has no embedding for some ids.
        """
        rows, pieces = config.vocab_size, self.vocab_size
        if rows < pieces:
            raise TokenizerError(
                "this tokenizer does not belong to the model: more pieces than the model has embeddings",
                file=self.file,
                expected=f"at most {rows}",
                found=pieces,
            )
        if rows == pieces:
            return None
        return f"{self.file}: {pieces} pieces for a model of {rows}; ids from {pieces} on are padding or added later"

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, as SentencePiece gives them. What looks like a control token is text here.

        Raises TokenizerError if `text` holds a lone surrogate, which no encoding of Unicode can carry.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: a lone surrogate at {error.start}") from None
        return [self.bos_id] * bos + self._encode(text)

    def encode_chat(self, messages: Sequence[Mapping[str, object]], continue_final: bool = False) -> list[int]:
        """Ids of a conversation, BOS included, ready for the model to answer (chat.py tells the format).

        `messages`: mappings with "role" (system, user, assistant) and "content" (text). A conversation that ends with
        the assistant is closed by EOS, unless `continue_final`. Raises TokenizerError as chat.turns does.
        """
        style = chat.style_of(self._control)
        ids: list[int] = []
        for text, is_control in chat.segments(chat.turns(messages, style), style, closed=not continue_final):
            ids += [self._control[text]] if is_control else self.encode(text, bos=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`, as SentencePiece gives it: no control tokens, without the blank that encoding put first."""
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def stream(self) -> StreamDecoder:
        """A decoder that takes one id at a time."""
        return StreamDecoder(self._meanings)


class StreamDecoder:
    """Ids to text, one by one: the pieces of text joined are what decode gives for all ids.

    A character spread over byte pieces comes out when its last byte is there; bytes that are no UTF-8 come out as
    U+FFFD, one for each, as in SentencePiece.
    """

    def __init__(self, meanings: Sequence[Meaning]) -> None:
        self._meanings = meanings
        self._bytes = bytearray()
        self._at_start = True

    def push(self, token: int) -> str:
        """The text that `token` completes, often empty. Raises TokenizerError if it is not in the vocabulary."""
        if not 0 <= token < len(self._meanings):
            raise TokenizerError(f"id {token} is not in the vocabulary of {len(self._meanings)}")
        meaning = self._meanings[token]
        if isinstance(meaning, int):
            self._bytes.append(meaning)
            return self._drain(final=False)
        text = self._drain(final=True)
        if meaning is None:
            return text
        if self._at_start and meaning.startswith(BLANK):
            meaning = meaning[1:]
            self._at_start = False
        self._at_start &= not meaning
        return text + meaning.replace(BLANK, " ")

    def finish(self) -> str:
        """What is left: bytes that wait for more."""
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


def _from_model(file: Path) -> Tokenizer:
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
    control = {piece.text: index for index, piece in pieces.of_kind(Kind.CONTROL)}
    return Tokenizer(file, meanings, control, sentencepiece_encoder(data, file))


def _from_json(file: Path) -> Tokenizer:
    import tokenizers

    try:
        text = read_model(file).decode("utf-8")
        document = json.loads(text)
        model = document["model"]
        if model.get("type", "BPE") != "BPE" or not model.get("byte_fallback"):
            raise TokenizerError("is not BPE with byte fallback, as a Mixtral's is", file=file)
        backend: Any = tokenizers.Tokenizer.from_str(text)
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        special = {str(token["content"]) for token in document.get("added_tokens", []) if token["special"]}
        unknown = str(model.get("unk_token"))
    except TokenizerError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise TokenizerError(f"is damaged or no tokenizer ({error})", file=file) from None
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise TokenizerError("its ids have gaps or repeat", file=file)
    meanings: list[Meaning] = [None] * len(vocabulary)
    for piece, index in vocabulary.items():
        if match := _BYTE.fullmatch(piece):
            meanings[index] = int(match[1], 16)
        elif piece == unknown:
            meanings[index] = " ⁇ "  # SentencePiece's word for it
        elif piece not in special:
            meanings[index] = piece
    backend.encode_special_tokens = True  # a "</s>" that somebody typed is text

    def encode(text: str) -> list[int]:
        ids: list[int] = backend.encode(text, add_special_tokens=False).ids
        return ids

    control = {piece: index for piece, index in vocabulary.items() if piece in special - {unknown}}
    return Tokenizer(file, meanings, control, encode)
