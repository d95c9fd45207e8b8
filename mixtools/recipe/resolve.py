"""Recipes: a YAML file of steps, resolved and refused where it is wrong before a weight is read.

    file ─► Recipe (vars, steps) ─► overrides ─► references ─► Step (verb, options of the right types)

    name: laser
    description: one line
    vars: {source: org/name, out: folder, text: null}      # null: no value yet
    needs: [text]              # variables that must have one before anything runs
    steps:
      - do: laser                # a verb; `as: NAME` names the step otherwise than by its first word
        when: ${text}            # left out where this has no value
        src: ${source}           # a variable, or ${steps.NAME.out}, an option of an earlier step
        out: ${out}

Which verbs there are, and which options they take, is read from the functions themselves (schema.py).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ..errors import RecipeError
from ..hub.names import hub_name

MAX_BYTES = 1 << 20
_KEYS = ("name", "description", "vars", "needs", "steps", "made")
_STEP_KEYS = ("do", "as", "when")  # of a step, beside its verb's options
_REFERENCE = re.compile(r"\$\{([^{}]*)\}")


class Typed(str):
    """A value from the command line: the option it is for decides its type."""


class Option(NamedTuple):
    """An option of a verb. `choices` are spelled NAME or NAME=VALUE; `file` must exist, but for
    `words`; `folder` is written.
    """

    type: type
    required: bool
    default: Any = None
    many: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    file: bool = False
    folder: bool = False
    model: bool = False
    words: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verb:
    """`machine`: options that say how and not what; a recipe does not hold them."""

    name: str
    options: Mapping[str, Option]
    machine: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """Resolved: `options` holds every option that has a value, defaults included."""

    name: str
    verb: Verb
    options: Mapping[str, Any]

    @property
    def out(self) -> Path | None:
        """What it writes: a folder, or a GGUF file."""
        paths = [self.options.get(name) for name, option in self.verb.options.items() if option.folder]
        return next((Path(path) for path in paths if path is not None), None)

    def inputs(self) -> list[str]:
        named = [(n, o) for n, o in self.verb.options.items() if (o.file or o.model) and n in self.options]
        return [value for name, option in named for value in values(self.options[name]) if value not in option.words]

    def document(self) -> dict[str, Any]:
        return {"do": self.verb.name, "as": self.name, **self.options}


@dataclass(frozen=True)
class Recipe:
    """As it stands in the file; `steps` are mappings with `do`, `as` and options."""

    file: str
    name: str
    description: str
    vars: Mapping[str, Any]
    steps: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...] = ()


def load(path: Path) -> Recipe:
    """Raises RecipeError, which names file, step and key, for what is no recipe."""
    return parse(read(path), str(path))


def parse(text: str, file: str) -> Recipe:
    """Raises RecipeError as `load`."""
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            raise RecipeError("holds an alias (*name): a few of them can stand for a billion values", file=file)
        document = yaml.load(text, _Loader)  # a SafeLoader: no tag makes an object
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark is not None else ""
        raise RecipeError(f"is no YAML{line}: {getattr(error, 'problem', None) or error}", file=file) from None
    except (RecursionError, ValueError) as error:  # thirty brackets deep, or a date with a month 13
        raise RecipeError(f"is no YAML: {error}", file=file) from None
    if not isinstance(document, dict):
        raise RecipeError("is no recipe: it needs name, description, vars and steps", file=file)
    for key in document:
        if key not in _KEYS:
            raise RecipeError(f"unknown key {key!r}{_nearest(key, _KEYS)}", file=file)
    name, description = (_text(document, key, file) for key in ("name", "description"))
    values = document.get("vars") or {}
    if not isinstance(values, dict) or not all(_is_name(key) and _is_scalar(v) for key, v in values.items()):
        raise RecipeError("vars: must map names to single values", file=file)
    needs = document.get("needs") or []
    if not isinstance(needs, list) or not all(isinstance(one, str) and one in values for one in needs):
        raise RecipeError("needs: must list variables", file=file)
    steps = document.get("steps")
    if not isinstance(steps, list) or not steps:
        raise RecipeError("steps: must be a list of at least one step", file=file)
    return Recipe(file, name, description, values, _steps(steps, file), tuple(needs))


def override(recipe: Recipe, pairs: Iterable[str]) -> Recipe:
    """`key=value`: a variable, or steps.NAME.OPTION. Raises RecipeError for a key that there is not."""
    values, steps = dict(recipe.vars), {name: dict(step) for name, step in recipe.steps.items()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RecipeError(f"{pair!r} is no key=value", file=recipe.file)
        start, _, rest = key.partition(".")
        if start == "steps":
            name, _, option = rest.partition(".")
            if name not in steps:
                raise RecipeError(f"{key}: no step {name!r}{_nearest(name, steps)}", file=recipe.file)
            if option in (*_STEP_KEYS, ""):
                raise RecipeError(f"{key}: name an option, as steps.{name}.OPTION=VALUE", file=recipe.file)
            steps[name][option] = Typed(value)
            continue
        key = rest if start == "vars" else key
        if key not in values:
            known = [*values, *(f"steps.{name}" for name in steps)]
            raise RecipeError(f"no variable {key!r}{_nearest(key, known)}", file=recipe.file)
        values[key] = Typed(value)
    return replace(recipe, vars=values, steps=steps)


def resolve(recipe: Recipe, verbs: Mapping[str, Verb]) -> list[Step]:
    """Every step with its options, checked. Raises RecipeError for whatever cannot run as it is written."""
    try:
        return _resolve(recipe, verbs)
    except RecipeError as error:
        error.file = error.file or recipe.file
        raise


def _resolve(recipe: Recipe, verbs: Mapping[str, Verb]) -> list[Step]:
    values = _resolved_vars(recipe)
    if empty := [name for name in recipe.needs if values[name] is None]:
        raise RecipeError(f"vars.{empty[0]}: has no value; give {empty[0]}=VALUE")
    steps: list[Step] = []
    for name, written in recipe.steps.items():
        verb = _verb(str(written["do"]), verbs, f"steps.{name}")
        known = values | {f"steps.{s.name}.{key}": value for s in steps for key, value in s.options.items()}
        if "when" in written and _substituted(written["when"], known, f"steps.{name}.when") is None:
            continue
        steps.append(_step(name, verb, {k: v for k, v in written.items() if k not in _STEP_KEYS}, known))
    _expect_files(steps)
    return steps


# --- the file ---


class _Loader(yaml.SafeLoader):
    """Refuses what SafeLoader takes silently: a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is there twice", key.start_mark)
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read(path: Path) -> str:
    """The file's text. Raises RecipeError."""
    try:
        if not path.is_file():
            raise RecipeError("is no file; `mixtools recipe ls` lists the recipes that come along", file=path)
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"is larger than {MAX_BYTES} bytes; that is no recipe", file=path)
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})", file=path) from None


def _text(document: Mapping[str, Any], key: str, file: str) -> str:
    value = document.get(key)
    if not isinstance(value, str) or not value.strip():
        raise RecipeError(f"{key}: must be a text", file=file)
    return value


def _steps(entries: Sequence[Any], file: str) -> dict[str, dict[str, Any]]:
    steps: dict[str, dict[str, Any]] = {}
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("do"), str) or not entry["do"].strip():
            raise RecipeError(f"steps: number {number} must say what to `do`", file=file)
        name = entry.get("as", entry["do"].split()[0])
        if not _is_name(name):
            raise RecipeError(f"steps: number {number}: {name!r} is no name for a step", file=file)
        if name in steps:
            raise RecipeError(f"steps.{name}: two steps have this name; tell them apart with `as: NAME`", file=file)
        steps[name] = entry
    return steps


def _is_name(name: object) -> bool:
    return isinstance(name, str) and re.fullmatch(r"[A-Za-z][\w-]*", name) is not None


def _is_scalar(value: object) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


def _nearest(key: object, known: Iterable[str]) -> str:
    """The nearest spelling, or all of them."""
    names = list(known)
    if close := difflib.get_close_matches(str(key).replace("-", "_"), names, 1, 0.6):
        return f"; did you mean {close[0]}?"
    return f"; there is {', '.join(names)}" if names else "; there is none"


# --- values ---


def _resolved_vars(recipe: Recipe) -> dict[str, Any]:
    """A variable may refer to those above it."""
    values: dict[str, Any] = {}
    for key, value in recipe.vars.items():
        values[key] = _substituted(value, values, f"vars.{key}")
    return values


def _substituted(value: Any, known: Mapping[str, Any], place: str) -> Any:
    """A reference alone keeps its value's type, and may be null."""
    if isinstance(value, list):
        return [_substituted(item, known, place) for item in value]
    if not isinstance(value, str):
        return value

    def look_up(match: re.Match[str]) -> Any:
        if match[1] not in known:
            raise RecipeError(f"{place}: nothing above is called ${{{match[1]}}}{_nearest(match[1], known)}")
        return known[match[1]]

    if (whole := _REFERENCE.fullmatch(value)) is not None:
        return look_up(whole)

    def within(match: re.Match[str]) -> str:
        if (found := look_up(match)) is None:
            raise RecipeError(f"{place}: ${{{match[1]}}} has no value; give {match[1]}=VALUE")
        return str(found)

    made = _REFERENCE.sub(within, value)
    return Typed(made) if isinstance(value, Typed) else made


def _verb(name: str, verbs: Mapping[str, Verb], place: str) -> Verb:
    if name in verbs:
        return verbs[name]
    raise RecipeError(f"{place}: unknown verb {name!r}{_nearest(name, verbs)}")


def _step(name: str, verb: Verb, written: Mapping[str, Any], known: Mapping[str, Any]) -> Step:
    options: dict[str, Any] = {}
    for key, value in written.items():
        place = f"steps.{name}.{key}"
        if key in verb.machine:
            raise RecipeError(f"{place}: says how, not what; give it to `mixtools run` as --{key.replace('_', '-')}")
        if key not in verb.options:
            raise RecipeError(f"{place}: `{verb.name}` has no such option{_nearest(key, verb.options)}")
        found = _substituted(value, known, place)
        if found is None and verb.options[key].required:
            given = _REFERENCE.fullmatch(value) if isinstance(value, str) else None
            raise RecipeError(f"{place}: has no value; give {given[1] if given else f'steps.{name}.{key}'}=VALUE")
        if found is not None:
            options[key] = _checked(found, verb.options[key], place)
    for key, option in verb.options.items():
        if key in options:
            continue
        if option.required:
            raise RecipeError(f"steps.{name}: `{verb.name}` needs {key}")
        if option.default is not None:
            options[key] = option.default
    return Step(name, verb, {key: options[key] for key in verb.options if key in options})


def _checked(value: Any, option: Option, place: str) -> Any:
    """The value in the option's type. Raises RecipeError."""
    if option.many:
        items = value if isinstance(value, list) else [value]
        return [_checked(item, option._replace(many=False), place) for item in items]
    made = _typed(value, option.type)
    if made is None:
        kind = {bool: "true or false", int: "a whole number", float: "a number"}.get(option.type, "a text")
        raise RecipeError(f"{place}: must be {kind}", expected=kind, found=repr(value))
    if option.choices and not _is_choice(str(made), option.choices):
        near = _nearest(str(made).partition("=")[0], [c.partition("=")[0] for c in option.choices])
        raise RecipeError(
            f"{place}: {made!r} is not one of {', '.join(option.choices)}{near if 'mean' in near else ''}"
        )
    if (option.low is not None and made < option.low) or (option.high is not None and made > option.high):
        raise RecipeError(f"{place}: {made} is out of range: from {option.low}, to {option.high or 'any'}")
    return made


def _typed(value: Any, kind: type) -> Any:
    """None where it does not fit. Numbers stand for texts, as on the command line; never the other way round."""
    if isinstance(value, Typed) and kind is not str:
        try:
            value = {"true": True, "false": False}.get(value.lower()) if kind is bool else kind(value)
        except ValueError:
            return None
    if kind is str:
        is_text = isinstance(value, (str, int, float)) and not isinstance(value, bool) and str(value).strip()
        return str(value) if is_text else None
    if kind is float and type(value) is int:
        return float(value)
    return value if type(value) is kind else None


def _is_choice(text: str, choices: Sequence[str]) -> bool:
    name, equals, value = text.partition("=")
    return any(c.partition("=")[0] == name and bool(c.partition("=")[1]) == bool(equals and value) for c in choices)


# --- files ---


def _expect_files(steps: Sequence[Step]) -> None:
    """Files exist, or lie in what an earlier step makes; no two steps write one output."""
    made: dict[Path, str] = {}
    for step in steps:
        for key, option in step.verb.options.items():
            place = f"steps.{step.name}.{key}"
            if key not in step.options or not (option.file or option.folder or option.model):
                continue
            for value in values(step.options[key]):
                if value not in option.words:
                    _expect_file(Path(value), option, made, place)
        if step.out is not None:
            made[step.out.absolute()] = step.name


def _expect_file(path: Path, option: Option, made: Mapping[Path, str], place: str) -> None:
    known = path.absolute() in made or any(parent in made for parent in path.absolute().parents)
    if option.folder:
        if path.absolute() in made:
            raise RecipeError(f"{place}: {path} is what steps.{made[path.absolute()]} writes; name another")
    elif not known and not path.exists() and not (option.model and hub_name(str(path))):
        raise RecipeError(f"{place}: {path} does not exist")


def values(found: Any) -> list[str]:
    """Of an option that takes one, or several."""
    return [str(value) for value in found] if isinstance(found, list) else [str(found)]
