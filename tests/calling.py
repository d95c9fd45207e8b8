"""The command line in the tests' own process: to start another takes longer than what most commands do."""

from __future__ import annotations

import io
import subprocess
from contextlib import redirect_stderr, redirect_stdout

import pytest

from mixtools.cli.main import main


def called(*arguments: object) -> subprocess.CompletedProcess[str]:
    """As subprocess.run has it of a process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    return subprocess.CompletedProcess([], int(caught.value.code or 0), out.getvalue(), err.getvalue())
