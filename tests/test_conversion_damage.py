"""Conversions of damaged sources, and conversions that are killed, interrupted and continued."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from converting import (
    DIMS,
    environment,
    files,
    go,
    nano,
    sources,
    to_hf,
    weights,
)
from layouts import make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixtools import errors, job
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage import store, torchzip
from mixtools.storage.output import JOURNAL
from mixtools.storage.replacing import WORK
from mixtools.storage.source import Source


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << at % 8
    path.write_bytes(raw)


def test_flipped_bit_of_a_plain_tensor(tmp_path: Path) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pth")) if e.name == "output.weight")
    flip(source / "consolidated.00.pth", entry.offset + 17)
    with pytest.raises(errors.ChecksumError) as caught:
        go(to_hf, source, tmp_path / "out")
    assert caught.value.tensor == "output.weight"
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("jobs", [1, 3])
def test_flipped_bit_of_a_stacked_tensor(tmp_path: Path, jobs: int) -> None:
    """However often the command is repeated: the parts written before the damage showed are not taken for good."""
    source = make.write_b(tmp_path / "b", DIMS, files=1)
    name = "layers.1.block_sparse_moe.w2"
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pt")) if e.name == name)
    flip(source / "consolidated.00.pt", entry.offset + 5)
    for _ in range(4):
        with pytest.raises(errors.ChecksumError) as caught:
            go(to_hf, source, tmp_path / "out", jobs=jobs)
        assert caught.value.tensor == name
        assert files(tmp_path / "out") == {}


def test_flipped_bit_beside_a_view(tmp_path: Path) -> None:
    """In a part of the storage that no tensor shows."""
    tensors = make.torrent(DIMS)
    tensors["norm.weight"] = torch.arange(100.0)[40:48].bfloat16()
    tensors["output.weight"] = torch.randn(DIMS.vocab + 9, 8).bfloat16()[2 : DIMS.vocab + 2]
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    make.assert_same(weights(go(to_hf, source, tmp_path / "good")), make.hf(tensors, DIMS))
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pth")) if e.name == "output.weight")
    assert entry.record is not None
    flip(source / "consolidated.00.pth", entry.record.offset + entry.record.size - 1)
    for _ in range(3):
        with pytest.raises(errors.ChecksumError):
            go(to_hf, source, tmp_path / "out")
        assert files(tmp_path / "out") == {}


def test_transposed_tensors_are_read_right(tmp_path: Path) -> None:
    tensors = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in make.torrent(DIMS).items()}
    assert not tensors["output.weight"].is_contiguous()
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    make.assert_same(weights(go(to_hf, source, tmp_path / "out")), make.hf(make.torrent(DIMS), DIMS))


def test_our_manifest_finds_a_flipped_bit(tmp_path: Path) -> None:
    hf = go(to_hf, make.write_a(tmp_path / "a", DIMS), tmp_path / "hf")
    raw = (hf / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for at in random.Random(0).choices(range(start, len(raw)), k=20):
        flip(hf / "model.safetensors", at)
        load_file(hf / "model.safetensors")  # which notices nothing
        with pytest.raises(errors.ChecksumError) as caught:
            make.read_all(open_checkpoint(hf))
        assert caught.value.tensor in make.hf(make.torrent(DIMS), DIMS)
        flip(hf / "model.safetensors", at)
    make.read_all(open_checkpoint(hf))


def test_mutated_sources(tmp_path: Path) -> None:
    """Any byte of any file: our error, or a right result."""
    chance = random.Random(0)
    expected = make.hf(make.torrent(DIMS), DIMS)
    for letter in ("A", "D", "E"):
        source = sources(DIMS, make.torrent(DIMS))[letter](tmp_path / letter)
        original = files(source)
        for _ in range(100):
            name = chance.choice(sorted(original))
            data = bytearray(original[name])
            # safetensors alone has no checksums: there the header is mutated
            end = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
            data[chance.randrange(end)] = chance.randrange(256)
            (source / name).write_bytes(data)
            with contextlib.suppress(errors.MixtoolsError):
                checkpoint = open_checkpoint(source)
                found = make.read_all(checkpoint)
                checkpoint.finish()
                assert found.keys() == expected.keys()
                if letter != "D":
                    make.assert_same(found, expected)
            (source / name).write_bytes(original[name])


# --- interruptions

KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from mixtools import conversion, job
from mixtools.layouts.detect import open_checkpoint
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
conversion.CHUNK = 1 << 16
os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway

def go(out):
    planned = conversion.plan_hf(open_checkpoint(source), conversion.Options(max_shard_bytes=2_000_000))
    job.run(planned, out)

def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} if out.exists() else {}

go(folder / "expected")
begun = time.perf_counter()
go(folder / "again")
span = time.perf_counter() - begun
expected, out, chance = files(folder / "expected"), folder / "out", random.Random(0)
assert files(folder / "again") == expected
unfinished = 0
for number in range(20):
    shutil.rmtree(out, ignore_errors=True)
    if (child := os.fork()) == 0:
        go(out)
        os._exit(0)
    time.sleep(span * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if files(out) != expected:
        unfinished += 1
        go(out)
    assert files(out) == expected
sys.stdout.write(f"{unfinished}\\n")
"""


def sharded(source: Checkpoint) -> job.Job:
    return to_hf(source, max_shard_bytes=2_000_000)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL from outside, twenty times, at moments spread over the run; each time continued to the same bytes."""
    source = make.write_b(tmp_path / "source", make.NANO, nano(), files=2)
    command = [sys.executable, "-c", KILLER, source, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_interrupted_from_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread while the others work: they stop, and what they wrote is continued."""
    source = make.write_a(tmp_path / "a", DIMS)
    expected = files(go(sharded, source, tmp_path / "expected"))
    reads, made = 0, []
    read_rows, event = store.Store.read_rows, threading.Event

    def watched_event() -> threading.Event:
        made.append(event())
        return made[-1]

    def interrupted(self: store.Store, *arguments, **options):
        nonlocal reads
        reads += 1
        if reads == 20:
            os.kill(os.getpid(), signal.SIGINT)
        if reads >= 20:  # no more work until the main thread has told the others to stop
            assert made[0].wait(60)
        return read_rows(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(job, "threading", SimpleNamespace(Event=watched_event))  # no other room's
        patch.setattr(store.Store, "read_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(sharded, source, tmp_path / "out")
    assert files(tmp_path / "out") == {}
    assert 10 < len((tmp_path / "out" / WORK / JOURNAL).read_text().splitlines()) <= 20
    document = job.run(sharded(open_checkpoint(source)), tmp_path / "out")
    assert document["resumed_bytes"] > 0
    assert files(tmp_path / "out") == expected


def test_resume_after_the_source_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make.write_a(tmp_path / "a", DIMS)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            go(to_hf, source, tmp_path / "out")
    with pytest.raises(errors.OutputExists, match=r"differs in options, plan;"):
        go(lambda source: to_hf(source, dtype="f32"), source, tmp_path / "out")
    os.utime(source / "consolidated.00.pth", ns=(0, 0))
    with pytest.raises(errors.OutputExists, match=r"differs in source;"):
        go(to_hf, source, tmp_path / "out")
    make.assert_same(weights(go(to_hf, source, tmp_path / "out", overwrite=True)), make.hf(make.torrent(DIMS), DIMS))


def test_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = Source.read_into

    def counted(self: Source, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        real(self, offset, view)

    for number, write in enumerate((make.write_a, make.write_b)):
        checkpoint = open_checkpoint(write(tmp_path / str(number), DIMS))
        with monkeypatch.context() as patch:
            patch.setattr(Source, "read_into", counted)
            read = 0
            job.run(to_hf(checkpoint), tmp_path / f"out{number}")
        assert read == sum(tensor.nbytes for tensor in make.torrent(DIMS).values())


def test_overwrite(tmp_path: Path) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    first = files(go(to_hf, source, tmp_path / "out"))
    with pytest.raises(errors.OutputExists):
        go(to_hf, source, tmp_path / "out")
    go(lambda source: to_hf(source, max_shard_bytes=1000), source, tmp_path / "out", overwrite=True)
    assert "model.safetensors" not in files(tmp_path / "out")
    assert files(go(to_hf, source, tmp_path / "out", overwrite=True)) == first


def test_metadata_for_transformers(tmp_path: Path) -> None:
    hf = go(to_hf, make.write_a(tmp_path / "a", DIMS), tmp_path / "hf")
    with safe_open(hf / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    save_file(weights(hf), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert load_file(tmp_path / "theirs.safetensors").keys() == weights(hf).keys()
