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
from .run import File
from .stored import store

_PROBE_ROWS, _PROBE_COLUMNS = 64, 4096
_READ = 64_000_000  # bytes of the source that are read to know its rate


def memory(files: Sequence[File], job: Job, jobs: int) -> int:
    """Bytes at most: each thread has a block of the source, and what it becomes in the file that is being written."""
    return job.base_bytes + jobs * (job.worker_bytes + len(files) * CHUNK)


def seconds(source: Checkpoint, files: Sequence[File], jobs: int) -> float:
    """Reading and encoding overlap, so the slower of the two counts."""
    values: Counter[DType] = Counter()
    for file in files:
        for slot, choice in file.choices.items():
            values[choice.type] += math.prod(source.config.shape(slot.role))
    encoding = sum(count / _rate(source, dtype) for dtype, count in values.items())
    return round(max(_reading(source), encoding / max(1, jobs)), 1)


def _rate(source: Checkpoint, target: DType) -> float:
    """Values a second that one thread encodes."""
    rows = np.random.default_rng(0).standard_normal((_PROBE_ROWS, _PROBE_COLUMNS), np.float32).view(np.uint32)
    bits, slot = store(rows, DType.F32, DType.BF16, None, Slot(Role.HEAD)), Slot(Role.HEAD)
    ones = np.ones(_PROBE_COLUMNS, np.float32)
    store(bits[:1], DType.BF16, target, ones, slot)  # what is made once
    began = time.perf_counter()
    store(bits, DType.BF16, target, None if target not in _WEIGHED else ones, slot)
    return bits.size / max(1e-9, time.perf_counter() - began)


_WEIGHED = (DType.IQ1_S, DType.IQ1_M, DType.IQ2_XXS, DType.IQ2_XS, DType.IQ2_S, DType.IQ3_XXS)


def _reading(source: Checkpoint) -> float:
    total = sum(entry.nbytes for entry in source.store.entries.values())
    began, read = time.perf_counter(), 0
    for slot in source.slots():
        for block in source.blocks(slot, CHUNK):
            read += block.nbytes
            if read > _READ:
                break
        if read > _READ:
            break
    return total * (time.perf_counter() - began) / max(1, read)
