"""The kernels of eigenproblems compiled ahead of time for GPUs that are not there, and what their machine code is like.

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
from gpu.targets import AMD, TARGETS, NoDriver, disassembled, in_compiler, instructions, loops
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


@dataclass(frozen=True)
class Code:
    """`loops`, `whole`: instructions by name, of each loop that holds no other and of all. `spilled`: bytes."""

    registers: int
    spilled: int
    shared: int
    loops: list[dict[str, int]]
    whole: dict[str, int]
    texts: dict[str, bool]


def compiled(cases: Sequence[Case]) -> dict[Case, Code]:
    """In a process of its own; Triton keeps what was compiled, until its source changes."""
    return {case: Code(**code) for case, code in zip(cases, in_compiler(__file__, cases), strict=True)}


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
        "loads 16 bytes": "ld.global.v2.b64" in ptx,
        "divides exactly": "div.rn.f64" in ptx and "div.full" not in ptx and "rcp.approx.ftz" not in ptx,
    }
    each, whole = [_counted(lines) for lines in loops(sass)], _counted([*instructions(sass)])
    return Code(registers, spilled, made.metadata.shared, each, whole, texts)


def _amd(made: Any) -> Code:
    text = made.asm["amdgcn"]
    found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
    lines = [line.strip() for line in text.splitlines() if line.startswith("\t") and line[1:2].isalpha()]
    names = Counter(line.split()[0] for line in lines)
    texts = {"loads 16 bytes": names["global_load_dwordx4"] > 0, "divides exactly": names["v_div_fixup_f64"] > 0}
    # scalars that have no room lie in lanes of a vector register: no memory
    spilled = found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
    each = [dict(Counter(line.split()[0] for line in lines)) for lines in loops(text, AMD)]
    return Code(found["vgpr_count"], spilled, made.metadata.shared, each, dict(names), texts)


def _counted(lines: Sequence[str]) -> dict[str, int]:
    return dict(Counter(line.split()[0].split(".")[0] for line in lines))


if __name__ == "__main__":
    json.dump([asdict(read(Case(**case))) for case in json.load(sys.stdin)], sys.stdout)
