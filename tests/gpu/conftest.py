"""Tests of the GPU's kernels, which need Triton and no GPU: collected only where scripts/test has put it in reach."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without Triton they cannot even be imported."""
    return None if os.environ.get("MIXTOOLS_GPU_KERNELS") else True


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    """Without work that comes to nothing, more than half of all. Triton's interpreter replaces the functions of its
    language in every call of a device function, though the launch has done so, or an earlier call; and of each integer
    it computes whether it overflows, which it tells only when it debugs."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    done: set[tuple[bool, ...]] = set()
    patch_lang: Callable[[Any], Any] = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__

    def replaced(function: Any) -> Any:
        found = tuple(any(value is one for value in function.__globals__.values()) for one in (tl, tl.core))
        if found in done:
            return interpreter._LangPatchScope()
        done.add(found)
        return patch_lang(function)

    def launched(executor: Any, *arguments: Any, **named: Any) -> None:
        done.clear()
        launch(executor, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", replaced)
        patch.setattr(interpreter.GridExecutor, "__call__", launched)
        if not (options := interpreter.interpreter_builder.options).debug:
            patch.setattr(interpreter.interpreter_builder, "options", replace(options, sanitize_overflow=False))
        yield
