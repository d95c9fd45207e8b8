"""Conversions: there and back bit for bit, whatever the layout, the threads or the kill; damage found on the way."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from layouts import make
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mixtools import convert, errors
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.storage import store, torchzip
from mixtools.storage.output import JOURNAL, WORK
from mixtools.storage.source import Source

TREE = Path(__file__).parents[1]
NANO = TREE / "tests" / "data" / "nano-mixtral"
DIMS = make.Dims(d=8, f=12, heads=4, kv=2, hd=4)
Planner = Callable[[Checkpoint], convert.Job]


def to_hf(source: Checkpoint, **options: object) -> convert.Job:
    return convert.plan_hf(source, convert.Options(**options))


def to_torrent(source: Checkpoint, **options: object) -> convert.Job:
    return convert.plan_torrent(source, convert.Options(**options), safetensors=False)


def to_consolidated(source: Checkpoint) -> convert.Job:
    return convert.plan_torrent(source, convert.Options(), safetensors=True)


def go(plan: Planner, source: Path, out: Path, **how: object) -> Path:
    convert.run(plan(open_checkpoint(source)), out, convert.Run(**how))
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def weights(folder: Path) -> make.Tensors:
    """Everything in the folder's safetensors, by the safetensors library."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def nano() -> make.Tensors:
    return torch.load(NANO / "consolidated.00.pth", weights_only=True)


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


def sources(dims: make.Dims, tensors: make.Tensors) -> dict[str, Callable[[Path], Path]]:
    canonical = make.hf(tensors, dims)
    return {
        "A": lambda folder: make.write_a(folder, dims, tensors),
        "A'": lambda folder: make.write_split(folder, dims, tensors),
        "B": lambda folder: make.write_b(folder, dims, tensors),
        "C": lambda folder: make.write_c(folder, dims, tensors),
        "D": lambda folder: make.write_hf(folder, canonical, dims),
        "E": lambda folder: make.write_e(folder, canonical, dims),
        "F": lambda folder: make.write_hf(folder, make.fused(canonical, dims), dims),
    }


@pytest.mark.parametrize("dims", [DIMS, make.Dims()], ids=["even", "odd"])
@pytest.mark.parametrize("letter", ["A", "A'", "B", "C", "D", "E", "F"])
def test_every_layout_to_every_layout(tmp_path: Path, letter: str, dims: make.Dims, monkeypatch) -> None:
    """In small blocks, so that each tensor takes several."""
    monkeypatch.setattr(convert, "CHUNK", 50)
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
        for name in own.keys() - {"mixtools.json"}:
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
    make.assert_same(weights(hf), {name: tensor.to(wanted) for name, tensor in make.hf(tensors, DIMS).items()})
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
        convert.Run(jobs=jobs)


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
        document = convert.run(plan(source), tmp_path / str(number))
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
    with pytest.raises(errors.UnsafeError, match="leaves the folder") as caught:
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
    document = convert.run(to_hf(open_checkpoint(source)), tmp_path / "out")
    assert document["resumed_bytes"] > 0
    make.assert_same(weights(tmp_path / "out"), make.hf(make.torrent(DIMS), DIMS))


# --- damage


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1 << at % 8
    path.write_bytes(raw)


def test_flipped_bit_of_a_plain_tensor(tmp_path: Path) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pth")) if e.name == "output.weight")
    flip(source / "consolidated.00.pth", entry.offset + 17)
    with pytest.raises(errors.ChecksumError) as caught:
        go(to_hf, source, tmp_path / "out")
    assert caught.value.tensor == "output.weight"
    assert files(tmp_path / "out") == {}


@pytest.mark.parametrize("jobs", [1, 3])
def test_flipped_bit_of_a_stacked_tensor(tmp_path: Path, jobs: int) -> None:
    """However often the command is repeated: the parts written before the damage showed are not taken for good."""
    source = make.write_b(tmp_path / "b", DIMS, files=1)
    name = "layers.1.block_sparse_moe.w2"
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pt")) if e.name == name)
    flip(source / "consolidated.00.pt", entry.offset + 5)
    for _ in range(4):
        with pytest.raises(errors.ChecksumError) as caught:
            go(to_hf, source, tmp_path / "out", jobs=jobs)
        assert caught.value.tensor == name
        assert files(tmp_path / "out") == {}


def test_flipped_bit_beside_a_view(tmp_path: Path) -> None:
    """In a part of the storage that no tensor shows."""
    tensors = make.torrent(DIMS)
    tensors["norm.weight"] = torch.arange(100.0)[40:48].bfloat16()
    tensors["output.weight"] = torch.randn(DIMS.vocab + 9, 8).bfloat16()[2 : DIMS.vocab + 2]
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    make.assert_same(weights(go(to_hf, source, tmp_path / "good")), make.hf(tensors, DIMS))
    entry = next(e for e in torchzip.read_header(Source(source / "consolidated.00.pth")) if e.name == "output.weight")
    assert entry.record is not None
    flip(source / "consolidated.00.pth", entry.record.offset + entry.record.size - 1)
    for _ in range(3):
        with pytest.raises(errors.ChecksumError):
            go(to_hf, source, tmp_path / "out")
        assert files(tmp_path / "out") == {}


def test_transposed_tensors_are_read_right(tmp_path: Path) -> None:
    tensors = {name: t.T.contiguous().T if t.dim() == 2 else t for name, t in make.torrent(DIMS).items()}
    assert not tensors["output.weight"].is_contiguous()
    source = make.write_a(tmp_path / "a", DIMS, tensors)
    make.assert_same(weights(go(to_hf, source, tmp_path / "out")), make.hf(make.torrent(DIMS), DIMS))


def test_our_manifest_finds_a_flipped_bit(tmp_path: Path) -> None:
    hf = go(to_hf, make.write_a(tmp_path / "a", DIMS), tmp_path / "hf")
    raw = (hf / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    for at in random.Random(0).choices(range(start, len(raw)), k=20):
        flip(hf / "model.safetensors", at)
        load_file(hf / "model.safetensors")  # which notices nothing
        with pytest.raises(errors.ChecksumError) as caught:
            make.read_all(open_checkpoint(hf))
        assert caught.value.tensor in make.hf(make.torrent(DIMS), DIMS)
        flip(hf / "model.safetensors", at)
    make.read_all(open_checkpoint(hf))


def test_mutated_sources(tmp_path: Path) -> None:
    """Any byte of any file: our error, or a right result."""
    chance = random.Random(0)
    expected = make.hf(make.torrent(DIMS), DIMS)
    for letter in ("A", "D", "E"):
        source = sources(DIMS, make.torrent(DIMS))[letter](tmp_path / letter)
        original = files(source)
        for _ in range(100):
            name = chance.choice(sorted(original))
            data = bytearray(original[name])
            # safetensors alone has no checksums: there the header is mutated
            end = 8 + int.from_bytes(data[:8], "little") if name.endswith("safetensors") else len(data)
            data[chance.randrange(end)] = chance.randrange(256)
            (source / name).write_bytes(data)
            with contextlib.suppress(errors.MixtoolsError):
                checkpoint = open_checkpoint(source)
                found = make.read_all(checkpoint)
                checkpoint.finish()
                assert found.keys() == expected.keys()
                if letter != "D":
                    make.assert_same(found, expected)
            (source / name).write_bytes(original[name])


# --- interruptions

SCRIPT = """
import sys
from pathlib import Path
from mixtools import convert
from mixtools.layouts.detect import open_checkpoint
source, out, jobs = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
convert.run(convert.plan_hf(open_checkpoint(source), convert.Options()), out, convert.Run(jobs=jobs))
"""
KILLER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from mixtools import convert
from mixtools.layouts.detect import open_checkpoint
source, folder = Path(sys.argv[1]), Path(sys.argv[2])
convert.CHUNK = 1 << 16
os.fsync = lambda file: None  # waits for the disk, which a killed process leaves in order anyway

def go(out):
    job = convert.plan_hf(open_checkpoint(source), convert.Options(max_shard_bytes=2_000_000))
    convert.run(job, out)

def files(out):
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} if out.exists() else {}

go(folder / "expected")
begun = time.perf_counter()
go(folder / "again")
span = time.perf_counter() - begun
expected, out, chance = files(folder / "expected"), folder / "out", random.Random(0)
assert files(folder / "again") == expected
unfinished = 0
for number in range(20):
    shutil.rmtree(out, ignore_errors=True)
    if (child := os.fork()) == 0:
        go(out)
        os._exit(0)
    time.sleep(span * chance.random())
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if files(out) != expected:
        unfinished += 1
        go(out)
    assert files(out) == expected
sys.stdout.write(f"{unfinished}\\n")
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(TREE), **more}


def sharded(source: Checkpoint) -> convert.Job:
    return to_hf(source, max_shard_bytes=2_000_000)


def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL from outside, twenty times, at moments spread over the run; each time continued to the same bytes."""
    source = make.write_b(tmp_path / "source", make.NANO, nano(), files=2)
    command = [sys.executable, "-c", KILLER, source, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment(OMP_NUM_THREADS="1"))
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 0


def test_interrupted_from_the_keyboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C reaches the main thread while the others work: they stop, and what they wrote is continued."""
    source = make.write_a(tmp_path / "a", DIMS)
    expected = files(go(sharded, source, tmp_path / "expected"))
    reads, made = 0, []
    read_rows, event = store.Store.read_rows, threading.Event

    def watched_event() -> threading.Event:
        made.append(event())
        return made[-1]

    def interrupted(self: store.Store, *arguments, **options):
        nonlocal reads
        reads += 1
        if reads == 20:
            os.kill(os.getpid(), signal.SIGINT)
        if reads >= 20:  # no more work until the main thread has told the others to stop
            assert made[0].wait(60)
        return read_rows(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(threading, "Event", watched_event)
        patch.setattr(store.Store, "read_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(sharded, source, tmp_path / "out")
    assert files(tmp_path / "out") == {}
    assert 10 < len((tmp_path / "out" / WORK / JOURNAL).read_text().splitlines()) <= 20
    document = convert.run(sharded(open_checkpoint(source)), tmp_path / "out")
    assert document["resumed_bytes"] > 0
    assert files(tmp_path / "out") == expected


def test_resume_after_the_source_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make.write_a(tmp_path / "a", DIMS)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            go(to_hf, source, tmp_path / "out")
    with pytest.raises(errors.OutputExists, match=r"differs in options, plan;"):
        go(lambda source: to_hf(source, dtype="f32"), source, tmp_path / "out")
    os.utime(source / "consolidated.00.pth", ns=(0, 0))
    with pytest.raises(errors.OutputExists, match=r"differs in source;"):
        go(to_hf, source, tmp_path / "out")
    make.assert_same(weights(go(to_hf, source, tmp_path / "out", overwrite=True)), make.hf(make.torrent(DIMS), DIMS))


def test_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    real = Source.read_into

    def counted(self: Source, offset: int, view: memoryview) -> None:
        nonlocal read
        read += len(view)
        real(self, offset, view)

    for number, write in enumerate((make.write_a, make.write_b)):
        checkpoint = open_checkpoint(write(tmp_path / str(number), DIMS))
        with monkeypatch.context() as patch:
            patch.setattr(Source, "read_into", counted)
            read = 0
            convert.run(to_hf(checkpoint), tmp_path / f"out{number}")
        assert read == sum(tensor.nbytes for tensor in make.torrent(DIMS).values())


def test_overwrite(tmp_path: Path) -> None:
    source = make.write_a(tmp_path / "a", DIMS)
    first = files(go(to_hf, source, tmp_path / "out"))
    with pytest.raises(errors.OutputExists):
        go(to_hf, source, tmp_path / "out")
    go(lambda source: to_hf(source, max_shard_bytes=1000), source, tmp_path / "out", overwrite=True)
    assert "model.safetensors" not in files(tmp_path / "out")
    assert files(go(to_hf, source, tmp_path / "out", overwrite=True)) == first


def test_metadata_for_transformers(tmp_path: Path) -> None:
    hf = go(to_hf, make.write_a(tmp_path / "a", DIMS), tmp_path / "hf")
    with safe_open(hf / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    save_file(weights(hf), tmp_path / "theirs.safetensors", {"format": "pt"})
    assert load_file(tmp_path / "theirs.safetensors").keys() == weights(hf).keys()
