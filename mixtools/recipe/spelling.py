"""A step of a recipe as one would type it."""

from __future__ import annotations

import shlex

from .resolve import Step, values


def as_command(step: Step) -> str:
    """The step as one would type it."""
    words = ["mixtools", *step.verb.name.split()]
    flags: list[str] = []
    for key, option in step.verb.options.items():
        value = step.options.get(key)
        if key in ("src", "output", "outputs", "repo") or (key == "out" and option.required):
            words += values(value)
        elif value is not None and value != option.default:
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else {"safetensors": "--pth"}.get(key, f"--no-{flag[2:]}"))
            else:
                flags += [part for item in (value if option.many else [value]) for part in (flag, str(item))]
    return shlex.join(words + flags)
