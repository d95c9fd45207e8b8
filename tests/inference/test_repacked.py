"""Models in GPTQ, AWQ, compressed-tensors, nf4 and int8 whose matrices stay packed: against those of their values."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtral_oracle import DATA, of_range
from torch import Tensor

import mixtools
from mixtools.errors import LayoutError, TensorError
from mixtools.formats import Awq, Format, Gptq, Int8, Nf4, Packed, PackedInts, Plain
from mixtools.formats.nf4 import nf4
from mixtools.inference import blocks, budget, products, repacked
from mixtools.inference.blocks import FEW_ROWS, Blocks
from mixtools.inference.generate import Options, generate
from mixtools.inference.model import Layer, Mixtral, PackedLayer
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.reader import Spec
from mixtools.names import Role, Slot
from mixtools.ops import repack
from mixtools.storage.dtypes import DType

NANO = DATA / "nano-mixtral"
CALIBRATED = {"calibration": DATA / "text.txt", "samples": 2, "seq_len": 32}
MADE: dict[str, dict[str, Any]] = {
    "gptq": {"method": "gptq", **CALIBRATED},
    "gptq-3": {"method": "gptq", "bits": 3, "group_size": 64, **CALIBRATED},
    "gptq-8": {"method": "awq", "format": "auto-gptq", "bits": 8, "group_size": -1, **CALIBRATED},
    "awq": {"method": "awq", "group_size": 64, **CALIBRATED},
    "tensors": {"method": "awq", "format": "compressed-tensors", "group_size": 32, **CALIBRATED},
    "nf4": {"method": "nf4"},
    "int8": {"method": "int8"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    place = tmp_path_factory.mktemp("repacked")

    def make(name: str) -> Path:
        if not (place / name).exists():
            mixtools.quantize(NANO, place / name, **MADE[name])
        return place / name

    return make


@pytest.fixture
def opened(made: Callable[[str], Path]) -> Callable[[str], Checkpoint]:
    return lambda name: open_checkpoint(made(name))


def dense(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> Mixtral:
    """The model of the values that the file holds, none rounded to 16 bits."""
    checkpoint.dense = DType.F32
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "type_of", lambda *_: None)
        return Mixtral.load(checkpoint, dtype=torch.float32)


def ids(length: int) -> Tensor:
    return torch.randint(2048, (1, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", MADE)
def test_logits_are_those_of_the_decoded_values(opened, name, monkeypatch):
    packed = Mixtral.load(opened(name), dtype=torch.float32)
    expected = dense(opened(name), monkeypatch)
    assert all(isinstance(layer, PackedLayer) for layer in packed.layers)
    for length in (1, FEW_ROWS, FEW_ROWS + 1, 90):
        assert of_range(packed(ids(length)), expected(ids(length))) < 2e-6


@pytest.mark.parametrize("name", ["gptq", "awq", "nf4", "int8"])
def test_in_16_bits_it_is_no_further_from_the_truth_than_widened_weights(opened, name, monkeypatch):
    truth = dense(opened(name), monkeypatch)
    for dtype in (torch.bfloat16, torch.float16):
        packed = Mixtral.load(opened(name), dtype=dtype)
        with monkeypatch.context() as patch:
            patch.setattr(blocks, "type_of", lambda *_: None)
            widened = Mixtral.load(opened(name), dtype=dtype)
        assert all(isinstance(layer, Layer) for layer in widened.layers)
        texts = [ids(length) for length in (*range(2, FEW_ROWS, 2), 20, 30, 45, 60)]
        errors = [[float((model(text) - truth(text)).square().mean()) for text in texts] for model in (packed, widened)]
        # the median: where rounding lets the router pick another expert, an error is a hundred times as large
        ours, theirs = np.median(errors, axis=1)
        assert packed.dtype == dtype and 0 < ours <= 1.5 * theirs


@pytest.mark.parametrize("name", ["gptq", "awq", "nf4"])
def test_texts_are_those_of_the_decoded_values(opened, name, monkeypatch):
    packed, expected = Mixtral.load(opened(name), dtype=torch.float32), dense(opened(name), monkeypatch)
    prompts = [[1, 5, 9], [1, 300, 20, 11]]
    options = Options(max_new_tokens=10)
    together = generate(packed, prompts, options)
    assert together == generate(expected, prompts, options)
    assert together == [generate(packed, [prompt], options)[0] for prompt in prompts]


@pytest.mark.parametrize("name", MADE)
def test_memory_is_about_what_the_file_holds(opened, name):
    checkpoint = opened(name)
    model = Mixtral.load(checkpoint)
    held = [matrix for layer in model.layers for matrix in layer.matrices.values()]
    assert all(isinstance(matrix, Blocks) for matrix in held)
    packed = sum(matrix.data.nbytes for matrix in held)
    stored = 0
    for layer in model.layers:
        for slot in layer.matrices:
            stored += sum(entry.nbytes for entry in checkpoint.parts(slot) if not entry.name.endswith(("g_idx", "map")))
    assert packed < 1.05 * stored
    slots = [slot for layer in model.layers for slot in layer.matrices]
    assert budget.held_bytes(checkpoint, slots, 2, packed=True) == packed
    assert budget.held_bytes(checkpoint, slots, 2, packed=False) > 1.8 * packed
    assert isinstance(model.head.matrix, Tensor)


def test_generate_speaks_from_packed_weights(made):
    said = mixtools.generate(made("awq"), "The following", max_new_tokens=8)
    assert said.text and len(said.tokens) == 8


def test_what_has_no_blocks_is_widened_beside_what_has(opened, monkeypatch):
    expected, kind_of = dense(opened("gptq"), monkeypatch)(ids(9)), repacked.kind_of

    def some(format: Format, shape: tuple[int, ...]) -> repack.Kind | None:
        return kind_of(format, shape) if shape[0] == 128 else None  # keys and values alone

    monkeypatch.setattr(repacked, "kind_of", some)
    checkpoint = opened("gptq")
    checkpoint.dense = DType.BF16
    model = Mixtral.load(checkpoint, dtype=torch.bfloat16)
    kinds = [type(matrix) for layer in model.layers for matrix in layer.matrices.values()]
    assert kinds.count(Blocks) == 2 * 2 and kinds.count(Tensor) == 2 * (2 + 3 * 8)
    assert of_range(model(ids(9)), expected) < 0.02
    monkeypatch.setattr(repacked, "kind_of", lambda *_: None)
    assert all(isinstance(layer, Layer) for layer in Mixtral.load(opened("gptq")).layers)


# --- single matrices --------------------------------------------------------------------------------------------------


class One:
    """A reader of one matrix."""

    def __init__(self, packed: Packed, shape: tuple[int, int]) -> None:
        self.config: Any = None
        self._packed, self._shape = packed, shape

    def slots(self) -> list[Slot]:
        return [Slot(Role.Q, 0)]

    def spec(self, slot: Slot) -> Spec:
        return Spec(self._shape, self._packed.format.dtype)

    def format(self, slot: Slot) -> Format:
        return self._packed.format

    def packed(self, slot: Slot) -> Packed:
        return self._packed

    def read(self, slot: Slot) -> Tensor:
        return self._packed.dense


def blocks_of(packed: Packed, shape: tuple[int, int]) -> Blocks | None:
    return blocks.read(One(packed, shape), Slot(Role.Q, 0))


def grid(rows: int, columns: int, group: int, bits: int, zeros: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    seed = torch.Generator().manual_seed(rows + group + bits)
    count = 1 if group == -1 else columns // group
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=seed, dtype=torch.uint8)
    scales = (torch.rand(rows, count, generator=seed) * 0.02 + 1e-5).bfloat16().half().bfloat16().float()
    return codes, scales, torch.randint(zeros[0], zeros[1] + 1, (rows, count), generator=seed)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[-1]))


def formats() -> list[Format]:
    found: list[Format] = []
    for bits in (3, 4, 8):
        for group in (32, 64, 128, 256, -1):
            found += [Gptq(bits, group, symmetric=symmetric, v2=v2) for symmetric in (0, 1) for v2 in (0, 1)]
            found += [PackedInts(bits, group, kind, sym) for kind in (DType.F16, DType.BF16) for sym in (False, True)]
    found += [Awq(group, symmetric=symmetric) for group in (32, 64, 128, -1) for symmetric in (False, True)]
    return [*found, Awq(64, DType.BF16), Gptq(4, 96)]


@pytest.mark.parametrize("format", formats(), ids=str)
def test_values_are_the_formats_own(format):
    rows, columns = 64, 768
    low = 0 if not isinstance(format, Gptq) or format.v2 else 1
    middle = 1 << format.bits - 1
    zeros = (middle, middle) if format.symmetric else (low, (1 << format.bits) - 1)
    packed = format.encode(*grid(rows, columns, format.group, format.bits, zeros))
    found = blocks_of(packed, (rows, columns))
    expected = format.to(DType.F32).decode(packed.parts)
    assert found is not None and found.order is None and found.data.shape[0] == rows
    assert torch.equal(found.rows(torch.arange(rows), torch.float32), expected)
    x = random(5, columns)
    assert of_range(found.product(x), x @ expected.T) < 2e-6


def test_zeros_that_mean_one_more_than_codes_go():
    """No encoder of ours writes them: stored as 2^bits - 1 in GPTQ's first version, which adds one."""
    for bits in (3, 4, 8):
        format = Gptq(bits, 64, symmetric=False)
        packed = format.encode(*grid(32, 512, 64, bits, (1, 3)))
        parts = (packed.parts[0], torch.full_like(packed.parts[1], -1), *packed.parts[2:])
        found = blocks_of(Packed(format, parts), (32, 512))
        expected = format.to(DType.F32).decode(parts)
        assert found is not None and torch.equal(found.rows(torch.arange(32), torch.float32), expected)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("columns", [256, 768, 14336])
def test_nf4_is_bitsandbytes_own(double, columns):
    weight = torch.randn(6, columns, generator=torch.Generator().manual_seed(columns)) * 0.02
    weight[2] = 0
    packed = nf4(weight, double)
    found = blocks_of(packed, (6, columns))
    expected = packed.format.to(DType.F32).decode(packed.parts)
    assert found is not None and torch.equal(found.rows(torch.arange(6), torch.float32), expected)


@pytest.mark.parametrize("block", [128, 256, 512])
def test_nf4_of_longer_blocks(block):
    seed = torch.Generator().manual_seed(block)
    codes = torch.randint(0, 16, (3, 512), generator=seed, dtype=torch.uint8)
    packed = Nf4(DType.F32, block=block).encode_codes(codes, torch.rand(3 * 512 // block, generator=seed))
    found = blocks_of(packed, (3, 512))
    assert found is not None and torch.equal(found.rows(torch.arange(3), torch.float32), packed.dense)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("kind", [Gptq, PackedInts])
def test_columns_in_activation_order(kind, bits, monkeypatch):
    """Whose groups are strewn over the row: x is sorted as they are."""
    rows, columns, group = 64, 512, 128
    middle = 1 << bits - 1
    sequential = Gptq(bits, group) if kind is Gptq else PackedInts(bits, group)
    stored = sequential.encode(*grid(rows, columns, group, bits, (middle, middle)))
    index = (torch.arange(columns) // group)[torch.randperm(columns, generator=torch.Generator().manual_seed(1))].int()
    if kind is Gptq:
        format, parts = sequential, (*stored.parts[:3], index)
    else:
        format, parts = PackedInts(bits, group, indexed=True), (*stored.parts[:2], index, stored.parts[2])
    packed = Packed(format, parts)
    expected = format.to(DType.F32).decode(parts)
    found = blocks_of(packed, (rows, columns))
    assert found is not None and found.order is not None
    picked = torch.tensor([[3, 0], [60, 3]])
    assert torch.equal(found.rows(picked, torch.float32), expected[picked])
    for count in (1, 3, FEW_ROWS, FEW_ROWS + 1):
        x = random(2, count, columns)
        assert of_range(found.product(x), x @ expected.T) < 2e-6
        narrow = x.bfloat16()
        assert of_range(products.linear(narrow, found).float(), narrow.float() @ expected.T) < 2**-8
    both = products.linear_all([(x, found), (x, blocks_of(stored, (rows, columns)))])
    assert of_range(both[0], x @ expected.T) < 2e-6
    assert of_range(both[1], x @ stored.format.to(DType.F32).decode(stored.parts).T) < 2e-6
    # groups of other lengths than the configuration says
    uneven = index.clone()
    uneven[int((index == 0).nonzero()[0])] = 1
    parts = tuple(uneven if part is index else part for part in parts)
    assert blocks_of(Packed(format, parts), (rows, columns)) is None
    with pytest.raises(TensorError, match="names a group that is none of the 4"):
        blocks_of(Packed(format, tuple(uneven + 3 if part is uneven else part for part in parts)), (rows, columns))


@pytest.mark.parametrize(
    ("format", "shape"),
    [
        (Gptq(2, 64), (64, 512)), (Gptq(4, 64), (64, 320)), (Gptq(4, 16), (64, 512)),
        (Gptq(4, 64, DType.F32), (64, 512)), (Awq(128), (64, 128)), (Nf4(block=32), (8, 512)), (Nf4(), (8, 64)),
        (Nf4(block=1024), (8, 512)), (Int8(), (8, 100)), (Plain(DType.BF16), (8, 512)), (Gptq(4, 64), (512,)),
    ],
)  # fmt: skip
def test_what_blocks_do_not_hold(format, shape):
    assert repacked.kind_of(format, shape) is None


def test_a_matrix_that_cannot_be_given_as_stored_is_widened(monkeypatch):
    format = Awq(64)
    one = One(format.encode(*grid(64, 512, 64, 4, (0, 15))), (64, 512))
    assert blocks.type_of(one, Slot(Role.Q, 0)) == repack.grouped(512, 4, 64)

    def refuse(slot: Slot) -> Packed:
        raise LayoutError("is stored rotary; only its values can be read")

    monkeypatch.setattr(one, "packed", refuse)
    assert blocks.read(one, Slot(Role.Q, 0)) is None


def test_a_symmetric_matrix_with_zeros_of_another_version_is_refused(made, tmp_path):
    """As where it is widened."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    for file in made("gptq").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "quantize_config.json"):
        document = json.loads((folder / name).read_text())
        document.get("quantization_config", document)["checkpoint_format"] = "gptq_v2"
        (folder / name).write_text(json.dumps(document))
    with pytest.raises(TensorError, match="not with the zeros of checkpoint_format gptq_v2"):
        Mixtral.load(open_checkpoint(folder))
