"""What a calibrated run is told to take, and where its hidden states lie."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtools.config import MixtralConfig
from mixtools.errors import MemoryBudgetError
from mixtools.layouts.reader import Spec
from mixtools.methods.quantize import asked
from mixtools.methods.quantize.matrix import Options
from mixtools.methods.quantize.passage import Room
from mixtools.storage.dtypes import DType

LARGE = MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000)
TOKENS = 128 * 2048


def told(device: str, tokens: int = TOKENS, limit: int | None = None) -> asked.Needs:
    source: Any = SimpleNamespace(
        config=LARGE, slots=LARGE.slots, spec=lambda slot: Spec(LARGE.shape(slot.role), DType.BF16)
    )
    sequences = tuple(torch.zeros(2048, dtype=torch.long) for _ in range(tokens // 2048))
    how: Any = SimpleNamespace(text=SimpleNamespace(sequences=sequences), options=Options(), smooth=True)
    stream: Any = SimpleNamespace(device=torch.device(device), dtype=torch.bfloat16)
    return asked.needs(source, how, stream, limit)


def test_on_a_cpu_many_states_go_to_a_file() -> None:
    assert told("cpu").room == Room(spilled=True) and told("cpu", 4096).room == Room()
    assert told("cpu", limit=100_000_000_000).room == Room()
    with pytest.raises(MemoryBudgetError, match="--max-memory is too small"):
        told("cpu", limit=3_000_000_000)


def test_on_a_card_they_stay_where_it_has_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the next layer is read ahead, then as many experts go in step as fit; all that is told."""
    free = [130_000_000_000]
    monkeypatch.setattr(asked, "memory_for", lambda device, limit: free[0])
    need = told("cuda:1")
    assert need.room == Room(False, 8, True) and need.memory > 2 * TOKENS * 4096 * 2
    for experts in range(7, 0, -1):
        free[0] = told("cuda:1").memory - 1
        assert told("cuda:1").room == Room(False, experts, True) and told("cuda:1").memory <= free[0]
    free[0] = told("cuda:1").memory - 1
    assert told("cuda:1").room == Room(False, 1, False)
    free[0] = told("cuda:1").memory - 1
    assert told("cuda:1").room.spilled
    free[0] = 5_000_000_000
    with pytest.raises(MemoryBudgetError, match="cuda:1 has too little memory free"):
        told("cuda:1")
    assert told("cuda:1", limit=need.memory).memory == need.memory
