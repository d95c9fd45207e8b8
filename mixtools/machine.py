"""What this machine has, and how its limits are written: sizes, memory, devices. Free of torch until a device is asked.

Sizes are decimal, as disks and the Hub count them.
"""

from __future__ import annotations

import ctypes
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import MemoryBudgetError, UsageError

if TYPE_CHECKING:
    import torch

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(size: str | int, option: str) -> int:
    """Bytes of "800MB", "5GB", "1.5GiB", "4096" or 4096. Raises UsageError, which names the option."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?|)b?\s*", str(size).lower())
    if match is None:
        raise UsageError(f"--{option.replace('_', '-')}: {size!r} is not a size; write 800MB, 5GB or 1.5GiB")
    return int(float(match[1]) * (_UNITS | _BINARY)[match[2]])


def parse_limit(size: str | int | None) -> int | None:
    """Bytes of --max-memory; None sets no limit. Raises UsageError."""
    return None if size is None else parse_size(size, "max_memory")


def human_bytes(count: float) -> str:
    """93.41 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def human_time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def peak_memory() -> int:
    """Largest resident set of this process so far, in bytes.

    On Linux not by getrusage, whose figure survives exec: a large parent's would be told as ours.
    """
    status = _fields("/proc/self/status")
    if "VmHWM" in status:
        return int(status["VmHWM"].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_memory() -> None:
    """Hand back to the system what was freed and the C library keeps for itself, where it is GNU's.

    What a layer leaves behind lies in pieces between what the next one takes, and without this a process grows from
    layer to layer though nothing is held.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def available_memory() -> int | None:
    """Bytes that this machine can still give (Linux); None where it does not tell."""
    fields = _fields("/proc/meminfo")
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _fields(file: str) -> dict[str, str]:
    """Of one of Linux's own files, a name and a value a line; empty elsewhere."""
    try:
        lines = Path(file).read_text("utf-8", "replace").splitlines()
    except OSError:
        return {}
    return dict(line.split(":", 1) for line in lines if ":" in line)


def check_device(name: str) -> None:
    """Raises UsageError unless the name has a device's form; whether it is there, torch tells later."""
    if re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name) is None:
        raise UsageError(f"--device: {name!r} is none of auto, cpu, cuda, cuda:N, mps")


def find_device(name: str) -> torch.device:
    """The torch device of a --device value; "auto" takes CUDA, then MPS, then the CPU.

    Raises UsageError if the name has no device's form or the device is not there.
    """
    import torch

    check_device(name)
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device: no {name} here; `mixtools doctor` lists what there is")
    if device.type == "mps" and not mps:
        raise UsageError("--device: no mps here; `mixtools doctor` lists what there is")
    return device


def memory_for(device: torch.device, limit: int | None) -> int | None:
    """Bytes for a model: what --max-memory leaves beside what the process has taken so far, else what is free.

    Raises MemoryBudgetError if the process alone takes more.
    """
    import torch

    if limit is not None:
        taken = peak_memory()
        if limit <= taken:
            raise MemoryBudgetError(
                "--max-memory is less than the program itself takes",
                expected=f"more than {human_bytes(taken)}", found=human_bytes(limit),
            )  # fmt: skip
        return limit - taken
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, and free for it
        return int(0.9 * (torch.cuda.mem_get_info(device)[0] + kept))
    return available_memory()


def product_rate(device: torch.device | None = None, dtype: str = "float32") -> float:
    """Operations a second of a device, the CPU if none is given, from small products in this torch dtype."""
    import torch

    side = 768 if device is None or device.type == "cpu" else 4096
    matrix = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
    float((matrix @ matrix)[0, 0])  # waits for the device
    began = time.perf_counter()
    for _ in range(3):
        product = matrix @ matrix
    float(product[0, 0])
    return 3 * 2 * side**3 / max(time.perf_counter() - began, 1e-9)
