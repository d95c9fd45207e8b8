"""Operations on tensors: schema, shape function and kernel agree with each other and with plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from card import Card, OnCard
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops import library as ops

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int8, torch.bool, torch.int64]
MATRICES = {
    "plain": lambda: torch.randn(50, 70),
    "one row": lambda: torch.randn(1, 9),
    "one column": lambda: torch.randn(9, 1),
    "no rows": lambda: torch.randn(0, 4),
    "band": lambda: torch.randn(40, 90)[:, 3:77],
    "every second row": lambda: torch.randn(41, 64)[::2],
    "every second column": lambda: torch.randn(40, 64)[:, ::2],
    "transposed": lambda: torch.randn(33, 65).t(),
    "one expert of a stack": lambda: torch.randn(3, 64, 96)[1],
    "repeated row": lambda: torch.randn(1, 80).expand(70, 80),
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MATRICES)
def test_transpose_equals_torch(isa, name, dtype):
    weight = MATRICES[name]().mul(50).to(dtype)
    result = ops.transpose(weight, threads=2)
    assert result.dtype == dtype
    assert result.is_contiguous()
    assert torch.equal(result, weight.t())
    assert torch.equal(result, ops.transpose_reference(weight))


@pytest.mark.parametrize("there", [False, True], ids=["cpu", "card"])
@pytest.mark.parametrize("name", MATRICES)
def test_turned_and_dense_where_they_lie(name, there):
    weight = MATRICES[name]().mul(50).to(torch.uint8)
    with Card():
        given = weight.to("cuda") if there else weight
        turned, dense = ops.turned(given), ops.dense(given)
    assert (dense is given) == weight.is_contiguous()
    for found, expected in ((turned, weight.t()), (dense, weight)):
        assert isinstance(found, OnCard) is there and found.is_contiguous()
        assert torch.equal(found.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", MATRICES)
def test_transpose_is_a_well_formed_operation(name):
    opcheck(ops.transpose, (MATRICES[name]().bfloat16(),))
    opcheck(ops.transpose, (MATRICES[name](), 2))


def test_transpose_of_a_parameter():
    weight = torch.nn.Parameter(torch.randn(20, 30))
    assert torch.equal(torch.ops.mixtools.transpose(weight), weight.detach().t())


def test_transpose_keeps_every_bit():
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(256, 256)
    assert torch.equal(ops.transpose(bits.view(torch.bfloat16)).view(torch.int16), bits.t())


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, 2, 2), torch.zeros(2, 2, dtype=torch.complex64)])
def test_transpose_refuses_what_is_no_real_matrix(wrong):
    with pytest.raises(MixtoolsError, match="takes a real matrix"):
        ops.transpose(wrong)


def spoilt(shape: tuple[int, ...], *marks: tuple[int, float]) -> torch.Tensor:
    values = torch.randn(shape)
    for index, value in marks:
        values.view(-1)[index] = value
    return values


VALUES = {
    "finite": lambda: torch.randn(3000),
    "empty": lambda: torch.randn(0),
    "scalar": lambda: torch.tensor(math.inf),
    "nan and then inf": lambda: spoilt((3000,), (700, math.nan), (900, -math.inf)),
    "last": lambda: spoilt((40, 50), (1999, math.nan)),
    "transposed": lambda: spoilt((40, 50), (154, math.inf), (101, math.nan)).t(),
    "largest": lambda: torch.full((100,), 60000.0),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", VALUES)
def test_first_nonfinite_equals_torch(isa, name, dtype):
    values = VALUES[name]().to(dtype)
    found = ops.first_nonfinite(values, threads=2)
    assert found.dtype == torch.int64
    assert torch.equal(found, ops.first_nonfinite_reference(values))
    flat = [float(value) for value in values.flatten()]
    expected = next((i for i, value in enumerate(flat) if value - value != 0), -1)
    assert found.item() == expected


@pytest.mark.parametrize("name", VALUES)
def test_first_nonfinite_is_a_well_formed_operation(name):
    opcheck(ops.first_nonfinite, (VALUES[name](),))
    opcheck(ops.first_nonfinite, (VALUES[name]().bfloat16(), 2))


def test_first_nonfinite_refuses_what_has_none():
    with pytest.raises(MixtoolsError, match="not torch.int32"):
        ops.first_nonfinite(torch.zeros(3, dtype=torch.int32))
