"""A matrix that stays as a GGUF stores it: it takes its size on disk in memory, and a product reads no more.

    few rows of x ─► each row of blocks decoded in registers and multiplied with all of them (ops/multiply.py)
    many          ─► a run of rows decoded into scratch that stays in the cache, then torch's own product

Values are ggml's in fp32 where few rows go. In a product of many, whose result is rounded to bf16, they are rounded
once to it, too, where the machine multiplies that by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import Format, Ggml, Packed
from ..layouts.reader import Reader
from ..names import Slot
from ..ops import decode, multiply  # and not as torch's operations, whose first call takes a second
from ..ops.cpu import NATIVE
from ..storage.dtypes import DType
from ..storage.store import to_tensor
from . import host

# Measured on an AMD EPYC with AVX-512 BF16 (scripts/bench/packed.py): up to so many rows of x go through registers.
FEW_ROWS = 16
RUN = 1 << 21  # values decoded at a time: 4 MB of bf16


@dataclass(frozen=True)
class Blocks:
    """A matrix [out, in] in blocks of a type that our kernels know. `data`: uint8 [out, bytes of a row], on the CPU."""

    data: Tensor
    type: DType

    def product(self, x: Tensor) -> Tensor:
        """x [.., in] times the matrix, transposed -> [.., out] fp32: the sums as they are."""
        (out,) = products([(x, self)])
        return out

    def rows(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [..] of the matrix -> [.., in], rounded once."""
        return self._dense(self.data[indices.flatten()], dtype).view(*indices.shape, -1)

    def decoded(self, x: Tensor, rounded: bool) -> Tensor:
        """The same for x [n, in], by way of dense rows; with `rounded` the sums may have been rounded to x's dtype."""
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
    few = [len(x.flatten(0, -2)) <= FEW_ROWS for x, _ in pairs]
    arrays = [
        multiply.Product(x.flatten(0, -2).float().contiguous().numpy(), weight.data.numpy(), weight.type)
        for (x, weight), is_few in zip(pairs, few, strict=True) if is_few
    ]  # fmt: skip
    narrow = pairs[0][0].dtype == torch.bfloat16
    found = iter(multiply.multiply_all(arrays, narrow=narrow, threads=torch.get_num_threads()))
    outs = (
        torch.from_numpy(next(found)) if is_few else weight.decoded(x.flatten(0, -2), rounded)
        for (x, weight), is_few in zip(pairs, few, strict=True)
    )
    return [out.view(*x.shape[:-1], -1) for (x, _), out in zip(pairs, outs, strict=True)]


@runtime_checkable
class Storing(Reader, Protocol):
    """A reader that can give a matrix as it is stored."""

    def format(self, slot: Slot) -> Format: ...

    def packed(self, slot: Slot) -> Packed: ...


def type_of(reader: object, slot: Slot) -> DType | None:
    """Of the blocks that a product takes as they are; None where there are none."""
    if not isinstance(reader, Storing) or not isinstance(found := reader.format(slot), Ggml):
        return None
    return found.type if found.type in NATIVE else None


def read(reader: object, slot: Slot) -> Blocks | None:
    """None where a matrix is not so stored. Raises what reading raises."""
    if (type := type_of(reader, slot)) is None or not isinstance(reader, Storing):
        return None
    (data,) = reader.packed(slot).parts
    return Blocks(data, type)
