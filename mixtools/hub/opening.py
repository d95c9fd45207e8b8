"""Any model by what a user calls it: a folder, a file in it, or a name on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..layouts.checkpoint import Checkpoint
from ..layouts.detect import open_checkpoint
from ..storage.source import missing
from . import cache, fetch
from .names import hub_name


def locate(name: str | Path) -> Path:
    """Where a model lies on this disk. See `found`."""
    return found(name).path


def found(name: str | Path) -> fetch.Located:
    """A path that exists, or a model of the Hub, downloaded into huggingface-hub's cache or found there.

    `org/name/FILE.gguf` is one file of a repository. A repository's folder in that cache stands for its snapshot of
    refs/main, or its only one. Raises InputError for a path that does not exist and cannot be a Hub name, HubError if
    the Hub refuses, LayoutError for a cache's folder of several snapshots.
    """
    path = Path(name)
    if path.exists():
        return fetch.Located(cache.newest(path) if cache.is_repository(path) else path)
    if (name_there := hub_name(str(name))) is not None and not path.is_symlink():
        return fetch.snapshot(name_there.repository, name_there.revision, name_there.gguf)
    raise InputError(missing(path, "does not exist"), file=str(name))


def open_model(model: str | Path | Checkpoint, *, strict: bool = True) -> Checkpoint:
    """A checkpoint to read tensor by tensor: its config, its slots, and `read(slot)` of each.

    `model`: a folder, a weight file in it where the folder holds two layouts, org/name[@revision] on the Hub, or a
    checkpoint that is open already. With `strict` the first problem is raised: LayoutError, ConfigError, FormatError,
    TensorError, UnsafeError. Without it, missing, unknown and misshapen tensors are listed in `problems` instead.
    """
    if isinstance(model, Checkpoint):
        return model
    path, remarks = found(model)
    return open_checkpoint(path, strict=strict, remarks=remarks)
