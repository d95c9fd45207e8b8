"""Rotary positions and a cache's new column, in Triton's interpreter, against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops.gpu import library, reference

CAPACITY = 11


def made(texts: int, heads: int, groups: int, size: int, dtype: torch.dtype, *, tables: int = 1) -> dict[str, Any]:
    """q, k and v beside each other as one product makes them; a cache of NaN; a column of its own for each text."""
    random = torch.Generator().manual_seed(size)
    both = torch.randn(texts, heads + 2 * groups, size, generator=random).to(dtype)
    angles = torch.rand(tables, CAPACITY, size // 2, generator=random) * 6
    seen = torch.tensor([[text, 3 * text + 2] for text in range(texts)], dtype=torch.int32)
    keys, values = torch.full((2, texts, groups, CAPACITY, size), torch.nan, dtype=dtype)
    heads_of = torch.split(both, [heads, groups, groups], 1)
    return {"heads": heads_of, "tables": (angles.cos(), angles.sin()), "seen": seen, "keys": keys, "values": values}


def same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "tables"), [((1, 4, 2, 32), 1), ((3, 6, 2, 16), 1), ((3, 2, 2, 4), 3)])
def test_turning(shape, tables, dtype):
    given = made(*shape, dtype, tables=tables)
    keys, values = given["keys"].clone(), given["values"].clone()
    found = library.turn(**given)
    wanted = reference.turn(**{**given, "keys": keys, "values": values})
    assert same(values, given["values"]) and int(values.isnan().sum()) == values.numel() * (CAPACITY - 1) // CAPACITY
    if dtype == torch.bfloat16:  # which the interpreter cuts off
        torch.testing.assert_close(found, wanted, rtol=2.0**-7, atol=0)
        torch.testing.assert_close(given["keys"], keys, rtol=2.0**-7, atol=0, equal_nan=True)
    else:
        assert torch.equal(found, wanted) and same(keys, given["keys"])


def test_heads_that_lie_apart():
    given = made(2, 4, 2, 16, torch.float32)
    other = {**given, "keys": given["keys"].clone(), "values": given["values"].clone()}
    apart = tuple(torch.stack([one, one], -1)[..., 0] for one in given["heads"])
    assert torch.equal(library.turn(**given), library.turn(**{**other, "heads": apart}))
    assert same(given["keys"], other["keys"]) and same(given["values"], other["values"])


def test_turning_is_a_well_formed_operation():
    given = made(2, 4, 2, 16, torch.float32)
    q, k, v = given["heads"]
    cos, sin = given["tables"]
    seen, keys, values = given["seen"], torch.zeros(2, 2, CAPACITY, 16), torch.zeros(2, 2, CAPACITY, 16)
    opcheck(library.gpu_turn, (q, k, v, cos, sin, seen, keys, values))
    refused: list[tuple[Tensor, ...]] = [
        (q[..., :12], k[..., :12], v[..., :12], cos[..., :6], sin[..., :6], keys[..., :12], values[..., :12]),
        (q, k[:1], v[:1], cos, sin, keys, values), (q, k, v.half(), cos, sin, keys, values),
        (q, k, v, cos[:, :5], sin[:, :5], keys, values), (q, k, v, cos.half(), sin.half(), keys, values),
        (q, k, v, cos, sin, keys[:, :1], values[:, :1]), (q, k, v, cos, sin, keys.transpose(2, 3), values),
    ]  # fmt: skip
    for q, k, v, cos, sin, keys, values in refused:
        with pytest.raises(MixtoolsError, match="into a cache of"):
            library.turn((q, k, v), (cos, sin), seen, keys, values)
