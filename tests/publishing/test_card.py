"""mixtools card: what it says, of what, where it may be written, and as huggingface_hub reads it."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from matplotlib import image
from publishing import made

import mixtools
from mixtools import errors
from mixtools.publishing import loaders
from mixtools.publishing.picture import Point, png
from mixtools.publishing.ways import Subject, ways
from mixtools.storage import checked, sealed

README = Path(__file__).parents[2] / "README.md"


def written(folder: Path, *outputs: Path, **options: str) -> tuple[str, ModelCard]:
    mixtools.card([*outputs] or [folder], **options)
    return (folder / "README.md").read_text(), ModelCard.load(folder / "README.md")


def test_of_a_set_of_ggufs(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    text, card = written(out, base_model="org/nano", repository="me/nano-GGUF", quantized_by="me")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"], data["library_name"]) == ("org/nano", "quantized", "gguf")
    assert (data["license"], data["language"], data["quantized_by"]) == ("apache-2.0", ["en", "de"], "me")
    assert data["tags"] == ["mixtral", "moe", "gguf", "mixtools", "small"]
    records = checked.load(out)
    for name, record in records.items():
        kld = record.document["kld"]["mean"]
        row = next(line for line in text.splitlines() if f"[{name}]" in line)
        assert f"{kld:.5f}" in row and f"{record.document['perplexity']['output']:.4f}" in row and "passed" in row
        assert f"{(out / name).stat().st_size / 1e6:.2f} MB" in row
        assert record.files[name].sha256 in text
        told = [one for one in card.data.eval_results if one.metric_name.startswith(name)]
        assert {one.metric_type: one.metric_value for one in told}["kl_divergence"] == round(kld, 6)
    assert len(card.data.eval_results) == 3 * len(records)
    picture = image.imread(io.BytesIO((out / sealed.PICTURE).read_bytes()), format="png")
    assert picture.shape[0] > 300 and f"]({sealed.PICTURE})" in text
    assert "llama-cli -hf me/nano-GGUF:Q8_0" in text or "llama-cli -hf me/nano-GGUF:Q4_K_M" in text
    assert "protocol gptq, windows of 128 tokens" in text and "600" not in text.split("sha256")[0].split("tokens of")[0]
    assert "text.txt" in text and str(tmp_path) not in text


def test_of_gptq_with_branches(tmp_path: Path) -> None:
    one, other = made.gptq(tmp_path), made.gptq(tmp_path, 8, 32)
    text, card = written(one, one, other, base_model="org/nano", repository="me/nano-GPTQ")
    assert (other / "README.md").read_text() == text
    assert card.data.to_dict()["tags"][:6] == ["mixtral", "moe", "gptq", "4-bit", "8-bit", "mixtools"]
    for branch in ("gptq-4bit-128g", "gptq-8bit-32g"):
        assert f"[{branch}](https://huggingface.co/me/nano-GPTQ/tree/{branch})" in text
    told = [one.metric_name.partition(": ")[0] for one in card.data.eval_results]
    assert told == [branch for branch in ("gptq-4bit-128g", "gptq-8bit-32g") for _ in range(3)]
    assert "8 bits, groups of 32, symmetric" in text
    assert "calibrated on 256 tokens of text.txt in 4 samples" in text
    assert "AutoGPTQForCausalLM" in text and 'revision="gptq-4bit-128g"' in text and "GPTQModel.load" not in text
    assert "GPTQModel 7.7; transformers alone" in text
    assert "desc_act" not in text or "actorder_True" not in text


def test_of_laser_and_of_dense_weights(tmp_path: Path) -> None:
    low = made.laser(tmp_path)
    text, card = written(low, base_model="org/nano")
    assert (card.data.base_model_relation, card.data.library_name) == ("finetune", "transformers")
    assert "laser" in card.data.tags and "intact, not judged" in text
    assert "AutoModelForCausalLM" in text and "vllm serve" in text
    dense = Path(shutil.copytree(made.source(), tmp_path / "nano"))
    (dense / "README.md").unlink()
    mixtools.check(dense, made.NANO, new_tokens=0)
    text, card = written(dense, base_model="org/nano-torrent")
    assert "base_model_relation" not in card.data.to_dict() and card.data.base_model == "org/nano-torrent"
    assert "perplexity and divergence are not known" in text and card.data.eval_results is None


def test_what_the_snippets_say_runs(tmp_path: Path) -> None:
    """Those of transformers, on the folder itself."""
    low = made.laser(tmp_path)
    text, _ = written(low)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    said: list[object] = []
    exec(re.sub(r'"YOUR-NAME/[^"]*"', repr(str(low)), code), {"print": said.append})
    assert len(said) == 1 and "condiment" in str(said[0])


def test_the_prompt_is_the_templates_own(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = made.gptq(tmp_path)
    text, card = written(out)
    turns = [{"role": "user", "content": "{prompt}"}]
    told = AutoTokenizer.from_pretrained(out).apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert f"```\n{told}\n```" in text and card.data.prompt_template == told
    assert "With a system message" in text
    config = json.loads((out / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    text, _ = written(out)
    assert "None: the model has no chat template" in text and "With a system message" not in text
    assert "**not checked**" in text  # tokenizer_config.json is another now


def test_a_failed_check_is_told_first(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    mixtools.check(out, made.source(), gate={"kld_mean": 1e-9}, **made.CHECK)
    text, card = written(out)
    assert text.index("> [!WARNING]") < text.index("## ") and "failed" in text
    assert card.data.eval_results is None


def test_whose_readme_it_is(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    first = mixtools.card([out])
    assert not first.kept and (out / "README.md").read_text() != made.SOURCE_CARD  # the source's goes
    assert sealed.is_sealed(out / "README.md")
    again = mixtools.card([out], base_model="org/nano")  # ours goes, and what it had from the source stays
    assert not again.kept and "license: apache-2.0" in again.text and "base_model: org/nano" in again.text
    assert "base_model: org/nano" in mixtools.card([out]).text
    mine = (out / "README.md").read_text() + "\nmy own words\n"
    (out / "README.md").write_text(mine)
    kept = mixtools.card([out])
    assert (out / "README.md").read_text() == mine and kept.kept == (out / "README.md",)
    assert (out / "README.mixtools.md").exists() and "somebody's own" in str(kept)
    assert not mixtools.card([out], replace=True).kept and (out / "README.md").read_text() != mine


def test_the_same_outputs_give_the_same_card(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    one, first = mixtools.card([out]).text, made.read(out)
    assert mixtools.card([out]).text == one and made.read(out) == first


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    out = made.gguf(tmp_path)
    before = made.read(out)
    told = mixtools.card([out], dry_run=True)
    assert made.read(out) == before and "# " in str(told)


def test_what_a_card_says_is_yaml_whatever_the_source_says(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    head = ['license: "a: b\\n---\\n# x"', 'language: [no, "y: es"]', "tags: [[1], {a: b}, 3, ok]", "base_model: 5"]
    hostile = "\n".join(["---", *head, "---", ""])
    (out / "README.md").write_text(hostile)
    manifest = json.loads((out / "mixtools.json").read_text())
    manifest["files"]["README.md"] = {
        "size": len(hostile), "sha256": hashlib.sha256(hostile.encode()).hexdigest(), "copied": True,
    }  # fmt: skip
    (out / "mixtools.json").write_text(json.dumps(manifest))
    text, card = written(out)
    assert "license" not in card.data.to_dict()
    assert yaml.safe_load(text.split("---\n")[1])["language"] == ["no", "y: es"]
    assert "ok" in card.data.tags and not any(isinstance(tag, (list, dict)) for tag in card.data.tags)


def test_no_output_and_several_that_differ(tmp_path: Path) -> None:
    with pytest.raises(errors.InputError):
        mixtools.card([tmp_path])
    with pytest.raises(errors.UsageError, match="name an output"):
        mixtools.card([])
    out = made.gptq(tmp_path)
    other = made.gguf(tmp_path)
    with pytest.raises(errors.UsageError, match="repositories of their own"):
        mixtools.card([out, other])


# --- tables ---


def test_the_readme_has_the_same_table() -> None:
    text = README.read_text()
    for row in loaders.TABLE:
        line = f"| {row.title} | {row.loads} | {row.refuses} | {row.wrongly} |"
        assert line.replace("|  |", "| |").replace("|  |", "| |") in text, row.title


@pytest.mark.parametrize("row", loaders.TABLE, ids=lambda row: row.title)
def test_ways_to_run_are_those_that_load(row: loaders.Row) -> None:
    for format in row.format.split(" or "):
        for symmetric in (True, False):
            subject = Subject("me/x", format, row.names, file="x.gguf", kind="Q8_0", bits=4, symmetric=symmetric)
            told = " ".join(f"{way.title} {way.code}" for way in ways(subject))
            assert ("vllm" in told) == ("vLLM" in row.loads and (symmetric or format == "dense"))
            for word, program in (("AutoGPTQ", "auto-gptq"), ("AutoAWQ", "autoawq"), ("llama-", "llama.cpp")):
                assert (word in told) == (program in row.loads)
            assert "mixtools generate" in told


def test_points_are_in_the_picture() -> None:
    one = png([Point("Q4_K_M", 28_000_000_000, 0.006), Point("Q2_K", 17_000_000_000, 0.06)], "nano")
    assert one == png([Point("Q2_K", 17_000_000_000, 0.06), Point("Q4_K_M", 28_000_000_000, 0.006)], "nano")
    assert one != png([Point("Q4_K_M", 28_000_000_000, 0.006), Point("Q2_K", 17_000_000_000, 0.02)], "nano")
    assert png([Point("a", 1000, 0.0), Point("b", 2000, 0.1)], "nano")[:4] == b"\x89PNG"


def test_a_template_does_not_break_out_of_its_block(tmp_path: Path) -> None:
    out = made.gptq(tmp_path)
    config = json.loads((out / "tokenizer_config.json").read_text())
    config["chat_template"] = "```\n# Heading\n---\n{{ messages[-1]['content'] }}"
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    text, card = written(out)
    assert "````\n```\n# Heading\n---\n{prompt}\n````" in text
    assert "prompt_template" not in card.data.to_dict() and card.text.lstrip().startswith("# ")
