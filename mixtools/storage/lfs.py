"""Git LFS pointers: the few lines of text that lie in a file's place where `git clone` fetched no large files.

Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md, which bounds a pointer to 1024 bytes.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import FormatError, InputError

START = b"version https://git-lfs.github.com/spec/v1"
_LARGEST = 1024


def refuse(start: bytes, file: str | Path) -> None:
    """Raises FormatError if a file that begins with `start` is a pointer."""
    if start.startswith(START):
        why = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository"
        raise FormatError(why, file=file)


def refuse_file(path: Path) -> None:
    """As `refuse`, of a file that may not be there. Raises InputError if it cannot be read."""
    try:
        if path.is_file() and path.stat().st_size <= _LARGEST:  # a named pipe would wait for ever
            with path.open("rb") as file:
                refuse(file.read(len(START)), path)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
