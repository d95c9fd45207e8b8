"""Chat templates: rendered as transformers renders them, and which one of a folder is meant."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import finetunes
import pytest
from transformers import AutoTokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from mixtools.errors import TokenizerError
from mixtools.text.rendering import render
from mixtools.text.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief & <kind>."},
    {"role": "user", "content": "Hé, 'you' — {{ x }} {% y %}\n"},
    {"role": "assistant", "content": "  Yes. "},
    {"role": "user", "content": ""},
]
TEMPLATES = {
    "chatml": finetunes.CHATML,
    "blocks are trimmed": "  {% for m in messages %}\n    {% if m.role == 'user' %}\n  {{ m.content }}\n"
    "    {% endif %}\n{% endfor %}\nend\n",
    "break and continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}"
    "{% if loop.index == 3 %}{% break %}{% endif %}{% endfor %}",
    "generation": "{% for m in messages %}{% set x = loop.index %}{% generation %}{% set x = 9 %}{{ m.content }}{{ x }}"
    "{% endgeneration %}{{ x }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}"
    "{{ {'b': 'é', 'a': 1} | tojson(sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}",
    "variables": "{{ bos_token }}{{ add_generation_prompt }}{{ tools is none }}{{ documents }}{{ never }}"
    "{{ pad_token }}",
    "namespace": "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "no autoescape": "{{ messages[0]['content'] }}{{ '<&>' }}",
    "year": "{{ strftime_now('%Y') }}",
    "last newline": "a\n",
    "methods": "{{ messages[1].content.strip().split(' ')[-1] }}{{ messages[::-1][0].role }}{{ '%s' % 'x' }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_render_as_in_transformers(name: str) -> None:
    variables: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    expected, _ = render_jinja_template(
        [MESSAGES], chat_template=TEMPLATES[name], add_generation_prompt=True, **variables
    )
    assert render(TEMPLATES[name], MESSAGES, add_generation_prompt=True, **variables) == expected[0]


def test_the_date_is_todays() -> None:
    before = datetime.now().strftime("%d %b %Y")
    assert render("{{ strftime_now('%d %b %Y') }}", MESSAGES) in (before, datetime.now().strftime("%d %b %Y"))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must alternate') }}", "^Roles must alternate$"),
        ("{% if %}", "Expected an expression"),
        ("{{ messages[0].content + 1 }}", "^TypeError: "),
        ("{{ 1 // 0 }}", "^ZeroDivisionError: "),
        ("{{ messages.append(1) }}", "not safely callable|unsafe"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|__mro__"),
        ("{{ none.x.y }}", "undefined|has no attribute"),
        ("{% include 'x' %}", "no loader|^TypeError"),
    ],
)
def test_a_template_that_fails_says_why(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render(template, MESSAGES)


def test_messages_that_are_not_plain_data_are_refused() -> None:
    with pytest.raises(ValueError, match="not JSON serializable"):
        render("{{ messages }}", [{"role": "user", "content": Path()}])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes.chatml(tmp_path_factory.mktemp("chatml") / "model", template=None)


@pytest.mark.parametrize("template", ["config", "list", "jinja"])
@pytest.mark.parametrize("tokenizer", ["json", "model"])
def test_conversations_by_the_models_own_template_equal_transformers(
    template: str, tokenizer: str, tmp_path: Path
) -> None:
    expected = [2049, 395, 259, 13, 1394, 768, 2048, 1327, 13]  # see finetunes.py
    ours = Tokenizer.from_folder(finetunes.chatml(tmp_path / "a", template=template, tokenizer=tokenizer))
    hub = AutoTokenizer.from_pretrained(finetunes.chatml(tmp_path / "b", template=template))
    hello = [{"role": "user", "content": "Hello"}]
    assert hub.apply_chat_template(hello, return_dict=False) == expected
    assert ours.encode_chat(hello)[: len(expected)] == expected
    for messages in (hello, MESSAGES, [{"role": "user", "content": "a<|im_end|>b</s><s>"}]):
        assert ours.encode_chat(messages) == hub.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )


def test_a_file_of_its_own_goes_before_tokenizer_config(tmp_path: Path) -> None:
    folder = finetunes.chatml(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    ours, hub = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "Hello"}]
    assert ours.encode_chat(messages) == hub.apply_chat_template(messages, return_dict=False) == [1, 465, 768]


def test_a_model_without_a_template_gets_none(folder: Path) -> None:
    with pytest.raises(TokenizerError, match=r"has no chat template.*base model.*--prompt") as caught:
        Tokenizer.from_folder(folder).encode_chat([{"role": "user", "content": "Hello"}])
    assert caught.value.file == str(folder)


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "config.json"])
def test_tokenizer_model_beside_hugging_face_documents_means_no_instruct_format(
    kept: str, folder: Path, tmp_path: Path
) -> None:
    for name in ("tokenizer.model", kept):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(TokenizerError, match="no chat template"):
        Tokenizer.from_folder(tmp_path).encode_chat([{"role": "user", "content": "Hello"}])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            [{"name": "rag", "template": "x"}, {"name": "tools", "template": "y"}],
            "templates rag, tools, and no default",
        ),
        (["x"], "something other than named templates"),
        ([{"name": "default"}], "something other than named templates"),
        ({"default": "x"}, "not a text"),
        (3, "chat_template is 3, not a text"),
        ("{{ raise_exception('only two turns') }}", "refuses the conversation: only two turns"),
    ],
)
def test_templates_that_cannot_be_are_refused(value: object, message: str, folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    finetunes.edit(tmp_path / "tokenizer_config.json", chat_template=value)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"] == value
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path).encode_chat([{"role": "user", "content": "Hello"}])
