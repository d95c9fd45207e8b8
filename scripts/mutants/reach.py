"""Runs in the mutated copy's environment: which lines each test reaches, or some tests in a given order.

reach.py collect FILE OUT    run a file of tests; for each test its seconds and the lines of mixtools it runs,
                             in processes that it starts too; the tests that fail
reach.py serve               for each line [LIST, OUT, LOG] of standard input: run the tests of LIST ([[test,
                             seconds], ..]) in a fork until one fails, OUT says which, and print its exit status
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

LIMITS = {resource.RLIMIT_AS: 16 << 30, resource.RLIMIT_FSIZE: 4 << 30}  # a mutant may ask for anything
PACKAGES = (
    "jinja2", "numpy", "safetensors.torch", "scipy.integrate", "scipy.linalg", "scipy.optimize", "sentencepiece",
    "tokenizers", "torch", "transformers.models.mixtral.modeling_mixtral", "yaml",
)  # fmt: skip
SLACK = 90  # seconds: for the start, for what lies between two tests, and for each beside ten times what it takes
TEST = "MUTANTS_TEST"  # the environment's variable that tells a process whose test it works for
COMMON = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=no"]
LATE = [
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # of plugins imported before pytest began
    "-W", "ignore::pytest.PytestUnraisableExceptionWarning",  # what a fork inherits ends when it likes, in any test
]  # fmt: skip


class Collecting:
    """Tells coverage whose the next lines are."""

    def __init__(self, coverage: Any) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.coverage.switch_context(item.nodeid)
        os.environ[TEST] = item.nodeid
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.seconds[item.nodeid] = time.perf_counter() - start

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


class Running:
    """Only the tests asked for, in their order, none longer than it may take."""

    def __init__(self, tests: list[tuple[str, float]], out: Path) -> None:
        self.place = {test: number for number, (test, _) in enumerate(tests)}
        self.seconds = dict(tests)
        self.out = out

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((i for i in items if i.nodeid in self.place), key=lambda item: self.place[item.nodeid])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        self.out.write_text(item.nodeid)  # whoever is last here failed, or was stopped by the alarm
        signal.alarm(int(SLACK + 10 * self.seconds[item.nodeid]))
        try:
            return (yield)
        finally:
            signal.alarm(SLACK)


def collect(file: str, out: Path) -> None:
    import coverage

    settings = out.with_suffix(".rc")
    data = out.with_suffix(".data")
    here = Path.cwd()
    settings.write_text(
        f"[run]\ninclude = {here}/mixtools/*\nparallel = true\ndata_file = {data}\ncontext = ${{{TEST}-}}\n"
        "disable_warnings = no-data-collected,module-not-imported,module-not-measured\n"
    )
    measured = coverage.Coverage(config_file=str(settings), context=None)
    os.environ["COVERAGE_PROCESS_START"] = str(settings)  # for processes that a test starts
    measured.start()
    plugin = Collecting(measured)
    pytest.main([*COMMON, f"--basetemp={out.with_suffix('.tmp')}", file], plugins=[plugin])
    measured.stop()
    measured.save()
    measured.combine()
    found = measured.get_data()
    lines: dict[str, dict[int, list[str]]] = {}
    for path in found.measured_files():
        lines[str(Path(path).relative_to(here))] = {
            line: tests for line, names in found.contexts_by_lineno(path).items() if (tests := [n for n in names if n])
        }
    out.write_text(json.dumps({"seconds": plugin.seconds, "failed": plugin.failed, "lines": lines}))


def run(listed: Path, out: Path) -> int:
    tests = [(test, seconds) for test, seconds in json.loads(listed.read_text())]
    files = list(dict.fromkeys(test.partition("::")[0] for test, _ in tests))
    arguments = [*COMMON, *LATE, "-x", f"--basetemp={out.with_suffix('.tmp')}", *files]
    return pytest.main(arguments, plugins=[Running(tests, out)])


def unmount(folder: Path) -> None:
    """The small disks of tests that were stopped: with one left, the next run's first test could not clear the folder,
    and would be said to have found a fault.
    """
    for line in Path("/proc/self/mounts").read_text().splitlines():
        place = line.split()[1]
        if place.startswith(f"{folder}/"):
            subprocess.run(["umount", "-l", place], check=False)


def serve() -> None:
    """Each time a process that has imported what is not mixtools, which takes longer than most tests do."""
    for name in PACKAGES:
        importlib.import_module(name)
    for line in sys.stdin:
        listed, out, log = map(Path, json.loads(line))
        if (child := os.fork()) == 0:
            os.setsid()
            signal.alarm(SLACK)  # nothing handles it: the process ends
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(file, stream)
            code = 3
            try:
                code = run(listed, out)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what the tests have started
        unmount(out.with_suffix(".tmp"))
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    for limit, most in LIMITS.items():
        resource.setrlimit(limit, (most, most))
    if sys.argv[1] == "collect":
        collect(sys.argv[2], Path(sys.argv[3]))
    else:
        serve()
