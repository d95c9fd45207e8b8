"""Special tokens in a text that is measured, and tokens that the model has no row for, against transformers."""

from __future__ import annotations

import json
from pathlib import Path

import finetunes
import pytest
import torch

import mixtools
from mixtools.errors import TokenizerError

TEXT = "<|im_start|>user\nThe following commands are not removed.<|im_end|>\n<|im_start|>assistant\nThe same time. " * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes.chatml(tmp_path_factory.mktemp("special") / "chatml")


@pytest.mark.parametrize("meant", [True, False])
def test_perplexity_of_a_text_with_special_tokens(folder: Path, tmp_path: Path, meant: bool) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([tokenizer(TEXT, split_special_tokens=not meant)["input_ids"]])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        nll = model(ids, labels=ids).loss.double()
    found = mixtools.perplexity(folder, file, ctx=ids.shape[1], dtype="f32", parse_special=meant)
    assert found.tokens == ids.shape[1] - 1
    assert found.perplexity == pytest.approx(float(nll.exp()), rel=1e-5)
    assert meant == (found.tokens == 132)


def test_a_token_without_a_row_is_refused_when_it_is_used_and_told_otherwise(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    more = {**document["added_tokens"][-1], "id": 2050, "content": "<|more|>", "special": False}
    source = finetunes.chatml(tmp_path / "source")
    document["added_tokens"].append(more)
    (source / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    told = mixtools.perplexity(source, file, ctx=64)
    assert any("2051 pieces for a model of 2050; ids from 2050 on ('<|more|>') cannot be used" in n for n in told.notes)
    out = tmp_path / "out"
    mixtools.convert(source, out)
    checked = mixtools.check(out, source, text=file, ctx=64, new_tokens=4)
    assert checked.verdict == "passed" and any("<|more|>" in remark for remark in checked.document["remarks"])
    file.write_text(TEXT + "<|more|>" + TEXT)
    for run in (
        lambda: mixtools.perplexity(source, file, ctx=64),
        lambda: mixtools.check(out, source, text=file, ctx=64),
        lambda: mixtools.generate(source, "Hello <|more|>"),
    ):
        with pytest.raises(TokenizerError, match=r"'<\|more\|>' has the id 2050, and the model has 2050 rows"):
            run()
    mixtools.perplexity(source, file, ctx=64, max_tokens=64)  # not among those
