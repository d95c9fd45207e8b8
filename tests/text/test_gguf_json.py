"""GGUFs of folders that have tokenizer.json: its merges become scores, which is all that llama.cpp merges by."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import finetunes
import pytest
import sentencepiece
import tokenizers
from converting import NANO
from text import vocabularies as make
from text.vocabularies import remarks, vocabulary
from tokenizers import models, trainers

from mixtools.errors import TokenizerError
from mixtools.text.gguf_keys import ranks
from mixtools.text.tokenizer import Tokenizer, hf_files

V1 = Path(str(resources.files("mistral_common") / "data" / "tokenizer.model.v1"))


def test_scores_of_merges_are_llama_cpps_for_the_same_ids(tmp_path: Path) -> None:
    """As SentencePiece has it, which merges by score as llama.cpp does: its own pieces, its own scores' order."""
    metadata = vocabulary(make.json_alone(tmp_path / "source", V1), 32000)
    made = make.from_metadata(metadata, tmp_path / "made")
    ours, theirs = (
        sentencepiece.SentencePieceProcessor(model_file=str(file)) for file in (made / "tokenizer.model", V1)
    )
    pieces = [theirs.id_to_piece(index).replace("▁", " ") for index in range(32000)]
    for text in (*make.TEXTS, *("".join(pieces[start::997]) for start in range(200))):
        assert ours.encode(text) == theirs.encode(text)
    ranked = [score for text, score in zip(pieces, metadata["tokenizer.ggml.scores"].value, strict=True) if text[1:]]
    assert -1.0 in ranked and len({*ranked}) > 20000


def test_of_several_merges_that_make_a_piece_the_best_counts() -> None:
    assert ranks(["a b", "ab c", "a bc", ["b", "c"]]) == {"ab": 1, "abc": 2, "bc": 4}


def test_a_vocabulary_whose_bytes_come_last(tmp_path: Path) -> None:
    """As the tokenizers package trains one; SentencePiece has them first."""
    backend: Any = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    document = json.loads(hf_files(NANO / "tokenizer.model")["tokenizer.json"])
    backend.normalizer = tokenizers.Tokenizer.from_str(json.dumps(document)).normalizer
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    backend.train_from_iterator([word for text in make.PROMPTS for word in text.split()], trainer)
    model = json.loads(backend.to_str())["model"]
    model["vocab"] |= {
        text: len(model["vocab"]) + at for at, text in enumerate(("漢字漢", "字漢字"))
    }  # nothing makes them
    size = len(model["vocab"])
    model["vocab"] |= {f"<0x{byte:02X}>": size + byte for byte in range(256)}
    source = make.write(tmp_path / "source", {"tokenizer.json": json.dumps({**document, "model": model}).encode()})
    made = make.rebuilt(source, size + 256, tmp_path / "made")
    assert json.loads((made / "tokenizer.json").read_text("utf-8"))["model"]["vocab"] == model["vocab"]
    ours, theirs = Tokenizer.from_folder(made), Tokenizer.from_folder(source)
    assert ours.encode("漢字漢字") == theirs.encode("漢字漢字") and len(ours.encode("漢字漢字")) > 9  # in bytes
    make.expect_same(source, made)


def drop_merges(document: dict[str, Any]) -> None:
    document["model"]["merges"] = document["model"]["merges"][::2]


def test_merges_that_no_scores_stand_for_are_refused(tmp_path: Path) -> None:
    source = make.changed(make.json_alone(tmp_path / "source"), drop_merges)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: has merges that no scores .* 'er' would get other ids"):
        vocabulary(source, 2048)


def test_a_merge_of_lower_rank_than_another_of_the_same_piece_is_refused(tmp_path: Path) -> None:
    """Either piece alone is encoded alike: "abc" by its score goes before "bcd", by the merge that is left after it."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcd",
        "abc",
        "bc",
        "ab",
        "bcd",
    ]
    document = json.loads(hf_files(NANO / "tokenizer.model")["tokenizer.json"])
    document["model"]["vocab"] = {piece: index for index, piece in enumerate(pieces)}
    document["model"]["merges"] = ["b c", "a b", "ab c", "bc d", "a bc"]
    source = make.write(tmp_path, {"tokenizer.json": json.dumps(document).encode()})
    with pytest.raises(TokenizerError, match="has merges that no scores stand for, .* 'abcd' would get other ids"):
        vocabulary(source, len(pieces))
    document["model"]["merges"] = ["b c", "a b", "ab c", "a bc", "bc d"]
    make.write(tmp_path, {"tokenizer.json": json.dumps(document).encode()})
    assert vocabulary(source, len(pieces))["tokenizer.ggml.scores"].value[-4:] == [-3.0, -1.0, -2.0, -5.0]


def one_piece_more(document: dict[str, Any]) -> None:
    document["model"]["vocab"]["erer"] = 2048
    document["model"]["merges"].append("er er")


def test_a_tokenizer_model_with_less_pieces_is_not_used(tmp_path: Path) -> None:
    source = make.changed(make.converted(tmp_path / "source"), one_piece_more)
    found = vocabulary(source, 2049)
    assert found["tokenizer.ggml.token_type"].value[-1] == 1 and found["tokenizer.ggml.tokens"].value[-1] == "erer"
    make.expect_same(source, made := make.from_metadata(found, tmp_path / "made"))
    assert Tokenizer.from_folder(made).encode("xerer")[-1] == 2048


def test_tokenizer_json_goes_before_a_tokenizer_model_that_differs(tmp_path: Path) -> None:
    """Merges turned round, beside the tokenizer.model that they no longer stand for, or one that cannot be read."""
    source = make.changed(make.converted(tmp_path / "source"), lambda document: document["model"]["merges"].reverse())
    made = make.rebuilt(source, 2048, tmp_path / "made")
    assert Tokenizer.from_folder(made).encode("The following") != Tokenizer.from_folder(NANO).encode("The following")
    (source / "tokenizer.model").write_bytes(b"no tokenizer")
    again = make.rebuilt(source, 2048, tmp_path / "again")
    ours = Tokenizer.from_folder(source)
    for text in make.TEXTS:
        ids = ours.encode(text, parse_special=True)
        assert all(Tokenizer.from_folder(one).encode(text, parse_special=True) == ids for one in (made, again))


BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}


def test_byte_level_tokenizers_are_refused(tmp_path: Path) -> None:
    document = {
        "version": "1.0", "added_tokens": [], "decoder": {**BYTE_LEVEL, "add_prefix_space": True},
        "pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: is byte-level BPE, .* written is SentencePiece's kind"):
        vocabulary(tmp_path, 3)


def test_what_a_gguf_cannot_say_is_told(tmp_path: Path) -> None:
    """A dummy blank before the first stretch alone: legacy=False, in either file."""
    source = make.changed(make.chatml(tmp_path / "json"), make.metaspace("first"))
    (remark,) = remarks(source, 2050)
    assert "tokenizer.json: llama.cpp will give other ids for ' a', [1327, 260] and not [260]" in remark
    source = make.chatml(tmp_path / "model", tokenizer="model")
    assert remarks(source, 2050) == ()
    finetunes.edit(source / "tokenizer_config.json", legacy=False)
    (remark,) = remarks(source, 2050)
    assert "tokenizer.model: llama.cpp will give other ids for 'a<s>b <s> c', [260, 1, 287, 1327, 1, 1327," in remark
