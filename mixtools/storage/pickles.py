"""The pickle inside a .pth file, run by a machine that knows a dozen values and calls nothing.

torch.load's own `weights_only` has been bypassed (CVE-2025-32434, CVE-2026-24747), so no unpickler of
Python's runs here: `pickletools` tells the opcodes, and the machine below builds descriptions of tensors.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from ..errors import FormatError, UnsafeError
from .dtypes import DType

STORAGES = {
    "DoubleStorage": DType.F64, "FloatStorage": DType.F32, "HalfStorage": DType.F16, "BFloat16Storage": DType.BF16,
    "LongStorage": DType.I64, "IntStorage": DType.I32, "ShortStorage": DType.I16, "CharStorage": DType.I8,
    "ByteStorage": DType.U8, "BoolStorage": DType.BOOL,
}  # fmt: skip
_STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
_REBUILD = "torch._utils _rebuild_tensor_v2"
_PARAMETER = "torch._utils _rebuild_parameter"
_ORDERED_DICT = "collections OrderedDict"
_FUNCTIONS = (_REBUILD, _PARAMETER, _ORDERED_DICT)


class StorageRef(NamedTuple):
    """A persistent id: the zip member data/<key> holds `numel` elements."""

    dtype: DType
    key: str
    numel: int


class TensorRef(NamedTuple):
    """A view of a storage; offset and strides in elements, not yet checked against its size."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Global(NamedTuple):
    name: str


_MARK = object()
_PUSHES = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_OPCODES = {opcode.code: opcode for opcode in pickletools.opcodes}
_KNOWN = {
    *_PUSHES, *_CONSTANTS, *_TUPLES, "PROTO", "FRAME", "STOP", "MARK", "TUPLE", "GLOBAL", "STACK_GLOBAL", "REDUCE",
    "BUILD", "BINPERSID", "BINGET", "LONG_BINGET", "BINPUT", "LONG_BINPUT", "MEMOIZE", "SETITEM", "SETITEMS",
    "APPEND", "APPENDS",
}  # fmt: skip


def load(data: bytes, file: str) -> Any:
    """What the pickle describes: dicts, lists, numbers, strings, TensorRefs.

    Raises UnsafeError if it names or calls anything else, FormatError if it is malformed.
    """
    try:
        return _Machine(file).run(data)
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise FormatError(
            f"data.pkl is not a well-formed pickle ({type(error).__name__}: {error})", file=file
        ) from None


class _Machine:
    def __init__(self, file: str) -> None:
        self.file = file
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        while code := stream.read(1):
            opcode = _OPCODES.get(code.decode("latin-1"))
            if opcode is None:
                raise ValueError(f"no opcode {code!r}")
            if opcode.name not in _KNOWN:
                why = f"its pickle uses {opcode.name}, which no checkpoint needs; not loaded"
                raise UnsafeError(why, file=self.file)
            argument = _argument(opcode, stream)
            if opcode.name == "STOP":
                return self.stack.pop()
            self._step(opcode.name, argument)
        raise ValueError("no STOP")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHES:
            stack.append(self._short(argument))
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name == "MARK":
            stack.append(_MARK)
        elif name in _TUPLES:
            stack.append(tuple([stack.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name == "TUPLE":
            stack.append(tuple(self._to_mark()))
        elif name == "GLOBAL":
            stack.append(self._global(argument))
        elif name == "STACK_GLOBAL":
            attribute, module = self._expect(stack.pop(), str), self._expect(stack.pop(), str)
            stack.append(self._global(f"{module} {attribute}"))
        elif name == "BINPERSID":
            stack.append(self._storage(stack.pop()))
        elif name not in ("PROTO", "FRAME"):
            self._combine(name)

    def _combine(self, name: str) -> None:
        """Opcodes that put values into others."""
        stack = self.stack
        if name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self._call(function, arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = self._to_mark() if name == "SETITEMS" else [stack.pop(-2), stack.pop()]
            self._fill(self._expect(stack[-1], dict), list(zip(items[::2], items[1::2], strict=True)))
        elif name in ("APPEND", "APPENDS"):
            values = self._to_mark() if name == "APPENDS" else [stack.pop()]
            self._expect(stack[-1], list).extend(values)
        else:  # BUILD, of a state_dict's `_metadata`: versions of modules, of no use here
            self._expect(stack.pop(), dict)
            self._expect(stack[-1], OrderedDict)

    def _to_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _fill(self, target: dict[Any, Any], items: Iterable[Sequence[Any]]) -> None:
        for key, value in items:
            if not isinstance(key, str):  # anything else can be made to take for ever to hash
                raise ValueError(f"a {type(key).__name__} as a key")
            if key in target:
                raise FormatError("stands twice in the pickle", file=self.file, tensor=key)
            target[key] = value

    def _short(self, argument: str | float) -> str | float:
        if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
            raise ValueError("a number of more than 64 bits")  # to multiply or print a huge one takes hours
        return argument

    def _expect(self, value: Any, kind: type) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"a {kind.__name__} was expected, not {type(value).__name__}")
        return value

    def _global(self, name: str) -> _Global:
        module, _, attribute = name.partition(" ")
        if name in _FUNCTIONS or (module == "torch" and attribute in STORAGES):
            return _Global(name)
        raise UnsafeError(f"its pickle asks for {module}.{attribute}; not loaded", file=self.file)

    def _storage(self, identity: Any) -> StorageRef:
        kind, storage, key, _device, numel = self._expect(identity, tuple)
        if kind != "storage" or not isinstance(storage, _Global) or not storage.name.startswith("torch "):
            raise ValueError("a persistent id is no storage")
        if not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise ValueError("a storage has no key and size")
        return StorageRef(STORAGES[storage.name.split()[1]], key, numel)

    def _call(self, function: Any, arguments: Any) -> Any:
        # never repr() a value here: a small pickle describes one whose text fills any memory
        if not isinstance(function, _Global) or function.name not in _FUNCTIONS:
            what = function.name if isinstance(function, _Global) else f"a {type(function).__name__}"
            raise UnsafeError(f"its pickle calls {what}; not loaded", file=self.file)
        self._expect(arguments, tuple)
        if function.name == _ORDERED_DICT:
            found: OrderedDict[Any, Any] = OrderedDict()
            for pairs in arguments:
                self._fill(found, self._expect(pairs, list))
            return found
        if function.name == _PARAMETER:  # (tensor, requires_grad, hooks): a tensor, for whoever only reads it
            tensor, requires_grad, hooks = arguments
            self._expect(requires_grad, bool), self._expect(hooks, OrderedDict)
            return self._expect(tensor, TensorRef)
        storage, offset, shape, strides = arguments[:4]
        numbers = (offset, *self._expect(shape, tuple), *self._expect(strides, tuple))
        if not isinstance(storage, StorageRef) or not all(type(n) is int for n in numbers):
            raise ValueError("a tensor is not made of a storage, an offset, a shape and strides")
        return TensorRef(storage, offset, shape, strides)


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.name != "GLOBAL":
        return opcode.arg.reader(stream) if opcode.arg else None
    module, name = stream.readline(), stream.readline()  # pickletools would undo escapes, which no unpickler does
    if not name.endswith(b"\n"):
        raise ValueError("a name is cut off")
    return f"{module[:-1].decode()} {name[:-1].decode()}"


def dump(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """The pickle of {name: tensor}, tensor i whole and contiguous in storage i (protocol 2, no memo).

    Raises FormatError for a block type, which torch does not know.
    """
    out = [b"\x80\x02}("]
    for index, (name, dtype, shape) in enumerate(tensors):
        if dtype not in _STORAGE_NAMES:
            raise FormatError(f"torch has no {dtype.value}", tensor=name)
        numel = 1
        strides: list[int] = []
        for n in reversed(shape):
            strides.insert(0, numel)
            numel *= n
        out += [_text(name), b"ctorch._utils\n_rebuild_tensor_v2\n((", _text("storage")]
        out += [f"ctorch\n{_STORAGE_NAMES[dtype]}\n".encode(), _text(str(index)), _text("cpu"), _int(numel), b"tQ"]
        out += [_int(0), b"(", *map(_int, shape), b"t(", *map(_int, strides), b"t\x89"]
        out += [b"ccollections\nOrderedDict\n)RtR"]
    return b"".join([*out, b"u."])


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def _int(value: int) -> bytes:
    if value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw
