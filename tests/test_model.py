"""The model against logits made in fp64 by other code, against transformers, and against itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mixtools.config import from_document, load_json
from mixtools.layouts.memory import MemoryReader
from mixtools.model import Mixtral
from mixtools.names import Role

DATA = Path(__file__).parent / "data"
NANO = DATA / "nano-mixtral"
LANGUAGES = ("en", "fr", "de", "it", "es")


def read_nano() -> MemoryReader:
    """The nano model by a path of its own: torch.load and the names of the torrent, spelled out here."""
    config = from_document(load_json(NANO / "params.json"), NANO / "params.json")
    stored = torch.load(NANO / "consolidated.00.pth", weights_only=True)
    names = {
        Role.EMBED: "tok_embeddings", Role.NORM: "norm", Role.HEAD: "output",
        Role.ATTENTION_NORM: "layers.{0}.attention_norm", Role.FFN_NORM: "layers.{0}.ffn_norm",
        Role.Q: "layers.{0}.attention.wq", Role.K: "layers.{0}.attention.wk",
        Role.V: "layers.{0}.attention.wv", Role.O: "layers.{0}.attention.wo",
        Role.ROUTER: "layers.{0}.feed_forward.gate", Role.GATE: "layers.{0}.feed_forward.experts.{1}.w1",
        Role.DOWN: "layers.{0}.feed_forward.experts.{1}.w2", Role.UP: "layers.{0}.feed_forward.experts.{1}.w3",
    }  # fmt: skip
    tensors = {}
    for slot in config.slots():
        weight = stored[names[slot.role].format(slot.layer, slot.expert) + ".weight"]
        if slot.role in (Role.Q, Role.K):  # from interleaved pairs to halves
            pairs = weight.view(-1, config.head_dim // 2, 2, config.hidden_size)
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        tensors[slot] = weight
    return MemoryReader(config, tensors)


@pytest.fixture(scope="module")
def nano() -> MemoryReader:
    return read_nano()


def of_range(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference, as a part of the range of what was expected."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("language", LANGUAGES)
def test_nano_equals_the_fp64_reference(nano: MemoryReader, language: str) -> None:
    reference = np.load(DATA / "reference_logits.npz")
    ids = torch.from_numpy(reference[f"{language}_ids"]).long()[None]
    logits = Mixtral.load(nano, dtype=torch.float32)(ids)[0]
    assert of_range(logits, torch.from_numpy(reference[f"{language}_logits"])) < 5e-6
