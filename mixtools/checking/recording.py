"""What a check leaves behind for `card` and `push`: which bytes it judged, and what it found."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MixtoolsError
from ..progress import Progress, Silent
from ..storage import checked
from ..storage.digest import of_file
from ..storage.manifest import File
from ..storage.replacing import Stamp

if TYPE_CHECKING:
    from ..layouts.checkpoint import Checkpoint
    from .judge import Check

_OURS = re.compile(r"mixtools.*\.json|report\.json|laser-report\.json|(.*\.)?quantize-report\.json")
_READ = re.compile(r".*\.(json|jinja)|tokenizer\.model(\.v\d+)?|merges\.txt")


def name_of(output: Checkpoint) -> str:
    """By which the output is called in its folder's record: a GGUF's first file, else the folder itself."""
    return checked.FOLDER if output.gguf is None else min(path.name for path in _weights(output))


def files_of(output: Checkpoint) -> list[Path]:
    """Weights, and the documents beside them that loaders act on; card, reports and other people's files are none."""
    weights = _weights(output)
    if output.gguf is not None:
        return weights
    beside = (path for path in output.folder.iterdir() if _READ.fullmatch(path.name) and path.is_file())
    return sorted({*weights, *(path for path in beside if not _OURS.fullmatch(path.name))})


def hashes(paths: list[Path], progress: Progress | None = None) -> dict[str, File]:
    """Size and SHA-256 by name; every byte is read. Raises OSError."""
    progress = progress or Silent()
    progress.start("hashing", sum(path.stat().st_size for path in paths))
    found = {path.name: File(path.stat().st_size, of_file(path, progress.advance)) for path in paths}
    progress.finish()
    return found


def stamps(output: Checkpoint) -> dict[Path, Stamp]:
    """Of the files as they are now. Raises OSError."""
    return {path: Stamp.of(path) for path in files_of(output)}


def leave(
    output: Checkpoint, source: Checkpoint, check: Check, before: Mapping[Path, Stamp], progress: Progress | None = None
) -> str | None:
    """Write the record beside the output; where it cannot be, why not: the check itself stands.

    `before`: stamps() of when the check began, since another file in the place of one was not checked.
    """
    try:
        found = hashes([*before], progress)
        if stamps(output) != before:
            return "the verdict is not recorded for card and push: the output was changed while it was checked"
        places = {str(folder) for one in (source, output) for folder in (one.folder, one.folder.absolute())}
        document = _portable(check.document, sorted(places, key=len, reverse=True))
        checked.write(output.folder, name_of(output), checked.Record(check.verdict, found, document))
    except (OSError, MixtoolsError) as error:
        return f"the verdict is not recorded for card and push: {error}"
    return None


def _weights(output: Checkpoint) -> list[Path]:
    return sorted({path for source in output.store.sources for path in source.paths})


def _portable(told: Any, places: Sequence[str]) -> Any:
    """Without the folders of the machine it was made on, since it is published."""
    if isinstance(told, dict):
        return {key: _portable(value, places) for key, value in told.items()}
    if isinstance(told, list):
        return [_portable(value, places) for value in told]
    if isinstance(told, str):
        for place in places:
            name = Path(place).name
            told = name if told == place else told.replace(f"{place}/", "")
    return told
