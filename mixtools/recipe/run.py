"""mixtools.run_recipe: the steps of a recipe in order; what is made already is skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from ..errors import OutputError, RecipeError, UsageError
from ..machine import check_device, parse_limit
from ..options import Device, Jobs, MaxMemory, Overwrite, Resume
from ..progress import Callback, Progress
from ..verbs import Option, Result
from ..verbs import Verb as Function
from . import made, resolve, schema, spelling

_RECIPE = "A YAML file, or a name of `mixtools recipe ls`."
OnStep = Callable[["Done"], None]


@dataclass(frozen=True)
class Done:
    """A step that has run or was skipped. `status`: "done", "failed" or "skipped"."""

    step: resolve.Step
    status: str
    result: Result | None = None

    @property
    def document(self) -> dict[str, Any]:
        told = {"step": self.step.name, "do": self.step.verb.name, "status": self.status}
        more = {"output": str(self.step.out)} if self.result is None else {"result": self.result.document}
        return {**told, **more}

    def lines(self) -> Iterator[str]:
        if self.result is not None:
            yield from self.result.lines()
        else:
            yield f"skipped {self.step.name}: {self.step.out} is made already, of the same input and options"


@dataclass(frozen=True)
class Ran(Result):
    """The steps that ran, or of a dry run those that would."""

    recipe: str
    planned: tuple[resolve.Step, ...]
    steps: tuple[Done, ...]
    seconds: float
    dry_run: bool = False

    @property
    def exit_code(self) -> int:
        last = self.steps[-1].result if self.steps else None
        return last.exit_code if last else 0

    @property
    def document(self) -> dict[str, Any]:
        if self.dry_run:
            return {"dry_run": True, "recipe": self.recipe, "steps": [step.document() for step in self.planned]}
        steps = [done.document for done in self.steps]
        return {"recipe": self.recipe, "steps": steps, "seconds": round(self.seconds, 3)}

    def lines(self) -> Iterator[str]:
        if self.dry_run:
            yield from (spelling.as_command(step) for step in self.planned)
        for done in self.steps:
            yield from done.lines()


def run_recipe(
    recipe: Annotated[str | Path, Option("RECIPE", _RECIPE, argument=True, key="file")],
    values: Annotated[
        list[str] | Mapping[str, Any] | None,
        Option("[KEY=VALUE]...", "Variables, or steps.NAME.OPTION=VALUE.", argument=True, key="pairs"),
    ] = None,
    *,
    dry_run: Annotated[bool, Option("", "Show the resolved steps; write nothing.", machine=True)] = False,
    resume: Resume = True,
    overwrite: Overwrite = False,
    jobs: Jobs = 2,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    on_begin: Callable[[int, int, resolve.Step], None] | None = None,
    on_step: OnStep | None = None,
    progress: Progress | Callback | None = None,
) -> Ran:
    """The steps of a recipe in order; what is made already, of the same input and options, is skipped.

    Example: mixtools run torrent-to-hf source=mixtral-8x7b-32kseqlen out=Mixtral-8x7B-v0.1

    `values`: by name, or as KEY=VALUE. A failed check ends the run. `on_begin` is told number, count and step before
    each; `on_step` what became of it. Raises RecipeError, before a weight is read, for whatever cannot run as it is
    written, and what the steps raise.
    """
    check_device(device)
    parse_limit(max_memory)
    pairs = values or []
    if isinstance(pairs, Mapping):
        pairs = [f"{key}={_spelled(value)}" for key, value in pairs.items()]
    written, steps = resolved(recipe, pairs)
    if dry_run:
        return Ran(written.name, tuple(steps), (), 0.0, dry_run=True)
    machine = {
        "resume": resume, "overwrite": overwrite, "jobs": jobs, "max_memory": max_memory, "device": device,
        "progress": progress,
    }  # fmt: skip
    began = time.monotonic()
    told: list[Done] = []
    for number, step in enumerate(steps, 1):
        if on_begin is not None:
            on_begin(number, len(steps), step)
        told.append(_carry_out(written, steps, step, machine))
        if on_step is not None:
            on_step(told[-1])
        if told[-1].status == "failed":
            break
    return Ran(written.name, tuple(steps), tuple(told), time.monotonic() - began)


def _spelled(value: Any) -> str:
    """As on the command line, where the option decides the type."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def resolved(recipe: str | Path, pairs: Sequence[str]) -> tuple[resolve.Recipe, list[resolve.Step]]:
    """A recipe with `key=value` pairs, and its steps, checked. Raises RecipeError for what cannot run."""
    verbs = functions()
    written = resolve.override(resolve.load(find(str(recipe))), pairs)
    steps = resolve.resolve(written, {name: schema.schema(verb) for name, verb in verbs.items()})
    for step in steps:
        preflight = verbs[step.verb.name].preflight
        try:
            if preflight is not None:
                preflight(**step.options)
        except UsageError as error:
            raise RecipeError(f"steps.{step.name}: {error.message}", file=written.file) from None
    return written, steps


def functions() -> dict[str, Function]:
    from ..api import verbs

    return schema.usable(verbs())


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


# --- one step ---


def _carry_out(
    recipe: resolve.Recipe, steps: Sequence[resolve.Step], step: resolve.Step, machine: Mapping[str, Any]
) -> Done:
    from ..hub.opening import locate
    from ..job import ENCLOSED

    inputs = made.digest(map(locate, step.inputs()))
    if machine["resume"] and made.is_made(step, inputs):
        return Done(step, "skipped")
    if step.out is not None:
        made.expect_free(step.out)
    copy = made.resolved(recipe, steps, step, inputs)
    token = ENCLOSED.set({made.NAME: copy})
    try:
        result = _call(step, machine)
    finally:
        ENCLOSED.reset(token)
    if step.out is not None and not result.exit_code:
        _leave(copy, made.place(step.out))
    return Done(step, "failed" if result.exit_code else "done", result)


def _call(step: resolve.Step, machine: Mapping[str, Any]) -> Result:
    verb = functions()[step.verb.name]
    names = {parameter.key: name for name, parameter in verb.parameters.items()}
    how = {key: value for key, value in machine.items() if key in names or key == "progress"}
    return verb.function(**how, **{names[key]: value for key, value in step.options.items()})


def _leave(copy: bytes, target: Path) -> None:
    """The recipe beside what a command wrote without the checkpoints' writer, which commits it itself."""
    part = target.with_name(f".{target.name}.part")
    try:
        if target.is_file() and target.read_bytes() == copy:
            return
        part.write_bytes(copy)
        part.replace(target)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror})", file=target) from None
