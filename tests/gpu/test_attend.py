"""Attention of a few new tokens over a cache, in Triton's interpreter, against torch's in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from well_formed import opcheck

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
    "many chunks": (1, 2, 1, 1, 16, 37 * launch.CHUNK + 9),
}


def made(name: str, dtype: torch.dtype = torch.float32, room: int = 7) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, keys and values with more room than is filled, where they are NaN; and which columns are seen."""
    batch, heads, groups, tokens, size, length = SHAPES[name]
    random = torch.Generator().manual_seed(length)
    q = torch.randn(batch, heads, tokens, size, generator=random).to(dtype)
    keys, values = torch.randn(2, batch, groups, length, size, generator=random).to(dtype)
    keys, values = (torch.nn.functional.pad(one, (0, 0, 0, room), value=torch.nan) for one in (keys, values))
    return q, keys, values, spans(*[(0, length)] * batch)


def spans(*each: tuple[int, int]) -> Tensor:
    return torch.tensor(each, dtype=torch.int32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_attention(name, dtype):
    q, keys, values, seen = made(name, dtype)
    found = library.attend(q, keys, values, seen)
    wanted = reference.attend(q, keys, values, seen)
    assert found.dtype == dtype and found.shape == q.shape
    digits = {torch.float32: 0.0, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-7}[dtype]  # bf16 is cut off there
    torch.testing.assert_close(found.double(), wanted, rtol=digits, atol=3e-6)


def test_large_scores_do_not_overflow():
    q, keys, values, seen = made("two texts")
    found = library.attend(q * 1e3, keys, values, seen)
    torch.testing.assert_close(found.double(), reference.attend(q * 1e3, keys, values, seen), rtol=1e-3, atol=1e-3)


def test_a_token_is_what_it_is_alone():
    """Later tokens of a pass change nothing of an earlier one, nor does the other text."""
    q, keys, values, seen = made("tokens across the edge of a chunk")
    whole = library.attend(q, keys, values, seen)
    for token in (0, 4, 7):
        before = spans((0, int(seen[0, 1]) - 7 + token))
        alone = library.attend(q[:, :, token : token + 1], keys, values, before)
        assert torch.equal(alone[:, :, 0], whole[:, :, token])
    q, keys, values, seen = made("two texts")
    alone = library.attend(q[1:], keys[1:], values[1:], seen[1:])
    assert torch.equal(alone, library.attend(q, keys, values, seen)[1:])


@pytest.mark.parametrize(
    "first", [1, 8, launch.CHUNK * 3 // 4, launch.CHUNK - 1, launch.CHUNK, launch.CHUNK + 5, 2 * launch.CHUNK + 5]
)
def test_columns_before_the_first_that_is_seen(first):
    """Padding, or what a sliding window hides: NaN there changes nothing, and the other text sees all."""
    q, keys, values, seen = made("two texts")
    seen[1, 0] = first
    keys[1, :, :first] = values[1, :, :first] = torch.nan
    found = library.attend(q, keys, values, seen)
    keys[1, :, :first] = values[1, :, :first] = 0
    torch.testing.assert_close(found.double(), reference.attend(q, keys, values, seen), rtol=0, atol=3e-6)


def test_room_beyond_what_is_seen_changes_nothing():
    found = [library.attend(*made("two texts", room=room)) for room in (0, 1, 3 * launch.CHUNK)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_attention_is_a_well_formed_operation():
    q, keys, values, seen = made("one token alone")
    opcheck(library.gpu_attend, (q, keys, values, seen))
    with pytest.raises(MixtoolsError, match="columns seen by 1 texts"):
        library.attend(q, keys, values, seen.long())
    refused = [
        (q[:, :3], keys, values), (q[..., :12], keys[..., :12], values[..., :12]), (q, keys, values.half()),
        (q, keys[:, :1], values), (q[0], keys, values), (q.expand(-1, -1, 9, -1), keys, values),
    ]  # fmt: skip
    for wrong in refused:
        with pytest.raises(MixtoolsError, match="attention of"):
            library.attend(*wrong, seen)
