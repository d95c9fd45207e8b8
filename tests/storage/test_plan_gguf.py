"""Plans of GGUF files against gguf's own writer, which splits as llama-gguf-split does."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage import ggufs

from mixtools import errors
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import read_header
from mixtools.storage.gguf_values import Kind, Value, array, string, uint32
from mixtools.storage.plan import Shape
from mixtools.storage.plan_gguf import gguf_files
from mixtools.storage.source import Source

METADATA = {"general.architecture": string("llama"), "tokens": array(Kind.STRING, ["a", "b"])}
FOUR: list[Shape] = [(f"t{i}", DType.F32, (3, size)) for i, size in enumerate((7, 1, 9, 2))]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 1000))
def test_parts_equal_ggufs(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    tensors: list[Shape] = [(f"t{i}", DType.F16, (2, size)) for i, size in enumerate(sizes)]
    theirs = ggufs.written_by_gguf(tmp_path_factory.mktemp("parts"), "x", METADATA, tensors, split=limit)
    plan = gguf_files("x", METADATA, tensors, limit)
    assert ggufs.written(plan) == theirs
    assert list(plan.tensors) == [name for name, _, _ in tensors]
    assert plan.total_bytes == sum(map(len, theirs.values()))
    assert plan.index == {}


def test_parts_tell_what_they_are(tmp_path: Path) -> None:
    files = ggufs.written(gguf_files("x", METADATA, FOUR, 100))
    assert list(files) == ["x-00001-of-00003.gguf", "x-00002-of-00003.gguf", "x-00003-of-00003.gguf"]
    for number, (name, raw) in enumerate(files.items()):
        (tmp_path / name).write_bytes(raw)
        header = read_header(Source(tmp_path / name))
        split = {
            "split.no": Value(Kind.UINT16, number),
            "split.count": Value(Kind.UINT16, 3),
            "split.tensors.count": Value(Kind.INT32, 4),
        }
        assert header.metadata == ({**METADATA, **split} if number == 0 else split)
    read = [tensor.name for name in files for tensor in gguf.GGUFReader(tmp_path / name).tensors]
    assert read == ["t0", "t1", "t2", "t3"]


def test_one_file() -> None:
    """With and without a limit that it keeps."""
    alone, limited = gguf_files("x", METADATA, FOUR), gguf_files("x", METADATA, FOUR, 228)
    assert alone == limited
    assert [file.name for file in alone.files] == ["x.gguf"]
    assert [file.name for file in gguf_files("x", METADATA, FOUR, 227).files] == [
        "x-00001-of-00002.gguf",
        "x-00002-of-00002.gguf",
    ]


@pytest.mark.parametrize("values", range(1, 20))
def test_ends_are_padded(values: int) -> None:
    """The last too: llama.cpp takes a file that ends with its last tensor for a truncated one."""
    plan = gguf_files("x", METADATA, [("a", DType.F32, (values,)), ("b", DType.F32, (values,))])
    (file,), a, b = plan.files, plan.tensors["a"], plan.tensors["b"]
    assert a.offset == len(file.head)
    assert len(file.head) % 32 == a.offset % 32 == b.offset % 32 == file.size % 32 == 0
    assert 0 <= b.offset - (a.offset + 4 * values) < 32
    assert 0 <= file.size - (b.offset + 4 * values) < 32


def test_no_tensors() -> None:
    (file,) = gguf_files("x", METADATA, []).files
    assert (file.name, file.size) == ("x.gguf", len(file.head))


def test_source_that_was_split() -> None:
    """Its own numbers go: a whole file that tells of parts would not load."""
    old = {**METADATA, "split.no": Value(Kind.UINT16, 0), "split.count": Value(Kind.UINT16, 9)}
    old["split.tensors.count"] = Value(Kind.INT32, 99)
    assert gguf_files("x", old, FOUR) == gguf_files("x", METADATA, FOUR)
    assert gguf_files("x", old, FOUR, 100) == gguf_files("x", METADATA, FOUR, 100)


def test_the_alignment_is_the_metadatas() -> None:
    """Of the first part; the others, which tell of none, have the format's own."""
    plan = gguf_files("x", {**METADATA, "general.alignment": uint32(4096)}, FOUR)
    assert plan.files[0].size % 4096 == 0
    assert all(tensor.offset % 4096 == 0 for tensor in plan.tensors.values())
    first, *others = gguf_files("x", {**METADATA, "general.alignment": uint32(4096)}, FOUR, 100).files
    assert first.size % 4096 == 0
    assert [file.head for file in others] == [file.head for file in gguf_files("x", METADATA, FOUR, 100).files[1:]]


def test_what_cannot_be_planned() -> None:
    with pytest.raises(errors.FormatError, match="tensor t0: stands twice"):
        gguf_files("x", METADATA, [*FOUR, FOUR[0]], 100)  # in two parts
    with pytest.raises(errors.FormatError, match="tensor t: rows of 3 values"):
        gguf_files("x", METADATA, [("t", DType.Q8_0, (3,))], 100)
    with pytest.raises(errors.UsageError):
        gguf_files("x", METADATA, FOUR, 0)
    many: list[Shape] = [(f"t{i}", DType.I8, (1,)) for i in range(65_536)]
    with pytest.raises(errors.UsageError, match="parts of 1 bytes are 65536; GGUF allows 65535"):
        gguf_files("x", {}, many, 1)
