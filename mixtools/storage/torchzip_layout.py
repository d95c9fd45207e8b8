"""Where everything lies in a zip that torch.load reads, before its data exists."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from . import pickles
from .dtypes import DType
from .torchzip import ALIGNMENT, CENTRAL, END, END64, FULL, FULL_SHORT, LOCAL, LOCATOR64

_PADDING_ID = 0x4246  # extra field that torch itself uses to align members
_DOS_DATE = (1 << 5) | 1  # 1 January 1980: no clock in the output


class _Member(NamedTuple):
    name: bytes
    header: int  # offset of the local header
    data: int  # offset of the data
    size: int


class ZipPlan:
    """Members of a torch zip holding `tensors`, each in a storage of its own, and their offsets."""

    def __init__(self, root: str, tensors: Sequence[tuple[str, DType, tuple[int, ...]]]) -> None:
        self._names = [name for name, _, _ in tensors]
        self._small = {
            "data.pkl": pickles.dump(tensors),
            "byteorder": b"little",
            "version": b"3\n",
        }
        sizes = [dtype.nbytes(shape) for _, dtype, shape in tensors]
        self._members: list[_Member] = []
        at = 0
        for name, size in [
            ("data.pkl", len(self._small["data.pkl"])),
            ("byteorder", len(self._small["byteorder"])),
            *((f"data/{i}", size) for i, size in enumerate(sizes)),
            ("version", len(self._small["version"])),
        ]:
            member = _place(f"{root}/{name}".encode(), at, size)
            self._members.append(member)
            at = member.data + size
        self._directory = at
        self.offsets = [member.data for member in self._members[2:-1]]
        self.size = at + len(self._ending([0] * len(self._members)))

    def seal(self, crcs: Mapping[str, int]) -> list[tuple[int, bytes]]:
        """Headers, small members and directory, with the CRC of each tensor in them."""
        small = {name: zlib.crc32(data) for name, data in self._small.items()}
        ordered = [small["data.pkl"], small["byteorder"], *(crcs[name] for name in self._names), small["version"]]
        patches = [
            (member.header, _local_header(member, crc)) for member, crc in zip(self._members, ordered, strict=True)
        ]
        edges = (self._members[0], self._members[1], self._members[-1])
        patches += [(member.data, data) for member, data in zip(edges, self._small.values(), strict=True)]
        return [*patches, (self._directory, self._ending(ordered))]

    def _ending(self, crcs: Sequence[int]) -> bytes:
        directory = b"".join(_central_header(m, crc) for m, crc in zip(self._members, crcs, strict=True))
        count, end = len(self._members), self._directory + len(directory)
        end64 = END64.pack(
            b"PK\x06\x06", END64.size - 12, 45, 45, 0, 0, count, count, len(directory), self._directory
        )  # fmt: skip
        locator = LOCATOR64.pack(b"PK\x06\x07", 0, end, 1)
        last = END.pack(b"PK\x05\x06", 0, 0, FULL_SHORT, FULL_SHORT, FULL, FULL, 0)
        return directory + end64 + locator + last


def _place(name: bytes, header: int, size: int) -> _Member:
    bare = header + LOCAL.size + len(name) + 20 + 4  # Zip64 field, then the head of the padding field
    return _Member(name, header, bare + -bare % ALIGNMENT, size)


def _local_header(member: _Member, crc: int) -> bytes:
    wide = struct.pack("<2H2Q", 1, 16, member.size, member.size)
    padding = member.data - member.header - LOCAL.size - len(member.name) - len(wide) - 4
    extra = wide + struct.pack("<2H", _PADDING_ID, padding) + b"Z" * padding
    fixed = LOCAL.pack(
        b"PK\x03\x04", 45, 0, 0, 0, _DOS_DATE, crc, FULL, FULL, len(member.name), len(extra)
    )  # fmt: skip
    return fixed + member.name + extra


def _central_header(member: _Member, crc: int) -> bytes:
    extra = struct.pack("<2H3Q", 1, 24, member.size, member.size, member.header)
    fixed = CENTRAL.pack(
        b"PK\x01\x02", 45, 45, 0, 0, 0, _DOS_DATE, crc, FULL, FULL,
        len(member.name), len(extra), 0, 0, 0, 0, FULL,
    )  # fmt: skip
    return fixed + member.name + extra
