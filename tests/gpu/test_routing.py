"""From the stream to the experts, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops.gpu import launch, library, reference

EPS = 1e-5


def inputs(tokens: int, columns: int, experts: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(tokens, columns, generator=random).to(dtype)
    norm = (1 + 0.2 * torch.randn(columns, generator=random)).to(dtype)
    return x, norm, torch.randn(experts, columns, generator=random) / columns**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "experts", "choices"),
    [(1, 512, 8, 2), (3, 1024, 8, 2), (8, 100, 8, 2), (2, 513, 5, 3), (2, 7, 1, 1), (2, 1600, 16, 16), (1, 5000, 8, 2)],
)
def test_routing(tokens, columns, experts, choices, dtype):
    x, norm, router = inputs(tokens, columns, experts, dtype)
    poison = torch.full((tokens, columns), torch.nan, dtype=dtype)
    weights = torch.full((tokens + 2, choices), torch.nan)
    chosen = torch.full((tokens + 2, choices), -7)
    launch.route(x, norm, router, EPS, poison, weights[1:-1], chosen[1:-1]).run()
    assert torch.isnan(weights[[0, -1]]).all() and (chosen[[0, -1]] == -7).all()
    normed, wanted_weights, wanted = reference.route(x, norm, router, EPS, choices)
    # the interpreter cuts bf16 off where a GPU rounds: twice here
    digits = {torch.float32: 2.0**-21, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
    torch.testing.assert_close(poison.float(), normed.float(), rtol=digits, atol=1e-6)
    # with the x that it made itself
    logits = poison.float() @ router.T
    order = logits.sort(descending=True, stable=True)
    torch.testing.assert_close(logits.gather(1, chosen[1:-1]), order.values[:, :choices], rtol=0, atol=1e-5)
    shares = logits.gather(1, chosen[1:-1]).softmax(-1)
    torch.testing.assert_close(weights[1:-1], shares, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(weights[1:-1].sum(1), torch.ones(tokens), rtol=1e-6, atol=0)
    assert all(len(set(row)) == choices for row in chosen[1:-1].tolist())
    if dtype == torch.float32:
        assert torch.equal(chosen[1:-1], wanted)
        torch.testing.assert_close(weights[1:-1], wanted_weights, rtol=1e-4, atol=1e-6)


def test_of_equal_experts_the_first():
    x, norm, router = inputs(4, 64, 8, torch.float32)
    router[3] = router[6] = router[1]
    _, weights, experts = library.route(x, norm, torch.zeros_like(router), EPS, 2)
    assert experts.tolist() == [[0, 1]] * 4 and torch.equal(weights, torch.full((4, 2), 0.5))
    _, _, experts = library.route(x, norm, router, EPS, 8)
    for row in experts.tolist():
        assert [expert for expert in row if expert in (1, 3, 6)] == [1, 3, 6]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_of_what_is_no_number_an_expert_that_there_is():
    """Its planes are read: beyond the last there is other memory, or none."""
    x, norm, router = inputs(2, 64, 5, torch.float32)
    x[1, 3] = torch.nan
    _, weights, experts = library.route(x, norm, router, EPS, 2)
    assert weights[0].isfinite().all() and weights[1].isnan().all()
    assert bool(((experts >= 0) & (experts < 5)).all())


def test_large_logits_do_not_overflow():
    x, norm, router = inputs(2, 64, 8, torch.float32)
    _, weights, _ = library.route(x, norm, router * 1e4, EPS, 2)
    assert torch.isfinite(weights).all() and torch.equal(weights.sum(1), torch.ones(2))


def test_routing_is_a_well_formed_operation():
    x, norm, router = inputs(2, 40, 8, torch.float32)
    opcheck(library.gpu_route, (x, norm, router, EPS, 2))
    assert torch.equal(
        library.route(x.T.contiguous().T, norm, router, EPS, 2)[0], library.route(x, norm, router, EPS, 2)[0]
    )
    for wrong in ((x, norm.half(), router), (x, norm[:3], router), (x, norm, router.half()), (x[:, :5], norm, router)):
        with pytest.raises(MixtoolsError, match="fit"):
            library.route(*wrong, EPS, 2)
    with pytest.raises(MixtoolsError, match="9 of 8 experts"):
        library.route(x, norm, router, EPS, 9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 512), (3, 1024), (8, 100), (2, 513), (2, 7)])
def test_normalising_is_what_routing_makes(tokens, columns, dtype):
    x, norm, router = inputs(tokens, columns, 8, dtype)
    found = library.normalise(x, norm, EPS)
    assert torch.equal(found, library.route(x, norm, router, EPS, 2)[0])
    digits = {torch.float32: 2.0**-21, torch.float16: 2.0**-9, torch.bfloat16: 2.0**-6}[dtype]
    torch.testing.assert_close(found, reference.normalise(x, norm, EPS), rtol=digits, atol=1e-6)


def test_normalising_is_a_well_formed_operation():
    x, norm, _ = inputs(2, 40, 8, torch.float32)
    opcheck(library.gpu_normalise, (x, norm, EPS))
    for wrong in ((x, norm.half()), (x, norm[:3]), (x[0], norm)):
        with pytest.raises(MixtoolsError, match="fit"):
            library.normalise(*wrong, EPS)
