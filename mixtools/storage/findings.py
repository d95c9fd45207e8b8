"""What a run found out before its output could be planned, kept in the output's work folder through kills.

An output is planned before its first byte. Where hours go by until then (ranks that depend on every matrix), each
finding is a line of a journal of its own, which the run that continues reads, and which goes when the output is whole.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import journal
from .disk import DiskErrors
from .place import FINDINGS, Place


class Findings:
    """Use as a context manager, before the Output of the same folder: both lock it."""

    def __init__(self, folder: Path, key: Mapping[str, Any], *, overwrite: bool = False, resume: bool = True) -> None:
        """Those of a run with the same `key` are there already; others are dropped, as all are without `resume`.

        Raises OutputExists, OutputLocked or DiskError.
        """
        self._place = Place(folder)
        self.folder, self._work = folder, self._place.work
        self.found: dict[str, Any] = {}
        self._file, self._lock = -1, self._place.claim(overwrite)
        try:
            with DiskErrors(folder):
                lines = journal.read(self._work / FINDINGS) if resume else []
                if not lines or lines[0] != {"key": dict(key)}:
                    lines = [{"key": dict(key)}]
                self.found = {line["name"]: line["found"] for line in lines[1:]}
                data = b"".join(map(journal.encode, lines))
                self._file = os.open(self._work / FINDINGS, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                if os.pread(self._file, len(data) + 1, 0) != data:  # another's, or with a last line that a kill cut off
                    os.ftruncate(self._file, 0)
                    self._append(data)
                os.lseek(self._file, 0, os.SEEK_END)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Findings:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for handle in (self._file, self._lock):
            if handle >= 0:
                os.close(handle)
        self._file = self._lock = -1
        if not self.found:
            (self._work / FINDINGS).unlink(missing_ok=True)
            self._place.forget()

    def keep(self, name: str, found: Any) -> None:
        """`found` is ready for JSON. Raises DiskError."""
        with DiskErrors(self.folder):
            self._append(journal.encode({"name": name, "found": found}))
        self.found[name] = found

    def _append(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._file, data) :]
