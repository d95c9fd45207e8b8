"""`mixtools convert torrent-to-hf` against `cp` and `sync` of the same bytes, on two layers of 8x7B.

    python scripts/bench/convert.py [--layouts A B] [--repeats 5] [--work DIR]

Both are timed as whole processes, from start to exit, with the bytes on the disk: ours ends with fsync, cp is followed
by `sync FILES`. They run in pairs, first one first, then the other, with the source's pages equally cold (written
back, then dropped with posix_fadvise) or equally warm (read once before). The ratio, cp's seconds to ours, is taken
within a pair, since a virtual disk's speed drifts; its median and spread are told. Peak memory is ours, as the kernel
counted it. Needs about 20 GB of free disk: a source in each layout, and one output at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
GOAL_RATIO, GOAL_MEMORY = 0.7, 800_000_000
MIXTOOLS = Path(sys.executable).parent / "mixtools"


class Timed(NamedTuple):
    seconds: float
    cpu_seconds: float
    peak_bytes: int


def timed(*command: str | Path) -> Timed:
    """Run a command to its end. Its peak memory counts this process's own at its start, about 15 MB."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed with {process.returncode}")
    return Timed(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def ours(source: Path, out: Path, jobs: int) -> Timed:
    return timed(MIXTOOLS, "convert", "torrent-to-hf", source, out, "--quiet", "--jobs", str(jobs))


def peer(source: Path, out: Path) -> Timed:
    out.mkdir()
    script = 'out=$1; shift; cp -- "$@" "$out" && sync -- "$out"/*'
    return timed("sh", "-c", script, "sh", out, *sorted(source.iterdir()))


def prepare(source: Path, *, warm: bool) -> None:
    """Nothing left to write anywhere; the source's pages all in memory, or none of them."""
    os.sync()
    for path in source.iterdir():
        with path.open("rb", buffering=0) as file:
            if warm:
                buffer = bytearray(4 << 20)
                while file.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(source: Path, work: Path, *, warm: bool, repeats: int, jobs: int) -> dict[str, Any]:
    """`repeats` pairs after one that does not count."""
    pairs: list[dict[str, Timed]] = []
    for number in range(repeats + 1):
        pair: dict[str, Timed] = {}
        for who in ("ours", "cp") if number % 2 else ("cp", "ours"):
            out = work / f"out-{who}"
            prepare(source, warm=warm)
            pair[who] = ours(source, out, jobs) if who == "ours" else peer(source, out)
            shutil.rmtree(out)
        if number:
            pairs.append(pair)
            print(f"  ours {pair['ours'].seconds:6.2f} s  cp {pair['cp'].seconds:6.2f} s", file=sys.stderr)
    size = sum(path.stat().st_size for path in source.iterdir())
    ratios = [pair["cp"].seconds / pair["ours"].seconds for pair in pairs]
    seconds = {who: [round(pair[who].seconds, 2) for pair in pairs] for who in ("ours", "cp")}
    return {
        "bytes": size, "cache": "warm" if warm else "cold", "jobs": jobs, "seconds": seconds,
        "bytes_per_second": {who: round(size / statistics.median(times)) for who, times in seconds.items()},
        "cpu_seconds": {who: round(statistics.median(p[who].cpu_seconds for p in pairs), 2) for who in seconds},
        "ratio": {name: round(of(ratios), 2) for name, of in
                  (("median", statistics.median), ("least", min), ("greatest", max))},
        "peak_memory_bytes": max(pair["ours"].peak_bytes for pair in pairs),
    }  # fmt: skip


def show(name: str, found: dict[str, Any]) -> None:
    rate = {who: f"{value / 1e9:.2f} GB/s" for who, value in found["bytes_per_second"].items()}
    ratio, peak = found["ratio"], found["peak_memory_bytes"]
    print(
        f"{name:8} {found['cache']}  ours {rate['ours']}  cp {rate['cp']}  {ratio['median']:.2f}x "
        f"({ratio['least']:.2f} to {ratio['greatest']:.2f}; goal {GOAL_RATIO})  "
        f"peak {peak / 1e6:.0f} MB (goal {GOAL_MEMORY / 1e6:.0f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--layouts", nargs="+", default=["A", "B"], metavar="LETTER")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="threads of ours (default: 2, the command's own)")
    parser.add_argument("--cache", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--work", type=Path, help="folder on the disk to measure; sources found there are used again")
    parser.add_argument("--scratch", action="store_true", help="only print: leave results/convert.json as it is")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.work) as scratch:
        for letter in options.layouts:
            source = (options.work or Path(scratch)) / f"full-{letter}"
            if not source.exists():
                make = [sys.executable, ROOT / "scripts" / "make_checkpoint", "--preset", "8x7b", "--quiet"]
                subprocess.run([*make, "--layers", str(options.layers), "--layout", letter, source], check=True)
            for cache in options.cache:
                found = compare(source, Path(scratch), warm=cache == "warm", repeats=options.repeats, jobs=options.jobs)
                results[f"{letter} {cache}"] = found
                show(f"{letter} to D", found)
    if not options.scratch:
        # not before: it loads torch, and the kernel counts this process's memory as its children's peak
        import _bench

        _bench.LOAD_BEFORE = load
        _bench.write_result("convert", results)


if __name__ == "__main__":
    main()
