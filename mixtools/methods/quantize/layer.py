"""One layer of a model: what its linears read, its smoothing, each matrix rounded, and the layer as it then is.

    states ─► attention ─► inputs of the experts ─► Hessians of q k v, of o, of w1 w3 by expert      (seen.py)
                                   │
    smoothing of each norm ◄───────┤ chosen by the error of the rounding
    expert by expert: inner ─► Hessian of w2, smoothing of w3 and w2 ─► w1, w3, w2 rounded

Experts are done one after the other: w2's Hessian is the largest piece of all (0.8 GB at 8x7B), and nothing is computed
twice for it, since the experts' inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from ...errors import TensorError
from ...formats import Packed, Plain
from ...inference.hessian import Gram, Rows
from ...inference.model import Layer, rms_norm
from ...inference.states import States
from ...inference.stream import Stream
from ...linalg.few import Hessian
from ...linalg.ldl import Factor
from ...names import Role, Slot
from ...ops.feedback import MOST_COLUMNS
from . import matrix, smoothing
from .clock import Clock
from .seen import TOKENS, Seen
from .worker import ROWS_TRIED, Method, Stored, Tried, Worker, spread


class LayerWork(Worker):
    """One layer of the stream."""

    def __init__(
        self, stream: Stream, layer: Layer, method: Method, read: Callable[[Slot], Tensor], clock: Clock | None = None
    ) -> None:
        super().__init__(method, read, lambda slot, weight: _put(layer.weight(slot), weight), clock or Clock())
        self.stream, self.layer, self.index = stream, layer, layer.index

    def run(self, states: States, pass_tokens: int, *, onward: bool = True) -> Iterator[Stored]:
        """Each slot of the layer as it is stored, in slot order; then, with `onward`, `states` are those behind it.

        Raises TensorError for inputs or a router that are not finite, SpectrumError for a matrix that comes out so.
        """
        seen = Seen(self.stream, self.layer, states, pass_tokens, self.clock)
        try:
            if onward and not self.method.sequential:
                self._through(states, pass_tokens)
            yield from self._attention(seen)
            yield from self._experts(seen)
        finally:
            seen.close()
        if not onward:
            return
        if self.method.sequential:
            self._through(states, pass_tokens)
        states.layer = self.index + 1

    def _through(self, states: States, pass_tokens: int) -> None:
        with self.clock("forward"):
            self.stream.through(self.layer, states, into=states, pass_tokens=pass_tokens)

    # --- attention ---

    def _attention(self, seen: Seen) -> Iterator[Stored]:
        slots = [Slot(role, self.index) for role in (Role.Q, Role.K, Role.V)]
        weights = {slot: self.weights(slot) for slot in slots}
        norm, scale = self.norm(Slot(Role.ATTENTION_NORM, self.index), seen.qkv, [(weights, seen.qkv)])
        yield norm
        hessian = matrix.scaled(seen.qkv.blocks[0], scale)
        found = self.factor(hessian)
        for slot in slots:
            made = self.round(slot, weights.pop(slot) * scale[:, None], hessian, found)
            yield self.finished(slot, [made], seen.qkv.tokens)
        slot, hessian = Slot(Role.O, self.index), seen.o.blocks[0]
        made = self.round(slot, self.weights(slot), hessian, self.factor(hessian))
        yield self.finished(slot, [made], seen.o.tokens)

    # --- experts ---

    def _experts(self, seen: Seen) -> Iterator[Stored]:
        readers = [
            ({slot: self.weights(slot, ROWS_TRIED) for slot in self._slots(expert, Role.GATE, Role.UP)}, gram)
            for expert, gram in seen.experts.items()
        ]
        norm, scale = self.norm(Slot(Role.FFN_NORM, self.index), seen.router, readers)
        del readers
        yield norm
        yield self._router(seen, scale)
        for expert in range(self.stream.config.num_experts):
            yield from self._expert(expert, scale, seen)

    def _expert(self, expert: int, scale: Tensor, seen: Seen) -> Iterator[Stored]:
        gate, down, up = self._slots(expert, Role.GATE, Role.DOWN, Role.UP)
        shown, tokens = seen.rows_of(expert)
        gram = seen.take(expert, shown)
        options = self.method.options
        # scales of whole rows are fitted by the Hessian itself
        few = options.rounding != "nearest" and self.method.scheme(down).span <= MOST_COLUMNS
        inner, weights = seen.inner(expert, shown, options.block, few=few), self.weights(down)
        choice, factors = self._inner_scale(down, weights, inner)
        hessian = matrix.scaled(gram.blocks[0], scale)
        found, made = self.factor(hessian), {}
        for slot, rows in ((gate, None), (up, choice.scale)):
            wide = self.weights(slot).mul_(scale[:, None])
            if rows is not None:
                wide /= rows
            made[slot] = self.finished(slot, [self.round(slot, wide, hessian, found)], tokens)
        del hessian, found, wide, gram
        parts = []
        blocks: list[Hessian] = [*inner.blocks]
        for number, (at, block) in enumerate(zip(inner.starts, blocks, strict=True)):
            part = slice(at, at + len(block))
            own = choice.scale[part]
            heard = matrix.scaled_(block, own) if choice.exponent else block
            factor = factors[number] if factors else self.factor(heard)
            parts.append(self.round(down, weights[part] * own[:, None], heard, factor))
        made[down] = self.finished(down, parts, tokens)
        self.rows[down] |= {"exponent": choice.exponent, "bounded": smoothing.bounded(choice.scale)}
        for slot in (gate, down, up):
            self.rows[slot]["shown"] = len(shown)
            yield made[slot]

    def _inner_scale(
        self, slot: Slot, weights: Tensor, inner: Gram | Rows
    ) -> tuple[smoothing.Choice, list[Factor | None] | None]:
        """Of w2's columns and w3's rows; and the factors of the Hessian's blocks where it stays as it is."""
        magnitude = inner.magnitude / max(1, inner.tokens)
        if not self.method.smooth or not inner.tokens:
            return smoothing.Choice(0.0, torch.ones_like(magnitude), {}), None
        blocks: list[Hessian] = [*inner.blocks]
        found = [self.factor(block) for block in blocks]

        tried = []
        for at, block, factor in zip(inner.starts, blocks, found, strict=True):
            part = slice(at, at + len(block))
            tried.append(Tried(slot, weights[part], block, factor, part))
        with self.clock("smoothing"):
            choice = smoothing.choose(magnitude, partial(self.tried, tried))
        return choice, None if choice.exponent else found

    # --- norms and router ---

    def _router(self, seen: Seen, scale: Tensor) -> Stored:
        slot = Slot(Role.ROUTER, self.index)
        dtype = self.method.stored(slot)
        stored = (self.read(slot) * scale).to(dtype.torch())
        if not bool(torch.isfinite(stored).all()):
            raise TensorError(f"the smoothed router does not fit {dtype.value}", tensor=slot)
        self.told["rerouted"] = seen.changed(stored.float(), scale)
        self.told["tokens"] = len(seen.choices)
        self.keep(slot, stored)
        return slot, Packed(Plain(dtype), (stored.cpu(),))

    def _slots(self, expert: int, *roles: Role) -> list[Slot]:
        return [Slot(role, self.index, expert) for role in roles]


def _put(place: Tensor, weight: Tensor) -> None:
    place.copy_(weight)


class HeadWork(Worker):
    """Final norm and head."""

    def __init__(
        self, stream: Stream, method: Method, read: Callable[[Slot], Tensor], clock: Clock | None = None
    ) -> None:
        super().__init__(method, read, lambda slot, weight: None, clock or Clock())
        self.stream = stream

    def run(self, states: States) -> Iterator[Stored]:
        """Both as they are stored, from the states behind the last layer. Raises as LayerWork.run."""
        config, norm_slot, slot = self.stream.config, Slot(Role.NORM), Slot(Role.HEAD)
        gram, norm = Gram(config.hidden_size, self.stream.device), self.read(norm_slot)
        for start in range(0, states.tokens, TOKENS):
            x = states.rows(start, min(start + TOKENS, states.tokens)).to(self.stream.device)
            with self.clock("hessian"):
                gram.add(rms_norm(x.float(), norm, config.rms_norm_eps))
        gram.settle(slot)
        weights = self.weights(slot)
        made, scale = self.norm(norm_slot, gram, [({slot: spread(weights, ROWS_TRIED)}, gram)])
        yield made
        hessian = matrix.scaled(gram.blocks[0], scale)
        parts = [self.round(slot, weights.mul_(scale[:, None]), hessian, self.factor(hessian))]
        yield self.finished(slot, parts, gram.tokens)
