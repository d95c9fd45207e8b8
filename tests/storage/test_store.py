"""Checksums judged through views, shared storages, partial and resumed reading; and never a byte read twice."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from storage import zips

from mixtools import errors
from mixtools.storage.source import Source
from mixtools.storage.store import CHUNK, Store, by_name
from mixtools.storage.torchzip import read_header


class Counting(Source):
    """Counts the bytes that are read."""

    count = 0

    def read_into(self, offset: int, view: memoryview) -> None:
        self.count += len(view)
        super().read_into(offset, view)


def open_store(path: Path, tensors: dict[str, torch.Tensor], flip: int | None = None) -> tuple[Store, Counting]:
    """A store of these tensors; `flip` is the byte of the first storage in which a bit is flipped."""
    raw = bytearray(zips.saved(tensors))
    if flip is not None:
        path.write_bytes(raw)
        entry = next(iter(read_header(Source(path))))
        assert entry.record is not None
        raw[entry.record.offset + flip] ^= 4
    path.write_bytes(raw)
    source = Counting(path)
    store = Store(by_name(read_header(source)))
    source.count = 0
    return store, source


def test_finish_reads_nothing_twice(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(10, 4), "b": torch.ones(7)}
    store, source = open_store(tmp_path / "x", tensors)
    for start in range(0, 10, 3):
        store.read_rows("a", start, min(10, start + 3))
    store.read_rows("b", 0, 1)
    store.finish()
    store.finish()
    assert source.count == (40 + 7) * 4


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
def test_rows_in_any_order(tmp_path: Path, order: str) -> None:
    rows = list(range(20))
    if order != "forward":
        rows.reverse() if order == "backward" else random.Random(0).shuffle(rows)
    tensor = torch.arange(100.0).reshape(20, 5)
    good, _ = open_store(tmp_path / "good", {"a": tensor})
    for row in rows:
        assert good.read_rows("a", row, row + 1).view("f4").tolist() == tensor[row : row + 1].tolist()
    bad, _ = open_store(tmp_path / "bad", {"a": tensor}, flip=50)
    for row in rows[:-1]:
        bad.read_rows("a", row, row + 1)
    with pytest.raises(errors.ChecksumError, match="stored checksum") as caught:
        bad.read_rows("a", rows[-1], rows[-1] + 1)
    assert (caught.value.tensor, caught.value.file) == ("a", str(tmp_path / "bad"))


def test_judged_anew_at_every_reading(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "x", {"a": torch.ones(4, 4)}, flip=0)
    for _ in range(3):
        with pytest.raises(errors.ChecksumError):
            store.read_rows("a", 0, 4)


@pytest.mark.parametrize("flip", [0, 200, 396])
def test_view_of_a_larger_storage(tmp_path: Path, flip: int) -> None:
    """What no tensor shows of a storage counts for its checksum as well."""
    whole = torch.arange(100.0)
    store, source = open_store(tmp_path / "x", {"a": whole[40:60]}, flip)
    store.read_rows("a", 0, 1)
    with pytest.raises(errors.ChecksumError):
        store.finish()
    assert source.count == 400


def test_shared_storage(tmp_path: Path) -> None:
    whole = torch.arange(100.0)
    tensors = {"a": whole[:50], "b": whole[30:], "c": whole, "d": whole[::2]}
    store, _ = open_store(tmp_path / "good", tensors)
    for name, tensor in tensors.items():
        assert store.read_rows(name, 0, 1).view("f4").tolist() == [tensor.tolist()]
    store.finish()
    store, _ = open_store(tmp_path / "bad", tensors, flip=160)
    store.read_rows("a", 0, 1)
    store.read_rows("b", 0, 1)
    with pytest.raises(errors.ChecksumError):
        store.finish()


def test_earlier_reading_is_judged_now(tmp_path: Path) -> None:
    """A resumed run that has nothing left to read of a stacked tensor must not let its damage pass."""
    store, source = open_store(tmp_path / "x", {"a": torch.ones(4, 4)}, flip=0)
    store.finish()
    assert source.count == 0
    with pytest.raises(errors.ChecksumError):
        store.finish(also=["a"])
    store.read_rows("a", 2, 4)
    with pytest.raises(errors.ChecksumError):
        store.finish(also=["a"])


def test_transposed_is_checked(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    store, _ = open_store(tmp_path / "x", {"a": tensor})
    assert store.read_rows("a", 1, 3).view("f4").tolist() == tensor[1:3].tolist()
    store, _ = open_store(tmp_path / "y", {"a": tensor}, flip=7)
    with pytest.raises(errors.ChecksumError):
        store.read_rows("a", 1, 3)


def test_out_is_used(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "x", {"a": torch.arange(12.0).reshape(3, 4)})
    out = np.empty((2, 4), "u4")
    assert store.read_rows("a", 1, 3, out=out) is out
    assert out.view("f4").tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("flip", [None, 0, CHUNK - 1, CHUNK, 2 * CHUNK + 100])
def test_longer_than_a_chunk(tmp_path: Path, flip: int | None) -> None:
    """Read whole, in runs of rows, and by `finish`: each longer than what is read and summed at once."""
    tensor = torch.arange((2 * CHUNK + 400) // 4, dtype=torch.int32).reshape(-1, 4)
    rows = len(tensor)
    for ends in ([rows], [rows - 3, rows], [1]):
        store, source = open_store(tmp_path / "x", {"a": tensor}, flip)
        with pytest.raises(errors.ChecksumError) if flip is not None else contextlib.nullcontext():
            read = [store.read_rows("a", start, stop) for start, stop in zip([0, *ends], ends, strict=False)]
            store.finish()
            assert np.array_equal(np.concatenate(read).view("i4"), tensor[: ends[-1]])
        assert source.count == tensor.nbytes


@pytest.mark.parametrize("fetch", [False, True])
@pytest.mark.parametrize("flip", [None, 5 * 4000 + 3])
def test_mapped_rows_are_checked_as_those_that_are_read(tmp_path: Path, fetch: bool, flip: int | None) -> None:
    """Runs of rows, of more than a chunk; once all of a record was looked at it is judged, and nothing is read."""
    tensors = {"a": torch.arange(1000 * 2000.0).view(2000, 1000), "b": torch.ones(7)}
    store, source = open_store(tmp_path / "x", tensors, flip)
    first = store.mapped_rows("a", 3, 2000, fetch=fetch)
    assert first is not None and not first.flags.writeable
    if flip is None:
        assert first.view(np.float32).tobytes() == tensors["a"][3:].numpy().tobytes()
        second = store.mapped_rows("a", 0, 3, fetch=fetch)
        assert second is not None and second.view(np.float32)[2, 7] == 2007
    else:
        with pytest.raises(errors.ChecksumError, match="the file is damaged"):
            store.mapped_rows("a", 0, 3, fetch=fetch)
    store.finish()
    assert source.count == 0


def test_strided_rows_are_not_mapped(tmp_path: Path) -> None:
    store, _ = open_store(tmp_path / "x", {"a": torch.ones(30, 4).t()})
    assert store.mapped_rows("a", 0, 4, fetch=True) is None
