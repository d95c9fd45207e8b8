"""A Checkpoint's reading: views, mixed types, several threads, and what was left by an earlier run."""

from __future__ import annotations

import threading
import zlib
from pathlib import Path

import pytest
import torch
from layouts import make

from mixtools import errors
from mixtools.formats import Factored
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import Role, Slot
from mixtools.storage import manifest
from mixtools.storage.dtypes import DType
from mixtools.storage.source import Source
from mixtools.storage.torchzip import read_header

DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)


def test_views_of_one_storage(tmp_path: Path) -> None:
    """All tensors in one storage, as some tools save them; transposed and shared ones among them."""
    tensors = make.torrent(DIMS)
    tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
    views, at = {}, 3
    flat = torch.cat([torch.ones(3).bfloat16(), flat])
    for name, tensor in tensors.items():
        views[name] = flat[at : at + tensor.numel()].view(tensor.shape)
        at += tensor.numel()
    views["output.weight"] = views["tok_embeddings.weight"]
    checkpoint = open_checkpoint(make.write_a(tmp_path, DIMS, views))
    make.assert_same(make.read_all(checkpoint), make.hf(tensors, DIMS))
    checkpoint.finish()


@pytest.mark.parametrize("write", [make.write_a, make.write_b])
def test_transposed_and_strided(tmp_path: Path, write) -> None:
    tensors = make.torrent(DIMS)
    odd = {name: torch.stack([t, t], 1)[:, 0] if t.dim() == 1 else t for name, t in tensors.items()}
    odd = {name: t.T.contiguous().T if name.endswith("wq.weight") else t for name, t in odd.items()}
    wide = {name: torch.cat([t, t], 1)[:, : t.shape[1]] if "wo" in name else t for name, t in odd.items()}
    assert sum(not tensor.is_contiguous() for tensor in wide.values()) > 4
    checkpoint = open_checkpoint(write(tmp_path, DIMS, wide))
    make.assert_same(make.read_all(checkpoint), make.hf(tensors, DIMS))


def test_stacked_tensor_saved_transposed(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS)
    folder = make.write_b(tmp_path, DIMS, tensors, files=1)
    stored = {n: t.T.contiguous().T if t.dim() == 2 else t for n, t in make.stacked(tensors, DIMS).items()}
    torch.save(stored, folder / "consolidated.00.pt")
    make.assert_same(make.read_all(open_checkpoint(folder)), make.hf(tensors, DIMS))


def test_expanded_norms(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS)
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.ones(1).bfloat16().expand(DIMS.d)
    make.assert_same(make.read_all(open_checkpoint(make.write_a(tmp_path, DIMS, tensors))), make.hf(tensors, DIMS))


def test_many_threads(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS)
    checkpoint = open_checkpoint(make.write_b(tmp_path, DIMS, tensors))
    found: list[make.Tensors] = []
    threads = [threading.Thread(target=lambda: found.append(make.read_all(checkpoint))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    for each in found:
        make.assert_same(each, make.hf(tensors, DIMS))
    checkpoint.finish()


def test_owner_may_write(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make.write_a(tmp_path, DIMS))
    for slot in checkpoint.slots():
        first = checkpoint.read(slot)
        before = first.clone()
        first.zero_()
        assert torch.equal(checkpoint.read(slot), before)


def test_spec_and_bytes(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS)
    tensors["norm.weight"] = tensors["norm.weight"].float()
    checkpoint = open_checkpoint(make.write_a(tmp_path, DIMS, tensors))
    for slot in checkpoint.slots():
        shape, dtype = checkpoint.spec(slot)
        tensor = checkpoint.read(slot)
        assert (shape, dtype.torch()) == (tuple(tensor.shape), tensor.dtype)
    counts = {dtype.torch(): count for dtype, count in checkpoint.bytes_by_dtype().items()}
    assert counts == {
        dtype: sum(t.nbytes for t in tensors.values() if t.dtype is dtype) for dtype in (torch.float, torch.bfloat16)
    }


def damage(path: Path, tensor: str) -> None:
    entry = next(entry for entry in read_header(Source(path)) if entry.name == tensor)
    raw = bytearray(path.read_bytes())
    raw[entry.offset] ^= 1
    path.write_bytes(raw)


def test_finish_judges_what_an_earlier_run_read_in_part(tmp_path: Path) -> None:
    folder = make.write_b(tmp_path, DIMS, files=1)
    damage(folder / "consolidated.00.pt", "layers.0.block_sparse_moe.w1")
    checkpoint = open_checkpoint(folder)
    checkpoint.finish()
    checkpoint.finish(earlier=[Slot(Role.Q, 0), Slot(Role.GATE, 1, 0)])
    for expert in range(DIMS.experts):
        with pytest.raises(errors.ChecksumError) as caught:
            checkpoint.finish(earlier=[Slot(Role.GATE, 0, expert)])
        assert caught.value.tensor == "layers.0.block_sparse_moe.w1"


def test_finish_trusts_what_an_earlier_run_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(make.write_a(tmp_path, DIMS))
    monkeypatch.setattr(Source, "read_into", None)
    checkpoint.finish(earlier=checkpoint.slots())


@pytest.mark.parametrize("suffix", ["", "_a"], ids=["", "of old"])
def test_finish_after_factors(tmp_path: Path, suffix: str) -> None:
    """A matrix that is stored as two factors; in outputs of old it has no tensor of its own name."""
    tensors = make.hf(make.torrent(DIMS), DIMS)
    name = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    a, b = torch.randn(8, 3).bfloat16(), torch.randn(3, 12).bfloat16()
    del tensors[name]
    factors = {f"{name}{suffix}": a, f"{name}_b": b}
    folder = make.write_hf(tmp_path, tensors | factors, DIMS, files=1)
    crcs = {name: zlib.crc32(make.bits(tensor)) for name, tensor in factors.items()}
    path = folder / "model-00001-of-00001.safetensors"
    (folder / manifest.NAME).write_bytes(
        manifest.encode({}, {path.name: manifest.File(path.stat().st_size, None)}, crcs)
    )
    checkpoint = open_checkpoint(folder)
    slot = Slot(Role.DOWN, 0, 1)
    assert checkpoint.format(slot) == Factored(DType.BF16, 3, f"weight{suffix}")
    assert [entry.name for entry in checkpoint.parts(slot)] == list(factors)
    assert torch.equal(checkpoint.read(slot), (a.float() @ b.float()).bfloat16())
    checkpoint.finish(earlier=[slot])
