"""mixtools.json: what an output was made from, every file that was written, and the CRC-32 of each of its tensors.

It lets any later reader tell a flipped bit from a weight, which safetensors itself cannot, and a file that mixtools
wrote from one that was edited since or is somebody's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ChecksumError, FormatError, InputError
from .store import Entry, Record

NAME = "mixtools.json"
MAX_BYTES = 16 << 20
KEYS = ("mixtools", "layout", "options", "source", "files", "crc32", "method")  # of every output; others are a method's


class File(NamedTuple):
    """A file that was written. `sha256` is None in manifests that did not tell it; `copied`: it is the source's own."""

    size: int
    sha256: str | None
    copied: bool = False


def encode(origin: Mapping[str, Any], files: Mapping[str, File], tensors: Mapping[str, int]) -> bytes:
    """The document, without times or machine names: the same conversion gives the same bytes."""
    told = {
        name: {"size": file.size, "sha256": file.sha256, **({"copied": True} if file.copied else {})}
        for name, file in files.items()
    }
    document = {**origin, "files": told, "crc32": {name: f"{crc:08x}" for name, crc in tensors.items()}}
    return (json.dumps(document, indent=1) + "\n").encode()


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, `files` as File by name, its checksums as numbers; None without one.

    Raises FormatError if it is not one of ours, InputError if it cannot be read.
    """
    path = folder / NAME
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise FormatError(f"is no file of at most {MAX_BYTES} bytes", file=path)
        document = json.loads(path.read_text("utf-8"))
        if not isinstance(document["files"], dict):
            raise TypeError("files is no object")
        document["files"] = {name: _file(told) for name, told in document["files"].items()}
        document["crc32"] = {name: int(crc, 16) for name, crc in document["crc32"].items()}
        return dict(document)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"is not a manifest of mixtools ({error}); delete it to read on without", file=path) from None


def _file(told: Any) -> File:
    """Manifests of old list weight files only, by size."""
    told = {"size": told} if isinstance(told, int) else told
    size, digest = told["size"], told.get("sha256")
    if type(size) is not int or not isinstance(digest, str | None):
        raise TypeError("a file has no size and digest")
    return File(size, digest, told.get("copied") is True)


def with_checksums(folder: Path, entries: Iterable[Entry]) -> list[Entry]:
    """Entries with the manifest's checksums, where there is a manifest and the file has none of its own.

    Raises ChecksumError if a file's size is not the one that was written.
    """
    if (document := load(folder)) is None:
        return list(entries)
    found = []
    for entry in entries:
        file = entry.source.paths[0].name
        written, crc = document["files"].get(file), document["crc32"].get(entry.name)
        if written is not None and written.size != entry.source.size:
            raise ChecksumError(
                f"changed since mixtools wrote it; delete {NAME} beside it if that was on purpose",
                file=entry.source.label, expected=f"{written.size} bytes", found=entry.source.size,
            )  # fmt: skip
        if written is not None and crc is not None and entry.record is None:
            found.append(replace(entry, record=Record(entry.offset, entry.nbytes, crc)))
        else:
            found.append(entry)
    return found
