"""Whether a device can run the kernels, and if not, why."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from ...errors import MixtoolsError

LEAST = (8, 0)  # compute capability: bf16 needs it


def problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this device, in a few words; None where they can.

    A CPU can in Triton's interpreter alone, which is for tests.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device.type == "cpu":
        return None if os.environ.get("TRITON_INTERPRET") == "1" else "kernels of a GPU do not run on a CPU"
    if device.type != "cuda":
        return f"there are no kernels for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < LEAST:
        has, needs = (".".join(map(str, version)) for version in (capability, LEAST))
        return f"{torch.cuda.get_device_name(device)} is too old: compute capability {has}, and bf16 needs {needs}"
    return None


def check(tensor: Tensor) -> None:
    """Raises MixtoolsError for one on a CPU where no interpreter is asked for."""
    if tensor.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise MixtoolsError("kernels for a GPU take CPU tensors in Triton's interpreter alone (TRITON_INTERPRET=1)")


def remark(device: torch.device) -> str | None:
    """What a user of a card should know whose kernels cannot run; None where they can, and elsewhere."""
    if device.type != "cuda" or (why := problem(device)) is None:
        return None
    return f"the GPU's kernels are left out, and packed matrices widened to 16 bits: {why}"


def kernels() -> dict[str, list[str]]:
    """What there are kernels for, as `mixtools doctor` tells it."""
    from . import encoding, planes

    blocks = [type.value for type in planes.TYPES]
    four = [f"{name} in 4 bits" for name in ("GPTQ", "AWQ", "compressed-tensors")]
    return {
        "products": ["bf16", "fp16", "fp32", *four, "nf4", *blocks],
        "encoders": [type.value for type in encoding.ENCODED],
        "rounding": ["groups", "nf4", "int8", "every block type"],
        "spectra": ["fp64"],
    }
