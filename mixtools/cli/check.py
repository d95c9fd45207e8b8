"""mixtools check: an output against its source."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CheckFailed
from . import base
from .perplexity import Ctx, Dtype, MaxTokens, Protocol, Stride, find_dtype, memory_for

Output = Annotated[str, typer.Argument(metavar="OUTPUT", help="What was made: folder, or org/name[@revision].")]
Against = Annotated[str, typer.Option("--against", metavar="SOURCE", help="What it was made from.")]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="UTF-8 text for perplexity and divergence.")]
Prompts = Annotated[
    Path | None,
    typer.Option(
        "--prompts", metavar="FILE", help="JSON list of texts, or a prompt a line; default: places in the text."
    ),
]
NewTokens = Annotated[
    int, typer.Option("--new-tokens", min=0, metavar="N", help="To continue each prompt by; 0: none.")
]
Generation = Annotated[
    str,
    typer.Option(
        "--generation", metavar="auto|greedy|text",
        help="Who continues the prompts: the source, or the text; auto: the source if it fits in memory.",
    ),
]  # fmt: skip
Report = Annotated[
    Path | None, typer.Option("--report", metavar="DIR", help="Write report.json and report.html there.")
]
Gate = Annotated[list[str] | None, typer.Option("--gate", metavar="NAME=VALUE", help="Another limit; may be repeated.")]


def check(
    output: Output, against: Against, text: Text = None, prompts: Prompts = None,
    new_tokens: NewTokens = 64, generation: Generation = "auto", report: Report = None, gate: Gate = None,
    protocol: Protocol = "gptq", ctx: Ctx = None, stride: Stride = None, max_tokens: MaxTokens = None,
    dtype: Dtype = "auto", device: base.Device = "auto", max_memory: base.MaxMemory = None,
    json: base.Json = False, quiet: base.Quiet = False, debug: base.Debug = False,
) -> int:  # fmt: skip
    """Every byte, every tensor, perplexity, divergence and continuations; exit code 4 if a gate fails.

    Example: mixtools check Mixtral-8x7B-Q4 --against Mixtral-8x7B-v0.1 --text wikitext2-test.txt --report report
    """
    from ..checking.gates import parse

    limits = parse(gate or [])
    limit = base.max_memory_bytes(max_memory)
    base.check_device(device)
    from ..checking import judge
    from ..checking import report as page
    from ..layouts.detect import open_checkpoint
    from .inspect import summary

    screen = base.Screen(json, quiet)
    source = open_checkpoint(base.find_model(against))
    made = open_checkpoint(base.find_model(output), strict=False)
    options = judge.Options(
        text=text, prompts=prompts, new_tokens=new_tokens, protocol=protocol, ctx=ctx, stride=stride,
        max_tokens=max_tokens, generation=generation, gates=limits,
    )  # fmt: skip
    where = base.find_device(device)
    machine = judge.Machine(where, find_dtype(dtype), max_memory=memory_for(where, limit), progress=screen.progress())
    found = judge.run(source, made, options, machine, (summary(source), summary(made)))
    if report is not None:
        page.write(found, report)
    screen.result(found.document, lambda: _tell(found.document, page.headline(found.document), report))
    return 0 if found.passed else CheckFailed.exit_code


def _tell(document: dict[str, Any], headline: str, report: Path | None) -> Iterator[str]:
    for problem in document["integrity"]["problems"]:
        yield f"problem: {problem['message']}"
    if (ppl := document["perplexity"]) is not None:
        yield (
            f"perplexity {_number(ppl['source'])} -> {_number(ppl['output'])}, ln ratio {_number(ppl['ln_ratio'])} "
            f"± {_number(ppl['ln_ratio_stderr'])} ({ppl['tokens']:,} tokens, {ppl['protocol']}, ctx {ppl['ctx']})"
        )
        kld = document["kld"]
        yield (
            f"KL divergence: mean {_number(kld['mean'])}, median {_number(kld['median'])}, 99 % {_number(kld['p99'])}, "
            f"largest {_number(kld['max'])}; same top token {_number(document['same_top'])}"
        )
    if (said := document["generation"]) is not None:
        yield (
            f"continuations ({said['forced_on']}): agreement {_number(said['teacher_forced_agreement'])}, "
            f"{said['identical']} of {said['prompts']} prompts identical"
        )
    for gate in document["gates"]:
        verdict = "passed" if gate["passed"] else "FAILED"
        yield f"gate {gate['name']}: {_number(gate['value'])}, limit {gate['limit']:g}: {verdict}"
    for remark in document["remarks"]:
        yield f"note: {remark}"
    if report is not None:
        yield f"report: {report / 'report.html'}"
    yield f"checked: {'passed' if document['passed'] else 'FAILED'}. {headline}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
