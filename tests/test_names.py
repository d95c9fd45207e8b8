"""Slots, against the names that transformers' own model has."""

from __future__ import annotations

import transformers
from layouts import make

from mixtools.config import MixtralConfig
from mixtools.names import Role, Slot, all_slots, layer_slots


def test_every_slot_once_and_none_forgotten() -> None:
    config = transformers.MixtralConfig(
        hidden_size=8, intermediate_size=4, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=9, num_local_experts=4,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    ours = MixtralConfig(8, 4, 3, 2, 1, 4, 9, num_experts=4)
    slots = list(ours.slots())
    assert len(slots) == len(set(slots)) == 1 + 3 * (7 + 3 * 4) + 2
    assert ours.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    names = {make.hf_name(slot) for slot in slots}
    assert len(names) == len(slots)
    theirs = {name for name, _ in model.named_parameters()}
    assert {name for name in names if ".block_sparse_moe." not in name} == {n for n in theirs if ".mlp." not in n}


def test_published_sizes() -> None:
    """Parameters and tensors of 8x7B and 8x22B, as their model cards and index files state them."""
    small = MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000)
    large = MixtralConfig(6144, 16384, 56, 48, 8, 128, 32000)
    instruct = MixtralConfig(6144, 16384, 56, 48, 8, 128, 32768)
    assert [config.num_parameters for config in (small, large, instruct)] == [
        46_702_792_704, 140_620_634_112, 140_630_071_296,
    ]  # fmt: skip
    assert [len(list(config.slots())) for config in (small, large)] == [995, 1739]


def test_order_is_that_of_a_forward_pass() -> None:
    slots = list(all_slots(2, 2))
    assert slots[0] == Slot(Role.EMBED)
    assert slots[-2:] == [Slot(Role.NORM), Slot(Role.HEAD)]
    assert slots[1:-2] == [*layer_slots(0, 2), *layer_slots(1, 2)]
    assert [slot.role.value for slot in layer_slots(0, 1)] == [
        "attention_norm", "q", "k", "v", "o", "ffn_norm", "router", "w1", "w2", "w3",
    ]  # fmt: skip


def test_text() -> None:
    assert [str(slot) for slot in (Slot(Role.EMBED), Slot(Role.Q, 3), Slot(Role.DOWN, 17, 5))] == [
        "embed", "layers.3.q", "layers.17.experts.5.w2",
    ]  # fmt: skip
