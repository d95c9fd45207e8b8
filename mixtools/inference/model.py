"""Mixtral in one file, from a Reader.

    ids ─► Embedding ─► Layer × L ─► Head ─► logits
                        │  x + attention(norm(x))      grouped queries, rotary positions, cache
                        └  x + experts(norm(x))        router picks K of E per token

The parts stand alone, so that a layer at a time can be loaded, run over all the text, and refilled (stream.py).
What attention does between positions is in attention.py. Letters in shapes: B sequences, T positions of this pass,
S positions seen so far, N = B*T tokens, D hidden size, H heads, G key-value heads, hd head size, E experts, K experts
per token, F expert size, V vocabulary.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MixtralConfig
from ..errors import TensorError
from ..layouts.reader import Mapped, Reader
from ..names import ATTENTION, EXPERT, Role, Slot, layer_slots
from ..progress import Progress
from . import blocks, budget, host, products
from .attention import LayerCache, Span, attend, rotate, span
from .mixture import mixture, segments
from .products import Matrix
from .watching import watched

# the matrices that are multiplied with the same x
QKV, OUT, GATE_UP, DOWN = (Role.Q, Role.K, Role.V), (Role.O,), (Role.GATE, Role.UP), (Role.DOWN,)


class Observer(Protocol):
    """Sees the input of each linear, before it runs.

    `x` is [N, in], of the dtype that the linear gets. For an expert's slots, N counts the tokens sent to it, `tokens`
    [N] says which of the pass they are, and `weights` [N] (fp32) what the router gave it; None elsewhere.
    The tensors must not be changed, nor kept without a copy.
    """

    def __call__(self, slot: Slot, x: Tensor, tokens: Tensor | None, weights: Tensor | None) -> None: ...


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [.., D] over its root mean square, in fp32, back in x's dtype, times weight [D]."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


# --- the parts ---------------------------------------------------------------------------------------------------


def copy(weight: Tensor, reader: Reader, slot: Slot) -> None:
    """Copy a tensor of the reader over `weight`, casting. Raises TensorError if its shape is another."""
    found = reader.spec(slot).shape
    if found != tuple(weight.shape):
        raise TensorError("has another shape than the configuration says", tensor=slot,
                          expected=tuple(weight.shape), found=found)  # fmt: skip
    weight.copy_(reader.read(slot))


def matrix(reader: Reader, slot: Slot, device: torch.device, dtype: torch.dtype, *, packed: bool) -> Matrix:
    """A matrix of the reader: with `packed` as it is stored, where a product can take it so. Raises as `copy`."""
    if packed and (found := blocks.read(reader, slot)) is not None:
        return found
    weight = host.empty(reader.config.shape(slot.role), device, dtype)
    copy(weight, reader, slot)
    return weight


class Embedding:
    """ids -> hidden states."""

    def __init__(self, table: Matrix, device: torch.device, dtype: torch.dtype) -> None:
        self.table, self.device, self.dtype = table, device, dtype  # [V, D]

    @classmethod
    def load(cls, reader: Reader, device: torch.device, dtype: torch.dtype, *, packed: bool = False) -> Embedding:
        return cls(matrix(reader, Slot(Role.EMBED), device, dtype, packed=packed), device, dtype)

    def __call__(self, ids: Tensor) -> Tensor:
        """[B, T] -> [B, T, D]."""
        return products.rows(ids, self.table, self.dtype)


class Block(ABC):
    """What one layer does, whatever its matrices lie in: see Layer and PackedLayer."""

    def __init__(self, config: MixtralConfig, index: int, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.index = config, index
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)  # of q, k, v
        self.attention_norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        self.ffn_norm = torch.empty(config.hidden_size, device=device, dtype=dtype)
        # fp32: a near tie picks another expert
        self.router = torch.empty(config.num_experts, config.hidden_size, device=device)

    def need(self, *roles: Role, expert: int | None = None) -> None:  # noqa: B027  (most layers have nothing to wait for)
        """Called before these weights are used: a layer that is still being read waits here (stream.py)."""

    def packs(self, slot: Slot) -> bool:
        """Whether a matrix of this layer lies as it is stored."""
        return False

    @abstractmethod
    def joined(self, x: Tensor, roles: tuple[Role, ...], expert: int | None = None) -> Tensor:
        """x [.., in] through the matrices of these roles (QKV, OUT, GATE_UP or DOWN), side by side: [.., out]."""

    def __call__(
        self, x: Tensor, where: Span, cache: LayerCache | None = None, observer: Observer | None = None
    ) -> Tensor:
        """[B, T, D] -> [B, T, D]. Takes about 4 F elements per token of the busiest expert."""
        eps = self.config.rms_norm_eps
        self.need(Role.ATTENTION_NORM, Role.FFN_NORM)
        x = x + self.attention(rms_norm(x, self.attention_norm, eps), where, cache, observer)
        tokens = rms_norm(x, self.ffn_norm, eps).flatten(0, 1)  # [N, D]
        return x + self.experts(tokens, observer).view_as(x)

    def attention(
        self, x: Tensor, where: Span, cache: LayerCache | None = None, observer: Observer | None = None
    ) -> Tensor:
        """[B, T, D] (normalised) -> [B, T, D]."""
        self.need(*ATTENTION)
        if observer:
            for role in (Role.Q, Role.K, Role.V):
                observer(Slot(role, self.index), x.flatten(0, 1), None, None)
        heads = self.joined(x, QKV).view(*x.shape[:2], -1, self.config.head_dim).transpose(1, 2)  # [B, H+2G, T, hd]
        q, k, v = torch.split(heads, list(self.heads), dim=1)
        q, k = rotate(q, where), rotate(k, where)
        if cache is not None:
            k, v = cache.append(k, v, where.start)
        mixed = attend(q, k, v, where).transpose(1, 2).flatten(2)  # [B, T, H*hd]
        if observer:
            observer(Slot(Role.O, self.index), mixed.flatten(0, 1), None, None)
        return self.joined(mixed, OUT)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> weights [N, K] fp32, which sum to one, and experts [N, K]: softmax, top K, renormalised."""
        self.need(Role.ROUTER)
        scores = F.linear(x.float(), self.router).softmax(-1)  # [N, E]
        weights, experts = scores.topk(self.config.experts_per_token, dim=-1)
        return weights / weights.sum(-1, keepdim=True), experts

    def experts(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        """[N, D] (normalised) -> [N, D]: each token through its K experts, summed with the router's weights."""
        if observer:
            observer(Slot(Role.ROUTER, self.index), x, None, None)
        weights, experts = self.route(x)
        out = torch.zeros(x.shape, device=x.device, dtype=torch.float32)
        for expert, rows, share in segments(weights, experts, self.config.num_experts):
            y = self.expert(expert, x[rows], rows, share, observer)
            out.index_add_(0, rows, y * share[:, None])  # a token occurs once in a segment: no race, one order
        return out.to(x.dtype)

    def expert(self, expert: int, x: Tensor, tokens: Tensor, weights: Tensor, observer: Observer | None) -> Tensor:
        """down(silu(gate(x)) * up(x)) of one expert: [n, D] -> [n, D]."""
        self.need(*EXPERT, expert=expert)
        if observer:
            observer(Slot(Role.GATE, self.index, expert), x, tokens, weights)
            observer(Slot(Role.UP, self.index, expert), x, tokens, weights)
        gate, up = self.joined(x, GATE_UP, expert).chunk(2, dim=-1)  # [n, F] each
        inner = F.silu(gate) * up
        if observer:
            observer(Slot(Role.DOWN, self.index, expert), inner, tokens, weights)
        return self.joined(inner, DOWN, expert)


class Layer(Block):
    """A layer of dense matrices; about 1.45 G weights in 8x7B. `fill` reuses its memory for another index."""

    def __init__(self, config: MixtralConfig, index: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, index, device, dtype)
        d, f, e, hd = config.hidden_size, config.intermediate_size, config.num_experts, config.head_dim
        self.qkv = host.empty((sum(self.heads) * hd, d), device, dtype)  # rows of q, then k, then v
        self.o = host.empty((d, config.num_heads * hd), device, dtype)
        self.gate_up = host.empty((e, 2 * f, d), device, dtype)  # rows of w1, then w3
        self.down = host.empty((e, d, f), device, dtype)

    @classmethod
    def load(cls, reader: Reader, index: int, device: torch.device, dtype: torch.dtype) -> Layer:
        layer = cls(reader.config, index, device, dtype)
        layer.fill(reader, index)
        return layer

    def fill(self, reader: Reader, index: int) -> None:
        """Become layer `index`: read its tensors one by one into the memory at hand."""
        self.index = index
        for slot in layer_slots(index, self.config.num_experts):
            copy(self.weight(slot), reader, slot)

    def weight(self, slot: Slot) -> Tensor:
        """The live weight of a slot of this layer, a view [out, in] or [D] to read or to copy_ into."""
        q, k, v = torch.split(self.qkv, [heads * self.config.head_dim for heads in self.heads])
        whole = {
            Role.ATTENTION_NORM: self.attention_norm, Role.Q: q, Role.K: k, Role.V: v, Role.O: self.o,
            Role.FFN_NORM: self.ffn_norm, Role.ROUTER: self.router,
        }  # fmt: skip
        if slot.expert is None:
            return whole[slot.role]
        if slot.role is Role.DOWN:
            return self.down[slot.expert]
        gate, up = self.gate_up[slot.expert].chunk(2)
        return gate if slot.role is Role.GATE else up

    def joined(self, x: Tensor, roles: tuple[Role, ...], expert: int | None = None) -> Tensor:
        if expert is None:
            return products.linear(x, self.qkv if roles == QKV else self.o)
        return products.linear(x, (self.gate_up if roles == GATE_UP else self.down)[expert])

    def experts(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        """As Block.experts; on a GPU all experts together, without waiting for what the CPU would have to know."""
        if observer or x.device.type == "cpu":
            return super().experts(x, observer)
        weights, experts = self.route(x)
        for expert in range(self.config.num_experts):
            self.need(*EXPERT, expert=expert)
        return mixture(x, weights, experts, lambda: self.gate_up, lambda: self.down)


class PackedLayer(Block):
    """A layer each of whose matrices is what its file holds, where a product can take that."""

    def __init__(self, reader: Reader, index: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(reader.config, index, device, dtype)
        self.matrices: dict[Slot, Matrix] = {}
        vectors = {Role.ATTENTION_NORM: self.attention_norm, Role.FFN_NORM: self.ffn_norm, Role.ROUTER: self.router}
        for slot in layer_slots(index, reader.config.num_experts):
            if slot.role in vectors:
                copy(vectors[slot.role], reader, slot)
            else:
                self.matrices[slot] = matrix(reader, slot, device, dtype, packed=True)

    def packs(self, slot: Slot) -> bool:
        return isinstance(self.matrices.get(slot), blocks.Blocks)

    def joined(self, x: Tensor, roles: tuple[Role, ...], expert: int | None = None) -> Tensor:
        return self.all_joined([x], roles, [expert])[0]

    def all_joined(self, xs: Sequence[Tensor], roles: tuple[Role, ...], experts: Sequence[int | None]) -> list[Tensor]:
        """`joined` of each x and expert; products of few rows go together."""
        found = products.linear_all(
            [(x, self.matrices[Slot(role, self.index, expert)]) for x, expert in zip(xs, experts, strict=True)
             for role in roles]
        )  # fmt: skip
        return [torch.cat(found[start : start + len(roles)], -1) for start in range(0, len(found), len(roles))]

    def experts(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        """As Block.experts; those of one token go together."""
        if observer or len(x) > 1:
            return super().experts(x, observer)
        weights, chosen = self.route(x)
        numbers: list[int] = chosen[0].tolist()
        inner = [
            F.silu(gate) * up
            for gate, up in (both.chunk(2, dim=-1) for both in self.all_joined([x] * len(numbers), GATE_UP, numbers))
        ]
        out = torch.zeros(x.shape, dtype=torch.float32)
        for y, share in zip(self.all_joined(inner, DOWN, numbers), weights[0], strict=True):
            out += y * share
        return out.to(x.dtype)


class Head:
    """Final norm and output matrix: hidden states -> logits, always fp32."""

    def __init__(self, config: MixtralConfig, norm: Tensor, matrix: Matrix) -> None:
        self.config, self.norm, self.matrix = config, norm, matrix  # [D], [V, D]

    @classmethod
    def load(cls, reader: Reader, device: torch.device, dtype: torch.dtype, *, packed: bool = False) -> Head:
        norm = torch.empty(reader.config.shape(Role.NORM), device=device, dtype=dtype)
        copy(norm, reader, Slot(Role.NORM))
        return cls(reader.config, norm, matrix(reader, Slot(Role.HEAD), device, dtype, packed=packed))

    def __call__(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        """[.., D] -> [.., V] fp32. The result is the only large thing made; see `chunks` for more rows than fit."""
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        if observer:
            observer(Slot(Role.HEAD), x.flatten(0, -2), None, None)
        # a product rounded to bf16 would round logits of 20 to steps of 1/8: top-1 becomes a matter of ties
        return products.linear_fp32(x, self.matrix)

    def chunks(self, x: Tensor, rows: int = 256) -> Iterator[tuple[int, Tensor]]:
        """x [N, D] -> (first row, logits [<= rows, V]) until N: never more than `rows` rows of logits at once."""
        for start in range(0, len(x), rows):
            yield start, self(x[start : start + rows])


# --- the model ---------------------------------------------------------------------------------------------------


class Cache:
    """Keys and values of every layer, for `batch` sequences of up to `capacity` columns."""

    def __init__(
        self, model: Mixtral, batch: int, capacity: int, padding: Tensor | None = None, prompt: int = 0
    ) -> None:
        """`padding` [B]: how many of the first columns of each sequence are not text; None where all are. `prompt`: how
        many columns come first that are one text, in however many passes: dynamic scaling turns all by its length.
        """
        self.layers = [LayerCache(model.config, batch, capacity, model.device, model.dtype) for _ in model.layers]
        self.capacity, self.used, self.padding, self.prompt = capacity, 0, padding, prompt
        self.batch = batch
        self.step: object = None  # what a model keeps to go on with these sequences, a token at a time

    def select(self, rows: Tensor) -> None:
        """Keep these sequences only, [n] indices into the batch."""
        self.batch, self.step = len(rows), None
        for layer in self.layers:
            layer.select(rows)
        if self.padding is not None:
            self.padding = self.padding[rows]


class Mixtral:
    """All parts on one device; `mapped`: how those are had that stay in their file. See stream.py for larger ones."""

    def __init__(self, embedding: Embedding, layers: Sequence[Block], head: Head, mapped: Mapped = Mapped.NOT) -> None:
        self.config, self.embedding, self.layers, self.head, self.mapped = head.config, embedding, layers, head, mapped

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @classmethod
    def load(
        cls,
        reader: Reader,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        packed: bool = True,
        max_memory: int | None = None,
        beyond: bool = False,
        progress: Progress | None = None,
    ) -> Mixtral:
        """Read a model tensor by tensor: the peak is the model in memory and one stored tensor.

        With `packed`, on a CPU, packed matrices stay so where kernels multiply their blocks (blocks.py), those of a
        GGUF in their file, mapped; all others, and all that is computed, are of `dtype`. Raises MemoryBudgetError,
        before anything is read, if that is more than `max_memory` bytes, or with `beyond` what is not in a file;
        TensorError for a tensor whose shape contradicts the configuration.
        """
        where = torch.device(device)
        packed = packed and where.type == "cpu" and any(blocks.type_of(reader, slot) for slot in reader.slots())
        mapped = budget.check(reader, dtype.itemsize, max_memory, packed=packed, beyond=beyond)
        source = watched(
            blocks.in_file(reader, mapped),
            progress,
            lambda slot: budget.held_bytes(reader, [slot], dtype.itemsize, packed),
        )
        indices = range(reader.config.num_layers)
        embedding = Embedding.load(source, where, dtype, packed=packed)
        layers: list[Block] = [
            PackedLayer(source, index, where, dtype) if packed else Layer.load(source, index, where, dtype)
            for index in indices
        ]
        head = Head.load(source, where, dtype, packed=packed)
        if progress:
            progress.finish()
        return cls(embedding, layers, head, mapped)

    def hidden(self, ids: Tensor, cache: Cache | None = None, observer: Observer | None = None) -> Tensor:
        """ids [B, T] -> [B, T, D] after the last layer, before the final norm. Continues after what `cache` holds.

        Raises ValueError if the cache has no room for T more columns.
        """
        start, padding, prompt = (cache.used, cache.padding, cache.prompt) if cache else (0, None, 0)
        if cache and start + ids.shape[1] > cache.capacity:
            raise ValueError(f"the cache holds {cache.capacity} columns, {start + ids.shape[1]} are asked for")
        where = span(self.config, ids.shape[1], self.device, start, padding, prompt=prompt)
        x = self.embedding(ids)
        for index, layer in enumerate(self.layers):
            x = layer(x, where, cache.layers[index] if cache else None, observer)
        if cache:
            cache.used += ids.shape[1]
        return x

    def __call__(
        self, ids: Tensor, cache: Cache | None = None, *, last_only: bool = False, observer: Observer | None = None
    ) -> Tensor:
        """ids [B, T] -> logits [B, T, V] fp32, or [B, 1, V] of the last position with `last_only`."""
        x = self.hidden(ids, cache, observer)
        return self.head(x[:, -1:] if last_only else x, observer)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """One more id of each sequence, [B] -> the logits after it, [B, V] fp32."""
        return self(ids[:, None], cache)[:, 0]
