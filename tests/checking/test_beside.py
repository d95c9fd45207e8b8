"""check sees all that loaders act on: each planted change fails, what a transformation means does not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finetunes
import pytest
import torch
from converting import NANO, go, to_consolidated, to_hf, to_torrent
from finetunes import edit
from safetensors.torch import load_file, save_file

import mixtools
from mixtools.checking import beside
from mixtools.text.pieces import read_pieces


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finetunes.chatml(tmp_path_factory.mktemp("beside") / "source")


@pytest.fixture
def output(source: Path, tmp_path: Path) -> Path:
    return go(to_hf, source, tmp_path / "out")


def check(output: Path, source: Path, verdict: str) -> dict[str, Any]:
    found = mixtools.check(output, source)
    assert found.verdict == verdict, list(found.lines())
    sections = {name: found.document[name] for name in ("configuration", "tokenizer")}
    for one in sections.values():
        assert one["passed"] == all(difference["expected"] for difference in one["differences"])
    return {**sections, "problems": [one["message"] for one in found.document["integrity"]["problems"]]}


def fails(output: Path, source: Path, section: str, file: str, key: str) -> dict[str, Any]:
    """The verdict is failed, by a difference of this file and key, of which a problem tells too."""
    found = check(output, source, "failed")
    (one,) = (one for one in found[section]["differences"] if (one["file"], one["key"]) == (file, key))
    assert not one["expected"]
    spelled = key.replace("num_experts_per_tok", "experts_per_token")  # as the configuration calls it
    assert any(spelled in message for message in found["problems"]), found["problems"]
    return dict(one)


# --- nothing changed


def test_a_copy_has_no_difference(source: Path, output: Path) -> None:
    found = check(output, source, "passed")
    assert found == {
        **{section: {"passed": True, "differences": []} for section in ("configuration", "tokenizer")},
        "problems": [],
    }


@pytest.mark.parametrize("shape", [{"tokenizer": "model"}, {"template": "jinja"}, {"template": None}])
def test_other_shapes_of_folders(tmp_path: Path, shape: dict[str, Any]) -> None:
    source = finetunes.chatml(tmp_path / "source", **shape)
    found = check(go(to_hf, source, tmp_path / "out"), source, "passed")
    assert found["configuration"]["differences"] == found["tokenizer"]["differences"] == []


def test_what_is_made_of_a_torrent_is_meant(tmp_path: Path) -> None:
    out = go(to_hf, NANO, tmp_path / "out")
    found = check(out, NANO, "passed")
    assert found["configuration"]["differences"] == []
    made = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    assert {one["file"] for one in found["tokenizer"]["differences"]} == made
    back = check(go(to_consolidated, out, tmp_path / "back"), out, "passed")
    assert {one["file"] for one in back["tokenizer"]["differences"]} == made
    assert check(tmp_path / "back", NANO, "passed")["tokenizer"]["differences"] == []


def test_what_a_torrent_cannot_hold_is_meant_and_told(source: Path, tmp_path: Path) -> None:
    found = check(go(to_torrent, source, tmp_path / "out"), source, "passed")
    keys = {(one["file"], one["key"]): one for one in found["configuration"]["differences"]}
    assert keys["config.json", "eos_token_id"] == {
        "file": "config.json", "key": "eos_token_id", "source": 2048, "output": None, "expected": True, "lost": True,
    }  # fmt: skip
    assert ("generation_config.json", "eos_token_id") in keys
    told = {one["key"] for one in found["tokenizer"]["differences"] if one["lost"]}
    assert {"number of tokens", "special token <|im_end|>", "ids of conversation 1"} <= told


def test_a_cast_means_its_dtype(source: Path, tmp_path: Path) -> None:
    found = check(go(lambda s: to_hf(s, dtype="f32"), source, tmp_path / "out"), source, "passed")
    (one,) = found["configuration"]["differences"]
    assert (one["key"], one["source"], one["output"], one["expected"]) == ("dtype", "bfloat16", "float32", True)
    edit(tmp_path / "out" / "config.json", torch_dtype="float16")
    fails(tmp_path / "out", source, "configuration", "config.json", "dtype")


def test_factors_mean_their_configuration(source: Path, tmp_path: Path) -> None:
    mixtools.laser(source, tmp_path / "out", layers="1", targets="w2", rank_rule="rank=4", factored=True)
    (one,) = check(tmp_path / "out", source, "intact")["configuration"]["differences"]
    assert one["key"] == "quantization_config" and one["expected"]


def test_old_and_new_spellings_are_the_same(source: Path, output: Path) -> None:
    """And a key that is missing is its default."""
    document = json.loads((output / "config.json").read_text())
    theta, dtype = document.pop("rope_theta"), document.pop("torch_dtype")
    for key in ("router_jitter_noise", "attention_dropout", "tie_word_embeddings", "sliding_window", "hidden_act"):
        document.pop(key, None)
    new = {"dtype": dtype, "rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    silent = {"transformers_version": "5.23.0", "_name_or_path": "elsewhere"}
    (output / "config.json").write_text(json.dumps(document | new | silent))
    edit(output / "generation_config.json", transformers_version="5.23.0", _from_model_config=True, eos_token_id=[2048])
    edit(output / "tokenizer_config.json", tokenizer_class="TokenizersBackend", is_local=True, backend="tokenizers")
    found = check(output, source, "passed")
    assert found["configuration"]["differences"] == found["tokenizer"]["differences"] == []


# --- the configuration

CHANGES: dict[str, object] = {
    "sliding_window": 16, "max_position_embeddings": 16384, "rope_theta": 1e5, "num_experts_per_tok": 1,
    "rms_norm_eps": 1e-6, "rope_scaling": {"type": "linear", "factor": 4.0}, "attention_bias": True,
    "hidden_act": "swish", "tie_word_embeddings": True, "bos_token_id": 2, "eos_token_id": 2, "pad_token_id": 0,
    "torch_dtype": "float16", "output_router_logits": True, "router_aux_loss_coef": 0.5, "router_jitter_noise": 0.1,
    "architectures": ["MixtralModel"], "auto_map": {"AutoConfig": "x.y"}, "use_cache": False,
    "a new key": [1, {"x": 2}],
}  # fmt: skip


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_fails(source: Path, output: Path, key: str) -> None:
    edit(output / "config.json", **{key: CHANGES[key]})
    spelled = "dtype" if key == "torch_dtype" else key
    one = fails(output, source, "configuration", "config.json", spelled)
    if key == "sliding_window":
        assert (one["source"], one["output"]) == (None, 16)


@pytest.mark.parametrize("key", ["eos_token_id", "attention_dropout", "initializer_range"])
def test_a_lost_key_fails_unless_it_was_the_default(tmp_path: Path, key: str) -> None:
    source = finetunes.chatml(tmp_path / "source", config={"attention_dropout": 0.5, "initializer_range": 0.5})
    out = go(to_hf, source, tmp_path / "out")
    edit(out / "config.json", **{key: None})
    fails(out, source, "configuration", "config.json", key)


@pytest.mark.parametrize(("key", "value"), [("eos_token_id", 2), ("eos_token_id", [2048, 2]), ("temperature", 0.5)])
def test_generation_config(source: Path, output: Path, key: str, value: object) -> None:
    edit(output / "generation_config.json", **{key: value})
    fails(output, source, "configuration", "generation_config.json", key)


def test_a_lost_generation_config(tmp_path: Path) -> None:
    source = finetunes.chatml(tmp_path / "source")
    edit(source / "generation_config.json", eos_token_id=[2048, 13])
    out = go(to_hf, source, tmp_path / "out")
    (out / "generation_config.json").unlink()
    fails(out, source, "configuration", "generation_config.json", "eos_token_id")


def test_a_tie_that_only_the_configuration_has(source: Path, output: Path) -> None:
    """Written apart is meant; said to be tied where two tensors differ is not."""
    edit(output / "config.json", tie_word_embeddings=True)
    fails(output, source, "configuration", "config.json", "tie_word_embeddings")


def test_tied_and_written_apart(tmp_path: Path) -> None:
    source = finetunes.base(tmp_path / "source")
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    edit(source / "config.json", tie_word_embeddings=True)
    apart = mixtools.convert(source, tmp_path / "apart")
    assert any("--keep-tied keeps one" in note for note in apart.notes)
    stored = load_file(tmp_path / "apart" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False
    (one,) = check(tmp_path / "apart", source, "passed")["configuration"]["differences"]
    assert one["key"] == "tie_word_embeddings" and one["expected"]
    kept = mixtools.convert(source, tmp_path / "kept", keep_tied=True)
    assert not any("tied" in note for note in kept.notes)
    assert kept.bytes == sum(tensor.nbytes for tensor in weights.values())
    assert kept.resumed_bytes == 0
    assert load_file(tmp_path / "kept" / "model.safetensors").keys() == weights.keys()
    assert check(tmp_path / "kept", source, "passed")["configuration"]["differences"] == []
    with pytest.raises(mixtools.errors.UsageError, match="two tensors"):
        mixtools.convert(tmp_path / "apart", tmp_path / "x", keep_tied=True)


# --- the tokenizer


def exchange(document: dict[str, Any]) -> str:
    vocabulary = document["model"]["vocab"]
    first, second = (next(piece for piece, index in vocabulary.items() if index == wanted) for wanted in (500, 900))
    vocabulary[first], vocabulary[second] = 900, 500
    return "model.vocab.500"


def other_merge(document: dict[str, Any]) -> str:
    merges = document["model"]["merges"]
    merges[7], merges[8] = merges[8], merges[7]
    return "model.merges[7]"


def fewer_merges(document: dict[str, Any]) -> str:
    del document["model"]["merges"][-1]
    return "model.merges (length)"


def flag(document: dict[str, Any]) -> str:
    document["added_tokens"][-1]["lstrip"] = True
    return "added_tokens.2049.lstrip"


def less_special(document: dict[str, Any]) -> str:
    document["added_tokens"][-1]["special"] = False
    return "added_tokens.2049.special"


def no_blank(document: dict[str, Any]) -> str:
    document["normalizer"]["normalizers"].pop(1)
    return "normalizer.normalizers[1]"


def no_bos(document: dict[str, Any]) -> str:
    document["post_processor"] = None
    return "post_processor"


def no_bytes(document: dict[str, Any]) -> str:
    document["model"]["fuse_unk"] = False
    return "model.fuse_unk"


@pytest.mark.parametrize(
    "change", [exchange, other_merge, fewer_merges, flag, less_special, no_blank, no_bos, no_bytes],
    ids=lambda change: change.__name__,
)  # fmt: skip
def test_a_changed_tokenizer_json_fails(source: Path, output: Path, change: Callable[[dict[str, Any]], str]) -> None:
    document = json.loads((output / "tokenizer.json").read_text("utf-8"))
    key = change(document)
    (output / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    fails(output, source, "tokenizer", "tokenizer.json", key)


def test_two_entries_exchanged_in_what_was_made_of_a_torrent(tmp_path: Path) -> None:
    """There is no tokenizer.json to hold it against: what it does tells."""
    out = go(to_hf, NANO, tmp_path / "out")
    document = json.loads((out / "tokenizer.json").read_text("utf-8"))
    exchange(document)
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    fails(out, NANO, "tokenizer", "tokenizer.json", "id 500")
    exchange(document)  # back
    del document["model"]["merges"][100:]
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    found = check(out, NANO, "failed")
    told = [one["key"] for one in found["tokenizer"]["differences"] if not one["expected"]]
    assert told[0].startswith("ids of '"), "pieces, special tokens and sizes are the same"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("chat_template", finetunes.CHATML.replace("\n", "")), ("eos_token", "</s>"), ("add_bos_token", False),
        ("add_prefix_space", False), ("padding_side", "right"), ("model_max_length", 9), ("tokenizer_class", "GPT2"),
    ],
)  # fmt: skip
def test_a_changed_tokenizer_config_fails(source: Path, output: Path, key: str, value: object) -> None:
    edit(output / "tokenizer_config.json", **{key: value})
    fails(output, source, "tokenizer", "tokenizer_config.json", key)
    if key == "chat_template":
        fails(output, source, "tokenizer", "tokenizer.json", "ids of conversation 1")


def test_a_template_that_only_a_system_message_shows(source: Path, output: Path) -> None:
    other = finetunes.CHATML.replace(
        "message['content']", "(message['content'] if message['role'] != 'system' else '')"
    )
    edit(output / "tokenizer_config.json", chat_template=other)
    fails(output, source, "tokenizer", "tokenizer.json", "ids of conversation 2")


def test_a_changed_tokenizer_model_fails(tmp_path: Path) -> None:
    """One score."""
    source = finetunes.chatml(tmp_path / "source", tokenizer="model")
    out = go(to_hf, source, tmp_path / "out")
    data = (out / "tokenizer.model").read_bytes()
    piece = read_pieces(data, "").all[600]
    before = piece.text.encode() + b"\x15" + struct.pack("<f", piece.score)
    assert data.count(before) == 1
    after = piece.text.encode() + b"\x15" + struct.pack("<f", piece.score - 3)
    (out / "tokenizer.model").write_bytes(data.replace(before, after))
    one = fails(out, source, "tokenizer", "tokenizer.model", "pieces.600[1]")
    assert one["output"] == one["source"] - 3


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"]
)
def test_a_lost_file_fails(source: Path, output: Path, name: str) -> None:
    (output / name).unlink()
    found = check(output, source, "failed")
    (one,) = (one for one in found["tokenizer"]["differences"] if (one["file"], one["key"]) == (name, ""))
    assert (one["source"], one["output"], one["expected"]) == ("there", "(not there)", False)


def test_a_file_more_fails(source: Path, output: Path) -> None:
    (output / "chat_template.jinja").write_text(finetunes.CHATML)
    fails(output, source, "tokenizer", "chat_template.jinja", "")


def test_a_further_template(tmp_path: Path) -> None:
    source = finetunes.chatml(tmp_path / "source")
    name = "additional_chat_templates/tool_use.jinja"
    (source / name).parent.mkdir()
    (source / name).write_text("{{ tools }}")
    out = go(to_hf, source, tmp_path / "out")
    assert check(out, source, "passed")["tokenizer"]["differences"] == []
    (out / name).write_text("{{ tool }}")
    fails(out, source, "tokenizer", name, "")


def test_no_tokenizer_left(source: Path, output: Path) -> None:
    for path in output.glob("*token*"):
        path.unlink()
    fails(output, source, "tokenizer", "tokenizer", "")


def test_a_damaged_document_is_a_problem(source: Path, output: Path) -> None:
    (output / "tokenizer_config.json").write_text("[]")
    assert any("is not a JSON object" in message for message in check(output, source, "failed")["problems"])


def test_many_differences_are_counted(source: Path, output: Path) -> None:
    document = json.loads((output / "tokenizer.json").read_text("utf-8"))
    document["model"]["merges"].reverse()
    (output / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), "utf-8")
    told = [
        one for one in check(output, source, "failed")["tokenizer"]["differences"] if one["file"] == "tokenizer.json"
    ]
    merges = [one for one in told if one["key"].startswith("model.merges")]
    assert len(merges) == 5
    (more,) = (one for one in told if one["key"] == "(further entries)")
    assert more["source"] == f"{len(document['model']['merges']) - 5} more"


def test_every_conversation_is_one_that_some_template_takes() -> None:
    """A set that all refuse would compare nothing."""
    from mixtools.text.tokenizer import Tokenizer

    nano, taken = Tokenizer.from_folder(NANO), 0
    for messages in beside.CONVERSATIONS:
        taken += beside._conversed(nano, messages) != "refused"
    assert taken == len(beside.CONVERSATIONS)


def test_what_is_lost_is_told_as_lost(source: Path, tmp_path: Path) -> None:
    out = go(to_torrent, source, tmp_path / "out")
    checked = mixtools.check(out, source, report=tmp_path / "report")
    (line,) = (
        line for line in checked.lines() if line.startswith("lost, since the output's layout has no place for it")
    )
    assert "config.json eos_token_id 2048; generation_config.json eos_token_id 2048" in line
    assert not any(line.startswith("changed, as meant") for line in checked.lines())
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.count("no place for it") == len(checked.document["configuration"]["differences"]) + len(
        checked.document["tokenizer"]["differences"]
    )
    cast = go(lambda s: to_hf(s, dtype="f32"), source, tmp_path / "cast")
    assert "changed, as meant: config.json dtype bfloat16 -> float32" in mixtools.check(cast, source).lines()


def test_an_added_token_in_the_place_of_a_piece(tmp_path: Path) -> None:
    """Fine-tunes list <unk>, <s> and </s> among the added tokens; with another end, </s> is special no longer."""
    source = finetunes.chatml(tmp_path / "source", tokenizer="model")
    (source / "added_tokens.json").write_text(json.dumps({"<unk>": 0, "<s>": 1, "</s>": 2, **finetunes.ADDED}))
    edit(source / "tokenizer_config.json", added_tokens_decoder=None)
    assert check(go(to_hf, source, tmp_path / "out"), source, "passed")["tokenizer"]["differences"] == []
    found = check(go(to_torrent, source, tmp_path / "torrent"), source, "passed")
    assert {"special token </s>", "ids of conversation 1"} & {one["key"] for one in found["tokenizer"]["differences"]}
    pieces = (tmp_path / "torrent" / "tokenizer.model").read_bytes()
    piece = read_pieces(pieces, "").all[600].text.encode()
    assert pieces.count(b"\x0a" + bytes([len(piece)]) + piece + b"\x15") == 1
    changed = pieces.replace(
        b"\x0a" + bytes([len(piece)]) + piece, b"\x0a" + bytes([len(piece)]) + piece[:-1] + b"\x7f"
    )
    (tmp_path / "torrent" / "tokenizer.model").write_bytes(changed)
    fails(tmp_path / "torrent", source, "tokenizer", "tokenizer.model", "id 600")
