"""The kernels of eigenproblems compiled for sm_80, sm_90, sm_100 and gfx942: nothing spilled, wide loads."""

from __future__ import annotations

import pytest
from gpu.symmetric_targets import TARGETS, Case, Code, compiled

from mixtools.ops.gpu.symmetric import Sizes

CASES = [Case(kernel, target) for kernel in ("form", "reflect", "bisect", "twist") for target in TARGETS]
OF_REST = [case for case in CASES if case.kernel == "reflect"]


@pytest.fixture(scope="module")
def codes() -> dict[Case, Code]:
    return compiled(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_spilled(codes, case):
    code = codes[case]
    assert code.spilled == 0
    assert not {"LDL", "STL"} & code.whole.keys()
    bounds = {"form": 190, "reflect": 190}
    assert code.registers <= bounds.get(case.kernel, 64), code.registers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_have_one_order(codes, case):
    """No atomics."""
    names = {name.split("_")[0] for name in codes[case].whole} if case.target == "gfx942" else set(codes[case].whole)
    assert not {"ATOM", "ATOMG", "RED", "REDG"} & names and not any("atomic" in name for name in codes[case].whole)


@pytest.mark.parametrize("case", [case for case in CASES if case.kernel != "form"], ids=str)
def test_quotients_are_exact(codes, case):
    assert codes[case].texts["divides exactly"]


@pytest.mark.parametrize("case", OF_REST, ids=str)
def test_the_rest_is_loaded_by_16_bytes_with_little_beside(codes, case):
    """Memory bounds it: of an H200 a multiprocessor gets 18.6 bytes a clock, and begins four instructions meanwhile."""
    code, amd = codes[case], case.target == "gfx942"
    assert code.texts["loads 16 bytes"]
    fused, product, load = (
        ("v_fmac_f64_e32", "v_mul_f64", "global_load_dwordx4") if amd else ("DFMA", "DMUL", "LDG")
    )  # fmt: skip
    sizes = Sizes()
    items = sizes.lines * sizes.columns // 128  # of a thread
    full = [loop for loop in code.loops if loop.get(fused, 0) == items <= loop.get(product, 0)]
    assert len(full) == 2  # before the diagonal, and where that is
    whole, last = sorted(full, key=lambda loop: sum(loop.values()))
    assert whole[load] >= items // 2
    of_warp = items * 8 * 32
    assert sum(whole.values()) / of_warp < 0.25 * 4 / 18.6
    exchanges = {"LDS", "STS", "BAR", "SHFL", "s_barrier", "ds_bpermute_b32", "v_mov_b32_dpp"}
    assert not exchanges & whole.keys() and not exchanges & last.keys()
