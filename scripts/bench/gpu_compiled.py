"""The GPU's kernels compiled for each target at the shapes of 8x7B, and the share of an H200's bandwidth that follows.

    scripts/test --gpu-kernels -k none   (makes .venv-triton)
    .venv/bin/python scripts/bench/gpu_compiled.py

No GPU is needed and none is measured: all is read from the machine code. The share is a bound, the least of three, for
one token and x in bf16, of what a copy reaches on an H200 (4.3 TB/s, 132 multiprocessors at 1.755 GHz: 18.6 bytes a
cycle and multiprocessor):

    issue    4 instructions of a warp a cycle, by the instructions of the loop over a row's units; 90 % of them, since
             no warp is always ready
    lines    one line of 128 bytes a cycle from the first cache: of each row's words, and of x, which 4 rows share
    flight   the bytes that the resident warps' loads of a turn have on their way, over what 0.8 microseconds need

Resident warps follow from registers (65,536 on a multiprocessor, in steps of 8 a thread), from 32 programs at most, and
from how many are started on 132 multiprocessors. On gfx942 they are those of one SIMD unit of 512 registers a lane.
Launches, the tail of the last programs and the second cache are left out.
"""

from __future__ import annotations

import statistics
from typing import Any

from _bench import write_result
from gpu.targets import TARGETS, Case, Code, compiled

KINDS = ["bf16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q3_K", "Q2_K", "gptq v2", "gptq sym", "nf4", "nf4 double"]
KERNELS = ["gemv", "gate_up", "down"]
BANDWIDTH, MULTIPROCESSORS, CLOCK = 4.3e12, 132, 1.755e9
PER_CYCLE = BANDWIDTH / MULTIPROCESSORS / CLOCK  # bytes that a multiprocessor can get
LATENCY = 0.8e-6 * CLOCK  # cycles
ISSUED = 4 * 0.9  # instructions of a warp a cycle
LINE = 128


def resident_warps(case: Case, code: Code) -> int:
    if case.target == "gfx942":
        return min(8, 512 // (-(-code.registers // 8) * 8))
    started = -(-code.programs * code.warps // MULTIPROCESSORS)
    return min(32 * code.warps, started, 65536 // (-(-code.registers // 8) * 8 * 32))


def shares(code: Code, warps: int) -> dict[str, float]:
    """Of the bandwidth, by what bounds it."""
    turn = code.weights * code.bytes_per_weight * code.lanes  # bytes of planes that a warp's turn loads
    instructions = sum(code.loop.values())
    of_x = code.unit * 2  # bytes of x that belong to a unit
    turns = code.weights / (code.rows * code.unit)
    lines = turns * (code.rows * code.lanes * 16 / LINE + of_x / 16 * min(code.lanes, code.lanes * of_x / LINE))
    return {
        "issue": turn / (instructions / ISSUED) / PER_CYCLE,
        "lines": turn / lines / PER_CYCLE,
        "flight": warps * turn / (LATENCY * PER_CYCLE),
    }


def figures(case: Case, code: Code) -> dict[str, Any]:
    warps = resident_warps(case, code)
    found: dict[str, Any] = {
        "kernel": case.kernel, "kind": case.kind, "target": case.target, "registers": code.registers,
        "spilled_bytes": code.spilled, "shared_bytes": code.shared, "resident_warps": warps,
        "bytes_per_weight": round(code.bytes_per_weight, 5),
    }  # fmt: skip
    if case.target == "sm_90":
        instructions = sum(code.loop.values())
        found["instructions_per_weight"] = round(instructions / code.weights, 2)
        found["instructions_per_byte"] = round(instructions / (code.weights * code.bytes_per_weight), 2)
        found["shares"] = {name: round(share, 2) for name, share in shares(code, warps).items()}
        found["share_of_bandwidth"] = round(min(1.0, *shares(code, warps).values()), 2)
    return found


def main() -> None:
    cases = [Case(kernel, kind, target) for kernel in KERNELS for kind in KINDS for target in TARGETS]
    results = [figures(case, code) for case, code in compiled(cases).items()]
    for row in results:
        if row["target"] == "sm_90":
            bounds = "  ".join(f"{name} {share:.2f}" for name, share in row["shares"].items())
            print(
                f"{row['kernel']:8} {row['kind']:11} {row['registers']:4} registers  {row['resident_warps']:3} warps  "
                f"{row['instructions_per_weight']:5.2f} instructions a weight, {row['instructions_per_byte']:5.2f} a "
                f"byte   {bounds}   at most {row['share_of_bandwidth']:.0%}"
            )
    print(f"spilled: {sum(row['spilled_bytes'] for row in results)} bytes in {len(results)} kernels")
    at_most = statistics.median(row["share_of_bandwidth"] for row in results if row["target"] == "sm_90")
    print(f"median share {at_most:.0%}", write_result("gpu-compiled", results))


if __name__ == "__main__":
    main()
