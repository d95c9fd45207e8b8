"""The journal of an output: a line for what is done, in JSON, that only ever grows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Its lines, as far as they are as they were written; a last one cut by a kill is left out."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    lines: list[dict[str, Any]] = []
    for text in raw.splitlines(keepends=True):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict) or encode(line) != text:
            break
        lines.append(line)
    return lines


def encode(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()


def commit_line(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last line that tells of a commit; empty without one."""
    return next((line for line in reversed([*lines]) if "committing" in line), {})


def difference(old: object, new: Mapping[str, Any]) -> str:
    """The names under which two keys differ."""
    if not isinstance(old, dict):
        return "everything"
    return ", ".join(sorted(name for name in {*old, *new} if old.get(name) != new.get(name)))
