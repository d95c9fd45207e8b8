"""GGUF files as models: those of other programs and ours, of today and of 2023, whole, split, damaged and others'."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf_old
import numpy as np
import pytest
import quantizing
import torch
from gguf_old import all_of, canonical, dequantized, keys, of_2023, write
from layouts import make
from quantizing import quantize

import mixtools
from mixtools import errors
from mixtools.config import MixtralConfig
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage.dtypes import DType

SMALL = make.Dims(d=256, f=256, layers=2, heads=2, kv=1, hd=128, vocab=5, experts=2)
ODD = make.Dims(d=32, f=64, layers=2, heads=2, kv=1, hd=16, vocab=5, experts=3)
SMALL_VALUES, ODD_VALUES = (
    quantizing.expected(make.hf(make.torrent(dims), dims), dims) for dims in (SMALL, ODD)
)  # fmt: skip
BLOCKS = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S",
          "MXFP4"]  # fmt: skip
LAYOUTS = {"today": lambda values: values, "2023": of_2023}


def values_of(path: Path, dims: make.Dims, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What gguf's own decoders read, as a reader of canonical tensors of `dtype` is to give it."""
    arrays = canonical(dequantized(path), dims)
    return {name: torch.from_numpy(array.copy()).to(dtype) for name, array in arrays.items()}


def assert_read(path: Path, dims: make.Dims) -> None:
    """Blocks as bf16, all else in its own dtype."""
    wanted = values_of(path, dims, torch.float32)
    for name, tensor in make.read_all(open_checkpoint(path)).items():
        assert torch.equal(tensor, wanted[name].to(tensor.dtype)), name
    assert len(wanted) == len(list(open_checkpoint(path).slots()))


def old(folder: Path, kind: str = "F16", dims: make.Dims = ODD, **changes: Any) -> Path:
    values = of_2023(SMALL_VALUES if dims is SMALL else ODD_VALUES)
    folder.mkdir(exist_ok=True, parents=True)
    return write(folder / f"old.{kind}.gguf", values, all_of(kind), keys(dims, **changes))


def new(folder: Path, kind: str = "F16", dims: make.Dims = ODD, **changes: Any) -> Path:
    values = SMALL_VALUES if dims is SMALL else ODD_VALUES
    folder.mkdir(exist_ok=True, parents=True)
    return write(folder / f"new.{kind}.gguf", values, all_of(kind, "F32"), keys(dims, **changes))


# --- what is read ---


@pytest.mark.parametrize("kind", [*BLOCKS, "F16", "BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_type_of_others(tmp_path: Path, kind: str, layout: str) -> None:
    path = (new if layout == "today" else old)(tmp_path, kind, SMALL)
    checkpoint = open_checkpoint(path)
    assert checkpoint.layout.letter == ("G" if layout == "today" else "G'")
    assert checkpoint.config == MixtralConfig(256, 256, 2, 2, 1, 128, 5, 2)
    assert_read(path, SMALL)


def test_ours(tmp_path: Path) -> None:
    quantize(make.write_a(tmp_path / "small", SMALL), tmp_path, "Q4_K_M", "BF16", "F16")
    for name in ("Q4_K_M", "BF16", "F16"):
        assert_read(tmp_path / f"small.{name}.gguf", SMALL)
    read = make.read_all(open_checkpoint(tmp_path / "small.BF16.gguf"))
    for name, tensor in make.hf(make.torrent(SMALL), SMALL).items():
        assert torch.equal(read[name].bfloat16(), tensor)


def test_mixed_types(tmp_path: Path) -> None:
    """Each tensor by its own; in the old layout also each expert."""
    kinds = ["Q8_0", "Q4_K", "F16", "Q6_K", "BF16", "F32", "Q5_1"]

    def mixed(name: str) -> str:
        return "F32" if "norm" in name else kinds[sum(name.encode()) % len(kinds)] if "inp" not in name else "F16"

    for name, change in LAYOUTS.items():
        path = write(tmp_path / f"{name}.gguf", change(SMALL_VALUES), mixed, keys(SMALL))
        assert_read(path, SMALL)
        assert len({tensor.type for tensor in quantizing.tensors(path).values()}) == len(kinds)


@pytest.mark.parametrize("max_bytes", [1, 500, 70_000])
def test_in_runs_of_rows(tmp_path: Path, max_bytes: int) -> None:
    """Of experts that share a tensor each has its own."""
    checkpoint = open_checkpoint(new(tmp_path, "Q8_0", ODD))
    for slot in checkpoint.slots():
        runs = list(checkpoint.blocks(slot, max_bytes, 1))
        assert np.array_equal(np.concatenate([run.copy() for run in checkpoint.blocks(slot, max_bytes, 1)]),
                              checkpoint.bits(slot)) and len(runs) >= 1  # fmt: skip


def test_decoded_to_another_dtype(tmp_path: Path) -> None:
    """Not rounded twice."""
    from dataclasses import replace

    path = new(tmp_path, "Q4_K", SMALL)
    for dtype, theirs in ((DType.F32, torch.float32), (DType.F16, torch.float16), (DType.BF16, torch.bfloat16)):
        wanted = values_of(path, SMALL, torch.float32)
        found = make.read_all(replace(open_checkpoint(path), dense=dtype))
        assert {tensor.dtype for tensor in found.values()} == {theirs, torch.float32}
        assert all(torch.equal(tensor, wanted[name].to(tensor.dtype)) for name, tensor in found.items())


def test_what_is_said_of_it(tmp_path: Path) -> None:
    for path, quantization, letter in (
        (old(tmp_path, "Q4_0", ODD, **{"general.file_type": 2}), "Q4_0", "gguf-2023"),
        (new(tmp_path, "F16"), None, "gguf"),
    ):
        document = mixtools.inspect(path).document
        assert document["layout"] == letter and document["path"] == str(path)
        assert document["quantization"] == quantization
        assert document["missing"] == document["unknown"] == []
        assert document["parameters"] == sum(array.size for array in ODD_VALUES.values())
        assert document["tensors"] == len(quantizing.tensors(path))


# --- one file, parts, folders ---


def test_split(tmp_path: Path) -> None:
    """Named by any part, or by their folder."""
    whole = new(tmp_path / "whole")
    first = write(tmp_path / "x.gguf", ODD_VALUES, all_of("F16", "F32"), keys(ODD), split=20_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert len(parts) > 2 and first == parts[0]
    for given in (parts[0], parts[-1], tmp_path):
        checkpoint = open_checkpoint(given)
        make.assert_same(make.read_all(checkpoint), make.read_all(open_checkpoint(whole)))
        assert checkpoint.place == parts[0]


def test_a_part_is_missing(tmp_path: Path) -> None:
    first = write(tmp_path / "x.gguf", ODD_VALUES, all_of("F16"), keys(ODD), split=20_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    parts[1].rename(tmp_path / "away")
    for given in (first, parts[2], tmp_path):
        with pytest.raises(errors.LayoutError, match=f"is missing, one of {len(parts)} parts; fetch it") as caught:
            open_checkpoint(given)
        assert caught.value.file == str(parts[1])


def test_parts_of_two_models(tmp_path: Path) -> None:
    """As many, of other sizes; or one renamed from another place."""
    for name, dims in (("x", ODD), ("y", SMALL)):
        values = ODD_VALUES if dims is ODD else SMALL_VALUES
        write(tmp_path / f"{name}.gguf", values, all_of("F16"), keys(dims), split=20_000 if dims is ODD else 500_000)
    parts, others = (sorted(tmp_path.glob(f"{name}-*.gguf")) for name in "xy")
    for wrong in (others[1], parts[2], parts[0]):
        shutil.copy(wrong, tmp_path / "kept")
        original = parts[1].read_bytes()
        (tmp_path / "kept").replace(parts[1])
        with pytest.raises(errors.MixtoolsError) as caught:
            open_checkpoint(parts[0])
        assert isinstance(caught.value, errors.LayoutError | errors.FormatError)
        # only a part that tells of another number, or that it is another part, can be told from the others
        assert str(parts[1]) in str(caught.value) or "one of 6 is another model's" in str(caught.value)
        parts[1].write_bytes(original)
    open_checkpoint(parts[0])


@pytest.mark.parametrize("key", ["split.no", "split.count", "split.tensors.count"])
def test_parts_that_tell_otherwise(tmp_path: Path, key: str) -> None:
    write(tmp_path / "x.gguf", ODD_VALUES, all_of("F16"), keys(ODD), split=20_000)
    part = sorted(tmp_path.glob("x-*.gguf"))[1]
    raw = bytearray(part.read_bytes())
    at = raw.index(key.encode() + (b"\x05" if key.endswith("tensors.count") else b"\x02")) + len(key) + 4
    raw[at] ^= 64
    part.write_bytes(raw)
    with pytest.raises(errors.LayoutError, match=rf"is not a part of the model .*\({key}\)") as caught:
        open_checkpoint(tmp_path)
    assert caught.value.file == str(part)


def test_a_whole_file_that_was_called_a_part(tmp_path: Path) -> None:
    new(tmp_path).rename(tmp_path / "x-00001-of-00001.gguf")
    open_checkpoint(tmp_path / "x-00001-of-00001.gguf")  # it has all there is


def test_a_folder_of_one(tmp_path: Path) -> None:
    path = new(tmp_path)
    (tmp_path / "README.md").write_text("x")
    assert open_checkpoint(tmp_path).place == path


def test_a_folder_of_several(tmp_path: Path) -> None:
    """Refused with their names, a split one by its first part."""
    new(tmp_path, "F16")
    new(tmp_path, "Q8_0")
    write(tmp_path / "x.gguf", ODD_VALUES, all_of("F16"), keys(ODD), split=20_000)
    with pytest.raises(errors.LayoutError, match="holds 3 GGUF files; name the one you mean: ") as caught:
        open_checkpoint(tmp_path)
    named = str(caught.value).rpartition(": ")[2].split(", ")
    assert named == ["new.F16.gguf", "new.Q8_0.gguf", sorted(tmp_path.glob("x-*"))[0].name]
    assert caught.value.file == str(tmp_path)


def test_a_folder_with_an_importance_matrix(tmp_path: Path) -> None:
    """Which is no model, and in the way of none."""
    path = new(tmp_path, "F16")
    file = quantizing.write_imatrix(tmp_path / "imatrix.gguf", *quantizing.importance(ODD_VALUES))
    assert open_checkpoint(tmp_path).place == path
    with pytest.raises(errors.LayoutError, match="is an importance matrix, not a model; it goes with --imatrix"):
        open_checkpoint(file)
    path.unlink()
    with pytest.raises(errors.LayoutError, match="is an importance matrix, not a model"):
        open_checkpoint(tmp_path)


def test_a_folder_with_unfinished_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a further type: what is finished can be read meanwhile, and the source in the same folder."""
    source = make.write_c(tmp_path / "out", ODD)
    quantize(source, source, "Q8_0")
    monkeypatch.setattr("mixtools.storage.output.Output.commit", _dies)
    with pytest.raises(KeyboardInterrupt):
        quantize(source, source, "F16")
    assert (source / ".mixtools-out.F16.gguf").is_dir()
    assert open_checkpoint(source).layout.letter == "C"
    (source / "consolidated.safetensors").unlink()
    assert open_checkpoint(source).place == source / "out.Q8_0.gguf"
    (source / "out.Q8_0.gguf").unlink()
    with pytest.raises(errors.LayoutError, match="holds no Mixtral checkpoint"):
        open_checkpoint(source)


def _dies(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError, match="does not exist"):
        open_checkpoint(tmp_path / "x.gguf")


# --- what is no Mixtral ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2moe"}, "is a GGUF of architecture 'qwen2moe'; a Mixtral's is 'llama' with"),
        ({"general.architecture": None}, "names no architecture"),
        ({"general.architecture": 5}, "names no architecture"),
        ({"llama.expert_count": None}, "is a llama without experts"),
        ({"llama.expert_count": 0}, "is a llama without experts"),
        ({"general.type": "imatrix"}, "is an importance matrix, not a model"),
    ],
)
def test_other_models(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(errors.LayoutError, match=message):
        open_checkpoint(new(tmp_path, **changes))


# --- tensors ---


def test_tied(tmp_path: Path) -> None:
    """Without an output.weight the embedding is the head, as to llama.cpp."""
    values = {name: array for name, array in ODD_VALUES.items() if name != "output.weight"}
    checkpoint = open_checkpoint(write(tmp_path / "x.gguf", values, all_of("F16"), keys(ODD)))
    read = make.read_all(checkpoint)
    assert checkpoint.tied and torch.equal(read["lm_head.weight"], read["model.embed_tokens.weight"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "name", ["blk.1.attn_q.weight", "output_norm.weight", "token_embd.weight", "blk.0.ffn_gate_inp.weight", "experts"]
)
def test_a_tensor_is_missing(tmp_path: Path, layout: str, name: str) -> None:
    values = dict(LAYOUTS[layout](ODD_VALUES))
    name = {"today": "blk.1.ffn_up_exps.weight", "2023": "blk.1.ffn_up.2.weight"}[layout] if name == "experts" else name
    del values[name]
    path = write(tmp_path / "x.gguf", values, all_of("F16"), keys(ODD))
    with pytest.raises(errors.LayoutError, match="lacks one tensor|is missing") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == name and caught.value.file == str(path)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("x.weight", (3,)), ("blk.2.attn_q.weight", (32, 32)), ("blk.0.attn_q.bias", (32,)), ("rope_freqs.weight", (8,)),
     ("blk.0.ffn_gate.0.weight", (64, 32))],
)  # fmt: skip
def test_a_tensor_too_many(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    values = {**ODD_VALUES, name: np.ones(shape, np.float32)}
    path = write(tmp_path / "x.gguf", values, all_of("F16", "F32"), keys(ODD))
    with pytest.raises(errors.LayoutError) as caught:
        open_checkpoint(path)
    assert name in str(caught.value) or "lacks" in str(caught.value)


@pytest.mark.parametrize("name", ["blk.0.attn_k.weight", "blk.1.ffn_down_exps.weight", "blk.1.attn_norm.weight"])
def test_a_tensor_of_another_shape(tmp_path: Path, name: str) -> None:
    values = {**ODD_VALUES, name: np.concatenate([ODD_VALUES[name]] * 2)}
    path = write(tmp_path / "x.gguf", values, all_of("F16", "F32"), keys(ODD))
    with pytest.raises(errors.TensorError, match="wrong shape") as caught:
        open_checkpoint(path)
    assert caught.value.tensor == name
    assert [problem.tensor for problem in mixtools.open(path, strict=False).problems] == [name]


def test_a_norm_in_blocks(tmp_path: Path) -> None:
    """No program writes one."""
    path = write(tmp_path / "x.gguf", ODD_VALUES, lambda _: "Q8_0", keys(ODD))
    with pytest.raises(errors.MixtoolsError, match="norm") as caught:
        open_checkpoint(path)
    assert "norm" in str(caught.value.tensor)


def test_names_of_the_test_s_own(tmp_path: Path) -> None:
    """The oracle undoes what the converter does."""
    hf = make.hf(make.torrent(ODD), ODD)
    for arrays in (ODD_VALUES, of_2023(ODD_VALUES)):
        back = canonical(arrays, ODD)
        assert back.keys() == hf.keys()
        assert all(np.array_equal(back[name], tensor.float().numpy()) for name, tensor in hf.items())
    assert gguf_old.keys(ODD)["llama.block_count"] == 2
