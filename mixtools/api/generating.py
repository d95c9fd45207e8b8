"""mixtools.generate: text from a model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from ..errors import UsageError
from ..machine import check_device, find_device, human_time, memory_for, parse_limit, peak_memory
from ..options import Device, ExpertsPerToken, MaxMemory, Model, ParseSpecial
from ..progress import Callback, Progress, watched
from ..verbs import Option, Result

if TYPE_CHECKING:
    from ..inference.generate import Options
    from ..inference.model import Mixtral
    from ..text.tokenizer import Tokenizer

Say = Callable[[str], None]


@dataclass(frozen=True)
class Generated(Result):
    """`tokens` are the new ids, `text` what they spell, up to the stop text that the last of them complete."""

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
    """A model in memory that answers as often as it is asked.

    `stop`: texts at which an answer ends. `parse_special`: special tokens in a text to continue are meant.
    """

    model: Mixtral
    tokenizer: Tokenizer
    options: Options
    notes: tuple[str, ...]
    stop: tuple[str, ...] = ()
    parse_special: bool = False

    def ids(self, prompt: str | Sequence[Mapping[str, object]]) -> list[int]:
        """The ids of a text, or of a conversation in the model's own format.

        Raises TokenizerError for a conversation that the model's template refuses, a model that has none, and a token
        that the model has no row for.
        """
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt, parse_special=self.parse_special)
        else:
            ids = self.tokenizer.encode_chat(prompt)
        self.tokenizer.expect_known(ids, self.model.config)
        return ids

    def answer(self, prompt: str | Sequence[Mapping[str, object]], on_text: Say | None = None) -> Generated:
        """Continue a text, or the conversation `prompt`; `on_text` is told the new text piece by piece.

        Raises as `ids` does, and UsageError for a prompt that fills the model's positions.
        """
        from ..inference.generate import stream
        from ..text.stopping import Until

        ids = self.ids(prompt)
        began = time.monotonic()
        until = Until(self.stop)
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
            if token < self.tokenizer.vocab_size:  # a row that pads the model has no spelling
                say(until.push(decoder.push(token)))
            if until.done:
                break
        say(until.push(decoder.finish()))
        say(until.finish())
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
    chat: Annotated[
        bool, Option("", "By the model's own chat template; without --prompt, a conversation from standard input.")
    ] = False,
    system: Annotated[str | None, Option("TEXT", "System message of --chat.")] = None,
    stop: Annotated[list[str] | None, Option("TEXT", "Stop where this is written; may be given again.")] = None,
    parse_special: ParseSpecial = False,
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

    `chat` takes the prompt as a user's message. Generation ends at every end of text that the model declares, at the
    texts `stop` (which are not part of the answer), and after `max_new_tokens`. `on_text` is told each new piece of
    text as it comes. The whole model is in memory: for several prompts, `talker` once and `answer` for each. Raises
    UsageError for options that cannot be, MemoryBudgetError for a model that does not fit, TokenizerError for a model
    without a chat template or one that refuses the conversation, and what reading it raises.
    """
    if prompt is None:
        raise UsageError("generate needs --prompt TEXT or --chat")
    check_chat(chat, system, parse_special)
    ready = talker(
        model, stop=stop, parse_special=parse_special, experts_per_token=experts_per_token, dtype=dtype, device=device,
        max_memory=max_memory, progress=progress, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        seed=seed,
    )  # fmt: skip
    return ready.answer([*opening(system), {"role": "user", "content": prompt}] if chat else prompt, on_text)


def check_chat(chat: bool, system: str | None, parse_special: bool) -> None:
    """Raises UsageError for options that do not go together."""
    if system is not None and not chat:
        raise UsageError("--system belongs to --chat")
    if parse_special and chat:
        raise UsageError("--parse-special belongs to --prompt without --chat: a chat template's own tokens are meant")


def opening(system: str | None) -> list[dict[str, object]]:
    """The messages that begin a conversation."""
    return [] if system is None else [{"role": "system", "content": system}]


def talker(
    model: Model, *, stop: Sequence[str] | None = None, parse_special: bool = False,
    experts_per_token: int | None = None, dtype: str = "auto", device: str = "auto",
    max_memory: str | int | None = None, progress: Progress | Callback | None = None, **options: Any,
) -> Talker:  # fmt: skip
    """A model read into memory. `options` are those of inference.generate.Options but `stop`. Raises as `generate`."""
    stops = tuple(stop or ())
    if "" in stops:
        raise UsageError("--stop needs a text; the empty one is everywhere")
    limit = parse_limit(max_memory)
    check_device(device)
    from ..conversion import compute_dtype
    from ..hub.opening import open_model
    from ..inference.generate import Options
    from ..inference.loading import load, paged, widened
    from ..ops.gpu import able
    from ..text.tokenizer import Tokenizer
    from .measuring import with_experts

    Options(**options)  # wrong ones are refused before anything is read
    checkpoint, rerouted = with_experts(open_model(model), experts_per_token)
    tokenizer = Tokenizer.from_folder(checkpoint.beside)
    remark = tokenizer.check_vocab(checkpoint.config)
    # a special token is never printed, so it is looked for by its id
    ends = (*tokenizer.end_ids, *(tokenizer.special[text] for text in stops if text in tokenizer.special))
    how = Options(**options, stop=ends)
    where = find_device(device)
    room, beyond = memory_for(where, limit), limit is None  # a limit that was asked for is kept
    kind = compute_dtype(dtype) or checkpoint.main_dtype().torch()
    loaded = load(checkpoint, where, kind, max_memory=room, beyond=beyond, progress=watched(progress))
    checkpoint.finish()
    wide = able.remark(where) or widened(checkpoint, loaded)
    slow = paged(checkpoint, loaded, room)
    notes = tuple(told for told in (*checkpoint.remarks, remark, rerouted, wide, slow) if told)
    return Talker(loaded, tokenizer, how, notes, stops, parse_special)
