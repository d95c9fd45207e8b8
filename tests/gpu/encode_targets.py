"""The encoders compiled ahead of time for GPUs that are not there: all launches of a case, and what their code is like.

As targets.py, whose process for interpreting is not the one for compiling, either.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch
from gpu.targets import HIDDEN, INNER, TARGETS, build, disassembled, in_compiler, instructions

from mixtools.ops.gpu import encoding
from mixtools.ops.gpu.launch import Launch
from mixtools.storage.dtypes import DType

LOOSE = r"\b(contract|fast|nsz|ninf|reassoc|arcp|afn)\b|fpmath|fmuladd|\bfma\b"  # a compiler's leave to round otherwise


@dataclass(frozen=True)
class Case:
    """An encoder of w2 of 8x7B, for a target."""

    type: str
    weighted: bool
    target: str
    source: str = "bfloat16"

    def __str__(self) -> str:
        return " ".join((self.type, *["weighted"] * self.weighted, self.target, self.source))


@dataclass(frozen=True)
class Code:
    """What a launch was compiled to. `odd`: what in its texts rounds otherwise than the CPU does, or may."""

    kernel: str
    registers: int
    spilled: int  # bytes of memory of a thread's own
    shared: int  # bytes of a program
    odd: list[str]
    names: dict[str, int]  # of instructions


def compiled(cases: Sequence[Case]) -> dict[Case, list[Code]]:
    """Triton keeps what was compiled, until its source changes."""
    found = in_compiler(__file__, cases)
    return {case: [Code(**code) for code in codes] for case, codes in zip(cases, found, strict=True)}


# --- in the process that compiles ------------------------------------------------------------------------------------


def launched(case: Case) -> tuple[Launch, ...]:
    type = DType(case.type)
    rows = torch.empty(HIDDEN, INNER, dtype=getattr(torch, case.source), device="meta")
    importance = torch.empty(INNER, device="meta") if case.weighted else None
    out = torch.empty(HIDDEN, type.row_bytes(INNER), dtype=torch.uint8, device="meta")
    return encoding.launches(rows, type, importance, out, TARGETS[case.target][2])


_disassembled = cache(disassembled)  # with importance and without, some launches are the same


def read(started: Launch, target: str) -> Code:
    made = build(started, target)
    odd = {found[0] for found in re.finditer(LOOSE, made.asm["llir"])}
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        told = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        names = Counter(line.split()[0] for line in text.splitlines() if line.startswith("\t") and line[1:2].isalpha())
        spilled = told["private_segment_fixed_size"] + 4 * (told["vgpr_spill_count"] + told["sgpr_spill_count"])
        # what fuses is inside a division, or a root, alone; and denormals stay what they are
        roots, divisions = names["v_sqrt_f32_e32"], names["v_div_fmas_f32"]
        fused = sum(count for name, count in names.items() if re.match(r"v_(pk_)?(fma|mac|mad)\w*_f32", name))
        if fused != 5 * divisions + 2 * roots:
            odd.add(f"{fused} fused in {divisions} divisions and {roots} roots")
        if re.findall(r"float_denorm_mode_32 (\d)", text) != ["3"]:
            odd.add("denormals")
        return Code(started.kernel, told["vgpr_count"], spilled, made.metadata.shared, sorted(odd), dict(names))
    registers, spilled, sass = _disassembled(made.asm["cubin"])
    ptx = made.asm["ptx"]
    exact = r"(div|sqrt)\.rn\.f32|div\.[us]\d+"
    odd |= {found[0] for found in re.finditer(r"\b(div|sqrt|rcp|rsqrt)\.[\w.]+", ptx) if not re.match(exact, found[0])}
    odd |= {found[0] for found in re.finditer(r"\bfma\.|\.ftz\b|\.approx\b|\b(atom|red)\.", ptx)}
    names = Counter(line.split()[0].split(".")[0] for line in instructions(sass))
    return Code(started.kernel, registers, spilled, made.metadata.shared, sorted(odd), dict(names))


if __name__ == "__main__":
    wanted = [Case(**case) for case in json.load(sys.stdin)]
    found: list[Any] = [[asdict(read(started, case.target)) for started in launched(case)] for case in wanted]
    json.dump(found, sys.stdout)
