"""Verbs: what mixtools can be told to do. A verb is a function, its parameters are its options.

    def laser(source: Source, out: Out, *, layers: Annotated[str, Option("WHICH", "all, 5, 3,7 or 20-31.")], ...)
        │
        ├─► mixtools.laser(...)           the Python API: the function itself
        ├─► mixtools laser SRC OUT ...    the command (cli/commands.py)
        └─► - do: laser                   the recipe's step (recipe/)

So the three cannot differ in a name or a default. Parameters without an Option (progress, callbacks) are the API's own.
Nothing heavy is imported where a verb is defined: `mixtools --help` asks all of them.
"""

from __future__ import annotations

import importlib
import inspect
import types
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple


class Option(NamedTuple):
    """About a parameter. `metavar`: how a value is written: SIZE, FILE, or its choices, "gptq|llamacpp|hf".

    `key`: its name in recipes and, with dashes, on the command line, if not the parameter's. `argument`: it stands
    without a flag. `machine`: it says how and not what, changes no byte, and no recipe holds it. `flags`: another
    spelling than --key. `words`: what a FILE may be instead of one.
    """

    metavar: str = ""
    help: str = ""
    low: float | None = None
    high: float | None = None
    key: str | None = None
    argument: bool = False
    machine: bool = False
    flags: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


class Parameter(NamedTuple):
    """One option of a verb; `type` is that of a single value on the command line."""

    name: str
    key: str
    type: type
    many: bool
    required: bool
    default: Any
    option: Option


class Entry(NamedTuple):
    """A line in a table of verbs: "module:function", and another that refuses option values before anything is read."""

    function: str
    preflight: str | None = None


@dataclass(frozen=True)
class Verb:
    """`function`, and what others need to call it. `preflight` takes its options by name and raises UsageError."""

    name: str
    function: Callable[..., Result]
    parameters: Mapping[str, Parameter]
    preflight: Callable[..., None] | None = None

    @classmethod
    def of(cls, name: str, entry: Entry) -> Verb:
        function = load(entry.function)
        parameters = {parameter.name: parameter for parameter in _parameters(function)}
        return cls(name, function, parameters, load(entry.preflight) if entry.preflight else None)

    @property
    def help(self) -> str:
        """The docstring up to its last example of the command line: what follows is for callers in Python."""
        paragraphs = inspect.cleandoc(self.function.__doc__ or "").split("\n\n")
        examples = [number for number, paragraph in enumerate(paragraphs) if paragraph.startswith("Example:")]
        return "\n\n".join(paragraphs[: max(examples, default=0) + 1])


class Result(ABC):
    """What a verb found or did: typed fields, one JSON document, and lines for people.

    `notes` are asides that a person should see and no script needs; `exit_code` is the command's.
    """

    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        return 0

    @property
    @abstractmethod
    def document(self) -> dict[str, Any]:
        """Ready for JSON (what the command prints with --json)."""

    @abstractmethod
    def lines(self) -> Iterator[str]:
        """What the command prints."""

    def __str__(self) -> str:
        return "\n".join(self.lines())


@dataclass(frozen=True)
class Forecast(Result):
    """Of a dry run: sizes, memory, time; nothing was written."""

    bytes: int
    peak_memory_bytes: int
    seconds: float
    told: dict[str, Any]
    said: tuple[str, ...]

    @property
    def document(self) -> dict[str, Any]:
        return self.told

    def lines(self) -> Iterator[str]:
        yield from self.said


def load(place: str) -> Callable[..., Any]:
    """The function at "module:name", the module within mixtools."""
    module, _, name = place.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(f"{__package__}.{module}"), name)
    return found


def _parameters(function: Callable[..., Any]) -> Iterator[Parameter]:
    """Those that have an Option. Their annotations alone are evaluated: a result's type may be heavy."""
    scope = vars(inspect.getmodule(function))
    for name, parameter in inspect.signature(function).parameters.items():
        hint = parameter.annotation
        hint = eval(hint, scope) if isinstance(hint, str) else hint  # our own source, as typing.get_type_hints does
        option = next((about for about in getattr(hint, "__metadata__", ()) if isinstance(about, Option)), None)
        if option is None:
            continue
        kind, many = _single(hint.__origin__)
        required = parameter.default is inspect.Parameter.empty
        yield Parameter(name, option.key or name, kind, many, required, None if required else parameter.default, option)


def _single(hint: Any) -> tuple[type, bool]:
    """Of a union the first type; of a list its items'; texts stand for paths."""
    kinds = (
        typing.get_args(hint) if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union else ()
    )
    kind = next((kind for kind in kinds if kind is not types.NoneType), hint)
    many = typing.get_origin(kind) is list
    kind = typing.get_args(kind)[0] if many else kind
    return (str if kind is Path else kind), many
