"""Tokens that a fine-tune added, against transformers, whichever file lies there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetunes
import pytest
import sentencepiece
from converting import NANO
from transformers import AutoTokenizer

from mixtools.errors import ConfigError, TokenizerError
from mixtools.text.tokenizer import Tokenizer, has_tokenizer

TEXTS = (
    "",
    "<|im_start|>user",
    "<|im_start|>",
    "a <|im_start|> b<|im_end|>",
    "  <|im_start|>  user\n<|im_end|>\n",
    "<|im_start|><|im_end|><|im_start|><|im_end",
    "x</s>y <s> z<unk>",
    "no token at all, naïve 😀",
)
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}


@pytest.fixture(scope="module", params=["json", "model"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes.chatml(tmp_path_factory.mktemp("chatml") / "model", tokenizer=request.param)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' own, of the folder with tokenizer.json."""
    return AutoTokenizer.from_pretrained(finetunes.chatml(tmp_path_factory.mktemp("hub") / "model"))


@pytest.fixture
def copy(tmp_path: Path, folder: Path) -> Path:
    """A folder to change, without weights."""
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors"))
    return tmp_path / "copy"


def test_ids_with_special_tokens_equal_transformers(folder: Path, hub: Any) -> None:
    ours = Tokenizer.from_folder(folder)
    assert ours.vocab_size == 2050 and ours.remarks == ()
    assert ours.encode("<|im_start|>user", parse_special=True) == [1, 2049, 395, 259]
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == hub(text)["input_ids"], text
        ids = [token for token in hub(text)["input_ids"] if token]  # <unk> is " ⁇ " to SentencePiece and to us
        assert ours.decode(ids) == hub.decode(ids, skip_special_tokens=True), text


def test_what_looks_like_a_special_token_is_text(folder: Path) -> None:
    """The same ids from either file: SentencePiece's."""
    ours = Tokenizer.from_folder(folder)
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    for text in TEXTS:
        assert ours.encode(text) == [1, *reference.encode(text)], text


def test_bos_eos_and_ends(folder: Path) -> None:
    ours = Tokenizer.from_folder(folder)
    assert (ours.bos_id, ours.eos_id, ours.end_ids) == (1, 2048, (2048,))
    assert ours.special["<|im_end|>"] == 2048 and ours.special["<s>"] == 1


def test_added_tokens_that_are_not_special_are_always_meant_and_printed(copy: Path, hub: Any) -> None:
    flags = {**FLAGS, "special": False}
    if (copy / "tokenizer.json").exists():
        document = json.loads((copy / "tokenizer.json").read_text())
        document["added_tokens"][-1]["special"] = False
        (copy / "tokenizer.json").write_text(json.dumps(document))
    decoder = json.loads((copy / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder["2049"] = {"content": "<|im_start|>", **flags}
    finetunes.edit(copy / "tokenizer_config.json", added_tokens_decoder=decoder)
    ours = Tokenizer.from_folder(copy)
    assert ours.encode("<|im_start|>user<|im_end|>")[:4] == [1, 2049, 395, 259]
    assert 2048 not in ours.encode("<|im_start|>user<|im_end|>")
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == hub(text)["input_ids"], text
    assert ours.decode([1, 2049, 395, 259, 2048]) == "<|im_start|> user"


def with_tokenizer_json(tmp_path: Path) -> Path:
    return finetunes.chatml(tmp_path / "model")


def flag(name: str) -> Callable[[Path], None]:
    """tokenizer_config.json gives <|im_end|> another flag than tokenizer.json."""

    def change(folder: Path) -> None:
        decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        decoder["2048"][name] = not decoder["2048"][name]
        finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)

    return change


def more(folder: Path) -> None:
    """A token that tokenizer_config.json alone knows."""
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    decoder["2050"] = {"content": "<|tool|>", **FLAGS, "special": False}
    finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)


def saved_with_truncation(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(document))


def no_post_processor(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(document))


CHANGES: dict[str, Callable[[Path], None]] = {
    "lstrip": flag("lstrip"),
    "rstrip": flag("rstrip"),
    "single_word": flag("single_word"),
    "special": flag("special"),
    "normalized": flag("normalized"),
    "more": more,
    "pad": lambda folder: finetunes.edit(folder / "tokenizer_config.json", pad_token="<pad>"),
    "extra": lambda folder: finetunes.edit(folder / "tokenizer_config.json", extra_special_tokens=["<|x|>"]),
    "additional": lambda folder: finetunes.edit(folder / "tokenizer_config.json", additional_special_tokens=["<|x|>"]),
    "no bos": lambda folder: finetunes.edit(folder / "tokenizer_config.json", add_bos_token=False),
    "eos": lambda folder: finetunes.edit(folder / "tokenizer_config.json", add_eos_token=True),
    "no decoder": lambda folder: finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=None),
    "truncation": saved_with_truncation,
    "no post-processor": no_post_processor,
    "no tokenizer_config.json": lambda folder: (folder / "tokenizer_config.json").unlink(),
    "bos is an object": lambda folder: finetunes.edit(
        folder / "tokenizer_config.json", bos_token={"__type": "AddedToken", "content": "<|im_start|>", **FLAGS}
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_tokenizer_json_folder_gives_transformers_ids(name: str, tmp_path: Path) -> None:
    folder = with_tokenizer_json(tmp_path)
    CHANGES[name](folder)
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    for text in (*TEXTS, "a<pad>b", "a <|x|> b", "a<|im_end|>b", "a <|im_end|>  b<|tool|> c"):
        expected = theirs(text, truncation=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == expected, text
        # <unk> is " ⁇ " to SentencePiece and to us; tokenizers prints a special token that it keeps as "▁<|im_end|>"
        printed = [token for token in expected if token and (name, token) != ("normalized", 2048)]
        assert ours.decode(printed) == theirs.decode(printed, skip_special_tokens=True), text
    if theirs.bos_token_id is not None:
        assert ours.bos_id == theirs.bos_token_id


def test_bos_that_two_documents_see_otherwise_is_told(tmp_path: Path) -> None:
    folder = with_tokenizer_json(tmp_path)
    CHANGES["no bos"](folder)
    (remark,) = Tokenizer.from_folder(folder).remarks
    assert "says add_bos_token false, tokenizer.json puts BOS before a text; the latter holds" in remark


def test_an_end_after_every_text_is_told(tmp_path: Path) -> None:
    folder = finetunes.chatml(tmp_path / "model", tokenizer="model")
    finetunes.edit(folder / "tokenizer_config.json", add_bos_token=False, add_eos_token=True)
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("The following") == [421, 281, 1291, 300, 2048]
    assert ours.encode("The following", bos=False) == [421, 281, 1291, 300]
    assert ours.remarks == (
        f"{folder / 'tokenizer.model'}: EOS goes after every text, as its documents say (add_eos_token)",
    )


def test_ids_that_two_documents_see_otherwise_are_told(tmp_path: Path) -> None:
    folder = with_tokenizer_json(tmp_path)
    finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
    finetunes.edit(folder / "added_tokens.json", **{"<|im_end|>": 2049, "<|im_start|>": 2048})
    remarks = Tokenizer.from_folder(folder).remarks
    assert [("'<|im_start|>' should have the id 2048" in one, "gives it 2049" in one) for one in remarks] == [
        (True, True), (False, False),
    ]  # fmt: skip


def test_legacy_false_puts_the_dummy_blank_at_the_very_beginning_alone(tmp_path: Path) -> None:
    """As LlamaTokenizer of transformers 4 with legacy=False: the ids of "user" without and with a blank before it."""
    folder = finetunes.chatml(tmp_path / "model", tokenizer="model")
    finetunes.edit(folder / "tokenizer_config.json", legacy=False)
    ours = Tokenizer.from_folder(folder)
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(NANO / "tokenizer.model"))
    whole = reference.encode("auser")  # merged otherwise than "user", so pieces are compared as text
    assert ours.encode("user", bos=False, parse_special=True) == reference.encode("user") != whole
    after = ours.encode("<|im_start|>user", bos=False, parse_special=True)[1:]
    assert "".join(reference.id_to_piece(after)) == "user"
    assert "".join(reference.id_to_piece(reference.encode("user"))) == "▁user"


def test_added_tokens_json_alone_names_tokens(tmp_path: Path) -> None:
    """Without added_tokens_decoder those are special that tokenizer_config.json or special_tokens_map.json name."""
    folder = finetunes.chatml(tmp_path / "model", tokenizer="model")
    finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=None, eos_token=None)
    ours = Tokenizer.from_folder(folder)
    assert ours.eos_id == 2048 and ours.special.keys() == {"<s>", "</s>", "<|im_end|>"}
    assert ours.encode("<|im_start|>user<|im_end|>")[:4] == [1, 2049, 395, 259]
    assert 2048 not in ours.encode("<|im_start|>user<|im_end|>")
    assert ours.encode("a<|im_end|>", parse_special=True)[-1] == 2048


def test_both_files_and_they_agree(tmp_path: Path) -> None:
    folder = with_tokenizer_json(tmp_path)
    assert (folder / "tokenizer.model").exists()
    assert Tokenizer.from_folder(folder).remarks == ()


@pytest.mark.parametrize("change", ["vocabulary", "special", "merges", "damaged"])
def test_both_files_and_they_disagree(change: str, tmp_path: Path) -> None:
    folder = with_tokenizer_json(tmp_path)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    if change == "vocabulary":
        vocabulary = document["model"]["vocab"]
        one, two = list(vocabulary)[-2:]
        vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    elif change == "special":
        document["added_tokens"][2]["special"] = False
        finetunes.edit(folder / "tokenizer_config.json", added_tokens_decoder=None)
        finetunes.edit(folder / "added_tokens.json")
    elif change == "merges":
        document["model"]["merges"] = document["model"]["merges"][::-1]
    else:
        (folder / "tokenizer.model").write_bytes(b"no tokenizer")
    (folder / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    ours = Tokenizer.from_folder(folder)
    assert ours.file == folder / "tokenizer.json"
    (remark,) = ours.remarks
    assert remark.startswith(f"{folder / 'tokenizer.model'} is not used: tokenizer.json is")
    told = {"vocabulary": "they disagree: id 2046 is", "special": "'</s>', is a control token here, none there",
            "merges": "other ids for a text made of them", "damaged": "it cannot be read (is"}  # fmt: skip
    assert told[change] in remark


@pytest.mark.parametrize("name", ["tokenizer.model.v3", "tokenizer.model.v1"])
def test_mistrals_names_for_the_file(name: str, tmp_path: Path) -> None:
    shutil.copyfile(NANO / "tokenizer.model", tmp_path / name)
    assert Tokenizer.from_folder(tmp_path).encode("The following") == [1, 421, 281, 1291, 300]


def test_has_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert not has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model.v3").write_bytes(b"")
    assert has_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model.v3").rename(tmp_path / "tokenizer.json")
    assert has_tokenizer(tmp_path)


def test_later_versions_and_several_that_differ_are_refused(tmp_path: Path) -> None:
    data = (NANO / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model.v7").write_bytes(data)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model\.v7: is of a version later than v3"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model.v3").write_bytes(data)
    (tmp_path / "tokenizer.model.v1").write_bytes(data)
    assert Tokenizer.from_folder(tmp_path).file.name == "tokenizer.model.v1"
    (tmp_path / "tokenizer.model.v1").write_bytes(data + b"\x1a\x00")
    with pytest.raises(TokenizerError, match=r"holds tokenizer\.model\.v1, tokenizer\.model\.v3, which differ"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(data)
    assert Tokenizer.from_folder(tmp_path).file.name == "tokenizer.model"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("tokenizer_config.json", "[]", "is not a JSON object"),
        ("tokenizer_config.json", "{", "is not valid JSON"),
        ("tokenizer_config.json", '{"bos_token": 3}', "bos_token is 3, not a token"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {"content": "a"}}}', "added tokens are not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"7": "a"}}', "added tokens are not"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}', "an id below 0"),
        ("added_tokens.json", '{"a": "b"}', "added tokens are not"),
        ("generation_config.json", '{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not a number"),
        ("config.json", '{"eos_token_id": [2, true]}', "not a number or a list of numbers"),
    ],
)
def test_damaged_documents_are_refused(file: str, text: str, message: str, tmp_path: Path) -> None:
    shutil.copyfile(NANO / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / file).write_text(text)
    with pytest.raises((TokenizerError, ConfigError), match=message) as caught:
        Tokenizer.from_folder(tmp_path)
    assert caught.value.file == str(tmp_path / file)


def test_ends_are_generation_configs_then_configs_then_the_tokenizers(tmp_path: Path) -> None:
    shutil.copyfile(NANO / "tokenizer.model", tmp_path / "tokenizer.model")
    assert Tokenizer.from_folder(tmp_path).end_ids == (2,)
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 2]}')
    assert Tokenizer.from_folder(tmp_path).end_ids == (7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert Tokenizer.from_folder(tmp_path).end_ids == (7, 2)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    assert Tokenizer.from_folder(tmp_path).end_ids == (9,)
