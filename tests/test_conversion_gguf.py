"""Out of a GGUF again: what inspect --verify finds in one, and what convert makes of it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import quantizing
import torch
from converting import NANO, files, go, to_hf, weights
from gguf_old import all_of, canonical, dequantized, keys, of_2023, write
from layouts import make
from quantizing import quantize

import mixtools
from mixtools import errors
from mixtools.checking import integrity
from mixtools.layouts.detect import open_checkpoint

ODD = make.Dims(d=32, f=64, layers=2, heads=2, kv=1, hd=16, vocab=5, experts=3)
SMALL = make.Dims(d=256, f=256, layers=1, heads=2, kv=1, hd=128, vocab=5, experts=2)
HF = {dims: make.hf(make.torrent(dims), dims) for dims in (ODD, SMALL)}
VALUES = {dims: quantizing.expected(HF[dims], dims) for dims in (ODD, SMALL)}


def theirs(file: Path, kind: str, dims: make.Dims = ODD, *, layout: str = "today", **more: Any) -> Path:
    values = VALUES[dims] if layout == "today" else of_2023(VALUES[dims])
    return write(file, values, all_of(kind, "F32" if layout == "today" else "F16"), keys(dims), **more)


# --- damage ---


def test_verify_what_is_whole(tmp_path: Path) -> None:
    quantize(make.write_a(tmp_path / "a", SMALL), tmp_path, "Q4_K_M", "BF16")
    for path in (tmp_path / "a.Q4_K_M.gguf", tmp_path / "a.BF16.gguf"):
        done = mixtools.inspect(path, verify=True)
        assert done.problems == [] and done.verified is True
        assert done.document["checksums"] == done.document["tensors"]
    done = mixtools.inspect(theirs(tmp_path / "theirs.gguf", "Q6_K", SMALL), verify=True)
    assert done.verified is True and done.document["checksums"] == 0


def test_verify_finds_a_flipped_bit(tmp_path: Path) -> None:
    """By the manifest: most bits of a block are as good as any others."""
    quantize(make.write_a(tmp_path / "a", SMALL), tmp_path, "Q4_K_M", "Q8_0")
    path = tmp_path / "a.Q4_K_M.gguf"
    whole, chance = path.read_bytes(), random.Random(0)
    for tensor in gguf.GGUFReader(path).tensors:
        raw = bytearray(whole)
        raw[tensor.data_offset + chance.randrange(tensor.n_bytes)] ^= 1 << chance.randrange(8)
        path.write_bytes(raw)
        done = mixtools.inspect(path, verify=True)
        assert done.exit_code == 3 and any(
            problem["tensor"] == tensor.name and "checksum" in problem["message"] for problem in done.problems
        )
        with pytest.raises(errors.ChecksumError):
            make.read_all(open_checkpoint(path))
        assert mixtools.inspect(tmp_path / "a.Q8_0.gguf", verify=True).verified  # of the same names
    path.write_bytes(whole)
    assert mixtools.inspect(path, verify=True).verified


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_K", "Q2_K", "Q6_K", "Q3_K", "Q5_1", "IQ4_NL"])
def test_verify_finds_a_scale_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """The first value of its block is named, in a stacked tensor with its expert, far into it."""
    monkeypatch.setattr(integrity, "CHUNK", 3000)
    path = theirs(tmp_path / "x.gguf", kind, SMALL)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    scale = {"Q2_K": size - 4, "Q3_K": size - 2, "Q6_K": size - 2}.get(kind, 0)
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.0.ffn_up_exps.weight")
    rows = SMALL.d // block
    at = tensor.data_offset + (256 + 7) * rows * size + (rows - 1) * size + scale  # expert 1, row 7, last block
    raw = bytearray(path.read_bytes())
    raw[at : at + 2] = b"\x00\x7e"
    path.write_bytes(raw)
    (problem,) = mixtools.inspect(path, verify=True).problems
    assert problem["tensor"] == "blk.0.ffn_up_exps.weight" and problem["file"] == str(path)
    assert f"holds nan at [1, 7, {SMALL.d - block}]" in problem["message"]


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_verify_finds_infinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr(integrity, "CHUNK", 300)
    path = theirs(tmp_path / "x.gguf", kind)
    tensor = next(one for one in gguf.GGUFReader(path).tensors if one.name == "blk.1.ffn_down_exps.weight")
    raw = bytearray(path.read_bytes())
    size = tensor.n_bytes // tensor.n_elements
    at = tensor.data_offset + size * ((2 * 32 + 5) * 64 + 3)
    raw[at : at + size] = {"F16": b"\x00\xfc", "BF16": b"\x80\xff", "F32": b"\x00\x00\x80\xff"}[kind]
    path.write_bytes(raw)
    (problem,) = mixtools.inspect(path, verify=True).problems
    assert "holds -inf at [2, 5, 3]" in problem["message"]


def test_verify_finds_truncation(tmp_path: Path) -> None:
    path = theirs(tmp_path / "x.gguf", "Q8_0")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(errors.FormatError, match="is truncated"):
        mixtools.inspect(path, verify=True)


# --- conversion ---


@pytest.mark.parametrize("layout", ["today", "2023"])
def test_bf16_gives_the_original_bytes(tmp_path: Path, layout: str) -> None:
    """Norms and router, F32 in the file, are bf16 again."""
    dims = ODD
    path = theirs(tmp_path / "x.gguf", "BF16", layout=layout)
    mixtools.convert(path, tmp_path / "out")
    make.assert_same(weights(tmp_path / "out"), HF[dims])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["model_type"] == "mixtral"
    assert open_checkpoint(tmp_path / "out").config == open_checkpoint(path).config


def test_there_and_back(tmp_path: Path) -> None:
    """The whole nano model: its weights file byte for byte, its configuration key for key."""
    quantize(NANO, tmp_path, "BF16", name="nano")
    go(to_hf, NANO, tmp_path / "straight")
    mixtools.convert(tmp_path / "nano.BF16.gguf", tmp_path / "back")
    straight, back = files(tmp_path / "straight"), files(tmp_path / "back")
    assert back["model.safetensors"] == straight["model.safetensors"]
    assert back.keys() == straight.keys() | {"gguf-metadata.json"}
    assert json.loads(straight["config.json"]) == json.loads(back["config.json"])
    assert mixtools.check(tmp_path / "back", NANO).verdict == "passed"


def test_f16(tmp_path: Path) -> None:
    """Kept; a norm becomes F16 again where that loses nothing, and stays F32 where it would."""
    values = {**VALUES[ODD]}
    values["blk.1.attn_norm.weight"] = values["blk.1.attn_norm.weight"] + np.float32(2**-20)
    path = write(tmp_path / "x.gguf", values, all_of("F16", "F32"), keys(ODD))
    mixtools.convert(path, tmp_path / "out")
    found, wanted = weights(tmp_path / "out"), canonical(values, ODD)
    kept = "model.layers.1.input_layernorm.weight"
    assert {name for name, tensor in found.items() if tensor.dtype is not torch.float16} == {kept}
    for name, tensor in found.items():
        assert torch.equal(tensor.float(), torch.from_numpy(wanted[name]).to(tensor.dtype).float()), name


def test_f32(tmp_path: Path) -> None:
    mixtools.convert(theirs(tmp_path / "x.gguf", "F32"), tmp_path / "out")
    make.assert_same(weights(tmp_path / "out"), {name: tensor.float() for name, tensor in HF[ODD].items()})


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ3_S"])
@pytest.mark.parametrize("layout", ["today", "2023"])
def test_quantized(tmp_path: Path, kind: str, layout: str) -> None:
    """Each value rounded once: to bf16, or exactly in f32."""
    path = theirs(tmp_path / "x.gguf", kind, SMALL, layout=layout)
    wanted = canonical(dequantized(path), SMALL)
    for dtype, theirs_ in (("keep", torch.bfloat16), ("f32", torch.float32), ("f16", torch.float16)):
        mixtools.convert(path, tmp_path / dtype, dtype=dtype)
        found = weights(tmp_path / dtype)
        assert {tensor.dtype for tensor in found.values()} == {theirs_}
        make.assert_same(found, {name: torch.from_numpy(array.copy()).to(theirs_) for name, array in wanted.items()})


def test_a_router_that_bf16_does_not_hold(tmp_path: Path) -> None:
    """Of a file that was not made from bf16."""
    values = {**VALUES[SMALL]}
    values["blk.0.ffn_gate_inp.weight"] = values["blk.0.ffn_gate_inp.weight"] * np.float32(1.0001)
    path = write(tmp_path / "x.gguf", values, all_of("Q8_0", "F32"), keys(SMALL))
    mixtools.convert(path, tmp_path / "out")
    found = weights(tmp_path / "out")["model.layers.0.block_sparse_moe.gate.weight"]
    assert found.dtype is torch.float32 and torch.equal(found, torch.from_numpy(values["blk.0.ffn_gate_inp.weight"]))


def test_a_value_that_f16_does_not_hold(tmp_path: Path) -> None:
    values = {**VALUES[SMALL]}
    values["blk.0.attn_v.weight"] = values["blk.0.attn_v.weight"] * np.float32(1e5)
    path = write(tmp_path / "x.gguf", values, all_of("BF16", "F32"), keys(SMALL))
    with pytest.raises(errors.TensorError, match="does not fit"):
        mixtools.convert(path, tmp_path / "out", dtype="f16")


def test_in_shards_from_parts(tmp_path: Path) -> None:
    first = theirs(tmp_path / "x.gguf", "Q8_0", split=20_000)
    mixtools.convert(first, tmp_path / "out", max_shard_size=30_000)
    mixtools.convert(theirs(tmp_path / "whole.gguf", "Q8_0"), tmp_path / "straight")
    assert len([*(tmp_path / "out").glob("*.safetensors")]) > 2
    make.assert_same(weights(tmp_path / "out"), weights(tmp_path / "straight"))


@pytest.mark.parametrize("keep_tied", [False, True])
def test_tied(tmp_path: Path, keep_tied: bool) -> None:
    values = {name: array for name, array in VALUES[ODD].items() if name != "output.weight"}
    path = write(tmp_path / "x.gguf", values, all_of("BF16", "F32"), keys(ODD))
    mixtools.convert(path, tmp_path / "out", keep_tied=keep_tied)
    found = weights(tmp_path / "out")
    assert ("lm_head.weight" in found) is not keep_tied
    checkpoint = open_checkpoint(tmp_path / "out")
    read = make.read_all(checkpoint)
    assert torch.equal(read["lm_head.weight"], HF[ODD]["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is keep_tied


def test_to_the_torrents_layout(tmp_path: Path) -> None:
    """Where q's and k's rows lie as in the GGUF."""
    mixtools.convert(theirs(tmp_path / "x.gguf", "BF16"), tmp_path / "out", "torrent")
    found = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True)
    make.assert_same(found, make.torrent(ODD))


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """It is said."""
    done: Any = mixtools.convert(theirs(tmp_path / "x.gguf", "BF16"), tmp_path / "out")
    assert done.missing == ("tokenizer.model",)
    assert sorted(files(tmp_path / "out")) == [
        "config.json",
        "gguf-metadata.json",
        "mixtools.json",
        "model.safetensors",
    ]


def test_an_output_beside_its_source(tmp_path: Path) -> None:
    """A folder of its own must not be the source's."""
    theirs(tmp_path / "x.gguf", "BF16")
    with pytest.raises(errors.UsageError, match="the output is the source's own folder"):
        mixtools.convert(tmp_path / "x.gguf", tmp_path)
    mixtools.convert(tmp_path / "x.gguf", tmp_path / "below")
    assert (tmp_path / "x.gguf").exists()


def test_what_a_gguf_says_survives_the_way_to_hugging_face_and_back(tmp_path: Path) -> None:
    """Keys that no other document has a place for, unknown ones included, kind for kind."""
    told = {
        "general.license": "mit", "general.author": "somebody", "general.languages": ["en", "fr"],
        "somebody.own.number": 7, "general.source.url": "https://example.org/ü",
    }  # fmt: skip
    source = write(tmp_path / "old.gguf", VALUES[SMALL], all_of("BF16", "F32"), {**keys(SMALL), **told})
    mixtools.convert(source, tmp_path / "hf")
    back = mixtools.quantize(tmp_path / "hf", tmp_path / "back", type=["BF16"])
    before, after = (mixtools.open(path).gguf.metadata for path in (source, back.output / back.rows[0].file))
    assert all(after[key] == before[key] for key in told)
    assert after["general.name"].value == before["general.name"].value == "theirs"
    (tmp_path / "hf" / "gguf-metadata.json").write_text('{"general.license": 3}')
    with pytest.raises(errors.ConfigError, match="is not what mixtools writes there") as caught:
        mixtools.quantize(tmp_path / "hf", tmp_path / "again", type=["BF16"])
    assert caught.value.file == str(tmp_path / "hf" / "gguf-metadata.json")


def test_laser_takes_what_is_quantized_where_it_is_told_to(tmp_path: Path) -> None:
    quantize(NANO, tmp_path, "Q8_0", name="nano")
    how: dict[str, Any] = {"layers": "1", "targets": "w2", "experts": "0", "rank_rule": "rank=8"}
    with pytest.raises(errors.QuantizedError, match=r"convert to-hf` it first.*or add --requantize"):
        mixtools.laser(tmp_path / "nano.Q8_0.gguf", tmp_path / "out", **how)
    mixtools.laser(tmp_path / "nano.Q8_0.gguf", tmp_path / "out", requantize=True, **how)
    mixtools.convert(tmp_path / "nano.Q8_0.gguf", tmp_path / "dense")
    mixtools.laser(tmp_path / "dense", tmp_path / "same", **how)
    assert weights(tmp_path / "out").keys() == weights(tmp_path / "same").keys()
    make.assert_same(weights(tmp_path / "out"), weights(tmp_path / "same"))
