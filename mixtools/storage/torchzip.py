"""torch.save's zip files: a directory, one pickle, and one stored member for each storage.

Read by offset without loading the file; written with planned offsets. Zip format: PKWARE's APPNOTE 6.3.9,
sections 4.3 and 4.5.3 (Zip64). torch.load accepts a flipped data bit; here each member's CRC is carried
along to the Store, which checks it while reading.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterable
from typing import NamedTuple

from ..errors import ChecksumError, FormatError, MixtoolsError
from . import lfs, pickles
from .source import Source
from .store import Entry, Record

LOCAL = struct.Struct("<4s5H3L2H")
CENTRAL = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR64 = struct.Struct("<4sLQL")
FULL, FULL_SHORT = 0xFFFFFFFF, 0xFFFF  # "look into the Zip64 field"
ALIGNMENT = 64
_MAX_DIRECTORY = 8 << 20  # 8x22B needs 0.3 MB of each; what is larger only costs memory and time
_MAX_PICKLE = 4 << 20
_WRAPPERS = ("model", "state_dict", "module")  # under which training loops keep the model's own dictionary
_MOST_WRAPPERS = 3
_MAX_EXPANDED = 64 << 20  # bytes of a tensor that repeats elements of its storage (stride 0)
_LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # first pickle of torch.save before 1.6


class Member(NamedTuple):
    """A stored member of a zip: where its data lies, and its CRC-32."""

    name: str
    offset: int
    size: int
    crc: int


def read_header(source: Source) -> list[Entry]:
    """The tensors of one .pth, .pt or .bin file.

    Raises FormatError if it is no such zip or is damaged, UnsafeError if its pickle wants to run code,
    ChecksumError later, when a storage is read.
    """
    members = read_directory(source)
    pickle_names = [name for name in members if name == "data.pkl" or name.endswith("/data.pkl")]
    if len(pickle_names) != 1:
        raise FormatError(f"is a zip, but holds {len(pickle_names) or 'no'} data.pkl", file=source.label)
    pickle_name = pickle_names[0]
    root = pickle_name.removesuffix("data.pkl")
    _expect_little_endian(source, members.get(root + "byteorder"))
    state = pickles.load(_checked(source, members[pickle_name], _MAX_PICKLE), source.label)
    if not isinstance(state, dict):
        raise FormatError("holds no dictionary of named tensors", file=source.label)
    state = _unwrap(state, source)
    return [_entry(name, tensor, root, members, source) for name, tensor in state.items()]


def _unwrap(state: dict[str, object], source: Source) -> dict[str, object]:
    """The state_dict that a training loop laid into another dictionary, beside its step, its arguments and the like."""
    for _ in range(_MOST_WRAPPERS):  # a dictionary may hold itself
        if any(isinstance(value, pickles.TensorRef) for value in state.values()):
            break
        inner = {name: value for name in _WRAPPERS if isinstance(value := state.get(name), dict)}
        if len(inner) > 1:
            why = f"holds {' and '.join(inner)}, each of which may be the model; save one alone"
            raise FormatError(why, file=source.label)
        if not inner:
            break
        (state,) = inner.values()
    return state


def read_directory(source: Source) -> dict[str, Member]:
    """The members of a zip by name. Raises FormatError for anything but an intact, uncompressed zip."""
    count, size, offset = _find_directory(source)
    if size > _MAX_DIRECTORY:
        raise FormatError(f"zip directory claims {size} bytes", file=source.label)
    raw = source.read(offset, size)
    members: dict[str, Member] = {}
    at = 0
    try:
        for _ in range(count):
            member, length = _central(raw, at, source)
            at += length
            if member.name in members:
                raise FormatError(f"zip member {member.name} stands twice", file=source.label)
            if member.offset + member.size > offset:
                raise FormatError(f"zip member {member.name} reaches outside the data", file=source.label)
            members[member.name] = member
    except (struct.error, UnicodeDecodeError, IndexError):
        raise FormatError("zip directory is malformed", file=source.label) from None
    if at != size:
        raise FormatError("zip directory is malformed", file=source.label)
    _expect_disjoint(members.values(), source)
    return members


def _find_directory(source: Source) -> tuple[int, int, int]:
    """Entries, size and offset of the central directory."""
    tail_start = max(0, source.size - END.size - 0xFFFF)
    tail = source.read(tail_start, source.size - tail_start)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + END.size > len(tail):
        raise _not_a_zip(source)
    _, _, _, _, count, size, offset, comment = END.unpack_from(tail, at)
    if at + END.size + comment != len(tail):
        raise FormatError("has bytes behind the end of the zip", file=source.label)
    end = tail_start + at
    if end >= LOCATOR64.size:
        magic, _, where, _ = LOCATOR64.unpack(source.read(end - LOCATOR64.size, LOCATOR64.size))
        if magic == b"PK\x06\x07":
            end64 = END64.unpack(source.read(where, END64.size))
            if end64[0] != b"PK\x06\x06" or where + 12 + end64[1] != end - LOCATOR64.size:
                raise FormatError("Zip64 end record is damaged, or of another file", file=source.label)
            count, size, offset = end64[-3:]
            end = where
    if offset + size != end:
        raise FormatError("zip directory is not where the file says; damaged or put together", file=source.label)
    return count, size, offset


def _central(raw: bytes, at: int, source: Source) -> tuple[Member, int]:
    """One entry of the central directory, and its length."""
    fields = CENTRAL.unpack_from(raw, at)
    magic, flags, method, crc, packed, size = fields[0], fields[3], fields[4], fields[7], fields[8], fields[9]
    name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
    name_at = at + CENTRAL.size
    name = raw[name_at : name_at + name_size].decode()
    extra = raw[name_at + name_size : name_at + name_size + extra_size]
    if magic != b"PK\x01\x02" or len(extra) < extra_size:
        raise FormatError("zip directory is malformed", file=source.label)
    wide = _zip64(extra)
    size, packed, header = (wide.pop(0) if value == FULL else value for value in (size, packed, header))
    if method != 0 or flags & 1 or packed != size:
        raise FormatError(f"zip member {name} is compressed or encrypted; torch stores plainly", file=source.label)
    local = LOCAL.unpack(source.read(header, LOCAL.size))
    if local[0] != b"PK\x03\x04":
        raise FormatError(f"zip member {name} has no local header where the directory says", file=source.label)
    data = header + LOCAL.size + local[-2] + local[-1]
    return Member(name, data, size, crc), CENTRAL.size + name_size + extra_size + comment_size


def _zip64(extra: bytes) -> list[int]:
    """The 64-bit numbers of the Zip64 extra field, in their order; empty without one."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            return list(struct.unpack_from(f"<{size // 8}Q", extra, at + 4))
        at += 4 + size
    return []


def _expect_disjoint(members: Iterable[Member], source: Source) -> None:
    at = 0
    for member in sorted(members, key=lambda member: (member.offset, member.size)):
        if member.offset < at:
            raise FormatError(f"zip member {member.name} overlaps another", file=source.label)
        at = member.offset + member.size


def _not_a_zip(source: Source) -> FormatError:
    start = source.read(0, min(source.size, 64))
    lfs.refuse(start, source.label)
    if not start:
        why = "is empty"
    elif start.startswith(_LEGACY_MAGIC):
        why = "was saved by torch before 1.6 (no zip); load and save it with torch first"
    elif start.startswith(b"PK\x03\x04"):
        why = "is truncated: its zip directory, at the end, is missing; fetch it again"
    else:
        why = "is not a torch file (no zip)"
    return FormatError(why, file=source.label)


def _checked(source: Source, member: Member, limit: int) -> bytes:
    if member.size > limit:
        raise FormatError(f"{member.name} claims {member.size} bytes", file=source.label)
    raw = source.read(member.offset, member.size)
    if (found := zlib.crc32(raw)) != member.crc:
        raise ChecksumError(
            f"{member.name}: stored checksum {member.crc:08x}, read {found:08x}; the file is damaged", file=source.label
        )
    return raw


def _expect_little_endian(source: Source, member: Member | None) -> None:
    if member is not None and (order := _checked(source, member, 16)) != b"little":
        raise FormatError(f"byte order is {order.decode('ascii', 'replace')!r}, not 'little'", file=source.label)


def _entry(name: str, tensor: object, root: str, members: dict[str, Member], source: Source) -> Entry:
    def refuse(why: str) -> MixtoolsError:
        return FormatError(why, file=source.label, tensor=name)

    if not isinstance(tensor, pickles.TensorRef):
        raise refuse(f"is not a tensor but {type(tensor).__name__}")
    storage, offset, shape, strides = tensor
    member = members.get(f"{root}data/{storage.key}")
    if member is None:
        raise refuse(f"its storage {root}data/{storage.key} is missing from the zip")
    size = storage.dtype.itemsize
    if member.size != storage.numel * size:
        raise FormatError(
            "storage size differs from what the pickle says",
            file=source.label, tensor=name, expected=storage.numel * size, found=member.size,
        )  # fmt: skip
    if len(shape) != len(strides) or min((offset, *shape, *strides)) < 0:
        raise refuse(f"offset {offset}, shape {shape} and strides {strides} describe no tensor")
    last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    if 0 not in shape and last >= storage.numel:
        raise refuse(f"reaches element {last} of a storage of {storage.numel}")
    if math.prod(shape) * size > max(member.size, _MAX_EXPANDED):
        raise refuse(f"strides {strides} blow {member.size} bytes up to shape {shape}")
    record = Record(member.offset, member.size, member.crc)
    contiguous = _contiguous(shape, strides)
    where = member.offset + offset * size
    return Entry(name, storage.dtype, shape, source, where, None if contiguous else strides, record)


def _contiguous(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for n, stride in zip(reversed(shape), reversed(strides), strict=True):
        if n != 1 and stride != expected:
            return False
        expected *= n
    return True
