"""What all tests share."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from mixtools.ops import cpu

pytest_plugins = ["hub.loopback_client"]  # the Hub's double, and a client that knows no other

# A shell's background job starts with SIGINT ignored, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure, and a run can be repeated: the same examples every time.
hypothesis.settings.register_profile("mixtools", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mixtools")


@pytest.fixture(autouse=True, scope="module")
def nobody_waits_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """No power fails here, and a busy disk lets the tests that write wait for each other; those of storage/ do."""
    with pytest.MonkeyPatch.context() as patch:
        if "storage" not in request.path.parts:
            patch.setattr(os, "fsync", lambda file: os.fstat(file) and None)  # not open is an error still
        yield


@pytest.fixture(params=list(cpu.Isa), ids=lambda isa: isa.name.lower())
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> cpu.Isa:
    """Runs the test once with each instruction set that this machine has."""
    if request.param > cpu.best_instruction_set():
        pytest.skip("this machine lacks it")
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param.name.lower())
    return cpu.Isa(request.param)
