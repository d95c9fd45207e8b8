"""The kernels compiled for sm_80, sm_90, sm_100 and gfx942 at the shapes of 8x7B: nothing spilled, wide loads."""

from __future__ import annotations

import pytest
from gpu.targets import EXCHANGES, TARGETS, Case, Code, compiled, startable

KINDS = ["bf16", "fp16", "fp32", "Q4_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "gptq", "gptq v2", "gptq sym",
         "nf4", "nf4 double"]  # fmt: skip
OF_EXPERTS = [kind for kind in KINDS if kind not in ("fp16", "fp32", "gptq", "gptq sym")]
OF_ROWS = ("gemv", "gate_up", "down")
SMALL = ("route", "normalise", "turn", "attend", "combine")  # what stands between products
CASES = [
    *(Case("gemv", kind, target) for kind in KINDS for target in TARGETS),
    *(Case(kernel, kind, target) for kernel in ("gate_up", "down") for kind in OF_EXPERTS for target in TARGETS),
    *(Case("gemv", kind, target, tokens) for kind in ("bf16", "Q4_K", "Q6_K") for target in ("sm_90", "gfx942")
      for tokens in (2, 4, 8)),
    *(Case("gemv", kind, "sm_90", 1, x) for kind in ("Q4_K", "Q8_0") for x in ("float16", "float32")),
    *(Case(kernel, kind, target, adds=True) for kernel in ("gemv", "down") for kind in ("bf16", "Q4_K", "gptq sym")
      for target in TARGETS),
    *(Case(kernel, "", target, tokens) for kernel in SMALL for target in TARGETS for tokens in (1, 8)),
    *(Case("unpack", kind, target) for kind in OF_EXPERTS for target in ("sm_90", "gfx942")),
]  # fmt: skip


@pytest.fixture(scope="module")
def codes() -> dict[Case, Code]:
    return compiled(CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_spilled(codes, case):
    code = codes[case]
    assert code.spilled == 0
    assert not {"LDL", "STL"} & code.whole.keys()
    # 12 warps on a multiprocessor, or 8: where units have 64 columns, and in `attend`, which holds all of its columns'
    # keys and values, so that it waits for memory once; one wave on each unit of gfx942
    bound = 255 if case.tokens > 2 or case.kind in ("Q2_K", "Q3_K") or case.kernel == "attend" else 168
    bound = 512 if case.target == "gfx942" else bound
    assert code.registers <= bound, code.registers


@pytest.mark.parametrize("case", [case for case in CASES if case.kernel not in SMALL], ids=str)
def test_loads_are_wide(codes, case):
    """16 bytes of each row a thread, and no less of x where it has 16 bits."""
    code = codes[case]
    if case.target == "gfx942":
        assert code.whole["global_load_dwordx4"] >= code.rows
    else:
        assert code.texts["loads 16 bytes"]
        of_x = {"float32": code.unit // 4}.get(case.x, max(1, code.unit // 8)) if case.kernel != "unpack" else 0
        wanted = code.rows + case.tokens * of_x * (case.kind != "fp32")
        assert code.wide_loads >= wanted, (code.wide_loads, wanted)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_threads_keep_to_themselves_until_the_end(codes, case):
    """In the loop nothing goes through shared memory and no thread waits for another; nowhere is an atomic."""
    code = codes[case]
    names = {name.split("_")[0] for name in code.whole} if case.target == "gfx942" else set(code.whole)
    assert not {"ATOM", "ATOMG", "RED", "REDG"} & names and not any("atomic" in name for name in code.whole)
    if case.target != "gfx942" and case.kernel in OF_ROWS:
        if code.loop == code.whole:  # few turns of little work become one text
            assert code.texts["exchanges last"]
        else:
            assert not {*EXCHANGES} & code.loop.keys()


@pytest.mark.parametrize("case", [case for case in CASES if case.kernel in OF_ROWS and case.tokens == 1], ids=str)
def test_what_a_turn_multiplies_is_told_on_each_target(codes, case):
    """What bounds follow from (scripts/bench/gpu_compiled.py): whole units of the rows, which the turn loads itself."""
    code = codes[case]
    turns, rest = divmod(code.weights, code.rows * code.unit)
    assert turns and not rest
    load = "global_load_dwordx4" if case.target == "gfx942" else "LDG"
    assert code.loop[load] >= turns * code.rows


@pytest.mark.parametrize("case", [case for case in CASES if case.target != "gfx942" and case.x == "bfloat16"
                                  and (case.kernel, case.kind) != ("unpack", "bf16")
                                  and case.kernel != "attend"], ids=str)  # fmt: skip
def test_results_are_rounded_to_nearest(codes, case):
    """Which Triton's interpreter does not do. `attend` leaves what it makes in fp32."""
    assert codes[case].texts["rounds to nearest"]


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.target in ("sm_80", "sm_90") and case.kernel in OF_ROWS], ids=str
)
def test_products_of_x_and_weights_are_fused_and_no_others(codes, case):
    """As many as a turn or some of the loop over units have, of x and of the decoders that ask for it."""
    code = codes[case]
    assert code.weights and code.weights % (code.rows * code.unit) == 0
    # a turn's instructions: what a weight costs, products with each token and decoding together
    assert sum(code.loop.values()) / code.weights < 9 + 2.5 * (case.tokens - 1)


def test_triton_starts_what_is_compiled_here():
    """Its own way to a launch takes these arguments, and comes to the same code."""
    some = [("gemv", "Q4_K"), ("gate_up", "nf4 double"), ("down", "bf16"), ("unpack", "gptq v2"), ("route", "")]
    cases = [Case(kernel, kind, "sm_90") for kernel, kind in some]
    assert startable(cases) == dict.fromkeys(cases, True)
