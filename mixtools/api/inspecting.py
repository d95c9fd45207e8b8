"""mixtools.inspect: what lies in a folder, and whether it is whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

from ..errors import InputError
from ..machine import human_bytes
from ..options import Model
from ..progress import Callback, Progress, watched
from ..verbs import Option, Result


@dataclass(frozen=True)
class Inspection(Result):
    """`problems` is empty for a checkpoint that is whole; `verified` None where the weights were not read."""

    told: dict[str, Any]

    @property
    def problems(self) -> list[dict[str, Any]]:
        problems: list[dict[str, Any]] = self.told["problems"]
        return problems

    @property
    def verified(self) -> bool | None:
        return self.told.get("verified")

    @property
    def exit_code(self) -> int:
        return InputError.exit_code if self.problems else 0

    @property
    def document(self) -> dict[str, Any]:
        return self.told

    def lines(self) -> Iterator[str]:
        document = self.told
        config = document["config"]
        kind = f", {document['quantization']}" if document["quantization"] else ""
        yield f"{document['path']}: {document['title']}{kind}"
        dtypes = ", ".join(f"{human_bytes(size)} {name}" for name, size in document["bytes_by_dtype"].items())
        yield f"  {document['parameters']:,} parameters in {document['tensors']} tensors: {dtypes}"
        yield (
            f"  {config['num_layers']} layers, {config['num_experts']} experts of which {config['experts_per_token']} "
            f"run, hidden {config['hidden_size']}, expert {config['intermediate_size']}, vocabulary "
            f"{config['vocab_size']}"
        )
        yield (
            f"  {config['num_heads']} heads on {config['num_kv_heads']} key-value heads of {config['head_dim']}, "
            f"context {config['max_position_embeddings']}, rope theta {config['rope_theta']:g}"
        )
        if window := config["sliding_window"]:
            yield f"  a token sees {window} positions (sliding window)"
        if scaling := config["rope_scaling"]:
            yield f"  positions stretched: {scaling['type']}, by {scaling['factor']:g}"
        if document["tied"]:
            yield "  head and embedding are one tensor (tied)"
        covered = f"{document['checksums']} of {document['tensors']} tensors carry a checksum"
        yield f"  {len(document['files'])} files; {covered}"
        for quantized in document["quantized"]:
            yield f"  matrices as {quantized}"
        for tensor in document.get("tensors_list", ()):
            shape = "x".join(map(str, tensor["shape"]))
            yield f"  {tensor['name']:<60} {tensor['dtype']:>5} {shape:>14}  {human_bytes(tensor['bytes'])}"
        for problem in self.problems:
            yield f"problem: {problem['message']}"
        for remark in document["remarks"]:
            yield f"note: {remark}"
        if self.verified:
            yield "verified: every byte was read; checksums agree, no NaN or Inf"
        elif not self.problems:
            yield "complete by its headers; --verify reads the weights too"


def inspect(
    model: Model,
    *,
    tensors: Annotated[bool, Option("", "List every tensor.")] = False,
    verify: Annotated[bool, Option("", "Read everything: checksums, truncation, NaN and Inf.")] = False,
    progress: Progress | Callback | None = None,
) -> Inspection:
    """Layout, configuration, sizes and problems of a checkpoint. Exit code 3 if it has problems.

    Example: mixtools inspect mixtral-8x7b-32kseqlen --verify

    Raises InputError for what is no checkpoint at all.
    """
    from ..checking.integrity import summary
    from ..checking.integrity import verify as read_all
    from ..hub.opening import open_model

    checkpoint = open_model(model, strict=False)
    document = summary(checkpoint)
    problems = list(checkpoint.problems)
    if verify:
        problems += read_all(checkpoint, watched(progress))
        document["verified"] = not problems
    document["problems"] = [problem.document()["error"] for problem in problems]
    document["tied"] = checkpoint.tied
    document["remarks"] = list(checkpoint.remarks)
    if tensors:
        document["tensors_list"] = [
            {"name": entry.name, "dtype": entry.dtype.value, "shape": list(entry.shape), "bytes": entry.nbytes,
             "file": entry.source.label, "offset": entry.offset}
            for entry in checkpoint.store.entries.values()
        ]  # fmt: skip
    return Inspection(document)
