"""A model card from what is known: manifest, configuration, check. No number in it that was not measured.

Judged ... ─► rows, figures with their protocol, options, prompt, loaders ─► card.md ─► README.md, sealed
            └► sizes against divergences ─► mixtools-card.png
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..errors import TokenizerError
from ..formats import Factored, Quantized
from ..layouts.hf import HF, HF_BIN, HF_V5
from ..machine import human_bytes
from ..storage import manifest
from ..storage.sealed import PICTURE, seal
from ..text.tokenizer import Tokenizer, has_tokenizer
from ..version import __version__
from . import front, loaders
from .outputs import UNCHECKED, Judged, Output, is_portable
from .picture import Point, png
from .ways import Subject, Way, ways

TEMPLATE = Path(__file__).with_name("card.md")
BESIDE_WEIGHTS = 2_500_000_000  # of memory, by the convention of GGUF's cards
LITTLE = 0.01  # nats of mean divergence: what few readers notice
_HUB = "https://huggingface.co/"
_FORMATS = {"gptq": "auto-gptq", "awq": "autoawq"}  # as loaders.py calls them
_NAMES = {HF.name: loaders.LEGACY, HF_BIN.name: loaders.LEGACY, HF_V5.name: loaders.V5}
_METHODS = {"gptq": "GPTQ", "awq": "AWQ", "nf4": "bitsandbytes nf4", "int8": "bitsandbytes int8", "laser": "LASER"}
_VERDICTS = {"passed": "passed", "intact": "intact, not judged", "failed": "**failed**", UNCHECKED: "**not checked**"}


@dataclass(frozen=True)
class Asked:
    """What the user says. `repository`: org/name to be; `base`: org/name of the model it was made of."""

    repository: str | None = None
    base: str | None = None
    quantized_by: str | None = None
    branches: tuple[str, ...] = ()  # of each output, where they are in several


@dataclass(frozen=True)
class Card:
    """README.md, and the picture that it shows, if there is anything to show. `remarks`: what it could not tell."""

    readme: bytes
    picture: bytes | None
    remarks: tuple[str, ...]


def write(judged: Sequence[Judged], asked: Asked) -> Card:
    """The card of these outputs, which are alike (outputs.expect_alike). Raises TokenizerError for a damaged one."""
    outputs = [one.output for one in judged]
    from_source = front.inherited(outputs)
    base = asked.base or from_source.base
    source = (base or _source_name(judged)).rpartition("/")[2]
    title = f"{source} - {_title(judged)}"
    repository = asked.repository or f"YOUR-NAME/{outputs[0].folder.absolute().name}"
    prompt, system = _prompts(outputs[0])
    names = asked.branches or [output.name for output in outputs]
    points = [Point(_label(one, asked, i), one.output.bytes, one.document["kld"]["mean"])
              for i, one in enumerate(judged) if one.document.get("kld")]  # fmt: skip
    picture = png(points, source) if len({point.bytes for point in points}) > 1 else None
    metadata = front.data(
        judged, from_source, base, name=title, quantized_by=asked.quantized_by, prompt=_one_turn(outputs[0]),
        labels=names if len(judged) > 1 or outputs[0].is_gguf else (),
    )  # fmt: skip
    body = _body().render(
        title=title, opening=_opening(judged, base, source), failed=_failed(judged), gguf=outputs[0].is_gguf,
        choice=_choice(judged), branches=asked.branches, rows=[_row(one, asked, i) for i, one in enumerate(judged)],
        picture=PICTURE if picture else None, measured=[*_measured(judged, names)], judged=[*_verdicts(judged, names)],
        loaders=[*_loaders(outputs)], prompt=prompt, system=system, ways=[*_ways(judged, repository, asked)],
        made=[*_made(outputs, names)], recipe=is_portable(outputs[0].folder / "recipe.yaml"),
        options=[*_options(outputs, names)], hashes=[*_hashes(judged, asked)],
        licence=_licence(from_source),
    )  # fmt: skip
    remarks = []
    if base is None:
        remarks.append("the model it was made of is not known on the Hub; --base-model ORG/NAME links the card to it")
    if not from_source.kept.get("license"):
        remarks.append("the source tells no licence; put one into the source's README.md, or write it into the card")
    return Card(seal(f"---\n{metadata.to_yaml()}\n---\n\n{body}"), picture, tuple(remarks))


@cache
def _body() -> Any:
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"cell": _cell, "fenced": _fenced}
    return environment.from_string(TEMPLATE.read_text("utf-8"))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _fenced(text: str, language: str = "") -> str:
    """As a block of code, which nothing within ends."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


# --- what it is ---


def _title(judged: Sequence[Judged]) -> str:
    first = judged[0].output
    if first.is_gguf:
        return "GGUF"
    made = [_METHODS.get(one.output.made[0] or "", one.output.made[0]) for one in judged]
    if any(made):
        return ", ".join(dict.fromkeys(one for one in made if one))
    about = first.checkpoint.quantized()
    return about[0].name if about else first.checkpoint.layout.title


def _source_name(judged: Sequence[Judged]) -> str:
    for one in judged:
        if (told := one.document.get("source")) and told.get("path"):
            return Path(str(told["path"])).stem
    return judged[0].output.folder.absolute().name


def _opening(judged: Sequence[Judged], base: str | None, source: str) -> str:
    config = judged[0].output.checkpoint.config
    name = f"[{source}]({_HUB}{base})" if base else source
    whats = {"quantized": "quantized", "finetune": "changed"}.get(front.relation(judged) or "", "in another layout")
    size = (
        f"{config.num_parameters / 1e9:.1f} billion" if config.num_parameters >= 1e9
        else f"{config.num_parameters / 1e6:.1f} million"
    )  # fmt: skip
    return (
        f"{name}, {whats} with mixtools {__version__}: {size} parameters, {config.num_layers} layers of "
        f"{config.num_experts} experts, of which {config.experts_per_token} run for each token, and a context of "
        f"{config.max_position_embeddings:,} tokens. Every figure below was measured on the files themselves, against "
        "the model they were made of."
    )


def _failed(judged: Sequence[Judged]) -> str:
    """What nobody should overlook."""
    told = []
    if names := [one.output.name for one in judged if one.verdict == "failed"]:
        told.append(f"The check of {', '.join(names)} failed.")
    if names := [one.output.name for one in judged if one.verdict == UNCHECKED]:
        told.append(f"Not checked: {', '.join(names)}.")
    return " ".join(told)


def _label(one: Judged, asked: Asked, index: int) -> str:
    return one.output.kind if one.output.is_gguf else asked.branches[index] if asked.branches else one.output.name


def _row(one: Judged, asked: Asked, index: int) -> dict[str, str]:
    output, document = one.output, one.document
    bits = 8 * output.bytes / output.checkpoint.config.num_parameters
    place = output.name if output.is_gguf or not asked.branches else asked.branches[index]
    link = f"`{place}`"
    if asked.repository:
        way = f"blob/main/{place}" if output.is_gguf else f"tree/{place}"
        link = f"[{place}]({_HUB}{asked.repository}/{way})" if output.is_gguf or asked.branches else link
    told, kld = document.get("perplexity"), document.get("kld")
    error = ""
    if told and told["output"] and told["source"]:
        error = f" ({100 * (told['output'] / told['source'] - 1):+.2f} %)"
    return {
        "link": link, "kind": output.kind, "about": _about(output), "bits": f"{bits:.2f}",
        "size": human_bytes(output.bytes), "ram": human_bytes(output.bytes + BESIDE_WEIGHTS),
        "perplexity": f"{told['output']:.4f}{error}" if told and told["output"] else "",
        "kld": f"{kld['mean']:.5f} ± {kld['stderr']:.5f}" if kld and kld.get("mean") is not None else "",
        "same_top": f"{100 * document['same_top']:.2f} %" if document.get("same_top") is not None else "",
        "verdict": _VERDICTS[one.verdict],
    }  # fmt: skip


def _wanted(judged: Sequence[Judged]) -> Judged:
    """The smallest that loses little, or else the one that loses least; without figures the largest."""
    known = [one for one in judged if (one.document.get("kld") or {}).get("mean") is not None]
    if not known:
        return max(judged, key=lambda one: one.output.bytes)
    good = [one for one in known if one.document["kld"]["mean"] < LITTLE and one.verdict != "failed"]
    if good:
        return min(good, key=lambda one: one.output.bytes)
    return min(known, key=lambda one: float(one.document["kld"]["mean"]))


def _choice(judged: Sequence[Judged]) -> str:
    """Which to take, by what was measured."""
    wanted = _wanted(judged)
    if len(judged) < 2 or not wanted.document.get("kld") or wanted.document["kld"]["mean"] >= LITTLE:
        return ""
    return f"`{wanted.output.name}` is the smallest of them that diverges by less than {LITTLE:g} nats."


def _about(output: Output) -> str:
    formats = output.checkpoint.quantized()
    if formats:
        return f"{formats[0].name}: {formats[0].about}"
    return f"{output.checkpoint.main_dtype().value}, {output.checkpoint.layout.title}"


# --- how it was measured ---


def _measured(judged: Sequence[Judged], names: Sequence[str]) -> Iterator[str]:
    said: dict[str, list[str]] = {}
    for one, name in zip(judged, names, strict=True):
        told = one.document.get("perplexity")
        if not told:
            said.setdefault("no text was given to the check: perplexity and divergence are not known", []).append(name)
            continue
        text = one.document.get("text") or {}
        digest = f" (sha256 `{text['sha256'][:16]}`)" if text.get("sha256") else ""
        line = (
            f"perplexity over {told['tokens']:,} tokens of `{text.get('name', 'a text')}`{digest}, protocol "
            f"{told['protocol']}, windows of {told['ctx']} tokens; the source has {told['source']:.4f} there. KL "
            "divergence of the next token's distribution from the source's, in nats, mean and its standard error over "
            "the same tokens; same top token: how often both hold the same one for the likeliest"
        )
        said.setdefault(line, []).append(name)
    for line, those in said.items():
        yield line if len(said) == 1 else f"{', '.join(f'`{name}`' for name in those)}: {line}"


def _verdicts(judged: Sequence[Judged], names: Sequence[str]) -> Iterator[str]:
    for one, name in zip(judged, names, strict=True):
        if one.verdict == UNCHECKED:
            yield f"`{name}` was not checked, or not as it is now"
            continue
        document = one.document
        whole = document["integrity"]
        gates = [
            f"{gate['name']} {gate['value']:.5g} (limit {gate['limit']:g})" if gate["value"] is not None
            else f"{gate['name']} not measured (limit {gate['limit']:g})"
            for gate in document["gates"]
        ]  # fmt: skip
        spoken = document.get("generation")
        told = [
            f"{whole['tensors']} tensors read to the last byte",
            f"{len(whole['problems'])} problems" if whole["problems"] else "none damaged",
            *(["gates: " + ", ".join(gates)] if gates else []),
            *([f"{spoken['prompts']} continuations of {spoken['new_tokens']} tokens agree with the source's in "
               f"{100 * spoken['teacher_forced_agreement']:.2f} %"] if spoken else []),
        ]  # fmt: skip
        yield f"`{name}`: {_VERDICTS[one.verdict]}; {'; '.join(told)}"


# --- who loads it, and how ---


def _subject(output: Output, repository: str, revision: str, chat: bool) -> Subject:
    checkpoint = output.checkpoint
    if checkpoint.gguf is not None:
        return Subject(repository, "GGUF", "", file=output.name, kind=output.kind, chat=chat)
    if checkpoint.layout.letter in ("A", "B", "C"):
        return Subject(repository, "torrent", "", revision, chat=chat)
    names = _NAMES.get(checkpoint.layout.name, "")
    formats: list[Quantized] = checkpoint.quantized()
    if formats:
        main = formats[0]
        bits, symmetric = getattr(main, "bits", 0), bool(getattr(main, "symmetric", False))
        return Subject(repository, _FORMATS.get(main.name, main.name), names, revision, "", "", bits, symmetric, chat)
    if any(isinstance(checkpoint.format(slot), Factored) for slot in checkpoint.slots()):
        return Subject(repository, "factored", names, revision, chat=chat)
    return Subject(repository, "dense", names, revision, chat=chat)


def _loaders(outputs: Sequence[Output]) -> Iterator[loaders.Row]:
    subjects = (_subject(output, "", "", True) for output in outputs)
    rows = dict.fromkeys(loaders.of(subject.format, subject.names) for subject in subjects)
    yield from (row for row in rows if row is not None)


def _ways(judged: Sequence[Judged], repository: str, asked: Asked) -> Iterator[Way]:
    """Of the first of each sort; of GGUF files the one that most people want."""
    wanted = _wanted(judged) if judged[0].output.is_gguf else None
    seen = set()
    for index, one in enumerate(judged):
        output = one.output
        if wanted is not None and one is not wanted:
            continue
        revision = asked.branches[index] if asked.branches else ""
        subject = _subject(output, repository, "" if revision == "main" else revision, _template(output) is not None)
        key = (subject.format, subject.names, subject.symmetric)
        if key not in seen:
            seen.add(key)
            yield from ways(subject)


# --- prompts ---


def _template(output: Output) -> Tokenizer | None:
    """The tokenizer, where it has a chat template."""
    if not has_tokenizer(output.checkpoint.beside):
        return None
    tokenizer = Tokenizer.from_folder(output.checkpoint.beside)
    try:
        told = tokenizer.chat_text([{"role": "user", "content": "{prompt}"}])
    except TokenizerError:
        return None
    return tokenizer if told is not None else None


def _prompts(output: Output) -> tuple[str | None, str | None]:
    """One turn, and one with a system message; None where the template takes none."""
    tokenizer = _template(output)
    if tokenizer is None:
        return None, None
    turns = [{"role": "user", "content": "{prompt}"}]
    try:
        system = tokenizer.chat_text([{"role": "system", "content": "{system}"}, *turns])
    except TokenizerError:
        system = None
    return tokenizer.chat_text(turns), system if system is None or "{system}" in system else None


def _one_turn(output: Output) -> str | None:
    return _prompts(output)[0]


# --- how it was made ---


def _made(outputs: Sequence[Output], names: Sequence[str]) -> Iterator[str]:
    """A line for those that were made alike."""
    lines: dict[str, list[str]] = {}
    for output, name in zip(outputs, names, strict=True):
        lines.setdefault(_how(output), []).append(f"`{name}`")
    yield from (f"{', '.join(those)}: {line}" for line, those in lines.items())


def _how(output: Output) -> str:
    if not output.entry:
        return "no manifest tells"
    name, told = output.made
    version = output.entry.get("mixtools", __version__)
    if name is None:
        layout = output.entry["source"]["layout"]
        return f"the weights of the layout {layout}, nothing else changed (mixtools {version})"
    left = ("method", "name") if output.is_gguf else ("method",)  # a type is the file's own name
    words = [f"{key} {_word(value)}" for key, value in told.items() if _is_plain(value) and key not in left]
    seen = told.get("calibration")
    if isinstance(seen, Mapping):
        text = output.entry.get(manifest.CALIBRATION) or "a text"
        words.append(f"calibrated on {seen['tokens']:,} tokens of {text} in {seen['samples']} samples")
    return f"{', '.join([told.get('method') or name, *words])} (mixtools {version})"


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float) and value != ""


def _word(value: Any) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _options(outputs: Sequence[Output], names: Sequence[str]) -> Iterator[dict[str, str]]:
    import yaml

    for output, name in zip(outputs, names, strict=True):
        told = {key: output.entry[key] for key in output.entry if key not in ("files", "crc32")}
        if told:
            text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True, width=110).rstrip()
            yield {"name": f"`{name}`", "yaml": text}


def _hashes(judged: Sequence[Judged], asked: Asked) -> Iterator[str]:
    for index, one in enumerate(judged):
        place = f"{asked.branches[index]}/" if asked.branches else ""
        yield from (f"{file.sha256}  {place}{name}" for name, file in sorted(one.files.items()))


def _licence(told: front.Inherited) -> str:
    licence = told.kept.get("license")
    if not isinstance(licence, str):
        return ""
    link = told.kept.get("license_link")
    return f"{licence}, as the source's card says{f' ({link})' if isinstance(link, str) else ''}."
