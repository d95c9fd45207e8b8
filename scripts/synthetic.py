"""Values of a synthetic Mixtral, and the writing of it in any layout.

The recipe of a matrix [m, n] (rows out, columns in), after which a spectrum, a quantizer and a rank rule see something
like a trained weight, and a test knows what was planted:

    W = sigma * (noise + sum_i t_i * edge / sqrt(m n) * u_i v_i^T), then OUTLIER_SCALE times its outlier columns

- noise: standard normal. Its largest singular value, the edge of its spectrum, is sqrt(m) + sqrt(n).
- planted rank: min(m, n) // 64. u_i and v_i are random signs, hence nearly orthogonal, and the singular values t_i
  times the edge, falling geometrically from t_1 = 6 to 2, stand clear of the noise. They are multiples of 1/16, so that
  the sum over i is one of whole numbers, exact in fp32 in whatever order a matrix product takes it.
- outlier columns: max(1, n // 1024) random ones, 8 times as large; each adds one more large singular value.
- sigma makes the variance of what is not an outlier 1 / n: a matrix keeps the variance of its input.

A matrix with fewer than 64 rows or columns (the router) is noise alone. A norm is 1 + 0.1 * noise.

Each value depends on the seed, the slot, the matrix's shape and its own place: not on the layout, the number of layers,
the order of writing, or dtype (bf16 and f16 are the f32 values, rounded to nearest even).
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mixtools import conversion, job
from mixtools.config import MixtralConfig, from_document
from mixtools.errors import TokenizerError, UsageError
from mixtools.formats import Plain
from mixtools.layouts.hf import HF, HF_BIN, HF_FUSED
from mixtools.layouts.table import Layout
from mixtools.layouts.torrent import CONSOLIDATED, SPLIT, STACKED, TORRENT
from mixtools.names import Slot
from mixtools.storage.dtypes import DType
from mixtools.storage.output import Output
from mixtools.storage.store import Bits
from mixtools.text import pieces

RECIPE = 1  # raised when the same seed no longer gives the same values
RANK_DIVISOR = 64
STRONGEST, WEAKEST, STEP = 6.0, 2.0, 16  # t_1, t_r, and t's denominator
OUTLIER_DIVISOR, OUTLIER_SCALE = 1024, 8.0
NORM_SPREAD = 0.1
BLOCK = 1 << 20  # elements drawn at once: 4 MB in fp32, which stay in the caches; part of the recipe
SPLIT_PARTS = 11  # as mirrored: consolidated.00.pth-split0 .. 10

LAYOUTS = (TORRENT, SPLIT, STACKED, CONSOLIDATED, HF, HF_BIN, HF_FUSED)
PRESETS = {
    "8x7b": MixtralConfig(4096, 14336, 32, 32, 8, 128, 32000),
    "8x22b": MixtralConfig(6144, 16384, 56, 48, 8, 128, 32000, max_position_embeddings=65536),
    "tiny": MixtralConfig(256, 512, 2, 4, 2, 64, 2048),
}
NANO_TOKENIZER = Path(__file__).parent.parent / "tests" / "data" / "nano-mixtral" / "tokenizer.model"

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Planted:
    """What a matrix of some shape holds besides noise."""

    rank: int
    strengths: tuple[int, ...]  # t_i * STEP, whole numbers, descending
    outliers: int

    @property
    def visible(self) -> int:
        """Singular values that stand above the noise's edge."""
        return self.rank + self.outliers


def planted(shape: tuple[int, ...]) -> Planted:
    """What is planted in a matrix of this shape; nothing in a vector or a narrow matrix."""
    rank = min(shape) // RANK_DIVISOR if len(shape) == 2 else 0
    if not rank:
        return Planted(0, (), 0)
    ratio = WEAKEST / STRONGEST
    strengths = tuple(round(STEP * STRONGEST * ratio ** (i / max(1, rank - 1))) for i in range(rank))
    return Planted(rank, strengths, max(1, shape[1] // OUTLIER_DIVISOR))


def noise_std(shape: tuple[int, ...]) -> float:
    """sigma: the standard deviation of a matrix's noise, which its planted rank leaves of 1 / sqrt(columns)."""
    unit = _low_rank_unit(shape)
    return 1 / math.sqrt(shape[1] * (1 + sum((unit * t) ** 2 for t in planted(shape).strengths)))


def _low_rank_unit(shape: tuple[int, ...]) -> float:
    """What a strength of one STEP of t adds to an element, in units of sigma."""
    return (1 / math.sqrt(shape[0]) + 1 / math.sqrt(shape[1])) / STEP


@dataclass(frozen=True)
class Model:
    """A synthetic Mixtral: any tensor on demand, in blocks of rows."""

    config: MixtralConfig
    seed: int

    def outlier_columns(self, slot: Slot) -> npt.NDArray[np.int64]:
        """Indices of the outlier columns of a matrix, ascending."""
        shape = self.config.shape(slot.role)
        chosen = self._random(slot, "outliers").permutation(shape[-1])[: planted(shape).outliers]
        return np.sort(chosen)

    def values(self, slot: Slot) -> Iterator[Floats]:
        """The tensor [rows, columns], in blocks of rows whose number is a power of two; a vector is one row.

        A block is valid until the next is asked for (its buffer is used again).
        """
        shape = self.config.shape(slot.role)
        if len(shape) == 1:
            yield (1 + NORM_SPREAD * self._random(slot, "noise", 0).standard_normal((1, *shape))).astype(np.float32)
            return
        m, n = shape
        plan, step = planted(shape), min(m, block_rows(n))
        low_rank_unit = _low_rank_unit(shape)
        left = self._signs(slot, "left", (m, plan.rank)) * np.array(plan.strengths, np.float32)
        right = self._signs(slot, "right", (plan.rank, n))
        scale = np.full(n, noise_std(shape), np.float32)
        scale[self.outlier_columns(slot)] *= np.float32(OUTLIER_SCALE)
        noise, low = np.empty((step, n), np.float32), np.empty((step, n), np.float32)
        for number, start in enumerate(range(0, m, step)):
            rows = min(step, m - start)
            block = noise[:rows]
            self._random(slot, "noise", number).standard_normal(out=block, dtype=np.float32)
            if plan.rank:
                np.matmul(left[start : start + rows], right, out=low[:rows])
                low *= np.float32(low_rank_unit)
                block += low[:rows]
            block *= scale
            yield block

    def blocks(self, slot: Slot, dtype: DType, granule: int) -> Iterator[Bits]:
        """Bit patterns of `values` in `dtype`, in runs of a multiple of `granule` rows; 0 gives one run."""
        shape = self.config.shape(slot.role)
        rows, columns = shape if len(shape) == 2 else (1, shape[0])
        step = block_rows(columns)
        if rows <= step or (granule and step % granule == 0):
            yield from (rounded(block, dtype) for block in self.values(slot))
            return
        whole = np.empty((rows, columns), f"u{dtype.itemsize}")
        for number, block in enumerate(self.values(slot)):
            whole[number * step : number * step + len(block)] = rounded(block, dtype)
        yield whole

    def _random(self, slot: Slot, *what: str | int) -> np.random.Generator:
        """A generator of its own for each use, so that any block can be made without those before it."""
        key = "/".join(map(str, ("mixtral", RECIPE, self.seed, slot, *what)))
        return np.random.Generator(np.random.SFC64(np.random.SeedSequence(int.from_bytes(key.encode(), "little"))))

    def _signs(self, slot: Slot, what: str, shape: tuple[int, int]) -> Floats:
        drawn = self._random(slot, what).integers(0, 2, shape, np.int8)
        return (2 * drawn - 1).astype(np.float32)


def block_rows(columns: int) -> int:
    """Rows of a block: the largest power of two within BLOCK elements, hence whole heads of q and k."""
    return 1 << max(0, (BLOCK // columns).bit_length() - 1)


def rounded(block: Floats, dtype: DType) -> Bits:
    """Bit patterns of fp32 values in `dtype`, rounded to nearest even; a copy."""
    bits = block.view(np.uint32)
    if dtype is DType.F32:
        return np.array(bits)
    if dtype is DType.F16:
        return np.asarray(block.astype(np.float16)).view(np.uint16)
    even = bits >> 16
    even &= 1
    even += 0x7FFF
    even += bits
    return np.asarray(even >> 16, np.uint16)


def layout_named(text: str) -> Layout:
    """A layout by its letter or its name. Raises UsageError for neither."""
    for layout in LAYOUTS:
        if text.lower() in (layout.letter.lower(), layout.name):
            return layout
    raise UsageError(f"layout {text!r} is not one of {', '.join(f'{lay.name} ({lay.letter})' for lay in LAYOUTS)}")


def write(
    model: Model, layout: Layout, dtype: DType, folder: Path, *,
    tokenizer: Path | None = None, max_shard_bytes: int = 5_000_000_000, how: job.Run | None = None,
) -> int:  # fmt: skip
    """Write the model into `folder`, resumably, as `mixtools convert` does; returns the bytes of its weight files.

    The tokenizer is the one given, or the tests' own where its vocabulary has the model's size.
    Raises the errors of storage.output; TokenizerError if a given tokenizer is another's.
    """
    how = how or job.Run()
    stored = TORRENT if layout is SPLIT else layout
    documents = _tokenizer(model.config, tokenizer)
    slots = list(model.config.slots())
    tensors = conversion.stored_tensors(stored, model.config, dict.fromkeys(slots, Plain(dtype)))
    plan = conversion.plan_for(stored, tensors, max_shard_bytes)
    key = {"synthetic": RECIPE, "seed": model.seed, "layout": stored.name}

    def blocks(slot: Slot) -> Iterator[Bits]:
        return model.blocks(slot, dtype, stored.granule(slot, model.config))

    units = [conversion.slot_unit(stored, slot, model.config, plan, functools.partial(blocks, slot)) for slot in slots]
    with Output(folder, plan, key, overwrite=how.overwrite, resume=how.resume) as output:
        how.progress.start("generating", sum(tensor.nbytes for tensor in plan.tensors.values()))
        how.progress.advance(output.done_bytes)
        job.write_tasks([job.UnitOf(unit, output) for unit in units], how)
        how.progress.finish()
        output.commit(documents, _configuration(model.config, layout, dtype))
    if layout is SPLIT:
        split(folder / "consolidated.00.pth")
    return plan.total_bytes


def split(path: Path) -> None:
    """Cut a file into SPLIT_PARTS parts, the last first, so that one part's room on the disk is enough."""
    size = path.stat().st_size
    part = -(-size // SPLIT_PARTS)
    with path.open("r+b") as whole:
        for number in reversed(range(1, SPLIT_PARTS)):
            start = min(size, number * part)
            with (path.parent / _torrent_file(number)).open("wb") as piece:
                _copy(whole.fileno(), start, piece.fileno(), min(size, start + part) - start)
                os.fsync(piece.fileno())
            whole.truncate(start)
        os.fsync(whole.fileno())
    path.rename(path.parent / _torrent_file(0))


def _torrent_file(number: int) -> str:
    return f"consolidated.00.pth-split{number}"


def _copy(source: int, start: int, target: int, count: int) -> None:
    done = 0
    while done < count:
        done += os.sendfile(target, source, start + done, count - done)


def _configuration(config: MixtralConfig, layout: Layout, dtype: DType) -> dict[str, bytes]:
    if layout in (HF, HF_BIN, HF_FUSED):
        return {"config.json": _json(config.to_hf(dtype.torch_name))}
    document = config.to_params()
    if layout is not CONSOLIDATED:  # the releases of 2023 left both to be known
        del document["rope_theta"], document["max_seq_len"]
    return {"params.json": _json(document)}


def _tokenizer(config: MixtralConfig, given: Path | None) -> dict[str, bytes]:
    for path in (given,) if given else (NANO_TOKENIZER,):
        data = pieces.read_model(path)
        size = len(pieces.read_pieces(data, path).all)
        if size == config.vocab_size:
            return {pieces.MODEL_FILE: data}
        if given:
            raise TokenizerError("is another model's", file=path, expected=f"{config.vocab_size} pieces", found=size)
    return {}


def configured(preset: str, overrides: Mapping[str, int | None]) -> MixtralConfig:
    """A preset with some fields replaced. Raises ConfigError if the result cannot be."""
    config = replace(PRESETS[preset], **{name: value for name, value in overrides.items() if value is not None})
    return from_document(config.to_params(), "options")


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2) + "\n").encode()
