"""The whole of `mixtools check`: integrity, then figures, then gates, as one document.

output ─► verify (every byte) ─► compare with the source (dense) ─┐
text, prompts ─► both models, a layer at a time ─► figures ───────┴─► gates ─► verdict, document, report
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigError, InputError, MixtoolsError, TokenizerError, UsageError
from ..inference.stream import Stream
from ..machine import peak_memory
from ..progress import Progress, Silent
from ..storage.digest import of_file
from ..text.reading import line_ends, read_text
from ..text.tokenizer import Tokenizer, has_tokenizer
from . import beside, continuations, gates, integrity, parity
from .perplexity import Windows, cut

if TYPE_CHECKING:
    import torch

    from ..layouts.checkpoint import Checkpoint

Verdict = Literal["passed", "intact", "failed"]
PASSED: dict[Verdict, bool | None] = {"passed": True, "intact": None, "failed": False}  # as a document says it


@dataclass(frozen=True)
class Options:
    """What to measure, and the limits. Without a text and prompts the tensors alone are compared."""

    text: Path | None = None
    prompts: Path | None = None
    new_tokens: int = 64
    protocol: str = "gptq"
    ctx: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    generation: str = "auto"  # continuations.MODES
    gates: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Machine:
    """With what: none of it is meant to change a figure by more than rounding. dtype None: each model's own."""

    device: torch.device
    dtype: torch.dtype | None = None
    max_memory: int | None = None
    spill: Path | None = None
    progress: Progress = field(default_factory=Silent)


@dataclass
class Check:
    """What was found; `document` is what the command prints, the rest is for the report."""

    document: dict[str, Any]
    figures: parity.Figures | None = None
    generation: parity.Generation | None = None
    tokenizer: Tokenizer | None = None

    @property
    def verdict(self) -> Verdict:
        found: Verdict = self.document["verdict"]
        return found

    @property
    def passed(self) -> bool:
        """Whether gates judged it and all of them held: an output that is merely intact has not passed."""
        return self.verdict == "passed"


def decide(sound: bool, limits: Mapping[str, float], judged: Sequence[gates.Gate]) -> Verdict:
    """The verdict. `sound`: nothing is damaged, and what was measured gave numbers; `limits`: what was to be judged.

    Damage, a gate that does not hold, and a limit that could not be judged fail; where there was no limit at all the
    output is intact, and how much it changed is for its reader to judge.
    """
    if not sound or len(judged) < len(limits) or not all(gate.passed for gate in judged):
        return "failed"
    return "passed" if judged else "intact"


def run(
    source: Checkpoint,
    output: Checkpoint,
    options: Options,
    machine: Machine,
) -> Check:
    """Check `output` against `source`. Opened leniently.

    Raises UsageError for options that cannot be, InputError for a text that cannot be used or a source with problems,
    all before a weight is read. What is wrong with the output is not raised but told in the document.
    """
    began = time.perf_counter()
    if source.problems:
        raise source.problems[0]
    kind = gates.kind_of(output, output.folder)
    if kind == source.quantization and not gates.was_quantized(output):
        kind = "dense"  # the same blocks laid out anew: what they stand for must not change
    limits = gates.choose(kind, options.gates, _measured(options))
    text = _prepare(source, output, options) if options.text or options.prompts else None
    check = Check({})
    problems, comparison = _integrity(source, output, machine)
    configuration, tokenizer = _beside(source, output, problems, compared=comparison is not None)
    problems += text.problems if text else []
    remarks = [*source.remarks, *output.remarks, *(text.remarks if text else ())]
    readable = comparison is not None and source.config.vocab_size == output.config.vocab_size
    if readable and text is not None:
        streams = [_stream(checkpoint, machine) for checkpoint in (source, output)]
        forced = _forced(streams[0], text, options)
        check.figures, check.generation = parity.compare(streams[0], streams[1], text.windows, forced)
        check.tokenizer = text.tokenizer
        remarks += [remark for stream in streams for remark in stream.remarks]
    judged = gates.judge(limits, _values(comparison, check.figures, check.generation)) if readable else []
    if readable and not judged:
        remarks.append(f"no default gates for the kind {kind}: the figures are reported, not judged")
    verdict = decide(readable and not problems and _is_finite(check.figures), limits, judged)
    document = {
        "passed": PASSED[verdict], "verdict": verdict,
        "kind": kind, "source": integrity.summary(source), "output": integrity.summary(output),
        "integrity": {
            "passed": not problems, "tensors": len(output.store.entries),
            "problems": [problem.document()["error"] for problem in problems],
            **(comparison.document() if comparison else {}),
        },
        "configuration": beside.section(configuration), "tokenizer": beside.section(tokenizer),
        "perplexity": None, "kld": None, "same_top": None, "rms_delta_p": None,
        **(check.figures.document() if check.figures else {}),
        "generation": check.generation.document() if check.generation else None,
        "text": _about(options.text), "prompts": _about(options.prompts),
        "gates": [gate.document() for gate in judged], "remarks": list(dict.fromkeys(remarks)),
        "seconds": round(time.perf_counter() - began, 3), "peak_memory_bytes": peak_memory(),
    }  # fmt: skip
    check.document = _finite(document)
    return check


@dataclass(frozen=True)
class _Text:
    """What goes through the models, ready before a weight is read."""

    tokenizer: Tokenizer
    ids: list[int] | None
    windows: Windows | None
    prompts: list[list[int]] | None
    problems: list[MixtoolsError]  # of the output's tokenizer
    remarks: tuple[str, ...] = ()


def _integrity(
    source: Checkpoint, output: Checkpoint, machine: Machine
) -> tuple[list[MixtoolsError], integrity.Comparison | None]:
    """Problems, and the comparison if the output is whole."""
    problems = list(output.problems) or integrity.verify(output, machine.progress)
    if problems:
        return problems, None
    comparison = integrity.compare(source, output, machine.progress, file=output.place)
    return list(comparison.problems), comparison


def _beside(
    source: Checkpoint, output: Checkpoint, problems: list[MixtoolsError], *, compared: bool
) -> tuple[list[beside.Difference], list[beside.Difference]]:
    """Differences of configuration and tokenizer; those that nothing means are problems, too.

    `compared`: what MixtralConfig carries is among the problems already, with its usual cause.
    """
    known = beside.typed_keys(source) if compared else set()
    found: list[list[beside.Difference]] = []
    for look, kind in ((beside.configuration, ConfigError), (beside.tokenizer, TokenizerError)):
        differences: list[beside.Difference] = []
        try:
            differences = look(source, output)
        except MixtoolsError as error:
            if str(error) not in map(str, problems):
                problems.append(error)
        meant = (one.expected or (one.file == beside.CONFIG and one.key in known) for one in differences)
        faults = [one for one, fine in zip(differences, meant, strict=True) if not fine]
        problems += [one.problem(output.folder, kind) for one in faults]
        found.append(differences)
    return found[0], found[1]


def _measured(options: Options) -> set[str]:
    """The figures that these options lead to."""
    names = {"tensors_different"}
    if options.text is not None:
        names |= {"ppl_ratio", "kld_mean", "kld_median", "kld_p99", "kld_max", "same_top", "rms_delta_p"}
    if options.new_tokens and (options.text or options.prompts):
        names |= {"teacher_forced_agreement", "identical"}
    return names


def _stream(checkpoint: Checkpoint, machine: Machine) -> Stream:
    dtype = checkpoint.main_dtype().torch() if machine.dtype is None else machine.dtype
    return Stream(
        checkpoint, machine.device, dtype,
        max_memory=machine.max_memory, progress=machine.progress, spill=machine.spill, reuse=True, packed=True,
    )  # fmt: skip


def _prepare(source: Checkpoint, output: Checkpoint, options: Options) -> _Text:
    """Tokenize text and prompts with the source's tokenizer (the output's where the source has none)."""
    if options.generation not in continuations.MODES:
        raise UsageError(f"generation {options.generation!r} is not one of {', '.join(continuations.MODES)}")
    content = read_text(options.text) if options.text else None
    spoken = continuations.read_prompts(options.prompts) if options.prompts else None
    problems: list[MixtoolsError] = []
    tokenizer = _tokenizer(source.beside)
    try:
        theirs = _tokenizer(output.beside)
        if tokenizer is not None and theirs is not None:
            problems += _same_ids(tokenizer, theirs, [*([content] if content else []), *(spoken or [])])
    except MixtoolsError as error:
        problems.append(error)
        theirs = None
    if (tokenizer := tokenizer or theirs) is None:
        raise TokenizerError("holds no tokenizer", file=source.folder)
    ids = None if content is None else tokenizer.encode(content)
    tokenizer.expect_known((ids or [])[: options.max_tokens], source.config)
    windows = None if ids is None else cut(
        ids, options.protocol, bos_id=tokenizer.bos_id,
        ctx=options.ctx, stride=options.stride, max_tokens=options.max_tokens,
    )  # fmt: skip
    prompts = None if spoken is None else [tokenizer.encode(text) for text in spoken]
    told = (line_ends(content or ""), tokenizer.check_vocab(source.config))
    return _Text(tokenizer, ids, windows, prompts, problems, tuple(filter(None, told)))


def _about(text: Path | None) -> dict[str, Any] | None:
    """Which text it was: a figure without it cannot be measured again."""
    return None if text is None else {"name": text.name, "sha256": of_file(text)}


def _tokenizer(folder: Path) -> Tokenizer | None:
    return Tokenizer.from_folder(folder) if has_tokenizer(folder) else None


def _same_ids(source: Tokenizer, output: Tokenizer, texts: list[str]) -> list[MixtoolsError]:
    """A problem for the first text that the output's own tokenizer cuts otherwise."""
    for text in texts:
        ours, theirs = source.encode(text), output.encode(text)
        if ours == theirs:
            continue
        differing = (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        at = next(differing, min(len(ours), len(theirs)))
        return [
            TokenizerError(
                f"gives other ids than the source's tokenizer, first at token {at} of the text",
                file=output.file, expected=ours[at : at + 3], found=theirs[at : at + 3],
            )
        ]  # fmt: skip
    return []


def _forced(source: Stream, text: _Text, options: Options) -> parity.Forced | None:
    if options.new_tokens < 1:
        return None
    ends = text.tokenizer.end_ids
    if text.prompts is not None:
        return continuations.for_prompts(source, text.prompts, options.new_tokens, options.generation, ends=ends)
    assert text.ids is not None
    try:
        places = continuations.from_text(text.ids[: options.max_tokens], options.new_tokens)
    except InputError:  # a text too short for prompts still has its perplexity
        return None
    return continuations.for_prompts(source, places.prompts, options.new_tokens, options.generation, places, ends=ends)


def _values(
    comparison: integrity.Comparison | None, figures: parity.Figures | None, generation: parity.Generation | None
) -> dict[str, float]:
    """The figures that gates may ask for, as far as they were measured."""
    values: dict[str, float] = {}
    if comparison is not None:
        values["tensors_different"] = len(comparison.differences)
    if figures is not None:
        found = figures.document()
        values["ppl_ratio"] = math.exp(min(figures.ln_ratio, 700.0))
        values |= {f"kld_{name}": found["kld"][name] for name in ("mean", "median", "p99", "max")}
        values |= {name: found[name] for name in ("same_top", "rms_delta_p")}
    if generation is not None:
        found = generation.document()
        values |= {name: found[name] for name in ("teacher_forced_agreement", "identical")}
    return values


def _is_finite(figures: parity.Figures | None) -> bool:
    """A model that gives NaN is broken, whatever its bytes say, and no figure tells how much."""
    return figures is None or (math.isfinite(figures.ln_ratio) and math.isfinite(float(figures.kld.mean())))


def _finite(item: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(item, dict):
        return {key: _finite(value) for key, value in item.items()}
    if isinstance(item, list):
        return [_finite(value) for value in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item
