"""Calibration texts: each kind of file, chats by transformers, and what is refused."""

from __future__ import annotations

import codecs
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import transformers
from converting import NANO, TREE
from finetunes import chatml, edit

from mixtools.errors import InputError, MixtoolsError, TokenizerError, UsageError
from mixtools.inference.calibrate import Text, cut
from mixtools.inference.corpus import sequences
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.text.reading import DEFAULT_FILE
from mixtools.text.tokenizer import Tokenizer

WORDS = (TREE / "tests" / "data" / "text.txt").read_text("utf-8")
CHAT = [
    {"role": "user", "content": "Where is the sea?"},
    {"role": "assistant", "content": "Behind the window."},
    {"role": "user", "content": "And the pages?"},
    {"role": "assistant", "content": "They were only pictures of leaves."},
]


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return open_checkpoint(NANO)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(NANO)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return open_checkpoint(chatml(tmp_path_factory.mktemp("tuned")))


def write(file: Path, content: str | bytes | Iterable[object]) -> Path:
    """Bytes, a text, or objects as the name wants them."""
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, str):
        file.write_text(content, "utf-8", newline="")
    elif file.suffix == ".json":
        file.write_text(json.dumps(list(content)), "utf-8")
    elif file.suffix == ".parquet":
        table = pyarrow.Table.from_pylist(list(content))
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    else:
        file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in content), "utf-8")
    return file


def ids(text: Text) -> list[list[int]]:
    return [one.tolist() for one in text.sequences]


# --- a plain text ---


def test_a_plain_text_is_cut_as_laser_cuts_it(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "text.md", WORDS)
    expected = cut(tokenizer.encode(WORDS, bos=False), 5, 64, tokenizer.bos_id)
    text = sequences(file, nano, samples=5, seq_len=64)
    assert ids(text) == ids(expected)
    assert text.record == {**expected.record, "asked": 5}
    expected = cut(tokenizer.encode(WORDS, bos=False), 5, 64, tokenizer.bos_id, seed=3)
    assert ids(sequences(file, nano, samples=5, seq_len=64, seed=3)) == ids(expected)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, nano: Checkpoint, encoding: str) -> None:
    words = WORDS + "Grüße, 😀"
    plain = sequences(write(tmp_path / "plain.txt", words), nano, samples=2, seq_len=200, sampling="start")
    marked = write(tmp_path / "marked.txt", f"\ufeff{words}".encode(encoding))
    text = sequences(marked, nano, samples=2, seq_len=200, sampling="start")
    assert text.record == plain.record and ids(text) == ids(plain)


def test_notes(tmp_path: Path, nano: Checkpoint) -> None:
    file = write(tmp_path / "text.txt", WORDS.replace("\n", "\r\n"))
    text = sequences(file, nano, samples=1000, seq_len=256)
    assert text.notes[0] == f"asked 1000 samples, the text has {len(text.sequences)}"
    assert "CRLF" in text.notes[1]
    assert (text.record["asked"], text.record["samples"]) == (1000, len(text.sequences))


# --- documents ---


def texts(count: int) -> list[str]:
    return [f"Document {index}. " + WORDS[37 * index : 37 * index + 40 + 11 * index] for index in range(count)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".JSONL"])
def test_a_document_is_a_sample(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer, suffix: str) -> None:
    documents = texts(9)
    file = write(tmp_path / f"texts{suffix}", [{"id": number, "text": one} for number, one in enumerate(documents)])
    text = sequences(file, nano, samples=9, seq_len=40)
    expected = [tokenizer.encode(one)[:40] for one in documents]
    assert all(one[0] == tokenizer.bos_id for one in expected)
    assert ids(text) == sorted(expected, key=len, reverse=True)
    assert len({len(one) for one in expected}) > 2  # some are cut, some short
    record = {key: text.record[key] for key in ("samples", "seq_len", "tokens", "documents", "asked")}
    assert record == {
        "samples": 9, "seq_len": 40, "tokens": sum(map(len, expected)), "documents": 9, "asked": 9,
    }  # fmt: skip


def test_row_groups_of_different_sizes(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    documents, file = texts(9), tmp_path / "texts.parquet"
    with pyarrow.parquet.ParquetWriter(file, pyarrow.schema([("text", pyarrow.string())])) as writer:
        for part in (documents[:3], documents[3:4], documents[4:]):
            writer.write_table(pyarrow.table({"text": part}))
    expected = sorted((tokenizer.encode(one)[:40] for one in documents), key=len, reverse=True)
    assert ids(sequences(file, nano, samples=9, seq_len=40)) == expected


def test_which_documents_are_taken(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    documents = texts(10)
    file = write(tmp_path / "texts.jsonl", [{"text": one} for one in documents])

    def taken(**how: Any) -> set[int]:
        found = ids(sequences(file, nano, samples=4, seq_len=12, **how))
        by_ids = {tuple(tokenizer.encode(one)[:12]): number for number, one in enumerate(documents)}
        return {by_ids[tuple(one)] for one in found}

    assert taken() == {0, 2, 5, 7}
    assert taken(sampling="start") == {0, 1, 2, 3}
    assert taken(seed=7) == {3, 2, 7, 0}  # the shuffle of test_sampling.py
    records = [sequences(file, nano, samples=4, seq_len=12, **how).record for how in ({}, {"seed": 7}, {"seed": 8})]
    assert len({repr(record) for record in records}) == 3
    assert records[1]["seed"] == 7
    other = write(tmp_path / "other.jsonl", [{"text": one.upper()} for one in documents])
    record = sequences(other, nano, samples=4, seq_len=12).record
    assert record.pop("text") != records[0].pop("text") and record == records[0]


@pytest.mark.parametrize("how", [{}, {"sampling": "start"}, {"seed": 5}])
def test_empty_documents_give_way_to_others(tmp_path: Path, nano: Checkpoint, how: dict[str, Any]) -> None:
    full = {f"{index}": f"number {index} " + WORDS[:60] for index in range(5)}
    documents = [full.get(f"{index / 3:g}", " \n") for index in range(13)]  # each third one
    file = write(tmp_path / "texts.jsonl", [{"text": one} for one in documents])
    text = sequences(file, nano, samples=5, seq_len=20, **how)
    assert len(set(map(tuple, ids(text)))) == 5
    assert any("of the documents are empty" in note for note in text.notes) or how == {"seed": 5}
    text = sequences(file, nano, samples=6, seq_len=20, **how)
    assert text.notes == ("asked 6 samples, the text has 5", "8 of the documents are empty and not taken")


def test_long_documents_fill_up_what_is_asked_for(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    long, short = tokenizer.encode(WORDS, bos=False)[:100], tokenizer.encode("A leaf.", bos=False)
    words = next(WORDS[:end] for end in range(len(WORDS)) if len(tokenizer.encode(WORDS[:end], bos=False)) == 100)
    file = write(tmp_path / "texts.jsonl", [words, "A leaf.", words])
    windows = [[1, *long[start : start + 30]] for start in (0, 30, 60)]
    text = sequences(file, nano, samples=6, seq_len=31)
    assert ids(text) == [windows[0], windows[0], windows[1], windows[1], windows[2], [1, *short]]
    text = sequences(file, nano, samples=99, seq_len=31)  # the last ten tokens are no whole window
    assert sorted(ids(text)) == sorted([*windows, *windows, [1, *short]])
    assert text.notes == ("asked 99 samples, the text has 7",)


def test_short_documents_are_told(tmp_path: Path, nano: Checkpoint) -> None:
    file = write(tmp_path / "texts.jsonl", ["A small library had bought a machine"] * 40)
    text = sequences(file, nano, samples=40, seq_len=256)
    assert f"40 samples have {text.record['tokens']} tokens" in text.notes[0]
    text = sequences(file, nano, samples=2, seq_len=256)  # shorter than a sample, but there are more
    assert "2 samples have" in text.notes[0]


def test_fields_and_shapes_of_a_document(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    """The first field there is, a null being none; a string alone; line separators of Unicode end no line."""
    odd = "one\u2028two\u0085three\u000bfour \u2029 five"
    documents = [{"prompt": "no", "text": odd}, {"text": None, "content": odd}, {"prompt": odd}, odd]
    lines = "\r\n\r\n".join(json.dumps(one, ensure_ascii=False) for one in documents)
    file = write(tmp_path / "texts.jsonl", codecs.BOM_UTF8 + lines.encode())
    expected = tokenizer.encode(odd)
    assert ids(sequences(file, nano, samples=4, seq_len=len(expected))) == [expected] * 4


def test_special_tokens_are_text_unless_they_are_meant(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    rendered = "<s>[INST] Where is the sea? [/INST] Behind the window.</s>"
    lines = write(tmp_path / "texts.jsonl", [{"text": rendered}])
    found = ids(sequences(lines, nano, samples=1, seq_len=10, parse_special=True))[0]
    assert found == tokenizer.encode(rendered, bos=False, parse_special=True)[:10]  # one BOS, not two
    assert found.count(tokenizer.bos_id) == 1
    assert ids(sequences(lines, nano, samples=1, seq_len=10))[0] == tokenizer.encode(rendered)[:10]
    lines = write(tmp_path / "more.jsonl", [{"text": "Where is the sea?"}])
    found_too = ids(sequences(lines, nano, samples=1, seq_len=5, parse_special=True))[0]
    assert found_too == tokenizer.encode("Where is the sea?")[:5]  # one of its own, where the text has none
    plain = write(tmp_path / "text.txt", rendered)
    assert ids(sequences(plain, nano, samples=1, seq_len=10, parse_special=True))[0] == found


# --- chats ---


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_chats_are_as_transformers_has_them(tmp_path: Path, tuned: Checkpoint, suffix: str) -> None:
    """To the end of what was said: no word of an answer to come."""
    theirs = transformers.AutoTokenizer.from_pretrained(tuned.folder)
    sharegpt = [{"from": {"user": "human", "assistant": "gpt"}[one["role"]], "value": one["content"]} for one in CHAT]
    shorter = [{"role": "system", "content": "Be brief."}, *CHAT[:2]]
    file = write(tmp_path / f"chats{suffix}", [{"messages": CHAT}, {"messages": shorter}])
    expected = [theirs.apply_chat_template(one, tokenize=True, return_dict=False) for one in (CHAT, shorter)]
    expected.sort(key=len, reverse=True)
    assert ids(sequences(file, tuned, samples=2, seq_len=60)) == [one[:60] for one in expected]
    file = write(tmp_path / f"sharegpt{suffix}", [{"conversations": sharegpt}])
    expected = theirs.apply_chat_template(CHAT, tokenize=True, return_dict=False)
    assert ids(sequences(file, tuned, samples=1, seq_len=len(expected))) == [expected]


def test_mistrals_own_folders_mean_mistrals_own_format(tmp_path: Path, nano: Checkpoint, tokenizer: Tokenizer) -> None:
    file = write(tmp_path / "chats.jsonl", [CHAT, {"text": "A leaf."}])
    found = ids(sequences(file, nano, samples=2, seq_len=60))
    assert found == [tokenizer.encode_instruct(CHAT)[:60], tokenizer.encode("A leaf.")]


def test_a_chat_without_a_template(tmp_path: Path) -> None:
    model = open_checkpoint(chatml(tmp_path / "model", template=None))
    file = write(tmp_path / "chats.jsonl", [{"text": WORDS[:300]}, {"messages": CHAT}])
    with pytest.raises(TokenizerError, match=r"chats.jsonl: line 2: .*no chat template.*a base model\?"):
        sequences(file, model, samples=2, seq_len=30)
    assert len(sequences(file, model, samples=1, seq_len=30).sequences) == 1


def test_a_chat_that_the_template_refuses(tmp_path: Path, nano: Checkpoint) -> None:
    model = open_checkpoint(chatml(tmp_path / "model"))
    edit(model.folder / "tokenizer_config.json", chat_template="{{ raise_exception('no system here') }}")
    file = write(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    with pytest.raises(TokenizerError, match="line 1: .*refuses .*: no system here"):
        sequences(file, model, samples=1, seq_len=30)
    backwards = write(tmp_path / "backwards.json", [{"messages": CHAT[::-1]}])
    with pytest.raises(TokenizerError, match="item 1: roles must alternate"):
        sequences(backwards, nano, samples=1, seq_len=30)


# --- what is refused ---

LATIN = "Grüße aus Köln, und mehr".encode("latin-1")
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "holds no text"),
    "white": ("a.txt", b" \n\t\n", "holds no text"),
    "mark alone": ("a.txt", codecs.BOM_UTF16_LE, "holds no text"),
    "latin-1": ("a.txt", LATIN, "not UTF-8 text: byte 2 is 0xfc"),
    "UTF-16 without a mark": ("a.txt", "Grün".encode("utf-16-le"), "not UTF-8 text: byte 4 is 0xfc"),
    "ASCII in UTF-16 without a mark": ("a.txt", "more".encode("utf-16-le"), "byte 1 is NUL: UTF-16 without"),
    "NUL": ("a.txt", "Grüße\0".encode(), "byte 7 is NUL"),
    "NUL in UTF-16": ("a.txt", "\ufeffab\0".encode("utf-16-be"), "byte 6 is NUL"),
    "half a character": ("a.txt", codecs.BOM_UTF16_LE + b"a\0b", "not UTF-16-LE text: byte 4 is 0x62"),
    "half a pair": ("a.txt", codecs.BOM_UTF16_BE + b"\0a\xd8\0\0a", "not UTF-16-BE text: byte 4 is 0xd8"),
    "too short": ("a.txt", b"A leaf.", r"a.txt: the text has \d+ tokens, fewer than one sample of 30; --seq-len"),
    "no line": ("a.jsonl", b"\n \n", "holds no text"),
    "lines without words": ("a.jsonl", b'{"text": " "}\n[]\n', "holds no text"),
    "no JSON": ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3 is not JSON"),
    "a number that is none": ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
    "latin-1 line": ("a.jsonl", b'{"text": "a"}\n{"text": "\xfc"}\n', "line 2 is not UTF-8 text: byte 24 of the file"),
    "UTF-16 lines": ("a.jsonl", '\ufeff{"text": "a"}'.encode("utf-16-le"), "is UTF-16, and JSON is UTF-8: .*iconv"),
    "no field": ("a.jsonl", b'{"id": 1, "body": "a"}', "line 1 has none of messages, .*; it has 'id', 'body'"),
    "a text that is none": ("a.jsonl", b'{"text": ["a"]}', r"line 1: text is \['a'\], not a text"),
    "messages that are none": ("a.jsonl", b'{"messages": "a"}', "line 1: messages is 'a', not a list of messages"),
    "a message that is none": ("a.jsonl", b'{"messages": ["a"]}', "line 1: messages is .*, not a list of messages"),
    "a number": ("a.jsonl", b"5", "line 1: it is 5, not a text, a list"),
    "a surrogate": ("a.jsonl", b'"a\\ud800"', "a.jsonl: line 1: the text is not valid Unicode"),
    "documents too short": (
        "a.jsonl",
        b'"A leaf."\n"A leaf."',
        r"have \d+ tokens together, fewer than one sample of 30",
    ),
    "an object": ("a.json", b'{"data": []}', "is not a list of documents"),
    "lines named json": ("a.json", b'{"text": "a"}\n{"text": "b"}', "the file is not JSON .*name it .jsonl"),
    "no parquet": ("a.parquet", b"PAR1 and no more", "cannot be read as parquet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_files(tmp_path: Path, nano: Checkpoint, case: str) -> None:
    name, data, said = REFUSED[case]
    with pytest.raises(InputError, match=said) as caught:
        sequences(write(tmp_path / name, data), nano, samples=8, seq_len=30)
    assert caught.value.file == str(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.parquet"])
def test_files_that_are_not_there(tmp_path: Path, nano: Checkpoint, name: str) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        sequences(tmp_path / name, nano)
    (tmp_path / name).mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        sequences(tmp_path / name, nano)


def test_parquet_of_other_columns(tmp_path: Path, nano: Checkpoint) -> None:
    file = write(tmp_path / "a.parquet", [{"body": "a", "id": 1}])
    with pytest.raises(InputError, match="has, of columns, none of messages, .*; it has 'body', 'id'"):
        sequences(file, nano)
    file = write(tmp_path / "b.parquet", [{"text": 5}])
    with pytest.raises(InputError, match="row 1: text is 5, not a text"):
        sequences(file, nano)


def test_parquet_without_its_package(tmp_path: Path, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.parquet", [{"text": WORDS}])
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # so an import fails
    with pytest.raises(UsageError, match=r"pip install pyarrow, or mixtools\[parquet\]"):
        sequences(file, nano)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_samples_that_cannot_be(tmp_path: Path, nano: Checkpoint, name: str) -> None:
    file = write(tmp_path / name, json.dumps(WORDS))
    for options in ({"samples": 0}, {"seq_len": 1}, {"sampling": "even"}, {"sampling": "start", "seed": 1}):
        with pytest.raises(UsageError):
            sequences(file, nano, **options)


def test_ids_that_the_model_lacks(tmp_path: Path, tuned: Checkpoint) -> None:
    """Added tokens in a text, in a document and in a chat, where the model has no rows for them."""
    smaller = open_checkpoint(NANO)
    smaller = type("Smaller", (), {"beside": tuned.beside, "config": smaller.config})()
    chat = write(tmp_path / "chat.jsonl", [{"messages": CHAT}])
    text = write(tmp_path / "text.txt", "<|im_start|>" + WORDS)
    for file, special in ((chat, False), (text, True)):
        with pytest.raises(MixtoolsError, match="the model has 2048 rows"):
            sequences(file, smaller, samples=1, seq_len=30, parse_special=special)


# --- the text that comes with the package ---


def test_the_default_is_mixed_from_the_start() -> None:
    """Any fifth of it holds Mixtral's five languages, code, numbers and talk, any half other scripts; nothing twice."""
    text = DEFAULT_FILE.read_text("utf-8")
    assert 100_000 < len(text.encode()) < 300_000
    languages = [" of the ", " (les|des) ", " (und|oder) ", " (che|nel) ", " (los|por) "]
    kinds = [*languages, "\n    return ", "\n(User|Question|Frage|Pregunta|Usuario|Assistant) ?: ", r"\d = \d"]
    scripts = ["[\u0430-\u044f]{4}", "[\u4e00-\u9fff]{4}", "[\u0620-\u064a]{4}", "[\u0905-\u0939]{2}"]
    for parts, wanted in ((5, kinds), (2, scripts)):
        size = len(text) // parts
        for start in range(0, parts * size, size):
            assert [kind for kind in wanted if not re.search(kind, text[start : start + size])] == []
    pieces = [piece for piece in text.split("\n\n") if len(piece) > 120]
    assert len(set(pieces)) == len(pieces)
    assert "\r" not in text and "\0" not in text and "\ufeff" not in text


def test_the_word_default(tmp_path: Path, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "default", WORDS)
    text = sequences("default", nano, samples=64, seq_len=256)
    assert len(text.sequences) == 64 and text.notes == ()
    assert text.record == sequences(DEFAULT_FILE, nano, samples=64, seq_len=256).record
    assert sequences("./default", nano, samples=4, seq_len=256).record["text"] != text.record["text"]
