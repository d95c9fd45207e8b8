"""SHA-256 of files that are written out of order, against hashlib over the whole."""

from __future__ import annotations

import hashlib
import itertools
import random
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from storage import small

from mixtools import errors
from mixtools.storage import digest, manifest
from mixtools.storage.writeback import WriteBehind


@pytest.mark.parametrize("seed", range(5))
def test_any_order_on_threads(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "_BLOCK", 1000)
    monkeypatch.setattr("mixtools.storage.writeback.WINDOW", 5000)  # pages are dropped all the while
    chance = random.Random(seed)
    data = chance.randbytes(100_000)
    cuts = sorted({0, len(data), *(chance.randrange(len(data)) for _ in range(200))})
    runs = list(itertools.pairwise(cuts))
    chance.shuffle(runs)
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryFile() as file:
        found = digest.Digest(file.fileno(), pool)
        writer = WriteBehind(file.fileno(), found)
        with ThreadPoolExecutor(3) as threads:
            list(threads.map(lambda run: writer.write(memoryview(data)[run[0] : run[1]], run[0]), runs))
        assert found.finish(len(data)) == hashlib.sha256(data).hexdigest()


def test_a_gap_is_no_file() -> None:
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryFile() as file:
        file.write(bytes(10))
        file.flush()
        found = digest.Digest(file.fileno(), pool)
        found.wrote(0, 4)
        found.wrote(6, 10)
        with pytest.raises(errors.OutputError, match="written to byte 4 of 10"):
            found.finish(10)


def test_shorter_than_told() -> None:
    with ThreadPoolExecutor(1) as pool, tempfile.TemporaryFile() as file:
        found = digest.Digest(file.fileno(), pool)
        found.wrote(0, 4)
        with pytest.raises(errors.OutputError, match="shrank"):
            found.finish(4)


@pytest.mark.parametrize("plan", [small.PLAN, small.ZIP], ids=["safetensors", "zip"])
@pytest.mark.parametrize("stop", [None, 5], ids=["at once", "resumed"])
def test_the_manifest_lists_every_file(tmp_path, plan, stop: int | None) -> None:
    if stop:
        small.write(tmp_path, plan, stop=stop)
    small.write(tmp_path, plan)
    listed = (manifest.load(tmp_path) or {})["files"]
    files = {name: raw for name, raw in small.found(tmp_path).items() if name != manifest.NAME}
    assert listed == {name: manifest.File(len(raw), hashlib.sha256(raw).hexdigest()) for name, raw in files.items()}


def test_what_is_copied_is_marked(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = tmp_path / "card.md"
    card.write_bytes(b"# card")
    monkeypatch.setattr(small, "DOCUMENTS", {"README.md": card})
    small.write(tmp_path / "out")
    assert (tmp_path / "out" / "README.md").read_bytes() == b"# card"
    listed = (manifest.load(tmp_path / "out") or {})["files"]
    assert [name for name, file in listed.items() if file.copied] == ["README.md"]
    card.unlink()
    with pytest.raises(errors.InputError, match="cannot be read") as caught:
        small.write(tmp_path / "again")
    assert caught.value.file == str(card)
