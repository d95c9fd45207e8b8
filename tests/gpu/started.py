"""What a launch by Triton's own way compiles, for a GPU that is not there, read from its machine code.

Used in the process that compiles (targets.py); the tests' own gets it by `compiled`.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, TypeVar

from gpu.targets import AMD, NVIDIA, NoDriver, disassembled, in_compiler, instructions, loops

from mixtools.ops.gpu.launch import Launch


class Case(Protocol):
    @property
    def target(self) -> str: ...


AnyCase = TypeVar("AnyCase", bound=Case)


@dataclass(frozen=True)
class Code:
    """`loops`, `whole`: instructions by name, of each loop that holds no other and of all. `spilled`: bytes."""

    registers: int
    spilled: int
    shared: int
    loops: list[dict[str, int]]
    whole: dict[str, int]
    texts: dict[str, bool]

    @property
    def loop(self) -> dict[str, int]:
        """The one that loads most."""
        return max(self.loops, key=lambda loop: sum(loop[name] for name in loop if name.startswith(_LOADS)))


_LOADS = (AMD.load, NVIDIA.load)
Reading = Callable[[str, Code], dict[str, bool]]


def compiled(script: str, cases: Sequence[AnyCase]) -> dict[AnyCase, Code]:
    """In a process of its own; Triton keeps what was compiled, until its source changes."""
    return {case: Code(**code) for case, code in zip(cases, in_compiler(script, cases), strict=True)}


def answer(case: Callable[..., AnyCase], launched: Callable[[AnyCase], Launch], texts: Reading) -> None:
    """What `compiled` asks of the script: its cases come in, their codes go out. `texts`: what else is told of a case,
    from PTX or AMD's assembly and all that is counted."""
    asked = [case(**one) for one in json.load(sys.stdin)]
    json.dump([asdict(_read(launched(one), one.target, texts)) for one in asked], sys.stdout)


def _read(started: Launch, target: str, texts: Reading) -> Code:
    from triton.runtime import driver

    driver.set_active(NoDriver(target))
    started.function.device_caches.clear()  # of the target before this one
    made: Any = started.function.warmup(**started.arguments, **started.constants, grid=started.grid, **started.options)
    if target.startswith("gfx"):
        text = made.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        # scalars that have no room lie in lanes of a vector register: no memory
        spilled = found["private_segment_fixed_size"] + 4 * found["vgpr_spill_count"]
        registers, assembly, language = found["vgpr_count"], text, AMD
    else:
        registers, spilled, assembly = disassembled(made.asm["cubin"])
        text, language = made.asm["ptx"], NVIDIA
    each = [_counted(lines) for lines in loops(assembly, language)]
    whole = _counted(instructions(assembly, language))
    code = Code(registers, spilled, made.metadata.shared, each, whole, {})
    return replace(code, texts=texts(text, code))


def _counted(lines: Iterable[str]) -> dict[str, int]:
    return dict(Counter(line.split()[0].split(".")[0] for line in lines))
