"""As killed.py, of an output that goes into a folder where another stands and a third is unfinished.

Run as a script in a process of its own (it forks): `killed_beside.py FOLDER STEM fresh|overwrite`. Writes the number of
points at which it was killed.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import traceback
from pathlib import Path

from beside import expected, files, first, found, plan, work, write
from killed import kill_before

from mixtools.errors import OutputExists
from mixtools.storage import manifest
from mixtools.storage.output import JOURNAL
from mixtools.storage.place import Place

OTHERS = {"README.md": b"# mine", "model.safetensors": b"mine"}
LATER = ".mixtools-later.gguf"


def run_killed(folder: Path, stem: str, call: int, overwrite: bool) -> bool:
    """Whether the process was killed (or came to its end before)."""
    if (child := os.fork()) == 0:
        kill_before(call)
        try:
            write(folder, stem, version="new", overwrite=overwrite)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, f"died of an error at {call}"
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFSIGNALED(status)


def check_unfinished(folder: Path, stem: str, old: dict[str, bytes], whole: dict[str, bytes]) -> None:
    """Before the commit all is as it was; the manifest lists the new when all of it is there."""
    here, journal = found(folder), Place(folder, tuple(file.name for file in plan(stem).files)).work / JOURNAL
    if here != old:
        committing = journal.exists() and b'"committing"' in journal.read_bytes()
        assert committing or here == whole, f"changed before the commit: {sorted(here)}"
    if here[manifest.NAME] == whole[manifest.NAME]:
        assert here == whole
    for name in (*OTHERS, *files("other")):
        assert here[name] == old[name], f"another's file: {name}"


def resume(folder: Path, stem: str, overwrite: bool, whole: dict[str, bytes]) -> None:
    """The same command again; --overwrite is needed only where a command that never began needs it."""
    try:
        write(folder, stem, version="new")
    except OutputExists:
        if found(folder) != whole:  # not killed after all was done
            assert overwrite
            write(folder, stem, version="new", overwrite=True)


def main(folder: Path, stem: str, scenario: str) -> None:
    os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway
    overwrite = scenario == "overwrite"
    start = folder.with_name("start")
    start.mkdir()
    for name, raw in OTHERS.items():
        (start / name).write_bytes(raw)
    write(start, "other")
    if overwrite:
        write(start, stem, version="old")
    write(start, "later", stop=2)
    old, whole = found(start), {**OTHERS, **expected([("other", 0), (stem, "new")])}
    for call in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)
        if not run_killed(folder, stem, call, overwrite):
            break
        check_unfinished(folder, stem, old, whole)
        if call % 3 == 0 and found(folder) != whole:  # the second attempt is killed as well, a little later
            run_killed(folder, stem, call // 2 + 3, True)
        resume(folder, stem, overwrite, whole)
        assert found(folder) == whole, f"killed before call {call}"
        # one killed as it removed its journal is done; only an empty folder may be left then
        left = [name for name in work(folder) if name != LATER]
        assert all(not any((folder / name).iterdir()) for name in left), f"killed before call {call}: {left}"
        assert first(stem) in whole
    assert write(folder, "later") == 2
    assert found(folder) == {**OTHERS, **expected([("other", 0), (stem, "new"), ("later", 0)])}
    sys.stdout.write(f"{call - 1}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
