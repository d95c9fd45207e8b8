"""torch.save's files: what torch wrote is read right; what is damaged or made by hand is refused by name."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from storage import zips

from mixtools import errors
from mixtools.storage.dtypes import ELEMENTS
from mixtools.storage.torchzip import read_directory, read_header

OURS = (errors.FormatError, errors.ChecksumError, errors.UnsafeError)


def example() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "plain": torch.randn(5, 7, generator=generator).bfloat16(),
        "vector": torch.randn(9, generator=generator),
        "wide": torch.randn(3, 100, generator=generator).half(),
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def variants() -> dict[str, tuple[dict[str, torch.Tensor], dict[str, object]]]:
    a = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    return {
        "plain": (example(), {}),
        "OrderedDict": (OrderedDict(example()), {}),
        "state_dict with _metadata": (module, {}),
        **{f"protocol {n}": (example(), {"pickle_protocol": n}) for n in (3, 4, 5)},
        "every dtype": ({dtype.value: torch.ones(3).to(dtype.torch()) for dtype in ELEMENTS}, {}),
        "shared storage": ({"a": a, "b": a, "head": a[:2], "tail": a[2:]}, {}),
        "view of a larger storage": ({"x": a[1:3]}, {}),
        "one element of a larger storage": ({"x": a[2, 3]}, {}),
        "transposed": ({"x": a.T}, {}),
        "permuted": ({"x": a.view(2, 3, 4).permute(2, 0, 1)}, {}),
        "columns": ({"x": a[:, 2:4]}, {}),
        "every other row": ({"x": a[::2]}, {}),
        "chunks": (dict(zip("abc", a.chunk(3, dim=1), strict=True)), {}),
        "expanded": ({"x": torch.ones(1, 3).expand(4, 3), "y": torch.tensor(2.0).expand(5)}, {}),
        "overlapping windows": ({"x": torch.arange(9.0).unfold(0, 3, 1)}, {}),
        "empty": ({"x": torch.ones(0), "y": torch.ones(2, 0, 3), "z": a[:0]}, {}),
        "scalar": ({"x": torch.tensor(3.0)}, {}),
        "no tensors": ({}, {}),
        "strange names": ({"é/../\\": torch.ones(1), "": torch.ones(2), "a b\n": torch.ones(3)}, {}),
    }  # fmt: skip


@pytest.mark.parametrize("case", variants())
def test_reads_what_torch_wrote(tmp_path: Path, case: str) -> None:
    value, options = variants()[case]
    assert_same(zips.read(tmp_path / "x.pth", zips.saved(value, **options)), value)


def test_reads_what_torch_aligned_to_pages(tmp_path: Path) -> None:
    with torch.utils.serialization.config.patch("save.storage_alignment", 4096):
        raw = zips.saved(example())
    assert_same(zips.read(tmp_path / "x.pth", raw), example())
    assert all(entry.offset % 4096 == 0 for entry in zips.entries(tmp_path / "x.pth", raw))


def test_offsets_are_those_of_zipfile(tmp_path: Path) -> None:
    raw = zips.saved(example())
    members = read_directory(zips.write(tmp_path / "x.pth", raw))
    archive = zipfile.ZipFile(io.BytesIO(raw))
    assert set(members) == set(archive.namelist())
    for name, member in members.items():
        assert raw[member.offset : member.offset + member.size] == archive.read(name)
        assert member.crc == archive.getinfo(name).CRC


def test_every_truncation(tmp_path: Path) -> None:
    raw = zips.saved(example())
    chance = random.Random(0)
    cuts = {0, 1, 3, 4, 21, 22, 23, 64, *range(len(raw) - 30, len(raw)), *chance.choices(range(len(raw)), k=100)}
    for cut in sorted(cuts):
        with pytest.raises(errors.FormatError) as caught:
            zips.read(tmp_path / "x.pth", raw[:cut])
        assert caught.value.file == str(tmp_path / "x.pth")


def regions(raw: bytes) -> dict[str, range]:
    archive = zipfile.ZipFile(io.BytesIO(raw))
    members = {info.filename.partition("/")[2]: info for info in archive.infolist()}

    def data(name: str) -> range:
        info = members[name]
        start = info.header_offset + 30 + sum(struct.unpack_from("<2H", raw, info.header_offset + 26))
        return range(start, start + info.file_size)

    return {
        "data/0": data("data/0"), "data/1": data("data/1"), "data/2": data("data/2"), "data.pkl": data("data.pkl"),
        "byteorder": data("byteorder"),
    }  # fmt: skip


def test_every_flipped_bit_of_data(tmp_path: Path) -> None:
    """torch.load accepts these; zip's CRC does not."""
    raw = zips.saved(example())
    chance = random.Random(0)
    for name, span in regions(raw).items():
        for _ in range(25):
            data = bytearray(raw)
            data[chance.choice(span)] ^= 1 << chance.randrange(8)
            with pytest.raises(errors.ChecksumError, match="stored checksum") as caught:
                zips.read(tmp_path / "x.pth", bytes(data))
            assert caught.value.file == str(tmp_path / "x.pth")
            expected = {"data/0": "plain", "data/1": "vector", "data/2": "wide"}.get(name)
            assert caught.value.tensor == expected


def test_every_flipped_bit_of_the_directory(tmp_path: Path) -> None:
    """Refused, or read right all the same (a time stamp): never read wrong."""
    raw = zips.saved(example())
    start = zipfile.ZipFile(io.BytesIO(raw)).start_dir
    refused = 0
    for at in range(start, len(raw)):
        data = bytearray(raw)
        data[at] ^= 1 << at % 8
        try:
            assert_same(zips.read(tmp_path / "x.pth", bytes(data)), example())
        except OURS:
            refused += 1
    assert refused > len(raw[start:]) // 2


def test_mutations_anywhere(tmp_path: Path) -> None:
    """Only our errors escape, and nothing is ever read wrong."""
    raw = zips.saved(example())
    chance = random.Random(0)
    for _ in range(700):
        data = bytearray(raw)
        for _ in range(chance.randrange(1, 4)):
            at = chance.randrange(len(data))
            data[at : at + chance.choice((0, 1, 1, 1, 4))] = chance.randbytes(chance.choice((0, 1, 1, 1, 4)))
        with contextlib.suppress(*OURS):
            assert_same(zips.read(tmp_path / "x.pth", bytes(data)), example())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "not a torch file"),
        (b"PK\x03\x04" + b"\0" * 100, "truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 9\n", "git lfs pull"),
        (zips.saved(example(), _use_new_zipfile_serialization=False), "before 1.6"),
        (zips.saved(example()) + b"\0", "behind the end"),
        (zips.saved(example()) * 2, "of another file"),
        (b"\0" * 64 + zips.saved(example()), "of another file"),
        (b"\0" * 64 + zips.zipped(zips.state()), "put together"),
        (zips.saved([torch.ones(1)]), "no dictionary"),
        (zips.saved(torch.ones(1)), "no dictionary"),
        (zips.saved({"weights": example()}), "not a tensor but dict"),
        (zips.saved({"model": example(), "x": torch.ones(1)}), "tensor model: is not a tensor but dict"),
        (zips.saved({"model": example(), "state_dict": example()}), "holds model and state_dict, each of which"),
        (zips.saved({"model": {"model": {"model": {"model": example()}}}}), "not a tensor but dict"),
        (zips.saved({"x": 1}), "not a tensor but int"),
        (zips.saved({"x": None}), "not a tensor but NoneType"),
    ],
)
def test_told_apart(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(errors.FormatError, match=message) as caught:
        zips.read(tmp_path / "x.pth", data)
    assert caught.value.file == str(tmp_path / "x.pth")


@pytest.mark.parametrize("name", ["model", "state_dict", "module"])
def test_a_dictionary_in_another_is_the_model(tmp_path: Path, name: str) -> None:
    """As training loops save it, beside what is of no use here; in one more, and in Parameters too."""
    beside = {"step": 3, "note": "x", "optimizer": {"lr": [0.1, None]}}
    parameters = {key: torch.nn.Parameter(tensor) for key, tensor in example().items()}
    for value in ({name: example()}, {**beside, name: example()}, {"state_dict": {name: example(), **beside}}):
        assert_same(zips.read(tmp_path / "x.pth", zips.saved(value)), example())
    assert_same(zips.read(tmp_path / "x.pth", zips.saved({name: OrderedDict(parameters)})), example())


def test_a_tensor_may_bear_a_wrappers_name(tmp_path: Path) -> None:
    tensors = {"model": torch.ones(2), "module": torch.ones(3)}
    assert_same(zips.read(tmp_path / "x.pth", zips.saved(tensors)), tensors)


def test_a_dictionary_in_itself_ends(tmp_path: Path) -> None:
    endless: dict[str, object] = {}
    endless["model"] = endless
    with pytest.raises(errors.FormatError, match="tensor model: is not a tensor but dict"):
        zips.read(tmp_path / "x.pth", zips.saved(endless))


def test_checkpoint_with_an_optimizer_names_what_is_odd(tmp_path: Path) -> None:
    with pytest.raises(errors.FormatError, match=r"tensor x: is not a tensor"):
        zips.read(tmp_path / "x.pth", zips.saved({"x": {"lr": 0.1}}))


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed(tmp_path: Path, compression: int) -> None:
    data = zips.zipped(zips.state(x=zips.tensor(zips.storage(), 0, (6,), (1,))), {"0": bytes(24)}, compression)
    with pytest.raises(errors.FormatError, match="compressed"):
        zips.read(tmp_path / "x.pth", data)


def test_big_endian(tmp_path: Path) -> None:
    buffer = io.BytesIO(zips.zipped(zips.state()))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(errors.FormatError, match="'big', not 'little'"):
        zips.read(tmp_path / "x.pth", buffer.getvalue())


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["archive/data/0", "archive/data.pkl"])
def test_member_twice(tmp_path: Path, name: str) -> None:
    buffer = io.BytesIO(zips.zipped(zips.state(x=zips.tensor(zips.storage(), 0, (6,), (1,))), {"0": bytes(24)}))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, b"\1" * 24)
    with pytest.raises(errors.FormatError, match="stands twice"):
        zips.read(tmp_path / "x.pth", buffer.getvalue())


@pytest.mark.parametrize("name", ["data.pkl", "evil/data.pkl", "archive/a/data.pkl"])
def test_second_pickle(tmp_path: Path, name: str) -> None:
    """Which of them is meant would depend on the reader."""
    buffer = io.BytesIO(zips.zipped(zips.state()))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr(name, zips.state())
    with pytest.raises(errors.FormatError, match=r"2 data\.pkl"):
        zips.read(tmp_path / "x.pth", buffer.getvalue())


def test_no_pickle(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x", b"")
    with pytest.raises(errors.FormatError, match=r"no data\.pkl"):
        zips.read(tmp_path / "x.pth", buffer.getvalue())


def patched(raw: bytes, name: str, field: int, form: str, value: int) -> bytes:
    """The zip with one number of a member's directory entry replaced."""
    data = bytearray(raw)
    at = data.index(b"PK\x01\x02")
    while data[at + 46 : at + 46 + len(name)] != name.encode():
        at = data.index(b"PK\x01\x02", at + 4)
    struct.pack_into(form, data, at + field, value)
    return bytes(data)


def two_storages() -> bytes:
    six = (6,)
    pickle = zips.state(
        x=zips.tensor(zips.storage(key="0"), 0, six, (1,)), y=zips.tensor(zips.storage(key="1"), 0, six, (1,))
    )
    return zips.zipped(pickle, {"0": np.arange(6, dtype="f4").tobytes(), "1": bytes(24)})


def test_overlapping_members(tmp_path: Path) -> None:
    """The trick of zip bombs: two directory entries for the same bytes."""
    raw = two_storages()
    info = {entry.filename: entry for entry in zipfile.ZipFile(io.BytesIO(raw)).infolist()}
    same = patched(raw, "archive/data/1", 42, "<L", info["archive/data/0"].header_offset)
    with pytest.raises(errors.FormatError, match="overlaps"):
        zips.read(tmp_path / "x.pth", same)
    longer = patched(patched(raw, "archive/data/0", 20, "<L", 90), "archive/data/0", 24, "<L", 90)
    with pytest.raises(errors.FormatError, match="overlaps"):
        zips.read(tmp_path / "x.pth", longer)


@pytest.mark.parametrize("where", [1, 1 << 20, 0xFFFFFFFE, 0xFFFFFFFF])
def test_member_in_the_wild(tmp_path: Path, where: int) -> None:
    with pytest.raises(errors.FormatError):
        zips.read(tmp_path / "x.pth", patched(two_storages(), "archive/data/0", 42, "<L", where))


@pytest.mark.parametrize("size", [0, 23, 25, 1 << 30, 0xFFFFFFFE, 0xFFFFFFFF])
def test_member_of_wild_size(tmp_path: Path, size: int) -> None:
    raw = patched(patched(two_storages(), "archive/data/1", 20, "<L", size), "archive/data/1", 24, "<L", size)
    with pytest.raises(errors.FormatError):
        zips.read(tmp_path / "x.pth", raw)


@pytest.mark.parametrize(
    ("storage", "offset", "shape", "strides"),
    [
        (zips.storage(), -1, (2,), (1,)),
        (zips.storage(), 0, (-2,), (1,)),
        (zips.storage(), 0, (2,), (-1,)),
        (zips.storage(), 5, (2,), (-1,)),
        (zips.storage(), 0, (7,), (1,)),
        (zips.storage(), 1, (6,), (1,)),
        (zips.storage(), 6, (1,), (1,)),
        (zips.storage(), 0, (2, 3), (4, 1)),
        (zips.storage(), 0, (2,), (1 << 62,)),
        (zips.storage(), 1 << 62, (1,), (1,)),
        (zips.storage(), 0, (1 << 40, 1 << 40), (0, 0)),
        (zips.storage(), 0, (1 << 62,) * 60, (0,) * 60),
        (zips.storage(), 0, (1 << 25,), (0,)),
        (zips.storage(), 0, (2, 3), (1,)),
        (zips.storage(), 0, (), (1,)),
        (zips.storage(numel=5), 0, (5,), (1,)),
        (zips.storage(numel=7), 0, (6,), (1,)),
        (zips.storage(numel=1 << 62), 0, (6,), (1,)),
        (zips.storage("HalfStorage"), 0, (6,), (1,)),
        (zips.storage("DoubleStorage", numel=6), 0, (6,), (1,)),
        (zips.storage(key="1"), 0, (6,), (1,)),
        (zips.storage(key="../data/0"), 0, (6,), (1,)),
        (zips.storage(key=""), 0, (6,), (1,)),
    ],
)
def test_wild_tensors(tmp_path: Path, storage: bytes, offset: int, shape: object, strides: object) -> None:
    data = zips.zipped(zips.state(weight=zips.tensor(storage, offset, shape, strides)), {"0": bytes(24)})
    with pytest.raises(errors.FormatError) as caught:
        zips.read(tmp_path / "x.pth", data)
    assert caught.value.tensor == "weight"
    assert caught.value.file == str(tmp_path / "x.pth")


def test_hand_made_strides_read_as_torch_reads_them(tmp_path: Path) -> None:
    floats = np.random.default_rng(0).random(24, "f4")
    chance = random.Random(0)
    for _ in range(300):
        shape = tuple(chance.randrange(0, 5) for _ in range(chance.randrange(4)))
        strides = tuple(chance.randrange(0, 6) for _ in shape)
        offset = chance.randrange(8)
        if 0 not in shape and offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= 24:
            continue
        data = zips.zipped(
            zips.state(x=zips.tensor(zips.storage(numel=24), offset, shape, strides)), {"0": floats.tobytes()}
        )
        expected = torch.load(io.BytesIO(data), weights_only=True)["x"]
        assert torch.equal(zips.read(tmp_path / "x.pth", data)["x"], expected)


def test_bombs(tmp_path: Path) -> None:
    """Small claims of large things are refused before memory is asked for."""
    for name, size in (("archive/data.pkl", 5 << 20), ("archive/byteorder", 17)):
        buffer = io.BytesIO(b"" if name.endswith("pkl") else zips.zipped(zips.state()))
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr(name, bytes(size))
        with pytest.raises(errors.FormatError, match=f"{name} claims {size} bytes"):
            read_header(zips.write(tmp_path / "x.pth", buffer.getvalue()))


def test_unsafe_pickle_is_refused_in_its_file(tmp_path: Path) -> None:
    with pytest.raises(errors.UnsafeError, match=r"posix\.system") as caught:
        zips.read(tmp_path / "x.pth", zips.zipped(b"\x80\x02cposix\nsystem\nX\x04\x00\x00\x00true\x85R."))
    assert caught.value.file == str(tmp_path / "x.pth")
