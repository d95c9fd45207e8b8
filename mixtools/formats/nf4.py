"""nf4: a code of 4 bits a value, of the 16 levels of LEVELS times the largest value of its block (QLoRA, 2023).

    matrix [out, in], row after row ─► blocks of 64 ─► absmax, and a code a value, the first of two in the high bits
    absmax ─► as it is in fp32 ─► or twice quantized: less its mean, in blocks of 256, a byte each

    weight uint8 [out * in / 2, 1]   weight.absmax [blocks]   weight.quant_map fp32 [16]
    weight.quant_state.bitsandbytes__nf4: JSON, as bytes; twice quantized also weight.nested_absmax, .nested_quant_map

The bytes are those of bitsandbytes 0.50.2 on a CPU with AVX2 and a single thread: its mean of many blocks depends on
the threads. Blocks are cut from the whole matrix: where its rows are no multiple of a block's length they run on into
the next row. Source: https://arxiv.org/abs/2305.14314; https://github.com/bitsandbytes-foundation/bitsandbytes
(bitsandbytes/functional.py, backends/default/ops.py, csrc/cpu_ops.cpp).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..errors import TensorError
from ..storage.dtypes import DType
from . import bnb, groups, nested
from .base import Packed, Part, Stored
from .bits import Codes

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_BLOCKS = (64, 32, 128, 256, 512, 1024, 2048, 4096)  # lengths that bitsandbytes reads, the usual one first
_ZERO = LEVELS.index(0.0)
_SMALLEST = 1e-38  # what a block's largest value is taken for where it is less
_RUN = 1 << 18  # values at once, a multiple of each block's length: their fp32 stays in a core's cache
_OFFSET = 22  # characters that the longest fp32 number takes in JSON
_STATE = "weight.quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Nf4:
    """`dtype`: of the dense matrix, and what bitsandbytes decodes to. `double`: absmax is quantized too.

    `state`: bytes of the JSON in a file that was found; it is padded with blanks where its length cannot be planned.
    """

    dtype: DType = DType.BF16
    double: bool = False
    block: int = BLOCK
    state: int | None = field(default=None, compare=False)

    name: ClassVar[str] = "nf4"
    kind: ClassVar[str] = "nf4"
    suffixes: ClassVar[tuple[str, ...]] = (
        "weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map", _STATE
    )  # fmt: skip

    @property
    def about(self) -> str:
        return f"4 bits, blocks of {self.block}" + (", their scales in 8 bits" if self.double else "")

    def to(self, dtype: DType) -> Nf4:
        return replace(self, dtype=dtype)

    def parts(self, shape: tuple[int, ...]) -> tuple[Part, ...]:
        """Raises TensorError for what is no matrix."""
        rows, columns = groups.expect_matrix(shape)
        count = self._blocks(rows * columns)
        state = len(self._json((rows, columns), 0.0)) if self.state is None else self.state
        scales = [Part("weight.absmax", DType.U8 if self.double else DType.F32, (count,))]
        if self.double:
            scales.append(Part("weight.nested_absmax", DType.F32, (nested.blocks(count),)))
            scales.append(Part("weight.nested_quant_map", DType.F32, (nested.VALUES,)))
        return (
            Part("weight", DType.U8, (-(-rows * columns // 2), 1)),
            *scales,
            Part("weight.quant_map", DType.F32, (16,)),
            Part(_STATE, DType.U8, (state,)),
        )

    def _blocks(self, values: int) -> int:
        return -(-values // self.block)

    def _json(self, shape: tuple[int, int], offset: float) -> bytes:
        """The keys in bitsandbytes' order; blanks up to the longest offset, so that its place can be planned."""
        document = {"quant_type": "nf4", "blocksize": self.block, "dtype": self.dtype.torch_name, "shape": shape}
        if not self.double:
            return json.dumps(document).encode()
        document |= {"nested_blocksize": nested.BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return json.dumps(document).encode().ljust(len(json.dumps(document | {"nested_offset": 0})) - 1 + _OFFSET)

    def kept(self, absmax: Tensor) -> Tensor:
        """fp32 [blocks] as a reader sees them: what codes are best chosen for."""
        return nested.decode(*nested.encode(absmax)) if self.double else absmax

    def encode_codes(self, codes: Tensor, absmax: Tensor) -> Packed:
        """From uint8 codes [out, in] and the fp32 absmax [blocks] of the matrix, value = LEVELS[code] * absmax.

        Raises TensorError for codes and scales that do not belong together, a code of more than 4 bits, and scales
        whose mean cannot be told.
        """
        import torch

        bnb.expect_codes(codes, absmax, torch.uint8, self._blocks(codes.numel()))
        if codes.numel() and int(codes.max()) >= len(LEVELS):
            raise TensorError(f"code {int(codes.max())} does not fit into 4 bits")
        pairs = codes.cpu().reshape(-1)
        if len(pairs) % 2:
            pairs = torch.cat((pairs, pairs.new_full((1,), _ZERO)))
        scales: tuple[Tensor, ...] = (absmax.cpu().contiguous(),)
        offset = 0.0
        if self.double:
            *bytes_, mean = nested.encode(scales[0])
            bnb.expect_finite(mean, "the sum of its scales is beyond the numbers of fp32")
            scales, offset = tuple(bytes_), float(mean)
        state = self._json((codes.shape[0], codes.shape[1]), offset)
        weight = (pairs[::2] << 4 | pairs[1::2])[:, None]
        return Packed(self, (weight, *scales, levels(), torch.frombuffer(bytearray(state), dtype=torch.uint8)))

    def decode(self, parts: Sequence[Tensor]) -> Tensor:
        """bitsandbytes' dequantize_4bit where `dtype` is that of the JSON: a product in fp32, rounded once.

        quant_map is not asked: neither does bitsandbytes, whose kernels know the levels. Raises TensorError for JSON
        that does not tell of this matrix.
        """
        import torch

        weight, (shape, absmax), table = parts[0], self._scales(parts), levels()
        pairs = torch.stack((table.repeat_interleave(16), table.repeat(16)), 1)  # [256, 2], by the byte
        flat, packed = torch.empty(2 * len(weight), dtype=self.dtype.torch()), weight.view(-1)
        for run, blocks in _runs(len(flat), self.block):
            values = pairs.index_select(0, packed[run.start // 2 : run.stop // 2].int()).view(-1)
            for part, scales in _by_block(values, absmax[blocks], self.block):
                part.mul_(scales)
            flat[run] = values
        return flat[: shape[0] * shape[1]].view(shape)

    def codes(self, parts: Sequence[Tensor]) -> tuple[Codes, Tensor]:
        """The codes [out, in], an even number, and the fp32 absmax [blocks] of the matrix. Raises as `decode`."""
        shape, absmax = self._scales(parts)
        packed = parts[0].numpy().reshape(-1)
        codes = np.empty((len(packed), 2), np.uint8)
        np.right_shift(packed, 4, out=codes[:, 0])
        np.bitwise_and(packed, 15, out=codes[:, 1])
        return codes.reshape(shape), absmax

    def offset(self, parts: Sequence[Tensor]) -> float:
        """What is added to twice quantized scales. Raises as `decode`."""
        return self._told(parts[-1], len(parts[0]))[1]

    def _scales(self, parts: Sequence[Tensor]) -> tuple[tuple[int, int], Tensor]:
        """The matrix's shape and its absmax, fp32 [blocks]."""
        import torch

        shape, offset = self._told(parts[-1], len(parts[0]))
        if not self.double:
            return shape, parts[1]
        return shape, nested.decode(parts[1], parts[2], parts[3], torch.tensor(offset))

    def _told(self, state: Tensor, packed: int) -> tuple[tuple[int, int], float]:
        """The matrix's shape and the offset of its absmax, from the JSON beside `packed` bytes."""
        wanted = {"quant_type": "nf4", "blocksize": self.block}
        if self.double:
            wanted["nested_blocksize"] = nested.BLOCK
        try:
            document = json.loads(bytes(state.numpy()))
            rows, columns = map(int, document["shape"])
            offset = float(document["nested_offset"]) if self.double else 0.0
            found = {key: document[key] for key in wanted}
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise TensorError(f"its quant_state is not what bitsandbytes writes: {error!r}") from None
        if min(rows, columns) < 1 or -(-rows * columns // 2) != packed:
            raise TensorError(f"its quant_state tells of a matrix {[rows, columns]}, which {packed} bytes do not hold")
        if found != wanted:
            raise TensorError("its quant_state tells of another format", expected=wanted, found=found)
        return (rows, columns), offset

    def decode_bytes(self, shape: tuple[int, ...]) -> int:
        """The scales in fp32 (two copies while they are made of bytes), a run in fp32 and its indices."""
        rows, columns = shape
        return 12 * (self._blocks(rows * columns) + nested.BLOCK) + 6 * min(_RUN, rows * columns + 1) + (8 << 10)

    def fragment(self) -> Mapping[str, Any]:
        about = bnb.quantization_config(4, double=self.double, compute=self.dtype.torch_name)
        return {"quantization_config": about}

    @classmethod
    def detect(cls, stored: Mapping[str, Stored], quantization: Mapping[str, Any]) -> Nf4 | None:
        """A block's length follows from the shapes; a small matrix may fit several."""
        if "weight" not in stored or not stored.keys() & set(cls.suffixes[1:]):
            return None
        bytes_, count = (_size(stored.get(suffix)) for suffix in ("weight", "weight.absmax"))
        block = next((length for length in _BLOCKS if -(-2 * bytes_ // length) == count), BLOCK)
        double = "weight.nested_absmax" in stored or "weight.nested_quant_map" in stored
        return cls(_dtype(quantization), double, block, _size(stored.get(_STATE)) or None)

    @classmethod
    def claims(cls, quantization: Mapping[str, Any]) -> bool:
        return bnb.claims(quantization, 4) and quantization.get("bnb_4bit_quant_type") == "nf4"


def levels() -> Tensor:
    """LEVELS in fp32: the values of the codes where a block's absmax is 1."""
    import torch

    return torch.tensor(LEVELS)


def nf4(weight: Tensor, double: bool = False) -> Packed:
    """`weight` [out, in], each value the nearest code of its block: bitsandbytes' own bytes.

    Twice quantized, blanks may follow in the JSON (Nf4._json). Raises TensorError for NaN and infinity.
    """
    groups.expect_matrix(tuple(weight.shape))
    absmax = block_absmax(weight)
    return Nf4(DType.of(weight.dtype), double).encode_codes(nearest(weight, absmax), absmax)


def block_absmax(weight: Tensor) -> Tensor:
    """The largest value of each block, fp32 [blocks]. Raises TensorError for NaN and infinity."""
    import torch

    flat = weight.reshape(-1)
    absmax = torch.empty(-(-len(flat) // BLOCK))
    for run, blocks in _runs(len(flat), BLOCK):
        whole = len(flat[run]) // BLOCK * BLOCK
        values = flat[run].abs().float()
        absmax[blocks][: whole // BLOCK] = values[:whole].view(-1, BLOCK).amax(1)
        if whole < len(values):
            absmax[-1] = values[whole:].amax().clamp(min=_SMALLEST)
    bnb.expect_finite(absmax, "a block holds NaN or infinity")
    return absmax


def nearest(weight: Tensor, absmax: Tensor) -> Tensor:
    """The codes uint8 [out, in] next to the values of `weight` over their block's absmax, fp32 [blocks].

    As bitsandbytes, which multiplies with 1 / absmax but divides in a last block that is shorter; at a midpoint the
    lower code.
    """
    import torch

    flat, table = weight.reshape(-1), levels().numpy()
    codes, bounds = np.zeros(len(flat), np.uint8), (table[:-1] + table[1:]) / 2
    above = np.empty(min(_RUN, len(flat)), np.bool_)
    for run, blocks in _runs(len(flat), BLOCK):
        values = flat[run].to(torch.float32, copy=True)
        for part, scales in _by_block(values, absmax[blocks], BLOCK):
            part.mul_(1.0 / scales.clamp(min=_SMALLEST)) if part.ndim == 2 else part.div_(scales)
        here = above[: len(values)]
        for bound in bounds:  # 15 comparisons of all values take a tenth of the time of a search for each
            np.greater(values.numpy(), bound, out=here)
            codes[run] += here.view(np.uint8)
    return torch.from_numpy(codes).view(weight.shape)


def _runs(values: int, block: int) -> Iterator[tuple[slice, slice]]:
    """Runs of whole blocks, but for the last: of values, and of their blocks."""
    for at in range(0, values, _RUN):
        stop = min(at + _RUN, values)
        yield slice(at, stop), slice(at // block, -(-stop // block))


def _by_block(values: Tensor, scales: Tensor, block: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of a run: its whole blocks [blocks, block] with their scales [blocks, 1], and what is left with its own."""
    whole = len(values) // block
    yield values[: whole * block].view(whole, block), scales[:whole, None]
    if whole * block < len(values):
        yield values[whole * block :], scales[whole]


def _size(found: Stored | None) -> int:
    return 0 if found is None else found.dtype.nbytes(found.shape) // found.dtype.itemsize


def _dtype(quantization: Mapping[str, Any]) -> DType:
    """What it is multiplied in, where that has 16 bits; which it was made of stands in the JSON alone."""
    told = quantization.get("bnb_4bit_compute_dtype")
    return DType.F16 if told == DType.F16.torch_name else DType.BF16
