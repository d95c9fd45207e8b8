"""Byte-level tokenizers, as the children of Llama 3 have them, against transformers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from mixtools.errors import TokenizerError
from mixtools.text import tokenizer as ours_in
from mixtools.text.decoding import byte_alphabet

DATA = Path(__file__).parents[1] / "data"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
TEXTS = (
    "",
    "The following",
    " two  blanks \n\n\ttab\r\n",
    "Wie groß ist die Übertragung? 漢字 👩‍👩‍👧 e\u0301 \u200b\0",
    "<|eot_id|>a<|begin_of_text|>",
    "a <tool>x</tool> b",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend: Any = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(json.loads((DATA / "prompts.json").read_text("utf-8")).values(), trainer)
    backend.add_special_tokens(SPECIAL)
    backend.add_tokens(["<tool>", "</tool>", "<größe▁>"])
    bos = backend.token_to_id(SPECIAL[0])
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{SPECIAL[0]} $A", special_tokens=[(SPECIAL[0], bos)]),
        ]
    )
    folder = tmp_path_factory.mktemp("byte-level")
    backend.save(str(folder / "tokenizer.json"))
    tokens = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": TEMPLATE}))
    ends = [backend.token_to_id(text) for text in SPECIAL[1:3]]
    config = {"model_type": "mixtral", "bos_token_id": bos, "eos_token_id": ends}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> ours_in.Tokenizer:
    return ours_in.Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def hub(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def test_ids_bos_eos_and_ends(ours: ours_in.Tokenizer, hub: Any) -> None:
    assert ours.vocab_size == len(hub) and ours.remarks == ()
    assert (ours.bos_id, ours.eos_id) == (hub.bos_token_id, hub.eos_token_id)
    assert ours.end_ids == tuple(hub.convert_tokens_to_ids(SPECIAL[1:3]))
    for text in TEXTS:
        assert ours.encode(text, parse_special=True) == hub(text)["input_ids"], text
        assert ours.encode(text) == [ours.bos_id, *hub(text, split_special_tokens=True)["input_ids"][1:]]
        assert ours.decode(ours.encode(text)) == text


def test_special_tokens_are_text_unless_asked_for(ours: ours_in.Tokenizer) -> None:
    assert ours.special.keys() == {*SPECIAL}
    assert not {*ours.special.values()} & {*ours.encode("".join(SPECIAL), bos=False)}
    meant = ours.encode("".join(SPECIAL), bos=False, parse_special=True)
    assert meant == [ours.special[text] for text in SPECIAL]
    assert ours.decode(meant) == ""


def test_a_conversation_equals_transformers(ours: ours_in.Tokenizer, hub: Any) -> None:
    messages = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hé <|eot_id|>"}]
    expected = hub.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ours.encode_chat(messages) == expected


def test_any_ids_decode_as_transformers_does(ours: ours_in.Tokenizer, hub: Any) -> None:
    rng = random.Random(3)
    added = [hub.convert_tokens_to_ids(text) for text in ("<tool>", "</tool>", "<größe▁>", *SPECIAL)]
    for _ in range(3000):
        pools = (range(len(hub)), range(256), added)
        ids = [rng.choice(rng.choice(pools)) for _ in range(rng.randrange(0, 12))]
        assert ours.decode(ids) == hub.decode(ids, skip_special_tokens=True), ids


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(text=st.text(max_size=40))
def test_text_comes_back_and_whole_characters_come_out_at_once(ours: ours_in.Tokenizer, text: str) -> None:
    stream, shown = ours.stream(), ""
    for token in ours.encode(text):
        shown += stream.push(token)
        assert text.startswith(shown)  # never half a character
    assert shown == text and stream.finish() == ""


def test_a_character_cut_short_comes_out_in_the_end(ours: ours_in.Tokenizer) -> None:
    stream = ours.stream()
    ids = ours.encode("漢", bos=False)
    assert len(ids) == 3  # no merge of the small training text has it
    assert [stream.push(token) for token in ids] == ["", "", "漢"]
    assert [stream.push(token) for token in ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_the_alphabet_is_the_tokenizers_packages() -> None:
    assert {*byte_alphabet()} == {*pre_tokenizers.ByteLevel.alphabet()}
    assert sorted(byte_alphabet().values()) == list(range(256))


def test_bos_without_any_name_is_the_post_processors(folder: Path, tmp_path: Path, ours: ours_in.Tokenizer) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    alone = ours_in.Tokenizer.from_folder(tmp_path)
    assert alone.bos_id == ours.bos_id and alone.eos_id is None and alone.end_ids == ()
    document = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    document["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    without = ours_in.Tokenizer.from_folder(tmp_path)
    assert without.encode("The") == without.encode("The", bos=False)
    with pytest.raises(TokenizerError, match="no token for the beginning of a text"):
        _ = without.bos_id
    (tmp_path / "config.json").write_text('{"bos_token_id": 5}')
    assert ours_in.Tokenizer.from_folder(tmp_path).bos_id == 5


def test_encode_instruct_needs_mistrals_tokens(ours: ours_in.Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="lacks the control token </s> and <s>"):
        ours.encode_instruct([{"role": "user", "content": "a"}])
