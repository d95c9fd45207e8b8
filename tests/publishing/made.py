"""Outputs of nano to publish, made and checked once for all tests; each test gets a copy."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import mixtools

DATA = Path(__file__).parents[1] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
SOURCE_CARD = """---
license: apache-2.0
language:
- en
- de
tags:
- small
base_model: somebody/else
---
# Nano

The source's own card.
"""
GATES = {"kld_mean": 0.2, "ppl_ratio": 1.2}
CHECK = {"text": TEXT, "ctx": 128, "max_tokens": 600, "new_tokens": 0}


@cache
def source() -> Path:
    """nano in Hugging Face's layout, with a card."""
    out = Path(mkdtemp(prefix="mixtools-publishing-")) / "nano"
    mixtools.convert(NANO, out, "hf")
    (out / "README.md").write_text(SOURCE_CARD)
    (out / "LICENSE").write_text("words")
    return out


@cache
def _gguf() -> Path:
    out = source().parent / "set"
    mixtools.quantize(source(), out, type=["Q8_0", "Q4_K_M"], name="nano")
    for type in ("Q8_0", "Q4_K_M"):
        assert mixtools.check(out / f"nano.{type}.gguf", source(), gate=GATES, **CHECK).verdict == "passed"
    return out


@cache
def _gptq(bits: int, group: int) -> Path:
    out = source().parent / f"gptq-{bits}-{group}"
    mixtools.quantize(
        source(), out, method="gptq", bits=bits, group_size=group, calibration=TEXT, samples=4, seq_len=64,
        max_shard_size="1MB",
    )  # fmt: skip
    assert mixtools.check(out, source(), gate=GATES, **CHECK).verdict == "passed"
    return out


@cache
def _laser() -> Path:
    out = source().parent / "low"
    mixtools.laser(source(), out, layers="1", targets="w2", rank_rule="energy=0.9")
    assert mixtools.check(out, source(), **CHECK).verdict == "intact"
    return out


def gguf(folder: Path) -> Path:
    return Path(shutil.copytree(_gguf(), folder / "set"))


def gptq(folder: Path, bits: int = 4, group: int = 128) -> Path:
    return Path(shutil.copytree(_gptq(bits, group), folder / f"gptq-{bits}-{group}"))


def laser(folder: Path) -> Path:
    return Path(shutil.copytree(_laser(), folder / "low"))


def read(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
