"""A card that lies on the Hub already: what somebody wrote there stays, as beside an output on disk."""

from __future__ import annotations

from typing import NamedTuple

from ..storage.sealed import BESIDE, CARD, seal, unsealed
from ..text import front_matter
from .front import KEPT, is_plain


class Placed(NamedTuple):
    """Where a card of ours goes, and what it says there."""

    path: str
    data: bytes


def placed(ours: bytes, theirs: bytes) -> Placed:
    """`ours` in place of `theirs`, or beside it if somebody wrote that.

    A head without a text, as the Hub's own form for a new repository leaves it, is no card yet. Licence and languages
    that it tells, or an earlier card of ours does, go into ours where ours has none. A card that is not ours goes in
    place of theirs: it is its user's, and so is the repository.
    """
    text = unsealed(ours)
    if text is None:
        return Placed(CARD, ours)
    head, body = front_matter.split(theirs.decode("utf-8", "replace").replace("\r\n", "\n"))
    if body.strip() and unsealed(theirs) is None:
        return Placed(BESIDE, ours)
    told, _ = front_matter.split(text)
    missing = {key: head[key] for key in KEPT if key not in told and is_plain(head.get(key))}
    if not missing:
        return Placed(CARD, ours)
    import yaml

    mark, _, rest = text.partition("\n")
    return Placed(CARD, seal(f"{mark}\n{yaml.safe_dump(missing, sort_keys=False, allow_unicode=True)}{rest}"))
