"""Matrices of a layer decomposed at once, as a GPU likes it: it has then enough to do until the last column."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ...layouts.checkpoint import Checkpoint, located
from ...linalg.eigen import has_kernels
from ...linalg.spectrum import Decomposition, check, decompose_batch
from ...machine import memory_for
from ...names import Slot
from .figures import WEIGHTS
from .method import Options

_SHARE = 4  # of what is free on the device, one part: what is left over of groups before may still be there
_KEPT = 2  # groups before the last whose matrices another thread may still be about to ask for


class Together:
    """Gives each of some matrices decomposed, once, and works on those beside it in the same go."""

    def __init__(self, source: Checkpoint, slots: Iterable[Slot], device: torch.device) -> None:
        self.source, self.device = source, device
        free = memory_for(device, None)
        self.groups = groups(source, slots, sys.maxsize if free is None else free // _SHARE)
        self._group_of = {slot: number for number, group in enumerate(self.groups) for slot in group}
        self._ready: dict[Slot, Decomposition] = {}

    def take(self, slot: Slot, read: Callable[[Slot], Tensor]) -> Decomposition:
        """Raises SpectrumError, which names file and tensor, for NaN or Inf in it or in one beside it."""
        if slot not in self._ready:
            number = self._group_of[slot]
            # what nobody took, an earlier run had made
            self._ready = {kept: found for kept, found in self._ready.items() if self._group_of[kept] >= number - _KEPT}
            group = self.groups[number]
            self._ready |= zip(group, decompose_batch([self._checked(one, read) for one in group]), strict=True)
        return self._ready.pop(slot)

    def _checked(self, slot: Slot, read: Callable[[Slot], Tensor]) -> Tensor:
        with located(self.source, slot):
            weight = read(slot)
            check(weight)
            return weight


def fits(method: Options, device: torch.device) -> bool:
    """Whether matrices are decomposed in groups: on a GPU, and where all that it takes is the weights themselves."""
    return method.norm == WEIGHTS and not method.exact and has_kernels(device)


def groups(source: Checkpoint, slots: Iterable[Slot], most_bytes: int) -> list[list[Slot]]:
    """Slots of one layer after the other whose short sides are equal, as many as fit, and one at least."""
    made: dict[tuple[int | None, int], list[list[Slot]]] = {}
    for slot in slots:
        shape, dtype = source.spec(slot)
        order = min(shape)
        size = dtype.nbytes(shape) + 10 * order**2  # the weight, its form, and scratch of that
        beside = made.setdefault((slot.layer, order), [[]])
        if (len(beside[-1]) + 1) * size > most_bytes and beside[-1]:
            beside.append([])
        beside[-1].append(slot)
    return [group for beside in made.values() for group in beside]
