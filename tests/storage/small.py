"""A small output in three files, and what it must look like when it is whole."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mixtools.storage import manifest
from mixtools.storage.dtypes import DType
from mixtools.storage.output import Output, Region
from mixtools.storage.plan import Plan, sharded_safetensors, torch_zips
from mixtools.storage.replacing import WORK
from mixtools.storage.store import Bits

SHAPES = [("a", DType.BF16, (6, 50)), ("b", DType.F32, (20,)), ("c", DType.F16, (8, 9)), ("d", DType.U8, (3, 700))]
KEY = {"options": {"dtype": "keep"}, "source": [["x", 1, 2]]}
DOCUMENTS = {"tokenizer.json": b"{}", "images/x.png": b"\x89PNG"}
LAST = {"config.json": b'{"a": 1}\n'}
PLAN = sharded_safetensors(SHAPES, 700)
ZIP = torch_zips({"x.pth": SHAPES})


def data(name: str) -> bytes:
    return random.Random(name).randbytes(PLAN.tensors[name].nbytes)


def regions(plan: Plan) -> list[tuple[Region, Bits]]:
    """Every tensor in runs of two rows."""
    found = []
    for name, tensor in plan.tensors.items():
        rows = np.frombuffer(data(name), "u1").reshape(-1, tensor.row_bytes)
        found += [(Region(name, at * tensor.row_bytes), rows[at : at + 2]) for at in range(0, len(rows), 2)]
    return found


def write(folder: Path, plan: Plan = PLAN, key: dict[str, Any] = KEY, stop: int | None = None, **how: Any) -> int:
    """Write what is missing and commit; with `stop`, leave after so many regions. Returns the regions resumed."""
    with Output(folder, plan, key, **how) as output:
        resumed = len(output.done)
        for count, (region, rows) in enumerate(regions(plan)):
            if count == stop:
                return resumed
            if region not in output.done:
                output.add(region, [rows])
        output.commit(DOCUMENTS, LAST, lambda files: manifest.encode({}, files, {}))
    return resumed


def listed(files: Mapping[str, bytes]) -> bytes:
    """The manifest of these files."""
    return manifest.encode(
        {}, {name: manifest.File(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()}, {}
    )


def expected(plan: Plan = PLAN) -> dict[str, bytes]:
    """Every file of a whole output, put together from the plan without Output."""
    files = {file.name: bytearray(file.size) for file in plan.files}
    for file in plan.files:
        files[file.name][: len(file.head)] = file.head
        for offset, raw in file.seal({name: zlib.crc32(data(name)) for name in plan.tensors}) if file.seal else ():
            files[file.name][offset : offset + len(raw)] = raw
    for name, tensor in plan.tensors.items():
        files[tensor.file][tensor.offset : tensor.offset + tensor.nbytes] = data(name)
    weights = {name: bytes(raw) for name, raw in files.items()}
    record = listed({**weights, **DOCUMENTS, **LAST, **plan.index})
    return {**weights, **DOCUMENTS, manifest.NAME: record, **LAST, **plan.index}


def found(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those of unfinished work."""
    if not folder.exists():
        return {}
    files = (path for path in folder.rglob("*") if path.is_file() and WORK not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
