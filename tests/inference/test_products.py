"""Products of 16-bit weights against fp64, on either way; which way is taken; what it takes of memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from streaming import allocated

from mixtools.inference import host, products

HALVES = [torch.bfloat16, torch.float16]
# rows of x; out and in of the weight: one block, blocks and a rest, a rest of one row, longer than a block is wide
CASES = [(5, 300, 256), (33, 1100, 700), (7, 513, 64), (6, 200, 70_000), (12, 1, 40)]


@pytest.fixture
def widened(monkeypatch):
    """As on a machine without instructions for 16 bits."""
    monkeypatch.setattr(host, "native", lambda dtype: dtype == torch.float32)


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(host, "native", lambda dtype: True)


def case(rows: int, out: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, and their product in fp64."""
    generator = torch.Generator().manual_seed(rows + out)
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    weight = (torch.randn(out, columns, generator=generator) / columns**0.5).to(dtype)
    return x, weight, x.double() @ weight.double().T


def steps(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest distance to the exact value, in halves of the result's last place: 1 is rounding to nearest."""
    last = torch.finfo(found.dtype).eps * 2.0 ** exact.abs().log2().floor()
    return float(((found.double() - exact).abs() / (last / 2)).max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", CASES)
def test_a_widened_product_is_the_exact_one_rounded_once(widened, shape, dtype):
    x, weight, exact = case(*shape, dtype)
    found = products.linear(x, weight)
    assert (found.dtype, found.shape) == (dtype, exact.shape)
    large = exact.abs() > 0.05 * exact.abs().max()  # near zero, fp32 sums themselves are off by many last places
    assert steps(found[large], exact[large]) < 1.2
    assert (found - exact).abs().max() <= 1.01 * (F.linear(x, weight) - exact).abs().max()


@pytest.mark.parametrize("way", ["widened", "native"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", CASES)
def test_an_fp32_result_keeps_the_accuracy_of_fp32(request, way, shape, dtype):
    request.getfixturevalue(way)
    x, weight, exact = case(*shape, dtype)
    found = products.linear_fp32(x, weight)
    assert (found.dtype, found.shape) == (torch.float32, exact.shape)
    assert (found - exact).abs().max() < 2e-5 * exact.abs().max()


@pytest.mark.parametrize("block", [(64 * 700, 512), (1 << 22, 100), (1, 1 << 20)])
def test_the_size_of_a_block_does_not_change_what_comes_out(widened, monkeypatch, block):
    x, weight, _ = case(33, 1100, 700, torch.bfloat16)
    whole = products.linear_fp32(x, weight)
    monkeypatch.setattr(products, "BLOCK", block[0])
    monkeypatch.setattr(products, "BLOCK_ROWS", block[1])
    found = products.linear_fp32(x, weight)
    assert (found - whole).abs().max() < 1e-5 * whole.abs().max()  # BLAS may order its sums by the block's size


def test_leading_dimensions_and_views_are_kept(widened):
    x, weight, _ = case(24, 600, 256, torch.bfloat16)
    flat = products.linear(x, weight)
    assert torch.equal(products.linear(x.view(2, 12, 256), weight), flat.view(2, 12, 600))
    wide = torch.randn(24, 512).bfloat16()
    wide[:, ::2] = x
    assert torch.equal(products.linear(wide[:, ::2], weight), flat)


def test_the_way_depends_on_dtype_and_rows_alone(widened):
    weight = torch.zeros(8, 16, dtype=torch.bfloat16)
    ways = {rows: products.widens(torch.zeros(rows, 16), weight) for rows in (1, 4, 5, 600)}
    assert ways == {1: False, 4: False, 5: True, 600: True}
    assert products.widens(torch.zeros(1, 5, 16), weight)
    assert not products.widens(torch.zeros(5, 16), weight.float())
    assert not products.widens(torch.zeros(5, 16), torch.zeros(8, 16, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize(
    ("can", "bf16", "fp16"),
    [
        ({"avx2": True}, False, False),
        ({"avx512_f": True, "avx512_bw": True}, False, False),
        ({"avx512_bf16": True}, True, False),
        ({"amx_bf16": True, "avx512_fp16": True}, True, True),
        ({"avx512_bf16": True, "amx_fp16": True}, True, True),
    ],
)
def test_native_is_what_the_processor_says(monkeypatch, can, bf16, fp16):
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can, raising=False)
    told = [host.native.__wrapped__(dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]
    assert told == [bf16, fp16, True]


def test_other_processors_and_old_torches_keep_torchs_own_way(monkeypatch):
    monkeypatch.setattr(host.platform, "machine", lambda: "aarch64")
    assert host.native.__wrapped__(torch.bfloat16)
    monkeypatch.setattr(host.platform, "machine", lambda: "x86_64")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert host.native.__wrapped__(torch.bfloat16)


@pytest.mark.parametrize("shape", CASES)
def test_memory_is_what_is_told(widened, shape):
    x, weight, _ = case(*shape, torch.bfloat16)
    found = []
    peak = allocated(lambda: found.append(products.linear(x, weight))) - found[0].nbytes
    told = len(x) * products.token_bytes(tuple(weight.shape)) + products.block_bytes(tuple(weight.shape))
    assert 0.9 * told < peak <= told + 64 * 3  # torch rounds each of three up to a line


def test_the_shape_of_a_block():
    assert [products.block_rows(shape) for shape in ((28672, 4096), (4096, 14336), (32000, 4096))] == [512, 256, 512]
    assert products.block_rows((100, 4096)) == 100
    assert products.block_rows((4096, 1 << 23)) == 64
