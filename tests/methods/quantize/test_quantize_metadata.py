"""What the files of mixtools.quantize say of themselves, by the gguf package's reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from finetunes import chatml, edit
from layouts import make
from quantizing import LEAST, kinds, metadata, quantize

import mixtools
from mixtools import errors
from mixtools.storage.gguf_values import string

TENSORS = make.hf(make.torrent(LEAST), LEAST)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make.write_hf(tmp_path / "my-model", TENSORS, LEAST)


def told(folder: Path, kind: str = "Q8_0", **options: Any) -> dict[str, Any]:
    out = folder.parent / "out"
    done = quantize(folder, out, kind, overwrite=True, **options)
    return metadata(out / done.rows[0].file)


def general(folder: Path, **options: Any) -> dict[str, Any]:
    found = told(folder, **options)
    return {key.removeprefix("general."): value for key, value in found.items() if key.startswith("general.")}


ALWAYS = {"architecture": "llama", "type": "model", "name": "my-model", "size_label": "2x10K", "file_type": 7,
          "quantization_version": 2}  # fmt: skip


# --- the model ---


def test_the_architecture(folder: Path) -> None:
    found = told(folder)
    assert {key: value for key, value in found.items() if key.startswith("llama.")} == {
        "llama.block_count": 1, "llama.context_length": 32768, "llama.embedding_length": 32,
        "llama.feed_forward_length": 64, "llama.attention.head_count": 2, "llama.attention.head_count_kv": 1,
        "llama.expert_count": 2, "llama.expert_used_count": 2, "llama.vocab_size": 5,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5), "llama.rope.freq_base": 1e6,
        "llama.rope.dimension_count": 16,
    }  # fmt: skip
    assert found["tokenizer.ggml.model"] == "none"
    shown = kinds(folder.parent / "out" / "my-model.Q8_0.gguf")
    assert {shown[key] for key in found if key.startswith("llama.") and "eps" not in key and "freq" not in key} == {
        "UINT32"
    }
    assert shown["llama.rope.freq_base"] == shown["llama.attention.layer_norm_rms_epsilon"] == "FLOAT32"
    assert shown["general.file_type"] == shown["general.quantization_version"] == "UINT32"


def test_constants_that_are_not_the_usual(folder: Path) -> None:
    edit(folder / "config.json", rope_theta=1e4, rms_norm_eps=1e-6, num_experts_per_tok=1, max_position_embeddings=77)
    found = told(folder)
    assert found["llama.rope.freq_base"] == 1e4
    assert found["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert (found["llama.expert_used_count"], found["llama.context_length"]) == (1, 77)


def test_heads_that_are_no_share_of_the_width(tmp_path: Path) -> None:
    """llama.cpp takes width over heads where it is not told."""
    dims = LEAST._replace(hd=32)
    found = told(make.write_hf(tmp_path / "x", make.hf(make.torrent(dims), dims), dims))
    assert found["llama.attention.key_length"] == found["llama.attention.value_length"] == 32
    assert found["llama.rope.dimension_count"] == 32
    usual = told(make.write_hf(tmp_path / "y", TENSORS, LEAST))
    assert "llama.attention.key_length" not in usual


@pytest.mark.parametrize(
    ("scaling", "keys"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096, "beta_fast": 30.0},
            {
                "type": "yarn",
                "factor": 2.0,
                "original_context_length": 4096,
                "yarn_beta_fast": 30.0,
                "yarn_beta_slow": 1.0,
            },
        ),
    ],
)
def test_stretched_positions(folder: Path, scaling: dict[str, Any], keys: dict[str, Any]) -> None:
    edit(folder / "config.json", rope_scaling=scaling)
    found = told(folder)
    assert {key: value for key, value in found.items() if key.startswith("llama.rope.scaling.")} == {
        f"llama.rope.scaling.{key}": value for key, value in keys.items()
    }


@pytest.mark.parametrize(
    ("scaling", "what"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_scaling of type dynamic"),
        ({"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5}, "attention_factor in rope_scaling"),
    ],
)
def test_stretched_as_no_gguf_can_tell(folder: Path, scaling: dict[str, Any], what: str) -> None:
    edit(folder / "config.json", rope_scaling=scaling)
    with pytest.raises(errors.ConfigError, match=f"{what} has no place in a GGUF"):
        told(folder)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("dims", "label"),
    [((4096, 14336, 32, 32, 8, 128, 32000, 8), "8x7.2B"), ((6144, 16384, 56, 48, 8, 128, 32768, 8), "8x22B"),
     ((256, 256, 2, 4, 2, 64, 2048, 8), "8x1.8M")],
)  # fmt: skip
def test_size_labels(dims: tuple[int, ...], label: str) -> None:
    from mixtools.config import MixtralConfig
    from mixtools.methods.quantize.about import size_label

    assert size_label(MixtralConfig(*dims)) == label


# --- where it comes from ---


def card(folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text, "utf-8")


def test_without_a_card(folder: Path) -> None:
    assert general(folder) == ALWAYS
    assert general(folder, quantized_by="A. Person", name="x") == {**ALWAYS, "name": "x", "quantized_by": "A. Person"}


def test_a_card(folder: Path) -> None:
    text = (
        "\ufeff---\nlicense: apache-2.0\nbase_model: mistralai/Mixtral-8x7B-v0.1\ntags:\n- moe\n- 'größe'\n"
        "language: [en, no]\nlicense_name: their-own\nlicense_link: https://x.y/z\nwidget: 5\n---\n# Title\n"
    )
    card(folder, text)
    assert general(folder) == {
        **ALWAYS, "license": "apache-2.0", "license.name": "their-own", "license.link": "https://x.y/z",
        "base_model.count": 1, "base_model.0.name": "Mixtral 8x7B v0.1", "base_model.0.organization": "mistralai",
        "base_model.0.repo_url": "https://huggingface.co/mistralai/Mixtral-8x7B-v0.1", "tags": ["moe", "größe"],
        "languages": ["en", "no"],
    }  # fmt: skip
    shown = kinds(folder.parent / "out" / "my-model.Q8_0.gguf")
    assert shown["general.tags"] == shown["general.languages"] == "ARRAY STRING"


def test_a_card_of_several_models(folder: Path) -> None:
    card(folder, "---\r\nbase_model:\r\n- a/b-c\r\n- not a model\r\n- d/e\r\nlanguage: de\r\n---\r\n")
    found = general(folder)
    assert (found["base_model.count"], found["base_model.0.name"], found["base_model.1.repo_url"]) == (
        2, "b c", "https://huggingface.co/d/e"
    )  # fmt: skip
    assert found["languages"] == ["de"] and "base_model.2.name" not in found


@pytest.mark.parametrize(
    "text",
    ["", "# Title", "---\n", "---\nlicense: mit\n", "text\n---\nlicense: mit\n---\n", "---\nlicense: [\n---\n",
     "---\n- a\n---\n", "---\n5\n---\n", "---\n\n---\n", "---\nlicense: [mit]\nbase_model: 3.5\n---\n",
     "---\nlicense: {a: b}\ntags: {a: b}\nlanguage: {}\nbase_model: {x/y: z}\n---\n", "---\nlicense:\ntags:\n---\n",
     "---\ndate: 2024-99-99\n---\n", "---\nx: !!timestamp y\n---\n", "---\na: &a [*a]\ntags: *a\n---\n",
     "---\nx: !!python/object:os.system y\n---\n", "---\nlicense: \x00\n---\n", "---\nx: " + 5000 * "[" + "\n---\n",
     "---\nx: " + 5000 * "{a: " + "\n---\n", "---\ntags: [[a], {b: c}]\n---\n", "---\n? [a]\n: b\n---\n",
     "---\nlicense: \"\\ud800\"\ntags: [\"\\udc80\"]\n---\n", "---\nx: \"\\UFFFFFFFF\"\n---\n"],
    ids=lambda text: repr(text[:40]),
)  # fmt: skip
def test_a_card_that_tells_nothing(folder: Path, text: str) -> None:
    """Broken, empty, or of other things than are asked for: it is no reason to stop."""
    card(folder, text)
    assert general(folder) == ALWAYS


def test_a_card_that_is_no_file(folder: Path) -> None:
    (folder / "README.md").mkdir()
    assert general(folder) == ALWAYS


def test_a_card_that_is_larger_than_any(folder: Path) -> None:
    card(folder, "---\nlicense: mit\n---\n" + (1 << 20) * "x")
    assert general(folder) == ALWAYS


def test_repeated_aliases_in_a_card(folder: Path) -> None:
    """Which a reader that writes them out would need the memory of a house for."""
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    card(folder, "---\n" + "\n".join(lines) + "\ntags: *a29\nlicense: mit\n---\n")
    assert general(folder)["license"] == "mit"


# --- of a GGUF ---


def test_of_a_gguf_all_is_kept(tmp_path: Path, folder: Path) -> None:
    """But for what its own bytes were."""
    first = tmp_path / "their.BF16.gguf"
    quantize(folder, first, "BF16", quantized_by="Somebody")
    (tmp_path / "mixtools.json").unlink()
    _rewrite(first, {"general.author": string("A"), "general.name": string("Theirs"), "x.y": string("z"),
                     "quantize.imatrix.file": string("old"), "tokenizer.chat_template": string("{{ x }}")})  # fmt: skip
    before = metadata(first)
    done = quantize(first, tmp_path / "two", "Q4_0")
    after = metadata(tmp_path / "two" / "their.Q4_0.gguf")
    assert done.rows[0].file == "their.Q4_0.gguf" and not done.missing
    del before["quantize.imatrix.file"]
    assert after == {**before, "general.file_type": 2}
    assert after["general.quantized_by"] == "Somebody"
    quantize(first, tmp_path / "three.gguf", "Q4_0", quantized_by="Me")
    assert metadata(tmp_path / "three.gguf")["general.quantized_by"] == "Me"


def _rewrite(file: Path, more: dict[str, Any]) -> None:
    """The same file with more keys."""
    from mixtools.storage.gguf import encode_header, read_header
    from mixtools.storage.source import Source

    header = read_header(Source(file))
    shapes = [(entry.name, entry.dtype, entry.shape) for entry in header.entries]
    data = [entry.source.read(entry.offset, entry.nbytes) for entry in header.entries]
    head, offsets = encode_header({**header.metadata, **more}, shapes)
    raw = bytearray(head)
    for at, part in zip(offsets, data, strict=True):
        raw += bytes(at - len(raw)) + part
    file.write_bytes(raw + bytes(-len(raw) % 32))


def test_the_tokenizer_of_a_folder(folder: Path) -> None:
    """One that cannot be read is no reason to leave it out silently."""
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))
    with pytest.raises(errors.MixtoolsError):
        told(folder)
    assert not (folder.parent / "out").exists()


def test_a_size_that_the_name_tells_is_the_size(folder: Path) -> None:
    assert general(folder, name="Mixtral-8x7B-Instruct-v0.1")["size_label"] == "8x7B"
    assert general(folder, name="a8x7Bb")["size_label"] == ALWAYS["size_label"]


def test_what_a_gguf_cannot_say_of_a_tokenizer_is_noted(tmp_path: Path) -> None:
    source = chatml(tmp_path / "chatml", config={"eos_token_id": [2048, 2, 5, 6]})
    edit(source / "generation_config.json", eos_token_id=[2048, 2, 5, 6])
    done = mixtools.quantize(source, tmp_path / "out", type=["Q8_0"], dry_run=True)
    assert any("of the ids that end generation a GGUF has no place for 6" in note for note in done.notes), done.notes
