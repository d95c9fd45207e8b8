"""mixtools run and mixtools recipe: whole pipelines, each step one of the other commands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from ..recipe import resolve
from ..recipe import run as running
from ..verbs import Verb
from . import base

app = typer.Typer(help="The recipes that come along, and the check of one's own.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `mixtools recipe ls`.")]
Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Variables, or steps.NAME.OPTION=VALUE.")
]


def run(verb: Verb, values: dict[str, Any], screen: base.Screen) -> int:
    """As commands.call, but each step is told when it is done."""

    def begun(number: int, count: int, step: resolve.Step) -> None:
        screen.note(f"step {number} of {count}: {step.name}")

    def ended(done: running.Done) -> None:
        for note in done.result.notes if done.result else ():
            screen.note(f"note: {note}")
        _print([] if screen.as_json else done.lines())

    result = verb.function(**values, on_begin=begun, on_step=ended, progress=screen.progress())
    screen.result(result.document, result.lines if values["dry_run"] else lambda: ())
    return result.exit_code


def _print(lines: Iterable[str]) -> None:
    for line in lines:
        print(line, flush=True)


@app.command("ls")
def ls(json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False) -> None:
    """The recipes that come along.

    Example: mixtools recipe ls
    """
    found = [resolve.load(path) for path in sorted(running.folder().glob("*.yaml"))]
    rows = [{"name": recipe.name, "description": recipe.description, "file": recipe.file} for recipe in found]
    base.Screen(json, quiet).result(
        {"recipes": rows}, lambda: (f"{row['name']:<16} {row['description'].strip()}" for row in rows)
    )


@app.command("show")
def show(file: File, json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False) -> None:
    """A recipe as it is written.

    Example: mixtools recipe show laser-instruct
    """
    path = running.find(file)
    recipe = resolve.load(path)
    document = {
        "name": recipe.name, "description": recipe.description, "file": recipe.file, "vars": dict(recipe.vars),
        "steps": [{**step, "as": name} for name, step in recipe.steps.items()],
    }  # fmt: skip
    base.Screen(json, quiet).result(document, lambda: path.read_text("utf-8").splitlines())


@app.command("validate")
def validate(
    file: File, pairs: Pairs = None, json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False
) -> None:
    """Whether a recipe can run: every key, type and file, and no weight read.

    Example: mixtools recipe validate mine.yaml source=Mixtral-8x7B-v0.1
    """
    recipe, steps = running.resolved(file, pairs or [])
    document = {"valid": True, "recipe": recipe.name, "steps": [step.document() for step in steps]}
    base.Screen(json, quiet).result(document, lambda: [f"{recipe.file}: {len(steps)} steps, all of them can run"])
