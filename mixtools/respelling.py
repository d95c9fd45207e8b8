"""Experts under other names: the same tensors, byte for byte, in the same files, for loaders that know no others.

    block_sparse_moe.experts.0.w1.qweight ─► mlp.experts.0.gate_proj.qweight      (legacy ─► v5, and back)

What config.json and the documents of quantizing packages name by them is re-spelled along; everything else is copied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from . import documents
from .config import MAX_CONFIG_BYTES, QUANT_CONFIG, QUANTIZE_CONFIG, load_object
from .conversion import EXPERT_NAMES, expect_names, inputs_of
from .errors import LayoutError, UsageError
from .job import Job, Unit
from .layouts.checkpoint import Checkpoint
from .layouts.families import MAX_INDEX_BYTES
from .layouts.hf import HF
from .layouts.table import Layout
from .names import Role, Slot
from .storage import plan
from .storage.output import Document, Output, Region
from .storage.store import CHUNK, Bits, Entry

_RESPELLED = (Role.ROUTER, Role.GATE, Role.DOWN, Role.UP)
_CONFIGS = ("config.json", QUANTIZE_CONFIG, QUANT_CONFIG, "quantization_config.json")
# keys of a quantization's description below which modules are named, whole or in regular expressions
_NAMING = frozenset({
    "ignore", "targets", "modules_to_not_convert", "modules_in_block_to_quantize", "inside_layer_modules", "dynamic",
    "extra_config", "llm_int8_skip_modules",
})  # fmt: skip
_TOLD_ANEW = re.compile(r"mixtools(-check)?\.json")
# a word of a module's name: of a path, of a regular expression, or by itself
_WORDS = {"block_sparse_moe": "mlp", "w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def plan_respelled(source: Checkpoint, spelling: str) -> Job:
    """A checkpoint of Hugging Face's layout with its experts' names as `spelling` has them (conversion.EXPERT_NAMES).

    Raises UsageError where there is no such spelling, or the names are such already; LayoutError for a source whose
    experts have no names of their own, or whose files are no safetensors.
    """
    target = expect_names(spelling)
    if source.layout.letter != HF.letter or any(entry.strides is not None for entry in source.store.entries.values()):
        raise LayoutError(
            f"is {source.layout.title}; names are re-spelled where each expert has its own in safetensors: "
            "`mixtools convert to-hf` makes such a folder of any other",
            file=source.place,
        )
    names = _new_names(source, target)
    if all(old == new for old, new in names.items()):
        raise UsageError(f"its experts' names are {spelling} already", file=source.place)
    target_plan = _plan(source, names)
    units = [_unit(source, slots, entries, names) for slots, entries in _groups(source)]
    beside = _documents(source, target)
    record = {"layout": target.name, "options": {"expert_names": spelling}}
    return Job(
        inputs_of(source), target_plan, lambda _: units, record, beside.documents, beside.last, notes=beside.notes,
        title=target.title, label="renaming", worker_bytes=2 * CHUNK,
    )  # fmt: skip


def _new_names(source: Checkpoint, target: Layout) -> dict[str, str]:
    """Of every stored tensor, biases included. Raises LayoutError where two would have one name."""
    layout = target.renamed(source.layout.root, "")
    stems = {
        source.piece(slot).name.removesuffix("weight"): layout.piece(slot, source.config).name.removesuffix("weight")
        for slot in source.slots()
        if slot.role in _RESPELLED
    }
    names = {}
    for name in source.store.entries:
        before = (name[: at + 1] for at, sign in enumerate(name) if sign == ".")
        stem = next((stem for stem in before if stem in stems), "")
        names[name] = stems.get(stem, "") + name.removeprefix(stem)
    if len({*names.values()}) < len(names):
        twice = next(name for name in names.values() if [*names.values()].count(name) > 1)
        raise LayoutError("would be the name of two tensors", file=source.place, tensor=twice)
    return names


def _groups(source: Checkpoint) -> Iterator[tuple[tuple[Slot, ...], list[Entry]]]:
    """The stored tensors of each slot, each tensor once, and then those of none."""
    left = dict(source.store.entries)
    for slot in source.slots():
        if entries := [left.pop(entry.name) for entry in source.parts(slot) if entry.name in left]:
            yield (slot,), entries
    yield from (((), [entry]) for entry in left.values())


def _plan(source: Checkpoint, names: Mapping[str, str]) -> plan.Plan:
    """The source's files and the order of tensors in them."""
    files: dict[str, list[Entry]] = {}
    for entry in sorted(source.store.entries.values(), key=lambda entry: (entry.source.label, entry.offset)):
        files.setdefault(entry.source.paths[0].name, []).append(entry)
    plans = [
        plan.single_safetensors(name, [(names[entry.name], entry.dtype, entry.shape) for entry in entries])
        for name, entries in files.items()
    ]
    tensors = {name: tensor for one in plans for name, tensor in one.tensors.items()}
    return plan.Plan([one.files[0] for one in plans], tensors, _index(source, names, files))


def _index(source: Checkpoint, names: Mapping[str, str], files: Mapping[str, list[Entry]]) -> dict[str, bytes]:
    """The source's index with the new names; of shards that came without one a new one."""
    if len(files) == 1:
        return {}
    stem = re.sub(r"-\d+-of-\d+\.safetensors$", "", next(iter(files)))
    name = f"{stem}.safetensors.index.json"
    told = load_object(source.folder / name, MAX_INDEX_BYTES)
    total = sum(entry.nbytes for entries in files.values() for entry in entries)
    weight_map = {names[entry.name]: file for file, entries in files.items() for entry in entries}
    document = {"metadata": {"total_size": total}, **told, "weight_map": dict(sorted(weight_map.items()))}
    return {name: _json(document)}


def _unit(source: Checkpoint, slots: tuple[Slot, ...], entries: list[Entry], names: Mapping[str, str]) -> Unit:
    def rows(entry: Entry) -> Iterator[Bits]:
        step = max(1, CHUNK // max(1, entry.row_bytes))
        for at in range(0, entry.rows, step):
            yield source.store.read_rows(entry.name, at, min(at + step, entry.rows))

    def make(_: Output) -> Iterator[Iterator[Bits]]:
        return (rows(entry) for entry in entries)

    return Unit(tuple(Region(names[entry.name], 0) for entry in entries), make, slots)


# --- documents ---


def _documents(source: Checkpoint, target: Layout) -> documents.Documents:
    """All of the source's, but what mixtools told of it; config.json comes last."""
    files, notes = documents.carried(source.beside, without=(), ours=_TOLD_ANEW)
    for name in _CONFIGS:
        if name in files:
            told = load_object(source.beside / name, MAX_CONFIG_BYTES)
            if (changed := respelled(told, target, inside=name != "config.json")) != told:
                files[name] = _json(changed)
    config: Mapping[str, Document] = {"config.json": files.pop("config.json")}
    return documents.Documents(files, config, notes=source.remarks + notes)


def respelled(document: Mapping[str, Any], target: Layout, *, inside: bool) -> dict[str, Any]:
    """A document with the modules' names of a quantization as `target` spells them.

    `inside`: all of the document describes the quantization, not only its quantization_config.
    """
    if inside:
        return {
            key: _respell(value, target) if key in _NAMING else _below(value, target) for key, value in document.items()
        }
    about = document.get("quantization_config")
    if not isinstance(about, Mapping):
        return dict(document)
    return {**document, "quantization_config": respelled(about, target, inside=True)}


def _below(value: Any, target: Layout) -> Any:
    """Descriptions within a description: compressed-tensors' groups have targets of their own."""
    return respelled(value, target, inside=True) if isinstance(value, Mapping) else value


def _respell(value: Any, target: Layout) -> Any:
    if isinstance(value, str):
        return _in_words(value, target)
    if isinstance(value, Mapping):
        return {_in_words(key, target): _respell(inner, target) for key, inner in value.items()}
    return [_respell(inner, target) for inner in value] if isinstance(value, list) else value


def _in_words(text: str, target: Layout) -> str:
    legacy = target is EXPERT_NAMES["legacy"]
    words = {new: old for old, new in _WORDS.items()} if legacy else _WORDS
    return re.sub(r"(?<![A-Za-z0-9_])(?:" + "|".join(words) + r")(?![A-Za-z0-9_])", lambda found: words[found[0]], text)


def _json(document: Mapping[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()
