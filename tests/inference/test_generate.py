"""Generation against transformers' own, its nucleus filter, and the distribution it should draw from."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from mixtral_oracle import DATA, read_nano, transformers_model
from scipy import stats
from transformers import GenerationConfig
from transformers.generation.logits_process import TopPLogitsWarper

from mixtools.errors import UsageError
from mixtools.inference.generate import Options, Sampler, Step, generate, nucleus, stream
from mixtools.inference.model import Mixtral
from mixtools.layouts.memory import MemoryReader

LENGTHS = {"en": 40, "fr": 7, "de": 1, "it": 23, "es": 40}


@pytest.fixture(scope="module")
def reader() -> MemoryReader:
    return read_nano()


@pytest.fixture(scope="module")
def model(reader: MemoryReader) -> Mixtral:
    return Mixtral.load(reader, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    with np.load(DATA / "reference_logits.npz") as stored:
        return [stored[f"{language}_ids"][:length].tolist() for language, length in LENGTHS.items()]


@pytest.fixture(scope="module")
def theirs(reader: MemoryReader, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy continuations by transformers, each prompt alone, up to their end of text."""
    model = transformers_model(reader)
    config = GenerationConfig(max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=0)
    texts = []
    for ids in prompts:
        row = torch.tensor([ids])
        mask = torch.ones_like(row)
        new = model.generate(row, attention_mask=mask, generation_config=config)[0, len(ids) :].tolist()
        texts.append(new[: new.index(2)] if 2 in new else new)
    return texts


@pytest.mark.parametrize("prefill", [512, 9])
def test_greedy_in_a_batch_equals_transformers_one_by_one(model, prompts, theirs, prefill):
    assert max(map(len, theirs)) == 24
    assert generate(model, prompts, Options(max_new_tokens=24, prefill=prefill)) == theirs


def test_a_prompt_stops_alone_and_the_others_go_on(model, prompts, theirs):
    stop = theirs[1][3]
    expected = [text[: text.index(stop)] if stop in text else text for text in theirs]
    assert len(set(map(len, expected))) > 1
    assert generate(model, prompts, Options(max_new_tokens=24, stop=(2, stop))) == expected


def test_tokens_are_told_as_they_come(model, prompts, theirs):
    steps = list(stream(model, prompts[:2], Options(max_new_tokens=3)))
    assert steps == [Step(prompt, theirs[prompt][place]) for place in range(3) for prompt in range(2)]
    told = []
    generate(model, prompts[:2], Options(max_new_tokens=3), lambda prompt, token: told.append((prompt, token)))
    assert told == steps


def test_a_seed_gives_one_text_alone_or_in_any_batch(model, prompts):
    options = Options(max_new_tokens=16, temperature=1.0, top_p=0.95, seed=3)
    batch = generate(model, prompts, options)
    assert batch == generate(model, prompts[::-1], options)[::-1]
    assert batch == [generate(model, [ids], options)[0] for ids in prompts]
    assert batch != generate(model, prompts, dataclasses.replace(options, seed=4))


def test_generation_ends_where_positions_end(model, prompts):
    config = dataclasses.replace(model.config, max_position_embeddings=42)
    short = Mixtral(model.embedding, model.layers, model.head)
    short.config = config
    lengths = [len(text) for text in generate(short, prompts, Options(max_new_tokens=30, stop=()))]
    assert lengths == [2, 30, 30, 19, 2]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_nucleus_keeps_what_transformers_keeps(model, prompts, temperature, top_p):
    for logits in model(torch.tensor(prompts[:1]))[0, ::10]:
        cumulative, tokens = nucleus(logits, temperature, top_p)
        filtered = (
            TopPLogitsWarper(top_p)(None, logits[None].double() / temperature)[0] if top_p < 1 else logits.double()
        )
        kept = torch.where(filtered.isfinite())[0]
        assert sorted(tokens.tolist()) == kept.tolist()
        mass = torch.diff(cumulative, prepend=torch.zeros(1))
        torch.testing.assert_close(mass, (logits.double() / temperature).softmax(-1)[tokens])


@pytest.mark.parametrize("spread", [0.0, 0.1, 2.0, 9.0])
@pytest.mark.parametrize("top_p", [0.03, 0.6, 0.999])
def test_a_nucleus_of_a_large_vocabulary_is_the_beginning_of_all_in_order(spread, top_p):
    logits = torch.randn(6000, generator=torch.Generator().manual_seed(1)) * spread
    logits[7::5] = logits[7]  # equals, more than are looked at first
    likely, order = logits.double().softmax(-1).sort(descending=True, stable=True)
    cumulative = likely.cumsum(-1)
    count = int(torch.searchsorted(cumulative, top_p)) + 1
    found = nucleus(logits, 1.0, top_p)
    assert torch.equal(found[0], cumulative[:count]) and torch.equal(found[1], order[:count])


def test_samples_follow_the_distribution():
    logits = torch.tensor([1.0, -0.5, 2.0, 0.0, 1.5, -30.0])
    sampler = Sampler(Options(temperature=1.3, top_p=0.9, seed=11))
    drawn = Counter(sampler(logits) for _ in range(20_000))
    likely = np.exp(logits.numpy().astype(np.float64) / 1.3)
    order = np.argsort(-likely)
    likely /= likely.sum()
    kept = order[: int(np.searchsorted(np.cumsum(likely[order]), 0.9)) + 1]
    assert sorted(drawn) == sorted(kept.tolist())
    expected = likely[kept] / likely[kept].sum() * 20_000
    assert stats.chisquare([drawn[token] for token in kept], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"prefill": 0},
    ],
)
def test_options_that_cannot_be_are_refused(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        Options(**wrong)


@pytest.mark.parametrize(
    ("ids", "message"), [([], "prompt 1 is empty"), ([1, 2048], "vocabulary of 2048"), ([1] * 32768, "32768 positions")]
)
def test_prompts_that_cannot_be_are_refused(model, ids, message):
    with pytest.raises(UsageError, match=message):
        generate(model, [[1], ids])


def test_no_prompts_give_no_texts(model):
    assert generate(model, []) == []
