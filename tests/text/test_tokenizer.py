"""Tokenizer against SentencePiece: encoding, decoding, streaming, and what it says of files that are no tokenizers."""

from __future__ import annotations

import dataclasses
import json
import random
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixtools.config import MixtralConfig
from mixtools.errors import TokenizerError
from mixtools.text.chat import MARKER
from mixtools.text.tokenizer import Tokenizer, hf_files

NANO = Path(__file__).parents[1] / "data" / "nano-mixtral"
MISTRAL = Path(str(resources.files("mistral_common") / "data"))
MODELS = {
    "nano": NANO / "tokenizer.model",
    "v1": MISTRAL / "tokenizer.model.v1",
    "v3": MISTRAL / "mistral_instruct_tokenizer_240323.model.v3",
}
TEXTS = ("", " ", "Hello world", "  two", "naïve €5 😀", "a\n\n\tb\0", "</s><s>[INST]<unk>", "[REFERENCE_DOC_3]x", "▁")


@pytest.fixture(scope="module", params=MODELS)
def reference(request: pytest.FixtureRequest) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(MODELS[request.param]))


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request: pytest.FixtureRequest, reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    model = folder / "tokenizer.model"
    model.write_bytes(reference.serialized_model_proto())
    files = hf_files(model)
    model.unlink()
    (folder / request.param).write_bytes(files[request.param])
    return Tokenizer.from_folder(folder)


def test_ids_and_sizes_equal_sentencepieces(tokenizer: Tokenizer, reference: Any) -> None:
    assert tokenizer.vocab_size == reference.get_piece_size()
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())
    for text in TEXTS:
        ids = reference.encode(text)
        assert tokenizer.encode(text) == [tokenizer.bos_id, *ids]
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode([tokenizer.bos_id, *ids]) == reference.decode(ids)


def ids_of(reference: Any, rng: random.Random) -> list[int]:
    """Ids at random, bytes and reserved ones more often than their share."""
    size = reference.get_piece_size()
    first = reference.piece_to_id("<0x00>")
    blank = reference.piece_to_id("▁")
    pools = ([0, 1, 2], [blank], range(size), range(first, first + 256), range(first + 0x80, first + 0x100))
    return [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(0, 25))]


def test_decoding_equals_sentencepieces_on_any_ids(tokenizer: Tokenizer, reference: Any) -> None:
    rng = random.Random(11)
    for _ in range(3000):
        ids = ids_of(reference, rng)
        assert tokenizer.decode(ids) == reference.decode(ids), ids


def test_every_id_alone_and_after_another_decodes_as_sentencepiece_does(tokenizer: Tokenizer, reference: Any) -> None:
    letter = reference.piece_to_id("a")
    for token in range(tokenizer.vocab_size):
        assert tokenizer.decode([token]) == reference.decode([token])
        assert tokenizer.decode([letter, token]) == reference.decode([letter, token])


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=60).filter(lambda text: MARKER not in text))  # tokenizer.json drops it (chat.py)
def test_text_comes_back(tokenizer: Tokenizer, reference: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids[1:] == reference.encode(text)
    assert tokenizer.decode(ids) == reference.decode(ids) == text.replace("▁", " ")


def test_stream_prints_whole_characters_as_soon_as_they_are_there(tokenizer: Tokenizer) -> None:
    text = "Grüße, 𝔊𝔯ü𝔰𝔰𝔢 👩‍👩‍👧 漢字 end"
    stream, shown = tokenizer.stream(), ""
    for token in tokenizer.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)
    assert shown == text
    assert stream.finish() == ""


def test_stream_does_not_lag(tokenizer: Tokenizer, reference: Any) -> None:
    byte = reference.piece_to_id("<0x00>")
    stream = tokenizer.stream()
    shown = [stream.push(byte + value) for value in "é€".encode() + b"\xff\xe2\x82"]
    assert shown == ["", "é", "", "", "€", "\ufffd", "", ""]
    assert stream.push(reference.piece_to_id("a")) == "\ufffd\ufffda"
    assert stream.push(byte + 0xF0) == ""
    assert stream.finish() == "\ufffd"


def test_stream_joined_equals_decode(tokenizer: Tokenizer, reference: Any) -> None:
    rng = random.Random(12)
    for _ in range(500):
        ids = ids_of(reference, rng)
        stream = tokenizer.stream()
        assert "".join([stream.push(token) for token in ids]) + stream.finish() == reference.decode(ids)


@pytest.mark.parametrize("token", [-1, 2048, 1 << 40])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {token} is not in the vocabulary of 2048"):
        Tokenizer.from_folder(NANO).decode([5, token])


def test_lone_surrogates_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lone surrogate at 2"):
        tokenizer.encode("ab\ud800")


def test_check_vocab() -> None:
    tokenizer = Tokenizer.from_folder(NANO)
    config = MixtralConfig(8, 8, 1, 2, 1, 4, vocab_size=2048)
    assert tokenizer.check_vocab(config) is None
    remark = tokenizer.check_vocab(dataclasses.replace(config, vocab_size=2112))
    assert remark is not None
    assert "2048 pieces for a model of 2112" in remark
    remark = tokenizer.check_vocab(dataclasses.replace(config, vocab_size=2047))
    last = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["nano"])).id_to_piece(2047)
    assert remark is not None and f"2048 pieces for a model of 2047; ids from 2047 on ({last!r}) cannot" in remark


def test_ids_beyond_the_models_rows_are_refused_where_they_are_used() -> None:
    tokenizer = Tokenizer.from_folder(NANO)
    config = MixtralConfig(8, 8, 1, 2, 1, 4, vocab_size=2000)
    tokenizer.expect_known([0, 1, 1999], config)
    piece = sentencepiece.SentencePieceProcessor(model_file=str(MODELS["nano"])).id_to_piece(2005)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: token .* the model has 2000 rows") as caught:
        tokenizer.expect_known([5, 2005, 2006], config)
    assert f"token {piece!r} has the id 2005" in str(caught.value)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="neither") as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.file == str(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read"):
        hf_files(tmp_path / "tokenizer.model")


def test_truncated_models_are_refused(tmp_path: Path) -> None:
    data = (NANO / "tokenizer.model").read_bytes()
    file = tmp_path / "tokenizer.model"
    ends = {*range(0, len(data), 211), *range(len(data) - 60, len(data))}
    for end in sorted(ends):
        file.write_bytes(data[:end])
        with pytest.raises(TokenizerError, match=r"tokenizer\.model: is (damaged|cut short)"):
            Tokenizer.from_folder(tmp_path)


def test_damaged_models_raise_no_other_error(tmp_path: Path) -> None:
    data = (NANO / "tokenizer.model").read_bytes()
    file = tmp_path / "tokenizer.model"
    rng = random.Random(4)
    messages = []
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        file.write_bytes(broken)
        try:
            Tokenizer.from_folder(tmp_path).encode("Hello")
        except TokenizerError as error:
            messages.append(str(error))
    assert all(message.startswith(str(file)) for message in messages)
    assert 30 < len(messages) < 300  # a changed letter of a piece is still a tokenizer


@pytest.mark.parametrize("data", [b"\n\n\n\n", b"<html>Not found</html>", b"version 2\n", b"\x80" * 99])
def test_other_files_are_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model: is (damaged|cut short)"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tokenizer.model.v3"])
def test_what_git_lfs_leaves_is_named(name: str, tmp_path: Path) -> None:
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 493443\n"
    (tmp_path / name).write_text(pointer)
    with pytest.raises(TokenizerError, match=rf"{name}: is a Git LFS pointer, .*git lfs pull"):
        Tokenizer.from_folder(tmp_path)


def test_repeated_and_switched_off_pieces_are_refused(tmp_path: Path) -> None:
    data = (NANO / "tokenizer.model").read_bytes()
    text, file = b"\n\x03ing", tmp_path / "tokenizer.model"
    assert data.count(text) == 1
    file.write_bytes(data.replace(text, b"\n\x03ent"))
    with pytest.raises(TokenizerError, match=r"repeats piece .*'ent'"):
        hf_files(file)
    start = data.index(text) - 2  # field 1, its length, then the piece; add field 3, type, as UNUSED
    size = data[start + 1]
    end = start + 2 + size
    file.write_bytes(data[: start + 1] + bytes([size + 2]) + data[start + 2 : end] + b"\x18\x05" + data[end:])
    with pytest.raises(TokenizerError, match="'ing', is switched off"):
        hf_files(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document["model"].update(type="WordPiece"), "not BPE"),
        (lambda document: document["model"].update(byte_fallback=False), "not BPE with byte fallback"),
        (lambda document: document["model"]["vocab"].update({"ing": 99999}), "damaged|gaps"),
        (lambda document: document["model"].update(merges=["nothing here"]), "damaged"),
        (lambda document: document.pop("model"), "damaged"),
        (lambda document: document.update(added_tokens=[{"id": 1}]), "damaged"),
    ],
)
def test_wrong_tokenizer_json_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    document = json.loads(hf_files(NANO / "tokenizer.model")["tokenizer.json"])
    change(document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": 3}'])
def test_no_tokenizer_json_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is damaged"):
        Tokenizer.from_folder(tmp_path)


def test_a_tokenizer_json_written_by_others_is_read(tmp_path: Path) -> None:
    """As the Hub's Mixtral repositories have it: merges as pairs, no pre-tokenizer, extra tokens at the end."""
    backend: Any = tokenizers.Tokenizer.from_str(hf_files(NANO / "tokenizer.model")["tokenizer.json"].decode())
    backend.add_special_tokens(["<|im_end|>"])
    backend.add_tokens(["<extra>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    found, expected = Tokenizer.from_folder(tmp_path), Tokenizer.from_folder(NANO)
    assert found.vocab_size == expected.vocab_size + 2
    for text in TEXTS:
        assert found.encode(text) == expected.encode(text)
    assert found.decode([*expected.encode("a"), 2048, 2049]) == "a<extra>"
