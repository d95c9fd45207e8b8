"""mixtools.json finds a flipped bit that safetensors cannot, and is no way in for nonsense."""

from __future__ import annotations

import contextlib
import json
import random
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mixtools import errors
from mixtools.storage import manifest
from mixtools.storage.safetensors import read_header
from mixtools.storage.source import Source
from mixtools.storage.store import Store, by_name

TENSORS = {"a": torch.arange(20.0).reshape(4, 5), "b": torch.ones(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    crcs = {name: zlib.crc32(tensor.numpy().tobytes()) for name, tensor in TENSORS.items()}
    (tmp_path / manifest.NAME).write_bytes(
        manifest.encode({"mixtools": "0"}, {path.name: manifest.File(path.stat().st_size, "00")}, crcs)
    )
    return tmp_path


def read(folder: Path) -> dict[str, list[float]]:
    entries = read_header(Source(folder / "model.safetensors"))
    store = Store(by_name(manifest.with_checksums(folder, entries)))
    return {
        name: store.read_rows(name, 0, entry.rows).view("f4").ravel().tolist() for name, entry in store.entries.items()
    }


def change(folder: Path, **fields: object) -> None:
    document = json.loads((folder / manifest.NAME).read_text())
    (folder / manifest.NAME).write_text(json.dumps(document | fields))


def test_golden() -> None:
    files = {"f": manifest.File(9, "ab" * 32), "g": manifest.File(1, "cd" * 32, copied=True)}
    raw = manifest.encode({"mixtools": "1"}, files, {"t": 0xAB})
    assert json.loads(raw) == {
        "mixtools": "1",
        "files": {"f": {"size": 9, "sha256": "ab" * 32}, "g": {"size": 1, "sha256": "cd" * 32, "copied": True}},
        "crc32": {"t": "000000ab"},
    }
    assert raw.startswith(b'{\n "mixtools": "1",\n "files": {\n  "f": {\n   "size": 9,\n') and raw.endswith(b"}\n")


def test_read_back(tmp_path: Path) -> None:
    files = {"f": manifest.File(9, "ab" * 32), "g": manifest.File(1, "cd" * 32, copied=True)}
    (tmp_path / manifest.NAME).write_bytes(manifest.encode({}, files, {"t": 0xAB}))
    assert manifest.load(tmp_path) == {"files": files, "crc32": {"t": 0xAB}}
    change(tmp_path, files={"f": 9})  # as it was, of weights alone
    assert manifest.load(tmp_path) == {"files": {"f": manifest.File(9, None)}, "crc32": {"t": 0xAB}}


def test_every_flipped_byte(folder: Path) -> None:
    assert read(folder) == {name: tensor.ravel().tolist() for name, tensor in TENSORS.items()}
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    for at in range(8 + int.from_bytes(raw[:8], "little"), len(raw)):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(errors.ChecksumError) as caught:
            read(folder)
        assert caught.value.file == str(path)
        assert caught.value.tensor in TENSORS


def test_changed_file(folder: Path) -> None:
    save_file({**TENSORS, "c": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(errors.ChecksumError, match="changed since mixtools wrote it; delete mixtools.json"):
        read(folder)


def test_unlisted_is_read_without(folder: Path) -> None:
    change(folder, crc32={}, files={"other": 1})
    assert read(folder).keys() == TENSORS.keys()
    (folder / manifest.NAME).unlink()
    assert read(folder).keys() == TENSORS.keys()


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", "null", "1", '"files"', "{", "[" * 100_000, '{"files": {}, "crc32": []}', "\xff"]
)
def test_nonsense(folder: Path, text: str) -> None:
    (folder / manifest.NAME).write_text(text, "latin-1")
    with pytest.raises(errors.FormatError, match="is not a manifest of mixtools") as caught:
        read(folder)
    assert caught.value.file == str(folder / manifest.NAME)


@pytest.mark.parametrize("crc", [1, None, "xyz", "", [], "1" * 5000 + "g"])
def test_nonsensical_checksum(folder: Path, crc: object) -> None:
    change(folder, crc32={"a": crc})
    with pytest.raises(errors.FormatError):
        read(folder)


def test_too_large(folder: Path) -> None:
    with (folder / manifest.NAME).open("ab") as file:
        file.truncate(manifest.MAX_BYTES + 1)
    with pytest.raises(errors.FormatError, match="no file of at most"):
        read(folder)


def test_mutations_raise_only_our_errors(folder: Path) -> None:
    raw = (folder / manifest.NAME).read_bytes()
    chance = random.Random(0)
    expected = {name: tensor.ravel().tolist() for name, tensor in TENSORS.items()}
    for _ in range(1000):
        data = bytearray(raw)
        data[chance.randrange(len(data))] = chance.randrange(256)
        (folder / manifest.NAME).write_bytes(data)
        with contextlib.suppress(errors.InputError):
            assert read(folder) == expected
