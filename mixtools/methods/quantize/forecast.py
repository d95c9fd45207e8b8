"""What a run of quantize will take: memory as an upper bound, time from short probes of this machine."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from ...job import Job
from ...layouts.checkpoint import Checkpoint
from ...names import Role, Slot
from ...storage.dtypes import DType
from ...storage.store import CHUNK
from ...writing import read_rate
from .mixtures import NEED_IMATRIX
from .run import File
from .stored import store

_PROBE_ROWS, _PROBE_COLUMNS = 64, 4096


def memory(files: Sequence[File], job: Job, jobs: int) -> int:
    """Bytes at most: each thread has a block of the source, and what it becomes in the file that is being written."""
    return job.base_bytes + jobs * (job.worker_bytes + len(files) * CHUNK)


def seconds(source: Checkpoint, files: Sequence[File], jobs: int) -> float:
    """Reading and encoding overlap, so the slower of the two counts."""
    values: Counter[DType] = Counter()
    for file in files:
        for slot, choice in file.choices.items():
            values[choice.type] += math.prod(source.config.shape(slot.role))
    encoding = sum(count / _rate(dtype) for dtype, count in values.items())
    reading = sum(dtype.nbytes(shape) for shape, dtype in map(source.spec, source.slots())) / read_rate(source)
    return round(max(reading, encoding / jobs), 1)


def _rate(target: DType) -> float:
    """Values a second that one thread encodes."""
    rows = np.random.default_rng(0).standard_normal((_PROBE_ROWS, _PROBE_COLUMNS), np.float32).view(np.uint32)
    bits, slot = store(rows, DType.F32, DType.BF16, None, Slot(Role.HEAD)), Slot(Role.HEAD)
    ones = np.ones(_PROBE_COLUMNS, np.float32)
    store(bits[:1], DType.BF16, target, ones, slot)  # what is made once
    began = time.perf_counter()
    store(bits, DType.BF16, target, ones if target in NEED_IMATRIX else None, slot)
    return bits.size / max(1e-9, time.perf_counter() - began)
