"""Texts that bear their own hash in their last line: as mixtools wrote them, or edited since.

A model card is written where its user may write one, too. No list beside it has to be kept up to tell them apart, and a
card keeps its seal wherever it is copied to.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

CARD = "README.md"
PICTURE = "mixtools-card.png"  # which the card shows
RECORD = "mixtools-check.json"  # of checks (checked.py)
_MAX_BYTES = 16 << 20
_SEAL = re.compile(rb"(.*\n)<!-- written by mixtools; sha256 of what stands above: ([0-9a-f]{64}) -->\s*", re.DOTALL)


def seal(text: str) -> bytes:
    """The text, which ends with a line break, and its seal."""
    data = text.encode()
    return data + f"<!-- written by mixtools; sha256 of what stands above: {_digest(data)} -->\n".encode()


def is_sealed(path: Path) -> bool:
    """Whether a file is there and as `seal` left it; Windows' line ends, as Git may give it, do not count."""
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return False
        match = _SEAL.fullmatch(path.read_bytes().replace(b"\r\n", b"\n"))
    except OSError:
        return False
    return match is not None and _digest(match[1]) == match[2].decode()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
