"""From a path to the GGUF files that are one model, and from those to a Checkpoint.

NAME.gguf, or NAME-00001-of-00003.gguf ...: the names of llama-gguf-split, which llama.cpp follows by them alone
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import from_document
from ..errors import FormatError, InputError, LayoutError, MixtoolsError
from ..names import Role
from ..storage import gguf, manifest
from ..storage.gguf_values import Metadata
from ..storage.plan_gguf import COUNT, NUMBER, TENSORS
from ..storage.source import Source, missing
from ..storage.store import Entry, Store, by_name
from .checkpoint import Checkpoint, find_problems
from .families import any_of
from .gguf import GGUF, GGUF_2023, About
from .gguf_config import IMATRIX, document, expect_mixtral, text
from .variants import is_stored

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file, or a folder that holds some and no weights of another family.

    Not of what cannot be looked into.
    """
    if path.suffix == ".gguf":
        return True
    try:
        return any(_is_file(one) for one in path.iterdir()) and not any_of(path)
    except OSError:
        return False


def _is_file(path: Path) -> bool:
    """Unfinished work lies in folders whose names end so, too."""
    return path.suffix == ".gguf" and not path.is_dir()


def stem_of(file: Path) -> str:
    """The name without its suffix and, of a split one, its number."""
    match = _PART.fullmatch(file.name)
    return match["stem"] if match else file.name.removesuffix(".gguf")


def files_of(path: Path) -> list[Path]:
    """The file, or all parts of the split one that it is or that the folder holds.

    Raises LayoutError for a missing part and for a folder of several models, with their names.
    """
    if not path.is_dir():
        if not path.exists():
            raise InputError(missing(path, "does not exist"), file=path)
        match = _PART.fullmatch(path.name)
        return _parts(path.parent, match["stem"], int(match["count"])) if match else [path]
    groups = _models(one.name for one in path.iterdir() if _is_file(one))
    models = [path / names[0] for names in groups]
    if len(models) > 1:
        models = [file for file in models if not is_importance(file)] or models
    if len(models) > 1:
        names = ", ".join(file.name for file in models)
        raise LayoutError(f"holds {len(models)} GGUF files; name the one you mean: {names}", file=path)
    return files_of(models[0])


def _models(names: Iterable[str]) -> list[list[str]]:
    """Names of GGUF files, the parts of a split one together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        match = _PART.fullmatch(name)
        groups.setdefault((match["stem"], match["count"]) if match else (name, ""), []).append(name)
    return [*groups.values()]


def only_gguf(names: Iterable[str], place: str) -> list[str]:
    """Of GGUF files' names those of the one model that they are. Raises LayoutError for several, with their names."""
    groups = _models(names)
    if len(groups) > 1:
        firsts = [group[0] for group in groups]
        why = f"holds {len(firsts)} GGUF files; name the one you mean, {place}/{firsts[0]}: {', '.join(firsts)}"
        raise LayoutError(why, file=place)
    return groups[0]


def parts_among(names: Iterable[str], wanted: str, place: str) -> list[str]:
    """The file of this name, or all parts of it that there are. Raises LayoutError where it is not there."""
    names = [name for name in names if name.endswith(".gguf")]
    if wanted not in names:
        raise LayoutError(f"has no {wanted}; there is {', '.join(sorted(names)) or 'no GGUF'}", file=place)
    return next(group for group in _models(names) if wanted in group)


def _parts(folder: Path, stem: str, count: int) -> list[Path]:
    files = [folder / f"{stem}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    for file in files:
        if not file.exists():
            raise LayoutError(missing(file, f"is missing, one of {count} parts; fetch it"), file=file)
    return files


def is_importance(file: Path) -> bool:
    """Whether a file says that it is an importance matrix, in the GGUF form; what it holds is not looked at."""
    source = Source(file)
    try:
        return text(gguf.read_header(source).metadata, "general.type") == IMATRIX
    except MixtoolsError:
        return False
    finally:
        source.close()


def open_gguf(path: Path, *, strict: bool = True, remarks: tuple[str, ...] = ()) -> Checkpoint:
    """As detect.open_checkpoint, of a GGUF in either layout."""
    files = files_of(path)
    headers = [gguf.read_header(Source(file)) for file in files]
    metadata = headers[0].metadata
    expect_mixtral(metadata, files[0])
    if len(files) > 1:
        _expect_one_model(files, headers)
    entries = by_name(manifest.with_checksums(files[0].parent, _collect(headers)))
    embedding = entries.get(GGUF.rules[Role.EMBED].name)
    if embedding is None:
        raise LayoutError("is missing", file=files[0], tensor=GGUF.rules[Role.EMBED].name)
    found = document(metadata, embedding.shape[0], files[0])
    config = from_document(found, files[0])
    usual = {key: value for key, value in config.to_hf("").items() if key != "torch_dtype"}
    found = {**usual, **found}  # what a torrent's config.json is given as well
    layout = GGUF_2023 if is_stored(GGUF_2023, Role.GATE, entries) else GGUF
    tied = not is_stored(layout, Role.HEAD, entries)
    if tied:  # llama.cpp, too, takes the embedding where there is no output.weight
        layout = layout.sharing(Role.HEAD, Role.EMBED)
        found["tie_word_embeddings"] = True
    problems: list[MixtoolsError] = [*find_problems(files[0], layout, config, Store(entries))]
    if strict and problems:
        raise problems[0]
    about = About(files[0], metadata, found)
    return Checkpoint(files[0].parent, layout, config, Store(entries), problems, found, tied, remarks, gguf=about)


def _collect(headers: Iterable[gguf.Header]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for header in headers:
        for entry in header.entries:
            if (other := entries.get(entry.name)) is not None:
                raise FormatError(f"stands also in {other.source.label}", file=entry.source.label, tensor=entry.name)
            entries[entry.name] = entry
    return [*entries.values()]


def _expect_one_model(files: Sequence[Path], headers: Sequence[gguf.Header]) -> None:
    """Parts that belong together. Raises LayoutError, with the file that does not, as far as one can be told."""
    told = headers[0].metadata[TENSORS].value if TENSORS in headers[0].metadata else "none"
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        for key, wanted in ((NUMBER, number), (COUNT, len(files)), (TENSORS, told)):
            found = header.metadata[key].value if key in header.metadata else "none"
            if found != wanted:
                why = f"is not a part of the model that {files[0].name} begins ({key})"
                raise LayoutError(why, file=file, expected=wanted, found=found)
        _expect_same(headers[0].metadata, header.metadata, file)
    if (tensors := sum(len(header.entries) for header in headers)) != told:
        why = f"tells of other tensors than its parts hold; one of {len(files)} is another model's ({TENSORS})"
        raise LayoutError(why, file=files[0], expected=told, found=tensors)


def _expect_same(first: Metadata, other: Metadata, file: Path) -> None:
    """What a later part tells of the model, if anything, is what the first one tells."""
    for key, value in other.items():
        if not key.startswith("split.") and key in first and first[key] != value:
            raise LayoutError(f"is not a part of the same model as the first part: {key} differs", file=file)
