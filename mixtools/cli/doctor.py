"""mixtools doctor: what this machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

from ..machine import human_bytes
from ..version import __version__
from . import base

_PACKAGES = ("torch", "safetensors", "numpy", "scipy", "tokenizers", "sentencepiece", "huggingface-hub", "gguf")
_OPTIONAL = {
    "transformers": "comparison with its Mixtral",
    "mistral-common": "comparison with its chat ids",
    "auto-gptq": "--backend auto-gptq",
    "autoawq": "--backend autoawq",
}


def doctor(
    measure: Annotated[bool, typer.Option("--measure", help="Measure memory and products too; takes seconds.")] = False,
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> int:  # fmt: skip
    """What this machine can do: torch, kernels, memory, disk, optional packages.

    Example: mixtools doctor --measure
    """
    screen = base.Screen(json, quiet)
    document = examine()
    if measure and document["kernels"]["problem"] is None:
        document["measured"] = _measured()
    screen.result(document, lambda: _tell(document))
    return 0 if document["ok"] else 1


def examine() -> dict[str, Any]:
    """Everything that can differ between two machines on which mixtools is installed."""
    import torch

    from ..errors import MixtoolsError
    from ..ops import cpu

    try:
        kernels, problem = cpu.instruction_set().name.lower(), None
    except MixtoolsError as error:
        kernels, problem = None, str(error)
    versions = {name: _version(name) for name in _PACKAGES}
    cuda = torch.cuda.is_available()
    return {
        "ok": problem is None and all(versions.values()),
        "mixtools": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "optional": {name: _version(name) for name in _OPTIONAL},
        "kernels": {"instruction_set": kernels, "problem": problem},
        "cpu": {"cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
                "torch_threads": torch.get_num_threads(), "torch_capability": torch.backends.cpu.get_cpu_capability()},
        "cuda": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "gpu": _gpu(),
        "mps": torch.backends.mps.is_available(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
    }  # fmt: skip


def _gpu() -> dict[str, Any]:
    """`problems`: why the GPU's kernels cannot run here, one of the machine or one of each card that cannot; `kernels`:
    what they are for, where a card can run them."""
    import torch

    from ..ops.gpu import able

    each: list[str | None]
    if torch.version.cuda is None and torch.version.hip is None:
        each = ["this torch is a build for CPUs alone"]
    elif not torch.cuda.is_available():
        each = ["torch finds no card: none is there, or its driver is missing or older than this torch"]
    else:
        each = [able.problem(torch.device("cuda", index)) for index in range(torch.cuda.device_count())]
    problems = [*dict.fromkeys(told for told in each if told)]
    return {"problems": problems, "triton": _version("triton"), "kernels": able.kernels() if None in each else {}}


def _measured() -> dict[str, Any]:
    import torch

    from .. import rates

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    return {device: rates.measure(torch.device(device)) for device in devices}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _tell(document: dict[str, Any]) -> Iterator[str]:
    yield f"mixtools {document['mixtools']}, Python {document['python']}, {document['platform']}"
    for name, version in document["packages"].items():
        yield f"  {name:<16} {version or 'MISSING: pip install ' + name}"
    kernels = document["kernels"]
    yield f"  {'kernels':<16} {kernels['instruction_set'] or 'MISSING: ' + str(kernels['problem'])}"
    cpu = document["cpu"]
    yield f"  {'cpu':<16} {cpu['cores']} cores, torch uses {cpu['torch_threads']} threads, {cpu['torch_capability']}"
    yield f"  {'cuda':<16} {', '.join(document['cuda']) or 'no device'}"
    for work, formats in document["gpu"]["kernels"].items():
        yield f"  {'gpu ' + work:<16} {', '.join(formats)}"
    for problem in document["gpu"]["problems"]:
        yield f"  {'':<16} {problem}"
    yield f"  {'memory':<16} {human_bytes(document['memory_bytes'])}"
    yield f"  {'disk':<16} {human_bytes(document['disk_free_bytes'])} free in this folder"
    for name, version in document["optional"].items():
        yield f"  {name:<16} {version or 'not installed'} (optional: {_OPTIONAL[name]})"
    for device, told in document.get("measured", {}).items():
        yield f"measured on {device}"
        yield f"  {'copy':<16} {told['copy_bytes_per_second'] / 1e9:.1f} GB/s, read and written"
        for name, rate in told["products_per_second"].items():
            yield f"  {'product ' + name:<16} {rate / 1e9:.0f} GFLOP/s"
        for name, rate in told.get("blocks_bytes_per_second", {}).items():
            yield f"  {'one token ' + name:<16} {rate / 1e9:.1f} GB/s of blocks"
    yield "all is well" if document["ok"] else "something is missing, see above"
