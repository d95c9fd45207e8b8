"""Eigenproblems by the GPU's kernels, in Triton's interpreter, against LAPACK."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.linalg import eigen
from mixtools.linalg.output import Covariance
from mixtools.linalg.weighted import decompose_weighted
from mixtools.ops.gpu import reference, symmetric
from mixtools.ops.gpu.symmetric import Reduction, Sizes

SMALL = Sizes(width=4, rows=8, lines=4, columns=16, together=2)


def random_of(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_of(order: int, seed: int = 0, count: int = 1) -> Tensor:
    some = random_of(count, order, order, seed=seed)
    return some + some.mT


def with_values(values: list[float] | Tensor, seed: int = 0) -> Tensor:
    turned = torch.linalg.qr(random_of(len(values), len(values), seed=seed))[0]
    made = turned * torch.as_tensor(values, dtype=torch.float64) @ turned.T
    return (made + made.T) / 2


def reduced(matrices: Tensor, sizes: Sizes = SMALL) -> Reduction:
    """What is only written before it is read holds NaN."""
    made = Reduction(matrices.clone(), sizes)
    for scratch in (made._x, made._products, made._dots, made._squares, made._across):
        scratch.fill_(torch.nan)
    made.run()
    return made


def far(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max()) if one.numel() else 0.0


# --- the form --------------------------------------------------------------------------------------------------------


# around the 4 columns of a panel, the 8 and 4 rows of programs and the 16 columns at a time
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5, 6, 8, 9, 16, 17, 31])
def test_the_form_is_that_of_one_column_after_the_other(order):
    matrices = symmetric_of(order, count=2)
    found = reduced(matrices)
    for index, matrix in enumerate(matrices):
        d, e, tau, reflectors = reference.tridiagonal(matrix)
        assert far(found.d[index], d) < 1e-12 * order
        assert far(found.e[index, :-1], e) < 1e-12 * order
        assert far(found.tau[index, :-1], tau) < 1e-11 * order
        assert far(found.matrices[index, :-1].triu(1), reflectors) < 1e-11 * order


@pytest.mark.parametrize("order", [2, 3, 14, 29])
def test_the_form_is_lapacks(order):
    matrix = symmetric_of(order, seed=1)
    found = reduced(matrix)
    reflectors, d, e, tau, info = scipy.linalg.lapack.dsytrd(np.asfortranarray(matrix[0].numpy()), lower=1)
    assert info == 0
    ours = found.matrices[0].T.numpy()
    np.testing.assert_allclose(np.tril(ours, -2), np.tril(reflectors, -2), atol=1e-10)
    for name, theirs in (("d", d), ("e", e), ("tau", tau)):
        np.testing.assert_allclose(getattr(found, name)[0, : len(theirs)].numpy(), theirs, atol=1e-11)


def test_as_a_gpu_starts_it():
    """More columns than a panel has."""
    matrix = symmetric_of(42, seed=2)
    found = reduced(matrix, Sizes())
    d, e, tau, reflectors = reference.tridiagonal(matrix[0])
    assert far(found.d[0], d) < 1e-11 and far(found.e[0, :-1], e) < 1e-11 and far(found.tau[0, :-1], tau) < 1e-10
    assert far(found.matrices[0, :-1].triu(1), reflectors) < 1e-10


@pytest.mark.parametrize("scale", [1e-120, 1.0, 1e120])
def test_the_form_has_the_matrixs_own_scale(scale):
    matrix = symmetric_of(11, seed=3)
    found, wanted = reduced(matrix * scale), reduced(matrix)
    assert far(found.d / scale, wanted.d) < 1e-11 and far(found.tau, wanted.tau) < 1e-11


def test_matrices_beside_others_are_as_by_themselves():
    matrices = symmetric_of(13, seed=4, count=2)
    together = reduced(matrices)
    for index in range(2):
        alone = reduced(matrices[index : index + 1])
        for name in ("matrices", "d", "e", "tau"):
            assert torch.equal(getattr(together, name)[index], getattr(alone, name)[0]), name


@pytest.mark.parametrize("name", ["zeros", "diagonal", "a form already", "one row", "blocks"])
def test_columns_with_nothing_below(name):
    """Reflectors that turn nothing."""
    order = 13
    given = {
        "zeros": torch.zeros(order, order), "diagonal": torch.diag(torch.arange(order) - 4.0),
        "a form already": reference.tridiagonal_whole(torch.arange(order) - 3.0, torch.ones(order - 1)),
        "one row": torch.nn.functional.pad(torch.ones(1, 1), (6, order - 7, 6, order - 7)),
        "blocks": torch.block_diag(symmetric_of(6)[0], symmetric_of(7)[0]),
    }[name].double()  # fmt: skip
    found = reduced(given[None])
    d, e, tau, _ = reference.tridiagonal(given)
    assert far(found.d[0], d) < 1e-12 and far(found.e[0, :-1], e) < 1e-12 and far(found.tau[0, :-1], tau) < 1e-12
    if name in ("zeros", "diagonal", "a form already"):
        assert not found.tau.any() and torch.equal(found.d[0], given.diagonal())


# --- its eigenvalues -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 9])
def test_values_are_lapacks(order):
    d, e = random_of(2, order, seed=5), random_of(2, order - 1, seed=6)
    found = symmetric.gpu_tridiagonal_values(d, e)
    for index in range(2):
        wanted = torch.linalg.eigvalsh(reference.tridiagonal_whole(d[index], e[index]))
        assert far(found[index], wanted) < 4e-16 * float(wanted.abs().max()) * max(order, 4)
    assert bool((found.diff() >= 0).all())


def test_more_values_than_a_program_has_lanes():
    d, e = random_of(1, 9, seed=5), random_of(1, 8, seed=6)
    low, high, least = symmetric._bounds(d, e)
    values, beside = torch.full_like(d, torch.nan), torch.nn.functional.pad(e, (0, 1))
    symmetric.bisect(d, beside, (low, high), least, values, lanes=4).run()
    assert torch.equal(values, symmetric.gpu_tridiagonal_values(d, e))
    vectors, behind = torch.full((2, 9, 7), torch.nan, dtype=torch.float64)
    symmetric.twist(d[0], beside[0], values[0, 2:], least, vectors, behind, lanes=4).run()
    wanted = symmetric.gpu_tridiagonal_vectors(d[0], e[0], values[0, 2:])
    assert torch.equal(vectors / torch.linalg.vector_norm(vectors, dim=0), wanted)


@pytest.mark.parametrize("name", ["zeros", "one", "negative", "pairs", "apart", "steep"])
def test_values_that_are_one_or_far_apart(name):
    d, e = {
        "zeros": (torch.zeros(7), torch.zeros(6)), "one": (torch.full((7,), 3.0), torch.zeros(6)),
        "negative": (torch.full((5,), -2.0), torch.zeros(4)), "pairs": ((torch.arange(9) - 4.0).abs(), torch.ones(8)),
        "apart": (torch.tensor([5.0, 1, 5, 1]), torch.tensor([0.0, 1e-30, 0.0])),
        "steep": (10.0 ** -torch.arange(0, 16, 2), 10.0 ** -torch.arange(1, 15, 2)),
    }[name]  # fmt: skip
    found = symmetric.gpu_tridiagonal_values(d.double()[None], e.double()[None])[0]
    wanted = torch.linalg.eigvalsh(reference.tridiagonal_whole(d.double(), e.double()))
    assert far(found, wanted) <= 1e-15 * max(float(wanted.abs().max()), 1e-300)


# --- and its vectors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 3, 12, 35])
def test_vectors_are_those_of_their_values(order):
    d, e = random_of(order, seed=7), random_of(order - 1, seed=8)
    whole = reference.tridiagonal_whole(d, e)
    values = torch.linalg.eigvalsh(whole)
    for start, stop in {(0, order), (order // 2, order), (order - 1, order)}:
        some = values[start:stop]
        found = symmetric.gpu_tridiagonal_vectors(d, e, some)
        assert far(whole @ found, found * some) < 1e-14 * order
        assert far(found.T @ found, torch.eye(stop - start, dtype=torch.float64)) < 1e-10


def test_no_vectors_are_none():
    assert symmetric.gpu_tridiagonal_vectors(random_of(5), random_of(4), torch.zeros(0).double()).shape == (5, 0)


def test_a_vector_that_is_nearly_nothing_at_both_ends():
    """Found where it is largest; from one end alone each item would be a rounding error of the one before."""
    d = torch.full((41,), 1.0, dtype=torch.float64)
    d[20] = 50.0
    e = torch.full((40,), 0.1, dtype=torch.float64)
    whole = reference.tridiagonal_whole(d, e)
    value = torch.linalg.eigvalsh(whole)[-1:]
    found = symmetric.gpu_tridiagonal_vectors(d, e, value)[:, 0]
    assert int(found.abs().argmax()) == 20 and far(whole @ found, found * value) < 1e-14
    assert 0 < abs(float(found[0])) < 1e-40 and 0 < abs(float(found[40])) < 1e-40


# --- a matrix's eigenproblem -----------------------------------------------------------------------------------------


SPECTRA = {
    "any": random_of(18, seed=9).sort().values, "of rank 3": torch.tensor([0.0] * 15 + [1, 2, 3]),
    "steep": 4.0 ** -torch.arange(18), "one outlier": torch.tensor([*range(17), 1e6]),
    "pairs": torch.arange(9.0).repeat_interleave(2), "one value": torch.full((18,), 2.0), "zeros": torch.zeros(18),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECTRA)
def test_the_best_approximation_is_lapacks(name):
    matrix = with_values(SPECTRA[name].double(), seed=10)
    (found,) = eigen.on_card(matrix.tril()[None].clone())  # the lower triangle is enough
    largest = max(float(matrix.abs().max()), 1e-300)
    values, vectors = torch.linalg.eigh(matrix)
    assert far(found.values, values) < 1e-14 * largest * 18
    for start, stop in ((15, 18), (6, 18), (0, 18), (0, 0)):
        basis = found.vectors(start, stop)
        assert far(basis.T @ basis, torch.eye(stop - start).double()) < 1e-13
        # it is told from others only as far as its values are
        assert far(matrix @ basis, basis * found.values[start:stop]) < 1e-13 * largest
        if start and values[start] - values[start - 1] > 0.1:
            assert far(basis @ basis.T, vectors[:, start:stop] @ vectors[:, start:stop].T) < 1e-10


def test_values_that_are_one_are_told_apart_by_lapack(monkeypatch):
    asked: list[tuple[int, int]] = []
    by_lapack = eigen._vectors

    def noted(d, e, start, stop):
        asked.append((start, stop))
        return by_lapack(d, e, start, stop)

    monkeypatch.setattr(eigen, "_vectors", noted)
    (found,) = eigen.on_card(with_values(SPECTRA["any"], seed=10)[None])
    found.vectors(9, 18)
    assert not asked
    (found,) = eigen.on_card(with_values(SPECTRA["pairs"].double(), seed=10)[None])
    found.vectors(10, 18)
    assert asked == [(10, 18)]


def test_a_batch_of_a_gpu_is_its_matrices_one_by_one():
    matrices = symmetric_of(9, seed=11, count=2)
    for one, together in zip(matrices.clone(), eigen.on_card(matrices.clone()), strict=True):
        (alone,) = eigen.on_card(one[None])
        assert torch.equal(alone.values, together.values)
        assert torch.equal(alone.vectors(4, 9), together.vectors(4, 9))


def test_more_reflectors_than_are_applied_together(monkeypatch):
    matrix = symmetric_of(23, seed=12)[0]
    (found,) = eigen.on_card(matrix[None].clone())
    wanted = found.vectors(10, 23)
    for several in (1, 5, 22):
        monkeypatch.setattr(eigen, "_REFLECTORS", several)
        assert far(found.vectors(10, 23), wanted) < 1e-13


@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("shape", [(14, 11), (11, 14)])
def test_the_outputs_norm_is_a_cpus(shape, side, monkeypatch):
    """Where a Gram matrix is used again once its values are known; more columns than a panel has."""
    inputs = random_of(40, shape[1], seed=13) * torch.logspace(-1, 1, shape[1])
    weight = random_of(*shape, seed=14)
    seen = inputs if side == "in" else inputs @ weight.T
    covariance = Covariance(seen.T @ seen, side, float(inputs.square().mean()), 40)
    expected = decompose_weighted(weight, covariance)
    monkeypatch.setattr(eigen, "has_kernels", lambda device: True)
    monkeypatch.setattr(symmetric, "Sizes", lambda: SMALL)
    found = decompose_weighted(weight, covariance)
    np.testing.assert_allclose(found.own.values, expected.own.values, rtol=1e-10)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-10)
    np.testing.assert_allclose(found.error(5), expected.error(5), rtol=1e-9)
    assert far(found.project(5), expected.project(5)) < 1e-9


# --- operations ------------------------------------------------------------------------------------------------------


def test_they_are_well_formed():
    matrices = symmetric_of(3, count=2)
    opcheck(symmetric.gpu_tridiagonal, (matrices,))
    opcheck(symmetric.gpu_tridiagonal_values, (random_of(2, 3), random_of(2, 2)))
    opcheck(symmetric.gpu_tridiagonal_vectors, (random_of(4), random_of(3), random_of(2)))


def test_what_is_no_eigenproblem_is_refused(monkeypatch):
    good = symmetric_of(4)
    for bad in (good.float(), good[0], good[:, :3], good[:, :, :3], good.mT[:, ::2, ::2], good[:0]):
        with pytest.raises(MixtoolsError, match="fp64|square"):
            symmetric.gpu_tridiagonal(bad)
    for d, e in pairwise((random_of(1, 4), random_of(1, 4), random_of(2, 3), random_of(3), random_of(1, 2).float())):
        with pytest.raises(MixtoolsError):
            symmetric.gpu_tridiagonal_values(d, e)
    with pytest.raises(MixtoolsError):
        symmetric.gpu_tridiagonal_vectors(random_of(4), random_of(3), random_of(2).float())
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(MixtoolsError, match="interpreter"):
        symmetric.gpu_tridiagonal(good)
