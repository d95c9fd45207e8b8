"""Second-order rounding of a block of columns: what a column's rounding changes is fed back into the columns after it.

GPTQ (https://arxiv.org/abs/2210.17323) in the form of LDLQ (https://arxiv.org/abs/2307.13304): the errors are those of
the original weights, e = w - q, and the target of column k is w_k + sum over i < k of e_i U[i, k]. With the Hessian
H = U D Uᵀ, U unit upper triangular, that is GPTQ's own order and its own codes. Coordinate descent is the same loop,
started with the errors there are. The kernels are kernels/feedback.h and, for a GPU, gpu/rounding.py; beside them the
same in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor, library

from ..errors import MixtoolsError
from . import cpu
from .gpu import able
from .gpu import round as gpu

MOST_COLUMNS, MOST_LEVELS, _FARTHEST = 512, 256, 1 << 20  # of a block; of a grid; of a level from zero


@dataclass(frozen=True)
class Block:
    """B columns (1 to 512) of a matrix of R rows, transposed: a line holds the R values of a column side by side.

    Lines may lie any stride apart. All on one device, but `group_of` on the CPU. Of as many matrices as there are in a
    first dimension of all tensors, where they have one more: those are one launch on a GPU.
    """

    targets: Tensor  # [B, R] float32, changed
    weights: Tensor  # [B, R] float32
    errors: Tensor  # [B, R] float32, changed
    codes: Tensor  # [B, R] uint8, changed
    scales: Tensor  # [G, R] float32
    mins: Tensor  # [G, R] float32
    group_of: Tensor  # [B] int32: the line of scales and mins that a column has
    feedback: Tensor  # [B, B] float32; what it holds on and below its diagonal does not matter


_NAMES = tuple(field.name for field in fields(Block))


def _tensors(block: Block) -> tuple[Tensor, ...]:
    return tuple(getattr(block, name) for name in _NAMES)


def _matrices(block: Block) -> Iterator[Block]:
    """Each by itself."""
    if block.targets.ndim == 2:
        yield block
    else:
        yield from (Block(*one) for one in zip(*_tensors(block), strict=True))


def round_block(block: Block, levels: range | Tensor, *, threads: int = 1) -> None:
    """Rounds the columns of a block one after the other; changes its targets, errors and codes in place.

    For i = 0 .. B - 1, with scale and min from the line group_of[i]:

        level      = that of `levels` nearest to (targets[i] - min) / scale, or to zero where scale is 0
        codes[i]   = its index
        e          = weights[i] - (scale * level + min)
        delta      = e - errors[i];  errors[i] = e
        targets[k] = targets[k] + delta * feedback[i, k] for all k > i

    so that in the end targets[i] is what was rounded. `levels` are consecutive integers, as a range of at most 256
    (ties go to the even one), or an ascending table of as many float32 (ties go to the lower one; time grows with its
    length). No product is fused with a sum: the same bits on each instruction set, with any number of threads, on a GPU
    with Triton, and, on the CPU, from round_block_reference, which also does the work on other devices.

    A NaN or an infinity in `weights` shows in `errors`. Raises MixtoolsError for tensors that are not so, and where
    one that is changed overlaps another.
    """
    table, count, low = _checked_levels(levels)
    torch.ops.mixtools.round_block.default(*_tensors(block), table, count, low, threads)


def round_block_reference(block: Block, levels: range | Tensor) -> None:
    """The same in plain torch, on any device."""
    table, count, low = _checked_levels(levels)
    _check_shapes(block)
    _check_memory(block)
    _each_by_torch(block, table, count, low)


def _round_block(  # noqa: PLR0917 (an operation takes its tensors by position)
    targets: Tensor, weights: Tensor, errors: Tensor, codes: Tensor, scales: Tensor, mins: Tensor, group_of: Tensor,
    feedback: Tensor, table: Tensor | None, count: int, low: int, threads: int,
) -> None:  # fmt: skip
    block = Block(targets, weights, errors, codes, scales, mins, group_of, feedback)
    _check_shapes(block)
    _check_memory(block)
    cpu.positive(threads)
    if targets.device.type == "cpu" and targets.numel():
        for one in _matrices(block):
            _round_by_kernel(one, table, count, low, threads)
    elif targets.numel():
        _way(targets.device)(block, table, count, low)


def _fake(  # noqa: PLR0917 (the same tensors, by position)
    targets: Tensor, weights: Tensor, errors: Tensor, codes: Tensor, scales: Tensor, mins: Tensor, group_of: Tensor,
    feedback: Tensor, table: Tensor | None, count: int, low: int, threads: int,
) -> None:  # fmt: skip
    _check_shapes(Block(targets, weights, errors, codes, scales, mins, group_of, feedback))


# no custom_op, which takes ten times as long to come to its function: a layer of 8x7B has tens of thousands of blocks
_OPERATION = "mixtools::round_block"
library.define(_OPERATION, library.infer_schema(_round_block, mutates_args=("targets", "errors", "codes")))
library.impl(_OPERATION, "default", _round_block)
library.register_fake(_OPERATION, _fake)


def _round_by_kernel(block: Block, table: Tensor | None, count: int, low: int, threads: int) -> None:
    limits = None if table is None else _limits(table)
    groups = block.group_of.contiguous()
    matrices = (block.targets, block.weights, block.errors, block.codes, block.scales, block.mins)
    status = cpu.kernels().mixtools_round_block(
        *block.targets.shape, *(value for matrix in matrices for value in (matrix.data_ptr(), matrix.stride(0))),
        groups.data_ptr(), block.feedback.data_ptr(), block.feedback.stride(0),
        None if table is None else table.data_ptr(), None if limits is None else limits.data_ptr(),
        count, low, threads, cpu.instruction_set(),
    )  # fmt: skip
    if status:
        raise MixtoolsError(f"the kernel that rounds a block refused {_describe(block.targets)} (status {status})")


def _way(device: torch.device) -> Callable[[Block, Tensor | None, int, int], None]:
    """How a block is rounded that is not on the CPU."""
    return _each_by_torch if able.problem(device) else _round_on_gpu


def _round_on_gpu(block: Block, table: Tensor | None, count: int, low: int) -> None:
    levels = range(low, low + count) if table is None else (table, _limits(table))
    gpu.round_blocks(_tensors(block), levels).run()


def _each_by_torch(block: Block, table: Tensor | None, count: int, low: int) -> None:
    for one in _matrices(block):
        _round_by_torch(one, table, count, low)


def _round_by_torch(block: Block, table: Tensor | None, count: int, low: int) -> None:
    if table is not None:
        table = table.to(block.targets.device)
        limits = _limits(table)
    for i, group in enumerate(block.group_of.tolist()):
        scale, least = block.scales[group], block.mins[group]
        wanted = (block.targets[i] - least) / scale
        wanted = torch.where((scale.abs() > 0) & ~wanted.isnan(), wanted, 0.0)
        if table is None:
            code = (wanted.clamp(low, low + count - 1).round() - low).to(torch.uint8)
            level = code.float() + low
        else:
            code = torch.bucketize(wanted, limits)
            level = table[code]
        error = block.weights[i] - (scale * level + least)
        delta = error - block.errors[i]
        block.errors[i], block.codes[i] = error, code
        block.targets[i + 1 :] += delta * block.feedback[i, i + 1 :, None]


def _limits(table: Tensor) -> Tensor:
    """[L] -> [L - 1]: level i + 1 is nearer than level i to exactly those float32 that are greater than limit i.

    A middle that float32 cannot hold is rounded down: the next float32 lies beyond the middle itself.
    """
    middles = (table[:-1].double() + table[1:].double()) / 2
    limits = middles.float()
    return torch.where(limits > middles, torch.nextafter(limits, torch.full_like(limits, -torch.inf)), limits)


def _checked_levels(levels: range | Tensor) -> tuple[Tensor | None, int, int]:
    """A table on the CPU or None, the number of levels, and the lowest where there is no table."""
    if isinstance(levels, range):
        count, low = len(levels), levels.start
        if levels.step != 1 or not 1 <= count <= MOST_LEVELS or max(abs(low), abs(levels.stop)) > _FARTHEST:
            raise MixtoolsError(f"levels are 1 to {MOST_LEVELS} consecutive integers near zero, not {levels}")
        return None, count, low
    table = levels.detach().cpu().contiguous()
    if table.dtype != torch.float32 or table.ndim != 1 or not 1 <= len(table) <= MOST_LEVELS:
        raise MixtoolsError(f"a table of levels is 1 to {MOST_LEVELS} torch.float32, not {_describe(levels)}")
    if not table.isfinite().all() or not (table[1:] > table[:-1]).all():
        raise MixtoolsError("a table of levels holds finite numbers, each greater than the one before it")
    return table, len(table), 0


def _check_shapes(block: Block) -> None:
    """Shapes, dtypes, devices, and that the items of a line lie side by side."""
    targets, groups = block.targets, block.group_of
    if targets.ndim not in (2, 3) or not 1 <= targets.shape[-2] <= MOST_COLUMNS or block.scales.ndim != targets.ndim:
        raise MixtoolsError(f"a block is a matrix of 1 to {MOST_COLUMNS} columns, not {_describe(targets)}")
    *matrices, columns, rows = targets.shape
    same, scales = (*matrices, columns, rows), (*matrices, block.scales.shape[-2], rows)
    shapes = {
        "targets": same, "weights": same, "errors": same, "codes": same, "scales": scales, "mins": scales,
        "feedback": (*matrices, columns, columns),
    }  # fmt: skip
    for name, shape in shapes.items():
        tensor = getattr(block, name)
        dtype = torch.uint8 if name == "codes" else torch.float32
        if (tensor.shape, tensor.dtype, tensor.device) != (shape, dtype, targets.device):
            expected = f"{dtype} {list(shape)} on {targets.device}"
            raise MixtoolsError(f"wrong {name} of a block", expected=expected, found=_describe(tensor))
        if shape[-1] > 1 and tensor.stride(-1) != 1:
            raise MixtoolsError(f"the items of a line of {name} lie side by side, not as in {_describe(tensor)}")
    if groups.shape != (*matrices, columns) or groups.dtype != torch.int32 or groups.device.type != "cpu":
        expected = f"torch.int32 {[*matrices, columns]} on cpu"
        raise MixtoolsError("wrong group_of of a block", expected=expected, found=_describe(groups))


def _check_memory(block: Block) -> None:
    """The groups exist, and what is changed lies apart from all else."""
    if block.group_of.numel():
        lowest, highest = int(block.group_of.min()), int(block.group_of.max())
        if lowest < 0 or highest >= block.scales.shape[-2]:
            raise MixtoolsError(f"group_of names the groups {lowest} to {highest}, of {block.scales.shape[-2]}")
    extents = dict(zip(_NAMES, map(_extent, _tensors(block)), strict=True))
    for name in ("targets", "errors", "codes"):
        tensor = getattr(block, name)
        if tensor.numel() and not _apart(tensor):
            raise MixtoolsError(f"the lines of {name} lie upon each other: {_describe(tensor)}")
        start, end = extents[name]
        for other, (first, last) in extents.items():
            if other != name and first < end and start < last:
                raise MixtoolsError(f"{name} of a block overlap its {other}")


def _apart(tensor: Tensor) -> bool:
    """Whether no two items of it are one: each dimension steps over all that the narrower ones reach."""
    reach = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach += (size - 1) * stride
    return True


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and of the one after the last."""
    if tensor.numel() == 0:
        return 0, 0
    first = tensor.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.itemsize


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} with strides {list(tensor.stride())} on {tensor.device}"
