"""Grids of groups: value = scale * (code - zero), a scale and a zero for each run of a row's columns.

A code less its zero has at most 9 bits and a scale at most 11, so the product is exact in fp32, and the dense matrix is
it, rounded once: the same bits whoever computes it, and those that the formats' own packages compute in 16 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from ..errors import TensorError
from ..storage.dtypes import DType
from .bits import Codes

if TYPE_CHECKING:
    from torch import Tensor

WHOLE_ROW = -1  # as a group's length
_RUN = 1 << 18  # values at once: their fp32 stays in a core's cache
DECODING = 16 * _RUN  # bytes that `values` takes beside its arguments and its result, matrices of very long rows apart


class Grid(NamedTuple):
    """The matrix [out, in] of codes [out, in], scales and zeros [out, groups].

    `group`: its length; or the group of each column [in], where they do not follow one another.
    """

    codes: Codes
    scales: Tensor
    zeros: Tensor
    group: int | Tensor


def count(columns: int, group: int) -> int:
    """Groups of a row; the last may be shorter."""
    return 1 if group == WHOLE_ROW else -(-columns // group)


def kind(name: str, bits: int) -> str:
    """See Quantized.kind."""
    return name if bits == 4 else f"{name}-{bits}bit"


def about(bits: int, group: int, symmetric: bool) -> str:
    """See Quantized.about."""
    groups = "a scale a row" if group == WHOLE_ROW else f"groups of {group}"
    return f"{bits} bits, {groups}, {'symmetric' if symmetric else 'asymmetric'}"


def expect_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Raises TensorError for what is no matrix."""
    if len(shape) != 2:
        raise TensorError(f"only a matrix is quantized, not a tensor of shape {list(shape)}")
    return shape[0], shape[1]


def expect_whole(columns: int, group: int) -> None:
    """Raises TensorError for columns that groups do not divide."""
    if group != WHOLE_ROW:
        expect_multiple("columns", columns, group)


def expect_multiple(what: str, size: int, of: int) -> None:
    """Raises TensorError for a size that the format cannot hold."""
    if size % of:
        raise TensorError(f"{size} {what} are no multiple of {of}, as the format needs")


def values(grid: Grid, dtype: DType) -> Tensor:
    """The matrix in `dtype`."""
    import torch

    codes, scales, zeros, group = grid
    rows, columns = codes.shape
    out = torch.empty((rows, columns), dtype=dtype.torch())
    scales, zeros = scales.float(), zeros.float()
    if isinstance(group, int):
        length = columns if group == WHOLE_ROW else group
        of = torch.arange(columns) // length if columns % length else None
    else:
        of = group.long()
    step = max(1, _RUN // max(1, columns))
    for at in range(0, rows, step):
        run = slice(at, min(at + step, rows))
        wide = torch.from_numpy(codes[run]).float()
        if of is None:
            grouped = wide.view(len(wide), -1, length)
            grouped.sub_(zeros[run, :, None]).mul_(scales[run, :, None])
        else:
            wide.sub_(zeros[run][:, of]).mul_(scales[run][:, of])
        out[run] = wide
    return out


def expect_index(index: Tensor, count: int) -> Tensor:
    """The group of each column [in]. Raises TensorError where there is no such group."""
    if bool((index < 0).any()) or bool((index >= count).any()):
        raise TensorError(f"names a group that is none of the {count} that there are")
    return index


def stored_scales(scales: Tensor, dtype: DType) -> Tensor:
    """Scales in the dtype that they are stored in. Raises TensorError where that would change or lose one."""
    import torch

    kept = scales.to(dtype.torch())
    if not torch.isfinite(kept).all():
        raise TensorError(f"a scale is no finite {dtype.value} number: {float(scales[~torch.isfinite(kept)][0]):g}")
    if not torch.equal(kept.float(), scales.float()):
        raise TensorError(f"a scale is no {dtype.value} number, so that its codes were chosen for another")
    return kept.contiguous()


def expect_zeros(zeros: Tensor, low: int, high: int, why: str) -> None:
    """Raises TensorError for a zero outside [low, high]."""
    if zeros.numel() and (int(zeros.min()) < low or int(zeros.max()) > high):
        found = int(zeros.min()) if int(zeros.min()) < low else int(zeros.max())
        wanted = low if low == high else f"{low} to {high}"
        raise TensorError(f"{why}: a zero of {found} cannot be stored", expected=wanted, found=found)


def expect_grid(codes: Tensor, scales: Tensor, zeros: Tensor, group: int) -> None:
    """Raises TensorError if the three do not belong together."""
    import torch

    shape = codes.shape[0], count(codes.shape[1], group)
    for what, found in (("scales", scales), ("zeros", zeros)):
        if tuple(found.shape) != shape:
            raise TensorError(f"{what} of a wrong shape", expected=list(shape), found=list(found.shape))
    if codes.dtype is not torch.uint8:
        raise TensorError("codes are bytes", expected="uint8", found=codes.dtype)
