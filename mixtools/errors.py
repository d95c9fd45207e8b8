"""Everything that mixtools raises on purpose, and the exit code a script sees.

    MixtoolsError                 1  our fault
    ├── UsageError                2  options that contradict each other
    │   └── RecipeError           2  a recipe that cannot run
    ├── InputError                3  the input is not what it should be
    │   ├── LayoutError           3  no known layout, two at once, tensors missing or unknown
    │   │   └── QuantizedError    3  a quantized checkpoint where the weights themselves are needed
    │   ├── ConfigError           3  params.json or config.json
    │   ├── FormatError           3  a file's structure: zip, pickle, header, offsets
    │   ├── TensorError           3  one tensor: its shape, dtype, or NaN/Inf in it
    │   │   └── SpectrumError     3  a matrix that has no spectrum to speak of
    │   ├── ChecksumError         3  bytes that differ from their stored checksum
    │   └── TokenizerError        3  tokenizer.model or tokenizer.json
    ├── CheckFailed               4  a gate of `mixtools check`
    ├── ResourceError             5  disk or memory
    │   ├── DiskError             5
    │   └── MemoryBudgetError     5
    ├── UnsafeError               6  a file that wants to run code or to leave its folder
    ├── HubError                  7  Hub or network
    ├── OutputError               8  the output cannot be written where it was asked for
    │   ├── OutputExists          8
    │   └── OutputLocked          8
    └── Interrupted             130  stopped by the user; the same command continues

Each carries, where it applies, the file, the tensor, and what was expected and found there.
"""

from __future__ import annotations

from pathlib import Path

_LONGEST_NAME, _LONGEST_LINE = 200, 2000  # names and values come from files, which may be hostile


class MixtoolsError(Exception):
    """Root of the tree; `str()` is one line that a user can act on."""

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        file: str | Path | None = None,
        tensor: object | None = None,
        expected: object | None = None,
        found: object | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.file = None if file is None else str(file)
        self.tensor = None if tensor is None else str(tensor)
        self.expected = expected
        self.found = found

    def __str__(self) -> str:
        tensor = self.tensor and f"tensor {_one_line(self.tensor, _LONGEST_NAME)}"
        place = ": ".join(filter(None, (self.file, tensor)))
        text = f"{place}: {self.message}" if place else self.message
        if self.expected is not None and self.found is not None:
            text += f": expected {self.expected}, found {self.found}"
        return _one_line(text, _LONGEST_LINE)

    def document(self) -> dict[str, dict[str, str | None]]:
        """What a script sees with --json (CLI.md)."""
        fields = {"type": type(self).__name__, "message": str(self)}
        return {"error": {**fields, "file": self.file, "tensor": self.tensor}}


def _one_line(text: str, limit: int) -> str:
    """Cut to `limit` characters, with line breaks and what would steer a terminal escaped."""
    if len(text) > limit:
        text = text[: limit - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class UsageError(MixtoolsError):
    exit_code = 2


class RecipeError(UsageError):
    pass


class InputError(MixtoolsError):
    exit_code = 3


class LayoutError(InputError):
    pass


class QuantizedError(LayoutError):
    pass


class ConfigError(InputError):
    pass


class FormatError(InputError):
    pass


class TensorError(InputError):
    pass


class SpectrumError(TensorError):
    pass


class ChecksumError(InputError):
    pass


class TokenizerError(InputError):
    pass


class CheckFailed(MixtoolsError):
    exit_code = 4


class ResourceError(MixtoolsError):
    exit_code = 5


class DiskError(ResourceError):
    pass


class MemoryBudgetError(ResourceError):
    pass


class UnsafeError(MixtoolsError):
    exit_code = 6


class HubError(MixtoolsError):
    exit_code = 7


class OutputError(MixtoolsError):
    exit_code = 8


class OutputExists(OutputError):
    pass


class OutputLocked(OutputError):
    pass


class Interrupted(MixtoolsError):
    exit_code = 130
