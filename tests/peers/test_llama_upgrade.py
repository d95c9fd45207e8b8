"""Files as the programs of December 2023 wrote them, a tensor an expert: llama.cpp refuses them, and loads what
`convert gguf-upgrade` makes of them.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peers import llama

import mixtools
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import encode_header, padded, read_header
from mixtools.storage.source import Source
from mixtools.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers("llama")

DATA = Path(__file__).parents[1] / "data"
TYPES = ("F16", "Q8_0", "Q4_0", "Q2_K", "Q4_K_M", "Q5_K_M", "Q6_K")


def write_old(today: Path, out: Path) -> Path:
    """The same blocks in tensors of their own, blk.0.ffn_gate.7.weight; the router in F16."""
    source = Source(today)
    header = read_header(source)
    source.close()
    parts: list[tuple[str, DType, tuple[int, ...], bytes]] = []
    stored = {one.name: one.data for one in gguf.GGUFReader(today).tensors}
    for name, dtype, shape in ((entry.name, entry.dtype, entry.shape) for entry in header.entries):
        if name.endswith("_exps.weight"):
            stem = name.removesuffix("_exps.weight")
            parts += [(f"{stem}.{i}.weight", dtype, shape[1:], stored[name][i].tobytes()) for i in range(shape[0])]
        elif "ffn_gate_inp" in name:
            half = stored[name].astype(np.float16)
            assert (half.astype(np.float32) == stored[name]).all()
            parts.append((name, DType.F16, shape, half.tobytes()))
        else:
            parts.append((name, dtype, shape, stored[name].tobytes()))
    head, offsets = encode_header(header.metadata, [part[:3] for part in parts])
    raw = bytearray(head)
    for (_, _, _, data), offset in zip(parts, offsets, strict=True):
        assert len(raw) == offset
        raw += data + bytes(padded(len(data), header.alignment) - len(data))
    out.write_bytes(raw)
    return out


@pytest.mark.parametrize("type", TYPES)
def test_an_old_file_loads_after_its_upgrade(type: str, tmp_path: Path) -> None:
    ids = Tokenizer.from_folder(DATA / "nano-mixtral").encode((DATA / "text.txt").read_text("utf-8"))[:256]
    mixtools.quantize(DATA / "nano-mixtral", tmp_path / "today.gguf", type=[type])
    old = write_old(tmp_path / "today.gguf", tmp_path / "old.gguf")
    assert len(llama.tensors(old)) == 3 + 2 * (7 + 3 * 8)
    with pytest.raises(llama.RefusedError, match="ffn_.*_exps"):
        llama.logits(old, [ids])
    mixtools.convert(old, tmp_path / "new.gguf", to="gguf")
    assert llama.tensors(tmp_path / "new.gguf") == llama.tensors(tmp_path / "today.gguf")
    assert torch.equal(llama.logits(tmp_path / "new.gguf", [ids]), llama.logits(tmp_path / "today.gguf", [ids]))
