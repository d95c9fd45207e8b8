"""What a run takes, told before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ... import conversion
from ...errors import MemoryBudgetError
from ...inference.calibrate import Calibration, moment_bytes
from ...layouts.checkpoint import Checkpoint
from ...machine import human_bytes, product_rate
from ...names import Slot
from ...storage.dtypes import DType
from ...storage.store import CHUNK
from ...verbs import Forecast
from .figures import OUTPUT
from .method import Options as Method
from .results import tell_forecast
from .selection import Asked, role_counts

BASE_MEMORY = 450_000_000  # the interpreter with torch and scipy


def threads_within(limit: int | None, asked: Asked, jobs: int, *, calibrated: bool) -> int:
    """As many as asked for and as fit; one decomposes, the others copy. Raises MemoryBudgetError."""
    source, slots, options = asked
    need = BASE_MEMORY + memory_bytes(source, slots, options.method, calibrated)
    need += moment_bytes(source.config, slots) if calibrated else 0
    if limit is None:
        return jobs
    if limit < need:
        raise MemoryBudgetError(
            "--max-memory is too small for the largest chosen matrix", expected=human_bytes(need), found=limit
        )
    return max(1, min(jobs, 1 + (limit - need) // (8 * CHUNK)))


def forecast(
    asked: Asked, threads: int, calibration: Calibration | None, *, rebuild: bool, search: str | None = None
) -> Forecast:
    """Memory is an upper bound; time is shapes over a measured rate, without the calibration's own."""
    source, slots, options = asked
    method, surveyed = options.method, False
    most = memory_bytes(source, slots, method, calibration is not None)
    record: dict[str, Any] = {}
    if calibration:
        plan = calibration.stream.plan([len(ids) for ids in calibration.text.sequences])
        # a layer is gone before its matrices are decomposed; its moments and the states stay
        stays = moment_bytes(source.config, slots) + (0 if plan.spilled else plan.states_bytes)
        most = max(plan.peak_bytes, stays + most)
        surveyed = method.norm == OUTPUT and options.is_surveyed
        record = {"calibration": calibration.text.record, "calibration_passes": 1 + surveyed}
    size = conversion.plan_hf(source, conversion.Options()).plan.total_bytes if rebuild else 0
    if options.factored and options.budget is not None:
        size -= int((1 - options.budget) * sum(dtype.nbytes(shape) for shape, dtype in map(source.spec, slots)))
    memory = BASE_MEMORY + most
    seconds = forecast_seconds(source, slots, rebuild, method.norm)
    if surveyed or options.budget is not None:
        seconds += forecast_seconds(source, slots, False, method.norm)
    seconds = round(seconds, 1)
    document: dict[str, Any] = {
        "dry_run": True, "search": search, "laser": options.document(), **record, "matrices": len(slots),
        "targets": role_counts(slots), "bytes": size, "seconds": seconds,
        "peak_memory_bytes": memory, "jobs": threads,
    }  # fmt: skip
    return Forecast(size, memory, seconds, document, tuple(tell_forecast(document)))


def memory_bytes(source: Checkpoint, slots: Sequence[Slot], method: Method, calibrated: bool = False) -> int:
    """What decomposing and rebuilding the largest chosen matrix takes at most, beside the interpreter."""
    most = 0
    for slot in slots:
        shape, dtype = source.spec(slot)
        most = max(most, _matrix_bytes(shape, dtype, _squares(method, calibrated)))
    return most


def _squares(method: Method, calibrated: bool) -> int:
    """Matrices [p, p] of fp64 at once."""
    if method.norm == OUTPUT:  # L and the form beside what follows, of which `look` takes all vectors
        return 8
    # reflectors, their copy, and half of all vectors three times over (all vectors with a covariance)
    return 6 if calibrated else 4


def _matrix_bytes(shape: Sequence[int], dtype: DType, squares: int) -> int:
    p, q = sorted(shape)
    # the weight, the same before it was permuted or transposed, and rebuilt
    weights = 3 * p * q * dtype.itemsize
    return weights + 8 * p * p * squares + 4 * 8 * p * 1024


def flop(shape: Sequence[int], rebuild: bool, norm: str) -> float:
    """Gram by symmetry, tridiagonal form, and, to rebuild, an eighth of the vectors and two products with them.

    In the output's norm the form twice, and Cholesky with two products by halves.
    """
    p, q = sorted(shape)
    kept = p / 8 if rebuild else 0
    form = 3 * 4 / 3 * p**3  # three times as slow as a product
    weighted = form + 4 / 3 * p**3 if norm == OUTPUT else 0
    return float(p * p * q + form + weighted + 2 * p * p * kept + 4 * p * q * kept)


def forecast_seconds(source: Checkpoint, slots: Sequence[Slot], rebuild: bool, norm: str) -> float:
    """From the shapes and the CPU's rate in one small product, on whatever device the run is."""
    return sum(flop(source.spec(slot).shape, rebuild, norm) for slot in slots) / product_rate(dtype="float64")
