"""What --overwrite may delete: the files of an earlier output, as mixtools wrote them. All else is its owner's.

The manifest of the earlier output lists what was written, with sizes and SHA-256; what differs was edited since, and
what is not listed is somebody's. Both stay, or the command refuses before anything is written: where the new output has
a file of the same name, and where a stray weight file would be read as one of its own.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from ..errors import FormatError, OutputExists
from ..progress import Progress, Silent
from . import manifest, sealed
from .digest import of_file

WORK = ".mixtools"
# of outputs that listed only their weights
_KNOWN_DOCUMENTS = frozenset(
    {"config.json", "generation_config.json", "params.json", "tokenizer.model", "tokenizer.json"}
    | {"tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "recipe.yaml"}
    | {"model.safetensors.index.json", "laser-report.json", "laser-report.csv", "laser-report.html"}
)
_OURS = frozenset({manifest.NAME, sealed.RECORD, sealed.PICTURE})  # no manifest lists itself
_READ_AS_WEIGHTS = re.compile(r".*(\.safetensors|\.pth|\.pt|\.bin|\.index\.json|\.pth-split\d+)")
_SMALL = 64 << 20


class Stamp(NamedTuple):
    """By which a file that changes is known."""

    inode: int
    size: int
    modified: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        status = os.lstat(path)
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


def expect_output(folder: Path) -> None:
    """Raises OutputExists unless the folder is one output of mixtools, and not several that share it."""
    _listed(folder)
    if manifest.is_shared(folder):
        raise OutputExists("holds outputs of mixtools that are files by themselves; name another folder", file=folder)


def replaceable(folder: Path, names: Iterable[str], progress: Progress | None = None) -> dict[str, Stamp]:
    """Files of the output in `folder`, unchanged since they were written; every byte of them is read.

    `names`: what the new output will hold. Raises OutputExists where one of them would replace a file that is not among
    these, where a weight file is not among them, and where the folder holds no output of mixtools.
    """
    listed = _listed(folder)
    found = _unchanged(folder, listed, sorted(listed), progress or Silent())
    expect_nothing_lost(folder, found, names, listed)
    return found


def unchanged(folder: Path, names: Iterable[str], progress: Progress) -> dict[str, Stamp]:
    """These files, which are there, every byte of which is read. Raises OutputExists where one was changed."""
    found = _unchanged(folder, _listed(folder), names, progress)
    if changed := sorted({*names} - found.keys()):
        why = "was changed since mixtools wrote it; move it away, --overwrite leaves it alone"
        raise OutputExists(why, file=folder / changed[0])
    return found


def _unchanged(
    folder: Path, listed: Mapping[str, manifest.File], names: Iterable[str], progress: Progress
) -> dict[str, Stamp]:
    candidates = [name for name in names if name in listed and _is_there(folder, name, listed[name])]
    progress.start("reading what is replaced", sum(listed[name].size for name in candidates if listed[name].sha256))
    found = {}
    for name in candidates:
        stamp = Stamp.of(folder / name)  # before it is read: a change meanwhile shows
        wanted = listed[name].sha256
        if wanted is None or of_file(folder / name, progress.advance) == wanted:
            found[name] = stamp
    progress.finish()
    return found


def expect_nothing_lost(
    folder: Path, ours: Collection[str], names: Iterable[str], listed: Mapping[str, object] | None = None
) -> None:
    """Raises OutputExists for a file in the way of a new one or of its weights, `ours` being what may go."""
    in_the_way = sorted(name for name in {*names} - {*ours} if os.path.lexists(folder / name))
    stray = (
        path.name
        for path in sorted(folder.iterdir())
        if _READ_AS_WEIGHTS.fullmatch(path.name) and path.name not in ours and not path.is_dir()
    )
    for name, then in (
        *((name, "the new output has one too") for name in in_the_way),
        *((name, "it would be read as one of the new output's") for name in stray),
    ):
        why = "was changed since mixtools wrote it" if name in (listed or ()) else "was not written by mixtools"
        raise OutputExists(f"holds {name}, which {why}; {then}: move it away, --overwrite leaves it alone", file=folder)


def expect_unchanged(folder: Path, old: Mapping[str, Stamp]) -> None:
    """Raises OutputExists for what has changed since it was looked at."""
    for name, stamp in old.items():
        if not os.path.lexists(folder / name) or Stamp.of(folder / name) != stamp:
            why = f"holds {name}, which was changed while the new output was made; move it away and run this again"
            raise OutputExists(why, file=folder)


def remove(folder: Path, names: Collection[str]) -> None:
    """Delete files, those that are still there, and a folder of theirs that holds nothing else."""
    for name in names:
        (folder / name).unlink(missing_ok=True)
    parents = {parent for name in names for parent in Path(name).parents if parent.name}
    for parent in sorted(parents, reverse=True):  # what lies deeper first
        with contextlib.suppress(OSError):  # others' files are in it
            (folder / parent).rmdir()


def _listed(folder: Path) -> dict[str, manifest.File]:
    """What the manifest lists, and itself."""
    try:
        document = manifest.load(folder)
    except FormatError as error:
        why = f"{error.message}; without it --overwrite cannot tell whose the files are"
        raise OutputExists(why, file=error.file) from None
    if document is None:
        name = min(path.name for path in folder.iterdir() if path.name != WORK)
        raise OutputExists(
            f"holds {name} and no output of mixtools; --overwrite replaces nothing else, so name another folder",
            file=folder,
        )
    files: dict[str, manifest.File] = dict(document["files"])
    others = _OURS if all(file.sha256 for file in files.values()) else _OURS | _KNOWN_DOCUMENTS
    for name in others - files.keys():
        path = folder / name
        if path.is_file() and path.stat().st_size <= _SMALL:
            files[name] = manifest.File(path.stat().st_size, None)
    if sealed.is_sealed(card := folder / sealed.CARD):  # `mixtools card` put it there, in the place of the source's
        files[sealed.CARD] = manifest.File(card.stat().st_size, None)
    return files


def _is_there(folder: Path, name: str, file: manifest.File) -> bool:
    """A file of this name and size that lies in the folder; a link that took a place was not written."""
    place = Path(name)
    if not name or place.is_absolute() or ".." in place.parts or "\0" in name:
        return False
    ways = [folder / place, *(folder / parent for parent in place.parents if parent.name)]
    path = ways[0]
    return not any(way.is_symlink() for way in ways) and path.is_file() and path.stat().st_size == file.size
