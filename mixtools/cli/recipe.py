"""mixtools run and mixtools recipe: whole pipelines, each step one of the other commands."""

from __future__ import annotations

import contextlib
import inspect
import io
import json as json_module
import shlex
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ..errors import OutputError, RecipeError, UsageError
from ..recipe import made as record
from ..recipe import resolve as engine
from . import base

app = typer.Typer(help="The recipes that come along, and the check of one's own.", no_args_is_help=True)

File = Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file, or a name of `mixtools recipe ls`.")]
Pairs = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Variables, or steps.NAME.OPTION=VALUE.")
]
_MODELS = ("SRC", "OUTPUT", "SOURCE", "MODEL")  # metavars of the commands, by what they stand for
_FOLDERS = ("OUT", "DIR")
_MACHINE = frozenset({"dry_run", "resume", "overwrite", "jobs", "max_memory", "device", "json", "quiet", "debug"})


class Machine(NamedTuple):
    """The options of `run` that every step is given, as far as its command takes them."""

    resume: bool
    overwrite: bool
    jobs: int
    max_memory: str | None
    device: str
    json: bool
    quiet: bool
    debug: bool


def run(
    file: File, pairs: Pairs = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the resolved steps; write nothing.")] = False,
    resume: base.Resume = True, overwrite: base.Overwrite = False, jobs: base.Jobs = 2,
    max_memory: base.MaxMemory = None, device: base.Device = "auto",
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> int:  # fmt: skip
    """The steps of a recipe in order; what is made already, of the same input and options, is skipped.

    Example: mixtools run torrent-to-hf source=mixtral-8x7b-32kseqlen out=Mixtral-8x7B-v0.1
    """
    base.check_device(device)
    base.max_memory_bytes(max_memory)
    screen = base.Screen(json, quiet)
    recipe, steps = _resolved(file, pairs)
    if dry_run:
        document = {"dry_run": True, "recipe": recipe.name, "steps": [step.document() for step in steps]}
        screen.result(document, lambda: map(_as_command, steps))
        return 0
    machine = Machine(resume, overwrite, jobs, max_memory, device, json, quiet, debug)
    began, told = time.monotonic(), []
    code = 0
    for number, step in enumerate(steps, 1):
        screen.note(f"step {number} of {len(steps)}: {step.name}")
        done, code = _carry_out(recipe, steps, step, machine)
        told.append({"step": step.name, "do": step.verb.name, **done})
        if done["status"] == "skipped" and not json:
            print(f"skipped {step.name}: {step.folder} is made already, of the same input and options")
        if code:
            break
    if json:
        print(json_module.dumps({"recipe": recipe.name, "steps": told, "seconds": round(time.monotonic() - began, 3)}))
    return code


@app.command("ls")
def ls(json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False) -> None:
    """The recipes that come along.

    Example: mixtools recipe ls
    """
    found = [engine.load(path) for path in sorted(folder().glob("*.yaml"))]
    rows = [{"name": recipe.name, "description": recipe.description, "file": recipe.file} for recipe in found]
    base.Screen(json, quiet).result(
        {"recipes": rows}, lambda: (f"{row['name']:<16} {row['description'].strip()}" for row in rows)
    )


@app.command("show")
def show(file: File, json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False) -> None:
    """A recipe as it is written.

    Example: mixtools recipe show laser-instruct
    """
    path = find(file)
    recipe = engine.load(path)
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
    recipe, steps = _resolved(file, pairs)
    document = {"valid": True, "recipe": recipe.name, "steps": [step.document() for step in steps]}
    base.Screen(json, quiet).result(document, lambda: [f"{recipe.file}: {len(steps)} steps, all of them can run"])


def folder() -> Path:
    """Where the recipes that come along lie: in the installed package, or beside it in the source tree."""
    package = Path(__file__).parent.parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def find(name: str) -> Path:
    """Raises RecipeError for a name that is neither a file nor a recipe that comes along."""
    path = Path(name)
    if path.exists() or path.suffix or len(path.parts) > 1:
        return path
    known = {file.stem: file for file in sorted(folder().glob("*.yaml"))}
    if name not in known:
        raise RecipeError(f"is neither a file nor one of the recipes {', '.join(known)}", file=name)
    return known[name]


def _resolved(file: str, pairs: list[str] | None) -> tuple[engine.Recipe, list[engine.Step]]:
    recipe = engine.override(engine.load(find(file)), pairs or [])
    steps = engine.resolve(recipe, {name: verb for name, (verb, _) in commands().items()})
    for step in steps:
        try:
            _preflight(step)
        except UsageError as error:
            raise RecipeError(f"steps.{step.name}: {error.message}", file=recipe.file) from None
    return recipe, steps


def _preflight(step: engine.Step) -> None:
    """What the commands refuse in their options' values. Raises UsageError."""
    options = step.options
    if "max_shard_size" in options:
        base.parse_size(options["max_shard_size"], "max_shard_size")
    if "rank_rule" in options:
        from ..linalg.rules import parse_rule

        parse_rule(options["rank_rule"]).require("text" in options)
    if step.verb.name == "laser":
        from .laser import _expect_consistent

        named = (options.get(name) for name in ("search", "text", "held_out", "rank_rule"))
        _expect_consistent(*named)
    if "gate" in options:
        from ..checking.gates import parse

        parse(options["gate"])


# --- the commands as verbs ---


def commands() -> dict[str, tuple[engine.Verb, Callable[..., Any]]]:
    """Every command that makes one checkpoint of another or checks one; a new one needs no line here."""
    from .main import app as root

    found = {}
    groups = [("", root), *((f"{group.name} ", group.typer_instance) for group in root.registered_groups)]
    for prefix, group in groups:
        for command in group.registered_commands if group else ():
            function = command.callback
            if function is None:
                continue
            parameters = inspect.signature(function).parameters.keys()
            if parameters >= {"src", "out"} or parameters >= {"output", "against"}:
                name = prefix + (command.name or function.__name__.replace("_", "-"))
                found[name] = (_verb(name, function), function)
    return found


def _verb(name: str, function: Callable[..., Any]) -> engine.Verb:
    hints = typing.get_type_hints(function, include_extras=True)
    parameters = inspect.signature(function).parameters
    options = {key: _option(hints[key], p.default) for key, p in parameters.items() if key not in _MACHINE}
    return engine.Verb(name, options, frozenset(parameters.keys() & _MACHINE))


def _option(hint: Any, default: Any) -> engine.Option:
    """Type, limits and choices, as the command declares them."""
    hint, about = hint.__origin__, hint.__metadata__[0]
    inner = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    kind = inner[0] if isinstance(hint, types.UnionType) else hint
    many = typing.get_origin(kind) is list
    kind = typing.get_args(kind)[0] if many else kind
    metavar = about.metavar or ""
    return engine.Option(
        type=str if kind is Path else kind,
        required=default is inspect.Parameter.empty,
        default=None if default is inspect.Parameter.empty else default,
        many=many,
        choices=tuple(metavar.split("|")) if "|" in metavar else (),
        low=about.min, high=about.max,
        file=metavar == "FILE", folder=metavar in _FOLDERS, model=metavar in _MODELS,
    )  # fmt: skip


def _as_command(step: engine.Step) -> str:
    """The step as one would type it."""
    words = ["mixtools", *step.verb.name.split()]
    flags: list[str] = []
    for key, option in step.verb.options.items():
        value = step.options.get(key)
        if key in ("src", "output") or (key == "out" and option.required):
            words.append(str(value))
        elif value is not None and value != option.default:
            flag = f"--{key.replace('_', '-')}"
            if isinstance(value, bool):
                flags.append(flag if value else {"safetensors": "--pth"}.get(key, f"--no-{flag[2:]}"))
            else:
                flags += [part for item in (value if option.many else [value]) for part in (flag, str(item))]
    return shlex.join(words + flags)


# --- one step ---


def _carry_out(
    recipe: engine.Recipe, steps: list[engine.Step], step: engine.Step, machine: Machine
) -> tuple[dict[str, Any], int]:
    """What became of it, and the exit code of its command."""
    from ..job import ENCLOSED

    inputs = record.digest(map(base.find_model, step.inputs()))
    if machine.resume and record.is_made(step, inputs):
        return {"status": "skipped", "output": str(step.folder)}, 0
    copy = record.resolved(recipe, steps, step, inputs)
    token = ENCLOSED.set({record.NAME: copy})
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said) if machine.json else contextlib.nullcontext():
            code = _call(step, machine)
    finally:
        ENCLOSED.reset(token)
    if step.folder is not None and not code:
        _leave(copy, step.folder)
    return {"status": "failed" if code else "done", **_result(said.getvalue())}, code


def _call(step: engine.Step, machine: Machine) -> int:
    _, function = commands()[step.verb.name]
    hints = typing.get_type_hints(function)
    values: dict[str, Any] = {key: value for key, value in machine._asdict().items() if key in hints}
    for key, value in step.options.items():
        values[key] = Path(value) if _is_path(hints[key]) else value
    code = function(**values)
    return code if isinstance(code, int) else 0


def _is_path(hint: Any) -> bool:
    return hint is Path or Path in typing.get_args(hint)


def _result(said: str) -> Mapping[str, Any]:
    return {"result": json_module.loads(said)} if said else {}


def _leave(copy: bytes, folder: Path) -> None:
    """The recipe beside what a command wrote without the checkpoints' writer, which commits it itself."""
    target, part = folder / record.NAME, folder / f".{record.NAME}.part"
    try:
        if target.is_file() and target.read_bytes() == copy:
            return
        part.write_bytes(copy)
        part.replace(target)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", file=target) from None
