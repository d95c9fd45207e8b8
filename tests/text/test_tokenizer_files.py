"""tokenizer.json against SentencePiece: the same ids for every text, through transformers and through tokenizers."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from mixtools import config as configs
from mixtools.errors import TokenizerError
from mixtools.text.chat import MARKER
from mixtools.text.pieces import _fields
from mixtools.text.tokenizer import hf_files

HERE = Path(__file__).parents[1]
MISTRAL = Path(str(resources.files("mistral_common") / "data"))
MODELS = {
    "nano": HERE / "data" / "nano-mixtral" / "tokenizer.model",
    "v1": MISTRAL / "tokenizer.model.v1",
    "v3": MISTRAL / "mistral_instruct_tokenizer_240323.model.v3",
}
LANGUAGES = [str(text) for text in json.loads((HERE / "data" / "prompts.json").read_text("utf-8")).values()]
CODE = [file.read_text("utf-8") for file in (Path(configs.__file__), Path(sentencepiece.__file__), Path(__file__))]
STRANGE = ("é", "e\u0301", "👩‍👩‍👧", "\0", "\ufeff")
RANGES = (
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x300, 0x370), (0x370, 0x530), (0x590, 0x700), (0x900, 0x980),
    (0x2000, 0x2070), (0x2190, 0x2600), (0x2581, 0x2582), (0x3000, 0x3100), (0x4E00, 0xA000), (0xAC00, 0xD7A4),
    (0xE000, 0xE100), (0xFDD0, 0xFDF0), (0xFE00, 0xFE10), (0xFFF0, 0x10000), (0x1F300, 0x1FB00), (0x10FFF0, 0x110000),
)  # fmt: skip


def texts(seed: int, count: int, pieces: list[str]) -> Iterator[str]:
    """Cuts of prose and code, random characters and pieces, runs, and prose with blanks and accents made stranger."""
    rng = random.Random(seed)
    sources = LANGUAGES + CODE

    def cut(longest: int) -> str:
        source = rng.choice(sources)
        start = rng.randrange(len(source))
        return source[start : start + rng.randrange(1, longest)]

    makers = (
        lambda: cut(300),
        lambda: "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 60))),
        lambda: "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 30))),
        lambda: "".join(rng.choice(" \n\t\r=-_*#.a/\\") * rng.randrange(1, 40) for _ in range(rng.randrange(1, 8))),
        lambda: "".join(rng.choice(rng.choice((" a", "ab", "= ", "\r\n", " \r"))) for _ in range(rng.randrange(1, 99))),
        lambda: cut(200).replace(" ", " " * rng.randrange(1, 20)).replace("e", rng.choice(STRANGE)),
    )
    for number in range(count):
        yield makers[number % len(makers)]()


class Pair:
    """A written folder and SentencePiece over the file that it was written from."""

    def __init__(self, model: Path, folder: Path) -> None:
        files = hf_files(model)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        self.folder = folder
        self.reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))
        self.hub: Any = AutoTokenizer.from_pretrained(folder)
        self.backend: Any = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
        self.backend.encode_special_tokens = True
        ids = range(self.reference.get_piece_size())
        self.pieces = [self.reference.id_to_piece(index).replace("▁", " ") for index in ids]
        self.control = [self.pieces[i] for i in ids if self.reference.is_control(i) or self.reference.is_unknown(i)]

    def typed_control(self, text: str) -> bool:
        return any(token in text for token in self.control)

    def check(self, text: str) -> None:
        ids = self.reference.encode(text)
        assert self.backend.encode(text, add_special_tokens=False).ids == ids
        if not self.typed_control(text):  # the loader takes those for the tokens themselves
            assert self.hub(text)["input_ids"] == [1, *ids]
            assert self.hub.decode([1, *ids], skip_special_tokens=True) == self.reference.decode(ids)
            assert self.hub.decode(ids) == self.reference.decode(ids)


@pytest.fixture(scope="module", params=MODELS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(MODELS[request.param], tmp_path_factory.mktemp(request.param))


def test_ids_equal_sentencepieces_on_seeded_texts(pair: Pair) -> None:
    for text in texts(seed=7, count=4000, pieces=pair.pieces):
        pair.check(text)


@settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=80) | st.text(alphabet=" \t\n\rab=_▁é€<>[]", max_size=60))
def test_ids_equal_sentencepieces_on_hypothesis_texts(pair: Pair, text: str) -> None:
    if MARKER not in text:
        pair.check(text)


def test_ids_equal_sentencepieces_on_edges(pair: Pair) -> None:
    halves = (MARKER[0], MARKER[1], MARKER[::-1])
    for text in ("", " ", "  ", "\0", "▁", "▁▁a", *halves, "<0x0A>", "\u0301", "\U0010ffff", "a" * 5000):
        pair.check(text)
    for length in range(1, 130):
        pair.check(" " * length)
        pair.check(f"x{' ' * length}y\n{' ' * length}return")


def test_only_the_marker_itself_is_lost(pair: Pair) -> None:
    assert pair.hub(f"a{MARKER}b")["input_ids"] == pair.hub("ab")["input_ids"]


def test_texts_of_reserved_names_equal_sentencepieces(pair: Pair) -> None:
    """Control tokens, byte pieces and user-defined pieces as somebody might type them, side by side."""
    rng = random.Random(3)
    names = [piece for piece in pair.pieces if piece[0] in "<[" and piece[-1] in ">]"]
    defined = [f"[REFERENCE_DOC_{number}]" for number in range(20)]
    for _ in range(2000):
        parts = [rng.choice(rng.choice((names, defined, [" ", "a", "<", "["]))) for _ in range(rng.randrange(1, 7))]
        text = "".join(parts)
        assert pair.backend.encode(text, add_special_tokens=False).ids == pair.reference.encode(text), text


def test_loader_finds_what_it_needs(pair: Pair) -> None:
    hub = pair.hub
    assert len(hub) == pair.reference.get_piece_size()
    assert (hub.bos_token_id, hub.eos_token_id, hub.unk_token_id) == (1, 2, 0)
    assert hub.padding_side == "left"
    assert list(hub("a")) == ["input_ids", "attention_mask"]
    assert hub("a", "b")["input_ids"] == [1, *pair.reference.encode("a"), 1, *pair.reference.encode("b")]
    assert hub("a</s>b")["input_ids"] == [1, *pair.reference.encode("a"), 2, *pair.reference.encode("b")]


def test_loads_the_same_beside_a_mixtrals_config(pair: Pair, tmp_path: Path) -> None:
    """The model type sends the loader down another path than a folder of tokenizer files alone."""
    for file in pair.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shape = configs.MixtralConfig(8, 8, 1, 2, 1, 4, pair.reference.get_piece_size())
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf("bfloat16")))
    hub = AutoTokenizer.from_pretrained(tmp_path)
    for text in texts(seed=8, count=300, pieces=pair.pieces):
        if not pair.typed_control(text):
            assert hub(text)["input_ids"] == [1, *pair.reference.encode(text)]
    hub.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    chat = [{"role": "user", "content": "a </s> [INST] b"}]
    assert again.apply_chat_template(chat) == pair.hub.apply_chat_template(chat)


def test_an_old_loader_makes_no_token_types_either(pair: Pair) -> None:
    """transformers 4.40 would add token_type_ids, which a Mixtral's forward refuses; newer ones do not show it."""
    document = json.loads((pair.folder / "tokenizer_config.json").read_text())
    assert document["model_input_names"] == ["input_ids", "attention_mask"]
    assert document["clean_up_tokenization_spaces"] is False


@pytest.mark.parametrize("name", MODELS)
def test_bytes_are_the_same_each_time_and_the_model_is_copied(name: str) -> None:
    first, second = hf_files(MODELS[name]), hf_files(MODELS[name])
    assert first == second
    assert set(first) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model"}
    assert first["tokenizer.model"] == MODELS[name].read_bytes()


def train(folder: Path, **options: Any) -> Path:
    """A small tokenizer.model; options override those that make it like Mixtral's."""
    rng = random.Random(1)
    units = ("ab", "aab", "a b", "=-", "ba ")
    lines = [rng.choice(units) * rng.randrange(1, 12) + rng.choice("abc ") for _ in range(300)]
    defaults: dict[str, Any] = {
        "model_type": "bpe",
        "vocab_size": 310,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "allow_whitespace_only_pieces": True,
        "hard_vocab_limit": False,
        "minloglevel": 3,
    }
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=out, **{**defaults, **options})
    file = folder / "tokenizer.model"
    file.write_bytes(out.getvalue())
    return file


@pytest.mark.parametrize("defined", [[], ["[X]", "[XY]"], ["ba", "<s>x"], ["aa"]])
def test_user_defined_pieces_and_periodic_text_equal_sentencepieces(defined: list[str], tmp_path: Path) -> None:
    """Few letters and much repetition: here ties between merges, and pieces inside pieces, are the rule."""
    pair = Pair(train(tmp_path, user_defined_symbols=defined, control_symbols=["[INST]", "[/INST]"]), tmp_path)
    rng = random.Random(2)
    parts = [*defined, "a", "b", "ab", "aab", "=", "-", " ", "<s>", "[INST]", "<0x0A>", "é"]
    for _ in range(3000):
        text = "".join(rng.choice(parts) * rng.choice((1, 1, 2, 5, 9)) for _ in range(rng.randrange(1, 9)))
        assert pair.backend.encode(text, add_special_tokens=False).ids == pair.reference.encode(text), text


def with_pieces(folder: Path, scores: dict[str, float]) -> Path:
    """The nano tokenizer with these pieces in place of its own, in the bytes of the format."""

    def field(number: int, data: bytes) -> bytes:
        size = bytes([len(data)]) if len(data) < 128 else bytes([len(data) & 127 | 128, len(data) >> 7])
        return bytes([number << 3 | 2]) + size + data

    fields = [(number, value) for number, value in _fields(MODELS["nano"].read_bytes()) if isinstance(value, bytes)]
    reserved = [value for number, value in fields if number == 1][:259]  # <unk>, <s>, </s> and the bytes
    own = [field(1, text.encode()) + b"\x15" + struct.pack("<f", score) for text, score in scores.items()]
    rest = b"".join(field(number, value) for number, value in fields if number != 1)
    file = folder / "tokenizer.model"
    file.write_bytes(b"".join(field(1, piece) for piece in reserved + own) + rest)
    return file


def random_pieces(rng: random.Random) -> list[str]:
    words = {rng.choice(("", "▁")) + "".join(rng.choice("ab") for _ in range(rng.randrange(2, 7))) for _ in range(20)}
    return ["a", "b", "▁", *sorted(words)]


def check_letters(file: Path, rng: random.Random) -> None:
    backend: Any = tokenizers.Tokenizer.from_str(hf_files(file)["tokenizer.json"].decode())
    reference: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for _ in range(300):
        text = "".join(rng.choice("ab ") * rng.choice((1, 1, 2, 3, 7)) for _ in range(rng.randrange(1, 12)))
        assert backend.encode(text, add_special_tokens=False).ids == reference.encode(text), text


def test_scores_in_any_order_equal_sentencepieces(tmp_path: Path) -> None:
    """No trainer would give such scores: parts may score below the whole, and pieces overlap in every way."""
    rng = random.Random(5)
    for _ in range(40):
        pieces = random_pieces(rng)
        check_letters(
            with_pieces(tmp_path, dict(zip(pieces, rng.sample(range(-999, 0), len(pieces)), strict=True))), rng
        )


def test_runs_of_equal_score_equal_sentencepieces(tmp_path: Path) -> None:
    rng = random.Random(6)
    for _ in range(40):
        runs = [letter * length for letter in "a▁" for length in range(2, 9) if rng.random() < 0.7]
        check_letters(with_pieces(tmp_path, dict.fromkeys(["a", "b", "▁", *runs], -1e9)), rng)


def test_other_pieces_of_equal_score_are_refused(tmp_path: Path) -> None:
    file = with_pieces(tmp_path, {"a": 0.0, "b": 0.0, "▁": 0.0, "aab": -1.0, "ab": -2.0, "aba": -1.0})
    with pytest.raises(TokenizerError, match=r"'aba', has the score of 'aab', -1\.0"):
        hf_files(file)


REFUSED = {
    "only BPE": {"model_type": "unigram"},
    "rule table": {"normalization_rule_name": "nmt_nfkc"},
    "byte fallback": {"byte_fallback": False, "hard_vocab_limit": False},
    "dummy prefix": {"add_dummy_prefix": False},
    "extra blanks": {"remove_extra_whitespaces": True},
    "end of words": {"treat_whitespace_as_suffix": True},
    "over a blank": {"split_by_whitespace": False},
    "holds a blank": {"user_defined_symbols": ["x y"]},
    "lacks the control token </s>": {"eos_id": -1},
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_tokenizers_are_refused(message: str, tmp_path: Path) -> None:
    file = train(tmp_path, **REFUSED[message])
    with pytest.raises(TokenizerError, match=message) as caught:
        hf_files(file)
    assert str(caught.value).startswith(str(file))


def test_a_wrong_conversion_is_caught_before_it_is_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Merges by id, which a loader that ignores the scores would make."""
    from mixtools.text import tokenizer_files

    right = tokenizer_files._merges
    monkeypatch.setattr(tokenizer_files, "_merges", lambda pieces: list(reversed(right(pieces))))
    with pytest.raises(TokenizerError, match="would encode"):
        hf_files(MODELS["nano"])
