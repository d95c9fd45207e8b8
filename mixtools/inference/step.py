"""One token more of each sequence, by the same launches on the same memory each time: a CUDA graph on a GPU.

    ids ─► embedding ─► each layer: norm ─► q k v ─► turn, cache ─► attention ─► o, added
                                    norm and router ─► gate+up of the chosen ─► down, added ─► norm ─► head ─► logits

Which column that is stands on the card and goes up with each step, so nothing is told by the CPU but the ids. Run one
by one (`captured` False) the launches give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import MixtralConfig
from ..errors import MixtoolsError
from ..ops.gpu import launch
from ..ops.gpu.launch import Launch
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
        self.cos, self.sin = self._tables(torch.arange(cache.capacity, device=table.device))
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
            column = torch.tensor([self.filled], device=self.ids.device)
            for table, found in zip((self.cos, self.sin), self._tables(column), strict=True):
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
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._run()
        self.graph.replay()

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

    def _tables(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B or 1, columns, hd/2]."""
        padding, device = self.padding, self.table.device
        left = torch.zeros(1, device=device, dtype=torch.long) if padding is None else padding
        reach = max(int(columns[-1]) + 1 if len(columns) == 1 else 1, self.prompt) - left
        frequency = rope.frequencies(self.config, device, reach)
        cos, sin = turns(self.config, columns[None], frequency, padding)
        return cos[:, 0].contiguous(), sin[:, 0].contiguous()

    def _launches(self, caches: Sequence[LayerCache]) -> list[Launch]:
        config, x = self.config, self.x
        heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
        self.normed, self.mixed, self.turned = (
            self._empty(config.hidden_size),
            *(self._empty(heads, size) for _ in range(2)),
        )
        self.between = self._empty(config.hidden_size)
        self.qkv = self._empty((heads + 2 * groups) * size)
        out: list[Launch] = []
        for layer, cache in zip(self.layers, caches, strict=True):
            out += self._attention(layer, cache)
            out += self._experts(layer)
        out.append(launch.normalise(x, self.head.norm, config.rms_norm_eps, self.normed))
        out.append(launch.gemv(self.normed, self.head.planes, self.logits))
        return out

    def _attention(self, layer: PlanesLayer, cache: LayerCache) -> list[Launch]:
        """x -> between."""
        config = self.config
        heads, groups, size = config.num_heads, config.num_kv_heads, config.head_dim
        widths = [one.rows for one in layer.qkv]
        made = [self.qkv] if len(widths) == 1 else [self._empty(width) for width in widths]
        parts = torch.split(made[0], [heads * size, groups * size, groups * size], 1) if len(made) == 1 else made
        q, k, v = (part.view(len(part), -1, size) for part in parts)
        first, last = launch.attend(
            self.turned[:, :, None], cache.keys, cache.values, self.seen, self.mixed[:, :, None]
        )
        return [
            launch.normalise(self.x, layer.attention_norm, config.rms_norm_eps, self.normed),
            *(launch.gemv(self.normed, planes, to) for planes, to in zip(layer.qkv, made, strict=True)),
            launch.turn((q, k, v), (self.cos, self.sin), self.seen, self.turned, cache.keys, cache.values),
            first, last,
            launch.gemv(self.mixed.flatten(1), layer.o, self.between, self.x),
        ]  # fmt: skip

    def _experts(self, layer: PlanesLayer) -> list[Launch]:
        """between -> x."""
        config = self.config
        weights = self._empty(config.experts_per_token, dtype=torch.float32)
        chosen = self._empty(config.experts_per_token, dtype=torch.int64)
        inner = self._empty(config.experts_per_token, config.intermediate_size)
        return [
            launch.route(self.between, layer.ffn_norm, layer.router, config.rms_norm_eps, self.normed, weights, chosen),
            launch.gate_up(self.normed, chosen, layer.gate_up, inner),
            launch.down(inner, chosen, weights, layer.down, self.x, self.between),
        ]
