"""One token more of each sequence, by the same launches on the same memory each time: a CUDA graph on a GPU.

    ids ─► embedding ─► each layer: norm ─► q k v ─► turn, cache ─► attention ─► o, added
                                    norm and router ─► gate+up of the chosen ─► down, added ─► norm ─► head ─► logits

Which column that is stands on the card and goes up with each step, so nothing is told by the CPU but the ids. Run one
by one (`captured` False) the launches give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..config import MixtralConfig
from ..errors import MixtoolsError
from ..ops.gpu import launch
from ..ops.gpu.launch import Arguments, Launch
from . import rope
from .attention import LayerCache, turns
from .model import Cache
from .planes import PlanesHead, PlanesLayer


class Step:
    """Of one model and one cache, from the column on to which the cache is filled."""

    def __init__(
        self, table: Tensor, layers: Sequence[PlanesLayer], head: PlanesHead, cache: Cache, *, captured: bool
    ) -> None:
        """`table`: the embedding [V, D]. `captured`: as a CUDA graph, which the second step makes."""
        self.table, self.layers, self.head, self.config, self.captured = table, layers, head, head.config, captured
        # not the cache itself, which holds this
        self.batch, self.padding, self.prompt, config = cache.batch, cache.padding, cache.prompt, head.config
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm = False
        self.ids = torch.zeros(cache.batch, dtype=torch.int64, device=table.device)
        self.seen = torch.zeros(cache.batch, 2, dtype=torch.int32, device=table.device)
        if cache.padding is not None:
            self.seen[:, 0] = cache.padding
        self.filled = -1  # columns, as `seen` has them
        scaling = config.rope_scaling
        self.dynamic = scaling is not None and scaling.type == "dynamic"
        self.cos, self.sin = self._tables(torch.arange(cache.capacity, device=table.device), 1)
        self.x = self._empty(config.hidden_size)
        self.logits = self._empty(config.vocab_size, dtype=torch.float32)
        self.launches = self._launches(cache.layers)

    @staticmethod
    def suits(config: MixtralConfig, cache: Cache) -> bool:
        """Whether the kernels take such a model and so many sequences."""
        size = config.head_dim
        return cache.batch <= launch.MOST_TOKENS and size > 1 and size & (size - 1) == 0

    def __call__(self, ids: Tensor, used: int) -> Tensor:
        """[B], of a cache of which so many columns are filled -> logits [B, V] fp32, valid until the next step.

        Raises MixtoolsError for a cache that is full: a kernel would write behind it.
        """
        if used >= self.cos.shape[1]:
            raise MixtoolsError(f"the cache of {self.cos.shape[1]} columns is full")
        if self.filled != used:
            self.seen[:, 1] = self.filled = used
        self.ids.copy_(ids)
        if self.dynamic:
            column = torch.tensor([used], device=self.ids.device)
            for table, found in zip((self.cos, self.sin), self._tables(column, used + 1), strict=True):
                table[:, column] = found
        if self.graph is not None:
            self.graph.replay()
        elif self.captured and self.warm:
            self._capture()
        else:
            self._run()
            self.warm = True  # every kernel is compiled now
        self.filled += 1
        return self.logits

    def _capture(self) -> None:
        """On a stream of the card's own: torch's usual one would be that of the current device, wherever this is. What
        other threads do meanwhile is not ours."""
        graph, device = torch.cuda.CUDAGraph(), self.table.device
        line = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it bare
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=line, capture_error_mode="thread_local"):
            self._run()
        graph.replay()
        self.graph = graph

    def _run(self) -> None:
        self.seen[:, 1] += 1
        window = self.config.sliding_window
        if window is not None:
            torch.maximum(self.seen[:, 0], self.seen[:, 1] - window, out=self.seen[:, 0])
        torch.index_select(self.table, 0, self.ids, out=self.x)
        for one in self.launches:
            one.run()

    # --- made once ---

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty((self.batch, *shape), dtype=dtype or self.table.dtype, device=self.table.device)

    def _tables(self, columns: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, columns, hd/2] in a text of so many columns."""
        padding, device = self.padding, self.table.device
        left = torch.zeros(1, device=device, dtype=torch.long) if padding is None else padding
        reach = max(length, self.prompt) - left
        frequency = rope.frequencies(self.config, device, reach)
        cos, sin = turns(self.config, columns[None], frequency, padding)
        return cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def _launches(self, caches: Sequence[LayerCache]) -> list[Launch]:
        """Layers come one after the other, so all have the same memory for what they make."""
        config, x = self.config, self.x
        heads, groups, size, count = config.num_heads, config.num_kv_heads, config.head_dim, config.experts_per_token
        self.between, self.normed = (self._empty(config.hidden_size) for _ in range(2))
        self.q, self.k, self.v = (self._empty(each, size) for each in (heads, groups, groups))
        self.qkv = self._empty(heads + 2 * groups, size)
        self.turned, self.mixed = (self._empty(heads, 1, size) for _ in range(2))
        self.weights, self.chosen = self._empty(count, dtype=torch.float32), self._empty(count, dtype=torch.int64)
        self.inner = self._empty(count, config.intermediate_size)
        first = caches[0]
        self.attending = launch.attend(self.turned, first.keys, first.values, self.seen, self.mixed)
        out: list[Launch] = []
        for layer, cache in zip(self.layers, caches, strict=True):
            out += self._attention(layer, cache)
            out += self._experts(layer)
        out.append(launch.normalise(x, self.head.norm, config.rms_norm_eps, self.normed))
        out.append(launch.gemv(self.normed, self.head.planes, self.logits))
        return out

    def _attention(self, layer: PlanesLayer, cache: LayerCache) -> list[Launch]:
        """x -> between."""
        if len(layer.qkv) == 1:
            made, groups = [self.qkv], self.config.num_kv_heads
            q, k, v = torch.split(self.qkv, [self.config.num_heads, groups, groups], 1)
        else:
            q, k, v = made = [self.q, self.k, self.v]
        attend, combine = self.attending
        over: Arguments = {**attend.arguments, "keys": cache.keys, "values": cache.values}
        return [
            launch.normalise(self.x, layer.attention_norm, self.config.rms_norm_eps, self.normed),
            *(launch.gemv(self.normed, planes, to.flatten(1)) for planes, to in zip(layer.qkv, made, strict=True)),
            launch.turn((q, k, v), (self.cos, self.sin), self.seen, self.turned[:, :, 0], cache.keys, cache.values),
            replace(attend, arguments=over), combine,
            launch.gemv(self.mixed.flatten(1), layer.o, self.between, self.x),
        ]  # fmt: skip

    def _experts(self, layer: PlanesLayer) -> list[Launch]:
        """between -> x."""
        eps, weights, chosen = self.config.rms_norm_eps, self.weights, self.chosen
        return [
            launch.route(self.between, layer.ffn_norm, layer.router, eps, self.normed, weights, chosen),
            launch.gate_up(self.normed, chosen, layer.gate_up, self.inner),
            launch.down(self.inner, chosen, weights, layer.down, self.x, self.between),
        ]
