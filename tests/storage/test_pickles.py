"""The pickle machine against real pickles, and against those that want to run code or fill the memory."""

from __future__ import annotations

import builtins
import collections
import contextlib
import io
import os
import pickle
import random
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from storage import zips

from mixtools import errors
from mixtools.storage import pickles
from mixtools.storage.dtypes import ELEMENTS, DType

FILE = "evil.pth"


class Call:
    """Pickles to a call of anything."""

    def __init__(self, function: object, *arguments: object, state: object = None) -> None:
        self.parts = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.parts


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


MODULE, NAME = text("os"), text("system")
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
BY_HAND = {
    "GLOBAL": b"\x80\x02cos\nsystem\n(" + text("true") + b"tR.",
    "GLOBAL alone": b"\x80\x02cos\nsystem\n.",
    "STACK_GLOBAL": b"\x80\x04" + MODULE + NAME + b"\x93(" + text("true") + b"tR.",
    "INST": b"(" + text("true") + b"ios\nsystem\n.",
    "OBJ": b"(cos\nsystem\n" + text("true") + b"o.",
    "OBJ of allowed class": b"(ccollections\nOrderedDict\no.",
    "NEWOBJ": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "NEWOBJ_EX": b"\x80\x04ccollections\nOrderedDict\n)}\x92.",
    "EXT1": b"\x80\x02\x82\x01.",
    "EXT2": b"\x80\x02\x83\x01\x00.",
    "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
    "PERSID": b"Pstorage\n.",
    "getattr": b"cbuiltins\ngetattr\n(cos\n__dict__\n" + NAME + b"tR.",
    "dotted name": b"\x80\x04" + text("torch") + text("FloatStorage.__init__") + b"\x93.",
    "dotted module": b"ctorch.serialization.os\nsystem\n.",
    "os through torch": b"ctorch._utils\nos\n.",
    "storage of another module": b"cos\nFloatStorage\n.",
    "blank in the module": b"ctorch._utils _rebuild_tensor_v2\n\n.",
    "rebuild by another name": b"ctorch._utils\n_rebuild_tensor\n.",
    "parameter with a state": b"ctorch._utils\n_rebuild_parameter_with_state\n.",
    "call in a parameter": PARAMETER + b"(cos\nsystem\n" + text("true") + b"\x85R\x88}tR.",
    "typed storage": b"ctorch.storage\n_load_from_bytes\n.",
    "memo of a function": b"\x80\x02cos\nsystem\nq\x000h\x00" + text("true") + b"\x85R.",
    "string called": text("collections OrderedDict") + b"\x85)R.",
    "storage called": b"ctorch\nFloatStorage\n)R.",
    "number called": b"K\x01)R.",
    "bytearray": b"\x80\x05\x96\x01\x00\x00\x00\x00\x00\x00\x00x.",
    "set": b"\x80\x04\x8f.",
    "next buffer": b"\x80\x05\x97.",
    "STRING": b"S'os'\n.",
    "BINSTRING": b"U\x02os.",
    "hidden behind a tensor": b"\x80\x02}" + text("a") + b"cposix\nsystem\n" + text("true") + b"\x85Rs.",
}


@pytest.mark.parametrize("data", BY_HAND.values(), ids=BY_HAND)
def test_refuses_to_run_code(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[object] = []
    monkeypatch.setattr(os, "system", called.append)
    with pytest.raises(errors.UnsafeError) as caught:
        pickles.load(data, FILE)
    assert caught.value.file == FILE
    assert called == []


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(
    "function",
    [os.system, eval, exec, getattr, subprocess.Popen, builtins.open, torch.load, torch.jit.load],
    ids=lambda function: f"{function.__module__}.{function.__qualname__}",  # no address: the same name in every run
)
def test_refuses_calls_in_every_protocol(function: object, protocol: int) -> None:
    """Pickles by Python's own pickler; BUILD with a state included."""
    for value in (Call(function, "true"), {"a": Call(function, "true")}, Call(dict, state={"x": 1})):
        with pytest.raises(errors.UnsafeError):
            pickles.load(pickle.dumps(value, protocol), FILE)


ONE = zips.tensor(zips.storage(), 0, (6,), (1,))
HOOKS = b"\x88ccollections\nOrderedDict\n)R"  # requires_grad, and no hook
MALFORMED = {
    "empty": b"", "no STOP": b"\x80\x02}", "only STOP": b".", "stack underflow": b"a.", "no mark": b"t.",
    "unknown memo": b"h\x07.", "unknown opcode": b"\xff.", "cut text": b"X\xff\xff\x00\x00a.",
    "not UTF-8": b"X\x02\x00\x00\x00\xff\xfe.", "odd items": b"}(K\x01u.", "item of a list": b"](K\x01K\x02u.",
    "append to a dict": b"}K\x01a.", "list as a key": b"}]K\x01s.", "number as a key": b"}K\x01K\x01s.",
    "huge number": b"\x8b\x00\x00\x01\x00" + b"\x7f" * 65536 + b".",
    "number of 65 bits": b"\x8a\x09" + b"\xff" * 8 + b"\x7f.",
    "BUILD on a dict": b"}}b.", "BUILD with a list": b"ccollections\nOrderedDict\n)R]b.",
    "BUILD on a storage": zips.storage() + b"}b.",
    "BUILD on a class": b"ctorch\nFloatStorage\n}b.",
    "OrderedDict of text": b"ccollections\nOrderedDict\n" + text("ab") + b"\x85R.",
    "OrderedDict of no tuple": b"ccollections\nOrderedDict\n]R.",
    "STACK_GLOBAL of numbers": b"\x80\x04K\x01K\x02\x93.",
    "persistent number": b"K\x01Q.", "persistent text": text("12345") + b"Q.", "persistent dict": b"}Q.",
    "persistent id of four": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"tQ.",
    "storage of another kind": b"(" + text("module") + b"ctorch\nFloatStorage\n" + text("0") * 2 + b"K\x06tQ.",
    "storage of no class": b"(" + text("storage") + b"ccollections\nOrderedDict\n" + text("0") * 2 + b"K\x06tQ.",
    "storage by its name": b"(" + text("storage") + text("torch FloatStorage") * 3 + b"K\x06tQ.",
    "storage key a number": zips.storage(key=0) + b".", "negative size": zips.storage(numel=-1) + b".",
    "size a float": zips.storage(numel=1.5) + b".", "size true": zips.storage(numel=True) + b".",
    "rebuild of nothing": b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "rebuild of a list": b"ctorch._utils\n_rebuild_tensor_v2\n]R.",
    "rebuild of text": zips.tensor(text("x"), 0, (1,), (1,)) + b".",
    "parameter of nothing": PARAMETER + b")R.", "parameter of text": PARAMETER + b"(" + text("x") + HOOKS + b"tR.",
    "parameter of a storage": PARAMETER + b"(" + zips.storage() + HOOKS + b"tR.",
    "parameter alone": PARAMETER + b"(" + ONE + b"tR.",
    "parameter's grad a number": PARAMETER + b"(" + ONE + b"K\x01" + HOOKS[1:] + b"tR.",
    "parameter's hooks a dict": PARAMETER + b"(" + ONE + b"\x88}tR.",
    "offset a float": zips.tensor(zips.storage(), 0.0, (1,), (1,)) + b".",
    "offset true": zips.tensor(zips.storage(), True, (1,), (1,)) + b".",
    "shape text": zips.tensor(zips.storage(), 0, "6", (1,)) + b".",
    "shape a number": zips.tensor(zips.storage(), 0, 6, (1,)) + b".",
    "shape of text": zips.tensor(zips.storage(), 0, ("6",), (1,)) + b".",
    "shape of tuples": zips.tensor(zips.storage(), 0, ((6,),), (1,)) + b".",
    "strides None": zips.tensor(zips.storage(), 0, (6,), None) + b".",
}  # fmt: skip


@pytest.mark.parametrize("data", MALFORMED.values(), ids=MALFORMED)
def test_refuses_the_malformed(data: bytes) -> None:
    with pytest.raises(errors.FormatError) as caught:
        pickles.load(data, FILE)
    assert caught.value.file == FILE


def test_a_name_twice() -> None:
    one = zips.tensor(zips.storage(), 0, (6,), (1,))
    data = b"\x80\x02}(" + (text("w") + one) * 2 + b"u."
    with pytest.raises(errors.FormatError, match="stands twice") as caught:
        pickles.load(data, FILE)
    assert caught.value.tensor == "w"


DOUBLED = b"K\x01" + b"".join(b"q%cq\x00h\x00\x86" % i for i in range(1, 100))  # t = (t, t), 99 times over
NESTED = b")" + b"\x85" * 200_000
BOMBS = {
    "as a name": b"\x80\x04" + DOUBLED + text("x") + b"\x93.",
    "as a module": b"\x80\x04" + text("x") + DOUBLED + b"\x93.",
    "as a key": b"}" + DOUBLED + b"K\x01s.",
    "as a key of OrderedDict": b"ccollections\nOrderedDict\n](" + DOUBLED + b"K\x01\x86e\x85R.",
    "as a persistent id": DOUBLED + b"Q.",
    "as a key of a storage": b"(" + text("storage") + b"ctorch\nFloatStorage\n" + DOUBLED + text("cpu") + b"K\x01tQ.",
    "as a kind": b"(" + DOUBLED + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x01tQ.",
    "as a function": DOUBLED + b")R.",
    "as arguments": b"ctorch._utils\n_rebuild_tensor_v2\n" + DOUBLED + b"R.",
    "as a shape": zips.tensor(zips.storage(), 0, zips.Raw(DOUBLED), (1,)) + b".",
    "nested name": b"\x80\x04" + NESTED + text("x") + b"\x93.",
    "nested key": b"}" + NESTED + b"K\x01s.",
    "nested id": NESTED + b"Q.",
    "nested function": NESTED + b")R.",
    "list in itself as an id": b"]q\x00h\x00aQ.",
    "marks": b"(" * 500_000 + b"t" * 500_000 + b"R.",
    "deep stack": b"N" * 500_000 + b"(t" * 200_000 + b"R.",
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_bombs(data: bytes) -> None:
    """A hundred bytes describe a value whose text or hash would take longer than the universe: never asked for."""
    with pytest.raises((errors.FormatError, errors.UnsafeError)) as caught:
        pickles.load(data, FILE)
    assert len(str(caught.value)) < 300


def test_reads_what_torch_wrote() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    for value in (module.state_dict(), dict(module.state_dict()), collections.OrderedDict(module.state_dict())):
        for protocol in range(2, 6):
            raw = zipfile.ZipFile(io.BytesIO(zips.saved(value, pickle_protocol=protocol))).read("archive/data.pkl")
            found = pickles.load(raw, FILE)
            assert list(found) == list(value)
            for name, tensor in value.items():
                assert found[name].shape == tuple(tensor.shape)
                assert found[name].strides == tensor.stride()
                assert found[name].storage.dtype is DType.F32
                assert found[name].storage.numel == tensor.numel()


def test_ordered_dict_as_python_2_pickled_it() -> None:
    data = (
        b"\x80\x02ccollections\nOrderedDict\n]("
        + b"]("
        + text("a")
        + b"K\x01e"
        + b"]("
        + text("b")
        + b"K\x02e"
        + b"e\x85R."
    )
    assert pickle.loads(data) == {"a": 1, "b": 2}  # the oracle agrees that this is a dictionary
    assert pickles.load(data, FILE) == {"a": 1, "b": 2}


def test_parameters_are_their_tensors() -> None:
    """As a dictionary of Parameters is saved; torch's own weights_only takes the same function."""
    tensors = {"w": torch.ones(2, 3), "b": torch.ones(4).half()}
    for grad in (True, False):
        saved = {name: torch.nn.Parameter(tensor, requires_grad=grad) for name, tensor in tensors.items()}
        for protocol in range(2, 6):
            raw = zips.saved(saved, pickle_protocol=protocol)
            if protocol == 2:  # the one that torch reads without a warning
                assert torch.load(io.BytesIO(raw), weights_only=True).keys() == tensors.keys()
            found = pickles.load(zipfile.ZipFile(io.BytesIO(raw)).read("archive/data.pkl"), FILE)
            assert b"_rebuild_parameter" in raw
            assert {name: (t.shape, t.storage.dtype) for name, t in found.items()} == {
                "w": ((2, 3), DType.F32), "b": ((4,), DType.F16),
            }  # fmt: skip


def test_a_parameter_with_a_state_is_refused() -> None:
    """Its Python attributes come along by a function that is not on the list."""
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.note = "x"
    raw = zipfile.ZipFile(io.BytesIO(zips.saved({"w": parameter}))).read("archive/data.pkl")
    with pytest.raises(errors.UnsafeError, match=r"torch\._utils\._rebuild_parameter_with_state"):
        pickles.load(raw, FILE)


DUMPED = st.lists(
    st.tuples(st.sampled_from(ELEMENTS), st.lists(st.integers(0, 5), max_size=4)), max_size=8
)  # fmt: skip


@given(DUMPED)
def test_dump_is_read_by_torch(tensors: list[tuple[DType, list[int]]]) -> None:
    named = [(f"a.{i}é", dtype, tuple(shape)) for i, (dtype, shape) in enumerate(tensors)]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in named]
    storages = {str(i): bytes(size) for i, size in enumerate(sizes)}
    raw = zips.zipped(pickles.dump(named), storages)
    found = torch.load(io.BytesIO(raw), weights_only=True)
    assert {name: (str(t.dtype), tuple(t.shape)) for name, t in found.items()} == {
        name: (f"torch.{dtype.torch_name}", shape) for name, dtype, shape in named
    }
    assert all(tensor.is_contiguous() for tensor in found.values())


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31, 2**32, 2**40, 2**62])
def test_dump_of_large_numbers(numel: int) -> None:
    found = pickles.load(pickles.dump([("x", DType.BF16, (numel,))]), FILE)
    assert found["x"] == pickles.TensorRef(pickles.StorageRef(DType.BF16, "0", numel), 0, (numel,), (1,))
    assert any(
        argument == numel for _, argument, _ in pickles.pickletools.genops(pickles.dump([("x", DType.U8, (numel,))]))
    )


def test_mutations_raise_only_our_errors(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
    chance = random.Random(0)
    for protocol in (2, 4):
        raw = zipfile.ZipFile(io.BytesIO(zips.saved(module.state_dict(), pickle_protocol=protocol))).read(
            "archive/data.pkl"
        )
        for _ in range(3000):
            data = bytearray(raw)
            for _ in range(chance.randrange(1, 4)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            stop = chance.choice((len(data), chance.randrange(len(data))))
            with contextlib.suppress(errors.FormatError, errors.UnsafeError):
                pickles.load(bytes(data[:stop]), FILE)


@pytest.mark.parametrize("number", [-1, -63, -1000, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1])
def test_numbers_of_up_to_64_bits_are_read(number: int) -> None:
    data = pickle.dumps({"x": number}, protocol=2)
    if -(2**63) <= number < 2**63:
        assert pickles.load(data, FILE) == {"x": number}
        return
    with pytest.raises(errors.FormatError, match="more than 64 bits"):
        pickles.load(data, FILE)
