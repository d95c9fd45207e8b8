"""Writing so that it lasts, and what can go wrong with it."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from pathlib import Path

from ..errors import DiskError, OutputError, OutputLocked
from .source import Source
from .store import CHUNK


class DiskErrors:
    """ENOSPC and its kin as DiskError; any other OSError as OutputError."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DiskError(
                    "the disk is full; free some space and run the same command again to continue", file=self.folder
                ) from None
            raise OutputError(f"cannot be written ({error.strerror})", file=error.filename or self.folder) from None


def free_bytes(folder: Path) -> int:
    """Of the disk on which the folder lies, or will lie."""
    while not folder.exists():
        folder = folder.absolute().parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def lock(path: Path, folder: Path) -> int:
    """The open file that holds the lock. Raises OutputLocked if another process has it."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise OutputLocked("is being written by another mixtools process", file=folder) from None
    except OSError as error:
        raise OutputError(f"cannot be locked ({error.strerror})", file=folder) from None
    return file


def write_durably(path: Path, data: bytes) -> None:
    """A whole file, on the disk when this returns."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Names given and taken in the folder are on the disk when this returns."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def crc(source: Source, offset: int, size: int) -> int:
    """CRC-32 of bytes of a file."""
    buffer = memoryview(bytearray(min(size, CHUNK)))
    found = 0
    for at in range(0, size, CHUNK):
        chunk = buffer[: min(CHUNK, size - at)]
        source.read_into(offset + at, chunk)
        found = zlib.crc32(chunk, found)
    return found
