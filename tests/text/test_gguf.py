"""A folder's tokenizer in a GGUF's metadata and out of it again: the same ids by whatever reads it.

Oracles: SentencePiece and transformers over the files that come out, mistral-common for conversations, for what goes in
llama.cpp's own converter, whose arrays' digests stand here. llama.cpp itself: tests/peers/test_llama_tokenizer.py.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import finetunes
import pytest
import sentencepiece
from converting import NANO
from mistral_common.protocol.instruct.messages import AssistantMessage, SystemMessage, UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from text import vocabularies as make
from text.vocabularies import remarks, vocabulary
from transformers import AutoTokenizer

from mixtools.errors import TokenizerError
from mixtools.storage.gguf import encode_header, read_header
from mixtools.storage.gguf_values import Kind, Value
from mixtools.storage.source import Source
from mixtools.text.chat import MARKER
from mixtools.text.pieces import Kind as PieceKind
from mixtools.text.pieces import Piece, _fields, read_pieces
from mixtools.text.rendering import render
from mixtools.text.tokenizer import Tokenizer

MISTRAL = Path(str(resources.files("mistral_common") / "data"))
V1, V3 = MISTRAL / "tokenizer.model.v1", MISTRAL / "mistral_instruct_tokenizer_240323.model.v3"
ROWS = {"v1": 32000, "v3": 32768, "v3 style": 600}
FOLDERS: dict[str, Callable[[Path], Path]] = {
    "torrent": make.torrent,
    "converted": make.converted,
    "json alone": make.json_alone,
    "v3": lambda folder: make.torrent(folder, V3),
    "v3 style": make.v3_style,
    "v3 style, json alone": lambda folder: make.json_alone(
        folder, make.v3_style(folder.parent / "style") / "tokenizer.model"
    ),
    "chatml": make.chatml,
    "chatml, model": lambda folder: make.chatml(folder, tokenizer="model"),
    "chatml, jinja": lambda folder: make.chatml(folder, template="jinja"),
    "chatml, list": lambda folder: make.chatml(folder, tokenizer="model", template="list"),
    "chatml, none": lambda folder: make.chatml(folder, template=None),
    "never a blank": lambda folder: make.changed(make.chatml(folder), make.metaspace("never")),
}


def rows_of(name: str) -> int:
    if name.startswith("v"):
        return ROWS[name.partition(",")[0]]
    return 2048 if name in ("torrent", "converted", "json alone") else 2050


@pytest.fixture(scope="module", params=FOLDERS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder, and what its tokenizer becomes by way of a GGUF with 7 rows more than it has tokens."""
    base = tmp_path_factory.mktemp(request.param.replace(",", "").replace(" ", "-"))
    folder = FOLDERS[request.param](base / "source")
    return folder, make.rebuilt(folder, rows_of(request.param) + 7, base / "rebuilt")


# --- there and back ---


def test_the_same_tokenizer_comes_back(both: tuple[Path, Path]) -> None:
    make.expect_same(*both)


def test_the_same_pieces_come_back(both: tuple[Path, Path]) -> None:
    source, made = both
    if source.parent.name.startswith("never"):
        assert not (made / "tokenizer.model").exists()  # pieces.read_pieces would have none without the blank
        return
    style = source.parent / "style"  # what tokenizer.json alone was made of
    model = next(one / "tokenizer.model" for one in (source, style, NANO) if (one / "tokenizer.model").exists())
    ours, theirs = (sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in (made / model.name, model))
    assert (ours.bos_id(), ours.eos_id(), ours.unk_id(), ours.pad_id()) == (1, 2, 0, -1)
    for text in make.TEXTS:
        assert ours.encode(text) == theirs.encode(text)
    before, after = (read_pieces(file.read_bytes(), file).all for file in (model, made / model.name))
    if model.parent == source:
        assert after == before
    else:  # other scores, which give the same ids
        assert [(piece.text, piece.kind) for piece in after] == [(piece.text, piece.kind) for piece in before]


def test_transformers_reads_what_comes_back(both: tuple[Path, Path]) -> None:
    source, made = both
    ours, hub = Tokenizer.from_folder(source), AutoTokenizer.from_pretrained(made)
    assert (hub.bos_token_id, hub.eos_token_id, len(hub)) == (ours.bos_id, ours.eos_id, ours.vocab_size)
    for text in make.TEXTS:
        assert hub(text)["input_ids"] == ours.encode(text, parse_special=True), text


def test_the_same_files_come_back(tmp_path: Path) -> None:
    """Of a folder that mixtools made: tokenizer.json and tokenizer_config.json key for key."""
    source = make.converted(tmp_path / "source")
    made = make.rebuilt(source, 2048, tmp_path / "made")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((made / name).read_text("utf-8")) == json.loads((source / name).read_text("utf-8"))
    assert json.loads((made / "generation_config.json").read_text()) == {"bos_token_id": 1, "eos_token_id": 2}


def test_settings_of_the_model_that_comes_back(tmp_path: Path) -> None:
    """The trainer's and the normalizer's, as far as they decide about ids: BPE, size, byte fallback, ids; no rules."""
    model = make.rebuilt(make.torrent(tmp_path / "source"), 2048, tmp_path / "made") / "tokenizer.model"
    settings = {3: 2, 4: 2048, 35: 1, 40: 0, 41: 1, 42: 2}
    for file in (model, NANO / "tokenizer.model"):
        trainer, normalizer = (dict(_fields(value)) for number, value in _fields(file.read_bytes()) if number in (2, 3))
        assert {number: trainer[number] for number in settings} == settings
        assert (normalizer[1], normalizer[3], normalizer[4], normalizer.get(5, 1)) == (b"identity", 1, 0, 1)


def test_the_file_keeps_it(tmp_path: Path) -> None:
    """Through the bytes of a header: scores of 32 bits, strings that are no UTF-8."""
    metadata = vocabulary(make.v3_style(tmp_path / "source"), 600)
    metadata["tokenizer.ggml.tokens"].value[-1] = "\udcff\udcfe"
    (tmp_path / "x.gguf").write_bytes(encode_header(metadata, [])[0])
    found = read_header(Source(tmp_path / "x.gguf")).metadata
    assert found == metadata
    assert Tokenizer.from_folder(make.from_metadata(found, tmp_path / "made")).vocab_size == 599


# --- what is written ---


def digest(value: Value) -> str:
    if value.item is Kind.STRING:
        raw = b"\0".join(text.encode() for text in value.value)
    else:
        raw = struct.pack(f"<{len(value.value)}{'f' if value.item is Kind.FLOAT32 else 'i'}", *value.value)
    return hashlib.sha256(raw).hexdigest()[:16]


CONVERTERS = {  # of the folder "chatml, model" by convert_hf_to_gguf.py of llama.cpp (in llama-cpp-python 0.3.36)
    "tokens": "8e90166baf8eb569", "scores": "144dcfaa4638500f", "token_type": "be876fcf70b78a97",
}  # fmt: skip


def test_arrays_are_those_of_llama_cpps_converter(tmp_path: Path) -> None:
    """But for <unk>, which tokenizer_config.json makes a control token there; llama.cpp treats both alike."""
    found = vocabulary(make.chatml(tmp_path / "source", tokenizer="model"), 2050)
    assert found["tokenizer.ggml.token_type"].value[:4] == [2, 3, 3, 6]
    found["tokenizer.ggml.scores"].value[0] = -1000.0
    found["tokenizer.ggml.token_type"].value[0] = 3
    assert {name: digest(found[f"tokenizer.ggml.{name}"]) for name in CONVERTERS} == CONVERTERS


def plain(metadata: dict[str, Value]) -> dict[str, object]:
    """All but the arrays and templates, without what their keys begin with."""
    return {
        key.removeprefix("tokenizer.ggml."): value.value
        for key, value in metadata.items()
        if value.kind is not Kind.ARRAY and "chat_template" not in key
    }


IDS = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
KEYS = {"model": "llama", "pre": "default", **IDS, "add_bos_token": True, "add_eos_token": False}


def test_keys_of_a_torrent(tmp_path: Path) -> None:
    found = vocabulary(make.torrent(tmp_path / "source"), 2050)
    assert plain(found) == KEYS
    tokens, scores, kinds = (found[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    assert (tokens.item, scores.item, kinds.item) == (Kind.STRING, Kind.FLOAT32, Kind.INT32)
    assert found["tokenizer.ggml.bos_token_id"].kind is Kind.UINT32
    assert found["tokenizer.ggml.add_bos_token"].kind is Kind.BOOL
    pieces = read_pieces((NANO / "tokenizer.model").read_bytes(), NANO).all
    holes = [Piece("[PAD2048]", -10000.0, PieceKind.UNUSED), Piece("[PAD2049]", -10000.0, PieceKind.UNUSED)]
    assert [*zip(tokens.value, scores.value, kinds.value, strict=True)] == [*pieces, *holes]
    assert remarks(tmp_path / "source", 2050) == ()


def test_more_ids_and_what_goes_round_a_text(tmp_path: Path) -> None:
    source = make.chatml(tmp_path / "source", tokenizer="model")
    finetunes.edit(
        source / "tokenizer_config.json", add_eos_token=True, add_bos_token=False, pad_token="<unk>",
        add_prefix_space=True, mask_token="<|im_start|>", sep_token={"content": "</s>"}, eos_token="</s>",
    )  # fmt: skip
    finetunes.edit(source / "generation_config.json", eos_token_id=[2048, 2, 13, 14])
    assert plain(vocabulary(source, 2050)) == {
        **KEYS, "add_bos_token": False, "add_eos_token": True, "eot_token_id": 2048, "eom_token_id": 13,
        "padding_token_id": 0, "mask_token_id": 2049, "seperator_token_id": 2, "add_space_prefix": True,
    }  # fmt: skip
    made = make.rebuilt(source, 2050, tmp_path / "made")
    ours, theirs = Tokenizer.from_folder(made), Tokenizer.from_folder(source)
    assert ours.encode("a") == theirs.encode("a") == [260, 2]
    assert ours.end_ids == (2, 2048, 13)
    names = json.loads((made / "special_tokens_map.json").read_text())
    assert (names["pad_token"], names["mask_token"], names["sep_token"]) == ("<unk>", "<|im_start|>", "</s>")
    assert remarks(source, 2050) == (f"{source}: of the ids that end generation a GGUF has no place for 14",)


def test_tokens_that_are_not_special_holes_and_another_end(tmp_path: Path) -> None:
    added = {2: ("<|end|>", True), 2049: ("<tool>", False), 2051: ("<|x|>", True), 2052: ("a▁b", False)}
    source = make.model_alone(tmp_path / "source", NANO, added, eos_token="<|end|>")
    found = vocabulary(source, 2060)
    tokens, kinds = found["tokenizer.ggml.tokens"].value, found["tokenizer.ggml.token_type"].value
    assert tokens[2048:2054] == ["[PAD2048]", "<tool>", "[PAD2050]", "<|x|>", "a b", "[PAD2053]"]
    assert kinds[2048:2054] == [5, 4, 5, 3, 4, 5] and (tokens[2], kinds[2]) == ("<|end|>", 3)
    made = make.rebuilt(source, 2060, tmp_path / "made")
    ours, theirs = Tokenizer.from_folder(made), Tokenizer.from_folder(source)
    assert (ours.vocab_size, ours.eos_id, ours.end_ids) == (2053, 2, (2,)) == (2053, theirs.eos_id, theirs.end_ids)
    assert ours.meanings[:2052] == theirs.meanings[:2052] and ours.meanings[2052] == "a b"
    assert ours.special.items() - theirs.special.items() == {("[PAD2048]", 2048), ("[PAD2050]", 2050)}
    for text in ("x <tool> y<|x|>", "<|end|>a", "<tool>", " [PAD7]"):
        for parse_special in (False, True):
            assert ours.encode(text, parse_special=parse_special) == theirs.encode(text, parse_special=parse_special)
    assert theirs.encode("</s>", parse_special=True) == [1, 2]  # a piece by its old name, too; a GGUF has one for each
    hub = AutoTokenizer.from_pretrained(made)
    assert hub("x <tool> y<|x|>")["input_ids"] == ours.encode("x <tool> y<|x|>", parse_special=True)
    assert hub.eos_token == "<|end|>" and len(hub) == 2053


def test_added_tokens_beyond_the_rows_are_left_out_and_told(tmp_path: Path) -> None:
    added = {2048: ("<a>", True), 2049: ("<b>", False)}
    source = make.model_alone(tmp_path / "source", NANO, added, pad_token="<pad>")
    found = vocabulary(source, 2049)
    assert found["tokenizer.ggml.tokens"].value[2047:] == ["½", "<a>"] and plain(found) == KEYS
    assert remarks(source, 2049) == (f"{source}: the model has 2049 rows; left out are the added tokens <b>, <pad>",)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: has 2048 pieces, and the model 2047 rows"):
        vocabulary(source, 2047)
    finetunes.edit(source / "tokenizer_config.json", eos_token="<b>")
    with pytest.raises(TokenizerError, match="eos_token '<b>' has the id 2049, and the model has 2049 rows"):
        vocabulary(source, 2049)


@pytest.mark.parametrize(
    ("added", "rows", "message"),
    [
        ({2048: ("[PAD2049]", True)}, 2050, r"token 2049, '\[PAD2049\]', repeats token 2048; llama.cpp stops"),
        ({2048: ("", False)}, 2049, "token 2048 is empty"),
    ],
)
def test_vocabularies_that_llama_cpp_would_not_load(
    added: dict[int, tuple[str, bool]], rows: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TokenizerError, match=message):
        vocabulary(make.model_alone(tmp_path / "source", NANO, added), rows)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="holds no tokenizer") as caught:
        vocabulary(tmp_path, 2048)
    assert caught.value.file == str(tmp_path)


# --- templates ---


def written(folder: Path) -> dict[str, str | list[str]]:
    found = vocabulary(folder, 2050)
    return {key.removeprefix("tokenizer."): value.value for key, value in found.items() if "chat_template" in key}


def test_a_fine_tunes_templates(tmp_path: Path) -> None:
    jinja = make.chatml(tmp_path / "jinja", template="jinja")
    finetunes.edit(jinja / "tokenizer_config.json", chat_template="another")
    assert written(jinja) == {"chat_template": finetunes.CHATML}
    (jinja / "additional_chat_templates").mkdir()
    (jinja / "additional_chat_templates" / "tool-use.jinja").write_text("tools")
    named = {"chat_templates": ["tool_use"], "chat_template.tool_use": "tools"}
    assert written(jinja) == {"chat_template": finetunes.CHATML, **named}
    several = make.chatml(tmp_path / "list", template="list")
    tools = "{{ 'tools' }}"
    assert written(several) == {**named, "chat_template": finetunes.CHATML, "chat_template.tool_use": tools}
    config = json.loads((make.rebuilt(several, 2050, tmp_path / "made") / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [
        {"name": "default", "template": finetunes.CHATML}, {"name": "tool_use", "template": tools},
    ]  # fmt: skip
    finetunes.edit(several / "tokenizer_config.json", chat_template=[{"name": "tool_use", "template": tools}])
    assert written(several) == {**named, "chat_template.tool_use": tools}
    finetunes.edit(several / "tokenizer_config.json", chat_template=[{"name": "tool_use"}])
    with pytest.raises(TokenizerError, match="lists something other than named templates"):
        written(several)
    assert written(make.chatml(tmp_path / "none", template=None)) == {}
    assert written(make.torrent(tmp_path / "torrent")) == written(make.converted(tmp_path / "converted"))


MESSAGES = {"system": SystemMessage, "user": UserMessage, "assistant": AssistantMessage}


@pytest.mark.parametrize(("name", "model"), [("v1", V1), ("v3", V3)])
def test_mistrals_own_template_for_llama_cpp(name: str, model: Path, tmp_path: Path) -> None:
    """mistral-common's ids, and a special token that a user typed is none."""
    source = make.torrent(tmp_path / "source", model)
    template = vocabulary(source, ROWS[name])["tokenizer.chat_template"].value
    assert not {*MARKER} & {*template}
    tokenizer = Tokenizer.from_folder(source)
    prompts = [render(template, messages, bos_token="<s>", eos_token="</s>") for messages in make.CONVERSATIONS]
    found = [tokenizer.encode(prompt, bos=False, parse_special=True) for prompt in prompts]
    reference: Any = MistralTokenizer.from_file(str(model))
    for messages, ids in zip(make.CONVERSATIONS[:2], found, strict=False):
        request = ChatCompletionRequest(
            messages=[MESSAGES[str(one["role"])](content=one["content"]) for one in messages]
        )
        assert ids == reference.encode_chat_completion(request).tokens
    meant = [token for token in found[2] if token in {*tokenizer.special.values(), 0}]
    assert meant == ([1] if name == "v1" else [1, 3, 4])
    assert "What is < /s>, < s>, < unk>, " in prompts[2]
