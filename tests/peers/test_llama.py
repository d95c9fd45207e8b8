"""llama.cpp on every type that we write: it loads, it computes what our own reading of the file does, and its own
quantizer gives the same bytes.

llama.cpp multiplies a quantized weight with activations that it rounds to 8 bits, an F16 or BF16 one with such: its
logits of a file are not quite those of the file's weights. So there are two comparisons. Where the gguf package has
decoded the weights to F32 it rounds nothing, and differs from us by the order of sums: a KLD of 1e-12. Over the file
itself the limits are those of its rounding, of which the first comparison shows that it is not ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layouts import make
from peers import llama

import mixtools
from mixtools.errors import UsageError
from mixtools.inference.model import Mixtral
from mixtools.layouts import gguf as layout
from mixtools.layouts.gguf_config import FILE_TYPES
from mixtools.layouts.table import Op, Rule
from mixtools.methods.quantize import importance
from mixtools.names import Role
from mixtools.storage.dtypes import DType
from mixtools.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers("llama")

DATA = Path(__file__).parents[1] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
WINDOW = 256
DENSE = ("F32", "F16", "BF16")
ASK = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S")  # for an imatrix
PLAIN = tuple(type for type in FILE_TYPES if type not in ASK)
SHAPES = {
    "4 experts": make.Dims(d=256, f=512, layers=2, heads=4, kv=1, hd=64, vocab=40, experts=4),
    "16 experts": make.Dims(d=256, f=256, layers=1, heads=2, kv=2, hd=128, vocab=40, experts=16),
    "rows that fit 32": make.Dims(d=288, f=352, layers=1, heads=4, kv=2, hd=72, vocab=40, experts=3),
    "rows that fit nothing": make.Dims(d=40, f=72, layers=1, heads=4, kv=2, hd=10, vocab=40, experts=8),
    "tied": make.Dims(d=256, f=256, layers=1, heads=4, kv=2, hd=64, vocab=40, experts=8),
}
Make = Callable[[str], Path]


@pytest.fixture(scope="module")
def windows() -> list[list[int]]:
    ids = Tokenizer.from_folder(NANO).encode(TEXT.read_text("utf-8"))
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - WINDOW + 1, WINDOW)]


@pytest.fixture(scope="module")
def truth(windows: list[list[int]]) -> torch.Tensor:
    """Logits of the checkpoint that all files are made from: no GGUF is read."""
    return ours(NANO, windows)


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a text so short that no token reaches one of the experts."""
    folder = tmp_path_factory.mktemp("imatrix")
    mixtools.imatrix(NANO, folder / "imatrix.gguf", text=TEXT, ctx=16, chunks=1, process_output=True)
    return folder / "imatrix.gguf"


@pytest.fixture(scope="module")
def weighed(imatrix: Path) -> dict[str, np.ndarray]:
    """What llama-quantize reads from it: means, and ones for an expert without tokens."""
    found = importance.read(imatrix)
    counts = {name: count[:, None] for name, count in found.counts.items()}
    assert any((count == 0).any() for count in counts.values())
    return {
        name: np.where(counts[name] > 0, sums / np.maximum(counts[name], 1), 1).astype(np.float32)
        for name, sums in found.sums.items()
    }


def maker(folder: Path, **options: object) -> Make:
    """Nano in a type, made once."""

    def make(type: str) -> Path:
        file = folder / f"{type}.gguf"
        if not file.exists():
            mixtools.quantize(NANO, file, type=[type], jobs=1, **options)
        return file

    return make


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Make:
    return maker(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def with_imatrix(tmp_path_factory: pytest.TempPathFactory, imatrix: Path) -> Make:
    return maker(tmp_path_factory.mktemp("weighed"), imatrix=imatrix)


def ours(model: Path, windows: list[list[int]]) -> torch.Tensor:
    """[tokens of all windows, V], in fp32 from weights decoded to fp32."""
    checkpoint = mixtools.open(model)
    mixtral = Mixtral.load(replace(checkpoint, dense=DType.F32), dtype=torch.float32)
    with torch.inference_mode():
        return torch.cat([mixtral(torch.tensor([window]))[0] for window in windows])


# --- it computes what we do ---


@pytest.mark.parametrize("type", FILE_TYPES)
def test_a_file_means_to_llama_what_it_means_to_us(
    type: str, windows: list[list[int]], plain: Make, with_imatrix: Make, tmp_path: Path
) -> None:
    file = with_imatrix(type) if type in ASK else plain(type)
    mine = ours(file, windows)
    assert len(mine) >= 1000
    # the judge: its own arithmetic over the weights as the gguf package decodes them
    exact = llama.beside(llama.logits(llama.in_f32(file, tmp_path / "f32.gguf"), windows), mine)
    assert exact.kld < 1e-10 and exact.same_top == 1
    its = llama.beside(llama.logits(file, windows), mine)
    if type in DENSE:
        assert its.kld < 2e-5 and its.same_top >= 0.99
    else:  # 8 bits an activation, which now and then make a token choose another expert
        assert its.kld < 4e-3 and its.median < 1e-3 and its.same_top > 0.95


@pytest.mark.parametrize("type", ["Q6_K", "Q4_K_M", "Q2_K", "IQ4_XS", "Q4_0"])
def test_a_calibrated_file_is_of_the_same_kind(
    type: str, windows: list[list[int]], with_imatrix: Make, tmp_path: Path
) -> None:
    """Smoothed norms and router, other codes: the same tensors, types and sizes, and what it means to us."""
    file = tmp_path / f"{type}.gguf"
    mixtools.quantize(NANO, file, type=[type], calibration=TEXT, samples=8, seq_len=64)
    kept, usual = llama.tensors(file), llama.tensors(with_imatrix(type))
    assert {n: (k.type, len(k.data)) for n, k in kept.items()} == {n: (k.type, len(k.data)) for n, k in usual.items()}
    mine = ours(file, windows)
    exact = llama.beside(llama.logits(llama.in_f32(file, tmp_path / "f32.gguf"), windows), mine)
    assert exact.kld < 1e-10 and exact.same_top == 1
    its = llama.beside(llama.logits(file, windows), mine)
    assert its.kld < 4e-3 and its.median < 1e-3 and its.same_top > 0.95


@pytest.mark.parametrize("type", ["F32", "BF16"])
def test_a_lossless_file_is_the_source(
    type: str, windows: list[list[int]], truth: torch.Tensor, plain: Make, tmp_path: Path
) -> None:
    found = llama.beside(llama.logits(llama.in_f32(plain(type), tmp_path / "f32.gguf"), windows), truth)
    assert found.kld < 1e-10 and found.same_top == 1


def test_rows_of_q_in_another_order_are_noticed_in_writing(
    windows: list[list[int]], truth: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(layout.GGUF.rules, Role.Q, Rule("blk.{layer}.attn_q.weight", Op.KEEP))
    mixtools.quantize(NANO, tmp_path / "wrong.gguf", type=["F32"])
    monkeypatch.undo()
    found = llama.beside(llama.logits(tmp_path / "wrong.gguf", windows), truth)
    assert found.kld > 0.01 and found.same_top < 0.95


def test_rows_of_q_in_another_order_are_noticed_in_reading(
    windows: list[list[int]], plain: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = plain("Q8_0")
    theirs = llama.logits(file, windows)
    monkeypatch.setitem(layout.GGUF.rules, Role.Q, Rule("blk.{layer}.attn_q.weight", Op.KEEP))
    found = llama.beside(theirs, ours(file, windows))
    assert found.kld > 0.01 and found.same_top < 0.95


def test_two_experts_that_changed_places_are_noticed(
    windows: list[list[int]], truth: torch.Tensor, plain: Make, tmp_path: Path
) -> None:
    raw, (name, size) = bytearray(plain("F32").read_bytes()), ("blk.1.ffn_down_exps.weight", 4 * 256 * 256)
    at = bytes(raw).index(llama.tensors(plain("F32"))[name].data)
    first, second = slice(at, at + size), slice(at + size, at + 2 * size)
    raw[first], raw[second] = raw[second], raw[first]
    (tmp_path / "wrong.gguf").write_bytes(raw)
    found = llama.beside(llama.logits(tmp_path / "wrong.gguf", windows), truth)
    assert found.kld > 1e-3 and found.same_top < 0.99


def test_a_split_file_loads_from_its_first_part(windows: list[list[int]], plain: Make, tmp_path: Path) -> None:
    mixtools.quantize(NANO, tmp_path, type=["Q4_K_M"], name="nano", max_shard_size="1MB")
    parts = sorted(path for path in tmp_path.glob("*.gguf"))
    assert len(parts) >= 3 and parts[0].name.startswith("nano.Q4_K_M-00001-of-")
    assert torch.equal(llama.logits(parts[0], windows), llama.logits(plain("Q4_K_M"), windows))


def test_half_a_split_file_does_not_load(tmp_path: Path) -> None:
    mixtools.quantize(NANO, tmp_path, type=["Q4_K_M"], name="nano", max_shard_size="1MB")
    sorted(tmp_path.glob("*.gguf"))[1].unlink()
    with pytest.raises(llama.RefusedError):
        llama.logits(next(iter(sorted(tmp_path.glob("*.gguf")))), [[1]])


# --- its quantizer gives the same bytes ---


def differences(mine: Path, theirs: Path) -> dict[str, tuple[str, str] | float]:
    """By tensor: the two types, or the share of bytes that differ."""
    found, wanted = llama.tensors(mine), llama.tensors(theirs)
    assert found.keys() == wanted.keys()
    told: dict[str, tuple[str, str] | float] = {}
    for name, (kind, shape, data) in wanted.items():
        assert found[name].shape == shape
        if found[name].type != kind:
            told[name] = found[name].type, kind
        elif found[name].data != data:
            told[name] = float(np.mean(np.frombuffer(found[name].data, "u1") != np.frombuffer(data, "u1")))
    return told


@pytest.mark.parametrize("type", PLAIN)
def test_bytes_equal_llama_quantizes(type: str, plain: Make, tmp_path: Path) -> None:
    llama.quantize(plain("BF16"), tmp_path / "theirs.gguf", type)
    assert differences(plain(type), tmp_path / "theirs.gguf") == {}


@pytest.mark.parametrize("type", FILE_TYPES)
def test_bytes_with_an_imatrix_equal_llama_quantizes(
    type: str, plain: Make, with_imatrix: Make, weighed: dict[str, np.ndarray], tmp_path: Path
) -> None:
    llama.quantize(plain("BF16"), tmp_path / "theirs.gguf", type, weighed)
    found = differences(with_imatrix(type), tmp_path / "theirs.gguf")
    if type == "IQ1_M":  # libgguf has the search of before llama.cpp summed in another order: ties fall otherwise
        assert all(isinstance(share, float) and share < 0.01 for share in found.values())
    else:
        assert found == {}


@pytest.mark.parametrize("source", ["F32", "F16"])
@pytest.mark.parametrize("type", ["Q8_0", "Q4_K_M", "BF16"])
def test_bytes_from_another_dense_source(source: str, type: str, plain: Make, tmp_path: Path) -> None:
    mixtools.quantize(plain(source), tmp_path / "mine.gguf", type=[type])
    llama.quantize(plain(source), tmp_path / "theirs.gguf", type)
    assert differences(tmp_path / "mine.gguf", tmp_path / "theirs.gguf") == {}


@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_of_other_shapes_equal_llama_quantizes(shape: str, tmp_path: Path) -> None:
    dims = SHAPES[shape]
    tensors = make.hf(make.torrent(dims), dims)
    if shape == "tied":
        del tensors["lm_head.weight"]
    source = make.write_hf(tmp_path / "source", tensors, dims)
    if shape == "tied":
        make.write_json(source / "config.json", dims.config() | {"tie_word_embeddings": True})
    types = ("BF16", "Q8_0", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_S", "IQ4_XS")
    mixtools.quantize(source, tmp_path, type=[*types], name="mine")
    for type in types:
        llama.quantize(tmp_path / "mine.BF16.gguf", tmp_path / "theirs.gguf", type)
        assert differences(tmp_path / f"mine.{type}.gguf", tmp_path / "theirs.gguf") == {}, type


@pytest.mark.parametrize("type", ASK)
def test_both_ask_for_an_imatrix(type: str, plain: Make, tmp_path: Path) -> None:
    with pytest.raises(llama.RefusedError, match="requires an importance matrix"):
        llama.quantize(plain("BF16"), tmp_path / "theirs.gguf", type)
    with pytest.raises(UsageError, match="needs an importance matrix"):
        mixtools.quantize(NANO, tmp_path / "mine.gguf", type=[type])


def test_an_encoder_that_errs_is_noticed(plain: Make, tmp_path: Path) -> None:
    llama.quantize(plain("BF16"), tmp_path / "theirs.gguf", "Q4_K_S")
    assert differences(plain("Q4_K_M"), tmp_path / "theirs.gguf")  # other types
    raw = bytearray((tmp_path / "theirs.gguf").read_bytes())
    raw[-40] ^= 1
    (tmp_path / "flipped.gguf").write_bytes(raw)
    assert differences(plain("Q4_K_S"), tmp_path / "flipped.gguf")
