"""Source: the bytes of one file, or of parts whose concatenation is one file, read by offset."""

from __future__ import annotations

import bisect
import errno
import mmap
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import FormatError, InputError

_POPULATE_READ = 22  # MADV_POPULATE_READ of <linux/mman.h>, since Linux 5.14
_DONTCACHE = 0x80  # RWF_DONTCACHE of <linux/fs.h>, since Linux 6.14


def missing(path: Path, otherwise: str) -> str:
    """What to say of a path that cannot be found: `otherwise`, unless it is a link, to nothing or in a circle."""
    if path.is_symlink() and not path.exists():
        return f"is a link that leads nowhere (to {path.readlink()}); fetch what it stood for again"
    return otherwise


class Source:
    """Reads with `pread`: no shared position, so any number of threads may read at once."""

    _close = staticmethod(os.close)  # names of the module are gone when an interpreter ends

    def __init__(self, paths: Path | Sequence[Path]) -> None:
        """Open one file or the parts of one, in order. Raises InputError if one cannot be opened."""
        self.paths = [paths] if isinstance(paths, Path) else list(paths)
        self.label = str(self.paths[0]) if len(self.paths) == 1 else f"{self.paths[0]}..{self.paths[-1].name}"
        self._files: list[int] = []
        self._maps: dict[int, mmap.mmap] = {}  # by the number of a part
        self._flags = 0  # of every read
        self._starts = [0]  # of each part in the concatenation, and the end
        for path in self.paths:
            try:  # without O_NONBLOCK a named pipe would wait for ever
                self._files.append(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK))
            except OSError as error:
                raise InputError(missing(path, f"cannot be opened ({error.strerror})"), file=path) from None
            status = os.fstat(self._files[-1])
            if not stat.S_ISREG(status.st_mode):
                raise InputError("is not a regular file", file=path)
            self._starts.append(self._starts[-1] + status.st_size)

    @property
    def size(self) -> int:
        return self._starts[-1]

    def fingerprint(self) -> list[list[object]]:
        """Name, size and modification time of each part: what a resumed run must find unchanged."""
        stats = [(path, os.fstat(file)) for path, file in zip(self.paths, self._files, strict=True)]
        return [[path.name, stat.st_size, stat.st_mtime_ns] for path, stat in stats]

    def read_once(self) -> None:
        """From now on leave no page in memory that was not there before, where the system can (Linux 6.14).

        For a file that will not be read again: it would push out pages that will, and in a virtual machine memory
        never used before costs several times what reading into it does.
        """
        self._flags = _DONTCACHE if sys.platform == "linux" else 0

    def read_into(self, offset: int, view: memoryview) -> None:
        """Fill `view` (bytes) from `offset`. Raises FormatError where the file ends too early."""
        done = 0
        while done < len(view):
            part = bisect.bisect_right(self._starts, offset + done) - 1
            if part >= len(self._files):
                raise FormatError("ends too early", file=self.label, expected=offset + len(view), found=self.size)
            in_part = offset + done - self._starts[part]
            room = self._starts[part + 1] - self._starts[part] - in_part
            try:
                count = os.preadv(self._files[part], [view[done : done + room]], in_part, self._flags)
            except OSError as error:
                if self._flags and error.errno in (errno.EOPNOTSUPP, errno.EINVAL):  # by this kernel or file system
                    self._flags = 0
                    continue
                raise InputError(f"cannot be read ({error.strerror})", file=self.paths[part]) from None
            if count == 0:
                raise FormatError("shrank while it was read", file=self.paths[part])
            done += count

    def read(self, offset: int, size: int) -> bytes:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise FormatError("ends too early", file=self.label, expected=offset + size, found=self.size)
        buffer = bytearray(size)
        self.read_into(offset, memoryview(buffer))
        return bytes(buffer)

    def mapped(self, offset: int, size: int, *, fetch: bool) -> memoryview | None:
        """Bytes as they lie in their file, which must not change as long as anyone looks at them: the system reads them
        when they are looked at, with `fetch` now, and gives them up when it wants the memory.

        None where a file cannot be mapped, or they lie in more than one part. Raises FormatError where the file ends
        too early, InputError where it cannot be read.
        """
        part = bisect.bisect_right(self._starts, offset) - 1
        start = offset - self._starts[part]
        if part >= len(self._files) or offset + size > self._starts[part + 1]:
            return None
        if part not in self._maps:
            try:
                self._maps[part] = mmap.mmap(self._files[part], 0, access=mmap.ACCESS_READ)
            except (OSError, ValueError):  # a file system that has no such thing; an empty file
                return None
        found = memoryview(self._maps[part])[start : start + size]
        if len(found) < size:
            raise FormatError("shrank while it was read", file=self.paths[part])
        if fetch and size:
            self._fetch(part, start, size)
        return found

    def _fetch(self, part: int, start: int, size: int) -> None:
        """A run of a mapped part into memory, in order."""
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        try:
            self._maps[part].madvise(_POPULATE_READ, first, start + size - first)
        except AttributeError:  # of a system that is not asked so
            self._look_at(part, first, start + size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise InputError(f"cannot be read ({error.strerror})", file=self.paths[part]) from None
            self._look_at(part, first, start + size)

    def _look_at(self, part: int, first: int, last: int) -> None:
        """At each page, which the system then reads."""
        sum(memoryview(self._maps[part])[first : last : mmap.PAGESIZE])

    def close(self) -> None:
        self._maps.clear()  # closed with the last who looks at them
        while self._files:
            self._close(self._files.pop())

    def __del__(self) -> None:
        self.close()
