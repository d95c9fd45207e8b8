"""nf4 and int8: bitsandbytes' own bytes (tests/golden/bnb.md), and what it decodes them to."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import pytest
import torch
from formats import bnb_matrices
from formats.bnb_matrices import BEYOND_FP16, matrices
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from mixtools.errors import TensorError
from mixtools.formats import Format, Packed, Stored, nested
from mixtools.formats.int8 import Int8, int8
from mixtools.formats.nf4 import BLOCK, LEVELS, Nf4, block_absmax, levels, nearest, nf4
from mixtools.storage.dtypes import DType

MATRICES = matrices()
GOLDEN = load_file(bnb_matrices.GOLDEN)
STATE = "weight.quant_state.bitsandbytes__nf4"
CASES = [
    (name, kind)
    for name, kind in product(MATRICES, ("nf4", "nf4-double", "int8"))
    if kind != "int8" or f"{name}/int8/weight" in GOLDEN
]
FORMATS: list[Format] = [
    Nf4(), Nf4(DType.F16), Nf4(DType.F32, double=True), Nf4(double=True), Nf4(block=32), Nf4(DType.F32, block=256),
    Int8(), Int8(DType.F16), Int8(marked=False),
]  # fmt: skip


def quantized(name: str, kind: str) -> Packed:
    return int8(MATRICES[name]) if kind == "int8" else nf4(MATRICES[name], kind == "nf4-double")


def words(tensor: Tensor) -> bytes:
    """Zeros of both signs differ, NaN equals itself."""
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def by_suffix(packed: Packed, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {part.suffix: tensor for part, tensor in zip(packed.format.parts(shape), packed.parts, strict=True)}


# --- bitsandbytes' bytes ---


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_bytes_equal_bitsandbytes(name: str, kind: str) -> None:
    weight = MATRICES[name].clone()
    packed = quantized(name, kind)
    assert words(weight) == words(MATRICES[name])  # nothing was done to it
    found = by_suffix(packed, tuple(weight.shape))
    for part, tensor in zip(packed.format.parts(tuple(weight.shape)), packed.parts, strict=True):
        assert (tensor.dtype, tuple(tensor.shape)) == (part.dtype.torch(), part.shape)
        assert tensor.is_contiguous()
        owner = "plain" if part.suffix.endswith("quant_map") else name
        golden = GOLDEN[f"{owner}/{'nf4' if part.suffix == 'weight' and kind != 'int8' else kind}/{part.suffix}"]
        if part.suffix == STATE and kind == "nf4-double":  # of a length that does not depend on the offset
            assert words(found[STATE]).rstrip(b" ") == words(golden)
        else:
            assert words(found[part.suffix]) == words(golden), part.suffix
            assert tuple(golden.shape) == part.shape


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case[0] != "many"])
def test_decoding_equals_bitsandbytes(name: str, kind: str) -> None:
    golden = GOLDEN[f"{name}/{kind}/decoded"]
    packed = quantized(name, kind)
    assert words(replace(packed.format, dtype=DType.of(golden.dtype)).decode(packed.parts)) == words(golden)
    if kind == "int8":
        assert words(packed.dense) == words(golden.to(MATRICES[name].dtype))
    else:
        assert packed.dense.dtype == golden.dtype


@pytest.mark.parametrize("name", ["scales", "scales-denormal"])
def test_scales_are_quantized_as_bitsandbytes_does(name: str) -> None:
    codes, largest, values, mean = nested.encode(GOLDEN[f"{name}/input"])
    assert words(codes) == words(GOLDEN[f"{name}/codes"])
    assert words(largest) == words(GOLDEN[f"{name}/largest"])
    assert words(mean) == words(GOLDEN[f"{name}/mean"])
    assert words(values) == words(GOLDEN["plain/nf4-double/weight.nested_quant_map"])


def test_other_people_s_files_are_read_as_ours() -> None:
    """Their JSON has no blanks, so that its length is another."""
    theirs = {key.split("/")[2]: tensor for key, tensor in GOLDEN.items() if key.startswith("odd/nf4-double/")}
    decoded = theirs.pop("decoded")
    theirs |= {key.split("/")[2]: GOLDEN[key] for key in GOLDEN if key.startswith("plain/") and "quant_map" in key}
    theirs["weight"] = GOLDEN["odd/nf4/weight"]
    about = {"bnb_4bit_compute_dtype": "float32"}
    found = Nf4.detect({suffix: Stored(DType.of(t.dtype), tuple(t.shape)) for suffix, t in theirs.items()}, about)
    assert found == Nf4(DType.BF16, double=True)
    parts = found.parts((5, 77))
    assert {part.suffix: part.shape for part in parts} == {suffix: tuple(t.shape) for suffix, t in theirs.items()}
    dense = found.to(DType.F32).decode([theirs[part.suffix] for part in parts])
    assert words(dense) == words(decoded)


def test_many_runs_are_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, weight in MATRICES.items():
        made = [nf4(weight, True)] + ([] if name in BEYOND_FP16 else [int8(weight)])
        with monkeypatch.context() as patch:
            patch.setattr("mixtools.formats.nf4._RUN", 128)
            patch.setattr("mixtools.formats.int8._RUN", 100)
            again = [nf4(weight, True)] + ([] if name in BEYOND_FP16 else [int8(weight)])
            dense = [packed.dense for packed in made]
        for one, other, values in zip(made, again, dense, strict=True):
            assert [*map(words, one.parts)] == [*map(words, other.parts)]
            assert words(one.dense) == words(values)


def test_threads_do_not_change_the_mean() -> None:
    absmax = torch.rand(100_003, generator=torch.Generator().manual_seed(5)) * 0.1
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append([*map(words, nested.encode(absmax))])
            if count == 1:
                assert words(nested.encode(absmax)[3]) == words(absmax.mean())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


# --- what a grid is made of ---


@given(st.integers(1, 7), st.integers(1, 90), st.integers(0, 99), st.sampled_from([DType.F32, DType.F16, DType.BF16]))
def test_no_other_code_is_nearer(rows: int, columns: int, seed: int, dtype: DType) -> None:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype.torch())
    absmax = block_absmax(weight)
    codes = nearest(weight, absmax)
    scales = absmax.double().repeat_interleave(BLOCK)[: weight.numel()].view(weight.shape)
    error = (weight.double()[..., None] - scales[..., None] * levels().double()).abs()
    taken = error.gather(-1, codes.long()[..., None])[..., 0]
    assert (taken <= error.amin(-1) + 1e-6 * scales).all()
    packed = nf4(weight)
    assert packed.format == Nf4(dtype)
    value = levels()[codes.long()] * scales.float()
    assert words(packed.dense) == words(value.to(dtype.torch()))


def test_given_codes_are_kept() -> None:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(0, 16, (6, 100), generator=generator, dtype=torch.uint8)
    absmax = torch.rand(10, generator=generator) + 0.5
    for double in (False, True):
        format = Nf4(DType.F32, double)
        seen = format.kept(absmax)
        assert double != torch.equal(seen, absmax)
        assert (seen - absmax).abs().max() < 0.01
        dense = format.encode_codes(codes, absmax).dense
        scales = seen.repeat_interleave(BLOCK)[:600].view(6, 100)
        assert torch.equal(dense, levels()[codes.long()] * scales)
    whole = torch.randint(-128, 128, (6, 100), generator=generator, dtype=torch.int8)
    dense = Int8(DType.F32).encode_codes(whole, absmax[:6]).dense
    torch.testing.assert_close(dense.double(), whole.double() * absmax[:6, None].double() / 127, rtol=2e-7, atol=0)


def test_blocks_of_other_lengths() -> None:
    codes = (torch.arange(3 * 200) % 16).to(torch.uint8).view(3, 200)
    absmax = torch.arange(1.0, 20.0)
    packed = Nf4(DType.F32, block=32).encode_codes(codes, absmax)
    scales = absmax.repeat_interleave(32)[:600].view(3, 200)
    assert torch.equal(packed.dense, levels()[codes.long()] * scales)
    found = Nf4.detect({part.suffix: Stored(part.dtype, part.shape) for part in packed.format.parts((3, 200))}, {})
    assert found is not None
    assert found.block == 32


# --- the protocol ---


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(6, 128), (5, 77)])
def test_what_is_planned_is_recognised(format: Format, shape: tuple[int, int]) -> None:
    parts = format.parts(shape)
    stored = {part.suffix: Stored(part.dtype, part.shape) for part in parts}
    assert parts[0].suffix == format.suffixes[0] == "weight"
    found = type(format).detect(stored, format.fragment()["quantization_config"])
    assert found is not None
    assert found.to(format.dtype) == format
    assert found.to(format.dtype).parts(shape) == parts
    assert type(format).detect({"weight": stored["weight"]}, {}) is None
    assert {part.suffix for part in parts} <= set(format.suffixes)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_a_missing_part_is_still_expected(format: Format) -> None:
    parts = format.parts((6, 128))
    for missing in parts[1:]:
        stored = {part.suffix: Stored(part.dtype, part.shape) for part in parts if part != missing}
        found = type(format).detect(stored, {})
        if missing.suffix == "weight_format" or (len(stored) == 1 and found is None):
            continue  # old files lack the one; codes alone are refused as a weight of a wrong dtype
        assert found is not None
        assert missing.suffix in {part.suffix for part in found.parts((6, 128))}, missing


def test_vectors_are_not_quantized() -> None:
    for format in (Nf4(), Int8()):
        with pytest.raises(TensorError, match="only a matrix"):
            format.parts((6,))
    for quantize in (nf4, int8):
        with pytest.raises(TensorError, match="only a matrix"):
            quantize(torch.ones(6))


def test_the_offset_s_length_is_planned() -> None:
    for value in (0.0, 1e-45, 2.0**-149, 1.17549435e-38, 0.00012345679, 3.4028234e38, 0.1, 123456.79, 1 / 3):
        absmax = torch.tensor([value])
        packed = Nf4(double=True).encode_codes(torch.zeros(1, 64, dtype=torch.uint8), absmax)
        state = by_suffix(packed, (1, 64))[STATE]
        assert state.shape == packed.format.parts((1, 64))[-1].shape
        assert json.loads(bytes(state.numpy()))["nested_offset"] == float(absmax)


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_decoding_takes_no_more_than_it_says(format: Format) -> None:
    shape = (512, 512)  # a run
    if isinstance(format, Nf4):
        codes = torch.zeros(shape, dtype=torch.uint8)
        parts = format.encode_codes(codes, torch.rand(512 * 512 // format.block) + 1).parts
    else:
        parts = format.encode_codes(torch.zeros(shape, dtype=torch.int8), torch.rand(512)).parts
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        dense = format.decode(parts)
    made = sum(max(0, event.self_cpu_memory_usage) for event in profile.function_events)
    assert made <= format.decode_bytes(shape) + dense.nbytes


# --- the configuration ---


def test_the_configuration_is_transformers_own() -> None:
    """As BitsAndBytesConfig(...).to_dict() of transformers 4.57.6 gives it."""
    common = {
        "bnb_4bit_quant_storage": "uint8", "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_threshold": 6.0,
        "llm_int8_has_fp16_weight": False, "llm_int8_skip_modules": ["gate", "lm_head"], "quant_method": "bitsandbytes",
    }  # fmt: skip
    assert Nf4(DType.BF16, double=True).fragment() == {
        "quantization_config": {
            "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "load_in_4bit": True,
            "load_in_8bit": False, **common,
        }
    }  # fmt: skip
    assert Int8().fragment() == {
        "quantization_config": {
            "_load_in_4bit": False, "_load_in_8bit": True, "bnb_4bit_compute_dtype": "float32",
            "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "load_in_4bit": False,
            "load_in_8bit": True, **common,
        }
    }  # fmt: skip


def test_each_claims_its_own_configuration() -> None:
    for format, other in ((Nf4(), Int8), (Int8(), Nf4)):
        about = format.fragment()["quantization_config"]
        assert type(format).claims(about)
        assert type(format).claims({key: value for key, value in about.items() if key != "quant_method"})
        assert not other.claims(about)
        assert not type(format).claims({**about, "quant_method": "gptq"})
    assert not Nf4.claims({"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"})
    assert not Nf4.claims({"quant_method": "bitsandbytes", "load_in_4bit": True})  # whose default is fp4
    assert not Int8.claims({}) and not Nf4.claims({})
    assert Nf4.detect({"weight": Stored(DType.U8, (8, 1)), STATE: Stored(DType.U8, (9,))}, {}) == Nf4(DType.BF16)
    told = {"bnb_4bit_compute_dtype": "float16"}
    assert Nf4.detect({"weight": Stored(DType.U8, (8, 1)), STATE: Stored(DType.U8, (9,))}, told) == Nf4(DType.F16)


# --- what cannot be ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("at", [0, 64, -1])
def test_nan_and_infinity_are_refused(value: float, at: int) -> None:
    weight = torch.ones(3, 43)
    weight.view(-1)[at] = value
    with pytest.raises(TensorError, match="a block holds NaN or infinity"):
        nf4(weight)
    with pytest.raises(TensorError, match="a row holds NaN"):
        int8(weight)


def test_int8_ends_where_fp16_does() -> None:
    weight = torch.zeros(2, 8)
    weight[0, 0], weight[1, 3] = 65504, -65519  # which rounds to fp16's largest
    assert int8(weight).dense[0, 0] == 65504
    weight[1, 3] = 65520
    with pytest.raises(TensorError, match="beyond those of fp16"):
        int8(weight)
    with pytest.raises(TensorError, match="beyond those of fp16"):
        int8(MATRICES["huge"])


def test_scales_whose_mean_cannot_be_told_are_refused() -> None:
    weight = torch.full((4, 64), 3e38)
    assert torch.isfinite(nf4(weight).dense).all()
    with pytest.raises(TensorError, match="beyond the numbers of fp32"):
        nf4(weight, double=True)


def test_codes_that_do_not_belong_to_their_scales_are_refused() -> None:
    codes, absmax = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(TensorError, match="scales do not fit"):
        Nf4().encode_codes(codes, torch.ones(3))
    with pytest.raises(TensorError, match="scales do not fit"):
        Nf4().encode_codes(codes, absmax.double())
    with pytest.raises(TensorError, match="wrong dtype"):
        Nf4().encode_codes(codes.to(torch.int8), absmax)
    with pytest.raises(TensorError, match="code 16 does not fit"):
        Nf4().encode_codes(codes + 16, absmax)
    with pytest.raises(TensorError, match="NaN or infinite"):
        Nf4().encode_codes(codes, absmax * float("nan"))
    with pytest.raises(TensorError, match="wrong dtype"):
        Int8().encode_codes(codes, absmax)
    with pytest.raises(TensorError, match="scales do not fit"):
        Int8().encode_codes(codes.to(torch.int8), torch.ones(64))


STATES = {
    "no JSON": (b"{", "not what bitsandbytes writes"),
    "no object": (b"[]", "not what bitsandbytes writes"),
    "no text": (b"\xff\xfe", "not what bitsandbytes writes"),
    "deep": (b"[" * 100_000, "not what bitsandbytes writes"),
    "no shape": (b'{"quant_type": "nf4", "blocksize": 64}', "not what bitsandbytes writes"),
    "vector": (b'{"quant_type": "nf4", "blocksize": 64, "shape": [768]}', "not what bitsandbytes writes"),
    "other size": (b'{"quant_type": "nf4", "blocksize": 64, "shape": [6, 130]}', "which 384 bytes do not hold"),
    "negative": (b'{"quant_type": "nf4", "blocksize": 64, "shape": [-6, -128]}', "which 384 bytes do not hold"),
    "fp4": (b'{"quant_type": "fp4", "blocksize": 64, "shape": [6, 128]}', "another format"),
    "blocks": (b'{"quant_type": "nf4", "blocksize": 128, "shape": [6, 128]}', "another format"),
}


@pytest.mark.parametrize("what", STATES)
def test_a_quant_state_that_tells_of_another_matrix_is_refused(what: str) -> None:
    state, message = STATES[what]
    packed = nf4(MATRICES["plain"])
    parts: Sequence[Tensor] = [*packed.parts[:-1], torch.frombuffer(bytearray(state), dtype=torch.uint8)]
    with pytest.raises(TensorError, match=message):
        packed.format.decode(parts)


def test_rows_in_a_gpu_s_tiles_are_refused() -> None:
    packed = int8(MATRICES["plain"])
    with pytest.raises(TensorError, match="tiles of a GPU"):
        packed.format.decode([*packed.parts[:2], torch.tensor(2, dtype=torch.uint8)])
    assert torch.equal(Int8(DType.BF16, marked=False).decode(packed.parts[:2]), packed.dense)


def test_levels_are_in_order_and_hold_zero_and_the_ends() -> None:
    assert sorted(LEVELS) == [*LEVELS]
    assert {-1.0, 0.0, 1.0} < set(LEVELS)
    assert words(levels()) == words(GOLDEN["plain/nf4/weight.quant_map"])
