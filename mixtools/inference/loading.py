"""A whole model on a device, in the way that suits it: on a GPU in planes, on a CPU in tensors or blocks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..layouts.reader import Reader
from ..names import Role, Slot
from ..ops.gpu import able
from ..progress import Progress
from . import budget, planes
from .model import Cache, Embedding, Mixtral, copy
from .planes import PlanesHead, PlanesLayer
from .step import Step
from .watching import watched


def load(
    reader: Reader, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, *,
    max_memory: int | None = None, progress: Progress | None = None,
) -> Mixtral:  # fmt: skip
    """As Mixtral.load, or as PlanesMixtral.load on a GPU with kernels."""
    kind = Mixtral if able.problem(torch.device(device)) else PlanesMixtral
    return kind.load(reader, device, dtype, max_memory=max_memory, progress=progress)


class PlanesMixtral(Mixtral):
    """All of a model in planes, on one device that their kernels run on (ops/gpu/able.py)."""

    def __init__(self, table: Tensor, layers: Sequence[PlanesLayer], head: PlanesHead) -> None:
        super().__init__(Embedding(table, table.device, table.dtype), layers, head)
        self._step = table, layers, head

    @classmethod
    def load(
        cls, reader: Reader, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16, *,
        packed: bool = True, max_memory: int | None = None, progress: Progress | None = None,
    ) -> Mixtral:  # fmt: skip
        """Read a model tensor by tensor: the peak on the device is the model and two of its matrices, widened.

        Matrices stay as they are stored where kernels multiply those (planes.py), all others are of `dtype`; without
        `packed`, all are. Raises as Mixtral.load.
        """
        where, config = torch.device(device), reader.config
        given: Reader = reader if packed else planes.Widened(reader)
        widest = max(math.prod(config.shape(slot.role)) for slot in config.slots()) * dtype.itemsize
        budget.check_held(planes.held_bytes(given, config.slots(), dtype.itemsize) + 2 * widest, max_memory)
        source = watched(given, progress, lambda slot: planes.held_bytes(given, [slot], dtype.itemsize))
        table = torch.empty(config.shape(Role.EMBED), device=where, dtype=dtype)
        copy(table, source, Slot(Role.EMBED))
        layers = [PlanesLayer.load(source, index, where, dtype) for index in range(config.num_layers)]
        norm = torch.empty(config.shape(Role.NORM), device=where, dtype=dtype)
        copy(norm, source, Slot(Role.NORM))
        head = PlanesHead(config, norm, planes.read(source, Slot(Role.HEAD), where, dtype))
        if progress:
            progress.finish()
        return cls(table, layers, head)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """As Mixtral.step, by the launches of step.py, of up to eight sequences: the result is theirs until the next.

        The first step runs them one by one, from the second on they are a CUDA graph.
        """
        if not Step.suits(self.config, cache):
            return super().step(ids, cache)
        if not isinstance(cache.step, Step):
            cache.step = Step(*self._step, cache, captured=self.device.type == "cuda")
        logits = cache.step(ids, cache.used)
        cache.used += 1
        return logits
