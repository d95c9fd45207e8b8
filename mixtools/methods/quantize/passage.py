"""From layer to layer: the states that a calibrated run has reached, kept through kills.

    layer i ─► quantized, written ─► its rows of the report, states before layer i + 1 (a file of the work folder)

A run that goes on begins with the last states that are there: the same bits, whatever `--jobs`. A layer is quantized
again where its regions were written but the states behind it were not: their file is written while the next layer is
quantized, and named in the journal once it is on the disk.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import MixtoolsError, TensorError
from ...formats import Packed
from ...inference.arriving import Arriving
from ...inference.lane import Lane
from ...inference.states import States
from ...inference.stream import Stream
from ...layouts.checkpoint import Checkpoint
from ...machine import give_back_memory
from ...names import Slot, layer_slots
from ...ops import library
from ...storage import disk
from ...storage.output import Output
from ...storage.store import Bits, as_bytes, from_tensor
from .clock import Clock
from .layer import HeadWork, LayerWork
from .worker import Method, Row, Stored, Worker

_ROWS = 4096  # of states that are moved at a time
_NOTE = "states"


class Room(NamedTuple):
    """What memory is spent on, which changes no byte. `spilled`: hidden states lie in a file; `experts` in step;
    `ahead`: the next layer is read while one is quantized.
    """

    spilled: bool = False
    experts: int = 1
    ahead: bool = False


class Passage:
    """Layers are asked for in order; one that was asked for before is run again from the start."""

    def __init__(
        self, source: Checkpoint, stream: Stream, method: Method, sequences: tuple[Tensor, ...], output: Output, *,
        head: bool, room: Room,
    ) -> None:  # fmt: skip
        """`head`: whether it will be asked for, behind all layers."""
        self.source, self.stream, self.method, self.sequences, self.output = source, stream, method, sequences, output
        self.lengths = [len(ids) for ids in sequences]
        self.room, self.pass_tokens = room, stream.plan(self.lengths).pass_tokens
        self._last = stream.config.num_layers - (0 if head else 1)  # layer, or head, whose inputs are states
        self._states: States | None = None
        self._coming: tuple[int, Iterator[Arriving]] | None = None  # the layer that the next one read is

    def layer(self, index: int) -> Iterator[Packed]:
        """The layer's slots as they are stored, in order. Raises as LayerWork.run, and DiskError."""
        states = self._before(index)
        onward = index < self._last
        for _, packed in self._quantized(index, states, onward=onward):
            yield packed
        if onward:
            self._keep(states)

    def head(self) -> Iterator[Packed]:
        """Final norm and head."""
        states, clock = self._before(self.stream.config.num_layers), Clock(self.stream.device)
        work = HeadWork(self.stream, self.method, partial(self._read, None), clock)
        with self._named():
            for _, packed in self._told("head", work, work.run(states), 2):
                yield packed

    def close(self) -> None:
        """Give memory and disk back."""
        if self._states is not None:
            self._states.close()
        self._states, self._coming = None, None

    # --- layers ---

    def _before(self, index: int) -> States:
        if self._states is None:
            self._states = self._restored(index)
        if self._states is None or self._states.layer > index:
            self.close()
            self._states = self.stream.embed(self.sequences, spilled=self.room.spilled)
        while self._states.layer < index:
            for _ in self._quantized(self._states.layer, self._states, onward=True):
                pass
            self._keep(self._states)
        return self._states

    def _quantized(self, index: int, states: States, *, onward: bool) -> Iterator[Stored]:
        for layer in self._read_layers(index):
            clock = Clock(self.stream.device)
            with clock("reading"):
                layer.finish()
                self._expect_finite(layer)
            read = partial(self._read, layer)
            work = LayerWork(self.stream, layer, self.method, read, clock, together=self.room.experts)
            slots = len([*layer_slots(index, self.stream.config.num_experts)])
            with self._named():
                yield from self._told(str(index), work, work.run(states, self.pass_tokens, onward=onward), slots)

    def _read_layers(self, index: int) -> Iterator[Arriving]:
        """One layer; where there is room, those behind it follow meanwhile."""
        if not self.room.ahead:
            yield from self.stream.layers(index, index + 1, double=False)
            return
        last = self.stream.config.num_layers
        following = self._coming[1] if self._coming and self._coming[0] == index else self.stream.layers(index, last)
        self._coming = index + 1, following
        yield next(following)
        if index + 1 == last:
            self._coming = None

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Errors within name the source."""
        try:
            yield
        except MixtoolsError as error:
            error.file = error.file or str(self.source.place)
            raise

    def _told(self, name: str, work: Worker, stored: Iterator[Stored], count: int) -> Iterator[Stored]:
        """What is stored, told of before the last of it is: to a layer that is written no run comes back. Then once
        more, with all of its seconds."""
        for number, one in enumerate(stored, 1):
            if number == count:
                self._tell(name, work)
            yield one
        self._tell(name, work)

    def _tell(self, name: str, work: Worker) -> None:
        rows = [{"slot": [slot.role.value, slot.layer, slot.expert], **row} for slot, row in work.rows.items()]
        seconds = {stage: round(found, 4) for stage, found in work.clock.seconds.items()}
        self.output.note(f"quantized.{name}", {"rows": rows, "told": _plain(work.told), "seconds": seconds})

    def _read(self, layer: Arriving | None, slot: Slot) -> Tensor:
        """As the source has it; from the layer, where it lies there unchanged and has not been quantized yet."""
        if layer is not None and self.source.spec(slot).dtype.torch() == self.stream.dtype:
            return layer.weight(slot).to(torch.float32, copy=True)
        weight = self.source.read(slot)
        if (bad := library.nonfinite(weight, torch.get_num_threads())) >= 0:
            raise self._not_finite(slot, weight.flatten()[bad], divmod(bad, weight.shape[-1]))
        return weight.to(self.stream.device).float()  # widened there: half the bytes on their way to a GPU

    def _expect_finite(self, layer: Arriving) -> None:
        """Before anything runs through them: what is no number in a weight is told by its own name."""
        for slot in layer_slots(layer.index, self.stream.config.num_experts):
            weight = layer.weight(slot)
            if not bool(torch.isfinite(weight).all()):
                bad = int((~torch.isfinite(weight.flatten())).nonzero()[0])
                raise self._not_finite(slot, weight.flatten()[bad], divmod(bad, weight.shape[-1]))

    def _not_finite(self, slot: Slot, value: Tensor, place: tuple[int, int]) -> TensorError:
        entry = self.source.entry(slot)
        why = f"holds {float(value)} at [{place[0]}, {place[1]}]; it cannot be quantized"
        return TensorError(why, file=entry.source.label, tensor=entry.name)

    # --- states ---

    def _file(self, layer: int) -> Path:
        return self.output.work / f"states.{layer}"

    def _keep(self, states: States) -> None:
        """Begin to write the states, and drop what their layer left in memory.

        No copy is made: the next layer changes them last, and waits until then (States.lend).
        """
        lane = self.stream.lane()
        if lane is not None:
            lane.after(lane.free())
        states.lend(self.output.aside(partial(self._write, states, states.layer, lane)))
        give_back_memory()

    def _write(self, states: States, layer: int, lane: Lane | None) -> None:
        """Write the states and note them; those before are dropped. From a GPU they come beside what it computes."""
        path, crc = self._file(layer), 0
        with disk.DiskErrors(self.output.folder):
            with path.open("wb") as file:
                for start in range(0, states.tokens, _ROWS):
                    data = as_bytes(_taken(states.rows(start, min(start + _ROWS, states.tokens)), lane))
                    crc = zlib.crc32(data, crc)
                    file.write(data)
                file.flush()
                os.fsync(file.fileno())
            before = self.output.notes.get(_NOTE)
            self.output.note(_NOTE, {"layer": layer, "crc32": crc})
            if before is not None and before["layer"] != layer:
                self._file(before["layer"]).unlink(missing_ok=True)

    def _restored(self, index: int) -> States | None:
        """What an earlier run reached; None where there is nothing whole, or only what is past the layer."""
        noted = self.output.notes.get(_NOTE)
        if noted is None or noted["layer"] > index or not (path := self._file(noted["layer"])).is_file():
            return None
        width = self.stream.config.hidden_size
        states, crc = self.stream.states(self.lengths, noted["layer"], spilled=self.room.spilled), 0
        with path.open("rb") as file:
            for start in range(0, states.tokens, _ROWS):
                rows = torch.empty(min(_ROWS, states.tokens - start), width, dtype=self.stream.dtype)
                data = as_bytes(from_tensor(rows))
                if file.readinto(data) != len(data):
                    break
                crc = zlib.crc32(data, crc)
                states.write(start, rows)
        if crc == noted["crc32"]:
            return states
        states.close()
        return None


def _taken(rows: Tensor, lane: Lane | None) -> Bits:
    """In the CPU's memory; from a GPU by the lane."""
    if lane is None:
        return from_tensor(rows)
    taken: list[Bits] = []
    lane.start(lambda: taken.append(from_tensor(rows)))
    return taken[0]


def _plain(told: Row) -> dict[str, Any]:
    """Ready for JSON."""
    return {name: {str(key): part for key, part in value.items()} if isinstance(value, dict) else value
            for name, value in told.items()}  # fmt: skip
