"""How much memory a model takes, told from its shapes before a weight is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..config import MixtralConfig
from ..errors import MemoryBudgetError
from ..layouts.reader import Mapped, Reader
from ..machine import human_bytes
from ..names import Role, Slot, layer_slots
from . import blocks, host, products
from .attention import BAND_ROWS

HALF = 2  # bytes of a weight in bf16 or fp16


def stored_bytes(reader: Reader, slot: Slot) -> int:
    """Bytes of a tensor as the reader returns it."""
    shape, dtype = reader.spec(slot)
    return math.prod(shape) * dtype.itemsize


def held_bytes(reader: Reader, slots: Iterable[Slot], itemsize: int, packed: bool) -> int:
    """Bytes that these tensors take in memory: in blocks where they stay in them, else `itemsize` bytes a weight."""
    total = 0
    for slot in slots:
        shape = reader.spec(slot).shape
        type = blocks.type_of(reader, slot) if packed else None
        total += type.nbytes(shape) if type else math.prod(shape) * itemsize
    return total


def layer_bytes(config: MixtralConfig, itemsize: int) -> int:
    """Bytes of one layer's weights, `itemsize` bytes each."""
    return sum(math.prod(config.shape(slot.role)) for slot in layer_slots(0, config.num_experts)) * itemsize


def check(
    reader: Reader, itemsize: int, max_memory: int | None, *, packed: bool = False, beyond: bool = False
) -> Mapped:
    """Raise MemoryBudgetError if the model, `itemsize` bytes a weight, and one stored tensor exceed `max_memory`.

    `packed`: matrices stay in their blocks, and some of these in their file: the result tells how those are to be had.
    With `beyond` they may exceed `max_memory`. The error tells what would fit: 16 bits, or one layer at a time.
    """
    config = reader.config
    staying = {slot for slot in config.slots() if packed and blocks.stays_in_file(reader, slot)}
    largest = max(stored_bytes(reader, slot) for slot in config.slots() if slot not in staying)
    need = held_bytes(reader, config.slots(), itemsize, packed) + largest
    if max_memory is None or need <= max_memory:
        return Mapped.NOW if staying else Mapped.NOT
    if beyond and need - held_bytes(reader, staying, itemsize, packed) <= max_memory:
        return Mapped.LATER
    halved = held_bytes(reader, config.slots(), HALF, packed) + largest
    layer = layer_bytes(config, itemsize) + largest
    if halved <= max_memory:
        advice = f"in bf16 or fp16 it takes {human_bytes(halved)} and fits"
    elif layer <= max_memory:
        advice = f"one layer at a time takes {human_bytes(layer)} and fits (perplexity and check run so)"
    else:
        advice = f"even one layer at a time takes {human_bytes(layer)}"
    what = "the model in its blocks" if packed else f"the model at {8 * itemsize} bits a weight"
    message = f"{what} exceeds the memory allowed; {advice}"
    raise MemoryBudgetError(message, expected=f"at most {human_bytes(max_memory)}", found=human_bytes(need))


def check_held(need: int, max_memory: int | None) -> None:
    """Raise MemoryBudgetError if what a model takes as it is stored exceeds `max_memory`."""
    if max_memory is not None and need > max_memory:
        message = "the model, its matrices as they are stored, exceeds the memory allowed"
        raise MemoryBudgetError(message, expected=f"at most {human_bytes(max_memory)}", found=human_bytes(need))


@dataclass(frozen=True)
class Needs:
    """Upper bounds in bytes of a run a layer at a time; see the test that counts what is really allocated."""

    embed: int  # the table, and the stored tensor it comes from
    layer: int  # one layer's weights
    aside: int  # beside the layers: stored tensors on their way, and the products' own room
    row: int  # hidden state of one token
    token: int  # activations of one token in a layer
    head: int
    logits: int  # one row of logits and what is made of it

    @classmethod
    def of(cls, reader: Reader, device: torch.device, dtype: torch.dtype, longest: int) -> Needs:
        """`longest`: tokens of the longest sequence."""
        config, size = reader.config, dtype.itemsize
        d, f, v = config.hidden_size, config.intermediate_size, config.vocab_size
        heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        stored = max(stored_bytes(reader, slot) for slot in layer_slots(0, config.num_experts))
        ends = max(stored_bytes(reader, Slot(role)) for role in (Role.EMBED, Role.HEAD))
        # twice: a layout that permutes or transposes holds the tensor before and after
        table = v * d * size + 2 * ends
        # wide = fp32: norm and its square; rotary halves, products and their join
        attention = size * (2 * d + 3 * heads) + 4 * max(3 * d, 3 * heads)
        # every token may go to one expert: gate and up, silu, product; on a GPU all of a token's at once (mixture.py);
        # the sum is fp32
        pairs = config.experts_per_token * (3 * f + 3 * d)
        experts = size * (3 * d + max(4 * f, pairs if device.type != "cpu" else 0)) + 4 * 3 * d
        shapes = ((2 * f, d), (d, f), (heads, d), (d, config.num_heads * config.head_dim))
        # a mask as it is made and as the product takes it, and the result put together from runs of rows
        window = config.sliding_window
        banded = window is not None and window < longest
        band = BAND_ROWS * min(BAND_ROWS + (window or 0), longest) * (3 + size) if banded else 0
        attention += size * config.num_heads * config.head_dim * banded
        widened = device.type == "cpu" and not host.native(dtype)
        return cls(
            embed=table,
            layer=layer_bytes(config, size) + 4 * config.num_experts * d,
            row=d * size,
            aside=2 * stored + 2 * f * d * size + max(map(products.block_bytes, shapes)) + band,
            token=size * 3 * d + max(attention, experts) + widened * max(map(products.token_bytes, shapes)),
            head=table + products.block_bytes((v, d)),
            logits=4 * (5 * v + 3 * d) + products.token_bytes((v, d)),
        )

    def layers(self, count: int) -> int:
        return count * self.layer + self.aside

    def peak(self, layers: int, pass_tokens: int, logit_rows: int, kept: bool = False) -> int:
        """Everything but the states between layers: the largest of a run's three parts.

        `kept`: the layers stay beside the embedding and the head.
        """
        weights, work = self.layers(layers), self.token * pass_tokens
        ends = max(self.embed + self.row * pass_tokens, self.head + self.logits * logit_rows)
        return weights + max(work, ends) if kept else max(weights + work, ends)
