"""The metadata at the head of a card, as the Hub reads it: what the source's card says, and what was measured.

README.md that came along, or ours of before ┐
a GGUF's general.*                            ├─► inherited ─► ModelCardData (huggingface_hub) ─► YAML
verdicts, figures                             ┘
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..layouts.gguf_config import text
from ..storage.gguf_values import Kind
from ..storage.sealed import CARD, is_sealed
from ..text import front_matter

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from .outputs import Judged, Output

KEPT = ("license", "license_name", "license_link", "language")
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
TAGS = {
    "gptq": ("gptq", "4-bit"), "awq": ("awq", "4-bit"), "nf4": ("bitsandbytes", "4-bit"),
    "int8": ("bitsandbytes", "8-bit"), "compressed-tensors": ("compressed-tensors",), "laser": ("laser",),
}  # fmt: skip


@dataclass(frozen=True)
class Inherited:
    """What is known of the model without asking its user. `base`: org/name on the Hub."""

    kept: Mapping[str, Any]
    tags: tuple[str, ...] = ()
    base: str | None = None


def inherited(outputs: Sequence[Output]) -> Inherited:
    """From the first output that tells."""
    kept: dict[str, Any] = {}
    tags: dict[str, None] = {}
    base = None
    for output in outputs:
        card = output.folder / CARD
        told = front_matter.read(card)
        kept = {**_of_gguf(output), **{key: told[key] for key in KEPT if is_plain(told.get(key))}, **kept}
        tags |= dict.fromkeys(
            filter(is_plain, (*_texts_of_gguf(output, "tags"), *front_matter.texts(told.get("tags"))))
        )
        base = base or _base(output) or _of_ours(card, told)
    return Inherited(kept, tuple(tags), base)


def data(
    judged: Sequence[Judged], from_source: Inherited, base: str | None, *, name: str, quantized_by: str | None,
    prompt: str | None, labels: Sequence[str] = (),
) -> ModelCardData:  # fmt: skip
    """The metadata. Results are those of checks that hold for the bytes as they are; `labels` tell those of several
    outputs apart.
    """
    from huggingface_hub import ModelCardData

    kinds = {one.output.kind for one in judged}
    of = labels or [""] * len(judged)
    results = [result for one, label in zip(judged, of, strict=True) for result in _results(one, label)]
    told: dict[str, Any] = {
        "base_model": base, "base_model_relation": relation(judged) if base else None,
        "library_name": library(judged), "pipeline_tag": "text-generation",
        "tags": [*dict.fromkeys([*_tags(judged, kinds), *from_source.tags])],
        "quantized_by": quantized_by, "model_creator": base.partition("/")[0] if base else None,
        "prompt_template": prompt if prompt and "---" not in prompt else None, **from_source.kept,
    }  # fmt: skip
    if results:
        told |= {"model_name": name, "eval_results": results}
    return ModelCardData(**{key: value for key, value in told.items() if value is not None})


def relation(judged: Sequence[Judged]) -> str | None:
    """As the Hub's model tree has it; None for what is the same weights in another layout."""
    if any(one.output.checkpoint.quantization is not None for one in judged):
        return "quantized"
    return "finetune" if any(one.output.made[0] for one in judged) else None


def library(judged: Sequence[Judged]) -> str | None:
    """By which the Hub's page tells how to load it."""
    first = judged[0].output
    if first.is_gguf:
        return "gguf"
    return "transformers" if first.checkpoint.layout.letter in ("D", "E", "F") else None


def _tags(judged: Sequence[Judged], kinds: set[str]) -> Iterator[str]:
    yield from ("mixtral", "moe")
    if judged[0].output.is_gguf:
        yield "gguf"
    for kind in sorted(kinds):
        family = kind.removesuffix("bit").rpartition("-")[0] if kind.endswith("bit") else kind
        yield from TAGS.get(family, ())
        if kind.endswith("bit"):
            yield f"{kind.rpartition('-')[2].removesuffix('bit')}-bit"
    for one in judged:
        yield from TAGS.get(one.output.made[0] or "", ())
    yield "mixtools"


def _results(one: Judged, label: str) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    document = one.document
    if one.verdict == "failed" or not document.get("perplexity"):
        return
    told, about = document["perplexity"], document.get("text") or {}
    where = f"{told['protocol']}, ctx {told['ctx']}"
    dataset: dict[str, Any] = {
        "task_type": "text-generation", "dataset_type": Path(about.get("name") or "text").stem.lower(),
        "dataset_name": about.get("name") or "text",
    }  # fmt: skip
    of = f"{label}: " if label else ""
    figures = {"perplexity": told["output"], "kl_divergence": document["kld"]["mean"], "same_top": document["same_top"]}
    for name, value in figures.items():
        if value is not None:
            words = f"{of}{name.replace('_', ' ')} ({where})"
            yield EvalResult(**dataset, metric_type=name, metric_value=round(value, 6), metric_name=words)


def _of_gguf(output: Output) -> Mapping[str, Any]:
    if output.checkpoint.gguf is None:
        return {}
    told = output.checkpoint.gguf.metadata
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
    }
    found: dict[str, Any] = {name: value for name, key in keys.items() if (value := text(told, key)) is not None}
    if languages := _texts_of_gguf(output, "languages"):
        found["language"] = languages
    return found


def _texts_of_gguf(output: Output, name: str) -> list[str]:
    gguf = output.checkpoint.gguf
    found = gguf.metadata.get(f"general.{name}") if gguf is not None else None
    return [*found.value] if found is not None and found.item is Kind.STRING else []


def is_plain(value: Any) -> bool:
    """A text of one line, or a list of such: a line of dashes within one would end the metadata."""
    if isinstance(value, list):
        return bool(value) and all(map(is_plain, value))
    return front_matter.is_text(value) and str(value).isprintable()


def _base(output: Output) -> str | None:
    """What the manifest tells of the source: its name on the Hub."""
    source = output.entry.get("source")
    name = source.get("repository") if isinstance(source, Mapping) else None
    return name if isinstance(name, str) and _HUB_NAME.fullmatch(name) else None


def _of_ours(card: Path, told: Mapping[str, Any]) -> str | None:
    """Of a card that we wrote before the base that it names; that of a source's card is the base of the source."""
    names = front_matter.texts(told.get("base_model")) if is_sealed(card) else []
    return names[0] if names else None
