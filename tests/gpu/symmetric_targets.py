"""The kernels of eigenproblems compiled ahead of time for GPUs that are not there, and what their machine code is like.

As targets.py, whose process this one is like: the tests' own interprets kernels and can compile none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from gpu import started
from gpu.started import Code
from gpu.targets import TARGETS
from torch import Tensor

from mixtools.ops.gpu import symmetric
from mixtools.ops.gpu.launch import Launch

ORDER, MATRICES, VECTORS = 4096, 24, 1024  # of 8x7B: the short side of a layer's expert matrices


@dataclass(frozen=True)
class Case:
    kernel: str
    target: str

    def __str__(self) -> str:
        return f"{self.kernel} {self.target}"


def compiled(cases: Sequence[Case]) -> dict[Case, Code]:
    return started.compiled(__file__, cases)


# --- in the process that compiles ------------------------------------------------------------------------------------


def launched(case: Case) -> Launch:
    """As `laser` starts it for a layer, on memory that is not there."""

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64, device="meta")

    lanes = TARGETS[case.target][2]
    if case.kernel in ("form", "reflect"):
        whole = symmetric.Reduction(empty(MATRICES, ORDER, ORDER), lanes=lanes)
        return getattr(whole, case.kernel)(100, 96)  # type: ignore[no-any-return]
    every, some = empty(MATRICES, ORDER), empty(MATRICES)
    if case.kernel == "bisect":
        return symmetric.bisect(every, every, (some, some), some, every, lanes)
    lines = empty(ORDER, VECTORS)
    return symmetric.twist(empty(ORDER), empty(ORDER), empty(VECTORS), some, lines, lines, lanes)


def texts(text: str, code: Code) -> dict[str, bool]:
    if ".amdhsa_" in text:
        return {
            "loads 16 bytes": code.whole.get("global_load_dwordx4", 0) > 0,
            "divides exactly": code.whole.get("v_div_fixup_f64", 0) > 0,
        }
    return {
        "loads 16 bytes": "ld.global.v2.b64" in text,
        "divides exactly": "div.rn.f64" in text and "div.full" not in text and "rcp.approx.ftz" not in text,
    }


if __name__ == "__main__":
    started.answer(Case, launched, texts)
