"""Σ x xᵀ in panels and blocks, against the whole product in float64."""

from __future__ import annotations

import pytest
import torch

from mixtools.errors import TensorError
from mixtools.inference import hessian
from mixtools.inference.hessian import Gram, gram_bytes
from mixtools.names import Role, Slot

SLOT = Slot(Role.DOWN, 1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("block", [None, 7, 32, 70, 100])
@pytest.mark.parametrize("panel", [1, 16, 35, 2048])
def test_it_is_the_product(dtype: torch.dtype, block: int | None, panel: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "PANEL", panel)
    x = torch.randn(90, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    gram = Gram(70, block=block)
    for part in torch.split(x, 40):
        gram.add(part)
    gram.settle(SLOT)
    expected = x.double().T @ x.double()
    assert gram.tokens == 90
    torch.testing.assert_close(gram.magnitude.double(), x.double().abs().sum(0), rtol=1e-6, atol=0)
    assert sum(map(len, gram.blocks)) == 70 and [*gram.starts] == [*range(0, 70, min(block or 70, 70))]
    for at, found in zip(gram.starts, gram.blocks, strict=True):
        part = slice(at, at + len(found))
        torch.testing.assert_close(found.double(), expected[part, part], rtol=0, atol=1e-4)
        assert torch.equal(found, found.T)


def test_what_is_no_number_is_told_by_its_column() -> None:
    gram = Gram(40, block=16)
    rows = torch.ones(3, 40)
    rows[1, 33] = float("nan")
    gram.add(rows)
    with pytest.raises(TensorError, match="not finite in column 33") as caught:
        gram.settle(SLOT)
    assert str(caught.value.tensor) == str(SLOT)


def test_bytes() -> None:
    for width, block in ((64, None), (64, 16), (64, 100)):
        gram = Gram(width, block=block)
        assert gram_bytes(width, block) == sum(part.nbytes for part in gram.blocks) + gram.magnitude.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_gpu_multiplies_16_bits_as_they_are(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To fp32, which only a GPU's torch.mm gives, as here; and 32 bits by nothing less."""
    monkeypatch.setattr(hessian, "fp32_from_16_bits", lambda x: x.dtype.itemsize == 2)
    monkeypatch.setattr(hessian, "PANEL", 5)
    products = []

    def mm(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        assert left.dtype == right.dtype == dtype and out_dtype == torch.float32
        products.append(left.shape)
        return left.float() @ right.float()

    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain, gram = Gram(12), Gram(12)
    plain.add(x.float())
    monkeypatch.setattr(torch, "mm", mm)
    gram.add(x)
    assert products == ([] if dtype == torch.float32 else [(12, 30), (7, 30), (2, 30)])
    torch.testing.assert_close(gram.blocks[0].tril(), plain.blocks[0].tril())
