"""Headers of GGUF against the gguf package, literal bytes, and what real files do."""

from __future__ import annotations

import os
import struct
from functools import partial
from pathlib import Path

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from storage import ggufs

from mixtools import errors
from mixtools.storage import gguf_cursor
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import MAX_KEY, TYPES, encode_header, read_header
from mixtools.storage.gguf_values import Kind, Metadata, Value, array, boolean, float32, string, uint32
from mixtools.storage.plan import Shape
from mixtools.storage.plan_gguf import gguf_files
from mixtools.storage.source import Source

RANGES = {
    Kind.UINT8: (0, 8), Kind.INT8: (1, 8), Kind.UINT16: (0, 16), Kind.INT16: (1, 16), Kind.UINT32: (0, 32),
    Kind.INT32: (1, 32), Kind.UINT64: (0, 64), Kind.INT64: (1, 64),
}  # fmt: skip
OF_KIND = {
    **{
        kind: st.integers(-(1 << bits - 1), (1 << bits - 1) - 1) if signed else st.integers(0, (1 << bits) - 1)
        for kind, (signed, bits) in RANGES.items()
    },
    Kind.FLOAT32: st.floats(width=32, allow_nan=False), Kind.FLOAT64: st.floats(allow_nan=False),
    Kind.BOOL: st.booleans(), Kind.STRING: st.text(st.characters(exclude_categories=["Cs"]), max_size=9),
}  # fmt: skip
KINDS = st.sampled_from(list(OF_KIND))
VALUES = KINDS.flatmap(lambda kind: OF_KIND[kind].map(partial(Value, kind)))
ARRAYS = KINDS.flatmap(lambda kind: st.lists(OF_KIND[kind], min_size=1, max_size=9).map(partial(array, kind)))
KEYS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=9)
METADATA = st.dictionaries(KEYS, VALUES | ARRAYS, max_size=6)
TENSORS = st.lists(
    st.tuples(st.sampled_from(list(TYPES)), st.lists(st.integers(1, 3), min_size=1, max_size=4)), max_size=5
).map(
    lambda found: [
        (f"t{i}", dtype, (*shape[:-1], shape[-1] * 256)) for i, (dtype, shape) in enumerate(found)
    ]
)  # fmt: skip
ALIGNMENTS = st.sampled_from([8, 32, 64, 4096])


def aligned(metadata: Metadata, alignment: int) -> Metadata:
    return metadata if alignment == 32 else {**metadata, "general.alignment": uint32(alignment)}


def test_golden_header() -> None:
    """Every byte by hand: magic, version, counts, keys, records with their dimensions reversed, padding to 32."""
    metadata = {"a": string("é"), "b": array(Kind.BOOL, [True, False]), "c": float32(1.0)}
    head, offsets = encode_header(metadata, [("t", DType.F16, (2, 3)), ("u", DType.Q8_0, (1, 2, 32))])
    expected = (
        b"GGUF\3\0\0\0" b"\2\0\0\0\0\0\0\0" b"\3\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0a" b"\x08\0\0\0" b"\2\0\0\0\0\0\0\0\xc3\xa9"
        b"\1\0\0\0\0\0\0\0b" b"\x09\0\0\0" b"\7\0\0\0" b"\2\0\0\0\0\0\0\0\1\0"
        b"\1\0\0\0\0\0\0\0c" b"\6\0\0\0" b"\0\0\x80\x3f"
        b"\1\0\0\0\0\0\0\0t" b"\2\0\0\0" b"\3\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0" b"\1\0\0\0" b"\0\0\0\0\0\0\0\0"
        b"\1\0\0\0\0\0\0\0u" b"\3\0\0\0" b"\x20\0\0\0\0\0\0\0\2\0\0\0\0\0\0\0\1\0\0\0\0\0\0\0" b"\x08\0\0\0"
        b"\x20\0\0\0\0\0\0\0"
    )  # fmt: skip
    assert len(expected) == 181
    assert head == expected + bytes(11)
    assert offsets == (192, 224)


@given(METADATA, TENSORS, ALIGNMENTS)
def test_bytes_equal_ggufs(
    tmp_path_factory: pytest.TempPathFactory, metadata: Metadata, tensors: list[Shape], alignment: int
) -> None:
    metadata = aligned(metadata, alignment)
    folder = tmp_path_factory.mktemp("written")
    theirs = ggufs.written_by_gguf(folder, "x", metadata, tensors, alignment=alignment)
    assert ggufs.written(gguf_files("x", metadata, tensors)) == theirs
    header = read_header(Source(folder / "x.gguf"))
    assert (header.version, header.alignment) == (3, alignment)
    assert list(header.metadata.items()) == list(metadata.items())
    assert [(entry.name, entry.dtype, entry.shape) for entry in header.entries] == tensors
    raw = theirs["x.gguf"]
    for entry in header.entries:
        data = ggufs.data_of(entry.name, entry.dtype, entry.shape)
        assert raw[entry.offset : entry.offset + entry.nbytes] == data


def test_every_kind(tmp_path: Path) -> None:
    head, _ = encode_header(ggufs.EVERY_KIND, [])
    found = ggufs.read(tmp_path / "x", head).metadata
    assert found == ggufs.EVERY_KIND
    for key, value in found.items():
        wanted = ggufs.EVERY_KIND[key].value
        pairs = zip(value.value, wanted, strict=True) if value.kind is Kind.ARRAY else [(value.value, wanted)]
        assert all(type(one) is type(other) for one, other in pairs)
    reader = gguf.GGUFReader(tmp_path / "x")
    assert {key: reader.fields[key].contents() for key in found} == {key: value.value for key, value in found.items()}


def test_gguf_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(ggufs.written(gguf_files("x", ggufs.EVERY_KIND, ggufs.SHAPES))["x.gguf"])
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, dtype, shape in ggufs.SHAPES:
        assert found[name].tensor_type.name == dtype.value
        assert tuple(reversed(found[name].shape.tolist())) == shape
        assert found[name].data.tobytes() == ggufs.data_of(name, dtype, shape)


def test_type_numbers_and_sizes() -> None:
    for dtype, number in TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        values, size = gguf.GGML_QUANT_SIZES[theirs]
        assert (dtype.value, dtype.row_bytes(values)) == (theirs.name, size)
    assert set(DType) - TYPES.keys() == {DType.U8, DType.BOOL}


def test_empty_strings_and_arrays(tmp_path: Path) -> None:
    metadata = {"s": string(""), **{f"a{kind}": array(kind, []) for kind in OF_KIND}}
    assert ggufs.read(tmp_path / "x", encode_header(metadata, [])[0]).metadata == metadata


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), -0.0, 1e-45])
@pytest.mark.parametrize("kind", [Kind.FLOAT32, Kind.FLOAT64])
def test_rare_floats(tmp_path: Path, kind: Kind, value: float) -> None:
    head, _ = encode_header({"x": Value(kind, value), "y": array(kind, [value])}, [])
    found = ggufs.read(tmp_path / "x", head).metadata
    again, _ = encode_header(found, [])
    assert again == head
    one = found["x"].value
    assert struct.pack("d", one) == struct.pack("d", found["y"].value[0])
    assert one == (struct.unpack("f", struct.pack("f", value))[0] if kind is Kind.FLOAT32 else value)


def test_strings_that_are_no_utf8_keep_their_bytes(tmp_path: Path) -> None:
    """Vocabularies of byte-level tokenizers hold pieces of characters; converters of 2023 wrote them raw."""
    tokens = [b"\xff", b"\xe4\xb8", b"ok\x80", b"\xed\xa0\x80", b"\xf0\x9f\x99\x82", b"\0"]
    raw = ggufs.file([
        ggufs.array("tokenizer.ggml.tokens", Kind.STRING, len(tokens), b"".join(map(ggufs.text, tokens))),
        ggufs.pair("general.name", Kind.STRING, ggufs.text(b"caf\xe9")),
    ])  # fmt: skip
    metadata = ggufs.read(tmp_path / "x", raw).metadata
    assert metadata["tokenizer.ggml.tokens"].value[4] == "🙂"
    assert [text.encode(errors="surrogateescape") for text in metadata["tokenizer.ggml.tokens"].value] == tokens
    assert encode_header(metadata, [])[0] == raw + bytes(-len(raw) % 32)


def test_version_2(tmp_path: Path) -> None:
    """It differs from 3 only in that 3 may be big-endian."""
    raw = ggufs.file([ggufs.pair("a", Kind.UINT8, b"\7")], [ggufs.tensor()], bytes(32), version=2)
    header = ggufs.read(tmp_path / "x", raw)
    assert (header.version, header.metadata, header.entries[0].shape) == (2, {"a": Value(Kind.UINT8, 7)}, (8,))


def test_what_writers_differ_in(tmp_path: Path) -> None:
    """The last tensor unpadded, padding and anything else behind it, a hole, and records in another order."""
    raw = ggufs.file(tensors=[ggufs.tensor("a", (7,)), ggufs.tensor("b", (1,), offset=32)], data=bytes(36))
    at = 96  # two records of 33 bytes behind the first 24
    for tail in (b"", bytes(28), bytes(1000), b"GGUF"):
        assert [entry.offset for entry in ggufs.read(tmp_path / "x", raw + tail).entries] == [at, at + 32]
    raw = ggufs.file(tensors=[ggufs.tensor("b", (1,), offset=96), ggufs.tensor("a", (7,))], data=bytes(100))
    assert [(e.name, e.offset) for e in ggufs.read(tmp_path / "x", raw).entries] == [("b", at + 96), ("a", at)]


def test_no_tensors(tmp_path: Path) -> None:
    """As of the files that hold a vocabulary alone; a file without tensors need not be padded."""
    raw = ggufs.file([ggufs.pair("a", Kind.UINT8, b"\7")])
    assert len(raw) % 32
    assert ggufs.read(tmp_path / "x", raw).entries == []
    assert ggufs.read(tmp_path / "x", ggufs.file()).metadata == {}


@pytest.mark.parametrize("chunk", [*range(1, 40), 1 << 10])
def test_any_size_of_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Wherever what is fetched at first ends: in a length, a string, a number."""
    raw = ggufs.written(gguf_files("x", ggufs.EVERY_KIND, ggufs.SHAPES))["x.gguf"]
    monkeypatch.setattr(gguf_cursor, "_CHUNK", chunk)
    header = ggufs.read(tmp_path / "x", raw)
    assert header.metadata == ggufs.EVERY_KIND
    assert [(entry.name, entry.dtype, entry.shape) for entry in header.entries] == ggufs.SHAPES


def test_a_header_of_many_reads(tmp_path: Path) -> None:
    """Longer than what is fetched at first, in strings shorter and longer than that."""
    metadata = {
        "a": array(Kind.STRING, [f"▁piece{i}" for i in range(100_000)]), "b": string("é" * 3_000_000),
        "c": array(Kind.FLOAT32, [float(-i) for i in range(500_000)]), "d": boolean(True),
    }  # fmt: skip
    head, _ = encode_header(metadata, [])
    assert ggufs.read(tmp_path / "x", head).metadata == metadata


def test_reads_little_of_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = gguf_files("x", ggufs.EVERY_KIND, [("big", DType.Q4_K, (1 << 20, 1 << 16))])
    path = tmp_path / "x.gguf"
    path.write_bytes(plan.files[0].head)
    os.truncate(path, plan.files[0].size)  # 36 GB, and not a page of it on the disk
    source, fetched = Source(path), []
    plain = source.read_into
    monkeypatch.setattr(
        source, "read_into", lambda offset, view: (fetched.append(offset + len(view)), plain(offset, view))
    )
    assert read_header(source).entries[0].nbytes == (1 << 28) * 144
    assert max(fetched) <= 1 << 20
    assert len(fetched) == 2


UNWRITABLE: dict[str, tuple[Metadata, list[Shape], str]] = {
    "key empty": ({"": uint32(1)}, [], "a key of 0 bytes"),
    "key too long": ({"k" * (MAX_KEY + 1): uint32(1)}, [], "a key of 65536 bytes"),
    "key not Unicode": ({"k\udcff": uint32(1)}, [], "is not Unicode"),
    "too large": ({"k": uint32(1 << 32)}, [], "key k: cannot be stored as uint32"),
    "negative": ({"k": Value(Kind.UINT8, -1)}, [], "key k: cannot be stored as uint8"),
    "a float for an integer": ({"k": uint32(1.5)}, [], "key k: cannot be stored as uint32"),
    "too large a float": ({"k": float32(1e39)}, [], "key k: cannot be stored as float32"),
    "text for a number": ({"k": float32("1")}, [], "key k: cannot be stored as float32"),
    "a number for text": ({"k": string(1)}, [], "key k: cannot be stored as string"),
    "a number for a truth value": ({"k": boolean(1)}, [], "key k: cannot be stored as bool"),
    "text that is not Unicode": ({"k": string("\ud800")}, [], "key k: cannot be stored as string"),
    "array of arrays": ({"k": array(Kind.ARRAY, [[]])}, [], "key k: an array needs a kind"),
    "array of no kind": ({"k": Value(Kind.ARRAY, [1])}, [], "key k: an array needs a kind"),
    "one item too large": ({"k": array(Kind.INT8, [1, 128])}, [], "key k: cannot be stored as int8"),
    "alignment of 24": ({"general.alignment": uint32(24)}, [], "general.alignment is 24"),
    "no dimensions": ({}, [("t", DType.F32, ())], "tensor t: has 0 dimensions"),
    "five dimensions": ({}, [("t", DType.F32, (1,) * 5)], "tensor t: has 5 dimensions"),
    "nothing in it": ({}, [("t", DType.F32, (3, 0))], "tensor t: shape .3, 0. holds nothing"),
    "a block cut": ({}, [("t", DType.Q4_K, (256, 32))], "tensor t: rows of 32 values"),
    "no such type": ({}, [("t", DType.U8, (1,))], "tensor t: GGUF has no U8"),
    "too much": ({}, [("t", DType.F32, (1 << 31, 1 << 31))], "tensor t: shape .* overflows"),
    "twice": ({}, [("t", DType.F32, (1,))] * 2, "tensor t: stands twice"),
    "name too long": ({}, [("t" * 64, DType.F32, (1,))], "a name of 64 bytes"),
    "name empty": ({}, [("", DType.F32, (1,))], "a name of 0 bytes"),
    "name not Unicode": ({}, [("\ud800", DType.F32, (1,))], "a name that is not Unicode"),
}


@pytest.mark.parametrize(("metadata", "tensors", "why"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written(metadata: Metadata, tensors: list[Shape], why: str) -> None:
    with pytest.raises(errors.FormatError, match=why):
        encode_header(metadata, tensors)
