"""general.* of a GGUF: what the model is and where it comes from, as far as its source tells.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A Hugging Face folder tells in its card's front matter
(README.md), a GGUF in its own metadata, which is kept.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...config import MixtralConfig, load_object
from ...documents import MAX_DOCUMENT
from ...errors import ConfigError
from ...layouts.checkpoint import Checkpoint
from ...layouts.gguf import KEPT
from ...layouts.gguf_config import ARCHITECTURE, FILE_TYPES
from ...layouts.gguf_files import stem_of
from ...storage.gguf_values import Kind, Metadata, Value, array, from_json, string, uint32
from ...text import front_matter
from ...text.front_matter import is_text, texts

QUANTIZATION_VERSION = 2  # GGML_QNT_VERSION
_HUB = "https://huggingface.co/"
_UNITS = ((1e15, "Q"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
_TYPE = re.compile(  # behind it, as some publishers have it, their own word for a mixture
    r"(?P<stem>.+?)[.-](?:(?:UD|i1)-)?(?:" + "|".join([*FILE_TYPES, "FP16", "FP32"]) + ")", re.IGNORECASE
)
_DROPPED = ("split.", "general.alignment", "general.file_type", "general.quantization_version", "GGUF.", "quantize.")


def default_name(source: Checkpoint) -> str:
    """What files made of a source are called: the Hub repository's name, the folder's, or a GGUF's without its type."""
    if source.gguf is None:
        return folder_name(source.folder)
    stem = stem_of(source.gguf.file)
    match = _TYPE.fullmatch(stem)
    return match["stem"] if match else stem


def folder_name(folder: Path) -> str:
    """Of a snapshot in the Hub's cache the repository's name, not the revision's."""
    folder = Path(os.path.abspath(folder))  # noqa: PTH100  # a link's own name, not what it points to
    repository = re.fullmatch(r"models--[^/]+?--(.+)", folder.parent.parent.name)
    if repository and folder.parent.name == "snapshots":
        return repository[1]
    return folder.name or "model"


def general(
    source: Checkpoint, name: str, file_type: str, *, quantized_by: str | None, named: bool
) -> dict[str, Value]:  # fmt: skip
    """All but what the architecture and the tokenizer say; what a card says amiss is left out.

    `named`: the name goes before one that the source has already.

    Raises ConfigError for a gguf-metadata.json that is none.
    """
    told: dict[str, Value] = {"general.architecture": string(ARCHITECTURE), "general.type": string("model")}
    if source.gguf is None:
        size = re.search(r"(?<![\w.])\d+x\d+(\.\d+)?[KMBT](?![\w.])", name)  # as llama.cpp's converter: the name's own
        told |= {
            "general.name": string(name),
            "general.size_label": string(size[0] if size else size_label(source.config)),
        }
    earlier = _earlier(source).items()
    told |= {key: value for key, value in earlier if key.startswith("general.") and not key.startswith(_DROPPED)}
    if source.gguf is None:
        told |= dict(_from_card(front_matter.read(source.folder / "README.md")))
    if named:
        told["general.name"] = string(name)
    if quantized_by:
        told["general.quantized_by"] = string(quantized_by)
    told["general.file_type"] = uint32(FILE_TYPES[file_type])
    told["general.quantization_version"] = uint32(QUANTIZATION_VERSION)
    return told


def _earlier(source: Checkpoint) -> Metadata:
    """Of a GGUF its metadata, of what was made of one those that were kept beside it."""
    if source.gguf is not None:
        return source.gguf.metadata
    file = source.folder / KEPT
    try:
        return from_json(load_object(file, MAX_DOCUMENT))
    except (KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"is not what mixtools writes there ({error!r}); move it away", file=file) from None


def kept(source: Checkpoint) -> dict[str, Value]:
    """All other keys, of a GGUF the tokenizer's and the architecture's included; what its bytes alone were is dropped.

    Raises as `general` does.
    """
    left = (*_DROPPED, "general.", *(() if source.gguf is not None else (f"{ARCHITECTURE}.", "tokenizer.")))
    return {key: value for key, value in _earlier(source).items() if not key.startswith(left)}


def size_label(config: MixtralConfig) -> str:
    """8x7.2B, as llama.cpp counts: the experts, and the size of a model with one of them, in two digits at least."""
    expert = 3 * config.hidden_size * config.intermediate_size
    alone = config.num_parameters - config.num_layers * (config.num_experts - 1) * expert
    scaled, letter = next((alone / size, letter) for size, letter in _UNITS if alone >= size or letter == "K")
    return f"{config.num_experts}x{scaled:.{max(0, 2 - len(str(round(scaled))))}f}{letter}"


def _from_card(card: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    for key in ("license", "license_name", "license_link"):
        if is_text(found := card.get(key)):
            yield f"general.{key.replace('_', '.')}", string(found)
    bases = [base for base in texts(card.get("base_model")) if re.fullmatch(r"[\w.-]+/[\w.-]+", base)]
    if bases:
        yield "general.base_model.count", uint32(len(bases))
    for number, base in enumerate(bases):
        owner, _, model = base.partition("/")
        key = f"general.base_model.{number}"
        yield f"{key}.name", string(model.replace("-", " "))
        yield f"{key}.organization", string(owner)
        yield f"{key}.repo_url", string(_HUB + base)
    for key, name in (("tags", "tags"), ("language", "languages")):
        if told := texts(card.get(key)):
            yield f"general.{name}", array(Kind.STRING, told)
