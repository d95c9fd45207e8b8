"""One layer of a model: what its linears read, its smoothing, each matrix rounded, and the layer as it then is.

    states ─► attention ─► inputs of the experts ─► Hessians of q k v, of o, of w1 w3 by expert      (seen.py)
                                   │
    smoothing of each norm ◄───────┤ chosen by the error of the rounding
    expert by expert: inner ─► Hessian of w2, smoothing of w3 and w2 ─► w1, w3, w2 rounded

Experts are done one after the other, on a GPU as many in step as it has memory for: w2's Hessian is the largest piece
of all (0.8 GB at 8x7B), and nothing is computed twice for it, since the experts' inputs are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

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
from .worker import ROWS_TRIED, Asked, Method, Outcome, Stored, Tried, Worker, spread


class _Expert(NamedTuple):
    """Before its matrices are rounded. `slots` of w1, w2, w3; `shown`, `tokens`: that calibrate it, and those of them
    routed to it; `gram` of w1 and w3, one, until it is taken; `inner`, `weights`, `choice`, `factors` of w2."""

    slots: tuple[Slot, Slot, Slot]
    shown: int
    tokens: int
    gram: list[Gram]
    inner: Gram | Rows
    weights: Tensor
    choice: smoothing.Choice
    factors: list[Factor | None] | None


class LayerWork(Worker):
    """One layer of the stream."""

    def __init__(
        self, stream: Stream, layer: Layer, method: Method, read: Callable[[Slot], Tensor], clock: Clock | None = None,
        *, together: int = 1,
    ) -> None:  # fmt: skip
        """`together`: experts that are done in step."""
        super().__init__(method, read, lambda slot, weight: _put(layer.weight(slot), weight), clock or Clock())
        self.stream, self.layer, self.index, self.together = stream, layer, layer.index, together

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
        asked = (Asked(slot, weights.pop(slot) * scale[:, None], hessian, found) for slot in slots)
        for slot, made in self.round(asked, self._at_once(len(slots))):  # k and v are alike
            yield self.finished(slot, [made], seen.qkv.tokens)
        slot, hessian = Slot(Role.O, self.index), seen.o.blocks[0]
        for _, made in self.round([Asked(slot, self.weights(slot), hessian, self.factor(hessian))]):
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
        every = range(self.stream.config.num_experts)
        for first in range(0, len(every), self.together):
            yield from self._some(every[first : first + self.together], scale, seen)

    def _some(self, numbers: Sequence[int], scale: Tensor, seen: Seen) -> Iterator[Stored]:
        """Experts in step."""
        experts = [self._expert(number, seen) for number in numbers]
        of = {slot: expert for expert in experts for slot in expert.slots}
        made: dict[Slot, Stored] = {}
        for slot, outcome in self.round(self._readers(experts, scale), self._at_once(2 * len(experts))):
            made[slot] = self.finished(slot, [outcome], of[slot].tokens)
            del outcome  # its errors are as large as the matrix
        parts: dict[Slot, list[Outcome]] = {}
        for slot, outcome in self.round(self._inner(experts), len(experts)):
            parts.setdefault(slot, []).append(outcome)
        for expert in experts:
            gate, down, up = expert.slots
            made[down] = self.finished(down, parts.pop(down), expert.tokens)
            self.rows[down] |= {"exponent": expert.choice.exponent, "bounded": smoothing.bounded(expert.choice.scale)}
            for slot in (gate, up, down):  # told in this order, whatever was in step
                self.rows[slot] = {**self.rows.pop(slot), "shown": expert.shown}
            for slot in expert.slots:
                yield made.pop(slot)

    def _at_once(self, count: int) -> int:
        """Of so many matrices: where experts go one after the other, memory is for one."""
        return count if self.together > 1 else 1

    def _expert(self, number: int, seen: Seen) -> _Expert:
        """What there is to know of an expert before any of its matrices is rounded."""
        gate, down, up = self._slots(number, Role.GATE, Role.DOWN, Role.UP)
        shown, tokens = seen.rows_of(number)
        gram = seen.take(number, shown)
        options = self.method.options
        # scales of whole rows are fitted by the Hessian itself
        few = options.rounding != "nearest" and self.method.scheme(down).span <= MOST_COLUMNS
        inner, weights = seen.inner(number, shown, options.block, few=few), self.weights(down)
        choice, factors = self._inner_scale(down, weights, inner)
        return _Expert((gate, down, up), len(shown), tokens, [gram], inner, weights, choice, factors)

    def _readers(self, experts: Sequence[_Expert], scale: Tensor) -> Iterator[Asked]:
        """w1 and w3 of each, over the inputs that a norm divided by `scale` gives."""
        for expert in experts:
            gate, _, up = expert.slots
            hessian = matrix.scaled(expert.gram.pop().blocks[0], scale)
            found = self.factor(hessian)
            for slot, rows in ((gate, None), (up, expert.choice.scale)):
                wide = self.weights(slot).mul_(scale[:, None])
                if rows is not None:
                    wide /= rows
                yield Asked(slot, wide, hessian, found)

    def _inner(self, experts: Sequence[_Expert]) -> Iterator[Asked]:
        """w2 of each, in runs of columns."""
        for expert in experts:
            _, down, _ = expert.slots
            choice, factors, inner = expert.choice, expert.factors, expert.inner
            blocks: list[Hessian] = [*inner.blocks]
            for number, (at, block) in enumerate(zip(inner.starts, blocks, strict=True)):
                part = slice(at, at + len(block))
                own = choice.scale[part]
                heard = matrix.scaled_(block, own) if choice.exponent else block
                factor = factors[number] if factors else self.factor(heard)
                yield Asked(down, expert.weights[part] * own[:, None], heard, factor)

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
        asked = Asked(slot, weights.mul_(scale[:, None]), hessian, self.factor(hessian))
        yield self.finished(slot, [made for _, made in self.round([asked])], gram.tokens)
