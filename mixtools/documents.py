"""What lies beside the weights: of a source all that a transformation does not change, in the output as it came.

    source folder ─► carried: every small file that is neither weights nor mixtools' own ─► copied byte for byte
    config.json ─► hf_config: key for key, and over it what the transformation decides
    what only the source's layout can hold ─► told (not_kept)

A torrent has no config.json and no tokenizer.json: those are made (config.to_hf, text.tokenizer_files).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import formats
from .config import QUANT_CONFIG, QUANTIZE_CONFIG, load_object
from .errors import InputError, TokenizerError
from .layouts.checkpoint import Checkpoint
from .storage.output import Document
from .text.declared import TEMPLATES, Declared, model_file
from .text.pieces import JSON_FILE, read_model, read_pieces, sentencepiece_encoder
from .text.pieces import MODEL_FILE as TOKENIZER

MAX_DOCUMENT = 64 << 20  # bytes of a file that is carried over; the largest tokenizer.json has 17 MB
_MAX_CARD = 16 << 20  # bytes of a README.md that is searched for images

_WEIGHTS = re.compile(  # and what training leaves behind
    r".*\.(safetensors|bin|pth|pt|gguf|ggml|ggmf|h5|msgpack|onnx|ot|ckpt|pkl|pickle|incomplete|part|lock)"
    r"|.*\.(safetensors|bin)\.index\.json|.*\.pth-split\d+"
)
# they tell of other bytes
_OURS = re.compile(r"mixtools(-check)?\.json|recipe\.yaml|laser-report\..*|(.*\.)?quantize-report\..*")
_TORRENT = frozenset({"params.json", "RELEASE"})
_HF = frozenset(
    {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    | {"added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json"}
)
_QUANTIZED = frozenset({QUANTIZE_CONFIG, QUANT_CONFIG, "quantization_config.json"})  # AutoRound's is the last
_IMAGE = re.compile(r"[^\s()\[\]\"'<>]+?\.(?:png|jpe?g|gif|webp|svg|avif)", re.IGNORECASE)
_V5_TOKENIZER_CLASS = "TokenizersBackend"  # transformers 4 knows no such class


@dataclass(frozen=True)
class Documents:
    """Of an output: files written after the weights, and those after them; what it lacks, and what else to say."""

    documents: Mapping[str, Document]
    last: Mapping[str, Document]
    missing: tuple[str, ...] = ()
    not_kept: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def is_hf(source: Checkpoint) -> bool:
    """Whether its configuration is a config.json; that of a GGUF is written out as one."""
    return source.layout.letter in ("D", "E", "F") or source.gguf is not None


# --- an output of Hugging Face's layout ---


def for_hf(
    source: Checkpoint, dtype: str | None, torch_dtype: str, fragments: Iterable[Mapping[str, Any]],
    keep_tied: bool = False,
) -> Documents:  # fmt: skip
    """`dtype`: what the weights were cast to, None where they were kept; `torch_dtype`: what most of them are.

    `fragments`: what the formats of the weights add to the configuration; `keep_tied`: a tied head has no tensor.
    Raises TokenizerError, ConfigError or InputError for a document that cannot be read or converted.
    """
    files, notes = carried(source.beside, without=_TORRENT | _QUANTIZED | {"config.json"})
    config = hf_config(source, dtype, torch_dtype)
    for fragment in fragments:
        config |= fragment
    if formats.Gptq.claims(about := config.get("quantization_config") or {}):
        files[QUANTIZE_CONFIG] = _json(about)  # auto-gptq opens it without asking whether it is there
    if not is_hf(source):
        files |= {"generation_config.json": _json({"bos_token_id": 1, "eos_token_id": 2})}
    elif (path := source.beside / "tokenizer_config.json").is_file():
        told = load_object(path, MAX_DOCUMENT)
        if (changed := for_version_4(told)) != told:
            files[path.name] = _json(changed)
    model = model_file(source.beside)
    if not files.keys() & {"tokenizer.json", "tokenizer_config.json"} and model is not None:
        from .text.tokenizer_files import hf_files

        files |= hf_files(model)
    _expect_tokenizer(source.beside, model)
    missing = () if "tokenizer.json" in files or model else (TOKENIZER,)
    if source.tied and not keep_tied:
        notes += ("head and embedding are one tensor (tied); the output has both, --keep-tied keeps one",)
    if source.document.get("tie_word_embeddings"):
        config["tie_word_embeddings"] = source.tied and keep_tied
    return Documents(files, {"config.json": _json(config)}, missing, notes=source.remarks + notes)


def hf_config(source: Checkpoint, dtype: str | None, torch_dtype: str) -> dict[str, Any]:
    """config.json of a dense output: the source's own, key for key, with another dtype where the weights were cast.

    What only transformers 5 reads stands there in the spelling of 4 as well.
    """
    if not is_hf(source):
        return source.config.to_hf(torch_dtype)
    config = dict(source.document)
    if isinstance(found := config.get("quantization_config"), Mapping) and formats.claims(found):
        del config["quantization_config"]
    if source.about:  # its dtype is that of the model before, which the matrices are not decoded to
        dtype = torch_dtype
    for key in ("torch_dtype", "dtype"):
        if key in config and dtype is not None:
            config[key] = dtype
    config.setdefault("torch_dtype", config.get("dtype") or torch_dtype)
    config.setdefault("architectures", ["MixtralForCausalLM"])
    config.setdefault("model_type", "mixtral")
    if isinstance(rope := config.get("rope_parameters"), Mapping):
        if "rope_theta" in rope:
            config.setdefault("rope_theta", rope["rope_theta"])
        kind = rope.get("rope_type", "default")
        if kind != "default" and config.get("rope_scaling") is None:
            scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
            config["rope_scaling"] = {**scaling, "type": kind}
    return config


def for_version_4(document: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer_config.json, in the spelling of transformers 4 where 5 wrote it; 5 reads both."""
    changed = dict(document)
    if document.get("tokenizer_class") == _V5_TOKENIZER_CLASS:
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokens := document.get("extra_special_tokens"), list):  # 4 expects a mapping, and stops
        del changed["extra_special_tokens"]
        if tokens:
            changed.setdefault("additional_special_tokens", tokens)
    return changed


# --- an output of mistral's layout ---


def for_torrent(source: Checkpoint) -> Documents:
    """params.json, tokenizer.model, and what is no document of Hugging Face's. Raises as `for_hf`."""
    files, notes = carried(source.beside, without=_HF | _QUANTIZED | {"params.json"})
    model = model_file(source.beside)
    if model is not None:  # published only once it is known to be one
        read_pieces(read_model(model), model)
    params = source.config.to_params()
    if not is_hf(source):  # its own, key for key, and what it leaves to the reader
        told = source.document
        params = {**told, **params, **told, "moe": {**params["moe"], **(told.get("moe") or {})}}
    missing = () if model else (TOKENIZER,)
    not_kept = tuple(_not_kept(source, model)) if is_hf(source) else ()
    return Documents(files, {"params.json": _json(params)}, missing, not_kept, source.remarks + notes)


def _not_kept(source: Checkpoint, model: Path | None) -> Iterator[str]:
    """What mistral's layouts have no place for."""
    declared = Declared.of(source.beside)
    if added := _added_tokens(source.beside, declared, model):
        yield f"the added tokens {', '.join(added)}"
    if (template := declared.template()) is not None and template != _own_template(model):
        yield "the chat template"
    if declared.ends not in ((), (2,)):
        yield f"eos_token_id {', '.join(map(str, declared.ends))}"
    if source.config.rope_scaling is not None:
        yield f"the rope scaling ({source.config.rope_scaling.type}) in a key that mistral's own programs read"


def _added_tokens(folder: Path, declared: Declared, model: Path | None) -> list[str]:
    """Tokens that tokenizer.model has no piece for, by id."""
    found = {index: token.content for index, token in declared.added.items()}
    if (path := folder / JSON_FILE).is_file():
        found |= {token["id"]: token["content"] for token in load_object(path, MAX_DOCUMENT).get("added_tokens") or ()}
    known = {piece.text for piece in read_pieces(read_model(model), model).all} if model else set()
    return [text for _, text in sorted(found.items()) if text not in known]


def _own_template(model: Path | None) -> str | None:
    """The one that such a tokenizer.model means, by itself."""
    from .text.tokenizer_files import own_template

    return own_template(read_pieces(read_model(model), model)) if model else None


# --- both ---


def _expect_tokenizer(folder: Path, model: Path | None) -> None:
    """What is copied as the tokenizer must be one: a link to somebody's secret is not to be published."""
    if (path := folder / JSON_FILE).is_file():
        if not isinstance(load_object(path, MAX_DOCUMENT).get("model"), dict):
            raise TokenizerError("is no tokenizer: it has no model", file=path)
    elif model is not None:
        sentencepiece_encoder(read_model(model), model)


def carried(
    folder: Path, without: Iterable[str], ours: re.Pattern[str] = _OURS
) -> tuple[dict[str, Document], tuple[str, ...]]:
    """Files of a checkpoint's folder to copy as they are, and notes on those that are not.

    All but weights, hidden files, what mixtools tells of its own outputs, and the names `without`; of folders in it
    the images that its README shows, and further templates. The folder may consist of links (layouts.md): what they
    point to is copied. Raises InputError for what may not be read.
    """
    left, notes = {*without}, []
    found: dict[str, Document] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in left or name.startswith(".") or _WEIGHTS.fullmatch(name) or ours.fullmatch(name):
            continue
        if path.is_dir():
            continue
        if not path.is_file():
            notes.append(f"{name} is not copied: it is no file")
        elif (size := path.stat().st_size) > MAX_DOCUMENT:
            notes.append(f"{name} is not copied: {size / 1e6:.0f} MB are more than a document has")
        else:
            found[name] = path
    below = [path.relative_to(folder).as_posix() for path in folder.glob(f"{TEMPLATES}/*.jinja")]
    for name in (*_images(folder), *sorted(below)):
        path = folder / name
        if path.is_file() and path.stat().st_size <= MAX_DOCUMENT:
            found[name] = path
    for path in map(folder.joinpath, found):  # now, not after hours of work
        if not os.access(path, os.R_OK):
            raise InputError("cannot be read (permission denied)", file=path)
    return found, tuple(notes)


def _images(folder: Path) -> list[str]:
    """Of the card the images in folders of the checkpoint's."""
    card = folder / "README.md"
    if not card.is_file() or card.stat().st_size > _MAX_CARD:
        return []
    paths = (Path(unquote(match[0])) for match in _IMAGE.finditer(card.read_text("utf-8", "replace")))
    return sorted(
        {
            path.as_posix()
            for path in paths
            if len(path.parts) > 1 and not path.is_absolute() and not any(part.startswith(".") for part in path.parts)
        }
    )


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
