"""Mutation testing: plants faults, a seeded sample of them, and tells which no test found. See scripts/test --mutants.

    copy of the tree ─► lines each test reaches, once ─► for each mutant: its file changed, the tests that reach its
                                                          line, those of the mirroring file first, until one fails

The copy and an environment of its own lie in build/mutants: what lies in .venv, but mixtools from the copy, in
processes that tests start too. Nothing of the working tree is changed. What is found goes to a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import venv
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import yaml
from places import Mutant, ranked

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
WORK = ROOT / "build" / "mutants"
TREE, PYTHON = WORK / "tree", WORK / "venv" / "bin" / "python"
ROOMS = ("storage", "layouts", "formats", "linalg", "checking")  # one that is not there has no places


# --- the copy ---


def copy_tree() -> None:
    """The files that git knows or would, and the compiled kernels, which it ignores."""
    shutil.rmtree(TREE, ignore_errors=True)
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, TREE / name)
    import mixtools

    for library in (path for folder in mixtools.__path__ for path in Path(folder).glob("*.so")):
        shutil.copy2(library, TREE / "mixtools")


def make_environment() -> None:
    """The packages of the environment that this runs in, without its hooks, of which one leads to the working tree."""
    shutil.rmtree(WORK / "venv", ignore_errors=True)
    venv.create(WORK / "venv", with_pip=False)
    (site,) = (WORK / "venv" / "lib").glob("python*/site-packages")
    measuring = "import os; os.environ.get('COVERAGE_PROCESS_START') and __import__('coverage').process_startup()"
    (site / "mutants.pth").write_text("\n".join([str(TREE), *(p for p in sys.path if "site-packages" in p), measuring]))
    code = "import mixtools, mixtools.ops.cpu; mixtools.ops.cpu.best_instruction_set(); print(mixtools.__file__)"
    found = subprocess.run([PYTHON, "-c", code], cwd=WORK, check=True, capture_output=True, text=True).stdout.strip()
    if found != str(TREE / "mixtools" / "__init__.py"):
        raise SystemExit(f"the copy would not be tested, but {found}")


class Tests:
    """Processes that run tests of the copy, one at a time, each while a shared lock on `lock` is held, if given."""

    def __init__(self, lock: Path | None) -> None:
        self.lock = lock
        self.environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.environment["OMP_NUM_THREADS"] = "1"
        self.server: subprocess.Popen[str] | None = None

    def run(self, tests: list[tuple[str, float]]) -> tuple[int, str]:
        """Exit status, and the test that was the last to begin."""
        listed, out = WORK / "tests.json", WORK / "last-test"
        listed.write_text(json.dumps(tests))
        out.write_text("")
        with self._held():
            if self.server is None:
                pipe = subprocess.PIPE
                command = [PYTHON, HERE / "reach.py", "serve"]
                self.server = subprocess.Popen(
                    command, cwd=TREE, env=self.environment, stdin=pipe, stdout=pipe, text=True, bufsize=1
                )
            assert self.server.stdin is not None and self.server.stdout is not None
            self.server.stdin.write(json.dumps([str(listed), str(out), str(WORK / "output.txt")]) + "\n")
            return int(self.server.stdout.readline()), out.read_text()

    def collect(self, file: Path, out: Path) -> None:
        command = [PYTHON, HERE / "reach.py", "collect", file, out]
        with self._held(), (WORK / "output.txt").open("wb") as log:
            subprocess.run(command, cwd=TREE, env=self.environment, check=False, stdout=log, stderr=log)

    @contextlib.contextmanager
    def _held(self) -> Iterator[None]:
        with (self.lock or Path(os.devnull)).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield


# --- who reaches what ---


class Reach:
    """Which tests run a line, and how long each takes. Collected a file of tests at a time, and kept."""

    def __init__(self, tests: Tests) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []
        self.lines: dict[tuple[str, int], set[str]] = defaultdict(set)
        self.files: dict[str, set[str]] = defaultdict(set)
        shared = _digest(path for path in _sources() if not path.name.startswith("test_"))
        for path in sorted((TREE / "tests").rglob("test_*.py")):
            kept = WORK / "reach" / f"{path.stem}-{shared}-{_digest([path])}.json"
            if not kept.exists():
                print(f"collecting {path.relative_to(TREE)}", flush=True)
                kept.parent.mkdir(exist_ok=True)
                tests.collect(path.relative_to(TREE), kept)
            if not kept.exists():
                raise SystemExit((WORK / "output.txt").read_text())
            self._add(json.loads(kept.read_text()))

    def _add(self, found: Mapping[str, Any]) -> None:
        self.failed += found["failed"]
        self.seconds |= {test: s for test, s in found["seconds"].items() if test not in found["failed"]}
        for file, lines in found["lines"].items():
            for line, tests in lines.items():
                good = [test for test in tests if test in self.seconds]
                self.lines[file, int(line)].update(good)
                self.files[file].update(good)

    def steps(self, mutant: Mutant, most: float) -> list[list[tuple[str, float]]]:
        """Tests in the order of running, in processes: the mirroring file's that reach it; others'; the rest of those.

        The rest, because what a fixture or a cache has made is charged to the first test that asked. Of the last two,
        the quickest that take `most` seconds together.
        """
        place = mutant.place
        first, last = place.lines
        reach = set().union(*(self.lines.get((place.file, line), ()) for line in range(first, last + 1)))
        if place.at_import:
            reach |= self.files[place.file]
        reach &= self.seconds.keys()
        near = {test for test in reach if _mirrors(test, place.file)}
        files = {_file(test) for test in near or reach}
        rest = {test for test in self.seconds if _file(test) in files} - reach
        steps = (near, self._quickest(reach - near, most), self._quickest(rest, most))
        return [self._ordered(tests) for tests in steps if tests]

    def control(self, tests: Tests, most: float) -> None:
        """Run the quickest tests on the copy as it is, and leave out what fails: it would be said to find faults."""
        while (code := tests.run(self._ordered(self._quickest(set(self.seconds), most))))[0]:
            print(f"fails without a fault: {code[1]}")
            if code[1] not in self.seconds:
                raise SystemExit((WORK / "output.txt").read_text())
            self.failed.append(code[1])
            del self.seconds[code[1]]

    def _quickest(self, tests: set[str], most: float) -> set[str]:
        order = sorted(tests, key=lambda test: (self.seconds[test], test))
        sums = accumulate(self.seconds[test] for test in order)
        return {test for test, total in zip(order, sums, strict=True) if total <= most}

    def _ordered(self, tests: set[str]) -> list[tuple[str, float]]:
        """The quick first, a file after the other: to and fro would make each module's fixtures again."""
        total: dict[str, float] = defaultdict(float)
        for test in tests:
            total[_file(test)] += self.seconds[test]
        return [(t, self.seconds[t]) for t in sorted(tests, key=lambda t: (total[_file(t)], _file(t), self.seconds[t]))]


def _file(test: str) -> str:
    return test.partition("::")[0]


def _mirrors(test: str, file: str) -> bool:
    """tests/storage/test_output.py and test_output_disk.py for storage/output.py; tests/test_linalg.py for a room."""
    path, module = Path(_file(test)), Path(file)
    stem = path.stem.removeprefix("test_")
    room = module.parent.name
    return (path.parent.name == room and stem.startswith(module.stem)) or stem == room


def _sources() -> list[Path]:
    return sorted(path for top in ("mixtools", "tests") for path in (TREE / top).rglob("*.py"))


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256(version("coverage").encode())
    for path in paths:
        digest.update(f"{path.relative_to(TREE)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


# --- the mutants ---


def judge(mutant: Mutant, number: int, tests: Tests, reach: Reach, most: float) -> tuple[str, str]:
    """killed, timeout, survived or not reached; and the test that found it."""
    path = TREE / mutant.place.file
    original, times = path.read_bytes(), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    steps = reach.steps(mutant, most)
    try:
        path.write_text(mutant.source, "utf-8")
        os.utime(path, (number, number))  # of its own: Python takes bytecode for fresh whose second is the file's
        for step in steps:
            if (outcome := _found(tests, step)) is not None:
                return outcome
    finally:
        path.write_bytes(original)
        os.utime(path, ns=times)
    return ("survived" if steps else "not reached"), ""


def _found(tests: Tests, step: list[tuple[str, float]]) -> tuple[str, str] | None:
    """killed or timeout, and by whom.

    A test that fails in a row must fail alone too, or the row goes on without it: of 40 that were said to have found a
    fault, 14 passed when they were run again.
    """
    while step:
        code, last = tests.run(step)
        if code == -signal.SIGALRM:
            return "timeout", last
        if code in (0, 5):  # 5: no test is left of those listed, as parameters come from the code
            return None
        alone = [(test, seconds) for test, seconds in step if test == last]
        if not alone or tests.run(alone)[0] not in (0, 5):
            return "killed", last or "import"
        step = step[step.index(alone[0]) + 1 :]
    return None


def equivalents() -> dict[tuple[str, str, str, str], str]:
    """Reviewed changes that change nothing a test could see, with the reason."""
    listed = yaml.safe_load((HERE / "equivalent.yaml").read_text()) or []
    return {(one["file"], one.get("in", ""), one["from"], one["to"]): one["why"] for one in listed}


def sample(seed: int, size: int, only: str) -> tuple[list[Mutant], list[Mutant]]:
    """`size` mutants that are not listed as equivalent, and the equivalent ones that came up before them."""
    files = [str(p.relative_to(TREE)) for room in ROOMS for p in sorted((TREE / "mixtools" / room).glob("*.py"))]
    known, same = equivalents(), []

    def others() -> Iterable[Mutant]:
        for mutant in ranked(TREE, [file for file in files if only in file], seed):
            if mutant.identity in known:
                same.append(mutant)
            else:
                yield mutant

    return list(islice(others(), size)), same


def described(mutant: Mutant) -> dict[str, Any]:
    place = mutant.place
    what = {"file": place.file, "line": place.line, "in": place.function, "operator": mutant.operator}
    return {**what, "from": mutant.before, "to": mutant.after}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/test --mutants", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, default=200, help="mutants to judge, beside those listed as equivalent")
    parser.add_argument("--only", default="", metavar="PART", help="of files whose path holds this")
    parser.add_argument("--most", type=float, default=60, help="seconds of tests beside those of the mirroring file")
    parser.add_argument("--again", action="store_true", help="only what survived the last time; --out is left alone")
    parser.add_argument("--list", action="store_true", help="tell the sample and end")
    parser.add_argument("--lock", type=Path, metavar="FILE", help="hold a shared lock on it while tests run")
    parser.add_argument("--out", type=Path, default=ROOT / "scripts/bench/results/mutants.json")
    options = parser.parse_args()

    WORK.mkdir(parents=True, exist_ok=True)
    copy_tree()
    mutants, same = sample(options.seed, options.size, options.only)
    if options.again:
        left = json.loads(options.out.read_text())["survivors"]
        wanted = {(one["file"], one["in"], one["from"], one["to"]) for one in left}
        mutants = [mutant for mutant in mutants if mutant.identity in wanted]
    if options.list:
        for mutant in mutants:
            print(json.dumps(described(mutant)))
        return 0
    make_environment()
    tests = Tests(options.lock)
    reach = Reach(tests)
    reach.control(tests, 3 * options.most)
    results = []
    for number, mutant in enumerate(mutants, 1):
        outcome, test = judge(mutant, number, tests, reach, options.most)
        results.append({**described(mutant), "outcome": outcome, "by": test})
        print(f"{number}/{len(mutants)} {mutant.place.file}:{mutant.place.line} {mutant.operator}: {outcome} {test}")
        if outcome in ("survived", "not reached"):
            print("  - " + mutant.before + "\n  + " + mutant.after, flush=True)
    document = report(options, results, [described(mutant) for mutant in same], reach.failed)
    print_table(document)
    if not options.again:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def report(
    options: argparse.Namespace, results: list[dict[str, Any]], same: list[dict[str, Any]], failed: list[str]
) -> dict[str, Any]:
    rooms: dict[str, Counter[str]] = defaultdict(Counter)
    for one in results:
        rooms[one["file"].split("/")[1]][one["outcome"]] += 1
    for one in same:
        rooms[one["file"].split("/")[1]]["equivalent"] += 1
    found = sum(one["outcome"] in ("killed", "timeout") for one in results)
    keys = {name: [one for one in results if (one["outcome"] in ("killed", "timeout")) == (name == "found")]
            for name in ("survivors", "found")}  # fmt: skip
    return {
        "seed": options.seed, "size": len(results), "files": options.only or "all", "most": options.most,
        "tools": {name: version(name) for name in ("cosmic-ray", "coverage", "pytest")},
        "python": platform.python_version(),
        "sampled": "each place in the code with an equal chance, and one of the changes that its operators allow",
        "killed": found, "share": round(found / max(1, len(results)), 4),
        "rooms": {room: dict(sorted(counts.items())) for room, counts in sorted(rooms.items())},
        "tests left out, as they fail without a fault": failed,
        **keys, "equivalent": same,
    }  # fmt: skip


def print_table(document: Mapping[str, Any]) -> None:
    columns = ("killed", "timeout", "survived", "not reached", "equivalent")
    print("\n" + f"{'room':<10}" + "".join(f"{name:>13}" for name in columns))
    for room, counts in document["rooms"].items():
        print(f"{room:<10}" + "".join(f"{counts.get(name, 0):>13}" for name in columns))
    print(f"{document['killed']} of {document['size']} were found: {document['share']:.1%} (seed {document['seed']})")


if __name__ == "__main__":
    sys.exit(main())
