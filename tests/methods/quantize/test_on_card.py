"""Calibrated quantization on a GPU that is not there (tests/card.py): nothing mixes devices, and few lines wait."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from card import Card, OnCard
from torch import Tensor

from mixtools.config import MixtralConfig
from mixtools.formats import Awq, Gptq, Int8, Nf4
from mixtools.inference import attention
from mixtools.inference.calibrate import Moments
from mixtools.inference.hessian import Gram
from mixtools.inference.model import Layer
from mixtools.inference.states import States
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import random_reader
from mixtools.layouts.reader import Spec
from mixtools.linalg.few import Few
from mixtools.methods.quantize import matrix, rounding, worker
from mixtools.methods.quantize.clock import Clock
from mixtools.methods.quantize.collect import Squares
from mixtools.methods.quantize.grid import Groups, Scheme
from mixtools.methods.quantize.grid_bnb import AbsMax
from mixtools.methods.quantize.grid_ggml import Blocks
from mixtools.methods.quantize.layer import HeadWork, LayerWork
from mixtools.methods.quantize.matrix import Options
from mixtools.methods.quantize.passage import Passage
from mixtools.methods.quantize.worker import Method, Row
from mixtools.names import Role, Slot
from mixtools.storage.dtypes import DType

CONFIG = MixtralConfig(
    hidden_size=256, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=64, vocab_size=64,
    num_experts=2, experts_per_token=1,
)  # fmt: skip
SEQUENCES = [torch.arange(40) * (3 + step) % 61 for step in range(8)]
SCHEMES: dict[str, Callable[[], Scheme]] = {
    "gptq": lambda: Groups(Gptq(4, 128), 1), "row": lambda: Groups(Gptq(4, -1), 1), "awq": lambda: Groups(Awq(64)),
    "nf4": lambda: AbsMax(Nf4(DType.BF16)), "int8": lambda: AbsMax(Int8(DType.BF16)),
    "Q4_K": lambda: Blocks(DType.Q4_K), "IQ4_XS": lambda: Blocks(DType.IQ4_XS), "MXFP4": lambda: Blocks(DType.MXFP4),
}  # fmt: skip


class Still(LayerWork):
    """The states stay as they are: what carries them on is tested elsewhere."""

    def _through(self, states: States, pass_tokens: int) -> None:
        pass


def quantized(
    device: str, scheme: Scheme, options: Options, smooth: bool, *, together: int = 1,
    config: MixtralConfig = CONFIG,
) -> tuple[dict[Slot, tuple[Tensor, ...]], dict[Slot, Row]]:  # fmt: skip
    """A layer, so many experts in step, and the head, from the same states."""
    reader = random_reader(config, 3)
    stream = Stream(reader, device, torch.float32)
    method = Method(lambda _: scheme, lambda _: DType.BF16, options, smooth)
    layer = Layer(config, 0, torch.device(device), torch.float32)
    layer.fill(reader, 0)

    def read(slot: Slot) -> Tensor:
        return reader.read(slot).to(device)

    works = Still(stream, layer, method, read, together=together), HeadWork(stream, method, read)
    with Stream(reader, dtype=torch.float32).embed(SEQUENCES) as states:
        made = dict(works[0].run(states, 160)) | dict(works[1].run(states))
    return {slot: packed.parts for slot, packed in made.items()}, works[0].rows | works[1].rows


@pytest.mark.parametrize(
    ("scheme", "options"),
    [*((name, {}) for name in SCHEMES), ("gptq", {"rounding": "nearest"}), ("awq", {"block": 128}),
     ("Q4_K", {"rounding": "nearest"})],
    ids=str,
)  # fmt: skip
def test_a_layer_is_quantized_where_it_lies(scheme: str, options: dict[str, Any]) -> None:
    """To the bits of the CPU, whose arithmetic it is; what is stored is in the CPU's memory."""
    chosen = SCHEMES[scheme](), Options(**options), (scheme, options) == ("gptq", {})
    expected, rows = quantized("cpu", *chosen)
    with Card() as card:
        found, told = quantized("cuda", *chosen)
    assert card.waits
    assert told == rows
    for slot, parts in expected.items():
        assert not any(isinstance(part, OnCard) for part in found[slot]), slot
        assert all(map(torch.equal, found[slot], parts)), slot


@pytest.mark.parametrize(
    ("scheme", "options"),
    [*((name, {}) for name in SCHEMES), ("gptq", {"rounding": "nearest"}), ("awq", {"block": 128}),
     ("Q4_K", {"sweeps": 2})],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("together", [3, 4])
def test_experts_in_step_are_as_one_by_one(
    scheme: str, options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rounding of all experts' w1 and w3 is one launch a block of columns, and so is that of all their w2."""
    plain, launches = rounding.round_block, []
    config = replace(CONFIG, num_experts=4, experts_per_token=2)
    chosen = SCHEMES[scheme](), Options(**options), (scheme, options) == ("gptq", {})
    expected, rows = quantized("cpu", *chosen, config=config)
    if not chosen[-1]:  # else tries are launches, too
        monkeypatch.setattr(
            rounding, "round_block", lambda *args, **how: launches.append(args[0]) or plain(*args, **how)
        )
    with Card():
        found, told = quantized("cuda", *chosen, together=together, config=config)
    assert told == rows and [*told] == [*rows]
    for slot, parts in expected.items():
        assert all(map(torch.equal, found[slot], parts)), slot
    if launches:
        numbers = [len(block.targets) for block in launches]
        sweeps = chosen[1].sweeps  # of one block of columns or two, as scales are fitted
        assert set(numbers) == ({1, 2, 4, 8} if together == 4 else {1, 2, 3, 6})
        assert numbers.count(max(numbers)) in (2 + sweeps, 2 + 2 * sweeps)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("few", [False, True], ids=["whole", "few"])
def test_no_block_of_columns_waits_for_the_card(scheme: str, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many there are, the CPU waits as often."""
    if few and scheme in ("row", "int8"):
        pytest.skip("scales of whole rows take the Hessian itself")
    generator, waits = torch.Generator().manual_seed(0), []
    weights, x = torch.randn(512, 24, generator=generator), torch.randn(90, 512, generator=generator)
    for block in (64, 256):
        monkeypatch.setattr(rounding, "BLOCK", block)
        with Card() as card:
            moved = x.to("cuda")
            hessian = Few(moved) if few else moved.T @ moved
            found = matrix.prepared(hessian, Options())
            power = hessian.diagonal()
            matrix.quantize(weights.to("cuda"), power, SCHEMES[scheme](), Options(), found, hessian=hessian)
        waits.append(sum(card.waits.values()))
    assert waits[0] == waits[1] < 30, card.waits


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("together", [1, 1 << 30])
def test_tries_of_all_matrices_are_one_launch(scheme: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a card, as long as memory is meant for them; what comes of it is what each by itself gives on a CPU."""
    monkeypatch.setattr(worker, "_TOGETHER", together)
    plain, launches = rounding.round_block, []
    monkeypatch.setattr(rounding, "round_block", lambda *args, **how: launches.append(args[0]) or plain(*args, **how))
    generator = torch.Generator().manual_seed(0)
    method = Method(lambda _: SCHEMES[scheme](), lambda _: DType.BF16, Options(), True)
    matrices = [(torch.randn(256, 24, generator=generator), torch.randn(300, 256, generator=generator)) for _ in "abc"]
    scales = torch.stack([torch.ones(256), torch.logspace(-1, 1, 256)])

    def lost(device: str) -> list[float]:
        work, tried = worker.Worker(method, lambda _: torch.ones(1), lambda *_: None, Clock()), []
        for number, (weights, x) in enumerate(matrices):
            moved = x.to(device)
            hessian = moved.T @ moved
            found = matrix.prepared(hessian, method.options)
            tried.append(worker.Tried(Slot(Role.UP, 0, number), weights.to(device), hessian, found))
        return work.tried(tried, scales.to(device))

    expected = lost("cpu")
    assert [len(block.targets) for block in launches] == [2] * 6  # blocks of 128 columns, each matrix by itself
    launches.clear()
    with Card():
        assert lost("cuda") == expected
    assert [len(block.targets) for block in launches] == ([2] * 6 if together == 1 else [6] * 2)


def test_observers_sum_on_the_card() -> None:
    reader = random_reader(CONFIG, 3)
    inputs = torch.randn(1500, 256, generator=torch.Generator().manual_seed(1))
    slots = [Slot(Role.Q, 0), Slot(Role.UP, 0, 1)]

    def seen(device: str) -> tuple[Tensor, Tensor, Tensor, Any]:
        layer = Layer(CONFIG, 0, torch.device(device), torch.float32)
        layer.fill(reader, 0)
        moments, squares, gram = Moments(layer, slots), Squares(), Gram(256, device)
        for part in inputs.to(device).split(800):
            gram.add(part)
            for slot in slots:
                moments(slot, part, None, None)
                squares(slot, part, None, None)
        gram.settle(slots[0])
        squares.settle()
        return gram.blocks[0], *(moments.covariance(slot).matrix for slot in slots), squares.sums(slots[0], 256)

    *expected, sums = seen("cpu")
    with Card():
        *found, counted = seen("cuda")
        assert all(one.device.type == "cuda" for one in found)
    assert all(map(torch.equal, (one.as_subclass(Tensor) for one in found), expected))
    torch.testing.assert_close(torch.from_numpy(counted), torch.from_numpy(sums))


def test_a_stage_ends_when_the_card_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def wait(device: torch.device) -> None:
        asked.append(device)
        now[0] += 5  # what was asked of it and is not done

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    for device, seconds in ((torch.device("cuda", 1), 6.0), (torch.device("cpu"), 1.0), (None, 1.0)):
        clock = Clock(device)
        with clock("rounding"):
            now[0] += 1
        assert clock.seconds == {"rounding": seconds}
    assert {*asked} == {torch.device("cuda", 1)}


@pytest.mark.parametrize("scheme", ["gptq", "row", "nf4", "Q4_K", "MXFP4"])
def test_what_becomes_of_a_matrix_is_what_a_reader_sees(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made where it lies, some columns at a time, of as many runs of columns as were rounded by themselves."""
    monkeypatch.setattr(worker, "_COLUMNS", 96)
    grids, how = SCHEMES[scheme](), torch.Generator().manual_seed(2)
    parts = []
    for width in (256, 512) if scheme != "row" else (512,):
        weights = torch.randn(width, 64, generator=how) * torch.randn(64, generator=how).exp()
        grid = grids.grid(weights, torch.rand(width, generator=how))
        parts.append((grid, grid.nearest(weights)))
    packed = grids.pack(parts)
    assert grids.plain and torch.equal(worker.values(parts, packed.dense.dtype), packed.dense)


def test_a_weight_is_read_from_its_layer_where_it_is_the_sources_own() -> None:
    """As a copy, which is changed while it is quantized; another dtype's has lost digits there."""
    there, stored = torch.randn(4, 6), torch.randn(4, 6)
    layer: Any = SimpleNamespace(weight=lambda _: there)
    for dtype, expected in ((DType.F32, there), (DType.BF16, stored)):
        source: Any = SimpleNamespace(spec=lambda _, dtype=dtype: Spec((4, 6), dtype), read=lambda _: stored)
        reading: Any = SimpleNamespace(
            source=source, stream=SimpleNamespace(dtype=torch.float32, device=torch.device("cpu"))
        )
        found = Passage._read(reading, layer, Slot(Role.Q, 0))
        assert torch.equal(found, expected) and found.data_ptr() != there.data_ptr()


@pytest.mark.parametrize("start", [0, 5, 12])
def test_attention_on_a_card_plans_nothing_and_makes_no_matrix_of_scores(
    start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN plans half a second for each new length; with a mask and shared heads torch computes all scores at once."""
    plain, asked = F.scaled_dot_product_attention, []

    def watched(*tensors: Tensor, **how: Any) -> Tensor:
        shared = how.get("enable_gqa", False) and how["attn_mask"] is not None
        asked.append((torch.backends.cuda.cudnn_sdp_enabled(), shared))
        return plain(*tensors, **how)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
    random = torch.Generator().manual_seed(start)
    q, k, v = (torch.randn(2, heads, columns, 16, generator=random)
               for heads, columns in ((4, 13 - start), (2, 13), (2, 13)))  # fmt: skip
    where = attention.span(CONFIG, 13 - start, torch.device("cpu"), start)
    expected = attention.attend(q, k, v, where)
    assert asked == [(True, start == 5)]
    with Card():
        there = where._replace(mask=None if where.mask is None else where.mask.to("cuda"))
        found = attention.attend(q.to("cuda"), k.to("cuda"), v.to("cuda"), there)
    assert asked[1:] == [(False, False)] and torch.backends.cuda.cudnn_sdp_enabled()
    torch.testing.assert_close(found.as_subclass(Tensor), expected)


# --- the card itself -------------------------------------------------------------------------------------------------


def test_a_card_tells_what_a_gpu_would_tell() -> None:
    here = torch.arange(6.0)
    with Card() as card:
        there = here.to("cuda")
        assert there.device.type == "cuda" and torch.zeros(2, device=there.device).device.type == "cuda"
        for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there.long()]):
            with pytest.raises(RuntimeError, match="same device"):
                mixed()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert (there * torch.tensor(2.0)).device.type == "cuda"
        there[2:] = here[2:]
        there.add_(1)
        assert there.cpu().numpy().tolist() == [1, 2, 3, 4, 5, 6]
        assert here.tolist() == [0, 1, 2, 3, 4, 5]
    assert card.waits == {"elsewhere": 3}  # there, a part of it, and back
