"""States: the hidden states of all the text between two layers, in memory or in a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from ..errors import DiskError
from ..machine import human_bytes

_ROOM = 64 << 20  # of the disk, left free beside the file
_IO_BYTES = 1 << 30  # Linux moves at most 2 GiB a call


class States:
    """Hidden states before layer `layer` (after the last: before the final norm), a sequence's as [T, D].

    In memory, or in a file that has no name: it is gone when closed, or when the process ends in whatever way.
    """

    def __init__(
        self, lengths: Sequence[int], width: int, dtype: torch.dtype, layer: int = 0, spill: Path | None = None, *,
        device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        """`spill`: the folder for the file; None keeps all in memory, that of `device`. Raises DiskError if the folder
        has no room."""
        self.lengths, self.width, self.dtype, self.layer = tuple(lengths), width, dtype, layer
        self.starts = [0]  # of each sequence in the rows of all, and the end
        for length in lengths:
            self.starts.append(self.starts[-1] + length)
        self._row_bytes = width * dtype.itemsize
        self._memory = torch.empty((0 if spill else self.starts[-1]), width, dtype=dtype, device=device)
        self._file = _unnamed_file(spill, self.starts[-1] * self._row_bytes) if spill else None
        self._reading: Future[None] | None = None

    @property
    def tokens(self) -> int:
        return self.starts[-1]

    @property
    def spilled(self) -> bool:
        return self._file is not None

    @property
    def memory_bytes(self) -> int:
        """What of the memory of a run these states take."""
        return self._memory.nbytes

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, sequence: int) -> Tensor:
        """[T, D] of one sequence. Raises IndexError past the last."""
        length = self.lengths[sequence]
        start = self.starts[sequence % len(self.lengths)]
        return self.rows(start, start + length)

    def rows(self, start: int, stop: int) -> Tensor:
        """[stop - start, D] of all sequences' tokens, joined. A copy where spilled; not to be changed."""
        if self._file is None:
            return self._memory[start:stop]
        x = torch.empty(stop - start, self.width, dtype=self.dtype)
        self._transfer(os.preadv, start, x)
        return x

    def select(self, rows: Tensor) -> Tensor:
        """[n, D] of the tokens `rows` [n], ascending; only these are read."""
        if self._file is None:
            return self._memory[rows]
        breaks = (rows.diff() != 1).nonzero().flatten() + 1
        runs = torch.tensor_split(rows, breaks)
        return torch.cat([self.rows(int(run[0]), int(run[-1]) + 1) for run in runs])

    def lend(self, reading: Future[None]) -> None:
        """Another thread reads them until this is done: until then they are neither written nor given back."""
        self._reading = reading

    def write(self, start: int, x: Tensor) -> None:
        """Replace the rows from `start` by x [n, D]. Raises what they were lent to raised."""
        if self._reading is not None:
            self._reading.result()
            self._reading = None
        if self._file is None:
            self._memory[start : start + len(x)].copy_(x)
            return
        self._transfer(os.pwritev, start, x.to("cpu").contiguous())

    def _transfer(self, call: Callable[[int, list[memoryview], int], int], start: int, x: Tensor) -> None:
        """Move all bytes of x between memory and the file; one call may move fewer than it was asked to."""
        assert self._file is not None
        view = memoryview(x.view(torch.uint8).numpy().reshape(-1).data)
        done = 0
        while done < len(view):
            try:
                done += call(self._file, [view[done : done + _IO_BYTES]], start * self._row_bytes + done)
            except OSError as error:
                raise DiskError(f"the temporary file of the hidden states failed ({error.strerror})") from None

    def close(self) -> None:
        """Give memory or disk back. Closing twice does nothing."""
        if self._reading is not None:
            wait([self._reading])
        self._memory = self._memory[:0].clone()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> States:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()


def _unnamed_file(folder: Path, length: int) -> int:
    free = shutil.disk_usage(folder).free
    if free < length + _ROOM:
        raise DiskError(
            "has no room for the hidden states; set TMPDIR to a larger disk, or allow more memory or less text",
            file=folder, expected=f"{human_bytes(length)} free", found=human_bytes(free),
        )  # fmt: skip
    file, name = tempfile.mkstemp(prefix="mixtools-states-", dir=folder)
    Path(name).unlink()  # nothing to clean up, however the process ends
    try:
        if length and hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, length)  # a full disk is found now, not hours later
        else:
            os.truncate(file, length)
    except OSError as error:
        os.close(file)
        raise DiskError(f"cannot hold the hidden states ({error.strerror})", file=folder) from None
    return file
