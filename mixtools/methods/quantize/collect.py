"""An importance matrix from a forward a layer at a time (inference/stream.py): what reaches each matrix, squared.

Which matrices have an entry is llama-imatrix's choice: all of a layer but the norms, q, k and v each with the input
that they share, the router among them; the head only if asked for. An expert sees the tokens that the router sends to
it, each counted once, whatever weight it has there. Source: tools/imatrix/imatrix.cpp in
https://github.com/ggml-org/llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...config import MixtralConfig
from ...errors import TensorError
from ...inference.model import copy, rms_norm
from ...inference.states import States
from ...inference.stream import Stream
from ...layouts.gguf import GGUF
from ...names import ATTENTION, EXPERT, Role, Slot

_SAME_INPUT = {Role.K: Role.Q, Role.V: Role.Q, Role.UP: Role.GATE}
_MATRICES = (*ATTENTION, Role.ROUTER, *EXPERT)
_ROWS = 64  # that are widened at a time: they stay in the cache of a CPU
_ROWS_ACCELERATOR = 1024  # a GPU would do nothing but start kernels
_HEAD_ROWS = 1024
_CPU = torch.device("cpu")

Sums = dict[str, npt.NDArray[np.float32]]


class Squares:
    """An observer (inference/model.py): sums of squares over the tokens, by column and in fp64, and how many came."""

    def __init__(self) -> None:
        self.tokens: dict[Slot, int] = {}
        self._done: dict[Slot, npt.NDArray[np.float32]] = {}
        self._live: dict[Slot, Tensor] = {}  # fp64, of one layer at a time
        self._layer: int | None = None

    def __call__(self, slot: Slot, x: Tensor, tokens: Tensor | None, weights: Tensor | None) -> None:
        if slot.role in _SAME_INPUT:
            return
        if slot.layer != self._layer:
            self.settle()
            self._layer = slot.layer
        wide = torch.float32 if x.device.type == "mps" else torch.float64  # which mps does not have
        total = self._live.setdefault(slot, torch.zeros(x.shape[1], dtype=wide, device=x.device))
        for rows in torch.split(x, _rows(x.device)):
            total += rows.float().square().sum(0, dtype=wide)
        self.tokens[slot] = self.tokens.get(slot, 0) + len(x)

    def settle(self) -> None:
        """What was seen so far becomes fp32. Raises TensorError for inputs that are not finite."""
        for slot, total in self._live.items():
            sums = total.float().cpu().numpy()
            if not np.isfinite(sums).all():
                column = int(np.flatnonzero(~np.isfinite(sums))[0])
                raise TensorError(
                    f"the squares of its inputs sum to {sums[column]} in column {column}: the weights before it hold "
                    "NaN or Inf (`mixtools inspect --verify` finds them), or overflow in this dtype", tensor=slot,
                )  # fmt: skip
            self._done[slot] = sums
        self._live = {}

    def sums(self, slot: Slot, columns: int) -> npt.NDArray[np.float32]:
        """[columns]; zeros where no token came."""
        return self._done.get(slot, np.zeros(columns, np.float32))


def collect(stream: Stream, sequences: Sequence[Tensor], *, process_output: bool = False) -> tuple[Sums, Sums]:
    """Sums [experts or 1, columns] and counts [experts or 1] over ids [T] each, by GGUF's names of the tensors.

    Raises what Stream.hidden raises, and TensorError for a model that gives NaN.
    """
    config, squares = stream.config, Squares()
    stream.reserved += reserved_bytes(config, stream.device)
    with stream.hidden(sequences, observer=squares) as states:
        if process_output:
            _before_head(stream, states, squares)
    squares.settle()
    sums: Sums = {}
    counts: Sums = {}
    for name, slots in entries(config, process_output):
        owners = [slot._replace(role=_SAME_INPUT.get(slot.role, slot.role)) for slot in slots]
        columns = config.shape(slots[0].role)[1]
        sums[name] = np.stack([squares.sums(owner, columns) for owner in owners])
        counts[name] = np.array([squares.tokens.get(owner, 0) for owner in owners], np.float32)
    return sums, counts


def entries(config: MixtralConfig, process_output: bool = False) -> Iterator[tuple[str, list[Slot]]]:
    """The name of each tensor that has an entry, and what is stacked in it."""
    for layer in range(config.num_layers):
        for role in _MATRICES:
            experts = range(config.num_experts) if role in EXPERT else [None]
            slots = [Slot(role, layer, expert) for expert in experts]
            yield GGUF.piece(slots[0], config).name, slots
    if process_output:
        yield GGUF.piece(Slot(Role.HEAD), config).name, [Slot(Role.HEAD)]


def shapes(config: MixtralConfig, process_output: bool = False) -> dict[str, tuple[int, int]]:
    """Of the sums, [experts or 1, columns]."""
    return {name: (len(slots), config.shape(slots[0].role)[1]) for name, slots in entries(config, process_output)}


def _rows(device: torch.device) -> int:
    return _ROWS if device.type == "cpu" else _ROWS_ACCELERATOR


def reserved_bytes(config: MixtralConfig, device: torch.device = _CPU) -> int:
    """What is held beside the stream: all sums, those of one layer in fp64, and a few rows on their way."""
    whole = sum(4 * rows * columns for rows, columns in shapes(config, process_output=True).values())
    widest = max(config.shape(role)[1] for role in _MATRICES)
    return 2 * whole + 2 * math.ceil(whole / config.num_layers) + _rows(device) * widest * (4 + 4 + 8)


def token_flop(config: MixtralConfig, ctx: int) -> int:
    """Of a token's way through all layers: products with weights, and with the keys and values before it."""
    attention = sum(math.prod(config.shape(role)) for role in (*ATTENTION, Role.ROUTER))
    experts = config.experts_per_token * sum(math.prod(config.shape(role)) for role in EXPERT)
    return 2 * config.num_layers * (attention + experts + ctx * config.num_heads * config.head_dim)


def _before_head(stream: Stream, states: States, squares: Squares) -> None:
    """The head's input: the final norm of the states after the last layer, which needs no head to be read."""
    config = stream.config
    weight = torch.empty(config.shape(Role.NORM), device=stream.device, dtype=stream.dtype)
    copy(weight, stream.reader, Slot(Role.NORM))
    for start in range(0, states.tokens, _HEAD_ROWS):
        x = states.rows(start, min(start + _HEAD_ROWS, states.tokens)).to(stream.device)
        squares(Slot(Role.HEAD), rms_norm(x, weight, config.rms_norm_eps), None, None)
