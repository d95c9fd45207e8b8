"""Windows of a calibration text: which are taken, and that they stay what they were."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtools.errors import InputError, UsageError
from mixtools.inference.calibrate import Text, cut
from mixtools.inference.sampling import Sampling

BOS = 1


def starts(text: Text) -> list[int]:
    """Of windows over range(100, ...), each checked to be whole."""
    found = []
    for ids in text.sequences:
        first = int(ids[1])
        assert ids.tolist() == [BOS, *range(first, first + text.record["seq_len"] - 1)]
        found.append(first - 100)
    return found


def test_a_text_without_options_is_cut_as_it_always_was() -> None:
    text = cut(range(100, 195), 4, 11, BOS)
    assert starts(text) == [0, 20, 40, 60]  # 9 windows of 10: numbers 0, 2, 4, 6
    assert text.record == {"samples": 4, "seq_len": 11, "tokens": 44, "text": "19b94abb549e8bb0"}
    assert text.notes == ()
    assert cut(range(100, 195), 4, 11, BOS, sampling="spread").record == text.record


def test_from_the_start_windows_are_consecutive() -> None:
    text = cut(range(100, 195), 4, 11, BOS, sampling="start")
    assert starts(text) == [0, 10, 20, 30]
    assert text.record["sampling"] == "start" and "seed" not in text.record


def shuffled(there: int, seed: int) -> list[int]:
    """Fisher and Yates's shuffle as everybody writes it."""
    rng, items = random.Random(seed), list(range(there))
    for index in range(there):
        other = index + int(rng.random() * (there - index))
        items[index], items[other] = items[other], items[index]
    return items


@given(st.integers(0, 60), st.integers(0, 2**40))
def test_the_shuffle_is_the_usual_one(there: int, seed: int) -> None:
    assert list(Sampling("random", seed).order(there)) == shuffled(there, seed)


def test_a_seed_gives_the_same_windows_on_every_machine() -> None:
    assert list(Sampling("random", 7).order(10)) == [3, 2, 7, 0, 1, 6, 5, 8, 4, 9]
    assert starts(cut(range(100, 600), 5, 11, BOS, seed=7)) == [35, 78, 165, 272, 332]


@given(st.integers(2, 30), st.integers(1, 40), st.integers(1, 300), st.integers(0, 9))
def test_random_windows_never_overlap(seq_len: int, samples: int, length: int, seed: int) -> None:
    if length < seq_len - 1:
        return
    text = cut(range(100, 100 + length), samples, seq_len, BOS, seed=seed)
    found = starts(text)
    assert len(found) == min(samples, length // (seq_len - 1))
    assert found[0] >= 0 and found[-1] + seq_len - 1 <= length
    assert all(after - before >= seq_len - 1 for before, after in itertools.pairwise(found))


def test_every_place_is_as_likely() -> None:
    """Two windows of 2 in 5 tokens: of the places (0 2), (0 3), (1 3) each in a third of the seeds."""
    seen = Counter(tuple(starts(cut(range(100, 105), 2, 3, BOS, seed=seed))) for seed in range(600))
    assert seen.keys() == {(0, 2), (0, 3), (1, 3)}
    assert max(abs(count - 200) for count in seen.values()) < 50  # 4 standard deviations: 46


def test_records_tell_texts_seeds_and_samplings_apart() -> None:
    ids = range(100, 400)
    records = [
        cut(ids, 4, 11, BOS).record, cut(ids, 4, 11, BOS, sampling="start").record,
        cut(ids, 4, 11, BOS, seed=0).record, cut(ids, 4, 11, BOS, seed=1).record,
        cut(range(100, 401), 4, 11, BOS, seed=1).record,
    ]  # fmt: skip
    assert len({repr(record) for record in records}) == len(records)
    assert cut(ids, 4, 11, BOS, sampling="random").record == records[2]  # seed 0 is meant


def test_fewer_windows_than_asked_for_are_told() -> None:
    for how in ({}, {"sampling": "start"}, {"seed": 3}):
        text = cut(range(25), 128, 11, BOS, **how)
        assert len(text.sequences) == text.record["samples"] == 2
        assert text.notes == ("asked 128 samples, the text has 2",)
    with pytest.raises(InputError, match="has 9 tokens, fewer than one sample of 11; --seq-len 10 would fit"):
        cut(range(9), 128, 11, BOS, seed=1)


@pytest.mark.parametrize(
    ("sampling", "seed", "said"),
    [
        ("spread", 1, "not to spread"),
        ("start", 0, "not to start"),
        ("even", None, "not one of"),
        (None, -1, "0 or more"),
    ],
)
def test_options_that_cannot_be(sampling: str | None, seed: int | None, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cut(range(100), 1, 11, BOS, sampling=sampling, seed=seed)
