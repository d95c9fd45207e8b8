"""mixtools-check.json: of each output in a folder the verdict of its check, and the SHA-256 of every file it judged.

    {"outputs": {"." or a GGUF's name: {"verdict": "passed", "files": {NAME: {"size", "sha256"}}, "document": {...}}}}

A file with another hash is not the one that was checked.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FormatError, InputError
from .disk import DiskErrors, sync_folder, write_durably
from .manifest import File
from .place import Place
from .sealed import RECORD

NAME = RECORD
FOLDER = "."  # names the output that is all of its folder
MAX_BYTES = 16 << 20
VERDICTS = ("passed", "intact", "failed")


class Record(NamedTuple):
    """Of a check: its verdict, the files it judged, and the document that `mixtools check --json` printed."""

    verdict: str
    files: Mapping[str, File]
    document: Mapping[str, Any]


def load(folder: Path) -> dict[str, Record]:
    """By output; empty without such a file. Raises FormatError if it is none of ours, InputError if unreadable."""
    path = folder / NAME
    try:
        if not path.exists():
            return {}
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            raise FormatError(f"is no file of at most {MAX_BYTES} bytes", file=path)
        document = json.loads(path.read_text("utf-8"))
        return {str(name): _read(told) for name, told in document["outputs"].items()}
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"is no record of a check ({error}); delete it and check again", file=path) from None


def write(folder: Path, name: str, record: Record) -> None:
    """Put the record beside those of the folder's other outputs; of an output whose files are gone it is dropped.

    Raises DiskError or OutputError if it cannot be written, FormatError where the file that is there is none of ours.
    """
    with DiskErrors(folder), Place(folder, (NAME,)).listing():
        others = {key: told for key, told in load(folder).items() if key != name and _is_there(folder, told)}
        told = {key: _told(one) for key, one in sorted({**others, name: record}.items())}
        part = folder / f".{NAME}.part"
        write_durably(part, (json.dumps({"outputs": told}, indent=1, allow_nan=False) + "\n").encode())
        part.replace(folder / NAME)
        sync_folder(folder)


def _is_there(folder: Path, record: Record) -> bool:
    return all((folder / name).is_file() for name in record.files)


def _told(record: Record) -> dict[str, Any]:
    files = {name: {"size": file.size, "sha256": file.sha256} for name, file in record.files.items()}
    return {"verdict": record.verdict, "files": files, "document": record.document}


def _read(told: Any) -> Record:
    files = {}
    for name, file in told["files"].items():
        size, digest = file["size"], file["sha256"]
        if type(size) is not int or not isinstance(digest, str):
            raise TypeError("a file has no size and digest")
        files[str(name)] = File(size, digest)
    if told["verdict"] not in VERDICTS or not isinstance(told["document"], dict):
        raise ValueError("an output has no verdict and document")
    return Record(told["verdict"], files, told["document"])
