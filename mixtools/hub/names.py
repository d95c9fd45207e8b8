"""How a model of the Hub is called: org/name[@revision], or one file of it, org/name/FILE.gguf[@revision]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_WORD = r"[\w-][\w.-]*"
_NAME = re.compile(rf"({_WORD}/{_WORD})(?:/((?:{_WORD}/)*{_WORD}\.gguf))?(?:@([\w./-]+))?")


class HubName(NamedTuple):
    repository: str
    gguf: str | None
    revision: str


def hub_name(text: str) -> HubName | None:
    """None for what cannot be one, and where the organization is a folder here: then a path was meant."""
    match = _NAME.fullmatch(text)
    if match is None or Path(match[1]).parent.exists():
        return None
    return HubName(match[1], match[2], match[3] or "")
