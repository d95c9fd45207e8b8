"""From a path to the files that are one checkpoint: the one that the user names, else what transformers would take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from ..config import load_json
from ..errors import FormatError, InputError, LayoutError, UnsafeError
from ..storage import lfs, safetensors, torchzip
from ..storage.source import Source, missing
from ..storage.store import Entry
from .hf import HF, HF_BIN, HF_FUSED, HF_HYBRID, HF_MIXED, HF_V5
from .table import Layout
from .torrent import CONSOLIDATED, SPLIT, STACKED, TORRENT

MAX_INDEX_BYTES = 16 << 20  # 8x22B needs 0.2 MB


class Family(NamedTuple):
    """Files that together are one checkpoint: how they are named, read and configured."""

    pattern: str  # of a file's name; the first group, if any, orders the files
    whole: str | None  # the one file that is a checkpoint by itself, in a family that has shards beside
    index_name: str | None
    config: str
    read_header: Callable[[Source], list[Entry]]
    layouts: tuple[Layout, ...]


_SAFETENSORS = (HF, HF_MIXED, HF_V5, HF_HYBRID, HF_FUSED)
FAMILIES = (
    Family(r"consolidated\.00\.pth", None, None, "params.json", torchzip.read_header, (TORRENT,)),
    Family(r"consolidated\.00\.pth-split(\d+)", None, None, "params.json", torchzip.read_header, (SPLIT,)),
    Family(r"consolidated\.(\d+)\.pt", None, None, "params.json", torchzip.read_header, (STACKED,)),
    Family(r"consolidated\.safetensors", None, None, "params.json", safetensors.read_header, (CONSOLIDATED,)),
    Family(
        r"model(?:-\d+-of-\d+)?\.safetensors",
        "model.safetensors",
        "model.safetensors.index.json",
        "config.json",
        safetensors.read_header,
        _SAFETENSORS,
    ),
    Family(
        r"pytorch_model(?:-\d+-of-\d+)?\.bin",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "config.json",
        torchzip.read_header,
        (HF_BIN, HF_MIXED, HF_V5, HF_HYBRID, HF_FUSED),
    ),
)
_PATTERNS = (
    "consolidated.00.pth, consolidated.*.pt, consolidated.safetensors, model*.safetensors, pytorch_model*.bin, *.gguf"
)
_GPTQ = r"(gptq_model-\d+bit-(?:-1|\d+)g)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?"  # auto-gptq's own names
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = r"adapter_config\.json|adapter_model.*\.(safetensors|bin)"


def any_of(folder: Path) -> bool:
    """Whether the folder holds weight files of a family here."""
    names = [path.name for path in folder.iterdir()]
    return any(family_files(family, names) for family in families(names))


def families(names: Iterable[str]) -> tuple[Family, ...]:
    """All of them; auto-gptq puts bits and groups into its file's name, so that each such name is one."""
    stems = dict.fromkeys(match[1] for name in names if (match := re.fullmatch(_GPTQ, name)))
    return FAMILIES + tuple(
        Family(
            rf"{re.escape(stem)}(?:-\d+-of-\d+)?\.safetensors",
            f"{stem}.safetensors",
            f"{stem}.safetensors.index.json",
            "config.json",
            safetensors.read_header,
            _SAFETENSORS,
        )
        for stem in stems
    )


class Found(NamedTuple):
    """The weight files of one checkpoint. `weight_map`: the index, tensor to file, where one was followed."""

    folder: Path
    family: Family
    names: list[str]
    weight_map: dict[str, str] | None = None
    remarks: tuple[str, ...] = ()


def find(path: Path) -> Found:
    """The checkpoint of a folder, or that to which a weight file or an index of it belongs.

    A file that is a checkpoint by itself is read alone when it is named, whatever lies beside it; a shard stands for
    its sharded checkpoint. Of a folder with both, the one file is taken, as transformers does, and a remark says so.
    Raises LayoutError, InputError, or UnsafeError for an index that names what is not in its folder.
    """
    try:
        if not path.exists():
            raise InputError(missing(path, "does not exist"), file=path)
        folder, only = (path, None) if path.is_dir() else (path.parent, path.name)
        names = sorted(entry.name for entry in folder.iterdir())
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    found = [(family, files) for family in families(names) if (files := family_files(family, names))]
    if only is not None:
        found = [(family, files) for family, files in found if only == family.index_name or only in files]
    if len(found) > 1:
        choices = " or ".join(
            str(folder / (family.index_name if family.index_name in names else files[0])) for family, files in found
        )
        raise LayoutError(f"holds two layouts at once; name the one you mean: {choices}", file=folder)
    if not found:
        raise _nothing(path, names, only)
    return _choose(folder, *found[0], only)


def family_files(family: Family, names: Iterable[str]) -> list[str]:
    """The family's weight files among `names`, in order; an index alone counts, so that missing shards are named."""
    matches = [match for name in names if (match := re.fullmatch(family.pattern, name))]
    if matches and matches[0].re.groups:
        matches.sort(key=lambda match: int(match[1]))
    files = [match[0] for match in matches]
    return files or [name for name in names if name == family.index_name]


def _nothing(path: Path, names: list[str], only: str | None) -> LayoutError:
    """The error for what is no checkpoint, by what it is instead."""
    if re.fullmatch(_ADAPTER, only) if only else ADAPTER_CONFIG in names:
        config = (path.parent if only else path) / ADAPTER_CONFIG
        document = load_json(config) if config.exists() else {}
        base = document.get("base_model_name_or_path") if isinstance(document, dict) else None
        return adapter_error(path, base if isinstance(base, str) else None)
    return LayoutError(f"holds no Mixtral checkpoint; looked for {_PATTERNS}", file=path)


def adapter_error(place: str | Path, base: str | None) -> LayoutError:
    """For a LoRA adapter where a model is needed; `base`: the model that it was trained on."""
    of = f" for {base}" if base else ""
    way = "merge it into its base model first (peft: merge_and_unload, then save_pretrained) and name the result"
    return LayoutError(f"is a LoRA adapter{of}, not a model; {way}", file=place)


def _choose(folder: Path, family: Family, files: list[str], only: str | None) -> Found:
    """Which of a family's files in the folder are read."""
    if family.whole is None or family.index_name is None:
        return Found(folder, family, files)
    index = folder / family.index_name
    shards = [name for name in files if name not in (family.whole, family.index_name)]
    if only == family.whole:
        return Found(folder, family, [only])
    if only is None and family.whole in files and ((folder / family.whole).is_file() or not (shards or index.exists())):
        return Found(folder, family, [family.whole], remarks=_told(family, shards, index))
    if only in shards:
        weight_map = _read_index(index) if index.exists() else None
        if weight_map is None or only not in weight_map.values():
            ending = _total(only)
            group = [name for name in shards if _total(name) == ending]
            _expect_all(folder, group)
            remark = f"{index.name} is not followed: it does not name {only}"
            return Found(folder, family, group, remarks=(remark,) if weight_map else ())
    elif index.exists() or not shards:
        weight_map = _read_index(index)
    else:
        _expect_all(folder, shards)
        return Found(folder, family, shards)
    _expect_named(index, weight_map)
    return Found(folder, family, sorted(set(weight_map.values())), weight_map)


def _told(family: Family, shards: list[str], index: Path) -> tuple[str, ...]:
    """What to say where one file is read and others lie beside it."""
    if not shards and not index.exists():
        return ()
    other = index.name if index.exists() else shards[0]
    return (f"{family.whole} is read, as transformers does; the shards beside it are not (name {other} to read them)",)


def _read_index(path: Path) -> dict[str, str]:
    """weight_map of an index. Its values must be base names, of files or links in its own folder."""
    lfs.refuse_file(path)
    document = load_json(path, MAX_INDEX_BYTES)
    weight_map = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise FormatError("has no weight_map of tensor names to file names", file=path)
    for name, tensor in _by_file(weight_map).items():
        if not _is_base_name(name):
            raise UnsafeError(f"names the file {name!r}, which is not in its folder; refused", file=path, tensor=tensor)
    return weight_map


def _expect_named(index: Path, weight_map: dict[str, str]) -> None:
    """Raises LayoutError for a shard that is not there; one that is a link may lead anywhere, as in a cache."""
    for name, tensor in _by_file(weight_map).items():
        if not (shard := index.parent / name).is_file():
            why = missing(shard, f"shard {name}, named by the index, is missing")
            raise LayoutError(why, file=shard, tensor=tensor)


def _by_file(weight_map: dict[str, str]) -> dict[str, str]:
    return {name: tensor for tensor, name in weight_map.items()}


def _is_base_name(name: str) -> bool:
    try:
        raw = name.encode()
    except UnicodeEncodeError:
        return False
    return name == Path(name).name and name not in ("", ".", "..") and len(raw) < 256 and not {*raw} & {*b"\\\0"}


def _total(shard: str) -> int:
    """How many shards there are, by the name of one."""
    match = re.search(r"-of-(\d+)\.", shard)
    assert match is not None, shard
    return int(match[1])


def _expect_all(folder: Path, shards: list[str]) -> None:
    totals = set(map(_total, shards))
    if len(totals) != 1 or len(shards) != max(totals):
        raise LayoutError(f"holds {len(shards)} shards of {max(totals)}; fetch the missing ones", file=folder)
