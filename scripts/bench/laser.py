"""How long a matrix of 8x7B takes to look at and to reduce, against the way it is commonly done, in one run.

    OMP_NUM_THREADS=1 python scripts/bench/laser.py [--skip-peer]

The peer's way: `torch.linalg.svd` in fp64 (thin, though its users take the full one at times), S > threshold,
U·S·Vᵀ back to bf16. Both get the same bf16 matrix (planted directions, noise, a few outlier columns), the same
threshold (mp), one after the other: ours, peer, ours. Wall and CPU seconds are both kept. Where others are at work,
wall time flatters whoever is repeated and takes the best: go by CPU seconds. It takes about six minutes.

Expected at 4096x14336 on one thread, before anything was written, from a plain gemm's Gram (11.5 s of 15.5) and a
full eigh: half the Gram by symmetry, and vectors for 200 directions instead of 4096: 14 times for the spectrum, 8 for
the rebuilt weight. Found: 17 and 12. The Gram by dsyrk, from bf16 a block at a time, runs at the rate of gemm, so
symmetry saves its whole half. Once the tridiagonal form is there, 200 vectors cost a twentieth of it; the form itself
(half of it matrix times vector, at the speed of memory) is now as long as the Gram.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _bench import write_result
from torch import Tensor

from mixtools.linalg import eigen, rules
from mixtools.linalg.bulk import Bulk
from mixtools.linalg.gram import gram
from mixtools.linalg.spectrum import decompose, spectrum
from mixtools.methods.laser import method as laser

SHAPES = {"expert": (4096, 14336), "attention": (4096, 4096)}
NOISE_SHAPES = ((4096, 4096), (1024, 4096), (4096, 14336))
PLANTED = 200
GOALS = {"expert": {"spectrum": 14.0, "encode": 8.0}}

Seconds = dict[str, float]


def structured(shape: tuple[int, int], seed: int = 0) -> Tensor:
    """bf16: noise of 0.02, PLANTED directions from just above the noise to five times it, 8 columns of outliers."""
    generator = torch.Generator().manual_seed(seed)
    rows, cols = shape
    left = torch.randn(rows, PLANTED, generator=generator) / math.sqrt(rows)
    left *= torch.linspace(2.0, 10.0, PLANTED) * 0.02 * math.sqrt(max(shape))
    weight = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, cols, 1024):
        width = min(1024, cols - start)
        right = torch.randn(PLANTED, width, generator=generator) / math.sqrt(cols)
        block = 0.02 * torch.randn(rows, width, generator=generator) + left @ right
        if start == 0:
            block[:, :: width // 8][:, :8] *= 6
        weight[:, start : start + width] = block
    return weight


def measured(run: Callable[[], Any]) -> tuple[Seconds, Any]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def least(*runs: Seconds) -> Seconds:
    return {clock: min(run[clock] for run in runs) for clock in ("wall", "cpu")}


def gemm_gflops(n: int = 3072) -> float:
    """Rate of fp64 matrix multiplication, best of 3, by CPU seconds per thread."""
    a = torch.randn(n, n, dtype=torch.float64)
    seconds = min(measured(lambda: a @ a)[0]["cpu"] for _ in range(3))
    return 2 * n**3 / seconds / 1e9 * torch.get_num_threads()


def peer(weight: Tensor, threshold: float) -> tuple[Tensor, Tensor, int]:
    """Singular values, the rebuilt matrix in fp64, its rank. The cast back to bf16 is not charged to it."""
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    keep = values > threshold
    return values, (left[:, keep] * values[keep]) @ right[keep], int(keep.sum())


def stages(weight: Tensor) -> dict[str, Seconds]:
    """Where our time goes."""
    rows, cols = weight.shape
    p = min(rows, cols)
    times: dict[str, Seconds] = {}
    times["gram"], matrix = measured(lambda: gram(weight))
    times["eigenvalues alone"], _ = measured(lambda: eigen.eigenvalues(matrix))
    times["tridiagonal form and eigenvalues"], solved = measured(lambda: eigen.decompose(matrix))
    times[f"{PLANTED} vectors"], _ = measured(lambda: solved.vectors(p - PLANTED, p))
    return times


def compare(name: str, weight: Tensor, with_peer: bool) -> dict[str, Any]:
    """One matrix: ours, the peer, ours again."""
    options = laser.Options()
    rate = gemm_gflops()
    scans = [measured(lambda: laser.scan(weight, options))]
    encodes = [measured(lambda: laser.encode(weight, options))]
    rank = encodes[0][1].report.rank
    row: dict[str, Any] = {"name": name, "shape": list(weight.shape), "rank": rank, "planted": PLANTED}
    if with_peer:
        found = spectrum(weight)
        threshold = Bulk.of(found).edge_with_margin
        row["peer"], (values, rebuilt, peer_rank) = measured(lambda: peer(weight, threshold))
        ours = decompose(weight).project(rank, torch.float64)
        row |= {
            "same_rank": peer_rank == rank,
            "rebuilt_relative_difference": float((ours - rebuilt).norm() / rebuilt.norm()),
            "singular_values_relative_difference": float((torch.from_numpy(found.values) / values - 1).abs().max()),
            "equal_after_rounding": float((encodes[0][1].dense == rebuilt.bfloat16()).double().mean()),
        }  # fmt: skip
        del ours, rebuilt
    for _ in range(2):
        scans.append(measured(lambda: laser.scan(weight, options)))
        encodes.append(measured(lambda: laser.encode(weight, options)))
    first, second = stages(weight), stages(weight)
    parts = {part: least(first[part], second[part]) for part in first}
    p, q = sorted(weight.shape)
    row |= {
        "spectrum": least(*(times for times, _ in scans)),
        "encode": least(*(times for times, _ in encodes)),
        "stages": parts,
        "gemm_gflops": max(rate, gemm_gflops()),
        "gram_gflops": p * p * q / parts["gram"]["cpu"] / 1e9 * torch.get_num_threads(),
    }
    # additions and multiplications that our way needs: half a Gram, tridiagonal form, turned vectors, two products
    flops = p * p * q + 4 / 3 * p**3 + 4 * p * p * rank + 4 * p * q * rank
    row["encode_gflops"] = flops / row["encode"]["cpu"] / 1e9 * torch.get_num_threads()
    row["encode_share_of_gemm"] = row["encode_gflops"] / row["gemm_gflops"]
    if with_peer:
        row["times_faster"] = {
            work: {clock: row["peer"][clock] / row[work][clock] for clock in ("wall", "cpu")}
            for work in ("spectrum", "encode")
        }
    return row


def show(row: dict[str, Any]) -> None:
    place = f"{row['shape'][0]}x{row['shape'][1]}, {threads()}"
    for work in ("spectrum", "encode"):
        line = f"{work:9s}{place}     ours {row[work]['cpu']:.1f} s"
        if "peer" in row:
            line += f"   torch.linalg.svd's way {row['peer']['cpu']:.1f} s   {row['times_faster'][work]['cpu']:.1f}x"
            line += f"   of CPU; by the wall {row['times_faster'][work]['wall']:.1f}x"
        print(line)
    print(f"  Gram at {row['gram_gflops']:.0f} of {row['gemm_gflops']:.0f} GFLOP/s, half of it saved by symmetry; "
          f"encode at {row['encode_gflops']:.0f}, {row['encode_share_of_gemm']:.0%} of gemm's rate")  # fmt: skip
    print("  " + "   ".join(f"{name} {times['cpu']:.2f} s" for name, times in row["stages"].items()))
    if "peer" in row:
        print(f"  rank {row['rank']}, the same: {row['same_rank']}; rebuilt weights differ by "
              f"{row['rebuilt_relative_difference']:.1e}, singular values by "
              f"{row['singular_values_relative_difference']:.1e}; "
              f"{row['equal_after_rounding']:.6%} of the bf16 equal")  # fmt: skip


def kept_of_noise() -> list[dict[str, Any]]:
    """What each threshold keeps of pure Gaussian noise, at full size."""
    rows = []
    for shape in NOISE_SHAPES:
        found = spectrum(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        bulk = Bulk.of(found)
        kept = {
            rule.name: rule.rank(found, bulk) / min(shape)
            for rule in (rules.MarchenkoPastur(), rules.GavishDonoho(), rules.LaserRmt())
        }
        rows.append({"name": "kept of noise", "shape": list(shape), **kept})
        print(f"pure noise {shape[0]}x{shape[1]}     kept: " + ", ".join(f"{k} {v:.1%}" for k, v in kept.items()))
    return rows


def peak_memory() -> int:
    """Largest resident set of a process that reduces one expert matrix, in bytes; Linux only."""
    command = [sys.executable, __file__, "--one-matrix"]
    output = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout
    return int(output.split()[-1])


def reduce_one() -> None:
    weight = structured(SHAPES["expert"])
    laser.encode(weight, laser.Options())
    status = Path("/proc/self/status").read_text("utf-8").splitlines()
    print(int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024)


def threads() -> str:
    count = torch.get_num_threads()
    return f"{count} thread{'s'[: count - 1]}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--skip-peer", action="store_true", help="ours alone: one minute instead of six")
    parser.add_argument("--one-matrix", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if "OMP_NUM_THREADS" not in os.environ:
        parser.error("set OMP_NUM_THREADS: scipy's and torch's LAPACK each take their number of threads from it")
    if arguments.one_matrix:
        return reduce_one()
    memory = peak_memory()
    print(f"peak resident memory, one expert matrix: {memory / 2**30:.2f} GiB")
    results: list[dict[str, Any]] = [{"name": "peak memory", "bytes": memory}]
    for name, shape in SHAPES.items():
        results.append(compare(name, structured(shape), not arguments.skip_peer))
        show(results[-1])
    results += kept_of_noise()
    if not arguments.skip_peer:
        print(write_result("laser", {"threads": torch.get_num_threads(), "goals": GOALS, "rows": results}))
    return None


if __name__ == "__main__":
    main()
