"""What a layer's linears read over a calibration text: its Hessians, and the experts' inputs, kept for the next steps.

One pass through attention and router; the experts run later, one at a time, over the inputs that were kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...inference import products
from ...inference.hessian import Gram, Rows
from ...inference.model import Layer, rms_norm
from ...inference.states import States
from ...inference.stream import Stream, passes
from ...linalg.few import LEAST_RATIO
from ...names import Role, Slot

if TYPE_CHECKING:
    from .clock import Clock

TOKENS = 4096  # of an expert's inputs at once
STARVED = 128  # tokens; an expert that saw fewer is shown those of the others, too
SHOWN = 4096  # of them, spread evenly, at most


class Seen:
    """`qkv`, `o`, `router`, `experts`: Hessians of what each reads; `choices` [N, K] of the router, as it was."""

    def __init__(self, stream: Stream, layer: Layer, states: States, pass_tokens: int, clock: Clock) -> None:
        """One pass; `inputs` holds what the experts read. Raises TensorError for inputs that are not finite."""
        config, device = stream.config, stream.device
        self.stream, self.layer, self.config, self.clock = stream, layer, config, clock
        width = config.hidden_size
        self.qkv, self.router = Gram(width, device), Gram(width, device)
        self.o = Gram(config.num_heads * config.head_dim, device)
        self.experts = {expert: Gram(width, device) for expert in range(config.num_experts)}
        self.inputs = stream.states(states.lengths, layer.index, spilled=states.spilled)
        self.choices = torch.empty(states.tokens, config.experts_per_token, dtype=torch.int16)
        for first, last in passes(states.lengths, pass_tokens):
            length, start, end = states.lengths[first], states.starts[first], states.starts[last]
            x = states.rows(start, end).to(device).view(last - first, length, -1)
            self._observe(x, start, length)
        index = layer.index
        for gram, role in ((self.qkv, Role.Q), (self.o, Role.O), (self.router, Role.ROUTER)):
            gram.settle(Slot(role, index))
        for expert, gram in self.experts.items():
            gram.settle(Slot(Role.GATE, index, expert))

    def _observe(self, x: Tensor, start: int, length: int) -> None:
        """Of states [B, T, D], whose first token is number `start`."""
        layer, eps = self.layer, self.config.rms_norm_eps
        with self.clock("forward"):
            layer.need(Role.ATTENTION_NORM, Role.FFN_NORM)
            mixed = x + layer.attention(rms_norm(x, layer.attention_norm, eps), self.stream.span(length), None, self)
            tokens = rms_norm(mixed, layer.ffn_norm, eps).flatten(0, 1)  # [N, D]
            _, chosen = layer.route(tokens)
        self.inputs.write(start, tokens)
        self.choices[start : start + len(tokens)] = chosen
        with self.clock("hessian"):
            self.router.add(tokens)
            for expert, gram in self.experts.items():
                gram.add(tokens[(chosen == expert).any(1)])

    def __call__(self, slot: Slot, x: Tensor, tokens: Tensor | None, weights: Tensor | None) -> None:
        """The observer (inference/model.py) of attention; k and v read what q does."""
        if slot.role in (Role.Q, Role.O):
            with self.clock("hessian"):
                (self.qkv if slot.role is Role.Q else self.o).add(x)

    # --- experts ---

    def rows_of(self, expert: int) -> tuple[Tensor, int]:
        """Tokens that calibrate an expert, ascending, and how many were routed to it.

        A starved one is shown a spread of all tokens beside its own.
        """
        own = (self.choices == expert).any(1).nonzero().flatten()
        if len(own) >= STARVED:
            return own, len(own)
        step = max(1, len(self.choices) // SHOWN)
        shown = torch.zeros(len(self.choices), dtype=torch.bool)
        shown[own] = True
        shown[::step] = True
        return shown.nonzero().flatten(), len(own)

    def take(self, expert: int, rows: Tensor) -> Gram:
        """The Hessian of w1 and w3 of an expert at tokens [n]; kept for nobody else, since w2's wants the memory."""
        own = self.experts.pop(expert)
        if own.tokens == len(rows):
            return own
        gram = Gram(own.width, self.stream.device)
        for part in torch.split(rows, TOKENS):
            gram.add(self.inputs.select(part).to(self.stream.device))
        gram.settle(Slot(Role.GATE, self.layer.index, expert))
        return gram

    def inner(self, expert: int, rows: Tensor, block: int | None, *, few: bool) -> Gram | Rows:
        """The Hessian of what w2 of an expert reads at tokens [n], from w1 and w3 as `layer` holds them.

        `few`: where the tokens are few for its width, they are kept as they are.
        """
        width, device = self.config.intermediate_size, self.stream.device
        few = few and block is None and 0 < LEAST_RATIO * len(rows) <= width
        gram = Rows(width, len(rows), device) if few else Gram(width, device, block=block)
        self.layer.need(Role.GATE, Role.UP, expert=expert)
        for part in torch.split(rows, TOKENS):
            with self.clock("forward"):
                x = self.inputs.select(part).to(self.stream.device)
                gate, up = products.linear(x, self.layer.gate_up[expert]).chunk(2, dim=-1)
                x = F.silu(gate) * up
            with self.clock("hessian"):
                gram.add(x)
        gram.settle(Slot(Role.DOWN, self.layer.index, expert))
        return gram

    def changed(self, router: Tensor, scale: Tensor) -> int:
        """Tokens that go elsewhere by the smoothed router [E, D], as stored, over inputs divided by `scale`."""
        count = 0
        for start in range(0, len(self.choices), TOKENS):
            end = min(start + TOKENS, len(self.choices))
            x = self.inputs.rows(start, end).to(self.stream.device).float() / scale
            now = F.linear(x, router).topk(self.choices.shape[1], dim=-1).indices.sort(-1).values
            before = self.choices[start:end].to(now).sort(-1).values
            count += int((now != before).any(1).sum())
        return count

    def close(self) -> None:
        """Give memory and disk back."""
        self.inputs.close()
