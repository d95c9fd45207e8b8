"""Output: a folder, or files in one, that is either absent, visibly unfinished, or whole.

Everything is written in a work folder (OUT/.mixtools/; place.py) under its final name; `commit` makes it durable and
renames it into place, configuration and index last. The journal there lists what is written, with checksums, so that a
killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DiskError, InputError, OutputError, OutputExists
from ..progress import Progress, Silent
from . import disk, journal, manifest, replacing
from .crc import Ledger
from .digest import Digest, of_file
from .disk import DiskErrors
from .place import FINDINGS, JOURNAL, LOCK, Place
from .plan import FilePlan, Plan
from .replacing import Stamp
from .source import Source
from .store import CHUNK, Bits, as_bytes
from .writeback import WriteBehind, write_all

Document = bytes | Path  # what is written, or the file of the source that is copied

_GONE = Stamp(0, 0, 0)  # of a file that a commit has begun to remove


class Region(NamedTuple):
    """A slot's bytes: `start` within the stored tensor `name`."""

    name: str
    start: int


class Writing:
    """A region on its way to the disk, from one thread."""

    def __init__(self, output: Output, region: Region, part: WriteBehind, start: int) -> None:
        self._output, self._region, self._part, self._start = output, region, part, start
        self._at, self._crc = start, 0

    def write(self, block: Bits) -> int:
        """The bytes that follow; how many they are. Raises DiskError."""
        view = as_bytes(block)
        for low in range(0, len(view), CHUNK):
            chunk = view[low : low + CHUNK]
            self._crc = zlib.crc32(chunk, self._crc)
            with DiskErrors(self._output.folder):
                self._part.write(chunk, self._at)
            self._at += len(chunk)
        return len(view)

    def finish(self) -> int:
        """Nothing follows; returns how many bytes there were. Raises DiskError."""
        size = self._at - self._start
        self._output.wrote(self._region, size, self._crc)
        return size


class Output:
    """Use as a context manager; leaving it without `commit` keeps the work folder for a resumed run."""

    def __init__(
        self, folder: Path, plan: Plan, key: Mapping[str, Any], *, names: Iterable[str] = (), overwrite: bool = False,
        resume: bool = True, progress: Progress | None = None, shared: bool = False, reserved: int = 0,
    ) -> None:  # fmt: skip
        """Lock `folder` and prepare it, or continue the run with the same `key` found there.

        `names`: of the documents that `commit` will be given, as far as they are known. `shared`: the folder holds
        others' files beside the plan's. `reserved`: bytes of the disk that others of the same run will take. Raises
        OutputExists, OutputLocked or DiskError before anything is written.
        """
        self.place = Place(folder, tuple(file.name for file in plan.files) if shared else ())
        self.folder, self.plan, self.work = folder, plan, self.place.work
        self.overwrite, self.progress = overwrite, progress or Silent()
        self.done: dict[Region, tuple[int, int]] = {}  # -> size, crc
        self.notes: dict[str, Any] = {}  # what was found while writing, for a report at the end
        self._mutex, self._reserved = threading.Lock(), reserved
        self._committing = False
        self._old: dict[str, Stamp] = {}  # what goes when the new is whole
        self._sealed: dict[str, str] = {}  # SHA-256 of whole files
        self._hasher = ThreadPoolExecutor(1, "mixtools-digest")
        self._aside = ThreadPoolExecutor(1, "mixtools-aside")
        self._last_aside: Future[None] | None = None
        self._digests: dict[str, Digest] = {}
        self._lock = self.place.claim(overwrite)
        self._files: dict[str, int] = {}
        self._parts: dict[str, WriteBehind] = {}
        try:
            with DiskErrors(folder):
                if overwrite and not self.place.is_committing():
                    written = [*(file.name for file in plan.files), *plan.index, *names]
                    self._old = self.place.replaceable(written, self.progress)
                self._begin({"plan": _digest(plan), **key}, overwrite, resume)
        except BaseException:
            self.close()
            self.place.forget()
            raise

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def abandon(self) -> None:
        """Close; where nothing was written, here or by an earlier run, no trace is left."""
        if not (self.done or self.notes or self._committing):
            (self.work / JOURNAL).unlink(missing_ok=True)
            self.place.forget()
        self.close()

    def close(self) -> None:
        for digest in self._digests.values():
            digest.stop()
        self._aside.shutdown()  # before the journal is closed, in which it may have a line to write
        self._hasher.shutdown(cancel_futures=True)
        while self._files:
            os.close(self._files.popitem()[1])
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def done_bytes(self) -> int:
        return sum(size for size, _ in self.done.values())

    def add(self, region: Region, blocks: Iterable[Bits]) -> int:
        """Write a region's blocks one behind the other, and journal it. Safe to call from several threads."""
        writing = self.begin(region)
        for block in blocks:
            writing.write(block)
        return writing.finish()

    def begin(self, region: Region) -> Writing:
        """As `add`, a block at a time."""
        tensor = self.plan.tensors[region.name]
        return Writing(self, region, self._parts[tensor.file], tensor.offset + region.start)

    def wrote(self, region: Region, size: int, crc: int) -> None:
        """Journal a region whose bytes are all written."""
        line = {"tensor": region.name, "start": region.start, "bytes": size, "crc32": f"{crc:08x}"}
        with self._mutex, DiskErrors(self.folder):
            self.done[region] = (size, crc)
            self._append(line)

    def note(self, name: str, found: Any) -> None:
        """Keep something (ready for JSON) for the end of the work, through kills; before the region it tells of."""
        with self._mutex, DiskErrors(self.folder):
            self.notes[name] = found
            self._append({"note": name, "found": found})

    def aside(self, work: Callable[[], None]) -> Future[None]:
        """Do something for this output on a thread of its own, one thing after the other, beside what is made next.

        `commit` waits for it, and raises what the last raised; `close` waits, too.
        """
        self._last_aside = self._aside.submit(work)
        return self._last_aside

    def checksums(self) -> dict[str, int]:
        """CRC-32 of every stored tensor, from those of its regions."""
        ledgers = {name: Ledger(tensor.nbytes) for name, tensor in self.plan.tensors.items()}
        for region, (size, crc) in self.done.items():
            ledgers[region.name].add(region.start, region.start + size, crc)
        totals = {name: ledger.total() for name, ledger in ledgers.items()}
        missing = [name for name, total in totals.items() if total is None]
        if missing:
            raise OutputError("was never written whole; nothing is committed", file=self.folder, tensor=missing[0])
        return {name: total for name, total in totals.items() if total is not None}

    def commit(
        self, documents: Mapping[str, Document], last: Mapping[str, Document],
        record: Callable[[Mapping[str, manifest.File]], bytes] | None = None,
    ) -> None:  # fmt: skip
        """Seal, fsync and rename into place: weights, then `documents`, then `last`, then the index.

        `record` gives the manifest, behind the documents, from what was written. Raises OutputError if a tensor was not
        written, DiskError if the disk is full, InputError for a document that cannot be copied.
        """
        if self._last_aside is not None:
            self._last_aside.result()
        with DiskErrors(self.folder):
            files = self._seal()
        with DiskErrors(self.folder), self.place.listing():
            after = {**last, **self.plan.index}
            written = {name: self._write_document(name, document) for name, document in {**documents, **after}.items()}
            small = list(documents)
            if record is not None:
                self._write_document(manifest.NAME, record({**files, **written}))
                small.append(manifest.NAME)
            disk.sync_folder(self.work)
            names = [*files, *small, *after]
            folders = sorted({parent for name in names for parent in Path(name).parents if parent.name})
            for folder in folders:
                disk.sync_folder(self.work / folder)
            if not self._committing and (self.overwrite or self.place.files):
                self.place.expect_nothing_lost(self._old, names)
            self._append({"committing": True, "overwrite": self.overwrite, "old": sorted(self._old)})
            os.fsync(self._journal)  # from here on only this line tells that the folder is ours
            # of a commit that goes on, names of the new may be in place
            replacing.remove(self.folder, self._old.keys() - {*(names if self._committing else ())})
            for name in names:
                if (self.work / name).exists():
                    (self.folder / name).parent.mkdir(exist_ok=True, parents=True)
                    (self.work / name).rename(self.folder / name)
            for folder in folders:
                disk.sync_folder(self.folder / folder)
            disk.sync_folder(self.folder)
        with DiskErrors(self.folder):
            _empty(self.work, but=(JOURNAL,))
            shutil.rmtree(self.work)  # the journal last: a run killed before that goes on, one killed after is done
            disk.sync_folder(self.folder)
            disk.sync_folder(self.folder.parent)

    def _write_document(self, name: str, document: Document) -> manifest.File:
        """Write a document into the work folder, for good."""
        target = self.work / name
        target.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(document, bytes):
            disk.write_durably(target, document)
            return manifest.File(len(document), hashlib.sha256(document).hexdigest())
        try:
            data = document.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", file=document) from None
        return self._write_document(name, data)._replace(copied=True)

    def _seal(self) -> dict[str, manifest.File]:
        """Complete the weight files; size and digest of each."""
        crcs = self.checksums()
        found = {}
        for file in self.plan.files:
            if file.name in self._files:  # not renamed by a run that was killed while committing
                for offset, data in file.seal(crcs) if file.seal else ():
                    write_all(self._files[file.name], memoryview(data), offset)
                os.fsync(self._files[file.name])
            if file.name not in self._sealed:
                self._sealed[file.name] = self._digest_of(file)
            found[file.name] = manifest.File(file.size, self._sealed[file.name])
        self._append({"sealed": self._sealed})
        return found

    def _digest_of(self, file: FilePlan) -> str:
        if file.name in self._digests:
            return self._digests[file.name].finish(file.size)
        path = self.work / file.name
        self.progress.start(f"hashing {file.name}", file.size)
        found = of_file(path if path.exists() else self.folder / file.name, self.progress.advance)
        self.progress.finish()
        return found

    def _begin(self, key: dict[str, Any], overwrite: bool, resume: bool) -> None:
        path = self.work / JOURNAL
        lines = journal.read(path) if resume else []
        if lines and lines[0] != {"key": key}:
            if not overwrite:
                why = f"holds an interrupted run that differs in {journal.difference(lines[0].get('key'), key)}"
                raise OutputExists(f"{why}; --overwrite drops it and starts anew", file=self.folder)
            lines = []
        if not lines:
            _empty(self.work)
        commit = journal.commit_line(lines)
        self._committing = bool(commit)
        self.overwrite |= bool(commit.get("overwrite"))  # a commit that began to replace goes on replacing
        self._old |= dict.fromkeys(commit.get("old", ()), _GONE)
        self._sealed = next((line["sealed"] for line in reversed(lines) if "sealed" in line), {}) if commit else {}
        files = [file for file in self.plan.files if not (self._committing and self._is_moved(file))]
        self.needed_bytes = _expect_room(self.folder, files, self.work, self._reserved)
        for file in files:
            handle = self._files[file.name] = _open_part(self.work / file.name, file)
            digest = None
            if file.seal is None and file.name not in self._sealed:  # what seals a file changes what lies before
                digest = self._digests[file.name] = Digest(handle, self._hasher)
                digest.wrote(0, len(file.head))
                for start, end in _holes(self.plan, file):
                    write_all(handle, memoryview(bytes(end - start)), start)  # of a part that a crash left, who knows
                    digest.wrote(start, end)
            self._parts[file.name] = WriteBehind(handle, digest)
        self._journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._files[JOURNAL] = self._journal
        os.ftruncate(self._journal, sum(len(journal.encode(line)) for line in lines))  # what a kill cut off
        if not lines:
            self._append({"key": key})
        self._take_over(lines[1:])

    def _is_moved(self, file: FilePlan) -> bool:
        """Renamed into the folder already by the run that was killed while committing."""
        there = self.folder / file.name
        return not (self.work / file.name).exists() and there.is_file() and there.stat().st_size == file.size

    def _take_over(self, lines: list[dict[str, Any]]) -> None:
        """Trust what the journal lists as far as the bytes on disk agree."""
        sources = {file.name: Source(self.work / file.name) for file in self.plan.files if file.name in self._files}
        for line in lines:
            if isinstance(line.get("note"), str):
                self.notes[line["note"]] = line.get("found")
            if (entry := _done(line)) is None or (tensor := self.plan.tensors.get(entry[0].name)) is None:
                continue
            region, size, crc = entry
            if region.start + size > tensor.nbytes:
                continue
            source = sources.get(tensor.file)
            start = tensor.offset + region.start
            if source is None or disk.crc(source, start, size) == crc:
                self.done[region] = (size, crc)
                if tensor.file in self._digests:
                    self._digests[tensor.file].wrote(start, start + size)

    def _append(self, line: Mapping[str, Any]) -> None:
        data = journal.encode(line)
        while data:
            data = data[os.write(self._journal, data) :]


def _expect_room(folder: Path, files: Iterable[FilePlan], work: Path, reserved: int) -> int:
    """Bytes still to be allocated, which must be free now, not after an hour's work."""
    present = sum(path.stat().st_blocks * 512 for path in work.iterdir() if path.is_file())
    needed = max(0, sum(file.size for file in files) - present)
    free = disk.free_bytes(folder)
    if needed + reserved > free:
        raise DiskError(f"needs {(needed + reserved) / 1e9:.2f} GB more, {free / 1e9:.2f} GB are free", file=folder)
    return needed


def _done(line: Mapping[str, Any]) -> tuple[Region, int, int] | None:
    """Region, size and checksum that a line of the journal tells; None for any other line."""
    try:
        name, start, size, crc = line["tensor"], line["start"], line["bytes"], int(line["crc32"], 16)
    except (KeyError, TypeError, ValueError):
        return None
    good = isinstance(name, str) and type(start) is int and type(size) is int and start >= 0 and size > 0
    return (Region(name, start), size, crc) if good else None


def _digest(plan: Plan) -> str:
    """Of every name, type and offset: a journal fits only the plan it was written for."""
    tensors = [[t.name, t.dtype.value, t.shape, t.file, t.offset] for t in plan.tensors.values()]
    return f"{zlib.crc32(json.dumps([tensors, [[f.name, f.size] for f in plan.files]]).encode()):08x}"


def _holes(plan: Plan, file: FilePlan) -> Iterator[tuple[int, int]]:
    """Start and end of what no tensor covers: those of a GGUF are aligned, and the last is padded."""
    end = len(file.head)
    for tensor in sorted((one for one in plan.tensors.values() if one.file == file.name), key=lambda one: one.offset):
        if tensor.offset > end:
            yield end, tensor.offset
        end = tensor.offset + tensor.nbytes
    if file.size > end:
        yield end, file.size


def _empty(work: Path, but: Iterable[str] = (LOCK, FINDINGS)) -> None:
    for path in work.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name not in but:
            path.unlink()


def _open_part(path: Path, file: FilePlan) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    os.ftruncate(handle, file.size)
    write_all(handle, memoryview(file.head), 0)
    return handle
