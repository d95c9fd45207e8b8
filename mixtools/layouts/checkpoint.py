"""Checkpoint: a Reader over any table layout, lazy and in bounded memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import MixtralConfig
from ..errors import LayoutError, MixtoolsError, TensorError
from ..formats import SUFFIXES, ByRows, Format, Ggml, Packed, Part, Plain, Quantized, Stored, detect
from ..names import Role, Slot
from ..storage.dtypes import WEIGHT_DTYPES, DType
from ..storage.store import CHUNK, Bits, Entry, Store, from_tensor, to_tensor
from .gguf import About
from .reader import Mapped, Spec
from .table import Layout, Op, Piece, to_canonical

if TYPE_CHECKING:
    import torch

_STRIP = 4  # times `max_bytes`: a transposition is fastest in strips of about 16 MB


@dataclass
class Checkpoint:
    """A checkpoint on disk, its matrices in whatever formats.

    `problems` is empty unless it was opened leniently. `document`: config.json or params.json as it lies there, with
    all that `config` does not know. `tied`: head and embedding are the same, whether one of them is stored or both;
    reading either gives the tensor. `remarks`: what a user should know and need not mend. `dense`: what quantized
    matrices are decoded to, None for what their format usually gives. `gguf`: of a GGUF its file type and metadata.
    `about`: what its documents say of a quantization, as quantization_config.
    """

    folder: Path
    layout: Layout
    config: MixtralConfig
    store: Store
    problems: list[MixtoolsError] = field(default_factory=list)
    document: Mapping[str, Any] = field(default_factory=dict)
    tied: bool = False
    remarks: tuple[str, ...] = ()
    dense: DType | None = None
    gguf: About | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def slots(self) -> Iterator[Slot]:
        return self.config.slots()

    def spec(self, slot: Slot) -> Spec:
        return Spec(self.config.shape(slot.role), self.format(slot).dtype)

    def entry(self, slot: Slot) -> Entry:
        """The stored tensor that holds this slot, maybe with others; the first of a matrix stored in several."""
        return self.parts(slot)[0]

    def parts(self, slot: Slot) -> list[Entry]:
        """The stored tensors of this slot, in the order of its format."""
        piece = self.piece(slot)
        return [self.store.entries[piece.part(part.suffix)] for part in self.format(slot).parts(piece.shape)]

    def format(self, slot: Slot) -> Format:
        """How the slot is stored. Raises LayoutError if it is not."""
        piece = self.piece(slot)
        if (found := _format(piece, self.store, self.about)) is None:
            raise LayoutError("is missing", file=self.place, tensor=piece.name)
        return found if self.dense is None or not isinstance(found, Quantized) else found.to(self.dense)

    def piece(self, slot: Slot) -> Piece:
        return self.layout.piece(slot, self.config)

    def blocks(self, slot: Slot, max_bytes: int, granule: int = 1) -> Iterator[Bits]:
        """The tensor as runs of canonical rows [rows, columns], in order, each about `max_bytes`.

        `granule`: each run but the last is a multiple of so many rows; 0 gives the tensor in one run.
        A block is valid until the next is asked for (its buffer is used again).
        """
        format = self.format(slot)
        if not isinstance(format, ByRows):
            yield from self._decoded(slot, max_bytes, granule)
            return
        name, _, start, stop, op = self.piece(slot)
        entry = self.store.entries[name]
        row_bytes = format.dtype.row_bytes(entry.shape[-1])
        asked = granule
        granule = math.lcm(granule, self.layout.granule(slot, self.config))  # with 0, the whole, it is 0
        if entry.strides is not None:
            granule = 0
        step = stop - start
        if granule:
            step = min(step, max(1, max_bytes // (row_bytes * granule)) * granule)
        buffer = np.empty((step, entry.row_bytes // entry.dtype.word), f"u{entry.dtype.word}")
        for at in range(start, stop, step):
            end = min(at + step, stop)
            bits = format.decode_rows(self.store.read_rows(name, at, end, out=buffer[: end - at]))
            if op is Op.TRANSPOSE:  # from memory, in strips: a second whole would cost more than their narrow reads
                for part in _parts(bits.shape[1], bits.shape[0] * format.dtype.itemsize, _STRIP * max_bytes, asked):
                    yield to_canonical(op, bits[:, part], self.config.head_dim)
            else:
                yield to_canonical(op, bits, self.config.head_dim)

    def fill(self, slot: Slot, out: Bits) -> None:
        """The tensor as `read` gives it into `out` [rows, columns], dense, of its dtype's words."""
        format, (name, _, start, stop, op) = self.format(slot), self.piece(slot)
        if not isinstance(format, Ggml) or op is not Op.KEEP:
            at = 0
            for block in self.blocks(slot, CHUNK):
                out[at : at + len(block)] = block
                at += len(block)
            return
        entry = self.store.entries[name]  # decoded in place: blocks are small, and their values are moved once
        step = min(stop - start, max(1, CHUNK // entry.row_bytes))
        buffer = np.empty((step, entry.row_bytes), np.uint8)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            bits = self.store.read_rows(name, at, end, out=buffer[: end - at])
            format.decode_rows(bits, out[at - start : end - start])

    def _decoded(self, slot: Slot, max_bytes: int, granule: int) -> Iterator[Bits]:
        """As `blocks`, of a matrix in another format: decoded whole, so that blocks do not change a bit.

        Raises TensorError for parts that contradict each other.
        """
        format = self.format(slot)
        try:
            dense = format.decode([self._tensor(entry) for entry in self.parts(slot)])
        except TensorError as error:
            raise TensorError(
                error.message, file=self.entry(slot).source.label, tensor=self.piece(slot).name,
                expected=error.expected, found=error.found,
            ) from None  # fmt: skip
        bits = to_canonical(self.piece(slot).op, from_tensor(dense), self.config.head_dim)
        for part in _parts(len(bits), bits.shape[1] * format.dtype.itemsize, max_bytes, granule):
            yield bits[part]

    def _tensor(self, entry: Entry) -> torch.Tensor:
        """A stored tensor, whole and in its own shape."""
        return to_tensor(self.store.read_rows(entry.name, 0, entry.rows), entry.dtype).reshape(entry.shape)

    def bits(self, slot: Slot) -> Bits:
        """The whole tensor's bit patterns in canonical form, [rows, columns]; a vector is one row."""
        return next(self.blocks(slot, 0, granule=0))

    def read(self, slot: Slot) -> torch.Tensor:
        """See Reader.read."""
        spec = self.spec(slot)
        return to_tensor(self.bits(slot), spec.dtype).reshape(spec.shape)

    def maps(self, slot: Slot) -> bool:
        """Whether the matrix's blocks, as they lie in their file, are its own: rows of a GGUF that keep their order."""
        format, piece = self.format(slot), self.piece(slot)
        return isinstance(format, Ggml) and piece.op is Op.KEEP and self.store.entries[piece.name].strides is None

    def packed(self, slot: Slot, mapped: Mapped = Mapped.NOT) -> Packed:
        """The matrix as it is stored, its rows in canonical order; where it `maps`, in its file if `mapped` wants it.

        Raises LayoutError where it lies transposed.
        """
        format, (name, _, start, stop, op) = self.format(slot), self.piece(slot)
        if op is Op.TRANSPOSE or (op is Op.ROTARY and not isinstance(format, ByRows)):
            raise LayoutError(f"is stored {op.value}; only its values can be read", file=self.place, tensor=name)
        if not isinstance(format, ByRows):
            return Packed(format, tuple(self._tensor(entry) for entry in self.parts(slot)))
        entry, bits = self.store.entries[name], None
        if mapped is not Mapped.NOT and self.maps(slot):
            bits = self.store.mapped_rows(name, start, stop, fetch=mapped is Mapped.NOW)
        if bits is None:
            bits = to_canonical(op, self.store.read_rows(name, start, stop), self.config.head_dim)
        return Packed(format, (to_tensor(bits, entry.dtype if entry.dtype.block == 1 else DType.U8),))

    def finish(self, earlier: Iterable[Slot] = ()) -> None:
        """Judge the checksums that need bytes which no slot covered, or which an earlier run read.

        `earlier`: slots that were read then. One that has a record to itself was judged then; a part of a
        stacked tensor, or a view of a larger storage, was not.
        """
        read = [pair for slot in earlier for pair in self._read_sizes(slot)]
        self.store.finish(entry.name for entry, size in read if entry.record and entry.record.size != size)

    def _read_sizes(self, slot: Slot) -> Iterator[tuple[Entry, int]]:
        """The stored tensors that a reading of the slot reads, and how many bytes of each."""
        _, _, start, stop, _ = self.piece(slot)
        by_rows = isinstance(self.format(slot), ByRows)
        for entry in self.parts(slot):
            yield entry, (stop - start) * entry.row_bytes if by_rows else entry.nbytes

    @property
    def beside(self) -> Path:
        """The folder of the documents: the weights' own, or of a GGUF one that its metadata has been written out to.

        Raises TokenizerError for a vocabulary that cannot be.
        """
        return self.folder if self.gguf is None else self.gguf.folder

    @property
    def place(self) -> Path:
        """What a user calls it: the folder, or the file that is all of it."""
        return self.folder if self.gguf is None else self.gguf.file

    @property
    def quantization(self) -> str | None:
        """The file type of a GGUF whose weights lie in blocks, or the kind of most matrices; None for a dense one."""
        found = self.quantized()
        return None if not found else self.gguf.file_type if self.gguf is not None else found[0].kind

    def quantized(self) -> list[Quantized]:
        """The quantized formats in it, that of most matrices first."""
        counts: Counter[Quantized] = Counter()
        for slot in self.slots():
            found = _format(self.piece(slot), self.store, self.about)
            if isinstance(found, Quantized):
                counts[found] += 1
        return [format for format, _ in counts.most_common()]

    def main_dtype(self) -> DType:
        """Of the dense weights, that of most bytes."""
        sizes: Counter[DType] = Counter()
        for shape, dtype in map(self.spec, self.slots()):
            sizes[dtype] += dtype.nbytes(shape)
        return max(sizes, key=sizes.__getitem__)

    def bytes_by_dtype(self) -> dict[DType, int]:
        counts: Counter[DType] = Counter()
        for entry in self.store.entries.values():
            counts[entry.dtype] += entry.nbytes
        return dict(counts)


@contextmanager
def located(source: Checkpoint, slot: Slot) -> Iterator[None]:
    """Errors within name the file and the tensor they are about."""
    try:
        yield
    except MixtoolsError as error:
        entry = source.entry(slot)
        error.file, error.tensor = error.file or str(entry.source.label), error.tensor or entry.name
        raise


def _parts(rows: int, row_bytes: int, max_bytes: int, granule: int) -> Iterator[slice]:
    """Runs of a multiple of `granule` rows, each about `max_bytes`; 0 gives one run."""
    step = max(1, max_bytes // (row_bytes * granule)) * granule if granule else rows
    return (slice(at, at + step) for at in range(0, rows, step))


def _format(piece: Piece, store: Store, about: Mapping[str, Any]) -> Format | None:
    """How what the piece names is stored; None if it is not there."""
    names = {suffix: piece.part(suffix) for suffix in SUFFIXES}
    there = {suffix: store.entries[name] for suffix, name in names.items() if name in store.entries}
    return detect({suffix: Stored(entry.dtype, entry.shape) for suffix, entry in there.items()}, about)


Expected = dict[str, tuple[Part, Format]]


def expected_tensors(
    layout: Layout, config: MixtralConfig, store: Store, about: Mapping[str, Any] | None = None
) -> Expected:
    """By name what must be stored: the parts of each slot, in the format found there; in none, of a plain one.

    `about`: see Checkpoint.
    """
    expected: Expected = {}
    for slot in config.slots():
        piece = layout.piece(slot, config)
        format = _format(piece, store, about or {}) or Plain(WEIGHT_DTYPES[0])
        if len(piece.shape) < 2:  # no format but the plain one is for vectors
            format = Plain(format.dtype)
        expected |= {piece.part(part.suffix): (part, format) for part in format.parts(piece.shape)}
    return expected


def unknown_tensors(layout: Layout, store: Store, expected: Expected) -> list[str]:
    """Names of what is stored and nobody expects, beside buffers that no model needs.

    auto-gptq gives its matrices biases of zeros, which do nothing; they are read. Raises what reading raises.
    """
    return [
        name
        for name, entry in store.entries.items()
        if name not in expected and not layout.ignores(name) and not _is_idle_bias(entry, store, expected)
    ]


def _is_idle_bias(entry: Entry, store: Store, expected: Expected) -> bool:
    """Zeros beside a quantized matrix."""
    stem, dot, last = entry.name.rpartition(".")
    if last != "bias" or f"{stem}{dot}weight" in expected or entry.dtype not in WEIGHT_DTYPES or len(entry.shape) != 1:
        return False
    if not any(f"{stem}{dot}{suffix}" in expected for suffix in SUFFIXES):
        return False
    return not to_tensor(store.read_rows(entry.name, 0, entry.rows), entry.dtype).any()


def find_problems(
    folder: Path, layout: Layout, config: MixtralConfig, store: Store, about: Mapping[str, Any] | None = None
) -> list[MixtoolsError]:
    """Full coverage in both directions, shapes and dtypes; the worst first, empty when all is well."""
    expected = expected_tensors(layout, config, store, about)
    missing = [name for name in expected if name not in store.entries]
    problems: list[MixtoolsError] = []
    unknown: list[str] = []
    try:
        unknown += unknown_tensors(layout, store, expected)
    except MixtoolsError as error:
        problems.append(error)
    if missing:
        why = f"lacks {_some(missing)}"
        if missing == [layout.rules[Role.HEAD].name]:
            why = (
                "lacks the output head alone, as a base model's save does; save the model with its head "
                "(MixtralForCausalLM), or set tie_word_embeddings to true where the head is the embedding"
            )
        problems.append(LayoutError(why, file=folder, tensor=missing[0]))
    if unknown:
        why = f"has {_some(unknown)} unknown to layout {layout.letter} ({layout.title})"
        if all(name.endswith(".bias") for name in unknown):
            why += "; no Mixtral has biases, and transformers ignores them" if not about else "; no Mixtral has biases"
        problems.append(LayoutError(why, file=store.entries[unknown[0]].source.label, tensor=unknown[0]))
    for name, (part, format) in expected.items():
        if (entry := store.entries.get(name)) is not None and (problem := _unfit(entry, part, format)) is not None:
            problems.append(problem)
    return problems


def _unfit(entry: Entry, part: Part, format: Format) -> TensorError | None:
    """Where a stored tensor is not what its format asks for."""
    place = {"file": entry.source.label, "tensor": entry.name}
    if entry.shape != part.shape:
        return TensorError("wrong shape", **place, expected=part.shape, found=entry.shape)
    if format.dtype not in WEIGHT_DTYPES:
        wanted = "/".join(dtype.value for dtype in WEIGHT_DTYPES)
        return TensorError("not a weight's dtype", **place, expected=wanted, found=format.dtype.value)
    if entry.dtype is not part.dtype:
        return TensorError("wrong dtype", **place, expected=part.dtype.value, found=entry.dtype.value)
    return None


def _some(names: list[str]) -> str:
    return "one tensor" if len(names) == 1 else f"{len(names)} tensors ({', '.join(names[:3])}, ...)"
