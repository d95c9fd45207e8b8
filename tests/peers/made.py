"""What the peers of packed formats load: nano, rounded to nearest, in each format and with either names of experts.

How well the codes were chosen is no matter here; what a loader makes of them is. So the quickest rounding will do, and
the command itself is tried on each format once.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from layouts import make
from safetensors import safe_open

import mixtools
from mixtools.conversion import Changes, Options, plan_hf
from mixtools.formats import Awq, Gptq, Int8, Nf4, Packed, PackedInts
from mixtools.formats.int8 import int8
from mixtools.formats.nf4 import nf4
from mixtools.inference.model import Mixtral
from mixtools.job import run
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import backends
from mixtools.names import ATTENTION, EXPERT
from mixtools.storage.dtypes import DType
from mixtools.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
WINDOW = 256
REAL = make.Dims(d=256, f=512, layers=1, heads=4, kv=2, hd=64, vocab=32000, experts=8)
RANDOM_TEXTS = [torch.randint(3, 32000, (128,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(8)]


class Figures(NamedTuple):
    """Of logits beside others. `most`: what nine positions of ten stay below, an expert of eight has a quarter of them;
    `same_top`: share of positions with the same likeliest token.
    """

    kld: float
    most: float
    same_top: float


def packed(out: Path, format: Any, *, names: str = "legacy", source: Path = NANO) -> Path:
    """Every matrix of attention and experts in that format, in shards of 1 MB, everything else in the scales' dtype."""
    checkpoint = open_checkpoint(source)
    slots = [slot for slot in checkpoint.slots() if slot.role in (*ATTENTION, *EXPERT)]
    changes = Changes.each(
        slots, lambda slot: nearest(checkpoint.read(slot).float(), format), dict.fromkeys(slots, format)
    )
    dtype = {DType.F16: "f16", DType.BF16: "bf16"}[format.dtype]
    run(plan_hf(checkpoint, Options(dtype=dtype, max_shard_bytes=1_000_000, expert_names=names), changes), out)
    return out


def quantized(out: Path, **options: Any) -> Path:
    """Nano by the command's own function, over a short text."""
    mixtools.quantize(NANO, out, calibration=TEXT, samples=8, seq_len=128, **options)
    return out


Format = Gptq | Awq | PackedInts | Nf4 | Int8


def nearest(weight: torch.Tensor, format: Format) -> Packed:
    """Of a matrix [out, in]; zeros are at least 1, which every format can store."""
    if isinstance(format, Nf4 | Int8):
        exact = weight.to(format.dtype.torch())
        return nf4(exact, format.double) if isinstance(format, Nf4) else int8(exact)
    rows, columns = weight.shape
    length, top = columns if format.group == -1 else format.group, (1 << format.bits) - 1
    groups = weight.view(rows, -1, length)
    low, high = groups.amin(2).clamp(max=-1e-6), groups.amax(2).clamp(min=1e-6)
    if format.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / top).to(format.dtype.torch()).float()
    zeros = torch.full_like(scales, 1 << format.bits - 1) if format.symmetric else (-low / scales).round().clamp(1, top)
    codes = (groups / scales[..., None] + zeros[..., None]).round().clamp(0, top).view(rows, columns)
    return format.encode(codes.to(torch.uint8), scales, zeros)


class Arithmetic(NamedTuple):
    """How far apart it leaves the same model. A token whose router's scores nearly tie may go to another expert: that
    raises the mean, and is seldom.
    """

    kld: float
    most: float


FP32, ALMOST_FP32, FP16 = Arithmetic(1e-4, 1e-10), Arithmetic(1e-4, 1e-6), Arithmetic(1e-3, 1e-5)


def random(out: Path) -> Path:
    """A model with the vocabulary of the real one, one layer, weights of a usual size; the tokenizer is nano's."""
    tensors = {name: one * 0.05 if one.ndim > 1 else one.abs() for name, one in make.torrent(REAL, seed=7).items()}
    make.write_hf(out, make.hf(tensors, REAL), REAL)
    shutil.copyfile(NANO / "tokenizer.model", out / "tokenizer.model")
    return out


def lend_environment(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """This environment, which has the package, as that of a back end."""
    python = folder / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    (folder / name / "made").write_text(backends.stamp(backends.find(name)))
    monkeypatch.setenv(backends.VARIABLE, str(folder))


# --- what it means ---


def windows() -> list[list[int]]:
    ids = Tokenizer.from_folder(NANO).encode(TEXT.read_text("utf-8"))
    return [ids[start : start + WINDOW] for start in range(0, 4 * WINDOW, WINDOW)]


def ours(model: Path, texts: Sequence[Sequence[int]], dense: DType | None = DType.F32) -> torch.Tensor:
    """[tokens of all texts, V], in fp32 from weights decoded to `dense`, None for what their format usually gives."""
    mixtral = Mixtral.load(replace(mixtools.open(model), dense=dense), dtype=torch.float32)
    with torch.inference_mode():
        return torch.cat([mixtral(torch.tensor([list(text)]))[0] for text in texts])


def theirs(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """[tokens of all texts, V] of a model of transformers'."""
    model.eval()
    with torch.inference_mode():
        return torch.cat([model(torch.tensor([list(text)])).logits[0].float() for text in texts])


def beside(theirs: torch.Tensor, ours: torch.Tensor) -> Figures:
    """Logits [N, V] each: how far the second's distributions are from the first's."""
    p, q = (logits.double().log_softmax(-1) for logits in (theirs, ours))
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    kld = (p.exp() * (p - q)).sum(-1)
    return Figures(float(kld.mean()), float(kld.quantile(0.9)), float(same))


def expect_equal(theirs: torch.Tensor, ours: torch.Tensor, how: Arithmetic) -> None:
    """The same weights, as far as that arithmetic can tell. Raises AssertionError."""
    assert len(theirs) == len(ours) >= 1000
    found = beside(theirs, ours)
    assert found.same_top >= 0.99 and found.most < how.most and found.kld < how.kld, found


# --- what lies there ---


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def expect_keys(model: torch.nn.Module, folder: Path, idle: Iterable[str] = ()) -> None:
    """Every tensor of the folder has its place in the model, and every place its tensor. Raises AssertionError.

    `idle`: last words of the names of places that a loader fills by itself.
    """
    there, wanted = stored(folder), {name: tuple(one.shape) for name, one in model.state_dict().items()}
    assert sorted(there.keys() - wanted.keys()) == []
    assert [name for name in sorted(wanted.keys() - there.keys()) if not name.endswith(tuple(idle))] == []
    assert {name: shape for name, shape in there.items() if wanted[name] != shape} == {}


def config(folder: Path) -> Mapping[str, object]:
    found: Mapping[str, object] = json.loads((folder / "config.json").read_text("utf-8"))
    return found
