"""huggingface-hub's cache on this disk: models--org--name/{refs,snapshots,blobs}, read without asking the Hub.

Described at https://huggingface.co/docs/huggingface_hub/guides/manage-cache: refs/<branch or tag> holds a commit,
snapshots/<commit> the files, as links to blobs.
"""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import InputError, LayoutError

_LONGEST = 256  # bytes of a ref: a commit has 40


def is_repository(path: Path) -> bool:
    """Whether a folder is a repository of the cache, above its snapshots."""
    return (path / "snapshots").is_dir() and (path.name.startswith("models--") or (path / "refs").is_dir())


def is_snapshot(folder: Path) -> bool:
    """Whether a folder is a snapshot in the cache: what lies there is the Hub's."""
    return folder.absolute().parent.name == "snapshots" and is_repository(folder.absolute().parents[1])


def hub_id(folder: Path) -> str | None:
    """`org/name` of a snapshot in the cache; None for any other folder."""
    match = re.fullmatch(r"models--([^/]+?)--(.+)", folder.absolute().parent.parent.name)
    return f"{match[1]}/{match[2]}" if match and is_snapshot(folder) else None


def repository(cache: Path, name: str) -> Path:
    """Where the cache keeps `org/name`, whether it does or not."""
    return cache / f"models--{name.replace('/', '--')}"


def newest(root: Path) -> Path:
    """The snapshot that a repository's folder stands for: that of refs/main, else the only one.

    Raises LayoutError where that is none, or several.
    """
    if (found := snapshot(root, "main")) is not None:
        return found
    there = _snapshots(root)
    if len(there) != 1:
        if not there:
            raise LayoutError("is a repository of the Hub's cache without a snapshot; fetch it again", file=root)
        choices = " or ".join(str(root / "snapshots" / name) for name in there)
        raise LayoutError(f"holds {len(there)} snapshots and no refs/main; name the one you mean: {choices}", file=root)
    return root / "snapshots" / there[0]


def snapshot(root: Path, revision: str) -> Path | None:
    """The snapshot of a branch, tag or commit; None where the cache does not know the revision.

    Raises LayoutError where it knows the revision and lacks its snapshot.
    """
    parts = revision.split("/")
    if ".." in parts or "" in parts:
        return None
    ref, there = root.joinpath("refs", *parts), _snapshots(root)
    try:
        commit = ref.read_bytes()[:_LONGEST].decode("ascii", "replace").strip() if ref.is_file() else revision
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=ref) from None
    if commit in there:  # a name of the folder's own entries, so that nothing else can be reached
        return root / "snapshots" / commit
    if commit != revision:
        found = f"; there are {', '.join(there)}" if there else ""
        raise LayoutError(f"names the snapshot {commit!r}, which is not there{found}", file=ref)
    return None


def _snapshots(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in (root / "snapshots").iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=root / "snapshots") from None
