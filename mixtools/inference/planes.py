"""A layer on a GPU, whose matrices lie as they are stored, repacked once into planes (ops/gpu/planes.py).

    reader ─► each matrix as it is stored ─► the card ─► planes ─► those of a layer's experts one below the other

    few tokens  ─► kernels that decode in registers: projections, experts, router (ops/gpu)
    many        ─► one projection at a time unpacked into scratch, torch's own products (mixture.py)
    `rounded`   ─► the second way whatever their number: weights are rounded to 16 bits, as where they lie so

What no kernel takes lies in 16 bits: act-order without static groups, other widths than 4 bits, rarer block types.
Letters in shapes as in model.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import MixtralConfig
from ..errors import LayoutError, TensorError
from ..formats import Awq, Format, Ggml, Gptq, Nf4, Packed, PackedInts
from ..formats.nf4 import levels
from ..layouts.reader import Reader
from ..names import Role, Slot
from ..ops.gpu import launch, library, planes
from ..ops.gpu.planes import Planes
from . import products
from .blocks import Storing
from .mixture import mixture
from .model import DOWN, GATE_UP, QKV, Block, Head, Observer, copy, rms_norm

# Up to so many tokens a packed matrix goes through the kernels, MOST_TOKENS at a time: unpacked, it would be read once
# and written and read again in 16 bits, which takes as long as four to eight times its own bytes.
FEW_PACKED = 4 * launch.MOST_TOKENS


def suits(format: Format, shape: tuple[int, ...]) -> bool:
    """Whether kernels take a matrix [out, in] of this format, as far as that is known before it is read."""
    if len(shape) != 2:
        return False
    columns = shape[1]
    if isinstance(format, Ggml):
        return format.type in planes.TYPES
    if isinstance(format, Nf4):
        return columns % format.block == 0
    if not isinstance(format, Gptq | Awq | PackedInts) or format.bits != 4:
        return False
    length = columns if format.group == planes.WHOLE_ROW else format.group
    indexed = isinstance(format, PackedInts) and format.indexed
    return length % 32 == 0 and columns % length == 0 and not indexed


def stays(reader: object, slot: Slot) -> bool:
    """Whether a matrix of the reader stays as it is stored."""
    return isinstance(reader, Storing) and suits(reader.format(slot), reader.spec(slot).shape)


def held_bytes(reader: Reader, slots: Iterable[Slot], itemsize: int) -> int:
    """Bytes that these tensors take on a card: as stored where they stay so, else `itemsize` bytes a weight."""
    total = 0
    for slot in slots:
        shape = reader.spec(slot).shape
        if isinstance(reader, Storing) and slot.role is not Role.EMBED and stays(reader, slot):
            total += sum(part.dtype.nbytes(part.shape) for part in reader.format(slot).parts(shape))
        else:
            total += math.prod(shape) * itemsize
    return total


def scratch_bytes(reader: Reader, itemsize: int) -> int:
    """What is widened at a time: a matrix on its way, as it is read and as it was; or a projection of all experts."""
    config = reader.config
    largest = max(math.prod(config.shape(slot.role)) for slot in config.slots())
    experts = 2 * config.num_experts * config.intermediate_size * config.hidden_size  # gate and up
    packed = any(stays(reader, Slot(role, 0, 0)) for role in GATE_UP)
    return itemsize * max(2 * largest, experts if packed else 0)


def read(reader: Reader, slot: Slot, device: torch.device, dtype: torch.dtype, *, packed: bool = True) -> Planes:
    """A matrix of the reader, on the device; without `packed` dense. Raises TensorError if it has another shape than
    the configuration says, and what reading raises."""
    found, expected = reader.spec(slot).shape, reader.config.shape(slot.role)
    if found != expected:
        raise TensorError("has another shape than the configuration says", tensor=slot, expected=expected, found=found)
    if packed and isinstance(reader, Storing) and stays(reader, slot):
        try:
            stored = reader.packed(slot)
        except LayoutError:  # rows that the layout orders otherwise, which the format cannot
            stored = None
        made = stored and _planes(stored, expected, device)
        if made:
            return made
    return planes.dense(reader.read(slot).to(device=device, dtype=dtype))


def _planes(packed: Packed, shape: tuple[int, ...], device: torch.device) -> Planes | None:
    """None where columns are grouped out of sequence."""
    format = packed.format
    named = dict(zip([part.suffix for part in format.parts(shape)], packed.parts, strict=True))
    parts = {name: part.to(device) for name, part in named.items()}
    if isinstance(format, Ggml):
        return planes.ggml(parts["weight"], format.type)
    if isinstance(format, Gptq):
        index = named.get("g_idx")
        if index is not None and not planes.in_sequence(index, format.group):
            return None
        return planes.gptq(parts["qweight"], parts["qzeros"], parts["scales"], None, group=format.group,
                           symmetric=format.symmetric, v2=format.v2)  # fmt: skip
    if isinstance(format, Awq):
        return planes.awq(parts["qweight"], parts["qzeros"], parts["scales"], group=format.group,
                          symmetric=format.symmetric)  # fmt: skip
    if isinstance(format, PackedInts):
        return planes.compressed(parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point"),
                                 group=format.group)  # fmt: skip
    assert isinstance(format, Nf4)
    inner = None
    if format.double:
        inner = parts["weight.nested_absmax"], parts["weight.nested_quant_map"], format.offset(packed.parts)
    rows, columns = shape
    return planes.nf4(parts["weight"], parts["weight.absmax"], levels().to(device), (rows, columns),
                      block=format.block, nested=inner)  # fmt: skip


def dense(of: Planes, dtype: torch.dtype) -> Tensor:
    """[rows, in]: as it lies, or unpacked."""
    if of.kind.name == "dense" and of.parts[0].dtype == dtype:
        return of.parts[0]
    return library.unpack(of, dtype)


def few(of: Planes, rounded: bool = False) -> int:
    """Up to how many tokens the kernels are the way."""
    return 0 if rounded else launch.MOST_TOKENS if of.kind.name == "dense" else FEW_PACKED


def product(x: Tensor, of: Planes, dtype: torch.dtype | None = None, *, rounded: bool = False) -> Tensor:
    """x [.., in] times a matrix -> [.., out] of `dtype`, x's unless told: fp32 gives the sums as they are."""
    rows, kind = x.flatten(0, -2), dtype or x.dtype
    if len(rows) <= few(of, rounded):
        starts = range(0, len(rows), launch.MOST_TOKENS)
        made = torch.cat([library.gemv(rows[at : at + launch.MOST_TOKENS], of, kind) for at in starts])
    else:
        weight = dense(of, x.dtype)
        made = F.linear(rows, weight) if kind == x.dtype else products.linear_fp32(rows, weight)
    return made.view(*x.shape[:-1], -1)


class PlanesLayer(Block):
    """A layer in planes: q, k and v beside each other where they are of one kind, the experts in a stack each."""

    def __init__(
        self, config: MixtralConfig, index: int, dtype: torch.dtype, *, qkv: Sequence[Planes], o: Planes,
        gate_up: Planes, down: Planes, rounded: bool = False,
    ) -> None:  # fmt: skip
        """Norms and router are to be filled in. `qkv`: one or three; `gate_up`: of each expert w1, then w3."""
        super().__init__(config, index, o.parts[0].device, dtype)
        self.qkv, self.o, self.gate_up, self.down, self.rounded = qkv, o, gate_up, down, rounded

    @classmethod
    def load(
        cls, reader: Reader, index: int, device: torch.device, dtype: torch.dtype, *, rounded: bool = False
    ) -> PlanesLayer:
        apart = [read(reader, Slot(role, index), device, dtype) for role in QKV]
        joined = planes.beside(apart)
        o = read(reader, Slot(Role.O, index), device, dtype)
        experts = range(reader.config.num_experts)
        gate_up = _stack(reader, [Slot(role, index, one) for one in experts for role in GATE_UP], device, dtype)
        down = _stack(reader, [Slot(Role.DOWN, index, one) for one in experts], device, dtype)
        layer = cls(reader.config, index, dtype, qkv=apart if joined is None else [joined], o=o, gate_up=gate_up,
                    down=down, rounded=rounded)  # fmt: skip
        vectors = {Role.ATTENTION_NORM: layer.attention_norm, Role.FFN_NORM: layer.ffn_norm, Role.ROUTER: layer.router}
        for role, weight in vectors.items():
            copy(weight, reader, Slot(role, index))
        return layer

    def packs(self, slot: Slot) -> bool:
        if slot.role in QKV:
            of = self.qkv[0] if len(self.qkv) == 1 else self.qkv[QKV.index(slot.role)]
        else:
            of = {Role.O: self.o, Role.DOWN: self.down}.get(slot.role, self.gate_up)
        return of.kind.name != "dense"

    def joined(self, x: Tensor, roles: tuple[Role, ...], expert: int | None = None) -> Tensor:
        if roles == QKV:
            return torch.cat([product(x, one, rounded=self.rounded) for one in self.qkv], -1)
        if expert is None:
            return product(x, self.o, rounded=self.rounded)
        of = self.down.matrices(expert, 1) if roles == DOWN else self.gate_up.matrices(2 * expert, 2)
        return product(x, of, rounded=self.rounded)

    def experts(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        if observer:
            return super().experts(x, observer)
        weights, chosen = self.route(x)
        hidden, inner, count = self.config.hidden_size, self.config.intermediate_size, self.config.num_experts
        if len(x) <= few(self.gate_up, self.rounded):
            made = library.gate_up(x, chosen, self.gate_up, inner)
            return library.down(made, chosen, weights, self.down, hidden)
        return mixture(
            x, weights, chosen, lambda: dense(self.gate_up, x.dtype).view(count, 2 * inner, hidden),
            lambda: dense(self.down, x.dtype).view(count, hidden, inner),
        )  # fmt: skip


def _stack(reader: Reader, slots: Sequence[Slot], device: torch.device, dtype: torch.dtype) -> Planes:
    """The matrices one below the other; of more than one kind, all in 16 bits."""
    kinds = {reader.format(slot) if isinstance(reader, Storing) and stays(reader, slot) else None for slot in slots}
    if len(kinds) == 1 and None not in kinds:
        first = read(reader, slots[0], device, dtype)
        if first.kind.name != "dense":
            rest = (read(reader, slot, device, dtype) for slot in slots[1:])
            return planes.stack(chain([first], rest), len(slots))
    return planes.stack((read(reader, slot, device, dtype, packed=False) for slot in slots), len(slots))


class PlanesHead(Head):
    """The output matrix in planes."""

    def __init__(self, config: MixtralConfig, norm: Tensor, of: Planes, *, rounded: bool = False) -> None:
        self.config, self.norm, self.planes, self.rounded = config, norm, of, rounded

    def __call__(self, x: Tensor, observer: Observer | None = None) -> Tensor:
        x = rms_norm(x, self.norm, self.config.rms_norm_eps)
        if observer:
            observer(Slot(Role.HEAD), x.flatten(0, -2), None, None)
        return product(x, self.planes, torch.float32, rounded=self.rounded)
