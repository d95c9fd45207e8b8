"""Attention of a few new tokens over a cache, in Triton's interpreter, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixtools.errors import MixtoolsError
from mixtools.ops.gpu import launch, library, reference

SHAPES = {  # batch, heads, groups, tokens, head size, columns so far
    "one token alone": (1, 4, 2, 1, 16, 1),
    "one token": (1, 8, 2, 1, 32, 37),
    "a chunk to the end": (1, 4, 1, 1, 16, launch.CHUNK),
    "a chunk and one": (1, 4, 4, 1, 16, launch.CHUNK + 1),
    "tokens that begin a text": (1, 4, 2, 5, 16, 5),
    "tokens across the edge of a chunk": (1, 4, 2, 8, 16, launch.CHUNK + 3),
    "three queries a group": (2, 6, 2, 2, 16, 40),
    "two texts": (2, 4, 2, 3, 16, 2 * launch.CHUNK + 9),
}


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, int]:
    """q, keys and values with more room than is filled, where they are NaN; and how many columns are."""
    batch, heads, groups, tokens, size, length = SHAPES[name]
    random = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads, tokens, size, generator=random).to(dtype)
    keys, values = torch.randn(2, batch, groups, length + 7, size, generator=random).to(dtype)
    keys[:, :, length:] = values[:, :, length:] = torch.nan
    return q, keys, values, length


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, dtype):
    q, keys, values, length = made(name, dtype)
    found = library.attend(q, keys, values, length)
    wanted = reference.attend(q, keys, values, length)
    assert found.dtype == dtype and found.shape == q.shape
    digits = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]  # bf16 is cut off there
    torch.testing.assert_close(found.double(), wanted, rtol=digits, atol=3e-6)


def test_large_scores_do_not_overflow():
    q, keys, values, length = made("two texts")
    found = library.attend(q * 1e3, keys, values, length)
    torch.testing.assert_close(found.double(), reference.attend(q * 1e3, keys, values, length), rtol=1e-3, atol=1e-3)


def test_a_token_is_what_it_is_alone():
    """Later tokens of a pass change nothing of an earlier one, nor does the other text."""
    q, keys, values, length = made("tokens across the edge of a chunk")
    whole = library.attend(q, keys, values, length)
    for token in (0, 4, 7):
        alone = library.attend(q[:, :, token : token + 1], keys, values, length - 7 + token)
        assert torch.equal(alone[:, :, 0], whole[:, :, token])
    q, keys, values, length = made("two texts")
    assert torch.equal(library.attend(q[1:], keys[1:], values[1:], length), library.attend(q, keys, values, length)[1:])


def test_attention_is_a_well_formed_operation():
    q, keys, values, length = made("one token alone")
    torch.library.opcheck(library.gpu_attend, (q, keys, values, length))
    refused = [
        (q[:, :3], keys, values, 1), (q[..., :12], keys[..., :12], values[..., :12], 1), (q, keys, values, 0),
        (q, keys, values, 9), (q, keys, values.half(), 1), (q, keys[:, :1], values, 1), (q[0], keys, values, 1),
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(MixtoolsError, match="attention of"):
            library.attend(*wrong)
