"""The kernels in Triton's interpreter, on CPU tensors, against plain torch in fp64 and the formats' own decoders."""

from __future__ import annotations

import pytest
import torch
from gpu.matrices import KINDS, Made, make
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops.gpu import launch, library, planes, reference

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Of a result that is rounded once: to nearest, but the interpreter cuts bf16 off (a compiled kernel does not, see
# test_compiled.py).
DIGITS = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-11, torch.float32: 0.0}
SUMS = 1e-6  # of what the magnitudes of a sum's terms come to: some 16 roundings of fp32


def inputs(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(*shape: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A tensor of NaN, and the memory around it."""
    around = torch.full((torch.Size(shape).numel() + 64,), torch.nan, dtype=dtype)
    return around[32:-32].view(shape), around


def assert_close(found: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    """`magnitude`: the sum of the terms' magnitudes, by which an error is judged, whatever the scale of the weights."""
    assert torch.isfinite(found).all()
    error = (found.double() - wanted).abs()
    allowed = SUMS * magnitude + DIGITS[found.dtype] * wanted.abs()
    worst = (error / allowed.clamp(min=1e-300)).max()
    assert worst <= 1, f"{float(worst):.3g} times what is allowed"


def check_gemv(made: Made, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    out, around = poisoned(len(x), made.planes.rows, dtype=dtype or x.dtype)
    launch.gemv(x, made.planes, out).run()
    assert torch.isnan(around[:32]).all() and torch.isnan(around[-32:]).all()
    weights = made.values.double()
    assert_close(out, x.double() @ weights.T, x.double().abs() @ weights.abs().T)
    return out


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("rows", "blocks"), [(32, 1), (96, 5)])
def test_every_value_is_the_formats_own(name, rows, blocks):
    made = make(name, rows, blocks, seed=7)
    out, around = poisoned(made.planes.rows, made.planes.columns, dtype=torch.float32)
    launch.unpack(made.planes, out).run()
    assert torch.equal(out, made.values)
    assert torch.isnan(around[:32]).all() and torch.isnan(around[-32:]).all()


@pytest.mark.parametrize("name", KINDS)
def test_values_are_rounded_once(name):
    made = make(name, 32, 2, seed=8)
    for dtype in (torch.bfloat16, torch.float16):
        bits = 16 if dtype == torch.bfloat16 else 0
        cut = (made.values.view(torch.int32) >> bits << bits).view(torch.float32)
        assert torch.equal(library.unpack(made.planes, dtype), cut.to(dtype))


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("tokens", [1, 3])
def test_products(name, tokens):
    made = make(name, 32, 5, seed=tokens)
    check_gemv(made, inputs(tokens, made.planes.columns, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", range(1, 9))
@pytest.mark.parametrize("name", ["bf16", "Q4_K"])
def test_any_number_of_tokens(name, tokens):
    made = make(name, 32, 3)
    x = inputs(tokens, made.planes.columns)
    out = check_gemv(made, x)
    if name == "bf16":  # each token's sums are its own: what the others hold does not change a bit of them
        assert torch.equal(check_gemv(made, torch.cat((x[:1], 1000 * x[1:])))[0], out[0])


@pytest.mark.parametrize(
    ("name", "columns", "warps"),
    [("bf16", 3584, 2), ("bf16", 7168, 4), ("bf16", 3584 + 256, 1), ("Q4_K", 14336, 2), ("Q5_K", 14336, 1)],
)
def test_few_long_rows_are_shared_by_several_warps(name, columns, warps):
    """As those of w2 are, whose programs alone would not keep a card's memory busy."""
    made, rows = make(name, 8, 1), 8
    made = make(name, rows, columns // made.planes.columns)
    started = launch.gemv(x := inputs(1, columns), made.planes, torch.empty(1, rows), lanes=32)
    assert made.planes.columns == columns and started.warps == warps
    assert started.constants["PLAN"].together == 32 * warps
    check_gemv(made, x)
    choice, weight, out = torch.tensor([[1, 0]]), torch.tensor([[0.75, 0.25]]), torch.full((1, 4), torch.nan)
    x = inputs(1, 2, columns)
    started = launch.down(x, choice, weight, made.planes, out, lanes=32)
    assert started.warps == warps
    started.run()
    values = made.values.double().view(2, 4, columns)[choice[0]] * weight[0, :, None, None]
    assert_close(out, torch.einsum("kdf,tkf->td", values, x.double()),
                 torch.einsum("kdf,tkf->td", values.abs(), x.double().abs()))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bf16", "fp16", "fp32", "Q8_0", "gptq"])
def test_any_dtype_of_x_and_result(name, dtype):
    made = make(name, 32, 40 if name.startswith(("bf", "fp")) else 2)
    x = inputs(2, made.planes.columns, dtype=dtype)
    for wanted in {dtype, torch.float32}:
        check_gemv(made, x, wanted)


@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 17])
@pytest.mark.parametrize("name", ["bf16", "Q6_K", "nf4"])
def test_any_number_of_rows(name, rows):
    check_gemv(make(name, rows, 2, seed=rows), inputs(1, make(name, rows, 2).planes.columns))


@pytest.mark.parametrize("columns", [1, 3, 7, 8, 9, 31, 255, 256, 257, 260, 520])
@pytest.mark.parametrize("name", ["bf16", "fp32"])
def test_any_number_of_columns_of_dense_rows(name, columns):
    check_gemv(make(name, 5, columns), inputs(2, columns))


@pytest.mark.parametrize("name", KINDS)
def test_rows_of_units_that_are_taken_together_and_a_rest(name):
    """1, 32 and 33 units or so: a row that is one step, and one with a step more of which one unit is left."""
    unit, (_, least) = make(name, 32, 1).planes.unit, KINDS[name]
    for columns in (32 * unit, 33 * unit):
        if columns % least == 0:
            made = make(name, 32, columns // least)
            check_gemv(made, inputs(1, columns))
    made = make(name, 32, -(-33 * unit // least))
    check_gemv(made, inputs(1, made.planes.columns))


@pytest.mark.parametrize("name", ["bf16", "Q8_0", "Q3_K", "gptq sym"])
def test_nothing_beside_the_planes_counts(name):
    """Planes inside larger memory of NaN, or of bytes that mean huge numbers."""
    made = make(name, 32, 3)
    parts = []
    for part in made.planes.parts:
        around = torch.full((part.numel() + 4096,), torch.nan if part.is_floating_point() else 127).to(part.dtype)
        inside = around[2048:-2048].view(part.shape)
        parts.append(inside.copy_(part))
    moved = planes.Planes(made.planes.kind, 32, made.planes.columns, 32, tuple(parts))
    x = inputs(1, made.planes.columns)
    out = check_gemv(made._replace(planes=moved), x)
    assert torch.equal(out, check_gemv(made, x))


@pytest.mark.parametrize("name", ["bf16", "Q2_K"])
def test_a_large_scale_changes_no_digit(name):
    made = make(name, 32, 2)
    x = inputs(1, made.planes.columns)
    assert torch.equal(check_gemv(made, x * 2.0**60), check_gemv(made, x) * 2.0**60)


def test_not_a_number_shows_in_its_row_alone():
    weight = torch.randn(9, 70)
    weight[3, 69] = torch.nan
    out = library.gemv(inputs(2, 70), planes.dense(weight))
    assert torch.isnan(out).sum(0).tolist() == [0, 0, 0, 2, 0, 0, 0, 0, 0]


# --- experts ---------------------------------------------------------------------------------------------------------

EXPERTS, INNER = 4, 8


def stacked(name: str, matrices: int, rows: int, blocks: int) -> Made:
    each = [make(name, rows, blocks, seed=seed) for seed in range(matrices)]
    whole = planes.stack((one.planes for one in each), matrices)
    return Made(whole, torch.stack([one.values for one in each]), sum(one.stored for one in each))


CHOICES = {
    "one of one": [[2]],
    "two of one": [[3, 0]],
    "all at one expert": [[1, 2], [1, 0], [1, 3]],
    "none at the last": [[0, 1], [2, 0], [1, 2], [0, 2], [1, 0]],
    "one each": [[0], [3], [3]],
    "eight tokens": [[token % 4, (token * 3 + 1) % 4] for token in range(8)],
}


def expected_gate_up(made: Made, x: Tensor, experts: Tensor) -> tuple[Tensor, Tensor]:
    """What it should be, and the magnitude of what goes wrong."""
    weights = made.values.double().view(EXPERTS, -1, made.planes.columns)
    wanted, magnitude = [], []
    for token, chosen in enumerate(experts.tolist()):
        for expert in chosen:
            gate, up = (weights[expert] @ x[token].double()).chunk(2)
            gate_size, up_size = (weights[expert].abs() @ x[token].double().abs()).chunk(2)
            silu = gate * torch.sigmoid(gate)
            wanted.append(silu * up)
            # silu's slope is at most 1.1; its own exponential and quotient are good to some 2^-20
            magnitude.append(1.1 * gate_size * up.abs() + silu.abs() * (up_size + up.abs()))
    shape = (*experts.shape, -1)
    return torch.stack(wanted).view(shape), torch.stack(magnitude).view(shape)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("name", ["bf16", "Q4_K"])
def test_gate_and_up(name, choices):
    made = stacked(name, 2 * EXPERTS, INNER, 2 if name == "Q4_K" else 96)
    experts = torch.tensor(CHOICES[choices])
    x = inputs(len(experts), made.planes.columns)
    out, around = poisoned(*experts.shape, INNER, dtype=torch.float32)
    launch.gate_up(x, experts, made.planes, out).run()
    assert torch.isnan(around[:32]).all() and torch.isnan(around[-32:]).all()
    assert_close(out, *expected_gate_up(made, x, experts))
    assert torch.equal(library.gate_up(x, experts, made.planes, INNER), out)


@pytest.mark.parametrize("choices", CHOICES)
@pytest.mark.parametrize("name", ["bf16", "Q6_K"])
def test_down(name, choices):
    made = stacked(name, EXPERTS, 12, 1 if name == "Q6_K" else 96)
    experts = torch.tensor(CHOICES[choices])
    x = inputs(*experts.shape, made.planes.columns)
    weights = torch.rand(experts.shape, generator=torch.Generator().manual_seed(0))
    out, around = poisoned(len(experts), 12, dtype=torch.float32)
    launch.down(x, experts, weights, made.planes, out).run()
    assert torch.isnan(around[:32]).all() and torch.isnan(around[-32:]).all()
    terms = torch.einsum("tkf,tkdf,tk->td", x.double(), made.values.double()[experts], weights.double())
    sizes = torch.einsum("tkf,tkdf,tk->td", x.double().abs(), made.values.double()[experts].abs(), weights.double())
    assert_close(out, terms, sizes)
    assert torch.equal(library.down(x, experts, weights, made.planes, 12), out)


@pytest.mark.parametrize("name", KINDS)
def test_experts_of_every_kind(name):
    inner = 32 if name.startswith("gptq") else INNER
    made = stacked(name, 2 * EXPERTS, inner, 2)
    experts = torch.tensor([[3, 1], [0, 3]])
    x = inputs(2, made.planes.columns, dtype=torch.bfloat16)
    out = library.gate_up(x, experts, made.planes, inner, torch.float32)
    assert_close(out, *expected_gate_up(made, x, experts))
    weights = torch.tensor([[0.7, 0.3], [0.5, 0.5]])
    turned = made.planes  # as experts of twice as many rows
    wide = inputs(2, 2, turned.columns, dtype=torch.bfloat16)
    found = library.down(wide, experts, weights, turned, 2 * inner, torch.float32)
    values = made.values.double().view(EXPERTS, 2 * inner, -1)[experts]
    terms = torch.einsum("tkf,tkdf,tk->td", wide.double(), values, weights.double())
    sizes = torch.einsum("tkf,tkdf,tk->td", wide.double().abs(), values.abs(), weights.double())
    assert_close(found, terms, sizes)


@pytest.mark.parametrize("inner", [1, 3, 5, 33])
def test_any_size_of_experts(inner):
    each = [make("bf16", inner, 24, seed=seed) for seed in range(2 * EXPERTS)]
    made = Made(planes.stack((one.planes for one in each), 2 * EXPERTS), torch.stack([one.values for one in each]), 0)
    experts, x = torch.tensor([[1, 3], [2, 0], [3, 3]]), inputs(3, 24)
    out, around = poisoned(3, 2, inner, dtype=torch.float32)
    launch.gate_up(x, experts, made.planes, out).run()
    assert torch.isnan(around[:32]).all() and torch.isnan(around[-32:]).all()
    assert_close(out, *expected_gate_up(made, x, experts))


def test_a_choice_weighs_what_it_is_told_to():
    made = stacked("bf16", EXPERTS, 8, 16)
    x, experts = inputs(1, 2, 16), torch.tensor([[2, 0]])
    each = [library.gemv(x[0, i : i + 1], make("bf16", 8, 16, seed=seed).planes) for i, seed in enumerate((2, 0))]
    for weights in ([1.0, 0.0], [0.0, 1.0], [0.25, 0.75]):
        found = library.down(x, experts, torch.tensor([weights]), made.planes, 8)
        assert torch.equal(found, weights[0] * each[0] + weights[1] * each[1])


def test_large_gates_neither_overflow_nor_vanish():
    weight = torch.eye(2).repeat(1, 1)  # gate sees x[0], up x[1]
    made = planes.stack([planes.dense(weight[:1].contiguous()), planes.dense(weight[1:].contiguous())], 2)
    for gate in (-1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 1e4):
        found = float(library.gate_up(torch.tensor([[gate, 3.0]]), torch.tensor([[0]]), made, 1))
        wanted = gate * float(torch.sigmoid(torch.tensor(gate, dtype=torch.float64))) * 3
        assert found == pytest.approx(wanted, rel=1e-5, abs=1e-30)


# --- as operations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "Q5_K", "nf4 double"])
def test_runs_agree_to_the_bit(name):
    made = stacked(name, 2 * EXPERTS, INNER, 2)
    x, experts = inputs(3, made.planes.columns, dtype=torch.bfloat16), torch.tensor(CHOICES["all at one expert"])
    first = library.gate_up(x, experts, made.planes, INNER)
    assert torch.equal(library.gate_up(x, experts, made.planes, INNER), first)
    alone = torch.cat([library.gate_up(x[i : i + 1], experts[i : i + 1], made.planes, INNER) for i in range(3)])
    assert torch.equal(alone, first)  # nor does it matter who else is there


def test_operations_are_well_formed():
    made = stacked("Q8_0", 2 * EXPERTS, 2, 1).planes
    x, experts = inputs(1, made.columns, dtype=torch.bfloat16), torch.tensor([[3, 1]])
    weights, inner = torch.rand(1, 2), inputs(1, 2, made.columns, dtype=torch.bfloat16)
    of, dtype = library.arguments(made), torch.float32
    opcheck(library.gpu_gemv, (x, *of, dtype))
    opcheck(library.gpu_gate_up, (x, experts, *of, 2, dtype))
    opcheck(library.gpu_down, (inner, experts, weights, *of, 4, torch.bfloat16))
    opcheck(library.gpu_unpack, (*of, torch.float16))


def test_operations_agree_with_their_references():
    made = stacked("Q8_0", 2 * EXPERTS, INNER, 4).planes
    x, experts, weights = inputs(2, made.columns), torch.tensor([[3, 1], [0, 2]]), torch.rand(2, 2)
    inner = inputs(2, 2, made.columns)
    near = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(library.gemv(x, made).double(), reference.gemv(x, made), **near)
    found = library.gate_up(x, experts, made, INNER).double()
    torch.testing.assert_close(found, reference.gate_up(x, experts, made, INNER), **near)
    found = library.down(inner, experts, weights, made, 2 * INNER).double()
    torch.testing.assert_close(found, reference.down(inner, experts, weights, made, 2 * INNER), **near)


def test_x_and_experts_may_lie_anyhow():
    made = make("Q8_0", 8, 2).planes
    x = inputs(2, 2 * made.columns)
    assert torch.equal(library.gemv(x[:, ::2], made), library.gemv(x[:, ::2].contiguous(), made))


def test_what_does_not_fit_is_refused(monkeypatch):
    made = stacked("bf16", 4, 8, 16).planes
    x, experts, weights = inputs(2, 16), torch.tensor([[0, 1], [1, 0]]), torch.rand(2, 2)
    refused = [
        (lambda: library.gemv(x[:, :8], made), "rows of 16 columns"),
        (lambda: library.gemv(x.double(), made), "float64"),
        (lambda: library.gemv(x[0], made), "does not fit"),
        (lambda: library.gemv(inputs(9, 16), made), "1 to 8 tokens, not 9"),
        (lambda: library.gemv(x, made, torch.float16), "or fp32, not torch.float16"),
        (lambda: library.gate_up(x, experts[:1], made, 8), "not those of 2 tokens"),
        (lambda: library.gate_up(x, experts.int(), made, 8), "int32"),
        (lambda: library.gate_up(x, experts, made, 5), "no experts of twice 5"),
        (lambda: library.down(inputs(2, 2, 16), experts, weights.half(), made, 8), "weights"),
        (lambda: library.down(inputs(2, 3, 16), experts, weights, made, 8), "do not fit experts"),
        (lambda: library.down(inputs(2, 2, 16), experts, weights, made, 7), "no experts of 7"),
    ]
    for call, message in refused:
        with pytest.raises(MixtoolsError, match=message):
            call()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(MixtoolsError, match="interpreter alone"):
        library.gemv(x, made)


# --- what is added ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bf16", "Q4_K"])
@pytest.mark.parametrize(("rows", "tokens"), [(32, 1), (7, 3), (5, 1)])
def test_products_added_to_what_was_before(name, rows, tokens):
    """Also by the last program, whose rows are some that another has."""
    made = make(name, rows, 3)
    x, before = inputs(tokens, made.planes.columns), inputs(tokens, rows, seed=3)
    out = torch.full((tokens, rows), torch.nan)
    launch.gemv(x, made.planes, out, before).run()
    assert torch.equal(out, library.gemv(x, made.planes) + before)


def test_experts_added_to_what_was_before():
    made = make("Q4_K", 7 * 4, 2)
    x, before = inputs(2, 2, made.planes.columns), inputs(2, 7, seed=3)
    experts, weights = torch.tensor([[3, 1], [0, 3]]), torch.tensor([[0.75, 0.25], [0.5, 0.5]])
    out = torch.full((2, 7), torch.nan)
    launch.down(x, experts, weights, made.planes, out, before).run()
    assert torch.equal(out, library.down(x, experts, weights, made.planes, 7) + before)


def test_what_is_added_lies_apart():
    made, x = make("bf16", 8, 8), inputs(1, 8)
    for before in (torch.zeros(1, 7), (out := torch.zeros(1, 8))):
        with pytest.raises(MixtoolsError, match="lies apart"):
            launch.gemv(x, made.planes, out if len(before[0]) == 8 else torch.zeros(1, 8), before)
