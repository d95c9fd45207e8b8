"""What mixtools.quantize does not take: weights that are no numbers, quantized sources, others' importance matrices."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import quantizing
from layouts import make
from quantizing import LEAST, SMALL, TINY, expected, quantize, tensors

import mixtools
from mixtools import errors
from mixtools.methods.quantize.results import Planned

DIMS = LEAST._replace(layers=2)
W2 = "layers.1.feed_forward.experts.1.w2.weight"


def nothing_written(folder: Path) -> bool:
    return not folder.exists() or not [path for path in folder.iterdir() if path.is_file()]


# --- no numbers ---


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["Q4_0", "F16", "BF16", "F32"])
def test_weights_that_are_no_numbers(tmp_path: Path, value: float, name: str) -> None:
    """Named, with the place, in every type: llama.cpp would refuse the file, or talk nonsense."""
    model = make.torrent(DIMS)
    model[W2][7, 33] = value
    source = make.write_a(tmp_path / "x", DIMS, model)
    with pytest.raises(errors.TensorError, match=rf"holds {value} at \[7, 33\]; it cannot be quantized") as caught:
        quantize(source, tmp_path / "out", name)
    assert caught.value.tensor == W2 and caught.value.file == str(source / "consolidated.00.pth")
    assert nothing_written(tmp_path / "out")


@pytest.mark.parametrize(
    ("tensor", "at", "shown"),
    [("norm.weight", (3,), "[0, 3]"), ("layers.0.feed_forward.gate.weight", (1, 2), "[1, 2]"),
     ("tok_embeddings.weight", (4, 31), "[4, 31]"), ("output.weight", (0, 0), "[0, 0]"),
     ("layers.0.attention.wq.weight", (2, 5), "[1, 5]")],
)  # fmt: skip
def test_wherever_they_are(tmp_path: Path, tensor: str, at: tuple[int, ...], shown: str) -> None:
    """Of q, row 2 of the file is row 1 in Hugging Face's order."""
    model = make.torrent(DIMS)
    model[tensor][at] = float("nan")
    with pytest.raises(errors.TensorError) as caught:
        quantize(make.write_c(tmp_path / "x", DIMS, model), tmp_path / "out", "Q8_0")
    assert f"holds nan at {shown}" in str(caught.value)


def test_far_into_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are counted over what was read before."""
    model = make.torrent(DIMS)
    model[W2][31, 63] = float("nan")
    source = make.write_a(tmp_path / "x", DIMS, model)
    monkeypatch.setattr(sys.modules["mixtools.methods.quantize.run"], "CHUNK", 300)
    with pytest.raises(errors.TensorError, match=r"holds nan at \[31, 63\]"):
        quantize(source, tmp_path / "out", "Q8_0")


def test_a_flipped_bit_of_the_source(tmp_path: Path) -> None:
    """By its own checksums, whatever is made of it."""
    source = make.write_a(tmp_path / "x", DIMS)
    raw = bytearray((source / "consolidated.00.pth").read_bytes())
    at = raw.index(make.bits(make.torrent(DIMS)[W2]))
    raw[at + 100] ^= 4
    (source / "consolidated.00.pth").write_bytes(raw)
    with pytest.raises(errors.ChecksumError) as caught:
        quantize(source, tmp_path / "out", "Q8_0", "F16")
    assert caught.value.tensor == W2
    assert nothing_written(tmp_path / "out")


# --- quantized already ---


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    quantize(make.write_a(folder / "small", TINY), folder, "Q8_0", "BF16")
    return folder


def test_a_quantized_source(tmp_path: Path, quantized: Path) -> None:
    file = quantized / "small.Q8_0.gguf"
    for dry_run in (False, True):
        with pytest.raises(
            errors.QuantizedError, match=r"is quantized already \(Q8_0\): .*convert to-hf.* --requantize"
        ) as caught:
            mixtools.quantize(file, tmp_path / "out", type=["Q4_K_M"], dry_run=dry_run)
        assert caught.value.file == str(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["Q4_K_M", "F16", "BF16", "F32"])
def test_requantized(tmp_path: Path, quantized: Path, name: str) -> None:
    """As llama-quantize does it: from the values that the blocks stand for, in fp32."""
    file = quantized / "small.Q8_0.gguf"
    values = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
        for tensor in gguf.GGUFReader(file).tensors
    }
    quantize(file, tmp_path, name, requantize=True)
    quantizing.assert_holds(tensors(tmp_path / f"small.{name}.gguf"), values)


def test_a_dense_gguf_is_a_source_like_others(tmp_path: Path, quantized: Path) -> None:
    quantize(quantized / "small.BF16.gguf", tmp_path / "a", "Q4_K_M", "Q8_0", "F32")
    quantize(make.write_a(tmp_path / "small", TINY), tmp_path / "b", "Q4_K_M", "Q8_0", "F32")
    for name in ("Q4_K_M", "Q8_0", "F32"):
        one, other = (tensors(tmp_path / folder / f"small.{name}.gguf") for folder in "ab")
        assert one == other


# --- importance matrices ---

VALUES = expected(make.hf(make.torrent(TINY), TINY), TINY)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return make.write_a(tmp_path / "tiny", TINY)


def test_of_another_model(tmp_path: Path, tiny: Path) -> None:
    other = SMALL._replace(experts=3)
    sums, counts = quantizing.importance(expected(make.hf(make.torrent(other), other), other))
    file = quantizing.write_imatrix(tmp_path / "other.imatrix", sums, counts)
    for dry_run in (False, True):
        with pytest.raises(errors.TensorError, match="is this the importance matrix of another model") as caught:
            mixtools.quantize(tiny, tmp_path / "out", type=["Q4_K_M"], imatrix=file, dry_run=dry_run)
        assert caught.value.file == str(file)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("key", ["blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"])
def test_of_wrong_size(tmp_path: Path, tiny: Path, key: str) -> None:
    sums, counts = quantizing.importance(VALUES)
    sums[key] = sums[key][:, :-32].copy()
    file = quantizing.write_imatrix(tmp_path / "x.imatrix", sums, counts)
    with pytest.raises(errors.TensorError, match="wrong size") as caught:
        quantize(tiny, tmp_path / "out", "Q8_0", imatrix=file)
    assert caught.value.tensor == key and caught.value.file == str(file)


def test_that_lacks_what_a_type_needs(tmp_path: Path, tiny: Path) -> None:
    """Before hours of work. Types that need none are made without, tensor by tensor, as llama-quantize does."""
    sums, counts = quantizing.importance(VALUES)
    del sums["blk.0.ffn_up_exps.weight"]
    file = quantizing.write_imatrix(tmp_path / "x.imatrix", sums, counts)
    with pytest.raises(errors.UsageError, match=r"has no entry for blk\.0\.ffn_up_exps\.weight, which Q2_K needs"):
        quantize(tiny, tmp_path / "out", "Q4_K_M", "Q2_K_S", imatrix=file)
    assert not (tmp_path / "out").exists()
    quantize(tiny, tmp_path / "out", "Q4_K_M", imatrix=file)
    quantizing.assert_holds(tensors(tmp_path / "out" / "tiny.Q4_K_M.gguf"), VALUES, quantizing.weights(sums, counts))


def test_that_is_none(tmp_path: Path, tiny: Path) -> None:
    (tmp_path / "x.dat").write_bytes(b"no")
    with pytest.raises(errors.FormatError, match="is no importance matrix"):
        quantize(tiny, tmp_path / "out", "Q8_0", imatrix=tmp_path / "x.dat")
    with pytest.raises(errors.InputError):
        quantize(tiny, tmp_path / "out", "Q8_0", imatrix=tmp_path / "gone.dat")


@pytest.mark.parametrize("name", ["Q2_K_S", "IQ2_XXS", "IQ3_XS"])
def test_types_that_need_one(tmp_path: Path, tiny: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match=f"--type {name} needs an importance matrix, as in llama.cpp"):
        quantize(tiny, tmp_path / "out", "Q8_0", name)
    assert not (tmp_path / "out").exists()


def test_another_one_is_another_run(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there is not taken for what another matrix would give."""
    sums, counts = quantizing.importance(VALUES)
    first = quantizing.write_imatrix(tmp_path / "1.imatrix", sums, counts)
    second = quantizing.write_imatrix(tmp_path / "2.imatrix", *quantizing.importance(VALUES, seed=1))
    quantize(tiny, tmp_path / "out", "Q4_0", imatrix=first)
    for other in (second, None):
        with pytest.raises(errors.OutputExists):
            quantize(tiny, tmp_path / "out", "Q4_0", "F16", imatrix=other)
    quantize(tiny, tmp_path / "out", "Q4_0", "F16", imatrix=first)


# --- packages ---


@pytest.mark.parametrize("dry_run", [False, True])
def test_types_of_a_package_that_is_not_there(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    sums, counts = quantizing.importance(VALUES)
    file = quantizing.write_imatrix(tmp_path / "x.imatrix", sums, counts)
    monkeypatch.setitem(sys.modules, "libgguf", None)
    with pytest.raises(errors.UsageError, match="IQ2_XXS.* is encoded by the package libgguf: pip install 'libgguf'"):
        mixtools.quantize(tiny, tmp_path / "out", type=["IQ2_XXS"], imatrix=file, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_a_forecast_of_such_types(tmp_path: Path, tiny: Path) -> None:
    sums, counts = quantizing.importance(VALUES)
    file = quantizing.write_imatrix(tmp_path / "x.imatrix", sums, counts)
    planned: Any = mixtools.quantize(tiny, tmp_path / "out", type=["IQ3_S", "Q4_K_M"], imatrix=file, dry_run=True)
    assert isinstance(planned, Planned) and planned.seconds is not None and planned.seconds >= 0
