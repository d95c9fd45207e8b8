"""mixtools perplexity: how well a model predicts a text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import MemoryBudgetError, UsageError
from . import base

if TYPE_CHECKING:
    import torch

Text = Annotated[Path, typer.Option("--text", metavar="FILE", help="UTF-8 text, taken as it stands.")]
Protocol = Annotated[
    str, typer.Option("--protocol", metavar="gptq|llamacpp|hf", help="How the text is cut and counted.")
]
Ctx = Annotated[int | None, typer.Option("--ctx", metavar="N", help="Tokens a window: 2048; for llamacpp 512.")]
Stride = Annotated[int | None, typer.Option("--stride", metavar="N", help="Of the protocol hf: ctx/2.")]
MaxTokens = Annotated[
    int | None, typer.Option("--max-tokens", min=2, metavar="N", help="Take the text's first N tokens.")
]
Dtype = Annotated[str, typer.Option("--dtype", metavar="auto|bf16|f16|f32", help="To compute in; auto: as stored.")]


def perplexity(
    model: base.Model, text: Text,
    protocol: Protocol = "gptq", ctx: Ctx = None, stride: Stride = None, max_tokens: MaxTokens = None,
    dtype: Dtype = "auto", device: base.Device = "auto", max_memory: base.MaxMemory = None,
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> None:  # fmt: skip
    """Perplexity over a text, a layer at a time: the model may be larger than memory.

    Example: mixtools perplexity Mixtral-8x7B-v0.1 --text wikitext2-test.txt --protocol llamacpp
    """
    limit = base.max_memory_bytes(max_memory)
    base.check_device(device)
    from ..checking import judge
    from ..checking import perplexity as engine
    from ..inference.stream import Stream
    from ..layouts.detect import open_checkpoint
    from ..text.tokenizer import Tokenizer

    screen = base.Screen(json, quiet)
    content = engine.read_text(text)
    checkpoint = open_checkpoint(base.find_model(model))
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    if (remark := tokenizer.check_vocab(checkpoint.config)) is not None:
        screen.note(f"note: {remark}")
    ids = tokenizer.encode(content)
    windows = engine.cut(ids, protocol, bos_id=tokenizer.bos_id, ctx=ctx, stride=stride, max_tokens=max_tokens)
    where = base.find_device(device)
    stream = Stream(
        checkpoint, where, find_dtype(dtype) or judge.main_dtype(checkpoint),
        max_memory=memory_for(where, limit), progress=screen.progress(),
    )  # fmt: skip
    found = engine.measure(stream, windows)
    checkpoint.finish()
    document = found.document()
    screen.result(document, lambda: _tell(document))


def find_dtype(name: str) -> torch.dtype | None:
    """The dtype of a --dtype value; None for auto. Raises UsageError."""
    from ..conversion import DTYPES

    if name != "auto" and name not in DTYPES:
        raise UsageError(f"--dtype: {name!r} is none of auto, {', '.join(DTYPES)}")
    return None if name == "auto" else DTYPES[name].torch()


def memory_for(device: torch.device, limit: int | None) -> int | None:
    """Bytes for a model: what --max-memory leaves beside what the process has taken so far, else what is free.

    Raises MemoryBudgetError if the process alone takes more.
    """
    import torch

    if limit is not None:
        taken = base.peak_memory()
        if limit <= taken:
            raise MemoryBudgetError(
                "--max-memory is less than the program itself takes",
                expected=f"more than {base.human_bytes(taken)}", found=base.human_bytes(limit),
            )  # fmt: skip
        return limit - taken
    if device.type == "cuda":
        return int(0.9 * torch.cuda.mem_get_info(device)[0])
    return base.available_memory()


def _tell(document: dict[str, Any]) -> Iterator[str]:
    yield (
        f"perplexity {document['perplexity']:.4f} ± {document['stderr']:.4f} over {document['tokens']:,} tokens "
        f"(protocol {document['protocol']}, ctx {document['ctx']})"
    )
    for remark in document["remarks"]:
        yield f"  {remark}"
    memory = base.human_bytes(document["peak_memory_bytes"])
    yield f"  {base.human_time(document['seconds'])}, at most {memory} of memory"
