"""What Triton 3.6 cannot compile in a kernel's text, and 3.9 can: told without either, from the text."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mixtools.ops.gpu

KERNELS = [path for path in Path(mixtools.ops.gpu.__file__).parent.glob("*.py") if "import triton" in path.read_text()]


def passed_on(text: str) -> list[str]:
    """Attributes of a plan that stand in a tuple, or are given to a kernel's own function, by themselves."""
    found = []
    for node in ast.walk(ast.parse(text)):
        own = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        inside = node.args if own else node.elts if isinstance(node, ast.Tuple) else []
        found += [
            ast.unparse(one) for one in inside if isinstance(one, ast.Attribute) and ast.unparse(one.value) == "PLAN"
        ]
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_a_plans_constants_are_passed_on_by_name(path):
    assert passed_on(path.read_text("utf-8")) == []


def test_what_is_looked_for_is_found():
    assert passed_on("value(loaded, PLAN.kind, j)") == ["PLAN.kind"]
    assert passed_on("tl.zeros((row.shape[0], TOGETHER, PLAN.wide), tl.float32)") == ["PLAN.wide"]
    assert passed_on("tl.arange(0, PLAN.wide) + load(x, row, PLAN)") == []
