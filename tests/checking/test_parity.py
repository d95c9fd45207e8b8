"""Every figure against transformers' logits, and numpy and scipy in fp64."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from mixtral_oracle import DATA, NANO, SHAPES, read_nano, transformers_model

from mixtools.checking import continuations, parity, perplexity
from mixtools.errors import InputError, MemoryBudgetError, UsageError
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.text.tokenizer import Tokenizer

CTX = 128


@pytest.fixture(scope="module")
def nano() -> MemoryReader:
    return read_nano()


@pytest.fixture(scope="module")
def noisy(nano) -> MemoryReader:
    """A worse nano: some noise on every matrix."""
    generator = torch.Generator().manual_seed(8)
    tensors = {}
    for slot in nano.slots():
        weight = nano.read(slot).float()
        noise = torch.randn(weight.shape, generator=generator)
        tensors[slot] = weight + 0.08 * weight.std() * noise if weight.ndim > 1 else weight
    return MemoryReader(nano.config, tensors)


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return Tokenizer.from_folder(NANO).encode((DATA / "text.txt").read_text("utf-8"))


@pytest.fixture(scope="module")
def windows(ids) -> perplexity.Windows:
    return perplexity.cut(ids, "gptq", bos_id=1, ctx=CTX, max_tokens=6 * CTX)


def stream(reader, **options) -> Stream:
    return Stream(reader, dtype=torch.float32, **options)


@pytest.fixture(scope="module")
def figures(nano, noisy, windows) -> parity.Figures:
    found, nothing = parity.compare(stream(nano), stream(noisy), windows)
    assert nothing is None
    return found


@torch.no_grad()
def test_every_figure_equals_numpy_and_scipy_on_transformers_logits(nano, noisy, windows, figures):
    batch = torch.stack(windows.sequences)
    logits = [transformers_model(reader)(batch).logits[:, :-1].double().numpy() for reader in (nano, noisy)]
    p, q = (scipy.special.softmax(x, axis=-1).reshape(-1, x.shape[-1]) for x in logits)
    truth = batch[:, 1:].flatten().numpy()
    token = np.arange(len(truth))
    nll = [-np.log(x[token, truth]) for x in (p, q)]
    kld = scipy.special.rel_entr(p, q).sum(-1)
    found = figures.document()
    assert found["perplexity"]["source"] == pytest.approx(np.exp(nll[0].mean()), rel=1e-5)
    assert found["perplexity"]["output"] == pytest.approx(np.exp(nll[1].mean()), rel=1e-5)
    assert found["perplexity"]["ln_ratio"] == pytest.approx((nll[1] - nll[0]).mean(), abs=2e-6)
    assert found["perplexity"]["ln_ratio_stderr"] == pytest.approx(scipy.stats.sem(nll[1] - nll[0]), rel=1e-4)
    assert found["perplexity"]["tokens"] == len(truth) == 6 * (CTX - 1)
    assert found["kld"]["mean"] == pytest.approx(kld.mean(), rel=1e-4)
    for name, q_ in (("median", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)):
        assert found["kld"][name] == pytest.approx(np.quantile(kld, q_), rel=1e-4)
    assert found["same_top"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).mean(), abs=1e-9)
    assert found["rms_delta_p"] == pytest.approx(np.sqrt(np.mean((q - p)[token, truth] ** 2)), rel=1e-4)
    assert 0.5 < found["same_top"] < 1
    assert 1e-3 < found["kld"]["mean"] < 1


def test_a_model_against_itself_differs_by_exactly_nothing(nano, windows):
    found, _ = parity.compare(stream(nano), stream(nano), windows)
    document = found.document()
    assert document["kld"]["max"] == 0
    assert document["perplexity"]["ln_ratio"] == document["perplexity"]["ln_ratio_stderr"] == 0
    assert (document["same_top"], document["rms_delta_p"]) == (1, 0)


def test_divergence_of_nearly_equal_logits_keeps_its_digits():
    """KL of a shift by e is about e²/2 of a variance: 1e-10 here, where sums in fp32 have nothing left."""
    generator = torch.Generator().manual_seed(1)
    p = torch.randn(50, 4000, generator=generator) * 3
    q = p + 2e-5 * torch.randn(50, 4000, generator=generator)
    found = parity.token_figures(p, q, torch.zeros(50, dtype=torch.long))[2].numpy()
    a, b = (scipy.special.softmax(x.double().numpy(), axis=-1) for x in (p, q))
    assert found == pytest.approx(scipy.special.rel_entr(a, b).sum(-1), rel=1e-4)
    assert 1e-12 < found.mean() < 1e-8


def test_quantiles_are_numpys():
    values = torch.randn(1237, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for q in (0.0, 0.123, 0.5, 0.99, 1.0):
        assert parity.quantile(values, q) == pytest.approx(np.quantile(values.numpy(), q), rel=1e-12)


def test_little_memory_gives_the_same_figures(nano, noisy, windows, figures, tmp_path):
    with pytest.raises(MemoryBudgetError) as error:
        parity.compare(stream(noisy, max_memory=1), stream(noisy), windows)  # stored in fp32, it needs more than nano
    allowed = int(float(str(error.value.found).split()[0]) * 1.01e6)
    both = (stream(reader, max_memory=allowed, spill=tmp_path) for reader in (nano, noisy))
    found, _ = parity.compare(*both, windows)
    assert torch.allclose(found.kld, figures.kld, atol=1e-6)
    assert torch.equal(found.same_top, figures.same_top)


def test_the_output_shares_the_memory_with_the_states_of_the_source(nano, windows):
    source, output = stream(nano, max_memory=10**9), stream(nano, max_memory=10**9)
    parity.compare(source, output, windows)
    assert output.reserved == 6 * CTX * 256 * 4


# --- generation ---


def prompts_of_the_project() -> list[list[int]]:
    tokenizer = Tokenizer.from_folder(NANO)
    return [tokenizer.encode(text)[:40] for text in continuations.read_prompts(DATA / "prompts.json")]


@torch.no_grad()
def test_greedy_continuations_are_those_of_transformers(nano):
    prompts = prompts_of_the_project()
    forced = continuations.for_prompts(stream(nano), prompts, 12)
    theirs = transformers_model(nano)
    assert forced.origin == "greedy"
    for ids, continuation in zip(prompts, forced.continuations, strict=True):
        expected = theirs.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)[0, 40:]
        assert continuation == expected.tolist()


def test_layer_major_continuations_are_the_same(nano):
    prompts = prompts_of_the_project()
    small = stream(nano, max_memory=12_000_000)  # less than nano's 18 MB
    assert continuations.for_prompts(small, prompts, 6).origin == "text"
    forced = continuations.for_prompts(small, prompts, 6, "greedy")
    assert forced.continuations == continuations.for_prompts(stream(nano), prompts, 6).continuations


def test_without_memory_the_prompts_own_second_part_is_the_continuation(nano):
    prompts = [[1, 5, 6, 7, 8, 9], [1, 4, 3]]
    forced = continuations.for_prompts(stream(nano), prompts, 2, "text")
    assert forced.prompts == [[1, 5, 6, 7], [1, 4]]
    assert forced.continuations == [[8, 9], [3]]
    with pytest.raises(InputError, match="prompt 0 has 1 tokens"):
        continuations.for_prompts(stream(nano), [[1]], 2, "text")
    with pytest.raises(UsageError, match="not one of auto, greedy, text"):
        continuations.for_prompts(stream(nano), prompts, 2, "sampled")


@torch.no_grad()
def test_teacher_forced_agreement_and_margins_equal_transformers(nano, noisy):
    prompts = prompts_of_the_project()
    forced = continuations.for_prompts(stream(nano), prompts, 16)
    _, found = parity.compare(stream(nano), stream(noisy), None, forced)
    models = [transformers_model(reader) for reader in (nano, noisy)]
    expected = []
    for number, (ids, text) in enumerate(zip(forced.prompts, forced.continuations, strict=True)):
        ours, theirs = (m(torch.tensor([[*ids, *text]])).logits[0, len(ids) - 1 : -1] for m in models)
        assert found.source_top[number] == ours.argmax(-1).tolist() == list(text)  # greedy is what it would say again
        assert found.output_top[number] == theirs.argmax(-1).tolist()
        best = ours.sort(descending=True).values
        for position in (ours.argmax(-1) != theirs.argmax(-1)).nonzero().flatten().tolist():
            expected.append((number, position, (best[position, 0] - best[position, 1]).item()))
    document = found.document()
    assert [(d["prompt"], d["position"]) for d in document["divergences"]] == [e[:2] for e in expected]
    assert [d["margin"] for d in document["divergences"]] == pytest.approx([e[2] for e in expected], abs=1e-4)
    assert document["teacher_forced_agreement"] == pytest.approx(1 - len(expected) / 80)
    assert document["identical"] == 5 - len({e[0] for e in expected})
    assert (document["prompts"], document["new_tokens"], document["forced_on"]) == (5, 16, "greedy")
    assert expected  # the noise shows


def test_identical_prompts_are_those_that_the_output_would_continue_alike(nano, noisy):
    prompts = prompts_of_the_project()
    forced = continuations.for_prompts(stream(nano), prompts, 8)
    _, found = parity.compare(stream(nano), stream(noisy), None, forced)
    free = continuations.for_prompts(stream(noisy), prompts, 8).continuations
    same = sum(a == b for a, b in zip(free, forced.continuations, strict=True))
    assert found.document()["identical"] == same


def test_text_and_prompts_share_one_run(nano, noisy, windows, figures):
    forced = continuations.from_text(list(range(5, 500)), 10, prompts=4, length=20)
    both, generation = parity.compare(stream(nano), stream(noisy), windows, forced)
    assert torch.equal(both.kld, figures.kld)
    _, alone = parity.compare(stream(nano), stream(noisy), None, forced)
    assert alone.output_top == generation.output_top
    assert alone.source_top == generation.source_top


def test_prompts_are_spread_over_the_text():
    forced = continuations.from_text(list(range(1000)), 10, prompts=3, length=20)
    assert [ids[0] for ids in forced.prompts] == [0, 485, 970]
    assert [ids[0] for ids in forced.continuations] == [20, 505, 990]
    assert len(continuations.from_text(list(range(65)), 10, prompts=8, length=20).prompts) == 2
    with pytest.raises(InputError, match="has 29 tokens, fewer than a prompt of 20 and 10 to follow"):
        continuations.from_text(list(range(29)), 10, length=20)


def test_prompts_are_read_from_json_and_from_lines(tmp_path: Path):
    (tmp_path / "p.json").write_text(json.dumps(["one", "two"]))
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert continuations.read_prompts(tmp_path / "p.json") == continuations.read_prompts(tmp_path / "p.txt")
    for bad in ("[1]", '"text"', "{}", "{", "[" * 100000):
        (tmp_path / "bad.json").write_text(bad)
        with pytest.raises(InputError, match="bad.json: is n"):
            continuations.read_prompts(tmp_path / "bad.json")


def test_nothing_to_compare_compares_nothing():
    reader = random_reader(SHAPES["top1"], seed=1)
    assert parity.compare(stream(reader), stream(reader), None) == (None, None)


def test_continuations_end_with_the_last_prompt(nano, ids):
    """An end that every prompt has reached ends the reading, too."""
    prompts = [ids[:12], ids[40:60]]
    free = continuations._layer_major(stream(nano), prompts, 3, ())
    whole = free[0][: free[0].index(free[0][1]) + 1]
    for write in (continuations._layer_major, continuations._in_memory):
        assert write(stream(nano), prompts[:1], 9, (7, free[0][1])) == [whole], "with its end, of several"
        assert [len(text) for text in write(stream(nano), prompts, 3, ())] == [3, 3]
