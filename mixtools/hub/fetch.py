"""A model of the Hub as a local folder, through huggingface-hub's cache."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from ..errors import HubError, LayoutError
from ..layouts.detect import FAMILIES

_BESIDE = r"(tokenizer.*|special_tokens_map\.json|chat_template\.jinja|generation_config\.json|mixtools\.json)"

T = TypeVar("T")


def snapshot(repository: str, revision: str = "") -> Path:
    """Download `org/name` (at a branch, tag or commit), or find it in the cache; the folder it lies in.

    Of a repository with several layouts, Hugging Face's safetensors come first, then Mistral's, then pickles.
    Raises HubError where the Hub or the network refuses, LayoutError if there is no Mixtral in it.
    """
    from huggingface_hub import HfApi, snapshot_download

    name = f"{repository}@{revision}" if revision else repository
    names = _ask(name, lambda: HfApi().list_repo_files(repository, revision=revision or None))
    wanted = choose(names, name)
    return Path(_ask(name, lambda: snapshot_download(repository, revision=revision or None, allow_patterns=wanted)))


def _ask(name: str, request: Callable[[], T]) -> T:
    """One request to the Hub; whatever goes wrong there is a HubError."""
    try:
        return request()
    except Exception as error:  # the client lets errors of its HTTP library through, and that library changed
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise HubError(f"cannot be fetched from the Hub: {first}", file=name) from error


def choose(names: list[str], repository: str) -> list[str]:
    """The files of one layout, and what belongs beside them. Raises LayoutError if there is none."""
    order = sorted(FAMILIES, key=lambda family: ("safetensors" not in family.pattern, family.config != "config.json"))
    for family in order:
        weights = [name for name in names if re.fullmatch(family.pattern, name)]
        if weights:
            beside = [name for name in names if re.fullmatch(_BESIDE, name)]
            wanted = {family.index_name, family.config}
            return [*weights, *beside, *(name for name in names if name in wanted)]
    raise LayoutError("holds no Mixtral checkpoint in a known layout", file=repository)
