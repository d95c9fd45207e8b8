"""The CPU's faster ways give what the plain ones give."""

from __future__ import annotations

import pytest
import torch

from mixtools.inference import host

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3,), (5, 7), (2, 3, 1000)])
def test_empty_is_a_dense_aligned_tensor_that_can_be_written(shape, dtype):
    tensors = [host.empty(shape, CPU, dtype) for _ in range(5)]
    for number, tensor in enumerate(tensors):
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)
        assert tensor.is_contiguous()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))


def test_bf16_products_keep_the_accuracy_of_fp32():
    """Against fp64: as close as the plain fp32 product up to the order of its sums, where bf16 output is far off."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(33, 700, generator=generator).bfloat16()
    weight = torch.randn(300, 700, generator=generator).bfloat16()
    exact = x.double() @ weight.double().T
    before = torch.backends.mkldnn.matmul.fp32_precision
    with host.bf16_products(weight):
        found = x.float() @ weight.float().T
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()
    assert (x @ weight.T - exact).abs().max() > 1e-3 * exact.abs().max()


def test_the_setting_is_put_back_after_an_error_and_left_alone_for_fp32():
    before = torch.backends.mkldnn.matmul.fp32_precision
    with host.bf16_products(torch.zeros(1)):
        assert torch.backends.mkldnn.matmul.fp32_precision == before
    with pytest.raises(KeyError), host.bf16_products(torch.zeros(1, dtype=torch.bfloat16)):
        raise KeyError
    assert torch.backends.mkldnn.matmul.fp32_precision == before
