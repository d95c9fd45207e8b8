"""mixtools laser and spectrum as users and scripts meet them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mixtools
from mixtools import conversion, job
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.laser import verbs as command
from mixtools.methods.laser.selection import ALL_TARGETS

DATA = Path(__file__).parent.parent / "data"
NANO = DATA / "nano-mixtral"
TEXT = DATA / "text.txt"
OUTPUT, HELD = ("--norm", "output", "--text", TEXT), ("--held-out", DATA / "prompts.json")
W2 = ("--layers", "1", "--targets", "w2", "--experts", "3")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "mixtools", *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, check=False)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit code and message, in this process: starting one for each would take most of the time."""
    from mixtools.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, (out, err)
    return int(caught.value.code or 0), err


def document(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    from mixtools.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main([*map(str, arguments), "--json", "--quiet"])
    out, err = capsys.readouterr()
    assert caught.value.code == 0, out + err
    return json.loads(out)


def test_a_run_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("laser", NANO, out, *W2, "--rank-rule", "energy=0.8", "--quiet")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in done.stdout
    assert done.stdout.splitlines()[-1] == f"Check it with: mixtools check {out} --against {NANO}"
    assert (out / "laser-report.html").is_file()
    assert open_checkpoint(out).layout.letter == "D"


def test_the_command_names_the_engines_targets() -> None:
    assert command.ALL_TARGETS == ALL_TARGETS


@pytest.mark.parametrize("name", ["laser", "spectrum"])
def test_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from mixtools.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    assert f"Example: mixtools {name}" in capsys.readouterr().out


def test_json_holds_report_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = document(capsys, "laser", NANO, tmp_path / "out", *W2, "--text", TEXT, "--seq-len", "64", "--samples", "4")
    assert found["laser"]["rank_rule"] == "mp"
    assert found["calibration"]["tokens"] == 256
    assert found["matrices"][0]["layer_error"] > 0
    assert found["tensors"] == 65 and found["resumed_bytes"] == 0
    report = json.loads((tmp_path / "out" / "laser-report.json").read_text())
    assert report["matrices"] == found["matrices"]
    assert "seconds" not in report


def test_spectrum_tells_what_laser_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = document(capsys, "spectrum", NANO, *W2, "--rank-rule", "gavish-donoho", "--out", tmp_path / "seen")
    done = document(capsys, "laser", NANO, tmp_path / "out", *W2, "--rank-rule", "gavish-donoho")
    assert sorted(path.suffix for path in (tmp_path / "seen").iterdir()) == [".csv", ".html", ".json"]
    assert refused(capsys, "spectrum", NANO, *W2, "--out", tmp_path / "out")[0] == 8  # the checkpoint's own report
    for row, other in zip(seen["matrices"], done["matrices"], strict=True):
        assert row["rank"] == other["rank"]
        assert row["energy"] == pytest.approx(other["energy"], rel=1e-9)


@pytest.mark.parametrize(
    "more",
    [
        (), ("--factored",), ("--text", TEXT, "--seq-len", "64"), ("--budget", "0.7"),
        (*OUTPUT, "--seq-len", "64", "--budget", "0.7", "--factored"),
    ],
)  # fmt: skip
def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[object, ...]) -> None:
    found = document(capsys, "laser", NANO, tmp_path / "out", "--layers", "all", "--dry-run", *more)
    assert found["dry_run"] and found["matrices"] == 56
    assert found["targets"] == {"w1": 16, "w2": 16, "w3": 16, "q": 2, "k": 2, "v": 2, "o": 2}
    assert found["seconds"] >= 0 and found["peak_memory_bytes"] > 1e6
    assert ("calibration" in found) == ("--text" in more)
    assert found.get("calibration_passes") == (None if "--text" not in more else 2 if "--budget" in more else 1)
    document(capsys, "spectrum", NANO, "--layers", "all", "--out", tmp_path / "seen", "--dry-run")
    assert not any(tmp_path.iterdir())


def test_factored_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (*W2, "--rank-rule", "activation=0.1", "--factored", "--text", TEXT, "--seq-len", "64")
    found = document(capsys, "laser", NANO, tmp_path / "factored", *arguments)
    assert 0 < found["matrices"][0]["layer_error"] <= 0.1
    document(capsys, "convert", "to-hf", tmp_path / "factored", tmp_path / "dense")
    pair = [open_checkpoint(tmp_path / name) for name in ("factored", "dense")]
    for slot in pair[0].slots():
        assert (pair[0].bits(slot) == pair[1].bits(slot)).all()


def test_bad_input_is_one_line_and_a_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = tmp_path / "hf"
    job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), hf)
    quantized = tmp_path / "quantized"
    mixtools.quantize(NANO, quantized, method="nf4")
    out = tmp_path / "out"
    busy = hf  # a folder that holds something
    cases: list[tuple[int, str, list[object]]] = [
        (2, "out of range", ["laser", NANO, out, "--layers", "2"]),
        (2, "out of range", ["spectrum", NANO, "--layers", "all", "--experts", "8"]),
        (2, "is not one of w1,w2,w3", ["laser", NANO, out, "--layers", "1", "--targets", "w9"]),
        (2, "rank 256 at most", ["laser", NANO, out, *W2, "--rank-rule", "rank=300"]),
        (2, "rank 256 at most", ["spectrum", NANO, *W2, "--rank-rule", "rank=300"]),
        (2, "save only below rank 128", ["laser", NANO, out, *W2, "--rank-rule", "rank=128", "--factored"]),
        (2, "calibration text", ["laser", NANO, out, *W2, "--rank-rule", "activation=0.01"]),
        (2, "is not one of mp", ["laser", NANO, out, *W2, "--rank-rule", "bayes"]),
        (2, "own folder", ["laser", hf, hf, *W2]),
        (2, "--held-out", ["laser", NANO, out, *W2, "--search", "gain", "--text", TEXT]),
        (2, "--held-out", ["laser", NANO, out, *W2, "--held-out", TEXT]),
        (
            2,
            "own threshold",
            ["laser", NANO, out, *W2, "--search", "laserrmt", "--text", TEXT, "--held-out", TEXT, "--rank-rule", "mp"],
        ),
        (2, "is not one of gain", ["laser", NANO, out, *W2, "--search", "luck", "--text", TEXT, "--held-out", TEXT]),
        (2, "give it --text", ["laser", NANO, out, *W2, "--norm", "output"]),
        (2, "give it --text", ["spectrum", NANO, *W2, "--norm", "output"]),
        (2, "is not one of weights, output", ["laser", NANO, out, *W2, "--norm", "both", "--text", TEXT]),
        (2, "finds noise in the weights", ["laser", NANO, out, *W2, *OUTPUT, "--rank-rule", "gavish-donoho"]),
        (2, "rank 256 at most", ["laser", NANO, out, *W2, *OUTPUT, "--rank-rule", "rank=257"]),
        (2, "leave out --exact", ["laser", NANO, out, *W2, *OUTPUT, "--exact"]),
        (2, "damping 0 is a share", ["laser", NANO, out, *W2, *OUTPUT, "--damping", "0"]),
        (2, "damping nan is a share", ["laser", NANO, out, *W2, *OUTPUT, "--damping", "nan"]),
        (2, "leave out --rank-rule", ["laser", NANO, out, *W2, "--budget", "0.5", "--rank-rule", "mp"]),
        (2, "leave out --search", ["laser", NANO, out, *W2, "--budget", "0.5", "--search", "gain", *OUTPUT, *HELD]),
        (2, "a budget of 1.5: it is a share", ["laser", NANO, out, *W2, "--budget", "1.5"]),
        (2, "a budget of nan: it is a share", ["laser", NANO, out, *W2, "--budget", "nan"]),
        (2, "a budget of 0: it is a share", ["laser", NANO, out, *W2, "--budget", "0"]),
        (2, "too small for a rank of 1", ["laser", NANO, out, *W2, "--budget", "0.001"]),
        (2, "between 0 and the budget, 0.5", ["laser", NANO, out, *W2, "--budget", "0.5", "--layer-floor", "0.6"]),
        (2, "give it with one", ["laser", NANO, out, *W2, "--layer-floor", "0.6"]),
        (2, "goes with --norm output", ["laser", NANO, out, *W2, "--sequential", "--text", TEXT]),
        (2, "goes with --norm output", ["laser", NANO, out, *W2, "--routed", "--text", TEXT]),
        (2, "leave out --sequential", ["laser", NANO, out, *W2, *OUTPUT, *HELD, "--search", "gain", "--sequential"]),
        (2, "leave out --norm output", ["laser", NANO, out, *W2, *OUTPUT, *HELD, "--search", "laserrmt"]),
        (3, "fewer than one sample", ["laser", NANO, out, *W2, *OUTPUT, "--seq-len", "99999"]),
        (5, "--max-memory", ["laser", NANO, out, *W2, *OUTPUT, "--seq-len", "64", "--max-memory", "1MB"]),
        (3, "does not exist", ["laser", tmp_path / "none", out, *W2]),
        (3, "`mixtools convert to-hf`", ["laser", quantized, out, *W2]),
        (3, "`mixtools convert to-hf`", ["spectrum", quantized, *W2]),
        (3, "fewer than one sample", ["laser", NANO, out, *W2, "--text", TEXT, "--seq-len", "99999"]),
        (5, "--max-memory", ["laser", NANO, out, *W2, "--max-memory", "1MB"]),
        (8, "is not empty", ["laser", NANO, busy, *W2, "--factored"]),
    ]
    for code, words, arguments in cases:
        found, message = refused(capsys, *arguments)
        assert found == code and words in message, (arguments, found, message)
    assert not out.exists()


def test_a_search_writes_what_it_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = TEXT.read_text("utf-8")
    (tmp_path / "a.txt").write_text(content[: len(content) // 2])
    (tmp_path / "b.txt").write_text(content[len(content) // 2 :])
    texts = ("--text", tmp_path / "a.txt", "--held-out", tmp_path / "b.txt", "--seq-len", "64")
    arguments = ("--layers", "1", "--targets", "w2", "--search", "gain", *texts)
    found = document(capsys, "laser", NANO, tmp_path / "out", *arguments)
    search = found["search"]
    assert len(search["candidates"]) == 8
    accepted = {row["tensor"]: row["rank"] for row in search["candidates"] if row["accepted"]}
    assert {row["tensor"]: row["rank"] for row in found["matrices"]} == accepted
    assert search["held_out"]["tokens"] > 100
    source, written = open_checkpoint(NANO), open_checkpoint(tmp_path / "out")
    for slot in source.slots():
        same = (source.bits(slot) == written.bits(slot)).all()
        assert same == (written.piece(slot).name not in accepted), slot
    page = (tmp_path / "out" / "laser-report.html").read_text("utf-8")
    assert "Search: gain" in page
    again = document(capsys, "laser", NANO, tmp_path / "again", *arguments)
    assert again["matrices"] == found["matrices"]
    for name in ("model.safetensors", "laser-report.json", "laser-report.html", "mixtools.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
