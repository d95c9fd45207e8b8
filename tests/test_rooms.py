"""The plan of the house: a room stands above all that it imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mixtools"


def room(path: Path) -> str:
    """Folder or file at the package's root."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[Path]:
    """Modules of the package that a file imports when it runs, wherever the statement stands; types do not count."""
    tree = ast.parse(path.read_text("utf-8"))
    for_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for part in branch.body
        for node in ast.walk(part)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in for_types:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for name in node.names:
                places = (base / name.name / "__init__.py", base / f"{name.name}.py", base / "__init__.py")
                yield next((place for place in places if place.exists()), base.with_suffix(".py"))


def test_no_circle_and_no_way_back_up() -> None:
    below: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        if path != PACKAGE / "__init__.py":
            below.setdefault(room(path), set()).update(map(room, imported(path)))
    assert not any("__init__" in rooms for rooms in below.values()), "asks the package's front door, which is above all"
    floors: list[set[str]] = []
    while below:
        ground = {name for name, rooms in below.items() if not rooms - {name} & below.keys() - {name}}
        assert ground, f"a circle among {sorted(below)}"
        floors.append(ground)
        below = {name: rooms for name, rooms in below.items() if name not in ground}
    assert floors[-1] == {"__main__"} and floors[-2] == {"cli"}


def test_each_room_says_what_it_is() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text("utf-8"))) or path == PACKAGE / "__main__.py", path
