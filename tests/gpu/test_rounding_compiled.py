"""The rounding of blocks compiled for sm_80, sm_90, sm_100 and gfx942: nothing spilled, nothing fused, nobody waits."""

from __future__ import annotations

import pytest
from gpu.rounding_targets import TARGETS, Case, Code, compiled, per_item

from mixtools.ops.gpu import round

WHOLE = [Case(target, levels) for target in TARGETS for levels in (0, 16)]
CASES = [*WHOLE, *(Case(target, 16, columns=100) for target in ("sm_90", "gfx942")), Case("sm_90", 0, 1, 1)]
NVIDIA = [case for case in WHOLE if case.target != "gfx942"]


@pytest.fixture(scope="module")
def codes() -> dict[Case, Code]:
    return compiled(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_spilled(codes, case):
    code = codes[case]
    assert code.spilled == 0
    assert not {"LDL", "STL"} & code.whole.keys()
    assert code.registers <= (256 if case.target == "gfx942" else 200), code.registers


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_keep_to_themselves(codes, case):
    """Nothing goes through shared memory and no thread waits for another; nowhere is an atomic."""
    code = codes[case]
    assert code.shared == 0
    names = {name.split("_")[0] for name in code.whole} if case.target == "gfx942" else set(code.whole)
    assert not {"LDS", "STS", "BAR", "SHFL", "ATOM", "ATOMG", "RED", "REDG", "ds"} & names
    assert not any("atomic" in name or "barrier" in name for name in code.whole)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_each_operation_is_rounded_by_itself(codes, case):
    """As on the CPU: quotients exact, no product fused with a sum, denormals kept."""
    assert codes[case].texts == {"divides exactly": True, "fuses": False, "flushes": False}


@pytest.mark.parametrize("case", NVIDIA, ids=str)
def test_what_a_weight_costs(codes, case):
    """The loop over earlier columns: a product and a sum for each of TILE times TILE, and little beside them."""
    code, squared = codes[case], round.TILE**2
    names = code.loop
    twos = names.get("FMUL2", 0), names.get("FADD2", 0)  # two in one
    assert (names.get("FMUL", 0) + 2 * twos[0], names.get("FADD", 0) + 2 * twos[1]) == (squared, squared)
    assert names["LDG"] == squared + round.TILE
    assert sum(names.values()) < 4.5 * squared
    assert per_item(code) * 32 < 450  # of a lane, for a row and a column of a block of 128
