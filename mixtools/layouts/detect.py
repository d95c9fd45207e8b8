"""From a path to a Checkpoint: which layout lies there, and is it whole."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import formats
from ..config import from_document, load_json
from ..errors import ConfigError, FormatError, LayoutError, MixtoolsError, QuantizedError
from ..storage import lfs, manifest
from ..storage.source import Source, missing
from ..storage.store import Entry, Store, by_name
from .checkpoint import Checkpoint, find_problems
from .families import ADAPTER_CONFIG, Family, Found, find
from .gguf_files import is_gguf, open_gguf
from .torrent import SPLIT
from .variants import layout_of, tie

_QUANTIZED = {"qweight": "GPTQ or AWQ", "absmax": "bitsandbytes", "SCB": "bitsandbytes", "weight_packed": "packed"}
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
    _refuse_quantized(entries, folder)
    layout, renamed = layout_of(family.layouts, entries)
    remarks += found.remarks + renamed
    tied = False
    if _says_tied(document, config_path):
        layout, tied, told = tie(layout, entries)
        remarks += told
    if (folder / ADAPTER_CONFIG).exists():
        remarks += (f"{ADAPTER_CONFIG} lies beside the model; the adapter is not applied",)
    problems = [*_index_problems(found, entries), *find_problems(folder, layout, config, Store(entries))]
    if problems and found.remarks and isinstance(problems[0], LayoutError):  # what was not read may be what was meant
        problems[0].message += f"; {found.remarks[0]}"
    problems += _pointers(folder)
    if strict and problems:
        raise problems[0]
    return Checkpoint(folder, layout, config, Store(entries), problems, document, tied, remarks)


def _read_config(path: Path, found: Found) -> Any:
    """config.json or params.json. Raises ConfigError without one, QuantizedError for what it says is quantized."""
    if not path.is_file():
        why = f"is missing beside {found.names[0]}; without it the shapes are unknown"
        raise ConfigError(missing(path, why), file=path)
    lfs.refuse_file(path)
    document = load_json(path)
    details = document.get("quantization_config") if isinstance(document, dict) else None
    if details and not (isinstance(details, dict) and formats.claims(details)):
        method = details.get("quant_method") if isinstance(details, dict) else None
        method = method if isinstance(method, str) else "an unknown method"
        raise QuantizedError(
            f"is quantized ({method}); reading quantized checkpoints is not supported yet", file=found.folder
        )
    return document


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


def _refuse_quantized(entries: Mapping[str, Entry], folder: Path) -> None:
    """Quantized tensors are refused by name, where no configuration told of them."""
    for name in entries:
        suffix = name.rpartition(".")[2]
        if suffix not in formats.SUFFIXES and (method := _QUANTIZED.get(suffix)) is not None:
            raise QuantizedError(f"is quantized ({method}: {name}); reading it is not supported yet", file=folder)


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
