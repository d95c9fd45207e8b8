"""Prompts and their continuations: what both models are led through, word by word.

The source writes the continuations itself, greedily, where that is affordable: where it fits in memory. A model that
must be read from disk for every token (93 GB each) does so only when asked. Otherwise the continuation is text: the
second part of each prompt, or what follows in the evaluation text. That measures agreement on real text just as well,
but says nothing about what the output would write on its own.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import InputError, MemoryBudgetError, UsageError
from ..inference import loading
from ..inference.generate import EOS, Options, generate
from ..inference.stream import Stream
from ..text.reading import read_text
from .parity import Forced

MODES = ("auto", "greedy", "text")
PROMPTS, PROMPT_TOKENS = 8, 64  # taken from the text where no prompts are given


def read_prompts(path: Path) -> list[str]:
    """A JSON list of texts, or an object whose values are texts; any other file: a prompt a line.

    Raises InputError.
    """
    text = read_text(path)
    if path.suffix != ".json":
        return [line for line in text.splitlines() if line.strip()]
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"is not valid JSON ({error})", file=path) from None
    prompts = list(document.values()) if isinstance(document, dict) else document
    if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise InputError("is neither a list of texts nor an object of texts", file=path)
    return prompts


def from_text(ids: Sequence[int], new_tokens: int, prompts: int = PROMPTS, length: int = PROMPT_TOKENS) -> Forced:
    """Places spread evenly over a text: `length` tokens as a prompt, and the `new_tokens` that follow there.

    Raises InputError if the text is shorter than one of these.
    """
    span = length + new_tokens
    if len(ids) < span:
        raise InputError(f"the text has {len(ids)} tokens, fewer than a prompt of {length} and {new_tokens} to follow")
    prompts = min(prompts, len(ids) // span)
    starts = [(len(ids) - span) * i // max(1, prompts - 1) for i in range(prompts)]
    return Forced(
        [ids[start : start + length] for start in starts],
        [ids[start + length : start + span] for start in starts],
        "text",
    )


def for_prompts(
    source: Stream, prompts: Sequence[Sequence[int]], new_tokens: int, mode: str = "auto",
    text: Forced | None = None, *, ends: Sequence[int] = (EOS,),
) -> Forced:  # fmt: skip
    """Continue the prompts: greedily by the source, up to one of `ends`, or by text (`mode`: see MODES).

    `text`: the continuations in that case; None takes the prompts' own second parts. "auto" is greedy where the source
    fits in the memory allowed. Raises UsageError for another mode, InputError for a prompt too short to be divided, and
    what running the source raises.
    """
    if mode not in MODES:
        raise UsageError(f"generation {mode!r} is not one of {', '.join(MODES)}")
    fits = _fits(source, prompts, new_tokens)
    if mode == "text" or (mode == "auto" and not fits):
        return text or _divided(prompts, new_tokens)
    write = _in_memory if fits else _layer_major
    continuations = write(source, prompts, new_tokens, ends)
    return Forced(prompts, continuations, "greedy")


def _divided(prompts: Sequence[Sequence[int]], new_tokens: int) -> Forced:
    cuts = [len(ids) - min(new_tokens, len(ids) // 2) for ids in prompts]
    for number, (ids, cut) in enumerate(zip(prompts, cuts, strict=True)):
        if cut == len(ids):
            raise InputError(f"prompt {number} has {len(ids)} tokens, too few to be divided")
    pairs = list(zip(prompts, cuts, strict=True))
    return Forced([ids[:cut] for ids, cut in pairs], [ids[cut:] for ids, cut in pairs], "text")


def _fits(source: Stream, prompts: Sequence[Sequence[int]], new_tokens: int) -> bool:
    config, size = source.config, source.dtype.itemsize
    columns = len(prompts) * (max(map(len, prompts)) + new_tokens)
    cache = 2 * config.num_layers * config.num_kv_heads * config.head_dim * size * columns
    room = None if source.max_memory is None else source.max_memory - cache
    try:
        loading.check(source.reader, source.device, source.dtype, room, rounded=True)
    except MemoryBudgetError:
        return False
    return True


def _in_memory(
    source: Stream, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """With the end, which generate leaves out: that the source ended is a choice to compare, too."""
    # rounded, as the stream that the output is compared with reads the source: its roundings and no others
    model = loading.load(source.reader, source.device, source.dtype, rounded=True)
    texts = generate(model, prompts, Options(max_new_tokens=new_tokens, stop=()))
    return [text[: next((at + 1 for at, token in enumerate(text) if token in ends), None)] for text in texts]


def _layer_major(
    source: Stream, prompts: Sequence[Sequence[int]], new_tokens: int, ends: Sequence[int]
) -> list[list[int]]:
    """The whole model is read once for each new token, whatever the number of prompts."""
    texts = [list(ids) for ids in prompts]
    alive = list(range(len(texts)))
    for _ in range(new_tokens):
        with source.hidden([torch.tensor(texts[i]) for i in alive]) as states:
            last = torch.tensor(states.starts[1:]) - 1
            best = torch.cat([logits.argmax(-1).cpu() for _, logits in source.logits(states, last)]).tolist()
        for i, token in zip(alive, best, strict=True):
            texts[i].append(token)
        alive = [i for i in alive if texts[i][-1] not in ends]
        if not alive:
            break
    return [text[len(ids) :] for text, ids in zip(texts, prompts, strict=True)]
