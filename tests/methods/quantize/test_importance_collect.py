"""What a streamed forward collects, against llama-imatrix (tests/golden/imatrix.md) and against itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixtral_oracle import SHAPES, read_nano
from streaming import allocated, some_ids

from mixtools.checking import perplexity
from mixtools.config import MixtralConfig
from mixtools.errors import TensorError
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.methods.quantize.collect import Squares, collect, reserved_bytes, shapes, token_flop
from mixtools.methods.quantize.importance import Importance
from mixtools.names import Role, Slot
from mixtools.text.tokenizer import Tokenizer

TESTS = Path(__file__).parents[2]
NANO, TEXT = TESTS / "data" / "nano-mixtral", TESTS / "data" / "text.txt"
GOLDEN: dict[str, Any] = json.loads((TESTS / "golden" / "imatrix-nano.json").read_text("utf-8"))
GATE = "blk.{}.ffn_gate_exps.weight"


def windows() -> tuple[torch.Tensor, ...]:
    tokenizer = Tokenizer.from_folder(NANO)
    ids = tokenizer.encode(TEXT.read_text("utf-8").removesuffix("\n"))
    return perplexity.cut(ids, "llamacpp", bos_id=tokenizer.bos_id, ctx=GOLDEN["chunk_size"]).sequences


def test_sums_and_counts_are_llama_imatrix_s() -> None:
    ids = windows()
    assert len(ids) == GOLDEN["chunks"] == 12
    sums, counts = collect(Stream(read_nano(), dtype=torch.float32), ids, process_output=True)
    assert sums.keys() == counts.keys() == GOLDEN["entries"].keys()
    for name, golden in GOLDEN["entries"].items():
        assert sums[name].dtype == counts[name].dtype == np.float32
        np.testing.assert_array_equal(counts[name], golden["counts"], err_msg=name)
        np.testing.assert_allclose(sums[name].sum(1, dtype=np.float64), golden["totals"], rtol=1e-4, err_msg=name)
        columns = sums[name][:, :: GOLDEN["every"]]
        np.testing.assert_allclose(columns, golden["columns"], rtol=1e-3, err_msg=name)


def test_in_the_stored_dtype_the_means_are_close_to_llama_imatrix_s() -> None:
    """bf16 rounds what the router sees: some tokens go elsewhere, and each expert's mean hardly changes."""
    sums, counts = collect(Stream(read_nano(), dtype=torch.bfloat16), windows())
    assert "output.weight" not in sums
    for name in sums:
        golden = GOLDEN["entries"][name]
        np.testing.assert_allclose(counts[name], golden["counts"], rtol=0.05, atol=4)
        many = counts[name] > 100
        ours, theirs = sums[name].sum(1)[many] / counts[name][many], np.divide(golden["totals"], golden["counts"])[many]
        np.testing.assert_allclose(ours, theirs, rtol=0.02, err_msg=name)


def test_each_token_counts_at_the_experts_it_is_sent_to() -> None:
    reader = random_reader(SHAPES["top3"], 5)
    sums, counts = collect(Stream(reader, dtype=torch.float32), some_ids(50, 9, 9, 4), process_output=True)
    for layer in range(2):
        for role in ("gate", "up", "down"):
            assert counts[f"blk.{layer}.ffn_{role}_exps.weight"].sum() == 3 * 22
        for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"):
            assert counts[f"blk.{layer}.{name}.weight"].tolist() == [22]
        # each token's vector is summed once for the router and at its three experts
        routed = sums[GATE.format(layer)].sum(0, dtype=np.float64)
        np.testing.assert_allclose(routed, 3 * sums[f"blk.{layer}.ffn_gate_inp.weight"][0], rtol=1e-5)
    # the final norm makes every vector's mean square one, before its weights
    norm = reader.read(Slot(Role.NORM)).numpy()
    np.testing.assert_allclose((sums["output.weight"][0] / norm**2).sum(), 22 * 64, rtol=1e-3)


def without(expert: int) -> MemoryReader:
    """nano, whose layer 1 never chooses one expert: what the router sees there has a column that is always 1."""
    nano = read_nano()
    tensors = {slot: nano.read(slot).float() for slot in nano.slots()}
    norm = Slot(Role.FFN_NORM, 1)
    for layer in range(2):  # a residual that only grows: the embedding sets a column that nothing writes to
        tensors[Slot(Role.O, layer)][0] = 0
        for one in range(8):
            tensors[Slot(Role.DOWN, layer, one)][0] = 0
    tensors[Slot(Role.EMBED)][:, 0] = 1
    tensors[norm][0] = 1
    router = tensors[Slot(Role.ROUTER, 1)]
    router[:, 0] = 0
    router[expert, 0] = -1e4
    return MemoryReader(nano.config, tensors)


def test_a_starved_expert_has_no_sums_and_weighs_all_columns_alike() -> None:
    sums, counts = collect(Stream(without(5), dtype=torch.float32), some_ids(2048, 32, 32))
    name = GATE.format(1)
    assert counts[name][5] == 0 and counts[name].sum() == 128 and not sums[name][5].any()
    found = Importance(sums, counts, (), 2, 32, None)
    for entry in (name, "blk.1.ffn_up_exps.weight", "blk.1.ffn_down_exps.weight"):
        np.testing.assert_array_equal(found.weights(entry, 5, 256), np.ones(256))
    found.expect_model(read_nano().config)


def test_what_is_in_memory_changes_nothing(tmp_path: Path) -> None:
    ids = some_ids(2048, 64, 64, 64)
    stream = Stream(read_nano(), dtype=torch.float32, spill=tmp_path)
    sums, counts = collect(stream, ids, process_output=True)
    least = stream.plan([64] * 3).peak_bytes
    tight = Stream(read_nano(), dtype=torch.float32, spill=tmp_path, max_memory=least * 2 // 3)
    again, counted = collect(tight, ids, process_output=True)
    assert tight.remarks  # it had to do without something
    for name in sums:
        np.testing.assert_array_equal(counted[name], counts[name])
        np.testing.assert_allclose(again[name], sums[name], rtol=1e-5)


def test_memory_is_within_what_was_reserved() -> None:
    reader, ids = random_reader(SHAPES["top3"], 5), some_ids(50, 256, 256)
    stream = Stream(reader, dtype=torch.float32)
    before = stream.plan([256, 256]).peak_bytes
    peak = allocated(lambda: collect(stream, ids, process_output=True))
    assert stream.plan([256, 256]).peak_bytes == before + reserved_bytes(reader.config) >= peak


def test_room_for_the_sums_is_reserved() -> None:
    """Sixty-four experts make them many: once as they are summed, once as they are given back."""
    config = MixtralConfig(64, 64, 8, 4, 4, 16, 50, num_experts=64)
    sums, counts = collect(Stream(random_reader(config, 5), dtype=torch.float32), some_ids(50, 4))
    size = sum(array.nbytes for table in (sums, counts) for array in table.values())
    assert 2 * size <= reserved_bytes(config) <= 3 * size


def test_one_layer_s_sums_are_wide_at_a_time() -> None:
    squares = Squares()
    squares(Slot(Role.Q, 0), torch.full((2, 3), 1e30), None, None)
    with pytest.raises(TensorError, match=r"layers\.0\.q: the squares of its inputs sum to inf in column 0"):
        squares(Slot(Role.Q, 1), torch.ones(2, 3), None, None)


def test_a_model_that_gives_nan_is_told() -> None:
    nano = read_nano()
    tensors = {slot: nano.read(slot) for slot in nano.slots()}
    tensors[Slot(Role.UP, 0, 3)][7, 7] = torch.nan
    stream = Stream(MemoryReader(nano.config, tensors), dtype=torch.float32)
    with pytest.raises(
        TensorError, match=r"layers\.0\.experts\.3\.w2: the squares of its inputs sum to nan in column 7"
    ):
        collect(stream, windows())


def test_sizes_told_before() -> None:
    config = read_nano().config
    sums, counts = collect(Stream(read_nano(), dtype=torch.float32), some_ids(2048, 8), process_output=True)
    told = shapes(config, process_output=True)
    assert told == {name: array.shape for name, array in sums.items()} and [*told] == [*counts]
    assert told.keys() - shapes(config).keys() == {"output.weight"}
    # q, k, v, o and the router, two of eight experts, and what attention does at a context of 64
    weights = 256 * (256 + 128 + 128 + 256 + 8) + 2 * 3 * 256 * 256
    assert token_flop(config, 64) == 2 * 2 * (weights + 64 * 256)
