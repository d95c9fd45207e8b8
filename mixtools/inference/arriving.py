"""Layers while they are read: on a thread of their own, ahead of the run that needs them.

reader's thread: a tensor at a time, in the order in which they are needed ─► the layer's memory
                 to a GPU by a lane; what is packed goes there so, and is widened there, or stays so
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.cuda import Event

from ..layouts.reader import Reader, Spec
from ..names import Role, Slot, layer_slots
from ..ops.gpu import able
from ..storage.store import Bits, from_tensor
from . import planes
from .lane import Lane
from .model import Layer, copy
from .planes import PlanesLayer


@runtime_checkable
class Filling(Protocol):
    """A reader that puts a tensor where it is wanted."""

    def spec(self, slot: Slot) -> Spec: ...

    def fill(self, slot: Slot, out: Bits) -> None: ...


class Arriving(Layer):
    """A layer that runs while another thread still reads it: each part waits for the weights that it needs."""

    coming: dict[Slot, Future[Event | None]]
    lane: Lane | None = None

    def read_ahead(self, reader: Reader, index: int, pool: ThreadPoolExecutor, lane: Lane | None = None) -> None:
        """Become layer `index`, tensor by tensor on the pool's one thread, on a GPU by a lane; returns at once."""
        self.index, self.lane = index, lane
        if lane is not None:
            pool.submit(lane.after, lane.free())
        self.coming = {
            slot: pool.submit(_fill, self, reader, slot, lane) for slot in layer_slots(index, self.config.num_experts)
        }

    def need(self, *roles: Role, expert: int | None = None) -> None:
        """Wait until these are there. Raises what reading them raised."""
        for role in roles:
            event = self.coming[Slot(role, self.index, expert)].result()
            if self.lane is not None and event is not None:
                self.lane.arrived(event)

    def weight(self, slot: Slot) -> Tensor:
        """As Layer.weight, once it is there."""
        self.need(slot.role, expert=slot.expert)
        return super().weight(slot)

    def finish(self) -> None:
        """Wait for all. Raises what reading raised, also of a tensor that nobody needed."""
        for reading in self.coming.values():
            reading.result()


def fill(layer: Layer, reader: Reader, index: int) -> Layer:
    """Make `layer` the one of that index."""
    layer.index = index
    for slot in layer_slots(index, layer.config.num_experts):
        _fill(layer, reader, slot)
    return layer


def _fill(layer: Layer, reader: Reader, slot: Slot, lane: Lane | None = None) -> Event | None:
    """Read one tensor of `layer` into place; by a lane, the event that comes when it is there.

    From a file on a CPU in blocks that stay in the cache on their way: half the work of a whole tensor, and none of
    it by torch, whose threads are busy with what is there already.
    """
    weight = Layer.weight(layer, slot)  # its place: an arriving layer's own would wait for what is done here
    if lane is not None and able.problem(weight.device) is None and planes.stays(reader, slot):
        return lane.start(lambda: weight.copy_(planes.dense(planes.read(reader, slot, weight.device, weight.dtype),
                                                            weight.dtype)))  # fmt: skip
    there = isinstance(reader, Filling) and reader.spec(slot).dtype.torch() == weight.dtype
    if lane is not None:
        return lane.send(weight, lambda place: _read(place, reader, slot, there))
    _read(weight, reader, slot, there and weight.device.type == "cpu")
    return None


def _read(place: Tensor, reader: Reader, slot: Slot, there: bool) -> None:
    """`there`: the reader can put it there."""
    if there:
        assert isinstance(reader, Filling)
        reader.fill(slot, from_tensor(place))  # its bits are shared
    else:
        copy(place, reader, slot)


def stays_packed(reader: Reader, device: torch.device) -> bool:
    """Whether layers of the reader can be run as they are stored, on this device."""
    slots = layer_slots(0, reader.config.num_experts)
    return able.problem(device) is None and any(planes.stays(reader, slot) for slot in slots)


def packed_layers(
    reader: Reader, indices: range, device: torch.device, dtype: torch.dtype, lane: Lane | None, *, double: bool
) -> Iterator[PlanesLayer]:
    """Layers as they are stored, each valid until the next is asked for; with `double` the next one is read meanwhile.

    Up to three are there for a moment, which take less than two that are widened. Raises what reading raises.
    """

    def load(index: int, free: Event | None) -> tuple[PlanesLayer, Event | None]:
        if lane is None or free is None:
            return PlanesLayer.load(reader, index, device, dtype, rounded=True), None
        # its memory may be that of the layer before the last, which is still computed with
        lane.after(free)
        made: list[PlanesLayer] = []
        event = lane.start(lambda: made.append(PlanesLayer.load(reader, index, device, dtype, rounded=True)))
        return made[0], event

    with ThreadPoolExecutor(1, "mixtools-reader") as pool:
        try:
            coming = [pool.submit(load, indices[0], lane.free() if lane else None)]
            for index in indices:
                layer, event = coming.pop().result()
                if lane is not None and event is not None:
                    lane.arrived(event)
                more = index != indices[-1]
                if more and double:
                    coming.append(pool.submit(load, index + 1, lane.free() if lane else None))
                yield layer
                del layer
                if more and not double:
                    coming.append(pool.submit(load, index + 1, lane.free() if lane else None))
        finally:
            pool.shutdown(cancel_futures=True)
