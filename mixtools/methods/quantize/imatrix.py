"""mixtools.imatrix from start to end: a text through the model, and what it says of each column as one file."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from ...errors import OutputError, OutputExists, UsageError
from ...machine import (
    check_device,
    find_device,
    human_bytes,
    human_time,
    memory_for,
    parse_limit,
    peak_memory,
    product_rate,
)
from ...options import ComputeDtype, Device, DryRun, MaxMemory, ParseSpecial, Source
from ...progress import Callback, Progress, watched
from ...verbs import Forecast, Option, Result

if TYPE_CHECKING:
    from torch import Tensor

    from ...config import MixtralConfig
    from ...inference.stream import Stream
    from ...layouts.checkpoint import Checkpoint

FEW_TOKENS = 128  # from which on a mean square is known to about an eighth: normal inputs give sqrt(2 / tokens)
_SHOWN = 12  # starved experts, each

OutFile = Annotated[str | Path, Option("OUT.gguf", "File to write; it must be new.", argument=True)]


class Visited(NamedTuple):
    """How many tokens each expert of a layer was sent."""

    layer: int
    experts: tuple[int, ...]

    def document(self) -> dict[str, Any]:
        low, middle, high = min(self.experts), statistics.median(self.experts), max(self.experts)
        return {"layer": self.layer, "min": low, "median": middle, "max": high, "experts": list(self.experts)}


@dataclass(frozen=True)
class Collected(Result):
    """What was written, and whose figures rest on little: `starved` experts were sent fewer than FEW_TOKENS tokens."""

    output: Path
    model: str
    bytes: int
    datasets: tuple[str, ...]
    chunks: int
    chunk_size: int
    entries: int
    layers: tuple[Visited, ...]
    seconds: float
    peak_memory_bytes: int
    remarks: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def starved(self) -> list[dict[str, int]]:
        return [
            {"layer": visited.layer, "expert": expert, "tokens": tokens}
            for visited in self.layers
            for expert, tokens in enumerate(visited.experts)
            if tokens < FEW_TOKENS
        ]

    @property
    def document(self) -> dict[str, Any]:
        return {
            "output": str(self.output), "bytes": self.bytes, "datasets": list(self.datasets), "chunks": self.chunks,
            "chunk_size": self.chunk_size, "tokens": self.chunks * self.chunk_size, "entries": self.entries,
            "layers": [visited.document() for visited in self.layers],
            "starved": self.starved, "starved_below": FEW_TOKENS, "remarks": list(self.remarks),
            "seconds": self.seconds, "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield f"{'layer':>5}  {'tokens per expert: least':>24}  {'median':>9}  {'most':>9}"
        for visited in self.layers:
            told = visited.document()
            yield f"{told['layer']:>5}  {told['min']:>24,}  {told['median']:>9,.10g}  {told['max']:>9,}"
        yield from _starved(self.starved)
        yield from (f"note: {remark}" for remark in self.remarks)
        text = f"{self.chunks} chunks of {self.chunk_size} tokens of {', '.join(self.datasets)}"
        yield f"wrote {self.output}: {self.entries} entries, {human_bytes(self.bytes)}, from {text}"
        yield f"  {human_time(self.seconds)}, at most {human_bytes(self.peak_memory_bytes)} of memory"
        yield f"Use it with: mixtools quantize {self.model} OUT --method gguf --type Q4_K_M --imatrix {self.output}"


def imatrix(
    source: Source, out: OutFile, *,
    text: Annotated[str | Path, Option("FILE", "UTF-8 text, like what the model will read.")],
    ctx: Annotated[int, Option("N", "Tokens a chunk.", low=4)] = 512,
    chunks: Annotated[int | None, Option("N", "Take the text's first N chunks.", low=1)] = None,
    process_output: Annotated[bool, Option("", "An entry for the head, too.")] = False,
    parse_special: ParseSpecial = False, dtype: ComputeDtype = "f32",
    dry_run: DryRun = False,
    overwrite: Annotated[bool, Option("", "Replace an importance matrix in OUT.gguf.", machine=True)] = False,
    max_memory: MaxMemory = None, device: Device = "auto",
    progress: Progress | Callback | None = None,
) -> Collected | Forecast:  # fmt: skip
    """How much each column of each matrix matters over a text, for `quantize --imatrix` and llama.cpp's llama-quantize.

    The text is cut and counted as llama-imatrix does it, without its trailing line end, BOS first in each chunk. In f32
    the sums equal llama.cpp's; --dtype auto takes half the memory, and a few tokens may choose other experts. A layer
    at a time: the model may be larger than memory. A run that was interrupted begins anew.

    Example: mixtools imatrix Mixtral-8x7B-v0.1 Mixtral-8x7B.imatrix.gguf --text calibration.txt

    Source: importance.py. The bytes are the same from run to run on as many threads; on others, products may round
    otherwise in the last place. Raises UsageError for options that cannot be, OutputExists, OutputError where the file
    cannot be written, InputError for a text that is too short or no UTF-8, TokenizerError, MemoryBudgetError where not
    even one layer fits, TensorError for a model that gives NaN.
    """
    began = time.monotonic()
    limit, path = parse_limit(max_memory), Path(out)
    check_device(device)
    from ...conversion import compute_dtype

    asked = compute_dtype(dtype)
    if chunks is not None and chunks < 1:
        raise UsageError(f"--chunks {chunks}: take at least one")
    if path.suffix != ".gguf":
        raise UsageError("is no name of an importance matrix here: let it end in .gguf", file=path)
    if not dry_run:
        expect_free(path, overwrite)
    from ...hub.opening import open_model
    from ...inference.stream import Stream
    from ...text.reading import line_ends, read_text
    from . import collect, importance

    content = read_text(Path(text))
    checkpoint = open_model(source)
    sequences, remark = _cut(content, checkpoint, (ctx, chunks), parse_special)
    where = find_device(device)
    kind = asked or checkpoint.main_dtype().torch()
    stream = Stream(checkpoint, where, kind, max_memory=memory_for(where, limit), progress=watched(progress))
    if dry_run:
        shapes = collect.shapes(checkpoint.config, process_output)
        return _forecast(stream, len(sequences), ctx, importance.encoded_bytes(shapes, [Path(text).name]))
    sums, counts = collect.collect(stream, sequences, process_output=process_output)
    checkpoint.finish()
    found = importance.Importance(sums, counts, (Path(text).name,), len(sequences), ctx, path)
    data = importance.encode(found)
    _write(path, data)
    told = [line_ends(content), *stream.remarks]
    if chunks is not None and len(sequences) < chunks:
        told.append(f"the text fills {len(sequences)} chunks, not {chunks}")
    named = str(source if isinstance(source, str | Path) else checkpoint.place)
    return Collected(
        path, named, len(data), found.datasets, found.chunks, ctx, len(sums),
        tuple(_visited(checkpoint.config, counts)), round(time.monotonic() - began, 3), peak_memory(),
        tuple(line for line in told if line), (*checkpoint.remarks, *([remark] if remark else [])),
    )  # fmt: skip


def _cut(
    content: str, checkpoint: Checkpoint, size: tuple[int, int | None], parse_special: bool
) -> tuple[tuple[Tensor, ...], str | None]:
    """The ids of chunks, of so many tokens and at most so many, and what a user should know of the tokenizer."""
    from ...checking import perplexity as engine
    from ...text.tokenizer import Tokenizer

    ctx, chunks = size
    tokenizer = Tokenizer.from_folder(checkpoint.beside)
    ids = tokenizer.encode(content.removesuffix("\n"), parse_special=parse_special)
    ids = ids[: None if chunks is None else chunks * ctx]
    tokenizer.expect_known(ids, checkpoint.config)
    found = engine.cut(ids, "llamacpp", bos_id=tokenizer.bos_id, ctx=ctx)
    return found.sequences, tokenizer.check_vocab(checkpoint.config)


def _visited(config: MixtralConfig, counts: Mapping[str, Any]) -> Iterator[Visited]:
    from ...layouts.gguf import GGUF
    from ...names import Role, Slot

    for layer in range(config.num_layers):
        name = GGUF.piece(Slot(Role.GATE, layer, 0), config).name
        yield Visited(layer, tuple(int(count) for count in counts[name]))


def _starved(experts: list[dict[str, int]]) -> Iterator[str]:
    for some, what in (
        ([one for one in experts if not one["tokens"]], "no token, so that all its columns weigh the same"),
        ([one for one in experts if one["tokens"]], f"fewer than {FEW_TOKENS} tokens"),
    ):
        shown = ", ".join(f"layer {one['layer']} expert {one['expert']} ({one['tokens']})" for one in some[:_SHOWN])
        more = f" and {len(some) - _SHOWN} more, which --json lists" if len(some) > _SHOWN else ""
        if some:
            number = f"{len(some)} expert{'s' if len(some) > 1 else ''} saw {what}"
            yield f"starved: {number}: {shown}{more}; a longer or more varied text would reach them"


# --- before and after ---


def expect_free(path: Path, overwrite: bool) -> None:
    """Raises OutputExists for what is there already, unless it is an importance matrix that may go, and OutputError
    where no file can be written.
    """
    from ...layouts.gguf_files import is_importance

    if os.path.lexists(path):
        if path.is_symlink() or not path.is_file():
            raise OutputExists("is there already, and no file; name another", file=path)
        if not is_importance(path):
            raise OutputExists("is there already, and no importance matrix; --overwrite leaves it alone", file=path)
        if not overwrite:
            raise OutputExists("is there already; --overwrite replaces it", file=path)
    if not path.parent.is_dir():
        raise OutputError("its folder is not there", file=path)
    _write(path, b"", probe=True)  # told now, and not when all has been computed


def _write(path: Path, data: bytes, probe: bool = False) -> None:
    """Whole or not at all: under another name until it is on the disk. `probe`: that other file alone, and gone."""
    from ...storage import disk

    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with disk.DiskErrors(path.parent):
            disk.write_durably(part, data)
            if not probe:
                part.replace(path)
                disk.sync_folder(path.parent)
    finally:
        with contextlib.suppress(OSError):  # gone by its other name, or never there
            part.unlink()


def _forecast(stream: Stream, chunks: int, ctx: int, size: int) -> Forecast:
    """Memory is an upper bound; time is the products over a measured rate."""
    from . import collect

    config = stream.config
    stream.reserved += collect.reserved_bytes(config, stream.device)
    memory = peak_memory() + stream.plan([ctx] * chunks).peak_bytes
    seconds = round(chunks * ctx * collect.token_flop(config, ctx) / product_rate(stream.device), 1)
    document = {
        "dry_run": True, "chunks": chunks, "chunk_size": ctx, "tokens": chunks * ctx, "layers": config.num_layers,
        "bytes": size, "seconds": seconds, "peak_memory_bytes": memory,
    }  # fmt: skip
    said = (
        f"would send {chunks} chunks of {ctx} tokens through {config.num_layers} layers, and write {human_bytes(size)}",
        f"memory at most {human_bytes(memory)}; about {human_time(max(seconds, 0.1))} of arithmetic",
    )
    return Forecast(size, memory, seconds, document, said)
