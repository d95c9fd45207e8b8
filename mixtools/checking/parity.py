"""Two models over the same text: paired perplexity, KL divergence, same top-1, and agreement under teacher forcing.

Text and prompts go through each model together, a layer at a time, so that each weight of either is read once. The
hidden states of both are kept and the logits made again from them, chunk by chunk: the logits of a WikiText test set
would be 42 GB. Softmax, its logarithm and all sums are fp64: the divergence of a good output is 1e-3 and less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..inference.model import Head
from ..inference.states import States
from ..inference.stream import Stream
from ..names import Role
from .perplexity import Windows, stderr

_ROWS_WIDE = 32  # rows that are fp64 at once: 8 MB each of five or so tensors at a vocabulary of 32000


@dataclass(frozen=True)
class Figures:
    """Per counted token, [n] each: fp64, but for same_top (bool)."""

    windows: Windows
    source_nll: Tensor
    output_nll: Tensor
    kld: Tensor  # sum of p ln(p/q), p the source's and q the output's
    same_top: Tensor
    delta_p: Tensor  # q - p of the token that the text has there

    @property
    def ln_ratio(self) -> float:
        """ln of the output's perplexity over the source's."""
        return float((self.output_nll - self.source_nll).mean())

    def document(self) -> dict[str, Any]:
        """The sections perplexity, kld, same_top and rms_delta_p of check's document."""
        return {
            "perplexity": {
                "protocol": self.windows.protocol,
                "ctx": self.windows.ctx,
                "tokens": len(self.kld),
                "source": _exp(float(self.source_nll.mean())),
                "output": _exp(float(self.output_nll.mean())),
                "ln_ratio": self.ln_ratio,
                # paired: most of a text's spread is common to both models and drops out
                "ln_ratio_stderr": stderr(self.output_nll - self.source_nll),
            },
            "kld": {
                "mean": float(self.kld.mean()),
                "stderr": stderr(self.kld),
                "median": quantile(self.kld, 0.5),
                "p99": quantile(self.kld, 0.99),
                "p999": quantile(self.kld, 0.999),
                "max": float(self.kld.max()),
            },
            "same_top": float(self.same_top.double().mean()),
            "rms_delta_p": math.sqrt(float(self.delta_p.square().mean())),
        }


@dataclass(frozen=True)
class Forced:
    """Prompts and a continuation of each, through which both models are led.

    `origin`: "greedy" if the source wrote the continuations itself, "text" if they come from a text.
    """

    prompts: Sequence[Sequence[int]]
    continuations: Sequence[Sequence[int]]
    origin: str

    def sequences(self) -> list[Tensor]:
        """What goes through the model: all but the last token of each, [T]."""
        pairs = zip(self.prompts, self.continuations, strict=True)
        return [torch.tensor([*prompt, *continuation][:-1]) for prompt, continuation in pairs]

    def rows(self, start: int) -> Tensor:
        """Where the continuation's tokens are predicted, the sequences' tokens beginning at `start`."""
        parts = []
        for prompt, continuation in zip(self.prompts, self.continuations, strict=True):
            first = start + len(prompt) - 1
            parts.append(torch.arange(first, first + len(continuation)))
            start += len(prompt) + len(continuation) - 1
        return torch.cat(parts)


@dataclass(frozen=True)
class Generation:
    """What each model would say next, at every position of every continuation."""

    forced: Forced
    source_top: list[list[int]]
    output_top: list[list[int]]
    margins: list[list[float]]  # of the source's logits, best less second best

    def divergences(self) -> list[dict[str, Any]]:
        """Every position where the two best tokens differ; a small margin means that the source hardly cared."""
        return [
            {"prompt": prompt, "position": position, "margin": self.margins[prompt][position]}
            for prompt, (ours, theirs) in enumerate(zip(self.source_top, self.output_top, strict=True))
            for position, (a, b) in enumerate(zip(ours, theirs, strict=True))
            if a != b
        ]

    def document(self) -> dict[str, Any]:
        """The section generation of check's document.

        `identical` counts prompts without a divergence. With continuations that the source wrote greedily, the output
        would write the same text; with continuations from a text, the two only agree on every token of it.
        """
        positions = sum(map(len, self.source_top))
        divergences = self.divergences()
        return {
            "prompts": len(self.source_top),
            "new_tokens": max(map(len, self.source_top), default=0),
            "forced_on": self.forced.origin,
            "teacher_forced_agreement": 1 - len(divergences) / positions,
            "identical": len(self.source_top) - len({found["prompt"] for found in divergences}),
            "divergences": divergences,
        }


def compare(
    source: Stream, output: Stream, windows: Windows | None, forced: Forced | None = None
) -> tuple[Figures | None, Generation | None]:
    """Both models over the windows of a text, and through the continuations of prompts; either may be left out.

    `output.max_memory` should be the source's: the source's hidden states are taken from it. Raises what Stream.hidden
    raises. A model that gives NaN gets NaN for its figures.
    """
    texts = list(windows.sequences) if windows else []
    sequences = [*texts, *(forced.sequences() if forced else [])]
    if not sequences:
        return None, None
    # both are planned before either is read; beside two sets of states there are two heads in the end
    lengths = [len(ids) for ids in sequences]
    plans = [stream.plan(lengths, copies=2, held=_head_bytes(source)) for stream in (source, output)]
    spilled = any(plan.spilled for plan in plans)
    with source.run(source.embed(sequences, spilled=spilled)) as ours:
        output.reserved = ours.memory_bytes
        output.inherit(source)
        with output.run(output.embed(sequences, spilled=spilled)) as theirs:
            output.forget()  # two heads are not in its plan
            both = _Both(source, output, ours, theirs)
            figures = _figures(both, windows) if windows else None
            return figures, _generation(both, forced, sum(map(len, texts))) if forced else None


class _Both:
    """Logits of two models, side by side."""

    def __init__(self, source: Stream, output: Stream, ours: States, theirs: States) -> None:
        self.source, self.output, self.ours, self.theirs = source, output, ours, theirs
        room = output.plan(ours.lengths, copies=0, held=theirs.memory_bytes + _head_bytes(source))
        self.chunk = max(1, room.logit_rows // 2)  # two sets of logits
        self.heads = [Head.load(stream.reader, stream.device, stream.dtype) for stream in (source, output)]

    def logits(self, rows: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(n, source's, output's): logits [<= 32, V], fp32, of the tokens from rows[n] on."""
        ours = self.source.logits(self.ours, rows, head=self.heads[0], chunk=self.chunk)
        theirs = self.output.logits(self.theirs, rows, head=self.heads[1], chunk=self.chunk)
        self.source.progress.start("comparing logits", len(rows), "tok")
        for (start, p), (_, q) in zip(ours, theirs, strict=True):
            for at in range(0, len(p), _ROWS_WIDE):
                yield start + at, p[at : at + _ROWS_WIDE], q[at : at + _ROWS_WIDE].to(p.device)
            self.source.progress.advance(len(p))
        self.source.progress.finish()


def _head_bytes(stream: Stream) -> int:
    return math.prod(stream.config.shape(Role.HEAD)) * stream.dtype.itemsize


def _figures(both: _Both, windows: Windows) -> Figures:
    rows, targets = windows.rows(), windows.targets()
    columns = torch.empty(5, len(rows), dtype=torch.float64)
    for start, p, q in both.logits(rows):
        end = start + len(p)
        columns[:, start:end] = token_figures(p, q, targets[start:end].to(p.device)).cpu()
    source_nll, output_nll, kld, same_top, delta_p = columns
    return Figures(windows, source_nll, output_nll, kld, same_top.bool(), delta_p)


def token_figures(source: Tensor, output: Tensor, targets: Tensor) -> Tensor:
    """Logits [n, V] of both and targets [n] -> fp64 [5, n]: nll of each, KL divergence, same top-1, delta p."""
    p, q = source.double().log_softmax(-1), output.double().log_softmax(-1)
    kld = (p.exp() * (p - q)).sum(-1)
    ours, theirs = (x.gather(-1, targets[:, None])[:, 0] for x in (p, q))
    same_top = source.argmax(-1) == output.argmax(-1)
    return torch.stack([-ours, -theirs, kld, same_top.double(), theirs.exp() - ours.exp()])


def _generation(both: _Both, forced: Forced, start: int) -> Generation:
    ours: list[int] = []
    theirs: list[int] = []
    margins: list[float] = []
    for _, p, q in both.logits(forced.rows(start)):
        best = p.topk(2, dim=-1).values
        margins += (best[:, 0] - best[:, 1]).tolist()
        ours += p.argmax(-1).tolist()
        theirs += q.argmax(-1).tolist()
    lengths = [len(continuation) for continuation in forced.continuations]
    return Generation(forced, _cut(ours, lengths), _cut(theirs, lengths), _cut(margins, lengths))


def _cut(items: list[Any], lengths: list[int]) -> list[list[Any]]:
    parts, start = [], 0
    for length in lengths:
        parts.append(items[start : start + length])
        start += length
    return parts


def quantile(values: Tensor, q: float) -> float:
    """Exact, linear between neighbours; values [n] of any length (torch.quantile takes at most 16 million)."""
    ordered = values.sort().values
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    a, b = float(ordered[low]), float(ordered[high])
    return a if a == b else a + (b - a) * (place - low)


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))
