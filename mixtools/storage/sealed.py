"""Texts that bear their own hash in their last line: as mixtools wrote them, or edited since.

A model card is written where its user may write one, too. No list beside it has to be kept up to tell them apart, and a
card keeps its seal wherever it is copied to.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CARD = "README.md"
BESIDE = "README.mixtools.md"  # the card, where somebody's own README.md is kept
PICTURE = "mixtools-card.png"  # which the card shows
RECORD = "mixtools-check.json"  # of checks (checked.py)
_MAX_BYTES = 16 << 20
_SEAL = re.compile(rb"(.*\n)<!-- written by mixtools; sha256 of what stands above: ([0-9a-f]{64}) -->\s*", re.DOTALL)


def seal(text: str) -> bytes:
    """The text, which ends with a line break, and its seal."""
    data = text.encode()
    return data + f"<!-- written by mixtools; sha256 of what stands above: {_digest(data)} -->\n".encode()


def unsealed(data: bytes) -> str | None:
    """The text that `seal` made this of, None where it was changed since; Windows' line ends, as Git may give them, do
    not count.
    """
    match = _SEAL.fullmatch(data.replace(b"\r\n", b"\n"))
    return match[1].decode() if match is not None and _digest(match[1]) == match[2].decode() else None


def is_sealed(path: Path) -> bool:
    """Whether a file is there and as `seal` left it."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return False
        return unsealed(path.read_bytes()) is not None
    except OSError:
        return False


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
