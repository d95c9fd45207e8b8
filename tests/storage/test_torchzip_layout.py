"""Zips that we plan, read by zipfile and torch; also beyond 4 GiB, where every number needs its wide field."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from storage import zips

from mixtools.storage import torchzip
from mixtools.storage.crc import combine
from mixtools.storage.dtypes import ELEMENTS, DType
from mixtools.storage.source import Source
from mixtools.storage.store import Store, by_name
from mixtools.storage.torchzip import read_header
from mixtools.storage.torchzip_layout import ZipPlan

SHAPES = st.lists(st.tuples(st.sampled_from(ELEMENTS), st.lists(st.integers(0, 9), max_size=3)), max_size=6)


def filled(plan: ZipPlan, data: dict[str, bytes]) -> bytes:
    out = bytearray(plan.size)
    patches = plan.seal({name: zlib.crc32(raw) for name, raw in data.items()})
    for offset, raw in [*zip(plan.offsets, data.values(), strict=True), *patches]:
        out[offset : offset + len(raw)] = raw
    assert len(out) == plan.size
    return bytes(out)


@given(
    SHAPES, st.sampled_from(["consolidated.00", "x", "pytorch_model-00001-of-00002"]), st.randoms(use_true_random=False)
)
def test_read_by_others(shapes: list[tuple[DType, list[int]]], root: str, chance) -> None:
    tensors = [(f"layer.{i}.ü", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)]
    data = {
        name: bytes(chance.randrange(2) for _ in range(torch.Size(shape).numel() * dtype.itemsize))
        for name, dtype, shape in tensors
    }
    plan = ZipPlan(root, tensors)
    raw = filled(plan, data)
    assert all(offset % 64 == 0 for offset in plan.offsets)
    archive = zipfile.ZipFile(io.BytesIO(raw))
    assert archive.testzip() is None
    assert {name.partition("/")[0] for name in archive.namelist()} == {root}
    for mmap in (False, True):
        found = load(raw, mmap)
        assert list(found) == [name for name, _, _ in tensors]
        for name, dtype, shape in tensors:
            assert (found[name].dtype, tuple(found[name].shape)) == (dtype.torch(), shape)
            assert found[name].reshape(-1).view(torch.uint8).numpy().tobytes() == data[name]


def load(raw: bytes, mmap: bool) -> dict[str, torch.Tensor]:
    if not mmap:
        return torch.load(io.BytesIO(raw), weights_only=True)
    file = os.memfd_create("x")
    try:
        os.write(file, raw)
        return torch.load(f"/proc/self/fd/{file}", weights_only=True, mmap=True)
    finally:
        os.close(file)


def crc_of_zeros(size: int) -> int:
    crc, block = zlib.crc32(b""), zlib.crc32(bytes(1 << 20))
    for _ in range(size >> 20):
        crc = combine(crc, block, 1 << 20)
    return combine(crc, zlib.crc32(bytes(size & 0xFFFFF)), size & 0xFFFFF)


@pytest.mark.parametrize("giant", [(1 << 32) - 64, (1 << 32) + 2, 9 << 30])
def test_beyond_4_gib(tmp_path: Path, giant: int) -> None:
    """A sparse file: a giant of zeros, and a tensor behind it."""
    tail = torch.arange(1000.0)
    tensors = [("giant", DType.U8, (giant,)), ("tail", DType.F32, (1000,))]
    plan = ZipPlan("consolidated.00", tensors)
    crcs = {"giant": crc_of_zeros(giant), "tail": zlib.crc32(tail.numpy().tobytes())}
    path = tmp_path / "consolidated.00.pth"
    with path.open("wb") as file:
        file.truncate(plan.size)
        for offset, raw in [(plan.offsets[1], tail.numpy().tobytes()), *plan.seal(crcs)]:
            file.seek(offset)
            file.write(raw)
    assert path.stat().st_size == plan.size > 1 << 32
    with zipfile.ZipFile(path) as archive:
        assert archive.getinfo("consolidated.00/data/0").file_size == giant
        assert archive.read("consolidated.00/data/1") == tail.numpy().tobytes()
    found = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(found["tail"], tail)
    assert found["giant"].shape == (giant,)
    store = Store(by_name(read_header(Source(path))))
    assert store.read_rows("tail", 0, 1).view("f4").tobytes() == tail.numpy().tobytes()
    assert store.entries["giant"].shape == (giant,)
    assert store.entries["tail"].offset == plan.offsets[1]


def test_zipfile_beyond_4_gib_is_read(tmp_path: Path) -> None:
    """Zip64 as zipfile lays it out: wide fields only where they are needed."""

    class Holes(io.FileIO):
        """Leaves zeros out, so that the file is sparse."""

        def write(self, data) -> int:
            if len(data) >= 1 << 20 and not any(data[:64]):
                self.seek(len(data), os.SEEK_CUR)
                return len(data)
            return super().write(data)

    path, block = tmp_path / "x.pth", bytes(64 << 20)
    pickle = zips.state(
        giant=zips.tensor(zips.storage("ByteStorage", "0", 65 << 26), 0, (65 << 26,), (1,)),
        tail=zips.tensor(zips.storage("FloatStorage", "1", 6), 0, (6,), (1,)),
    )
    tail = torch.arange(6.0)
    with Holes(path, "w+") as file, zipfile.ZipFile(file, "w") as archive:
        with archive.open("archive/data/0", "w", force_zip64=True) as member:
            for _ in range(65):
                member.write(block)
        archive.writestr("archive/data/1", tail.numpy().tobytes())
        archive.writestr("archive/data.pkl", pickle)
    assert path.stat().st_size > 1 << 32
    store = Store(by_name(read_header(Source(path))))
    assert store.entries["tail"].offset > 1 << 32
    assert store.read_rows("tail", 0, 1).view("f4").tobytes() == tail.numpy().tobytes()


def test_no_member_has_a_date() -> None:
    """The first day that a zip can tell: the same bytes whenever they are written."""
    plan = ZipPlan("x", [("t", DType.F32, (2, 2))])
    raw = filled(plan, {"t": bytes(16)})
    assert {member.date_time for member in zipfile.ZipFile(io.BytesIO(raw)).infolist()} == {(1980, 1, 1, 0, 0, 0)}


@pytest.mark.parametrize("before", [b"", struct.pack("<2H5x", 0x5455, 5), struct.pack("<2H", 9, 0) * 3])
def test_the_64_bit_sizes_stand_behind_other_fields_too(before: bytes) -> None:
    assert torchzip._zip64(before + struct.pack("<2H2Q", 1, 16, 1 << 40, 7)) == [1 << 40, 7]
    assert torchzip._zip64(before) == []
