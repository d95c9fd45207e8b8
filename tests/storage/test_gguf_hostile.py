"""Headers of GGUF that are wrong: each is refused with a line that says why, and none takes memory to speak of."""

from __future__ import annotations

import itertools
import os
import random
import re
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from storage import ggufs
from storage.ggufs import Memory, array, file, pair, tensor, text

from mixtools import errors
from mixtools.storage.gguf import MAX_ITEMS, MAX_KEYS, MAX_TENSORS, TYPES, Header, encode_header, read_header
from mixtools.storage.gguf_cursor import MAX_HEADER
from mixtools.storage.gguf_values import Kind
from mixtools.storage.plan_gguf import gguf_files
from mixtools.storage.source import Source

HUGE = (1 << 64) - 1
ONE = bytes(32)  # of a tensor of eight floats
ALIGNMENT = "general.alignment"

OF_THE_FILE = {
    "empty": (b"", "is truncated within its header: expected at least 4 bytes, found 0"),
    "magic alone": (b"GGUF", "is truncated within its header: expected at least 8 bytes, found 4"),
    "no counts": (b"GGUF\3\0\0\0", "is truncated within its header: expected at least 24 bytes, found 8"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "is a Git LFS pointer"),
    "another magic": (b"PK\3\4" + bytes(40), r"begins with b'PK\\x03\\x04', not with b'GGUF'"),
    "backwards": (b"FUGG" + bytes(40), "is a big-endian GGUF"),
    "ggml": (b"lmgg" + bytes(40), "is of the format ggml, from before GGUF"),
    "ggmf": (b"fmgg" + bytes(40), "is of the format ggmf, from before GGUF"),
    "ggjt": (b"tjgg" + bytes(40), "is of the format ggjt, from before GGUF"),
    "ggla": (b"algg" + bytes(40), "is of the format ggla, from before GGUF"),
    "ggjt of a big-endian": (b"ggjt" + bytes(40), "is of the format ggjt, from before GGUF"),
    "version 0": (file(version=0), "is GGUF version 0; known are 2 and 3"),
    "version 1": (file(version=1), r"is GGUF version 1 \(32-bit counts\).*convert the model anew"),
    "version 4": (file(version=4), "is GGUF version 4; known are 2 and 3"),
    "version of a big-endian": (file(version=3 << 24), "is a big-endian GGUF; convert it with"),
    "version of nothing": (file(version=0x0003_0001), "is GGUF version 196609"),
    "more tensors than bytes": (file(counts=(1, 0)), "claims 1 tensors, more than its 24 bytes can hold"),
    "most tensors": (file(counts=(HUGE, 0)), f"claims {HUGE} tensors, more than"),
    "more keys than bytes": (file(counts=(0, 2)) + bytes(27), "claims 2 keys, more than its 51 bytes can hold"),
    "most keys": (file(counts=(0, HUGE)), f"claims {HUGE} keys, more than"),
    "too many keys": (file(counts=(0, MAX_KEYS + 1)) + bytes(14 * MAX_KEYS + 14), "claims 100001 keys, which no"),
    "too many tensors": (file(counts=(MAX_TENSORS + 1, 0)) + bytes(33 * MAX_TENSORS + 33), "claims 100001 tensors, wh"),
}  # fmt: skip
OF_A_KEY = {
    "empty": (file([pair("", 0, b"\0") + b"\0"]), "a key of 0 bytes; the format allows 1 to 65535"),
    "long": (file([pair("k" * 65_536, 0, b"\0")]), "a key of 65536 bytes"),
    "endless": (file([struct.pack("<QI", HUGE, 0) + bytes(9)]), f"a key of {HUGE} bytes"),
    "past the end": (file([struct.pack("<Q", 100) + bytes(9)]), "is truncated within its header"),
    "not UTF-8": (file([pair(b"k\xff", 0, b"\0")]), r"a key that is not UTF-8: b'k\\xff'"),
    "a lone surrogate": (file([pair(b"\xed\xa0\x80", 0, b"\0")]), "a key that is not UTF-8"),
    "twice": (file([pair("k", 0, b"\0"), pair("k", 0, b"\0")]), "key k: stands twice"),
    "twice, once an array": (file([array("k", 0, 0), pair("k", 0, b"\0")]), "key k: stands twice"),
    "unknown kind": (file([pair("k", 13, bytes(8))]), "key k: is of the kind 13; known are 0 to 12"),
    "largest kind": (file([pair("k", 0xFFFFFFFF, bytes(8))]), "key k: is of the kind 4294967295"),
    "items of unknown kind": (file([array("k", 13, 1, bytes(8))]), "key k: is of the kind 13"),
    "array of arrays": (file([array("k", 9, 1, struct.pack("<IQ", 0, 0))]), "key k: is an array of arrays"),
    "bool of 2": (file([pair("k", 7, b"\2")]), "key k: a truth value is 2, neither 0 nor 1"),
    "bools, one of 255": (file([array("k", 7, 3, b"\0\1\xff")]), "key k: a truth value is 255"),
    "cut number": (file([pair("k", 10, bytes(7))]), "key k: is truncated within its header: expected at least 45"),
    "endless text": (file([pair("k", 8, struct.pack("<Q", HUGE))]), "key k: is truncated within its header"),
    "text of gigabytes": (file([pair("k", 8, struct.pack("<Q", 1 << 33))]), "key k: is truncated .* 8589934637 bytes"),
    "array past the end": (file([array("k", 4, 9, bytes(35))]), "key k: is truncated within its header"),
    "texts past the end": (file([array("k", 8, 9, bytes(71))]), "key k: is truncated within its header"),
    "last text past the end": (file([array("k", 8, 2, text("a") + b"\7" + bytes(7))]), "key k: is truncated within"),
    "too many items": (file([array("k", 0, MAX_ITEMS + 1)]), "key k: brings the arrays' values to more than 4000000"),
    "too many in all": (
        file([array("j", 0, MAX_ITEMS, bytes(MAX_ITEMS)), array("k", 0, 1, b"\0")]), "key k: brings the arrays'"
    ),
    "alignment of text": (file([pair(ALIGNMENT, 8, text("32"))]), f"{ALIGNMENT} is not of the kind uint32 but string"),
    "alignments": (file([array(ALIGNMENT, 4, 1, bytes(4))]), f"{ALIGNMENT} is not of the kind uint32 but array"),
    "long key in an error": (file([pair("k" * 60_000, 99, b"\0")]), r"key k{197}\.\.\.: is of the kind 99"),
}  # fmt: skip
OF_A_TENSOR = {
    "no dimensions": (file(tensors=[tensor(dims=())], data=ONE), "has 0 dimensions; GGUF allows 1 to 4"),
    "five": (file(tensors=[tensor(dims=(1,) * 5)], data=ONE), "has 5 dimensions"),
    "endless dimensions": (file(tensors=[text("t") + b"\xff" * 4 + bytes(99)]), "has 4294967295 dimensions"),
    "dimension of 0": (file(tensors=[tensor(dims=(0,))], data=ONE), "shape [0] holds nothing"),
    "last dimension of 0": (file(tensors=[tensor(dims=(8, 0))], data=ONE), "shape [0, 8] holds nothing"),
    "dimension of 2^63": (file(tensors=[tensor(dims=(1 << 63,))], data=ONE), "shape [9223372036854775808] overflows"),
    "product wraps to 0": (file(tensors=[tensor(dims=(1 << 32, 1 << 32))], data=ONE), "overflows 63 bits"),
    "product wraps to 1": (file(tensors=[tensor(dims=((1 << 32) - 1, (1 << 32) + 1))], data=ONE), "overflows"),
    "bytes wrap": (file(tensors=[tensor(dims=(1 << 30, 1 << 30), number=28)], data=ONE), "overflows 63 bits"),
    "blocks cut": (file(tensors=[tensor(dims=(48,), number=8)], data=bytes(64)), "rows of 48 values are no multiple"),
    "blocks in columns": (
        file(tensors=[tensor(dims=(32, 8), number=12)], data=bytes(144)), "rows of 32 values are no multiple of Q4_K"
    ),
    "number 255": (file(tensors=[tensor(number=255)], data=ONE), "is of the type number 255, which is not known"),
    "negative number": (file(tensors=[tensor(number=0xFFFFFFFF)], data=ONE), "is of the type number 4294967295"),
    "Q4_2": (file(tensors=[tensor(number=4)], data=ONE), "is of the type Q4_2, which ggml gave up in 2023"),
    "Q4_0_4_4": (file(tensors=[tensor(number=31)], data=ONE), "Q4_0_4_4, which ggml gave up in 2024; fetch the same m"),
    "IQ4_NL_4_4": (file(tensors=[tensor(number=36)], data=ONE), "in 2024; fetch the same model in IQ4_NL"),
    "misaligned": (file(tensors=[tensor(offset=16)], data=ONE * 2), "offset 16 is no multiple of the alignment, 32"),
    "past the end": (file(tensors=[tensor(offset=1 << 40)], data=ONE), "offset 1099511627776 lies past the end of"),
    "just past the end": (file(tensors=[tensor(offset=32)], data=ONE), "offset 32 lies past the end of the file"),
    "far past the end": (file(tensors=[tensor(offset=HUGE - 31)], data=ONE), "lies past the end of the file"),
    "truncated": (file(tensors=[tensor()], data=ONE[:-1]), "is truncated: expected 96 bytes, found 95"),
    "nothing behind the header": (file(tensors=[tensor()]), "is truncated: expected 96 bytes, found 57"),
    "overlap": (
        file(tensors=[tensor("a", (9,)), tensor(offset=32)], data=ONE * 3), "overlaps a: expected at least 132"
    ),
    "within another": (
        file(tensors=[tensor("a", (64,)), tensor(offset=96)], data=bytes(256)), "overlaps a: expected at least 352"
    ),
    "in the same place": (file(tensors=[tensor("a"), tensor()], data=ONE), "overlaps a"),
    "twice": (file(tensors=[tensor(), tensor(offset=32)], data=ONE * 2), "stands twice in the header"),
    "behind a key": (file([pair("k", 0, b"\0")], [tensor(number=255)], ONE), "is of the type number 255"),
}  # fmt: skip
NAMES = {
    "name empty": (file(tensors=[tensor("")], data=ONE), "a tensor's name of 0 bytes"),
    "name endless": (file(tensors=[b"\xff" * 40], data=ONE), f"a tensor's name of {HUGE} bytes"),
    "name long": (file(tensors=[tensor("t" * 65_536)], data=ONE), "a tensor's name of 65536 bytes"),
    "name not UTF-8": (file(tensors=[tensor(b"\x80")], data=ONE), r"a tensor's name that is not UTF-8: b'\\x80'"),
    "name behind a tensor": (file(tensors=[tensor(), tensor(b"\x80")], data=ONE), "a tensor's name that is not UTF-8"),
    "name past the end": (file(tensors=[struct.pack("<Q", 99) + bytes(30)]), "is truncated within its header"),
}


@pytest.mark.parametrize(("raw", "why"), (OF_THE_FILE | NAMES).values(), ids=[*OF_THE_FILE, *NAMES])
def test_refused_naming_the_file(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(errors.FormatError, match=f"^{tmp_path}/x: {why}") as caught:
        ggufs.read(tmp_path / "x", raw)
    assert (caught.value.file, caught.value.tensor) == (str(tmp_path / "x"), None)


@pytest.mark.parametrize(("raw", "why"), OF_A_KEY.values(), ids=OF_A_KEY)
def test_refused_naming_the_key(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(errors.FormatError, match=f"^{tmp_path}/x: {why}") as caught:
        ggufs.read(tmp_path / "x", raw)
    assert caught.value.tensor is None


@pytest.mark.parametrize(("raw", "why"), OF_A_TENSOR.values(), ids=OF_A_TENSOR)
def test_refused_naming_the_tensor(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(errors.FormatError) as caught:
        ggufs.read(tmp_path / "x", raw)
    assert str(caught.value).startswith(f"{tmp_path}/x: tensor t: ")
    assert why in str(caught.value)
    assert "key k" not in str(caught.value)


def test_text_of_gigabytes(tmp_path: Path) -> None:
    """That the file does hold, as a hole."""
    raw = file([pair("k", 8, struct.pack("<Q", 1 << 33))])
    (tmp_path / "x").write_bytes(raw)
    os.truncate(tmp_path / "x", len(raw) + (1 << 33))
    with pytest.raises(errors.FormatError, match=f"key k: makes the header longer than {MAX_HEADER} bytes"):
        read_header(Source(tmp_path / "x"))


@pytest.mark.parametrize("alignment", [0, 1, 4, 7, 24, 33, 1 << 21, 1 << 31, 0xFFFFFFFF])
def test_alignments(tmp_path: Path, alignment: int) -> None:
    raw = file([pair(ALIGNMENT, 4, struct.pack("<I", alignment))], [tensor()], ONE)
    with pytest.raises(errors.FormatError, match=f"{ALIGNMENT} is {alignment}, not a power of two of 8 to 1048576"):
        ggufs.read(tmp_path / "x", raw)


def test_every_type_that_ggml_has(tmp_path: Path) -> None:
    """Read, or refused by its name."""
    for theirs in gguf.GGMLQuantizationType:
        values, size = gguf.GGML_QUANT_SIZES[theirs]
        raw = file(tensors=[tensor(dims=(values,), number=theirs)], data=bytes(size))
        if theirs in TYPES.values():
            assert ggufs.read(tmp_path / "x", raw).entries[0].nbytes == size
        else:
            with pytest.raises(errors.FormatError, match=f"tensor t: is of the type {theirs.name}, which"):
                ggufs.read(tmp_path / "x", raw)


def alignment_of(kind: int, value: bytes) -> bytes:
    return file([pair(ALIGNMENT, kind, value)], [tensor()], ONE)


REPORTED = {
    # https://github.com/ggml-org/llama.cpp/pull/18674: a dimension of 2^42 + 1 wrapped the size to a small one
    "18674": (file(tensors=[tensor(dims=(1152, (1 << 42) + 1), number=8)], data=ONE), "tensor t: is truncated"),
    # .../llama.cpp/pull/25596: a dimension of 0 behind another divided by zero
    "25596": (file(tensors=[tensor(dims=(1, 0))], data=ONE), r"tensor t: shape \[0, 1\] holds nothing"),
    # .../llama.cpp/pull/24759: a quarter of 2^64 floats, padded, were no bytes at all
    "24759": (file(tensors=[tensor(dims=(HUGE // 4,))], data=ONE), "tensor t: shape .* overflows 63 bits"),
    # .../llama.cpp/issues/15711: as many tensors as a size_t of records, then a larger record for each
    "15711": (file(counts=(HUGE // 400, 0)) + bytes(64), "claims 46116860184273879 tensors, more than its 88 bytes"),
    # .../llama.cpp/issues/19003: the length of a key, here 6 * 10^17 bytes, was asked for at once
    "19003": (
        b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7) + b"GGU\1\2\0\0\x08" + bytes(30), "a key of 57646[0-9]+ bytes"
    ),
    # .../llama.cpp/issues/24884: an empty key met an assertion
    "24884": (file([pair("", 4, bytes(4))]), "a key of 0 bytes"),
    # .../llama.cpp/pull/24988: so did an alignment of another kind
    "24988": (alignment_of(5, struct.pack("<i", 32)), f"{ALIGNMENT} is not of the kind uint32 but int32"),
    # CVE-2024-21802, https://github.com/Tiiny-AI/PowerInfer/issues/256: one more than the length was none
    "21802": (file([pair("k", 8, struct.pack("<Q", HUGE) + bytes(40))]), "key k: is truncated within its header"),
    # CVE-2026-7482: a tensor that claims more than the file has was read from the memory behind it
    "7482": (file(tensors=[tensor(dims=(1 << 20,))], data=ONE), "tensor t: is truncated: expected 4194368 bytes, fo"),
    # https://github.com/antirez/gguf-tools/issues/27, https://github.com/huggingface/candle/pull/3876: a division
    "alignment 0": (alignment_of(4, bytes(4)), f"{ALIGNMENT} is 0, not a power of two"),
    # https://github.com/ROCm/hrx-system/pull/278: items that make 2^64 + 8 bytes were read as eight
    "hrx 278": (file([array("k", 10, (1 << 61) + 1, bytes(8))]), "key k: brings the arrays' values to more than"),
    # GGUFReader of gguf 0.19 recurses into arrays of arrays until Python gives up
    "nested": (
        file([array("k", 9, 1, struct.pack("<IQ", 9, 1) * 5000)]), "key k: is an array of arrays, which no writer"
    ),
    # .../llama.cpp/issues/3358: what a browser is shown instead of the file
    "3358": (b"\n<!doctype html>\n<html>" + bytes(99), "is a web page, not the file itself"),
}  # fmt: skip


@pytest.mark.parametrize(("raw", "why"), REPORTED.values(), ids=REPORTED)
def test_what_others_fell_for(tmp_path: Path, raw: bytes, why: str) -> None:
    with pytest.raises(errors.FormatError, match=f"^{tmp_path}/x: {why}"):
        ggufs.read(tmp_path / "x", raw)


def test_an_alignment_of_16_is_heeded(tmp_path: Path) -> None:
    """https://github.com/ollama/ollama/pull/18130: read as 32, each tensor is its neighbour."""
    for padding in range(16):
        pairs = [pair(ALIGNMENT, 4, struct.pack("<I", 16)), pair("k" * (padding + 1), 0, b"\0")]
        records = [tensor(name, (4,), offset=16 * at) for at, name in enumerate("abc")]
        raw = file(pairs, records, b"a" * 16 + b"b" * 16 + b"c" * 16, alignment=16)
        for entry in ggufs.read(tmp_path / "x", raw).entries:
            assert raw[entry.offset : entry.offset + 16] == entry.name.encode() * 16


def small() -> bytes:
    """A file of every kind of value and record."""
    return ggufs.written(gguf_files("x", ggufs.EVERY_KIND, ggufs.SHAPES))["x.gguf"]


def accept(raw: bytes) -> Header | None:
    """What is read, if it is taken; it must then be what the format allows."""
    header, refused = None, ""
    try:
        header = read_header(Memory(raw))
    except errors.FormatError as error:
        refused = str(error)
    if header is None:
        assert refused.startswith("memory: ")
        return None
    ends = sorted((entry.offset, entry.offset + entry.nbytes) for entry in header.entries)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(ends))
    assert all(start % header.alignment == 0 and end <= len(raw) for start, end in ends)
    tensors = [(entry.name, entry.dtype, entry.shape) for entry in header.entries]
    head, _ = encode_header(header.metadata, tensors)
    again = read_header(Memory(head + bytes(max((end for _, end in ends), default=0))))
    assert repr(again.metadata) == repr(header.metadata)  # as text: NaN is not equal to itself
    assert [(entry.name, entry.dtype, entry.shape) for entry in again.entries] == tensors
    return header


def test_truncated_anywhere() -> None:
    raw = small()
    header = read_header(Memory(raw))
    end = max(entry.offset + entry.nbytes for entry in header.entries)
    assert end < len(raw)
    for cut in range(end):
        with pytest.raises(errors.FormatError, match="is truncated|more than its"):
            read_header(Memory(raw[:cut]))
    assert read_header(Memory(raw[:end])).metadata == header.metadata


def flips(raw: bytes, stop: int) -> Iterator[bytes]:
    for bit in range(8 * stop):
        data = bytearray(raw)
        data[bit // 8] ^= 1 << bit % 8
        yield bytes(data)


def test_each_bit_flipped() -> None:
    raw = small()
    start = min(entry.offset for entry in read_header(Memory(raw)).entries)
    taken = sum(accept(data) is not None for data in flips(raw, start))
    assert start < taken < 4 * start  # most bits of keys and values may be any


def test_mutations() -> None:
    """Nothing but our own error, and never memory beyond some copies of the file."""
    raw, chance, taken = small(), random.Random(0), 0
    start = min(entry.offset for entry in read_header(Memory(raw)).entries)
    tracemalloc.start()
    try:
        for _ in range(2000):
            data = bytearray(raw)
            for _ in range(chance.randrange(1, 4)):
                at = chance.randrange(start)
                data[at : at + chance.randrange(9)] = chance.randbytes(chance.randrange(9))
            taken += accept(bytes(data)) is not None
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert 0 < taken < 1000


@given(st.sampled_from([b"", b"GGUF", b"GGUF\3\0\0\0", b"GGUF\3\0\0\0" + bytes(8) + b"\1" + bytes(7)]), st.binary())
@example(b"GGUF", b"")
def test_random_bytes(start: bytes, rest: bytes) -> None:
    accept(start + rest)


BOMBS = {
    "texts": (file([array("k", 8, 7_000_000)]), 8 * 7_000_000, "key k: brings the arrays' values to more than"),
    "bytes": (file([array("k", 0, 60_000_000)]), 60_000_000, "key k: brings the arrays' values to more than"),
    "text of 50 MB": (file([pair("k", 8, struct.pack("<Q", 50_000_000))]), 50_000_000, ""),
    "as many as go": (file([array("k", 8, MAX_ITEMS)]), 8 * MAX_ITEMS, ""),
    "numbers": (file([array("k", 12, MAX_ITEMS)]), 8 * MAX_ITEMS, ""),
}  # fmt: skip
READER = """
import sys
from pathlib import Path
from mixtools.storage.gguf import read_header
from mixtools.storage.source import Source
from mixtools.errors import FormatError
try:
    read_header(Source(Path(sys.argv[1])))
    print()
except FormatError as error:
    print(error)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(("head", "zeros", "why"), BOMBS.values(), ids=BOMBS)
def test_bombs(tmp_path: Path, head: bytes, zeros: int, why: str) -> None:
    """Little on the disk, being a hole, and little in memory whether it is taken or refused."""
    path = tmp_path / "x.gguf"
    path.write_bytes(head)
    os.truncate(path, len(head) + zeros)
    result = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, text=True, check=True)
    message, kilobytes = result.stdout.splitlines()
    assert re.search(why, message) if why else message == ""
    assert int(kilobytes) < 400_000


def test_kinds_are_the_formats() -> None:
    assert {kind.name: int(kind) for kind in Kind} == {kind.name: int(kind) for kind in gguf.GGUFValueType}
