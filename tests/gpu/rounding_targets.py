"""The rounding of blocks compiled ahead of time for GPUs that are not there, and what its machine code is like.

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

from mixtools.ops.gpu import round
from mixtools.ops.gpu.launch import Launch

COLUMNS = 128  # of a block: methods/quantize/rounding.BLOCK
INNER, GROUPS = 14336, 32  # rows of w1 in 8x7B, groups of its columns


@dataclass(frozen=True)
class Case:
    """`levels`: of a table, or 0 for integers; `matrices` of one launch."""

    target: str
    levels: int = 0
    columns: int = COLUMNS
    rows: int = INNER
    matrices: int = 1

    def __str__(self) -> str:
        told = f"table of {self.levels}" if self.levels else "integers"
        return f"{self.target} {told} {self.matrices} of {self.columns} x {self.rows}"


def per_item(code: Code, columns: int = COLUMNS, lanes: int = 32) -> float:
    """Instructions of a warp for each row and column of a block at most, all of a tile's being taken."""
    tiles, body = columns // round.TILE, sum(code.loop.values())
    return (tiles * (tiles - 1) / 2 * body + tiles * (sum(code.whole.values()) - body)) / (columns * lanes)


def compiled(cases: Sequence[Case]) -> dict[Case, Code]:
    return started.compiled(__file__, cases)


# --- in the process that compiles ------------------------------------------------------------------------------------


def launched(case: Case) -> Launch:
    """As a calibrated run starts it, on memory that is not there."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty((case.matrices, *shape), dtype=dtype, device="meta")

    same, scales = (case.columns, case.rows), (GROUPS, case.rows)
    tensors = (
        empty(*same), empty(*same), empty(*same), empty(*same, dtype=torch.uint8), empty(*scales), empty(*scales),
        empty(case.columns, dtype=torch.int32), empty(case.columns, case.columns),
    )  # fmt: skip
    table = torch.arange(float(case.levels))
    levels = (table, table[1:]) if case.levels else range(-8, 8)
    return round.round_blocks(tensors, levels, TARGETS[case.target][2])


def texts(text: str, code: Code) -> dict[str, bool]:
    if ".amdhsa_" in text:
        fused = sum(count for name, count in code.whole.items() if "fma" in name or "mac" in name)
        return {
            "divides exactly": code.whole["v_div_fixup_f32"] == round.TILE,
            "fuses": fused > 6 * round.TILE,  # which a division itself is made of
            "flushes": ".amdhsa_float_denorm_mode_32 3" not in text,
        }
    return {
        "divides exactly": text.count("div.rn.f32") == round.TILE,
        "fuses": "fma" in text or "FFMA" in code.loop,
        "flushes": ".ftz" in text,
    }


if __name__ == "__main__":
    started.answer(Case, launched, texts)
