"""Which of a family's layouts lies in the files, by the names that are there: prefixes, experts' spellings, ties."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from ..formats import SUFFIXES
from ..names import Role
from ..storage.store import CHUNK, Entry, Store, to_tensor
from .table import Layout, part_name

_BEFORE = r"((?:module\.|model\.)*)"  # what DataParallel and saving a wrapper leave before every name
_TELLING = (Role.ROUTER, Role.GATE, Role.DOWN, Role.UP)  # roles whose names differ between the layouts of a family


def layout_of(layouts: Sequence[Layout], names: Iterable[str]) -> tuple[Layout, tuple[str, ...]]:
    """The layout under whose names most of a layer's tensors are there, of equals the first; and what to remark.

    Names may stand behind `module.` or `model.`, or lack Hugging Face's own `model.`, the same for all of them.
    """
    names = set(names)
    own, head = layouts[0].root, layouts[0].rules[Role.HEAD].name
    root = _most(rf"{_BEFORE}layers\.\d", names, own)
    extra = root.removesuffix(own)
    before_head = _most(rf"{_BEFORE}{re.escape(head)}$", names, extra if root.endswith(own) else "")
    found = [layout.renamed(root, before_head) for layout in layouts]
    best = max(found, key=lambda layout: sum(is_stored(layout, role, names) for role in _TELLING))
    if root.endswith(own):
        return best, (f"tensor names begin with {extra!r}; read without it",) if extra else ()
    return best, (f"tensor names lack {own!r}, as those of a base model's save do; read as if they had it",)


def _most(pattern: str, names: Iterable[str], usual: str) -> str:
    """The prefix that most names have, the usual one if no other has more."""
    counts = Counter(match[1] for name in names if (match := re.match(pattern, name)))
    return max(sorted(counts), key=lambda prefix: (counts[prefix], prefix == usual), default=usual)


def is_stored(layout: Layout, role: Role, names: Iterable[str], layer: int = 0, expert: int = 0) -> bool:
    """Whether a matrix of this role lies under the layout's name for it, plain or in parts."""
    name = layout.rules[role].name.format(layer=layer, expert=expert)
    return any(part_name(name, suffix) in names for suffix in SUFFIXES)


def tie(layout: Layout, entries: Mapping[str, Entry]) -> tuple[Layout, bool, tuple[str, ...]]:
    """The layout of a checkpoint whose configuration ties head and embedding; whether they are; what to remark.

    As transformers 5.23 (PreTrainedModel.tie_weights): where one of them is not stored, it is the other; where both
    are and differ, the configuration is wrong and each is used as it lies.
    """
    head, embedding = (is_stored(layout, role, entries) for role in (Role.HEAD, Role.EMBED))
    names = {role: layout.rules[role].name for role in (Role.HEAD, Role.EMBED)}
    if embedding and not head:
        return layout.sharing(Role.HEAD, Role.EMBED), True, ()
    if head and not embedding:
        remark = f"{names[Role.EMBED]} is not stored; tie_word_embeddings makes it the same as {names[Role.HEAD]}"
        return layout.sharing(Role.EMBED, Role.HEAD), True, (remark,)
    if not head or not all(name in entries for name in names.values()):
        return layout, False, ()
    if _equal(*(entries[name] for name in names.values())):
        return layout, True, ()
    remark = (
        f"the configuration says tie_word_embeddings, but {names[Role.HEAD]} is stored and differs from "
        f"{names[Role.EMBED]}: each is used as it lies, as transformers does"
    )
    return layout, False, (remark,)


def _equal(one: Entry, other: Entry) -> bool:
    """Whether two stored tensors have the same values; reads both, up to the first difference."""
    import torch

    if one.shape != other.shape:
        return False
    if replace(one, name="") == replace(other, name=""):  # two names of one storage
        return True
    # without checksums: damage is for the reader to tell, a part read here must not count as read
    pair = [replace(entry, name=str(number), record=None) for number, entry in enumerate((one, other))]
    store = Store({entry.name: entry for entry in pair})
    step = max(1, CHUNK // max(1, *(entry.row_bytes for entry in pair)))
    if any(entry.strides is not None for entry in pair):
        step = max(1, one.rows)
    for at in range(0, one.rows, step):
        blocks = (
            to_tensor(store.read_rows(entry.name, at, min(at + step, one.rows)), entry.dtype).float() for entry in pair
        )
        if not torch.equal(*blocks):
            return False
    return True
