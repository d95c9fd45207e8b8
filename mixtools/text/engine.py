"""What either kind of file gives: tokens, and text to ids."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .decoding import Decoder, Meaning


@dataclass(frozen=True)
class Engine:
    """A vocabulary and its encoder.

    `meanings`: one for each id. `ids`: of each token's spelling. `special`: the special tokens among them. `encode`:
    text, and whether special tokens in it are meant, to ids; without BOS. `before`, `after`: ids that go round every
    text. `stream`: makes a decoder. `remarks`: what a user should know.
    """

    file: Path
    meanings: Sequence[Meaning]
    ids: Mapping[str, int]
    special: Mapping[str, int]
    encode: Callable[[str, bool], list[int]]
    before: tuple[int, ...]
    after: tuple[int, ...]
    stream: Callable[[], Decoder]
    remarks: tuple[str, ...] = ()
