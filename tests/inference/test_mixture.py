"""Many tokens through their experts at once, and a layer that does so on a GPU that is not there (tests/card.py)."""

from __future__ import annotations

import pytest
import torch
from card import Card, OnCard
from mixtral_oracle import of_range, read_nano
from streaming import some_ids

from mixtools.inference import mixture
from mixtools.inference.stream import Stream


@pytest.mark.parametrize("case", ["any", "one expert takes all", "an expert without tokens"])
def test_a_mixture_is_the_sum_of_each_tokens_experts(case):
    random = torch.Generator().manual_seed(4)
    tokens, hidden, inner, experts = 37, 12, 20, 5
    x = torch.randn(tokens, hidden, generator=random)
    gate_up = torch.randn(experts, 2 * inner, hidden, generator=random)
    down = torch.randn(experts, hidden, inner, generator=random)
    choices = {
        "any": torch.stack([torch.randperm(experts, generator=random)[:2] for _ in range(tokens)]),
        "one expert takes all": torch.tensor([[3, 1]]).repeat(tokens, 1),
        "an expert without tokens": torch.tensor([[4, 0]]).repeat(tokens, 1).flip(0),
    }[case]
    weights = torch.rand(tokens, 2, generator=random)
    found = mixture.mixture(x, weights, choices, lambda: gate_up, lambda: down)
    wanted = torch.zeros(tokens, hidden, dtype=torch.float64)
    for token in range(tokens):
        for choice, share in zip(choices[token].tolist(), weights[token].double(), strict=True):
            gate, up = (gate_up[choice].double() @ x[token].double()).chunk(2)
            wanted[token] += share * (down[choice].double() @ (torch.nn.functional.silu(gate) * up))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-4)


def test_rows_of_a_group_are_multiplied_by_its_matrix():
    random = torch.Generator().manual_seed(1)
    x, matrices = torch.randn(7, 4, generator=random), torch.randn(3, 5, 4, generator=random)
    found = mixture.grouped(x, matrices, torch.tensor([3, 3, 7], dtype=torch.int32))
    torch.testing.assert_close(found, torch.cat((x[:3] @ matrices[0].T, x[3:] @ matrices[2].T)))


def test_a_matrix_is_asked_for_when_it_is_needed():
    """And what was unpacked before is free by then."""
    asked: list[str] = []
    x, experts, weights = torch.ones(2, 4), torch.tensor([[0], [0]]), torch.ones(2, 1)
    mixture.mixture(
        x, weights, experts, lambda: asked.append("gate and up") or torch.ones(1, 6, 4),
        lambda: asked.append("down") or torch.ones(1, 4, 3),
    )  # fmt: skip
    assert asked == ["gate and up", "down"]


def test_a_layer_on_a_gpu_mixes_no_devices(monkeypatch):
    """A stream's states are those of a CPU up to the order of sums; what waits are the loops of grouped products."""
    reader, ids = read_nano(), some_ids(2048, 20, 20)
    stream = Stream(reader, dtype=torch.float32)
    expected = torch.cat([logits for _, logits in stream.logits(stream.hidden(ids), torch.arange(3, 40, 2))])
    monkeypatch.setattr(Stream, "lane", lambda _: None)  # which needs streams
    with Card() as card:
        stream = Stream(reader, "cuda", torch.float32)
        states = stream.hidden(ids)
        assert isinstance(states.rows(0, 40), OnCard)  # nothing goes back and forth between layers
        found = torch.cat([logits.cpu() for _, logits in stream.logits(states, torch.arange(3, 40, 2))])
    assert of_range(found, expected) < 2e-6
    computing = {line.split(":")[0] for line in card.waits} - {"elsewhere"}  # what is asked for here
    assert "inference/mixture.py" in computing
    assert computing <= {"inference/mixture.py", "inference/arriving.py", "inference/model.py", "inference/states.py",
                         "inference/stream.py"}  # fmt: skip
