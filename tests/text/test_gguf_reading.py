"""Tokenizers out of GGUFs as people have them, by other converters and of other years; and damaged ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetunes
import pytest
import sentencepiece
from converting import NANO
from text import vocabularies as make
from text.vocabularies import vocabulary

from mixtools.errors import TokenizerError
from mixtools.storage.gguf_values import Kind, Value, array, boolean, string, uint32
from mixtools.text.from_gguf import documents
from mixtools.text.tokenizer import Tokenizer, hf_files

Keys = dict[str, Value]
GGML = "tokenizer.ggml."
TEXTS = (
    "The following",
    "a  b\n\tc",
    "</s>x",
    "naïve 漢字 😀",
    "[REFERENCE_DOC_1]y",
    "<|im_start|>user<|im_end|>",
    " ",
)


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return vocabulary(make.torrent(tmp_path / "torrent"), 2048)


@pytest.fixture
def chatml(tmp_path: Path) -> Keys:
    return vocabulary(make.chatml(tmp_path / "chatml", tokenizer="model"), 2050)


def of(keys: Keys, name: str) -> list[Any]:
    values: list[Any] = keys[GGML + name].value
    return values


def put(keys: Keys, index: int, text: str, kind: int, score: float = -1000.0) -> None:
    """A token in place of another, or after the last."""
    for name, value in (("tokens", text), ("token_type", kind), ("scores", score)):
        of(keys, name)[index : index + 1] = [value]


def tokenizer(keys: Keys, out: Path) -> Tokenizer:
    return Tokenizer.from_folder(make.from_metadata(keys, out))


def expect_ids(found: Tokenizer, source: Tokenizer) -> None:
    for text in TEXTS:
        for parse_special in (False, True):
            assert found.encode(text, parse_special=parse_special) == source.encode(text, parse_special=parse_special)


# --- as others write them ---


def test_as_convert_py_of_december_2023_wrote_them(chatml: Keys, tmp_path: Path) -> None:
    """Added tokens all USER_DEFINED, merges that nothing needs, and no word on BOS, EOS, <unk> or templates."""
    of(chatml, "token_type")[2048:] = [4, 4]
    chatml[f"{GGML}merges"] = array(Kind.STRING, ["no merge"])
    kept = ("model", "tokens", "scores", "token_type", "eos_token_id", "merges")
    found = tokenizer({key: chatml[key] for key in (GGML + name for name in kept)}, tmp_path / "made")
    assert (found.bos_id, found.eos_id, found.end_ids) == (1, 2048, (2048,))
    assert found.special == {"<s>": 1, "</s>": 2, "<|im_end|>": 2048}  # EOS is special, whatever its kind
    decoder = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert [decoder[index]["special"] for index in ("0", "1", "2048", "2049")] == [True, True, True, False]
    assert found.encode("<|im_start|>user<|im_end|>")[:4] == [1, 2049, 395, 259]
    assert 2048 not in found.encode("<|im_start|>user<|im_end|>")
    assert found.decode([1, 2049, 395, 259, 2048]) == "<|im_start|> user"
    with pytest.raises(TokenizerError, match="has no chat template"):
        found.encode_chat([{"role": "user", "content": "a"}])


def test_one_score_for_all_pieces_and_merges(chatml: Keys, tmp_path: Path) -> None:
    """What a converter wrote that had tokenizer.json alone: -1000 for each, <unk> a control token."""
    document = json.loads(hf_files(NANO / "tokenizer.model")["tokenizer.json"])
    chatml[f"{GGML}scores"] = array(Kind.FLOAT32, [-1000.0] * 2050)
    of(chatml, "token_type")[0] = 3
    with pytest.raises(TokenizerError, match=r"x\.gguf: gives all pieces one score and holds no merges"):
        documents(chatml, Path("x.gguf"))
    chatml[f"{GGML}merges"] = array(Kind.STRING, document["model"]["merges"])
    found = tokenizer(chatml, tmp_path / "made")
    expect_ids(found, Tokenizer.from_folder(tmp_path / "chatml"))
    assert found.meanings[0] == " ⁇ " and "<unk>" not in found.special
    del chatml[f"{GGML}scores"]
    expect_ids(tokenizer(chatml, tmp_path / "again"), found)


@pytest.mark.parametrize("merges", [False, True])
def test_user_defined_pieces_that_llama_cpps_converter_calls_normal(merges: bool, tmp_path: Path) -> None:
    source = make.v3_style(tmp_path / "source")
    keys = vocabulary(source, 600)
    places = [index for index, kind in enumerate(of(keys, "token_type")) if kind == 4]
    assert [of(keys, "tokens")[index] for index in places] == [*make.DEFINED]
    for index in places:
        of(keys, "token_type")[index] = 1
    if merges:
        document = json.loads(hf_files(source / "tokenizer.model")["tokenizer.json"])
        keys[f"{GGML}merges"] = array(Kind.STRING, document["model"]["merges"])
        keys[f"{GGML}scores"] = array(Kind.FLOAT32, [-1000.0] * 600)
    made = make.from_metadata(keys, tmp_path / "made")
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
    for text in TEXTS:
        assert Tokenizer.from_folder(made).encode(text) == [1, *reference.encode(text)]


def test_holes(chatml: Keys, tmp_path: Path) -> None:
    """At the end they are no tokens, amid others they print nothing; a hole that is PAD is one."""
    put(chatml, 2050, "[PAD2050]", 4)
    put(chatml, 2051, "<tool>", 4)
    put(chatml, 2052, "[PAD]", 5)
    put(chatml, 2053, "[PAD2053]", 5, -10000.0)
    put(chatml, 2054, "dummy", 5)
    found = tokenizer(chatml, tmp_path / "made")
    assert found.vocab_size == 2052 and found.meanings[2048:] == [None, None, None, "<tool>"]
    assert found.special.items() >= {("[PAD2050]", 2050), ("<|im_start|>", 2049)}
    assert found.encode("a <tool>b")[-3:-1] == [1327, 2051]
    chatml[f"{GGML}padding_token_id"] = uint32(2052)
    found = tokenizer(chatml, tmp_path / "padded")
    assert found.vocab_size == 2053 and found.special["[PAD]"] == 2052
    assert json.loads((tmp_path / "padded" / "special_tokens_map.json").read_text())["pad_token"] == "[PAD]"


def test_tokens_that_are_no_text(keys: Keys, tmp_path: Path) -> None:
    put(keys, 300, "\udcc3\udc28", 1, -41.0)
    put(keys, 301, "", 1, -42.0)
    found = tokenizer(keys, tmp_path / "made")
    assert found.meanings[300] is None and found.special.items() >= {("[PAD300]", 300), ("[PAD301]", 301)}
    assert found.encode("½") == [1, 1327, 2047] and found.remarks == ()


def test_a_token_in_the_place_of_a_piece(keys: Keys, tmp_path: Path) -> None:
    """A fine-tune that made </s> its end of a turn, one that gave its sign to a piece, and one that is not special."""
    put(keys, 2, "<|end|>", 3)
    put(keys, 2000, "<tool>", 4)
    put(keys, 2001, "<|x|>", 3)
    found = tokenizer(keys, tmp_path / "made")
    assert (found.eos_id, found.end_ids, found.vocab_size) == (2, (2,), 2048)
    assert found.encode("x<tool><|end|>", parse_special=True) == [1, *found.encode("x", bos=False), 2000, 2]
    assert found.encode("<tool>") == [1, 2000] and 2001 not in found.encode("<|x|>")
    assert found.decode([2, 2000, 2001]) == "<tool>" and "</s>" not in found.special
    names = json.loads((tmp_path / "made" / "tokenizer_config.json").read_text())
    assert names["eos_token"] == "<|end|>" and names["added_tokens_decoder"]["2000"]["special"] is False


def test_other_ends_and_what_goes_round_a_text(chatml: Keys, tmp_path: Path) -> None:
    told = {"add_bos_token": boolean(False), "add_eos_token": boolean(True), "eot_token_id": uint32(2)}
    chatml |= {GGML + name: value for name, value in told.items()} | {f"{GGML}eom_token_id": uint32(2049)}
    found = tokenizer(chatml, tmp_path / "made")
    assert found.encode("a") == [260, 2048] and found.end_ids == (2048, 2, 2049)
    ends = json.loads((tmp_path / "made" / "generation_config.json").read_text())
    assert ends == {"bos_token_id": 1, "eos_token_id": [2048, 2, 2049]}
    chatml[f"{GGML}eot_token_id"] = chatml[f"{GGML}eom_token_id"] = uint32(2048)
    chatml[f"{GGML}add_eos_token"] = boolean(False)
    found = tokenizer(chatml, tmp_path / "again")
    assert found.encode("a") == [260] and found.end_ids == (2048,)


def test_an_end_that_is_no_token_of_its_own(keys: Keys, tmp_path: Path) -> None:
    """EOS is a line break: it has no name, for a name would make it special."""
    keys[f"{GGML}eos_token_id"] = uint32(13)
    found = tokenizer(keys, tmp_path / "made")
    assert found.end_ids == (13,) and found.encode("a\nb") == Tokenizer.from_folder(NANO).encode("a\nb")
    assert found.decode([260, 13]) == "a\n"


def test_templates(chatml: Keys, tmp_path: Path) -> None:
    del chatml["tokenizer.chat_template"]
    chatml["tokenizer.chat_template.rag"] = string("{{ 'rag' }}")
    folder = make.from_metadata(chatml, tmp_path / "rag")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["chat_template"] == [{"name": "rag", "template": "{{ 'rag' }}"}]
    chatml["tokenizer.chat_template"] = string(finetunes.CHATML)
    found = tokenizer(chatml, tmp_path / "both")
    assert found.encode_chat([{"role": "user", "content": "Hello"}])[:9] == [
        2049, 395, 259, 13, 1394, 768, 2048, 1327, 13,
    ]  # fmt: skip


# --- what cannot be ---


def without(name: str) -> Callable[[Keys], None]:
    return lambda keys: keys.__delitem__(GGML + name)


def told(name: str, value: Value) -> Callable[[Keys], None]:
    return lambda keys: keys.__setitem__(GGML + name, value)


def token(index: int, text: str, kind: int, score: float = -1000.0) -> Callable[[Keys], None]:
    return lambda keys: put(keys, index, text, kind, score)


def shorter(name: str) -> Callable[[Keys], None]:
    return lambda keys: of(keys, name).__delitem__(-1)


def emptied(keys: Keys) -> None:
    for name in ("tokens", "scores", "token_type"):
        of(keys, name).clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("model"), r"lacks tokenizer\.ggml\.model"),
        (told("model", uint32(1)), r"tokenizer\.ggml\.model is no string"),
        (told("model", string("gpt2")), "has a tokenizer of the kind 'gpt2'; read is 'llama'"),
        (told("model", string("bert")), "has a tokenizer of the kind 'bert'"),
        (told("model", string("no_vocab")), r"holds no tokenizer \(no_vocab\)"),
        (told("model", string("none")), r"holds no tokenizer \(none\)"),
        (without("tokens"), r"lacks tokenizer\.ggml\.tokens"),
        (without("token_type"), r"lacks tokenizer\.ggml\.token_type"),
        (without("scores"), "gives all pieces one score and holds no merges"),
        (told("tokens", array(Kind.INT32, [1])), r"tokenizer\.ggml\.tokens is no array of string"),
        (told("tokens", string("a")), r"tokenizer\.ggml\.tokens is no array"),
        (told("scores", array(Kind.STRING, ["a"])), r"tokenizer\.ggml\.scores is no array of float32"),
        (emptied, "has a tokenizer without tokens"),
        (shorter("scores"), "scores has not as many entries as tokens: expected 2048, found 2047"),
        (shorter("token_type"), "token_type has not as many entries as tokens: expected 2048, found 2047"),
        (shorter("tokens"), "token_type has not as many entries as tokens: expected 2047, found 2048"),
        (told("bos_token_id", uint32(2048)), r"bos_token_id is 2048, not an id of its 2048 tokens"),
        (told("eot_token_id", Value(Kind.INT32, -1)), r"eot_token_id is -1, not an id"),
        (told("padding_token_id", string("a")), r"padding_token_id is 'a', not an id"),
        (told("eos_token_id", boolean(True)), r"eos_token_id is True, not an id"),
        (told("add_bos_token", uint32(1)), r"add_bos_token is no bool"),
        (token(300, "</s>", 1), "token 300 repeats token 2, '</s>'"),
        (token(300, "x" * 20000, 1), "token 300 has 20000 characters"),
        (token(300, "x", 7), "token 300, 'x', is of no known kind"),
        (token(300, "x", 0), "token 300, 'x', is of no known kind"),
        (token(300, "qqq", 1, float("nan")), "piece 300, 'qqq', has the score nan"),
        (token(300, "qqq", 1, -44.0), "piece 303, .*, has the score of 'qqq', -44.0; ties cannot be converted"),
        (token(300, "a b▁c", 1), "reaches over a blank between words"),
        (token(20, "qqq", 1), "lacks a byte piece"),
        (token(0, "<unk>", 1, -7000.0), "must have exactly one unknown piece"),
        (token(1, "<s>", 1, -7000.0), "lacks the control token <s>"),
        (lambda keys: keys.__setitem__("tokenizer.chat_template", uint32(1)), "chat_template is no string"),
    ],
)
def test_damaged_vocabularies(change: Callable[[Keys], None], message: str, keys: Keys) -> None:
    change(keys)
    with pytest.raises(TokenizerError, match=message) as caught:
        documents(keys, Path("x.gguf"))
    assert caught.value.file == "x.gguf"
