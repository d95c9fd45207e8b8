"""mixtools.quantize, killed, interrupted, locked out, and short of room."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from converting import environment
from layouts import make
from quantizing import LEAST, names, quantize, read

import mixtools
from mixtools import errors
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize.results import Planned
from mixtools.storage import output as storage_output

TESTS = Path(__file__).parents[2]
NANO = TESTS / "data" / "nano-mixtral"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make.write_a(tmp_path / "small", LEAST)


# --- interruptions ---


def test_killed_before_changes_to_the_disk(tmp_path: Path) -> None:
    """While both files are made, and when one is finished and the other is not."""
    script = Path(__file__).parent / "killed_quantize.py"
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "storage")))
    result = subprocess.run(
        [sys.executable, script, tmp_path],
        capture_output=True,
        text=True,
        check=False,
        env=environment(OMP_NUM_THREADS="1", PYTHONPATH=paths),
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 60


def test_resumed_after_some_regions(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is missing is made, for the file that misses it."""
    quantize(source, tmp_path / "whole", "Q8_0", "Q4_0")
    out, written = tmp_path / "out", 0
    wrote = storage_output.Output.wrote

    def stopping(self: storage_output.Output, *arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 15:
            raise KeyboardInterrupt
        wrote(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(storage_output.Output, "wrote", stopping)
        with pytest.raises(KeyboardInterrupt):
            quantize(source, out, "Q8_0", "Q4_0", jobs=1)
    assert read(out) == {} and names(out) == [".mixtools-small.Q4_0.gguf", ".mixtools-small.Q8_0.gguf"]
    with pytest.raises(errors.OutputExists, match="interrupted run that differs in"):
        quantize(source, out, "Q8_0", "Q4_0", pure=True, output_tensor_type="F16")
    again: list[Any] = []
    monkeypatch.setattr(
        storage_output.Output,
        "wrote",
        lambda self, *arguments: (again.append((self, *arguments)), wrote(self, *arguments)),
    )
    done = quantize(source, out, "Q8_0", "Q4_0", jobs=3)
    assert len(again) == 2 * len([*open_checkpoint(source).slots()]) - 15
    assert done.resumed_bytes > 0
    assert read(out) == read(tmp_path / "whole")
    assert names(out) == ["small.Q4_0.gguf", "small.Q8_0.gguf"]


def test_two_at_once(tmp_path: Path, source: Path) -> None:
    """Different types into one folder, from two processes, or threads as here."""
    failed: list[BaseException] = []

    def one(name: str) -> None:
        try:
            quantize(source, tmp_path / "out", name)
        except BaseException as error:  # a thread's own is lost
            failed.append(error)

    threads = [threading.Thread(target=one, args=(name,)) for name in ("Q8_0", "Q4_0", "F16")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    quantize(source, tmp_path / "whole", "Q8_0", "Q4_0", "F16")
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_locked(tmp_path: Path, source: Path) -> None:
    with storage_output.Output(tmp_path, _planned(source), {}, shared=True):
        with pytest.raises(errors.OutputLocked):
            quantize(source, tmp_path, "Q8_0")
        quantize(source, tmp_path, "F16")


def _planned(source: Path) -> Any:
    from mixtools.methods.quantize.mixtures import Mixture
    from mixtools.methods.quantize.run import Options, plan_jobs

    return plan_jobs(open_checkpoint(source), [Mixture("Q8_0")], Options("small"))[0][1].plan


# --- room ---


def test_disk_that_is_too_small_for_all(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one of two files there is room."""
    sizes = [file["bytes"] for file in quantize(source, tmp_path / "x", "F16", "Q8_0").document["files"]]
    status = type("Status", (), {"f_frsize": 1, "f_bavail": sum(sizes) - 1})
    monkeypatch.setattr(os, "statvfs", lambda _: status)
    with pytest.raises(errors.DiskError, match="GB more"):
        quantize(source, tmp_path / "out", "F16", "Q8_0")
    assert not (tmp_path / "out").exists()
    status.f_bavail = sum(sizes)
    quantize(source, tmp_path / "out", "F16", "Q8_0")


def test_disk_that_fills_up(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, count = os.pwrite, 0

    def failing(*arguments: Any) -> int:
        nonlocal count
        count += 1
        if count > 20:
            raise OSError(28, os.strerror(28))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing)
        with pytest.raises(errors.DiskError, match="the disk is full"):
            quantize(source, tmp_path / "out", "F16", "Q8_0")
    assert read(tmp_path / "out") == {}
    done = quantize(source, tmp_path / "out", "F16", "Q8_0")
    assert done.resumed_bytes > 0
    quantize(source, tmp_path / "whole", "F16", "Q8_0")
    assert read(tmp_path / "out") == read(tmp_path / "whole")


def test_memory_that_is_too_small(tmp_path: Path, source: Path) -> None:
    with pytest.raises(errors.MemoryBudgetError, match="too small even for one thread"):
        quantize(source, tmp_path / "out", "F16", max_memory="20MB")
    assert not (tmp_path / "out").exists()
    planned = mixtools.quantize(source, tmp_path, type=["F16"], jobs=9, dry_run=True)
    assert isinstance(planned, Planned)
    fewer = mixtools.quantize(
        source, tmp_path, type=["F16"], jobs=9, dry_run=True, max_memory=planned.peak_memory_bytes - 1
    )
    assert isinstance(fewer, Planned)
    assert (planned.jobs, fewer.jobs) == (9, 8) and fewer.peak_memory_bytes < planned.peak_memory_bytes
