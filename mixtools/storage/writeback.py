"""Writing behind: what was written goes to the disk, and out of memory, while the next is made."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
import threading
from collections import deque

from .digest import Digest, drop

WINDOW = 32 << 20  # bytes of a file that may be on their way; a few blocks of each thread
_WRITE, _WRITE_AND_WAIT = 2, 7  # of <linux/fs.h>: SYNC_FILE_RANGE_WRITE; that and WAIT_BEFORE and WAIT_AFTER
_UNSUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ESPIPE)


class WriteBehind:
    """Writes into one file, for any number of threads.

    One write at a time: the kernel would let the threads spin for the file's lock (a quarter of the time of two). And
    no more than WINDOW bytes in memory: an output larger than memory would push all else out of it, and in a virtual
    machine a page that was never used costs several times what copying into it does. Where the system cannot do it
    (it takes Linux), pages are written whenever it sees fit.
    """

    def __init__(self, file: int, digest: Digest | None = None) -> None:
        """`digest` is told what was written; pages that it has yet to read stay in memory."""
        self.file, self.digest = file, digest
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, int]] = deque()  # offset, size; given to the disk, the oldest first
        self._size = 0
        self._supported = sys.platform == "linux"

    def write(self, data: memoryview, offset: int) -> None:
        """Raises OSError, also for earlier data: what the disk could not take is told here or by fsync, but once."""
        with self._lock:
            write_all(self.file, data, offset)
        if self.digest is not None:
            self.digest.wrote(offset, offset + len(data))
        if not self._supported:
            return
        self._sync(offset, len(data), _WRITE)
        for start, size in self._due(offset, len(data)):
            self._sync(start, size, _WRITE_AND_WAIT)
            if self.digest is None or start + size <= self.digest.position:
                drop(self.file, start, size)

    def _due(self, offset: int, size: int) -> list[tuple[int, int]]:
        with self._lock:
            self._waiting.append((offset, size))
            self._size += size
            due = []
            while self._size > WINDOW:
                due.append(self._waiting.popleft())
                self._size -= due[-1][1]
            return due

    def _sync(self, offset: int, size: int, flags: int) -> None:
        number = _sync_file_range(self.file, offset, size, flags)
        if number in _UNSUPPORTED:
            self._supported = False
        elif number:
            raise OSError(number, os.strerror(number))


def write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(file, data, offset)
        data, offset = data[count:], offset + count


def _sync_file_range(file: int, offset: int, size: int, flags: int) -> int:
    """The system call, which Python has no name for: 0 or an error number."""
    call = ctypes.CDLL(None, use_errno=True).sync_file_range
    call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return ctypes.get_errno() if call(file, offset, size, flags) else 0
