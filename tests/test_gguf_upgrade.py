"""convert gguf-upgrade: files of 2023 as today's llama.cpp loads them, not a bit of a block changed."""

from __future__ import annotations

import json
import os
import sys
import zlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import quantizing
from gguf_old import all_of, keys, of_2023, write
from layouts import make
from quantizing import kinds, metadata, tensors

import mixtools
from mixtools import errors
from mixtools.cli.main import main
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage import output as storage_output
from mixtools.verbs import Forecast
from mixtools.writing import Written

SMALL = make.Dims(d=256, f=256, layers=2, heads=2, kv=1, hd=128, vocab=5, experts=3)
ODD = make.Dims(d=32, f=64, layers=2, heads=2, kv=1, hd=16, vocab=5, experts=3)
VALUES = {dims: quantizing.expected(make.hf(make.torrent(dims), dims), dims) for dims in (SMALL, ODD)}
TYPES = ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "F16", "F32", "BF16", "IQ3_S"]
TOKENIZER = {
    "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁a", "b"],
    "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0, -2.5], "tokenizer.ggml.token_type": [2, 3, 3, 1, 1],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.add_bos_token": True,
    "tokenizer.chat_template": "{{ größe }}", "general.quantized_by": "TheBloke", "a.double": np.float64(0.1),
    "a.long": np.uint64(1 << 40), "a.truth": False,
}  # fmt: skip


def old(file: Path, kind: str = "Q8_0", dims: make.Dims = ODD, *, split: int = 0, **changes: Any) -> Path:
    told = keys(dims, **{**TOKENIZER, **changes})
    return write(file, of_2023(VALUES[dims]), all_of(kind), told, split=split)


def upgrade(source: Path, out: Path, **options: Any) -> Written:
    done = mixtools.convert(source, out, "gguf", **options)
    assert isinstance(done, Written)
    return done


def stacked(found: dict[str, quantizing.Tensor], dims: make.Dims) -> dict[str, quantizing.Tensor]:
    """What the new file must hold: the old one's bytes, put together by hand."""
    wanted = {}
    for name, tensor in found.items():
        stem, _, rest = name.removesuffix(".weight").rpartition(".")
        if "gate_inp" in name:
            wide = np.frombuffer(tensor.data, np.float16).astype(np.float32)
            wanted[name] = quantizing.Tensor("F32", tensor.shape, wide.tobytes())
        elif not rest.isdigit():
            wanted[name] = tensor
        elif rest == "0":
            parts = [found[f"{stem}.{number}.weight"] for number in range(dims.experts)]
            data = b"".join(part.data for part in parts)
            wanted[f"{stem}_exps.weight"] = quantizing.Tensor(tensor.type, (dims.experts, *tensor.shape), data)
    return wanted


# --- what is written ---


@pytest.mark.parametrize("kind", TYPES)
def test_each_type(tmp_path: Path, kind: str) -> None:
    path = old(tmp_path / "old.gguf", kind, SMALL)
    done = upgrade(path, tmp_path / "new.gguf")
    found = tensors(tmp_path / "new.gguf")
    assert found == stacked(tensors(path), SMALL)
    assert {tensor.type for name, tensor in found.items() if "_exps" in name} == {kind}
    assert done.tensors == len(found) == 23
    assert open_checkpoint(tmp_path / "new.gguf").layout.letter == "G"
    before, after = open_checkpoint(path), open_checkpoint(tmp_path / "new.gguf")
    for slot in before.slots():
        assert np.array_equal(before.read(slot).float().numpy(), after.read(slot).float().numpy()), slot


def test_the_metadata_is_kept(tmp_path: Path) -> None:
    """Key for key, in order, each of its own kind."""
    path = old(tmp_path / "old.gguf", **{"general.file_type": 7, "general.name": "their model"})
    upgrade(path, tmp_path / "new.gguf")
    one, other = metadata(path), metadata(tmp_path / "new.gguf")
    assert list(one.items()) == list(other.items())
    assert kinds(path)["a.double"] == "FLOAT64"
    assert {key: kind for key, kind in kinds(path).items() if not key.startswith("GGUF.")} == {
        key: kind for key, kind in kinds(tmp_path / "new.gguf").items() if not key.startswith("GGUF.")
    }


def test_the_types_of_december_2023(tmp_path: Path) -> None:
    """Attention and head in others than the experts, each layer's experts in their own."""

    def mixed(name: str) -> str:
        if "norm" in name or "gate_inp" in name:
            return "F32" if "norm" in name else "F16"
        if "attn" in name or name.startswith("output"):
            return {"attn_v": "Q8_0", "attn_k": "Q8_0", "output": "Q6_K"}.get(name.split(".")[-2], "Q4_K")
        return "Q5_K" if "blk.1.ffn_down" in name else "Q4_K"

    path = write(tmp_path / "old.gguf", of_2023(VALUES[SMALL]), mixed, keys(SMALL))
    upgrade(path, tmp_path / "new.gguf")
    found = tensors(tmp_path / "new.gguf")
    assert found == stacked(tensors(path), SMALL)
    assert (found["blk.0.ffn_down_exps.weight"].type, found["blk.1.ffn_down_exps.weight"].type) == ("Q4_K", "Q5_K")


@pytest.mark.parametrize("router", ["F32", "BF16"])
def test_routers_of_other_dtypes(tmp_path: Path, router: str) -> None:
    path = write(tmp_path / "old.gguf", of_2023(VALUES[ODD]), all_of("Q8_0", router), keys(ODD))
    upgrade(path, tmp_path / "new.gguf")
    found = tensors(tmp_path / "new.gguf")["blk.1.ffn_gate_inp.weight"]
    assert found.type == "F32" and found.data == VALUES[ODD]["blk.1.ffn_gate_inp.weight"].tobytes()


def test_tied(tmp_path: Path) -> None:
    values = {name: array for name, array in of_2023(VALUES[ODD]).items() if name != "output.weight"}
    path = write(tmp_path / "old.gguf", values, all_of("Q8_0"), keys(ODD))
    upgrade(path, tmp_path / "new.gguf")
    assert tensors(tmp_path / "new.gguf") == stacked(tensors(path), ODD)


@pytest.mark.parametrize("jobs", [1, 3])
@pytest.mark.parametrize("chunk", [50, 1000, 5000])
def test_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, jobs: int) -> None:
    path = old(tmp_path / "old.gguf", "Q5_1")
    upgrade(path, tmp_path / "whole.gguf")
    for name, module in [*sys.modules.items()]:
        if name.startswith("mixtools") and hasattr(module, "CHUNK"):
            monkeypatch.setattr(module, "CHUNK", chunk)
    upgrade(path, tmp_path / "new.gguf", jobs=jobs)
    assert (tmp_path / "new.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_from_parts(tmp_path: Path) -> None:
    """Any of them is given; the new one is whole."""
    upgrade(old(tmp_path / "whole.gguf"), tmp_path / "new.gguf")
    first = old(tmp_path / "x.gguf", split=30_000)
    parts = sorted(tmp_path.glob("x-*.gguf"))
    assert len(parts) > 1 and first == parts[0]
    upgrade(parts[1], tmp_path / "from.gguf")
    assert (tmp_path / "from.gguf").read_bytes() == (tmp_path / "new.gguf").read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = old(tmp_path / "old.gguf")
    with pytest.raises(SystemExit) as caught:
        main(["convert", "gguf-upgrade", str(path), str(tmp_path / "out" / "new.gguf"), "--json", "--quiet"])
    assert caught.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert document["output"] == str(tmp_path / "out" / "new.gguf")
    assert document["files"] == ["new.gguf"] and document["layout"] == "gguf" and document["tensors"] == 23
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["mixtools.json", "new.gguf"]
    assert mixtools.inspect(tmp_path / "out" / "new.gguf", verify=True).verified


def test_a_dry_run(tmp_path: Path) -> None:
    path = old(tmp_path / "old.gguf")
    planned = mixtools.convert(path, tmp_path / "out" / "new.gguf", "gguf", dry_run=True)
    assert isinstance(planned, Forecast) and not (tmp_path / "out").exists()
    upgrade(path, tmp_path / "out" / "new.gguf")
    assert planned.bytes == (tmp_path / "out" / "new.gguf").stat().st_size


def test_beside_others(tmp_path: Path) -> None:
    """In the folder of the old one and of other outputs, each listed."""
    path = old(tmp_path / "old.gguf")
    upgrade(path, tmp_path / "a.gguf")
    upgrade(path, tmp_path / "b.gguf")
    assert [*json.loads((tmp_path / "mixtools.json").read_text())["outputs"]] == ["a.gguf", "b.gguf"]
    with pytest.raises(errors.OutputExists, match="is there already"):
        upgrade(path, tmp_path / "a.gguf")
    upgrade(path, tmp_path / "a.gguf", overwrite=True)
    with pytest.raises(errors.UsageError, match="is the source itself"):
        upgrade(path, path, overwrite=True)


# --- interruptions ---


@pytest.mark.parametrize("fatal", [1, 5, 20, 25])
def test_killed_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int) -> None:
    """At a region of the old file, or among the renames of the commit."""
    path = old(tmp_path / "old.gguf")
    upgrade(path, tmp_path / "whole" / "new.gguf")
    count = 0
    wrote, rename = storage_output.Output.wrote, os.rename

    def dying(real: Any) -> Any:
        def wrapped(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == fatal:
                raise KeyboardInterrupt
            return real(*arguments)

        return wrapped

    with monkeypatch.context() as patch:
        patch.setattr(storage_output.Output, "wrote", dying(wrote))
        patch.setattr(os, "rename", dying(rename))
        if fatal == 25:
            count = fatal - 2  # the manifest's rename
            patch.setattr(storage_output.Output, "wrote", wrote)
        with pytest.raises(KeyboardInterrupt):
            upgrade(path, tmp_path / "out" / "new.gguf", jobs=1)
    done = upgrade(path, tmp_path / "out" / "new.gguf")
    assert (done.resumed_bytes > 0) is (fatal > 1)
    for name in ("new.gguf", "mixtools.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len([*(tmp_path / "out").iterdir()]) == 2


# --- what is refused ---


def test_experts_of_several_types(tmp_path: Path) -> None:
    """As llama.cpp of 11 to 14 January 2024 made some."""

    def mixed(name: str) -> str:
        return "Q4_K" if name == "blk.1.ffn_down.2.weight" else all_of("Q8_0")(name)

    path = write(tmp_path / "old.gguf", of_2023(VALUES[SMALL]), mixed, keys(SMALL))
    told = (
        r"would join experts of several types \(Q8_0: blk\.1\.ffn_down\.0\.weight, blk\.1\.ffn_down\.1\.weight; "
        r"Q4_K: blk\.1\.ffn_down\.2\.weight\)"
    )
    with pytest.raises(errors.TensorError, match=told) as caught:
        upgrade(path, tmp_path / "new.gguf")
    assert caught.value.tensor == "blk.1.ffn_down_exps.weight" and caught.value.file == str(path)
    assert [file.name for file in tmp_path.iterdir()] == ["old.gguf"]
    quantizing.quantize(path, tmp_path / "new.gguf", "Q8_0", requantize=True)  # the way out that it tells


def test_a_file_of_today(tmp_path: Path) -> None:
    path = write(tmp_path / "new.gguf", VALUES[ODD], all_of("F16", "F32"), keys(ODD))
    with pytest.raises(errors.LayoutError, match="is GGUF; gguf-upgrade takes GGUFs of before April 2024"):
        upgrade(path, tmp_path / "newer.gguf")


def test_no_gguf(tmp_path: Path) -> None:
    with pytest.raises(errors.LayoutError, match="gguf-upgrade takes GGUFs of before April 2024"):
        upgrade(make.write_a(tmp_path / "a", ODD), tmp_path / "new.gguf")


@pytest.mark.parametrize("name", ["new", "new.bin", "."])
def test_an_output_that_is_no_gguf(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.UsageError, match="the output is a file: name it"):
        upgrade(old(tmp_path / "old.gguf"), tmp_path / name)


def test_damage_of_the_old_file(tmp_path: Path) -> None:
    """Truncated by a download: nothing is made of it."""
    path = old(tmp_path / "old.gguf")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(errors.FormatError, match="is truncated"):
        upgrade(path, tmp_path / "new.gguf")


def test_a_flipped_bit_of_an_old_file_that_has_checksums(tmp_path: Path) -> None:
    """Of one with a manifest, which upgraded files have."""
    path = old(tmp_path / "old.gguf")
    reader = gguf.GGUFReader(path)
    tensor = next(one for one in reader.tensors if one.name == "blk.0.ffn_up.1.weight")
    crcs = {one.name: f"{zlib.crc32(one.data.tobytes()):08x}" for one in reader.tensors}
    size = path.stat().st_size
    (tmp_path / "mixtools.json").write_text(json.dumps({"files": {"old.gguf": size}, "crc32": crcs}))
    upgrade(path, tmp_path / "out" / "new.gguf")
    raw = bytearray(path.read_bytes())
    raw[tensor.data_offset + 3] ^= 1
    path.write_bytes(raw)
    with pytest.raises(errors.ChecksumError) as caught:
        upgrade(path, tmp_path / "out" / "other.gguf")
    assert caught.value.tensor == "blk.0.ffn_up.1.weight"
    assert not (tmp_path / "out" / "other.gguf").exists()
