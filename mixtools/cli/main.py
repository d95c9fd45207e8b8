"""The `mixtools` command: its groups, and how every error ends."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import typer

from ..api import verbs
from ..errors import Interrupted, MemoryBudgetError, MixtoolsError, UsageError
from ..verbs import Entry, Verb
from ..version import __version__
from . import commands, doctor, generate, recipe

_GROUPS = {"convert": "Rename and reshape a checkpoint into another layout."}
_OWN = {"generate": generate.generate}  # verbs whose answer comes piece by piece
_RUN = Verb.of("run", Entry("recipe.run:run_recipe"))

app = typer.Typer(
    name="mixtools",
    help="Load any Mixtral checkpoint, transform it in bounded memory, and prove what was written.",
    epilog="Exit codes: 0 done, 1 our fault, 2 usage, 3 bad input, 4 check failed, 5 disk or memory, "
    "6 unsafe input, 7 Hub, 8 output exists or locked, 130 interrupted (run again to continue).",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _add_commands() -> None:
    """Every verb by its name, those of two words in groups; a new one needs no line here."""
    groups: dict[str, typer.Typer] = {}
    for name, verb in verbs().items():
        group, _, word = name.rpartition(" ")
        if group and group not in groups:
            groups[group] = typer.Typer(help=_GROUPS[group], no_args_is_help=True)
            app.add_typer(groups[group], name=group)
        (groups[group] if group else app).command(word)(commands.command(verb, _OWN.get(name, commands.call)))
    app.command("run")(commands.command(_RUN, recipe.run))
    app.add_typer(recipe.app, name="recipe")
    app.command("doctor")(doctor.doctor)


_add_commands()


def _print_version(value: bool) -> None:
    if value:
        print(f"mixtools {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: bool = typer.Option(False, "--version", callback=_print_version, is_eager=True, help="Print the version."),
) -> None:
    """Options that stand before the command."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Every failure is one line (or one JSON document) and an exit code of errors.py."""
    arguments = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    sys.exit(code)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _run(arguments: list[str]) -> int:
    command = typer.main.get_command(app)
    try:
        result: Any = command.main(args=arguments, prog_name="mixtools", standalone_mode=False)
        if result == Interrupted.exit_code:  # typer turns a KeyboardInterrupt into this number, silently
            raise KeyboardInterrupt
        return result if isinstance(result, int) else 0
    except BrokenPipeError:
        raise
    except (Exception, KeyboardInterrupt) as error:
        if (
            type(error).__name__ == "NoArgsIsHelpError"
        ):  # a group alone; where the class lies depends on typer's version
            print(getattr(error, "message", ""))
            return UsageError.exit_code
        return _report(_as_ours(error, debug="--debug" in arguments), arguments)


def _as_ours(error: BaseException, *, debug: bool) -> MixtoolsError:
    """Any exception as one of the tree."""
    if isinstance(error, MixtoolsError):
        return error
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        return Interrupted("interrupted; the same command continues where it stopped")
    if isinstance(error, MemoryError):
        return MemoryBudgetError("memory ran out; try --max-memory or fewer --jobs")
    if (usage := _usage_error(error)) is not None:
        return usage
    where = "" if debug else "; --debug shows where"
    return MixtoolsError(f"internal error: {type(error).__name__}: {error}{where}")


def _usage_error(error: BaseException) -> UsageError | None:
    """typer's own complaint about the command line, in our words."""
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "mixtools"
    message = error.format_message().rstrip(".")
    return UsageError(f"{message}{' ' if message.endswith('?') else '. '}Try: {path} --help")


def _report(error: MixtoolsError, arguments: list[str]) -> int:
    if "--debug" in arguments:
        import traceback

        traceback.print_exc()
    if "--json" in arguments:
        print(json.dumps(error.document()))
    else:
        print(f"error: {error}", file=sys.stderr)
    return error.exit_code
