"""The states between layers go to their file while the next layer is quantized: what is written is what was reached."""

from __future__ import annotations

import hashlib
import os
import threading
import time
import zlib
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from card import Card, OnCard
from layouts import make

import mixtools
from mixtools import errors
from mixtools.inference import stream
from mixtools.inference.lane import Lane
from mixtools.inference.states import States
from mixtools.methods.quantize import passage
from mixtools.methods.quantize.passage import Passage
from mixtools.storage.store import from_tensor

DATA = Path(__file__).parents[2] / "data"
LAYERS = 3


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dims = make.Dims(d=64, f=64, layers=LAYERS, heads=2, kv=1, hd=32, vocab=2048, experts=2)
    folder = make.write_a(tmp_path_factory.mktemp("source") / "source", dims)
    (folder / "tokenizer.model").write_bytes((DATA / "nano-mixtral" / "tokenizer.model").read_bytes())
    return folder


def quantize(source: Path, out: Path, **options: Any) -> dict[str, str]:
    """Digests of the weights."""
    mixtools.quantize(
        source, out, method="gptq", group_size=32, calibration=DATA / "text.txt", samples=4, seq_len=32, **options
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.safetensors")}


def crc(states: States) -> int:
    return zlib.crc32(from_tensor(states.rows(0, states.tokens)))


@pytest.mark.parametrize("sequential", [True, False])
def test_the_next_layer_begins_but_changes_nothing_before_they_are_written(
    tmp_path: Path, source: Path, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their file is begun only when the layer behind them is about to change them: it has to wait."""
    expected = quantize(source, tmp_path / "whole", sequential=sequential)
    changing = {layer: threading.Event() for layer in range(LAYERS)}
    reached: dict[int, int] = {}
    written: dict[int, int] = {}
    keep, write, through = Passage._keep, Passage._write, stream.Stream.through

    def kept(self: Passage, states: States) -> None:
        reached[states.layer] = crc(states)
        keep(self, states)

    def late(self: Passage, states: States, layer: int, lane: Lane | None) -> None:
        last = layer == LAYERS - 1  # the layer behind them changes nothing: no other asks for what it makes of them
        assert last or changing[layer].wait(30), "the next layer waits for the file"
        time.sleep(0.2)
        write(self, states, layer, lane)
        written[layer] = self.output.notes["states"]["crc32"]

    def carried(self: stream.Stream, layer: Any, states: States, **how: Any) -> None:
        changing[layer.index].set()
        through(self, layer, states, **how)

    monkeypatch.setattr(Passage, "_keep", kept)
    monkeypatch.setattr(Passage, "_write", late)
    monkeypatch.setattr(stream.Stream, "through", carried)
    assert quantize(source, tmp_path / "late", sequential=sequential) == expected
    assert written == reached and [*reached] == [1, 2]


def test_the_journal_names_a_file_that_is_on_the_disk(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then the file before is there, and is the one that it names."""
    fsync, write = os.fsync, Passage._write
    now: list[Passage] = []
    seen: list[int] = []

    def watched(self: Passage, states: States, layer: int, lane: Lane | None) -> None:
        now[:] = [self]
        write(self, states, layer, lane)
        assert self.output.notes["states"]["layer"] == layer == seen[-1]
        assert [path.name for path in self.output.work.glob("states.*")] == [f"states.{layer}"]

    def synced(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.name.startswith("states."):
            (here,) = now
            layer, noted = int(path.suffix[1:]), here.output.notes.get("states")
            tokens, width = sum(here.lengths), here.stream.config.hidden_size
            assert path.stat().st_size == tokens * width * here.stream.dtype.itemsize
            assert noted == (noted and {"layer": layer - 1, "crc32": zlib.crc32(here._file(layer - 1).read_bytes())})
            seen.append(layer)
        fsync(file)

    monkeypatch.setattr(Passage, "_write", watched)
    monkeypatch.setattr(passage.os, "fsync", synced)
    quantize(source, tmp_path / "out")
    assert seen == [1, 2]


@pytest.mark.parametrize("sequential", [True, False])
def test_behind_the_last_layer_they_are_for_the_head_alone(
    tmp_path: Path, source: Path, sequential: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    keep, carried = Passage._keep, []
    through = stream.Stream.through

    def watched(self: Passage, states: States) -> None:
        kept.append(states.layer)
        keep(self, states)

    def counted(self: stream.Stream, layer: Any, states: States, **how: Any) -> None:
        carried.append(layer.index)
        through(self, layer, states, **how)

    monkeypatch.setattr(Passage, "_keep", watched)
    monkeypatch.setattr(stream.Stream, "through", counted)
    quantize(source, tmp_path / "packed", sequential=sequential)
    assert kept == [1, 2] and carried == [0, 1]
    mixtools.quantize(
        source, tmp_path / "gguf", type=["Q8_0"], calibration=DATA / "text.txt", samples=2, seq_len=32,
        sequential=sequential,
    )  # fmt: skip
    assert kept[2:] == [1, 2, 3] and carried[2:] == [0, 1, 2]


@pytest.mark.parametrize("spilled", [False, True], ids=["memory", "file"])
def test_states_that_are_lent_stay_as_they_are(tmp_path: Path, spilled: bool) -> None:
    states = States([4, 3], 8, torch.float32, spill=tmp_path if spilled else None)
    states.write(0, torch.ones(7, 8))
    for act in (lambda: states.write(2, torch.zeros(3, 8)), states.close):
        reading: Future[None] = Future()
        states.lend(reading)
        before = states.rows(0, 7).clone()
        thread = threading.Thread(target=act)
        thread.start()
        thread.join(0.1)
        assert thread.is_alive() and torch.equal(states.rows(0, 7), before)
        reading.set_result(None)
        thread.join(30)
        assert not thread.is_alive()
    states = States([4], 8, torch.float32)
    reading = Future()
    reading.set_exception(errors.DiskError("full"))
    states.lend(reading)
    with pytest.raises(errors.DiskError):
        states.write(0, torch.zeros(4, 8))
    states.close()


class Line:
    """Of a GPU that is not there: what is asked of it, in order."""

    def __init__(self, log: list[Any], name: str) -> None:
        self.log, self.name = log, name

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "waits", event))

    def record_event(self) -> str:
        self.log.append((self.name, "event"))
        return f"event of {self.name}"


def test_from_a_card_they_come_on_a_line_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind all that was asked of the card before; the bytes are those of the CPU."""
    monkeypatch.setattr(passage, "_ROWS", 5)
    log: list[Any] = []
    inside: list[str] = []

    class Lines:
        def line(self) -> Line:
            return Line(log, "own")

        def current(self) -> Line:
            return Line(log, "compute")

        def on(self, line: Line) -> AbstractContextManager[None]:
            inside.append(line.name)
            return nullcontext()

    noted: dict[str, Any] = {}

    def aside(work: Any) -> Future[None]:
        log.append("begun")
        with Card():  # a thread has its own
            work()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    values = torch.randn(13, 8, generator=torch.Generator().manual_seed(0))
    files = {}
    for device in ("cpu", "cuda"):
        folder = tmp_path / device
        folder.mkdir()
        output = SimpleNamespace(work=folder, folder=folder, notes={}, aside=aside, note=noted.__setitem__)
        lane: Any = Lane(Lines()) if device == "cuda" else None  # type: ignore[arg-type]
        here: Any = SimpleNamespace(output=output, stream=SimpleNamespace(lane=lambda lane=lane: lane))
        here._file = lambda layer, folder=folder: folder / f"states.{layer}"
        here._write = lambda *given, here=here: Passage._write(here, *given)
        with Card():
            states = States([6, 7], 8, torch.float32, 2, device=device)
            states.write(0, values.to(device))
            assert isinstance(states.rows(0, 1), OnCard) is (device == "cuda")
            Passage._keep(here, states)
        files[device] = (folder / "states.2").read_bytes()
        assert noted["states"] == {"layer": 2, "crc32": zlib.crc32(files[device])}
    assert files["cuda"] == files["cpu"] == values.numpy().tobytes()
    before, own = [("compute", "event"), ("own", "waits", "event of compute")], [("own", "event")] * 3
    assert log == ["begun", *before, "begun", *own]
    assert inside == ["own"] * 3
