"""From a path to a Checkpoint: which layout lies there, and is it whole."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from .. import formats
from ..config import from_document, load_json
from ..errors import ConfigError, FormatError, InputError, LayoutError, MixtoolsError, QuantizedError, UnsafeError
from ..names import Role
from ..storage import manifest, safetensors, torchzip
from ..storage.source import Source
from ..storage.store import Entry, Store, by_name
from .checkpoint import Checkpoint, find_problems
from .hf import HF, HF_BIN, HF_FUSED
from .table import Layout
from .torrent import CONSOLIDATED, SPLIT, STACKED, TORRENT

MAX_INDEX_BYTES = 16 << 20  # 8x22B needs 0.2 MB


class Family(NamedTuple):
    """Files that together are one checkpoint: how they are named, read and configured."""

    pattern: str  # of a file's name; the first group, if any, orders the files
    index_name: str | None
    config: str
    read_header: Callable[[Source], list[Entry]]
    layouts: tuple[Layout, ...]


FAMILIES = (
    Family(r"consolidated\.00\.pth", None, "params.json", torchzip.read_header, (TORRENT,)),
    Family(r"consolidated\.00\.pth-split(\d+)", None, "params.json", torchzip.read_header, (SPLIT,)),
    Family(r"consolidated\.(\d+)\.pt", None, "params.json", torchzip.read_header, (STACKED,)),
    Family(r"consolidated\.safetensors", None, "params.json", safetensors.read_header, (CONSOLIDATED,)),
    Family(
        r"model(?:-\d+-of-\d+)?\.safetensors",
        "model.safetensors.index.json",
        "config.json",
        safetensors.read_header,
        (HF, HF_FUSED),
    ),
    Family(
        r"pytorch_model(?:-\d+-of-\d+)?\.bin",
        "pytorch_model.bin.index.json",
        "config.json",
        torchzip.read_header,
        (HF_BIN, HF_FUSED),
    ),
)
_QUANTIZED = {"qweight": "GPTQ or AWQ", "absmax": "bitsandbytes", "SCB": "bitsandbytes", "weight_packed": "packed"}


def open_checkpoint(path: Path, *, strict: bool = True) -> Checkpoint:
    """Open a folder, or one index or weight file of it where the folder holds several layouts.

    With `strict` the first problem is raised: LayoutError, ConfigError, FormatError, TensorError, UnsafeError.
    Without it, missing, unknown and misshapen tensors are listed in `problems` instead.
    """
    folder, family, names = _find_family(path)
    config_path = folder / family.config
    if not config_path.is_file():
        raise ConfigError(f"is missing beside {names[0]}; without it the shapes are unknown", file=config_path)
    document = load_json(config_path)
    details = document.get("quantization_config") if isinstance(document, dict) else None
    if details and not (isinstance(details, dict) and formats.claims(details)):
        method = details.get("quant_method") if isinstance(details, dict) else None
        method = method if isinstance(method, str) else "an unknown method"
        raise QuantizedError(
            f"is quantized ({method}); reading quantized checkpoints is not supported yet", file=folder
        )
    config = from_document(document, config_path)
    weight_map = _read_index(folder, family)
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
    elif any("-of-" in name for name in names):
        _expect_all_shards(folder, names)
    sources = _open(folder, family, names)
    entries = by_name(manifest.with_checksums(folder, _collect(family, sources)))
    problems = _index_problems(folder, family, weight_map, entries)
    layout = _best_layout(family, entries, folder)
    problems += find_problems(folder, layout, config, Store(entries))
    if strict and problems:
        raise problems[0]
    return Checkpoint(folder, layout, config, Store(entries), problems, document)


def _find_family(path: Path) -> tuple[Path, Family, list[str]]:
    """The folder, its family and the names of its weight files."""
    if path.suffix == ".gguf":
        raise LayoutError("is GGUF; reading GGUF is not supported yet", file=path)
    try:
        if not path.exists():
            raise InputError("does not exist", file=path)
        folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    found = [(family, files) for family in FAMILIES if (files := _files(family, names))]
    if only is not None:
        found = [(family, files) for family, files in found if only == family.index_name or only in files]
    if len(found) > 1:
        choices = " or ".join(
            str(folder / (family.index_name if family.index_name in names else files[0])) for family, files in found
        )
        raise LayoutError(f"holds two layouts at once; name the one you mean: {choices}", file=folder)
    if not found:
        if any(name.endswith(".gguf") for name in names):
            raise LayoutError("holds GGUF files; reading GGUF is not supported yet", file=folder)
        patterns = (
            "consolidated.00.pth, consolidated.*.pt, consolidated.safetensors, model*.safetensors, pytorch_model*.bin"
        )
        raise LayoutError(f"holds no Mixtral checkpoint; looked for {patterns}", file=path)
    return folder, *found[0]


def _files(family: Family, names: Iterable[str]) -> list[str]:
    """The family's weight files, in order; an index alone counts, so that missing shards are named."""
    matches = [match for name in names if (match := re.fullmatch(family.pattern, name))]
    if matches and matches[0].re.groups:
        matches.sort(key=lambda match: int(match[1]))
    files = [match[0] for match in matches]
    return files or [name for name in names if name == family.index_name]


def _read_index(folder: Path, family: Family) -> dict[str, str] | None:
    """weight_map of the index; None without one. Its values must be names of files in the folder."""
    if family.index_name is None or not (path := folder / family.index_name).exists():
        return None
    document = load_json(path, MAX_INDEX_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError("has no weight_map of tensor names to file names", file=path)
    for name, tensor in {name: tensor for tensor, name in weight_map.items()}.items():
        if not _is_base_name(name):
            raise UnsafeError(f"names the file {name!r}, which is not in its folder; refused", file=path, tensor=tensor)
        if not stays_inside(folder, folder / name):
            raise UnsafeError(f"names {name!r}, a link that leaves the folder; refused", file=path, tensor=tensor)
        if not (folder / name).is_file():
            raise LayoutError(f"shard {name}, named by the index, is missing", file=folder / name, tensor=tensor)
    return weight_map


def _is_base_name(name: str) -> bool:
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        return False
    return name == Path(name).name and name not in ("", ".", "..") and len(raw) < 256 and not {*raw} & {*b"\\\0"}


def stays_inside(folder: Path, path: Path) -> bool:
    """No link out of the folder, except into the blobs of huggingface-hub's own cache."""
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        roots.append(folder.resolve().parent.parent / "blobs")
    return any(path.resolve().is_relative_to(root) for root in roots)


def _open(folder: Path, family: Family, names: list[str]) -> list[Source]:
    if family.layouts == (SPLIT,):
        numbers = [int(name.rpartition("split")[2]) for name in names]
        if numbers != list(range(len(numbers))):
            missing = next(n for n in range(len(numbers)) if n not in numbers)
            raise LayoutError("a part is missing", file=folder / f"consolidated.00.pth-split{missing}")
        return [Source([folder / name for name in names])]
    return [Source(folder / name) for name in names]


def _expect_all_shards(folder: Path, names: list[str]) -> None:
    totals = {int(match[1]) for name in names if (match := re.search(r"-of-(\d+)\.", name))}
    if len(totals) != 1 or len(names) != max(totals):
        raise LayoutError(f"holds {len(names)} shards of {max(totals)}; fetch the missing ones", file=folder)


def _collect(family: Family, sources: list[Source]) -> list[Entry]:
    entries: dict[str, Entry] = {}
    for source in sources:
        for entry in family.read_header(source):
            if (other := entries.get(entry.name)) is not None:
                raise FormatError(f"stands also in {other.source.label}", file=source.label, tensor=entry.name)
            entries[entry.name] = entry
    return list(entries.values())


def _index_problems(
    folder: Path, family: Family, weight_map: dict[str, str] | None, entries: dict[str, Entry]
) -> list[MixtoolsError]:
    """Where index and shards disagree on which tensor lies where."""
    problems: list[MixtoolsError] = []
    for name, shard in (weight_map or {}).items():
        place = entries[name].source.paths[0].name if name in entries else None
        if place != shard:
            why = "the index places it wrongly"
            problems.append(
                LayoutError(
                    why, file=folder / str(family.index_name), tensor=name, expected=shard, found=place or "nowhere"
                )
            )
    return problems[:1]


def _best_layout(family: Family, entries: dict[str, Any], folder: Path) -> Layout:
    """Of the family's layouts the one whose router name is there; quantized names are refused by name."""
    for name in entries:
        suffix = name.rpartition(".")[2]
        if suffix not in formats.SUFFIXES and (method := _QUANTIZED.get(suffix)) is not None:
            raise QuantizedError(f"is quantized ({method}: {name}); reading it is not supported yet", file=folder)
    routers = [layout.rules[Role.ROUTER].name.format(layer=0) for layout in family.layouts]
    return next(
        (lay for lay, router in zip(family.layouts, routers, strict=True) if router in entries), family.layouts[0]
    )
