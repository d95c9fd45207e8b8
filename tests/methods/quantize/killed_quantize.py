"""Kills `quantize` of two types before changes to the disk, and runs the same again: tests/storage/killed.py, one up.

Run as a script in a process of its own (it forks): `killed_quantize.py FOLDER`. Writes the number of points.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from pathlib import Path

from killed import kill_before
from layouts import make

import mixtools
from mixtools.errors import OutputExists
from mixtools.storage.replacing import WORK

DIMS = make.Dims(d=32, f=32, layers=1, heads=2, kv=1, hd=16, vocab=3, experts=2)
TYPES = ["Q8_0", "Q4_0"]
FILES = {f"x.{name}.gguf" for name in TYPES}


def go(source: Path, out: Path) -> None:
    mixtools.quantize(source, out, type=TYPES, name="x", jobs=1)


def files(folder: Path) -> dict[str, bytes]:
    if not folder.exists():
        return {}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def work(folder: Path) -> dict[str, list[str]]:
    """Unfinished work, as far as there is something in it."""
    found = {path.name: sorted(one.name for one in path.iterdir()) for path in folder.glob(f"{WORK}*")}
    return {name: inside for name, inside in found.items() if inside}


def killed(source: Path, out: Path, call: int) -> bool:
    if (child := os.fork()) == 0:
        kill_before(call)
        try:
            go(source, out)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"died of an error at {call}"
    return os.WIFSIGNALED(status)


def main(folder: Path) -> None:
    os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway
    source, out = make.write_a(folder / "source", DIMS), folder / "out"
    go(source, folder / "whole")
    whole = files(folder / "whole")
    assert whole.keys() > FILES
    seen = set()  # how many of the files were in place
    points = 0
    for call in itertools.count(1):
        if call > 30 and not seen - {0} and call % 3:  # every change of the commits, and some before
            continue
        shutil.rmtree(out, ignore_errors=True)
        if not killed(source, out, call):
            break
        points += 1
        here = files(out)
        assert all(here[name] == whole[name] for name in FILES & here.keys()), f"killed before call {call}"
        seen.add(len(FILES & here.keys()))
        try:
            go(source, out)
        except OutputExists:
            assert here == whole, f"killed before call {call}: {sorted(here)}"
        assert files(out) == whole, f"killed before call {call}"
        assert not work(out), f"killed before call {call}: {work(out)}"
    assert seen == {0, 1, 2}
    sys.stdout.write(f"{points}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
