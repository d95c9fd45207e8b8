"""The way of a layer's tensors to a GPU: read into pinned memory, copied beside what the GPU computes.

    reader's thread:  wait until a buffer is free ─► read into it ─► copy, on a stream of its own ─► an event
    who needs it:     its stream waits for the event, the CPU does not

Two buffers: one is filled while the other is on its way. A layer's memory may still be in use when it is to be filled
anew: its first copy waits for all that was started before.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.cuda import Event, Stream


class Card:
    """What is asked of a GPU; the tests have a double."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def line(self) -> Stream:
        """A new one."""
        return Stream(self.device)  # type: ignore[no-untyped-call]  # torch leaves it bare

    def current(self) -> Stream:
        """That of this thread."""
        return torch.cuda.current_stream(self.device)

    def on(self, line: Stream) -> AbstractContextManager[object]:
        """What is started within goes there."""
        return torch.cuda.stream(line)

    def pinned(self, size: int) -> Tensor:
        """uint8 [size], which a GPU copies from by itself."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class Lane:
    """For one reading thread. `free` may be called by another, which starts the computing."""

    def __init__(self, card: Card) -> None:
        self.card, self.line = card, card.line()
        self._buffers: list[tuple[Tensor, Event | None]] = [(torch.empty(0, dtype=torch.uint8), None)] * 2

    def free(self) -> Event:
        """Comes when all is done that was started up to now: what it used may be filled anew."""
        event: Event = self.card.current().record_event()
        return event

    def after(self, event: Event) -> None:
        """Nothing is copied before the event."""
        self.line.wait_event(event)

    def send(self, to: Tensor, fill: Callable[[Tensor], object]) -> Event:
        """`fill` is given memory of the tensor's shape and dtype on the CPU, and what it puts there is copied."""
        size = to.numel() * to.itemsize
        buffer, sent = self._buffers.pop(0)
        if sent is not None:
            sent.synchronize()
        if len(buffer) < size:
            buffer = self.card.pinned(size)
        place = buffer[:size].view(to.dtype).view(to.shape)
        fill(place)
        event = self.start(lambda: to.copy_(place, non_blocking=True))
        self._buffers.append((buffer, event))
        return event

    def start(self, work: Callable[[], object]) -> Event:
        """Other work on the lane's line, in its turn."""
        with self.card.on(self.line):
            work()
        event: Event = self.line.record_event()
        return event

    def finish(self) -> None:
        """Waits until all is there that was sent: what it went to may then be given back."""
        self.line.synchronize()

    def arrived(self, event: Event) -> None:
        """What is started from now on by this thread finds what was sent."""
        self.card.current().wait_event(event)
