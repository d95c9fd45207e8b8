"""A sliding window against transformers: in whole sequences, in pieces, behind padding, and in generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mixtral_oracle import SHAPES, greedy, of_range, read_nano, transformers_model
from streaming import allocated, least_memory, some_ids

from mixtools.inference import attention, host
from mixtools.inference.attention import span
from mixtools.inference.generate import Options, generate
from mixtools.inference.model import Cache, Mixtral
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import Role, Slot
from mixtools.scaling import RopeScaling

CPU = torch.device("cpu")


def limited(window: int | None, **other: object) -> MemoryReader:
    nano = read_nano()
    config = replace(nano.config, sliding_window=window, **other)
    return MemoryReader(config, {slot: nano.read(slot) for slot in nano.slots()})


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 2048, (2, 150), generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[512, 64, 7])
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Rows that attend at a time: all, some, and fewer than a window."""
    monkeypatch.setattr(attention, "BAND_ROWS", request.param)
    return request.param


@torch.no_grad()
@pytest.mark.parametrize("window", [1, 2, 16, 64, 149, 150, 151])
def test_logits_are_those_of_transformers_at_every_position(window, ids, rows):
    reader = limited(window)
    theirs = transformers_model(reader)
    assert theirs.config.sliding_window == window
    found = Mixtral.load(reader, dtype=torch.float32)(ids)
    assert of_range(found, theirs(ids).logits) < 5e-6
    plain = Mixtral.load(limited(None), dtype=torch.float32)(ids)
    assert of_range(found[:, :window], plain[:, :window]) < 5e-6
    if window < 150:
        assert of_range(found[:, window:], plain[:, window:]) > 1e-3  # a token sees itself and window - 1 before it


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_of_heads(shape):
    reader = random_reader(replace(SHAPES[shape], sliding_window=9), seed=4)
    ids = torch.randint(reader.config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(2))
    expected = transformers_model(reader)(ids).logits
    assert of_range(Mixtral.load(reader, dtype=torch.float32)(ids), expected) < 2e-5


@pytest.mark.parametrize("pieces", [[1] * 150, [20, 1, 1, 99, 29], [149, 1], [10, 6, 1, 133]])
@pytest.mark.parametrize("window", [1, 16, 100])
def test_pieces_through_the_cache_equal_the_whole(window, pieces, ids, rows):
    model = Mixtral.load(limited(window), dtype=torch.float32)
    cache = Cache(model, batch=2, capacity=150)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert of_range(found, model(ids)) < 5e-6


@pytest.mark.parametrize("columns", [4, 23, 64])
@pytest.mark.parametrize("window", [1, 5, 30])
def test_each_row_of_a_padded_batch_equals_itself_alone(window, columns, ids, rows):
    model = Mixtral.load(limited(window), dtype=torch.float32)
    lengths = (64, 1, 30, 47)
    texts = [ids[row % 2, row : row + length] for row, length in enumerate(lengths)]
    padding = torch.tensor([64 - length for length in lengths])
    batch = torch.stack([torch.nn.functional.pad(row, (64 - len(row), 0)) for row in texts])
    cache = Cache(model, batch=4, capacity=66, padding=padding)
    prompt = torch.cat([model(piece, cache) for piece in batch.split(columns, dim=1)], dim=1)
    cache.select(torch.tensor([0, 2, 3]))  # the second prompt ends here
    further = [torch.tensor([[5], [6], [7]]), torch.tensor([[8], [9], [10]])]
    after = torch.cat([model(step, cache) for step in further], dim=1)
    for place, row in ((0, 0), (1, 2), (2, 3)):
        alone = model(torch.cat([texts[row], *(step[place] for step in further)])[None])[0]
        found = torch.cat([prompt[row, 64 - lengths[row] :], after[place]])
        assert of_range(found, alone) < 5e-6


@torch.no_grad()
@pytest.mark.parametrize("prefill", [512, 9])
@pytest.mark.parametrize("other", [{}, {"scaled": True}])
def test_generation_equals_transformers_one_by_one(prefill, other, ids):
    more = {"max_position_embeddings": 50, "rope_scaling": RopeScaling("dynamic", 4.0)} if other else {}
    reader = limited(16, **more)
    prompts = [ids[0, :length].tolist() for length in (60, 16, 10, 1)]
    expected = greedy(reader, prompts, 24)
    model = Mixtral.load(reader, dtype=torch.float32)
    assert generate(model, prompts, Options(max_new_tokens=24, stop=(), prefill=prefill)) == expected
    plain = Mixtral.load(limited(None, **more), dtype=torch.float32)
    assert generate(plain, prompts, Options(max_new_tokens=24, stop=())) != expected


def test_a_window_that_hides_nothing_takes_the_plain_way():
    """No mask, no runs of rows: what a model without a window takes."""
    config = limited(64).config
    assert span(config, 64, CPU).band is None
    assert span(config, 64, CPU).mask is None
    assert span(config, 1, CPU, start=63).band is None
    assert span(config, 65, CPU).band is not None
    assert span(config, 1, CPU, start=64).band is not None
    assert span(replace(config, sliding_window=None), 4000, CPU).band is None


def test_a_new_token_behind_a_window_needs_no_mask():
    band = span(limited(64).config, 1, CPU, start=100).band
    assert attention._visible(band, 100, 1, CPU) == (37, None)  # 37 to 100: 64 columns


def test_no_row_sees_nothing():
    """Not even one of padding: some kernels make NaN of it, and NaN spreads through the cache."""
    where = span(limited(5).config, 20, CPU, padding=torch.tensor([0, 12]))
    _, mask = attention._visible(where.band, 0, 20, CPU)
    assert mask.any(-1).all()


@torch.no_grad()
def test_layer_by_layer_it_is_the_same(ids):
    reader = limited(16)
    sequences = [ids[0], ids[1], ids[0, :10]]
    stream = Stream(reader, dtype=torch.float32)
    with stream.hidden(sequences) as states:
        logits = torch.cat([part for _, part in stream.logits(states)])
    theirs = transformers_model(reader)
    assert of_range(logits, torch.cat([theirs(row[None]).logits[0] for row in sequences])) < 5e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [3, 700])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_plan_counts_what_masks_take(dtype, window, share, tmp_path, monkeypatch):
    """Few experts and a small vocabulary: without the masks' room, a plan would be exceeded."""
    monkeypatch.setattr(host, "empty", lambda shape, device, kind: torch.empty(shape, device=device, dtype=kind))
    config = replace(SHAPES["mqa"], intermediate_size=8, vocab_size=40, sliding_window=window)
    tensors = {slot: random_reader(config, seed=1, dtype=dtype).read(slot) for slot in config.slots()}
    for layer in range(config.num_layers):
        tensors[Slot(Role.ROUTER, layer)].zero_()
    reader = MemoryReader(config, tensors)
    sequences = some_ids(40, 1500, 1500)
    least = least_memory(reader, dtype, sequences)
    most = Stream(reader, dtype=dtype).plan([1500, 1500]).peak_bytes
    allowed = int(least + share * (most - least))
    stream = Stream(reader, dtype=dtype, max_memory=allowed, spill=tmp_path)

    def work() -> None:
        with stream.hidden(sequences) as states:
            for _, logits in stream.logits(states):
                logits.logsumexp(-1)

    assert allocated(work) <= allowed
