"""Chat templates: Jinja in the sandbox, with what transformers gives them.

After chat_template_utils.py of https://github.com/huggingface/transformers: trim_blocks and lstrip_blocks, break and
continue, {% generation %} blocks, `raise_exception`, `strftime_now`, a `tojson` that leaves HTML's characters alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class _Generation(Extension):
    """{% generation %} marks what the assistant said; here it is just printed, in a scope of its own."""

    tags = {"generation"}  # noqa: RUF012  # as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Which takes longer than many renderings, and a check renders dozens of conversations by the same template."""
    return _environment().from_string(template)


def render(template: str, messages: Sequence[Mapping[str, object]], **variables: object) -> str:
    """The prompt that `template` makes of a conversation. `variables`: bos_token and the like.

    Raises ValueError with the reason if the template cannot be read, or refuses the conversation.
    """
    try:
        plain = json.loads(json.dumps(list(map(dict, messages))))  # a template may call what it is given
        values = {"tools": None, "documents": None, **variables, "messages": plain}
        return _compiled(template).render(values)
    except jinja2.TemplateError as error:
        raise ValueError(error.message or type(error).__name__) from None
    except Exception as error:  # whatever the template does: 1 // 0, None + "x", endless recursion
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
