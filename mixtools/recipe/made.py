"""recipe.yaml beside what a recipe's step made: what it was, and whether the step need run again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..errors import OutputExists, RecipeError
from ..storage import sealed
from ..version import __version__
from .resolve import Recipe, Step, read

NAME = "recipe.yaml"
_EDGE = 1 << 20  # bytes of a large file that are looked at, at either end


def resolved(recipe: Recipe, steps: Sequence[Step], step: Step, inputs: str) -> bytes:
    """recipe.yaml of what `step` made: a recipe itself, all values in it. `inputs` is digest()'s."""
    made = {"step": step.name, "mixtools": __version__, "inputs": inputs}
    document = {
        "name": recipe.name, "description": recipe.description, "steps": [s.document() for s in steps], "made": made,
    }  # fmt: skip
    text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)
    return f"# The recipe, as it ran, by which this was made; `mixtools run {NAME}` does it again.\n{text}".encode()


def place(out: Path) -> Path:
    """Where the recipe of an output lies: in its folder, or beside its file."""
    return out.with_name(f"{out.stem}.{NAME}") if out.suffix == ".gguf" else out / NAME


def expect_free(out: Path) -> None:
    """Raises OutputExists where a file that no run left has the name of the recipe's copy."""
    file = place(out)
    if file.exists() and _made(file) is None:
        raise OutputExists("is there, and no copy that a run left; name another output, or move it away", file=file)


def _made(file: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Of such a copy what it says of the making, and the step that made it; None for what is none."""
    try:
        document = yaml.safe_load(read(file))
        made = document["made"]
        return made, next(s for s in document["steps"] if s.get("as") == made["step"])
    except (RecipeError, yaml.YAMLError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def is_made(step: Step, inputs: str) -> bool:
    """Whether the step's output is there, whole, as these options make it of these inputs."""
    from ..storage.replacing import WORK

    out = step.out
    if out is None or not out.exists() or (out / WORK).exists() or (found := _made(place(out))) is None:
        return False
    made, entry = found
    if {**entry, "as": step.name} != step.document() or (made["inputs"], made["mixtools"]) != (inputs, __version__):
        return False
    born = place(out).stat().st_mtime_ns  # a source of the same size, changed since, is newer than this
    return all(file.stat().st_mtime_ns <= born for path in step.inputs() for file in _files(Path(path)))


def digest(paths: Iterable[Path]) -> str:
    """Of inputs as `is_made` compares them: small files whole, of large ones size, head and tail.

    A torch zip's tail and our manifest hold the checksums of all tensors.
    """
    found = hashlib.sha256()
    for path in paths:
        for file in _files(path):
            size = file.stat().st_size
            found.update(f"{file.name} {size}\n".encode())
            with file.open("rb") as stream:
                found.update(stream.read(_EDGE))
                stream.seek(max(_EDGE, size - _EDGE))
                found.update(stream.read(_EDGE))
    return found.hexdigest()[:32]


def _files(path: Path) -> list[Path]:
    """What of an input counts: no copied recipe, nothing hidden, nothing that `check` and `card` leave there later."""
    if path.is_dir():
        return sorted(one for one in path.iterdir() if one.is_file() and not _is_beside(one))
    return [path] if path.is_file() else []


def _is_beside(file: Path) -> bool:
    later = (sealed.RECORD, sealed.CARD, sealed.PICTURE)
    return file.name in later or file.name.endswith(NAME) or file.name.startswith(".")
