"""Kills calibrated runs before changes to the disk, and runs the same again with more threads: tests/storage/killed.py.

Run as a script in a process of its own (it forks): `killed_calibrated.py FOLDER`. Writes the number of points.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import traceback
from pathlib import Path
from typing import Any

from killed import kill_before
from layouts import make

import mixtools
from mixtools.errors import OutputExists
from mixtools.storage.replacing import WORK

DATA = Path(__file__).parents[2] / "data"
DIMS = make.Dims(d=32, f=32, layers=2, heads=1, kv=1, hd=32, vocab=2048, experts=2)
TEXT: dict[str, Any] = {"calibration": DATA / "text.txt", "samples": 4, "seq_len": 32}
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", "group_size": 32}, "gguf": {"method": "gguf", "type": "Q4_0", "name": "x"},
}  # fmt: skip
STEP = 13


def go(source: Path, out: Path, kind: str, jobs: int) -> None:
    mixtools.quantize(source, out, **KINDS[kind], **TEXT, jobs=jobs)


def weights(folder: Path) -> dict[str, bytes]:
    if not folder.exists():
        return {}
    files = [path for path in folder.iterdir() if path.is_file() and path.suffix in (".safetensors", ".gguf")]
    return {path.name: path.read_bytes() for path in files}


def killed(source: Path, out: Path, kind: str, call: int) -> bool:
    if (child := os.fork()) == 0:
        kill_before(call)
        try:
            go(source, out, kind, 1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"died of an error at {call}"
    return os.WIFSIGNALED(status)


def main(folder: Path) -> None:
    os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway
    source = make.write_a(folder / "source", DIMS)
    shutil.copy(DATA / "nano-mixtral" / "tokenizer.model", source)
    points = 0
    for kind in KINDS:
        go(source, folder / kind, kind, 2)
        whole, out = weights(folder / kind), folder / "out"
        assert whole
        for call in itertools.count(1, STEP):
            shutil.rmtree(out, ignore_errors=True)
            if not killed(source, out, kind, call):
                break
            points += 1
            here = weights(out)
            try:
                go(source, out, kind, 3)
            except OutputExists:  # killed when all was in place
                assert here == whole, f"{kind} killed before call {call}: {sorted(here)}"
            assert weights(out) == whole, f"{kind} killed before call {call}"
            left = [one for place in out.glob(f"{WORK}*") for one in place.iterdir()]
            assert not left, f"{kind} killed before call {call}: {left}"
    sys.stdout.write(f"{points}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
