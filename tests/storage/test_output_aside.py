"""What an output does on a thread of its own: before a commit, before the journal is closed."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from storage import small

from mixtools import errors
from mixtools.storage import manifest
from mixtools.storage.output import Output
from mixtools.storage.replacing import WORK


def fill(output: Output) -> None:
    for region, rows in small.regions(small.PLAN):
        output.add(region, [rows])


def commit(output: Output) -> None:
    output.commit(small.DOCUMENTS, small.LAST, lambda files: manifest.encode({}, files, {}))


def test_a_commit_waits_for_it(tmp_path: Path) -> None:
    """It still writes into the work folder, which the commit removes."""
    begun, may = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        assert may.wait(30)
        (output.work / "states").write_bytes(b"x")
        output.note("states", 1)

    with Output(tmp_path, small.PLAN, small.KEY) as output:
        done = output.aside(work)
        assert begun.wait(30)
        fill(output)  # meanwhile
        assert not done.done()
        threading.Timer(0.2, may.set).start()
        commit(output)
        assert done.done() and output.notes == {"states": 1}
    assert small.found(tmp_path) == small.expected()
    assert not (tmp_path / WORK).exists()


def test_the_journal_is_not_closed_under_it(tmp_path: Path) -> None:
    """Its number may be another file's by then. The next run knows what was noted."""
    may = threading.Event()

    def work() -> None:
        assert may.wait(30)
        output.note("states", 2)

    with Output(tmp_path, small.PLAN, small.KEY) as output:  # and no commit
        output.aside(work)
        threading.Timer(0.2, may.set).start()
    with Output(tmp_path, small.PLAN, small.KEY) as output:
        assert output.notes == {"states": 2}


def test_what_it_raises_stops_a_commit(tmp_path: Path) -> None:
    def full() -> None:
        raise errors.DiskError("the disk is full")

    with Output(tmp_path, small.PLAN, small.KEY) as output:
        output.aside(full)
        fill(output)
        with pytest.raises(errors.DiskError, match="disk is full"):
            commit(output)
    assert not small.found(tmp_path)
    small.write(tmp_path)
    assert small.found(tmp_path) == small.expected()
