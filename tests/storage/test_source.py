"""Reading by offset, against the bytes that were written."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import random
import re
import sys
import threading
from pathlib import Path

import pytest

from mixtools import errors
from mixtools.storage.source import Source


@pytest.mark.parametrize("sizes", [[100], [10, 20, 70], [0, 1, 99], [50, 0, 0, 50], [99, 1, 0], [1] * 100])
def test_parts_read_as_one(tmp_path: Path, sizes: list[int]) -> None:
    data = random.Random(0).randbytes(100)
    paths, at = [], 0
    for number, size in enumerate(sizes):
        paths.append(tmp_path / f"part{number}")
        paths[-1].write_bytes(data[at : at + size])
        at += size
    source = Source(paths)
    assert source.size == 100
    for start in range(0, 101, 3):
        for stop in range(start, 101, 7):
            assert source.read(start, stop - start) == data[start:stop]
    for offset, size in [(0, 101), (100, 1), (101, 0), (-1, 5), (0, -1), (1 << 70, 1)]:
        with pytest.raises(errors.FormatError, match="ends too early"):
            source.read(offset, size)
    assert [entry[:2] for entry in source.fingerprint()] == [[p.name, s] for p, s in zip(paths, sizes, strict=True)]


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_system_that_must_keep_pages_reads_all_the_same(
    tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    source = Source([tmp_path / "x", tmp_path / "x"])
    source.read_once()
    assert source.read(5, 10) == b"5678901234"  # whatever this system can
    source.read_once()
    real, asked = os.preadv, []

    def preadv(file: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        asked.append(flags)
        if flags:
            raise OSError(number, os.strerror(number))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    assert source.read(5, 10) == b"5678901234"
    assert [flag != 0 for flag in asked] == [sys.platform == "linux"] * (sys.platform == "linux") + [False] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="Linux keeps what was read unless asked not to")
def test_read_once_leaves_no_page(tmp_path: Path) -> None:
    """Of a file half of which was in memory, that half stays."""
    path, half = tmp_path / "x", 4 << 20
    path.write_bytes(bytes(2 * half))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), half, half, os.POSIX_FADV_DONTNEED)
        source = Source(path)
        source.read_once()
        assert source.read(0, 2 * half) == bytes(2 * half)
        if not source._flags:
            pytest.skip("this system cannot")
        buffer = memoryview(bytearray(2 * half))
        held = os.preadv(file.fileno(), [buffer], 0, os.RWF_NOWAIT)
    assert half <= held < 1.5 * half


def test_threads_share_no_position(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(1 << 16)
    (tmp_path / "x").write_bytes(data)
    source = Source(tmp_path / "x")
    wrong: list[int] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(500):
            start = chance.randrange(1 << 16)
            size = chance.randrange((1 << 16) - start)
            if source.read(start, size) != data[start : start + size]:
                wrong.append(start)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_file_that_shrinks(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(100))
    source = Source(tmp_path / "x")
    os.truncate(tmp_path / "x", 50)
    with pytest.raises(errors.FormatError, match="shrank"):
        source.read(0, 100)


@pytest.mark.parametrize("sizes", [[30000], [10000, 20000]], ids=str)
@pytest.mark.parametrize("fetch", [False, True])
@pytest.mark.parametrize("populates", ["populates", "an older kernel", "no madvise"])
def test_mapped_is_what_is_read(
    tmp_path: Path, sizes: list[int], fetch: bool, populates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any place; what lies in two parts cannot be."""

    class Map(mmap.mmap):
        def madvise(self, *_: int) -> None:
            if populates == "no madvise":
                raise AttributeError("madvise")
            raise OSError(errno.EINVAL, "Invalid argument")

    if populates != "populates":
        monkeypatch.setattr(mmap, "mmap", Map)
    paths, content = [], random.Random(0).randbytes(sum(sizes))
    for number, size in enumerate(sizes):
        paths.append(tmp_path / str(number))
        paths[-1].write_bytes(content[sum(sizes[:number]) :][:size])
    source = Source(paths)
    for offset, size in ((0, 10000), (1, 4096), (4095, 2), (12345, 17655), (29999, 1), (10000, 0)):
        found = source.mapped(offset, size, fetch=fetch)
        assert found is not None and bytes(found) == source.read(offset, size) and found.readonly
    apart, kept = source.mapped(9000, 2000, fetch=fetch), source.mapped(12000, 9000, fetch=fetch)
    assert (apart is None) == (len(sizes) == 2)
    source.close()
    assert kept is not None and bytes(kept) == content[12000:21000]  # what was had lives on


def test_mapped_is_in_memory_once_it_was_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whole pages, as the system wants them."""

    class Map(mmap.mmap):
        def madvise(self, advice: int, first: int, size: int) -> None:
            asked.append((first, size))
            super().madvise(advice, first, size)

    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(mmap, "mmap", Map)
    if sys.platform != "linux":
        pytest.skip("looks at the system's own tables")
    (tmp_path / "x").write_bytes(bytes(range(256)) * 4096)
    source = Source(tmp_path / "x")

    def resident() -> int:
        tables = Path("/proc/self/smaps").read_text()
        return sum(int(one) for one in re.findall(rf"{tmp_path}/x\nSize:[^R]+(?:\n.*)*?\nRss: +(\d+)", tables))

    kept = source.mapped(0, 1 << 20, fetch=False)
    assert resident() < 1024
    source.mapped(4096 * 3 + 5, 4096 * 200, fetch=True)
    assert resident() >= 4 * 200 and kept is not None
    assert asked == [(4096 * 3, 4096 * 200 + 5)] or mmap.PAGESIZE != 4096


@pytest.mark.parametrize("fetch", [False, True])
def test_mapped_file_that_has_shrunk(tmp_path: Path, fetch: bool) -> None:
    (tmp_path / "x").write_bytes(bytes(10000))
    source = Source(tmp_path / "x")
    os.truncate(tmp_path / "x", 5000)
    with pytest.raises(errors.FormatError, match="shrank"):
        source.mapped(4000, 5000, fetch=fetch)
    os.truncate(tmp_path / "x", 0)
    assert Source(tmp_path / "x").mapped(0, 0, fetch=fetch) is None


def test_a_disk_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Map(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(errno.EFAULT, "Bad address")

    monkeypatch.setattr(mmap, "mmap", Map)
    (tmp_path / "x").write_bytes(bytes(10000))
    with pytest.raises(errors.InputError, match=r"cannot be read \(Bad address\)"):
        Source(tmp_path / "x").mapped(0, 5000, fetch=True)


def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(errors.InputError, match="not a regular file"):
            Source(path)
    with pytest.raises(errors.InputError, match="cannot be opened"):
        Source(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(errors.InputError, match=r"is a link that leads nowhere \(to loop\)"):
        Source(tmp_path / "loop")


def test_no_file_is_left_open(tmp_path: Path) -> None:
    (tmp_path / "x").touch()
    files = Path("/dev/fd")
    gc.collect()  # what other tests have left is not counted
    before = len(list(files.iterdir()))
    for _ in range(5):
        Source(tmp_path / "x").close()
        with pytest.raises(errors.InputError):
            Source([tmp_path / "x", tmp_path / "none"])
    assert len(list(files.iterdir())) == before
