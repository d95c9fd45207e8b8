"""From a path to a Checkpoint: which layout lies there, and is it whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import formats
from ..config import QUANT_CONFIG, QUANTIZE_CONFIG, from_document, load_json, load_object
from ..errors import ConfigError, FormatError, LayoutError, MixtoolsError, QuantizedError
from ..storage import lfs, manifest
from ..storage.source import Source, missing
from ..storage.store import Entry, Store, by_name
from .checkpoint import Checkpoint, find_problems
from .families import ADAPTER_CONFIG, Family, Found, find
from .gguf_files import is_gguf, open_gguf
from .torrent import SPLIT
from .variants import layout_of, tie

_QUANTIZED = {
    "qweight": "GPTQ or AWQ", "absmax": "bitsandbytes", "SCB": "bitsandbytes", "weight_packed": "compressed-tensors"
}  # fmt: skip
_ABOUT = {QUANTIZE_CONFIG: "gptq", QUANT_CONFIG: "awq"}  # documents of auto-gptq and autoawq, beside config.json
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size"}  # autoawq's in its own document
_KIND = ("quant_method", "checkpoint_format", "format", "version", "packing_format", "fmt")  # words for a refusal
_SAME = ("bits", "group_size", "checkpoint_format")  # what the documents must agree on
_TOKENIZER = r"tokenizer.*|added_tokens\.json|special_tokens_map\.json|vocab\.json|merges\.txt|chat_template\..*"


def open_checkpoint(path: Path, *, strict: bool = True, remarks: tuple[str, ...] = ()) -> Checkpoint:
    """Open a folder, or one index or weight file of it (families.find tells which files that means).

    With `strict` the first problem is raised: LayoutError, ConfigError, FormatError, TensorError, UnsafeError.
    Without it, missing, unknown and misshapen tensors are listed in `problems` instead. `remarks`: what is known of
    the path already, told before what is found here.
    """
    if is_gguf(path):
        return open_gguf(path, strict=strict, remarks=remarks)
    found = find(path)
    folder, family = found.folder, found.family
    config_path = folder / family.config
    document = _read_config(config_path, found)
    config = from_document(document, config_path)
    sources = _open(folder, family, found.names)
    entries = by_name(manifest.with_checksums(folder, _collect(family, sources)))
    about = _quantization(document, folder)
    _refuse_quantized(entries, about, folder)
    layout, renamed = layout_of(family.layouts, entries)
    remarks += found.remarks + renamed
    tied = False
    if _says_tied(document, config_path):
        layout, tied, told = tie(layout, entries)
        remarks += told
    if (folder / ADAPTER_CONFIG).exists():
        remarks += (f"{ADAPTER_CONFIG} lies beside the model; the adapter is not applied",)
    problems = [*_index_problems(found, entries), *find_problems(folder, layout, config, Store(entries), about)]
    if problems and found.remarks and isinstance(problems[0], LayoutError):  # what was not read may be what was meant
        problems[0].message += f"; {found.remarks[0]}"
    problems += _pointers(folder)
    if strict and problems:
        raise problems[0]
    return Checkpoint(folder, layout, config, Store(entries), problems, document, tied, remarks, about=about)


def _read_config(path: Path, found: Found) -> Any:
    """config.json or params.json. Raises ConfigError without one."""
    if not path.is_file():
        why = f"is missing beside {found.names[0]}; without it the shapes are unknown"
        raise ConfigError(missing(path, why), file=path)
    lfs.refuse_file(path)
    return load_json(path)


def _quantization(document: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """What config.json says of a quantization, or the document of the package that made it; empty without either.

    Raises QuantizedError for one that no format here has, ConfigError where two documents contradict each other.
    """
    told = document.get("quantization_config")
    if told and not isinstance(told, Mapping):
        raise QuantizedError("is quantized (an unknown method), in no form that is read here", file=folder)
    name, beside = next(((name, found) for name in _ABOUT if (found := _beside(folder / name))), ("", {}))
    about = told or beside
    if told and told.get("quant_method") == beside.get("quant_method"):  # else it is left over from another
        for key in _SAME:
            if None not in (told.get(key), beside.get(key)) and told[key] != beside[key]:
                why = f"{key} is not that of config.json's quantization_config; programs differ in which they read"
                raise ConfigError(why, file=folder / name, expected=told[key], found=beside[key])
        about = {**beside, **told}
    if about and not formats.claims(about):
        kind = ", ".join(str(about[key]) for key in _KIND if isinstance(about.get(key), str))
        raise QuantizedError(f"is quantized ({kind or 'an unknown method'}), in no form that is read here", file=folder)
    return about


def _beside(path: Path) -> dict[str, Any]:
    """A package's own document, in the spelling of config.json; empty where there is none."""
    found = {_SPELLINGS.get(key, key): value for key, value in load_object(path).items()}
    return {"quant_method": _ABOUT[path.name], **found} if found else {}


def _says_tied(document: Mapping[str, Any], file: Path) -> bool:
    value = document.get("tie_word_embeddings")
    if value is not None and not isinstance(value, bool):
        raise ConfigError("tie_word_embeddings is neither true nor false", file=file)
    return value is True


def _open(folder: Path, family: Family, names: list[str]) -> list[Source]:
    if family.layouts == (SPLIT,):
        numbers = [int(name.rpartition("split")[2]) for name in names]
        if numbers != list(range(len(numbers))):
            gap = next(n for n in range(len(numbers)) if n not in numbers)
            raise LayoutError("a part is missing", file=folder / f"consolidated.00.pth-split{gap}")
        return [Source([folder / name for name in names])]
    return [Source(folder / name) for name in names]


def _collect(family: Family, sources: list[Source]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for source in sources:
        for entry in family.read_header(source):
            if (other := entries.get(entry.name)) is not None:
                raise FormatError(f"stands also in {other.source.label}", file=source.label, tensor=entry.name)
            entries[entry.name] = entry
    return list(entries.values())


def _index_problems(found: Found, entries: Mapping[str, Entry]) -> list[MixtoolsError]:
    """Where index and shards disagree on which tensor lies where."""
    problems: list[MixtoolsError] = []
    for name, shard in (found.weight_map or {}).items():
        place = entries[name].source.paths[0].name if name in entries else None
        if place != shard:
            why, index = "the index places it wrongly", found.folder / str(found.family.index_name)
            problems.append(LayoutError(why, file=index, tensor=name, expected=shard, found=place or "nowhere"))
    return problems[:1]


def _refuse_quantized(entries: Mapping[str, Entry], about: Mapping[str, Any], folder: Path) -> None:
    """Quantized tensors are refused by name, where no document told how they are to be read."""
    if about:
        return
    for name in entries:
        if (method := _QUANTIZED.get(name.rpartition(".")[2])) is not None:
            why = f"is quantized ({method}: {name}), and neither config.json nor {' nor '.join(_ABOUT)} tells how"
            raise QuantizedError(why, file=folder)


def _pointers(folder: Path) -> list[MixtoolsError]:
    """Tokenizer files that are Git LFS pointers: whatever needs one would stumble over it later, less plainly."""
    problems: list[MixtoolsError] = []
    for path in sorted(folder.iterdir()):
        if re.fullmatch(_TOKENIZER, path.name):
            try:
                lfs.refuse_file(path)
            except FormatError as error:
                problems.append(error)
    return problems
