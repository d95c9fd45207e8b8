"""The outputs that a user names, what each is, and how its check judged its bytes as they are now.

OUT ... ─► find ─► Output (checkpoint, manifest, record of the check) ─► judge (every byte hashed) ─► Judged
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checking import recording
from ..checking.gates import kind_of
from ..errors import InputError, LayoutError, UsageError
from ..layouts.detect import open_checkpoint
from ..layouts.gguf_files import is_gguf
from ..progress import Progress
from ..storage import checked, manifest
from ..storage.manifest import File
from ..storage.source import missing

if TYPE_CHECKING:
    from ..layouts.checkpoint import Checkpoint

_PART = re.compile(r".*-(\d{5})-of-\d{5}\.gguf")
_IMPORTANCE = re.compile(r".*imatrix.*\.gguf")  # what goes with a set, and is no model
UNCHECKED = "unchecked"


@dataclass(frozen=True)
class Output:
    """A folder that is an output, or a GGUF in one. `entry`: the manifest's, empty without; `record`: its check's."""

    checkpoint: Checkpoint
    entry: Mapping[str, Any]
    record: checked.Record | None

    @property
    def folder(self) -> Path:
        return self.checkpoint.folder

    @property
    def is_gguf(self) -> bool:
        return self.checkpoint.gguf is not None

    @property
    def name(self) -> str:
        """Of the file, or of the folder."""
        if self.is_gguf:
            return recording.name_of(self.checkpoint)
        return self.folder.absolute().name

    @property
    def kind(self) -> str:
        """A GGUF's type, a quantization's or method's name, "dense"."""
        if self.checkpoint.gguf is not None:
            return self.checkpoint.gguf.file_type
        return kind_of(self.checkpoint, self.folder)

    @property
    def weights(self) -> list[Path]:
        return sorted({path for source in self.checkpoint.store.sources for path in source.paths})

    @property
    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.weights)

    @property
    def made(self) -> tuple[str | None, Mapping[str, Any]]:
        """The method that changed the weights and its options, as the manifest tells."""
        name = manifest.method(self.entry)
        return name, self.entry[name] if name else {}


@dataclass(frozen=True)
class Judged:
    """An output, the hash of each file that a check judges, and the verdict that holds for these bytes.

    `verdict`: the check's, or "unchecked", and then `why`. `document`: the check's, as far as it holds.
    """

    output: Output
    files: Mapping[str, File]
    verdict: str
    why: str = ""

    @property
    def document(self) -> Mapping[str, Any]:
        record = self.output.record
        return record.document if record is not None and self.verdict != UNCHECKED else {}


def find(names: Iterable[str | Path]) -> list[Output]:
    """The outputs at these places; of a folder of several GGUFs each.

    Raises InputError for a place that does not exist or holds no checkpoint, UsageError for one named twice.
    """
    found: dict[Path, Output] = {}
    for path in map(Path, names):
        if not path.exists():
            raise InputError(missing(path, "does not exist"), file=path)
        for place in _places(path):
            output = _open(place)
            if (key := output.checkpoint.place.absolute()) in found:
                raise UsageError(f"{place} is named twice")
            found[key] = output
    if not found:
        raise UsageError("name an output at least")
    return [*found.values()]


def _places(path: Path) -> Iterator[Path]:
    if not path.is_dir() or not is_gguf(path):
        yield path
        return
    files = sorted(one for one in path.iterdir() if one.suffix == ".gguf" and one.is_file())
    firsts = [one for one in files if (part := _PART.fullmatch(one.name)) is None or int(part[1]) == 1]
    models = [one for one in firsts if not _IMPORTANCE.fullmatch(one.name)] or firsts
    yield from models


def _open(place: Path) -> Output:
    checkpoint = open_checkpoint(place, strict=False)
    folder = checkpoint.folder
    written = manifest.load(folder) or {}
    entry = manifest.of_output(written, checkpoint.place.name)
    if manifest.OUTPUTS in entry:  # of a folder that others share, and this one is not listed
        entry = {}
    return Output(checkpoint, entry, checked.load(folder).get(recording.name_of(checkpoint)))


def judge(outputs: Sequence[Output], progress: Progress | None = None) -> list[Judged]:
    """Hash every file of each. Raises InputError for one that cannot be read."""
    return [_judge(output, progress) for output in outputs]


def _judge(output: Output, progress: Progress | None) -> Judged:
    try:
        files = recording.hashes(recording.files_of(output.checkpoint), progress)
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=error.filename or output.folder) from None
    place = output.checkpoint.place
    if output.record is None:
        why = f"was not checked: mixtools check {place} --against SOURCE --text FILE"
        return Judged(output, files, UNCHECKED, why)
    told = output.record.files
    for name in sorted({*files, *told}):
        if name not in told:
            return Judged(output, files, UNCHECKED, f"{name} came there after the check; check it again")
        if name not in files:
            return Judged(output, files, UNCHECKED, f"{name}, which was checked, is gone; check what is left")
        if files[name] != told[name]:
            return Judged(output, files, UNCHECKED, f"{name} has changed since it was checked; check it again")
    return Judged(output, files, output.record.verdict)


def expect_alike(outputs: Sequence[Output]) -> None:
    """GGUF files of one folder, or folders: what one repository holds. Raises UsageError for others."""
    if len({output.is_gguf for output in outputs}) > 1:
        raise UsageError("GGUF files and folders go to repositories of their own; name one sort at a time")
    if outputs[0].is_gguf and len({output.folder.absolute() for output in outputs}) > 1:
        raise UsageError("the GGUF files lie in several folders; a card tells of those in one")
    one, *others = outputs
    for other in others:
        if _sizes(one) != _sizes(other):
            why = f"is a model of other sizes than {one.checkpoint.place}; a repository holds variants of one"
            raise LayoutError(why, file=other.checkpoint.place)


def _sizes(output: Output) -> tuple[int, ...]:
    config = output.checkpoint.config
    return (
        config.hidden_size, config.intermediate_size, config.num_layers, config.num_heads, config.num_kv_heads,
        config.vocab_size, config.num_experts,
    )  # fmt: skip


def is_portable(recipe: Path) -> bool:
    """Whether a recipe says nothing of where on a machine its files lay, which is nobody's business."""
    try:
        return re.search(r"""(^|[\s'"=\[])(/|~|[A-Za-z]:\\)[^\s]""", recipe.read_text("utf-8")) is None
    except (OSError, UnicodeDecodeError):
        return False
