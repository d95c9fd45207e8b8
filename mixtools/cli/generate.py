"""mixtools generate: text as it comes, and conversations from standard input."""

from __future__ import annotations

import sys
from typing import Any

from ..api.generating import check_chat, opening, talker
from ..errors import UsageError
from ..verbs import Verb
from . import base


def generate(verb: Verb, values: dict[str, Any], screen: base.Screen) -> int:
    """As commands.call, but that text is printed while it is made."""
    if values["prompt"] is None and values["chat"]:
        _talk(values, screen)
        return 0
    on_text = None if screen.as_json else _print
    result = verb.function(**values, on_text=on_text, progress=screen.progress())
    if screen.as_json:
        screen.result(result.document, result.lines)
    else:
        print()
    for note in result.notes:
        screen.note(note)
    return 0


def _print(piece: str) -> None:
    print(piece, end="", flush=True)


def _talk(values: dict[str, Any], screen: base.Screen) -> None:
    """Turns from standard input, one a line, until it ends."""
    if screen.as_json:
        raise UsageError("--chat without --prompt is a conversation; --json needs --prompt")
    check_chat(values["chat"], values["system"], values["parse_special"])
    messages = opening(values["system"])
    ready = talker(
        values.pop("model"), progress=screen.progress(),
        **{name: value for name, value in values.items() if name not in ("prompt", "chat", "system")},
    )  # fmt: skip
    for note in ready.notes:
        screen.note(note)
    screen.note("one line is one turn; end with Ctrl-D")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        answer = ready.answer(messages, _print)
        print()
        messages.append({"role": "assistant", "content": answer.text.strip()})
