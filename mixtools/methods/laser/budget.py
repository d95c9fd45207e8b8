"""Ranks that share a budget of bytes, so that the summed error is least.

Each matrix [m, n] is stored as factors of some rank k, k(m + n) numbers, or whole, mn numbers without an error. Errors
fall convexly with the rank, so the step that saves most error per byte, taken again and again, is the best that can be
done (Fox, Operations Research 14, 1966), up to the last step that no longer fits. From any rank a matrix may also step
to being whole at once: that ends its convex hull.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

from ...errors import UsageError
from ...linalg.spectrum import FloatArray
from .figures import largest_saving

Key = TypeVar("Key")


class Matrix(NamedTuple):
    """What competes: `lost` [min(m, n) + 1], the error of each rank from 0, falling convexly; bytes of a number."""

    lost: FloatArray
    shape: tuple[int, int]
    itemsize: int
    layer: int

    @property
    def rank_bytes(self) -> int:
        return sum(self.shape) * self.itemsize

    @property
    def whole_bytes(self) -> int:
        return self.shape[0] * self.shape[1] * self.itemsize


def distribute(matrices: Mapping[Key, Matrix], share: float, floor: float) -> dict[Key, int | None]:
    """A rank for each matrix, at least 1, or None for one that stays whole.

    Together they take at most `share` of the matrices' bytes, and in each layer at least `floor` of its bytes, but for
    the last step. Of equal gains the first in order goes first. Raises UsageError for shares that cannot be.
    """
    check([(matrix.shape, matrix.itemsize) for matrix in matrices.values()], share, floor)
    race = _Race(list(matrices.values()), share)
    layers: defaultdict[int, list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices.values()):
        layers[matrix.layer].append(number)
    owed = [(members, floor * race.whole(members)) for members in layers.values()]
    for place, (members, least) in enumerate(owed, 1):
        race.reserved = sum(max(0.0, other - race.bytes(those)) for those, other in owed[place:])
        race.run(members, least, to_reach=True)
    race.run(range(len(matrices)), race.limit)
    return dict(zip(matrices, race.ranks, strict=True))


def check_shares(share: float, floor: float) -> None:
    """Raises UsageError for shares that cannot be, whatever the matrices."""
    if not 0.0 < share < 1.0:
        raise UsageError(f"a budget of {share:g}: it is a share of the chosen weights' bytes, above 0 and below 1")
    if not 0.0 <= floor <= share:
        raise UsageError(f"a floor of {floor:g}: each layer's least share lies between 0 and the budget, {share:g}")


def check(matrices: Sequence[tuple[tuple[int, int], int]], share: float, floor: float) -> None:
    """Raises UsageError for shares that cannot be, of matrices whose shapes and bytes of a number are known."""
    check_shares(share, floor)
    least = sum((sum(shape) if largest_saving(shape) else shape[0] * shape[1]) * size for shape, size in matrices)
    whole = sum(shape[0] * shape[1] * size for shape, size in matrices)
    if least > share * whole:
        raise UsageError(f"a budget of {share:g} is too small for a rank of 1 each, which takes {least / whole:.3g}")


def stored_bytes(matrix: Matrix, rank: int | None) -> int:
    return matrix.whole_bytes if rank is None else rank * matrix.rank_bytes


class _Race:
    """Who takes the next step, until the bytes are gone. Every matrix begins at rank 1."""

    def __init__(self, matrices: Sequence[Matrix], share: float) -> None:
        self.matrices = matrices
        self.ranks: list[int | None] = [1 if largest_saving(matrix.shape) else None for matrix in matrices]
        self.limit = share * self.whole(range(len(matrices)))
        self.used, self.reserved = self.bytes(range(len(matrices))), 0.0  # reserved: owed to others

    def whole(self, members: Iterable[int]) -> int:
        return sum(self.matrices[number].whole_bytes for number in members)

    def run(self, members: Iterable[int], limit: float, *, to_reach: bool = False) -> None:
        """Steps of these within `limit` bytes; `to_reach`: until they have reached it, by a rank more if need be."""
        members = list(members)
        used = self.bytes(members)
        heap = [step for number in members for step in self._steps(number)]
        heapq.heapify(heap)
        while heap and not (to_reach and used >= limit):
            _, number, rank, size = heapq.heappop(heap)
            within = used + size <= limit or (to_reach and rank is not None)
            if not within or self.used + size > self.limit - self.reserved:
                if rank is None:  # too much at once: as many ranks as fit
                    for other in self._steps(number, whole=False):
                        heapq.heappush(heap, other)
                continue
            self.ranks[number] = rank
            used, self.used = used + size, self.used + size
            for other in self._steps(number):
                heapq.heappush(heap, other)

    def bytes(self, members: Iterable[int]) -> int:
        return sum(stored_bytes(self.matrices[number], self.ranks[number]) for number in members)

    def _steps(self, number: int, *, whole: bool = True) -> Iterator[tuple[float, int, int | None, int]]:
        """The next step, if one gains anything: -gain per byte, matrix, rank after it (None: whole), its bytes."""
        matrix, rank = self.matrices[number], self.ranks[number]
        if rank is None or matrix.lost[rank] <= 0:
            return
        rest = matrix.whole_bytes - rank * matrix.rank_bytes
        to_whole = float(matrix.lost[rank]) / rest
        by_one = float(matrix.lost[rank] - matrix.lost[rank + 1]) / matrix.rank_bytes
        if whole and to_whole >= by_one:  # always so at the last rank that saves: the rest is less than a rank
            yield -to_whole, number, None, rest
        elif rank < largest_saving(matrix.shape):
            yield -by_one, number, rank + 1, matrix.rank_bytes
