"""A format that mixtools does not have: one class, and checkpoints that hold it can be read, checked and converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from layouts import make
from safetensors.torch import load_file
from torch import Tensor

from mixtools import conversion, formats, job
from mixtools.errors import LayoutError, TensorError
from mixtools.formats import Packed, Part, Stored
from mixtools.layouts import checkpoint as readers
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import EXPERT, Slot
from mixtools.storage.dtypes import DType

DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)


@dataclass(frozen=True)
class RowInt8:
    """An int8 code a value and an fp32 scale a row."""

    dtype: DType

    name: ClassVar[str] = "row-int8"
    suffixes: ClassVar[tuple[str, ...]] = ("codes", "scales")

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        codes, scales = self.suffixes
        return (Part(codes, DType.I8, shape), Part(scales, DType.F32, shape[:1]))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        codes, scales = parts
        return (codes.float() * scales[:, None]).to(self.dtype.torch())

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        return 2 * DType.F32.nbytes(shape)

    def fragment(self) -> Mapping[str, Any]:
        return {"quantization_config": {"quant_method": self.name}}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> RowInt8 | None:
        return cls(DType.BF16) if cls.suffixes[0] in stored else None

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return quantization.get("quant_method") == cls.name


def encode(weight: Tensor, kind: type[RowInt8] = RowInt8) -> Packed:
    scales = weight.float().abs().amax(1) / 127
    codes = (weight.float() / scales[:, None]).round().to(torch.int8)
    return Packed(kind(DType.BF16), (codes, scales))


def known(monkeypatch: pytest.MonkeyPatch, kind: type[RowInt8]) -> None:
    """As if it stood in the room's list."""
    suffixes = (*formats.SUFFIXES, *kind.suffixes)
    monkeypatch.setattr(formats, "FORMATS", (*formats.FORMATS, kind))
    monkeypatch.setattr(formats, "SUFFIXES", suffixes)
    monkeypatch.setattr(readers, "SUFFIXES", suffixes)


def write(folder: Path, kind: type[RowInt8]) -> Path:
    """The experts of a small model in that format, a unit for each expert's three matrices."""
    source = open_checkpoint(make.write_a(folder / "a", DIMS))
    experts = [[Slot(role, layer, e) for role in EXPERT] for layer in range(DIMS.layers) for e in range(DIMS.experts)]
    work = [
        conversion.Work(tuple(slots), lambda _, slots=slots: (encode(source.read(slot), kind) for slot in slots))
        for slots in experts
    ]
    planned = {slot: kind(DType.BF16) for slots in experts for slot in slots}
    changes = conversion.Changes(planned, lambda _: work)
    job.run(conversion.plan_hf(source, conversion.Options(), changes), folder / "q")
    return folder / "q"


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    known(monkeypatch, RowInt8)
    return write(tmp_path, RowInt8)


def test_it_is_written_read_and_made_dense_again(written: Path, tmp_path: Path) -> None:
    source, found = open_checkpoint(tmp_path / "a"), open_checkpoint(written)
    stored = load_file(written / "model.safetensors")
    for slot in found.slots():
        weight = source.read(slot)
        if slot.expert is None:
            assert torch.equal(found.read(slot), weight)
            continue
        assert found.format(slot) == RowInt8(DType.BF16)
        assert torch.equal(found.read(slot), encode(weight).dense)
        name = f"model.layers.{slot.layer}.block_sparse_moe.experts.{slot.expert}.{slot.role.value}"
        assert stored[f"{name}.codes"].dtype == torch.int8
        assert f"{name}.weight" not in stored
    job.run(conversion.plan_hf(found, conversion.Options()), tmp_path / "dense")
    dense = open_checkpoint(tmp_path / "dense")
    assert all(torch.equal(dense.read(slot), found.read(slot)) for slot in dense.slots())
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()


def test_without_the_format_the_folder_is_refused(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(LayoutError, match=r"quantized \(row-int8\)"):
        open_checkpoint(written)


@pytest.mark.parametrize(("suffix", "tensor"), [("codes", torch.zeros(12, 8)), ("scales", torch.zeros(11))])
def test_a_misfit_is_named(written: Path, suffix: str, tensor: Tensor) -> None:
    name = f"model.layers.0.block_sparse_moe.experts.0.w1.{suffix}"
    tensors = load_file(written / "model.safetensors") | {name: tensor}
    (written / "mixtools.json").unlink()
    make.save_file(tensors, written / "model.safetensors")
    with pytest.raises(TensorError, match="wrong (dtype|shape)") as caught:
        open_checkpoint(written)
    assert caught.value.tensor == name


def test_a_method_that_makes_another_format_than_planned_is_our_fault(tmp_path: Path) -> None:
    source = open_checkpoint(make.write_a(tmp_path / "a", DIMS))
    slot = Slot(EXPERT[0], 0, 0)
    work = [conversion.Work((slot,), lambda _: [encode(source.read(slot))])]
    planned = conversion.plan_hf(source, conversion.Options(), conversion.Changes(work=lambda _: work))
    with pytest.raises(Exception, match="is not what was planned"):
        job.run(planned, tmp_path / "q")
    assert not (tmp_path / "q" / "config.json").exists()
