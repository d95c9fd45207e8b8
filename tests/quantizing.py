"""What the tests of GGUF files share: small models, and what a GGUF of one must hold by other people's programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import libgguf
import numpy as np
import pytest
import torch
from layouts import make

import mixtools
from mixtools.cli.main import main
from mixtools.methods.quantize.results import Quantized

Arrays = dict[str, np.ndarray]
SMALL = make.Dims(d=256, f=256, layers=2, heads=4, kv=1, hd=64, vocab=9, experts=2)  # rows fit blocks of 256
TINY = SMALL._replace(f=64, layers=1, vocab=3)  # but for ffn_down; for encoders that take long
ODD = make.Dims(d=64, f=96, layers=2, heads=4, kv=2, hd=16, vocab=11, experts=3)  # rows fit blocks of 32
LEAST = make.Dims(d=32, f=64, layers=1, heads=2, kv=1, hd=16, vocab=5, experts=2)
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
EXPERTS = {"w1": "gate", "w2": "down", "w3": "up"}


class Tensor(NamedTuple):
    """As the gguf package reads it."""

    type: str
    shape: tuple[int, ...]
    data: bytes


def quantize(source: Path, out: Path, *types: str, **options: Any) -> Quantized:
    done = mixtools.quantize(source, out, type=[*types], **options)
    assert isinstance(done, Quantized)
    return done


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and document of `mixtools quantize`."""
    with pytest.raises(SystemExit) as caught:
        main(["quantize", *map(str, arguments), "--json", "--quiet"])
    return int(caught.value.code or 0), json.loads(capsys.readouterr().out)


def names(folder: Path) -> list[str]:
    """Files and unfinished work, but for the manifest."""
    return sorted(path.name for path in folder.iterdir() if path.name != "mixtools.json")


def read(folder: Path) -> dict[str, bytes]:
    """Files by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face's rows of q or k as llama.cpp's converter lays them: rotary pairs side by side."""
    pairs = weight.reshape(heads, 2, len(weight) // heads // 2, *weight.shape[1:]).swapaxes(1, 2)
    return pairs.reshape(weight.shape)


def expected(hf: Mapping[str, torch.Tensor], dims: make.Dims) -> Arrays:
    """By GGUF's names the values of a model, from those under Hugging Face's names."""
    weights = {name: tensor.float().numpy() for name, tensor in hf.items()}
    found = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
    }
    if "lm_head.weight" in weights:
        found["output.weight"] = weights["lm_head.weight"]
    for layer in range(dims.layers):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        attention, experts = theirs + "self_attn.", theirs + "block_sparse_moe.experts."
        found |= {
            ours + "attn_norm.weight": weights[theirs + "input_layernorm.weight"],
            ours + "ffn_norm.weight": weights[theirs + "post_attention_layernorm.weight"],
            ours + "attn_q.weight": rotated(weights[attention + "q_proj.weight"], dims.heads),
            ours + "attn_k.weight": rotated(weights[attention + "k_proj.weight"], dims.kv),
            ours + "attn_v.weight": weights[attention + "v_proj.weight"],
            ours + "attn_output.weight": weights[attention + "o_proj.weight"],
            ours + "ffn_gate_inp.weight": weights[theirs + "block_sparse_moe.gate.weight"],
        }
        for word, name in EXPERTS.items():
            parts = [weights[f"{experts}{number}.{word}.weight"] for number in range(dims.experts)]
            found[f"{ours}ffn_{name}_exps.weight"] = np.stack(parts)
    return found


def encoded(values: np.ndarray, kind: str, importance: np.ndarray | None = None) -> bytes:
    """Stored bytes of a tensor, ggml's by libgguf; `importance` [columns], or [experts, columns] of stacked ones."""
    if kind in DENSE:
        cast = torch.from_numpy(values.copy()).to(DENSE[kind])
        return cast.reshape(-1).view(torch.uint8).numpy().tobytes()
    number = int(gguf.GGMLQuantizationType[kind])
    parts = values if values.ndim == 3 else np.atleast_2d(values)[None]
    weights = [None] * len(parts) if importance is None else importance.reshape(-1, values.shape[-1])
    return b"".join(
        libgguf.quantize_rows_raw(number, np.ascontiguousarray(part), *part.shape, weight)
        for part, weight in zip(parts, weights, strict=True)
    )


def tensors(*files: Path) -> dict[str, Tensor]:
    """Of a file, or all parts of one."""
    found = {}
    for file in files:
        for tensor in gguf.GGUFReader(file).tensors:
            assert tensor.name not in found
            shape = tuple(int(size) for size in tensor.shape[::-1])
            found[tensor.name] = Tensor(tensor.tensor_type.name, shape, tensor.data.tobytes())
    return found


def metadata(file: Path) -> dict[str, Any]:
    """Of a file by the gguf package, without what that adds of its own."""
    fields = gguf.GGUFReader(file).fields
    return {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}


def kinds(file: Path) -> dict[str, str]:
    return {name: " ".join(kind.name for kind in field.types) for name, field in gguf.GGUFReader(file).fields.items()}


def assert_holds(
    found: Mapping[str, Tensor], values: Arrays, importance: Mapping[str, np.ndarray] | None = None
) -> None:
    """Every tensor, with the bytes that ggml makes of its values in the type that it has."""
    assert found.keys() == values.keys()
    for name, array in values.items():
        kind, shape, data = found[name]
        assert shape == array.shape, name
        assert data == encoded(array, kind, (importance or {}).get(name)), f"{name} as {kind}"


def write_imatrix(file: Path, sums: Mapping[str, np.ndarray], counts: Mapping[str, np.ndarray]) -> Path:
    """An importance matrix by the gguf package; sums [experts or 1, columns], counts [experts or 1]."""
    writer = gguf.GGUFWriter(file, "x")
    del writer.kv_data[0]["general.architecture"]  # which llama-imatrix does not write
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["their.txt", "other.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in sums:
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(sums[name], np.float32))
        writer.add_tensor(f"{name}.counts", np.ascontiguousarray(counts[name].reshape(-1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def importance(values: Arrays, seed: int = 0) -> tuple[Arrays, Arrays]:
    """Sums and counts for every matrix of a model; of each stack the last expert was sent no token."""
    rng = np.random.default_rng(seed)
    sums, counts = {}, {}
    for name, array in values.items():
        if array.ndim < 2 or "gate_inp" in name:
            continue
        rows = len(array) if array.ndim == 3 else 1
        counts[name] = rng.integers(1, 99, rows).astype(np.float32)
        if rows > 1:
            counts[name][-1] = 0
        sums[name] = rng.random((rows, array.shape[-1]), np.float32) ** 4 * (counts[name] > 0)[:, None]
    return sums, counts


def weights(sums: Arrays, counts: Arrays) -> Arrays:
    """What an encoder is given of them: means, and ones where there was no token."""
    return {
        name: np.where(counts[name][:, None] > 0, sums[name] / np.maximum(counts[name], 1)[:, None], 1).astype("f4")
        for name in sums
    }
