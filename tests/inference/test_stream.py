"""Layer-major running against the model in memory (bit for bit), transformers, and counted allocations."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from pathlib import Path

import pytest
import torch
from mixtral_oracle import NANO, SHAPES, of_range, read_nano, transformers_model
from streaming import allocated, least_memory, some_ids

import mixtools
from mixtools.errors import DiskError, InputError, MemoryBudgetError, TensorError
from mixtools.inference import arriving, host
from mixtools.inference import states as states_module
from mixtools.inference.model import Layer, Mixtral
from mixtools.inference.states import States
from mixtools.inference.stream import Stream, passes
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import Role, Slot, layer_slots


class CountingReader:
    """Counts how often each tensor is read, and on which thread."""

    def __init__(self, inner: MemoryReader) -> None:
        self.config, self.slots, self.spec, self.inner = inner.config, inner.slots, inner.spec, inner
        self.reads: Counter[Slot] = Counter()
        self.threads: set[str] = set()

    def read(self, slot: Slot) -> torch.Tensor:
        self.reads[slot] += 1
        self.threads.add(threading.current_thread().name.partition("_")[0])
        return self.inner.read(slot)


def all_logits(stream: Stream, states: States) -> torch.Tensor:
    return torch.cat([chunk for _, chunk in stream.logits(states)])


@pytest.fixture(scope="module")
def nano() -> MemoryReader:
    return read_nano()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("spilled", [True, False])
def test_streamed_is_bit_equal_to_the_model_in_memory(dtype, double, spilled, tmp_path, monkeypatch):
    nano, ids = read_nano(), some_ids(2048, 40, 40, 40)
    whole = Mixtral.load(nano, dtype=dtype)
    stream = Stream(nano, dtype=dtype, spill=tmp_path)
    plan = stream.plan([40] * 3)
    chosen = plan.__class__(double, spilled, plan.pass_tokens, plan.logit_rows, plan.states_bytes, plan.peak_bytes)
    monkeypatch.setattr(stream, "plan", lambda *_, **__: chosen)
    states = stream.hidden(ids)
    assert states.spilled is spilled
    assert torch.equal(torch.stack([states[i] for i in range(3)]), whole.hidden(torch.stack(ids)))
    assert torch.equal(all_logits(stream, states), whole(torch.stack(ids)).flatten(0, 1))
    assert len(stream.remarks) == (not double) + spilled


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_sequences_of_many_lengths_equal_transformers(shape):
    reader = random_reader(SHAPES[shape], seed=5)
    sequences = some_ids(reader.config.vocab_size, 12, 12, 12, 7, 12, 1)
    stream = Stream(reader, dtype=torch.float32)
    states = stream.hidden(sequences)
    theirs = transformers_model(reader)
    for index, ids in enumerate(sequences):
        found = torch.cat(
            [c for _, c in stream.logits(states, torch.arange(states.starts[index], states.starts[index + 1]))]
        )
        assert of_range(found, theirs(ids[None]).logits[0]) < 5e-6


def test_each_weight_is_read_once_and_layers_on_a_thread_of_their_own(nano):
    reader = CountingReader(nano)
    stream = Stream(reader, dtype=torch.float32)
    all_logits(stream, stream.hidden(some_ids(2048, *[16] * 9)))
    assert set(reader.reads.values()) == {1}
    assert set(reader.reads) == set(nano.slots())
    assert reader.threads == {"mixtools-reader", "MainThread"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("share", [0.0, 0.2, 1.0, 3.0])
def test_memory_stays_within_what_is_allowed(nano, dtype, share, tmp_path, monkeypatch):
    """From the least that works to more than enough; the router sends every token to the same experts."""
    # by torch's own allocator, whose record is what we count
    monkeypatch.setattr(host, "empty", lambda shape, device, kind: torch.empty(shape, device=device, dtype=kind))
    tensors = {slot: nano.read(slot) for slot in nano.slots()}
    for layer in range(2):
        tensors[Slot(Role.ROUTER, layer)].zero_()
    reader = MemoryReader(nano.config, tensors)
    ids = some_ids(2048, *[64] * 80)
    least = least_memory(reader, dtype, ids)
    most = Stream(reader, dtype=dtype).plan([64] * 80).peak_bytes
    allowed = int(least + share * (most - least))
    stream = Stream(reader, dtype=dtype, max_memory=allowed, spill=tmp_path)
    plan = stream.plan([64] * 80)
    assert plan.peak_bytes <= allowed
    if dtype == torch.float32:  # in 16 bits the head, in part fp32, takes more than a layer of nano
        assert (plan.double, plan.spilled) == (share > 0, share < 1)
    found = []
    peak = allocated(
        lambda: found.append(sum(float(c.logsumexp(-1).sum()) for _, c in stream.logits(stream.hidden(ids))))
    )
    assert 0.2 * plan.peak_bytes < peak <= plan.peak_bytes
    whole = Mixtral.load(reader, dtype=dtype)(torch.stack(ids)).logsumexp(-1).sum()
    assert found[0] == pytest.approx(float(whole), rel=1e-4)


def test_too_little_memory_is_refused_before_anything_is_read(nano):
    reader = CountingReader(nano)
    with pytest.raises(MemoryBudgetError, match=r"allow \d+\.\d+ MB or more"):
        Stream(reader, max_memory=2_000_000).hidden(some_ids(2048, 64))
    assert not reader.reads


def test_a_full_disk_is_refused_before_anything_is_read(nano, tmp_path, monkeypatch):
    monkeypatch.setattr(states_module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    reader = CountingReader(nano)
    ids = some_ids(2048, *[64] * 80)
    stream = Stream(reader, max_memory=least_memory(nano, torch.bfloat16, ids), spill=tmp_path)
    with pytest.raises(DiskError, match="no room for the hidden states"):
        stream.hidden(ids)
    assert not reader.reads


def test_a_spilled_file_has_no_name_to_leave_behind(tmp_path):
    states = States([3, 2], 4, torch.bfloat16, spill=tmp_path)
    assert list(tmp_path.iterdir()) == []
    states.write(1, torch.arange(16).view(4, 4).bfloat16())
    assert torch.equal(states[1], torch.arange(8, 16).view(2, 4).bfloat16())
    assert torch.equal(states.select(torch.tensor([1, 2, 4]))[:, 0], torch.tensor([0, 4, 12]).bfloat16())
    states.close()
    states.close()


def test_boundary_states_can_be_started_from_again():
    config = SHAPES["mqa"]  # 3 layers
    reader = random_reader(config, seed=2)
    ids = some_ids(config.vocab_size, 9, 9, 4)
    stream = Stream(reader, dtype=torch.float32)
    expected = stream.hidden(ids)
    boundary = stream.hidden(ids, stop=2)
    assert boundary.layer == 2
    for _ in range(2):
        again = stream.run(boundary, keep=True)
        assert again.layer == 3
        assert torch.equal(again.rows(0, 22), expected.rows(0, 22))
    assert boundary.layer == 2
    assert torch.equal(stream.run(boundary, stop=2, keep=True).rows(0, 22), boundary.rows(0, 22))
    assert not torch.equal(boundary.rows(0, 22), expected.rows(0, 22))


def test_observers_see_what_they_see_in_memory(nano):
    ids = some_ids(2048, 20, 20)
    seen: list[dict[Slot, torch.Tensor]] = [{}, {}]

    def into(table):
        return lambda slot, x, tokens, weights: table.__setitem__(slot, x.clone())

    Stream(nano, dtype=torch.float32).hidden(ids, observer=into(seen[0]))
    Mixtral.load(nano, dtype=torch.float32).hidden(torch.stack(ids), observer=into(seen[1]))
    assert seen[0].keys() == seen[1].keys() >= {Slot(Role.Q, 0), Slot(Role.DOWN, 1, 3), Slot(Role.ROUTER, 1)}
    assert all(torch.equal(seen[0][slot], seen[1][slot]) for slot in seen[0])


def test_passes_are_runs_of_one_length():
    assert list(passes([4, 4, 4, 4, 4, 3], 8)) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert list(passes([9, 9, 2, 2], 4)) == [(0, 1), (1, 2), (2, 4)]
    assert list(passes([], 4)) == []


def test_an_id_outside_the_vocabulary_is_named(nano):
    bad = some_ids(2048, 8, 8)
    bad[1][5] = 2048
    with pytest.raises(InputError, match="sequence 1, position 5.*expected 0 to 2047, found 2048"):
        Stream(nano).hidden(bad)
    with pytest.raises(InputError, match="sequence 0 is empty"):
        Stream(nano).hidden([torch.zeros(0, dtype=torch.long)])


def test_what_the_reading_thread_raises_arrives(nano):
    class Damaged(CountingReader):
        def read(self, slot: Slot) -> torch.Tensor:
            if slot == Slot(Role.DOWN, 1, 3):
                raise TensorError("is damaged", tensor=slot)
            return super().read(slot)

    with pytest.raises(TensorError, match=r"layers.1.experts.3.w2: is damaged"):
        Stream(Damaged(nano)).hidden(some_ids(2048, 8))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mixtools-reader")]


def test_progress_counts_every_token_of_every_layer(nano, tmp_path):
    told: list[object] = []

    class Told:
        def start(self, label: str, total: int, unit: str = "B") -> None:
            told.append((label, total, unit))

        def advance(self, amount: int) -> None:
            told.append(amount)

        def finish(self) -> None:
            told.append("end")

    ids = some_ids(2048, 30, 30, 5)
    least = least_memory(nano, torch.bfloat16, ids)
    Stream(nano, max_memory=least, progress=Told(), spill=Path(tmp_path)).hidden(ids)
    label, total, unit = told[0]
    assert "two layers do not fit" in label
    assert (total, unit, told[-1]) == (130, "tok", "end")
    assert sum(told[1:-1]) == 130


@pytest.fixture(scope="module")
def stacked(tmp_path_factory) -> Path:
    """Nano as layout B: experts stacked, w2 transposed. Written with torch.save, from the format's page."""
    folder = tmp_path_factory.mktemp("stacked")
    stored = torch.load(NANO / "consolidated.00.pth", weights_only=True)
    tensors = {name: tensor for name, tensor in stored.items() if ".feed_forward." not in name}
    for layer in range(2):
        old, new = f"layers.{layer}.feed_forward", f"layers.{layer}.block_sparse_moe"
        tensors[f"{new}.gate.weight"] = stored[f"{old}.gate.weight"]
        for part in ("w1", "w2", "w3"):
            experts = [stored[f"{old}.experts.{expert}.{part}.weight"] for expert in range(8)]
            tensors[f"{new}.{part}"] = torch.cat([w.T if part == "w2" else w for w in experts]).contiguous()
    torch.save(tensors, folder / "consolidated.00.pt")
    shutil.copy(NANO / "params.json", folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_files_are_read_into_place_in_blocks(nano, stacked, dtype, monkeypatch):
    """Rotary rows, transposed experts, another dtype: as from whole tensors, whatever the size of a block."""
    for folder in (NANO, stacked):
        for size in (1 << 12, 1 << 22):
            monkeypatch.setattr("mixtools.layouts.checkpoint.CHUNK", size)
            checkpoint = open_checkpoint(folder)
            assert isinstance(checkpoint, arriving.Filling)
            filled = arriving.fill(Layer(nano.config, 0, torch.device("cpu"), dtype), checkpoint, 1)
            expected = Layer.load(nano, 1, torch.device("cpu"), dtype)
            assert filled.index == 1
            for slot in layer_slots(1, 8):
                assert torch.equal(filled.weight(slot), expected.weight(slot)), slot


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_blocks_are_decoded_in_place(dtype, tmp_path, monkeypatch):
    """As from whole tensors, whatever the size of a block."""
    mixtools.quantize(NANO, tmp_path, type=["Q4_K_M"], name="nano")
    checkpoint = open_checkpoint(tmp_path)
    for size in (1 << 12, 1 << 22):
        monkeypatch.setattr("mixtools.layouts.checkpoint.CHUNK", size)
        filled = arriving.fill(Layer(checkpoint.config, 0, torch.device("cpu"), dtype), checkpoint, 1)
        for slot in layer_slots(1, 8):
            assert torch.equal(filled.weight(slot), checkpoint.read(slot).to(dtype)), slot
