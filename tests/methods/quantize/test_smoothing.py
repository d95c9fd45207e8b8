"""Smoothing: the layer stays what it is, and is left alone where nothing is to be had."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from card import Card
from torch import Tensor

from mixtools.config import MixtralConfig
from mixtools.errors import SpectrumError, TensorError
from mixtools.formats import Gptq, Packed, Plain
from mixtools.inference.hessian import Gram
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.linalg import ldl
from mixtools.linalg.few import Few
from mixtools.linalg.ldl import factor
from mixtools.methods.quantize import matrix, smoothing
from mixtools.methods.quantize.clock import Clock
from mixtools.methods.quantize.grid import Groups
from mixtools.methods.quantize.layer import LayerWork
from mixtools.methods.quantize.matrix import Options
from mixtools.methods.quantize.rounding import Rounded
from mixtools.methods.quantize.worker import Method, Stored, Tried, Worker
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

CONFIG = MixtralConfig(
    hidden_size=64, intermediate_size=96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=97,
    num_experts=4, experts_per_token=2,
)  # fmt: skip
SEQUENCES = [torch.arange(50) * (3 + step) % 97 for step in range(16)]


def outlying(seed: int = 0) -> MemoryReader:
    """A random model whose norms have channels far above the others, and whose readers do not mind them."""
    reader = random_reader(CONFIG, seed)
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    scale = torch.ones(64)
    scale[[3, 17, 40]] = torch.tensor([30.0, 12.0, 20.0])
    for norm, readers in (
        (Role.ATTENTION_NORM, (Role.Q, Role.K, Role.V)),
        (Role.FFN_NORM, (Role.ROUTER, Role.GATE, Role.UP)),
    ):
        tensors[Slot(norm, 0)] *= scale
        for slot in tensors:
            if slot.role in readers:
                tensors[slot] /= scale
    inner = torch.ones(96)
    inner[[5, 50]] = 25.0
    for expert in range(4):
        tensors[Slot(Role.UP, 0, expert)] *= inner[:, None]
        tensors[Slot(Role.DOWN, 0, expert)] /= inner
    return MemoryReader(CONFIG, tensors)


class Unrounded(LayerWork):
    """All that a layer's work does, but that each matrix keeps its weights."""

    def outcome(self, asked: Any, made: Rounded) -> Any:
        _, row = super().outcome(asked, made)
        return (Rounded(made.grid, made.codes, asked.weights), row)

    def finished(self, slot: Slot, parts: Any, tokens: int) -> Stored:
        super().finished(slot, parts, tokens)
        weights = torch.cat([made.errors for made, _ in parts]).T.contiguous()
        self.keep(slot, weights)
        return slot, Packed(Plain(DType.F32), (weights,))


def run(
    reader: MemoryReader, kind: type[LayerWork], sequences: Sequence[Tensor] = SEQUENCES, **changed: Any
) -> tuple[LayerWork, dict[Slot, Packed], Tensor]:
    stream = Stream(reader, dtype=torch.float32)
    scheme = Groups(Gptq(4, 32), 1)
    method = replace(Method(lambda _: scheme, lambda _: DType.F32, Options()), **changed)
    with stream.embed(sequences) as states:
        for layer in stream.layers(0, 1):
            layer.finish()
            work = kind(stream, layer, method, lambda slot: reader.read(slot).float())
            made = dict(work.run(states, 128))
        return work, made, states.rows(0, states.tokens).clone()


def after(reader: MemoryReader) -> Tensor:
    with Stream(reader, dtype=torch.float32).hidden(SEQUENCES) as states:
        return states.rows(0, states.tokens).clone()


@pytest.mark.parametrize("stored", [DType.F32, DType.BF16, DType.F16])
def test_the_layer_stays_what_it_is(stored: DType) -> None:
    """Before anything is rounded: scales are those of the stored norm, so that only the router's rounding is left."""
    reader = outlying()
    work, made, states = run(reader, Unrounded, stored=lambda slot: DType.F32 if slot.role is Role.ROUTER else stored)
    assert work.told["attention_norm"]["exponent"] > 0 and work.told["ffn_norm"]["exponent"] > 0
    assert all(work.rows[Slot(Role.DOWN, 0, expert)]["exponent"] > 0 for expert in range(4))
    norm = made[Slot(Role.FFN_NORM, 0)].parts[0]
    assert norm.dtype == stored.torch()
    assert not torch.equal(norm.float(), reader.read(Slot(Role.FFN_NORM, 0)))
    expected = after(reader)
    torch.testing.assert_close(states, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))
    assert work.told["rerouted"] == 0
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    tensors |= {slot: packed.parts[0].float() for slot, packed in made.items()}
    torch.testing.assert_close(
        after(MemoryReader(CONFIG, tensors)), expected, rtol=0, atol=2e-5 * float(expected.abs().max())
    )


def test_without_its_router_it_would_not() -> None:
    """What the packages do: the test above can fail."""
    reader = outlying()
    _, made, _ = run(reader, Unrounded)
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    expected = after(reader)
    tensors |= {slot: packed.parts[0] for slot, packed in made.items() if slot.role is not Role.ROUTER}
    assert (after(MemoryReader(CONFIG, tensors)) - expected).abs().max() > 0.1


def test_smoothing_is_worth_it_where_channels_differ() -> None:
    reader = outlying()
    expected = after(reader)
    lost = {
        smooth: float((run(reader, LayerWork, smooth=smooth)[2] - expected).square().sum()) for smooth in (True, False)
    }
    assert lost[True] < 0.5 * lost[False]


def test_a_layer_without_outliers_is_left_alone() -> None:
    reader = random_reader(CONFIG, 1)
    work, made, _ = run(reader, LayerWork)
    assert work.told["attention_norm"]["exponent"] == work.told["ffn_norm"]["exponent"] == 0
    for role in (Role.ATTENTION_NORM, Role.FFN_NORM, Role.ROUTER):
        assert torch.equal(made[Slot(role, 0)].parts[0], reader.read(Slot(role, 0)))


def test_off() -> None:
    reader = outlying()
    work, made, _ = run(reader, LayerWork, smooth=False)
    assert torch.equal(made[Slot(Role.FFN_NORM, 0)].parts[0], reader.read(Slot(Role.FFN_NORM, 0)))
    assert work.told["ffn_norm"]["errors"] == {}


# --- the parts ---


def test_the_margin_is_for_leaving_it_out() -> None:
    magnitude = torch.tensor([1.0, 4.0])

    def errors(scales: Tensor) -> list[float]:
        return [0.981 if bool((scale != 1).any()) else 1.0 for scale in scales]

    assert smoothing.choose(magnitude, errors).exponent == 0
    chosen = smoothing.choose(magnitude, errors, margin=0.01)
    assert chosen.exponent == 0.25 and torch.equal(chosen.scale, smoothing.scale_of(magnitude, 0.25))
    assert smoothing.choose(magnitude, errors).errors[0.25] == 0.981


def test_scales() -> None:
    magnitude = torch.tensor([4.0, 1.0, 0.0, 16.0])
    torch.testing.assert_close(smoothing.scale_of(magnitude, 0.5), torch.tensor([1.0, 0.5, 1.0, 2.0]))
    assert torch.equal(smoothing.scale_of(magnitude, 0.0), torch.ones(4))
    assert torch.equal(smoothing.scale_of(torch.zeros(3), 0.5), torch.ones(3))
    far = smoothing.scale_of(torch.tensor([1e-20, 1.0, 1e20]), 1.0)
    assert float(far.max()) == smoothing.SPAN and float(far.min()) == 1 / smoothing.SPAN


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_those_of_the_stored_norm(dtype: torch.dtype) -> None:
    norm = torch.tensor([0.3, -1.7, 0.0, 60000.0, 2e-8, 1.0])
    wanted = torch.tensor([3.0, 0.11, 2.0, 0.01, 4.0, 1.0])
    stored, scale = smoothing.on_norm(norm, wanted, dtype)
    assert stored.dtype == dtype and torch.isfinite(stored.float()).all()
    moved = stored.float() * scale
    kept = [0, 1, 5] if dtype == torch.float16 else [0, 1, 3, 4, 5]
    torch.testing.assert_close(moved[kept], norm[kept], rtol=1e-6, atol=0)
    assert float(scale[2]) == 1
    if dtype == torch.float16:  # what it cannot hold stays where it was
        assert float(scale[3]) == float(scale[4]) == 1
    torch.testing.assert_close(scale[[0, 1]], wanted[[0, 1]], rtol=1e-2, atol=0)


def test_starved_and_empty_experts_are_shown_the_others_tokens() -> None:
    reader = random_reader(CONFIG, 2)
    work, made, _ = run(reader, LayerWork, sequences=SEQUENCES[:3])
    for expert in range(4):
        row = work.rows[Slot(Role.GATE, 0, expert)]
        assert row["tokens"] < 128 < row["shown"] == 150
        assert row["error"] < row["nearest"]
    few, _, _ = run(reader, LayerWork)
    assert all(row["shown"] == row["tokens"] >= 128 for slot, row in few.rows.items() if slot.expert is not None)
    dense, source = made[Slot(Role.DOWN, 0, 1)].dense.float(), reader.read(Slot(Role.DOWN, 0, 1))
    assert (dense - source).norm() < 0.2 * source.norm()


def test_inputs_that_are_no_numbers() -> None:
    reader = random_reader(CONFIG, 3)
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    tensors[Slot(Role.UP, 0, 2)] *= 1e19
    with pytest.raises(SpectrumError, match="scales are beyond what the format can hold") as failed:
        run(MemoryReader(CONFIG, tensors), LayerWork)
    assert str(failed.value.tensor) == "layers.0.experts.2.w3"
    gram, rows = Gram(40, block=16), torch.ones(3, 40)
    rows[1, 33] = float("inf")
    gram.add(rows)
    with pytest.raises(TensorError, match="inputs are not finite in column 33") as caught:
        gram.settle(Slot(Role.DOWN, 0, 2))
    assert str(caught.value.tensor) == "layers.0.experts.2.w2"


def test_the_layers_live_weights_are_a_readers() -> None:
    """States behind the layer come through what is stored, decoded."""
    reader = outlying()
    _, made, states = run(reader, LayerWork)
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    tensors |= {slot: packed.dense.float().view(CONFIG.shape(slot.role)) for slot, packed in made.items()}
    torch.testing.assert_close(states, after(MemoryReader(CONFIG, tensors)), rtol=0, atol=0)
    assert isinstance(next(iter(made)), Slot) and [*made] == [slot for slot in reader.slots() if slot.layer == 0]
    _, _, plain = run(reader, LayerWork, sequential=False)
    torch.testing.assert_close(plain, after(reader), rtol=0, atol=0)


def test_runs_of_columns_have_scales_of_their_own() -> None:
    """w2's Hessian in blocks along its diagonal: outlying channels 5 and 50 lie in different ones."""
    work, _, _ = run(outlying(), LayerWork, options=Options(block=32))
    assert all(work.rows[Slot(Role.DOWN, 0, expert)]["exponent"] > 0 for expert in range(4))


@pytest.mark.parametrize("rounding", ["nearest", "second-order"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_candidate_costs_what_it_loses_at_the_output(
    rounding: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Undamped, and of the outputs as they are, whatever the inputs are divided by; of unlike matrices together, one of
    them a run of columns."""
    monkeypatch.setattr(ldl, "PANEL", 48)
    generator = torch.Generator().manual_seed(0)
    options = Options(rounding, damping=0.3)
    schemes = {Role.Q: Groups(Gptq(4, 32), 1), Role.K: Groups(Gptq(4, 32), 1), Role.V: Groups(Gptq(3, 32), 1)}
    method = Method(lambda slot: schemes.get(slot.role, schemes[Role.Q]), lambda _: DType.F32, options)
    work = Worker(method, lambda _: torch.ones(1), lambda *_: None, Clock())
    scales = torch.stack([torch.ones(96), torch.logspace(-1, 1, 96), torch.logspace(1, -0.5, 96)])
    tried, expected = [], torch.zeros(3, dtype=torch.float64)
    read_by = ((Role.Q, 0, 64, 300), (Role.K, 0, 64, 20), (Role.V, 0, 64, 20), (Role.O, 64, 96, 300))
    for role, first, last, tokens in read_by:
        columns, width, slot = slice(first, last), last - first, Slot(role, 0)
        one, x = torch.randn(width, 40, generator=generator), torch.randn(tokens, width, generator=generator)
        x *= torch.logspace(-1.5, 1.5, width)
        hessian = x.T @ x
        few = rounding != "nearest" and tokens < width
        read = Few(x) if few else hessian
        found = matrix.prepared(read, options)
        tried.append(Tried(slot, one, read, found, columns))
        for number, scale in enumerate(scales[:, columns]):
            smoothed = hessian / scale[:, None] / scale
            if found is not None:  # the same order, and damping that is scaled along
                added = 0.3 * hessian.diagonal().mean() / scale.square()
                found = factor(smoothed + added.diag(), 0.0, found.order)
            whole = smoothed if found is None else None
            made = matrix.quantize(
                one * scale[:, None], smoothed.diagonal(), method.scheme(slot), options, found, hessian=whole
            )
            outputs = x.double() @ (made.errors / scale[:, None]).double()
            expected[number] += outputs.square().sum()
    if device == "cpu":
        assert work.tried(tried, scales) == pytest.approx(expected.tolist(), rel=2e-3)
        return
    with Card():
        there = [
            one._replace(
                weights=one.weights.to(device),
                hessian=Few(one.hessian.rows.to(device)) if isinstance(one.hessian, Few) else one.hessian.to(device),
            )
            for one in tried
        ]
        there = [one._replace(found=matrix.prepared(one.hessian, options)) for one in there]
        assert work.tried(there, scales.to(device)) == pytest.approx(expected.tolist(), rel=2e-3)
