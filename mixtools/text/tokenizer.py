"""Tokenizer: text to ids and back, conversations to ids. hf_files: the files that Hugging Face's loaders read.

folder ─► declared.py      tokenizer_config.json, added_tokens.json, template, ends
   ├────► from_json.py     tokenizer.json, where it is there ─┐
   └────► from_model.py    tokenizer.model else ──────────────┴► Engine ─► Tokenizer
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import TokenizerError
from . import chat
from .declared import CONFIG_FILE, Declared, has_tokenizer, model_file
from .decoding import Decoder
from .engine import Engine
from .from_json import read_tokenizer_json
from .from_model import read_tokenizer_model
from .pieces import JSON_FILE, MODEL_FILE, Kind, read_model, read_pieces, sentencepiece_encoder
from .tokenizer_files import hf_files

if TYPE_CHECKING:
    from ..config import MixtralConfig

__all__ = ["Tokenizer", "has_tokenizer", "hf_files"]


class Tokenizer:
    """A Mixtral's tokenizer, the one that transformers would use: tokenizer.json's, else tokenizer.model's.

    `remarks`: what a user should know of the files, such as that the two disagree.
    """

    def __init__(self, engine: Engine, declared: Declared) -> None:
        self.file = engine.file
        self.remarks = engine.remarks
        if engine.after:
            self.remarks += (f"{engine.file}: EOS goes after every text, as its documents say (add_eos_token)",)
        self.special: Mapping[str, int] = engine.special  # ids of the special tokens
        self.meanings = engine.meanings  # of each id
        self._engine = engine
        self._declared = declared

    @classmethod
    def from_folder(cls, folder: Path | str) -> Tokenizer:
        """The tokenizer of a model folder. Raises TokenizerError if there is none, or it is damaged or not BPE, and
        ConfigError for another document of the folder that is damaged."""
        folder = Path(folder)
        declared = Declared.of(folder)
        model = model_file(folder)
        if (document := folder / JSON_FILE).exists():
            engine = read_tokenizer_json(document, declared)
            if model is not None and (remark := _disagreement(engine, model)):
                engine = dataclasses.replace(engine, remarks=(*engine.remarks, remark))
            return cls(engine, declared)
        if model is None:
            raise TokenizerError(f"holds neither {JSON_FILE} nor {MODEL_FILE}", file=folder)
        return cls(read_tokenizer_model(model, declared), declared)

    @property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return len(self._engine.meanings)

    @property
    def bos_id(self) -> int:
        """Raises TokenizerError if neither the tokenizer nor config.json tells one."""
        if (found := self._id("bos_token", "<s>", *self._engine.before)) is None:
            raise TokenizerError("has no token for the beginning of a text (bos_token)", file=self.file)
        return found

    @property
    def eos_id(self) -> int | None:
        return self._id("eos_token", "</s>")

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end generation: generation_config.json's or config.json's, else the tokenizer's EOS."""
        return self._declared.ends or (() if self.eos_id is None else (self.eos_id,))

    def _id(self, name: str, usual: str, *around: int) -> int | None:
        """By the folder's documents, the ids round every text, and the usual spelling."""
        ids, spelled = self._engine.ids, self._declared.names.get(name, "")
        if spelled in ids:
            return ids[spelled]
        usuals = [ids[usual]] if usual in ids else []
        return next(iter([*self._declared.ids.get(name, ()), *around, *usuals]), None)

    def check_vocab(self, config: MixtralConfig) -> str | None:
        """What a user should know of this tokenizer with this model: `remarks`, and vocabularies that differ in size.

        None if all is well. A tokenizer that has more ids than the model has rows is no fault until one of those is
        used: see expect_known.
        """
        rows, pieces = config.vocab_size, self.vocab_size
        remarks = [*self.remarks]
        if rows < pieces:
            _, first = min((index, text) for text, index in self._engine.ids.items() if index >= rows)
            remarks.append(
                f"{self.file}: {pieces} pieces for a model of {rows}; ids from {rows} on ({first!r}) cannot be used"
            )
        elif rows > pieces:
            remarks.append(
                f"{self.file}: {pieces} pieces for a model of {rows}; ids from {pieces} on are padding or added later"
            )
        return "; ".join(remarks) or None

    def expect_known(self, ids: Iterable[int], config: MixtralConfig) -> None:
        """Raises TokenizerError for an id beyond the model's rows, with its spelling."""
        beyond = next((token for token in ids if not 0 <= token < config.vocab_size), None)
        if beyond is not None:
            spelled = next((text for text, index in self._engine.ids.items() if index == beyond), "")
            raise TokenizerError(
                f"token {spelled!r} has the id {beyond}, and the model has {config.vocab_size} rows: the tokenizer "
                "of another model, or tokens that were added without training them",
                file=self.file,
            )

    def encode(self, text: str, bos: bool = True, parse_special: bool = False) -> list[int]:
        """Ids of `text`. What looks like a special token is text here, unless `parse_special`; added tokens that are
        not special are always meant. `bos`: with what the tokenizer puts round every text, mostly BOS before it.

        Raises TokenizerError if `text` holds a lone surrogate, which no encoding of Unicode can carry.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(f"the text is not valid Unicode: a lone surrogate at {error.start}") from None
        ids = self._engine.encode(text, parse_special)
        return [*self._engine.before, *ids, *self._engine.after] if bos else ids

    def encode_chat(self, messages: Sequence[Mapping[str, object]], answered: bool = False) -> list[int]:
        """Ids of a conversation in the model's own format: ready for the model to answer, unless it is `answered`.

        `messages`: mappings with "role" (system, user, assistant) and "content" (text). By the folder's chat template;
        mistral's own folders, which know none, mean mistral's format. Raises TokenizerError if the template refuses the
        conversation, and for a model without one.
        """
        template = self._declared.template()
        if template is None and self._declared.is_mistrals:
            return self.encode_instruct(messages)
        if template is None:
            raise TokenizerError(
                f"has no chat template, neither in {CONFIG_FILE} nor in a file of its own: a base model? It can "
                "continue a text, with --prompt and without --chat",
                file=self._declared.folder,
            )
        text = self._rendered(template, messages, answered)
        return self.encode(text, bos=False, parse_special=True)

    def chat_text(self, messages: Sequence[Mapping[str, object]]) -> str | None:
        """What `encode_chat` makes ids of, for a person to read; None for a model without a template.

        Of mistral's own folders it is what their pieces look like side by side. Raises TokenizerError as `encode_chat`.
        """
        template = self._declared.template()
        if template is None and self._declared.is_mistrals:
            template = chat.template(chat.style_of(self.special), self.special)
        return None if template is None else self._rendered(template, messages, False).replace(chat.MARKER, "")

    def _rendered(self, template: str, messages: Sequence[Mapping[str, object]], answered: bool) -> str:
        from .rendering import render

        names = self._declared.names
        if not (self._declared.folder / JSON_FILE).exists():
            names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **names}
        try:
            return render(template, messages, add_generation_prompt=not answered, **names)
        except ValueError as error:
            raise TokenizerError(
                f"the model's chat template refuses the conversation: {error}", file=self._declared.folder
            ) from None

    def encode_instruct(self, messages: Sequence[Mapping[str, object]], continue_final: bool = False) -> list[int]:
        """Ids of a conversation in mistral's own format, BOS included (chat.py tells it).

        A conversation that ends with the assistant is closed by EOS, unless `continue_final`. Raises TokenizerError as
        chat.turns does, and for a tokenizer without <s> and </s>.
        """
        if missing := {"<s>", "</s>"} - self.special.keys():
            raise TokenizerError(f"lacks the control token {' and '.join(sorted(missing))}", file=self.file)
        style = chat.style_of(self.special)
        ids: list[int] = []
        for text, is_control in chat.segments(chat.turns(messages, style), style, closed=not continue_final):
            ids += [self.special[text]] if is_control else self.encode(text, bos=False)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`: no special tokens, and without the blank that SentencePiece puts first."""
        stream = self.stream()
        return "".join([stream.push(token) for token in ids]) + stream.finish()

    def stream(self) -> Decoder:
        """A decoder that takes one id at a time."""
        return self._engine.stream()


def _disagreement(engine: Engine, model: Path) -> str | None:
    """A remark if tokenizer.model, which is not used, gives other ids than tokenizer.json."""
    place = f"{model} is not used: {JSON_FILE} is, as in transformers"
    try:
        data = read_model(model)
        pieces = read_pieces(data, model)
        spelled = [piece.text.replace("▁", " ") for _, piece in pieces.of_kind(Kind.NORMAL)]
        probe = "".join(spelled[:: max(1, len(spelled) // 500)])
        theirs = sentencepiece_encoder(data, model)(probe)
    except TokenizerError as error:
        return f"{place}; it cannot be read ({error.message})"
    names = {index: text for text, index in engine.ids.items()}
    for index, piece in enumerate(pieces.all):
        if names.get(index) != piece.text:
            return f"{place}; they disagree: id {index} is {piece.text!r} here, {names.get(index)!r} there"
    for index, piece in pieces.of_kind(Kind.CONTROL):
        if piece.text not in engine.special:
            return f"{place}; they disagree: id {index}, {piece.text!r}, is a control token here, none there"
    if engine.encode(probe, False) != theirs:
        return f"{place}; they disagree: the same pieces, but other ids for a text made of them"
    return None
