"""The YAML at the head of a model card."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

_MAX_BYTES = 1 << 20


def read(card: Path) -> Mapping[str, Any]:
    """Values are texts, lists and mappings of them; empty without a head that can be read."""
    try:
        return split(card.read_text("utf-8", "replace"))[0] if card.stat().st_size <= _MAX_BYTES else {}
    except OSError:
        return {}


def split(text: str) -> tuple[Mapping[str, Any], str]:
    """Head, as `read` gives it, and what follows it."""
    import yaml

    match = re.match(r"\ufeff?---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    try:
        found = yaml.load(match[1], yaml.BaseLoader) if match else {}  # texts alone: Norwegian is no, and no false
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError):
        found = {}
    return found if isinstance(found, dict) else {}, text[match.end() :] if match else text


def texts(value: Any) -> list[str]:
    """One, or a list of them: those that UTF-8 can hold, since YAML can write others."""
    return [one for one in (value if isinstance(value, list) else [value]) if is_text(one)]


def is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value) and not re.search("[\ud800-\udfff]", value)
