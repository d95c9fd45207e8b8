"""The random model that tests run on."""

from __future__ import annotations

import torch

from mixtools.config import MixtralConfig
from mixtools.layouts.memory import random_reader

CONFIG = MixtralConfig(256, 128, 2, 4, 2, 64, 300, num_experts=2)


def test_a_random_model_neither_fades_nor_grows() -> None:
    reader = random_reader(CONFIG, seed=7)
    for slot in reader.slots():
        weight = reader.read(slot)
        if weight.ndim == 1:
            assert abs(float(weight.mean()) - 1) < 0.05 and 0.05 < float(weight.std()) < 0.15
        else:  # the variance of an input is that of the output
            assert 0.9 < float(weight.std()) * weight.shape[1] ** 0.5 < 1.1


def test_the_same_seed_is_the_same_model() -> None:
    first, again, other = random_reader(CONFIG, 7), random_reader(CONFIG, 7), random_reader(CONFIG, 8)
    for slot in first.slots():
        assert torch.equal(first.read(slot), again.read(slot))
        assert not torch.equal(first.read(slot), other.read(slot))
