"""Which files are read: the named one, else transformers' choice; links, pointers and adapters in their place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from layouts import make
from safetensors.torch import save_file

import mixtools
from mixtools import errors
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.families import find

DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)
CANONICAL = make.hf(make.torrent(DIMS), DIMS)
OTHER = make.hf(make.torrent(DIMS, seed=1), DIMS)
NANO = Path(__file__).parents[1] / "data" / "nano-mixtral"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "a" * 64 + "\nsize 17179869184\n"
WHOLE = "model.safetensors"


def both(folder: Path) -> Path:
    """Shards with an index, and beside them a whole checkpoint of another model."""
    make.write_hf(folder, CANONICAL, DIMS)
    save_file(OTHER, folder / WHOLE, metadata={"format": "pt"})
    return folder


def reads(path: Path, tensors: make.Tensors) -> tuple[str, ...]:
    checkpoint = open_checkpoint(path)
    make.assert_same(make.read_all(checkpoint), tensors)
    return checkpoint.remarks


def test_the_named_file_is_read(tmp_path: Path) -> None:
    folder = both(tmp_path)
    assert reads(folder / WHOLE, OTHER) == ()
    assert reads(folder / make.INDEX, CANONICAL) == ()
    for number in (1, 2, 3):
        assert reads(folder / f"model-0000{number}-of-00003.safetensors", CANONICAL) == ()


def test_the_named_file_of_zeros(tmp_path: Path) -> None:
    """Every one of 2048 tokens is as likely as any other, so the perplexity is 2048."""
    folder = tmp_path / "stray"
    mixtools.convert(NANO, folder, max_shard_size="1MB")
    zeros = {name: torch.zeros_like(t) for name, t in make.read_all(open_checkpoint(folder)).items()}
    save_file(zeros, folder / WHOLE, metadata={"format": "pt"})
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    measured = {name: mixtools.perplexity(folder / name, text=text, ctx=128) for name in (WHOLE, make.INDEX)}
    assert measured[WHOLE].perplexity == pytest.approx(2048, rel=1e-6)
    assert measured[make.INDEX].perplexity < 1000


def test_a_folder_with_both_is_read_as_transformers_does(tmp_path: Path) -> None:
    folder = both(tmp_path)
    theirs = transformers.MixtralForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert torch.equal(theirs["lm_head.weight"], OTHER["lm_head.weight"])
    assert reads(folder, OTHER) == (
        f"{WHOLE} is read, as transformers does; the shards beside it are not (name {make.INDEX} to read them)",
    )
    (folder / make.INDEX).unlink()
    (remark,) = reads(folder, OTHER)
    assert "name model-00001-of-00003.safetensors" in remark
    assert reads(folder / "model-00001-of-00003.safetensors", CANONICAL) == ()


def test_pickles_beside_each_other(tmp_path: Path) -> None:
    folder = make.write_e(tmp_path, CANONICAL, DIMS)
    torch.save(OTHER, folder / "pytorch_model.bin")
    assert "pytorch_model.bin is read" in reads(folder, OTHER)[0]
    assert reads(folder / "pytorch_model.bin", OTHER) == ()
    assert reads(folder / "pytorch_model.bin.index.json", CANONICAL) == ()


STALE = '{"weight_map": {"x": "model-00001-of-00009.safetensors"}}'


@pytest.mark.parametrize("index", [STALE, "{", '{"weight_map": {"x": "../x"}}'])
def test_a_stale_index(tmp_path: Path, index: str) -> None:
    """It blocks neither the whole file nor shards that are complete without it, only itself."""
    folder = both(tmp_path)
    (folder / make.INDEX).write_text(index)
    reads(folder / WHOLE, OTHER)
    reads(folder, OTHER)
    with pytest.raises((errors.InputError, errors.UnsafeError)):
        open_checkpoint(folder / make.INDEX)
    if index == STALE:
        remarks = reads(folder / "model-00002-of-00003.safetensors", CANONICAL)
        assert remarks == (f"{make.INDEX} is not followed: it does not name model-00002-of-00003.safetensors",)
        (folder / WHOLE).unlink()
        with pytest.raises(errors.LayoutError, match=r"of-00009.safetensors, named by the index, is missing"):
            open_checkpoint(folder)


def test_a_named_shard_of_several_sets(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL, DIMS, files=3)
    make.write_hf(tmp_path, OTHER, DIMS, files=2)
    assert reads(folder, OTHER) == ()
    assert reads(folder / "model-00001-of-00002.safetensors", OTHER) == ()
    assert len(reads(folder / "model-00001-of-00003.safetensors", CANONICAL)) == 1
    (folder / make.INDEX).unlink()
    assert reads(folder / "model-00001-of-00003.safetensors", CANONICAL) == ()
    (folder / "model-00003-of-00003.safetensors").unlink()
    with pytest.raises(errors.LayoutError, match="2 shards of 3"):
        open_checkpoint(folder / "model-00001-of-00003.safetensors")


def test_a_whole_file_that_is_not_whole(tmp_path: Path) -> None:
    """The message tells what was not read, since that may be what was meant."""
    folder = make.write_hf(tmp_path, CANONICAL, DIMS)
    save_file({"lm_head.weight": OTHER["lm_head.weight"]}, folder / WHOLE)
    with pytest.raises(errors.LayoutError, match=rf"lacks \d+ tensors .*name {make.INDEX} to read them"):
        open_checkpoint(folder)
    reads(folder / make.INDEX, CANONICAL)


def test_checksums_are_those_of_the_file_that_is_read(tmp_path: Path) -> None:
    """A manifest of the shards says nothing of a file that it does not list."""
    folder = tmp_path / "hf"
    mixtools.convert(NANO, folder, max_shard_size="1MB")
    assert all(entry.record for entry in open_checkpoint(folder).store.entries.values())
    save_file(make.read_all(open_checkpoint(folder)), folder / WHOLE, metadata={"format": "pt"})
    assert not any(entry.record for entry in open_checkpoint(folder / WHOLE).store.entries.values())


def links_to(folder: Path, target: Path) -> Path:
    folder.mkdir(parents=True)
    for path in target.iterdir():
        (folder / path.name).symlink_to(path)
    return folder


@pytest.mark.parametrize("write", [make.write_a, make.write_split, make.write_b, make.write_c])
def test_a_folder_of_links(tmp_path: Path, write) -> None:
    """To anywhere: the user named the folder."""
    folder = links_to(tmp_path / "links", write(tmp_path / "elsewhere", DIMS))
    make.assert_same(make.read_all(open_checkpoint(folder)), CANONICAL)
    (tmp_path / "folder").symlink_to(folder)
    make.assert_same(make.read_all(open_checkpoint(tmp_path / "folder")), CANONICAL)


def test_a_folder_of_links_to_shards(tmp_path: Path) -> None:
    folder = links_to(tmp_path / "links", make.write_hf(tmp_path / "elsewhere", CANONICAL, DIMS))
    for path in (folder, folder / make.INDEX, folder / "model-00001-of-00003.safetensors"):
        reads(path, CANONICAL)
    for path in folder.iterdir():  # the same with names that are not the targets'
        shutil.move(path.readlink(), tmp_path / f"blob of {path.name}")
        path.unlink()
        path.symlink_to(Path("..") / f"blob of {path.name}")
    reads(folder, CANONICAL)


@pytest.mark.parametrize("name", ["config.json", "model-00002-of-00003.safetensors"])
@pytest.mark.parametrize("target", ["nowhere", "itself"])
def test_a_link_that_leads_nowhere(tmp_path: Path, name: str, target: str) -> None:
    folder = make.write_hf(tmp_path, CANONICAL, DIMS)
    path = folder / name
    path.unlink()
    path.symlink_to("../blobs/nowhere" if target == "nowhere" else name)
    with pytest.raises(errors.InputError, match="is a link that leads nowhere") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(path)
    (folder / make.INDEX).unlink()  # now a shard is found by its name alone
    with pytest.raises(errors.InputError, match="is a link that leads nowhere"):
        open_checkpoint(folder)
    with pytest.raises(errors.InputError, match="is a link that leads nowhere"):
        open_checkpoint(path)


def test_a_whole_file_that_leads_nowhere(tmp_path: Path) -> None:
    """transformers passes it by for the index; alone it is named."""
    folder = make.write_hf(tmp_path, CANONICAL, DIMS)
    (folder / WHOLE).symlink_to("nowhere")
    reads(folder, CANONICAL)
    for path in folder.glob("model[-.]*-*.safetensors"):
        path.unlink()
    (folder / make.INDEX).unlink()
    with pytest.raises(errors.InputError, match="is a link that leads nowhere"):
        open_checkpoint(folder)


POINTED = [
    "model-00002-of-00003.safetensors", "config.json", make.INDEX, "tokenizer.model", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model.v3", "special_tokens_map.json",
]  # fmt: skip


@pytest.mark.parametrize("name", POINTED)
def test_a_pointer_in_a_files_place(tmp_path: Path, name: str) -> None:
    folder = make.write_hf(tmp_path, CANONICAL, DIMS)
    (folder / name).write_text(POINTER)
    with pytest.raises(errors.FormatError, match=r"is a Git LFS pointer.*git lfs pull") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(folder / name)


@pytest.mark.parametrize("write", [make.write_a, make.write_b, make.write_c])
def test_a_pointer_in_the_place_of_a_torrent(tmp_path: Path, write) -> None:
    folder = write(tmp_path, DIMS)
    path = max(folder.glob("consolidated*"))
    path.write_text(POINTER)
    with pytest.raises(errors.FormatError, match=r"is a Git LFS pointer.*git lfs pull") as caught:
        open_checkpoint(folder)
    assert caught.value.file == str(path)


def test_a_tokenizers_pointer_is_a_problem_beside_others(tmp_path: Path) -> None:
    folder = make.write_hf(tmp_path, CANONICAL, DIMS)
    (folder / "tokenizer.json").write_text(POINTER)
    problems = open_checkpoint(folder, strict=False).problems
    assert [type(problem) for problem in problems] == [errors.FormatError]
    make.assert_same(make.read_all(open_checkpoint(folder, strict=False)), CANONICAL)


def adapter(folder: Path, base: object = "mistralai/Mixtral-8x7B-v0.1") -> Path:
    folder.mkdir(exist_ok=True)
    make.write_json(folder / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": base})
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.ones(2, 8)}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["", "adapter_model.safetensors", "adapter_config.json"])
def test_an_adapter_is_named_as_one(tmp_path: Path, name: str) -> None:
    path = adapter(tmp_path) / name
    message = r"is a LoRA adapter for mistralai/Mixtral-8x7B-v0.1, not a model; merge it into its base model first"
    with pytest.raises(errors.LayoutError, match=message) as caught:
        open_checkpoint(path)
    assert caught.value.file == str(path)


@pytest.mark.parametrize("base", [None, 3, ["x"]])
def test_an_adapter_of_no_known_base(tmp_path: Path, base: object) -> None:
    with pytest.raises(errors.LayoutError, match="is a LoRA adapter, not a model"):
        open_checkpoint(adapter(tmp_path, base))


def test_an_adapter_beside_a_model_is_told(tmp_path: Path) -> None:
    folder = adapter(make.write_hf(tmp_path, CANONICAL, DIMS))
    assert reads(folder, CANONICAL) == ("adapter_config.json lies beside the model; the adapter is not applied",)


def test_inspect_tells_remarks(tmp_path: Path) -> None:
    told = mixtools.inspect(both(tmp_path))
    remark = find(tmp_path).remarks[0]
    assert told.document["remarks"] == [remark] and told.document["tied"] is False
    assert f"note: {remark}" in list(told.lines())
    assert told.exit_code == 0 and json.dumps(told.document)
