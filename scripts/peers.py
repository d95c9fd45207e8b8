"""The programs that our outputs must load in, each in an environment of its own. See scripts/test --peers.

    tests/peers/NAME.txt ─► .venv-peers/NAME: torch, what it pins, mixtools ─► pytest, the tests of that peer

An environment is made anew when its pins change, and mixtools installed into it again when mixtools does. A peer that
cannot be had is told at the end, with the reason; its whole story is in .venv-peers/NAME.log.

A pin may end in "# without dependencies", where a program asks for more than it needs or for other versions than work,
and mixtools itself too, where the peer's versions are older than it allows; or in "# removed again", for what comes
along as a dependency and does harm.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import venv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PINS = ROOT / "tests" / "peers"
ENVIRONMENTS = ROOT / ".venv-peers"
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
WHEELS_VARIABLE = "MIXTOOLS_PEER_WHEELS"
PEER_VARIABLE = "MIXTOOLS_PEER"  # tests/peers/conftest.py collects nothing without it
BESIDE = ROOT.parent / "shared" / "peers" / "wheels"
RUNS_THE_TESTS = ("pytest", "hypothesis")
NO_TESTS = 5  # pytest's exit status
ALONE, REMOVED = MARKS = ("without dependencies", "removed again")
OURS = "mixtools"

USAGE = """usage: scripts/test --peers [NAME ...] [arguments of pytest]

Runs the tests of the programs that our outputs must load in: all of them, or those named. There are: {names}.
An environment for each is made in .venv-peers from tests/peers/NAME.txt, once; MIXTOOLS_PEER_WHEELS names a folder of
wheels to take, where there is none pip builds from source packages. Exit status 1 if a test failed or no peer was had.
"""


class CannotHaveError(Exception):
    """Why a peer is not there."""


@dataclass(frozen=True)
class Outcome:
    """What came of a peer. `why_not`: it could not be had; else `status` is that of pytest."""

    name: str
    status: int = 0
    why_not: str | None = None


# --- what to install ---


def package(line: str) -> str | None:
    """The name that a line of a requirements file pins, as pip compares names; None for a comment or an option."""
    found = re.match(r"\s*([A-Za-z0-9][\w.-]*)", line)
    return re.sub(r"[-_.]+", "-", found[1]).lower() if found else None


def constraints(pins: str, ours: str) -> str:
    """Our versions, but for the packages that a peer needs in others."""
    pinned = {package(line) for line in pins.splitlines()} - {None}
    return "".join(f"{line}\n" for line in ours.splitlines() if package(line) not in pinned)


def marked(pins: str, mark: str | None) -> list[str]:
    """The requirements whose line bears that mark; without one, those with none."""
    lines = [line.partition("#") for line in pins.splitlines() if package(line)]
    return [left.strip() for left, _, said in lines if (said.strip() if said.strip() in MARKS else None) == mark]


def wheels() -> Path | None:
    """The folder of wheels that were built before. Raises CannotHaveError where one is named that is not there."""
    if named := os.environ.get(WHEELS_VARIABLE):
        if not Path(named).is_dir():
            raise CannotHaveError(f"{WHEELS_VARIABLE} names {named}, which is no folder")
        return Path(named).resolve()
    return BESIDE if BESIDE.is_dir() else None


# --- the environment ---


class Environment:
    """Of one peer, and of one process at a time while `held`."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = ENVIRONMENTS / name
        self.python = self.folder / "bin" / "python"
        self.log = ENVIRONMENTS / f"{name}.log"
        self.pins = (PINS / f"{name}.txt").read_text("utf-8")

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        ENVIRONMENTS.mkdir(exist_ok=True)
        with (ENVIRONMENTS / f"{self.name}.lock").open("wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def ready(self, ours: str) -> None:
        """Makes what is missing. `ours`: changes whenever mixtools must be installed again. Raises CannotHaveError."""
        found = wheels()
        told = constraints(self.pins, CONSTRAINTS.read_text("utf-8"))
        theirs = hashlib.sha256(f"{sys.version}\0{self.folder}\0{self.pins}\0{told}".encode()).hexdigest()
        if self._stamp("peer") != theirs:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.log.unlink(missing_ok=True)
            where = f"wheels of {found}" if found else "no folder of wheels: what has none is built, which takes long"
            print(f"making .venv-peers/{self.name} ({where})", flush=True)
            venv.create(self.folder, with_pip=True)
            # torch by itself first: its version alone decides whether gigabytes of CUDA libraries come along
            self._pip(told, found, "torch")
            self._pip(told, found, *marked(self.pins, None), *RUNS_THE_TESTS)
            if alone := [pin for pin in marked(self.pins, ALONE) if pin != OURS]:
                self._pip(told, found, "--no-deps", *alone)
            if removed := marked(self.pins, REMOVED):
                subprocess.run([self.python, "-m", "pip", "uninstall", "--yes", "--quiet", *removed], check=True)
            self._write_stamp("peer", theirs)
        if self._stamp("mixtools") != ours:
            print(f"installing mixtools into .venv-peers/{self.name}", flush=True)
            alone = OURS in marked(self.pins, ALONE)
            self._pip(told, found, *(["--no-deps", "-e", str(ROOT)] if alone else ["-e", f"{ROOT}[iq]"]))
            self._write_stamp("mixtools", ours)

    def _pip(self, constrained: str, found: Path | None, *what: str) -> None:
        file = self.folder / "constraints.txt"
        file.write_text(constrained, "utf-8")
        command = [self.python, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", "-c", file]
        command += ["--find-links", found] if found else []
        with self.log.open("a+", encoding="utf-8") as log:
            start = log.seek(0, os.SEEK_END)
            status = subprocess.run([*command, *what], stdout=log, stderr=log, check=False).returncode
            log.seek(start)
            said = log.read()
        if status:
            raise CannotHaveError(reason(said) or f"pip ended with exit status {status}")

    def _stamp(self, which: str) -> str | None:
        file = self.folder / f"{which}-installed"
        return file.read_text("utf-8") if file.is_file() else None

    def _write_stamp(self, which: str, value: str) -> None:
        (self.folder / f"{which}-installed").write_text(value, "utf-8")

    def test(self, arguments: Sequence[str]) -> int:
        """Exit status of pytest."""
        environment = {**os.environ, PEER_VARIABLE: self.name}
        environment.setdefault("OMP_NUM_THREADS", "1")
        command = [self.python, "-m", "pytest", "-q", "--durations=5", PINS, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def reason(said: str) -> str | None:
    """pip's own words for what went wrong: its first line of ERROR, which names the package."""
    return next((line.strip() for line in said.splitlines() if line.lstrip().startswith("ERROR:")), None)


# --- the command ---


def known() -> list[str]:
    return sorted(path.stem for path in PINS.glob("*.txt"))


def split(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Peers, and what goes to pytest: all from the first argument that names no peer. Raises SystemExit for a word
    before any option that is neither a peer nor a file of tests.
    """
    count = next((index for index, word in enumerate(arguments) if word not in names), len(arguments))
    rest = list(arguments[count:])
    if rest and not rest[0].startswith("-") and not (ROOT / rest[0].partition("::")[0]).exists():
        raise SystemExit(f"there is no peer {rest[0]!r}; there are: {', '.join(names)}")
    return list(arguments[:count]) or list(names), rest


def outcome(name: str, ours: str, arguments: Sequence[str]) -> Outcome:
    print(f"\n== {name}", flush=True)
    environment = Environment(name)
    try:
        with environment.held():
            environment.ready(ours)
    except CannotHaveError as error:
        print(f"cannot be had: {error}", flush=True)
        return Outcome(name, why_not=f"{error} (see .venv-peers/{name}.log)")
    return Outcome(name, environment.test(arguments))


def judged(status: int) -> str:
    """In words; a wheel that was built for another processor ends by a signal."""
    if status < 0:
        return f"FAILED, ended by {signal.Signals(-status).name}"
    return "FAILED" if status else "passed"


def verdict(outcomes: Iterable[Outcome], chosen: bool) -> tuple[list[str], int]:
    """Lines, and the exit status. `chosen`: tests were picked, and a peer may have none of them."""
    lines, ran, failed = [], 0, False
    for one in outcomes:
        if one.why_not is not None:
            lines.append(f"{one.name}: not had: {one.why_not}")
        elif one.status == NO_TESTS and chosen:
            lines.append(f"{one.name}: had; none of its tests was picked")
        else:
            ran += 1
            failed |= one.status != 0
            lines.append(f"{one.name}: had; {judged(one.status)}")
    if not ran:
        lines.append("nothing was tested")
    return lines, int(failed or not ran)


def main(arguments: Sequence[str]) -> int:
    ours, *rest = arguments
    if rest[:1] in (["--help"], ["-h"]):
        print(USAGE.format(names=", ".join(known())), end="")
        return 0
    names, chosen = split(rest, known())
    outcomes = [outcome(name, ours, chosen) for name in names]
    lines, status = verdict(outcomes, bool(chosen))
    print("\n== peers", *lines, sep="\n")
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
