"""Weights as the kernels read them: each part of a format in a plane of its own, [out, ..], row after row.

A row is cut into units, the columns whose codes fill 16 bytes: four words of 32 bits. A plane of codes holds those of
a unit so that word `c` has its j-th code, from the low bits up, from column 4 j + c: whoever takes the j-th code of
four words side by side gets four columns side by side. Scales, zeros and what bits a code has beyond a power of two
lie in further planes. No plane is larger than what it was made of.

    dense     values
    int4      words  scales [out, groups]  zeros, two in a byte, unless all are 8
    nf4       words  absmax fp32 or bytes  of each matrix: levels, what bytes mean, their mean  largest of 256 bytes
    q8_0      words, each code plus 128  d f16
    q4_k q5_k words  d, dmin f16  low 4 bits of a group's scale and minimum  high 2 bits of both, two groups in a byte
              and of q5_k the fifth bits, 32 columns in a word
    q6_k      words  high 2 bits, 8 columns in 16 bits  two scales in 16 bits  d f16
    q2_k      words  d, dmin f16  four groups' scales and minima in a word
    q3_k      words  high bits, 16 columns in 16 bits  d f16  low 4 bits of four scales  their high 2 bits

ggml's blocks of 84 to 210 bytes allow no wide loads as they lie; these planes do. Plain torch: they are made where the
tensors are, a run of rows at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...errors import MixtoolsError, TensorError
from ...storage.dtypes import DType

_RUN = 1 << 22  # codes at a time, a byte each
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which of eight rows lies in a word's lowest four bits, and so on upwards
_WORDS: dict[int, torch.dtype] = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
_UNITS = {"int4": 32, "nf4": 32, "q8_0": 16, "q4_k": 32, "q5_k": 32, "q6_k": 32, "q2_k": 64, "q3_k": 64}
WHOLE_ROW = -1  # as a group's length
NESTED_BLOCK = 256  # scales of nf4 that share a largest one
# Whose high bits lie there, from the low bits of 16 up, of a word's 8 codes (Q6_K) or 16 (Q3_K): few shifts bring all
# of them beside their low bits.
HIGH_BITS_OF_8 = [0, 4, 1, 5, 2, 6, 3, 7]
HIGH_BITS_OF_16 = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15]


@dataclass(frozen=True)
class Kind:
    """How the planes of a matrix are to be read.

    `group`: columns that share a scale (int4, nf4). int4: a value is (code - zero) * scale, a zero what its plane holds
    (if there is one) plus `zero`. `nested`: nf4's absmax are bytes.
    """

    name: str
    group: int = 0
    zero: int = 0
    has_zeros: bool = False
    nested: bool = False

    @property
    def spelled(self) -> str:
        return f"{self.name}:{self.group}:{self.zero}:{self.has_zeros:d}:{self.nested:d}"

    @classmethod
    def parse(cls, spelled: str) -> Kind:
        name, *numbers = spelled.split(":")
        group, zero, has_zeros, nested = map(int, numbers)
        return cls(name, group, zero, bool(has_zeros), bool(nested))


@dataclass(frozen=True)
class Planes:
    """One matrix or several of one shape, one below the other; `matrix_rows` has each."""

    kind: Kind
    rows: int
    columns: int
    matrix_rows: int
    parts: tuple[Tensor, ...]

    @property
    def nbytes(self) -> int:
        return sum(part.numel() * part.itemsize for part in self.parts)

    def matrices(self, first: int, count: int) -> Planes:
        """Some of them, without a copy."""
        each = self.rows // self.matrix_rows
        parts = (part[len(part) // each * first : len(part) // each * (first + count)] for part in self.parts)
        return replace(self, rows=count * self.matrix_rows, parts=tuple(parts))

    @property
    def unit(self) -> int:
        """Columns of a unit."""
        return _UNITS.get(self.kind.name) or 16 // self.parts[0].itemsize


def stack(matrices: Iterable[Planes], count: int) -> Planes:
    """`count` matrices of one kind and shape, one below the other; no two are held beside the result.

    Raises MixtoolsError for others.
    """
    first: Planes | None = None
    out: list[Tensor] = []
    for index, matrix in enumerate(matrices):
        if first is None:
            first = matrix
            out = [part.new_empty((count * len(part), *part.shape[1:])) for part in matrix.parts]
        if _alike(matrix) != _alike(first) or matrix.rows != first.rows or index >= count:
            raise MixtoolsError(f"matrix {index} does not belong to a stack of {count} of {first.kind}")
        for whole, part in zip(out, matrix.parts, strict=True):
            whole[index * len(part) : (index + 1) * len(part)] = part
    if first is None or index + 1 != count:
        raise MixtoolsError(f"a stack of {count} matrices lacks some")
    return replace(first, rows=count * first.rows, parts=tuple(out))


def beside(matrices: Sequence[Planes]) -> Planes | None:
    """Matrices of one kind and width, of any number of rows, one below the other as one matrix; None where they are not
    so, or have tables of their own."""
    if len(set(map(_alike, matrices))) > 1 or matrices[0].kind.name == "nf4":
        return None
    parts = tuple(torch.cat(part) for part in zip(*(matrix.parts for matrix in matrices), strict=True))
    rows = sum(matrix.rows for matrix in matrices)
    return replace(matrices[0], rows=rows, matrix_rows=rows, parts=parts)


def _alike(matrix: Planes) -> tuple[object, ...]:
    return matrix.kind, matrix.columns, *(part.dtype for part in matrix.parts)


def dense(weight: Tensor) -> Planes:
    """`weight` [.., out, in] bf16, f16 or fp32, as it is."""
    if weight.dtype not in (torch.bfloat16, torch.float16, torch.float32) or weight.ndim < 2:
        raise MixtoolsError(f"no kernel multiplies {weight.dtype} {list(weight.shape)}")
    rows = weight.numel() // weight.shape[-1]
    plane = weight.reshape(rows, -1).contiguous()
    plane = plane if plane.data_ptr() % 16 == 0 else plane.clone()
    return Planes(Kind("dense"), rows, weight.shape[-1], weight.shape[-2], (plane,))


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, *, group: int, symmetric: bool, v2: bool
) -> Planes:
    """From GPTQ's tensors of 4 bits: qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in].

    Raises TensorError where columns are not grouped in sequence (act-order without static groups: x would have to be
    permuted for each matrix), where groups are no multiple of 32 columns, and for a symmetric one with other zeros.
    """
    columns, rows = qweight.shape[0] * 8, qweight.shape[1]
    length = columns if group == WHOLE_ROW else group
    if g_idx is not None and not in_sequence(g_idx, group):
        raise TensorError("its columns are grouped out of sequence (act-order), which no kernel multiplies")
    words = _by_rows(rows, columns, lambda run: _pack(_nibbles(qweight[:, run].T.contiguous()), 4))
    zeros = _nibbles(qzeros).T  # [out, groups]
    return _int4(words, scales, zeros, columns, length, 0 if v2 else 1, symmetric)


def in_sequence(g_idx: Tensor, group: int) -> bool:
    """Whether columns, whose groups are g_idx [in], are grouped one after the other."""
    length = len(g_idx) if group == WHOLE_ROW else group
    return torch.equal(g_idx.cpu(), torch.arange(len(g_idx), dtype=g_idx.dtype) // length)


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor, *, group: int, symmetric: bool) -> Planes:
    """From AWQ's tensors: qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]. Raises as `gptq`."""
    columns, rows = qweight.shape[0], qweight.shape[1] * 8
    length = columns if group == WHOLE_ROW else group

    def codes(run: slice) -> Tensor:
        return _awq_rows(qweight[:, run.start // 8 : -(-run.stop // 8)])

    words = _by_rows(rows, columns, lambda run: _pack(codes(run), 4), step=8)
    return _int4(words, scales, _awq_rows(qzeros), columns, length, 0, symmetric)


def compressed(packed: Tensor, scales: Tensor, zeros: Tensor | None, *, group: int) -> Planes:
    """From compressed-tensors' parts of 4 bits: weight_packed [out, in / 8], weight_scale [out, groups], and, unless
    symmetric, weight_zero_point [out / 8, groups]. Raises as `gptq`."""
    rows, columns = packed.shape[0], packed.shape[1] * 8
    words = _by_rows(rows, columns, lambda run: _pack(_nibbles(packed[run]), 4))
    length = columns if group == WHOLE_ROW else group
    if zeros is None:
        return _int4(words, scales.T, torch.full_like(scales, 8, dtype=torch.uint8), columns, length, 0, True)
    return _int4(words, scales.T, _nibbles(zeros.T.contiguous()).T, columns, length, 0, False)


def nf4(
    weight: Tensor, absmax: Tensor, levels: Tensor, shape: tuple[int, int], *, block: int = 64,
    nested: tuple[Tensor, Tensor, float] | None = None,
) -> Planes:  # fmt: skip
    """From bitsandbytes' tensors: weight uint8 [out * in / 2, 1], absmax [blocks], what the 16 codes mean.

    `nested`: nested_absmax, what the bytes of absmax mean, their offset. Raises TensorError where a block goes on in
    the next row.
    """
    rows, columns = shape
    if columns % block or block % _UNITS["nf4"]:
        raise TensorError(f"rows of {columns} columns cut blocks of {block}, which no kernel multiplies")
    packed = weight.view(rows, columns // 2)

    def words(run: slice) -> Tensor:
        pairs = packed[run]
        return _pack(torch.stack((pairs >> 4, pairs & 15), -1).flatten(1), 4)

    scales = absmax.view(rows, -1)
    tables = levels.float().to(absmax.device)
    parts: tuple[Tensor, ...] = (_by_rows(rows, columns, words), scales, tables[None])
    if nested is not None:
        largest, values, offset = nested
        parts = (*parts[:2], torch.cat((tables, values, values.new_tensor([offset])))[None], largest)
    return Planes(Kind("nf4", block, nested=nested is not None), rows, columns, rows, parts)


def ggml(blocks: Tensor, type: DType) -> Planes:
    """From ggml's blocks uint8 [out, bytes of a row]. Raises MixtoolsError for a type that no kernel multiplies."""
    if type not in TYPES:
        raise MixtoolsError(f"no kernel multiplies {type.value} on a GPU; those of {', '.join(t.value for t in TYPES)}")
    rows = len(blocks)
    size, split = type.row_bytes(type.block), TYPES[type]
    columns = blocks.shape[1] // size * type.block
    runs = [split(blocks[run].view(-1, columns // type.block, size)) for run in _runs(rows, columns)]
    parts = tuple(torch.cat(part) if len(part) > 1 else part[0] for part in zip(*runs, strict=True))
    kind = Kind("int4", 32, 8) if type is DType.Q4_0 else Kind(type.value.lower())
    return Planes(kind, rows, columns, rows, parts)


# --- codes -----------------------------------------------------------------------------------------------------------


def _runs(rows: int, columns: int, step: int = 1) -> Iterator[slice]:
    """Rows that are taken together, a multiple of `step`."""
    size = max(1, _RUN // (columns * step)) * step
    return (slice(at, min(at + size, rows)) for at in range(0, rows, size))


def _by_rows(rows: int, columns: int, words: Callable[[slice], Tensor], step: int = 1) -> Tensor:
    """The words [rows, columns / 8] that `words` makes of runs of rows."""
    if columns % _UNITS["int4"]:
        raise TensorError(f"rows of {columns} columns are no multiple of {_UNITS['int4']}, as the kernels need")
    out: Tensor | None = None
    for run in _runs(rows, columns, step):
        made = words(run)
        out = made.new_empty((rows, made.shape[1])) if out is None else out
        out[run] = made
    if out is None:
        raise TensorError("a matrix without rows")
    return out


def _pack(codes: Tensor, bits: int, many: int = 0) -> Tensor:
    """Codes uint8 [rows, in], each below 2^bits -> words [rows, ..] of `many` codes (as many as 32 bits hold).

    The codes of word c of a unit are those of columns 4 j + c, the first in the low bits.
    """
    many = many or 32 // bits
    rows, per_byte, size = len(codes), 8 // bits, many * bits // 8
    apart = codes.view(rows, -1, size, per_byte, 4)  # unit, byte of a word, code of a byte, word
    out = apart[:, :, :, 0].clone()
    for place in range(1, per_byte):
        out |= apart[:, :, :, place] << bits * place
    return out.transpose(2, 3).reshape(rows, -1).contiguous().view(_WORDS[size])


def _nibbles(words: Tensor) -> Tensor:
    """int32 [.., n] -> uint8 [.., 8 n], low bits first."""
    packed = words.contiguous().view(torch.uint8)
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def _pairs(codes: Tensor) -> Tensor:
    """Codes of 4 bits [rows, n] -> bytes [rows, n / 2 upwards], the first in the low bits."""
    even = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2))
    return even[:, ::2] | even[:, 1::2] << 4


def _bytes_of_bits(bits: Tensor) -> Tensor:
    """[rows, n] of 0 and 1 -> bytes [rows, n / 8], the first in the lowest bit."""
    place = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.view(len(bits), -1, 8) << place).sum(-1, dtype=torch.uint8)


def _awq_rows(words: Tensor) -> Tensor:
    """int32 [n, out / 8] in AWQ's order -> uint8 [out, n]."""
    count, eighths = words.shape
    codes = _nibbles(words).view(count, eighths, 8)
    order = torch.tensor(_AWQ_ORDER, device=words.device)
    in_order = torch.empty_like(codes)
    in_order[:, :, order] = codes
    return in_order.view(count, -1).T.contiguous()


def _int4(
    words: Tensor, scales: Tensor, zeros: Tensor, columns: int, length: int, less: int, symmetric: bool
) -> Planes:
    """`zeros` [out, groups] as they are stored: each `less` than it is."""
    if length % _UNITS["int4"] or columns % length:
        raise TensorError(f"groups of {length} columns in rows of {columns}: kernels need multiples of 32")
    parts = (words, scales.T.contiguous())
    if not symmetric:
        kind = Kind("int4", length, less, has_zeros=True)
        return Planes(kind, len(words), columns, len(words), (*parts, _pairs(zeros.reshape(1, -1))[0]))
    if not bool((zeros + less == 8).all()):
        raise TensorError("is symmetric by its configuration, but not by its zeros", expected=8, found="others")
    return Planes(Kind("int4", length, 8), len(words), columns, len(words), parts)


# --- ggml's blocks, uint8 [rows, blocks of a row, bytes] -> planes ----------------------------------------------------


def _f16(blocks: Tensor, at: int) -> Tensor:
    """[rows, blocks]"""
    return blocks[:, :, at : at + 2].flatten(1).contiguous().view(torch.float16)


def _f16_pairs(blocks: Tensor, at: int) -> Tensor:
    """Two f16 of each block in a word [rows, blocks]."""
    return blocks[:, :, at : at + 4].flatten(1).contiguous().view(torch.int32)


def _codes(blocks: Tensor, at: int, size: int, run: int, bits: int) -> Tensor:
    """Codes uint8 [rows, in] of blocks whose `size` bytes from `at` come in runs: columns go through the low bits of a
    run's bytes, then through the next higher ones."""
    packed = blocks[:, :, at : at + size].reshape(*blocks.shape[:2], -1, 1, run)
    shifts = torch.arange(0, 8, bits, device=blocks.device, dtype=torch.uint8)[:, None]
    return (packed >> shifts & (1 << bits) - 1).flatten(1).contiguous()


def _q4_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return _pack(_codes(blocks, 2, 16, 16, 4), 4), _f16(blocks, 0)


def _q8_0(blocks: Tensor) -> tuple[Tensor, ...]:
    return _pack((blocks[:, :, 2:] ^ 128).flatten(1).contiguous(), 8), _f16(blocks, 0)


def _six_bits(blocks: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """The scales and minima of Q4_K's and Q5_K's groups: low halves, then both high parts of two groups in a byte."""
    a, b, c = (blocks[:, :, at + 4 * i : at + 4 * i + 4] for i in range(3))
    scales = torch.cat((a & 63, c & 15 | a >> 6 << 4), 2).flatten(1)
    minima = torch.cat((b & 63, c >> 4 | b >> 6 << 4), 2).flatten(1)
    return scales & 15 | (minima & 15) << 4, _pairs(scales >> 4 | minima >> 4 << 2)


def _q4_k(blocks: Tensor) -> tuple[Tensor, ...]:
    return _pack(_codes(blocks, 16, 128, 32, 4), 4), _f16_pairs(blocks, 0), *_six_bits(blocks, 4)


def _q5_k(blocks: Tensor) -> tuple[Tensor, ...]:
    fifth = _bytes_of_bits(_codes(blocks, 16, 32, 32, 1)).view(torch.int32)
    return _pack(_codes(blocks, 48, 128, 32, 4), 4), _f16_pairs(blocks, 0), *_six_bits(blocks, 4), fifth


def _q6_k(blocks: Tensor) -> tuple[Tensor, ...]:
    low, high = _codes(blocks, 0, 128, 64, 4), _codes(blocks, 128, 64, 32, 2)
    mixed = high.view(len(blocks), -1, 8, 4)[:, :, HIGH_BITS_OF_8].reshape(len(blocks), -1)
    scales = blocks[:, :, 192:208].flatten(1).contiguous().view(torch.int16)
    return _pack(low, 4), _pack(mixed, 2, 8), scales, _f16(blocks, 208)


def _q2_k(blocks: Tensor) -> tuple[Tensor, ...]:
    groups = blocks[:, :, :16].flatten(1).contiguous().view(torch.int32)
    return _pack(_codes(blocks, 16, 64, 32, 2), 2), _f16_pairs(blocks, 80), groups


def _q3_k(blocks: Tensor) -> tuple[Tensor, ...]:
    high = _codes(blocks, 0, 32, 32, 1)
    mixed = high.view(len(blocks), -1, 16, 4)[:, :, HIGH_BITS_OF_16].reshape(len(blocks), -1)
    packed = blocks[:, :, 96:108]
    low = torch.cat((packed[:, :, :8] & 15, packed[:, :, :8] >> 4), 2)  # scale i: low bits of byte i % 8
    top = torch.cat([packed[:, :, 8:] >> 2 * i & 3 for i in range(4)], 2)
    quarters = top.flatten(1).view(len(blocks), -1, 4)
    tops = quarters[..., 0] | quarters[..., 1] << 2 | quarters[..., 2] << 4 | quarters[..., 3] << 6
    lows = _pairs(low.flatten(1)).contiguous().view(torch.int16)
    return _pack(_codes(blocks, 32, 64, 32, 2), 2), _pack(mixed, 1, 16), _f16(blocks, 108), lows, tops


TYPES: dict[DType, Callable[[Any], tuple[Tensor, ...]]] = {
    DType.Q4_0: _q4_0, DType.Q8_0: _q8_0, DType.Q2_K: _q2_k, DType.Q3_K: _q3_k, DType.Q4_K: _q4_k, DType.Q5_K: _q5_k,
    DType.Q6_K: _q6_k,
}  # fmt: skip
