"""Kills a writing process before each of its system calls that change the disk, and continues it each time.

Run as a script in a process of its own (it forks): `killed.py FOLDER fresh|overwrite|zip`. Writes the number of points.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from small import DOCUMENTS, LAST, PLAN, ZIP, expected, found, listed, write

from mixtools.errors import OutputExists
from mixtools.storage import manifest
from mixtools.storage.output import JOURNAL
from mixtools.storage.replacing import WORK

CALLS = ("pwrite", "write", "fsync", "rename", "unlink", "rmdir", "mkdir", "ftruncate")
OLD = {"model-00001-of-00009.safetensors": b"old weights", "laser-report.csv": b"", **dict.fromkeys(LAST, b"older")}
OLD[PLAN.files[0].name] = b"old weights that the new ones replace by name"
OLD[manifest.NAME] = listed(OLD)


def kill_before(call: int) -> None:
    """Let this process die before its `call`-th change; a write is cut in half."""
    count = itertools.count(1)

    def deadly(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(first: Any, *rest: Any, **options: Any) -> Any:
            if next(count) != call:
                return real(first, *rest, **options)
            if real.__name__ in ("write", "pwrite"):
                real(first, rest[0][: len(rest[0]) // 2], *rest[1:])
            os.kill(os.getpid(), signal.SIGKILL)

        return wrapped

    for name in CALLS:
        setattr(os, name, deadly(getattr(os, name)))


def run_killed(folder: Path, call: int, how: dict[str, Any]) -> bool:
    """Whether the process was killed (or came to its end before)."""
    if (child := os.fork()) == 0:
        kill_before(call)
        try:
            write(folder, **how)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"died of an error at {call}"
    return os.WIFSIGNALED(status)


def check_unfinished(folder: Path, old: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Whatever lies there is the old or a part of the new, and the new's last file comes when all others are there."""
    here = found(folder)
    committing = b'"committing"' in journal(folder)
    if here != old:
        assert committing or here == whole, f"changed before the commit: {sorted(here)}"
    last = list({**DOCUMENTS, **LAST, **PLAN.index})[-1]
    if last in here and here[last] == whole.get(last):
        assert here == whole


def journal(folder: Path) -> bytes:
    path = folder / WORK / JOURNAL
    return path.read_bytes() if path.exists() else b""


def resume(folder: Path, how: dict[str, Any], whole: dict[str, bytes]) -> None:
    """The same command again; --overwrite is needed only where a command that never began needs it."""
    plain = {**how, "overwrite": False}
    try:
        write(folder, **plain)
    except OutputExists:
        if found(folder) != whole:  # not killed after all was done
            write(folder, **how)


def main(folder: Path, scenario: str) -> None:
    os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway
    plan = ZIP if scenario == "zip" else PLAN
    how = {"plan": plan, "overwrite": scenario == "overwrite"}
    old, whole = OLD if scenario == "overwrite" else {}, expected(plan)
    for call in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        if old:
            folder.mkdir()
        for name, raw in old.items():
            (folder / name).write_bytes(raw)
        if not run_killed(folder, call, how):
            break
        check_unfinished(folder, old, whole)
        # the second attempt is killed as well, a little later: what is left has been continued once
        again = run_killed(folder, call // 2 + 3, {**how, "overwrite": True}) if call % 3 == 0 else False
        resume(folder, how, whole)
        assert found(folder) == whole, f"killed before call {call}, again: {again}"
    sys.stdout.write(f"{call - 1}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
