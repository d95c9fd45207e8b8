"""The output's norm against scipy's gesvd of W·cholesky(C + λI), and against inputs that are kept whole."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from output_oracle import Matrix, Side, best, damped, lost, plain, seen, truth
from torch import Tensor

from mixtools.errors import SpectrumError, TensorError
from mixtools.linalg import output, spectrum, weighted
from mixtools.linalg.output import Covariance
from mixtools.linalg.weighted import DAMPING, Weighted, decompose_weighted, weighted_spectrum

SIDES: tuple[Side, ...] = ("in", "out")
SHAPES = [(24, 60), (60, 24), (32, 32)]
TINY = [(1, 1), (1, 9), (9, 1), (2, 2), (2, 3), (3, 2)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
TOKENS = 150


def noise(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(features: int, tokens: int = TOKENS, seed: int = 100) -> Tensor:
    """[in, tokens], correlated, of features that differ tenfold: far from white."""
    mixed = noise((features, features), seed) / math.sqrt(features) @ noise((features, tokens), seed + 1)
    return torch.from_numpy(np.geomspace(0.3, 3.0, features))[:, None] * mixed


def ranks_of(shape: tuple[int, int]) -> list[int]:
    p = min(shape)
    return sorted({0, 1, p // 3, p // 2, p // 2 + 1, p - 1, p} & set(range(p + 1)))


# --- the best there is ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_the_approximation_is_that_of_gesvd(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    before = weight.clone()
    covariance = seen(weight, X, side)
    matrix = covariance.matrix.clone()
    found = decompose_weighted(weight, covariance)
    assert found.shape == shape and found.damping == DAMPING
    for rank in ranks_of(shape):
        np.testing.assert_allclose(
            found.project(rank).numpy(), best(weight, X, rank), rtol=0, atol=1e-10 * float(weight.norm())
        )
    assert torch.equal(weight, before)
    assert torch.equal(covariance.matrix, matrix)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("damping", [1e-6, 1e-2, 1.0])
def test_damping_is_a_share_of_the_mean_diagonal(shape: tuple[int, int], side: Side, damping: float) -> None:
    weight, X = noise(shape), inputs(shape[1])
    found = decompose_weighted(weight, seen(weight, X, side), damping)
    expected = truth(weight, X, damping)[1]
    np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-11 * expected[0])
    np.testing.assert_allclose(found.project(9).numpy(), best(weight, X, 9, damping), rtol=0, atol=1e-9)
    assert found.damping == damping


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_other_matrix_of_the_rank_errs_less(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    C = damped(X)
    W = weight.numpy()
    squares, Q = np.linalg.eigh(C)
    root, inverse = Q * np.sqrt(squares) @ Q.T, Q / np.sqrt(squares) @ Q.T
    random = np.random.default_rng(0)

    def error(other: Matrix) -> float:
        return float(((W - other) @ C * (W - other)).sum() / (W @ C * W).sum())

    found = decompose_weighted(weight, seen(weight, X, side))
    for rank in (1, 7, 13, min(shape) - 1):
        A, B = (part.numpy() for part in found.factors(rank))
        least = error(found.project(rank).numpy())
        assert least == pytest.approx(float(found.tail[rank]), rel=1e-9)
        u, s, vt = scipy.linalg.svd(W @ root, lapack_driver="gesvd")
        by_root = (u[:, :rank] * s[:rank]) @ vt[:rank] @ inverse  # SVD-LLM's way
        assert least <= error(by_root) * (1 + 1e-9)
        assert least < 0.999 * error(plain(weight, rank))
        for size in (1e-3, 1e-1):
            for _ in range(20):
                other = (A + size * random.standard_normal(A.shape)) @ (B + size * random.standard_normal(B.shape))
                assert least < error(other)
                # the least of all matrices with these rows, and with these columns, is no better either
                assert least <= error(W @ C @ B.T @ np.linalg.pinv(B @ C @ B.T) @ B) * (1 + 1e-9)
        for gone in range(min(rank, 3)):  # another direction in the place of one
            U = truth(weight, X)[0]
            U = np.delete(U, rank - 1 - gone, axis=1)[:, :rank]
            assert least < error(U @ U.T @ W)


@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_both_sides_say_the_same(shape: tuple[int, int]) -> None:
    weight, X = noise(shape), inputs(shape[1])
    by_inputs, by_outputs = (decompose_weighted(weight, seen(weight, X, side)) for side in SIDES)
    np.testing.assert_allclose(by_inputs.values, by_outputs.values, rtol=0, atol=1e-9 * by_inputs.values[0])
    np.testing.assert_allclose(by_inputs.errors(), by_outputs.errors(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(by_inputs.weight_errors(), by_outputs.weight_errors(), rtol=0, atol=1e-8)
    for rank in ranks_of(shape):
        torch.testing.assert_close(by_inputs.project(rank), by_outputs.project(rank), rtol=0, atol=1e-9)
        assert by_inputs.error(rank) == pytest.approx(by_outputs.error(rank), rel=1e-8, abs=1e-11)


def test_outputs_without_a_power_take_inputs_all_alike() -> None:
    weight, X = noise((24, 60)), inputs(60)
    Y = weight @ X
    found = decompose_weighted(weight, Covariance(Y @ Y.T, "out"))
    power = float(Y.square().sum() / weight.square().sum())  # C = power · I would give outputs of this energy
    expected = decompose_weighted(weight, Covariance(Y @ Y.T, "out", power))
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-12)
    np.testing.assert_allclose(found.project(9).numpy(), best(weight, X, 9), rtol=0, atol=1e-2)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(17, 40), (40, 17), (23, 23)], ids=str)
def test_blocks_are_put_together(shape: tuple[int, int], side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, X = noise(shape), inputs(shape[1])
    covariance = seen(weight, X, side)
    whole = decompose_weighted(weight, covariance)
    expected = whole.project(8), whole.factors(8)[0] @ whole.factors(8)[1], whole.error(8), whole.errors()
    monkeypatch.setattr(weighted, "_BLOCK", 7)
    found = decompose_weighted(weight, covariance)
    np.testing.assert_allclose(found.values, whole.values, rtol=0, atol=1e-12 * whole.values[0])
    torch.testing.assert_close(found.project(8), expected[0], rtol=0, atol=1e-11)
    A, B = found.factors(8)
    torch.testing.assert_close(A @ B, expected[1], rtol=0, atol=1e-11)
    assert found.error(8) == pytest.approx(expected[2], rel=1e-11)
    np.testing.assert_allclose(found.errors(), expected[3], rtol=0, atol=1e-12)


def test_a_quadratic_form_in_blocks() -> None:
    vectors, matrix = noise((30, 4)), noise((30, 30), 1)
    expected = np.diag(vectors.numpy().T @ matrix.numpy() @ vectors.numpy())
    for block in (1, 7, 30, 1024):
        np.testing.assert_allclose(output.quadratic(vectors, matrix, block), expected, rtol=1e-12)


# --- errors ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_errors_are_those_that_are_measured(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    found = decompose_weighted(weight, seen(weight, X, side))
    errors, weight_errors, values = found.errors(), found.weight_errors(), truth(weight, X)[1]
    p = min(shape)
    assert errors.shape == weight_errors.shape == found.tail.shape == (p + 1,)
    np.testing.assert_allclose(found.values, values, rtol=0, atol=1e-11 * values[0])
    assert found.energy == pytest.approx(float(np.square(values).sum()))
    root = torch.from_numpy(np.linalg.cholesky(damped(X)))
    for rank in range(p + 1):
        other = best(weight, X, rank)
        at_output, of_weight = (lost(weight, other, X), lost(weight, other)) if rank < p else (0.0, 0.0)
        assert errors[rank] == pytest.approx(at_output, rel=1e-7, abs=1e-11)
        assert found.error(rank) == pytest.approx(at_output, rel=1e-7, abs=1e-11)
        # squares less gains, over λ: what is lost to rounding has grown by 1/λ
        assert weight_errors[rank] == pytest.approx(of_weight, rel=1e-7, abs=1e-9)
        assert found.weight_error(rank) == pytest.approx(of_weight, rel=1e-7, abs=1e-9)
        assert found.tail[rank] == pytest.approx(lost(weight, other, root) if rank < p else 0.0, rel=1e-7, abs=1e-11)
    for curve in (errors, weight_errors, found.tail):
        assert curve[0] == pytest.approx(1.0) and curve[-1] == 0.0
        assert (np.diff(curve) <= 0).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_alone_are_the_same(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape, dtype=torch.float32), inputs(shape[1])
    covariance = seen(weight, X, side, tokens=5)
    alone, full = weighted_spectrum(weight, covariance, 1e-3), decompose_weighted(weight, covariance, 1e-3)
    assert alone.shape == full.shape == shape
    assert alone.damping == full.damping == pytest.approx(1e-2)
    np.testing.assert_allclose(alone.values, full.values, rtol=0, atol=1e-12 * full.values[0])
    own = scipy.linalg.svdvals(weight.double().numpy())
    for found in (alone, full):
        np.testing.assert_allclose(found.own.values, own, rtol=0, atol=1e-12 * own[0])
        assert found.own.shape == shape
        assert found.own.rounding == spectrum.spectrum(weight).rounding > 0
        assert found.rounding == 0.0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_in_fp32_are_enough(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    covariance = seen(weight, X, side)
    rough = covariance.matrix.float() * (1 + 1e-7 * noise((len(covariance.matrix),) * 2, 5).float())  # not symmetric
    assert not torch.equal(rough, rough.T)
    found = decompose_weighted(weight, Covariance(rough, side, covariance.power))
    for rank in (1, 9, 15, min(shape) - 1):
        other = found.project(rank)
        np.testing.assert_allclose(other.numpy(), best(weight, X, rank), rtol=0, atol=1e-3)
        assert found.error(rank) == pytest.approx(lost(weight, other, X), rel=1e-3, abs=1e-7)
        assert found.weight_error(rank) == pytest.approx(lost(weight, other), rel=1e-6, abs=1e-7)


# --- what must not matter ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_white_inputs_give_the_plain_approximation(shape: tuple[int, int], side: Side) -> None:
    weight = noise(shape)
    C = torch.eye(shape[1], dtype=torch.float64)
    covariance = Covariance(C) if side == "in" else Covariance(weight @ weight.T, "out", 1.0)
    found = decompose_weighted(weight, covariance)
    own = scipy.linalg.svdvals(weight.numpy())
    np.testing.assert_allclose(found.values, own * math.sqrt(1 + DAMPING), rtol=1e-10)
    for rank in ranks_of(shape):
        expected = plain(weight, rank)
        np.testing.assert_allclose(found.project(rank).numpy(), expected, rtol=0, atol=1e-10)
        left = lost(weight, expected) if rank < min(shape) else 0.0
        assert found.error(rank) == pytest.approx(left, abs=1e-10)
        assert found.weight_error(rank) == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_inputs_scale_does_not_matter(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape, dtype=torch.float32), inputs(shape[1])
    expected = decompose_weighted(weight, seen(weight, X, side))
    for scale in (1024.0, 2.0**-30):  # powers of two change no digit
        found = decompose_weighted(weight, seen(weight, scale * X, side))
        np.testing.assert_array_equal(found.values, scale * expected.values)
        for rank in ranks_of(shape):
            assert torch.equal(found.project(rank), expected.project(rank))
            assert found.error(rank) == expected.error(rank)
    found = decompose_weighted(weight, seen(weight, 3.7 * X, side))
    np.testing.assert_allclose(found.values, 3.7 * expected.values, rtol=0, atol=1e-11 * found.values[0])
    for rank in ranks_of(shape):
        torch.testing.assert_close(
            found.project(rank, torch.float64), expected.project(rank, torch.float64), rtol=0, atol=1e-10
        )
        assert found.error(rank) == pytest.approx(expected.error(rank), abs=1e-11)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rotations_go_through(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    expected = decompose_weighted(weight, seen(weight, X, side)).project(9)
    Q, P = (torch.linalg.qr(noise((n, n), 50))[0] for n in (shape[1], shape[0]))
    for turn in (Q, torch.eye(shape[1], dtype=torch.float64)[torch.randperm(shape[1])]):  # of the inputs
        turned = weight @ turn.T
        found = decompose_weighted(turned, seen(turned, turn @ X, side)).project(9)
        torch.testing.assert_close(found, expected @ turn.T, rtol=0, atol=1e-10)
    turned = P @ weight  # of the outputs
    found = decompose_weighted(turned, seen(turned, X, side)).project(9)
    torch.testing.assert_close(found, P @ expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", SIDES)
def test_the_order_of_what_is_asked_does_not_matter(side: Side) -> None:
    weight, X = noise((24, 60)), inputs(60)
    covariance = seen(weight, X, side)
    found = decompose_weighted(weight, covariance)
    for rank in (5, 20, 5):
        fresh = [decompose_weighted(weight, covariance) for _ in range(4)]
        assert found.errors()[rank] == fresh[0].errors()[rank]
        assert torch.equal(found.project(rank), fresh[1].project(rank))
        assert torch.equal(found.factors(rank)[1], fresh[2].factors(rank)[1])
        assert found.weight_error(rank) == fresh[3].weight_error(rank)


# --- few tokens ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_that_no_token_reached_are_not_thrown_away(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1], 6)  # seen: 6 directions
    found = decompose_weighted(weight, seen(weight, X, side))
    p = min(shape)
    for rank in (5, 6, 7, 12, p - 1):
        other = found.project(rank)
        assert torch.isfinite(other).all()
        np.testing.assert_allclose(other.numpy(), best(weight, X, rank), rtol=0, atol=1e-8)
    assert torch.equal(found.project(p), weight)
    # six directions give the six tokens' outputs; every further one is of the weight itself
    assert found.error(6) < 1e-6 and found.error(5) > 1e-3
    own = np.array([lost(weight, found.project(rank)) for rank in range(6, p + 1)])
    assert (np.diff(own) < 0).all() and own[-1] == 0.0
    seen_alone = lost(weight, weight @ X @ torch.linalg.pinv(X))
    assert own[1] < own[0] <= seen_alone * (1 + 1e-6)
    # and the best of those: what is left over after six directions is truncated as by a plain SVD
    rest = weight - found.project(6)
    for rank in (7, 12):
        least = float(np.square(scipy.linalg.svdvals(rest.numpy())[rank - 6 :]).sum() / weight.square().sum())
        assert lost(weight, found.project(rank)) == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fewer_tokens_than_directions_are_damped_tenfold(shape: tuple[int, int], side: Side) -> None:
    weight, p = noise(shape), min(shape)
    for tokens, damping in ((1, 1e-3), (p - 1, 1e-3), (p, 1e-4), (p + 1, 1e-4), (None, 1e-4)):
        X = inputs(shape[1], tokens or 5)
        covariance = seen(weight, X, side, tokens)
        found = decompose_weighted(weight, covariance)
        assert found.damping == pytest.approx(damping)
        assert weighted_spectrum(weight, covariance).damping == pytest.approx(damping)
        expected = truth(weight, X, damping)[1]
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-9 * expected[0])
    assert decompose_weighted(weight, seen(weight, X, side, p - 1), 0.03).damping == pytest.approx(0.3)


@pytest.mark.parametrize("shape", [(60, 24), (32, 32)], ids=str)
def test_a_covariance_that_is_not_positive_is_damped_until_it_is(shape: tuple[int, int]) -> None:
    weight, n = noise(shape), shape[1]
    Q = torch.linalg.qr(noise((n, n), 9))[0]
    for least, damping in ((0.0, 1e-4), (-5e-5, 1e-4), (-5e-4, 1e-3), (-5e-3, 1e-2), (-0.3, 1.0)):
        values = torch.ones(n, dtype=torch.float64)
        values[0], values[1] = least, 1.0 - least  # their mean is 1 - 1/n
        C = Q * values @ Q.T
        found = decompose_weighted(weight, Covariance(C), damping=1e-4)
        assert found.damping == pytest.approx(damping)
        root = np.linalg.cholesky(C.numpy() + damping * float(values.mean()) * np.eye(n))
        left, expected, _ = scipy.linalg.svd(weight.numpy() @ root, lapack_driver="gesvd")
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-9 * expected[0])
        U = left[:, :9]
        np.testing.assert_allclose(found.project(9).numpy(), U @ U.T @ weight.numpy(), rtol=0, atol=1e-8)
    starved = decompose_weighted(weight, Covariance(C, tokens=3), damping=1e-4)
    assert starved.damping == pytest.approx(1.0)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_fp32_makes_of_few_tokens_is_taken(shape: tuple[int, int], side: Side) -> None:
    # sums of fp32 over one direction a thousand times the others: the small eigenvalues come out below zero
    X = inputs(shape[1], 4)
    X[0] *= 1000
    weight = noise(shape)
    covariance = seen(weight, X, side, tokens=4)
    matrix = covariance.matrix.float()
    assert np.linalg.eigvalsh(matrix.double().numpy())[0] < 0
    found = decompose_weighted(weight, Covariance(matrix, side, covariance.power, 4))
    assert np.isfinite(found.values).all()
    assert torch.isfinite(found.project(12)).all()
    assert found.error(4) < 1e-4
    for curve in (found.errors(), found.weight_errors()):
        assert ((curve >= 0) & (curve <= 1)).all() and (np.diff(curve) <= 0).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_features_that_are_always_zero(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    X[::3] = 0.0
    found = decompose_weighted(weight, seen(weight, X, side))
    for rank in (1, 9, min(shape) - 1):
        np.testing.assert_allclose(found.project(rank).numpy(), best(weight, X, rank), rtol=0, atol=1e-8)
        assert found.error(rank) == pytest.approx(lost(weight, best(weight, X, rank), X), rel=1e-6, abs=1e-11)


# --- outliers and extremes ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outlier_channels_are_kept(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    X[[2, 11, 17]] *= 1000.0
    found = decompose_weighted(weight, seen(weight, X, side))
    for rank in (3, 6, min(shape) // 2):
        other = found.project(rank)
        np.testing.assert_allclose(other.numpy(), best(weight, X, rank), rtol=0, atol=1e-7)
        assert lost(weight, other, X) < 1e-3 * lost(weight, plain(weight, rank), X)
        assert found.error(rank) == pytest.approx(lost(weight, other, X), rel=1e-5)
        assert found.weight_error(rank) == pytest.approx(lost(weight, other), rel=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [1e12, 1e-12])
def test_huge_and_tiny_inputs_fit_f16(shape: tuple[int, int], side: Side, scale: float) -> None:
    weight, X = noise(shape, dtype=torch.float16), math.sqrt(scale) * inputs(shape[1])
    covariance = seen(weight, X, side)
    found = decompose_weighted(weight, covariance)
    A, B = found.factors(9)
    assert A.dtype == B.dtype == torch.float16
    assert torch.isfinite(A).all() and torch.isfinite(B).all()
    expected = torch.from_numpy(best(weight, X, 9))
    for other in (A.double() @ B.double(), found.project(9).double()):
        assert float((other - expected).norm()) < 1e-3 * float(expected.norm())


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", [2.0**-23, 2.0**10])  # exact in the weight: the same rounding, but for LAPACK's own
def test_a_weights_scale_goes_through(shape: tuple[int, int], side: Side, scale: float) -> None:
    weight, X = noise(shape), inputs(shape[1])
    expected = decompose_weighted(weight, seen(weight, X, side))
    found = decompose_weighted(scale * weight, seen(scale * weight, X, side))
    np.testing.assert_allclose(found.values, scale * expected.values, rtol=1e-9)
    torch.testing.assert_close(found.project(9), scale * expected.project(9), rtol=0, atol=1e-10 * scale)
    assert found.error(9) == pytest.approx(expected.error(9), rel=1e-9)


# --- dtypes, ends and factors ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_results_are_rounded_once(shape: tuple[int, int], dtype: torch.dtype, side: Side) -> None:
    weight, X = noise(shape, dtype=dtype), inputs(shape[1])
    weight[0, 0] = -0.0
    found = decompose_weighted(weight, seen(weight, X, side))
    p = min(shape)
    for rank in (1, 9, p - 1):
        expected = torch.from_numpy(best(weight, X, rank))
        assert found.project(rank).dtype == dtype
        assert (found.project(rank) == expected.to(dtype)).float().mean() > 0.999  # but for a tie
        wide = found.project(rank, torch.float64)
        torch.testing.assert_close(wide, expected, rtol=0, atol=1e-10)
        assert found.error(rank) == pytest.approx(lost(weight, wide, X), rel=1e-6)  # of the matrix before rounding
    zero, full = found.project(0), found.project(p)
    assert zero.shape == shape and zero.dtype == dtype and not zero.any()
    assert full.view(torch.uint8).equal(weight.view(torch.uint8))
    assert full.data_ptr() != weight.data_ptr()
    assert found.error(0) == found.weight_error(0) == 1.0
    assert found.error(p) == found.weight_error(p) == 0.0


# those of over 1024 rows or columns come in blocks
@pytest.mark.parametrize(
    ("shape", "side"), [*itertools.product(SHAPES, SIDES), ((20, 1100), "out"), ((1100, 20), "in")], ids=str
)
def test_factors_multiply_to_the_approximation(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    found = decompose_weighted(weight, seen(weight, X, side))
    left = truth(weight, X)[0]
    for rank in (1, 9, 17):
        A, B = found.factors(rank)
        assert A.shape == (shape[0], rank) and B.shape == (rank, shape[1])
        assert A.dtype == B.dtype == weight.dtype and A.is_contiguous() and B.is_contiguous()
        torch.testing.assert_close(A.T @ A, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-10)
        torch.testing.assert_close(A.T @ weight, B, rtol=0, atol=1e-9)
        torch.testing.assert_close(A @ B, found.project(rank), rtol=0, atol=1e-10)
        U = left[:, :rank]
        np.testing.assert_allclose((A @ (A.T @ weight)).numpy(), U @ U.T @ weight.numpy(), rtol=0, atol=1e-9)
    assert [part.shape for part in found.factors(0)] == [(shape[0], 0), (0, shape[1])]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_are_rounded_once(shape: tuple[int, int], side: Side, dtype: torch.dtype) -> None:
    weight, X = noise(shape, dtype=dtype), inputs(shape[1])
    A, B = decompose_weighted(weight, seen(weight, X, side)).factors(9)
    assert A.dtype == B.dtype == dtype
    exact = decompose_weighted(weight.double(), seen(weight, X, side)).factors(9)
    signs = torch.sign((A.double() * exact[0]).sum(0))
    # atol: f16 has no more below 6e-5 than that
    for found, wanted in ((A.double() * signs, exact[0]), (B.double() * signs[:, None], exact[1])):
        torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=1e-7)
    expected = best(weight, X, 9)
    error = np.linalg.norm(A.double().numpy() @ B.double().numpy() - expected) / np.linalg.norm(expected)
    assert error < torch.finfo(dtype).eps


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_weight_of_low_rank_has_no_more(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise((shape[0], 4)) @ noise((4, shape[1]), 1), inputs(shape[1])
    found = decompose_weighted(weight, seen(weight, X, side))
    assert found.numerical_rank == 4
    for rank in (4, 7, 14):
        np.testing.assert_allclose(found.project(rank).numpy(), weight.numpy(), rtol=0, atol=1e-9)
        assert found.error(rank) == pytest.approx(0.0, abs=1e-11)
        A, B = found.factors(rank)
        np.testing.assert_allclose((A @ B).numpy(), weight.numpy(), rtol=0, atol=1e-9)
        assert torch.isfinite(A).all() and float(B[4:].abs().max() if rank > 4 else 0.0) < 1e-8


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [*SHAPES, *TINY], ids=str)
def test_a_zero_matrix_stays_zero(shape: tuple[int, int], side: Side) -> None:
    weight = torch.zeros(shape, dtype=torch.bfloat16)
    C = torch.eye(shape[1]) if side == "in" else torch.zeros(shape[0], shape[0])
    found = decompose_weighted(weight, Covariance(C, side, 1.0))
    assert not found.values.any() and found.numerical_rank == 0
    assert not found.tail.any() and not found.errors().any() and not found.weight_errors().any()
    for rank in ranks_of(shape):
        assert not found.project(rank).any()
        A, B = found.factors(rank)
        assert not (A.double() @ B.double()).any()
        assert found.error(rank) == found.weight_error(rank) == 0.0


def test_a_view_of_a_matrix_is_as_good_as_a_copy() -> None:
    weight, X = noise((60, 24)), inputs(60)
    for view, Z in ((weight.T, X), (noise((60, 60))[::2, ::3], inputs(20))):
        for side in SIDES:
            covariance = seen(view, Z, side)
            found = decompose_weighted(view, covariance)
            np.testing.assert_allclose(found.project(9).numpy(), best(view, Z, 9), rtol=0, atol=1e-9)
            A, B = found.factors(9)
            np.testing.assert_allclose((A @ B).numpy(), best(view, Z, 9), rtol=0, atol=1e-9)


@given(
    rows=st.integers(1, 14),
    cols=st.integers(1, 14),
    tokens=st.integers(1, 20),
    rank=st.integers(1, 14),
    seed=st.integers(0, 99),
    side=st.sampled_from(SIDES),
    dtype=st.sampled_from([*DTYPES, torch.float64]),
)
def test_any_matrix_has_its_best(
    *, rows: int, cols: int, tokens: int, rank: int, seed: int, side: Side, dtype: torch.dtype
) -> None:
    rank = min(rank, rows, cols)
    weight = (noise((rows, rank), seed) @ noise((rank, cols), seed + 1)).to(dtype)
    X = noise((cols, tokens), seed + 2)
    found = decompose_weighted(weight, seen(weight, X, side, tokens))
    starved = tokens < min(rows, cols)
    assert found.damping == pytest.approx(1e-3 if starved else 1e-4)
    root = torch.from_numpy(np.linalg.cholesky(damped(X, found.damping)))
    squares = np.square(truth(weight, X, found.damping)[1])
    for k in range(min(rows, cols) + 1):
        # where two values are alike the matrix is free, but its error is not
        rest = (weight.double() - found.project(k, torch.float64)) @ root
        assert float(rest.square().sum()) == pytest.approx(squares[k:].sum(), rel=1e-6, abs=1e-10 * squares.sum())
        A, B = found.factors(k)
        rest = (weight.double() - A.double() @ B.double()) @ root
        bound = squares[k:].sum() + 4 * torch.finfo(dtype).eps * squares.sum() + 1e-10 * squares.sum()
        assert float(rest.square().sum()) <= bound


# --- what is refused ---


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_that_are_not_finite_are_refused(shape: tuple[int, int], bad: float) -> None:
    weight, X = noise(shape, dtype=torch.float32), inputs(shape[1])
    for side in SIDES:
        covariance = seen(weight, X, side)
        covariance.matrix[5, 3] = bad
        for refused in (decompose_weighted, weighted_spectrum):
            with pytest.raises(TensorError, match="covariance holds NaN or infinity"):
                refused(weight, covariance)
    covariance = seen(weight, X)
    weight[4, 7] = bad
    for refused in (decompose_weighted, weighted_spectrum):
        with pytest.raises(SpectrumError, match=r"\[4, 7\]"):
            refused(weight, covariance)


@pytest.mark.parametrize("size", [(24, 24), (60, 24), (25, 25), (1, 1)], ids=str)
def test_a_covariance_of_another_shape_is_refused(size: tuple[int, int]) -> None:
    weight = noise((24, 60))
    with pytest.raises(TensorError, match=r"covariance of the inputs does not fit.*expected \[60, 60\]"):
        decompose_weighted(weight, Covariance(torch.ones(size)))
    if size != (24, 24):
        with pytest.raises(TensorError, match=r"covariance of the outputs does not fit.*expected \[24, 24\]"):
            decompose_weighted(weight, Covariance(torch.ones(size), "out", 1.0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_energy_there_is_no_norm(shape: tuple[int, int]) -> None:
    weight = noise(shape)
    nothing = torch.zeros(shape[1], shape[1])
    outputs = torch.zeros(shape[0], shape[0])
    for covariance in (
        Covariance(nothing), Covariance(nothing - torch.eye(shape[1])), Covariance(outputs, "out"),
        Covariance(outputs, "out", 0.0), Covariance(outputs, "out", math.nan), Covariance(outputs, "out", math.inf),
    ):  # fmt: skip
        for refused in (decompose_weighted, weighted_spectrum):
            with pytest.raises(TensorError, match="no token came"):
                refused(weight, covariance)


@pytest.mark.parametrize(
    "weight", [torch.zeros(3), torch.zeros(0, 5), torch.zeros(2, 2, dtype=torch.int32)], ids=lambda w: str(w.shape)
)
def test_what_is_no_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(SpectrumError, match="no real matrix"):
        decompose_weighted(weight, Covariance(torch.eye(5)))


def test_what_is_empty() -> None:
    one = torch.eye(4)
    assert Covariance(one, tokens=0).empty and Covariance(torch.zeros(4, 4)).empty
    assert Covariance(one, "out", 0.0).empty and Covariance(torch.zeros(4, 4), "out", tokens=9).empty
    for some in (Covariance(one), Covariance(one, tokens=1), Covariance(torch.zeros(4, 4), "out", 1.0)):
        assert not some.empty


def test_it_holds_its_weight_and_no_copy() -> None:
    weight = noise((24, 60))
    found: Weighted = decompose_weighted(weight, Covariance(torch.eye(60)))
    assert found.weight is weight


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_of_any_dtype(shape: tuple[int, int], side: Side) -> None:
    weight, X = noise(shape), inputs(shape[1])
    given = seen(weight, X, side)
    found = decompose_weighted(weight, Covariance(given.matrix.bfloat16(), side, given.power))
    assert bool(found.project(9).isfinite().all())
    assert found.damping <= 1.0
