"""What the tests of conversions share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from layouts import make
from safetensors.torch import load_file

from mixtools import conversion, job
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint

TREE = Path(__file__).parents[1]
NANO = TREE / "tests" / "data" / "nano-mixtral"
DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)
Planner = Callable[[Checkpoint], job.Job]


def to_hf(source: Checkpoint, **options: object) -> job.Job:
    return conversion.plan_hf(source, conversion.Options(**options))


def to_torrent(source: Checkpoint, **options: object) -> job.Job:
    return conversion.plan_torrent(source, conversion.Options(**options), safetensors=False)


def to_consolidated(source: Checkpoint) -> job.Job:
    return conversion.plan_torrent(source, conversion.Options(), safetensors=True)


def go(plan: Planner, source: Path, out: Path, **how: object) -> Path:
    job.run(plan(open_checkpoint(source)), out, job.Run(**how))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def weights(folder: Path) -> make.Tensors:
    """Everything in the folder's safetensors, by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def nano() -> make.Tensors:
    return torch.load(NANO / "consolidated.00.pth", weights_only=True)


def sources(dims: make.Dims, tensors: make.Tensors) -> dict[str, Callable[[Path], Path]]:
    canonical = make.hf(tensors, dims)
    return {
        "A": lambda folder: make.write_a(folder, dims, tensors),
        "A'": lambda folder: make.write_split(folder, dims, tensors),
        "B": lambda folder: make.write_b(folder, dims, tensors),
        "C": lambda folder: make.write_c(folder, dims, tensors),
        "D": lambda folder: make.write_hf(folder, canonical, dims),
        "E": lambda folder: make.write_e(folder, canonical, dims),
        "F": lambda folder: make.write_hf(folder, make.fused(canonical, dims), dims),
    }


SCRIPT = """
import sys
from pathlib import Path
from mixtools import conversion, job
from mixtools.layouts.detect import open_checkpoint
source, out, jobs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
job.run(conversion.plan_hf(open_checkpoint(source), conversion.Options()), out, job.Run(jobs=jobs))
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TREE), **more}
