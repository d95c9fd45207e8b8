"""What a card's memory is spent on, here on a CPU: layers read ahead, experts in step; no byte is another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from methods.quantize.test_calibrated import NANO, SMALL, KilledError, dies, small

import mixtools
from mixtools.inference.arriving import Arriving
from mixtools.methods.quantize import asked, gguf_verb, packed_verb, passage
from mixtools.methods.quantize.passage import Room
from mixtools.methods.quantize.results import Quantized

__all__ = ["small"]  # a fixture

GROUPS: dict[str, Any] = {"method": "gptq", "group_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq"}, "gguf": {"type": ["Q4_K_M"]}, "nearest": {"method": "awq", "rounding": "nearest"},
    "parallel": {"method": "awq", "sequential": False},
}  # fmt: skip


def with_room(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    plain = asked.needs
    for module in (asked, packed_verb):
        monkeypatch.setattr(module, "needs", lambda *given: replace(plain(*given), room=room))
    assert gguf_verb.__dict__.get("needs") is None  # which takes it where it lies


def weights(out: Path) -> list[bytes]:
    return [file.read_bytes() for end in ("safetensors", "gguf") for file in sorted(out.glob(f"*.{end}"))]


def quantize(out: Path, name: str) -> list[bytes]:
    done = mixtools.quantize(NANO, out, **SMALL, **KINDS[name])
    assert isinstance(done, Quantized) and not list(out.glob(".mixtools/states*"))
    return weights(out)


@pytest.mark.parametrize("name", KINDS)
def test_it_changes_no_byte(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantize(tmp_path / "plain", name)
    told: list[tuple[str, int]] = []
    read_ahead, quantized = Arriving.read_ahead, passage.Passage._quantized

    def read(self: Arriving, reader: Any, index: int, *more: Any) -> None:
        told.append(("read", index))
        read_ahead(self, reader, index, *more)

    def made(self: passage.Passage, index: int, *more: Any, **how: Any) -> Any:
        for number, stored in enumerate(quantized(self, index, *more, **how)):
            if not number:
                told.append(("begun", index))
            yield stored

    monkeypatch.setattr(Arriving, "read_ahead", read)
    monkeypatch.setattr(passage.Passage, "_quantized", made)
    with_room(monkeypatch, Room(experts=3, ahead=True))
    assert expected and quantize(tmp_path / "out", name) == expected
    assert told == [("read", 0), ("read", 1), ("begun", 0), ("begun", 1)]


def test_a_layer_that_is_asked_for_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And behind the last, no layer's memory is held."""
    expected = quantize(tmp_path / "plain", "gguf")
    layer, seen = passage.Passage.layer, []

    def twice(self: passage.Passage, index: int) -> Any:
        begun = layer(self, index)
        next(begun)
        yield from layer(self, index)
        seen.append((self, self._coming))

    monkeypatch.setattr(passage.Passage, "layer", twice)
    with_room(monkeypatch, Room(ahead=True))
    assert quantize(tmp_path / "out", "gguf") == expected
    coming = [coming for _, coming in seen]
    assert coming[0] is not None and coming[-1] is None


def test_killed_anywhere_it_goes_on(tmp_path: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_room(monkeypatch, Room(experts=2, ahead=True))
    kills = 0
    expected = weights(mixtools.quantize(small, tmp_path / "whole", **SMALL, **GROUPS).output)
    for at in range(3, 1000, 34):
        out = tmp_path / f"killed-{at}"
        with monkeypatch.context() as patch:
            dies(patch, at)
            try:
                mixtools.quantize(small, out, **SMALL, **GROUPS)
            except KilledError:
                kills += 1
            else:
                break
        assert weights(mixtools.quantize(small, out, **SMALL, **GROUPS).output) == expected
    assert kills > 4
