"""Few inputs, kept as rows, are the Hessian that they stand for: the same factor, codes and figures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtools import errors
from mixtools.formats import Gptq
from mixtools.inference.hessian import Gram, Rows
from mixtools.linalg import ldl
from mixtools.linalg.few import Few, energy, near
from mixtools.linalg.ldl import factor
from mixtools.methods.quantize import matrix, rounding
from mixtools.methods.quantize.grid import Groups, Scheme
from mixtools.methods.quantize.grid_ggml import Blocks
from mixtools.methods.quantize.matrix import Options
from mixtools.methods.quantize.rounding import Given
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

WIDE, OUT, TOKENS = 512, 48, 60

DOWN = Slot(Role.DOWN, 0, 0)


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights [in, out], and rows of inputs [k, in] that are correlated and whose channels differ."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(WIDE, OUT, generator=generator) * 0.02
    mixed = torch.randn(TOKENS, 20, generator=generator) @ torch.randn(20, WIDE, generator=generator)
    x = mixed + torch.randn(TOKENS, WIDE, generator=generator)
    return weights, x * torch.logspace(-1, 1, WIDE)[torch.randperm(WIDE, generator=generator)]


def test_it_is_the_hessian() -> None:
    _, x = data()
    few, whole = Few(x), x.T @ x
    assert len(few) == WIDE
    torch.testing.assert_close(few.diagonal(), whole.diagonal())
    torch.testing.assert_close(near(few, slice(3, 9)), whole[3:9, 3:9])
    other = torch.randn(WIDE, 5)
    torch.testing.assert_close(few @ other, whole @ other, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
    assert energy(few, other) == pytest.approx(energy(whole, other), rel=1e-5)
    scale = torch.rand(WIDE) + 0.5
    torch.testing.assert_close(few.divided(scale).diagonal(), matrix.scaled(whole, scale).diagonal())


@pytest.mark.parametrize("panel", [32, 100, 512, 4096])
def test_the_factor_asks_the_same_of_columns(panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64, for errors of any size: a target is what the whole matrix U says."""
    monkeypatch.setattr(ldl, "PANEL", panel)
    _, x = data(1)
    x, generator = x.double(), torch.Generator().manual_seed(2)
    order = torch.randperm(WIDE, generator=generator)
    one, few = factor(x.T @ x, 0.05, order), factor(Few(x), 0.05, order)
    assert len(few.panels) == -(-WIDE // panel)
    torch.testing.assert_close(few.pivots, one.pivots, rtol=1e-8, atol=0)
    missed = torch.randn(WIDE, 3, generator=generator, dtype=torch.float64)
    expected = one.feedback.triu(1).T @ missed
    carried, found = torch.zeros(TOKENS, 3, dtype=torch.float64), []
    for start, feedback, inputs, gain in few.panels:
        assert inputs is not None and gain is not None
        base = inputs.T @ carried
        mine = missed[start : start + len(feedback)] + base
        found.append(base + feedback.triu(1).T @ mine)
        carried += gain @ mine
    torch.testing.assert_close(torch.cat(found), expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("scheme", [Groups(Gptq(4, 128), 1), Blocks(DType.Q4_K), Blocks(DType.Q3_K)], ids=str)
@pytest.mark.parametrize("panel", [128, 384, 1024])
def test_codes_and_error_are_the_same(scheme: Scheme, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ldl, "PANEL", panel)
    weights, x = data(3)
    whole, few = x.T @ x, Few(x)
    for options in (Options(sweeps=0), Options(sweeps=2)):
        results = []
        for hessian in (whole, few):
            found = matrix.prepared(hessian, options)
            results.append(matrix.quantize(weights, hessian.diagonal(), scheme, options, found, hessian=hessian))
        one, other = results
        assert float((one.codes == other.codes).float().mean()) > 0.995
        assert energy(whole, other.errors) == pytest.approx(energy(whole, one.errors), rel=1e-2)
        torch.testing.assert_close(weights - other.errors, other.grid.values(other.codes))


def test_a_sweep_over_few_inputs_never_loses() -> None:
    weights, x = data(4)
    scheme, few = Groups(Gptq(4, 128), 1), Few(x)
    made = matrix.quantize(weights, few.diagonal(), scheme, Options(sweeps=0), matrix.prepared(few, Options()))
    damped = x.T @ x + 0.05 * few.diagonal().mean() * torch.eye(WIDE)
    for _ in range(3):
        (after,) = rounding.sweep([Given(weights, matrix.prepared(few, Options()), few)], [made], scheme)
        one, other = ((damped @ found.errors * found.errors).sum(0) for found in (made, after))
        assert (other <= one * (1 + 1e-4)).all() and other.sum() < one.sum()
        made = after


def test_rows_are_a_gram() -> None:
    _, x = data(5)
    gram, rows = Gram(WIDE), Rows(WIDE, TOKENS)
    for part in torch.split(x.bfloat16(), 17):
        gram.add(part)
        rows.add(part)
    gram.settle(DOWN)
    rows.settle(DOWN)
    assert (rows.tokens, [*rows.starts]) == (gram.tokens, [*gram.starts])
    torch.testing.assert_close(rows.magnitude, gram.magnitude)
    torch.testing.assert_close(rows.blocks[0] @ torch.eye(WIDE), gram.blocks[0], rtol=1e-4, atol=1e-3)


def test_what_is_no_number_is_told_by_its_column() -> None:
    for value in (float("nan"), float("inf"), 1e30):
        rows = Rows(WIDE, 2)
        x = torch.ones(2, WIDE)
        x[1, 300] = value
        rows.add(x)
        with pytest.raises(errors.TensorError, match="not finite in column 300"):
            rows.settle(DOWN)


def test_nothing_to_factor_and_more_damping() -> None:
    with pytest.raises(errors.SpectrumError, match="cannot be factored"):
        factor(Few(torch.zeros(3, 8)), 0.01)
    assert factor(Few(torch.ones(3, 40) * 1e3), 0.0).damping > 0  # of rank 1: nothing without damping
