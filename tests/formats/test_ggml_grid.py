"""Blocks of ggml as grids, against the decoders of the gguf package, and ggml's own bytes from our encoders."""

from __future__ import annotations

from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from card import Card, OnCard

from mixtools.errors import MixtoolsError, TensorError
from mixtools.formats import ggml_grid
from mixtools.ops.cpu import NATIVE
from mixtools.ops.decode import decode
from mixtools.ops.encode import encode
from mixtools.storage.dtypes import DType

TYPES = sorted(NATIVE, key=lambda type: type.value)
WITH_SUBS = [type for type in TYPES if type.value.endswith("_K") or type is DType.IQ4_XS]
F16 = {  # bytes of a block at which its f16 scales lie
    DType.Q4_0: [0], DType.Q4_1: [0, 2], DType.Q5_0: [0], DType.Q5_1: [0, 2], DType.Q8_0: [0], DType.Q2_K: [80, 82],
    DType.Q3_K: [108], DType.Q4_K: [0, 2], DType.Q5_K: [0, 2], DType.Q6_K: [208], DType.IQ4_NL: [0], DType.IQ4_XS: [0],
    DType.MXFP4: [],
}  # fmt: skip
# 0, -0, the least, the largest below a normal one, the least normal one, the largest, 1
EDGES = [0x0000, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x8400, 0x7BFF, 0xFBFF, 0x3C00]
COLS, SHAPE = 1280, (9, 1280)

each_type = pytest.mark.parametrize("type", TYPES, ids=lambda type: type.value)
each_with_subs = pytest.mark.parametrize("type", WITH_SUBS, ids=lambda type: type.value)


def number(type: DType) -> gguf.GGMLQuantizationType:
    return gguf.GGMLQuantizationType[type.value]


def random_blocks(type: DType, seed: int = 0) -> np.ndarray:
    """[9, bytes]: any bytes, but for scales that are finite, usual ones and extreme ones."""
    random = np.random.default_rng(seed)
    values, size = gguf.GGML_QUANT_SIZES[number(type)]
    blocks = random.integers(0, 256, (SHAPE[0] * COLS // values, size), np.uint8)
    scales = np.array([*range(0x0040, 0x2C00, 7), *range(0x8040, 0xAC00, 7), *EDGES * 50], np.uint16)
    for at in F16[type]:
        blocks[:, at : at + 2] = random.choice(scales, len(blocks)).view(np.uint8).reshape(-1, 2)
    if type is DType.MXFP4:
        blocks[:, 0] %= 255  # which is no number outside ggml
        blocks[:10, 0] = range(10)
    return blocks.reshape(SHAPE[0], -1)


def random_codes(type: DType, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, len(ggml_grid.levels(type)), SHAPE).astype(np.uint8)


# the module's own, of numpy's arrays whose rows come first


def codes_of(type: DType, blocks: np.ndarray) -> np.ndarray:
    return ggml_grid.codes(type, torch.from_numpy(blocks)).numpy().T


def with_codes(type: DType, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return ggml_grid.with_codes(type, torch.from_numpy(blocks), torch.from_numpy(codes).T).numpy()


class Supers(NamedTuple):
    d: np.ndarray
    dmin: np.ndarray | None
    scales: np.ndarray
    mins: np.ndarray | None


def supers_of(type: DType, blocks: np.ndarray) -> Supers:
    found = ggml_grid.supers(type, torch.from_numpy(blocks))
    return Supers(*(None if part is None else np.ascontiguousarray(part.numpy().T) for part in found))


def grid_of(type: DType, blocks: np.ndarray) -> list[np.ndarray]:
    found = ggml_grid.supers(type, torch.from_numpy(blocks)).grid()
    return [np.ascontiguousarray(part.numpy().T) for part in found]


def with_supers(type: DType, blocks: np.ndarray, d: np.ndarray, dmin: np.ndarray | None = None) -> np.ndarray:
    parts = (None if part is None else torch.from_numpy(np.ascontiguousarray(part.T)) for part in (d, dmin))
    return ggml_grid.with_supers(type, torch.from_numpy(blocks), *parts).numpy()


def by_gguf(type: DType, blocks: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return gguf.quants.dequantize(np.ascontiguousarray(blocks), number(type))


def values(type: DType, blocks: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """As the module's head says."""
    scale, least = (np.repeat(part, ggml_grid.group(type), axis=1) for part in grid_of(type, blocks))
    with np.errstate(over="ignore"):
        return scale * ggml_grid.levels(type)[codes] + least


def assert_same_bits(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.uint32), expected.view(np.uint32))


def rows(kind: str) -> np.ndarray:
    random = np.random.default_rng(5)
    normal = random.standard_normal(SHAPE).astype(np.float32)
    return {
        "normal": normal * np.float32(0.02),
        "heavy": random.standard_t(2, SHAPE).astype(np.float32),
        "outliers": np.where(random.random(SHAPE) < 0.01, 300, 0.1).astype(np.float32) * normal,
        "tiny": normal * np.float32(1e-7),
        "constant": np.broadcast_to(np.float32([0.3, -0.3, 1, -1, 1e-8, 7, 1e4, -2e-3, 0.5])[:, None], SHAPE).copy(),
        "positive": np.abs(normal) + np.float32(0.1),
        "zero": np.zeros(SHAPE, np.float32),
    }[kind]


def test_every_type_that_is_encoded_is_a_grid() -> None:
    assert set(ggml_grid._KINDS) == NATIVE
    for type in (DType.IQ2_XS, DType.F16):
        with pytest.raises(MixtoolsError, match=f"{type.value} is no grid here"):
            ggml_grid.levels(type)


@each_type
def test_levels_ascend_and_fill_the_codes_bits(type: DType) -> None:
    levels = ggml_grid.levels(type)
    assert levels.dtype == np.float32 and (np.diff(levels) > 0).all()
    bits = {"MX": 4, "IQ": 4}.get(type.value[:2]) or int(type.value[1])
    assert len(levels) == 2**bits - (type is DType.MXFP4)  # which has two zeros
    if type.value[1] in "234568":
        assert set(np.diff(levels)) == {1}
    assert type.block % ggml_grid.group(type) == 0


@each_type
def test_value_is_scale_times_level_plus_minimum(type: DType) -> None:
    blocks = random_blocks(type)
    found = values(type, blocks, codes_of(type, blocks))
    assert_same_bits(found, by_gguf(type, blocks))
    assert_same_bits(found, decode(blocks, type, DType.F32).view(np.float32))


@each_type
@pytest.mark.parametrize("kind", ["normal", "heavy", "outliers", "tiny", "constant", "positive", "zero"])
def test_encoded_blocks_come_back_byte_for_byte(type: DType, kind: str) -> None:
    blocks = encode(rows(kind), DType.F32, type)
    codes = codes_of(type, blocks)
    assert codes.dtype == np.uint8 and codes.shape == SHAPE
    assert with_codes(type, blocks, codes).tobytes() == blocks.tobytes()
    d, dmin, *_ = supers_of(type, blocks)
    assert with_supers(type, blocks, d, dmin).tobytes() == blocks.tobytes()
    assert_same_bits(values(type, blocks, codes), by_gguf(type, blocks))


@each_type
def test_any_bytes_come_back(type: DType) -> None:
    """Nothing in a block is lost: no bit is unused. MXFP4's negative zero becomes the positive one, decoded alike."""
    blocks = random_blocks(type, seed=3)
    again = with_codes(type, blocks, codes_of(type, blocks))
    if type is not DType.MXFP4:
        np.testing.assert_array_equal(again, blocks)
    else:
        codes = np.stack((again.reshape(-1, 17)[:, 1:] & 15, again.reshape(-1, 17)[:, 1:] >> 4))
        assert set(codes.ravel()) == set(range(16)) - {8}
        np.testing.assert_array_equal(again.reshape(-1, 17)[:, 0], blocks.reshape(-1, 17)[:, 0])
    assert_same_bits(by_gguf(type, again), by_gguf(type, blocks))


@each_type
def test_other_codes_are_put_in(type: DType) -> None:
    blocks, codes = random_blocks(type), random_codes(type)
    before = blocks.tobytes(), codes.tobytes()
    new = with_codes(type, blocks, codes)
    assert (blocks.tobytes(), codes.tobytes()) == before and new.shape == blocks.shape
    np.testing.assert_array_equal(codes_of(type, new), codes)
    assert_same_bits(by_gguf(type, new), values(type, blocks, codes))
    for part, old in zip(supers_of(type, new), supers_of(type, blocks), strict=True):
        assert (part is None and old is None) or part.tobytes() == old.tobytes()


@each_type
def test_scales_and_minima_are_products(type: DType) -> None:
    blocks = random_blocks(type)
    d, dmin, scales, mins = supers_of(type, blocks)
    per = scales.shape[1] // d.shape[1]
    scale, least = grid_of(type, blocks)
    assert scale.shape == least.shape == (SHAPE[0], COLS // ggml_grid.group(type))
    assert d.shape == (SHAPE[0], COLS // type.block) and d.dtype == np.float32 and scales.dtype == np.int8
    assert_same_bits(scale, np.repeat(d, per, axis=1) * scales)
    if dmin is None:
        assert mins is None and (least.view(np.uint32) == 0x80000000).all()  # -0: added, it changes nothing
    else:
        assert_same_bits(least, -(np.repeat(dmin, per, axis=1) * mins))
    if type not in WITH_SUBS:
        assert per == 1 and (scales == 1).all()


@each_type
def test_other_super_scales_are_put_in(type: DType) -> None:
    blocks, codes = random_blocks(type), random_codes(type)
    old = supers_of(type, blocks)
    random = np.random.default_rng(8)
    d, dmin = random.standard_normal((2, *old.d.shape)).astype(np.float32)
    given = (np.abs(d) if type is DType.MXFP4 else d), None if old.dmin is None else dmin
    before = blocks.tobytes()
    new = with_supers(type, blocks, *given)
    assert blocks.tobytes() == before
    supers = supers_of(type, new)
    if type is DType.MXFP4:
        assert (np.abs(supers.d - given[0]) <= np.minimum(np.abs(supers.d * 2 - given[0]), supers.d / 2)).all()
        assert set(np.frexp(supers.d)[0].ravel()) == {0.5}
    else:
        assert_same_bits(supers.d, d.astype(np.float16).astype(np.float32))
    if old.dmin is not None:
        assert_same_bits(supers.dmin, dmin.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(supers.scales, old.scales)
    np.testing.assert_array_equal(codes_of(type, new), codes_of(type, blocks))
    assert_same_bits(by_gguf(type, with_codes(type, new, codes)), values(type, new, codes))


@each_type
@pytest.mark.parametrize("strip", [1, 2 * COLS + 5, 1 << 18])
def test_runs_and_places_of_rows_do_not_matter(type: DType, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, codes = random_blocks(type), random_codes(type)
    expected = codes_of(type, blocks), with_codes(type, blocks, codes), grid_of(type, blocks)
    supers = supers_of(type, blocks)
    wide = np.full((SHAPE[0], blocks.shape[1] + 3), 0xA5, np.uint8)
    wide[:, 1:-2] = blocks
    before, place, upside = wide.tobytes(), wide[:, 1:-2], np.asfortranarray(codes)
    monkeypatch.setattr(ggml_grid, "_STRIP", strip)
    np.testing.assert_array_equal(codes_of(type, place), expected[0])
    np.testing.assert_array_equal(with_codes(type, place, upside), expected[1])
    for part, other in zip(grid_of(type, place), expected[2], strict=True):
        assert_same_bits(part, other)
    np.testing.assert_array_equal(with_supers(type, place, supers.d, supers.dmin), blocks)
    assert wide.tobytes() == before


@each_type
def test_on_a_card_all_is_done_there(type: DType) -> None:
    """And what is waited for are judgements: of the codes the largest, of scales whether f16 holds them."""
    blocks, codes = random_blocks(type), random_codes(type)
    factors = supers_of(type, blocks)
    scales = [one for one in (factors.d, factors.dmin) if one is not None]
    scales = [np.minimum(np.abs(one), 60000) for one in scales]
    expected = with_codes(type, with_supers(type, blocks, *scales), codes)
    with Card() as card:
        moved, joined, *turned = (
            torch.from_numpy(np.ascontiguousarray(one)).to("cuda")
            for one in (blocks, codes.T, *(one.T for one in scales))
        )
        card.waits.clear()
        found = ggml_grid.supers(type, moved)
        made = ggml_grid.with_codes(type, ggml_grid.with_supers(type, moved, *turned), joined)
        assert sum(card.waits.values()) <= 3 + 2 * (type is DType.MXFP4), card.waits  # and tables that go there
        assert isinstance(made, OnCard) and isinstance(ggml_grid.codes(type, moved), OnCard)
        assert all(isinstance(one, OnCard) for one in (*found, *found.grid()) if one is not None)
        assert np.array_equal(found.d.cpu().numpy().T, factors.d)
        np.testing.assert_array_equal(made.cpu().numpy(), expected)


@each_type
@pytest.mark.parametrize("shape", [(0, COLS), (3, 0)])
def test_nothing_is_nothing(type: DType, shape: tuple[int, int]) -> None:
    blocks = np.empty((shape[0], type.row_bytes(shape[1])), np.uint8)
    codes = codes_of(type, blocks)
    assert codes.shape == shape and with_codes(type, blocks, codes).shape == blocks.shape
    d, dmin, scales, _ = supers_of(type, blocks)
    assert scales.shape == grid_of(type, blocks)[0].shape == (shape[0], shape[1] // ggml_grid.group(type))
    assert with_supers(type, blocks, d, dmin).shape == blocks.shape


@each_type
def test_scales_that_are_no_f16_are_refused(type: DType) -> None:
    """A refit divides 0 by 0 where a block is zero; one NaN in a file makes NaN of every token."""
    blocks = encode(rows("zero"), DType.F32, type)
    good, dmin = supers_of(type, blocks)[:2]
    for wrong in (np.nan, np.inf, -np.inf, 65520.0, -65520.0) if F16[type] else (np.nan, np.inf, -1e-3, 2.0**126 * 1.5):
        bad = good.copy()
        bad[3, 1] = wrong
        with pytest.raises(TensorError, match=r"^d of .*beyond"):
            with_supers(type, blocks, bad, dmin)
        if dmin is not None:
            with pytest.raises(TensorError, match=r"^dmin of .*beyond"):
                with_supers(type, blocks, good, bad)
    largest = 65519.99 if F16[type] else 2.0**126 * 1.499
    new = with_supers(type, blocks, np.full_like(good, largest), dmin)
    assert (supers_of(type, new).d == (65504 if F16[type] else 2.0**126)).all()


def test_what_is_below_mxfp4s_powers_takes_the_least() -> None:
    blocks = random_blocks(DType.MXFP4)
    d = supers_of(DType.MXFP4, blocks).d.copy()
    d[0, :6] = 0, 1e-45, 2.0**-128, 2.0**-127, 2.0**-128 * 1.5, 2.0**-128 * 1.49
    new = with_supers(DType.MXFP4, blocks, d)
    np.testing.assert_array_equal(new.reshape(SHAPE[0], -1, 17)[0, :6, 0], [0, 0, 0, 1, 1, 0])


@each_type
def test_what_does_not_fit_is_refused(type: DType) -> None:
    blocks, codes = random_blocks(type), random_codes(type)
    supers = supers_of(type, blocks)
    for wrong in (blocks[:, :-1], blocks[0], blocks.astype(np.int8)):
        with pytest.raises(MixtoolsError, match="bytes"):
            codes_of(type, wrong)
        with pytest.raises(MixtoolsError, match="bytes"):
            grid_of(type, wrong)
    for wrong in (codes[:, :-1], codes[:-1], codes.astype(np.int32)):
        with pytest.raises(MixtoolsError, match="codes are as many uint8"):
            with_codes(type, blocks, wrong)
    if len(ggml_grid.levels(type)) < 256:
        codes[-1, -1] = len(ggml_grid.levels(type))
        with pytest.raises(MixtoolsError, match=f"codes, and none is {codes[-1, -1]}"):
            with_codes(type, blocks, codes)
    for wrong in (supers.d[:, 1:], supers.d.view(np.int32)):
        with pytest.raises(MixtoolsError, match="d of .* is torch.float32"):
            with_supers(type, blocks, wrong, supers.dmin)
    with pytest.raises(MixtoolsError, match="dmin"):
        with_supers(type, blocks, supers.d, supers.d if supers.dmin is None else None)


@each_type
def test_what_is_no_number_is_seen_in_the_grid(type: DType) -> None:
    """As decode: no warning, and the caller finds it."""
    for at in F16[type]:
        for bits in (0x7C00, 0x7E00, 0x7C01):
            blocks = random_blocks(type)
            blocks[0, at : at + 2] = np.array([bits], np.uint16).view(np.uint8)
            scale, least = grid_of(type, blocks)
            assert not (np.isfinite(scale[0]) & np.isfinite(least[0])).all()
            assert np.isfinite(scale[1:]).all() and np.isfinite(least[1:]).all()


def test_mxfp4s_last_exponent_is_read_as_ggml_does_and_not_written() -> None:
    blocks = random_blocks(DType.MXFP4)
    blocks[2, 17] = 255
    assert_same_bits(values(DType.MXFP4, blocks, codes_of(DType.MXFP4, blocks)), by_gguf(DType.MXFP4, blocks))
    with pytest.raises(TensorError, match="beyond"):
        with_supers(DType.MXFP4, blocks, supers_of(DType.MXFP4, blocks).d)
