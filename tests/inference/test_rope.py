"""Stretched rotary positions against transformers: its frequencies, its logits, its generation."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from mixtral_oracle import SHAPES, greedy, of_range, read_nano, transformers_model
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mixtools.config import MixtralConfig, from_document
from mixtools.errors import UsageError
from mixtools.inference import rope
from mixtools.inference.attention import span
from mixtools.inference.generate import Options, generate, prefill
from mixtools.inference.model import Cache, Mixtral
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader
from mixtools.scaling import RopeScaling

CPU = torch.device("cpu")
POSITIONS = 32  # that the models below were trained on, as their configurations say

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 4, "beta_slow": 0.5, "truncate": False},
    "yarn-attention": {**YARN, "attention_factor": 1.3, "factor": 3},
    "yarn-one": {**YARN, "factor": 1.0, "mscale": 0.0},
    "yarn-null": {**YARN, "factor": None, "original_max_position_embeddings": 10},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 24},
}  # fmt: skip


def scaled(config: MixtralConfig, scaling: dict, positions: int = POSITIONS) -> MixtralConfig:
    """As it is read from a file."""
    document = {**replace(config, max_position_embeddings=positions).to_hf("float32"), "rope_scaling": scaling}
    return from_document(document, "config.json")


def reader_of(config: MixtralConfig) -> MemoryReader:
    nano = read_nano()
    return MemoryReader(config, {slot: nano.read(slot) for slot in nano.slots()})


def theirs_of(config: MixtralConfig, scaling: dict) -> transformers.MixtralConfig:
    return transformers.MixtralConfig(**{**config.to_hf("float32"), "rope_scaling": dict(scaling)})


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(3, 2048, (2, 120), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", ["nano", "top3", "real"])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_and_gain_are_those_of_transformers(name, shape):
    base = {"nano": read_nano().config, "top3": SHAPES["top3"],
            "real": MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000)}[shape]  # fmt: skip
    factor = 100 if shape == "real" else 1  # a length at which the bounds fall within the head
    document = dict(SCALINGS[name])
    if "original_max_position_embeddings" in document:
        document["original_max_position_embeddings"] *= factor
    config = scaled(base, document, POSITIONS * factor)
    function, theirs = ROPE_INIT_FUNCTIONS[document["rope_type"]], theirs_of(config, document)
    for reach in (1, POSITIONS * factor, POSITIONS * factor + 1, 50 * POSITIONS * factor):
        expected, gain = function(theirs, CPU, seq_len=torch.tensor(reach))
        found = rope.frequencies(config, CPU, torch.tensor([reach])).view(-1)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert rope.gain(config.rope_scaling) == pytest.approx(gain, rel=1e-12)
    plain = rope.frequencies(base, CPU)
    assert name == "yarn-one" or not torch.equal(found, plain)


@torch.no_grad()
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_are_those_of_transformers_within_and_beyond_the_training(name, ids):
    config = scaled(read_nano().config, SCALINGS[name])
    reader = reader_of(config)
    ours, rope_scaling = Mixtral.load(reader, dtype=torch.float32), config.to_hf("float32").get("rope_scaling")
    for length in (POSITIONS - 7, POSITIONS, POSITIONS + 1, 120):
        # a new one each time: in the dynamic one, a text leaves its frequencies for the next
        theirs = transformers_model(reader)
        assert theirs.config.rope_parameters["rope_type"] == rope_scaling["rope_type"] == SCALINGS[name]["rope_type"]
        expected = theirs(ids[:, :length]).logits
        assert of_range(ours(ids[:, :length]), expected) < 5e-6
    plain = Mixtral.load(read_nano(), dtype=torch.float32)(ids)
    assert name == "yarn-one" or of_range(ours(ids), plain) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_layer_by_layer_each_sequence_turns_by_its_own_length(name, ids):
    config = scaled(read_nano().config, SCALINGS[name])
    reader = reader_of(config)
    sequences = [ids[0, :100], ids[1, :100], ids[1, :20], ids[0, :40]]
    stream = Stream(reader, dtype=torch.float32)
    with stream.hidden(sequences) as states:
        logits = torch.cat([part for _, part in stream.logits(states)])
    expected = torch.cat([transformers_model(reader)(row[None]).logits[0] for row in sequences])
    assert of_range(logits, expected) < 5e-6


@torch.no_grad()
@pytest.mark.parametrize("columns", [512, 9])
@pytest.mark.parametrize("name", ["linear", "dynamic", "yarn", "llama3"])
def test_generation_equals_transformers_one_by_one(name, columns, ids):
    """Prompts that end within, at and beyond the training, in one batch, in pieces or whole.

    The dynamic type gives every new token frequencies of its own, while what is cached keeps those it had: all of the
    prompt those of its whole length.
    """
    config = scaled(read_nano().config, SCALINGS[name])
    reader = reader_of(config)
    prompts = [ids[0, :length].tolist() for length in (40, POSITIONS, 25, 1)]
    expected = greedy(reader, prompts, 24)
    model = Mixtral.load(reader, dtype=torch.float32)
    assert generate(model, prompts, Options(max_new_tokens=24, stop=(), prefill=columns)) == expected


@torch.no_grad()
@pytest.mark.parametrize("columns", [1, 7, 64])
def test_logits_of_every_step_equal_those_of_transformers_cache(columns, ids):
    """Tokens may agree by chance where logits do not."""
    reader = reader_of(scaled(read_nano().config, SCALINGS["dynamic"]))
    ours, theirs = Mixtral.load(reader, dtype=torch.float32), transformers_model(reader)
    cache = Cache(ours, batch=2, capacity=60, prompt=45)
    found = [ours(piece, cache) for piece in ids[:, :45].split(columns, dim=1)]
    out = theirs(ids[:, :45], use_cache=True)
    assert of_range(torch.cat(found, dim=1), out.logits) < 5e-6
    for at in range(45, 60):
        out = theirs(ids[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
        assert of_range(ours(ids[:, at : at + 1], cache), out.logits) < 5e-6


@torch.no_grad()
@pytest.mark.parametrize("columns", [9, 33, 512])
def test_a_prompt_in_pieces_turns_by_its_whole_length(columns, ids):
    reader = reader_of(scaled(read_nano().config, {"rope_type": "dynamic", "factor": 8.0}))
    prompts = [ids[0, :length].tolist() for length in (110, 60, 20)]
    logits, _ = prefill(Mixtral.load(reader, dtype=torch.float32), prompts, room=1, columns=columns)
    for prompt, found in zip(prompts, logits, strict=True):
        assert of_range(found, transformers_model(reader)(torch.tensor([prompt])).logits[0, -1]) < 5e-6


def test_rows_of_a_padded_batch_turn_by_their_own_lengths():
    config = scaled(read_nano().config, SCALINGS["dynamic"])
    padding = torch.tensor([0, 70, 90])
    whole = span(config, 100, CPU, padding=padding)
    for row, left in enumerate(padding.tolist()):
        alone = span(config, 100 - left, CPU)
        torch.testing.assert_close(whole.cos[row, 0, left:], alone.cos[0, 0], rtol=0, atol=1e-6)
    assert not torch.equal(whole.cos[0, 0, 1], whole.cos[1, 0, 71])


@pytest.mark.parametrize(
    ("scaling", "positions", "reach"),
    [
        (None, 32, 32),
        (RopeScaling("linear", 3.5), 32, 112),  # the length before the stretching
        (RopeScaling("dynamic", 2.5), 32, 80),
        (RopeScaling("yarn", 3.5, 32, beta_fast=32.0, beta_slow=1.0), 32, 112),
        (RopeScaling("yarn", 3.5, 32, beta_fast=32.0, beta_slow=1.0), 112, 112),  # the length after it
        (RopeScaling("llama3", 8.0, 8, low_freq_factor=1.0, high_freq_factor=4.0), 112, 112),  # as in Llama 3.1
    ],
)
def test_generation_goes_as_far_as_positions_are_stretched(scaling, positions, reach, ids):
    config = replace(read_nano().config, max_position_embeddings=positions, rope_scaling=scaling)
    assert config.reach == reach
    model = Mixtral.load(reader_of(config), dtype=torch.float32)
    assert len(generate(model, [ids[0, : reach - 3].tolist()], Options(max_new_tokens=9, stop=()))[0]) == 3
    with pytest.raises(UsageError, match=f"the model {reach} positions"):
        generate(model, [[5] * reach])
