"""What the benches share: best-of timing, the machine's description, and a JSON file per bench in results/."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mixtools.ops import cpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "tests"))  # the oracles lie there
RESULTS = Path(__file__).resolve().parent / "results"
LOAD_BEFORE = os.getloadavg()[0]  # of the last minute: the bench's own work is not in it yet


def best_seconds(run: Callable[[], object], *, rounds: int = 7) -> float:
    """Least wall time of `rounds` runs: what the work takes when nothing else disturbs it."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def machine() -> dict[str, Any]:
    """Where and with what a figure was measured; a `load_before` well above 0 says that others were at work."""
    commit = _git("rev-parse", "HEAD")
    return {
        "cpu": _first_line("/proc/cpuinfo", "model name") or platform.processor(),
        "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load_before": round(LOAD_BEFORE, 2),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "instruction_set": cpu.instruction_set().name.lower(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "commit": f"{commit} with changes" if _git("status", "--porcelain", "--untracked-files=no") else commit,
    }


def write_result(name: str, results: object) -> Path:
    """Write results/NAME.json: the machine and what the bench found."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n", "utf-8")
    return path


def _first_line(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
