"""mixtools.generate: text from a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError
from ..machine import available_memory, check_device, find_device, human_time, parse_limit, peak_memory
from ..options import Device, ExpertsPerToken, MaxMemory, Model
from ..progress import Callback, Progress, watched
from ..verbs import Option, Result

if TYPE_CHECKING:
    from ..inference.generate import Options
    from ..inference.model import Mixtral
    from ..text.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Generated(Result):
    """`tokens` are the new ids, `text` what they spell."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    seconds: float
    peak_memory_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / max(self.seconds, 1e-9)

    @property
    def document(self) -> dict[str, Any]:
        return {
            "text": self.text, "tokens": list(self.tokens), "prompt_tokens": self.prompt_tokens,
            "seconds": round(self.seconds, 3), "tokens_per_second": round(self.tokens_per_second, 2),
            "peak_memory_bytes": self.peak_memory_bytes,
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        yield self.text


@dataclass(frozen=True)
class Talker:
    """A model in memory that answers as often as it is asked."""

    model: Mixtral
    tokenizer: Tokenizer
    options: Options
    notes: tuple[str, ...]

    def answer(self, prompt: str | Sequence[Mapping[str, object]], on_text: Say | None = None) -> Generated:
        """Continue a text, or the conversation `prompt`; `on_text` is told the new text piece by piece."""
        from ..inference.generate import stream

        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else self.tokenizer.encode_chat([*prompt])
        began = time.monotonic()
        decoder = self.tokenizer.stream()
        for token in ids:
            decoder.push(token)  # so that the first new word keeps its blank
        pieces: list[str] = []
        tokens: list[int] = []

        def say(piece: str) -> None:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

        for _, token in stream(self.model, [ids], self.options):
            tokens.append(token)
            say(decoder.push(token))
        say(decoder.finish())
        seconds = time.monotonic() - began
        notes = (
            *self.notes,
            f"{len(tokens)} tokens in {human_time(seconds)}, {len(tokens) / max(seconds, 1e-9):.1f} a second",
        )
        return Generated("".join(pieces), tuple(tokens), len(ids), seconds, peak_memory(), notes)


def generate(
    model: Model,
    prompt: Annotated[str | None, Option("TEXT", "Text to continue.", flags=("--prompt", "-p"))] = None,
    *,
    chat: Annotated[bool, Option("", "Instruct format; without --prompt, a conversation from standard input.")] = False,
    max_new_tokens: Annotated[int, Option("N", low=1)] = 256,
    temperature: Annotated[float, Option("T", "0 is greedy.")] = 0.0,
    top_p: Annotated[float, Option("P", "Mass of the likeliest tokens kept.")] = 1.0,
    seed: Annotated[int, Option("S")] = 0,
    experts_per_token: ExpertsPerToken = None,
    dtype: Annotated[str, Option("auto|bf16|f16|f32", "auto: as stored.")] = "auto",
    device: Device = "auto",
    max_memory: MaxMemory = None,
    on_text: Say | None = None,
    progress: Progress | Callback | None = None,
) -> Generated:
    """Continue a text, or talk.

    Example: mixtools generate Mixtral-8x7B-v0.1 --prompt "The installer asks for" --max-new-tokens 32

    `chat` takes the prompt as a user's message. `on_text` is told each new piece of text as it comes. The whole model
    is in memory: for several prompts, `talker` once and `answer` for each. Raises UsageError for options that cannot
    be, MemoryBudgetError for a model that does not fit, and what reading it raises.
    """
    if prompt is None:
        raise UsageError("generate needs --prompt TEXT or --chat")
    ready = talker(
        model, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, dtype=dtype,
        experts_per_token=experts_per_token, device=device, max_memory=max_memory, progress=progress,
    )  # fmt: skip
    return ready.answer([{"role": "user", "content": prompt}] if chat else prompt, on_text)


def talker(
    model: Model, *, dtype: str = "auto", device: str = "auto", max_memory: str | int | None = None,
    experts_per_token: int | None = None, progress: Progress | Callback | None = None, **options: Any,
) -> Talker:  # fmt: skip
    """A model read into memory. `options` are those of inference.generate.Options. Raises as `generate`."""
    limit = parse_limit(max_memory)
    check_device(device)
    from ..hub.opening import open_model
    from ..inference.generate import Options
    from ..inference.model import Mixtral
    from ..text.tokenizer import Tokenizer
    from .measuring import compute_dtype, with_experts

    how = Options(**options)
    checkpoint, rerouted = with_experts(open_model(model), experts_per_token)
    tokenizer = Tokenizer.from_folder(checkpoint.folder)
    remark = tokenizer.check_vocab(checkpoint.config)
    where = find_device(device)
    if limit is None and where.type == "cpu":
        limit = available_memory()
    kind = compute_dtype(dtype) or checkpoint.main_dtype().torch()
    loaded = Mixtral.load(checkpoint, where, kind, max_memory=limit, progress=watched(progress))
    checkpoint.finish()
    return Talker(loaded, tokenizer, how, tuple(told for told in (remark, rerouted) if told))
