"""What may be mutated: the operators of cosmic-ray and one of our own, at every place of a file that can matter.

A place is a stretch of code that one family of operators changes; a `+` can be changed in eleven ways. Left out, as no
test should tell them apart: annotations, docstrings and message texts (no operator changes a plain string; what stands
in an f-string is skipped here), the stars of parameter lists, zip's `strict` (an assertion), identity in place of
equality or the reverse, which for None and enums, the only things compared so, is the same; and bits in place of
arithmetic or the reverse, which for floats is a TypeError that any test finds.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import parso
from cosmic_ray.ast import ast_nodes
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names

GROUPS = {
    "ReplaceComparisonOperator": ("Is", "IsNot"),
    "ReplaceBinaryOperator": ("RShift", "LShift", "BitOr", "BitAnd", "BitXor"),
}
Position = tuple[int, int]  # line from 1, column from 0


class RemoveCall(Operator):
    """A statement that is a call becomes `pass`: nothing of cosmic-ray's leaves out an fsync."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[Position, Position]]:
        if node.type == "simple_stmt" and node.children[0].type == "atom_expr":
            call = node.children[0]
            if call.get_code().endswith(")"):
                yield call.start_pos, call.end_pos

    def mutate(self, node: Any, index: int) -> Any:
        call = node.children[0]
        node.children[0] = parso.python.tree.Keyword("pass", call.start_pos, call.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@dataclass(frozen=True)
class Place:
    """Where, and each way to change it: an operator and which of its occurrences in the file."""

    file: str
    function: str  # dotted; "" at the module's level
    line: int
    lines: tuple[int, int]  # of the statement
    at_import: bool  # runs when the module is imported: whose test that was, nobody knows
    text: str  # its line
    family: str
    ways: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Mutant:
    """A place changed."""

    place: Place
    operator: str
    before: str  # the changed lines, without their indentation
    after: str
    source: str  # the whole file, changed

    @property
    def identity(self) -> tuple[str, str, str, str]:
        return self.place.file, self.place.function, self.before, self.after


def ranked(root: Path, files: Iterable[str], seed: int) -> Iterator[Mutant]:
    """A mutant of every place, in the order of a sample: by a digest of the seed and of what stands there.

    So every place has an equal chance, and a change elsewhere in the code leaves a sample as it was.
    """
    seen: Counter[tuple[str, ...]] = Counter()
    order = []
    for place in (place for file in files for place in places(root, file)):
        what = (place.file, place.function, place.text, place.family)
        seen[what] += 1
        order.append((_digest(seed, *what, str(seen[what])), place))
    for digest, place in sorted(order, key=lambda pair: pair[0]):
        mutant = _mutant((root / place.file).read_text("utf-8"), place, digest)
        if mutant is not None:
            yield mutant


def places(root: Path, file: str) -> list[Place]:
    """Every place of a file."""
    source = (root / file).read_text("utf-8")
    nodes, scopes = list(ast_nodes(parso.parse(source))), _Scopes(ast.parse(source))
    ways: dict[tuple[Position, Position, str], list[tuple[str, int]]] = defaultdict(list)
    for name, operator in _operators().items():
        positions = [(node, *span) for node in nodes for span in operator.mutation_positions(node)]
        for occurrence, (node, start, end) in enumerate(positions):
            if not _is_left_out(node) and not scopes.are_text(start):
                ways[start, end, name.partition("_")[0]].append((name, occurrence))
    found = []
    for (start, _, family), changes in ways.items():
        function, lines, at_import = scopes.around(start)
        text = source.splitlines()[start[0] - 1].strip()
        found.append(Place(file, function, start[0], lines, at_import, text, family, tuple(changes)))
    return found


def _operators() -> dict[str, Operator]:
    """By name; those that ask for arguments (names of variables) are not used."""
    found: dict[str, Operator] = {"RemoveCall": RemoveCall()}
    for name in operator_names():
        kind, short = get_operator(name), name.partition("/")[2]
        if not kind.arguments() and not _is_across(short):
            found[short] = kind()
    return found


def _is_across(operator: str) -> bool:
    """From one of a group to one outside of it."""
    kind, *ends = operator.split("_")
    return kind in GROUPS and len({end in GROUPS[kind] for end in ends}) == 2


def _is_left_out(node: Any) -> bool:
    if node.type == "operator" and node.parent.type in ("parameters", "lambdef"):
        return True
    argument = node.parent
    return bool(argument and argument.type == "argument" and argument.children[0].get_code().strip() == "strict")


def _mutant(source: str, place: Place, digest: bytes) -> Mutant | None:
    """Changed in the way that the digest chooses among those that give Python; None if none does."""
    order = sorted(range(len(place.ways)), key=lambda way: hashlib.sha256(digest + bytes([way])).digest())
    for name, occurrence in (place.ways[way] for way in order):
        try:
            changed = mutate_code(source, _operators()[name], occurrence)
            compile(changed or "(", place.file, "exec", dont_inherit=True)
        except (SyntaxError, AttributeError):  # cosmic-ray's own, of `except module.Error`
            continue
        sides: tuple[list[str], list[str]] = ([], [])
        for line in difflib.ndiff(source.splitlines(), changed.splitlines()):
            if line.startswith(("- ", "+ ")):
                sides[line.startswith("+")].append(line[2:].strip())
        return Mutant(place, name, " ".join(sides[0]), " ".join(sides[1]), changed)
    return None


def _digest(seed: int, *parts: str) -> bytes:
    return hashlib.sha256("\0".join([str(seed), *parts]).encode()).digest()


class _Scopes:
    """Where a position stands: its function, its statement, and whether it is text for readers."""

    def __init__(self, tree: ast.Module) -> None:
        self.text: list[ast.AST] = []
        self.scopes: list[tuple[str, Any]] = []  # the outer ones first
        self.statements: list[Any] = []
        self._visit(tree, "")

    def _visit(self, node: ast.AST, name: str) -> None:
        for child in ast.iter_child_nodes(node):
            inner = name
            if isinstance(child, ast.stmt):
                self.statements.append(child)
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{name}.{child.name}".lstrip(".")
                self.scopes.append((inner, child))
            if isinstance(child, ast.JoinedStr):
                self.text.append(child)
            self.text += [part for what in ("annotation", "returns") if (part := getattr(child, what, None))]
            self._visit(child, inner)

    def are_text(self, at: Position) -> bool:
        return any(_holds(node, at) for node in self.text)

    def around(self, at: Position) -> tuple[str, tuple[int, int], bool]:
        inside = [(name, node) for name, node in self.scopes if _holds(node, at)]
        runs_later = any(isinstance(node, ast.FunctionDef) and at[0] >= node.body[0].lineno for _, node in inside)
        statement = [node for node in self.statements if _holds(node, at)][-1]
        last = int(statement.end_lineno)
        if body := getattr(statement, "body", None):  # of a compound statement the head alone
            last = max(statement.lineno, body[0].lineno - 1)
        return inside[-1][0] if inside else "", (statement.lineno, last), not runs_later


def _holds(node: Any, at: Position) -> bool:
    decorators = getattr(node, "decorator_list", [])
    first = min([(node.lineno, node.col_offset), *((one.lineno, 0) for one in decorators)])
    return bool(first <= at < (node.end_lineno, node.end_col_offset))
