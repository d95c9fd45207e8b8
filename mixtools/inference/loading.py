"""A whole model on a device, in the way that suits it: on a GPU in planes, on a CPU in tensors or blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import Quantized
from ..layouts.reader import Mapped, Reader
from ..machine import human_bytes
from ..names import Role, Slot, layer_slots
from ..ops.gpu import able
from ..progress import Progress
from . import blocks, budget, planes
from .model import Cache, Embedding, Mixtral, copy
from .planes import PlanesHead, PlanesLayer
from .step import Step
from .watching import watched


def load(
    reader: Reader, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bfloat16, *, rounded: bool = False,
    max_memory: int | None = None, beyond: bool = False, progress: Progress | None = None,
) -> Mixtral:  # fmt: skip
    """As Mixtral.load; in planes on a GPU with kernels, which `beyond` says nothing of.

    `rounded`: weights are those of `dtype`, as a stream has them, not the formats' own where these have more digits.
    """
    where = torch.device(device)
    if able.problem(where) is None:
        return PlanesMixtral.read(reader, where, dtype, rounded=rounded, max_memory=max_memory, progress=progress)
    return Mixtral.load(
        reader, where, dtype, packed=not rounded, max_memory=max_memory, beyond=beyond, progress=progress
    )


def check(reader: Reader, device: torch.device, dtype: torch.dtype, max_memory: int | None, *, rounded: bool) -> None:
    """Raises MemoryBudgetError if what `load` would hold exceeds `max_memory`."""
    if able.problem(device) is not None:
        packed = not rounded and device.type == "cpu"
        budget.check(reader, dtype.itemsize, max_memory, packed=packed)
        return
    size = dtype.itemsize
    held = planes.held_bytes(reader, reader.config.slots(), size) + planes.scratch_bytes(reader, size)
    budget.check_held(held, max_memory)


def widened(reader: Reader, model: Mixtral) -> str | None:
    """What a user should know of matrices that are packed in the file and not in memory, told by the first layer's;
    None where there are none."""
    if not isinstance(reader, blocks.Storing):
        return None
    layer, slots = model.layers[0], layer_slots(0, reader.config.num_experts)
    formats = {reader.format(slot) for slot in slots if not layer.packs(slot)}
    named = sorted({f"{one.kind}, {one.about}" for one in formats if isinstance(one, Quantized)})
    return f"widened when loaded, since no kernel here multiplies them: {'; '.join(named)}" if named else None


def paged(reader: Reader, model: Mixtral, max_memory: int | None) -> str | None:
    """What a user should know of a model that does not stay in memory; None of one that does."""
    if model.mapped is not Mapped.LATER or max_memory is None:
        return None
    size = budget.held_bytes(reader, reader.config.slots(), model.dtype.itemsize, packed=True)
    return (
        f"the model takes {human_bytes(size)}, and {human_bytes(max_memory)} of memory are free: what has no room is "
        "read from its file again and again, at the speed of the disk"
    )


class PlanesMixtral(Mixtral):
    """All of a model in planes, on one device that their kernels run on (ops/gpu/able.py)."""

    def __init__(self, table: Tensor, layers: Sequence[PlanesLayer], head: PlanesHead) -> None:
        super().__init__(Embedding(table, table.device, table.dtype), layers, head)
        self._step = table, layers, head

    @classmethod
    def read(
        cls, reader: Reader, device: torch.device, dtype: torch.dtype, *, rounded: bool, max_memory: int | None,
        progress: Progress | None,
    ) -> PlanesMixtral:  # fmt: skip
        """Tensor by tensor: matrices stay as they are stored where kernels multiply those (planes.py), all others are
        of `dtype`. Raises as Mixtral.load."""
        check(reader, device, dtype, max_memory, rounded=rounded)
        source = watched(reader, progress, lambda slot: planes.held_bytes(reader, [slot], dtype.itemsize))
        config = reader.config
        table = torch.empty(config.shape(Role.EMBED), device=device, dtype=dtype)
        copy(table, source, Slot(Role.EMBED))
        layers = [PlanesLayer.load(source, index, device, dtype, rounded=rounded) for index in range(config.num_layers)]
        norm = torch.empty(config.shape(Role.NORM), device=device, dtype=dtype)
        copy(norm, source, Slot(Role.NORM))
        head = PlanesHead(config, norm, planes.read(source, Slot(Role.HEAD), device, dtype), rounded=rounded)
        if progress:
            progress.finish()
        return cls(table, layers, head)

    def step(self, ids: Tensor, cache: Cache) -> Tensor:
        """As Mixtral.step, by the launches of step.py, of up to eight sequences: the result is theirs until the next.

        The first step runs them one by one, from the second on they are a CUDA graph.
        """
        table, layers, head = self._step
        if not Step.suits(self.config, cache) or head.rounded:
            return super().step(ids, cache)
        if not isinstance(cache.step, Step):
            cache.step = Step(table, layers, head, cache, captured=self.device.type == "cuda")
        logits = cache.step(ids, cache.used)
        cache.used += 1
        return logits
