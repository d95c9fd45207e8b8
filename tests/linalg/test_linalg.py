"""Spectra against LAPACK's gesvd, thresholds against the laws of random matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mixtools.errors import SpectrumError, TensorError, UsageError
from mixtools.linalg import bulk, eigen, gram, output, rules, spectrum

SHAPES = [(1, 7), (7, 1), (1, 1), (2, 2), (40, 40), (30, 90), (90, 30), (200, 57)]
ATTENTION, KEY_VALUE, EXPERT = (4096, 4096), (1024, 4096), (4096, 14336)


def noise(shape: tuple[int, int], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_values(shape: tuple[int, int], values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values (the rest are zero) and random vectors."""
    left = np.linalg.qr(noise((shape[0], len(values)), seed).numpy())[0]
    right = np.linalg.qr(noise((shape[1], len(values)), seed + 1).numpy())[0]
    return torch.from_numpy(left * np.array(values) @ right.T)


def gesvd(weight: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return scipy.linalg.svd(weight.double().numpy(), full_matrices=False, lapack_driver="gesvd")


def best_approximation(weight: Tensor, rank: int) -> np.ndarray:
    left, values, right = gesvd(weight)
    return left[:, :rank] * values[:rank] @ right[:rank]


# --- the Gram matrix ---


@pytest.mark.parametrize("shape", [*SHAPES, (20, 2500), (2500, 20)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gram_is_the_product_on_the_short_side(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = noise(shape, dtype=dtype)
    wide = weight.double().numpy() if shape[0] <= shape[1] else weight.double().numpy().T
    expected = wide @ wide.T
    for found in (gram.gram(weight), gram._gram_device(weight)):
        assert found.dtype == torch.float64
        np.testing.assert_allclose(np.tril(found.numpy()), np.tril(expected), rtol=0, atol=1e-12 * shape[0] * shape[1])


@pytest.mark.parametrize("shape", [(1, 1), (33, 70), (700, 60), (64, 1000)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gram_in_fp32_alone_is_nearly_that_of_fp64(shape: tuple[int, int], dtype: torch.dtype) -> None:
    weight = noise(shape, dtype=dtype)
    (weight if shape[0] <= shape[1] else weight.T)[0] *= 1000.0  # one row's scale does not blur another's
    expected = gram.gram(weight)
    found = gram.gram_sliced(weight)
    scale = expected.diagonal().sqrt()
    error = (found.tril() - expected.tril()) / (scale[:, None] * scale)
    assert error.abs().max() < 1e-9
    assert torch.equal(found, found.T)


def test_gram_in_fp32_alone_keeps_small_singular_values() -> None:
    weight = with_values((64, 300), list(np.geomspace(1.0, 1e-3, 64))).float().bfloat16()
    expected = gesvd(weight)[1]
    plain = torch.linalg.eigvalsh((weight.float() @ weight.float().T).double()).clamp_min(0).sqrt().flip(0).numpy()
    sliced = eigen.eigenvalues(gram.gram_sliced(weight)).clamp_min(0).sqrt().flip(0).numpy()
    assert abs(sliced / expected - 1).max() < 1e-6
    assert abs(plain / expected - 1).max() > 1e-5  # the plain sum in fp32 is what this is for


@pytest.mark.parametrize("exponent", [-140, -60, 60, 127])
def test_gram_in_fp32_alone_spans_the_range_of_fp32(exponent: int) -> None:
    weight = torch.from_numpy(np.ldexp(np.ones((2, 3)), exponent)).float()
    assert torch.equal(gram.gram_sliced(weight), torch.full((2, 2), 3 * 4.0**exponent, dtype=torch.float64))


def test_zero_rows_stay_zero_in_fp32_alone() -> None:
    weight = noise((5, 300), dtype=torch.bfloat16)
    weight[2] = 0
    found = gram.gram_sliced(weight)
    assert not found[2].any()
    assert torch.isfinite(found).all()


# --- eigenvalues and vectors ---


@pytest.mark.parametrize("p", [1, 2, 3, 17, 130])
def test_vectors_of_a_range_are_eigenvectors(p: int) -> None:
    symmetric = noise((p, p))
    symmetric = symmetric + symmetric.T
    expected = scipy.linalg.eigh(symmetric.numpy())
    for solved in (eigen.decompose(symmetric.clone()), eigen.decompose_batch(symmetric[None])[0]):
        np.testing.assert_allclose(solved.values.numpy(), expected[0], atol=1e-12 * p)
        for start, stop in ((0, p), (p - 1, p), (0, 0), (p // 3, p // 2)):
            found = solved.vectors(start, stop).numpy()
            wanted = expected[1][:, start:stop]
            assert found.shape == wanted.shape
            np.testing.assert_allclose(found @ found.T, wanted @ wanted.T, atol=1e-11)  # projectors: signs are free


def test_lower_triangle_is_enough() -> None:
    full = noise((30, 30))
    full = full @ full.T
    expected = np.linalg.eigvalsh(full.numpy())
    lower = full.tril()
    np.testing.assert_allclose(eigen.eigenvalues(lower).numpy(), expected, atol=1e-11)
    np.testing.assert_allclose(eigen.decompose(lower.clone()).values.numpy(), expected, atol=1e-11)


# --- spectra ---


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [False, True])
def test_singular_values_equal_gesvd(shape: tuple[int, int], exact: bool) -> None:
    weight = noise(shape, dtype=torch.bfloat16)
    expected = gesvd(weight)[1]
    for found in (spectrum.spectrum(weight, exact=exact), spectrum.decompose(weight, exact=exact)):
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-12 * expected[0])
        assert found.shape == shape


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("exact", [False, True])
def test_projection_is_the_best_approximation(shape: tuple[int, int], exact: bool) -> None:
    weight = noise(shape, dtype=torch.float32)
    found = spectrum.decompose(weight, exact=exact)
    norm = float(weight.double().norm())
    for rank in {0, 1, min(shape) // 3, min(shape) // 2 + 1, min(shape) - 1, min(shape)}:
        best = best_approximation(weight, rank)
        np.testing.assert_allclose(found.project(rank, torch.float64).numpy(), best, atol=1e-11 * norm)
        assert found.project(rank).dtype == torch.float32
        if rank:
            A, B = spectrum.decompose(weight.double(), exact=exact).factors(rank)
            assert A.shape == (shape[0], rank)
            assert B.shape == (rank, shape[1])
            np.testing.assert_allclose((A @ B).numpy(), best, atol=1e-11 * norm)


@pytest.mark.parametrize("shape", [(60, 200), (200, 60), (80, 80)])
def test_eckart_young(shape: tuple[int, int]) -> None:
    weight = noise(shape)
    found = spectrum.decompose(weight)
    for rank in (0, 1, 20, 45, 59):
        rest = (weight - found.project(rank)).numpy()
        squares = np.square(found.values)
        assert np.square(rest).sum() == pytest.approx(squares[rank:].sum(), rel=1e-10)
        assert np.linalg.norm(rest, 2) == pytest.approx(found.values[rank], rel=1e-10)


def test_factors_carry_a_root_of_each_value_on_both_sides() -> None:
    weight = noise((30, 50))
    A, B = spectrum.decompose(weight).factors(10)
    values = gesvd(weight)[1][:10]
    np.testing.assert_allclose((A.T @ A).numpy(), np.diag(values), atol=1e-11)
    np.testing.assert_allclose((B @ B.T).numpy(), np.diag(values), atol=1e-11)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30)])
def test_factors_beyond_the_numerical_rank_are_zeros(shape: tuple[int, int]) -> None:
    weight = with_values(shape, [3.0, 2.0])
    A, B = spectrum.decompose(weight).factors(10)
    np.testing.assert_allclose((A @ B).numpy(), weight.numpy(), atol=1e-12)
    assert not A[:, 2:].any()
    assert not B[2:].any()


def test_small_values_are_lost_below_the_floor_and_kept_by_the_svd() -> None:
    true = np.geomspace(1.0, 1e-12, 40)
    weight = with_values((40, 100), list(true))
    by_gram, by_svd = spectrum.spectrum(weight), spectrum.spectrum(weight, exact=True)
    above = true > 2 * by_gram.floor
    assert 0 < above.sum() < 40
    # relative error of s_i at most p·2⁻⁵² · (s_1/s_i)², as gram.py states
    bound = 40 * 2.0**-52 / np.square(true[above])
    assert (abs(by_gram.values[above] / true[above] - 1) < bound).all()
    assert (by_gram.values[true < by_gram.floor / 10] < by_gram.floor).all()
    np.testing.assert_allclose(by_svd.values, true, rtol=1e-2)
    assert by_svd.numerical_rank == 40


def test_bf16_weights_lose_nothing_in_the_gram_matrix() -> None:
    weight = with_values((100, 400), list(np.geomspace(1.0, 1e-3, 100))).bfloat16()
    found = spectrum.spectrum(weight).values
    assert abs(found / gesvd(weight)[1] - 1).max() < 1e-9


@given(
    rows=st.integers(1, 24),
    cols=st.integers(1, 24),
    rank=st.integers(0, 24),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_matrix_has_a_spectrum(rows: int, cols: int, rank: int, seed: int, dtype: torch.dtype) -> None:
    rank = min(rank, rows, cols)
    weight = (noise((rows, rank), seed) @ noise((rank, cols), seed + 1)).to(dtype)  # rank 0: the zero matrix
    expected = gesvd(weight)[1]
    found = spectrum.decompose(weight)
    # Weyl: an eigenvalue of the Gram matrix is off by no more than its rounding
    tolerance = 8 * min(rows, cols) * max(rows, cols) * 2.0**-53 * expected[0] ** 2
    assert (abs(np.square(found.values) - np.square(expected)) <= tolerance).all()
    assert (np.diff(found.values) <= 0).all()
    for k in range(min(rows, cols) + 1):
        rest = weight.double() - found.project(k, torch.float64)
        assert float(rest.square().sum()) <= np.square(expected[k:]).sum() + 4 * tolerance * min(rows, cols)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named(bad: float) -> None:
    weight = noise((6, 9), dtype=torch.bfloat16)
    weight[4, 7] = bad
    with pytest.raises(SpectrumError, match=r"\[4, 7\]"):
        spectrum.spectrum(weight)
    with pytest.raises(SpectrumError, match=r"\[4, 7\]"):
        spectrum.decompose(weight)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 3, 4), torch.zeros(0, 5), torch.zeros(5, 0), torch.zeros(2, 2, dtype=torch.int32)],
    ids=str,
)
def test_what_is_no_real_matrix_is_refused(weight: Tensor) -> None:
    with pytest.raises(SpectrumError, match="no real matrix"):
        spectrum.decompose(weight)


def test_a_batch_is_its_matrices_one_by_one() -> None:
    weights = [noise((20, 50), 1), noise((50, 20), 2), noise((20, 20), 3)]
    for weight, found in zip(weights, spectrum.decompose_batch(weights), strict=True):
        alone = spectrum.decompose(weight)
        np.testing.assert_allclose(found.values, alone.values, rtol=0, atol=1e-12 * alone.values[0])
        np.testing.assert_allclose(found.project(6).numpy(), alone.project(6).numpy(), atol=1e-11)


# --- the bulk ---


@pytest.mark.parametrize(
    ("shape", "edge", "gavish_donoho"),
    [(ATTENTION, 2.475, 2.858), (KEY_VALUE, 1.567, 1.837), (EXPERT, 1.614, 1.887)],
)
def test_constants_of_the_shapes_of_8x7b(shape: tuple[int, int], edge: float, gavish_donoho: float) -> None:
    for sides in (shape, shape[::-1]):
        assert bulk.mp_edge_over_median(sides) == pytest.approx(edge, abs=6e-4)
        assert bulk.gavish_donoho_over_median(sides) == pytest.approx(gavish_donoho, abs=6e-4)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.25, 0.4, 0.5, 0.75, 0.9, 1.0])
def test_gavish_donoho_follows_the_papers_approximation(beta: float) -> None:
    # equation 5 of the paper; it states an error of at most 0.02 from beta = 0.001 on
    approximation = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    assert bulk.gavish_donoho_over_median((int(1000 * beta), 1000)) == pytest.approx(approximation, abs=0.02)


@pytest.mark.parametrize("beta", [1 / 4096, 0.1, 2 / 7, 0.5, 0.99, 1.0])
def test_mp_density_holds_one_half_below_its_median(beta: float) -> None:
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    # midpoints in an angle: dense at both ends, where the density rises steeply
    angle = (np.arange(200_000) + 0.5) * math.pi / 200_000
    x = (low + high) / 2 - (high - low) / 2 * np.cos(angle)
    mass = bulk.mp_density(x, beta) * (high - low) / 2 * np.sin(angle) * math.pi / 200_000
    assert mass.sum() == pytest.approx(1.0, abs=1e-6)
    assert mass[x < bulk.mp_median(beta)].sum() == pytest.approx(0.5, abs=1e-4)
    assert not bulk.mp_density(np.array([low * 0.99 - 1e-9, high * 1.01]), beta).any()


@pytest.mark.parametrize("shape", [(500, 500), (250, 1000), (1750, 500)])
@pytest.mark.parametrize("sigma", [0.02, 3.0])
def test_noise_follows_the_law(shape: tuple[int, int], sigma: float) -> None:
    found = spectrum.spectrum(sigma * noise(shape))
    estimate = bulk.Bulk.of(found)
    assert estimate.sigma == pytest.approx(sigma, rel=0.005)
    counts, borders = np.histogram(found.values, bins=10)
    s = np.linspace(borders[0], borders[-1], 4001)
    density = bulk.singular_value_density(s, shape, sigma)
    cumulative = np.append(0, np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(s)))
    expected = np.diff(np.interp(borders, s, cumulative)) * len(found.values)
    assert abs(counts - expected).max() < 0.01 * len(found.values) + 2


@pytest.mark.parametrize(
    # LaserRMT's threshold over the true edge, and what it keeps of pure noise: at 1/4 of 8x7B's sides
    ("shape", "over_edge", "kept"),
    [((1024, 1024), 0.648, 0.237), ((256, 1024), 0.303, 1.0), ((1024, 3584), 0.325, 0.987)],
)
def test_laserrmt_threshold_is_not_the_edge(shape: tuple[int, int], over_edge: float, kept: float) -> None:
    weight = noise(shape)
    found = spectrum.spectrum(weight)
    estimate = bulk.Bulk.of(found)
    assert estimate.laserrmt / estimate.edge == pytest.approx(over_edge, abs=0.004)
    assert rules.LaserRmt().rank(found, estimate) / min(shape) == pytest.approx(kept, abs=0.006)


def test_laserrmt_threshold_is_the_formula() -> None:
    values = torch.linalg.svdvals(noise((40, 90))).numpy()
    quartiles = torch.quantile(torch.from_numpy(values), torch.tensor([0.25, 0.75], dtype=torch.float64))
    expected = float(quartiles[1] - quartiles[0]) / 1.349 * math.sqrt((1 + math.sqrt(40 / 90)) ** 2)
    assert bulk.laserrmt_threshold(values, (40, 90)) == pytest.approx(expected, rel=1e-12)
    assert bulk.laserrmt_threshold(values, (90, 40)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(300, 300), (150, 600), (1050, 300)])
def test_nothing_of_pure_noise_is_kept(shape: tuple[int, int]) -> None:
    for seed in range(8):
        found = spectrum.spectrum(noise(shape, seed))
        estimate = bulk.Bulk.of(found)
        p = min(shape)
        assert estimate.edge_with_margin == pytest.approx(estimate.edge * (1 + p ** (-2 / 3)))
        assert rules.MarchenkoPastur().rank(found, estimate) == 0
        assert rules.GavishDonoho().rank(found, estimate) == 0


@pytest.mark.parametrize("shape", [(600, 600), (300, 1200), (1050, 300)])
@pytest.mark.parametrize("planted", [1, 4, 9])
def test_planted_directions_are_counted(shape: tuple[int, int], planted: int) -> None:
    # Benaych-Georges and Nadakuditi, J. Multivariate Analysis 111 (2012): theta over beta^(1/4) comes out of the noise
    beta, q = min(shape) / max(shape), max(shape)
    theta = np.linspace(2.5, 5.0, planted)
    expected = np.sort(np.sqrt((theta**2 + 1) * (theta**2 + beta)) / theta)[::-1]
    weight = noise(shape) / math.sqrt(q) + with_values(shape, list(theta), seed=7)
    found = spectrum.spectrum(weight)
    estimate = bulk.Bulk.of(found)
    assert rules.MarchenkoPastur().rank(found, estimate) == planted
    np.testing.assert_allclose(found.values[:planted], expected, rtol=0.05)


def test_directions_too_weak_for_the_noise_are_not_counted() -> None:
    shape = (600, 600)
    weight = noise(shape) / math.sqrt(600) + with_values(shape, [0.5, 0.6], seed=7)  # beta^(1/4) is 1
    found = spectrum.spectrum(weight)
    assert rules.MarchenkoPastur().rank(found, bulk.Bulk.of(found)) == 0


RULES = ["mp", "gavish-donoho", "laserrmt", "energy=0.9", "rho=0.3", "rank=5"]


@pytest.mark.parametrize("spelling", RULES)
def test_ranks_do_not_change_with_scale_transposition_or_order(spelling: str) -> None:
    rule = rules.parse_rule(spelling)
    weight = noise((120, 300)) + with_values((120, 300), [90.0, 60.0, 50.0])

    def rank(matrix: Tensor) -> int:
        found = spectrum.spectrum(matrix)
        return rule.rank(found, bulk.Bulk.of(found))

    expected = rank(weight)
    rows, cols = torch.from_numpy(np.random.default_rng(0).permutation(120)), torch.randperm(300)
    for same in (weight * 1e-6, weight * 12345.6, weight.T, weight[rows], weight[:, cols], -weight):
        assert rank(same) == expected


# --- rules ---


@given(
    values=st.lists(st.floats(0, 100, width=32), min_size=1, max_size=30),
    share=st.floats(0.01, 0.99),
)
def test_shares_are_met_by_the_smallest_rank(values: list[float], share: float) -> None:
    ordered = np.array(sorted(values, reverse=True))
    found = spectrum.Spectrum((len(values), len(values) + 3), ordered, 0.0, 0.0)
    estimate = bulk.Bulk.of(found)
    squares = np.square(ordered)
    rank = rules.Energy(share).rank(found, estimate)
    slack = 1e-9 * squares.sum()
    assert squares[:rank].sum() >= share * squares.sum() - slack
    assert rank == 0 or squares[: rank - 1].sum() < share * squares.sum() + slack
    assert rules.Rho(share).rank(found, estimate) == max(1, int(np.floor(np.round(share * len(values), 6))))
    lost = np.append(np.cumsum(squares[::-1])[::-1] / max(squares.sum(), 1e-300), 0.0)
    rank = rules.Activation(share).rank(found, estimate, lost)
    assert lost[rank] <= share
    assert rank == 0 or lost[rank - 1] > share


@pytest.mark.parametrize("text", [*RULES, "activation=0.01"])
def test_a_rule_reads_its_own_spelling(text: str) -> None:
    assert str(rules.parse_rule(text)) == text
    assert rules.parse_rule(f" {text} ") == rules.parse_rule(text)


@pytest.mark.parametrize(
    "text",
    ["", "MP", "mp=1", "rank", "rank=", "rank=0", "rank=-3", "rank=2.5", "energy", "energy=0", "energy=1", "energy=x",
     "energy=nan", "rho=1.5", "activation=1.5", "activation=-1", "activation=inf", "svd=3"],
)  # fmt: skip
def test_a_rule_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="rank rule"):
        rules.parse_rule(text)


def test_a_rank_above_the_matrix_is_refused() -> None:
    found = spectrum.spectrum(noise((4, 9)))
    estimate = bulk.Bulk.of(found)
    assert rules.Fixed(4).rank(found, estimate) == 4
    with pytest.raises(UsageError, match="rank=5: a 4x9 matrix has rank 4 at most"):
        rules.Fixed(5).rank(found, estimate)


def test_signal_to_noise() -> None:
    assert bulk.signal_to_noise(np.array([5.0, 3.0, 2.0, 1.0]), 2.0) == pytest.approx(8 / 3)
    assert bulk.signal_to_noise(np.array([5.0, 3.0]), 1.0) == math.inf
    assert bulk.signal_to_noise(np.array([5.0, 3.0]), 6.0) == 0.0


# --- the cost at the layer's output ---


@pytest.mark.parametrize("shape", [(30, 70), (70, 30), (25, 25), (1, 6), (6, 1)])
@pytest.mark.parametrize("side", ["in", "out"])
@pytest.mark.parametrize("deficient", [False, True])
def test_output_errors_are_those_of_the_outputs(shape: tuple[int, int], side: str, deficient: bool) -> None:
    weight = noise(shape)
    if deficient and min(shape) > 3:
        weight = with_values(shape, [5.0, 4.0, 3.0])
    inputs = noise((shape[1], 200), 3) * torch.linspace(0.1, 4, shape[1], dtype=torch.float64)[:, None]
    outputs = weight @ inputs
    matrix = inputs @ inputs.T if side == "in" else outputs @ outputs.T
    found = spectrum.decompose(weight)
    lost = output.output_errors(found, output.Covariance(matrix, side))  # type: ignore[arg-type]  # the parameter is a literal of the list above
    assert lost.shape == (min(shape) + 1,)
    total = float(outputs.square().sum())
    for rank in range(min(shape) + 1):
        rest = (weight - torch.from_numpy(best_approximation(weight, rank))) @ inputs
        assert lost[rank] == pytest.approx(float(rest.square().sum()) / total, rel=1e-7, abs=1e-10)


def test_no_output_loses_nothing() -> None:
    found = spectrum.decompose(noise((5, 8)))
    assert not output.output_errors(found, output.Covariance(torch.zeros(8, 8))).any()


def test_a_covariance_that_does_not_fit_is_refused() -> None:
    found = spectrum.decompose(noise((5, 8)))
    with pytest.raises(TensorError, match=r"expected \[8, 8\], found \[5, 5\]"):
        output.output_errors(found, output.Covariance(torch.zeros(5, 5)))
    with pytest.raises(TensorError, match="NaN"):
        output.output_errors(found, output.Covariance(torch.full((8, 8), math.nan)))
