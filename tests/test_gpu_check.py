"""scripts/gpu_check where there is no GPU: it says so, and its parts run in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

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
    assert told["parts"]["spectra"]["figures"]["spectrum"]["ratio"] > 0
    assert told["seconds"] >= told["parts"]["spectra"]["seconds"]


def test_of_a_part_that_takes_too_long_what_it_found_stays(monkeypatch):
    script = load_script()
    late = """if True:
        import time
        print('{"kinds": 1}\\n{"kinds": 2}\\n{', end="", flush=True)
        time.sleep(60)
    """
    monkeypatch.setattr(script, "command", lambda part, small: [sys.executable, "-c", late])
    found = script.run("decode", True, 3.0)
    assert "more than 3 seconds" in found["failed"] and found["figures"] == {"kinds": 2}
    monkeypatch.setattr(script, "command", lambda part, small: [sys.executable, "-c", "import time; time.sleep(60)"])
    assert "figures" not in script.run("decode", True, 1.0)


def test_a_part_that_takes_too_long_leaves_nothing_running(monkeypatch, tmp_path):
    """What a part has started itself, as a test's workers are, would keep the card busy."""
    script, pid = load_script(), tmp_path / "pid"
    late = f"""if True:
        import pathlib, subprocess, time
        other = subprocess.Popen(["sleep", "60"])
        print("not a figure", flush=True)
        pathlib.Path({str(pid)!r}).write_text(str(other.pid))
        time.sleep(60)
    """
    monkeypatch.setattr(script, "command", lambda part, small: [sys.executable, "-c", late])
    found = script.run("calibrated", True, 4.0)
    assert "more than 4 seconds" in found["failed"] and "figures" not in found
    gone = time.monotonic() + 20
    while alive(int(pid.read_text())):
        assert time.monotonic() < gone
        time.sleep(0.1)


def alive(pid: int) -> bool:
    """A zombie, which its new parent has not asked for yet, is not."""
    state = Path(f"/proc/{pid}/stat")
    try:
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_part_without_figures_has_failed(monkeypatch):
    script = load_script()
    monkeypatch.setattr(script, "command", lambda part, small: [sys.executable, "-c", "print('all is well')"])
    assert script.run("decode", True, 30.0)["failed"] == "told no figures"


def test_without_git_its_state_is_unknown(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert load_script().commit() == "unknown"


def load_script() -> ModuleType:
    path = str(ROOT / "scripts" / "gpu_check")
    loader = SourceFileLoader("gpu_check", path)
    module = module_from_spec(spec_from_loader("gpu_check", loader))
    loader.exec_module(module)
    return module
