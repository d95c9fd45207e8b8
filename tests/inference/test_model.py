"""The model against logits made in fp64 by other code, against transformers, and against itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixtral_oracle import DATA, SHAPES, of_range, read_nano, transformers_model

from mixtools.errors import LayoutError, MemoryBudgetError, TensorError
from mixtools.inference import budget
from mixtools.inference.attention import span
from mixtools.inference.model import Cache, Head, Layer, Mixtral
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import Role, Slot, layer_slots

LANGUAGES = ("en", "fr", "de", "it", "es")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def nano() -> MemoryReader:
    return read_nano()


@pytest.fixture(scope="module")
def texts() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per language: ids [1, T] and fp64-made logits [T, V]."""
    with np.load(DATA / "reference_logits.npz") as stored:
        return {
            language: (torch.from_numpy(stored[f"{language}_ids"]).long()[None],
                       torch.from_numpy(stored[f"{language}_logits"]))
            for language in LANGUAGES
        }  # fmt: skip


@pytest.fixture(params=SHAPES)
def reader(request: pytest.FixtureRequest) -> MemoryReader:
    return random_reader(SHAPES[request.param], seed=len(request.param))


def some_ids(reader: MemoryReader, batch: int, length: int) -> torch.Tensor:
    return torch.randint(reader.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("language", LANGUAGES)
def test_nano_equals_the_fp64_reference(nano, texts, language):
    ids, expected = texts[language]
    assert of_range(Mixtral.load(nano, dtype=torch.float32)(ids)[0], expected) < 2e-6


@torch.no_grad()
def test_nano_in_16_bits_is_no_further_from_the_truth_than_transformers(nano, texts):
    for dtype in (torch.bfloat16, torch.float16):
        ours, theirs = Mixtral.load(nano, dtype=dtype), transformers_model(nano, dtype)
        squares = np.zeros(2)
        for ids, expected in texts.values():
            for place, logits in enumerate((ours(ids)[0], theirs(ids).logits[0])):
                squares[place] += float((logits.float() - expected).square().mean())
        assert 0 < squares[0] <= squares[1]


@torch.no_grad()
def test_equals_transformers(reader):
    ids = some_ids(reader, batch=3, length=33)
    logits = Mixtral.load(reader, dtype=torch.float32)(ids)
    expected = transformers_model(reader)(ids).logits
    assert logits.dtype == torch.float32
    assert logits.shape == (3, 33, reader.config.vocab_size)
    assert of_range(logits, expected) < 2e-5


@torch.no_grad()
def test_stored_dtype_may_differ_from_the_dtype_of_computing(reader):
    narrow = random_reader(reader.config, seed=5, dtype=torch.bfloat16)
    ids = some_ids(reader, batch=1, length=20)
    assert of_range(Mixtral.load(narrow, dtype=torch.float32)(ids), transformers_model(narrow)(ids).logits) < 2e-5


@torch.no_grad()
def test_far_positions_turn_as_in_transformers(nano):
    rotary = transformers_model(nano).model.rotary_emb
    positions = torch.arange(32700, 32768)[None]
    cos, sin = rotary(torch.zeros(1), positions)
    where = span(nano.config, 68, CPU, start=32700)
    half = nano.config.head_dim // 2
    torch.testing.assert_close(where.cos[:, 0], cos[..., :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(where.sin[:, 0], sin[..., half:], rtol=0, atol=1e-6)


@torch.no_grad()
def test_positions_count_from_the_first_token_that_is_text(nano):
    """Attention sees only differences of positions, so logits would hide a shift until it runs out of positions."""
    rotary = transformers_model(nano).model.rotary_emb
    padding = torch.tensor([0, 3, 9])
    text = torch.arange(10)[None] >= padding[:, None]
    cos, _ = rotary(torch.zeros(1), (text.cumsum(1) - 1).clamp(min=0))
    half = nano.config.head_dim // 2
    whole = span(nano.config, 10, CPU, padding=padding).cos
    rest = span(nano.config, 4, CPU, start=6, padding=padding).cos
    torch.testing.assert_close(whole[:, 0], cos[..., :half], rtol=0, atol=1e-6)
    torch.testing.assert_close(rest[:, 0], cos[:, 6:, :half], rtol=0, atol=1e-6)


@pytest.mark.parametrize("pieces", [[1] * 19, [7, 12], [18, 1], [1, 5, 1, 12]])
def test_pieces_through_the_cache_equal_the_whole(reader, pieces):
    model = Mixtral.load(reader, dtype=torch.float32)
    ids = some_ids(reader, batch=2, length=19)
    cache = Cache(model, batch=2, capacity=19)
    found = torch.cat([model(piece, cache) for piece in ids.split(pieces, dim=1)], dim=1)
    assert of_range(found, model(ids)) < 2e-6
    with pytest.raises(ValueError, match="19 columns"):
        model(ids[:, :1], cache)


@pytest.mark.parametrize("columns", [4, 11])
def test_each_row_of_a_padded_batch_equals_itself_alone(reader, columns):
    model = Mixtral.load(reader, dtype=torch.float32)
    lengths = (11, 1, 4, 10)
    rows = [some_ids(reader, 1, length)[0] for length in lengths]
    padding = torch.tensor([11 - length for length in lengths])
    ids = torch.stack([torch.nn.functional.pad(row, (11 - len(row), 0)) for row in rows])
    cache = Cache(model, batch=4, capacity=13, padding=padding)
    prompt = torch.cat([model(piece, cache) for piece in ids.split(columns, dim=1)], dim=1)
    cache.select(torch.tensor([0, 1, 3]))  # the third prompt ends here
    further = [torch.tensor([[5], [6], [7]]), torch.tensor([[8], [9], [10]])]
    after = torch.cat([model(step, cache) for step in further], dim=1)
    for place, row in ((0, 0), (1, 1), (2, 3)):
        alone = model(torch.cat([rows[row], *(step[place] for step in further)])[None])[0]
        found = torch.cat([prompt[row, 11 - lengths[row] :], after[place]])
        assert of_range(found, alone) < 2e-6


def test_last_only_and_chunks_are_parts_of_all_logits(nano, texts):
    model = Mixtral.load(nano, dtype=torch.bfloat16)
    ids, _ = texts["de"]
    logits = model(ids)
    torch.testing.assert_close(model(ids, last_only=True), logits[:, -1:], rtol=1e-5, atol=1e-5)
    chunks = list(model.head.chunks(model.hidden(ids)[0], rows=32))
    assert [start for start, _ in chunks] == [0, 32, 64, 96]
    torch.testing.assert_close(torch.cat([part for _, part in chunks]), logits[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_observer_sees_what_transformers_linears_see(reader):
    theirs, seen = transformers_model(reader), {}
    names = {Role.Q: "q_proj", Role.K: "k_proj", Role.V: "v_proj", Role.O: "o_proj"}
    watched = {Slot(Role.HEAD): theirs.lm_head}
    for index, layer in enumerate(theirs.model.layers):
        watched |= {Slot(role, index): getattr(layer.self_attn, name) for role, name in names.items()}
        watched[Slot(Role.ROUTER, index)] = layer.mlp.gate
    for slot, module in watched.items():
        module.register_forward_hook(lambda _, args, out, slot=slot: seen.update({slot: (args[0], out)}))
    ids, ours = some_ids(reader, batch=2, length=15), {}

    def observe(slot, x, tokens, weights):
        assert slot not in ours
        ours[slot] = (x.clone(), tokens, weights)

    theirs(ids)
    Mixtral.load(reader, dtype=torch.float32)(ids, observer=observe)
    experts = {slot for slot in reader.slots() if slot.expert is not None}
    assert seen.keys() <= ours.keys() <= seen.keys() | experts
    for slot, (x, _) in seen.items():
        expected = x.reshape(30, -1)
        torch.testing.assert_close(ours[slot][0], expected, rtol=1e-4, atol=1e-4)
    for layer, block in enumerate(theirs.model.layers):
        x, (_, weights, chosen) = seen[Slot(Role.ROUTER, layer)]
        for expert in range(reader.config.num_experts):
            tokens, place = torch.where(chosen == expert)
            if not len(tokens):
                assert Slot(Role.GATE, layer, expert) not in ours
                continue
            for role in (Role.GATE, Role.UP, Role.DOWN):
                found, rows, shares = ours[Slot(role, layer, expert)]
                assert rows.tolist() == tokens.tolist()
                torch.testing.assert_close(shares, weights[tokens, place], rtol=1e-4, atol=1e-5)
                inner = x.reshape(30, -1)[tokens]
                if role is Role.DOWN:
                    gate, up = (inner @ block.mlp.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
                    inner = torch.nn.functional.silu(gate) * up
                torch.testing.assert_close(found, inner, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_router_decides_in_fp32_whatever_the_rest_is(dtype):
    """In 16 bits near ties would go to other experts."""
    reader = random_reader(SHAPES["top3"], seed=1)
    x = torch.randn(4000, reader.config.hidden_size, generator=torch.Generator().manual_seed(2)).to(dtype)
    router = reader.read(Slot(Role.ROUTER, 0))
    expected, chosen = (x.double() @ router.double().T).softmax(-1).topk(3)
    weights, experts = Layer.load(reader, 0, CPU, dtype).route(x)
    assert weights.dtype == torch.float32
    assert torch.equal(experts, chosen)
    torch.testing.assert_close(weights.double(), expected / expected.sum(-1, keepdim=True), rtol=1e-5, atol=0)
    rounded = (x @ router.to(dtype).T).float().topk(3).indices
    assert not torch.equal(rounded, chosen)


def test_a_layer_refilled_is_the_other_layer(reader):
    layer = Layer.load(reader, 0, CPU, torch.float32)
    memory = layer.gate_up.data_ptr()
    layer.fill(reader, 1)
    other = Layer.load(reader, 1, CPU, torch.float32)
    for slot in layer_slots(1, reader.config.num_experts):
        assert torch.equal(layer.weight(slot), reader.read(slot))
        assert layer.weight(slot).is_contiguous()
    x = torch.randn(2, 9, reader.config.hidden_size, generator=torch.Generator().manual_seed(0))
    where = span(reader.config, 9, CPU)
    assert torch.equal(layer(x, where), other(x, where))
    assert layer.gate_up.data_ptr() == memory


def test_a_weight_copied_into_the_view_is_the_weight_that_runs(reader):
    layer = Layer.load(reader, 0, CPU, torch.float32)
    x = torch.randn(1, 9, reader.config.hidden_size, generator=torch.Generator().manual_seed(0))
    where = span(reader.config, 9, CPU)
    before = layer(x, where)
    for expert in range(reader.config.num_experts):
        layer.weight(Slot(Role.UP, 0, expert)).zero_()
    after_attention = x + layer.attention(
        torch.nn.functional.rms_norm(x, x.shape[-1:], layer.attention_norm, reader.config.rms_norm_eps), where
    )
    torch.testing.assert_close(layer(x, where), after_attention)
    assert not torch.allclose(before, after_attention)


def test_progress_tells_every_tensors_bytes(nano):
    told = []

    class Told:
        def start(self, label, total, unit="B"):
            told.append((label, total, unit))

        def advance(self, amount):
            told.append(amount)

        def finish(self):
            told.append("finish")

    Mixtral.load(nano, dtype=torch.bfloat16, progress=Told())
    sizes = [nano.read(slot).nbytes for slot in nano.slots()]
    assert told == [("loading", sum(sizes), "B"), *sizes, "finish"]


def test_a_shape_that_contradicts_the_configuration_is_named(reader):
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    slot = Slot(Role.DOWN, 1, 2)
    tensors[slot] = tensors[slot].T.contiguous()
    with pytest.raises(TensorError, match=r"layers\.1\.experts\.2\.w2.*expected \(\d+, \d+\), found"):
        Mixtral.load(MemoryReader(reader.config, tensors))


def test_a_reader_with_a_tensor_missing_or_unknown_is_refused(reader):
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    extra = {**tensors, Slot(Role.Q, 99): tensors[Slot(Role.NORM)]}
    with pytest.raises(LayoutError, match=r"layers\.99\.q.*unknown"):
        MemoryReader(reader.config, extra)
    del tensors[Slot(Role.NORM)]
    with pytest.raises(LayoutError, match=r"norm.*missing"):
        MemoryReader(reader.config, tensors)


def test_a_model_over_its_budget_is_refused_before_reading(nano):
    class Unread(MemoryReader):
        def read(self, slot):
            raise AssertionError(slot)

    unread = Unread(nano.config, {slot: nano.read(slot) for slot in nano.slots()})
    largest = nano.config.vocab_size * nano.config.hidden_size * 2
    whole = nano.config.num_parameters * 4 + largest
    layer = budget.layer_bytes(nano.config, 4) + largest
    for limit, advice in ((whole - 1, "bf16 or fp16"), (layer, "one layer at a time"), (layer - 1, "even one layer")):
        with pytest.raises(MemoryBudgetError, match=advice):
            Mixtral.load(unread, dtype=torch.float32, max_memory=limit)
    Mixtral.load(nano, dtype=torch.float32, max_memory=whole)


def test_budget_counts_what_the_parts_hold(nano):
    layer = Layer.load(nano, 0, CPU, torch.bfloat16)
    held = sum(layer.weight(slot).numel() for slot in layer_slots(0, nano.config.num_experts))
    assert budget.layer_bytes(nano.config, 2) == held * 2
    head = Head.load(nano, CPU, torch.bfloat16)
    embedding = nano.config.vocab_size * nano.config.hidden_size
    assert nano.config.num_parameters == held * 2 + head.norm.numel() + head.matrix.numel() + embedding


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_equals_the_cpu(nano, texts, dtype):
    ids, expected = texts["fr"]
    model = Mixtral.load(nano, device="cuda", dtype=dtype)
    cache = Cache(model, batch=1, capacity=ids.shape[1])
    pieces = [model(piece, cache) for piece in ids.cuda().split([60, 1, ids.shape[1] - 61], dim=1)]
    limit = 1e-5 if dtype == torch.float32 else 1e-2
    assert of_range(torch.cat(pieces, dim=1)[0].cpu(), expected) < limit
