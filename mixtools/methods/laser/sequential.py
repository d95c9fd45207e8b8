"""Calibration by the model as it is being reduced: a layer's inputs come from the reduced layers before it.

states before layer i ─► its moments ─► its matrices reduced ─► the layer as it will be ─► states before layer i + 1
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from ...inference.calibrate import Calibration, Moments, Text
from ...inference.stream import Stream
from ...names import Slot
from .search.shelf import EditedReader, Place, Shelf


class Sequential(Calibration):
    """Moments of the layers as they are, over inputs that came through the reduced ones.

    `reduce`, set before anything is asked for, gives the weight as a reader will see it, and asks for the slot's
    covariance on its way. A layer that an earlier run had written is reduced once more, to the same weights. Reduced
    weights lie in a temporary file.
    """

    reduce: Callable[[Slot], Tensor]

    def __init__(self, stream: Stream, text: Text, slots: Iterable[Slot], routed: bool = False) -> None:
        super().__init__(stream, text, slots, routed)
        self._shelf = Shelf(stream.spill)
        self._edits: dict[Slot, Place] = {}
        stream.reader = self._reader = EditedReader(stream.reader, self._shelf)

    def settle(self, slot: Slot, weight: Tensor) -> None:
        """This is what becomes of the slot."""
        if slot not in self._edits:
            self._edits[slot] = self._shelf.put(weight)

    def close(self) -> None:
        super().close()
        self._shelf.close()

    def _advance(self, index: int) -> Moments:
        if self._states is None or self._states.layer > index:
            self._states = self.stream.embed(self.text.sequences)
        states = self._states
        for layer in range(states.layer, index):
            for slot in self.slots:
                if slot.layer == layer and slot not in self._edits:
                    self.settle(slot, self.reduce(slot))
            self._moments = None  # its memory is the layer's
            self._reader.edits = self._edits
            self.stream.run(states, stop=layer + 1)
            self._reader.edits = {}
            for slot in [slot for slot in self._edits if slot.layer == layer]:
                self._shelf.drop(self._edits.pop(slot))
        return self._observe(index, states, into=None)
