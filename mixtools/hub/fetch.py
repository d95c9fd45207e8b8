"""A model of the Hub as a local folder, through huggingface-hub's cache."""

from __future__ import annotations

import fnmatch
import glob
import re
from pathlib import Path
from typing import NamedTuple

from ..errors import HubError, InputError, LayoutError
from ..layouts.families import ADAPTER_CONFIG, adapter_error, families, family_files, find
from ..layouts.gguf_files import files_of, is_gguf, only_gguf, parts_among
from . import cache

# what goes with a model wherever it goes: documents, tokenizers, templates, the card and the pictures that it shows
_BESIDE = (
    "*.json", "*.model", "*.model.v*", "*.jinja", "*.txt", "*.md", "*.html", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_IMATRIX = ("imatrix.gguf", "imatrix_unsloth.gguf")  # what goes with --imatrix, as repositories call it
_BESIDE_BELOW = ("*.jinja", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp")  # in folders of the repository too


class Located(NamedTuple):
    """Where a model lies on this disk, and what its user should know of how it came there."""

    path: Path
    remarks: tuple[str, ...] = ()


class _UnreachableError(Exception):
    """The Hub gave no answer, as against a refusal."""


def snapshot(repository: str, revision: str = "", gguf: str | None = None) -> Located:
    """Download `org/name` (at a branch, tag or commit), or find it in the cache; the folder it lies in.

    Of a repository with several layouts, Hugging Face's safetensors come first, then Mistral's, then pickles, then a
    GGUF that is the only one. `gguf`: a file of the repository, which is meant; its place is returned. With
    HF_HUB_OFFLINE, or where the Hub does not answer, the copy in the cache is taken if it is whole.
    Raises HubError where the Hub refuses or cannot be reached and the cache has no whole copy, LayoutError if there is
    no Mixtral in it.
    """
    from huggingface_hub import constants

    name = f"{repository}@{revision}" if revision else repository
    if constants.HF_HUB_OFFLINE:
        return Located(_cached(repository, revision, name, gguf, "HF_HUB_OFFLINE is set"))
    try:
        return Located(_download(repository, revision or None, name, gguf))
    except _UnreachableError as error:
        path = _cached(repository, revision, name, gguf, f"cannot be fetched from the Hub: {error}")
        return Located(path, (f"the Hub could not be reached ({error}); the copy in its cache is used: {path}",))


def _download(repository: str, revision: str | None, name: str, gguf: str | None) -> Path:
    """Raises _UnreachableError where there was no answer, HubError for what else goes wrong there."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        # one request; list_repo_files goes on asking a Hub that does not answer for half a minute
        siblings = HfApi().model_info(repository, revision=revision).siblings or []
        names = [file.rfilename for file in siblings]
        chosen = parts_among(names, gguf, name) if gguf else choose(names, name)
        wanted = [glob.escape(file) for file in chosen]
        folder = Path(snapshot_download(repository, revision=revision, allow_patterns=wanted))
        return folder / gguf if gguf else folder
    except LayoutError:
        raise
    except Exception as error:  # the client lets errors of its HTTP library through, and that library changed
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        status = getattr(getattr(error, "response", None), "status_code", 0) if isinstance(error, HfHubHTTPError) else 0
        if isinstance(error, HFValidationError) or 400 <= status < 500:
            raise HubError(f"cannot be fetched from the Hub: {first}", file=name) from error
        raise _UnreachableError(first) from error


def _cached(repository: str, revision: str, name: str, gguf: str | None, why: str) -> Path:
    """The copy in the cache. Raises HubError, beginning with `why` the Hub is not asked, if there is no whole one."""
    from huggingface_hub import constants

    root = cache.repository(Path(constants.HF_HUB_CACHE), repository)
    try:
        folder = cache.snapshot(root, revision or "main")
        if folder is None:
            raise HubError(f"{why}; and the cache {root.parent} has no copy", file=name)
        place = folder / gguf if gguf else folder
        if is_gguf(place):
            files_of(place)
            return place
        found = find(folder)
        for file in (found.family.config, *found.names):
            if not (folder / file).is_file():
                raise InputError("is missing", file=folder / file)
    except InputError as error:
        raise HubError(f"{why}; and the copy in the cache is not whole: {error}", file=name) from error
    return folder


def choose(names: list[str], repository: str) -> list[str]:
    """The files of one layout, and what goes with them. Raises LayoutError if there is none.

    Where one file is a checkpoint by itself, its family's shards and index stay away, as they would not be read.
    """
    order = sorted(
        families(names), key=lambda family: ("safetensors" not in family.pattern, family.config != "config.json")
    )
    others = {name for family in order for name in (family.config, family.index_name)}
    for family in order:
        weights = [name for name in family_files(family, names) if name != family.index_name]
        if weights:
            whole = family.whole in weights
            mine = {family.config, None if whole else family.index_name}
            beside = [name for name in names if (name in mine if name in others else _goes_along(name))]
            return [*([str(family.whole)] if whole else weights), *beside]
    if ADAPTER_CONFIG in names:
        raise adapter_error(repository, None)
    if ggufs := [name for name in names if name.endswith(".gguf") and not name.endswith(_IMATRIX)]:
        return only_gguf(ggufs, repository)
    raise LayoutError("holds no Mixtral checkpoint in a known layout", file=repository)


def _goes_along(name: str) -> bool:
    patterns = _BESIDE_BELOW if "/" in name else (*_BESIDE, *_BESIDE_BELOW)
    return any(re.match(fnmatch.translate(pattern), name) for pattern in patterns)
