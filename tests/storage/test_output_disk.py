"""The output folder on disks that are full, fail or are closed to us."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors import safe_open
from storage import small

from mixtools import errors
from mixtools.storage import plan
from mixtools.storage.dtypes import DType
from mixtools.storage.output import Output, Region
from mixtools.storage.replacing import WORK


def test_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    fields = {name: getattr(real, name) for name in ("f_frsize", "f_bavail")}
    full = type("Status", (), {**fields, "f_bavail": 0})
    monkeypatch.setattr(os, "statvfs", lambda _: full)
    with pytest.raises(errors.DiskError, match="GB more, 0.00 GB are free"):
        small.write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk_does_not_stop_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All is written, some renamed: what is left needs no room."""
    calls = 0
    rename = os.rename

    def interrupted(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            small.write(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: type("Status", (), {"f_frsize": 4096, "f_bavail": 0}))
    small.write(tmp_path)
    assert small.found(tmp_path) == small.expected()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "write", "rename"])
def test_disk_that_fails_midway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int) -> None:
    real, count = getattr(os, call), 0

    def failing(*arguments: object) -> object:
        nonlocal count
        count += 1
        if count > 4:
            raise OSError(code, os.strerror(code))
        return real(*arguments)

    expected = errors.DiskError if code in (errno.ENOSPC, errno.EDQUOT) else errors.OutputError
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        with pytest.raises(expected, match="free some space" if expected is errors.DiskError else "cannot be written"):
            small.write(tmp_path)
    assert "model.safetensors.index.json" not in small.found(tmp_path)
    small.write(tmp_path)
    assert small.found(tmp_path) == small.expected()


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_disk_that_is_full(tiny_disk: Path) -> None:
    (tiny_disk / "x").write_bytes(bytes(700_000))
    plan = small.sharded_safetensors([("a", small.DType.U8, (200, 2000))], 1 << 20)
    with pytest.raises(errors.DiskError, match="GB more"):
        small.write(tiny_disk / "out", plan)
    assert [path.name for path in tiny_disk.iterdir()] == ["x"]


def test_disk_that_fills_up(tiny_disk: Path) -> None:
    """Somebody else takes the room that was there at the start; once it is free again, the work goes on."""
    plan = small.sharded_safetensors([("a", small.DType.U8, (200, 2000)), ("b", small.DType.U8, (200, 2000))], 1 << 20)
    rows = small.np.frombuffer(random.Random(0).randbytes(400_000), "u1").reshape(200, 2000)

    def write() -> int:
        with Output(tiny_disk / "out", plan, {}) as out:
            resumed = len(out.done)
            for name in ("a", "b"):
                for at in range(0, 200, 50):
                    region = Region(name, at * 2000)
                    if region not in out.done:
                        out.add(region, [rows[at : at + 50]])
                    if not (tiny_disk / "x").exists() and resumed == 0:
                        (tiny_disk / "x").write_bytes(bytes(500_000))
            out.commit({}, {})
        return resumed

    with pytest.raises(errors.DiskError, match="the disk is full"):
        write()
    (tiny_disk / "x").write_bytes(b"")
    assert write() > 0
    with safe_open(tiny_disk / "out" / "model.safetensors", "np") as opened:
        assert (opened.get_tensor("a") == rows).all()
        assert (opened.get_tensor("b") == rows).all()


def test_folder_closed_to_us(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        for folder in (closed, closed / "out"):
            with pytest.raises(errors.OutputError, match="cannot be written") as caught:
                small.write(folder)
            assert caught.value.exit_code == 8
    finally:
        os.seteuid(user)
    assert list(closed.iterdir()) == []


def test_what_a_dropped_run_left_is_gone_before_the_next_writes(tmp_path: Path) -> None:
    """Not only at the end: its parts may be as large as the disk."""
    shapes = [("t", DType.U8, (4, 8))]
    with Output(tmp_path / "out", plan.single_safetensors("first.safetensors", shapes), {"run": 1}):
        pass
    work = tmp_path / "out" / WORK
    assert (work / "first.safetensors").exists()
    other = plan.single_safetensors("second.safetensors", shapes)
    with Output(tmp_path / "out", other, {"run": 2}, overwrite=True):
        assert not (work / "first.safetensors").exists()
        assert (work / "second.safetensors").exists()


def test_closing_twice_closes_no_file_of_others(tmp_path: Path) -> None:
    output = Output(tmp_path / "out", small.PLAN, small.KEY)
    output.close()
    output.close()
    with Output(tmp_path / "out", small.PLAN, small.KEY):  # and the lock is free
        pass
