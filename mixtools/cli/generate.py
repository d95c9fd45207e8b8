"""mixtools generate: text from a model."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from . import base

if TYPE_CHECKING:
    import torch

    from ..inference.generate import Options
    from ..inference.model import Mixtral
    from ..layouts.checkpoint import Checkpoint
    from ..text.tokenizer import Tokenizer

Message = dict[str, object]


def generate(
    model: base.Model,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", metavar="TEXT", help="Text to continue.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Instruct format; without --prompt, a conversation from standard input.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, metavar="N")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", metavar="T", help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", metavar="P", help="Mass of the likeliest tokens kept.")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", metavar="S")] = 0,
    dtype: Annotated[str, typer.Option("--dtype", metavar="auto|bf16|f16|f32", help="auto: as stored.")] = "auto",
    device: base.Device = "auto",
    max_memory: base.MaxMemory = None,
    json: base.Json = False,
    quiet: base.Quiet = False,
    debug: base.Debug = False,
) -> None:
    """Continue a text, or talk.

    Example: mixtools generate Mixtral-8x7B-v0.1 --prompt "The installer asks for" --max-new-tokens 32
    """
    if prompt is None and not chat:
        raise UsageError("generate needs --prompt TEXT or --chat")
    from ..inference.generate import Options
    from ..layouts.detect import open_checkpoint
    from ..text.tokenizer import Tokenizer

    screen = base.Screen(json, quiet)
    options = Options(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    checkpoint = open_checkpoint(base.find_model(model))
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    if (remark := tokenizer.check_vocab(checkpoint.config)) is not None:
        screen.note(f"note: {remark}")
    loaded = _load(checkpoint, dtype, device, base.max_memory_bytes(max_memory), screen)
    if prompt is None:
        _talk(loaded, tokenizer, options, screen)
        return
    messages: list[Message] = [{"role": "user", "content": prompt}]
    ids = tokenizer.encode_chat(messages) if chat else tokenizer.encode(prompt)
    began = time.monotonic()
    text, tokens = _answer(loaded, tokenizer, ids, options, show=not json)
    seconds = time.monotonic() - began
    document = {
        "text": text, "tokens": tokens, "prompt_tokens": len(ids), "seconds": round(seconds, 3),
        "tokens_per_second": round(len(tokens) / seconds, 2), "peak_memory_bytes": base.peak_memory(),
    }  # fmt: skip
    screen.result(document, lambda: ())
    screen.note(f"{len(tokens)} tokens in {base.human_time(seconds)}, {len(tokens) / seconds:.1f} a second")


def _load(checkpoint: Checkpoint, dtype: str, device: str, limit: int | None, screen: base.Screen) -> Mixtral:
    from ..inference.model import Mixtral

    where = base.find_device(device)
    if limit is None and where.type == "cpu":
        limit = base.available_memory()
    model = Mixtral.load(checkpoint, where, _dtype(checkpoint, dtype), max_memory=limit, progress=screen.progress())
    checkpoint.finish()
    return model


def _dtype(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype asked for; "auto" is the one that most of the weights are stored in."""
    from ..conversion import DTYPES

    if name != "auto" and name not in DTYPES:
        raise UsageError(f"--dtype: {name!r} is none of auto, {', '.join(DTYPES)}")
    sizes = checkpoint.bytes_by_dtype()
    return (max(sizes, key=sizes.__getitem__) if name == "auto" else DTYPES[name]).torch()


def _answer(
    model: Mixtral, tokenizer: Tokenizer, ids: list[int], options: Options, *, show: bool
) -> tuple[str, list[int]]:
    """The continuation of `ids` as text and tokens, printed as it comes."""
    from ..inference.generate import stream

    decoder = tokenizer.stream()
    for token in ids:
        decoder.push(token)  # so that the first new word keeps its blank
    text = ""
    tokens: list[int] = []

    def say(piece: str) -> None:
        nonlocal text
        text += piece
        if show:
            print(piece, end="", flush=True)

    for _, token in stream(model, [ids], options):
        tokens.append(token)
        say(decoder.push(token))
    say(decoder.finish() + "\n" * show)
    return text, tokens


def _talk(model: Mixtral, tokenizer: Tokenizer, options: Options, screen: base.Screen) -> None:
    """Turns from standard input, one a line, until it ends."""
    if screen.as_json:
        raise UsageError("--chat without --prompt is a conversation; --json needs --prompt")
    messages: list[Message] = []
    screen.note("one line is one turn; end with Ctrl-D")
    while True:
        if sys.stdin.isatty():
            print("> ", end="", flush=True, file=sys.stderr)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        text, _ = _answer(model, tokenizer, tokenizer.encode_chat(messages), options, show=True)
        messages.append({"role": "assistant", "content": text.strip()})
