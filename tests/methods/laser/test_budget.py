"""Ranks that share a budget, against every way to share it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import numpy as np
import numpy.typing as npt
import pytest

from mixtools.errors import UsageError
from mixtools.methods.laser import budget
from mixtools.methods.laser.budget import Matrix, distribute, stored_bytes

Vector = npt.NDArray[np.float64]
SMALL = [(6, 6), (8, 12), (20, 12), (10, 10), (5, 1), (2, 9), (9, 16)]  # 1x5 and 2x2 have no rank that saves
SEEDS = range(40)


def matrix(squares: Sequence[float] | Vector, shape: tuple[int, int], itemsize: int = 2, layer: int = 0) -> Matrix:
    """With these squared singular values."""
    ordered = np.sort(np.asarray(squares, dtype=np.float64))[::-1]
    assert len(ordered) == min(shape)
    return Matrix(np.append(np.cumsum(ordered[::-1])[::-1], 0.0), shape, itemsize, layer)


def steep(shape: tuple[int, int], layer: int = 0, fall: float = 0.5, scale: float = 1.0) -> Matrix:
    return matrix(scale * fall ** np.arange(min(shape)), shape, layer=layer)


def some(seed: int, count: int = 4, shapes: Sequence[tuple[int, int]] = tuple(SMALL)) -> dict[str, Matrix]:
    """Of different shapes, bytes a number, sizes of error, and falls: some of them nearly flat."""
    random = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        shape = shapes[random.integers(len(shapes))]
        fall = random.choice([0.4, 0.7, 0.95])
        squares = random.choice([0.3, 1.0, 4.0]) * random.uniform(0.5, 1.0, min(shape)) * fall ** np.arange(min(shape))
        found[f"{number}"] = matrix(squares, shape, int(random.choice([2, 4])), number % 2)
    return found


def largest_rank(shape: tuple[int, int]) -> int:
    """By counting: the largest rank whose factors hold fewer numbers than the matrix."""
    return sum(rank * (shape[0] + shape[1]) < shape[0] * shape[1] for rank in range(1, min(shape) + 1))


def states(one: Matrix) -> tuple[Vector, Vector]:
    """Bytes and error of each way to store it: as factors that save, and whole."""
    rows, cols = one.shape
    ranks = range(1, largest_rank(one.shape) + 1)
    taken = [rank * (rows + cols) * one.itemsize for rank in ranks] + [rows * cols * one.itemsize]
    return np.array(taken, dtype=np.float64), np.array([one.lost[rank] for rank in ranks] + [0.0])


def every_way(matrices: Sequence[Matrix]) -> tuple[Vector, Vector]:
    """Bytes and error of all choices at once."""
    taken, errors = zip(*map(states, matrices), strict=True)
    return reduce(np.add.outer, taken).ravel(), reduce(np.add.outer, errors).ravel()


def least_error(matrices: Sequence[Matrix], limit: float) -> float:
    taken, errors = every_way(matrices)
    within = errors[taken <= limit]
    return float(within.min()) if len(within) else math.inf


def hull(one: Matrix) -> list[tuple[float, float]]:
    """Steps (bytes, gain) along the lower convex hull of its states."""
    taken, errors = states(one)
    corner, steps = 0, []
    while corner < len(taken) - 1:
        gains = (errors[corner] - errors[corner + 1 :]) / (taken[corner + 1 :] - taken[corner])
        following = corner + 1 + int(np.flatnonzero(gains == gains.max())[-1])
        steps.append((taken[following] - taken[corner], errors[corner] - errors[following]))
        corner = following
    return steps


def whole(matrices: Sequence[Matrix]) -> int:
    return sum(one.shape[0] * one.shape[1] * one.itemsize for one in matrices)


def used(matrices: dict[str, Matrix], ranks: dict[str, int | None], layer: int | None = None) -> float:
    """In bytes, counted by the states."""
    total = 0.0
    for name, one in matrices.items():
        if layer is None or one.layer == layer:
            rank = ranks[name]
            total += states(one)[0][-1 if rank is None else rank - 1]
    return total


def error(matrices: dict[str, Matrix], ranks: dict[str, int | None]) -> float:
    return sum(0.0 if (rank := ranks[name]) is None else float(one.lost[rank]) for name, one in matrices.items())


def shares(matrices: dict[str, Matrix]) -> list[float]:
    """Of which the smallest is that of a rank of 1 each."""
    least = sum(states(one)[0][0] for one in matrices.values()) / whole(list(matrices.values()))
    return [share for share in np.linspace(least + 1e-9, 0.99, 9) if least < share < 1]


# --- the least error ---


@pytest.mark.parametrize("seed", SEEDS)
def test_the_error_is_the_least_but_for_the_last_step(seed: int) -> None:
    matrices = some(seed)
    largest = max((size for one in matrices.values() for size, _ in hull(one)), default=0.0)
    for share in shares(matrices):
        ranks = distribute(matrices, share, 0.0)
        limit = share * whole(list(matrices.values()))
        assert used(matrices, ranks) <= limit
        for name, rank in ranks.items():
            assert rank is None or 1 <= rank <= largest_rank(matrices[name].shape)
            assert stored_bytes(matrices[name], rank) == used({name: matrices[name]}, ranks)
        found = error(matrices, ranks)
        assert found >= least_error(list(matrices.values()), limit) - 1e-12
        assert found <= least_error(list(matrices.values()), limit - largest) + 1e-12


@pytest.mark.parametrize("seed", SEEDS)
def test_a_budget_that_ends_with_a_step_is_shared_best(seed: int) -> None:
    matrices = some(seed)
    everything = list(matrices.values())
    total, spent = whole(everything), sum(states(one)[0][0] for one in everything)
    steps = sorted((step for one in everything for step in hull(one)), key=lambda step: -step[1] / step[0])
    assert all(np.diff([gain / size for size, gain in hull(one)]).max(initial=-1.0) < 0 for one in everything)
    for size, _ in steps[:-1]:
        spent += size
        ranks = distribute(matrices, (spent + 0.25) / total, 0.0)
        assert used(matrices, ranks) == spent
        assert error(matrices, ranks) == pytest.approx(least_error(everything, spent), rel=1e-12, abs=1e-15)


def test_bytes_are_what_a_rank_costs() -> None:
    # the same numbers at twice the bytes: 0.8^a / 2 = 0.8^b / 4 is reached ln 2 / ln(1/0.8) = 3.1 ranks apart
    squares = 0.8 ** np.arange(40)
    ranks = distribute({"cheap": matrix(squares, (40, 40), 2), "dear": matrix(squares, (40, 40), 4)}, 0.4, 0.0)
    assert ranks["cheap"] is not None and ranks["dear"] is not None
    assert ranks["cheap"] - ranks["dear"] in (3, 4)


def test_an_error_decides_by_its_size() -> None:
    matrices = {"large": steep((20, 20), fall=0.7), "small": steep((20, 20), fall=0.7, scale=0.7**4)}
    ranks = distribute(matrices, 0.5, 0.0)
    assert ranks["large"] is not None and ranks["small"] is not None
    assert ranks["large"] - ranks["small"] in (3, 4, 5)
    assert used(matrices, ranks) > 0.5 * 1600 - 80  # less than a step is left


@pytest.mark.parametrize("seed", range(12))
def test_a_larger_budget_loses_no_more(seed: int) -> None:
    matrices = some(seed, count=12)
    everything = list(matrices.values())
    largest = max(size for one in everything for size, _ in hull(one)) / whole(everything)
    found = [(share, error(matrices, distribute(matrices, share, 0.0))) for share in shares(matrices)]
    compared = 0
    for share, loss in found:
        for other, less in found:
            if other >= share + largest:
                compared += 1
                assert less <= loss + 1e-12
    assert compared > 10
    assert found[-1][1] < 0.2 * found[0][1]


# --- whole or in ranks ---


def test_what_a_rank_helps_little_stays_whole() -> None:
    # flat: each rank saves a tenth of the error for 20 of 100 numbers, whole all of it for 100
    matrices = {"flat": matrix(np.ones(10), (10, 10)), "too": matrix(0.99 * np.ones(10), (10, 10))}
    assert distribute(matrices, 0.6, 0.0) == {"flat": None, "too": 1}
    assert distribute(matrices, 0.7, 0.0) == {"flat": None, "too": 2}
    # and where whole is too much at once, ranks as far as they fit
    assert distribute(matrices, 0.599, 0.0) == {"flat": 4, "too": 1}
    assert distribute(matrices, 0.3, 0.0) == {"flat": 2, "too": 1}


def test_a_matrix_whose_factors_cannot_save_stays_whole() -> None:
    thin = {"row": matrix([3.0], (1, 9)), "column": matrix([3.0], (9, 1)), "square": matrix([3.0, 1.0], (2, 2))}
    matrices = thin | {"large": steep((40, 40))}
    ranks = distribute(matrices, 0.5, 0.0)
    assert [ranks[name] for name in thin] == [None, None, None]
    rank = ranks["large"]
    assert rank is not None and rank > 1
    assert used(matrices, ranks) <= 0.5 * whole(list(matrices.values()))
    with pytest.raises(UsageError, match="too small for a rank of 1 each, which takes 1"):
        distribute(thin, 0.99, 0.0)


@pytest.mark.parametrize("zeros", [0, 1, 5, 17])
def test_what_has_no_error_left_takes_no_more(zeros: int) -> None:
    known = 20 - zeros
    matrices = {"low": matrix([1.0] * known + [0.0] * zeros, (20, 20)), "zero": matrix(np.zeros(20), (20, 20))}
    ranks = distribute(matrices, 0.9, 0.0)
    assert ranks["zero"] == 1
    rank = ranks["low"]
    if known > 9:
        assert rank is None
    else:
        assert rank is not None and rank == known
    # nor does a floor make it take more
    assert distribute(matrices, 0.9, 0.9) == ranks


# --- fairness ---


@pytest.mark.parametrize("share", [0.15, 0.21, 0.3, 0.37, 0.44])
def test_equal_matrices_get_equal_ranks(share: float) -> None:
    matrices = {f"{number}": steep((24, 36), fall=0.6) for number in range(7)}
    ranks = list(distribute(matrices, share, 0.0).values())
    known = [rank for rank in ranks if rank is not None]
    assert len(known) == 7
    assert known == sorted(known, reverse=True)  # of equal gains the first in order goes first
    assert known[0] - known[-1] <= 1
    assert share * 7 * 24 * 36 - 60 < sum(known) * 60 <= share * 7 * 24 * 36


def test_the_first_of_two_equal_ones_goes_first() -> None:
    one, same = steep((20, 20)), steep((20, 20))
    for names in (("a", "b"), ("b", "a")):
        ranks = distribute(dict(zip(names, (one, same), strict=True)), 0.25, 0.0)  # 5 ranks of 40 in all
        assert [ranks[name] for name in names] == [3, 2]
        assert list(ranks) == [*names]


@pytest.mark.parametrize("floor", [0.0, 0.15])
@pytest.mark.parametrize("seed", range(10))
def test_the_order_does_not_matter(seed: int, floor: float) -> None:
    # of one shape and size each, so that what fits fits whatever its turn; no two gains are equal
    random = np.random.default_rng(seed)
    matrices = {
        f"{number}": matrix(random.uniform(0.5, 1.0, 16) * 0.8 ** np.arange(16), (16, 24), 2, number % 3)
        for number in range(9)
    }
    expected = distribute(matrices, 0.4, floor)
    for _ in range(5):
        names = [*random.permutation(list(matrices))]
        assert distribute({name: matrices[name] for name in names}, 0.4, floor) == expected


# --- floors ---


def three_layers() -> dict[str, Matrix]:
    """Errors so far apart that without a floor the first would take all, the last nothing."""
    return {
        f"{layer}.{number}": steep(shape, layer, 0.8, 1e-4**layer)
        for layer in range(3)
        for number, shape in enumerate([(32, 32), (24, 40), (40, 24)])
    }


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("part", [0.25, 0.5, 0.9])
def test_a_floor_holds_in_each_layer(share: float, part: float) -> None:
    matrices, floor = three_layers(), part * share
    free, ranks = (distribute(matrices, share, least) for least in (0.0, floor))
    below = 0
    for layer in range(3):
        members = [one for one in matrices.values() if one.layer == layer]
        least = floor * whole(members)
        assert used(matrices, ranks, layer) >= least, layer
        below += used(matrices, free, layer) < least
    assert below > 0 or share == 0.8  # which it would not without one
    assert used(matrices, ranks) <= share * whole(list(matrices.values()))
    assert error(matrices, ranks) >= error(matrices, free)


@pytest.mark.parametrize("seed", SEEDS)
def test_with_floors_the_error_is_the_least_but_for_a_step_each(seed: int) -> None:
    random = np.random.default_rng(seed)
    matrices = {
        f"{number}": matrix(
            random.choice([0.05, 1.0]) * random.uniform(0.5, 1.0, 16) * 0.6 ** np.arange(16), (16, 16), 2, number // 2
        )
        for number in range(4)
    }
    everything = list(matrices.values())
    step = 2 * 32
    for share in (0.35, 0.5, 0.6):
        floor = 0.6 * share
        ranks = distribute(matrices, share, floor)
        for layer in (0, 1):
            members = [one for one in everything if one.layer == layer]
            assert used(matrices, ranks, layer) >= floor * whole(members)
        # all ways that keep the floors, of either layer
        (low, of_low), (high, of_high) = (every_way(everything[at : at + 2]) for at in (0, 2))
        least = floor * whole(everything[:2])
        taken = np.add.outer(low, high)
        errors = np.add.outer(np.where(low >= least, of_low, np.inf), np.where(high >= least, of_high, np.inf))
        limit = share * whole(everything)
        assert used(matrices, ranks) <= limit
        assert error(matrices, ranks) >= errors[taken <= limit].min() - 1e-12
        assert error(matrices, ranks) <= errors[taken <= limit - step].min() + 1e-12


@pytest.mark.parametrize("floor", [0.2, 0.29, 0.3])
def test_floors_that_leave_nothing_over_stay_within_the_budget(floor: float) -> None:
    matrices = {f"{layer}.{side}": steep((32, side), layer, 0.9) for layer in range(8) for side in (32, 48, 57)}
    for names in (list(matrices), list(matrices)[::-1]):
        ranks = distribute({name: matrices[name] for name in names}, 0.3, floor)
        assert used(matrices, ranks) <= 0.3 * whole(list(matrices.values()))


def test_a_floor_is_not_reached_by_what_another_layer_needs() -> None:
    # flat: whole is worth most, but the first layer's 80 numbers more would leave too few for the second's floor
    matrices = {name: matrix(np.ones(10), (10, 10), layer=layer) for layer, name in enumerate("ab")}
    assert distribute(matrices, 0.6, 0.3) == {"a": 4, "b": 2}
    assert distribute(matrices, 0.6, 0.1) == {"a": None, "b": 1}


def test_a_floor_of_nothing_changes_nothing() -> None:
    for seed in range(5):
        matrices = some(seed)
        for share in shares(matrices):
            assert distribute(matrices, share, 0.0) == distribute(matrices, share, 1e-9)


# --- what is refused ---


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(UsageError, match=r"a budget of \S+: it is a share .* above 0 and below 1"):
        distribute({"a": steep((20, 20))}, share, 0.0)


@pytest.mark.parametrize("floor", [-0.01, 0.5001, 1.0, math.nan])
def test_a_floor_above_the_share_is_refused(floor: float) -> None:
    with pytest.raises(UsageError, match=r"a floor of \S+: .* between 0 and the budget, 0\.5"):
        distribute({"a": steep((20, 20))}, 0.5, floor)


def test_a_budget_below_a_rank_of_one_each_is_refused() -> None:
    matrices = {"a": steep((20, 20)), "b": matrix([1.0], (1, 40), 4)}
    least = (40 * 2 + 40 * 4) / (400 * 2 + 40 * 4)
    assert distribute(matrices, least + 1e-9, 0.0) == {"a": 1, "b": None}
    with pytest.raises(UsageError, match=r"a budget of 0\.24.* too small for a rank of 1 each, which takes 0\.25"):
        distribute(matrices, 0.249, 0.0)
    # the same, before errors are known
    with pytest.raises(UsageError, match=r"too small for a rank of 1 each, which takes 0\.25"):
        budget.check([(one.shape, one.itemsize) for one in matrices.values()], 0.249, 0.0)
    budget.check([(one.shape, one.itemsize) for one in matrices.values()], least + 1e-9, 0.0)


def test_nothing_shares_nothing() -> None:
    assert distribute({}, 0.5, 0.25) == {}


@pytest.mark.parametrize("floor", [0.4, 0.399])
def test_floors_near_the_budget_hold_in_every_layer(floor: float) -> None:
    """What a layer takes beyond its floor is not another's."""
    gains = 0.9 ** np.arange(64)
    curve = np.append(np.cumsum(gains[::-1])[::-1], 0.0)
    matrices = {(layer, i): Matrix(curve, (64, 64 + 5 * i), 2, layer) for layer in range(32) for i in range(3)}
    ranks = distribute(matrices, 0.4, floor)
    for layer in range(32):
        members = [key for key in matrices if key[0] == layer]
        found = sum(stored_bytes(matrices[key], ranks[key]) for key in members)
        step = max(matrices[key].rank_bytes for key in members)
        assert found >= floor * sum(matrices[key].whole_bytes for key in members) - step, layer
