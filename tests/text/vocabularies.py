"""Folders with a tokenizer and nothing else, and what becomes of them by way of a GGUF's metadata."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import finetunes
import sentencepiece
from converting import NANO

from mixtools.errors import TokenizerError
from mixtools.storage.gguf_values import Value
from mixtools.text import to_gguf
from mixtools.text.from_gguf import documents
from mixtools.text.tokenizer import Tokenizer, hf_files

FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
CONTROL = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
DEFINED = ("[REFERENCE_DOC_1]", "[REFERENCE_DOC_0]")
PROMPTS = [str(text) for text in json.loads((NANO.parent / "prompts.json").read_text("utf-8")).values()]

TEXTS = [
    "", " ", "a", "   a  b", "Hello  world\n\n\tx", "</s>a<s> b", "x[REFERENCE_DOC_1]y", "[REFERENCE_DOC_0]",
    "<|im_start|>user\nhi<|im_end|>\n", "a <|im_end|> b", "<|im_start|><|im_end|><|im_end", "[INST] a [/INST]",
    "naïve €5 漢字 👩‍👩‍👧 e\u0301", "\0\x01\x7f", "▁", "<0x0A>", "\ufeff", "x" + " " * 70 + "y", *PROMPTS,
]  # fmt: skip
CONVERSATIONS: list[list[dict[str, object]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": " q\n"},
        {"role": "assistant", "content": "An answer."}, {"role": "user", "content": "again"},
    ],
    [{"role": "user", "content": "What is </s>, <s>, <unk>, [INST], <|im_end|>?"}],
]  # fmt: skip


def write(folder: Path, files: Mapping[str, bytes]) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def torrent(folder: Path, model: Path = NANO / "tokenizer.model") -> Path:
    return write(folder, {"tokenizer.model": model.read_bytes()})


def converted(folder: Path, model: Path = NANO / "tokenizer.model") -> Path:
    """What `convert to-hf` makes of it."""
    return write(folder, hf_files(model))


def json_alone(folder: Path, model: Path = NANO / "tokenizer.model") -> Path:
    converted(folder, model)
    (folder / "tokenizer.model").unlink()
    return folder


def v3_style(folder: Path) -> Path:
    """A torrent's, with the control tokens of tokenizer v3 and pieces that are user-defined; 600 in all."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in PROMPTS for line in text.splitlines()), model_writer=out,
        model_type="bpe", vocab_size=600, byte_fallback=True, normalization_rule_name="identity",
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, character_coverage=1.0,
        hard_vocab_limit=False, control_symbols=list(CONTROL), user_defined_symbols=list(DEFINED), minloglevel=3,
    )  # fmt: skip
    return write(folder, {"tokenizer.model": out.getvalue()})


def chatml(folder: Path, **how: Any) -> Path:
    finetunes.chatml(folder, **how)
    (folder / "model.safetensors").unlink()
    return folder


def changed(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A folder whose tokenizer.json alone holds, changed."""
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    change(document)
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    return folder


def metaspace(scheme: str) -> Callable[[dict[str, Any]], None]:
    """As LlamaTokenizerFast of transformers 4 with legacy=False ("first"), or one without any dummy blank ("never")."""

    def change(document: dict[str, Any]) -> None:
        document["normalizer"] = None
        document["pre_tokenizer"] = {
            "type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False,
        }  # fmt: skip
        if scheme == "never":
            document["decoder"]["decoders"] = [one for one in document["decoder"]["decoders"] if one["type"] != "Strip"]

    return change


def model_alone(folder: Path, source: Path, added: Mapping[int, tuple[str, bool]], **config: object) -> Path:
    """tokenizer.model with tokens in tokenizer_config.json. `added`: text, and whether it is special, by id."""
    folder.mkdir(parents=True)
    shutil.copyfile(source / "tokenizer.model", folder / "tokenizer.model")
    decoder = {str(index): {"content": text, **FLAGS, "special": special} for index, (text, special) in added.items()}
    told = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "added_tokens_decoder": decoder, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    return folder


def rebuilt(folder: Path, rows: int, out: Path) -> Path:
    return from_metadata(vocabulary(folder, rows), out)


def from_metadata(metadata: Mapping[str, Value], out: Path) -> Path:
    return write(out, documents(metadata, Path("model.gguf")))


def conversed(tokenizer: Tokenizer, messages: list[dict[str, object]]) -> list[int] | str:
    try:
        return tokenizer.encode_chat(messages)
    except TokenizerError as error:
        return error.message


def expect_same(source: Path, made: Path) -> None:
    ours, theirs = Tokenizer.from_folder(source), Tokenizer.from_folder(made)
    assert theirs.remarks == () and theirs.meanings == list(ours.meanings)
    assert theirs.special == ours.special and theirs.vocab_size == ours.vocab_size
    assert (theirs.bos_id, theirs.eos_id, theirs.end_ids) == (ours.bos_id, ours.eos_id, ours.end_ids)
    for text in TEXTS:
        for parse_special in (False, True):
            ids = ours.encode(text, parse_special=parse_special)
            assert theirs.encode(text, parse_special=parse_special) == ids and theirs.decode(ids) == ours.decode(ids)
    for messages in CONVERSATIONS:
        assert conversed(theirs, messages) == conversed(ours, messages)


def vocabulary(folder: Path, vocab_size: int) -> dict[str, Value]:
    return to_gguf.vocabulary(folder, vocab_size).metadata


def remarks(folder: Path, vocab_size: int) -> tuple[str, ...]:
    return to_gguf.vocabulary(folder, vocab_size).remarks
