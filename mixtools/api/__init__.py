"""The functions behind `import mixtools` that belong to no method, and the table of all verbs.

A verb (verbs.py) is one of these functions, or a method's (methods/): the API has it by its last word, the command line
by its whole name, recipes too where it makes or checks a checkpoint.
"""

from __future__ import annotations

from functools import cache

from ..methods import METHODS
from ..verbs import Entry, Verb

VERBS = {
    "inspect": Entry("api.inspecting:inspect"),
    "convert torrent-to-hf": Entry("api.converting:torrent_to_hf", "api.converting:preflight"),
    "convert to-hf": Entry("api.converting:to_hf", "api.converting:preflight"),
    "convert hf-to-torrent": Entry("api.converting:hf_to_torrent"),
    "convert expert-names": Entry("api.converting:expert_names", "api.converting:preflight_names"),
    "convert gguf-upgrade": Entry("api.converting:gguf_upgrade"),
    "perplexity": Entry("api.measuring:perplexity"),
    "check": Entry("api.measuring:check", "api.measuring:preflight"),
    **METHODS,
    "card": Entry("api.publishing:card"),
    "push": Entry("api.publishing:push", "api.publishing:preflight"),
    "generate": Entry("api.generating:generate"),
}


@cache
def verbs() -> dict[str, Verb]:
    """All of them, by the names of the command line."""
    return {name: Verb.of(name, entry) for name, entry in VERBS.items()}
