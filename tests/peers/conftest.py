"""Tests of the programs that our outputs must load in, one file or more a peer: test_NAME.py, test_NAME_*.py.

They are collected only in the environment of their peer, which scripts/test --peers makes; there each of them must
bear the mark of it, so that none is left out by a slip.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PEER = os.environ.get("MIXTOOLS_PEER")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """What is another peer's cannot even be imported here."""
    stem = collection_path.stem
    if not stem.startswith("test_"):
        return None
    mine = PEER is not None and (stem == f"test_{PEER}" or stem.startswith(f"test_{PEER}_"))
    return None if mine else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here) and not any(PEER in mark.args for mark in item.iter_markers("peers")):
            raise pytest.UsageError(f"{item.nodeid}: lacks pytest.mark.peers({PEER!r})")
