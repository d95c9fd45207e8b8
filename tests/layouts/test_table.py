"""Shape operations against the formulas of the format's description, in torch; and where each slot lies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layouts import make

from mixtools.config import from_document
from mixtools.layouts.hf import HF, HF_BIN, HF_FUSED
from mixtools.layouts.table import Op, from_canonical, to_canonical
from mixtools.layouts.torrent import CONSOLIDATED, SPLIT, STACKED, TORRENT
from mixtools.names import Role, Slot

LAYOUTS = (TORRENT, SPLIT, STACKED, CONSOLIDATED, HF, HF_BIN, HF_FUSED)
CONFIG = from_document(make.ODD.params(), "params.json")


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 6), st.sampled_from([torch.int8, torch.int16, torch.int32]))
def test_rotary(heads: int, pairs: int, columns: int, dtype: torch.dtype) -> None:
    hd = 2 * pairs
    stored = torch.arange(heads * hd * columns).to(dtype).reshape(heads * hd, columns)
    canonical = stored.view(heads, hd // 2, 2, columns).transpose(1, 2).reshape(heads * hd, columns)
    bits = stored.numpy().view(f"u{dtype.itemsize}")
    found = to_canonical(Op.ROTARY, bits, hd)
    assert found.tobytes() == canonical.numpy().tobytes()
    assert from_canonical(Op.ROTARY, found, hd).tobytes() == stored.numpy().tobytes()


@given(st.integers(1, 9), st.integers(1, 9))
def test_transpose(rows: int, columns: int) -> None:
    stored = torch.arange(rows * columns).short().reshape(rows, columns)
    found = to_canonical(Op.TRANSPOSE, stored.numpy().view("u2"), 2)
    assert found.shape == (columns, rows)
    assert found.tobytes() == stored.T.contiguous().numpy().tobytes()
    assert from_canonical(Op.TRANSPOSE, found, 2).tobytes() == stored.numpy().tobytes()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_slots_cover_every_stored_row_once(layout) -> None:
    rows: dict[str, list[range]] = {}
    shapes = {}
    for slot in CONFIG.slots():
        piece = layout.piece(slot, CONFIG)
        rows.setdefault(piece.name, []).append(range(piece.start, piece.stop))
        assert shapes.setdefault(piece.name, piece.shape) == piece.shape
    for name, shape in shapes.items():
        total = torch.Size(shape[:-1]).numel()
        assert sorted(row for span in rows[name] for row in span) == list(range(total)), name
    tensors = make.torrent(make.ODD)
    canonical = make.hf(tensors, make.ODD)
    made = {"B": make.stacked(tensors, make.ODD), "F": make.fused(canonical, make.ODD)}
    made |= dict.fromkeys(("A", "A'", "C"), tensors) | dict.fromkeys(("D", "E"), canonical)
    assert shapes == {name: tuple(tensor.shape) for name, tensor in made[layout.letter].items()}


def test_letters_are_all_different() -> None:
    assert sorted(layout.letter for layout in LAYOUTS) == ["A", "A'", "B", "C", "D", "E", "F"]
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


def test_granules() -> None:
    assert TORRENT.granule(Slot(Role.Q, 0), CONFIG) == CONFIG.head_dim
    assert TORRENT.granule(Slot(Role.V, 0), CONFIG) == 1
    assert STACKED.granule(Slot(Role.DOWN, 0, 0), CONFIG) == 0
    assert HF.granule(Slot(Role.Q, 0), CONFIG) == 1
