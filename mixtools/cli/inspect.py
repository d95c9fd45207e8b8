"""mixtools inspect: what lies in a folder, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import base

if TYPE_CHECKING:
    from ..layouts.checkpoint import Checkpoint

BAD_INPUT = 3


def inspect(
    model: base.Model,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read everything: checksums, truncation, NaN and Inf.")
    ] = False,
    json: base.Json = False,
    quiet: base.Quiet = False,
    debug: base.Debug = False,
) -> int:
    """Layout, configuration, sizes and problems of a checkpoint. Exit code 3 if it has problems.

    Example: mixtools inspect mixtral-8x7b-32kseqlen --verify
    """
    from ..layouts.detect import open_checkpoint

    screen = base.Screen(json, quiet)
    checkpoint = open_checkpoint(base.find_model(model), strict=False)
    document = summary(checkpoint)
    problems = list(checkpoint.problems)
    if verify:
        from ..checking.integrity import verify as read_all

        problems += read_all(checkpoint, screen.progress())
        document["verified"] = not problems
    document["problems"] = [problem.document()["error"] for problem in problems]
    if tensors:
        document["tensors_list"] = [_tensor(entry) for entry in checkpoint.store.entries.values()]
    screen.result(document, lambda: _tell(document))
    return BAD_INPUT if problems else 0


def summary(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `inspect` and `check` say of a checkpoint."""
    store = checkpoint.store
    sizes = {path.name: path.stat().st_size for source in store.sources for path in source.paths}
    found = {piece.name for piece in map(checkpoint.piece, checkpoint.slots())}
    return {
        "path": str(checkpoint.folder),
        "layout": checkpoint.layout.name,
        "title": checkpoint.layout.title,
        "config": asdict(checkpoint.config),
        "parameters": checkpoint.config.num_parameters,
        "tensors": len(store.entries),
        "bytes": sum(entry.nbytes for entry in store.entries.values()),
        "bytes_by_dtype": {dtype.value: count for dtype, count in checkpoint.bytes_by_dtype().items()},
        "quantization": None,
        "checksums": sum(entry.record is not None for entry in store.entries.values()),
        "missing": sorted(found - store.entries.keys()),
        "unknown": sorted(name for name in store.entries.keys() - found if not checkpoint.layout.ignores(name)),
        "files": sizes,
    }


def _tensor(entry: Any) -> dict[str, Any]:
    return {
        "name": entry.name, "dtype": entry.dtype.value, "shape": list(entry.shape), "bytes": entry.nbytes,
        "file": entry.source.label, "offset": entry.offset,
    }  # fmt: skip


def _tell(document: dict[str, Any]) -> Iterator[str]:
    config = document["config"]
    yield f"{document['path']}: {document['title']}"
    dtypes = ", ".join(f"{base.human_bytes(size)} {name}" for name, size in document["bytes_by_dtype"].items())
    yield f"  {document['parameters']:,} parameters in {document['tensors']} tensors: {dtypes}"
    yield (
        f"  {config['num_layers']} layers, {config['num_experts']} experts of which {config['experts_per_token']} run, "
        f"hidden {config['hidden_size']}, expert {config['intermediate_size']}, vocabulary {config['vocab_size']}"
    )
    yield (
        f"  {config['num_heads']} heads on {config['num_kv_heads']} key-value heads of {config['head_dim']}, "
        f"context {config['max_position_embeddings']}, rope theta {config['rope_theta']:g}"
    )
    covered = f"{document['checksums']} of {document['tensors']} tensors carry a checksum"
    yield f"  {len(document['files'])} files; {covered}"
    for tensor in document.get("tensors_list", ()):
        shape = "x".join(map(str, tensor["shape"]))
        yield f"  {tensor['name']:<60} {tensor['dtype']:>5} {shape:>14}  {base.human_bytes(tensor['bytes'])}"
    for problem in document["problems"]:
        yield f"problem: {problem['message']}"
    if document.get("verified"):
        yield "verified: every byte was read; checksums agree, no NaN or Inf"
    elif not document["problems"]:
        yield "complete by its headers; --verify reads the weights too"
