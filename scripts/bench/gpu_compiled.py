"""The GPU's kernels compiled for each target at the shapes of 8x7B, and the share of a GPU's bandwidth that follows.

    scripts/test --gpu-kernels -k none   (makes .venv-triton)
    .venv/bin/python scripts/bench/gpu_compiled.py

No GPU is needed and none is measured: all is read from the machine code. The share is a bound, the least of three, for
one token and x in bf16, of what a copy reaches: on an H200 4.3 TB/s, which is nine tenths of its vendor's figure, and
as much of theirs on the others, which nobody measured here:

    issue    4 instructions of a warp a cycle, by the instructions of the loop over a row's units; 90 % of them, since
             no warp is always ready. On gfx942 one vector instruction a cycle, those for scalars beside it
    lines    one line of 128 bytes a cycle from the first cache: of each row's words, and of x, which 4 rows share (not
             told of gfx942)
    flight   the bytes that the resident warps' loads of a turn have on their way, over what 0.8 microseconds need

Resident warps follow from registers (65,536 on a multiprocessor, in steps of 8 a thread), from 32 programs at most, and
from how many are started. On gfx942 they are those of one of a unit's four SIMDs, of 512 registers a lane. Launches,
the tail of the last programs and the second cache are left out.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from _bench import write_result
from gpu.targets import TARGETS, Case, Code, compiled

KINDS = ["bf16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "gptq v2", "gptq sym", "nf4", "nf4 double"]
KERNELS = ["gemv", "gate_up", "down"]
LATENCY = 0.8e-6  # seconds
READY = 0.9  # of the cycles there is a warp that can go on
LINE = 128


@dataclass(frozen=True)
class Gpu:
    """What the bounds need of a GPU: its vendor's figures, and what a copy reaches of the bandwidth."""

    name: str
    bandwidth: float
    units: int
    clock: float
    issued: int = 4  # instructions of a warp a cycle and unit

    @property
    def per_cycle(self) -> float:
        """Bytes that a unit can get."""
        return self.bandwidth / self.units / self.clock


GPUS = {
    "sm_80": Gpu("A100 of 80 GB", 0.9 * 2.039e12, 108, 1.41e9), "sm_90": Gpu("H200", 4.3e12, 132, 1.755e9),
    "sm_100": Gpu("B200", 0.9 * 8e12, 148, 1.965e9), "gfx942": Gpu("MI300X", 0.9 * 5.3e12, 304, 2.1e9, 1),
}  # fmt: skip


def resident_warps(case: Case, code: Code) -> int:
    if case.target == "gfx942":
        return min(8, 512 // (-(-code.registers // 8) * 8))
    started: int = -(-code.programs * code.warps // GPUS[case.target].units)
    return min(32 * code.warps, started, 65536 // (-(-code.registers // 8) * 8 * 32))


def shares(case: Case, code: Code, warps: int) -> dict[str, float]:
    """Of the bandwidth, by what bounds it."""
    gpu, amd = GPUS[case.target], case.target == "gfx942"
    turn = code.weights * code.bytes_per_weight * code.lanes  # bytes of planes that a warp's turn loads
    issued = sum(count for name, count in code.loop.items() if not (amd and name.startswith("s_")))
    found = {
        "issue": turn / (issued / (gpu.issued * READY)) / gpu.per_cycle,
        "flight": warps * (4 if amd else 1) * turn / (LATENCY * gpu.clock * gpu.per_cycle),
    }
    if not amd:
        of_x = code.unit * 2  # bytes of x that belong to a unit
        turns = code.weights / (code.rows * code.unit)
        lines = turns * (code.rows * code.lanes * 16 / LINE + of_x / 16 * min(code.lanes, code.lanes * of_x / LINE))
        found["lines"] = turn / lines / gpu.per_cycle
    return found


def figures(case: Case, code: Code) -> dict[str, Any]:
    warps = resident_warps(case, code)
    found: dict[str, Any] = {
        "kernel": case.kernel, "kind": case.kind, "target": case.target, "registers": code.registers,
        "spilled_bytes": code.spilled, "shared_bytes": code.shared, "resident_warps": warps,
        "bytes_per_weight": round(code.bytes_per_weight, 5),
    }  # fmt: skip
    instructions, bounds = sum(code.loop.values()), shares(case, code, warps)
    found["load_bytes"] = 16 if code.wide_loads else 0
    found["instructions_per_weight"] = round(instructions / code.weights, 2)
    found["instructions_per_byte"] = round(instructions / (code.weights * code.bytes_per_weight), 2)
    found["shares"] = {name: round(share, 2) for name, share in bounds.items()}
    found["share_of_bandwidth"] = round(min(1.0, *bounds.values()), 2)
    return found


def main() -> None:
    cases = [Case(kernel, kind, target) for kernel in KERNELS for kind in KINDS for target in TARGETS]
    results = [figures(case, code) for case, code in compiled(cases).items()]
    for row in results:
        bounds = "  ".join(f"{name} {share:.2f}" for name, share in row["shares"].items())
        print(
            f"{row['target']:6} {row['kernel']:8} {row['kind']:11} {row['registers']:4} registers  "
            f"{row['resident_warps']:3} warps  {row['instructions_per_weight']:5.2f} instructions a weight, "
            f"{row['instructions_per_byte']:5.2f} a byte   {bounds}   at most {row['share_of_bandwidth']:.0%}"
        )
    print(f"spilled: {sum(row['spilled_bytes'] for row in results)} bytes in {len(results)} kernels")
    for target, gpu in GPUS.items():
        at_most = statistics.median(row["share_of_bandwidth"] for row in results if row["target"] == target)
        print(f"{target} ({gpu.name}): median share {at_most:.0%}")
    print(write_result("gpu-compiled", results))


if __name__ == "__main__":
    main()
