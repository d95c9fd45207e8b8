"""mixtools.perplexity and mixtools.check: how well a model predicts a text, and an output against its source."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from ..machine import check_device, find_device, human_bytes, human_time, memory_for, parse_limit
from ..options import (
    ComputeDtype,
    Ctx,
    Device,
    ExpertsPerToken,
    MaxMemory,
    MaxTokens,
    Model,
    ParseSpecial,
    Protocol,
    Stride,
)
from ..progress import Callback, Progress, watched
from ..verbs import Option, Result

if TYPE_CHECKING:
    from ..checking.judge import Check
    from ..layouts.checkpoint import Checkpoint
else:
    Checkpoint = Path  # not imported for the command line, where a model is a text

Output = Annotated[
    str | Path | Checkpoint, Option("OUTPUT", "What was made: folder, or org/name[@revision].", argument=True)
]
Against = Annotated[str | Path | Checkpoint, Option("SOURCE", "What it was made from.")]


@dataclass(frozen=True)
class Measured(Result):
    """`stderr` is the perplexity's own, `tokens` are the predictions counted.

    `word_perplexity` and `byte_perplexity` are of the words and UTF-8 bytes that these tokens spell
    (checking/perplexity.py tells exactly); None where they spell none.
    """

    perplexity: float
    word_perplexity: float | None
    byte_perplexity: float | None
    stderr: float
    tokens: int
    protocol: str
    ctx: int
    seconds: float
    peak_memory_bytes: int
    remarks: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def document(self) -> dict[str, Any]:
        names = (
            "perplexity", "word_perplexity", "byte_perplexity", "stderr", "tokens", "protocol", "ctx", "seconds",
            "peak_memory_bytes",
        )  # fmt: skip
        return {**{name: getattr(self, name) for name in names}, "remarks": list(self.remarks)}

    def lines(self) -> Iterator[str]:
        yield (
            f"perplexity {self.perplexity:.4f} ± {self.stderr:.4f} over {self.tokens:,} tokens "
            f"(protocol {self.protocol}, ctx {self.ctx})"
        )
        if self.word_perplexity is not None and self.byte_perplexity is not None:
            yield f"  word perplexity {self.word_perplexity:.6g}, byte perplexity {self.byte_perplexity:.4f}"
        yield from (f"  {remark}" for remark in self.remarks)
        yield f"  {human_time(self.seconds)}, at most {human_bytes(self.peak_memory_bytes)} of memory"


def perplexity(
    model: Model, text: Annotated[str | Path, Option("FILE", "UTF-8 text, taken as it stands.")], *,
    protocol: Protocol = "gptq", ctx: Ctx = None, stride: Stride = None, max_tokens: MaxTokens = None,
    parse_special: ParseSpecial = False, experts_per_token: ExpertsPerToken = None,
    dtype: ComputeDtype = "auto", device: Device = "auto",
    max_memory: MaxMemory = None, progress: Progress | Callback | None = None,
) -> Measured:  # fmt: skip
    """Perplexity over a text, a layer at a time: the model may be larger than memory.

    Example: mixtools perplexity Mixtral-8x7B-v0.1 --text wikitext2-test.txt --protocol llamacpp

    `text` is a file. Raises UsageError for options that cannot be, InputError for a text that is too short or no UTF-8,
    TokenizerError, MemoryBudgetError where not even one layer fits, TensorError for a model that gives NaN.
    """
    limit = parse_limit(max_memory)
    check_device(device)
    from ..checking import perplexity as engine
    from ..conversion import compute_dtype
    from ..hub.opening import open_model
    from ..inference.stream import Stream
    from ..text.reading import line_ends, read_text
    from ..text.tokenizer import Tokenizer

    content = read_text(Path(text))
    checkpoint, rerouted = with_experts(open_model(model), experts_per_token)
    tokenizer = Tokenizer.from_folder(checkpoint.beside)
    remark = tokenizer.check_vocab(checkpoint.config)
    ids = tokenizer.encode(content, parse_special=parse_special)
    tokenizer.expect_known(ids[:max_tokens], checkpoint.config)
    windows = engine.cut(ids, protocol, bos_id=tokenizer.bos_id, ctx=ctx, stride=stride, max_tokens=max_tokens)
    where = find_device(device)
    stream = Stream(
        checkpoint, where, compute_dtype(dtype) or checkpoint.main_dtype().torch(),
        max_memory=memory_for(where, limit), progress=watched(progress), packed=True,
    )  # fmt: skip
    found = engine.measure(stream, windows, engine.spell(tokenizer, ids, windows)).document()
    checkpoint.finish()
    remarks = [told for told in (rerouted, line_ends(content), *found["remarks"]) if told]
    notes = (*checkpoint.remarks, *([remark] if remark else []))
    return Measured(**{**found, "remarks": tuple(remarks)}, notes=notes)


@dataclass(frozen=True)
class Checked(Result):
    """`verdict` is "passed", "intact" (nothing is damaged, but no gate judges this kind of output) or "failed"; all
    figures are in `document` (CLI.md).
    """

    check: Check
    report: Path | None
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        return str(self.check.verdict)

    @property
    def passed(self) -> bool | None:
        """None where nothing was judged."""
        passed: bool | None = self.document["passed"]
        return passed

    @property
    def exit_code(self) -> int:
        from ..errors import CheckFailed

        return CheckFailed.exit_code if self.verdict == "failed" else 0

    @property
    def document(self) -> dict[str, Any]:
        return self.check.document

    def lines(self) -> Iterator[str]:
        from ..checking import report

        yield from report.lines(self.check.document, self.report)


def check(
    output: Output,
    against: Against,
    *,
    text: Annotated[str | Path | None, Option("FILE", "UTF-8 text for perplexity and divergence.")] = None,
    prompts: Annotated[
        str | Path | None,
        Option("FILE", "JSON list of texts, or a prompt a line; default: places in the text."),
    ] = None,
    new_tokens: Annotated[int, Option("N", "To continue each prompt by; 0: none.", low=0)] = 64,
    generation: Annotated[
        str,
        Option(
            "auto|greedy|text",
            "Who continues the prompts: the source, or the text; auto: the source if it fits in memory.",
        ),
    ] = "auto",
    report: Annotated[str | Path | None, Option("DIR", "Write report.json and report.html there.")] = None,
    gate: Annotated[
        list[str] | Mapping[str, float] | None, Option("NAME=VALUE", "Another limit; may be repeated.")
    ] = None,
    protocol: Protocol = "gptq",
    ctx: Ctx = None,
    stride: Stride = None,
    max_tokens: MaxTokens = None,
    dtype: ComputeDtype = "auto",
    device: Device = "auto",
    max_memory: MaxMemory = None,
    record: Annotated[
        bool,
        Option(
            "",
            "Leave mixtools-check.json beside OUTPUT, for card and push.",
            machine=True,
            flags=("--record/--no-record",),
        ),
    ] = True,
    progress: Progress | Callback | None = None,
) -> Checked:
    """Every byte, every tensor, perplexity, divergence and continuations; exit code 4 if a gate fails.

    Example: mixtools check Mixtral-8x7B-Q4 --against Mixtral-8x7B-v0.1 --text wikitext2-test.txt --report report

    An output that no gate judges, as LASER's, is "intact", and its change is told first. `gate`: limits by name, or as
    NAME=VALUE. Raises UsageError for options that cannot be, InputError for a text that
    cannot be used or a source with problems. What is wrong with the output is not raised but told. `record`: the
    verdict, with the hash of every file, is left in OUTPUT's folder, unless that is the Hub's cache.
    """
    from ..checking.gates import parse

    limits = parse(_pairs(gate))
    limit = parse_limit(max_memory)
    check_device(device)
    from ..checking import judge, recording
    from ..checking import report as page
    from ..conversion import compute_dtype
    from ..hub.cache import is_snapshot
    from ..hub.opening import open_model

    source = open_model(against)
    made = open_model(output, strict=False)
    options = judge.Options(
        text=_path(text), prompts=_path(prompts), new_tokens=new_tokens, protocol=protocol, ctx=ctx,
        stride=stride, max_tokens=max_tokens, generation=generation, gates=limits,
    )  # fmt: skip
    where = find_device(device)
    machine = judge.Machine(
        where, compute_dtype(dtype), max_memory=memory_for(where, limit), progress=watched(progress)
    )
    recorded = record and not is_snapshot(made.folder)
    before = recording.stamps(made) if recorded else {}
    found = judge.run(source, made, options, machine)
    folder = _path(report)
    if folder is not None:
        page.write(found, folder)
    note = recording.leave(made, source, found, before, machine.progress) if recorded else None
    return Checked(found, folder, (note,) if note else ())


def preflight(gate: Sequence[str] | None = None, **_: Any) -> None:
    """Raises UsageError for gates that there are not."""
    from ..checking.gates import parse

    parse(gate or [])


def _path(name: str | Path | None) -> Path | None:
    return None if name is None else Path(name)


def _pairs(gate: Sequence[str] | Mapping[str, float] | None) -> list[str]:
    if isinstance(gate, Mapping):
        return [f"{name}={limit!r}" for name, limit in gate.items()]
    return list(gate or [])


def with_experts(checkpoint: Checkpoint, experts_per_token: int | None) -> tuple[Checkpoint, str | None]:
    """The same checkpoint, whose tokens go through so many experts (None: its own number), and a remark if that is
    another. Raises UsageError for a number that it has not.
    """
    from dataclasses import replace

    from ..errors import UsageError

    config = checkpoint.config
    if experts_per_token is None or experts_per_token == config.experts_per_token:
        return checkpoint, None
    if not 1 <= experts_per_token <= config.num_experts:
        raise UsageError(f"--experts-per-token {experts_per_token}: the model has 1 to {config.num_experts}")
    routed = replace(checkpoint, config=replace(config, experts_per_token=experts_per_token))
    return routed, f"{experts_per_token} experts a token, where the model has {config.experts_per_token}"
