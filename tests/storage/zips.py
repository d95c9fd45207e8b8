"""Files such as torch.save makes, by torch.save itself or with any pickle put into a zip by zipfile."""

from __future__ import annotations

import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mixtools.storage.source import Source
from mixtools.storage.store import Entry, Store, by_name
from mixtools.storage.torchzip import read_header


def saved(value: object, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def zipped(
    data_pkl: bytes, storages: Mapping[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED
) -> bytes:
    """A zip with this pickle and storages."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", data_pkl)
        archive.writestr("archive/version", b"3\n")
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
    return buffer.getvalue()


class Raw:
    """Opcodes to be spliced into a pickle."""

    def __init__(self, opcodes: bytes) -> None:
        self.opcodes = opcodes


def opcodes(value: object) -> bytes:
    """A value's pickle without its head and STOP."""
    return value.opcodes if isinstance(value, Raw) else pickle.dumps(value, 2)[2:-1].replace(b"q\x00", b"")


def tensor(storage: bytes, offset: object, shape: object, strides: object) -> bytes:
    """Opcodes of one tensor; the arguments may be nonsense."""
    head = b"ctorch._utils\n_rebuild_tensor_v2\n("
    return head + storage + b"".join(map(opcodes, (offset, shape, strides, False))) + b"ccollections\nOrderedDict\n)RtR"


def storage(kind: str = "FloatStorage", key: object = "0", numel: object = 6) -> bytes:
    """Opcodes of one storage."""
    return (
        b"(" + opcodes("storage") + f"ctorch\n{kind}\n".encode() + b"".join(map(opcodes, (key, "cpu", numel))) + b"tQ"
    )


def state(**tensors: bytes) -> bytes:
    """A pickle of {name: tensor}."""
    return b"\x80\x02}(" + b"".join(opcodes(name) + item for name, item in tensors.items()) + b"u."


def write(path: Path, data: bytes) -> Source:
    path.write_bytes(data)
    return Source(path)


def entries(path: Path, data: bytes) -> list[Entry]:
    return read_header(write(path, data))


def read(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    """All tensors, with all checksums judged."""
    store = Store(by_name(entries(path, data)))
    found = {}
    for name, entry in store.entries.items():
        bits = store.read_rows(name, 0, entry.rows)
        found[name] = torch.from_numpy(bits.view("u1")).view(entry.dtype.torch()).reshape(entry.shape)
    store.finish()
    return found
