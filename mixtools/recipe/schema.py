"""The verbs that a recipe may use, with the options that it may give them: those of the functions themselves."""

from __future__ import annotations

from collections.abc import Mapping

from ..verbs import Parameter
from ..verbs import Verb as Function
from .resolve import Option, Verb

_MODELS = ("SRC", "OUTPUT", "SOURCE", "MODEL")  # metavars, by what they stand for
_FOLDERS = ("OUT", "DIR", "OUT.gguf", "NEW")  # of a file the folder that it lies in


def usable(verbs: Mapping[str, Function]) -> dict[str, Function]:
    """Those that make one checkpoint of another, check one, or publish some."""
    return {
        name: verb for name, verb in verbs.items()
        if {"source", "out"} <= _required(verb) or _checks(verb) or "outputs" in _required(verb)
    }  # fmt: skip


def _required(verb: Function) -> set[str]:
    return {name for name, parameter in verb.parameters.items() if parameter.required}


def _checks(verb: Function) -> bool:
    return {"output", "against"} <= _required(verb)


def schema(verb: Function) -> Verb:
    """As recipes see it."""
    parameters = verb.parameters.values()
    options = {parameter.key: _option(parameter) for parameter in parameters if not parameter.option.machine}
    return Verb(verb.name, options, frozenset(parameter.key for parameter in parameters if parameter.option.machine))


def _option(parameter: Parameter) -> Option:
    """Type, limits and choices, as the function declares them."""
    about = parameter.option
    return Option(
        type=parameter.type, required=parameter.required, default=parameter.default, many=parameter.many,
        choices=tuple(about.metavar.split("|")) if "|" in about.metavar else (),
        low=about.low, high=about.high,
        file=about.metavar == "FILE", folder=about.metavar in _FOLDERS, model=about.metavar in _MODELS,
        words=about.words,
    )  # fmt: skip
