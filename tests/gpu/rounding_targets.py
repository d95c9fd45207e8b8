"""The rounding of blocks compiled ahead of time for GPUs that are not there, and what its machine code is like.

As targets.py, whose process this one is like: the tests' own interprets kernels and can compile none.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from gpu.targets import TARGETS, NoDriver, disassembled, in_compiler, instructions, loop
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


@dataclass(frozen=True)
class Code:
    """`loop`, `whole`: instructions by name, of the loop over earlier columns and of all. `spilled`: bytes."""

    registers: int
    spilled: int
    shared: int
    loop: dict[str, int]
    whole: dict[str, int]
    texts: dict[str, bool]

    def per_item(self, columns: int = COLUMNS, lanes: int = 32) -> float:
        """Instructions of a warp for each row and column of a block at most, all of a tile's being taken."""
        tiles, body = columns // round.TILE, sum(self.loop.values())
        return (tiles * (tiles - 1) / 2 * body + tiles * (sum(self.whole.values()) - body)) / (columns * lanes)


def compiled(cases: Sequence[Case]) -> dict[Case, Code]:
    """In a process of its own; Triton keeps what was compiled, until its source changes."""
    return {case: Code(**code) for case, code in zip(cases, in_compiler(__file__, cases), strict=True)}


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


def read(case: Case) -> Code:
    """Of what a launch by Triton's own way compiles."""
    from triton.runtime import driver

    driver.set_active(NoDriver(case.target))
    started = launched(case)
    started.function.device_caches.clear()  # of the target before this one
    made = started.function.warmup(**started.arguments, **started.constants, grid=started.grid, **started.options)
    if case.target.startswith("gfx"):
        return _amd(made)
    registers, spilled, sass = disassembled(made.asm["cubin"])
    ptx = made.asm["ptx"]
    texts = {
        "divides exactly": ptx.count("div.rn.f32") == round.TILE,
        "fuses": "fma" in ptx or any(line.startswith("FFMA") for line in loop(sass)),
        "flushes": ".ftz" in ptx,
    }
    of_loop, whole = (_counted(lines) for lines in (loop(sass), [*instructions(sass)]))
    return Code(registers, spilled, made.metadata.shared, of_loop, whole, texts)


def _amd(made: Any) -> Code:
    text = made.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    lines = [line.strip() for line in text.splitlines() if line.startswith("\t") and line[1:2].isalpha()]
    names = Counter(line.split()[0] for line in lines)
    fused = sum(count for name, count in names.items() if "fma" in name or "mac" in name)
    texts = {
        "divides exactly": names["v_div_fixup_f32"] == round.TILE,
        "fuses": fused > 6 * round.TILE,  # which a division itself is made of
        "flushes": ".amdhsa_float_denorm_mode_32 3" not in text,
    }
    # scalars that have no room lie in lanes of a vector register: no memory
    spilled = found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
    return Code(found["vgpr_count"], spilled, made.metadata.shared, {}, dict(names), texts)


def _counted(lines: Sequence[str]) -> dict[str, int]:
    return dict(Counter(line.split()[0].split(".")[0] for line in lines))


if __name__ == "__main__":
    json.dump([asdict(read(Case(**case))) for case in json.load(sys.stdin)], sys.stdout)
