"""How much memory a model takes, told from its shapes before a weight is read."""

from __future__ import annotations

import math

from ..config import MixtralConfig
from ..errors import MemoryBudgetError
from ..layouts.reader import Reader
from ..names import Slot, layer_slots

HALF = 2  # bytes of a weight in bf16 or fp16


def stored_bytes(reader: Reader, slot: Slot) -> int:
    """Bytes of a tensor as the reader returns it."""
    shape, dtype = reader.spec(slot)
    return math.prod(shape) * dtype.itemsize


def layer_bytes(config: MixtralConfig, itemsize: int) -> int:
    """Bytes of one layer's weights, `itemsize` bytes each."""
    return sum(math.prod(config.shape(slot.role)) for slot in layer_slots(0, config.num_experts)) * itemsize


def check(reader: Reader, itemsize: int, max_memory: int | None) -> None:
    """Raise MemoryBudgetError if the model, `itemsize` bytes a weight, and one stored tensor exceed `max_memory`.

    The error tells what would fit: 16 bits, or one layer at a time.
    """
    config = reader.config
    largest = max(stored_bytes(reader, slot) for slot in config.slots())
    need = config.num_parameters * itemsize + largest
    if max_memory is None or need <= max_memory:
        return
    halved = config.num_parameters * HALF + largest
    layer = layer_bytes(config, itemsize) + largest
    if halved <= max_memory:
        advice = f"in bf16 or fp16 it takes {_size(halved)} and fits"
    elif layer <= max_memory:
        advice = f"one layer at a time takes {_size(layer)} and fits (perplexity and check run so)"
    else:
        advice = f"even one layer at a time takes {_size(layer)}"
    message = f"the model at {8 * itemsize} bits a weight exceeds the memory allowed; {advice}"
    raise MemoryBudgetError(message, expected=f"at most {_size(max_memory)}", found=_size(need))


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
