"""Writing behind: the bytes, the errors, and how much may wait in memory."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mixtools.storage import writeback
from mixtools.storage.writeback import WriteBehind

PIECE = 1 << 16
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given to the disk on Linux only")


@pytest.fixture(autouse=True)
def window(monkeypatch: pytest.MonkeyPatch) -> int:
    """Four pieces."""
    monkeypatch.setattr(writeback, "WINDOW", 4 * PIECE)
    return 4 * PIECE


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    handle = os.open(tmp_path / "x", os.O_RDWR | os.O_CREAT)
    yield handle
    os.close(handle)


def test_threads_write_each_their_own_place(file: int) -> None:
    data = random.Random(0).randbytes(40 * PIECE + 123)
    behind = WriteBehind(file)
    starts = list(range(0, len(data), PIECE))
    random.Random(1).shuffle(starts)

    def work(mine: list[int]) -> None:
        for start in mine:
            behind.write(memoryview(data)[start : start + PIECE], start)

    threads = [threading.Thread(target=work, args=(starts[number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert os.pread(file, len(data) + 1, 0) == data


@linux
def test_no_more_than_the_window_waits(file: int, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[tuple[int, int]] = []
    most = 0

    def sync(_: int, offset: int, size: int, flags: int) -> int:
        nonlocal most
        if flags == 2:
            waiting.append((offset, size))
        else:
            waiting.remove((offset, size))
        most = max(most, sum(size for _, size in waiting))
        return 0

    def drop(_: int, offset: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        assert (offset, size) not in waiting  # what is not on the disk yet cannot be dropped

    monkeypatch.setattr(writeback, "_sync_file_range", sync)
    monkeypatch.setattr(os, "posix_fadvise", drop)
    behind = WriteBehind(file)
    for number in range(20):
        behind.write(memoryview(bytes(PIECE)), number * PIECE)
    assert [offset for offset, _ in waiting] == [number * PIECE for number in range(16, 20)]
    assert most == window + PIECE  # the newest is on its way before the oldest is waited for


@linux
def test_pages_leave_the_memory(file: int) -> None:
    behind = WriteBehind(file)
    for number in range(64):
        behind.write(memoryview(bytes(PIECE)), number * PIECE)
    assert _in_memory(file, 60 * PIECE) < 30 * PIECE / 4096


def _in_memory(file: int, size: int) -> int:
    """Pages of the file's first bytes that are in memory, by mincore(2): to read them would fetch the next ones."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(3 * [ctypes.c_int]), ctypes.c_int64)
    libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
    libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file, 0)
    there = ctypes.create_string_buffer(-(-size // mmap.PAGESIZE))
    assert libc.mincore(address, size, there) == 0, os.strerror(ctypes.get_errno())
    libc.munmap(address, size)
    return sum(page & 1 for page in there.raw)


@linux
@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
def test_a_system_that_cannot_is_asked_once(file: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(writeback, "_sync_file_range", lambda *call: asked.append(call) or number)
    behind = WriteBehind(file)
    for start in range(10):
        behind.write(memoryview(b"ab"), 2 * start)
    assert os.pread(file, 100, 0) == b"ab" * 10
    assert len(asked) <= 2


@linux
def test_what_the_disk_could_not_take_is_told(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync would be silent: a file handle is told of a failure once."""
    monkeypatch.setattr(writeback, "_sync_file_range", lambda *call: errno.EIO if call[3] == 7 else 0)
    behind = WriteBehind(file)
    for number in range(4):
        behind.write(memoryview(bytes(PIECE)), number * PIECE)
    with pytest.raises(OSError, match="Input/output error") as caught:
        behind.write(memoryview(bytes(PIECE)), 4 * PIECE)
    assert caught.value.errno == errno.EIO


@linux
def test_the_system_call_gives_error_numbers(file: int) -> None:
    os.pwrite(file, b"abc", 0)
    assert writeback._sync_file_range(file, 0, 3, 7) in (0, errno.ENOSYS)
    reader, writer = os.pipe()
    assert writeback._sync_file_range(reader, 0, 3, 7) in (errno.ESPIPE, errno.ENOSYS)
    os.close(reader)
    os.close(writer)
    assert writeback._sync_file_range(reader, 0, 3, 7) in (errno.EBADF, errno.ENOSYS)
