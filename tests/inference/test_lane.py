"""The way of tensors to a GPU, by a double that keeps what is asked of it in order."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from mixtral_oracle import read_nano
from streaming import some_ids

from mixtools.errors import TensorError
from mixtools.inference import arriving
from mixtools.inference.lane import Lane
from mixtools.inference.model import Mixtral
from mixtools.inference.stream import Stream


class Double:
    """A GPU whose lines are lists in one log; events are named by number, and have come when a line waits for them."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.events = 0

    def line(self) -> Any:
        return _Line(self, "copies")

    def current(self) -> Any:
        return _Line(self, "compute")

    def on(self, line: Any) -> Any:
        return nullcontext()

    def pinned(self, size: int) -> torch.Tensor:
        self.log.append(("pinned", size))
        return torch.full((size,), 255, dtype=torch.uint8)


class _Line:
    def __init__(self, card: Double, name: str) -> None:
        self.card, self.name = card, name

    def wait_event(self, event: Any) -> None:
        self.card.log.append((self.name, "waits", event.number))

    def synchronize(self) -> None:
        self.card.log.append((self.name, "is waited for"))

    def record_event(self) -> Any:
        self.card.events += 1
        self.card.log.append((self.name, "event", self.card.events))
        return _Event(self.card, self.card.events)


class _Event:
    def __init__(self, card: Double, number: int) -> None:
        self.card, self.number = card, number

    def synchronize(self) -> None:
        self.card.log.append(("reader", "waits", self.number))


def test_a_buffer_is_filled_anew_when_it_has_been_copied():
    card = Double()
    lane, to = Lane(card), [torch.zeros(2, 3, dtype=torch.bfloat16) for _ in range(5)]
    for number, one in enumerate(to):
        lane.send(one, lambda place, number=number: (card.log.append(("reader", "fills", number)), place.fill_(number)))
    assert [one.unique().tolist() for one in to] == [[0], [1], [2], [3], [4]]
    fills = [("reader", "fills", number) for number in range(5)]
    sent = [("copies", "event", number) for number in range(1, 6)]
    asked, waits = ("pinned", 12), [("reader", "waits", number) for number in range(1, 4)]
    assert card.log == [
        asked, fills[0], sent[0], asked, fills[1], sent[1], waits[0], fills[2], sent[2], waits[1], fills[3], sent[3],
        waits[2], fills[4], sent[4],
    ]  # fmt: skip


def test_a_larger_tensor_gets_a_larger_buffer():
    card = Double()
    lane = Lane(card)
    for size in (4, 8, 2, 16):
        lane.send(to := torch.zeros(size), lambda place: place.fill_(1))
        assert bool((to == 1).all())
    assert [entry[1] for entry in card.log if entry[0] == "pinned"] == [16, 32, 64]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Double:
    card = Double()
    monkeypatch.setattr(Stream, "lane", lambda _: Lane(card))
    return card


def test_a_stream_by_a_lane_gives_what_a_stream_gives(card):
    reader, ids = read_nano(), some_ids(2048, 20, 20)
    stream = Stream(reader, dtype=torch.bfloat16)
    found = stream.hidden(ids).rows(0, 40)
    whole = Mixtral.load(reader, dtype=torch.bfloat16)
    assert torch.equal(found.view(2, 20, -1), whole.hidden(torch.stack(ids)))


def test_copies_wait_for_what_used_the_memory_and_computing_for_the_copies(card):
    reader = read_nano()
    Stream(reader, dtype=torch.bfloat16).hidden(some_ids(2048, 5))
    freed = [entry[2] for entry in card.log if entry[:2] == ("compute", "event")]
    waited = [entry[2] for entry in card.log if entry[:2] == ("copies", "waits")]
    assert freed == waited and len(freed) == reader.config.num_layers
    first_copy = next(index for index, entry in enumerate(card.log) if entry[:2] == ("copies", "event"))
    assert card.log.index(("copies", "waits", freed[0])) < first_copy
    sent = {entry[2] for entry in card.log if entry[:2] == ("copies", "event")}
    met = {entry[2] for entry in card.log if entry[:2] == ("compute", "waits")}
    outside = sum(slot.expert is None for slot in reader.slots() if slot.layer is not None)
    assert met <= sent and len(met) > outside  # all of attention and router, and of experts those that got a token
    per_layer = len([slot for slot in reader.slots() if slot.layer == 0])
    assert len(sent) == per_layer * reader.config.num_layers


def test_what_reading_raises_by_a_lane_is_raised(card, monkeypatch):
    def broken(*_: object) -> None:
        raise TensorError("is damaged")

    monkeypatch.setattr(arriving, "_read", broken)
    with pytest.raises(TensorError, match="damaged"):
        Stream(read_nano(), dtype=torch.bfloat16).hidden(some_ids(2048, 5))


def test_a_stream_that_is_left_waits_for_what_was_sent(card):
    """What it was sent to is given back then, and may be another's at once."""
    layers = Stream(read_nano(), dtype=torch.bfloat16).layers(0, 2)
    next(layers)
    layers.close()
    assert card.log[-1] == ("copies", "is waited for")
