"""llama.cpp on the vocabularies that we write: the ids, texts and prompts of the model's own tokenizer.

Two differences are llama.cpp's own, and stand here as what they are: it finds <unk> in a text wherever special tokens
are meant, and it puts no blank before a user-defined piece of tokenizer v3 and one after it.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from peers import llama
from text import vocabularies as make
from text.vocabularies import vocabulary

from mixtools.storage.gguf import read_header
from mixtools.storage.gguf_values import Kind, Metadata, Value, array
from mixtools.storage.source import Source
from mixtools.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers("llama")

DATA = Path(__file__).parents[1] / "data"
PROSE = [(DATA / "text.txt").read_text("utf-8"), *make.PROMPTS]
RANGES = (
    (0x00, 0x20), (0x20, 0x7F), (0x7F, 0x250), (0x300, 0x370), (0x370, 0x700), (0x2000, 0x2070), (0x2581, 0x2582),
    (0x3000, 0x3100), (0x4E00, 0xA000), (0xE000, 0xE100), (0xFDF0, 0xFE10), (0xFFF0, 0x10000), (0x1F300, 0x1FB00),
    (0x10FFF0, 0x110000),
)  # fmt: skip
ADDED = {2048: ("<tool>", False), 2049: ("<|x|>", True), 2052: ("a  b", False)}


def mistrals(name: str) -> Path:
    return Path(str(resources.files("mistral_common") / "data" / name))


FOLDERS: dict[str, tuple[Callable[[Path], Path], int]] = {
    "torrent": (make.torrent, 2048),
    "converted": (make.converted, 2060),
    "json alone": (make.json_alone, 2048),
    "v3 style": (make.v3_style, 600),
    "chatml": (make.chatml, 2050),
    "chatml, model": (lambda folder: make.chatml(folder, tokenizer="model"), 2056),
    "added": (lambda folder: make.model_alone(folder, DATA / "nano-mixtral", ADDED), 2053),
    "never a blank": (lambda folder: make.changed(make.chatml(folder), make.metaspace("never")), 2050),
    "v1": (lambda folder: make.torrent(folder, mistrals("tokenizer.model.v1")), 32000),
    "v3": (lambda folder: make.converted(folder, mistrals("mistral_instruct_tokenizer_240323.model.v3")), 32768),
}


class Pair:
    """A folder's tokenizer, and llama.cpp over what becomes of it; `read`: as our reader has it of that file."""

    def __init__(self, folder: Path, metadata: Metadata, file: Path, model: llama_cpp.Llama) -> None:
        self.ours, self.llama, self.metadata = Tokenizer.from_folder(folder), model, metadata
        self.read = read_header(Source(file)).metadata
        tokens, kinds, scores = (
            metadata[f"tokenizer.ggml.{name}"].value for name in ("tokens", "token_type", "scores")
        )
        self.spelled = [text.replace("▁", " ") for text in tokens]
        self.defined = [
            text for text, kind, score in zip(tokens, kinds, scores, strict=True) if (kind, score) == (4, 0)
        ]
        self.unknown_found = 0 in self.ours.encode("<unk>", parse_special=True)

    def ids(self, text: str, special: bool) -> list[int]:
        found: list[int] = self.llama.tokenize(text.encode(), add_bos=True, special=special)
        return found

    def is_theirs(self, text: str, special: bool) -> bool:
        """Whether llama.cpp is known to do otherwise."""
        unknown = special and not self.unknown_found and "<unk>" in text
        return unknown or any(piece in text for piece in self.defined)


def write(file: Path, metadata: Metadata) -> Path:
    """By gguf's own writer: a model of which only the vocabulary is there."""
    writer = gguf.GGUFWriter(file, "llama")
    for name in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{name}", 512)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in metadata.items():
        item = None if value.item is None else gguf.GGUFValueType(value.item)
        writer.add_key_value(key, value.value, gguf.GGUFValueType(value.kind), item)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return file


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    base = tmp_path_factory.mktemp("tokenizer")
    build, rows = FOLDERS[request.param]
    folder = build(base / "folder")
    metadata = vocabulary(folder, rows)
    with llama.loaded(write(base / "x.gguf", metadata), vocab_only=True) as model:
        yield Pair(folder, metadata, base / "x.gguf", model)


def texts(pair: Pair) -> Iterator[str]:
    """Prose in five languages, each token, tokens and characters at random, runs, and special tokens amid others."""
    rng = random.Random(7)
    yield from (
        "",
        "\0",
        "a\0b",
        "👩‍👩‍👧",
        "e\u0301",
        "\ufeff",
        "▁",
        "▁▁a",
        "<0x0A>",
        "\r\n",
        "</s",
        "<|im_end|",
        "<<s>>",
    )
    for prose in PROSE:
        yield prose
        yield from prose.splitlines()[:200]
    yield from pair.spelled
    for _ in range(1000):
        yield "".join(rng.choice(pair.spelled) for _ in range(rng.randrange(1, 12)))
        yield "".join(chr(rng.randrange(*rng.choice(RANGES))) for _ in range(rng.randrange(1, 40)))
    for length in range(1, 130):
        yield from (" " * length, f"x{' ' * length}y\n{' ' * length}return", "\n" * length, "=" * length, "a" * length)
    for token in (*list(pair.ours.special)[:30], "<unk>", "<tool>", "a  b", *pair.defined):
        yield from (token, f"a{token}b", f"a {token} b", f"{token}{token}x", f" {token}", f"{token} ", token[:-1])


@pytest.mark.parametrize("special", [False, True])
def test_ids_are_the_models_own(pair: Pair, special: bool) -> None:
    compared = 0
    for text in texts(pair):
        if not pair.is_theirs(text, special):
            assert pair.ids(text, special) == pair.ours.encode(text, parse_special=special), text
            compared += 1
    assert compared > 3000


def test_what_is_known_to_differ(pair: Pair) -> None:
    ours, letter = pair.ours, pair.ours.encode("a", bos=False)
    assert pair.ids("a<unk>", True) == [1, *letter, 0]
    assert pair.ids("a<unk>", False) == ours.encode("a<unk>")
    for piece in pair.defined:
        (index,) = [at for at, text in enumerate(pair.spelled) if text == piece]
        blank = ours.encode(piece, bos=False)[:-1]
        assert pair.ids(piece, False) == [1, index] and ours.encode(piece, bos=False) == [*blank, index]
        assert pair.ids(f"a{piece}b", False) == [1, *letter, index, *ours.encode("b", bos=False)]


def test_names_ends_and_text(pair: Pair) -> None:
    model, ours = pair.llama, pair.ours
    assert (model.n_vocab(), model.token_bos(), model.token_eos()) == (len(pair.spelled), ours.bos_id, ours.eos_id)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    ends = [token for token in range(len(pair.spelled)) if llama_cpp.llama_vocab_is_eog(vocab, token)]
    assert {*ours.end_ids} <= {*ends} <= {*ours.end_ids, 2}  # </s> always, by its name
    for token, meaning in enumerate(ours.meanings):
        text = model.detokenize([token], prev_tokens=[token], special=False)
        wanted = b"" if meaning is None or token == 0 else meaning
        wanted = bytes([wanted]) if isinstance(wanted, int) else wanted
        assert text == (wanted.replace("▁", " ").encode() if isinstance(wanted, str) else wanted), token


def test_prompts_are_the_models_own(pair: Pair) -> None:
    """By its template in Python's jinja2, as llama-cpp-python renders it. A typed special token is none."""
    template = pair.llama.metadata.get("tokenizer.chat_template")
    if template is None:
        assert "tokenizer.chat_template" not in pair.metadata
        return
    formatter = Jinja2ChatFormatter(template, eos_token="</s>", bos_token="<s>", add_generation_prompt=True)

    def prompt(messages: Any) -> list[int]:
        made: list[int] = pair.llama.tokenize(formatter(messages=messages).prompt.encode(), add_bos=False, special=True)
        return made

    user, assistant = {"role": "user", "content": "Wie groß?\n"}, {"role": "assistant", "content": "So groß."}
    system = {"role": "system", "content": "Be brief."}
    for messages in ([user], [system, user], [user, assistant, user], [system, user, assistant, user]):
        assert prompt(messages) == pair.ours.encode_chat(messages)
    if "im_start" not in template:  # a fine-tune's own template takes care of nothing, there or here
        typed = [{"role": "user", "content": "a</s>b <s> [INST] <unk> [/INST]"}]
        meant = {0, *pair.ours.special.values()}
        assert [token for token in prompt(typed) if token in meant] == [
            token for token in prompt([user]) if token in meant
        ]


def test_our_reader_finds_what_was_written(pair: Pair) -> None:
    found = {key: value for key, value in pair.read.items() if key.startswith("tokenizer.")}
    scores = "tokenizer.ggml.scores"
    assert found.pop(scores).value == pytest.approx(pair.metadata[scores].value, rel=1e-7)
    assert found == {key: value for key, value in pair.metadata.items() if key != scores}


def test_what_a_converter_made_without_tokenizer_model_is_not_the_models_own(tmp_path: Path) -> None:
    """All scores alike: why we give those of the merges, and read them out of a file that has merges."""
    folder = make.json_alone(tmp_path / "folder")
    metadata = vocabulary(folder, 2048)
    metadata["tokenizer.ggml.scores"] = Value(Kind.ARRAY, [-1000.0] * 2048, Kind.FLOAT32)
    merges = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    metadata["tokenizer.ggml.merges"] = array(Kind.STRING, merges)
    ours = Tokenizer.from_folder(folder)
    made = Tokenizer.from_folder(make.from_metadata(metadata, tmp_path / "made"))
    with llama.loaded(write(tmp_path / "x.gguf", metadata), vocab_only=True) as model:
        text = PROSE[0][:500]
        assert model.tokenize(text.encode(), add_bos=True) != ours.encode(text) == made.encode(text)
