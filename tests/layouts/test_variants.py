"""Prefixes, experts' spellings and ties, as transformers loads them where it does, else as they were made."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from layouts import make
from safetensors.torch import save_file

from mixtools import conversion, errors, job
from mixtools.layouts.detect import open_checkpoint
from mixtools.names import Role, Slot
from mixtools.storage import manifest

DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)
TORRENT = make.torrent(DIMS)
CANONICAL = make.hf(TORRENT, DIMS)
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EQUAL = CANONICAL | {HEAD: CANONICAL[EMBED].clone()}


def without(tensors: make.Tensors, *names: str) -> make.Tensors:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def write(folder: Path, tensors: make.Tensors, tie: object = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    make.write_json(folder / "config.json", DIMS.config() | ({} if tie is None else {"tie_word_embeddings": tie}))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def as_transformers_loads(folder: Path) -> make.Tensors:
    """Under Hugging Face's old names, which transformers turns its own into; nothing may be missing or left over."""
    model, info = transformers.MixtralForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    found = dict(model.state_dict())
    for layer in range(DIMS.layers):
        at, old = f"model.layers.{layer}.mlp.", f"model.layers.{layer}.block_sparse_moe."
        found[old + "gate.weight"] = found.pop(at + "gate.weight")
        pairs, downs = found.pop(at + "experts.gate_up_proj"), found.pop(at + "experts.down_proj")
        for expert, (pair, down) in enumerate(zip(pairs, downs, strict=True)):
            for name, tensor in zip(("w1", "w3", "w2"), (*pair.chunk(2), down), strict=True):
                found[f"{old}experts.{expert}.{name}.weight"] = tensor.contiguous()
    return found


def mixed(tensors: make.Tensors) -> make.Tensors:
    return {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in tensors.items()}


def v5(tensors: make.Tensors) -> make.Tensors:
    names = {".w1.": ".gate_proj.", ".w2.": ".down_proj.", ".w3.": ".up_proj."}
    found = {}
    for name, tensor in mixed(tensors).items():
        spelled = name
        for old, new in names.items():
            spelled = spelled.replace(old, new)
        found[spelled] = tensor
    return found


def before(prefix: str) -> Callable[[make.Tensors], make.Tensors]:
    return lambda tensors: {prefix + name: tensor for name, tensor in tensors.items()}


def bare(tensors: make.Tensors) -> make.Tensors:
    """As a base model's save, which knows no `model.`."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


TAKEN = {  # by transformers 5.23 too: names, layout, remark
    "usual": (lambda tensors: tensors, "hf", None),
    "experts below mlp": (mixed, "hf-mixed", None),
    "model. twice": (before("model."), "hf", "begin with 'model.'"),
    "model. twice but on the head": (
        lambda tensors: {name if name == HEAD else "model." + name: t for name, t in tensors.items()},
        "hf",
        "begin with 'model.'",
    ),
    "no model.": (bare, "hf", "lack 'model.'"),
    "no model., fused": (lambda tensors: bare(make.fused(tensors, DIMS)), "hf-fused", "lack 'model.'"),
}
OURS = {  # transformers 5.23 fills these at random
    "v5": (v5, "hf-v5", None),
    "module.": (before("module."), "hf", "begin with 'module.'"),
    "module.model.": (before("module.model."), "hf", "begin with 'module.model.'"),
    "module. of a base model": (lambda tensors: before("module.")(bare(tensors)), "hf", "lack 'model.'"),
    "module. of v5": (lambda tensors: before("module.")(v5(tensors)), "hf-v5", "begin with 'module.'"),
}


@pytest.mark.parametrize("name", [*TAKEN, *OURS])
def test_names(tmp_path: Path, name: str) -> None:
    names, layout, remark = {**TAKEN, **OURS}[name]
    checkpoint = open_checkpoint(write(tmp_path, names(CANONICAL)))
    assert checkpoint.layout.name == layout and checkpoint.layout.letter in "DEF"
    found = make.read_all(checkpoint)
    make.assert_same(found, CANONICAL)
    if name in TAKEN:
        make.assert_same(found, as_transformers_loads(tmp_path))
    if remark is None:
        assert checkpoint.remarks == ()
    else:
        assert len(checkpoint.remarks) == 1 and remark in checkpoint.remarks[0]
    checkpoint.finish()


@pytest.mark.parametrize("names", [mixed, v5, before("module."), bare])
@pytest.mark.parametrize("nested", ["", "model", "state_dict"])
def test_names_in_pickles(tmp_path: Path, names: Callable[[make.Tensors], make.Tensors], nested: str) -> None:
    """Of Parameters, in a dictionary within another, over several files."""
    stored = {name: torch.nn.Parameter(tensor) for name, tensor in names(CANONICAL).items()}
    folder = make.write_e(tmp_path, stored, DIMS)
    if nested:
        for path in folder.glob("*.bin"):
            torch.save({"epoch": 1, nested: torch.load(path, weights_only=True)}, path)
    make.assert_same(make.read_all(open_checkpoint(folder)), CANONICAL)


@pytest.mark.parametrize("write_torrent", [make.write_a, make.write_split, make.write_b, make.write_c])
def test_torrent_with_a_prefix_and_a_buffer(tmp_path: Path, write_torrent: Callable[..., Path]) -> None:
    dims = DIMS
    if write_torrent is make.write_b:
        folder = write_torrent(tmp_path, dims, files=1)
        path = folder / "consolidated.00.pt"
        torch.save(before("module.")(torch.load(path) | {"rope.freqs": torch.ones(2)}), path)
    else:
        folder = write_torrent(tmp_path, dims, before("module.")(TORRENT | {"rope.freqs": torch.ones(2)}))
    checkpoint = open_checkpoint(folder)
    make.assert_same(make.read_all(checkpoint), CANONICAL)
    assert checkpoint.remarks == ("tensor names begin with 'module.'; read without it",)


@pytest.mark.parametrize("names", [mixed, v5, before("module."), bare, lambda t: without(t, HEAD)])
def test_variants_become_torrents(tmp_path: Path, names: Callable[[make.Tensors], make.Tensors]) -> None:
    stored = names(CANONICAL)
    tied = HEAD not in {name.removeprefix("module.") for name in stored}
    source = open_checkpoint(write(tmp_path / "in", stored, tie=tied))
    job.run(conversion.plan_torrent(source, conversion.Options(), safetensors=True), tmp_path / "out")
    expected = CANONICAL | ({HEAD: CANONICAL[EMBED]} if tied else {})
    make.assert_same(make.read_all(open_checkpoint(tmp_path / "out")), expected)


def test_mixed_prefixes_are_told(tmp_path: Path) -> None:
    """What stands behind another prefix than the rest is missing, and unknown; never taken silently."""
    odd = "model.layers.0.self_attn.q_proj.weight"
    tensors = without(CANONICAL, odd) | {"module." + odd: CANONICAL[odd]}
    problems = open_checkpoint(write(tmp_path, tensors), strict=False).problems
    assert [problem.tensor for problem in problems] == [odd, "module." + odd]


def test_two_heads(tmp_path: Path) -> None:
    tensors = CANONICAL | {"model." + HEAD: CANONICAL[HEAD] + 1}
    with pytest.raises(errors.LayoutError, match="unknown to layout D") as caught:
        open_checkpoint(write(tmp_path, tensors))
    assert caught.value.tensor == "model." + HEAD


def test_a_layer_of_its_own_is_enough(tmp_path: Path) -> None:
    """The spelling is found where a tensor that tells it is missing, and that one is named."""
    router = "model.layers.0.mlp.gate.weight"
    with pytest.raises(errors.LayoutError, match="lacks one tensor") as caught:
        open_checkpoint(write(tmp_path, without(v5(CANONICAL), router)))
    assert caught.value.tensor == router


@pytest.mark.parametrize("names", [lambda tensors: tensors, bare, before("module.")])
def test_no_head(tmp_path: Path, names: Callable[[make.Tensors], make.Tensors]) -> None:
    """transformers fills it at random."""
    with pytest.raises(errors.LayoutError, match=r"lacks the output head alone, as a base model's save does") as caught:
        open_checkpoint(write(tmp_path, names(without(CANONICAL, HEAD))))
    assert caught.value.tensor is not None and caught.value.tensor.endswith(HEAD)


def test_biases(tmp_path: Path) -> None:
    """transformers 5.23 ignores them with a warning."""
    rows = {"q": 16, "k": 8, "v": 8}
    biases = {f"model.layers.{i}.self_attn.{w}_proj.bias": torch.ones(n) for i in range(2) for w, n in rows.items()}
    with pytest.raises(errors.LayoutError, match=r"6 tensors .*no Mixtral has biases") as caught:
        open_checkpoint(write(tmp_path, CANONICAL | biases))
    assert caught.value.tensor in biases


TIES = {  # tensors, whether they are tied, the remark
    "no head": (without(CANONICAL, HEAD), True, None),
    "no embedding": (without(CANONICAL, EMBED), True, "model.embed_tokens.weight is not stored"),
    "both, equal": (EQUAL, True, None),
    "both, different": (CANONICAL, False, "is stored and differs"),
    "base model": (bare(without(CANONICAL, HEAD)), True, "lack 'model.'"),
}


@pytest.mark.parametrize("name", TIES)
def test_tied(tmp_path: Path, name: str) -> None:
    tensors, tied, remark = TIES[name]
    checkpoint = open_checkpoint(write(tmp_path, tensors, tie=True))
    theirs = as_transformers_loads(tmp_path)
    make.assert_same(make.read_all(checkpoint), theirs)
    assert checkpoint.tied is tied is torch.equal(theirs[HEAD], theirs[EMBED])
    assert len(checkpoint.remarks) == (remark is not None) and (remark or "") in "".join(checkpoint.remarks)
    for slot in checkpoint.slots():
        assert checkpoint.entry(slot) in checkpoint.store.entries.values()
        assert checkpoint.spec(slot).shape == theirs[make.hf_name(slot)].shape
    checkpoint.finish()
    checkpoint.finish(earlier=checkpoint.slots())


def test_a_difference_far_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison goes on to the last row, in blocks."""
    monkeypatch.setattr("mixtools.layouts.variants.CHUNK", 32)  # two rows
    assert open_checkpoint(write(tmp_path / "same", EQUAL, tie=True)).tied
    head = EQUAL[HEAD].clone()
    head[-1, -1] += 1
    assert not open_checkpoint(write(tmp_path / "other", EQUAL | {HEAD: head}, tie=True)).tied


def test_equal_in_another_dtype_and_order(tmp_path: Path) -> None:
    assert open_checkpoint(write(tmp_path / "f32", EQUAL | {HEAD: EQUAL[HEAD].float()}, tie=True)).tied
    odd = EQUAL | {HEAD: EQUAL[EMBED].T.contiguous().T}
    folder = make.write_e(tmp_path / "transposed", odd, DIMS, files=1)
    make.write_json(folder / "config.json", DIMS.config() | {"tie_word_embeddings": True})
    assert open_checkpoint(folder).tied


def test_one_storage_is_not_read_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch.save writes tied weights: two names of one storage."""
    folder = make.write_e(tmp_path, CANONICAL | {HEAD: CANONICAL[EMBED]}, DIMS, files=1)
    make.write_json(folder / "config.json", DIMS.config() | {"tie_word_embeddings": True})
    monkeypatch.setattr("mixtools.storage.store.Store.read_rows", None)
    assert open_checkpoint(folder).tied


def test_a_shared_tensor_keeps_its_checksum(tmp_path: Path) -> None:
    tensors = without(CANONICAL, HEAD)
    folder = write(tmp_path, tensors, tie=True)
    path = folder / "model.safetensors"
    crcs = {name: zlib.crc32(make.bits(tensor)) for name, tensor in tensors.items()}
    (folder / manifest.NAME).write_text(
        json.dumps({"files": {path.name: path.stat().st_size}, "crc32": {n: f"{crc:08x}" for n, crc in crcs.items()}})
    )
    checkpoint = open_checkpoint(folder)
    for role in (Role.EMBED, Role.HEAD, Role.HEAD):
        assert torch.equal(checkpoint.read(Slot(role)), CANONICAL[EMBED])
    entry = checkpoint.entry(Slot(Role.HEAD))
    raw = bytearray(path.read_bytes())
    raw[entry.offset + 3] ^= 1
    path.write_bytes(raw)
    for role in (Role.EMBED, Role.HEAD):
        with pytest.raises(errors.ChecksumError) as caught:
            open_checkpoint(folder).read(Slot(role))
        assert caught.value.tensor == EMBED


def test_damage_is_found_by_reading_not_by_opening(tmp_path: Path) -> None:
    """The comparison of head and embedding judges no checksum, so that `inspect` can open what is damaged."""
    folder = make.write_e(tmp_path, CANONICAL, DIMS, files=1)
    make.write_json(folder / "config.json", DIMS.config() | {"tie_word_embeddings": True})
    path = next(folder.glob("*.bin"))
    raw = bytearray(path.read_bytes())
    raw[open_checkpoint(folder).entry(Slot(Role.HEAD)).offset] ^= 1
    path.write_bytes(raw)
    checkpoint = open_checkpoint(folder)
    checkpoint.finish()  # nothing was read for use
    with pytest.raises(errors.ChecksumError) as caught:
        checkpoint.read(Slot(Role.HEAD))
    assert caught.value.tensor == HEAD


@pytest.mark.parametrize("tie", [False, None])
def test_not_tied(tmp_path: Path, tie: object) -> None:
    checkpoint = open_checkpoint(write(tmp_path, EQUAL, tie))
    assert not checkpoint.tied and checkpoint.remarks == ()
    make.assert_same(make.read_all(checkpoint), EQUAL)


@pytest.mark.parametrize("tie", ["yes", 1, [True]])
def test_no_truth_value(tmp_path: Path, tie: object) -> None:
    with pytest.raises(errors.ConfigError, match="tie_word_embeddings is neither true nor false"):
        open_checkpoint(write(tmp_path, CANONICAL, tie))


def test_neither_is_there(tmp_path: Path) -> None:
    with pytest.raises(errors.LayoutError, match="lacks 2 tensors"):
        open_checkpoint(write(tmp_path, without(CANONICAL, HEAD, EMBED), tie=True))
