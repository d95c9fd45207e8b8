"""Kills the recipe of everything at random moments, and runs it again each time, to the end.

Run as a script in a process of its own (it forks: Python and torch take as long to start as several steps):
`killed_recipe.py WHOLE KILLED KEY=VALUE...`. Makes all of it in WHOLE, where nobody disturbs it, and in KILLED. Writes
the number of runs that were killed.
"""

from __future__ import annotations

import importlib
import os
import random
import select
import signal
import sys
import time
from pathlib import Path

from mixtools.cli.main import main as command

KILLS = 10
HEAVY = ("torch", "scipy.linalg", "matplotlib.backends.backend_agg", "mixtools.methods.laser.budget",
         "mixtools.methods.quantize.calibrated", "mixtools.checking.judge", "mixtools.publishing.card")  # fmt: skip


def run(folder: Path, values: list[str], seconds: float | None = None) -> bool:
    """Whether it came to its end; killed after `seconds`."""
    if (child := os.fork()) == 0:
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            command(["run", "everything", *values, "--quiet"])
        except SystemExit as done:
            os._exit(int(done.code or 0))
        os._exit(1)
    ended = os.pidfd_open(child)
    if not select.select([ended], [], [], seconds)[0]:
        os.kill(child, signal.SIGKILL)
    os.close(ended)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, status
    return not os.WIFSIGNALED(status)


def main(whole: Path, killed: Path, values: list[str]) -> None:
    for name in HEAVY:  # imported, and nothing more: a run knows nothing of another
        importlib.import_module(name)
    began = time.monotonic()
    assert run(whole, values)
    seconds = time.monotonic() - began
    chance, kills = random.Random(12), 0
    while kills < KILLS and not run(killed, values, chance.uniform(0.03, 0.35) * seconds):
        kills += 1
    assert run(killed, values)
    sys.stdout.write(f"{kills}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
