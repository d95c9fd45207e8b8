"""Formats: what is planned is what is decoded, and what lies on disk is recognised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixtools import formats
from mixtools.errors import TensorError
from mixtools.formats import Factored, Format, Packed, Plain, Stored
from mixtools.storage.dtypes import WEIGHT_DTYPES, DType

KINDS: list[Format] = [Plain(DType.BF16), Plain(DType.F32), Factored(DType.F16, 3), Factored(DType.BF16, 1)]
KINDS.append(Factored(DType.BF16, 2, a="weight_a"))  # as in outputs of old


def stored(format: Format, shape: tuple[int, ...], but: str | None = None) -> dict[str, Stored]:
    return {part.suffix: Stored(part.dtype, part.shape) for part in format.parts(shape) if part.suffix != but}


@pytest.mark.parametrize("format", KINDS, ids=str)
def test_what_is_planned_is_recognised(format: Format) -> None:
    assert formats.detect(stored(format, (6, 10))) == format
    assert {part.suffix for part in format.parts((6, 10))} <= set(format.suffixes) <= set(formats.SUFFIXES)


@pytest.mark.parametrize("format", KINDS, ids=str)
def test_what_is_planned_is_decoded(format: Format) -> None:
    parts = [torch.randn(part.shape).to(part.dtype.torch()) for part in format.parts((6, 10))]
    dense = Packed(format, tuple(parts)).dense
    assert dense.shape == (6, 10)
    assert dense.dtype == format.dtype.torch()


@given(st.sampled_from(WEIGHT_DTYPES), st.integers(1, 9), st.integers(1, 30), st.integers(1, 30))
def test_factors_are_multiplied_and_rounded_once(dtype: DType, rank: int, rows: int, cols: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    a, b = (torch.randn(shape, generator=generator).to(dtype.torch()) for shape in ((rows, rank), (rank, cols)))
    exact = a.double() @ b.double()
    found = Factored(dtype, rank).decode([a, b])
    # half a unit in the last place, and what fp32 sums may add at a tie
    assert ((found.double() - exact).abs() <= (0.5 + 2**-12) * _ulp(exact, dtype) + 1e-5 * (dtype is DType.F32)).all()


def _ulp(values: torch.Tensor, dtype: DType) -> torch.Tensor:
    about = torch.finfo(dtype.torch())
    size = torch.exp2(values.abs().clamp(min=about.tiny).log2().floor())
    return size * about.eps + (torch.finfo(torch.float32).eps * 64 * (1 + values.abs()))


def test_the_second_factor_tells_a_first_from_the_matrix() -> None:
    """Both have the matrix's own name: programs that know no factors stop at the shape."""
    assert formats.detect(stored(Factored(DType.BF16, 2), (6, 10))) == Factored(DType.BF16, 2)
    assert formats.detect(stored(Factored(DType.BF16, 2), (6, 10), but="weight_b")) == Plain(DType.BF16)
    assert formats.detect(stored(Factored(DType.BF16, 2), (6, 10), but="weight")) is None
    old = Factored(DType.BF16, 2, a="weight_a")
    assert formats.detect(stored(old, (6, 10), but="weight_b")) == old
    assert formats.detect(stored(old, (6, 10), but="weight_a")) is None
    assert formats.detect({}) is None


def test_a_vector_has_no_factors() -> None:
    with pytest.raises(TensorError, match="only a matrix"):
        Factored(DType.BF16, 2).parts((6,))


def test_each_knows_its_own_configuration() -> None:
    assert Plain(DType.BF16).fragment() == {}
    fragment = Factored(DType.BF16, 2).fragment()
    assert formats.claims(fragment["quantization_config"])
    assert "quant_method" not in fragment["quantization_config"]  # transformers must stop, not ignore one it lacks
    for other in ({}, {"quant_method": "hqq"}, {"format": "pack-quantized"}, {"format": None}):
        assert not formats.claims(other)


@pytest.mark.parametrize("format", KINDS, ids=str)
def test_decoding_takes_no_more_than_it_says(format: Format) -> None:
    shape = (64, 96)
    parts = [torch.randn(part.shape).to(part.dtype.torch()) for part in format.parts(shape)]
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        dense = format.decode(parts)
    made = sum(max(0, event.self_cpu_memory_usage) for event in profile.function_events)
    own = 0 if isinstance(format, Plain) else dense.nbytes
    assert made <= format.decode_bytes(shape) + own
