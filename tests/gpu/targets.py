"""Kernels compiled ahead of time for GPUs that are not there, and what their machine code is like.

    cases ─► a process without Triton's interpreter: each compiled at the shapes of 8x7B ─► figures read from the code

A process either interprets kernels or compiles them, and the tests' own interprets: this module is also the other one.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mixtools.ops.gpu import launch
from mixtools.ops.gpu.launch import Launch
from mixtools.ops.gpu.planes import Planes

ROOT = Path(__file__).resolve().parents[2]
TRITON = Path(os.environ.get("MIXTOOLS_TRITON") or ROOT / ".venv-triton")  # where it is installed: any version to try
TARGETS: dict[str, tuple[str, int | str, int]] = {
    "sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32), "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
HIDDEN, INNER, EXPERTS, CHOICES, QKV = 4096, 14336, 8, 2, 6144  # of 8x7B
HEADS, KV_HEADS, HEAD, LENGTH = 32, 8, 128, 4096  # and columns of its cache
FUSED = ("int4", "q8_0", "q2_k", "q4_k", "q5_k")  # whose decoders ask for a fused multiply-add
EXCHANGES = ("LDS", "STS", "LDSM", "BAR", "SHFL")  # by which threads hear of each other
_TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int32: "*i32", torch.int16: "*i16",
    torch.uint8: "*u8", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A kernel over planes of a kind (matrices.KINDS), for a target."""

    kernel: str
    kind: str
    target: str
    tokens: int = 1
    x: str = "bfloat16"
    adds: bool = False

    def __str__(self) -> str:
        rest = [f"{self.tokens} tokens"] * (self.tokens > 1) + [self.x] * (self.x != "bfloat16") + ["adds"] * self.adds
        return " ".join((self.kernel, self.kind, self.target, *rest))


@dataclass(frozen=True)
class Code:
    """What a case was compiled to. `loop`: instructions of the loop over a row's units, by name; where it has none, of
    the whole kernel."""

    registers: int
    spilled: int  # bytes of memory of a thread's own
    shared: int  # bytes of a program
    rows: int
    unit: int
    lanes: int  # of a warp
    warps: int  # of a program
    programs: int
    bytes_per_weight: float
    wide_loads: int  # of 16 bytes, in the loop
    weights: int  # that a thread multiplies in one turn of the loop, told from its fused multiply-adds
    loop: dict[str, int]
    whole: dict[str, int]
    texts: dict[str, bool]


def compiled(cases: Sequence[Case]) -> dict[Case, Code]:
    """Triton keeps what was compiled, until its source changes."""
    return {case: Code(**code) for case, code in zip(cases, in_compiler(__file__, cases), strict=True)}


def startable(cases: Sequence[Case]) -> dict[Case, bool]:
    """See started_as_users_start_it."""
    return dict(zip(cases, in_compiler(__file__, cases, "--start"), strict=True))


def in_compiler(script: str, cases: Sequence[Any], *arguments: str) -> list[Any]:
    """What a script answers of cases, dataclasses, in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, (TRITON, ROOT / "tests", ROOT)))
    environment["TRITON_CACHE_DIR"] = str(TRITON / "compiled")
    done = subprocess.run(
        [sys.executable, script, *arguments], input=json.dumps([asdict(case) for case in cases]), env=environment,
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    found: list[Any] = json.loads(done.stdout)
    return found


# --- in the process that compiles ------------------------------------------------------------------------------------


@cache
def _small(kind: str, columns: int) -> Planes:
    from gpu.matrices import KINDS

    return KINDS[kind][0](32, columns, 0).planes


def large(kind: str, matrices: int, rows: int, columns: int) -> tuple[Planes, float]:
    """Planes of `matrices` of [rows, columns] whose memory is not there, and the bytes of a weight."""
    small = _small(kind, columns)
    parts = tuple(
        torch.empty((len(part) * rows // 32 * matrices, *part.shape[1:]), dtype=part.dtype, device="meta")
        for part in small.parts
    )
    tables = small.parts[2].nbytes if small.kind.name == "nf4" else 0
    return replace(small, rows=matrices * rows, matrix_rows=rows, parts=parts), (small.nbytes - tables) / (32 * columns)


def launched(case: Case) -> tuple[Launch, float]:  # noqa: PLR0911 (a kernel a return)
    """As 8x7B would start it, and the bytes of a weight."""
    lanes, dtype, tokens = TARGETS[case.target][2], getattr(torch, case.x), case.tokens

    def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    chosen = empty(tokens, CHOICES, dtype=torch.int64)
    weights = empty(tokens, CHOICES, dtype=torch.float32)
    if case.kernel == "route":
        router = empty(EXPERTS, HIDDEN, dtype=torch.float32)
        x, normed = empty(tokens, HIDDEN), empty(tokens, HIDDEN)
        return launch.route(x, empty(HIDDEN), router, 1e-5, normed, weights, chosen), 0.0
    if case.kernel == "normalise":
        return launch.normalise(empty(tokens, HIDDEN), empty(HIDDEN), 1e-5, empty(tokens, HIDDEN)), 0.0
    if case.kernel == "turn":
        heads = torch.split(empty(tokens, HEADS + 2 * KV_HEADS, HEAD), [HEADS, KV_HEADS, KV_HEADS], 1)
        table, cache = empty(1, LENGTH, HEAD // 2, dtype=torch.float32), empty(tokens, KV_HEADS, LENGTH, HEAD)
        seen, out = empty(tokens, 2, dtype=torch.int32), empty(tokens, HEADS, HEAD)
        return launch.turn((heads[0], heads[1], heads[2]), (table, table), seen, out, cache, cache), 0.0
    if case.kernel in ("attend", "combine"):
        cache, q = empty(1, KV_HEADS, LENGTH, HEAD), empty(1, HEADS, tokens, HEAD)
        first, last = launch.attend(q, cache, cache, empty(1, 2, dtype=torch.int32), q)
        return (first if case.kernel == "attend" else last), 0.0
    if case.kernel == "gemv":
        planes, size = large(case.kind, 1, QKV, HIDDEN)
        before = empty(tokens, QKV) if case.adds else None
        return launch.gemv(empty(tokens, HIDDEN), planes, empty(tokens, QKV), before, lanes), size
    if case.kernel == "gate_up":
        planes, size = large(case.kind, 2 * EXPERTS, INNER, HIDDEN)
        return launch.gate_up(empty(tokens, HIDDEN), chosen, planes, empty(tokens, CHOICES, INNER), lanes), size
    if case.kernel == "down":
        (planes, size), x = large(case.kind, EXPERTS, HIDDEN, INNER), empty(tokens, CHOICES, INNER)
        before = empty(tokens, HIDDEN) if case.adds else None
        return launch.down(x, chosen, weights, planes, empty(tokens, HIDDEN), before, lanes), size
    planes, size = large(case.kind, 1, INNER, HIDDEN)
    return launch.unpack(planes, empty(INNER, HIDDEN), lanes), size


def build(started: Launch, target: str) -> Any:
    """What Triton makes of a kernel whose pointers and sizes are multiples of 16 where they are here."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = started.function
    signature: dict[str, str] = {}
    aligned = {}
    varied = {param.name for param in function.params if param.do_not_specialize}
    for index, name in enumerate(function.arg_names):
        given = started.arguments.get(name)
        if given is None:
            signature[name] = "constexpr"
        else:
            number = "fp32" if isinstance(given, float) else "i32"
            signature[name] = _TYPES[given.dtype] if isinstance(given, Tensor) else number
            if isinstance(given, Tensor) or (isinstance(given, int) and given % 16 == 0 and name not in varied):
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, started.constants, aligned)
    return triton.compile(source, target=GPUTarget(*TARGETS[target]), options=started.options)


def read(case: Case) -> Code:
    started, size = launched(case)
    made = build(started, case.target)
    plan, rows = started.constants.get("PLAN"), started.constants.get("ROWS", 0)
    unit = plan.unit if plan else 0
    told = {"rows": rows, "unit": unit, "lanes": TARGETS[case.target][2], "warps": started.warps,
            "programs": math.prod(started.grid), "bytes_per_weight": size}  # fmt: skip
    if case.target.startswith("gfx"):
        text = made.asm["amdgcn"]
        found = {key: int(value) for key, value in re.findall(r"\.(\w+):\s+(\d+)\s*$", text, re.MULTILINE)}
        lines = [line.strip() for line in text.splitlines() if line.startswith("\t") and line[1:2].isalpha()]
        spilled = found["private_segment_fixed_size"] + 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])
        registers, names = found["vgpr_count"], Counter(line.split()[0] for line in lines)
        wide = sum(count for name, count in names.items() if name == "global_load_dwordx4")
        inside = Counter(line.split()[0] for line in loop(text, AMD))
        fused = sum(count * (2 if name.startswith("v_pk_") else 1) for name, count in inside.items()
                    if re.match(r"v_(pk_)?fma(c|ak|mk)?_f32|v_fma_mix_f32", name))  # fmt: skip
        weights = _weights(fused, case, plan, rows)
        return Code(registers, spilled, made.metadata.shared, **told, wide_loads=wide, weights=weights,
                    loop=dict(inside), whole=dict(names), texts={})  # fmt: skip
    registers, spilled, sass = disassembled(made.asm["cubin"])
    body, whole = loop(sass), [*instructions(sass)]
    names = Counter(line.split()[0] for line in body)
    wide = sum(count for name, count in names.items() if name.startswith("LDG") and ".128" in name)
    order = [line.split()[0].split(".")[0] for line in whole]
    loads, meets = ([index for index, name in enumerate(order) if name in names]
                    for names in (("LDG",), EXCHANGES))  # fmt: skip
    texts = {
        "exchanges last": bool(loads and meets) and loads[-1] < meets[0],
        "loads 16 bytes": "ld.global.v4.b32" in made.asm["ptx"],
        "rounds to nearest": "cvt.rn.bf16" in made.asm["ptx"] and "cvt.rz.bf16" not in made.asm["ptx"],
    }
    fused = sum(name.count("FFMA") * (1 + name.startswith("FFMA2")) for name in (line.split()[0] for line in body))
    short, all_short = (dict(Counter(line.split()[0].split(".")[0] for line in lines)) for lines in (body, whole))
    return Code(registers, spilled, made.metadata.shared, **told, wide_loads=wide,
                weights=_weights(fused, case, plan, rows), loop=short, whole=all_short, texts=texts)  # fmt: skip


def _weights(fused: int, case: Case, plan: Any, rows: int) -> int:
    """That so many fused multiply-adds multiply; 0 where they are no whole number, and on sm_100 and gfx942, which make
    some products otherwise and some scales by them, whole turns of the loop as it was written."""
    if not plan:
        return 0
    weights, rest = divmod(fused, case.tokens + (plan.kind in FUSED))
    turn = rows * plan.unit
    if case.target in ("sm_100", "gfx942") and turn:
        return turn * max(1, round(weights / turn))
    return 0 if rest else weights


def disassembled(cubin: bytes) -> tuple[int, int, str]:
    """Registers, bytes of local memory, and the text of the machine code."""
    tools = TRITON / "triton" / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        text = _run(tools / "nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)}
    return used["REG"], used["LOCAL"] + used["STACK"], text


def _run(*command: Path | str) -> str:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout


class Language(NamedTuple):
    """How a machine code is written: patterns of an instruction, without address and predicate, of a label, of a branch
    to one; how the name of a load from global memory begins."""

    instruction: str
    label: str
    branch: str
    load: str


NVIDIA = Language(
    r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?((?!NOP).*?) ?;", r"(\.L_x_\d+):", r"BRA.*`\((\.L_x_\d+)\)", "LDG"
)
AMD = Language(r"\t([a-z]\w*.*)", r"(\.LBB\d+_\d+):", r"s_c?branch\w*\s+(\.LBB\d+_\d+)", "global_load")


def instructions(lines: str | Iterable[str], language: Language = NVIDIA) -> Iterable[str]:
    """Without what only fills the end up."""
    for line in lines.splitlines() if isinstance(lines, str) else lines:
        if found := re.match(language.instruction, line):
            yield found[1]


def loops(text: str, language: Language = NVIDIA) -> list[list[str]]:
    """The instructions of each loop that holds no other."""
    lines = text.splitlines()
    labels = {found[1]: index for index, line in enumerate(lines) if (found := re.match(language.label, line))}
    spans = []
    for index, line in enumerate(lines):
        found = re.search(language.branch, line)
        if found and labels[found[1]] < index:
            spans.append((labels[found[1]], index + 1))
    inner = [(a, b) for a, b in spans if not any((a, b) != (c, d) and a <= c and d <= b for c, d in spans)]
    return [[*instructions(lines[first:last], language)] for first, last in inner]


def loop(text: str, language: Language = NVIDIA) -> list[str]:
    """The instructions of the loop that loads most, of those that hold no other; all where there is none."""
    bodies = loops(text, language)
    loads = {count: body for body in bodies if (count := sum(name.startswith(language.load) for name in body))}
    return loads[max(loads)] if loads else [*instructions(text, language)]


class NoDriver:
    """Stands where Triton would ask a GPU: knows what it is, and has none."""

    def __init__(self, target: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(*TARGETS[target])

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def started_as_users_start_it(case: Case) -> bool:
    """Whether a launch by Triton's own way, up to where a GPU would be needed, makes the code that `build` makes."""
    from triton.runtime import driver

    driver.set_active(NoDriver(case.target))
    started, _ = launched(case)
    made = started.function.warmup(**started.arguments, **started.constants, grid=started.grid, **started.options)
    binary = "hsaco" if case.target.startswith("gfx") else "cubin"
    return bool(made.asm[binary] == build(started, case.target).asm[binary])


if __name__ == "__main__":
    asked = json.load(sys.stdin)
    if sys.argv[1:] == ["--start"]:
        json.dump([started_as_users_start_it(Case(**case)) for case in asked], sys.stdout)
    else:
        json.dump([asdict(read(Case(**case))) for case in asked], sys.stdout)
