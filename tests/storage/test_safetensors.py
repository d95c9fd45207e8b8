"""Headers against the safetensors library, literal bytes, and everything that the format forbids."""

from __future__ import annotations

import contextlib
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from mixtools import errors
from mixtools.storage.dtypes import ELEMENTS, DType
from mixtools.storage.plan import single_safetensors
from mixtools.storage.safetensors import MAX_HEADER, encode_header, read_header
from mixtools.storage.source import Source
from mixtools.storage.store import Entry, Store, by_name


def entries(path: Path, data: bytes) -> list[Entry]:
    path.write_bytes(data)
    return read_header(Source(path))


def file(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def item(dtype: object = "F32", shape: object = (2, 3), offsets: object = (0, 24)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_golden_header() -> None:
    """Every byte by hand: length, metadata, names as given, padding to 8."""
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},'
        b'"a\xc3\xa9":{"dtype":"F32","shape":[],"data_offsets":[12,16]}}       '
    )
    assert encode_header([("b", DType.BF16, (2, 3)), ("aé", DType.F32, ())]) == b"\x98\0\0\0\0\0\0\0" + text
    assert len(text) == 0x98
    assert encode_header([]) == b"\x20\0\0\0\0\0\0\0" + b'{"__metadata__":{"format":"pt"}}'


SHAPES = st.lists(st.tuples(st.sampled_from(ELEMENTS), st.lists(st.integers(0, 5), max_size=3)), max_size=8)


@given(SHAPES)
def test_reads_what_the_library_wrote(tmp_path_factory: pytest.TempPathFactory, shapes) -> None:
    tensors = {f"t{i}": torch.ones(shape).to(dtype.torch()) * i for i, (dtype, shape) in enumerate(shapes)}
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    found = by_name(entries(path, save(tensors, {"format": "pt", "é": "x"})))
    assert found.keys() == tensors.keys()
    raw = path.read_bytes()
    for name, tensor in tensors.items():
        entry = found[name]
        assert (entry.dtype.torch(), entry.shape) == (tensor.dtype, tuple(tensor.shape))
        assert raw[entry.offset : entry.offset + entry.nbytes] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(SHAPES)
def test_the_library_reads_what_we_plan(tmp_path_factory: pytest.TempPathFactory, shapes) -> None:
    """Any mixture of types, also where a tensor of single bytes stands before one of eight."""
    path = tmp_path_factory.getbasetemp() / "ours.safetensors"
    tensors = {f"t{i}": torch.ones(shape).to(dtype.torch()) for i, (dtype, shape) in enumerate(shapes)}
    plan = single_safetensors(path.name, [(f"t{i}", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(shapes)])
    raw = bytearray(plan.files[0].size)
    raw[: len(plan.files[0].head)] = plan.files[0].head
    for name, tensor in tensors.items():
        at = plan.tensors[name].offset
        raw[at : at + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    path.write_bytes(raw)
    with safetensors.safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        for name, tensor in tensors.items():
            found = opened.get_tensor(name)
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
    assert {entry.name for entry in read_header(Source(path))} == set(tensors)


def test_blanks_behind_the_header(tmp_path: Path) -> None:
    raw = json.dumps({"x": item()}).encode()
    assert [entry.name for entry in entries(tmp_path / "x", file(raw + b" " * 100, bytes(24)))] == ["x"]


def test_no_tensors(tmp_path: Path) -> None:
    assert entries(tmp_path / "x", file({})) == []
    assert entries(tmp_path / "x", file({"__metadata__": {"a": "b"}})) == []


def test_metadata_null(tmp_path: Path) -> None:
    """Some writers say none so; the library takes it."""
    data = file({"__metadata__": None, "x": item()}, bytes(24))
    assert safetensors.torch.load(data).keys() == {"x"}
    assert [entry.name for entry in entries(tmp_path / "x", data)] == ["x"]


def test_tensors_of_no_size(tmp_path: Path) -> None:
    header = {"b": item("F32", [2], [0, 8]), "a": item("F32", [0, 9], [8, 8]), "c": item("F32", [0], [0, 0])}
    found = entries(tmp_path / "x", file(header, bytes(8)))
    assert [(entry.name, entry.nbytes) for entry in found] == [("c", 0), ("b", 8), ("a", 0)]
    assert Store(by_name(found)).read_rows("a", 0, 0).size == 0


DEEP = b'{"x":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
OF_THE_FILE = {
    "empty": b"", "seven bytes": b"\1\0\0\0\0\0\0", "no header": bytes(8), "length too large": b"\xff" * 8 + b"{}",
    "length over the limit": (MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
    "length over the end": (100).to_bytes(8, "little") + b"{}",
    "leading blank": file(b" {}"), "leading newline": file(b"\n{}"), "leading mark": file("\ufeff{}".encode()),
    "cut": file(b'{"x":'), "list": file([]), "null": file(b"null"), "not UTF-8": file(b'{"\xff":1}'),
    "trailing comma": file(b"{},"), "two objects": file(b"{}{}"), "NUL behind": file(b"{}\0\0"),
    "deep": file(DEEP), "metadata a list": file({"__metadata__": []}), "metadata false": file({"__metadata__": False}),
    "metadata a number": file({"__metadata__": {"a": 1}}), "metadata nested": file({"__metadata__": {"a": {}}}),
    "bytes behind": file({}, b"\0"), "deep metadata": file(b'{"__metadata__":' + DEEP + b"}"),
    "number of 5000 digits": file(b'{"x":' + b"9" * 5000 + b"}"),
}  # fmt: skip
OF_THE_TENSOR = {
    "twice": (b'{"x":%s,"x":%s}' % ((json.dumps(item()).encode(),) * 2), 24),
    "number": ({"x": 1}, 0), "list": ({"x": []}, 0), "nothing": ({"x": {}}, 0), "null": ({"x": None}, 0),
    "no dtype": ({"x": {"shape": [2, 3], "data_offsets": [0, 24]}}, 24),
    "a key too many": ({"x": {**item(), "strides": [3, 1]}}, 24),
    "unknown dtype": ({"x": item("F31")}, 24), "lower case": ({"x": item("f32")}, 24),
    "null dtype": ({"x": item(None)}, 24),
    "dtype a list": ({"x": item(["F32"])}, 24), "dtype a number": ({"x": item(32)}, 24),
    "fp8": ({"x": item("F8_E4M3", [24])}, 24), "four bits": ({"x": item("F4", [48])}, 24),
    "negative shape": ({"x": item("F32", [-2, -3])}, 24), "float shape": ({"x": item("F32", [2.0, 3])}, 24),
    "bool shape": ({"x": item("F32", [True, 6])}, 24), "text shape": ({"x": item("F32", "23")}, 24),
    "null shape": ({"x": item("F32", None)}, 24), "number as shape": ({"x": item("F32", 6)}, 24),
    "nested shape": ({"x": item("F32", [[2, 3]])}, 24),
    "infinite shape": (b'{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,24]}}', 24),
    "NaN shape": (b'{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}}', 24),
    "huge shape": ({"x": item("F32", [1 << 62, 4], [0, 24])}, 24),
    "shape that wraps": ({"x": item("F32", [1 << 32, 1 << 32], [0, 0])}, 0),
    "shape of 65 bits": ({"x": item("F32", [1 << 64], [0, 0])}, 0),
    "shape of 4000 digits": ({"x": item("F32", [10**4000] * 2, [0, 24])}, 24),
    "a thousand dimensions": ({"x": item("F32", [1 << 62] * 1000, [0, 24])}, 24),
    "zero times huge": ({"x": item("F32", [0, 1 << 64], [0, 0])}, 0),
    "one offset": ({"x": item(offsets=[24])}, 24), "three offsets": ({"x": item(offsets=[0, 24, 24])}, 24),
    "negative offset": ({"x": item(offsets=[-24, 0])}, 24), "float offset": ({"x": item(offsets=[0, 24.0])}, 24),
    "bool offset": ({"x": item("U8", [1], [False, True])}, 1), "text offsets": ({"x": item(offsets=["0", "24"])}, 24),
    "offsets reversed": ({"x": item(offsets=[24, 0])}, 24), "too short": ({"x": item(offsets=[0, 20])}, 24),
    "too long": ({"x": item(offsets=[0, 28])}, 28), "behind the end": ({"x": item()}, 20),
    "far behind the end": ({"x": item(offsets=[1 << 40, (1 << 40) + 24])}, 24),
    "hole before": ({"x": item(offsets=[4, 28])}, 28),
    "hole between": ({"a": item("U8", [1], [0, 1]), "x": item(offsets=[2, 26])}, 26),
    "bytes behind": ({"x": item()}, 25),
    "overlap": ({"a": item(), "x": item(offsets=[20, 44])}, 44), "the same place": ({"a": item(), "x": item()}, 24),
    "within another": ({"a": item(), "x": item("U8", [4], [8, 12])}, 24),
    "no size, in the middle": ({"a": item(), "x": item("U8", [0], [8, 8])}, 24),
    "half a surrogate": (b'{"x\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', 0),
}  # fmt: skip


@pytest.mark.parametrize("data", OF_THE_FILE.values(), ids=OF_THE_FILE)
def test_refuses_the_file(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(errors.FormatError) as caught:
        entries(tmp_path / "x.safetensors", data)
    assert caught.value.file == str(tmp_path / "x.safetensors")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("header", "size"), OF_THE_TENSOR.values(), ids=OF_THE_TENSOR)
def test_refuses_the_tensor(tmp_path: Path, header: object, size: int) -> None:
    with pytest.raises(errors.FormatError) as caught:
        entries(tmp_path / "x.safetensors", file(header, bytes(size)))
    assert caught.value.file == str(tmp_path / "x.safetensors")
    assert caught.value.tensor is not None
    assert caught.value.tensor.startswith("x")
    assert len(str(caught.value)) < 500
    assert str(caught.value).isprintable()


def test_git_lfs_pointer(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n"
    with pytest.raises(errors.FormatError, match=r"is a Git LFS pointer.*git lfs pull"):
        entries(tmp_path / "x", pointer)


def test_every_truncation(tmp_path: Path) -> None:
    raw = save({"a": torch.ones(3, 4), "b": torch.ones(5)})
    for cut in range(len(raw)):
        with pytest.raises(errors.FormatError):
            entries(tmp_path / "x", raw[:cut])


def test_mutations_raise_only_our_errors(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3, 4), "layer.b": torch.ones(5).half()}, tmp_path / "x", {"format": "pt"})
    raw = (tmp_path / "x").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    chance = random.Random(0)
    accepted = 0
    for _ in range(2000):
        data = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            data[chance.randrange(start)] = chance.choice((chance.randrange(256), *b'"{}[]:,0129'))
        with contextlib.suppress(errors.FormatError):
            found = entries(tmp_path / "x", bytes(data))
            accepted += 1
            # whatever was changed, what is accepted covers the file exactly once
            assert sum(entry.nbytes for entry in found) == len(raw) - 8 - int.from_bytes(data[:8], "little")
    assert 0 < accepted < 1000


BOMBS = {
    "tiny tensors": (b'{"%s":1', b',"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}', b"}"),
    "metadata": (b'{"__metadata__":{"":""', b',"":""', b"}}"),
    "shape": (b'{"x":{"dtype":"U8","shape":[0', b",0", b'],"data_offsets":[0,0]}}'),
    "empty lists": (b'{"x":[[]', b",[]", b"]}"),
}
READER = """
import sys
from pathlib import Path
from mixtools.storage.safetensors import read_header
from mixtools.storage.source import Source
from mixtools.errors import FormatError
try:
    read_header(Source(Path(sys.argv[1])))
except FormatError as error:
    print(error)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("parts", BOMBS.values(), ids=BOMBS)
def test_header_bomb(tmp_path: Path, parts: tuple[bytes, bytes, bytes]) -> None:
    """90 MB of header would become gigabytes of objects; refused for a few copies of its bytes."""
    first, middle, last = parts
    path = tmp_path / "x.safetensors"
    path.write_bytes(file(first + middle * (90_000_000 // len(middle)) + last))
    result = subprocess.run([sys.executable, "-c", READER, path], capture_output=True, text=True, check=True)
    message, kilobytes = result.stdout.splitlines()
    assert "which no model needs" in message
    assert int(kilobytes) < 500_000
