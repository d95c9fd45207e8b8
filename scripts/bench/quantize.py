"""`mixtools quantize` on a full-width model: against its three parts done alone, and against llama.cpp's two steps.

    python scripts/bench/quantize.py SOURCE [--types Q4_K_M Q2_K] [--jobs 2] [--repeats 3] [--work DIR]
        [--converter convert_hf_to_gguf.py --peer-python PYTHON --llama-quantize llama-quantize]

SOURCE: a Hugging Face folder, such as `scripts/make_checkpoint --preset 8x7b --layers 2 --layout hf` makes. A command
is timed as a whole process, its source's pages warm, and ends with its bytes on the disk (the peer's with `sync FILE`).
Alone: reading is every block of the source through the reader, encoding every matrix from memory, writing every region
of the file through the writer, checksums, digest and fsync included; each on as many threads as the command has. The
peer's converter and quantizer come from llama.cpp (its source package, and a build of it).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _bench import write_result
from convert import MIXTOOLS, Timed, timed

from mixtools.hub.opening import open_model
from mixtools.methods.quantize.mixtures import Mixture
from mixtools.methods.quantize.run import File, Options, fans, plan_jobs
from mixtools.methods.quantize.stored import store
from mixtools.storage.output import Output, Region
from mixtools.storage.store import CHUNK

GOALS = {"overlap": 1.5, "peer_ratio": 4.0, "peak_bytes": 1_500_000_000}


def in_parallel(work: Callable[[Any], object], items: Iterable[Any], jobs: int) -> float:
    """Wall seconds of `work` on each item."""
    began = time.perf_counter()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(work, items))
    return time.perf_counter() - began


def reading(source: Any, jobs: int) -> float:
    def read(slot: Any) -> None:
        for _ in source.blocks(slot, CHUNK):
            pass

    return in_parallel(read, source.slots(), jobs)


def encoding(source: Any, file: File, jobs: int) -> float:
    """Slot by slot: what is read between is not counted."""
    seconds = 0.0
    for slot in source.slots():
        dtype, target = source.spec(slot).dtype, file.choices[slot].type
        blocks = [block.copy() for block in source.blocks(slot, CHUNK)]
        seconds += in_parallel(lambda block: store(block, dtype, target, None, slot), blocks, jobs)  # noqa: B023
    return seconds


def writing(source: Any, file: File, folder: Path, jobs: int) -> float:
    """Bytes of no meaning, each region as the command writes it."""
    block = np.random.default_rng(0).integers(0, 256, (1, CHUNK), np.uint8)
    began = time.perf_counter()
    with Output(folder, file.plan, {"bench": 1}, shared=True) as output:
        regions = [fan.targets[0].region for fan in fans(source, [file], None)([output])]
        sizes = dict(zip(regions, _sizes(source, file), strict=True))

        def write(region: Region) -> None:
            whole, rest = divmod(sizes[region], CHUNK)
            output.add(region, [*[block] * whole, *([block[:, :rest]] if rest else [])])

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(write, regions))
        output.commit({}, {})
    return time.perf_counter() - began


def _sizes(source: Any, file: File) -> list[int]:
    return [file.choices[slot].type.nbytes(source.spec(slot).shape) for slot in source.slots()]


def ours(source: Path, out: Path, kind: str, jobs: int) -> Timed:
    """Peak memory is what the command says of itself: the kernel's figure counts this process's own before exec."""
    told = out.parent / "told.json"
    command = '"$0" quantize "$1" "$2" --type "$3" --jobs "$4" --json > "$5"'
    done = timed("sh", "-c", command, MIXTOOLS, source, out, kind, str(jobs), told)
    return done._replace(peak_bytes=json.loads(told.read_text("utf-8"))["peak_memory_bytes"])


def peer(args: argparse.Namespace, work: Path, kind: str) -> tuple[Timed, Timed]:
    """Converter, then quantizer."""
    whole, out = work / "peer.bf16.gguf", work / f"peer.{kind}.gguf"
    command = '"$0" "$1" "$2" --outtype bf16 --outfile "$3" && sync -- "$3"'
    first = timed("sh", "-c", command, args.peer_python, args.converter, args.source, whole)
    command = '"$0" "$1" "$2" "$3" "$4" && sync -- "$2"'
    second = timed("sh", "-c", command, args.llama_quantize, whole, out, kind, str(args.jobs))
    return first, second


def one(args: argparse.Namespace, kind: str) -> dict[str, Any]:
    source = open_model(args.source)
    ((file, _),) = plan_jobs(source, [Mixture(kind)], Options("bench"))
    work = Path(args.work)
    found: dict[str, Any] = {"type": kind, "source_bytes": sum(e.nbytes for e in source.store.entries.values()),
                             "bytes": file.plan.total_bytes}  # fmt: skip
    rounds = []
    for number in range(args.repeats):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        reading(source, args.jobs)  # its pages are warm
        done = ours(Path(args.source), work / "ours", kind, args.jobs)
        shutil.rmtree(work / "ours")
        alone = {
            "reading": reading(source, args.jobs), "encoding": encoding(source, file, args.jobs),
            "writing": writing(source, file, work / "written", args.jobs),
        }  # fmt: skip
        shutil.rmtree(work / "written")
        told = {
            "seconds": done.seconds, "cpu_seconds": done.cpu_seconds, "peak_bytes": done.peak_bytes, "alone": alone,
            "overlap": done.seconds / max(alone.values()),
        }  # fmt: skip
        if args.converter and number < args.peer_rounds:
            first, second = peer(args, work, kind)
            told["peer"] = {"convert": first._asdict(), "quantize": second._asdict()}
            told["peer_ratio"] = (first.seconds + second.seconds) / done.seconds
        rounds.append(told)
        print(kind, {key: value for key, value in told.items() if key != "peer"}, flush=True)
    shutil.rmtree(work, ignore_errors=True)
    for key in ("seconds", "cpu_seconds", "peak_bytes", "overlap", "peer_ratio"):
        if key in rounds[0]:
            found[key] = statistics.median(told[key] for told in rounds if key in told)
    if "peer" in rounds[0]:
        seconds = [sum(part["seconds"] for part in told["peer"].values()) for told in rounds if "peer" in told]
        found["peer_ratio_of_medians"] = statistics.median(seconds) / found["seconds"]
    return {**found, "rounds": rounds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--types", nargs="+", default=["Q4_K_M", "Q2_K"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", default="bench-quantize")
    parser.add_argument("--converter")
    parser.add_argument("--peer-rounds", type=int, default=1, help="it takes twenty times as long")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--llama-quantize")
    args = parser.parse_args()
    results = {"goals": GOALS, "jobs": args.jobs, "types": [one(args, kind) for kind in args.types]}
    print(write_result("quantize", results))


if __name__ == "__main__":
    main()
