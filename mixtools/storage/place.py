"""Where an output goes: a folder that is its own, or files that stand beside others' in one, such as several GGUFs.

a folder of its own   work in OUT/.mixtools, the manifest tells of the folder
files beside others   work in OUT/.mixtools-NAME, the manifest has an entry for each such output
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, OutputExists
from ..progress import Progress
from . import disk, journal, manifest, replacing
from .disk import DiskErrors
from .replacing import WORK, Stamp

JOURNAL = "journal.jsonl"
FINDINGS = "findings.jsonl"  # of a run that had to look before it could plan: findings.py
LOCK = "lock"
LISTING = f"{WORK}.lock"  # in the folder itself, while an output is listed in its manifest


@dataclass(frozen=True)
class Place:
    """`files`: the output's own, where the folder is not."""

    folder: Path
    files: tuple[str, ...] = ()

    @property
    def work(self) -> Path:
        return self.folder / (f"{WORK}-{self.files[0]}" if self.files else WORK)

    def claim(self, overwrite: bool) -> int:
        """The lock: an open file. Raises OutputExists, OutputLocked or DiskError, and leaves no trace then."""
        with DiskErrors(self.folder):
            self.expect_free(overwrite)
            self.work.mkdir(parents=True, exist_ok=True)
        lock = disk.lock(self.work / LOCK, self.folder / self.files[0] if self.files else self.folder)
        try:
            with DiskErrors(self.folder):
                self.expect_free(overwrite)  # again: until the lock it may have been another's
        except BaseException:
            os.close(lock)
            self.forget()
            raise
        return lock

    def expect_free(self, overwrite: bool) -> None:
        """Raises OutputExists where an output cannot be made, as far as a glance tells: nothing large is read."""
        if not self.folder.exists():
            return
        if not self.folder.is_dir():
            raise OutputExists("is a file; the output is a folder", file=self.folder)
        if self.work.is_symlink():
            raise OutputExists("is a link; what it points to is not ours to empty", file=self.work)
        if self.is_committing():
            return
        if self.files:
            self._expect_files_free(overwrite)
        elif not self.is_empty():
            if not overwrite:
                name = min(path.name for path in self.folder.iterdir() if path.name != WORK)
                raise OutputExists(
                    f"is not empty ({name}, ...); --overwrite replaces an earlier output of mixtools there",
                    file=self.folder,
                )
            replacing.expect_output(self.folder)

    def _expect_files_free(self, overwrite: bool) -> None:
        listed: Collection[str] = ()
        try:
            if (document := manifest.load(self.folder)) is not None:
                if manifest.OUTPUTS not in document:
                    raise OutputExists("is an output of mixtools by itself; name another folder", file=self.folder)
                listed = document["files"]
        except FormatError as error:
            raise OutputExists(f"{error.message}; the new output is to be listed there", file=error.file) from None
        for name in self.files:
            if not os.path.lexists(self.folder / name):
                continue
            if not overwrite:
                raise OutputExists("is there already; --overwrite replaces it", file=self.folder / name)
            if name not in listed:
                why = "was not written by mixtools; move it away, --overwrite leaves it alone"
                raise OutputExists(why, file=self.folder / name)

    def replaceable(self, names: Iterable[str], progress: Progress) -> dict[str, Stamp]:
        """What an output may replace there: see replacing.replaceable."""
        if not self.files:
            return {} if self.is_empty() else replacing.replaceable(self.folder, names, progress)
        there = [name for name in self.files if os.path.lexists(self.folder / name)]
        return replacing.unchanged(self.folder, there, progress) if there else {}

    def expect_nothing_lost(self, old: Mapping[str, Stamp], names: Iterable[str]) -> None:
        """Once more, before anything is replaced."""
        if self.files:
            came = next((name for name in self.files if name not in old and os.path.lexists(self.folder / name)), None)
            if came is not None:
                why = "came there while the new one was made; move it away and run this again"
                raise OutputExists(why, file=self.folder / came)
        else:
            replacing.expect_nothing_lost(self.folder, old, names)
        replacing.expect_unchanged(self.folder, old)

    def is_empty(self) -> bool:
        """The folder, but for unfinished work."""
        return all(path.name == WORK for path in self.folder.iterdir())

    def is_committing(self) -> bool:
        return bool(journal.commit_line(journal.read(self.work / JOURNAL)))

    @contextlib.contextmanager
    def listing(self) -> Iterator[None]:
        """While this is held, nobody else lists an output in the folder's manifest."""
        if not self.files:
            yield
            return
        path = self.folder / LISTING
        while True:  # a file, since a folder cannot be locked on every kind of disk
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
                break
            os.close(handle)  # whoever held it took it away
        try:
            yield
        finally:
            path.unlink(
                missing_ok=True
            )  # before the work is cleared away: a run killed until then goes on, and does it
            os.close(handle)

    def forget(self) -> None:
        """Leave no trace of a run that never began."""
        if not (self.work / JOURNAL).exists() and not (self.work / FINDINGS).exists():
            shutil.rmtree(self.work, ignore_errors=True)
            if self.folder.is_dir() and not any(self.folder.iterdir()):
                self.folder.rmdir()
