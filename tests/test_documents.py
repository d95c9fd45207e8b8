"""A folder leaves as it came: what a transformation does not change, byte for byte or key for key."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import finetunes
import pytest
from converting import NANO, files, go, to_consolidated, to_hf, to_torrent
from finetunes import edit

import mixtools
from mixtools import documents, errors, job
from mixtools.cli.main import main
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.laser import run as laser
from mixtools.storage.store import Store

CARD = b"# Dolphin\n![curve](images/loss%20curve.png)\n<img src='./assets/a/b.webp'>\n![far](https://x.org/images/far.png)\n"
BESIDE = {
    "README.md": CARD,
    "LICENSE": b"Apache",
    "images/loss curve.png": b"\x89PNG",
    "assets/a/b.webp": b"RIFF",
    "logo.svg": b"<svg/>",
    "trainer_state.json": b"{ }",
    "modeling_custom.py": b"import os\n",
    "NOTICE": b"",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
}
LEFT = {  # weights, what training leaves, what is hidden, what tells of other bytes
    "training_args.bin": b"x",
    "optimizer.pt": b"x",
    "model.safetensors.index.json.bak/x": b"x",
    "checkpoint-500/README.md": b"x",
    "images/not shown.png": b"x",
    ".git/config": b"x",
    ".gitattributes": b"x",
    "laser-report.json": b"{}",
    "recipe.yaml": b"x",
    "mixtools-check.json": b"{}",
}
KEYS = {  # as fine-tunes have them
    "output_router_logits": True,
    "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.1,
    "pad_token_id": 2,
    "eos_token_id": [2, 2048],
    "sliding_window": 4096,
    "attention_dropout": 0.5,
    "auto_map": {"AutoConfig": "configuration_custom.Config"},
    "_name_or_path": "mistralai/Mixtral-8x7B-v0.1",
    "transformers_version": "4.36.0",
    "unsloth_version": "2024.1",
    "max_position_embeddings": 16384,
    "x": {"y": [None, 1.5, "ü"]},
}


def fill(folder: Path, beside: dict[str, bytes]) -> None:
    for name, raw in beside.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)


def loaded(path: Path) -> dict[str, object]:
    document = json.loads(path.read_text("utf-8"))
    assert isinstance(document, dict)
    return document


def lasered(source: Path, out: Path) -> Path:
    mixtools.laser(source, out, layers="1", targets="w2", rank_rule="rank=4")
    return out


TRANSFORMATIONS: dict[str, Callable[[Path, Path], Path]] = {
    "to-hf": lambda source, out: go(to_hf, source, out),
    "sharded": lambda source, out: go(lambda s: to_hf(s, max_shard_bytes=2_000_000), source, out),
    "f16": lambda source, out: go(lambda s: to_hf(s, dtype="f16"), source, out),
    "laser": lasered,
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
@pytest.mark.parametrize("shape", ["json", "model", "jinja"])
def test_a_fine_tune(tmp_path: Path, name: str, shape: str) -> None:
    how = {"tokenizer": "model"} if shape == "model" else {"template": "jinja" if shape == "jinja" else "config"}
    source = finetunes.chatml(tmp_path / "source", **how)
    edit(source / "config.json", **KEYS)
    fill(source, BESIDE | LEFT)
    before = {path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*") if path.is_file()}
    out = TRANSFORMATIONS[name](source, tmp_path / "out")
    kept = before.keys() - LEFT.keys() - {"config.json", "model.safetensors"}
    assert kept >= BESIDE.keys() | {"generation_config.json", "special_tokens_map.json", "added_tokens.json"}
    for file in kept:
        assert (out / file).read_bytes() == before[file], file
    made = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - kept
    weights = {path.name for path in out.glob("*.safetensors*")}
    reports = {f"laser-report.{kind}" for kind in ("json", "csv", "html")} if name == "laser" else set()
    assert made == weights | reports | {"config.json", "mixtools.json"}
    config = loaded(source / "config.json")
    assert list(config) == list(loaded(out / "config.json")), "in the same order"
    assert loaded(out / "config.json") == config | ({"torch_dtype": "float16"} if name == "f16" else {})
    listed = loaded(out / "mixtools.json")["files"]
    assert {file for file, about in listed.items() if about.get("copied")} == kept
    for file, about in listed.items():
        assert hashlib.sha256((out / file).read_bytes()).hexdigest() == about["sha256"], file


def test_round_trip(tmp_path: Path) -> None:
    """To another dtype and back, in shards and in one: the folder that came, but for what tells of us."""
    source = finetunes.chatml(tmp_path / "source")
    edit(source / "config.json", **KEYS)
    fill(source, BESIDE)
    first = go(lambda s: to_hf(s, dtype="f32", max_shard_bytes=3_000_000), source, tmp_path / "a")
    second = go(lambda s: to_hf(s, dtype="bf16"), first, tmp_path / "b")
    before, after = files(source), files(second)
    assert before.keys() == after.keys() - {"mixtools.json"}
    for name in before.keys() - {"config.json", "model.safetensors"}:
        assert before[name] == after[name], name
    assert loaded(source / "config.json") == loaded(second / "config.json")


def test_a_torrent_gets_what_it_lacks(tmp_path: Path) -> None:
    out = go(to_hf, NANO, tmp_path / "out")
    made = {"generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert files(out).keys() == made | {"tokenizer.model", "config.json", "mixtools.json", "model.safetensors"}
    assert not any(
        about.get("copied") for about in loaded(out / "mixtools.json")["files"].values() if about["size"] < 0
    )


def test_the_spelling_that_old_loaders_read_is_added(tmp_path: Path) -> None:
    source = finetunes.base(tmp_path / "source")
    document = loaded(source / "config.json")
    del document["rope_theta"], document["torch_dtype"]
    new = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
    (source / "config.json").write_text(json.dumps(document | new))
    config = loaded(go(to_hf, source, tmp_path / "out") / "config.json")
    assert config == document | new | {"torch_dtype": "bfloat16", "rope_theta": 1e6}
    cast = loaded(go(lambda s: to_hf(s, dtype="f32"), source, tmp_path / "cast") / "config.json")
    assert cast == config | {"dtype": "float32", "torch_dtype": "float32"}


def test_a_dtype_that_is_not_the_weights_stays_unless_they_are_cast(tmp_path: Path) -> None:
    source = finetunes.base(tmp_path / "source")
    edit(source / "config.json", torch_dtype="float32")  # merged in fp32, saved in bf16
    assert loaded(go(to_hf, source, tmp_path / "out") / "config.json")["torch_dtype"] == "float32"
    cast = go(lambda s: to_hf(s, dtype="f16"), source, tmp_path / "cast")
    assert loaded(cast / "config.json")["torch_dtype"] == "float16"


def test_what_transformers_5_saved_loads_in_4(tmp_path: Path) -> None:
    """Its tokenizer_config.json names a class that 4 lacks, and a list where 4 expects a mapping."""
    source = finetunes.chatml(tmp_path / "source", template="jinja")
    saved = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<|im_end|>"], "backend": "tokenizers"}
    edit(source / "tokenizer_config.json", added_tokens_decoder=None, **saved)
    before = loaded(source / "tokenizer_config.json")
    out = go(to_hf, source, tmp_path / "out")
    del before["extra_special_tokens"]
    changed = {"tokenizer_class": "PreTrainedTokenizerFast", "additional_special_tokens": ["<|im_end|>"]}
    assert loaded(out / "tokenizer_config.json") == before | changed
    listed = loaded(out / "mixtools.json")["files"]
    assert "copied" not in listed["tokenizer_config.json"] and listed["tokenizer.json"]["copied"]
    edit(source / "tokenizer_config.json", extra_special_tokens=[], tokenizer_class="LlamaTokenizer")
    again = loaded(go(to_hf, source, tmp_path / "again") / "tokenizer_config.json")
    assert again == before | {"tokenizer_class": "LlamaTokenizer"}


def test_links_are_followed(tmp_path: Path) -> None:
    """A folder of links, as caches make them: what they point to is copied."""
    real = finetunes.chatml(tmp_path / "blobs")
    fill(real, BESIDE)
    (tmp_path / "source").mkdir()
    for path in real.iterdir():
        (tmp_path / "source" / path.name).symlink_to(path)
    out = go(to_hf, tmp_path / "source", tmp_path / "out")
    for name in BESIDE.keys() | {"tokenizer.json", "generation_config.json"}:
        assert not (out / name).is_symlink() and (out / name).read_bytes() == (real / name).read_bytes()


def test_what_cannot_be_copied_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = finetunes.base(tmp_path / "source")
    monkeypatch.setattr(documents, "MAX_DOCUMENT", 300_000)
    (source / "log.txt").write_bytes(bytes(300_001))
    (source / "gone").symlink_to(tmp_path / "nowhere")
    made = mixtools.convert(source, tmp_path / "out")
    assert made.notes == (
        "gone is not copied: it is no file",
        "log.txt is not copied: 0 MB are more than a document has",
    )
    assert made.document["notes"] == list(made.notes)
    assert not (tmp_path / "out" / "log.txt").exists()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[]", "version https://git-lfs.github.com/spec/v1", '{"model": 1}'])
def test_a_document_that_is_none(tmp_path: Path, name: str, text: str) -> None:
    source = finetunes.base(tmp_path / "source")
    (source / name).write_text(text)
    if name == "tokenizer_config.json" and text == '{"model": 1}':
        assert (go(to_hf, source, tmp_path / "out") / name).read_text() == text
        return
    with pytest.raises(errors.InputError) as caught:
        go(to_hf, source, tmp_path / "out")
    assert caught.value.file == str(source / name)
    assert not (tmp_path / "out").exists()


# --- to mistral's layouts


@pytest.mark.parametrize("plan", [to_torrent, to_consolidated])
def test_what_a_torrent_cannot_hold_is_told(tmp_path: Path, plan: Callable[..., job.Job]) -> None:
    source = finetunes.chatml(tmp_path / "source")
    fill(source, BESIDE | LEFT)
    done = job.run(plan(open_checkpoint(source)), tmp_path / "out")
    assert done["not_kept"] == ["the added tokens <|im_end|>, <|im_start|>", "the chat template", "eos_token_id 2048"]
    assert done["missing"] == []
    weights = "consolidated.00.pth" if plan is to_torrent else "consolidated.safetensors"
    assert files(tmp_path / "out").keys() == {
        *(name for name in BESIDE if "/" not in name), "params.json", "tokenizer.model", weights, "mixtools.json",
    }  # fmt: skip
    assert loaded(tmp_path / "out" / "params.json")["vocab_size"] == 2050


def test_a_base_model_loses_nothing(tmp_path: Path) -> None:
    """Its template and its end are those that its tokenizer.model means."""
    done = job.run(to_torrent(open_checkpoint(finetunes.base(tmp_path / "source"))), tmp_path / "out")
    assert done["not_kept"] == done["missing"] == []
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (NANO / "tokenizer.model").read_bytes()


def test_without_a_tokenizer_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Told with --quiet, and in the document."""
    source = finetunes.chatml(tmp_path / "source")
    (source / "tokenizer.model").unlink()

    def told(name: str, *flags: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(["convert", "hf-to-torrent", str(source), str(tmp_path / name), *flags])
        assert caught.value.code == 0
        return capsys.readouterr().out

    said = told("a", "--quiet")
    assert "note: the source has no tokenizer.model; the output has none either" in said
    assert "note: the output cannot hold the added tokens <unk>, <s>, </s>, <|im_end|>, <|im_start|>" in said
    for flags in (["--json"], ["--json", "--dry-run"]):
        document = json.loads(told("b", *flags))
        assert document["missing"] == ["tokenizer.model"] and len(document["not_kept"]) == 3


def test_params_of_a_torrent_key_for_key(tmp_path: Path) -> None:
    source = go(to_torrent, NANO, tmp_path / "source")
    edit(source / "params.json", rope_theta=None, use_biases=False, x={"y": 1}, _comment="ü")
    fill(source, {"LICENSE": b"Apache", "RELEASE": b"december"})
    before = loaded(source / "params.json")
    out = go(to_consolidated, source, tmp_path / "out")
    assert loaded(out / "params.json") == before | {"rope_theta": 1e6}
    assert (out / "LICENSE").read_bytes() == b"Apache" and (out / "RELEASE").read_bytes() == b"december"
    assert not (go(to_hf, source, tmp_path / "hf") / "RELEASE").exists(), "a part of the layout"


def test_laser_of_what_it_made(tmp_path: Path) -> None:
    """The second run's report is its own; a dense copy has none, since it is judged as a copy."""
    first = lasered(finetunes.chatml(tmp_path / "source"), tmp_path / "first")
    second = go(to_hf, first, tmp_path / "second")
    assert not (second / "laser-report.json").exists()
    assert loaded(lasered(second, tmp_path / "third") / "laser-report.json")["laser"]["layers"] == "1"
    assert laser.Options(layers="1").layers == "1"


def test_overwriting_what_was_edited_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A card that its owner wrote over ours, a configuration that he mended: hours later would be too late."""
    source = finetunes.chatml(tmp_path / "source")
    fill(source, BESIDE)
    out = go(to_hf, source, tmp_path / "out")
    (out / "README.md").write_text("# mine")
    (out / "results.csv").write_text("mine")
    monkeypatch.setattr(Store, "read_rows", None)
    with pytest.raises(errors.OutputExists, match=r"holds README\.md, which was changed since mixtools wrote it"):
        go(to_hf, source, out, overwrite=True)
    monkeypatch.undo()
    (out / "README.md").rename(out / "README.mine.md")
    go(to_hf, source, out, overwrite=True)
    assert (out / "README.md").read_bytes() == CARD
    assert (out / "README.mine.md").read_text() == "# mine" and (out / "results.csv").read_text() == "mine"


def test_a_report_in_the_way_is_refused_before_a_weight_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = finetunes.base(tmp_path / "source")
    out = go(to_hf, source, tmp_path / "out")
    (out / "laser-report.html").write_text("mine")
    monkeypatch.setattr(Store, "read_rows", None)
    with pytest.raises(errors.OutputExists, match=r"holds laser-report\.html, which was not written by mixtools"):
        mixtools.laser(source, out, layers="1", targets="w2", rank_rule="rank=4", overwrite=True)


def test_what_may_not_be_read_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = finetunes.base(tmp_path / "source")
    (source / "README.md").write_text("x")
    monkeypatch.setattr(os, "access", lambda path, mode: mode == os.R_OK and Path(path).name != "README.md")  # not root
    with pytest.raises(errors.InputError, match="permission denied") as caught:
        to_hf(open_checkpoint(source))
    assert caught.value.file == str(source / "README.md")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md"])
def test_a_source_whose_files_lie_in_the_output(tmp_path: Path, name: str) -> None:
    """By links: to replace the output would delete what is read."""
    first = finetunes.base(tmp_path / "first")
    (first / "README.md").write_text("x")
    out = go(to_hf, first, tmp_path / "out")
    (first / name).unlink()
    (first / name).symlink_to(out / name)
    before = files(out)
    with pytest.raises(errors.UsageError, match="is a file of the source, which links to it") as caught:
        go(to_hf, first, out, overwrite=True)
    assert caught.value.file == str(out / name)
    assert files(out) == before
