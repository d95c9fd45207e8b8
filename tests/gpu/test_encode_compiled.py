"""The encoders compiled for sm_80, sm_90, sm_100 and gfx942: nothing spilled, and each operation rounded as a CPU's."""

from __future__ import annotations

import pytest
from gpu.encode_targets import Case, Code, compiled

TYPES = ("Q8_0", "Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q2_K", "Q3_K")
# All types for one target; of the others those that have all there is: both kinds of searches, and tiles.
CASES = [
    *(Case(type, weighted, "sm_90") for type in TYPES for weighted in (False, True) if type != "Q8_0" or not weighted),
    *(Case(type, False, target) for type in ("Q8_0", "Q4_K") for target in ("sm_80", "sm_100")),
    *(Case(type, type == "Q4_0", "gfx942") for type in ("Q8_0", "Q4_0", "Q4_K", "Q6_K", "Q3_K")),
    Case("Q4_K", True, "gfx942"),
    *(Case(type, False, "sm_90", source) for type in ("Q4_K", "Q8_0") for source in ("float16", "float32")),
]
by_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture(scope="module")
def codes() -> dict[Case, list[Code]]:
    return compiled(CASES)


@by_case
def test_nothing_is_spilled(codes, case):
    for code in codes[case]:
        assert code.spilled == 0, code.kernel
        assert not {"LDL", "STL"} & code.names.keys(), code.kernel
        # 16 warps on a multiprocessor, whose searches hide each other's waiting; two waves on each unit of gfx942
        assert code.registers <= (256 if case.target == "gfx942" else 128), (code.kernel, code.registers)


@by_case
def test_arithmetic_is_the_cpus(codes, case):
    """No sum fused with a product, no quotient but the nearest, no denormal made zero, no order left to chance."""
    for code in codes[case]:
        assert code.odd == [], code.kernel
        assert not any("atomic" in name or name in ("ATOM", "ATOMG", "RED", "REDG") for name in code.names)


@by_case
def test_searches_keep_to_their_lanes(codes, case):
    """Where a lane has a sub-block, nothing goes through memory that lanes share: no order but the text's."""
    for code in codes[case]:
        if code.kernel not in ("levels", "levels_q4_0", "q8_0", "q4_0"):
            assert code.shared == 0 and not {"SHFL", "BAR", "LDS", "STS"} & code.names.keys(), code.kernel


@pytest.mark.parametrize("case", [case for case in CASES if case.type in ("Q4_K", "Q5_K") and case.target != "gfx942"],
                         ids=str)  # fmt: skip
def test_guards_against_nans_are_left(codes, case):
    """Levels of a search may be NaNs: a maximum beside the two limits of each."""
    assert sum(code.names["FMNMX"] >= 3 * 32 for code in codes[case] if code.kernel == "fit") == 1
