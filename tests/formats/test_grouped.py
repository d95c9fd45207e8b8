"""GPTQ, AWQ and compressed-tensors: what is encoded is what other programs' readers must see, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packing import Grid

from mixtools import formats
from mixtools.errors import TensorError
from mixtools.formats import Awq, Gptq, Packed, PackedInts, Stored
from mixtools.formats.gptq import quantize_config
from mixtools.storage.dtypes import DType

Kind = Gptq | Awq | PackedInts
KINDS: list[Kind] = [
    *(Gptq(bits, group) for bits in (2, 3, 4, 8) for group in (-1, 32)),
    *(Gptq(bits, 32, symmetric=False) for bits in (2, 3, 4, 8)),
    *(Gptq(4, 64, symmetric=symmetric, v2=True) for symmetric in (True, False)),
    *(Awq(group, symmetric=symmetric) for group in (-1, 32) for symmetric in (True, False)),
    *(PackedInts(bits, -1) for bits in (2, 3, 4, 8)),
    *(PackedInts(bits, 32, symmetric=False) for bits in (2, 3, 4, 8)),
    PackedInts(4, 32, DType.BF16), Gptq(4, 32, DType.BF16),
]  # fmt: skip
ROWS, COLUMNS = 32, 192


def grid(kind: Kind, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> Grid:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return Grid.of(weight, kind.bits, kind.group, symmetric=kind.symmetric)


def encode(kind: Kind, of: Grid, **other: torch.Tensor) -> Packed:
    given = {"codes": of.codes.to(torch.uint8), "scales": of.scales.float(), "zeros": of.zeros.to(torch.uint8)}
    return kind.encode(**{**given, **other})


def theirs(kind: Kind, of: Grid) -> dict[str, torch.Tensor]:
    if isinstance(kind, Gptq):
        return of.gptq(0 if kind.v2 else 1)
    return of.awq() if isinstance(kind, Awq) else of.compressed(symmetric=kind.symmetric)


def stored(kind: Kind, shape: tuple[int, int]) -> dict[str, Stored]:
    return {part.suffix: Stored(part.dtype, part.shape) for part in kind.parts(shape)}


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_bytes_are_those_of_plain_loops(kind: Kind) -> None:
    of = grid(kind)
    if kind.dtype is DType.BF16:
        of = Grid(of.bits, of.codes, of.scales.bfloat16(), of.zeros, of.index)
    packed = encode(kind, of)
    expected = theirs(kind, of)
    for part, planned in zip(packed.parts, kind.parts((ROWS, COLUMNS)), strict=True):
        assert torch.equal(part, expected[planned.suffix]), planned.suffix
        assert (tuple(part.shape), part.dtype) == (planned.shape, planned.dtype.torch())
        assert part.is_contiguous()
    assert torch.equal(packed.dense, of.dense.to(kind.dtype.torch()) if kind.dtype is DType.F16 else exactly(of, kind))


def exactly(of: Grid, kind: Kind) -> torch.Tensor:
    exact = of.scales.double()[:, of.index] * (of.codes - of.zeros[:, of.index])
    return exact.to(kind.dtype.torch())


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(KINDS), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_decoding_is_the_exact_product_rounded_once(kind: Kind, rows: int, columns: int, seed: int) -> None:
    of = grid(kind, 32 * rows, 64 * columns, seed)
    if kind.dtype is DType.BF16:
        of = Grid(of.bits, of.codes, of.scales.bfloat16(), of.zeros, of.index)
    packed = encode(kind, of)
    assert torch.equal(packed.dense, exactly(of, kind))
    for dtype in (DType.F32, DType.BF16):
        found = kind.to(dtype).decode(packed.parts)
        assert torch.equal(found, exactly(of, kind.to(dtype)))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_planned_is_recognised_by_its_own_configuration(kind: Kind) -> None:
    about = kind.fragment()["quantization_config"]
    assert formats.claims(about)
    assert formats.detect(stored(kind, (ROWS, COLUMNS)), about) == kind
    assert {part.suffix for part in kind.parts((ROWS, COLUMNS))} <= set(kind.suffixes)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_decoding_takes_no_more_than_it_says(kind: Kind) -> None:
    packed = encode(Gptq(4, 32) if kind.dtype is DType.BF16 else kind, grid(kind))
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        dense = packed.dense
    made = sum(max(0, event.self_cpu_memory_usage) for event in profile.function_events)
    assert made <= kind.decode_bytes((ROWS, COLUMNS)) + dense.nbytes


def test_an_order_of_columns_is_followed() -> None:
    """As desc_act leaves it: the group of each column is what g_idx says, not where it stands."""
    of = Grid.of(torch.randn(64, 128), 4, 32, symmetric=False, shuffled=True)
    parts = tuple(of.gptq().values())
    assert torch.equal(Gptq(4, 32, symmetric=False).decode(parts), of.dense)
    assert not torch.equal(of.index, torch.arange(128) // 32)


BAD: list[tuple[Kind, str, Any, str]] = [
    (Gptq(4, 32, symmetric=False), "zeros", 0, "first version holds a zero less one: a zero of 0 .* expected 1 to 15"),
    (Gptq(4, 32), "zeros", 7, "symmetric grid has its zero in the middle: a zero of 7 .*expected 8"),
    (Awq(32), "zeros", 16, "a zero of 16 cannot be stored"),
    (Awq(32, symmetric=True), "zeros", 9, "in the middle"),
    (PackedInts(8, 32), "zeros", 127, "in the middle"),
    (PackedInts(3, 32, symmetric=False), "zeros", 8, "zeros have 3 bits: a zero of 8"),
    (Gptq(4, 32), "codes", 16, "code 16 does not fit into 4 bits"),
    (Awq(32), "codes", 16, "code 16 does not fit into 4 bits"),
    (PackedInts(3, 32, symmetric=False), "codes", 8, "code 8 does not fit into 3 bits"),
    (Gptq(4, 32), "scales", float("inf"), "no finite F16 number: inf"),
    (Awq(32), "scales", 65520.0, "no finite F16 number"),
    (PackedInts(4, 32), "scales", float("nan"), "no finite F16 number: nan"),
    (
        PackedInts(4, 32, DType.BF16),
        "scales",
        1.0009765625,
        "no BF16 number, so that its codes were chosen for another",
    ),
]


@pytest.mark.parametrize(("kind", "what", "value", "told"), BAD, ids=lambda value: str(value)[:24])
def test_what_a_format_cannot_hold(kind: Kind, what: str, value: Any, told: str) -> None:
    of = grid(kind)
    if kind.dtype is DType.BF16:
        of = Grid(of.bits, of.codes, of.scales.bfloat16(), of.zeros, of.index)
    good = {"codes": of.codes.to(torch.uint8), "scales": of.scales.float(), "zeros": of.zeros.int()}
    kind.encode(**good)
    good[what][-1, -1] = value
    with pytest.raises(TensorError, match=told):
        kind.encode(**good)


def test_a_zero_of_nothing_is_held_by_the_others() -> None:
    for kind in (Gptq(4, 32, symmetric=False, v2=True), Awq(32), PackedInts(4, 32, symmetric=False)):
        of = grid(kind)
        of.zeros[:] = 0
        assert torch.equal(encode(kind, of).dense, of.dense)


@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        (Gptq(4, 32), 24, 64),
        (Gptq(4, 8), 32, 40),
        (Gptq(4, 64), 32, 96),
        (Awq(32), 12, 64),
        (Awq(32), 16, 48),
        (PackedInts(4, 32), 8, 48),
    ],
    ids=str,
)
def test_matrices_that_words_or_groups_do_not_divide(kind: Kind, rows: int, columns: int) -> None:
    groups = -(-columns // kind.group)
    codes, scales = torch.zeros(rows, columns, dtype=torch.uint8), torch.ones(rows, groups)
    with pytest.raises(TensorError, match="no multiple of"):
        kind.encode(codes, scales, torch.full((rows, groups), 8))


@pytest.mark.parametrize("kind", [Gptq(4, 32), Awq(32), PackedInts(4, 32)], ids=str)
def test_scales_and_zeros_must_be_those_of_the_groups(kind: Kind) -> None:
    of = grid(kind)
    for what in ("scales", "zeros"):
        whole = of.scales.float() if what == "scales" else of.zeros
        with pytest.raises(TensorError, match=f"{what} of a wrong shape"):
            encode(kind, of, **{what: whole[:, :-1]})
    with pytest.raises(TensorError, match="codes are bytes"):
        encode(kind, of, codes=of.codes.int())
    with pytest.raises(TensorError, match="only a matrix"):
        kind.parts((8,))


def test_compressed_rows_that_fill_no_word() -> None:
    """Zeros are packed along the output, the last word in part."""
    kind = PackedInts(4, 32, symmetric=False)
    of = grid(kind, rows=13, columns=64)
    packed = encode(kind, of)
    assert packed.parts[2].shape == (2, 2)
    assert torch.equal(packed.dense, of.dense)


def test_a_stored_shape_that_is_another() -> None:
    kind = PackedInts(4, 32)
    packed, scales, _ = encode(kind, grid(kind)).parts
    with pytest.raises(TensorError, match="weight_shape is another"):
        kind.decode((packed, scales, torch.tensor([ROWS, COLUMNS + 32])))


def test_documents_are_as_the_packages_write_them() -> None:
    told = quantize_config(Gptq(4, 128))
    assert Gptq(4, 128).fragment() == {"quantization_config": told}
    assert told["checkpoint_format"] == "gptq" and told["desc_act"] is False and told["sym"] is True
    assert quantize_config(Gptq(3, -1, symmetric=False, v2=True)) == {
        **told, "bits": 3, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2",
    }  # fmt: skip
    awq = Awq(128).fragment()["quantization_config"]
    assert awq["modules_to_not_convert"] == ["gate"] and awq["version"] == "gemm" and awq["zero_point"] is True
    whole = PackedInts(8, -1).fragment()["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (whole["strategy"], whole["group_size"], whole["num_bits"]) == ("channel", None, 8)


def test_modules_that_stay_plain_are_named_where_there_is_a_list() -> None:
    fragment = PackedInts(4, 128).fragment()
    named = formats.naming(fragment, ["model.layers.0.mlp.gate", "lm_head"])
    assert named["quantization_config"]["ignore"] == ["model.layers.0.mlp.gate", "lm_head"]
    assert fragment["quantization_config"]["ignore"] == ["lm_head"]
    for other in (Gptq(4, 128), Awq(128), formats.Plain(DType.BF16)):
        assert formats.naming(other.fragment(), ["lm_head"]) == other.fragment()
