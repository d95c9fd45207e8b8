"""A model whose matrices stay in a GGUF's blocks: against the same from decoded values."""

from __future__ import annotations

import gc
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixtral_oracle import DATA, of_range

import mixtools
from mixtools.errors import ChecksumError, LayoutError, MemoryBudgetError
from mixtools.formats import Ggml
from mixtools.inference import blocks, budget, host, loading, products
from mixtools.inference.blocks import FEW_ROWS, Blocks
from mixtools.inference.generate import Options, generate
from mixtools.inference.model import Block, Cache, Layer, Mixtral, PackedLayer
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.reader import Mapped
from mixtools.layouts.table import Op
from mixtools.names import Role, Slot
from mixtools.ops.decode import decode
from mixtools.storage.dtypes import DType
from mixtools.storage.source import Source
from mixtools.storage.store import from_tensor

NANO = DATA / "nano-mixtral"
TYPES = ("Q8_0", "Q6_K", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_0", "Q5_1", "IQ4_XS")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed")
    mixtools.quantize(NANO, out, type=[*TYPES, "F16"], name="nano")
    return out


@pytest.fixture
def opened(folder: Path):
    return lambda type: open_checkpoint(folder / f"nano.{type}.gguf")


def dense(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> Mixtral:
    """The model of the values that the blocks hold."""
    checkpoint.dense = DType.of(dtype)
    with monkeypatch.context() as patch:
        patch.setattr(blocks, "type_of", lambda *_: None)
        return Mixtral.load(checkpoint, dtype=dtype)


def ids(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(2048, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize("length", [1, FEW_ROWS, FEW_ROWS + 1, 90])
def test_logits_are_those_of_the_decoded_values(opened, type, length, monkeypatch):
    packed = Mixtral.load(opened(type), dtype=torch.float32)
    expected = dense(opened(type), monkeypatch)(ids(length))
    assert all(isinstance(layer, PackedLayer) for layer in packed.layers)
    assert of_range(packed(ids(length)), expected) < 2e-6


def test_in_16_bits_it_is_no_further_from_the_truth_than_decoded_weights(opened, monkeypatch):
    truth = dense(opened("Q4_K_M"), monkeypatch)
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = Mixtral.load(opened("Q4_K_M"), dtype=dtype), dense(opened("Q4_K_M"), monkeypatch, dtype)
        errors = np.zeros(2)
        for seed in range(12):
            text = ids(FEW_ROWS - seed)
            expected = truth(text)
            for place, model in enumerate((ours, theirs)):
                errors[place] += float((model(text) - expected).square().mean())
        assert ours.dtype == dtype and 0 < errors[0] <= 1.2 * errors[1]  # most is the hidden states' own rounding


@pytest.mark.parametrize("narrow", [True, False])
def test_many_rows_go_through_runs_of_decoded_rows(opened, narrow, monkeypatch):
    """Whatever the machine multiplies by itself, and wherever a run ends."""
    monkeypatch.setattr(host, "native", lambda dtype: narrow)
    model = Mixtral.load(opened("Q4_K_M"), dtype=torch.bfloat16)
    chosen: list[torch.Tensor] = []
    route = Block.route

    def noted(self: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        weights, experts = route(self, x)
        chosen.append(experts)
        return weights, experts

    def repeated(self: Block, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a router hesitates a sum in another order might choose another expert."""
        weights = F.linear(x.float(), self.router).softmax(-1).gather(1, chosen[self.index])
        return weights / weights.sum(-1, keepdim=True), chosen[self.index]

    with monkeypatch.context() as patch:
        patch.setattr(Block, "route", noted)
        expected = model(ids(60))
        patch.setattr(Block, "route", repeated)
        for run in (1, 256 * 3, 256 * 255):
            patch.setattr(blocks, "RUN", run)
            torch.testing.assert_close(model(ids(60)), expected, rtol=0, atol=4e-3 * float(expected.abs().max()))
    truth = dense(opened("Q4_K_M"), monkeypatch)(ids(60))
    theirs = dense(opened("Q4_K_M"), monkeypatch, torch.bfloat16)(ids(60))
    # of most tokens: one whose router chose another expert is as far off either way, and outweighs all others
    ours, others = ((found - truth).square().mean(-1).median() for found in (expected, theirs))
    assert ours < 1.2 * others


def test_logits_of_many_rows_are_not_rounded_to_16_bits(opened):
    """As products of bf16 are: near 20 their steps are 1/8, and the likeliest token would be a matter of ties."""
    head = Mixtral.load(opened("Q6_K"), dtype=torch.bfloat16).head
    x = torch.randn(2 * FEW_ROWS, 256).bfloat16()
    logits = head(x)
    assert logits.dtype == torch.float32 and (logits != logits.bfloat16().float()).float().mean() > 0.9
    alone = torch.cat([head(row) for row in x.split(1)])
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5 * float(alone.abs().max()))


@pytest.mark.parametrize("pieces", [[1] * 19, [7, 12], [18, 1]])
def test_pieces_through_the_cache_equal_the_whole(opened, pieces):
    model = Mixtral.load(opened("Q4_K_M"), dtype=torch.float32)
    text, cache = ids(19, batch=2), Cache(model, batch=2, capacity=19)
    found = torch.cat([model(piece, cache) for piece in text.split(pieces, dim=1)], dim=1)
    assert of_range(found, model(text)) < 2e-6


def test_texts_are_the_same_alone_and_together_and_again(opened):
    model = Mixtral.load(opened("Q3_K_M"), dtype=torch.float32)
    prompts = [[1, 5, 9], [1, 7], [1, 300, 20, 11]]
    together = generate(model, prompts, Options(max_new_tokens=12))
    assert together == [generate(model, [prompt], Options(max_new_tokens=12))[0] for prompt in prompts]
    assert together == generate(model, prompts, Options(max_new_tokens=12))
    assert all(len(text) == 12 for text in together)


@pytest.mark.parametrize("type", ["Q4_K_M", "Q8_0"])
def test_what_is_packed_decodes_to_what_is_read(opened, type):
    """Rows of q and k in canonical order, an expert's rows of the stack of all."""
    checkpoint = opened(type)
    seen = 0
    for slot in checkpoint.slots():
        packed = checkpoint.packed(slot)
        if isinstance(packed.format, Ggml):
            seen += 1
            (data,) = packed.parts
            values = decode(data.numpy(), packed.format.type, DType.BF16)
            np.testing.assert_array_equal(values, from_tensor(checkpoint.read(slot)))
        else:
            assert torch.equal(packed.parts[0].reshape(-1), checkpoint.read(slot).reshape(-1))
    assert seen == 2 + 2 * (4 + 3 * 8)


def test_matrices_in_other_formats_are_packed_as_they_are(tmp_path, monkeypatch):
    mixtools.quantize(NANO, tmp_path / "awq", method="awq", calibration=DATA / "text.txt", samples=2, seq_len=32)
    checkpoint = open_checkpoint(tmp_path / "awq")
    slot = Slot(Role.DOWN, 1, 5)
    packed = checkpoint.packed(slot)
    assert torch.equal(packed.format.decode(packed.parts), checkpoint.read(slot))
    piece = checkpoint.piece(slot)._replace(op=Op.TRANSPOSE)
    monkeypatch.setattr(Checkpoint, "piece", lambda *_: piece)
    with pytest.raises(LayoutError, match=r"stored transposed; only its values can be read"):
        checkpoint.packed(slot)


def test_memory_is_what_the_file_holds(opened):
    checkpoint = opened("Q4_K_M")
    model = Mixtral.load(checkpoint, dtype=torch.bfloat16)
    held = [model.embedding.table, model.head.matrix, *(m for layer in model.layers for m in layer.matrices.values())]
    assert all(isinstance(one, Blocks) for one in held)
    stored = sum(entry.nbytes for entry in checkpoint.store.entries.values() if entry.dtype is not DType.F32)
    assert sum(one.data.nbytes for one in held) == stored
    vectors = 2 * 256 * (2 * 2 + 1) + 2 * 2 * 8 * 256  # norms, and routers counted as of 16 bits
    assert budget.held_bytes(checkpoint, checkpoint.slots(), 2, packed=True) == stored + vectors


def in_file(checkpoint: Checkpoint, matrix: Blocks) -> bool:
    """Whether its blocks are the bytes of the mapped file, and no copy."""
    (source,) = checkpoint.store.sources
    (file,) = source._maps.values()
    first = np.frombuffer(file, np.uint8).ctypes.data
    return first <= matrix.data.data_ptr() and matrix.data.data_ptr() + matrix.data.nbytes <= first + len(file)


def test_matrices_stay_in_their_file_but_for_those_whose_rows_move(opened):
    checkpoint = opened("Q4_K_M")
    model = Mixtral.load(checkpoint, dtype=torch.bfloat16)
    assert model.mapped is Mapped.NOW
    assert in_file(checkpoint, model.embedding.table) and in_file(checkpoint, model.head.matrix)
    for slot, matrix in (pair for layer in model.layers for pair in layer.matrices.items()):
        assert in_file(checkpoint, matrix) == checkpoint.maps(slot) == (slot.role not in (Role.Q, Role.K))
        assert not in_file(checkpoint, blocks.read(checkpoint, slot))  # who does not ask for it gets a copy
    assert Mixtral.load(open_checkpoint(NANO)).mapped is Mapped.NOT


def test_a_file_is_there_as_long_as_its_matrices(opened):
    expected = Mixtral.load(opened("Q2_K"), dtype=torch.float32)(ids(7))
    checkpoint = opened("Q2_K")
    model = Mixtral.load(checkpoint, dtype=torch.float32)
    for source in checkpoint.store.sources:
        source.close()
    del checkpoint
    gc.collect()
    assert torch.equal(model(ids(7)), expected)


def test_where_nothing_can_be_mapped_it_is_read(opened, monkeypatch):
    expected = Mixtral.load(opened("Q3_K_M"), dtype=torch.float32)(ids(7))
    monkeypatch.setattr(Source, "mapped", lambda *_, **__: None)
    assert torch.equal(Mixtral.load(opened("Q3_K_M"), dtype=torch.float32)(ids(7)), expected)


def test_the_limit_is_on_all_that_may_come_into_memory(opened):
    checkpoint = opened("Q2_K")
    moved = [slot for slot in checkpoint.slots() if not checkpoint.maps(slot)]
    need = budget.held_bytes(checkpoint, checkpoint.slots(), 2, packed=True)
    need += max(budget.stored_bytes(checkpoint, slot) for slot in moved)
    assert need < checkpoint.config.num_parameters
    assert Mixtral.load(checkpoint, dtype=torch.bfloat16, max_memory=need).mapped is Mapped.NOW
    with pytest.raises(MemoryBudgetError, match="the model in its blocks exceeds the memory allowed"):
        Mixtral.load(checkpoint, dtype=torch.bfloat16, max_memory=need - 1)


def test_what_is_in_the_file_may_exceed_memory_where_that_is_wanted(opened, monkeypatch):
    checkpoint, asked = opened("Q4_K_M"), []
    expected = Mixtral.load(checkpoint, dtype=torch.float32)(ids(9))
    monkeypatch.setattr(Source, "_fetch", lambda *place: asked.append(place))
    moved = [slot for slot in checkpoint.slots() if not checkpoint.maps(slot)]
    least = budget.held_bytes(checkpoint, moved, 4, packed=True)
    least += max(budget.stored_bytes(checkpoint, slot) for slot in moved)
    model = Mixtral.load(checkpoint, dtype=torch.float32, max_memory=least, beyond=True)
    assert model.mapped is Mapped.LATER and not asked
    assert torch.equal(model(ids(9)), expected)
    assert "the model takes" in str(loading.paged(checkpoint, model, least))
    with pytest.raises(MemoryBudgetError):
        Mixtral.load(checkpoint, dtype=torch.float32, max_memory=least - 1, beyond=True)
    whole = Mixtral.load(checkpoint, dtype=torch.float32, max_memory=1 << 30, beyond=True)
    assert whole.mapped is Mapped.NOW and asked and loading.paged(checkpoint, whole, 1 << 30) is None
    with pytest.raises(MemoryBudgetError, match="the model at 32 bits"):
        Mixtral.load(open_checkpoint(NANO), dtype=torch.float32, max_memory=least, beyond=True)


def test_a_damaged_block_is_told_of_though_it_is_not_copied(folder, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy")) / "nano.Q4_0.gguf"
    slot = Slot(Role.DOWN, 1, 3)
    checkpoint = open_checkpoint(copy)
    entry = checkpoint.entry(slot)
    assert entry.record is not None  # listed in mixtools.json
    raw = bytearray(copy.read_bytes())
    raw[entry.offset + 12345] ^= 8
    copy.write_bytes(raw)
    with pytest.raises(ChecksumError) as caught:
        Mixtral.load(open_checkpoint(copy))
    assert caught.value.tensor == entry.name and str(copy) == str(caught.value.file)


def test_a_type_without_a_kernel_is_decoded_and_the_rest_stays(opened, monkeypatch):
    expected = Mixtral.load(opened("Q4_K_M"), dtype=torch.float32)(ids(9))
    monkeypatch.setattr(blocks, "NATIVE", blocks.NATIVE - {DType.Q6_K})
    checkpoint = opened("Q4_K_M")
    checkpoint.dense = DType.F32
    model = Mixtral.load(checkpoint, dtype=torch.float32)
    kinds = {type(one) for layer in model.layers for one in layer.matrices.values()}
    assert kinds == {Blocks, torch.Tensor}
    assert of_range(model(ids(9)), expected) < 2e-6


def test_what_is_not_in_blocks_is_loaded_as_before(opened):
    assert all(isinstance(layer, Layer) for layer in Mixtral.load(opened("F16")).layers)
    assert all(isinstance(layer, Layer) for layer in Mixtral.load(open_checkpoint(NANO)).layers)


def test_progress_counts_what_is_held(opened):
    seen = []

    class Told:
        def start(self, title: str, total: int, unit: str = "B") -> None:
            seen.append(total)

        def advance(self, count: int) -> None:
            seen.append(-count)

        def finish(self) -> None: ...

    checkpoint = opened("Q4_K_M")
    Mixtral.load(checkpoint, progress=Told())
    assert sum(seen) == 0 and len(seen) == 1 + len([*checkpoint.slots()])
    stored = sum(entry.nbytes for entry in checkpoint.store.entries.values())
    assert seen[0] < 1.01 * stored


def test_generate_speaks_from_blocks(folder):
    said = mixtools.generate(folder / "nano.Q8_0.gguf", "The following", max_new_tokens=8)
    assert said.text and len(said.tokens) == 8


def test_rows_of_a_dense_table_and_of_blocks():
    table = torch.randn(7, 32)
    picked = torch.tensor([[3, 0], [6, 3]])
    assert torch.equal(products.rows(picked, table, torch.float32), table[picked])
