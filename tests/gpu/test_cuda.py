"""On a GPU itself: the kernels, compiled for it and at the shapes of 8x7B, and whole models, graphs and streams.

Needs torch with its Triton, numpy, safetensors and scipy alone (scripts/gpu_check runs it so). Without a GPU the same
tests run in Triton's interpreter on CPU tensors, over small shapes: that they are right is known before there is one.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpu.random_planes import KINDS, make
from torch import Tensor

import mixtools
from mixtools.errors import MixtoolsError
from mixtools.formats.nf4 import levels as nf4_levels
from mixtools.inference import loading, mixture
from mixtools.inference.generate import Options, generate
from mixtools.inference.model import Cache, Mixtral
from mixtools.inference.step import Step
from mixtools.inference.stream import Stream
from mixtools.layouts.detect import open_checkpoint
from mixtools.linalg import eigen
from mixtools.linalg.gram import gram
from mixtools.ops import cpu, feedback
from mixtools.ops.encode import encode
from mixtools.ops.feedback import Block
from mixtools.ops.gpu import encoding, launch, library, planes, reference
from mixtools.storage.dtypes import DType
from mixtools.storage.store import from_tensor

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, where kernels are interpreted
]
CARD = torch.cuda.is_available()
DEVICE = "cuda" if CARD else "cpu"
HIDDEN, INNER = (4096, 14336) if CARD else (256, 32)
DATA = Path(__file__).resolve().parents[1] / "data"
NANO = DATA / "nano-mixtral"
DIGITS = {torch.bfloat16: 2.0**-8 if CARD else 2.0**-7, torch.float16: 2.0**-11, torch.float32: 0.0}


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interpreted takes as long for many rows as for few."""
    if not CARD:
        monkeypatch.setattr(launch, "_ROWS", dict.fromkeys(range(1, 9), 32))


needs_card = pytest.mark.skipif(not CARD, reason="needs a GPU")


def inputs(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device=DEVICE, dtype=dtype)


def assert_close(found: Tensor, wanted: Tensor, magnitude: Tensor) -> None:
    """`magnitude`: the sum of the terms' magnitudes."""
    assert torch.isfinite(found).all()
    allowed = 2e-6 * magnitude + DIGITS[found.dtype] * wanted.abs()
    worst = float(((found.double() - wanted).abs() / allowed.clamp(min=1e-300)).max())
    assert worst <= 1, f"{worst:.3g} times what is allowed"


def of_range(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double().cpu(), expected.double().cpu()
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("kind", KINDS)
def test_values(kind):
    made = make(kind, 512 if CARD else 32, HIDDEN, DEVICE)
    assert torch.equal(library.unpack(made, torch.float32), reference.values(made))


@pytest.mark.parametrize("tokens", [1, 8] if CARD else [2])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, tokens):
    made, x = make(kind, 6144 if CARD else 32, HIDDEN, DEVICE), inputs(tokens, HIDDEN)
    found = [library.gemv(x, made, torch.float32) for _ in range(2)]
    weights = reference.values(made).double()
    assert_close(found[0], x.double() @ weights.T, x.double().abs() @ weights.abs().T)
    assert torch.equal(*found)  # and again the same bits
    assert_close(library.gemv(x, made), x.double() @ weights.T, x.double().abs() @ weights.abs().T)


@pytest.mark.parametrize("tokens", [1, 8] if CARD else [1])
@pytest.mark.parametrize("kind", KINDS)
def test_experts(kind, tokens):
    experts = 4 if CARD else 2
    gate_up = make(kind, INNER, HIDDEN, DEVICE, matrices=2 * experts)
    x = inputs(tokens, HIDDEN)
    random = torch.Generator().manual_seed(7)
    chosen = torch.stack([torch.randperm(experts, generator=random)[:2] for _ in range(tokens)])
    chosen, weights = chosen.to(DEVICE), torch.tensor([[0.75, 0.25]], device=DEVICE).repeat(tokens, 1)
    found = library.gate_up(x, chosen, gate_up, INNER, torch.float32)
    for token, row in enumerate(chosen.tolist()):
        for place, expert in enumerate(row):
            some = reference.values(gate_up.matrices(2 * expert, 2)).double()
            sums, sizes = some @ x[token].double(), some.abs() @ x[token].double().abs()
            gate, up = sums.chunk(2)
            wanted = torch.nn.functional.silu(gate) * up
            # the product of two sums, each with an error of its own
            size = (sizes[:INNER] * up.abs() + gate.abs() * sizes[INNER:]).clamp(min=1e-6) * 2
            assert_close(found[token, place], wanted, size)
    # down, of rows that a block of 256 divides
    inner = inputs(tokens, 2, HIDDEN, seed=2)
    down = make(kind, 64 if CARD else 32, HIDDEN, DEVICE, matrices=experts)
    made = library.down(inner, chosen, weights, down, down.matrix_rows, torch.float32)
    wanted = reference.down(inner, chosen, weights, down, down.matrix_rows)
    values = reference.values(down).double().abs().view(experts, -1, HIDDEN)
    size = torch.einsum("tkf,tkdf,tk->td", inner.double().abs(), values[chosen], weights.double())
    assert_close(made, wanted, size)


@pytest.mark.parametrize("length", [1, 255, 300, 3000] if CARD else [5])
def test_attention(length):
    texts, heads, groups, size = 2, 32 if CARD else 4, 8 if CARD else 2, 128 if CARD else 16
    q, cache = inputs(texts, heads, 1, size), inputs(2, texts, groups, length + 40, size, seed=2)
    seen = torch.tensor([[0, length], [length // 3, length]], dtype=torch.int32, device=DEVICE)
    wanted = reference.attend(q, cache[0], cache[1], seen)
    torch.testing.assert_close(library.attend(q, cache[0], cache[1], seen).double(), wanted, rtol=2**-7, atol=1e-4)


def test_what_stands_between_products():
    x, norm, router = inputs(3, HIDDEN), inputs(HIDDEN, seed=2), inputs(8, HIDDEN, dtype=torch.float32, seed=3) / 64
    normed, weights, experts = library.route(x, norm, router, 1e-5, 2)
    wanted, wanted_weights, wanted_experts = reference.route(x, norm, router, 1e-5, 2)
    torch.testing.assert_close(normed, wanted, rtol=2**-6, atol=1e-5)
    assert torch.equal(library.normalise(x, norm, 1e-5), normed)
    if CARD:  # the interpreter cuts bf16 off, and the router then sees another x
        assert torch.equal(experts, wanted_experts)
        torch.testing.assert_close(weights, wanted_weights, rtol=1e-3, atol=1e-4)
    heads = torch.split(inputs(2, 8, 16, dtype=torch.float32), [4, 2, 2], 1)
    angles = torch.rand(1, 9, 8, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    seen = torch.tensor([[0, 4], [1, 7]], dtype=torch.int32, device=DEVICE)
    cache = torch.zeros(4, 2, 2, 9, 16, device=DEVICE)
    found = library.turn((heads[0], heads[1], heads[2]), (angles.cos(), angles.sin()), seen, cache[0], cache[1])
    same = reference.turn((heads[0], heads[1], heads[2]), (angles.cos(), angles.sin()), seen, cache[2], cache[3])
    assert torch.equal(found, same) and torch.equal(cache[:2], cache[2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_many_tokens_through_their_experts(dtype):
    x, experts = inputs(50, 64, dtype=dtype), torch.randint(0, 3, (50, 2), generator=torch.Generator().manual_seed(5))
    experts[:, 1] += experts[:, 1] >= experts[:, 0]  # two that differ, of four; the last may have none
    experts, weights = experts.to(DEVICE), torch.full((50, 2), 0.5, device=DEVICE)
    gate_up, down = inputs(4, 192, 64, dtype=dtype, seed=2), inputs(4, 64, 96, dtype=dtype, seed=3)
    found = mixture.mixture(x, weights, experts, lambda: gate_up, lambda: down)
    every = torch.einsum("td,efd->tef", x.double(), gate_up.double())
    inner = torch.nn.functional.silu(every[..., :96]) * every[..., 96:]
    made = torch.einsum("tef,edf->ted", inner, down.double())
    wanted = made.gather(1, experts[..., None].expand(-1, -1, 64)).mean(1)
    assert of_range(found, wanted) < {torch.float32: 1e-5, torch.float16: 2e-3}.get(dtype, 1e-2)


# --- whole models ----------------------------------------------------------------------------------------------------


@needs_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_a_cpu(dtype):
    text = torch.randint(2048, (2, 70), generator=torch.Generator().manual_seed(3))
    truth = Mixtral.load(open_checkpoint(NANO), dtype=torch.float32)(text)
    ours = loading.load(open_checkpoint(NANO), DEVICE, dtype)
    assert isinstance(ours, loading.PlanesMixtral)
    limit = {torch.float32: 1e-5, torch.float16: 5e-3}.get(dtype, 3e-2)
    assert of_range(ours(text.to(DEVICE)), truth) < limit
    kept = Cache(ours, 2, 70)
    ours(text[:, :60].to(DEVICE), kept)
    for at in range(60, 70):
        assert of_range(ours.step(text[:, at].to(DEVICE), kept), truth[:, at]) < limit
    assert isinstance(kept.step, Step) and kept.step.graph is not None


@needs_card
@pytest.mark.parametrize("texts", [1, 5])
def test_a_graph_gives_what_its_launches_give_one_by_one(texts):
    ours = loading.load(open_checkpoint(NANO), DEVICE, torch.bfloat16)
    assert isinstance(ours, loading.PlanesMixtral)
    text, found = torch.randint(2048, (texts, 24), generator=torch.Generator().manual_seed(3)).to(DEVICE), []
    for captured in (True, False, True):
        kept = Cache(ours, texts, 24)
        ours(text[:, :4], kept)
        kept.step = Step(*ours._step, kept, captured=captured)
        found.append(torch.stack([ours.step(text[:, at], kept).clone() for at in range(4, 24)]))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_card
def test_generation_is_a_cpus_own():
    prompts = [[1, 5, 9], [1], [1, 800, 3, 4, 5, 6]]
    options = Options(max_new_tokens=24)
    theirs = generate(Mixtral.load(open_checkpoint(NANO), dtype=torch.float32), prompts, options)
    assert generate(loading.load(open_checkpoint(NANO), DEVICE, torch.float32), prompts, options) == theirs


@needs_card
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_streamed_run_is_that_of_a_cpu(dtype):
    ids = [torch.randint(2048, (50,), generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    truth = Stream(open_checkpoint(NANO), dtype=torch.float32).hidden(ids).rows(0, 250)
    found = [Stream(open_checkpoint(NANO), DEVICE, dtype).hidden(ids).rows(0, 250) for _ in range(2)]
    assert of_range(found[0], truth) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(*found)


# --- what quantizes --------------------------------------------------------------------------------------------------


@pytest.fixture
def cpus_kernels() -> None:
    """With which the GPU's are compared."""
    try:
        cpu.kernels()
    except MixtoolsError as error:
        pytest.skip(f"without the CPU's: {error}")


def rows_of_kinds(columns: int) -> Tensor:
    random = torch.Generator().manual_seed(2)
    normal = torch.randn(40, columns, generator=random)
    normal[:8] *= 0.02
    normal[8:16] = normal[8:16] ** 5
    normal[16:20] = normal[16:20, :1]
    normal[20:22] = 0
    normal[22:26, 1::7] = -0.0
    normal[26:30] = normal[26:30].abs() + 1
    normal[30:34] *= 1e-6
    normal[34:38] = normal[34:38].round()
    return normal


@pytest.mark.parametrize(
    ("type", "dtype", "weighted"),
    [(type, torch.bfloat16, weighted) for type in encoding.ENCODED for weighted in (False, True)][:: 1 if CARD else 5]
    + [(type, torch.float32, True) for type in (DType.Q4_K, DType.Q6_K, DType.Q5_K, DType.Q8_0)][:: 1 if CARD else 3],
    ids=str,
)
def test_blocks_are_a_cpus(type, dtype, weighted, cpus_kernels):
    rows = rows_of_kinds(1536 if CARD else 512).to(dtype)
    importance = torch.rand(rows.shape[1], generator=torch.Generator().manual_seed(4)) if weighted else None
    given = None if importance is None else importance.to(DEVICE)
    found = encoding.encode(rows.to(DEVICE), type, given).cpu().numpy()
    expected = encode(from_tensor(rows), DType.of(dtype), type, None if importance is None else importance.numpy())
    assert (found == expected).all()


@pytest.mark.parametrize("columns", [128, 100] if CARD else [20])
@pytest.mark.parametrize("levels", [range(16), nf4_levels()], ids=["integers", "nf4"])
def test_rounding_is_a_cpus(levels, columns, cpus_kernels):
    random = torch.Generator().manual_seed(6)
    rows, groups = 1000 if CARD else 70, 4
    weights = torch.randn(columns, rows, generator=random)
    scale = torch.rand(groups, rows, generator=random) * 0.3
    scale[0, :3] = 0
    fed = torch.randn(columns, columns, generator=random) * 0.1
    given = (
        weights.clone(), weights, torch.randn(columns, rows, generator=random) * 0.1,
        torch.zeros(columns, rows, dtype=torch.uint8), scale, -scale, torch.arange(columns) * groups // columns, fed,
    )  # fmt: skip
    theirs, ours = (Block(*one[:6], given[6].int(), one[7])
                    for one in ([part.clone().to(device) for part in given] for device in ("cpu", DEVICE)))  # fmt: skip
    feedback.round_block(theirs, levels)
    feedback._round_on_gpu(ours, *feedback._checked_levels(levels))
    for name in ("targets", "errors", "codes"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name


@pytest.mark.parametrize(("shape", "count"), [((1100, 700), 3), ((512, 512), 1)] if CARD else [((14, 10), 2)])
def test_spectra_are_a_cpus(shape, count):
    random = torch.Generator().manual_seed(9)
    weights = [torch.randn(shape, generator=random).to(torch.bfloat16) for _ in range(count)]
    solved = eigen.on_card(torch.stack([gram(weight).tril() for weight in weights]).to(DEVICE))
    for weight, found in zip(weights, solved, strict=True):
        order, wanted = min(shape), eigen.decompose(gram(weight))
        assert float((found.values - wanted.values).abs().max()) < 1e-15 * order * float(wanted.values[-1])
        for start, stop in ((order - order // 3, order), (0, order // 2)):
            ours, theirs = found.vectors(start, stop).cpu(), wanted.vectors(start, stop)
            assert float((ours @ ours.T - theirs @ theirs.T).abs().max()) < 1e-9


@needs_card
@pytest.mark.parametrize(
    "options", [{"layers": "all"}, {"layers": "1", "rank_rule": "rho=0.1", "factored": True}], ids=str
)
def test_a_reduced_model_is_that_of_a_cpu(options, tmp_path):
    made = []
    for device in ("cpu", DEVICE):
        mixtools.laser(NANO, tmp_path / device, device=device, **options)
        report = json.loads((tmp_path / device / "laser-report.json").read_text("utf-8"))
        made.append([(row["tensor"], row["rank"]) for row in report["matrices"]])
    assert made[0] == made[1]
    ids = [torch.randint(2048, (50,), generator=torch.Generator().manual_seed(3))]
    theirs, ours = (Stream(open_checkpoint(tmp_path / device)).hidden(ids).rows(0, 50) for device in ("cpu", DEVICE))
    assert of_range(ours, theirs) < 1e-2


@needs_card
@pytest.mark.parametrize("options", [{"method": "gptq"}, {"type": ["Q4_K_M"]}], ids=str)
def test_a_calibrated_run_is_as_good_as_a_cpus(options, tmp_path, cpus_kernels):
    errors = []
    for device in ("cpu", DEVICE):
        out = tmp_path / device
        mixtools.quantize(NANO, out, calibration="default", samples=8, seq_len=128, device=device, **options)
        (report,) = out.glob("*quantize-report.json")
        errors.append([row["error"] for row in json.loads(report.read_text("utf-8"))["matrices"]])
    theirs, ours = (torch.tensor(each) for each in errors)
    assert torch.isfinite(ours).all() and float((ours / theirs).log().abs().max()) < 0.1


def test_planes_are_made_on_the_device():
    made = make("Q4_K", 64, 256, DEVICE, matrices=2)
    assert made.parts[0].device.type == DEVICE and made.rows == 128
    assert torch.equal(reference.values(made)[64:], reference.values(made.matrices(1, 1)))
    assert planes.beside([made.matrices(0, 1), made.matrices(1, 1)]) is not None
