"""Small outputs that share a folder, each of one file or of several parts, and what lies there when all are whole."""

from __future__ import annotations

import hashlib
import json
import random
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtools.storage import manifest
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf_values import string
from mixtools.storage.output import Output, Region
from mixtools.storage.plan import Plan
from mixtools.storage.plan_gguf import gguf_files
from mixtools.storage.replacing import WORK
from mixtools.storage.store import Bits

SHAPES = [("a", DType.BF16, (6, 50)), ("b", DType.F32, (20,)), ("c", DType.F16, (8, 9)), ("d", DType.Q8_0, (3, 640))]
PARTS = {"split": 700}  # the stems of outputs that come in parts, and how large one may be
KEY = {"options": {"dtype": "keep"}, "source": [["x", 1, 2]]}


def plan(stem: str) -> Plan:
    return gguf_files(stem, {"general.name": string(stem)}, SHAPES, PARTS.get(stem))


def first(stem: str) -> str:
    """The file that gives an output its name."""
    return plan(stem).files[0].name


def data(stem: str, tensor: str, version: object = 0) -> bytes:
    """Bytes that differ between outputs, and between two makings of one."""
    dtype, shape = next((dtype, shape) for name, dtype, shape in SHAPES if name == tensor)
    return random.Random(f"{stem} {tensor} {version}").randbytes(dtype.nbytes(shape))


def write(
    folder: Path, stem: str, *, version: object = 0, stop: int | None = None, key: dict[str, Any] | None = None,
    **how: Any,
) -> int:  # fmt: skip
    """Write what is missing and commit; with `stop`, leave after so many regions. Returns the regions resumed."""
    planned = plan(stem)
    with Output(folder, planned, {**(key or KEY), "version": version}, shared=True, **how) as output:
        resumed = len(output.done)
        for count, (name, tensor) in enumerate(planned.tensors.items()):
            if count == stop:
                return resumed
            if Region(name, 0) not in output.done:
                rows = np.frombuffer(data(stem, name, version), "u1").reshape(-1, tensor.row_bytes)
                output.add(Region(name, 0), [rows[:1], rows[1:]])
        checksums = output.checksums()
        output.commit(
            {}, {}, lambda files: manifest.encode_beside(folder, {"made": [stem, str(version)]}, files, checksums)
        )
    return resumed


def regions(stem: str) -> list[tuple[Region, list[Bits]]]:
    """Every tensor as one block."""
    tensors = plan(stem).tensors.values()
    return [
        (Region(one.name, 0), [np.frombuffer(data(stem, one.name), "u1").reshape(-1, one.row_bytes)]) for one in tensors
    ]


def record(folder: Path, stem: str, files: Mapping[str, manifest.File], output: Output) -> bytes:
    """The manifest that a commit is given."""
    return manifest.encode_beside(folder, {"made": [stem, "0"]}, files, output.checksums())


def put(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Somebody's own files."""
    for name, raw in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(raw)
    return folder


def files(stem: str, version: object = 0) -> dict[str, bytes]:
    """The files of an output, put together from its plan."""
    planned = plan(stem)
    found = {file.name: bytearray(file.size) for file in planned.files}
    for file in planned.files:
        found[file.name][: len(file.head)] = file.head
    for name, tensor in planned.tensors.items():
        found[tensor.file][tensor.offset : tensor.offset + tensor.nbytes] = data(stem, name, version)
    return {name: bytes(raw) for name, raw in found.items()}


def expected(outputs: Iterable[tuple[str, object]]) -> dict[str, bytes]:
    """The folder of these outputs, (stem, version) each, in any order; the manifest spelled out once more."""
    whole: dict[str, bytes] = {}
    entries = {}
    for stem, version in outputs:
        mine = files(stem, version)
        whole |= mine
        told = {name: {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()} for name, raw in mine.items()}
        crcs = {name: f"{zlib.crc32(data(stem, name, version)):08x}" for name, _, _ in SHAPES}
        entries[min(mine)] = {"made": [stem, str(version)], "files": told, "crc32": crcs}
    document = {"outputs": {name: entries[name] for name in sorted(entries)}}
    return {**whole, manifest.NAME: (json.dumps(document, indent=1) + "\n").encode()}


def found(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those of unfinished work."""
    if not folder.exists():
        return {}
    paths = [path for path in folder.rglob("*") if not path.relative_to(folder).parts[0].startswith(WORK)]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths if path.is_file()}


def work(folder: Path) -> list[str]:
    """The folders of unfinished work."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(WORK))
