"""The chat template in a GGUF with Mixtral's two tokenizers (v1: 8x7B Instruct, v3: 8x22B Instruct), as a program on
llama.cpp applies it: rendered, then tokenized with special tokens meant, gives the ids of our own encoder.
"""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import llama_cpp
import pytest
from layouts import make
from llama_cpp import llama_cpp as library
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from peers import llama

import mixtools
from mixtools.text.tokenizer import Tokenizer

pytestmark = pytest.mark.peers("llama")

FILES = {"v1": "tokenizer.model.v1", "v3": "mistral_instruct_tokenizer_240323.model.v3"}
ROWS = {"v1": 32000, "v3": 32768}
SAYINGS = (
    "Hello", "Wie groß ist die Übertragung?", "¿Qué tal? 你好。世界 مرحبا", " one blank before", "one blank after ",
    "   three and two  ", "\nlines\n\nand\n", "\ttab\r\n\r\n", "def f(x):\n    return {'a': [x], \"b\": x << 2}\n",
    "😀👩‍👩‍👧 e\u0301 \u200b", "<0x0A> < s> </ s>",
)  # fmt: skip
TYPED = ("</s>", "a</s>b", "<s>", "[/INST]", "x [INST] y [/INST]</s><s>[INST]go")
Messages = list[dict[str, str]]


def say(*texts: str, system: str | None = None) -> Messages:
    first = [] if system is None else [{"role": "system", "content": system}]
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def conversations() -> Iterator[Messages]:
    for number, text in enumerate(SAYINGS):
        other = SAYINGS[number - 3]
        yield say(text)
        yield say(other, text, other)
        yield say(other, text, other, other, "", system=text)
        yield say(text, other)
    yield say(*SAYINGS)


class Served:
    """A model that llama.cpp has loaded, and the folder it was made from."""

    def __init__(self, folder: Path, model: llama_cpp.Llama) -> None:
        self.tokenizer, self.model = Tokenizer.from_folder(folder), model
        self.template = model.metadata["tokenizer.chat_template"]

    def ids(self, messages: Messages) -> list[int]:
        """As llama-cpp-python makes them of a chat."""
        names = (self.model.detokenize([one], special=True).decode() for one in (2, 1))
        made = Jinja2ChatFormatter(self.template, *names)(messages=messages)
        found: list[int] = self.model.tokenize(made.prompt.encode(), add_bos=not made.added_special, special=True)
        return found


@pytest.fixture(scope="module", params=FILES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp(request.param)
    make.write_a(folder, make.Dims(d=32, f=32, layers=1, heads=1, kv=1, hd=32, vocab=ROWS[request.param], experts=2))
    shutil.copyfile(str(resources.files("mistral_common") / "data" / FILES[request.param]), folder / "tokenizer.model")
    mixtools.quantize(folder, folder / "model.gguf", type=["F16"])
    with llama.loaded(folder / "model.gguf", n_ctx=64) as model:
        yield Served(folder, model)


def test_the_rendered_chat_has_our_ids(served: Served) -> None:
    for messages in conversations():
        assert served.ids(messages) == served.tokenizer.encode_chat(messages), messages


def test_what_a_user_types_ends_no_turn(served: Served) -> None:
    usual = served.ids(say("x", "x", "x"))
    control = {index for index in usual if served.model.detokenize([index]) == b""}
    assert {1, 2} <= control
    for text in TYPED:
        found = served.ids(say(text, text, text))
        assert [index for index in found if index in control] == [index for index in usual if index in control], text


def test_a_conversation_that_cannot_be_is_refused(served: Served) -> None:
    for messages in (say(), say(system="alone"), say("x", "") + say("y"), [{"role": "assistant", "content": "x"}]):
        with pytest.raises(ValueError, match=r"alternate|needs a user message|is empty"):
            served.ids(messages)


def test_llama_cpps_own_format_of_a_first_question(served: Served) -> None:
    """llama_chat_apply_template runs no template but takes a built-in format by its words: of v1 for a first question
    the right one; it has none with v3's ids, and puts one blank too many.
    """
    v1 = served.model.n_vocab() == ROWS["v1"]
    for text in SAYINGS:
        chat = (library.llama_chat_message * 1)(library.llama_chat_message(b"user", text.encode()))
        room = ctypes.create_string_buffer(1000)
        size = library.llama_chat_apply_template(served.template.encode(), chat, 1, True, room, 1000)
        found = served.model.tokenize(room.raw[:size], add_bos=True, special=True)
        if v1:
            assert found == served.tokenizer.encode_chat(say(text))
        else:
            assert size > 0 and found != served.tokenizer.encode_chat(say(text))
