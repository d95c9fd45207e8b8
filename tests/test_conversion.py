"""Conversions: there and back bit for bit in every layout and dtype, and where the output goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from converting import (
    DIMS,
    NANO,
    SCRIPT,
    environment,
    files,
    go,
    nano,
    sources,
    to_consolidated,
    to_hf,
    to_torrent,
    weights,
)
from layouts import make
from safetensors.torch import load_file

from mixtools import conversion, errors, job
from mixtools.layouts.detect import open_checkpoint

# --- there and back


@pytest.mark.parametrize("options", [{}, {"max_shard_bytes": 1_000_000}], ids=["whole", "sharded"])
def test_nano_there_and_back(tmp_path: Path, options: dict) -> None:
    hf = go(lambda source: to_hf(source, **options), NANO, tmp_path / "hf")
    assert ("model.safetensors" in files(hf)) == (not options)
    make.assert_same(weights(hf), make.hf(nano(), make.NANO))
    back = torch.load(go(to_torrent, hf, tmp_path / "back") / "consolidated.00.pth", weights_only=True)
    make.assert_same(back, nano())
    consolidated = go(to_consolidated, hf, tmp_path / "c")
    make.assert_same(load_file(consolidated / "consolidated.safetensors"), nano())
    assert (consolidated / "tokenizer.model").read_bytes() == (NANO / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("dims", [DIMS, make.Dims()], ids=["even", "odd"])
@pytest.mark.parametrize("letter", ["A", "A'", "B", "C", "D", "E", "F"])
def test_every_layout_to_every_layout(tmp_path: Path, letter: str, dims: make.Dims, monkeypatch) -> None:
    """In small blocks, so that each tensor takes several."""
    monkeypatch.setattr(conversion, "CHUNK", 50)
    tensors = make.torrent(dims, seed=3)
    source = sources(dims, tensors)[letter](tmp_path / "source")
    hf = go(lambda source: to_hf(source, max_shard_bytes=1000), source, tmp_path / "hf")
    make.assert_same(weights(hf), make.hf(tensors, dims))
    torrent = torch.load(go(to_torrent, source, tmp_path / "a") / "consolidated.00.pth", weights_only=True)
    make.assert_same(torrent, tensors)
    make.assert_same(load_file(go(to_consolidated, source, tmp_path / "c") / "consolidated.safetensors"), tensors)
    # and the same model gives the same files, wherever it came from (but for the record of where that was)
    if letter == "C":
        other = go(
            lambda source: to_hf(source, max_shard_bytes=1000),
            sources(dims, tensors)["F"](tmp_path / "f"),
            tmp_path / "hf2",
        )
        own, others = files(hf), files(other)
        config, kept = json.loads(own["config.json"]), json.loads(others["config.json"])
        assert config | kept == config, "made for a source that has none"
        for name in own.keys() - {"mixtools.json", "generation_config.json", "config.json"}:
            assert own[name] == others[name], name


def test_written_layouts_are_detected(tmp_path: Path) -> None:
    source = make.write_b(tmp_path / "b", DIMS)
    assert open_checkpoint(go(to_hf, source, tmp_path / "d")).layout.letter == "D"
    assert open_checkpoint(go(to_torrent, source, tmp_path / "a")).layout.letter == "A"
    assert open_checkpoint(go(to_consolidated, source, tmp_path / "c")).layout.letter == "C"


def test_cast_back_and_forth_of_config(tmp_path: Path) -> None:
    source = open_checkpoint(make.write_a(tmp_path / "a", DIMS))
    hf = open_checkpoint(go(to_hf, source.folder, tmp_path / "d"))
    back = open_checkpoint(go(to_torrent, hf.folder, tmp_path / "back"))
    assert source.config == hf.config == back.config
    written = json.loads((tmp_path / "d" / "config.json").read_text())
    assert (written["rope_theta"], written["torch_dtype"]) == (1e6, "bfloat16")
    assert "sliding_window" in written
    assert written["tie_word_embeddings"] is False
    assert json.loads((tmp_path / "back" / "params.json").read_text())["rope_theta"] == 1e6


# --- dtypes


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["keep", "bf16", "f16", "f32"])
def test_casts_equal_torchs(tmp_path: Path, source: torch.dtype, target: str) -> None:
    tensors = make.torrent(DIMS, dtype=source)
    tensors["norm.weight"] = torch.tensor([0.0, -0.0, 1e-8, 6e-5, 1e-40, torch.inf, -torch.inf, torch.nan]).to(source)
    hf = go(lambda source: to_hf(source, dtype=target), make.write_a(tmp_path / "a", DIMS, tensors), tmp_path / "hf")
    wanted = {"keep": source, "bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[target]
    expected = {name: tensor.to(wanted) for name, tensor in make.hf(tensors, DIMS).items()}
    if (source, wanted) == (torch.float32, torch.bfloat16):  # torch's NaN is another from size to size; ours is one
        expected["model.norm.weight"].view(torch.int16)[-1] = 0x7FC0
    make.assert_same(weights(hf), expected)
    assert json.loads((hf / "config.json").read_text())["torch_dtype"] == str(wanted).removeprefix("torch.")


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("f16", -1e30), ("bf16", 3.4e38)])
def test_overflow_names_the_tensor(tmp_path: Path, dtype: str, value: float) -> None:
    tensors = make.torrent(DIMS, dtype=torch.float32)
    tensors["layers.1.feed_forward.experts.2.w2.weight"][3, 4] = value
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    with pytest.raises(errors.TensorError, match="does not fit") as caught:
        go(lambda source: to_hf(source, dtype=dtype), source, tmp_path / "out")
    assert caught.value.tensor == "layers.1.experts.2.w2"
    assert caught.value.exit_code == 3
    assert files(tmp_path / "out") == {}


def test_largest_that_fits(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS, dtype=torch.float32)
    tensors["norm.weight"][0] = 65519.0
    hf = go(lambda s: to_hf(s, dtype="f16"), make.write_a(tmp_path / "a", DIMS, tensors), tmp_path / "hf")
    assert weights(hf)["model.norm.weight"][0] == 65504


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    tensors = make.torrent(DIMS)
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float()
        elif "gate" in name:
            tensors[name] = tensors[name].half()
    hf = go(to_hf, make.write_c(tmp_path / "c", DIMS, tensors), tmp_path / "hf")
    make.assert_same(weights(hf), make.hf(tensors, DIMS))
    assert json.loads((hf / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_unknown_dtype(tmp_path: Path) -> None:
    with pytest.raises(errors.UsageError, match="not one of keep, bf16, f16, f32"):
        to_hf(open_checkpoint(make.write_a(tmp_path, DIMS)), dtype="fp8")


# --- the same bytes, always


def test_same_bytes_whatever_the_threads(tmp_path: Path) -> None:
    source = make.write_b(tmp_path / "b", DIMS)
    for plan in (to_hf, to_torrent):
        made = [files(go(plan, source, tmp_path / f"{plan.__name__}{jobs}", jobs=jobs)) for jobs in (1, 2, 4, 16)]
        assert all(other == made[0] for other in made)


def test_same_bytes_whatever_the_hash_seed(tmp_path: Path) -> None:
    """As many weights in fp16 as in fp32: which is `torch_dtype` must not depend on the order of a set."""
    tensors = make.torrent(DIMS)
    for name in tensors:
        if name != "norm.weight":
            tensors[name] = tensors[name].to(torch.half if name.startswith(("output", "layers.1")) else torch.float)
    sizes = [sum(t.numel() for t in tensors.values() if t.dtype is dtype) for dtype in (torch.half, torch.float)]
    assert sizes[0] == sizes[1] > 0
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    made = []
    for seed in ("0", "1", "2", "3"):
        out = tmp_path / f"out{seed}"
        subprocess.run(
            [sys.executable, "-c", SCRIPT, source, out, "1"], check=True, env=environment(PYTHONHASHSEED=seed)
        )
        made.append(files(out))
    assert all(other == made[0] for other in made)


@pytest.mark.parametrize("jobs", [0, -1])
def test_no_jobs(jobs: int) -> None:
    with pytest.raises(errors.UsageError, match="no work"):
        job.Run(jobs=jobs)


# --- where the output goes


def test_output_is_the_source(tmp_path: Path) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    (tmp_path / "link").symlink_to(source)
    before = files(source)
    for out in (source, tmp_path / "link", tmp_path / "a" / ".." / "a"):
        for overwrite in (False, True):
            with pytest.raises(errors.UsageError, match="the source's own folder"):
                go(to_hf, source, out, overwrite=overwrite)
    assert files(source) == before


def test_source_within_the_output(tmp_path: Path) -> None:
    make.write_a(tmp_path / "a", DIMS)
    with pytest.raises(errors.OutputExists, match="holds a"):
        go(to_hf, tmp_path / "a", tmp_path, overwrite=True)


def test_no_tokenizer(tmp_path: Path) -> None:
    source = open_checkpoint(make.write_a(tmp_path / "a", DIMS))
    for number, plan in enumerate((to_hf, to_torrent, to_consolidated)):
        document = job.run(plan(source), tmp_path / str(number))
        assert document["missing"] == ["tokenizer.model"]
        assert document["tensors"] == len(make.torrent(DIMS))
    assert weights(tmp_path / "0").keys() == make.hf(make.torrent(DIMS), DIMS).keys()


def test_tokenizer_of_a_hf_source_is_kept(tmp_path: Path) -> None:
    hf = go(to_hf, NANO, tmp_path / "hf")
    (hf / "tokenizer.model").unlink()
    again = go(to_hf, hf, tmp_path / "again")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (again / name).read_bytes() == (hf / name).read_bytes()
    assert "tokenizer.model" not in files(again)


def test_tokenizer_that_is_a_link_to_a_secret(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"token": "hunter2"}')
    source = make.write_hf(tmp_path / "d", make.hf(make.torrent(DIMS), DIMS), DIMS)
    (source / "tokenizer.json").symlink_to(tmp_path / "secret")
    with pytest.raises(errors.TokenizerError, match="is no tokenizer") as caught:
        go(to_hf, source, tmp_path / "out")
    assert caught.value.file == str(source / "tokenizer.json")
    (source / "tokenizer.json").unlink()
    (source / "tokenizer.model").symlink_to(tmp_path / "secret")
    for plan in (to_hf, to_torrent):
        with pytest.raises(errors.TokenizerError):
            go(plan, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    real, written = os.pwrite, 0
    head = len(to_hf(open_checkpoint(source)).plan.files[0].head)

    def full(file: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += len(data)
        if written > head + 3000:
            raise OSError(28, "No space left on device")
        return real(file, data, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(errors.DiskError, match="free some space"):
            go(to_hf, source, tmp_path / "out")
    assert files(tmp_path / "out") == {}
    document = job.run(to_hf(open_checkpoint(source)), tmp_path / "out")
    assert document["resumed_bytes"] > 0
    make.assert_same(weights(tmp_path / "out"), make.hf(make.torrent(DIMS), DIMS))
