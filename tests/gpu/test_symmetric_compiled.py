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
    assert code.registers <= {"form": 168, "reflect": 128}.get(case.kernel, 64), code.registers


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
    """So that memory bounds it: of the 140 instructions and more a loaded 128 bytes that a card has time for."""
    code, amd = codes[case], case.target == "gfx942"
    assert code.texts["loads 16 bytes"]
    products = code.loop["v_fmac_f64_e32" if amd else "DFMA"]
    sizes = Sizes()
    assert products == sizes.lines * sizes.columns // (256 if amd else 128)
    loads = code.loop["global_load_dwordx4" if amd else "LDG"]
    assert loads >= products // 2
    assert sum(code.loop.values()) / products < 8
