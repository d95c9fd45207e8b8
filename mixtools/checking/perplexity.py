"""Perplexity under the three protocols whose figures people compare.

    name      windows                                         counted predictions
    gptq      ctx tokens (2048), side by side, rest dropped   all ctx - 1 of each
    llamacpp  ctx tokens (512), side by side, rest dropped,   those of the second half: from position ctx/2 on
              the first token of each replaced by BOS
    hf        ctx tokens (2048), one every `stride` tokens    what no earlier window has predicted

The text is tokenized once, as it stands, BOS first. gptq is the evaluation of github.com/IST-DASLab/gptq, llamacpp that
of llama-perplexity, hf that of transformers' guide "Perplexity of fixed-length models", except that the guide weighs
each window by its count less one, while here every predicted token weighs the same.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, TensorError, UsageError
from ..inference.stream import Stream
from ..machine import peak_memory

_ROWS = 64
DEFAULT_CTX = {"gptq": 2048, "llamacpp": 512, "hf": 2048}


@dataclass(frozen=True)
class Windows:
    """A text, cut. Of sequence i the predictions from position `firsts[i]` to the last but one are counted."""

    protocol: str
    ctx: int
    sequences: tuple[Tensor, ...]  # ids [T] each
    firsts: tuple[int, ...]

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

    def counts(self) -> list[int]:
        """Counted predictions of each sequence."""
        return [len(ids) - 1 - first for ids, first in zip(self.sequences, self.firsts, strict=True)]


@dataclass(frozen=True)
class Perplexity:
    """What `measure` found. `nll` [n], fp64: -ln p of each counted token, window by window."""

    windows: Windows
    nll: Tensor
    seconds: float
    remarks: tuple[str, ...] = ()

    @property
    def perplexity(self) -> float:
        return math.exp(min(float(self.nll.mean()), 700.0))  # beyond, a float would overflow

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


def read_text(path: Path) -> str:
    """The text of a file, exactly. Raises InputError if it cannot be read, is empty, or is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"is not UTF-8 text: byte {error.start} is 0x{error.object[error.start]:02x}", file=path
        ) from None
    if not text.strip():
        raise InputError("holds no text", file=path)
    return text


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
    if protocol == "gptq":
        return Windows(protocol, ctx, tuple(windows), (0,) * len(windows))
    windows = windows.clone()
    windows[:, 0] = bos_id
    return Windows(protocol, ctx, tuple(windows), (ctx // 2,) * len(windows))


def _sliding(text: Tensor, ctx: int, stride: int) -> Windows:
    sequences, firsts, predicted = [], [], 1  # tokens before `predicted` are done; the very first has no prediction
    for start in range(0, len(text), stride):
        end = min(start + ctx, len(text))
        first = max(0, predicted - 1 - start)  # a stride of ctx leaves each window's first token without a past
        if first < end - start - 1:
            sequences.append(text[start:end])
            firsts.append(first)
        predicted = end
        if end == len(text):
            break
    return Windows("hf", ctx, tuple(sequences), tuple(firsts))


def measure(stream: Stream, windows: Windows) -> Perplexity:
    """Run the windows and score them. Raises what Stream.hidden raises, and TensorError if the model gives NaN."""
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
    return Perplexity(windows, nll, time.perf_counter() - start, tuple(stream.remarks))


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of targets [n] under logits [n, V] fp32."""
    # a few rows at a time: what a sum makes on its way stays in the cache
    total = torch.cat([rows.logsumexp(-1) for rows in torch.split(logits, _ROWS)])
    return total - logits.gather(-1, targets[:, None])[:, 0]
