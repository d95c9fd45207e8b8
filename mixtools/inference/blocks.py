"""A matrix in blocks, as a GGUF stores it or made of GPTQ's, AWQ's or bitsandbytes' parts (repacked.py): it takes about
its size on disk in memory, or lies in its file, and a product reads no more.

    few rows of x ─► each row of blocks decoded in registers and multiplied with all of them (ops/multiply.py)
    many          ─► a run of rows decoded into scratch that stays in the cache, then torch's own product

Values are the format's own in fp32 where few rows go, not rounded to 16 bits before. In a product of many, whose result
is rounded to bf16, they are rounded once to it, too, where the machine multiplies that by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import LayoutError
from ..formats import Format, Ggml, Packed
from ..layouts.reader import Mapped, Reader
from ..names import Slot
from ..ops import decode, multiply  # and not as torch's operations, whose first call takes a second
from ..ops.cpu import NATIVE
from ..ops.repack import Kind, Type
from ..storage.dtypes import DType
from ..storage.store import to_tensor
from . import host, repacked

# Measured on an AMD EPYC with AVX-512 BF16 (scripts/bench/packed.py): up to so many rows of x go through registers.
FEW_ROWS = 16
RUN = 1 << 21  # values decoded at a time: 4 MB of bf16


@dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in blocks of a type that our kernels know. `data`: uint8 [out, bytes of a row], on the CPU.

    `order` [in]: which columns come one after the other in the blocks; None for all in order.
    """

    data: Tensor
    type: Type
    order: Tensor | None = None

    def product(self, x: Tensor) -> Tensor:
        """x [.., in] times the matrix, transposed -> [.., out] fp32: the sums as they are."""
        (out,) = products([(x, self)])
        return out

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..] of the matrix -> [.., in], rounded once."""
        found = self._dense(self.data[indices.flatten()], dtype)
        if self.order is not None:
            found = torch.empty_like(found).index_copy_(1, self.order, found)
        return found.view(*indices.shape, -1)

    def ordered(self, x: Tensor) -> Tensor:
        """x [.., in] -> [n, in], its columns as those of the blocks."""
        flat = x.flatten(0, -2)
        return flat if self.order is None else flat.index_select(1, self.order)

    def decoded(self, x: Tensor, rounded: bool) -> Tensor:
        """The same for x [n, in] in the blocks' order, by way of dense rows; with `rounded` the sums may have been
        rounded to x's dtype.
        """
        narrow = rounded and x.dtype == torch.bfloat16 and host.native(x.dtype)
        kind = x.dtype if narrow else torch.float32
        wide, out = x.to(kind), host.empty((len(x), len(self.data)), x.device, torch.float32)
        step = max(1, RUN // x.shape[1])
        for start in range(0, len(self.data), step):
            run = self._dense(self.data[start : start + step], kind)
            out[:, start : start + step] = F.linear(wide, run)
        return out

    def _dense(self, data: Tensor, dtype: torch.dtype) -> Tensor:
        to = DType.of(dtype)
        return to_tensor(decode.decode(data.numpy(), self.type, to, threads=torch.get_num_threads()), to)


def products(pairs: Sequence[tuple[Tensor, Blocks]], *, rounded: bool = False) -> list[Tensor]:
    """`Blocks.product` of each, all x of one dtype; with `rounded` its caller rounds it to that. Those of few rows go
    together.
    """
    rows = [weight.ordered(x) for x, weight in pairs]
    few = [len(x) <= FEW_ROWS for x in rows]
    arrays = [
        multiply.Product(x.float().contiguous().numpy(), weight.data.numpy(), weight.type)
        for x, (_, weight), is_few in zip(rows, pairs, few, strict=True) if is_few
    ]  # fmt: skip
    narrow = pairs[0][0].dtype == torch.bfloat16
    found = iter(multiply.multiply_all(arrays, narrow=narrow, threads=torch.get_num_threads()))
    outs = (
        torch.from_numpy(next(found)) if is_few else weight.decoded(x, rounded)
        for x, (_, weight), is_few in zip(rows, pairs, few, strict=True)
    )
    return [out.view(*x.shape[:-1], -1) for (x, _), out in zip(pairs, outs, strict=True)]


@runtime_checkable
class Storing(Reader, Protocol):
    """A reader that can give a matrix as it is stored."""

    def format(self, slot: Slot) -> Format: ...

    def packed(self, slot: Slot) -> Packed: ...


@runtime_checkable
class Mapping(Storing, Protocol):
    """One of whose matrices some can stay in their file."""

    def maps(self, slot: Slot) -> bool: ...

    def packed(self, slot: Slot, mapped: Mapped = Mapped.NOT) -> Packed: ...


class _InFile:
    """What a reader maps is had from it so."""

    def __init__(self, reader: Mapping, how: Mapped) -> None:
        self.config, self.slots, self.spec, self.read = reader.config, reader.slots, reader.spec, reader.read
        self.format, self._packed, self._how = reader.format, reader.packed, how

    def packed(self, slot: Slot) -> Packed:
        return self._packed(slot, self._how)


def in_file(reader: Reader, how: Mapped) -> Reader:
    """The reader itself where nothing is to stay in its file."""
    return _InFile(reader, how) if isinstance(reader, Mapping) and how is not Mapped.NOT else reader


def type_of(reader: object, slot: Slot) -> Type | None:
    """Of the blocks that a product takes, stored or made of what is; None where there are none."""
    if not isinstance(reader, Storing):
        return None
    found = reader.format(slot)
    if isinstance(found, Ggml):
        return found.type if found.type in NATIVE else None
    return repacked.kind_of(found, reader.spec(slot).shape)


def stays_in_file(reader: object, slot: Slot) -> bool:
    """Whether a product takes a matrix from where its file lies in memory."""
    return type_of(reader, slot) is not None and isinstance(reader, Mapping) and reader.maps(slot)


def read(reader: object, slot: Slot) -> Blocks | None:
    """None where a matrix has no blocks, or its parts turn out not to fit them. Raises what reading raises."""
    if (type := type_of(reader, slot)) is None or not isinstance(reader, Storing):
        return None
    try:
        packed = reader.packed(slot)
    except LayoutError:
        return None
    if not isinstance(type, Kind):
        return Blocks(packed.parts[0], type)
    found = repacked.blocks_of(packed)
    return None if found is None else Blocks(found[0], type, found[1])
