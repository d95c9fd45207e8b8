"""`mixtools perplexity` and `mixtools check` as a script sees them: one document, and the exit code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtral_oracle import DATA, NANO
from safetensors.torch import load_file, save_file

import mixtools as api
from mixtools import conversion, job
from mixtools.checking import perplexity
from mixtools.cli.main import main
from mixtools.errors import UsageError
from mixtools.inference.stream import Stream
from mixtools.layouts.detect import open_checkpoint
from mixtools.text.tokenizer import Tokenizer

TEXT, PROMPTS = DATA / "text.txt", DATA / "prompts.json"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "hf"
    job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), folder)
    return folder


@pytest.fixture
def mixtools(capsys: pytest.CaptureFixture[str]):
    def run(*arguments: object) -> tuple[int, Any, str]:
        """Exit code, standard output (parsed, if JSON), standard error."""
        with pytest.raises(SystemExit) as stop:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), json.loads(out) if "--json" in arguments else out, err

    return run


def test_perplexity_gives_the_promised_document(mixtools):
    code, found, _ = mixtools(
        "perplexity", NANO, "--text", TEXT, "--protocol", "hf", "--ctx", 200, "--stride", 150, "--max-tokens", 900,
        "--dtype", "f32", "--json",
    )  # fmt: skip
    assert code == 0
    checkpoint, tokenizer = open_checkpoint(NANO), Tokenizer.from_folder(NANO)
    ids = tokenizer.encode(TEXT.read_text("utf-8"))
    windows = perplexity.cut(ids, "hf", bos_id=1, ctx=200, stride=150, max_tokens=900)
    expected = perplexity.measure(Stream(checkpoint, dtype=torch.float32), windows)
    assert found["perplexity"] == pytest.approx(expected.perplexity, rel=1e-9)
    assert found["stderr"] == pytest.approx(expected.stderr, rel=1e-9)
    assert (found["tokens"], found["protocol"], found["ctx"]) == (899, "hf", 200)
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0


def test_perplexity_is_told_in_a_line(mixtools):
    code, out, _ = mixtools("perplexity", NANO, "--text", TEXT, "--protocol", "llamacpp")
    assert code == 0
    assert out.startswith("perplexity 65.")  # beyond the 256 positions that nano was trained on
    assert "over 765 tokens (protocol llamacpp, ctx 512)" in out


def test_words_bytes_line_ends_and_experts_are_told(mixtools, tmp_path):
    folder = Path(shutil.copytree(NANO, tmp_path / "three"))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "moe": {"num_experts": 8, "num_experts_per_tok": 3}}))
    file = tmp_path / "windows.txt"
    file.write_bytes(TEXT.read_bytes().replace(b"\n", b"\r\n"))
    rest = ("--ctx", 256, "--dtype", "f32")
    _, expected, _ = mixtools("perplexity", folder, "--text", TEXT, *rest, "--json")
    code, found, _ = mixtools("perplexity", NANO, "--text", TEXT, "--experts-per-token", 3, *rest, "--json")
    assert code == 0
    figures = ("perplexity", "word_perplexity", "byte_perplexity", "stderr", "tokens")
    assert [found[name] for name in figures] == [expected[name] for name in figures]
    assert (expected["remarks"], found["remarks"]) == ([], ["3 experts a token, where the model has 2"])
    code, out, _ = mixtools("perplexity", NANO, "--text", file, "--experts-per-token", 2, *rest)
    assert code == 0
    assert "  word perplexity " in out and ", byte perplexity " in out
    assert "Windows line ends (CRLF)" in out and "experts a token" not in out


def test_check_tells_windows_line_ends(mixtools, hf, tmp_path):
    file = tmp_path / "windows.txt"
    file.write_bytes(TEXT.read_bytes().replace(b"\n", b"\r\n"))
    for text, told in ((TEXT, False), (file, True)):
        arguments = ("--against", NANO, "--text", text, "--ctx", 256, "--new-tokens", 0, "--json")
        code, found, _ = mixtools("check", hf, *arguments)
        assert code == 0
        assert any("Windows line ends (CRLF)" in remark for remark in found["remarks"]) is told


def test_generate_takes_another_number_of_experts(mixtools, tmp_path):
    folder = Path(shutil.copytree(NANO, tmp_path / "one"))
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps({**params, "moe": {"num_experts": 8, "num_experts_per_tok": 1}}))
    rest = ("--prompt", "The following", "--max-new-tokens", 12, "--dtype", "f32", "--json")
    _, expected, _ = mixtools("generate", folder, *rest)
    code, found, _ = mixtools("generate", NANO, "--experts-per-token", 1, *rest)
    assert code == 0
    assert found["tokens"] == expected["tokens"]
    _, plain, _ = mixtools("generate", NANO, *rest)
    assert found["tokens"] != plain["tokens"]
    code, _, err = mixtools("generate", NANO, "--experts-per-token", 1, *rest[:-1])
    assert code == 0
    assert "1 experts a token, where the model has 2" in err


@pytest.mark.parametrize("number", [0, 9, -1])
def test_experts_that_the_model_has_not_are_refused(mixtools, number):
    for command in (["perplexity", NANO, "--text", TEXT, "--ctx", 64], ["generate", NANO, "--prompt", "x"]):
        code, _, err = mixtools(*command, "--experts-per-token", number)
        assert code == 2
        assert "experts-per-token" in err
    with pytest.raises(UsageError, match=f"--experts-per-token {number}: the model has 1 to 8"):
        api.perplexity(NANO, TEXT, ctx=64, experts_per_token=number)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--text", TEXT, "--protocol", "wiki"], 2, "not one of gptq, llamacpp, hf"),
        (["--text", TEXT], 3, "has 1631 tokens, fewer than one window of 2048"),
        (["--text", "no-such-file"], 3, "cannot be read"),
        (["--text", TEXT, "--ctx", "64", "--dtype", "int8"], 2, "none of auto, bf16, f16, f32"),
        (["--text", TEXT, "--ctx", "64", "--max-memory", "10MB"], 5, "less than the program itself takes"),
        (["--text", TEXT, "--ctx", "64", "--device", "tpu"], 2, "none of auto, cpu"),
        ([], 2, "--text"),
    ],
)
def test_perplexity_refuses_in_one_line(mixtools, arguments, code, message):
    found, _, err = mixtools("perplexity", NANO, *arguments)
    assert found == code
    assert message in err
    assert err.count("\n") == 1


def test_check_passes_a_conversion_and_writes_a_report(mixtools, hf, tmp_path):
    code, found, _ = mixtools(
        "check", hf, "--against", NANO, "--text", TEXT, "--ctx", 256, "--prompts", PROMPTS, "--new-tokens", 8,
        "--report", tmp_path / "report", "--json",
    )  # fmt: skip
    assert code == 0
    assert found["passed"] is True
    assert found["source"]["layout"] == "torrent"
    assert found["output"]["tensors"] == found["integrity"]["identical"] == 65
    assert json.loads((tmp_path / "report" / "report.json").read_text("utf-8")) == found
    assert "<h1>Passed</h1>" in (tmp_path / "report" / "report.html").read_text("utf-8")


def test_check_ends_with_4_and_its_document_when_a_gate_fails(mixtools, hf, tmp_path):
    folder = Path(shutil.copytree(hf, tmp_path / "hf"))
    (folder / "mixtools.json").unlink()
    file = next(folder.glob("*.safetensors"))
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    stored["lm_head.weight"] *= 1.01
    save_file(stored, file)
    code, found, _ = mixtools("check", folder, "--against", NANO, "--json")
    assert code == 4
    assert [gate["passed"] for gate in found["gates"]] == [False]
    assert found["integrity"]["worst"][0]["tensor"] == "head"
    assert found["integrity"]["worst"][0]["relative_error"] == pytest.approx(0.01, rel=0.1)
    code, out, _ = mixtools("check", folder, "--against", NANO)
    assert code == 4
    assert "gate tensors_different: 1, limit 0: FAILED" in out
    assert mixtools("check", folder, "--against", NANO, "--gate", "tensors_different=1")[0] == 0


def test_check_ends_with_its_verdict_and_names_no_command_that_is_not_there(mixtools, hf):
    code, out, _ = mixtools("check", hf, "--against", NANO, "--text", TEXT, "--ctx", 256, "--new-tokens", 4)
    assert code == 0
    assert out.splitlines()[-1].startswith("checked: passed.")
    assert "mixtools" not in out.splitlines()[-1]


def test_check_refuses_an_unknown_gate_before_reading(mixtools):
    code, found, _ = mixtools("check", "nowhere", "--against", "nowhere", "--gate", "kld=1", "--json")
    assert code == 2
    assert "tensors_different, ppl_ratio, kld_mean" in found["error"]["message"]
