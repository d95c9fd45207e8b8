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

from ..errors import ChecksumError, FormatError, InputError, OutputExists
from .store import Entry, Record

NAME = "mixtools.json"
MAX_BYTES = 16 << 20
OUTPUTS = "outputs"  # of a folder that several share: an entry for each
CALIBRATION = "calibration_text"  # its file's name
KEYS = (  # of every output; others are a method's
    "mixtools", "layout", "options", "source", "files", "crc32", "method", CALIBRATION,
)  # fmt: skip


class File(NamedTuple):
    """A file that was written. `sha256` is None in manifests that did not tell it; `copied`: it is the source's own."""

    size: int
    sha256: str | None
    copied: bool = False


def encode(origin: Mapping[str, Any], files: Mapping[str, File], tensors: Mapping[str, int]) -> bytes:
    """The document, without times or machine names: the same conversion gives the same bytes."""
    return _text(_entry(origin, files, tensors))


def encode_beside(
    folder: Path, origin: Mapping[str, Any], files: Mapping[str, File], tensors: Mapping[str, int]
) -> bytes:
    """The document of a folder that several outputs share, with this one, named for its first file, beside the others.

    Raises as `load` does, and OutputExists where the folder has become an output by itself.
    """
    if not is_shared(folder) and _document(folder) is not None:
        raise OutputExists("is an output of mixtools by itself; name another folder", file=folder)
    entries = (_document(folder) or {}).get(OUTPUTS, {}).items()
    others = {name: entry for name, entry in entries if entry["files"].keys().isdisjoint(files)}
    others[min(files)] = _entry(origin, files, tensors)
    return _text({OUTPUTS: dict(sorted(others.items()))})


def _entry(origin: Mapping[str, Any], files: Mapping[str, File], tensors: Mapping[str, int]) -> dict[str, Any]:
    told = {
        name: {"size": file.size, "sha256": file.sha256, **({"copied": True} if file.copied else {})}
        for name, file in files.items()
    }
    return {**origin, "files": told, "crc32": {name: f"{crc:08x}" for name, crc in tensors.items()}}


def _text(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=1) + "\n").encode()


def load(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder, `files` as File by name, its checksums as numbers; None without one.

    Of a folder that several outputs share, `outputs` has these of each, and `files` are those of all. Raises
    FormatError if it is not one of ours, InputError if it cannot be read.
    """
    document = _document(folder)
    if document is None:
        return None
    try:
        if OUTPUTS not in document:
            return _read(document)
        outputs = {name: _read(entry) for name, entry in document[OUTPUTS].items()}
        together = {name: file for entry in outputs.values() for name, file in entry["files"].items()}
        return {OUTPUTS: outputs, "files": together, "crc32": {}}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def is_shared(folder: Path) -> bool:
    """Whether several outputs share the folder. Raises as `load` does."""
    return OUTPUTS in (_document(folder) or {})


def _document(folder: Path) -> dict[str, Any] | None:
    """As it lies there."""
    path = folder / NAME
    try:
        if not path.exists():
            return None
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise FormatError(f"is no file of at most {MAX_BYTES} bytes", file=path)
        return dict(json.loads(path.read_text("utf-8")))
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    except (ValueError, TypeError, RecursionError) as error:
        raise _damaged(folder, error) from None


def _damaged(folder: Path, error: Exception) -> FormatError:
    return FormatError(f"is not a manifest of mixtools ({error}); delete it to read on without", file=folder / NAME)


def _read(document: Any) -> dict[str, Any]:
    if not isinstance(document["files"], dict):
        raise TypeError("files is no object")
    files = {name: _file(told) for name, told in document["files"].items()}
    return {**document, "files": files, "crc32": {name: int(crc, 16) for name, crc in document["crc32"].items()}}


def method(entry: Mapping[str, Any]) -> str | None:
    """The name of what changed the weights, whose options stand under it; None where nothing did."""
    return next((str(name) for name in entry if name not in (*KEYS, OUTPUTS)), None)


def of_output(document: Mapping[str, Any], file: str) -> Mapping[str, Any]:
    """Of a loaded manifest the part that tells of the output that `file` belongs to."""
    outputs: Mapping[str, Mapping[str, Any]] = document.get(OUTPUTS, {})
    return next((entry for entry in outputs.values() if file in entry["files"]), document)


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
        told = of_output(document, file)
        written, crc = told["files"].get(file), told["crc32"].get(entry.name)
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
