"""Perplexity under the three protocols whose figures people compare.

    name      windows                                         counted predictions
    gptq      ctx tokens (2048), side by side, rest dropped   all ctx - 1 of each
    llamacpp  ctx tokens (512), side by side, rest dropped,   those of the second half: from position ctx/2 on
              the first token of each replaced by BOS
    hf        ctx tokens (2048), one every `stride` tokens    what no earlier window has predicted

The text is tokenized once, as it stands, BOS first. gptq is the evaluation of github.com/IST-DASLab/gptq, llamacpp that
of llama-perplexity, hf that of transformers' guide "Perplexity of fixed-length models", except that the guide weighs
each window by its count less one, while here every predicted token weighs the same.

Beside the perplexity of a token stand those of a word and of a byte, by which models of different tokenizers compare:
exp(total nll / words) and exp(total nll / bytes), as lm-evaluation-harness has them, of what the counted tokens spell
(`spell`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, TensorError, UsageError
from ..inference.stream import Stream
from ..machine import peak_memory

if TYPE_CHECKING:
    from ..text.tokenizer import Tokenizer

_ROWS = 64
DEFAULT_CTX = {"gptq": 2048, "llamacpp": 512, "hf": 2048}


@dataclass(frozen=True)
class Windows:
    """A text, cut. Of sequence i the predictions from position `firsts[i]` to the last but one are counted."""

    protocol: str
    ctx: int
    sequences: tuple[Tensor, ...]  # ids [T] each
    firsts: tuple[int, ...]
    starts: tuple[int, ...] = ()  # where each begins in the text, which `cut` knows

    def rows(self) -> Tensor:
        """Where the counted predictions are made: [n] indices into all sequences joined."""
        parts, start = [], 0
        for ids, first in zip(self.sequences, self.firsts, strict=True):
            parts.append(torch.arange(start + first, start + len(ids) - 1))
            start += len(ids)
        return torch.cat(parts)

    def targets(self) -> Tensor:
        """The ids that are predicted there, [n]."""
        return torch.cat([ids[first + 1 :] for ids, first in zip(self.sequences, self.firsts, strict=True)])

    def places(self) -> list[int]:
        """Where the targets stand in the text's ids, [n]; of windows that were cut from one."""
        parts = zip(self.starts, self.sequences, self.firsts, strict=True)
        return [place for start, ids, first in parts for place in range(start + first + 1, start + len(ids))]

    def counts(self) -> list[int]:
        """Counted predictions of each sequence."""
        return [len(ids) - 1 - first for ids, first in zip(self.sequences, self.firsts, strict=True)]


class Spelled(NamedTuple):
    """How much text the counted tokens spell: words between white space, and bytes of UTF-8."""

    words: int
    bytes: int


@dataclass(frozen=True)
class Perplexity:
    """What `measure` found. `nll` [n], fp64: -ln p of each counted token, window by window."""

    windows: Windows
    nll: Tensor
    seconds: float
    remarks: tuple[str, ...] = ()
    spelled: Spelled | None = None

    @property
    def perplexity(self) -> float:
        return _exp(float(self.nll.mean()))

    @property
    def word_perplexity(self) -> float | None:
        """exp(total nll / words); None where the counted tokens spell no word, or nobody counted."""
        return _exp(float(self.nll.sum()) / self.spelled.words) if self.spelled and self.spelled.words else None

    @property
    def byte_perplexity(self) -> float | None:
        """exp(total nll / bytes); None as above."""
        return _exp(float(self.nll.sum()) / self.spelled.bytes) if self.spelled and self.spelled.bytes else None

    @property
    def stderr(self) -> float:
        """Of the perplexity, by the delta method: that of the mean nll, times the perplexity."""
        return self.perplexity * stderr(self.nll)

    def by_window(self) -> list[float]:
        """Mean nll of each window."""
        return [float(part.mean()) for part in torch.split(self.nll, self.windows.counts())]

    def document(self) -> dict[str, Any]:
        return {
            "perplexity": self.perplexity,
            "word_perplexity": self.word_perplexity,
            "byte_perplexity": self.byte_perplexity,
            "stderr": self.stderr,
            "tokens": len(self.nll),
            "protocol": self.windows.protocol,
            "ctx": self.windows.ctx,
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory(),
            "remarks": list(self.remarks),
        }


def stderr(values: Tensor) -> float:
    """Standard error of the mean of values [n]; 0 for a single one."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else 0.0


def spell(tokenizer: Tokenizer, ids: Sequence[int], windows: Windows) -> Spelled:
    """Words and bytes of what the counted tokens of a text spell; `ids` are all of the text, as `cut` got them.

    Each token spells its part of the text, so that all of them together spell the text; a character of several tokens
    belongs to the last of them, as in SentencePiece. The parts of the counted tokens are joined in the order of the
    text, and what is not counted left out: the first token of each window with gptq, the first half of each and a token
    with llamacpp, nothing but BOS with hf (with a stride of ctx, too, the first of each window). So a word that two
    windows share is one word where either counts a piece of it, and the words cut at the ends of counted stretches are
    joined two to one. lm-evaluation-harness, which measures documents whole, counts an empty word more where one begins
    or ends with white space.
    """
    decoder = tokenizer.stream()
    parts = [decoder.push(token) for token in ids]
    text = "".join(parts[place] for place in windows.places())
    return Spelled(len(text.split()), len(text.encode("utf-8")))


def cut(
    ids: Sequence[int],
    protocol: str = "gptq",
    *,
    bos_id: int,
    ctx: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
) -> Windows:
    """Windows over the ids of a text (BOS first), the first `max_tokens` of them if given.

    `stride` belongs to the protocol hf, ctx/2 unless given. Raises UsageError for options that cannot be, InputError
    for a text that is shorter than one window.
    """
    if protocol not in DEFAULT_CTX:
        raise UsageError(f"protocol {protocol!r} is not one of {', '.join(DEFAULT_CTX)}")
    if stride is not None and protocol != "hf":
        raise UsageError(f"a stride belongs to the protocol hf, not to {protocol}")
    ctx = DEFAULT_CTX[protocol] if ctx is None else ctx
    stride = max(1, ctx // 2) if stride is None else stride
    if ctx < 2 or (protocol == "llamacpp" and ctx < 4):
        raise UsageError(f"a window of {ctx} tokens predicts nothing")
    if not 1 <= stride <= ctx:
        raise UsageError(f"a stride of {stride} does not fit windows of {ctx} tokens; take 1 to {ctx}")
    text = torch.tensor(ids[:max_tokens], dtype=torch.long)
    shortest = 2 if protocol == "hf" else ctx
    if len(text) < shortest:
        advice = f"--ctx {len(text)} or less would fit" if len(text) >= 4 else "give a longer text"
        raise InputError(f"the text has {len(text)} tokens, fewer than one window of {ctx}; {advice}")
    if protocol == "hf":
        return _sliding(text, ctx, stride)
    windows = text[: len(text) // ctx * ctx].view(-1, ctx)
    starts = tuple(range(0, windows.numel(), ctx))
    if protocol == "gptq":
        return Windows(protocol, ctx, tuple(windows), (0,) * len(windows), starts)
    windows = windows.clone()
    windows[:, 0] = bos_id
    return Windows(protocol, ctx, tuple(windows), (ctx // 2,) * len(windows), starts)


def _sliding(text: Tensor, ctx: int, stride: int) -> Windows:
    sequences, firsts, starts = [], [], []
    predicted = 1  # tokens before it are done; the very first has no prediction
    for start in range(0, len(text), stride):
        end = min(start + ctx, len(text))
        first = max(0, predicted - 1 - start)  # a stride of ctx leaves each window's first token without a past
        if first < end - start - 1:
            sequences.append(text[start:end])
            firsts.append(first)
            starts.append(start)
        predicted = end
        if end == len(text):
            break
    return Windows("hf", ctx, tuple(sequences), tuple(firsts), tuple(starts))


def measure(stream: Stream, windows: Windows, spelled: Spelled | None = None) -> Perplexity:
    """Run the windows and score them; by words and bytes, too, where `spelled` tells how many there are.

    Raises what Stream.hidden raises, and TensorError if the model gives NaN.
    """
    start = time.perf_counter()
    rows, targets = windows.rows(), windows.targets()
    nll = torch.empty(len(rows), dtype=torch.float64)
    with stream.hidden(windows.sequences) as states:
        stream.progress.start("head", len(rows), "tok")
        for at, logits in stream.logits(states, rows):
            end = at + len(logits)
            nll[at:end] = token_nll(logits, targets[at:end].to(logits.device))
            stream.progress.advance(len(logits))
        stream.progress.finish()
    if not bool(nll.isfinite().all()):
        place = int((~nll.isfinite()).nonzero()[0])
        raise TensorError(
            f"the model gives {float(nll[place])} from prediction {place} of {len(nll)} on: its weights hold NaN or "
            "Inf (`mixtools inspect --verify` finds them), or overflow in this dtype"
        )
    return Perplexity(windows, nll, time.perf_counter() - start, tuple(stream.remarks), spelled)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of targets [n] under logits [n, V] fp32."""
    # a few rows at a time: what a sum makes on its way stays in the cache
    total = torch.cat([rows.logsumexp(-1) for rows in torch.split(logits, _ROWS)])
    return total - logits.gather(-1, targets[:, None])[:, 0]


def _exp(mean: float) -> float:
    return math.exp(min(mean, 700.0))  # beyond, a float would overflow
