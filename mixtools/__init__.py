"""mixtools: read, transform, check and publish Mixtral checkpoints in bounded memory.

    import mixtools

    mixtools.convert("mixtral-torrent", "mixtral-hf")
    print(mixtools.check("mixtral-hf", "mixtral-torrent").verdict)

Each function takes the options of its command as keywords, returns a typed result (`document` is what --json prints,
`str()` what the command does), prints nothing, and raises the errors of mixtools.errors. Nothing heavy is imported
before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import errors as errors
from .version import __version__ as __version__

if TYPE_CHECKING:  # for readers of types; at run time __getattr__ finds them, and every method of methods/ besides
    from .api.converting import convert as convert
    from .api.converting import expert_names as expert_names
    from .api.generating import generate as generate
    from .api.inspecting import inspect as inspect
    from .api.measuring import check as check
    from .api.measuring import perplexity as perplexity
    from .api.publishing import card as card
    from .api.publishing import push as push
    from .hub.opening import open_model
    from .methods.laser.verbs import laser as laser
    from .methods.laser.verbs import spectrum as spectrum
    from .methods.quantize.imatrix import imatrix as imatrix
    from .methods.quantize.verbs import quantize as quantize
    from .recipe.run import run_recipe as run_recipe

    open = open_model

_FUNCTIONS = {
    "open": "hub.opening:open_model",
    "inspect": "api.inspecting:inspect",
    "convert": "api.converting:convert",
    "expert_names": "api.converting:expert_names",
    "perplexity": "api.measuring:perplexity",
    "check": "api.measuring:check",
    "card": "api.publishing:card",
    "push": "api.publishing:push",
    "generate": "api.generating:generate",
    "run_recipe": "recipe.run:run_recipe",
}


def _functions() -> dict[str, str]:
    """Where each function of the API is defined."""
    from .methods import METHODS

    return {**_FUNCTIONS, **{name: entry.function for name, entry in METHODS.items()}}


def __getattr__(name: str) -> Any:
    if name.startswith("_") or name not in (places := _functions()):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .verbs import load

    return load(places[name])


def __dir__() -> list[str]:
    return sorted(["errors", "__version__", *_functions()])
