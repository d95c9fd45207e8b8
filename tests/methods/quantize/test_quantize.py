"""mixtools.quantize: the bytes in the files, by the gguf package's reader and libgguf's ggml."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import quantizing
import torch
from converting import nano, sources
from layouts import make
from quantizing import ODD, SMALL, TINY, assert_holds, encoded, expected, metadata, quantize, tensors

from mixtools import errors
from mixtools.cli.main import main
from mixtools.config import from_document
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.gguf import GGUF
from mixtools.layouts.gguf_config import FILE_TYPES
from mixtools.methods.quantize.mixtures import Mixture, choose
from mixtools.storage.output import Output

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "nano-mixtral"
MODEL = make.torrent(SMALL)
VALUES = expected(make.hf(MODEL, SMALL), SMALL)
PLAIN = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
         "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ3_S", "IQ3_M", "MXFP4_MOE"]  # fmt: skip
SLOW = ("IQ1_S", "IQ1_M", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS")  # libgguf makes tables for them, seconds each
WEIGHED = [name for name in FILE_TYPES if name not in ("F32", "F16", "BF16", "MXFP4_MOE", *SLOW)]
TINY_VALUES = expected(make.hf(make.torrent(TINY), TINY), TINY)
IMPORTANCE = quantizing.importance(TINY_VALUES)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make.write_a(tmp_path_factory.mktemp("source") / "small", SMALL, MODEL)


@pytest.fixture(scope="module")
def plain(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every type that needs no importance matrix, in one pass."""
    out = tmp_path_factory.mktemp("plain")
    quantize(source, out, *PLAIN)
    return out


@pytest.fixture(scope="module")
def weighed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every type that an importance matrix changes."""
    out = tmp_path_factory.mktemp("weighed")
    quantize(
        make.write_a(out / "tiny", TINY), out, *WEIGHED,
        imatrix=quantizing.write_imatrix(out / "their.imatrix", *IMPORTANCE),
    )  # fmt: skip
    return out


def types(name: str, dims: make.Dims = SMALL, *, imatrix: bool = False) -> dict[str, str]:
    """By tensor, as the mixtures say; test_mixtures.py holds them against llama.cpp's."""
    config = from_document(dims.params(), "params.json")
    chosen = choose(Mixture(name), config, tied=False, imatrix=imatrix)
    return {GGUF.piece(slot, config).name: choice.type.value for slot, choice in chosen.items()}


# --- the bytes ---


@pytest.mark.parametrize("name", PLAIN)
def test_each_type(plain: Path, name: str) -> None:
    found = tensors(plain / f"small.{name}.gguf")
    assert {name: tensor.type for name, tensor in found.items()} == types(name)
    assert_holds(found, VALUES)
    told = metadata(plain / f"small.{name}.gguf")
    assert told["general.file_type"] == FILE_TYPES[name] == gguf.LlamaFileType[_their_name(name)]
    assert not any(key.startswith("quantize.") for key in told)


def _their_name(name: str) -> str:
    if name == "F32":
        return "ALL_F32"
    return f"MOSTLY_{name}"


@pytest.mark.parametrize("name", WEIGHED)
def test_each_type_with_an_importance_matrix(weighed: Path, name: str) -> None:
    """Each expert by its own sums over its own count; one that no token came to as if all columns were alike."""
    found = tensors(weighed / f"tiny.{name}.gguf")
    assert {name: tensor.type for name, tensor in found.items()} == types(name, TINY, imatrix=True)
    assert_holds(found, TINY_VALUES, quantizing.weights(*IMPORTANCE))
    told = metadata(weighed / f"tiny.{name}.gguf")
    assert {key: told[f"quantize.imatrix.{key}"] for key in ("file", "dataset", "entries_count", "chunks_count")} == {
        "file": "their.imatrix", "dataset": "their.txt", "entries_count": len(IMPORTANCE[0]), "chunks_count": 7
    }  # fmt: skip


def test_an_importance_matrix_changes_bytes() -> None:
    """So that the test above tells something, of dense tensors and of each expert that tokens came to."""
    means = quantizing.weights(*IMPORTANCE)
    for kind in ("Q4_K", "Q4_0", "Q2_K", "IQ4_XS", "Q6_K", "Q3_K"):
        dense, experts = TINY_VALUES["blk.0.attn_q.weight"], TINY_VALUES["blk.0.ffn_up_exps.weight"]
        assert encoded(dense, kind) != encoded(dense, kind, means["blk.0.attn_q.weight"])
        one = means["blk.0.ffn_up_exps.weight"]
        assert encoded(experts, kind, one) not in (encoded(experts, kind), encoded(experts, kind, one[::-1]))


def test_types_of_which_libgguf_makes_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for the right ones, with each expert's importances; what it answers is another test's matter."""
    sums, counts = IMPORTANCE
    asked: dict[int, set[bytes | None]] = {}

    def answer(number: int, rows: np.ndarray, count: int, columns: int, importance: np.ndarray | None) -> bytes:
        assert rows.shape == (count, columns) and rows.dtype == np.float32
        asked.setdefault(number, set()).add(None if importance is None else importance.tobytes())
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)]
        return bytes([number]) * (count * columns // block * size)

    folder = make.write_a(tmp_path / "tiny", TINY)
    file = quantizing.write_imatrix(tmp_path / "x.imatrix", sums, counts)
    monkeypatch.setattr("libgguf.quantize_rows_raw", answer)
    quantize(folder, tmp_path / "out", *SLOW, imatrix=file)
    for name in SLOW:
        for tensor in tensors(tmp_path / "out" / f"tiny.{name}.gguf").values():
            if tensor.type.startswith("IQ") and not tensor.type.startswith("IQ4"):
                assert {*tensor.data} == {gguf.GGMLQuantizationType[tensor.type]}
    means = quantizing.weights(sums, counts)["blk.0.ffn_up_exps.weight"]
    assert asked[gguf.GGMLQuantizationType.IQ1_S] >= {row.tobytes() for row in means}
    foreign = {number for number in asked if gguf.GGMLQuantizationType(number).name[:3] in ("IQ1", "IQ2", "IQ3")}
    assert len(foreign) == 7 and all(None not in asked[number] for number in foreign)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "BF16", "F16", "MXFP4"])
def test_the_oracle_is_ggufs_own_encoder(name: str) -> None:
    """Where the gguf package has one: two programs that others wrote agree."""
    values = VALUES["blk.0.attn_q.weight"]
    theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name])
    assert theirs.tobytes() == quantizing.encoded(values, name)


def test_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command, from the torrent's layout, with its tokenizer."""
    arguments = ["--type", "Q4_K_M", "--type", "BF16", "--json", "--quiet"]
    with pytest.raises(SystemExit) as caught:
        main(["quantize", str(NANO), str(tmp_path), "--method", "gguf", *arguments])
    assert caught.value.code == 0
    document = json.loads(capsys.readouterr().out)
    assert [file["file"] for file in document["files"]] == ["nano-mixtral.Q4_K_M.gguf", "nano-mixtral.BF16.gguf"]
    values = expected(make.hf(nano(), make.NANO), make.NANO)
    for file in document["files"]:
        path = tmp_path / file["file"]
        assert path.stat().st_size == file["bytes"]
        assert_holds(tensors(path), values)
        assert metadata(path)["tokenizer.ggml.model"] == "llama"
        assert len(metadata(path)["tokenizer.ggml.tokens"]) == 2048


def test_nano_as_llama_quantize_made_it(tmp_path: Path) -> None:
    """Names, types, shapes and bytes of all tensors, by the whole program and not by its encoders alone."""
    golden = json.loads((DATA.parent / "golden" / "quantized-nano.json").read_text())
    quantize(NANO, tmp_path, *golden)
    for name, wanted in golden.items():
        digest = hashlib.sha256()
        for key, tensor in sorted(tensors(tmp_path / f"nano-mixtral.{name}.gguf").items()):
            digest.update(f"{key} {tensor.type} {list(tensor.shape)}\n".encode() + tensor.data)
        assert digest.hexdigest() == wanted, name


@pytest.mark.parametrize("letter", ["A", "A'", "B", "C", "D", "E", "F"])
def test_every_layout_gives_the_same_file(tmp_path: Path, plain: Path, letter: str) -> None:
    """Whole files: q's and k's rows, transposed and fused experts and all."""
    made = sources(SMALL, MODEL)[letter](tmp_path / "source")
    quantize(made, tmp_path / "out", "Q5_K_M", "F16", name="small")
    for name in ("Q5_K_M", "F16"):
        file = f"small.{name}.gguf"
        assert (tmp_path / "out" / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.parametrize("how", [{"jobs": 1}, {"jobs": 3}, {"max_memory": "500MB", "jobs": 5}])
def test_one_at_a_time_on_any_number_of_threads(tmp_path: Path, source: Path, plain: Path, how: dict[str, Any]) -> None:
    for name in ("Q4_K_M", "Q3_K_S", "BF16", "MXFP4_MOE"):
        quantize(source, tmp_path, name, **how)
        file = f"small.{name}.gguf"
        assert (tmp_path / file).read_bytes() == (plain / file).read_bytes()


@pytest.mark.parametrize("chunk", [100, 1000, 5000])
def test_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Tensors larger than what is read and written at once: less than a row, some rows, rows across experts."""
    model = make.torrent(ODD)
    makers = [sources(ODD, model)[letter] for letter in ("A", "B", "D")]
    folders = [maker(tmp_path / str(number)) for number, maker in enumerate(makers)]
    whole = tmp_path / "whole"
    quantize(folders[0], whole, "Q8_0", "Q4_0", "BF16", name="x")
    assert_holds(tensors(whole / "x.Q8_0.gguf"), expected(make.hf(model, ODD), ODD))
    names = [name for name, module in sys.modules.items() if name.startswith("mixtools") and hasattr(module, "CHUNK")]
    assert {"mixtools.storage.store", "mixtools.methods.quantize.run", "mixtools.storage.output"} <= {*names}
    for name in names:
        monkeypatch.setattr(sys.modules[name], "CHUNK", chunk)
    for number, folder in enumerate(folders):
        quantize(folder, tmp_path / f"out{number}", "Q8_0", "Q4_0", "BF16", name="x")
        for name in ("Q8_0", "Q4_0", "BF16"):
            file = f"x.{name}.gguf"
            assert (tmp_path / f"out{number}" / file).read_bytes() == (whole / file).read_bytes()


def test_each_file_is_padded_and_aligned(plain: Path) -> None:
    for name in ("Q4_K_M", "F16", "IQ4_NL"):
        path = plain / f"small.{name}.gguf"
        end = 0
        for tensor in gguf.GGUFReader(path).tensors:
            assert tensor.data_offset % 32 == 0
            assert end == 0 or end <= tensor.data_offset < end + 32
            end = tensor.data_offset + tensor.n_bytes
        assert path.stat().st_size == -(-end // 32) * 32


# --- overrides, splits, ties ---


def test_overrides(tmp_path: Path, source: Path) -> None:
    quantize(
        source, tmp_path, "Q4_K_M", "Q8_0", tensor_type=[r"blk\.0\.ffn_down=Q6_K", "attn_(q|k)=F16", "attn=Q5_0"],
        output_tensor_type="Q5_K", token_embedding_type="bf16",
    )  # fmt: skip
    for name in ("Q4_K_M", "Q8_0"):
        found = tensors(tmp_path / f"small.{name}.gguf")
        assert_holds(found, VALUES)
        usual = types(name)
        for key, tensor in found.items():
            role = key.split(".")[-2]
            wanted = {"attn_q": "F16", "attn_k": "F16", "attn_v": "Q5_0", "attn_output": "Q5_0", "output": "Q5_K",
                      "token_embd": "BF16"}.get(role, usual[key])  # fmt: skip
            assert tensor.type == ("Q6_K" if key == "blk.0.ffn_down_exps.weight" else wanted), key


def test_pure(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path, "Q4_K_M", pure=True)
    found = tensors(tmp_path / "small.Q4_K_M.gguf")
    assert {tensor.type for key, tensor in found.items() if "norm" not in key and "gate_inp" not in key} == {"Q4_K"}
    assert_holds(found, VALUES)


def test_rules_of_december_2023(tmp_path: Path, source: Path) -> None:
    quantize(source, tmp_path, "Q3_K_M", rules="2023-12")
    found = tensors(tmp_path / "small.Q3_K_M.gguf")
    assert {found[f"blk.{layer}.ffn_down_exps.weight"].type for layer in range(2)} == {"Q3_K"}
    assert found["blk.0.attn_output.weight"].type == "Q4_K"
    assert_holds(found, VALUES)


def test_split(tmp_path: Path, source: Path, plain: Path) -> None:
    done = quantize(source, tmp_path, "Q4_K_M", "Q8_0", max_shard_size=200_000, name="small")
    for row in done.document["files"]:
        name, count = row["type"], row["parts"]
        parts = [tmp_path / f"small.{name}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
        assert count > 2 and row["file"] == parts[0].name
        assert row["bytes"] == sum(part.stat().st_size for part in parts)
        assert tensors(*parts) == tensors(plain / f"small.{name}.gguf")
        assert [metadata(part)["split.no"] for part in parts] == [*range(count)]
        assert {metadata(part)["split.count"] for part in parts} == {count}
        assert {metadata(part)["split.tensors.count"] for part in parts} == {len(VALUES)}
        whole = metadata(plain / f"small.{name}.gguf")
        assert {key: value for key, value in metadata(parts[0]).items() if not key.startswith("split.")} == whole
        reader, other = open_checkpoint(parts[0]), open_checkpoint(plain / f"small.{name}.gguf")
        assert all(np.array_equal(reader.bits(slot), other.bits(slot)) for slot in reader.slots())
    assert len([*tmp_path.glob("*.gguf")]) == sum(row["parts"] for row in done.document["files"])


def test_tied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One tensor, of the head's type, made once."""
    canonical = make.hf(MODEL, SMALL)
    del canonical["lm_head.weight"]
    folder = make.write_hf(tmp_path / "tied", canonical, SMALL)
    make.write_json(folder / "config.json", {**SMALL.config(), "tie_word_embeddings": True})
    regions: list[tuple[Path, object]] = []
    wrote = Output.wrote
    monkeypatch.setattr(Output, "wrote", lambda self, *told: (regions.append((self.work, told[0])), wrote(self, *told)))
    quantize(folder, tmp_path / "out", "Q4_K_M", "F16")
    assert len({*regions}) == len(regions) == 2 * (len(make.hf(MODEL, SMALL)) - 1)
    found = tensors(tmp_path / "out" / "tied.Q4_K_M.gguf")
    assert "output.weight" not in found and found["token_embd.weight"].type == "Q6_K"
    assert_holds(found, {name: array for name, array in VALUES.items() if name != "output.weight"})
    assert tensors(tmp_path / "out" / "tied.F16.gguf")["token_embd.weight"].type == "F16"


def test_rows_that_fit_no_block(tmp_path: Path) -> None:
    """Said once, with the tensors, however many experts; and the bytes are those of the type taken instead."""
    dims = make.Dims(d=96, f=80, layers=2, heads=3, kv=1, hd=32, vocab=7, experts=5)
    model = make.torrent(dims, seed=1)
    folder = make.write_a(tmp_path / "odd", dims, model)
    done = quantize(folder, tmp_path / "out", "Q4_K_M", "IQ4_XS")
    found = tensors(tmp_path / "out" / "odd.Q4_K_M.gguf")
    assert_holds(found, expected(make.hf(model, dims), dims))
    assert_holds(tensors(tmp_path / "out" / "odd.IQ4_XS.gguf"), expected(make.hf(model, dims), dims))
    assert found["token_embd.weight"].type == "Q5_0" and found["blk.1.ffn_down_exps.weight"].type == "F16"
    assert found["output.weight"].type == "Q8_0"
    told = [note for note in done.notes if "no multiple" in note]
    assert len(told) == 2  # one a file
    count = len([name for name in found if "norm" not in name and "gate_inp" not in name and name != "output.weight"])
    assert told[0].startswith(f"{count} tensors have rows") and "token_embd.weight Q4_K -> Q5_0" in told[0]


# --- other dtypes of the source ---


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_sources_of_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """Encoded from the stored values, with no bf16 in between; casts round to nearest even."""
    dims = SMALL._replace(layers=1, experts=2)
    model = make.torrent(dims, seed=3, dtype=dtype)
    folder = make.write_c(tmp_path / "wide", dims, model)
    quantize(folder, tmp_path / "out", "Q4_K_S", "F16", "BF16", "F32")
    values = expected(make.hf(model, dims), dims)
    for name in ("Q4_K_S", "F16", "BF16", "F32"):
        assert_holds(tensors(tmp_path / "out" / f"wide.{name}.gguf"), values)


@pytest.mark.parametrize(("dtype", "target", "value"), [(torch.bfloat16, "F16", 1e5), (torch.float32, "BF16", 3.4e38)])
def test_values_that_a_type_cannot_hold(tmp_path: Path, dtype: torch.dtype, target: str, value: float) -> None:
    dims = make.Dims()
    model = make.torrent(dims, dtype=dtype)
    model["layers.1.feed_forward.experts.2.w3.weight"][3, 4] = value
    folder = make.write_c(tmp_path / "large", dims, model)
    name = {"F16": "float16", "BF16": "bfloat16"}[target]
    with pytest.raises(errors.TensorError, match=rf"does not fit {name}; use .*f32") as caught:
        quantize(folder, tmp_path / "out", target)
    assert "w3" in str(caught.value.tensor) and "1" in str(caught.value.tensor)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    quantize(folder, tmp_path / "wider", "F32")
