"""The method in the output's norm: what it tells against what is measured, what it refuses, what must not matter."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from output_oracle import Matrix, Side, best, lost, plain, seen, truth
from torch import Tensor

from mixtools.errors import SpectrumError, TensorError, UsageError
from mixtools.formats import Factored, Plain
from mixtools.methods.laser import figures
from mixtools.methods.laser import method as laser
from mixtools.methods.laser.method import Covariance, Options
from mixtools.storage.dtypes import DType

SIDES: tuple[Side, ...] = ("in", "out")
SHAPES = [(40, 100), (100, 40), (50, 50)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
RULES = ["activation=0.05", "energy=0.9", "rho=0.25", "rank=7"]  # those that the output's norm takes
THRESHOLDS = ["mp", "gavish-donoho", "laserrmt"]


def planted(shape: tuple[int, int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Noise of 0.02, and six directions that stand out of it."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(shape, generator=generator)
    left, right = (torch.randn(side, 6, generator=generator) / math.sqrt(side) for side in shape)
    return (weight + left @ right.T).to(dtype)


def inputs(features: int, tokens: int = 300, seed: int = 1) -> Tensor:
    """[in, tokens], correlated, of features that differ thirtyfold."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(features, features, generator=generator).double() / math.sqrt(features)
    scale = torch.logspace(0, -1.5, features, dtype=torch.float64)[:, None]
    return scale * (mixed @ torch.randn(features, tokens, generator=generator).double())


def options(rule: str, norm: str = "output", **more: bool | float) -> Options:
    return dataclasses.replace(Options.parse(rule, norm=norm), **more)  # type: ignore[arg-type]  # fields by their names


def tail(values: Matrix) -> Matrix:
    squares = np.square(values)
    result: Matrix = np.array([squares[k:].sum() for k in range(len(values) + 1)]) / squares.sum()
    return result


def ranks_by(values: Matrix, damped: Matrix) -> dict[str, int]:
    """Those of the rules that need no threshold, by their definitions."""
    own = tail(values)
    return {
        name: int(np.argmax(curve <= share))
        for name, curve, share in (
            ("energy=0.9", own, 0.1), ("energy=0.99", own, 0.01), ("activation=0.1", damped, 0.1),
            ("activation=0.01", damped, 0.01),
        )
    }  # fmt: skip


# --- what is written and told ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_weight_is_the_best_for_the_output(
    shape: tuple[int, int], side: Side, rule: str, dtype: torch.dtype
) -> None:
    weight, X = planted(shape, dtype), inputs(shape[1])
    before = weight.clone()
    result = laser.encode(weight, options(rule), seen(weight, X, side))
    values = truth(weight, X)[1]
    p, rank = min(shape), result.report.rank
    squares = np.cumsum(np.square(values)) / np.square(values).sum()
    assert rank == {
        "activation=0.05": int((squares < 0.95).sum()) + 1, "energy=0.9": int((squares < 0.9).sum()) + 1,
        "rho=0.25": p // 4, "rank=7": 7,
    }[rule]  # fmt: skip
    assert 0 < rank < p
    expected = torch.from_numpy(best(weight, X, rank))
    assert isinstance(result.stored.format, Plain)
    assert result.dense.dtype == dtype
    assert (result.dense == expected.to(dtype)).float().mean() > 0.999  # but for a tie
    assert torch.equal(weight, before)
    assert lost(weight, expected, X) < lost(weight, plain(weight, rank), X)
    report = result.report
    assert (report.norm, report.damping, report.shape, report.of) == ("output", 1e-4, shape, p)
    assert report.energy == pytest.approx(1 - lost(weight, expected), abs=1e-8)
    assert report.layer_error == pytest.approx(lost(weight, expected, X), rel=1e-6)
    np.testing.assert_allclose(report.spectrum, scipy.linalg.svdvals(weight.double().numpy()), rtol=1e-9)
    np.testing.assert_allclose(report.output_spectrum, values, rtol=1e-8)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_report_tells_each_rules_rank(shape: tuple[int, int], side: Side) -> None:
    weight, X = planted(shape), inputs(shape[1])
    values, own = truth(weight, X)[1], scipy.linalg.svdvals(weight.double().numpy())
    report = laser.encode(weight, options("rank=5"), seen(weight, X, side)).report
    assert report.choices["output"] == ranks_by(values, tail(values))
    plain_norm = laser.encode(weight, options("rank=5", "weights")).report
    assert report.choices["weights"] == plain_norm.choices["weights"]  # those that need no text
    assert {*report.choices["weights"]} == {"energy=0.9", "energy=0.99", *THRESHOLDS}
    assert report.choices["weights"]["energy=0.9"] == ranks_by(own, tail(own))["energy=0.9"]
    for name in ("sigma", "edge", "gavish_donoho", "laserrmt_threshold", "snr_mp", "break_even"):
        assert getattr(report, name) == pytest.approx(getattr(plain_norm, name))  # of the weights in either norm
    np.testing.assert_allclose(report.curves.lost["output"]["output"], tail(values), rtol=0, atol=1e-11)
    np.testing.assert_allclose(report.curves.lost["weights"]["weights"], tail(own), rtol=0, atol=1e-11)
    assert report.curves.damped
    assert [(norm, *each) for norm, each in report.curves.lost.items()] == [(norm, norm) for norm in figures.NORMS]


def test_a_curve_is_told_at_65_ranks() -> None:
    weight, X = planted((150, 200)), inputs(200)
    report = laser.encode(weight, options("rank=5"), seen(weight, X)).report
    ranks = report.curves.ranks
    assert len(ranks) == 65 and ranks[0] == 0 and ranks[-1] == 150
    assert {2, 3} == {*np.diff(ranks)}
    expected = tail(truth(weight, X)[1])[[*ranks]]
    np.testing.assert_allclose(report.curves.lost["output"]["output"], expected, rtol=0, atol=1e-11)
    document = report.document(spectra=False)
    assert document["curves"]["output"]["output"] == [pytest.approx(share, rel=1e-4, abs=1e-12) for share in expected]
    assert document["curves"]["damped"] is True


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(24, 60), (60, 24), (30, 30)], ids=str)
def test_a_look_tells_both_norms_in_full(shape: tuple[int, int], side: Side) -> None:
    weight, X = planted(shape), inputs(shape[1])
    covariance = seen(weight, X, side)
    p = min(shape)
    report = laser.look(weight, options("activation=0.05"), covariance)
    curves = report.curves
    assert curves.ranks == tuple(range(p + 1)) and not curves.damped
    for measured, Z in (("weights", None), ("output", X)):
        of_plain = [lost(weight, plain(weight, rank), Z) for rank in range(p)] + [0.0]
        of_best = [lost(weight, best(weight, X, rank), Z) for rank in range(p)] + [0.0]
        np.testing.assert_allclose(curves.lost["weights"][measured], of_plain, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(curves.lost["output"][measured], of_best, rtol=1e-6, atol=1e-8)
    # each norm's own approximation is the best there is in it
    slack = 1e-4 * 30  # of what is damped
    for rank in range(1, p):
        assert curves.lost["weights"]["weights"][rank] <= curves.lost["output"]["weights"][rank] + 1e-9
        assert curves.lost["output"]["output"][rank] <= curves.lost["weights"]["output"][rank] * (1 + slack) + 1e-9
    values, own = truth(weight, X)[1], scipy.linalg.svdvals(weight.double().numpy())
    at_output = np.array([lost(weight, plain(weight, rank), X) for rank in range(p)] + [0.0])
    assert report.choices["output"] == ranks_by(values, tail(values))
    assert report.choices["weights"].items() >= ranks_by(own, at_output).items()
    assert {*report.choices["weights"]} == {*figures.TOLD_RULES}
    chosen = int(np.argmax(tail(values) <= 0.05))
    assert report.rank == chosen
    other = best(weight, X, chosen)
    assert report.norm == "output" and report.damping == 1e-4
    assert report.energy == pytest.approx(1 - lost(weight, other), abs=1e-8)
    assert report.layer_error == pytest.approx(lost(weight, other, X), rel=1e-6)
    json.dumps(report.document(), allow_nan=False)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rule", RULES)
def test_a_look_chooses_as_the_run_does(rule: str, side: Side) -> None:
    weight, X = planted((40, 100)), inputs(100)
    covariance = seen(weight, X, side)
    found = laser.look(weight, options(rule), covariance)
    done = laser.encode(weight, options(rule), covariance).report
    assert (found.rank, found.norm, found.damping) == (done.rank, done.norm, done.damping)
    for name in ("energy", "layer_error", "sigma", "edge", "snr_mp", "snr_laserrmt"):
        assert getattr(found, name) == pytest.approx(getattr(done, name), rel=1e-7)


@pytest.mark.parametrize("norm", ["weights", "output"])
def test_values_alone_choose_as_vectors_do(norm: str) -> None:
    for shape in SHAPES:
        weight, X = planted(shape), inputs(shape[1])
        for side in SIDES:
            covariance = seen(weight, X, side)
            for rule in RULES if norm == "output" else [*RULES[1:], *THRESHOLDS]:
                found = laser.spectrum_in_norm(weight, options(rule, norm), covariance)
                alone = laser.report_of(found, options(rule, norm))
                full = laser.encode(weight, options(rule, norm), covariance).report
                assert (alone.rank, alone.norm, alone.damping) == (full.rank, full.norm, full.damping)
                assert alone.choices.get("output") == full.choices.get("output")
                assert alone.layer_error is None  # which takes vectors
            whole = laser.report_of(found, options(rule, norm), min(shape))
            assert whole.rank == min(shape) and whole.energy == 1.0
            assert whole.layer_error == (0.0 if norm == "output" else None)


# --- rules ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_activation_is_energy_by_another_name(shape: tuple[int, int], side: Side) -> None:
    weight, X = planted(shape), inputs(shape[1])
    covariance = seen(weight, X, side)
    found = set()
    for share in (0.5, 0.3, 0.1, 0.07, 0.01, 0.001, 1e-5):
        lossy = laser.encode(weight, options(f"activation={share}"), covariance)
        kept = laser.encode(weight, options(f"energy={1 - share!r}"), covariance)
        assert lossy.report.rank == kept.report.rank
        assert torch.equal(lossy.dense, kept.dense)
        assert lossy.report.layer_error == kept.report.layer_error
        found.add(lossy.report.rank)
    assert len(found) > 4
    plain_norm = laser.encode(weight, options("activation=0.01", "weights"), covariance).report
    assert laser.encode(weight, options("activation=0.01"), covariance).report.rank < plain_norm.rank


@pytest.mark.parametrize("rule", [*RULES, "activation=0.3", "energy=0.99"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_white_inputs_give_plain_laser(shape: tuple[int, int], dtype: torch.dtype, rule: str) -> None:
    weight = planted(shape, dtype)
    # by its own energy, of which white inputs leave the same share at the output
    name, _, value = rule.partition("=")
    same = f"energy={1 - float(value)!r}" if name == "activation" else rule
    expected = laser.encode(weight, options(same, "weights"))
    for side in SIDES:
        C = torch.eye(shape[1]) if side == "in" else weight.double() @ weight.double().T
        result = laser.encode(weight, options(rule), Covariance(C, side, 1.0))
        assert result.report.rank == expected.report.rank
        assert (result.dense == expected.dense).float().mean() > 0.999  # but for a tie
        torch.testing.assert_close(result.dense, expected.dense, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        assert result.report.energy == pytest.approx(expected.report.energy, abs=1e-9)
        assert result.report.layer_error == pytest.approx(1 - expected.report.energy, abs=1e-9)
        assert result.report.choices["output"]["energy=0.99"] == expected.report.choices["weights"]["energy=0.99"]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_inputs_scale_does_not_matter(shape: tuple[int, int], side: Side, rule: str) -> None:
    weight, X = planted(shape, torch.bfloat16), inputs(shape[1])
    expected = laser.encode(weight, options(rule), seen(weight, X, side))
    for scale in (1024.0, 2.0**-20):
        found = laser.encode(weight, options(rule), seen(weight, scale * X, side))
        assert torch.equal(found.dense, expected.dense)  # powers of two change no digit
        assert found.report.rank == expected.report.rank
        assert found.report.layer_error == expected.report.layer_error
    for scale in (3.7, 1e6):
        found = laser.encode(weight, options(rule), seen(weight, scale * X, side))
        assert found.report.rank == expected.report.rank
        assert (found.dense == expected.dense).float().mean() > 0.999
        assert found.report.layer_error == pytest.approx(expected.report.layer_error, rel=1e-8)


# --- few tokens, and none ---


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("factored", [False, True])
def test_without_a_token_the_weights_norm_stands_in(rule: str, side: Side, factored: bool) -> None:
    weight, X = planted((40, 100)), inputs(100)
    size = 100 if side == "in" else 40
    name, _, value = rule.partition("=")
    same = f"energy={1 - float(value)!r}" if name == "activation" else rule
    expected = laser.encode(weight, options(same, "weights", factored=factored))
    for nothing in (
        Covariance(torch.zeros(size, size), side), Covariance(torch.zeros(size, size), side, 0.0, 0),
        Covariance(seen(weight, X, side).matrix, side, 1.0, 0),
    ):  # fmt: skip
        result = laser.encode(weight, options(rule, factored=factored), nothing)
        report = result.report
        assert torch.equal(result.dense, expected.dense)
        assert (report.norm, report.damping, report.layer_error) == ("weights", None, None)
        assert (report.rank, report.energy) == (expected.report.rank, expected.report.energy)
        assert "output" not in report.choices and report.output_spectrum is None
        assert {*report.curves.lost} == {"weights"} and {*report.curves.lost["weights"]} == {"weights"}
        looked = laser.look(weight, options(rule), nothing)
        assert (looked.rank, looked.norm, looked.layer_error) == (report.rank, "weights", None)
        alone = laser.report_of(laser.spectrum_in_norm(weight, options(rule), nothing), options(rule))
        assert (alone.rank, alone.norm, alone.layer_error) == (report.rank, "weights", None)
        json.dumps(report.document(), allow_nan=False)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_few_tokens_are_damped_tenfold_and_told(shape: tuple[int, int], side: Side) -> None:
    p = min(shape)
    weight, X = planted(shape), inputs(shape[1], 8)
    for tokens, damping in ((8, 1e-3), (p - 1, 1e-3), (p, 1e-4)):
        covariance = seen(weight, X, side, tokens)
        for rule in ("rank=6", "rank=15", "activation=0.01"):
            result = laser.encode(weight, options(rule), covariance)
            assert result.report.damping == pytest.approx(damping)
            assert result.report.norm == "output"
            expected = best(weight, X, result.report.rank, damping)
            np.testing.assert_allclose(result.dense.double().numpy(), expected, rtol=0, atol=1e-7)
            assert result.report.layer_error == pytest.approx(lost(weight, expected, X), rel=1e-5, abs=1e-11)
    assert laser.encode(weight, options("rank=6", damping=0.02), seen(weight, X, side, 8)).report.damping == 0.2
    # a rank above the tokens' gives their outputs, and of what they did not reach more than nothing
    result = laser.encode(weight, options("rank=15"), seen(weight, X, side, 8))
    assert result.report.layer_error is not None and result.report.layer_error < 1e-6
    assert lost(weight, result.dense) < lost(weight, laser.encode(weight, options("rank=8"), covariance).dense) - 1e-2
    full = laser.encode(weight, options(f"rank={p}"), seen(weight, X, side, 8))
    assert torch.equal(full.dense, weight)


# --- ends ---


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_full_rank_leaves_every_bit(dtype: torch.dtype, side: Side) -> None:
    for shape in SHAPES:
        weight, X = planted(shape, dtype), inputs(shape[1])
        weight[0, 0] = -0.0
        result = laser.encode(weight, options(f"rank={min(shape)}"), seen(weight, X, side))
        assert result.dense.view(torch.uint8).equal(weight.view(torch.uint8))
        assert result.dense.data_ptr() != weight.data_ptr()
        assert result.report.energy == 1.0 and result.report.layer_error == 0.0


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("rule", ["activation=0.01", "energy=0.99"])
def test_a_zero_matrix_stays_zero(rule: str, factored: bool) -> None:
    weight = torch.zeros(10, 30, dtype=torch.bfloat16)
    for covariance in (Covariance(torch.eye(30)), Covariance(torch.zeros(10, 10), "out", 1.0)):
        result = laser.encode(weight, options(rule, factored=factored), covariance)
        assert torch.equal(result.dense, weight)
        assert (result.report.rank, result.report.norm) == (0, "output")
        assert (result.report.energy, result.report.layer_error) == (1.0, 0.0)
        assert result.report.note == "the matrix is zero"
        json.dumps(result.report.document(), allow_nan=False)
        assert laser.look(weight, options(rule), covariance).rank == 0


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_factors_multiply_to_the_best_for_the_output(shape: tuple[int, int], dtype: torch.dtype, side: Side) -> None:
    weight, X = planted(shape, dtype), inputs(shape[1])
    result = laser.encode(weight, options("rank=10", factored=True), seen(weight, X, side))
    assert result.stored.format == Factored(DType.of(dtype), 10)
    A, B = result.stored.parts
    assert A.shape == (shape[0], 10) and B.shape == (10, shape[1])
    expected = torch.from_numpy(best(weight, X, 10))
    for found in (A.double() @ B.double(), result.dense.double()):
        assert (found - expected).norm() < torch.finfo(dtype).eps * expected.norm()
    torch.testing.assert_close(
        A.double().T @ A.double(), torch.eye(10).double(), rtol=0, atol=2 * torch.finfo(dtype).eps
    )
    assert result.report.layer_error == pytest.approx(lost(weight, expected, X), rel=1e-6)


@given(
    rows=st.integers(1, 12),
    cols=st.integers(1, 12),
    rank=st.integers(0, 12),
    tokens=st.integers(0, 15),
    rule=st.sampled_from(["activation=0.1", "energy=0.7", "rho=0.5", "rank=1"]),
    side=st.sampled_from(SIDES),
    factored=st.booleans(),
)
def test_any_shape_has_an_answer(
    *, rows: int, cols: int, rank: int, tokens: int, rule: str, side: Side, factored: bool
) -> None:
    generator = torch.Generator().manual_seed(rows * 400 + cols * 20 + rank)
    rank = min(rank, rows, cols)
    weight = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, cols, generator=generator)
    X = inputs(cols, tokens)
    asked, covariance = options(rule, factored=factored), seen(weight, X, side, tokens)
    alone = laser.report_of(laser.spectrum_in_norm(weight, asked, covariance), asked)
    json.dumps(alone.document(), allow_nan=False)
    if factored and alone.rank * (rows + cols) >= rows * cols:
        with pytest.raises(UsageError, match="save only below rank"):
            laser.encode(weight, asked, covariance)
        return
    result = laser.encode(weight, asked, covariance)
    report = result.report
    assert abs(report.rank - alone.rank) <= 1  # two ways to a value that lies on a threshold
    json.dumps(report.document(), allow_nan=False)
    assert torch.isfinite(result.dense).all()
    assert report.norm == ("output" if tokens else "weights")
    if report.norm == "output" and rank:
        assert report.layer_error == pytest.approx(lost(weight, result.dense, X), rel=1e-3, abs=1e-5)
    if rank:
        assert report.energy == pytest.approx(1 - lost(weight, result.dense), abs=1e-5)


# --- what is refused ---


@pytest.mark.parametrize("rule", THRESHOLDS)
def test_a_threshold_of_noise_has_no_meaning_at_the_output(rule: str) -> None:
    with pytest.raises(UsageError, match=rf"rank rule {rule} finds noise in the weights.*activation=0.01.*rank=512"):
        Options.parse(rule, norm="output")
    assert Options.parse(rule, norm="weights").norm == "weights"
    with pytest.raises(UsageError, match="rank rule mp finds noise"):
        Options(norm="output")


def test_exact_is_refused_at_the_output() -> None:
    with pytest.raises(UsageError, match="leave out --exact"):
        Options.parse("rank=5", exact=True, norm="output")
    assert Options.parse("rank=5", exact=True).exact


@pytest.mark.parametrize("damping", [0.0, -1e-4, 1.0001, math.inf, math.nan])
@pytest.mark.parametrize("norm", ["weights", "output"])
def test_a_damping_that_is_no_share_is_refused(damping: float, norm: str) -> None:
    with pytest.raises(UsageError, match=r"damping \S+ is a share of the inputs' mean square, 1e-08 to 1"):
        Options.parse("rank=5", norm=norm, damping=damping)
    assert Options.parse("rank=5", norm=norm, damping=1.0).damping == 1.0


@pytest.mark.parametrize("norm", ["", "Output", "outputs", "input"])
def test_a_norm_that_there_is_not_is_refused(norm: str) -> None:
    with pytest.raises(UsageError, match=rf"norm '{norm}' is not one of weights, output"):
        Options.parse("rank=5", norm=norm)


@pytest.mark.parametrize("rule", RULES)
def test_the_outputs_norm_asks_for_a_text(rule: str) -> None:
    weight = planted((10, 20))
    for refused in (laser.encode, laser.scan):
        with pytest.raises(UsageError, match="over a calibration text: give it one"):
            refused(weight, options(rule))


def test_bad_input_is_refused() -> None:
    weight, X = planted((30, 60)), inputs(60)
    with pytest.raises(UsageError, match="rank=31: a 30x60 matrix has rank 30 at most"):
        laser.encode(weight, options("rank=31"), seen(weight, X))
    with pytest.raises(UsageError, match="save only below rank 20"):
        laser.encode(weight, options("rank=20", factored=True), seen(weight, X))
    with pytest.raises(TensorError, match=r"does not fit.*expected \[60, 60\], found \[30, 30\]"):
        laser.encode(weight, options("rank=3"), Covariance(torch.eye(30)))
    for bad in (math.nan, math.inf):
        for side in SIDES:
            covariance = seen(weight, X, side)
            covariance.matrix[2, 1] = bad
            with pytest.raises(TensorError, match="NaN or infinity"):
                laser.encode(weight, options("rank=3"), covariance)
        covariance, broken = seen(weight, X), weight.clone()
        broken[3, 5] = bad
        for refused in (laser.encode, laser.look, laser.spectrum_in_norm):
            with pytest.raises(SpectrumError, match=r"\[3, 5\]"):
                refused(broken, options("rank=3"), covariance)


@pytest.mark.parametrize("what", ["dead", "alike", "one token"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_channels_that_are_dead_or_all_alike(shape: tuple[int, int], side: Side, what: str) -> None:
    """Where an inverse of the whitening fails: "the diagonal element 6940 is zero", as a user of SVD-LLM was told."""
    weight, X = planted(shape), inputs(shape[1])
    if what == "dead":
        X[::3] = 0
    elif what == "alike":
        X[1:] = X[:1].clone()
    else:
        X = X[:, :1]
    covariance = seen(weight, X, side, X.shape[1])
    for factored in (False, True):
        result = laser.encode(weight, options("rank=12", factored=factored), covariance)
        assert bool(result.dense.isfinite().all())
        assert result.report.layer_error == pytest.approx(lost(weight, result.dense, X), rel=1e-2, abs=1e-5)
        rest = lost(weight, result.dense)
        assert 0.03 < rest < 0.95  # what no token saw is kept as far as the rank goes
        assert result.report.energy == pytest.approx(1 - rest, abs=1e-3)


def test_without_a_token_activation_keeps_all_in_the_weights_norm() -> None:
    result = laser.encode(planted((30, 60)), options("activation=0.01", "weights"), Covariance(torch.zeros(60, 60)))
    assert result.report.rank == 30
