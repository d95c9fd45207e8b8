"""A whole model in planes, in Triton's interpreter: against the same model's decoded values, format by format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from layouts import make
from mixtral_oracle import of_range
from packing import Model
from torch import Tensor

import mixtools
from mixtools.errors import MemoryBudgetError, MixtoolsError, TensorError
from mixtools.formats import Nf4
from mixtools.inference import loading, planes
from mixtools.inference.arriving import packed_layers
from mixtools.inference.generate import Options, generate, prefill
from mixtools.inference.lane import Lane
from mixtools.inference.loading import PlanesMixtral
from mixtools.inference.model import Cache, Mixtral
from mixtools.inference.planes import PlanesLayer
from mixtools.inference.step import Step
from mixtools.inference.stream import Stream
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import Role, Slot
from mixtools.ops.gpu import launch
from mixtools.scaling import RopeScaling
from mixtools.storage.dtypes import DType

NANO = Path(__file__).resolve().parents[1] / "data" / "nano-mixtral"
# an interpreted program takes milliseconds: small models
DIMS = make.Dims(d=64, f=64, layers=1, heads=4, kv=2, hd=16, vocab=24, experts=3)
BLOCKY = make.Dims(d=256, f=32, layers=1, heads=4, kv=1, hd=64, vocab=9, experts=2)  # rows fit blocks of 256
MANY = planes.FEW_PACKED + 1  # tokens that do not go through kernels
NEAR = 3e-5  # of the logits' range, in fp32
PACKED = {
    "gptq": Model("gptq", dims=DIMS), "gptq asym": Model("gptq", symmetric=False, group=64, dims=DIMS),
    "gptq v2": Model("gptq", about={"checkpoint_format": "gptq_v2"}, dims=DIMS),
    "awq": Model("awq", symmetric=False, dims=DIMS), "compressed": Model("compressed-tensors", dims=DIMS),
    "compressed asym": Model("compressed-tensors", symmetric=False, dims=DIMS),
    "act-order": Model("gptq", shuffled=True, dims=DIMS), "8 bits": Model("gptq", bits=8, dims=DIMS),
}  # fmt: skip
BLOCKS = ("Q4_K_M", "Q2_K", "Q8_0")


@pytest.fixture(autouse=True)
def larger_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is interpreted takes as long for many rows as for few; test_gemv.py has the usual number."""
    monkeypatch.setattr(launch, "_ROWS", dict.fromkeys(range(1, 9), 32))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    @cache
    def folder(name: str) -> Path:
        out = tmp_path_factory.mktemp("planes")
        if name in PACKED:
            return PACKED[name].write(out / "model")
        if name in BLOCKS:
            mixtools.quantize(
                make.write_a(out / "dense", BLOCKY), out / "gguf", type=[name], name="small", device="cpu"
            )
            return out / "gguf" / f"small.{name}.gguf"
        if name == "nf4":
            mixtools.quantize(make.write_a(out / "dense", DIMS), out / "nf4", method="nf4")
            return out / "nf4"
        assert name == "bf16"
        return make.write_a(out / "dense", DIMS)

    return lambda name: open_checkpoint(folder(name))


def ids(length: int, vocab: int, batch: int = 1) -> Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(length))


def both(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> tuple[Mixtral, Mixtral]:
    """In planes, and of decoded values."""
    checkpoint.dense = DType.of(dtype)
    ours = loading.load(checkpoint, dtype=dtype)
    assert isinstance(ours, PlanesMixtral)
    return ours, Mixtral.load(checkpoint, dtype=dtype, packed=False)


def kinds(model: Mixtral) -> set[str]:
    (layer, *_) = model.layers
    assert isinstance(layer, PlanesLayer)
    return {of.kind.name for of in (*layer.qkv, layer.o, layer.gate_up, layer.down)}


@pytest.mark.parametrize("name", [*PACKED, *BLOCKS, "bf16", "nf4"])
def test_logits_are_those_of_the_decoded_values(opened, name):
    checkpoint = opened(name)
    ours, theirs = both(checkpoint)
    vocab = checkpoint.config.vocab_size
    blocks = {"Q2_K": {"q2_k", "q3_k", "q4_k", "int4"}, "Q8_0": {"q8_0"}, "Q4_K_M": {"q4_k", "q6_k", "q8_0", "int4"}}
    wide = {"act-order": {"dense"}, "8 bits": {"dense"}, "bf16": {"dense"}, "nf4": {"nf4"}}
    assert kinds(ours) <= (blocks | wide).get(name, {"int4"})
    for length in (1, MANY):
        text = ids(length, vocab)
        assert of_range(ours(text), theirs(text)) < NEAR


@pytest.mark.parametrize("name", ["gptq", "nf4"])
def test_an_observer_sees_each_expert_alone(opened, name):
    ours, theirs = both(opened(name))
    seen: dict[Slot, Tensor] = {}
    text = ids(MANY, DIMS.vocab)
    ours(text, observer=lambda slot, x, *_: seen.update({slot: x.clone()}))
    told: dict[Slot, Tensor] = {}
    theirs(text, observer=lambda slot, x, *_: told.update({slot: x.clone()}))
    assert seen.keys() == told.keys()
    for slot, x in told.items():
        assert of_range(seen[slot], x) < NEAR


@pytest.mark.parametrize("rows", [1, 8, 9, 17, MANY])
@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_products_of_any_number_of_rows(opened, rows, dtype):
    (layer,) = loading.load(opened("gptq"), dtype=torch.float32).layers
    assert isinstance(layer, PlanesLayer)
    x = torch.randn(1, rows, DIMS.d, generator=torch.Generator().manual_seed(rows))
    found = planes.product(x, layer.o, dtype)
    assert found.shape == (1, rows, DIMS.d)
    assert of_range(found, x @ planes.dense(layer.o, torch.float32).T) < NEAR


@pytest.mark.parametrize("name", ["bf16", "gptq asym", "Q4_K_M"])
def test_a_step_is_what_the_whole_text_gives(opened, name):
    """Three texts of different lengths side by side, so that two begin with padding."""
    checkpoint = opened(name)
    ours, theirs = both(checkpoint)
    vocab = checkpoint.config.vocab_size
    prompts = [ids(length, vocab)[0].tolist() for length in (2, 5, 4)]
    logits, kept = prefill(ours, prompts, room=3)
    for _ in range(2):
        chosen = logits.argmax(-1)
        for prompt, token in zip(prompts, chosen.tolist(), strict=True):
            prompt.append(token)
        logits = ours.step(chosen, kept).clone()
        assert isinstance(kept.step, Step)
        for row, prompt in enumerate(prompts):
            assert of_range(logits[row], theirs(torch.tensor([prompt]))[0, -1]) < NEAR


@pytest.mark.parametrize("changes", [
    {"sliding_window": 3},
    {"rope_scaling": RopeScaling(type="dynamic", factor=4.0), "max_position_embeddings": 3},
    {"rope_scaling": RopeScaling(type="linear", factor=2.0)},
], ids=["window", "dynamic", "linear"])  # fmt: skip
def test_a_step_sees_and_turns_as_a_pass_does(opened, changes):
    checkpoint = opened("bf16")
    checkpoint.config = replace(checkpoint.config, **changes)
    ours, theirs = both(checkpoint)
    text, (mine, other) = ids(7, DIMS.vocab), (Cache(model, 1, 9, None, 4) for model in (ours, theirs))
    for model, kept in ((ours, mine), (theirs, other)):
        model(text[:, :4], kept)
    for at in (4, 5, 6):
        assert of_range(ours.step(text[:, at], mine), theirs.step(text[:, at], other)) < NEAR


def test_generation_is_the_same_though_texts_end(opened):
    checkpoint = opened("gptq")
    ours, theirs = both(checkpoint)
    prompts = [ids(length, DIMS.vocab)[0].tolist() for length in (3, 1, 6, 4)]
    made = generate(theirs, prompts, Options(max_new_tokens=5, stop=()))
    options = Options(max_new_tokens=5, stop=(made[0][1], made[2][3]))
    assert generate(ours, prompts, options) == generate(theirs, prompts, options) != made


def test_steps_go_on_where_a_pass_has_filled_the_cache(opened):
    ours, theirs = both(opened("bf16"))
    text = ids(9, DIMS.vocab, 2)
    kept, whole = Cache(ours, 2, 9), theirs(text)
    ours(text[:, :3], kept)
    ours.step(text[:, 3], kept)
    ours(text[:, 4:7], kept)
    for at in (7, 8):
        assert of_range(ours.step(text[:, at], kept), whole[:, at]) < NEAR
    assert kept.used == 9


def test_more_texts_than_the_kernels_take_go_the_other_way(opened):
    ours, theirs = both(opened("bf16"))
    text = ids(2, DIMS.vocab, 9)
    kept = Cache(ours, 9, 2)
    ours(text[:, :1], kept)
    assert of_range(ours.step(text[:, 1], kept), theirs(text)[:, 1]) < NEAR
    assert kept.step is None


def test_steps_in_16_bits_are_as_near_to_the_truth_as_decoded_weights(opened):
    checkpoint = opened("gptq")
    text, errors = ids(4, DIMS.vocab, 4), [0.0, 0.0]
    truth = both(checkpoint)[1](text)[:, -1]
    for which, model in enumerate(both(checkpoint, torch.float16)):
        kept = Cache(model, 4, 4)
        model(text[:, :3], kept)
        errors[which] = of_range(model.step(text[:, 3], kept), truth)
    assert errors[0] < 1.5 * errors[1]


@pytest.mark.parametrize("name", ["gptq", "Q4_K_M"])
def test_rounded_weights_are_those_that_a_stream_has(opened, name):
    """One by one, too: their roundings are those of 16 bits, which the formats' own values do not have."""
    checkpoint = opened(name)
    checkpoint.dense = DType.F16
    theirs = Mixtral.load(checkpoint, dtype=torch.float16, packed=False)
    exact, rounded = (loading.load(checkpoint, dtype=torch.float16, rounded=how) for how in (False, True))
    text = ids(5, checkpoint.config.vocab_size)
    expected = theirs(text)
    assert of_range(rounded(text), expected) < of_range(exact(text), expected)
    kept = Cache(rounded, 1, 5)
    rounded(text[:, :4], kept)
    assert of_range(rounded.step(text[:, 4], kept), expected[:, 4]) < 2e-3
    assert kept.step is None


def test_what_is_widened_is_told_by_its_format(opened):
    for name, said in (("8 bits", "gptq-8bit, 8 bits"), ("act-order", "gptq, 4 bits"), ("gptq", None), ("bf16", None)):
        told = loading.widened(checkpoint := opened(name), loading.load(checkpoint))
        assert said in told if said else told is None
    wide = loading.widened(checkpoint := opened("gptq"), Mixtral.load(checkpoint, packed=False))
    assert wide is not None and "gptq, 4 bits" in wide


def test_runs_are_the_same_bit_for_bit(opened):
    ours = loading.load(opened("awq"), dtype=torch.float32)
    text, found = ids(3, DIMS.vocab, 2), []
    for _ in range(2):
        kept = Cache(ours, 2, 3)
        ours(text[:, :2], kept)
        found.append(ours.step(text[:, 2], kept))
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["gptq", "Q4_K_M"])
def test_a_stream_runs_layers_as_they_are_stored(opened, name, monkeypatch):
    checkpoint = opened(name)
    checkpoint.dense = DType.F32
    text = [ids(MANY, checkpoint.config.vocab_size)[0]]
    wide = Stream(checkpoint, dtype=torch.float32).hidden(text).rows(0, MANY)
    monkeypatch.setattr(Stream, "layers", lambda *_, **__: pytest.fail("widened"))
    for limit in (None, 10_000_000):
        stream = Stream(checkpoint, dtype=torch.float32, packed=True, max_memory=limit)
        assert of_range(stream.hidden(text).rows(0, MANY), wide) < NEAR


def test_a_stream_of_dense_layers_runs_them_as_ever(opened, monkeypatch):
    monkeypatch.setattr(PlanesLayer, "load", lambda *_: pytest.fail("in planes"))
    Stream(opened("bf16"), packed=True).hidden([ids(3, DIMS.vocab)[0]])


def test_what_reading_a_packed_layer_raises_is_raised(opened, monkeypatch):
    def broken(*_: object) -> None:
        raise TensorError("is damaged")

    checkpoint = opened("gptq")
    monkeypatch.setattr(type(checkpoint), "packed", broken)
    with pytest.raises(TensorError, match="damaged"):
        Stream(checkpoint, packed=True).hidden([ids(3, DIMS.vocab)[0]])


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("block", [64, 128])
def test_nf4_of_any_block(double, block):
    codes = torch.randint(0, 16, (32, 256), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    absmax = torch.rand(32 * 256 // block, generator=torch.Generator().manual_seed(3)) + 0.1
    packed = Nf4(DType.F32, double=double, block=block).encode_codes(codes, absmax)
    assert planes.suits(packed.format, (32, 256))
    made = planes._planes(packed, (32, 256), torch.device("cpu"))
    assert made is not None and torch.equal(planes.dense(made, torch.float32), packed.dense)


# --- memory ----------------------------------------------------------------------------------------------------------


ON_DISK = [("Q4_K_M", 5.6), ("gptq", 4.6), ("awq", 4.7), ("nf4", 4.7), ("8 bits", 16.1)]


@pytest.mark.parametrize(("name", "bits"), ON_DISK)
def test_matrices_take_what_they_take_on_disk(opened, name, bits):
    checkpoint = opened(name)
    model = loading.load(checkpoint, dtype=torch.bfloat16)
    of = [one for layer in model.layers for one in (*layer.qkv, layer.o, layer.gate_up, layer.down)]
    held, weights = sum(one.nbytes for one in of), sum(one.rows * one.columns for one in of)
    assert held * 8 / weights < bits
    slots = [slot for slot in checkpoint.slots() if slot.layer is not None and len(checkpoint.spec(slot).shape) == 2
             and slot.role is not Role.ROUTER]  # fmt: skip
    told = planes.held_bytes(checkpoint, slots, 2)
    assert held <= told * 1.001 + 64 * len(of)


@pytest.mark.parametrize("name", ["Q4_K_M", "gptq"])
def test_what_is_told_is_what_the_model_takes(opened, name):
    checkpoint = opened(name)
    model = loading.load(checkpoint, dtype=torch.bfloat16)
    assert isinstance(model, PlanesMixtral)
    table, layers, head = model._step
    of = [one for layer in layers for one in (*layer.qkv, layer.o, layer.gate_up, layer.down)] + [head.planes]
    rest = [table, head.norm, *(one for layer in layers for one in (layer.attention_norm, layer.ffn_norm))]
    held = sum(one.nbytes for one in of) + sum(one.nbytes for one in rest)
    routers = sum(layer.router.numel() * 2 for layer in layers)
    told = planes.held_bytes(checkpoint, checkpoint.slots(), 2)
    assert held + routers <= told * 1.001 + 64 * len(of) and held + routers > 0.75 * told


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(opened, monkeypatch):
    checkpoint = opened("gptq")
    need = planes.held_bytes(checkpoint, checkpoint.slots(), 2)
    scratch = planes.scratch_bytes(checkpoint, 2)
    assert scratch == 2 * DIMS.experts * 2 * DIMS.f * DIMS.d  # gate and up of all experts, in 16 bits
    loading.load(checkpoint, max_memory=need + scratch)
    monkeypatch.setattr(Checkpoint, "packed", lambda *_: pytest.fail("read"))
    with pytest.raises(MemoryBudgetError, match="as they are stored"):
        loading.load(checkpoint, max_memory=need + scratch - 1)


def test_loading_tells_how_far_it_is(opened):
    from mixtools.progress import Progress

    class Told(Progress):
        total = done = 0.0

        def start(self, what: str, total: float, unit: str = "B") -> None:
            self.total = total

        def advance(self, by: float) -> None:
            self.done += by

        def finish(self) -> None:
            assert self.done == self.total

    loading.load(opened("Q2_K"), progress=(told := Told()))
    assert told.done == told.total > 0


def test_a_matrix_of_another_shape_is_named(opened, monkeypatch):
    checkpoint = opened("bf16")
    spec = checkpoint.spec
    for slot in (Slot(Role.O, 0), Slot(Role.DOWN, 0, 1)):
        wrong = spec(slot)._replace(shape=(1, 2))
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "spec", lambda one, slot=slot, wrong=wrong: wrong if one == slot else spec(one))
            with pytest.raises(TensorError, match="another shape") as caught:
                loading.load(checkpoint)
            assert caught.value.tensor == str(slot)


def test_a_full_cache_is_refused(opened):
    ours = loading.load(opened("bf16"), dtype=torch.float32)
    kept = Cache(ours, 1, 3)
    ours(ids(3, DIMS.vocab), kept)
    with pytest.raises(MixtoolsError, match="the cache of 3 columns is full"):
        ours.step(torch.tensor([1]), kept)


class Log:
    """Where a lane would be: what is asked of it, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def free(self) -> str:
        self.log.append("free")
        return f"free {self.log.count('free')}"

    def after(self, event: str) -> None:
        self.log.append(f"after {event}")

    def start(self, work: Callable[[], object]) -> str:
        work()
        self.log.append("copied")
        return "copied"

    def arrived(self, event: str) -> None:
        self.log.append(f"arrived {event}")


@pytest.mark.parametrize("double", [True, False])
def test_packed_layers_by_a_lane_wait_for_those_before(double):
    """One is loaded when what ran before it is done, and runs when it is there; with `double` while another runs."""
    checkpoint = open_checkpoint(NANO)
    lane = Log()
    for layer in packed_layers(
        checkpoint, range(2), torch.device("cpu"), torch.bfloat16, cast("Lane", lane), double=double
    ):
        lane.log.append(f"runs {layer.index}")
        assert isinstance(layer, PlanesLayer)
    inner = [entry for entry in lane.log if entry != "free"]
    wanted = ["after free 1", "copied", "arrived copied"]
    assert inner[:3] == wanted and lane.log.count("free") == 2
    assert inner.index("after free 2") < len(inner) - 1 - inner[::-1].index("copied")
    seen = [entry for entry in inner if entry.startswith(("runs", "arrived"))]
    assert seen == ["arrived copied", "runs 0", "arrived copied", "runs 1"]
    if not double:
        assert lane.log.index("runs 0") < [n for n, entry in enumerate(lane.log) if entry == "free"][1]
