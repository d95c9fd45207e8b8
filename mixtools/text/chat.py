"""Conversations: the chat template that goes into tokenizer_config.json, and the same prompt as pieces of text.

Mixtral 8x7B Instruct (tokenizer v1) spells its marks as text, 8x22B Instruct (v3) as control tokens:

    v1    <s> [INST] user [/INST] assistant</s> [INST] ...
    v3    <s>[INST] user[/INST] assistant</s>[INST] ...

What was tokenized in training is not one string but pieces, each with a dummy blank before it, joined by ids.
Reference: the tokenizers v1 and v3 of https://github.com/mistralai/mistral-common. A system message goes before the
first user message in v1 and before the last in v3. mistral-common joins neighbours of the same role; here they are
refused, as in the templates on the Hub. Tools and function calls of v3 are out of scope: their roles are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum
from typing import NamedTuple

from ..errors import TokenizerError

# Two noncharacters of Unicode, never to be interchanged. The template puts them inside a special token that a user
# typed, so that the loader does not take it for the token itself; tokenizer.json's normalizer deletes them again.
MARKER = "\ufdd0\ufdd1"


class Style(Enum):
    V1 = "v1"
    V3 = "v3"


class Turn(NamedTuple):
    role: str  # "user" or "assistant", alternately
    text: str  # with the system message where the style wants it


def style_of(control: Iterable[str]) -> Style:
    """The style of a tokenizer with these control tokens. Raises TokenizerError for a later one than Mixtral's."""
    names = set(control)
    if "[SYSTEM_PROMPT]" in names:
        raise TokenizerError("has the control tokens of tokenizer v7, which no Mixtral uses")
    return Style.V3 if {"[INST]", "[/INST]"} <= names else Style.V1


def turns(messages: Sequence[Mapping[str, object]], style: Style) -> list[Turn]:
    """Check a conversation and put its system message in place.

    `messages`: at most one "system" first, then "user" and "assistant" alternately, user first; each a mapping with
    "role" and "content", a string. Raises TokenizerError for anything else, and for an assistant without words.
    """
    found = [_message(index, message) for index, message in enumerate(messages)]
    system = found.pop(0).text if found and found[0].role == "system" else ""
    if not found:
        raise TokenizerError("a conversation needs a user message")
    for index, turn in enumerate(found):
        expected = "assistant" if index % 2 else "user"
        if turn.role != expected:
            raise TokenizerError("roles must alternate", expected=expected, found=turn.role)
        if turn.role == "assistant" and not turn.text:
            raise TokenizerError("an assistant message is empty")
    place = 0 if style is Style.V1 else (len(found) - 1) // 2 * 2
    if system:
        found[place] = Turn("user", f"{system}\n\n{found[place].text}")
    return found


def _message(index: int, message: Mapping[str, object]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not isinstance(content, str):
        raise TokenizerError(f"message {index} must have a role and a content, both text")
    return Turn(role, content)


def segments(conversation: list[Turn], style: Style, closed: bool = True) -> Iterator[tuple[str, bool]]:
    """(text, is a control token), in order. Text is tokenized piece by piece, each with a dummy blank before it.

    `closed`: end an assistant's turn with </s>, also the last; False leaves the last one open, to be continued.
    """
    yield "<s>", True
    for index, (role, text) in enumerate(conversation):
        if role == "user" and style is Style.V1:
            yield f"[INST] {text} [/INST]", False
        elif role == "user":
            yield from (("[INST]", True), (text, False), ("[/INST]", True))
        else:
            yield text if style is Style.V1 else text.rstrip(" "), False
            if closed or index < len(conversation) - 1:
                yield "</s>", True


def template(style: Style, control: Iterable[str]) -> str:
    """The Jinja template that renders the prompt of `style`; `control` lists the tokens to defuse in users' text.

    For a tokenizer.json that puts a dummy blank before each stretch between control tokens (tokenizer.hf_files). Text
    without control tokens renders without MARKER. Other engines than jinja2 read the same template (llama.cpp's own,
    minijinja), so it keeps to what they all have: no `//`, nothing computed, no filter but `replace`.
    """
    user, assistant, place = _PARTS[style]
    broken = {part: part[0] + MARKER + part[1:] for part in _defused(control)}
    defused = "".join(f" | replace({_quote(part)}, {_quote(other)})" for part, other in broken.items())
    lines = (
        "{%- macro plain(text) -%}",
        "{%- if text is not string -%}{{- raise_exception('A message must hold text.') -}}{%- endif -%}",
        "{{- text" + defused + " -}}",
        "{%- endmacro -%}",
        "{%- if messages and messages[0]['role'] == 'system' -%}",
        "{%- set system = messages[0]['content'] -%}{%- set turns = messages[1:] -%}",
        "{%- else -%}",
        "{%- set system = '' -%}{%- set turns = messages -%}",
        "{%- endif -%}",
        "{%- if not turns -%}{{- raise_exception('A conversation needs a user message.') -}}{%- endif -%}",
        "{{- bos_token -}}",
        "{%- set next = namespace(role='user') -%}",
        "{%- for message in turns -%}",
        "{%- if message['role'] != next.role -%}",
        "{{- raise_exception('Roles must alternate: user, assistant, user, ... after an optional system message.') -}}",
        "{%- endif -%}",
        "{%- if message['role'] == 'user' -%}",
        "{%- set next.role = 'assistant' -%}",
        "{%- set ahead = plain(system) + '\\n\\n' if system and " + place + " else '' -%}",
        "{{- " + user + " -}}",
        "{%- else -%}",
        "{%- set next.role = 'user' -%}",
        "{%- if not message['content'] -%}{{- raise_exception('An assistant message is empty.') -}}{%- endif -%}",
        "{%- set answer = plain(message['content']) -%}",
        "{{- " + assistant + " + eos_token -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
    )
    return "\n".join(lines)


# style -> user's turn, assistant's turn, and whether the system message goes into this turn
_PARTS = {
    Style.V1: (
        "'[INST] ' + ahead + plain(message['content']) + ' [/INST]'",
        "' ' + answer",
        "loop.first",
    ),
    Style.V3: (
        "'[INST]' + ahead + plain(message['content']) + '[/INST]'",
        "answer.rstrip(' ')",
        "loop.revindex < 3",  # the last message or, where an assistant ends, the one before it
    ),
}


def _defused(control: Iterable[str]) -> list[str]:
    """The strings to break up: each token, or, of the hundreds of numbered ones, the part before the number."""
    found = dict.fromkeys(re.split(r"\d", token, maxsplit=1)[0] or token for token in control)
    return [part for part in found if not any(other != part and other in part for other in found)]


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
