"""A layer runs while it is read, and its memory is used again: nothing is taken too early, nothing held too long."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest
import torch
from mixtral_oracle import SHAPES, read_nano
from streaming import allocated, least_memory, some_ids

from mixtools.errors import TensorError
from mixtools.inference import budget, host
from mixtools.inference.attention import span
from mixtools.inference.model import Layer, Mixtral
from mixtools.inference.stream import Arriving, Stream
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import Role, Slot, layer_slots


class SlowReader:
    """Gives nano's tensors with a pause before each, or when `before` returns."""

    def __init__(self, before=lambda _: time.sleep(0.002)) -> None:
        self.inner, self.before = read_nano(), before
        self.config, self.slots, self.spec = self.inner.config, self.inner.slots, self.inner.spec
        self.reads: list[Slot] = []

    def read(self, slot: Slot) -> torch.Tensor:
        self.reads.append(slot)
        if slot.layer is not None:
            self.before(slot)
        return self.inner.read(slot)


@pytest.fixture
def spoilt(monkeypatch):
    """What is not read yet is NaN."""
    plain = Arriving.read_ahead

    def read_ahead(layer, reader, index, pool, lane=None):
        layer.index = index
        for slot in layer_slots(index, layer.config.num_experts):
            super(Arriving, layer).weight(slot).fill_(torch.nan)
        plain(layer, reader, index, pool, lane)

    monkeypatch.setattr(Arriving, "read_ahead", read_ahead)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("late", [None, *(slot for slot in layer_slots(0, 8) if slot.expert in (None, 3))], ids=str)
def test_every_part_waits_for_its_weights(spoilt, double, late):
    def before(slot: Slot) -> None:
        time.sleep(0.05 if late and slot[::2] == late[::2] else 0.001)

    stream, ids = Stream(SlowReader(before), dtype=torch.float32), some_ids(2048, 30, 30)
    states = stream.embed(ids)
    for layer in stream.layers(0, 2, double=double):
        stream.through(layer, states, into=states, pass_tokens=30)
    whole = Mixtral.load(read_nano(), dtype=torch.float32)
    assert torch.equal(torch.cat([states[0], states[1]]), torch.cat([whole.hidden(row[None])[0] for row in ids]))


def test_attention_runs_before_the_last_expert_is_there():
    seen, overlapped = threading.Event(), []

    def before(slot: Slot) -> None:
        if slot == Slot(Role.UP, 0, 7):
            overlapped.append(seen.wait(20))

    def observer(slot, x, tokens, weights):
        if slot == Slot(Role.ROUTER, 0):
            seen.set()

    Stream(SlowReader(before), dtype=torch.float32).hidden(some_ids(2048, 12), observer=observer)
    assert overlapped == [True]


def test_a_weight_changed_by_the_caller_is_not_read_over():
    """As edits are put in by the search: the tensor is waited for."""
    stream = Stream(SlowReader(), dtype=torch.float32)
    for layer in stream.layers(0, 2):
        last = Slot(Role.UP, layer.index, 7)
        layer.weight(last).zero_()
        layer.finish()
        assert not layer.weight(last).any()


def test_damage_in_a_tensor_that_no_token_needs_is_raised():
    tensors = {slot: read_nano().read(slot) for slot in read_nano().slots()}
    tensors[Slot(Role.ROUTER, 1)].zero_()  # every token to the same two experts

    class Damaged(MemoryReader):
        def read(self, slot: Slot) -> torch.Tensor:
            if slot == damaged:
                raise TensorError("is damaged", tensor=slot)
            return super().read(slot)

    for expert in range(8):
        damaged = Slot(Role.UP, 1, expert)
        with pytest.raises(TensorError, match=rf"layers.1.experts.{expert}.w3: is damaged"):
            Stream(Damaged(read_nano().config, tensors)).hidden(some_ids(2048, 8))


def test_who_stops_early_does_not_wait_for_the_rest():
    reader = SlowReader(lambda _: time.sleep(0.01))
    layers = Stream(reader, dtype=torch.float32).layers(0, 2)
    assert next(layers).weight(Slot(Role.Q, 0)).isfinite().all()
    layers.close()
    assert len(reader.reads) < 10
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixtools-reader")]


# --- memory from run to run ---


def addresses(stream: Stream) -> set[int]:
    return {layer.down.data_ptr() for layer in stream._spare}


def test_the_next_run_uses_the_same_memory(spoilt):
    ids, expected = some_ids(2048, 30, 30), Mixtral.load(read_nano(), dtype=torch.bfloat16)
    stream, used = Stream(read_nano(), reuse=True), []
    for _ in range(3):
        states = stream.hidden(ids)
        assert torch.equal(states[1], expected.hidden(torch.stack(ids))[1])
        used.append(addresses(stream))
    assert used[0] == used[1] == used[2]
    assert len(used[0]) == 2
    stream.forget()
    assert not addresses(stream)
    plain = Stream(read_nano())
    plain.hidden(ids)
    assert not addresses(plain)


def test_another_stream_inherits_what_fits_it():
    ids, first = some_ids(2048, 9), Stream(read_nano(), reuse=True)
    for dtype, count in ((torch.bfloat16, 2), (torch.float32, 0)):
        first.hidden(ids)
        held = addresses(first)
        second = Stream(read_nano(), dtype=dtype, reuse=True)
        second.inherit(first)
        assert not addresses(first)
        assert addresses(second) == (held if count else set())
        second.hidden(ids)
        assert addresses(second) == held or not count


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0, 1.5])
def test_what_is_held_is_in_the_plan(dtype, native, share, tmp_path, monkeypatch):
    """Two runs, the second longer, from the least memory that works to more than enough, on either kind of machine."""
    monkeypatch.setattr(host, "empty", lambda shape, device, kind: torch.empty(shape, device=device, dtype=kind))
    monkeypatch.setattr(host, "native", lambda kind: native or kind == torch.float32)
    tensors = {slot: read_nano().read(slot) for slot in read_nano().slots()}
    for layer in range(2):
        tensors[Slot(Role.ROUTER, layer)].zero_()
    reader = MemoryReader(read_nano().config, tensors)
    runs = [some_ids(2048, *[64] * 10), some_ids(2048, *[64] * 40)]
    lengths = [len(ids) for ids in runs[1]]
    least = least_memory(reader, dtype, runs[1])
    most = Stream(reader, dtype=dtype, reuse=True).plan(lengths).peak_bytes
    allowed = int(least + share * (most - least))
    stream = Stream(reader, dtype=dtype, max_memory=allowed, spill=tmp_path, reuse=True)
    plan = stream.plan(lengths)
    assert plan.kept is (share >= 1)

    def work() -> None:
        for ids in runs:
            with stream.hidden(ids) as states:
                for _, logits in stream.logits(states):
                    logits.logsumexp(-1)

    assert allocated(work) <= allowed
    assert bool(addresses(stream)) is plan.kept


def test_what_no_longer_fits_is_given_back_before_the_next_text_comes_in():
    reader, short, long = read_nano(), some_ids(2048, 64), some_ids(2048, *[64] * 40)
    enough = Stream(reader, reuse=True).plan([64]).peak_bytes
    stream = Stream(reader, max_memory=enough, reuse=True)
    stream.hidden(short)
    assert len(addresses(stream)) == 2
    assert not stream.plan([64] * 40).kept
    stream.embed(long)
    assert not addresses(stream)


@pytest.mark.parametrize("native", [True, False])
def test_a_pass_takes_what_the_plan_counts_for_its_tokens(native, monkeypatch):
    """Experts as wide as Mixtral's are, and every token to the same two: what widening takes shows."""
    monkeypatch.setattr(host, "native", lambda kind: native or kind == torch.float32)
    config = replace(SHAPES["mqa"], intermediate_size=2048)
    reader = random_reader(config, seed=1, dtype=torch.bfloat16)
    needs = budget.Needs.of(reader, torch.device("cpu"), torch.bfloat16, longest=64)
    layer = Layer.load(reader, 0, torch.device("cpu"), torch.bfloat16)
    layer.router.zero_()
    x = torch.randn(32, 64, config.hidden_size).bfloat16()
    where = span(config, 64, torch.device("cpu"))
    peak = allocated(lambda: layer(x, where))
    assert 0.7 * 2048 * needs.token < peak <= 2048 * needs.token + needs.aside
