"""Texts from files: bytes to text, and the documents of a jsonl, json or parquet file, each read when it is asked for.

    .jsonl     a document a line, UTF-8; empty lines are none
    .json      a list of documents
    .parquet   a document a row; through pyarrow, an extra
    any other  one text: the file as it stands

A document is an object or a row, and its first field of these counts: `messages` or `conversations`, a chat; `text`,
`content` or `prompt`, a text. A string alone is a text, a list alone a chat. Messages have "role" and "content", or
"from" and "value" with the roles human and gpt, as ShareGPT's files have them.
"""

from __future__ import annotations

import bisect
import importlib
import itertools
import json
import reprlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, UsageError

Message = Mapping[str, object]

DEFAULT = "default"  # the word that means the next
DEFAULT_FILE = Path(__file__).with_name("data") / "calibration.txt"  # data/README.md tells what is in it
CHATS = ("messages", "conversations")
TEXTS = ("text", "content", "prompt")
FIELDS = (*CHATS, *TEXTS)
_MARKS = {  # the longer first: UTF-32's begins as UTF-16's
    b"\xff\xfe\0\0": "UTF-32-LE",
    b"\0\0\xfe\xff": "UTF-32-BE",
    b"\xef\xbb\xbf": "UTF-8",
    b"\xff\xfe": "UTF-16-LE",
    b"\xfe\xff": "UTF-16-BE",
}
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words
_MOST_NAMES = 8


def read_text(path: Path, marked: bool = False) -> str:
    """The text of a file, exactly.

    `marked`: a byte order mark tells the encoding, and is no part of the text. Raises InputError if the file cannot be
    read, is empty, is not UTF-8 (or what its mark says), and with `marked` for a NUL, which no text holds.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot be read ({error.strerror})", file=path) from None
    mark = next((mark for mark in _MARKS if marked and data.startswith(mark)), b"")
    encoding = _MARKS.get(mark, "UTF-8")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        place = len(mark) + error.start
        raise InputError(f"is not {encoding} text: byte {place} is 0x{data[place]:02x}", file=path) from None
    if not text.strip():
        raise InputError("holds no text", file=path)
    if marked and "\0" in text:
        before = len(text[: text.index("\0")].encode(encoding))
        raise InputError(
            f"byte {len(mark) + before} is NUL: UTF-16 without a byte order mark, or no text at all", file=path
        )
    return text


def line_ends(text: str) -> str | None:
    """A remark about a text from Windows: the same words have another perplexity, and the text does not show why."""
    if "\r\n" not in text:
        return None
    return (
        "the text has Windows line ends (CRLF): other tokens, and other figures than the same text without; convert it "
        "with tr -d '\\r' < FILE > NEW"
    )


class Documents(Protocol):
    """The documents of a file, by number."""

    def __len__(self) -> int: ...

    def where(self, index: int) -> str:
        """What a user calls a document."""

    def value(self, index: int) -> object:
        """As it stands in the file. Raises InputError if it cannot be read."""


def documents(path: Path) -> Documents | None:
    """None for a file that is one text. Raises InputError, and UsageError for parquet without the extra."""
    kinds: dict[str, Callable[[Path], Documents]] = {".jsonl": _Lines, ".json": _List, ".parquet": _Rows}
    kind = kinds.get(path.suffix.lower())
    return None if kind is None else kind(path)


def document(path: Path, found: Documents, index: int) -> str | list[Message]:
    """A text, or a chat's messages. Raises InputError, with the place, for a value that is neither."""
    value, name, where = found.value(index), "", found.where(index)
    if isinstance(value, dict):
        name = next((name for name in FIELDS if value.get(name) is not None), "")
        if not name:
            raise InputError(f"{where} has {_lacks(value)}", file=path)
        value = value[name]
    if isinstance(value, str) and name not in CHATS:
        return value
    if isinstance(value, list) and name not in TEXTS and all(isinstance(one, dict) for one in value):
        return [_message(one) for one in value]
    wanted = "a list of messages" if name in CHATS else "a text" if name else "a text, a list of messages or an object"
    raise InputError(f"{where}: {name or 'it'} is {reprlib.repr(value)}, not {wanted}", file=path)


def _lacks(names: Iterable[str]) -> str:
    shown = ", ".join(map(reprlib.repr, itertools.islice(names, _MOST_NAMES)))
    return f"none of {', '.join(FIELDS)}" + (f"; it has {shown}" if shown else "")


def _message(message: Mapping[str, object]) -> Message:
    if "from" not in message or "role" in message:
        return message
    role = message["from"]
    return {"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": message.get("value")}


class _Lines:
    """The lines of a jsonl file, which stays on disk."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts: list[tuple[int, int]] = []  # number of the line, byte where it starts
        try:
            with path.open("rb") as file:
                start = _utf8_start(path, file.read(4))
                file.seek(start)
                for number, line in enumerate(file, 1):  # of bytes: U+2028 and others, which end no line here, stay
                    if line.strip():
                        self._starts.append((number, start))
                    start += len(line)
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", file=path) from None

    def __len__(self) -> int:
        return len(self._starts)

    def where(self, index: int) -> str:
        return f"line {self._starts[index][0]}"

    def value(self, index: int) -> object:
        start = self._starts[index][1]
        with self._path.open("rb") as file:
            file.seek(start)
            return _json(file.readline(), self._path, self.where(index), start)


class _List:
    """The items of a json file, all in memory."""

    def __init__(self, path: Path) -> None:
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(f"cannot be read ({error.strerror})", file=path) from None
        start = _utf8_start(path, data[:4])
        found = _json(data[start:], path, "the file", start, "; if it is a document a line, name it .jsonl")
        if not isinstance(found, list):
            raise InputError("is not a list of documents; if it is one document a line, name it .jsonl", file=path)
        self._items = found

    def __len__(self) -> int:
        return len(self._items)

    def where(self, index: int) -> str:
        return f"item {index + 1}"

    def value(self, index: int) -> object:
        return self._items[index]


class _Rows:
    """The rows of a parquet file; one row group of the columns that count is in memory at a time."""

    def __init__(self, path: Path) -> None:
        try:
            self._arrow: Any = importlib.import_module("pyarrow")
            self._parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            raise UsageError(
                "parquet is read by the package pyarrow: pip install pyarrow, or mixtools[parquet]", file=path
            ) from None
        self._path = path
        with self._open() as file:
            meta = file.metadata
            sizes = [meta.row_group(index).num_rows for index in range(meta.num_row_groups)]
            names = file.schema_arrow.names
        self._columns = [name for name in FIELDS if name in names]
        if not self._columns:
            raise InputError(f"has, of columns, {_lacks(names)}", file=path)
        self._ends = list(itertools.accumulate(sizes))
        self._group: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, index: int) -> str:
        return f"row {index + 1}"

    def value(self, index: int) -> object:
        group = bisect.bisect_right(self._ends, index)
        if self._group[0] != group:
            self._group = (-1, None)  # its memory is free for the next
            with self._open() as file:
                self._group = (group, self._try(file.read_row_group, group, columns=self._columns))
        table = self._group[1]
        row = self._try(table.slice(index - (self._ends[group] - table.num_rows), 1).to_pylist)[0]
        found: object = row
        return found

    def _open(self) -> Any:
        return self._try(self._parquet.ParquetFile, self._path)

    def _try(self, call: Any, *arguments: object, **options: object) -> Any:
        try:
            return call(*arguments, **options)
        except (OSError, ValueError, self._arrow.ArrowException) as error:
            said = str(error).partition("\n")[0]
            raise InputError(f"cannot be read as parquet ({said})", file=self._path) from None


def _utf8_start(path: Path, head: bytes) -> int:
    """Where JSON begins: behind a byte order mark, UTF-8's. Raises InputError for another's."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            if encoding == "UTF-8":
                return len(mark)
            name = encoding[:6]
            raise InputError(
                f"is {name}, and JSON is UTF-8: convert it with iconv -f {name} -t UTF-8 FILE > NEW", file=path
            )
    return 0


def _json(data: bytes, path: Path, where: str, start: int, advice: str = "") -> object:
    """`start`: where `data` begins in the file. Raises InputError."""
    try:
        found: object = json.loads(data.decode("utf-8"))
        return found
    except UnicodeDecodeError as error:
        place = start + error.start
        said = f"{where} is not UTF-8 text: byte {place} of the file is 0x{data[error.start]:02x}"
    except (ValueError, RecursionError) as error:
        said = f"{where} is not JSON ({error}){advice}"
    raise InputError(said, file=path)
