"""Text from a model: ids in, a stream of ids out; greedy or sampled, any number of prompts at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import UsageError
from .model import Cache, Mixtral

EOS = 2  # of mistral's own tokenizers; a fine-tune may declare others (Tokenizer.end_ids)
PAD = 0  # fills columns that no token looks at


@dataclass(frozen=True)
class Options:
    """How to continue a prompt. Temperature 0 is greedy; `top_p` keeps the smallest set of tokens of that mass.

    Each prompt draws from a stream of its own that starts at `seed`, so its text is the same alone or in a batch (up
    to the rounding of logits); vary the seed for several texts of one prompt. `prefill` bounds the memory of long
    prompts: as many columns go through the model at once.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[int, ...] = (EOS,)
    prefill: int = 512

    def __post_init__(self) -> None:
        problems = {
            "max_new_tokens must be at least 1": self.max_new_tokens < 1,
            "temperature must be 0 or more": not 0 <= self.temperature < float("inf"),
            "top_p must be above 0 and at most 1": not 0 < self.top_p <= 1,
            "prefill must be at least 1": self.prefill < 1,
        }
        for problem, true in problems.items():
            if true:
                raise UsageError(problem)


class Step(NamedTuple):
    """One new token of one prompt. A stop token is not reported: it ends its prompt."""

    prompt: int  # index into the prompts
    token: int


def stream(model: Mixtral, prompts: Sequence[Sequence[int]], options: Options | None = None) -> Iterator[Step]:
    """Continue all prompts together, yielding each token as soon as it is known.

    A prompt ends at a stop token, after max_new_tokens, or where the model's positions end; it then leaves the batch.
    Raises UsageError for an empty prompt, an id outside the vocabulary, or a prompt longer than the model's positions.
    """
    options = options or Options()
    _check(model, prompts)
    if not prompts:
        return
    samplers = [Sampler(options) for _ in prompts]
    limits = [min(options.max_new_tokens, model.config.reach - len(ids)) for ids in prompts]
    made = [0] * len(prompts)
    alive = list(range(len(prompts)))  # the prompt of each row of the batch
    logits, cache = prefill(model, prompts, max(limits), options.prefill)
    while True:
        chosen = [samplers[prompt](row) for prompt, row in zip(alive, logits, strict=True)]
        kept = []
        for row, (prompt, token) in enumerate(zip(alive, chosen, strict=True)):
            if token in options.stop:
                continue
            yield Step(prompt, token)
            made[prompt] += 1
            if made[prompt] < limits[prompt]:
                kept.append(row)
        if not kept:
            return
        if len(kept) < len(alive):
            cache.select(torch.tensor(kept, device=model.device))
            alive, chosen = [alive[row] for row in kept], [chosen[row] for row in kept]
        logits = model.step(torch.tensor(chosen, device=model.device), cache).cpu()  # [B, V]


def generate(
    model: Mixtral,
    prompts: Sequence[Sequence[int]],
    options: Options | None = None,
    on_token: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """The new ids of each prompt; `on_token(prompt, token)` sees each as it comes. Raises as `stream` does."""
    texts: list[list[int]] = [[] for _ in prompts]
    for prompt, token in stream(model, prompts, options):
        texts[prompt].append(token)
        if on_token:
            on_token(prompt, token)
    return texts


def prefill(model: Mixtral, prompts: Sequence[Sequence[int]], room: int, columns: int = 512) -> tuple[Tensor, Cache]:
    """Run the prompts, `columns` at a time: the logits [B, V] (CPU) after each, and a cache with `room` to go on.

    Shorter prompts stand at the right: their first columns are padding, and positions count from their first token.
    """
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(ids) for ids in prompts], device=model.device)
    ids = torch.tensor([[PAD] * (longest - len(ids)) + list(ids) for ids in prompts], device=model.device)
    # without padding there is no mask, and attention takes its fastest way
    cache = Cache(model, len(prompts), longest + room, padding if padding.any() else None, longest)
    for start in range(0, longest, columns):
        hidden = model.hidden(ids[:, start : start + columns], cache)
    return model.head(hidden[:, -1]).cpu(), cache


class Sampler:
    """Chooses the next token of one prompt; holds its stream of random numbers."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)  # on the CPU: the same on every device

    def __call__(self, logits: Tensor) -> int:
        """logits [V] fp32 -> token. Greedy takes the first of equals."""
        if self.options.temperature == 0:
            return int(logits.argmax())
        cumulative, tokens = nucleus(logits, self.options.temperature, self.options.top_p)
        point = torch.rand((), generator=self.generator, dtype=torch.float64) * cumulative[-1]
        place = int(torch.searchsorted(cumulative, point, right=True))
        return int(tokens[min(place, len(tokens) - 1)])


def nucleus(logits: Tensor, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """logits [V] -> the smallest set of likeliest tokens whose mass reaches `top_p`, as running mass (fp64) and ids:
    the likeliest first, or all in order of ids where all are asked for.

    Source: Holtzman and others, "The Curious Case of Neural Text Degeneration", 2020, arxiv.org/abs/1904.09751.
    """
    shares = (logits.double() / temperature).softmax(-1)
    if top_p == 1:
        return shares.cumsum(-1), torch.arange(len(shares))
    for most in (128, 1024, len(shares)):  # to sort all takes longer than a step on a GPU
        likely, tokens = _likeliest(shares, most)
        cumulative = likely.cumsum(-1)
        if cumulative[-1] >= top_p:
            break
    count = int((cumulative - likely < top_p).sum())  # the token that crosses top_p still belongs
    return cumulative[:count], tokens[:count]


def _likeliest(shares: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of shares [V] so many of the greatest and all that equal the last of them, in order, and their ids; equals in
    order of ids.
    """
    ids = torch.arange(len(shares))
    if most < len(shares):
        ids = (shares >= shares.topk(most).values[-1]).nonzero().flatten()
    likely, order = shares[ids].sort(descending=True, stable=True)
    return likely, ids[order]


def _check(model: Mixtral, prompts: Sequence[Sequence[int]]) -> None:
    config = model.config
    for index, ids in enumerate(prompts):
        if not ids:
            raise UsageError(f"prompt {index} is empty: it needs one token at least, such as BOS")
        if min(ids) < 0 or max(ids) >= config.vocab_size:
            raise UsageError(
                f"prompt {index} holds an id outside the vocabulary of {config.vocab_size}: another model's tokenizer?"
            )
        if len(ids) >= config.reach:
            raise UsageError(f"prompt {index} has {len(ids)} tokens, the model {config.reach} positions")
