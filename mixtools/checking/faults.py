"""The classic faults of converters, recognised in a tensor: all of them pass every check of names and shapes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..names import Role, Slot

UNPERMUTED = "the q/k rows are in the torrent's order: the rotary permutation was left out"
TWICE = (
    "the q/k rows were permuted once too often: a permutation to Hugging Face's order was repeated, or the one back to "
    "the torrent's order was left out"
)
RESHAPED = "w2 was reshaped where it had to be transposed"
TRANSPOSED = "the matrix is transposed"
SAME_SIGNS = 0.75  # share among a matrix's values and their quantized selves' it is above, of unrelated ones near 0.5
_ALIKE = 0.7  # cosine of a row and itself in one bit a weight or more; of unrelated rows it is near 0


def reordered(
    slot: Slot, wanted: Tensor, found: Tensor, head_dim: int, same: Callable[[Tensor, Tensor], bool] = torch.equal
) -> str | None:
    """Which fault makes `found` of `wanted` (one shape, one dtype, canonical), or None: right values, wrong order.

    `same`: of two tensors of one shape; where values were quantized, whether they are near.
    """
    if slot.role in (Role.Q, Role.K):
        heads = found.view(-1, head_dim, found.shape[1])
        pairs = wanted.view(-1, 2, head_dim // 2, found.shape[1]).transpose(1, 2)  # Hugging Face's halves, interleaved
        if same(heads, pairs.reshape(heads.shape)):
            return UNPERMUTED
        halves = wanted.view(-1, head_dim // 2, 2, found.shape[1]).transpose(1, 2)
        if same(heads, halves.reshape(heads.shape)):
            return TWICE
    if wanted.ndim == 2 and wanted.shape[0] == wanted.shape[1] and same(found, wanted.T):
        return TRANSPOSED
    if slot.role is Role.DOWN:
        # layout B keeps w2 as [F, D]; taken as [D, F] without moving a value, or the other way round
        stored = wanted.T.contiguous().view(wanted.shape)
        if same(found, stored) or same(found.T.contiguous().view(found.shape), wanted):
            return RESHAPED
    return None


def rows(tensor: Tensor) -> Tensor:
    """The rows that a fingerprint is made of, [3, columns] in fp32, each of length 1."""
    return torch.nn.functional.normalize(_some(tensor).float(), dim=1)


def nearest(found: Tensor, among: Mapping[Slot, Tensor]) -> Slot | None:
    """Whose rows point where those of `found` do, as a matrix and its quantized self do; None if nobody's."""
    likeness = {slot: float((found * rows).sum(1).min()) for slot, rows in among.items() if rows.shape == found.shape}
    best = max(likeness, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] > _ALIKE else None


def same_signs(one: Tensor, other: Tensor) -> float:
    """Share of the values with the same sign in both, of those that are 0 in neither; 1 where there are none.

    Smoothing multiplies rows and columns by positive factors, which changes no sign, whatever it does to the values.
    """
    there = (one != 0) & (other != 0)
    count = int(there.sum())
    return int(((one > 0) == (other > 0)).logical_and_(there).sum()) / count if count else 1.0


def nearest_by_signs(found: Tensor, among: Mapping[Slot, Tensor]) -> Slot | None:
    """Whose rows have the signs that those of `found` have, as a matrix and its smoothed self do; None if nobody's."""
    likeness = {slot: same_signs(found, rows) for slot, rows in among.items() if rows.shape == found.shape}
    best = max(likeness, key=likeness.__getitem__, default=None)
    return best if best is not None and likeness[best] > SAME_SIGNS else None


def fingerprint(tensor: Tensor) -> bytes:
    """Of some rows and the shape: enough to recognise a tensor among a model's, to be confirmed in full."""
    rows = tensor if tensor.ndim > 1 else tensor[None]
    chosen = _some(rows).contiguous()
    return hashlib.blake2b(chosen.view(torch.uint8).numpy().data, person=str(len(rows)).encode()).digest()


def _some(matrix: Tensor) -> Tensor:
    """Its first, middle and last row."""
    return matrix[[0, len(matrix) // 2, len(matrix) - 1]]
