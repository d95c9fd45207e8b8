"""Calibration texts: any file, or the one that comes with the package, as samples of ids.

A plain text is one stream of tokens, cut into windows (calibrate.cut). Of a file of documents (text/reading.py) each
sample is one document, as it would reach the model: a text behind BOS, a chat in the model's own template, cut at the
length of a sample; a shorter one stays as short as it is. Joined ones would fill every sample, but tokens would look
back into another document, which none does in use, and a chat would rarely begin where a sample does. llm-compressor
does the same; AutoAWQ joins, AutoRound drops what is short. Where there are fewer documents than samples, the long ones
give further windows.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import InputError, TokenizerError, UsageError
from ..text.reading import DEFAULT, DEFAULT_FILE, Documents, Message, document, documents, line_ends, read_text
from ..text.tokenizer import Tokenizer
from . import calibrate
from .sampling import Sampling

if TYPE_CHECKING:
    from ..layouts.checkpoint import Checkpoint


def sequences(
    source: str | Path,
    checkpoint: Checkpoint,
    *,
    samples: int = calibrate.DEFAULT_SAMPLES,
    seq_len: int = calibrate.DEFAULT_SEQ_LEN,
    sampling: str | None = None,
    seed: int | None = None,
    parse_special: bool = False,
) -> calibrate.Text:
    """At most `samples` sequences of at most `seq_len` ids for this model, those of one length side by side.

    `source`: a file, or the word "default" (a file of that name is ./default). `sampling`, `seed`: calibrate.cut; of
    documents, they choose which. `parse_special`: special tokens that a text spells are meant, as where a template was
    applied before; a BOS there counts as the text's own. What is not taken of a jsonl file is not parsed either.

    The notes tell of fewer or shorter samples than asked for, of Windows line ends, and of the tokenizer. Raises
    UsageError for samples that cannot be and for parquet without pyarrow, InputError for a file that cannot be read, is
    of another encoding, no JSON, too short, or a chat that the model has no template for, TokenizerError.
    """
    path = DEFAULT_FILE if source == DEFAULT else Path(source)
    tokenizer = Tokenizer.from_folder(checkpoint.beside)
    encoder = _Encoder(path, checkpoint, tokenizer, parse_special)
    how = Sampling.of(sampling, seed)
    if (found := documents(path)) is not None:
        text = _of_documents(encoder, found, (samples, seq_len), how)
    else:
        content = read_text(path, marked=True)
        ids = encoder.encode(content)
        try:
            text = calibrate.cut(ids, samples, seq_len, tokenizer.bos_id, sampling=sampling, seed=seed)
        except InputError as error:
            raise InputError(error.message, file=path) from None
        text = text._replace(notes=(*text.notes, *filter(None, [line_ends(content)])))
    remark = tokenizer.check_vocab(checkpoint.config)
    notes = (*text.notes, *([remark] if remark else []))
    name = DEFAULT if path == DEFAULT_FILE else path.name
    return text._replace(record={**text.record, "asked": samples}, notes=notes, name=name)


class _Pieces(NamedTuple):
    """A document's ids: the first sample, and what is left."""

    first: list[int]
    rest: list[int]


class _Encoder:
    """Documents to ids, each checked against the model's vocabulary."""

    def __init__(self, path: Path, checkpoint: Checkpoint, tokenizer: Tokenizer, parse_special: bool) -> None:
        self.path, self.bos_id, self._parse_special = path, tokenizer.bos_id, parse_special
        self._tokenizer, self._config = tokenizer, checkpoint.config

    def encode(self, text: str) -> list[int]:
        """Without BOS."""
        ids = self._tokenizer.encode(text, bos=False, parse_special=self._parse_special)
        self._tokenizer.expect_known(ids, self._config)
        return ids[1:] if self._parse_special and ids[:1] == [self.bos_id] else ids

    def pieces(self, found: Documents, index: int, seq_len: int) -> _Pieces | None:
        """None for a document without words. Raises InputError and TokenizerError that name the document."""
        content = document(self.path, found, index)
        if not (content.strip() if isinstance(content, str) else content):
            return None
        try:
            ids = [self.bos_id, *self.encode(content)] if isinstance(content, str) else self._chat(content)
        except TokenizerError as error:
            raise TokenizerError(f"{found.where(index)}: {error}", file=self.path) from None
        return _Pieces(ids[:seq_len], ids[seq_len:]) if len(ids) > 1 else None

    def _chat(self, messages: Sequence[Message]) -> list[int]:
        ids = self._tokenizer.encode_chat(messages, answered=True)
        self._tokenizer.expect_known(ids, self._config)
        return ids


def _of_documents(encoder: _Encoder, found: Documents, size: tuple[int, int], how: Sampling) -> calibrate.Text:
    samples, seq_len = size
    if samples < 1 or seq_len < 2:
        raise UsageError(f"{samples} samples of {seq_len} tokens calibrate nothing")
    taken, empty = _take(encoder, found, size, how)
    if not taken:
        raise InputError("holds no text", file=encoder.path)
    ids = [pieces.first for pieces in taken]
    ids += itertools.islice(_further(taken, encoder.bos_id, seq_len), samples - len(ids))
    tokens = sum(map(len, ids))
    if tokens < seq_len and len(taken) + empty == len(found):  # there is no more text in the file
        advice = f"--seq-len {tokens} would do"
        raise InputError(
            f"the documents have {tokens} tokens together, fewer than one sample of {seq_len}; {advice}",
            file=encoder.path,
        )
    ids.sort(key=len, reverse=True)  # stream.py runs neighbours of one length together
    digest = hashlib.sha256()
    for one in ids:
        digest.update(torch.tensor([len(one), *one], dtype=torch.long).numpy().tobytes())
    record: dict[str, Any] = {"samples": len(ids), "seq_len": seq_len, "tokens": tokens}
    record |= {"text": digest.hexdigest()[:16], "documents": len(found), **how.record()}
    notes = []
    if len(ids) < samples:
        notes.append(f"asked {samples} samples, the text has {len(ids)}")
    if empty:
        notes.append(f"{empty} of the documents {'is' if empty == 1 else 'are'} empty and not taken")
    if 2 * tokens < len(ids) * seq_len:
        notes.append(
            f"the {len(ids)} samples have {tokens} tokens, {tokens // len(ids)} on average and not {seq_len}, since a "
            "document is a sample: more samples would give more"
        )
    return calibrate.Text(tuple(map(torch.tensor, ids)), record, tuple(notes))


def _take(encoder: _Encoder, found: Documents, size: tuple[int, int], how: Sampling) -> tuple[list[_Pieces], int]:
    """The documents that are chosen, others in place of those without words, and how many these were."""
    samples, seq_len = size
    order = _order(how, min(samples, len(found)), len(found))
    taken: list[_Pieces] = []
    empty = 0
    while batch := sorted(itertools.islice(order, samples - len(taken))):  # sorted: a file is read from front to back
        for index in batch:
            if (pieces := encoder.pieces(found, index, seq_len)) is not None:
                taken.append(pieces)
            else:
                empty += 1
    return taken, empty


def _order(how: Sampling, count: int, there: int) -> Iterator[int]:
    if how.name != "spread":
        yield from how.order(there)
        return
    chosen = how.choose(count, there)
    yield from chosen
    yield from sorted(set(range(there)).difference(chosen))


def _further(taken: Sequence[_Pieces], bos_id: int, seq_len: int) -> Iterator[list[int]]:
    """Whole windows of what is left of the documents, BOS first, one of each in turn."""
    length = seq_len - 1
    for start in itertools.count(0, length):
        windows = [pieces.rest[start : start + length] for pieces in taken]
        windows = [window for window in windows if len(window) == length]
        if not windows:
            return
        yield from ([bos_id, *window] for window in windows)
