"""Tests of the GPU's kernels, which need Triton and no GPU: collected only where scripts/test has put it in reach."""

from __future__ import annotations

import os
from pathlib import Path


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Without Triton they cannot even be imported."""
    return None if os.environ.get("MIXTOOLS_GPU_KERNELS") else True
