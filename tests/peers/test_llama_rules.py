"""Which type where: our mixtures against the choices of llama.cpp's quantizer, whose dry run needs no weights.

Every rule that depends on a shape is met: 32 layers and few, 8 experts and other numbers, one head for keys and many,
rows that fit no block, a tied head, an imatrix or none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import make
from peers import llama

from mixtools.config import MixtralConfig, from_document
from mixtools.layouts.gguf import GGUF
from mixtools.layouts.gguf_config import FILE_TYPES, architecture
from mixtools.methods.quantize.mixtures import MATRICES, Mixture, choose, needs_imatrix
from mixtools.names import Role
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import encode_header
from mixtools.storage.gguf_values import string

pytestmark = pytest.mark.peers("llama")

BASE = make.Dims(d=256, f=256, layers=32, heads=4, kv=2, hd=64, vocab=512, experts=8)
SHAPES = {
    "8x7B": BASE,
    "one key head": BASE._replace(heads=8, kv=1, hd=32),
    "4 experts": BASE._replace(experts=4),
    "4 experts, one key head": BASE._replace(experts=4, kv=1),
    "16 experts": BASE._replace(experts=16),
    "2 experts": BASE._replace(experts=2, f=512),
    "3 experts, one key head": BASE._replace(experts=3, kv=1),
    "2 layers": BASE._replace(layers=2),
    "15 layers": BASE._replace(layers=15),
    "56 layers": BASE._replace(layers=56, d=768, heads=6, kv=1, hd=128),
    "80 layers": BASE._replace(layers=80, experts=4),
    "80 layers, as many key heads": BASE._replace(layers=80, experts=4, kv=4),
    "wide rows that fit 32": BASE._replace(layers=8, d=288, hd=72),
    "expert's rows that fit 32": BASE._replace(layers=8, f=352),
    "rows that fit nothing": BASE._replace(layers=8, d=40, f=72, hd=10),
}
OVERRIDES: dict[str, dict[str, Any]] = {
    "pure": {"pure": True},
    "output": {"output": DType.Q8_0},
    "embedding": {"embedding": DType.BF16},
    "both, pure": {"output": DType.F16, "embedding": DType.Q8_0, "pure": True},
    "tensors": {
        "tensor_types": (("ffn_(gate|up)", DType.Q4_K), ("exps", DType.Q2_K), ("token_embd|out", DType.IQ4_NL))
    },
    "first match": {"tensor_types": ((r"blk\.[0-3]\.attn_v", DType.F32), ("attn_v", DType.F16)), "output": DType.Q5_1},
    "of low bits": {"tensor_types": (("attn_q", DType.IQ2_XS), ("ffn_up", DType.IQ1_S))},
}


def write_empty(file: Path, config: MixtralConfig, tied: bool) -> Path:
    """A BF16 file whose weights take no room on the disk."""
    layout = GGUF.sharing(Role.HEAD, Role.EMBED) if tied else GGUF
    shapes: dict[str, tuple[str, DType, tuple[int, ...]]] = {}
    for slot in config.slots():
        piece = layout.piece(slot, config)
        shapes[piece.name] = piece.name, DType.BF16 if slot.role in MATRICES else DType.F32, piece.shape
    metadata = {"general.architecture": string("llama"), **architecture(config, file)}
    head, offsets = encode_header(metadata, list(shapes.values()))
    _, dtype, shape = list(shapes.values())[-1]
    with file.open("wb") as stream:
        stream.write(head)
        stream.truncate(offsets[-1] + dtype.nbytes(shape))
    return file


def ours(config: MixtralConfig, tied: bool, imatrix: bool, mixture: Mixture) -> dict[str, str]:
    """As llama.planned tells it."""
    layout = GGUF.sharing(Role.HEAD, Role.EMBED) if tied else GGUF
    choices = choose(mixture, config, tied=tied, imatrix=imatrix)
    found: dict[str, str] = {}
    for slot, choice in choices.items():
        found.setdefault(layout.piece(slot, config).name, choice.type.value)
    asks = not imatrix and any(needs_imatrix(mixture, choices))
    return found | ({"": "imatrix"} if asks else {})


@pytest.mark.parametrize("imatrix", [False, True], ids=["plain", "imatrix"])
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_file_type_mixes_as_llama_cpp_does(shape: str, tied: bool, imatrix: bool, tmp_path: Path) -> None:
    config = from_document(SHAPES[shape].config(), "config.json")
    file = write_empty(tmp_path / "empty.gguf", config, tied)
    weights = {"blk.0.attn_q.weight": np.ones(config.hidden_size)} if imatrix else None
    for type in FILE_TYPES:
        theirs = llama.planned(file, type, weights)
        assert len(theirs.keys() - {""}) == 10 * config.num_layers + (2 if tied else 3)
        assert ours(config, tied, imatrix, Mixture(type)) == theirs, type


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("shape", ["2 layers", "4 experts", "wide rows that fit 32"])
@pytest.mark.parametrize("override", OVERRIDES)
def test_overrides_win_in_the_same_order(override: str, shape: str, tied: bool, tmp_path: Path) -> None:
    config = from_document(SHAPES[shape].config(), "config.json")
    file = write_empty(tmp_path / "empty.gguf", config, tied)
    how = OVERRIDES[override]
    for type in FILE_TYPES:
        if type in ("F32", "F16", "BF16") and "tensor_types" in how:
            continue  # where llama-quantize passes them over without a word
        assert ours(config, tied, False, Mixture(type, **how)) == llama.planned(file, type, **how), type
