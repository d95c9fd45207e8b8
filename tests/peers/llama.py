"""llama.cpp through llama-cpp-python: its logits, its quantizer, its words when it refuses."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import llama_cpp
import numpy as np
import torch
from gguf.quants import dequantize
from llama_cpp import llama_cpp as library

from mixtools.layouts.gguf_config import FILE_TYPES
from mixtools.storage.dtypes import DType
from mixtools.storage.gguf import ALIGNMENT, TYPES, encode_header, read_header
from mixtools.storage.source import Source

# exact as far as it goes: one thread, and keys and values as they are computed
EXACTLY = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": False, "type_k": 0, "type_v": 0}
_PLANNED = re.compile(r"\[ *\d+/ *\d+\] (\S+) +- \[[^]]*\], type = +(\S+), size = .*?MiB(?: -> .*?\((\S+)\))?\n")
_said: list[str] = []


@library.llama_log_callback
def _listen(level: int, text: bytes, data: object) -> None:
    _said.append(text.decode("utf-8", "replace"))


library.llama_log_set(_listen, None)
library.llama_backend_init()


class RefusedError(Exception):
    """What llama.cpp said."""


class Kept(NamedTuple):
    """A tensor of a file, as the gguf package reads it."""

    type: str
    shape: tuple[int, ...]
    data: bytes


class Figures(NamedTuple):
    """Of logits beside others. `same_top`: share of positions with the same likeliest token."""

    kld: float
    median: float
    same_top: float


# --- the model ---


@contextlib.contextmanager
def loaded(file: Path, **options: Any) -> Iterator[llama_cpp.Llama]:
    """Raises RefusedError for a file that it does not load."""
    _said.clear()
    try:
        model = llama_cpp.Llama(str(file), verbose=True, **{**EXACTLY, **options})
    except ValueError as error:
        raise RefusedError("".join(_said)) from error
    try:
        yield model
    finally:
        model.close()


def logits(file: Path, windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """[tokens of all windows, V]: each window is a text of its own."""
    longest = max(map(len, windows))
    found = []
    with loaded(file, n_ctx=longest, n_batch=longest, n_ubatch=longest, logits_all=True) as model:
        for window in windows:
            model.reset()
            model.eval(list(window))
            found.append(torch.from_numpy(np.array(model.scores[: len(window)])))
    return torch.cat(found)


def beside(theirs: torch.Tensor, ours: torch.Tensor) -> Figures:
    """Logits [N, V] each: how far the second's distributions are from the first's."""
    p, q = (logits.double().log_softmax(-1) for logits in (theirs, ours))
    kld = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return Figures(float(kld.mean()), float(kld.median()), float(same))


# --- files ---


def tensors(file: Path) -> dict[str, Kept]:
    found = gguf.GGUFReader(file).tensors
    return {
        one.name: Kept(one.tensor_type.name, tuple(int(size) for size in reversed(one.shape)), one.data.tobytes())
        for one in found
    }


def in_f32(file: Path, out: Path) -> Path:
    """The same model with every tensor decoded to F32 by the gguf package: over it llama.cpp rounds nothing."""
    source = Source(file)
    header = read_header(source)
    source.close()
    shapes = [(entry.name, DType.F32, entry.shape) for entry in header.entries]
    head, offsets = encode_header({key: v for key, v in header.metadata.items() if key != ALIGNMENT}, shapes)
    decoded = {one.name: dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(file).tensors}
    with out.open("wb") as stream:
        stream.write(head)
        for (name, _, _), offset in zip(shapes, offsets, strict=True):
            stream.seek(offset)
            stream.write(decoded[name].astype("<f4").tobytes())
        stream.write(bytes(-stream.tell() % 32))
    return out


# --- the quantizer ---


def quantize(source: Path, out: Path, type: str, importance: Mapping[str, np.ndarray] | None = None, **how: Any) -> str:
    """What llama-quantize does. `importance`: flat, by the name of a tensor. Raises RefusedError.

    `tensor_types`: pairs of a regular expression and a type; `output`, `embedding`: types; `pure`, `dry_run`.
    Returns what it said.
    """
    asked = library.llama_model_quantize_default_params()
    asked.nthread, asked.ftype = 1, FILE_TYPES[type]
    asked.pure, asked.dry_run = how.get("pure", False), how.get("dry_run", False)
    if how.get("output"):
        asked.output_tensor_type = TYPES[how["output"]]
    if how.get("embedding"):
        asked.token_embedding_type = TYPES[how["embedding"]]
    held: list[Any] = []  # ctypes keeps no array alive that a pointer in it leads to
    if importance is not None:
        rows = (library.llama_model_imatrix_data * (len(importance) + 1))()
        for row, (name, values) in zip(rows, importance.items(), strict=False):
            flat = np.ascontiguousarray(values, np.float32).reshape(-1)
            held.append(flat)
            row.name, row.size = name.encode(), flat.size
            row.data = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        asked.imatrix = rows
    if how.get("tensor_types"):
        overrides = (library.llama_model_tensor_override * (len(how["tensor_types"]) + 1))()
        for override, (pattern, dtype) in zip(overrides, how["tensor_types"], strict=False):
            override.pattern, override.type = pattern.encode(), TYPES[dtype]
        asked.tt_overrides = overrides
    _said.clear()
    status = library.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(asked))
    if status:
        raise RefusedError("".join(_said))
    return "".join(_said)


def planned(source: Path, type: str, importance: Mapping[str, np.ndarray] | None = None, **how: Any) -> dict[str, str]:
    """The type that it would give each tensor; `""` -> "imatrix" if it would ask for one. Reads no weight."""
    said = quantize(source, Path("unwritten"), type, importance, dry_run=True, **how)
    found = {name: (new or old).upper() for name, old, new in _PLANNED.findall(said)}
    return found | ({"": "imatrix"} if "will require an imatrix" in said else {})
