"""mixtools.json: what an output was made from and the CRC-32 of each of its tensors.

It lets any later reader tell a flipped bit from a weight, which safetensors itself cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..errors import ChecksumError, FormatError, InputError
from .store import Entry, Record

NAME = "mixtools.json"
MAX_BYTES = 16 << 20
KEYS = ("mixtools", "layout", "options", "source", "files", "crc32", "method")  # of every output; others are a method's


def encode(origin: Mapping[str, Any], files: Mapping[str, int], tensors: Mapping[str, int]) -> bytes:
    """The document, without times or machine names: the same conversion gives the same bytes."""
    document = {**origin, "files": dict(files), "crc32": {name: f"{crc:08x}" for name, crc in tensors.items()}}
    return (json.dumps(document, indent=1) + "\n").encode()


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, its checksums as numbers; None without one.

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
        document["crc32"] = {name: int(crc, 16) for name, crc in document["crc32"].items()}
        return dict(document)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"is not a manifest of mixtools ({error}); delete it to read on without", file=path) from None


def with_checksums(folder: Path, entries: Iterable[Entry]) -> list[Entry]:
    """Entries with the manifest's checksums, where there is a manifest and the file has none of its own.

    Raises ChecksumError if a file's size is not the one that was written.
    """
    if (document := load(folder)) is None:
        return list(entries)
    found = []
    for entry in entries:
        file = entry.source.paths[0].name
        size, crc = document["files"].get(file), document["crc32"].get(entry.name)
        if size is not None and size != entry.source.size:
            raise ChecksumError(
                f"changed since mixtools wrote it; delete {NAME} beside it if that was on purpose",
                file=entry.source.label, expected=f"{size} bytes", found=entry.source.size,
            )  # fmt: skip
        if size is not None and crc is not None and entry.record is None:
            found.append(replace(entry, record=Record(entry.offset, entry.nbytes, crc)))
        else:
            found.append(entry)
    return found
