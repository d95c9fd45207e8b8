"""Planes hold what they were made of, in no more bytes."""

from __future__ import annotations

import pytest
import torch
from gpu.matrices import BLOCKS, KINDS, awq, dense, ggml, gptq, make, nf4

from mixtools.errors import MixtoolsError, TensorError
from mixtools.ops.gpu import planes, reference
from mixtools.ops.gpu.planes import Kind
from mixtools.storage.dtypes import DType


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(32, 1), (64, 3), (96, 8)])
def test_planes_mean_what_was_stored(name, rows, blocks):
    made = make(name, rows, blocks, seed=rows)
    assert torch.equal(reference.values(made.planes), made.values)


@pytest.mark.parametrize("name", KINDS)
def test_runs_of_rows_make_the_same_planes(name, monkeypatch):
    whole = make(name, 64, 8).planes
    monkeypatch.setattr(planes, "_RUN", 8 * whole.columns + 1)
    for one, other in zip(whole.parts, make(name, 64, 8).planes.parts, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_no_plane_set_is_larger_than_what_it_was_made_of(name):
    made = make(name, 64, 16)
    assert made.planes.nbytes <= made.stored
    if name not in ("bf16", "fp16", "fp32"):
        assert made.planes.nbytes > 0.9 * made.stored  # and nothing is left out


def test_eight_by_seven_bits_per_weight():
    """What the formats' pages say."""
    bits = {"Q8_0": 8.5, "Q4_0": 4.5, "Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625}
    for type in BLOCKS:
        made = ggml(4, 2048, 0, type=type)
        assert made.planes.nbytes * 8 / (4 * 2048) == bits[type.value]
    assert gptq(32, 1024, 0, group=128).planes.nbytes * 8 / (32 * 1024) == 4 + (16 + 4) / 128
    assert gptq(32, 1024, 0, group=128, symmetric=True).planes.nbytes * 8 / (32 * 1024) == 4 + 16 / 128


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_words_start_at_16_bytes(name):
    made = make(name, 32, 8).planes
    first = made.parts[0]
    assert first.is_contiguous() and first.data_ptr() % 16 == 0 and first[0].numel() * first.itemsize % 16 == 0
    assert all(part.is_contiguous() for part in made.parts)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_stack_has_its_matrices_one_below_the_other(name):
    each = [make(name, 32, 3, seed=seed) for seed in range(3)]
    stacked = planes.stack((one.planes for one in each), 3)
    assert (stacked.rows, stacked.matrix_rows) == (96, 32)
    assert torch.equal(reference.values(stacked), torch.cat([one.values for one in each]))


def test_what_does_not_stack_is_refused():
    one, two = make("Q8_0", 4, 2).planes, make("Q8_0", 4, 3).planes
    for matrices, count in [
        ((one, two), 2),
        ((one, make("Q4_0", 4, 2).planes), 2),
        ((one,), 2),
        ((one, one), 1),
        ((), 1),
    ]:
        with pytest.raises(MixtoolsError, match="stack"):
            planes.stack(matrices, count)


def test_dense_keeps_its_memory():
    weight = torch.randn(3, 8, 16, dtype=torch.bfloat16)
    made = planes.dense(weight)
    assert (made.rows, made.columns, made.matrix_rows) == (24, 16, 8)
    assert made.parts[0].data_ptr() == weight.data_ptr()
    crooked = torch.randn(100, dtype=torch.bfloat16)[1:97].view(6, 16)
    assert planes.dense(crooked).parts[0].data_ptr() % 16 == 0
    with pytest.raises(MixtoolsError, match="float64"):
        planes.dense(torch.zeros(2, 2, dtype=torch.float64))


def test_what_no_kernel_multiplies_is_refused():
    words = torch.zeros(8, 32, dtype=torch.int32)  # [in / 8, out]
    zeros, scales = torch.full((2, 4), 0x77777777, dtype=torch.int32), torch.ones(2, 32, dtype=torch.float16)
    told = {"symmetric": True, "v2": False}
    in_order = torch.arange(64, dtype=torch.int32) // 32
    assert planes.gptq(words, zeros, scales, in_order, group=32, **told).kind == Kind("int4", 32, 8)
    with pytest.raises(TensorError, match="act-order"):
        planes.gptq(words, zeros, scales, in_order.flip(0), group=32, **told)
    with pytest.raises(TensorError, match="expected 8"):
        planes.gptq(words, zeros, scales, in_order, group=32, symmetric=True, v2=True)
    with pytest.raises(TensorError, match="groups of 16"):
        planes.gptq(words, zeros.repeat(2, 1), scales.repeat(2, 1), None, group=16, **told)
    with pytest.raises(TensorError, match="cut blocks of 64"):
        planes.nf4(torch.zeros(48, 1, dtype=torch.uint8), torch.ones(2), torch.zeros(16), (1, 96))
    with pytest.raises(MixtoolsError, match="no kernel multiplies IQ3_S"):
        planes.ggml(torch.zeros(1, 110, dtype=torch.uint8), DType.IQ3_S)


def test_a_kind_is_spelled_and_read():
    for made in (awq(8, 64, 0, group=32), nf4(1, 64, 0, double=True), dense(1, 3, 0, dtype=torch.float32)):
        assert Kind.parse(made.planes.kind.spelled) == made.planes.kind
