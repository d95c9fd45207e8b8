"""Grids and rounding: against plain loops, and the error that may only fall."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mixtools.formats import Awq, Gptq, Int8, Nf4, PackedInts
from mixtools.linalg import ldl
from mixtools.linalg.few import Few, Hessian, energy, near
from mixtools.linalg.ldl import factor
from mixtools.methods.quantize import matrix, rounding
from mixtools.methods.quantize.grid import Groups, Scheme
from mixtools.methods.quantize.grid_bnb import AbsMax
from mixtools.methods.quantize.grid_ggml import Blocks
from mixtools.methods.quantize.matrix import Options
from mixtools.methods.quantize.rounding import Given
from mixtools.ops.cpu import NATIVE
from mixtools.storage.dtypes import DType

WIDE, ROWS = 256, 64
GROUPED = [
    Groups(Gptq(4, 128), 1), Groups(Gptq(3, 32), 1), Groups(Gptq(2, 64), 1), Groups(Gptq(8, -1), 1), Groups(Awq(128)),
    Groups(Awq(-1)), Groups(PackedInts(4, 32, DType.BF16, symmetric=False)), Groups(PackedInts(8, 128, DType.BF16)),
]  # fmt: skip
SCHEMES: list[Scheme] = [*GROUPED, AbsMax(Nf4()), AbsMax(Int8()), *map(Blocks, sorted(NATIVE, key=str))]


def name(scheme: object) -> str:
    return str(getattr(scheme, "type", None) or getattr(scheme, "format", ""))


def data(seed: int = 0, columns: int = WIDE, rows: int = ROWS) -> tuple[Tensor, Tensor]:
    """Weights [in, out], and the Hessian of inputs that are correlated and of channels that differ."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(columns, rows, generator=generator) * 0.02
    mixed = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    x = mixed * torch.logspace(-1, 1, columns)[torch.randperm(columns, generator=generator)]
    return weights, x.T @ x / 600


def made(scheme: Scheme, options: Options, seed: int = 0) -> tuple[rounding.Rounded, Tensor, Tensor]:
    weights, hessian = data(seed)
    found = matrix.prepared(hessian, options)
    return (
        matrix.quantize(weights, hessian.diagonal(), scheme, options, found, hessian=hessian),
        weights,
        hessian,
    )


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_what_is_packed_is_what_was_rounded(scheme: Scheme) -> None:
    """A reader's dense matrix is the grid's, but for the rounding to its dtype; errors are what is missing to it."""
    for options in (Options("nearest"), Options(sweeps=0), Options(sweeps=2)):
        found, weights, _ = made(scheme, options)
        packed = scheme.pack([(found.grid, found.codes)])
        parts = packed.format.parts((ROWS, WIDE))
        if not isinstance(scheme, Blocks):
            assert [(DType.of(part.dtype), tuple(part.shape)) for part in packed.parts] == [part[1:] for part in parts]
        wide = packed.format.to(DType.F32) if hasattr(packed.format, "to") else packed.format
        dense = wide.decode(packed.parts).float().T
        torch.testing.assert_close(dense, weights - found.errors, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_each_step_costs_less(scheme: Scheme) -> None:
    results = [made(scheme, options) for options in (Options("nearest"), Options(sweeps=0), Options(sweeps=1))]
    lost = [energy(hessian, found.errors) for found, _, hessian in results]
    assert lost[1] < 0.9 * lost[0] and lost[2] < lost[1]


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_a_sweep_never_loses(scheme: Scheme) -> None:
    weights, hessian = data(3)
    found = matrix.quantize(weights, hessian.diagonal(), scheme, Options(sweeps=0), matrix.prepared(hessian, Options()))
    damped = hessian + 0.05 * hessian.diagonal().mean() * torch.eye(WIDE)
    before = [(damped @ found.errors * found.errors).sum(0)]
    for _ in range(4):
        (found,) = rounding.sweep([Given(weights, factor(hessian, 0.05), hessian)], [found], scheme)
        before.append((damped @ found.errors * found.errors).sum(0))
    for one, other in itertools.pairwise(before):
        assert (other <= one * (1 + 1e-4)).all()  # in each row


def test_second_order_is_the_loop() -> None:
    """Column by column, in float64, of one row at a time."""
    weights, hessian = data(5, 160, 7)
    scheme = Groups(Gptq(4, 32), 1)
    grid, found = scheme.grid(weights, hessian.diagonal()), factor(hessian, 0.05)
    (rounded,) = rounding.second_order([Given(weights, found)], [grid])
    feedback, order = found.feedback.double(), found.order.tolist()
    agree = 0
    for row in range(7):
        errors: list[float] = []
        for place, column in enumerate(order):
            target = float(weights[column, row])
            target += sum(error * float(feedback[i, place]) for i, error in enumerate(errors))
            scale, least = float(grid.scale[column // 32, row]), float(grid.min[column // 32, row])
            code = min(15, max(0, round((target - least) / scale)))
            agree += code == int(rounded.codes[column, row])
            code = int(rounded.codes[column, row])  # so that a tie does not lead apart
            errors.append(float(weights[column, row]) - (scale * code + least))
    assert agree > 0.999 * 7 * 160


def test_order_and_groups_keep_their_places() -> None:
    """Activation order needs no g_idx: each column's scale is that of the group that it stands in."""
    weights, hessian = data(6)
    scheme = Groups(Gptq(4, 64), 1)
    grid = scheme.grid(weights, hessian.diagonal())
    (found,) = rounding.second_order([Given(weights, factor(hessian, 0.05))], [grid])
    for group in range(4):
        part = slice(64 * group, 64 * (group + 1))
        values = grid.scale[group] * found.codes[part].float() + grid.min[group]
        torch.testing.assert_close(weights[part] - found.errors[part], values, rtol=0, atol=1e-7)


@pytest.mark.parametrize("scheme", [Groups(Awq(64)), AbsMax(Nf4()), Blocks(DType.Q4_K)], ids=name)
@pytest.mark.parametrize("few", [False, True], ids=["whole", "few"])
def test_trials_lose_what_rounding_them_would(scheme: Scheme, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All at once, each matrix with an order, feedback and scales of its own; more columns than one block or panel."""
    monkeypatch.setattr(ldl, "PANEL", 192)
    trials, expected = [], []
    for seed in range(3):
        weights, hessian = data(seed, rows=24)
        read: Hessian = Few(torch.randn(40, WIDE, generator=torch.Generator().manual_seed(seed))) if few else hessian
        found = factor(read, 0.05)
        assert len(found.panels) == (2 if few else 1)
        added = 0.05 * float(read.diagonal().double().mean())
        scales = torch.stack([torch.ones(WIDE), torch.logspace(-1, 1, WIDE), torch.logspace(1, -0.5, WIDE)])
        grids = [scheme.grid(weights * scale[:, None], read.diagonal() / scale.square()) for scale in scales]
        trials.append(rounding.Trial(weights, found, added, scales, grids))
        whole = near(read, slice(None)).double()
        for scale, grid in zip(scales.double(), grids, strict=True):
            damped = (whole + added * torch.eye(WIDE)) / scale[:, None] / scale
            alone = Given((weights * scale[:, None]).float(), factor(damped.float(), 0.0, found.order))
            (own,) = rounding.second_order([alone], [grid])
            errors = own.errors.double() / scale[:, None]
            expected.append(float((errors * (whole @ errors)).sum()))
    lost = rounding.lost(trials)
    assert lost.flatten().tolist() == pytest.approx(expected, rel=3e-3)
    assert not float(lost.std(1).min()) < 1e-3 * float(lost.mean())  # what is tried differs
    for number, trial in enumerate(trials):  # whoever is beside it
        assert torch.equal(rounding.lost([trial]), lost[number : number + 1])


def test_a_trial_whose_errors_are_no_numbers_says_so() -> None:
    weights, hessian = data(7)
    scheme, found = Groups(Awq(64)), factor(hessian, 0.05)
    trials = []
    for value in (1.0, float("nan"), float("inf")):
        grid, other = scheme.grid(weights, hessian.diagonal()), weights.clone()
        other[3, 5] *= value
        trials.append(rounding.Trial(other, found, 0.1, torch.ones(1, WIDE), [grid]))
    assert rounding.lost(trials).isnan().flatten().tolist() == [False, True, True]


# --- grids ---


@pytest.mark.parametrize("scheme", GROUPED, ids=name)
def test_the_range_with_the_least_error(scheme: Groups) -> None:
    weights, hessian = data(1)
    weights[5, 3] = 0.4  # an outlier that costs more than it is worth, in a column that hardly counts
    power = hessian.diagonal().clone()
    power[5] = 1e-9
    chosen, whole = scheme.grid(weights, power), replace(scheme, clips=(1.0,)).grid(weights, power)

    def lost(grid: object) -> Tensor:
        assert isinstance(grid, type(chosen))
        return ((weights - grid.values(grid.nearest(weights))).square() * power[:, None]).sum(0)

    assert (lost(chosen) <= lost(whole) * (1 + 1e-6)).all()
    assert lost(chosen)[3] < lost(whole)[3] or scheme.format.bits == 8
    assert chosen.clip is not None and 0.5 <= chosen.clip < 1 and whole.clip == 1


@pytest.mark.parametrize("scheme", SCHEMES, ids=name)
def test_zero_and_constant_columns_and_rows(scheme: Scheme) -> None:
    weights, hessian = data(2)
    weights[:, 0] = 0
    weights[:, 1] = 0.25
    weights[7] = 0
    weights[:, 2] = 1e-9
    hessian[9] = 0
    hessian[:, 9] = 0
    found = matrix.quantize(
        weights, hessian.diagonal(), scheme, Options(), matrix.prepared(hessian, Options()), hessian=hessian
    )
    dense = scheme.pack([(found.grid, found.codes)]).dense.float().T
    assert torch.isfinite(dense).all()
    assert (dense[:, 0] == 0).all()
    assert (dense[:, 1] - 0.25).abs().median() < 0.1  # at two bits a column may be rounded down for the others' sake
    assert dense[:, 2].abs().max() < 1e-6


def test_no_hessian_is_nearest() -> None:
    weights, _ = data()
    none = torch.zeros(WIDE, WIDE)
    assert matrix.prepared(none, Options()) is None
    found = matrix.quantize(weights, none.diagonal(), GROUPED[0], Options(), None, hessian=none)
    grid = GROUPED[0].grid(weights, torch.ones(WIDE))
    assert torch.equal(found.codes, grid.nearest(weights))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["nearest", "second-order"]), st.integers(0, 2))
def test_codes_are_on_their_grid(seed: int, how: str, sweeps: int) -> None:
    """And a matrix cut into runs of columns is packed as one."""
    weights, hessian = data(seed, 128, 32)
    scheme = Groups(PackedInts(4, 32, DType.F16, symmetric=False))
    parts = []
    for part in (slice(0, 64), slice(64, 128)):
        options, own = Options(how, sweeps=sweeps), hessian[part, part]
        found = matrix.prepared(own, options)
        made = matrix.quantize(weights[part], own.diagonal(), scheme, options, found, hessian=own)
        assert int(made.codes.max()) <= 15
        parts.append(made)
    packed = scheme.pack([(made.grid, made.codes) for made in parts])
    dense = packed.format.to(DType.F32).decode(packed.parts).T
    expected = torch.cat([weights[:64] - parts[0].errors, weights[64:] - parts[1].errors])
    torch.testing.assert_close(dense, expected, rtol=2e-6, atol=1e-7)
