"""Layouts A, A', B and C, written by torch.save and safetensors, against tensors permuted by the format's formula."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layouts import make

from mixtools.layouts.detect import open_checkpoint

DATA = Path(__file__).parents[1] / "data" / "nano-mixtral"
SHAPES = {"odd": make.Dims(), "plain": make.Dims(d=8, f=12, heads=4, kv=2, hd=4), "one": make.Dims(experts=2, layers=1)}


@pytest.mark.parametrize("dims", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("write", [make.write_a, make.write_split, make.write_b, make.write_c])
def test_reads_canonical(tmp_path: Path, write, dtype: torch.dtype, dims: make.Dims) -> None:
    tensors = make.torrent(dims, seed=1, dtype=dtype)
    checkpoint = open_checkpoint(write(tmp_path, dims, tensors))
    make.assert_same(make.read_all(checkpoint), make.hf(tensors, dims))
    checkpoint.finish()


def nano() -> make.Tensors:
    return torch.load(DATA / "consolidated.00.pth", weights_only=True)


def test_nano_split_in_11(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make.write_split(tmp_path, make.NANO, nano(), parts=11))
    assert checkpoint.layout.letter == "A'"
    make.assert_same(make.read_all(checkpoint), make.hf(nano(), make.NANO))


@pytest.mark.parametrize(("files", "turn"), [(8, 0), (8, 5), (1, 0), (2, 1)])
def test_nano_stacked_however_dealt(tmp_path: Path, files: int, turn: int) -> None:
    """A wrong reading of w2 passes every shape check; only the tensors it was made from tell."""
    checkpoint = open_checkpoint(make.write_b(tmp_path, make.NANO, nano(), files, turn))
    assert checkpoint.layout.letter == "B"
    make.assert_same(make.read_all(checkpoint), make.hf(nano(), make.NANO))


def test_nano_itself() -> None:
    checkpoint = open_checkpoint(DATA)
    assert checkpoint.layout.letter == "A"
    assert checkpoint.config.rope_theta == 1e6
    make.assert_same(make.read_all(checkpoint), make.hf(nano(), make.NANO))


def test_blocks_of_any_size_are_the_tensor(tmp_path: Path) -> None:
    dims = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)
    checkpoint = open_checkpoint(make.write_b(tmp_path, dims))
    for slot in checkpoint.slots():
        whole = checkpoint.bits(slot)
        for max_bytes in (1, 40, 1 << 20):
            for granule in (1, 3, 0):
                blocks = [block.copy() for block in checkpoint.blocks(slot, max_bytes, granule)]
                assert b"".join(block.tobytes() for block in blocks) == whole.tobytes()
                assert granule or len(blocks) == 1
                assert all(len(block) % granule == 0 for block in blocks[:-1] if granule)
