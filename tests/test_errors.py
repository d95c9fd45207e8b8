"""The tree drawn in the docstring is the real one, and every message is one line that a user can act on."""

from __future__ import annotations

import json
import re

import pytest

from mixtools import errors


def drawn() -> dict[str, tuple[str | None, int]]:
    """Each class of the docstring's tree: its parent and its exit code."""
    found: dict[str, tuple[str | None, int]] = {}
    path: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        if (match := re.match(r"([ │├└─]*)([A-Z]\w+) +(\d+)\b", line)) is None:
            continue
        depth, name = len(match[1]), match[2]
        while path and path[-1][0] >= depth:
            path.pop()
        found[name] = (path[-1][1] if path else None, int(match[3]))
        path.append((depth, name))
    return found


def real() -> dict[str, tuple[str | None, int]]:
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MixtoolsError)]
    root = errors.MixtoolsError
    return {c.__name__: (None if c is root else c.__bases__[0].__name__, c.exit_code) for c in classes}


def test_tree() -> None:
    assert len(drawn()) > 15
    assert drawn() == real()


def test_codes_of_the_command_line() -> None:
    codes = {name: code for name, (_, code) in real().items()}
    expected = {
        "MixtoolsError": 1, "UsageError": 2, "RecipeError": 2, "InputError": 3, "CheckFailed": 4, "DiskError": 5,
        "MemoryBudgetError": 5, "UnsafeError": 6, "HubError": 7, "OutputExists": 8, "OutputLocked": 8,
        "Interrupted": 130,
    }  # fmt: skip
    assert {name: codes[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "why"),
        ({"file": "f"}, "f: why"),
        ({"tensor": "t"}, "tensor t: why"),
        ({"file": "f", "tensor": "t", "expected": 1, "found": 0}, "f: tensor t: why: expected 1, found 0"),
        ({"expected": 1}, "why"),
    ],
)
def test_text(fields: dict[str, object], text: str) -> None:
    error = errors.FormatError("why", **fields)
    assert str(error) == text
    assert error.document()["error"] == {
        "type": "FormatError", "message": text, "file": fields.get("file"), "tensor": fields.get("tensor"),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J\x1b]0;x\x07", "\u202e", "\ud800", "a\0b", "x" * 100_000, "é\t"])
def test_hostile_names_stay_on_one_line(name: str) -> None:
    error = errors.FormatError(f"names {name}", tensor=name, expected=name, found=name)
    assert str(error).isprintable()
    assert len(str(error)) < 10_000
    assert str(error).encode()
    assert json.loads(json.dumps(error.document()))["error"]["tensor"] == name


def test_cause_stays_readable_behind_a_long_name() -> None:
    assert "the file is damaged" in str(errors.ChecksumError("the file is damaged", tensor="x" * 100_000))
