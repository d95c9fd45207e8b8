"""mixtools.generate on a ChatML fine-tune, against transformers: where it stops, how it talks, what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finetunes
import pytest
import torch
from calling import called
from mixtral_oracle import DATA
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import mixtools
from mixtools import machine
from mixtools.api.generating import talker
from mixtools.errors import TokenizerError, UsageError

HELLO = [{"role": "user", "content": "Hello"}]
CONVERSATIONS = (
    HELLO,
    [{"role": "system", "content": "Le programme"}, *HELLO],
    [*HELLO, {"role": "assistant", "content": "Hi."}, {"role": "user", "content": "a<|im_end|>b </s> é"}],
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes.chatml(tmp_path_factory.mktemp("chatml") / "model")


def copied(folder: Path, out: Path) -> Path:
    return Path(shutil.copytree(folder, out / "copy"))


def theirs(folder: Path, ids: Sequence[int], new: int) -> list[int]:
    """transformers' greedy continuation, without the end of text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = torch.tensor([ids])
    made = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new, pad_token_id=0)
    ends = model.generation_config.eos_token_id
    found: list[int] = made[0, len(ids) :].tolist()
    return found[:-1] if found[-1] in (ends if isinstance(ends, list) else [ends]) else found


def ours(folder: Path, prompt: str, **options: Any) -> mixtools.api.generating.Generated:
    return mixtools.generate(folder, prompt, dtype="f32", **options)


def run(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixtools", "generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, input=stdin)


@pytest.mark.parametrize("tokenizer", ["json", "model"])
def test_it_stops_at_the_models_own_end(tokenizer: str, tmp_path: Path) -> None:
    folder = finetunes.chatml(tmp_path / "model", tokenizer=tokenizer)
    made = ours(folder, "The following")
    assert made.tokens == (895, 1343, 13) == tuple(theirs(folder, [1, 421, 281, 1291, 300], 20))
    assert made.text == " command.\n"


@pytest.mark.parametrize(
    ("config", "generation", "length"),
    [
        (2, 2048, 3),
        (2, [7, 2048], 3),
        (2048, 2, 12),
        ([2, 2048], "absent", 3),
        (2048, "absent", 3),
        ([2], "absent", 12),
    ],
)
def test_ends_are_those_of_generation_config_else_of_config(
    config: Any, generation: Any, length: int, folder: Path, tmp_path: Path
) -> None:
    copy = copied(folder, tmp_path)
    finetunes.edit(copy / "config.json", eos_token_id=config)
    finetunes.edit(copy / "generation_config.json", eos_token_id=generation)
    if generation == "absent":
        (copy / "generation_config.json").unlink()
    made = ours(copy, "The following", max_new_tokens=12)
    assert made.tokens == tuple(theirs(copy, [1, 421, 281, 1291, 300], 12))
    assert len(made.tokens) == length


def test_conversations_equal_transformers_token_for_token(folder: Path) -> None:
    hub = AutoTokenizer.from_pretrained(folder)
    ready = talker(folder, dtype="f32", max_new_tokens=24)
    lengths = set()
    for messages in CONVERSATIONS:
        ids = hub.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ready.ids(messages) == ids
        made = ready.answer(messages)
        assert list(made.tokens) == theirs(folder, ids, 24)
        assert made.prompt_tokens == len(ids)
        lengths.add(len(made.tokens))
    assert min(lengths) < 24  # one at least ends by itself
    assert ours(folder, "Hello", chat=True, max_new_tokens=24).tokens == ready.answer(HELLO).tokens
    told = ours(folder, "Hello", chat=True, system="Le programme", max_new_tokens=24)
    assert told.tokens == ready.answer(CONVERSATIONS[1]).tokens != ready.answer(HELLO).tokens


def test_a_stop_text_is_left_out_also_when_tokens_share_it(folder: Path) -> None:
    whole = ours(folder, "Hello", chat=True, max_new_tokens=24)
    assert len(whole.tokens) > 8
    stop = whole.text[5:19]
    assert whole.text.count(stop) == 1 and len(stop.split()) > 1
    for stops in ([stop], ["never said", stop, stop + "x"]):
        pieces: list[str] = []
        made = ours(folder, "Hello", chat=True, max_new_tokens=24, stop=stops, on_text=pieces.append)
        assert made.text == "".join(pieces) == whole.text[:5]
        assert made.tokens == whole.tokens[: len(made.tokens)] and len(made.tokens) < len(whole.tokens)
    held = ours(folder, "Hello", chat=True, max_new_tokens=24, stop=[whole.text + "and more"])
    assert (held.text, held.tokens) == (whole.text, whole.tokens)


def test_a_special_token_stops_by_its_name(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    finetunes.edit(copy / "generation_config.json", eos_token_id=2)
    assert len(ours(copy, "The following", max_new_tokens=8).tokens) == 8
    assert ours(copy, "The following", max_new_tokens=8, stop=["<|im_end|>"]).tokens == (895, 1343, 13)


def test_special_tokens_in_a_prompt_are_meant_on_request(folder: Path) -> None:
    prompt = "<|im_start|>user"
    hub = AutoTokenizer.from_pretrained(folder)
    made = ours(folder, prompt, parse_special=True, max_new_tokens=6)
    assert made.prompt_tokens == 4
    assert list(made.tokens) == theirs(folder, hub(prompt)["input_ids"], 6)
    assert ours(folder, prompt, max_new_tokens=1).prompt_tokens == 12


def test_a_template_that_refuses_says_why(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    finetunes.edit(copy / "tokenizer_config.json", chat_template=template + finetunes.CHATML)
    assert (
        ours(copy, "Hello", chat=True, max_new_tokens=3).tokens
        == ours(folder, "Hello", chat=True, max_new_tokens=3).tokens
    )
    with pytest.raises(TokenizerError, match="refuses the conversation: System role not supported"):
        ours(copy, "Hello", chat=True, system="Be brief.")


def test_a_model_without_a_template_is_told_so(tmp_path: Path) -> None:
    folder = finetunes.chatml(tmp_path / "model", template=None)
    done = called("generate", folder, "--chat", "--prompt", "Hello")
    assert done.returncode == 3 and done.stdout == ""
    assert "has no chat template" in done.stderr and "--prompt" in done.stderr
    assert called("generate", folder, "--prompt", "Hello", "--max-new-tokens", 2).returncode == 0


def test_mistrals_own_folder_talks_in_mistrals_format() -> None:
    made = mixtools.generate(finetunes.NANO, "Hello", chat=True, max_new_tokens=2)
    again = mixtools.generate(finetunes.NANO, "[INST] Hello [/INST]", max_new_tokens=2)
    assert (made.tokens, made.prompt_tokens) == (again.tokens, again.prompt_tokens)


def test_tokens_that_the_model_has_no_row_for(tmp_path: Path) -> None:
    """A tokenizer with two more tokens beside the base model's weights: told, and refused where one is used."""
    folder = finetunes.chatml(tmp_path / "model", config={"vocab_size": 2048})
    weights = load_file(folder / "model.safetensors")
    for name in (finetunes.EMBED, finetunes.HEAD):
        weights[name] = weights[name][:2048].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    made = ours(folder, "The following", max_new_tokens=4)
    assert len(made.tokens) == 4
    assert any("2050 pieces for a model of 2048; ids from 2048 on ('<|im_end|>')" in note for note in made.notes)
    for options in ({"parse_special": True}, {"chat": True}):
        prompt = "Hello" if "chat" in options else "<|im_start|>user"
        with pytest.raises(
            TokenizerError, match=r"token '<\|im_start\|>' has the id 2049, and the model has 2048 rows"
        ):
            ours(folder, prompt, **options)


def test_a_padding_row_that_is_chosen_has_no_spelling(folder: Path, tmp_path: Path) -> None:
    copy = copied(folder, tmp_path)
    for name in ("tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"):
        (copy / name).unlink()
    finetunes.edit(copy / "generation_config.json", eos_token_id=2)
    pieces: list[str] = []
    made = ours(copy, "The following", max_new_tokens=5, on_text=pieces.append)
    assert made.tokens[:4] == (895, 1343, 13, 2048) and len(made.tokens) == 5
    assert made.text == "".join(pieces) and made.text.startswith(" command.\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "Be brief."}, "--system belongs to --chat"),
        ({"chat": True, "parse_special": True}, "--parse-special belongs to --prompt"),
        ({"stop": ["x", ""]}, "--stop needs a text"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_a_model_is_read(options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        mixtools.generate("no/such/folder", "Hello", **options)


def test_a_gguf_larger_than_memory_is_read_as_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And told of; a limit that was asked for is kept."""
    mixtools.quantize(DATA / "nano-mixtral", tmp_path, type="Q8_0", name="nano")
    common = tmp_path / "nano.Q8_0.gguf", "--prompt", "The following", "--max-new-tokens", 6
    expected = called("generate", *common)
    assert expected.returncode == 0 and "speed of the disk" not in expected.stderr
    monkeypatch.setattr(machine, "available_memory", lambda: 2_000_000)
    found = called("generate", *common)
    assert (found.returncode, found.stdout) == (0, expected.stdout)
    assert "and 2.00 MB of memory are free" in found.stderr and "at the speed of the disk" in found.stderr
    monkeypatch.setattr(machine, "peak_memory", lambda: 100_000_000)
    found = called("generate", *common, "--max-memory", "110MB")
    assert (found.returncode, found.stdout) == (0, expected.stdout) and "speed of the disk" not in found.stderr
    found = called("generate", *common, "--max-memory", "102MB")
    assert found.returncode == 5 and "exceeds the memory allowed" in found.stderr


def test_the_command(folder: Path) -> None:
    whole = ours(folder, "Hello", chat=True, max_new_tokens=24)
    stop = whole.text[5:19]
    common = ("--dtype", "f32", "--max-new-tokens", 24)
    shown = run(folder, "--chat", "--prompt", "Hello", "--stop", "never said", "--stop", stop, *common, "--quiet")
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, whole.text[:5] + "\n", "")
    told = json.loads(
        called("generate", folder, "--prompt", "<|im_start|>user", "--parse-special", *common, "--json").stdout
    )
    assert told["prompt_tokens"] == 4
    assert called("generate", folder, "--prompt", "Hello", "--system", "x").returncode == 2
    assert called("generate", folder, "--chat", "--parse-special").returncode == 2


def test_a_conversation_from_standard_input_begins_with_the_system_message(folder: Path) -> None:
    ready = talker(folder, dtype="f32", max_new_tokens=12)
    messages: list[dict[str, object]] = [{"role": "system", "content": "Be brief."}]
    expected = ""
    for line in ("The following", "Hello"):
        messages.append({"role": "user", "content": line})
        text = ready.answer(messages).text
        messages.append({"role": "assistant", "content": text.strip()})
        expected += text + "\n"
    done = run(
        folder, "--chat", "--system", "Be brief.", "--dtype", "f32", "--max-new-tokens", 12, "--quiet",
        stdin="The following\n\nHello\n",
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, expected)
