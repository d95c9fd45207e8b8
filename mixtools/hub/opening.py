"""Any model by what a user calls it: a folder, a file in it, or a name on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError
from ..layouts.checkpoint import Checkpoint
from ..layouts.detect import open_checkpoint


def locate(name: str | Path) -> Path:
    """A path that exists, or a model of the Hub, downloaded into huggingface-hub's cache.

    Raises InputError for a path that does not exist and cannot be a Hub name, HubError if the Hub refuses.
    """
    path = Path(name)
    if path.exists():
        return path
    if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?", str(name)) and not path.parent.exists():
        from . import fetch

        return fetch.snapshot(*str(name).partition("@")[::2])
    raise InputError("does not exist", file=str(name))


def open_model(model: str | Path | Checkpoint, *, strict: bool = True) -> Checkpoint:
    """A checkpoint to read tensor by tensor: its config, its slots, and `read(slot)` of each.

    `model`: a folder, a weight file in it where the folder holds two layouts, org/name[@revision] on the Hub, or a
    checkpoint that is open already. With `strict` the first problem is raised: LayoutError, ConfigError, FormatError,
    TensorError, UnsafeError. Without it, missing, unknown and misshapen tensors are listed in `problems` instead.
    """
    return model if isinstance(model, Checkpoint) else open_checkpoint(locate(model), strict=strict)
