"""What reaches a model's linears over a calibration text: second moments and token counts, layer by layer.

All text goes through one layer before the next (stream.py), so the statistics of one layer are in memory at a time.
They are those of the model as it was read, whatever is done to its weights meanwhile.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MixtralConfig
from ..errors import InputError, UsageError
from ..linalg.output import Covariance
from ..names import Role, Slot
from .model import Layer
from .sampling import Sampling
from .states import States
from .stream import Stream

DEFAULT_SAMPLES, DEFAULT_SEQ_LEN = 32, 1024
_SEES_THE_SAME = {Role.K: Role.Q, Role.V: Role.Q, Role.UP: Role.GATE}  # linears that share their input
_ROWS = 1024  # of a weight that are widened to fp32 at a time


class Text(NamedTuple):
    """A calibration text, cut: ids of each sample, what tells it from another, and what its user should know.

    `name`: of the file, which decides nothing.
    """

    sequences: tuple[Tensor, ...]
    record: dict[str, Any]
    notes: tuple[str, ...] = ()
    name: str = ""


def cut(
    ids: Sequence[int], samples: int, seq_len: int, bos_id: int, *, sampling: str | None = None, seed: int | None = None
) -> Text:
    """`samples` windows of `seq_len` tokens, BOS first, over the ids of a text (without BOS).

    `sampling`: "spread" evenly, the first from the "start", or "random", which is meant where a `seed` is given. No two
    windows overlap. All windows there are, if there are fewer. Raises UsageError for windows that cannot be, InputError
    for a text shorter than one.
    """
    how = Sampling.of(sampling, seed)
    if samples < 1 or seq_len < 2:
        raise UsageError(f"{samples} samples of {seq_len} tokens calibrate nothing")
    text = torch.tensor(ids, dtype=torch.long)
    length = seq_len - 1
    there = len(text) // length
    if there < 1:
        advice = f"--seq-len {len(text) + 1} would fit" if len(text) else "give a longer text"
        raise InputError(f"the text has {len(text)} tokens, fewer than one sample of {seq_len}; {advice}")
    count = min(samples, there)
    if how.name == "random":  # any places, not only multiples of the length: what is between windows is dealt out
        slack = len(text) - count * length
        starts = [place + index * (length - 1) for index, place in enumerate(how.choose(count, slack + count))]
    else:
        starts = [length * index for index in how.choose(count, there)]
    bos = torch.tensor([bos_id])
    digest = hashlib.sha256(text.numpy().tobytes()).hexdigest()[:16]
    record = {"samples": count, "seq_len": seq_len, "tokens": count * seq_len, "text": digest, **how.record()}
    notes = (f"asked {samples} samples, the text has {count}",) if count < samples else ()
    return Text(tuple(torch.cat([bos, text[start : start + length]]) for start in starts), record, notes)


class Calibration:
    """Second moments of the linears of `slots`, asked for from the first layer to the last.

    Asking for an earlier layer begins anew: right, but it reads and runs everything before it once more.
    """

    def __init__(self, stream: Stream, text: Text, slots: Iterable[Slot], routed: bool = False) -> None:
        """`routed`: see Moments."""
        self.stream, self.text, self.slots, self.routed = stream, text, tuple(slots), routed
        self.tokens: dict[Slot, int] = dict.fromkeys(self.slots, 0)
        self._states: States | None = None
        self._moments: Moments | None = None

    def covariance(self, slot: Slot) -> Covariance:
        """Of the linear's shorter side. Raises what Stream.run raises."""
        if self._moments is None or self._moments.layer != slot.layer:
            self._moments = None  # its memory is free for the next layer's
            self._moments = self._advance(int(slot.layer or 0))
            self.tokens |= self._moments.tokens
        return self._moments.covariance(slot)

    def close(self) -> None:
        """Give memory and disk back."""
        if self._states is not None:
            self._states.close()
        self._states = self._moments = None

    def _advance(self, index: int) -> Moments:
        if self._states is None or self._states.layer > index:
            self._states = self.stream.embed(self.text.sequences)
        self._states = self.stream.run(self._states, stop=index)
        moments = self._observe(index, self._states, into=self._states)
        self._states.layer = index + 1
        return moments

    def _observe(self, index: int, states: States, into: States | None) -> Moments:
        """The moments of a layer from the states before it, which go on `into` the states after it."""
        plan = self.stream.plan(states.lengths, copies=0, held=states.memory_bytes)
        for layer in self.stream.layers(index, index + 1, double=False):
            moments = Moments(layer, [slot for slot in self.slots if slot.layer == index], self.routed)
            self.stream.through(layer, states, into=into, observer=moments, pass_tokens=plan.pass_tokens)
        moments.forget_weights()
        return moments


class Moments:
    """An observer (model.py) of one layer: Σ x xᵀ of each wanted linear on its shorter side, in fp32.

    `routed`: a token counts at an expert by the square of the weight that the router gives it there.
    """

    def __init__(self, layer: Layer, slots: Sequence[Slot], routed: bool = False) -> None:
        self.layer, self.routed = layer.index, routed
        self._live: Layer | None = layer
        self.tokens = dict.fromkeys(slots, 0)
        self._owner: dict[Slot, Slot] = {}  # who of those that share an input sums it
        first: dict[object, Slot] = {}
        self._shapes = {slot: layer.config.shape(slot.role) for slot in slots}
        for slot in slots:
            side = shorter_side(self._shapes[slot])
            shared = slot._replace(role=_SEES_THE_SAME.get(slot.role, slot.role)) if side == "in" else slot
            self._owner[slot] = first.setdefault((side, shared), slot)
        self._sums: dict[Slot, Tensor] = {}
        self._energy: dict[Slot, float] = {}  # Σ |x|² of the inputs, where the sums are the outputs'

    def __call__(self, slot: Slot, x: Tensor, tokens: Tensor | None, weights: Tensor | None) -> None:
        if slot not in self.tokens:
            return
        self.tokens[slot] += len(x)
        if self._owner[slot] != slot:
            return
        assert self._live is not None
        weight = self._live.weight(slot)
        rows = x.float()
        if self.routed and weights is not None:
            rows = rows * weights.float()[:, None]
        if shorter_side(self._shapes[slot]) == "out":
            self._energy[slot] = self._energy.get(slot, 0.0) + float(rows.square().sum(dtype=torch.float64))
            rows = torch.cat([F.linear(rows, part.float()) for part in torch.split(weight, _ROWS)], dim=1)
        side = rows.shape[1]
        if slot not in self._sums:
            self._sums[slot] = torch.zeros(side, side, device=x.device)
        self._sums[slot].addmm_(rows.T, rows)

    def forget_weights(self) -> None:
        """Once all is seen: the layer's memory is wanted elsewhere."""
        self._live = None

    def covariance(self, slot: Slot) -> Covariance:
        """All zeros where no token came."""
        shape = self._shapes[slot]
        side = shorter_side(shape)
        empty, owner = torch.zeros(min(shape), min(shape)), self._owner[slot]
        power = self._energy.get(owner, 0.0) / shape[1] if side == "out" else None
        return Covariance(self._sums.get(owner, empty), side, power, self.tokens[slot])


def shorter_side(shape: tuple[int, ...]) -> Literal["in", "out"]:
    """Of a linear [out, in]: for w2 of 8x7B 4096 outputs say as much as 14336 inputs (linalg/output.py)."""
    return "out" if shape[0] < shape[1] else "in"


def moment_bytes(config: MixtralConfig, slots: Iterable[Slot]) -> int:
    """What the sums of a layer take at most, if none is shared: they are in memory beside the layer itself."""
    by_layer: Counter[int | None] = Counter()
    for slot in slots:
        by_layer[slot.layer] += 4 * min(config.shape(slot.role)) ** 2
    return max(by_layer.values(), default=0)
