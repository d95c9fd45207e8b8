"""Is a checkpoint whole, and is it what its source says: every byte read, every tensor compared.

`verify` reads one checkpoint: checksums, truncation, NaN and Inf. `compare` holds two dense ones against each other,
bit by bit, and names the classic faults of converters where it meets one (faults.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ..errors import ConfigError, Interrupted, MixtoolsError, TensorError
from ..formats import Ggml
from ..layouts.checkpoint import Expected, expected_tensors, unknown_tensors
from ..names import Slot
from ..ops import cpu
from ..progress import Progress, Silent
from ..storage.dtypes import ELEMENTS, WEIGHT_DTYPES, DType
from ..storage.store import CHUNK, Bits, Entry, as_bytes, to_tensor

if TYPE_CHECKING:
    import torch

    from ..config import MixtralConfig
    from ..layouts.checkpoint import Checkpoint
    from ..layouts.reader import Reader

JOBS = 2
_UNRELATED = 0.8  # relative error; that of one bit a weight is about 0.6, of another tensor 1.4 ...
_RESCALED = 2.0  # ... and of columns that were scaled any
WORST = 20  # tensors that a document lists
_SIGNED = {2: "int16", 4: "int32", 8: "int64"}

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Difference:
    """A tensor of the output that is not its source's, nor an exact cast of it."""

    slot: Slot
    relative_error: float  # of the Frobenius norms; inf where the output holds NaN or Inf
    fault: str | None = None  # the classic fault that explains it
    same_signs: float = 1.0  # share of a matrix's values; smoothing may change all of them and hardly a sign


@dataclass
class Comparison:
    """Two dense models, tensor by tensor; `differences` has the worst first."""

    identical: int = 0
    cast: int = 0
    differences: list[Difference] = field(default_factory=list)
    problems: list[MixtoolsError] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        worst = [
            {
                "tensor": str(found.slot),
                "relative_error": found.relative_error,
                "same_signs": found.same_signs,
                "fault": found.fault,
            }
            for found in self.differences[:WORST]
        ]
        counts = {"identical": self.identical, "cast": self.cast, "different": len(self.differences)}
        return {**counts, "worst": worst}


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` and `check` say of a checkpoint."""
    store = checkpoint.store
    sizes = {path.name: path.stat().st_size for source in store.sources for path in source.paths}
    found = expected_tensors(checkpoint.layout, checkpoint.config, store, checkpoint.about)
    quantized = checkpoint.quantized() if checkpoint.gguf is None else []
    return {
        "path": str(checkpoint.place),
        "layout": checkpoint.layout.name,
        "title": checkpoint.layout.title,
        "config": asdict(checkpoint.config),
        "parameters": checkpoint.config.num_parameters
        - checkpoint.tied * checkpoint.config.vocab_size * checkpoint.config.hidden_size,
        "tensors": len(store.entries),
        "bytes": sum(entry.nbytes for entry in store.entries.values()),
        "bytes_by_dtype": {dtype.value: count for dtype, count in checkpoint.bytes_by_dtype().items()},
        "quantization": checkpoint.quantization,
        "checksums": sum(entry.record is not None for entry in store.entries.values()),
        "quantized": [f"{format.name}: {format.about}" for format in quantized],
        "missing": sorted(found.keys() - store.entries.keys()),
        "unknown": sorted(_unknown(checkpoint, found)),
        "files": sizes,
    }


def _unknown(checkpoint: Checkpoint, expected: Expected) -> list[str]:
    try:
        return unknown_tensors(checkpoint.layout, checkpoint.store, expected)
    except MixtoolsError:  # a bias that cannot be read, which the checkpoint's problems tell
        ignores = checkpoint.layout.ignores
        return [name for name in checkpoint.store.entries.keys() - expected.keys() if not ignores(name)]


def verify(checkpoint: Checkpoint, progress: Progress | None = None, jobs: int = JOBS) -> list[MixtoolsError]:
    """Read every byte of every tensor; the problems found, in the order of the files, none raised.

    Checksums that differ, files that end too early, and the first NaN or infinity of each tensor with its index.
    Memory: 4 MB a thread, or a whole tensor where it is stored with strides.
    """
    progress = progress or Silent()
    store = checkpoint.store
    entries = sorted(store.entries.values(), key=lambda entry: (entry.source.label, entry.offset))
    progress.start("verifying", sum(entry.nbytes for entry in entries))

    def one(entry: Entry) -> MixtoolsError | None:
        try:
            return _first_nonfinite(checkpoint, entry, progress)
        except MixtoolsError as error:
            return error

    problems = [problem for problem in _parallel(one, entries, jobs) if problem is not None]
    for _ in entries:  # each call judges the records before the first bad one
        try:
            store.finish()
            break
        except MixtoolsError as error:
            if str(error) in map(str, problems):
                break
            problems.append(error)
    progress.finish()
    return problems


def _first_nonfinite(checkpoint: Checkpoint, entry: Entry, progress: Progress) -> MixtoolsError | None:
    """Read a stored tensor to its end. Raises what reading raises."""
    step = max(1, entry.rows if entry.strides is not None else CHUNK // max(1, entry.row_bytes))
    buffer = None
    found: tuple[int, float] | None = None
    columns, blocks = entry.shape[-1] if entry.shape else 1, entry.dtype not in ELEMENTS
    for at in range(0, entry.rows, step):
        rows = min(step, entry.rows - at)
        if buffer is None and entry.strides is None:
            buffer = np.empty((rows, entry.row_bytes // entry.dtype.word), f"u{entry.dtype.word}")
        bits = checkpoint.store.read_rows(entry.name, at, at + rows, None if buffer is None else buffer[:rows])
        progress.advance(bits.nbytes)
        dtype = entry.dtype
        if found is None and blocks:  # a scale may be NaN, which no other bits of a block can
            bits, dtype = Ggml(dtype, DType.F32).decode_rows(bits), DType.F32
        if found is None and dtype in WEIGHT_DTYPES:
            index = cpu.first_nonfinite(as_bytes(bits), dtype)
            found = None if index is None else (at * columns + index, _value(bits, index, dtype))
    if found is None:
        return None
    where = ", ".join(str(int(i)) for i in np.unravel_index(found[0], entry.shape))
    return TensorError(f"holds {found[1]} at [{where}]", file=entry.source.label, tensor=entry.name)


def _value(bits: Bits, index: int, dtype: DType) -> float:
    return float(to_tensor(bits.reshape(-1)[index : index + 1], dtype)[0])


def compare_configs(source: MixtralConfig, output: MixtralConfig, file: object = None) -> list[MixtoolsError]:
    """A problem for every field that differs; the usual cause is named where there is one."""
    causes = {
        "rope_theta": "the model runs and is wrong; params.json does not tell it, and 1e4 or 1e5 are what converters "
        "for other models assume",
        "rms_norm_eps": "the model runs and is slightly wrong; Mixtral's is 1e-5",
        "experts_per_token": "the router would mix another number of experts than the model was trained with",
    }
    theirs = asdict(output)
    return [
        ConfigError(
            f"{key} is not the source's" + (f" ({causes[key]})" if key in causes else ""),
            file=None if file is None else str(file), expected=_shown(value), found=_shown(theirs[key]),
        )
        for key, value in asdict(source).items()
        if theirs[key] != value
    ]  # fmt: skip


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def compare(
    source: Reader, output: Reader, progress: Progress | None = None, *, jobs: int = JOBS, file: object = None
) -> Comparison:
    """Every tensor of `output` against the source's. Both dense; of any layouts and dtypes.

    A tensor is identical, or the source's cast to the output's dtype (rounded to nearest even), or different. Memory:
    about four tensors a thread. A tensor that cannot be read becomes a problem; nothing is raised for one.
    """
    import torch

    from ..inference.budget import stored_bytes
    from . import faults

    progress = progress or Silent()
    result = Comparison(problems=compare_configs(source.config, output.config, file))
    slots = list(source.slots())
    if slots != list(output.slots()) or any(source.spec(slot).shape != output.spec(slot).shape for slot in slots):
        return result  # another model: the configuration's problems say so
    progress.start("comparing", sum(stored_bytes(output, slot) for slot in slots))
    prints: dict[bytes, Slot] = {}
    rows: dict[Slot, torch.Tensor] = {}
    suspects: dict[Slot, bytes] = {}

    def one(slot: Slot) -> str | Difference | MixtoolsError:
        try:
            theirs = output.read(slot)
            ours = source.read(slot)
        except MixtoolsError as error:
            return error
        progress.advance(theirs.nbytes)
        verdict = "identical" if ours.dtype == theirs.dtype else "cast"
        wanted = ours.to(theirs.dtype)
        prints.setdefault(faults.fingerprint(wanted), slot)
        if wanted.ndim > 1:
            rows[slot] = faults.rows(wanted).to(torch.bfloat16)
        if same_bits(wanted, theirs):
            return verdict
        suspects[slot] = faults.fingerprint(theirs)
        apart = relative_error(ours, theirs)
        signs = faults.same_signs(wanted, theirs) if wanted.ndim > 1 else 1.0
        alike: list[Callable[[torch.Tensor, torch.Tensor], bool]] = [torch.equal]
        if signs < faults.SAME_SIGNS:  # quantized, smoothed maybe, and wrong besides
            alike.append(lambda a, b: faults.same_signs(a, b) > faults.SAME_SIGNS)
            if _UNRELATED < apart < _RESCALED:  # of low rank, and wrong besides
                alike.append(lambda a, b: relative_error(a, b) < apart / 2)
        found = (faults.reordered(slot, wanted, theirs, source.config.head_dim, same) for same in alike)
        return Difference(slot, apart, next(filter(None, found), None), signs)

    for found in _parallel(one, slots, jobs):
        if isinstance(found, MixtoolsError):
            result.problems.append(found)
        elif isinstance(found, Difference):
            result.differences.append(found)
        else:
            setattr(result, found, getattr(result, found) + 1)
    result.differences = [
        found if found.fault else _misplaced(found, prints.get(suspects[found.slot]), rows, source, output)
        for found in result.differences
    ]
    result.differences.sort(key=lambda found: -found.relative_error)
    result.problems += _fault_problems(result.differences, file)
    progress.finish()
    return result


def _misplaced(
    found: Difference, other: Slot | None, rows: Mapping[Slot, torch.Tensor], source: Reader, output: Reader
) -> Difference:
    """Does the output hold another of the source's tensors there? `other` looks like it; `rows`: some of each."""
    from . import faults

    theirs, near = output.read(found.slot), other is None
    smoothed = False
    if near and found.same_signs < faults.SAME_SIGNS:
        some = faults.rows(theirs)
        other = faults.nearest_by_signs(some, rows)
        smoothed = other is not None
        if not smoothed and found.relative_error > _UNRELATED:
            other = faults.nearest(some, rows)
    if other is None or other == found.slot:
        return found
    ours = source.read(other)
    if smoothed:
        same = faults.same_signs(ours, theirs) > faults.SAME_SIGNS
    elif near:
        same = relative_error(ours, theirs) < found.relative_error / 2
    else:
        same = same_bits(ours.to(theirs.dtype), theirs)
    return replace(found, fault=f"holds the source's {other}") if same else found


def _fault_problems(differences: Iterable[Difference], file: object) -> list[MixtoolsError]:
    """One problem for each kind of fault, naming the tensors."""
    by_fault: dict[str, list[Difference]] = defaultdict(list)
    for found in differences:
        if found.fault:
            kind = "tensors stand in each other's places" if found.fault.startswith("holds") else found.fault
            by_fault[kind].append(found)
    problems: list[MixtoolsError] = []
    for kind, members in by_fault.items():
        members.sort(key=lambda found: (found.slot.layer or 0, found.slot.expert or 0, str(found.slot)))
        shown = [f"{found.slot} {found.fault}" if kind != found.fault else str(found.slot) for found in members[:4]]
        more = f" and {len(members) - 4} more" if len(members) > 4 else ""
        where = None if file is None else str(file)
        problems.append(TensorError(f"{kind}: {', '.join(shown)}{more}", file=where, tensor=members[0].slot))
    return problems


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit by bit: NaN equals itself, and 0 is not -0."""
    import torch

    signed = getattr(torch, _SIGNED[a.dtype.itemsize])
    return a.dtype == b.dtype and torch.equal(a.view(signed), b.view(signed))


def relative_error(source: torch.Tensor, output: torch.Tensor) -> float:
    """Frobenius norm of the difference over that of the source, summed in fp64; inf for NaN or Inf."""
    import torch

    difference = square = 0.0
    for a, b in zip(torch.split(source.reshape(-1), 1 << 22), torch.split(output.reshape(-1), 1 << 22), strict=True):
        wide = a.double()
        square += float(wide.square().sum())
        difference += float((b.double() - wide).square().sum())
    error = math.sqrt(difference / square) if square else math.inf * difference if difference else 0.0
    return error if math.isfinite(error) else math.inf


def _parallel(work: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> list[Result]:
    """Results in the order of the items; an exception or Ctrl-C stops what has not begun."""
    with ThreadPoolExecutor(jobs, "mixtools-check") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except KeyboardInterrupt:
            raise Interrupted("stopped; nothing was written") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
