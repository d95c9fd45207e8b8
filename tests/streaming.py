"""What the tests of layer-major running share: ids, and memory counted."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from mixtools.errors import MemoryBudgetError
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader


def some_ids(vocab: int, *lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


def allocated(work) -> int:
    """Peak of what torch allocates during `work`, from the profiler's record of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate(event.nbytes() for event in events))


def least_memory(reader: MemoryReader, dtype: torch.dtype, ids: list[torch.Tensor]) -> int:
    with pytest.raises(MemoryBudgetError, match="even one layer") as error:
        Stream(reader, dtype=dtype, max_memory=1).plan([len(row) for row in ids])
    number, unit = str(error.value.found).split()
    return int(float(number) * {"GB": 1e9, "MB": 1e6}[unit] * 1.01)
