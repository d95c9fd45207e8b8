"""A verb as a command: its parameters become options, its result is printed."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..verbs import Parameter, Verb
from . import base

Call = Callable[[Verb, dict[str, Any], base.Screen], int]
_PATHS = ("OUT", "FILE", "DIR")
_SHARED = {"json": base.Json, "quiet": base.Quiet, "debug": base.Debug}


def call(verb: Verb, values: dict[str, Any], screen: base.Screen) -> int:
    """Carry the verb out and print what it answers; the exit code."""
    result = verb.function(**values, progress=screen.progress())
    screen.tell(result)
    return result.exit_code


def command(verb: Verb, how: Call = call) -> Callable[..., int]:
    """A function that typer takes for a command: of the verb's parameters, and what every command has."""
    names = {parameter.key: name for name, parameter in verb.parameters.items()}

    def run(*, json: bool, quiet: bool, debug: bool, **given: Any) -> int:
        return how(verb, {names[key]: value for key, value in given.items()}, base.Screen(json, quiet))

    kind = inspect.Parameter.KEYWORD_ONLY
    parameters = [
        inspect.Parameter(
            one.key, kind, annotation=_hint(one), default=inspect.Parameter.empty if one.required else one.default
        )
        for one in verb.parameters.values()
    ]
    parameters += [inspect.Parameter(name, kind, annotation=hint, default=False) for name, hint in _SHARED.items()]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # any callable may have one
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__doc__, run.__name__ = verb.help, verb.function.__name__
    return run


def _hint(parameter: Parameter) -> Any:
    """The annotation by which typer knows it."""
    about = parameter.option
    kind: Any = Path if about.metavar in _PATHS else parameter.type  # shells complete paths
    kind = types.GenericAlias(list, kind) if parameter.many else kind
    kind = kind | None if not parameter.required and parameter.default is None else kind
    text, metavar = about.help or None, about.metavar or None
    if about.argument:
        return Annotated[kind, typer.Argument(help=text, metavar=metavar)]
    flags = about.flags or ("--" + parameter.key.replace("_", "-"),)
    return Annotated[kind, typer.Option(*flags, help=text, metavar=metavar, min=about.low, max=about.high)]
