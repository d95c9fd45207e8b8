"""The command line as users and scripts meet it: where it matters in a process of its own."""

from __future__ import annotations

import importlib.metadata
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import called
from converting import environment

from mixtools import machine
from mixtools.cli import base
from mixtools.errors import UsageError

DATA = Path(__file__).parent.parent / "data"
NANO = DATA / "nano-mixtral"


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mixtools", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def document(*arguments: object, code: int = 0) -> Any:
    done = called(*arguments, "--json")
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "hf"
    assert run("convert", "torrent-to-hf", NANO, out).returncode == 0
    return out


def test_the_main_job_loads_in_transformers_with_the_reference_logits(hf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    reference = np.load(DATA / "reference_logits.npz")
    tokenizer = AutoTokenizer.from_pretrained(hf)
    for language, text in json.loads((DATA / "prompts.json").read_text("utf-8")).items():
        ids, expected = reference[f"{language}_ids"], reference[f"{language}_logits"]
        assert tokenizer(text)["input_ids"][: len(ids)] == ids.tolist()
        with torch.no_grad():
            found = model(torch.tensor(ids[None].astype(np.int64))).logits[0].numpy()
        assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from mixtools.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
    heavy = {"torch", "numpy", "scipy", "tokenizers", "huggingface_hub", "transformers", "matplotlib"}
    code += f"print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", [["convert", "torrent-to-hf", NANO, "out"], ["inspect", NANO, "--verify"]],
                         ids=["convert", "inspect"])  # fmt: skip
def test_what_needs_no_torch(tmp_path: Path, command: list[object]) -> None:
    code = "import sys; from mixtools.cli.main import main\n"
    code += f"try: main({[*map(str, command)]!r})\n"
    code += "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment()
    )
    assert done.stdout.splitlines()[-1] == "0 False"


@pytest.mark.parametrize("command", [["inspect"], ["convert"], ["convert", "to-hf"], ["convert", "torrent-to-hf"],
                                     ["convert", "hf-to-torrent"], ["generate"], ["doctor"]])  # fmt: skip
def test_every_command_has_help(command: list[str]) -> None:
    done = called(*command, "--help")
    assert done.returncode == 0
    assert "Usage: mixtools" in done.stdout
    assert command == ["convert"] or "Example: mixtools" in done.stdout


@pytest.mark.parametrize(
    ("group", "lists"), [([], "convert"), (["convert"], "torrent-to-hf"), (["recipe"], "validate")]
)
def test_a_group_alone_is_its_help(group: list[str], lists: str) -> None:
    """The first thing that a newcomer types."""
    alone, asked = called(*group), called(*group, "--help")
    assert alone.stdout == asked.stdout and alone.stdout.startswith(f"Usage: {' '.join(['mixtools', *group])} ")
    assert re.search(rf"^  {lists} ", alone.stdout, re.M)
    assert alone.stderr == "" and alone.returncode in (0, 2)


def test_a_misspelt_command_is_answered_with_the_right_one() -> None:
    assert called("convrt").stderr == "error: No such command 'convrt'. Did you mean 'convert'? Try: mixtools --help\n"
    assert called("convert", "tohf").stderr.endswith("Try: mixtools convert --help\n")
    assert called("inspect").stderr == "error: Missing argument 'MODEL'. Try: mixtools inspect --help\n"


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("con", {"convert"}),
        ("convert ", {"to-hf", "torrent-to-hf", "hf-to-torrent", "gguf-upgrade", "expert-names"}),
        ("laser --rank", {"--rank-rule"}),
    ],
)
def test_the_shell_completes(typed: str, offered: set[str]) -> None:
    words = f"mixtools {typed}"
    asked = {"_MIXTOOLS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    done = subprocess.run(
        [sys.executable, "-c", "from mixtools.cli.main import main; main()"],
        capture_output=True, text=True, check=True, env={**os.environ, **asked},
    )  # fmt: skip
    assert set(done.stdout.split()) == offered


def test_completion_is_installed_on_request(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m mixtools --install-completion bash; exit $?"  # whose parent is a shell
    env = {**os.environ, "HOME": str(tmp_path), "SHELL": "/bin/bash"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (script,) = [path for path in tmp_path.rglob("*") if path.is_file() and "mixtools" in path.name]
    assert "_MIXTOOLS_COMPLETE" in script.read_text()


def test_the_package_s_page_is_the_readme() -> None:
    assert "## In Python" in str(importlib.metadata.metadata("mixtools").get_payload())


def test_errors_are_one_line_and_an_exit_code(tmp_path: Path, hf: Path) -> None:
    busy = tmp_path / "busy"
    busy.mkdir()
    (busy / "thesis.txt").write_text("years of work")
    cases: list[tuple[int, list[object]]] = [
        (2, ["inspect"]),
        (2, ["inspect", NANO, "--frobnicate"]),
        (2, ["frobnicate"]),
        (2, ["generate", hf]),
        (2, ["generate", hf, "--prompt", "x", "--temperature", "-1"]),
        (2, ["generate", hf, "--prompt", "x", "--dtype", "int3"]),
        (2, ["generate", hf, "--prompt", "x", "--device", "cuda:99"]),
        (2, ["convert", "to-hf", NANO, tmp_path / "a", "--max-memory", "much"]),
        (2, ["convert", "to-hf", NANO, tmp_path / "a", "--dtype", "bf17"]),
        (2, ["convert", "to-hf", NANO, NANO]),
        (3, ["inspect", tmp_path / "missing"]),
        (3, ["inspect", busy]),
        (3, ["convert", "torrent-to-hf", hf, tmp_path / "a"]),
        (3, ["convert", "hf-to-torrent", NANO, tmp_path / "a"]),
        (5, ["convert", "to-hf", NANO, tmp_path / "a", "--max-memory", "1MB"]),
        (5, ["generate", hf, "--prompt", "x", "--max-memory", "1MB"]),
        (8, ["convert", "to-hf", NANO, busy]),
        (8, ["convert", "to-hf", NANO, busy, "--overwrite"]),
    ]
    seen = set()
    for code, arguments in cases:
        done = called(*arguments)
        assert done.returncode == code, (arguments, done.stderr)
        assert done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        error = document(*arguments, code=code)["error"]
        assert error.keys() == {"type", "message", "file", "tensor"}
        assert done.stderr == f"error: {error['message']}\n"
        if code not in seen:  # once of each in a process of its own
            alone = run(*arguments)
            assert (alone.returncode, alone.stdout, alone.stderr) == (code, "", done.stderr)
            seen.add(code)
    assert (busy / "thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["busy"]


def test_debug_shows_a_traceback(tmp_path: Path) -> None:
    done = run("inspect", tmp_path / "missing", "--debug")
    assert "Traceback" in done.stderr and done.stderr.splitlines()[-1].startswith("error: ")


def test_inspect_tells_what_is_there(hf: Path) -> None:
    nano = document("inspect", NANO, "--tensors")
    assert nano["layout"] == "torrent" and nano["parameters"] == 4_592_896 and nano["tensors"] == 65
    assert nano["bytes"] == 9_185_792 and nano["config"]["rope_theta"] == 1e6
    assert nano["problems"] == nano["missing"] == nano["unknown"] == []
    assert {"name", "dtype", "shape", "bytes", "file", "offset"} == nano["tensors_list"][0].keys()
    assert document("inspect", hf, "--verify")["verified"] is True
    text = called("inspect", hf).stdout
    assert "4,592,896 parameters in 65 tensors" in text and "rope theta 1e+06" in text


def test_inspect_names_what_is_missing(tmp_path: Path, hf: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors["model.layers.1.block_sparse_moe.experts.3.w9.weight"] = tensors.pop(name)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((hf / "config.json").read_bytes())
    found = document("inspect", tmp_path, code=3)
    assert found["missing"] == [name] and found["unknown"] == [name.replace("w2", "w9")]
    assert [problem["type"] for problem in found["problems"]] == ["LayoutError", "LayoutError"]
    assert document("convert", "to-hf", tmp_path, tmp_path / "out", code=3)["error"]["tensor"] == name


def test_dry_run_is_exact_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--max-shard-size", "3MB")
    forecast = document("convert", "torrent-to-hf", NANO, out, *options, "--dry-run")
    assert not out.exists()
    document("convert", "torrent-to-hf", NANO, out, *options)
    assert forecast["files"] == {path.name: path.stat().st_size for path in out.glob("*.safetensors")}
    assert forecast["bytes"] == sum(forecast["files"].values())


def test_a_whole_round_trip_by_commands(tmp_path: Path, hf: Path) -> None:
    for form, name in (("--pth", "consolidated.00.pth"), ("--safetensors", "consolidated.safetensors")):
        out = tmp_path / form
        made = document("convert", "hf-to-torrent", hf, out, form)
        assert made["files"] == [name] and made["missing"] == []
        assert (out / "tokenizer.model").read_bytes() == (NANO / "tokenizer.model").read_bytes()
    first = torch.load(NANO / "consolidated.00.pth", weights_only=True)
    again = torch.load(tmp_path / "--pth" / "consolidated.00.pth", weights_only=True, mmap=True)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_generate_continues_as_transformers_does(hf: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The installer asks for the name"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)[0, ids.shape[1] :].tolist()
    made = document("generate", hf, "--prompt", prompt, "--max-new-tokens", 20, "--dtype", "f32")
    assert made["tokens"] == [token for token in expected if token != 2]
    assert made["prompt_tokens"] == ids.shape[1]
    shown = run("generate", hf, "--prompt", prompt, "--max-new-tokens", 20, "--dtype", "f32", "--quiet")
    assert shown.stdout == made["text"] + "\n" and shown.stderr == ""


def test_sampling_repeats_with_its_seed(hf: Path) -> None:
    options = ("--prompt", "Le", "--max-new-tokens", 12, "--temperature", 1.0, "--top-p", 0.9)
    first, again, other = (document("generate", hf, *options, "--seed", seed)["tokens"] for seed in (3, 3, 4))
    assert first == again != other


def test_chat_from_standard_input(hf: Path) -> None:
    done = run("generate", hf, "--chat", "--max-new-tokens", 4, input="Hello\n\nAnd again\n")
    assert done.returncode == 0 and len(done.stdout.strip("\n").split("\n")) >= 2
    assert called("generate", hf, "--chat", "--json").returncode == 2


def test_an_interrupt_is_exit_130_and_the_same_command_continues(tmp_path: Path) -> None:
    """A slow disk, so that the signal comes in the middle."""
    out = tmp_path / "out"
    code = (
        "import os, sys, time\nreal = os.pwrite\n"
        "def slow(*a):\n    time.sleep(0.05)\n    return real(*a)\nos.pwrite = slow\n"
        "from mixtools.cli.main import main\nmain(sys.argv[1:])\n"
    )
    arguments = ["convert", "torrent-to-hf", str(NANO), str(out)]
    with subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True) as process:
        journal = out / ".mixtools" / "journal.jsonl"
        while not journal.exists() or journal.read_text().count("\n") < 8:
            time.sleep(0.01)
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert process.returncode == 130
    assert errors == "error: interrupted; the same command continues where it stopped\n"
    assert [path.name for path in out.iterdir()] == [".mixtools"]
    assert document(*arguments)["resumed_bytes"] > 0
    whole = tmp_path / "whole"
    document("convert", "torrent-to-hf", NANO, whole)
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_progress_is_drawn_on_a_terminal_only(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "mixtools", "convert", "torrent-to-hf", str(NANO), str(tmp_path / "out")]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=slave, check=True, env={**os.environ, "TERM": "xterm"}
    )
    os.close(slave)
    assert b"converting" in os.read(master, 1 << 16)
    os.close(master)
    assert b"converting" not in done.stdout


def test_a_closed_pipe_is_no_error() -> None:
    command = f"{sys.executable} -m mixtools inspect {NANO} --tensors | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("800mb", 8 * 10**8), ("1.5GiB", 3 << 29), ("4096", 4096), ("2 K", 2000), ("1T", 10**12)],
)
def test_sizes(text: str, size: int) -> None:
    assert machine.parse_size(text, "x") == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1PB", "1e9", "5 GB!", "nan"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="--x"):
        machine.parse_size(text, "x")


def test_line_progress_tells_time_left(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    clock = iter([0.0, 5.0, 20.0])
    monkeypatch.setattr(base.time, "monotonic", lambda: next(clock))
    progress = base.LineProgress()
    progress.start("converting", 4_000_000_000)
    progress.advance(500_000_000)
    progress.advance(500_000_000)
    assert capsys.readouterr().err == "converting: 1.00 GB of 4.00 GB, 60.0 s left\n"
