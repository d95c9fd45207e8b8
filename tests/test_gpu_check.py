"""scripts/gpu_check where there is no GPU: it says so, and its parts run in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, ROOT / "scripts" / "gpu_check", *arguments]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=environment, check=False)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run("--out", tmp_path / "gpu.json")
    assert done.returncode == 1 and "finds no GPU" in done.stderr and not (tmp_path / "gpu.json").exists()


def test_an_unknown_part_is_named(tmp_path):
    done = run("--parts", "decode,encoed", "--out", tmp_path / "gpu.json")
    assert done.returncode == 2 and "encoed" in done.stderr and "encode" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_what_fails_is_told_of_and_takes_nothing_else_along(tmp_path):
    """Without Triton nothing is decoded; what comes before and after is."""
    out = tmp_path / "gpu.json"
    done = run("--small", "--parts", "machine,decode,spectra", "--out", out)
    told = json.loads(out.read_text("utf-8"))
    assert done.returncode == 1 and done.stdout.strip() == str(out)
    assert told["small"] and told["parts"]["machine"]["figures"]["torch"] == torch.__version__
    assert "Triton" in told["parts"]["decode"]["failed"]
    assert told["parts"]["spectra"]["figures"]["ratio"] > 0
    assert told["seconds"] >= told["parts"]["spectra"]["seconds"]
