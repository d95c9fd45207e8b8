"""`mixtools run` and `mixtools recipe` as users and scripts meet them."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from mixtools.cli import main as cli
from mixtools.recipe import run as command

DATA = Path(__file__).parent.parent / "data"
NANO = DATA / "nano-mixtral"


class Done(NamedTuple):
    code: object
    out: str
    err: str


def run(*arguments: object) -> Done:
    """The command in this process: a start of the interpreter for each would take longer than the work."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as ended:
        cli.main([*map(str, arguments)])
    return Done(ended.value.code, out.getvalue(), err.getvalue())


def document(*arguments: object) -> Any:
    done = run(*arguments, "--json", "--quiet")
    assert done.code == 0, done.out + done.err
    return json.loads(done.out)


def contents(folder: Path) -> dict[str, bytes]:
    """But for what the manifest lists of the recipe, which tells where it wrote, and the record of a check's time."""
    found = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "mixtools-check.json"}
    if "mixtools.json" in found:
        manifest = json.loads(found["mixtools.json"])
        manifest["files"].pop("recipe.yaml", None)
        found["mixtools.json"] = json.dumps(manifest).encode()
    return found


@pytest.fixture
def nano(tmp_path: Path) -> Path:
    """A copy that a test may change, older than all that is made of it."""
    folder = tmp_path / "nano"
    folder.mkdir()
    for path in NANO.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_the_recipes_that_come_along_are_found_and_fit_their_commands(tmp_path: Path) -> None:
    listed = document("recipe", "ls")["recipes"]
    assert [row["name"] for row in listed] == [
        "awq", "everything", "gguf-set", "gptq-branches", "laser-instruct", "laser-output", "torrent-to-hf",
    ]  # fmt: skip
    given = {"source": NANO, "text": DATA / "text.txt", "held_out": DATA / "prompts.json"}
    given |= {"out": tmp_path / "o", "name": tmp_path / "o"}
    for row in listed:
        known = document("recipe", "show", row["name"])["vars"]
        pairs = [f"{key}={value}" for key, value in given.items() if key in known]
        assert document("recipe", "validate", row["name"], *pairs)["valid"] is True
        assert document("recipe", "show", row["name"])["name"] == row["name"]
        assert run("recipe", "show", row["name"]).out == (command.folder() / f"{row['name']}.yaml").read_text()
    assert not (tmp_path / "o").exists()


def test_torrent_to_hf_is_the_command_s_own_bytes_and_a_second_run_does_nothing(nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    arguments = ("run", "torrent-to-hf", f"source={nano}", f"out={out}")
    plan = run(*arguments, "--dry-run")
    assert plan.out.splitlines() == [
        f"mixtools convert torrent-to-hf {nano} {out}",
        f"mixtools check {out} --against {nano} --report {out}-check",
    ]
    assert not out.exists()
    first = document(*arguments)
    assert [(step["step"], step["status"]) for step in first["steps"]] == [("convert", "done"), ("check", "done")]
    assert first["steps"][1]["result"]["passed"] is True
    plain = tmp_path / "plain"
    document("convert", "torrent-to-hf", nano, plain)
    made = contents(out)
    copy = yaml.safe_load(made.pop("recipe.yaml"))
    assert made == contents(plain)
    assert copy["steps"][0] == {
        "do": "convert torrent-to-hf", "as": "convert", "src": str(nano), "out": str(out), "dtype": "keep",
        "max_shard_size": "5GB",
    }  # fmt: skip
    before = contents(out) | contents(tmp_path / "hf-check")
    again = document(*arguments)
    assert [step["status"] for step in again["steps"]] == ["skipped", "skipped"]
    assert contents(out) | contents(tmp_path / "hf-check") == before
    assert "skipped convert" in run("run", out / "recipe.yaml").out


def test_what_changed_is_not_skipped(nano: Path, tmp_path: Path) -> None:
    out = tmp_path / "hf"
    arguments = ("run", "torrent-to-hf", f"source={nano}", f"out={out}")
    document(*arguments)
    other = run(*arguments, "steps.convert.dtype=f32")
    assert other.code == 8 and "--overwrite" in other.err
    redone = document(*arguments, "steps.convert.dtype=f32", "--overwrite")
    assert [step["status"] for step in redone["steps"]] == ["done", "done"]
    later = (out / "recipe.yaml").stat().st_mtime_ns + 10**9
    os.utime(nano / "consolidated.00.pth", ns=(later, later))
    assert run(*arguments, "steps.convert.dtype=f32").code == 8


def test_a_failed_check_ends_the_run_with_its_code(nano: Path, tmp_path: Path) -> None:
    steps = [
        {
            "do": "laser",
            "src": str(nano),
            "out": str(tmp_path / "low"),
            "layers": 1,
            "targets": "q",
            "rank_rule": "rank=8",
        },
        {"do": "check", "output": "${steps.laser.out}", "against": str(nano), "gate": ["tensors_different=0"]},
        {"do": "convert hf-to-torrent", "as": "back", "src": "${steps.laser.out}", "out": str(tmp_path / "back")},
    ]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "n", "description": "d", "steps": steps}))
    done = run("run", file, "--json")
    assert done.code == 4
    assert [step["status"] for step in json.loads(done.out)["steps"]] == ["done", "failed"]
    assert not (tmp_path / "back").exists()


def test_an_output_that_no_gate_judges_does_not_end_the_run(nano: Path, tmp_path: Path) -> None:
    low, back = tmp_path / "low", tmp_path / "back"
    steps = [
        {"do": "laser", "src": str(nano), "out": str(low), "layers": 1, "targets": "q", "rank_rule": "rank=8"},
        {"do": "check", "output": "${steps.laser.out}", "against": str(nano)},
        {"do": "convert hf-to-torrent", "as": "back", "src": "${steps.laser.out}", "out": str(back)},
    ]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "n", "description": "d", "steps": steps}))
    told = document("run", file)["steps"]
    assert [step["status"] for step in told] == ["done", "done", "done"]
    assert (told[1]["result"]["passed"], told[1]["result"]["verdict"]) == (None, "intact")
    assert back.is_dir()


def test_laser_and_check_go_on_after_an_interruption(nano: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from mixtools.methods.laser.worker import Worker

    steps = [
        {"do": "laser", "src": str(nano), "out": "${out}", "layers": 1, "targets": "w2", "rank_rule": "rank=8"},
        {"do": "check", "output": "${steps.laser.out}", "against": str(nano), "new_tokens": 0},
    ]
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({"name": "n", "description": "d", "vars": {"out": None}, "steps": steps}))
    out, whole = tmp_path / "out", tmp_path / "whole"
    real, calls = Worker.analyse, iter(range(100))

    def stopped(self: Worker, slot: Any) -> Any:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return real(self, slot)

    monkeypatch.setattr(Worker, "analyse", stopped)
    done = run("run", file, f"out={out}", "--jobs", 1)
    assert done.code == 130 and [path.name for path in out.iterdir()] == [".mixtools"]
    monkeypatch.setattr(Worker, "analyse", real)
    found = document("run", file, f"out={out}")
    assert found["steps"][0]["result"]["resumed_bytes"] > 0
    document("run", file, f"out={whole}")
    first, second = contents(out), contents(whole)
    assert first.pop("recipe.yaml").replace(bytes(out), b"") == second.pop("recipe.yaml").replace(bytes(whole), b"")
    assert first == second
    assert [step["status"] for step in document("run", file, f"out={out}")["steps"]] == ["skipped", "done"]


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"do": "laser", "layers": 1, "rank_rul": "mp"}, "did you mean rank_rule?"),
        ({"do": "laser", "layers": 1, "rank_rule": "energy=7"}, "energy"),
        ({"do": "laser", "layers": 1, "rank_rule": "activation=0.01"}, "calibration text"),
        ({"do": "laser", "layers": 1, "search": "gain"}, "--held-out"),
        ({"do": "laser"}, "steps.laser: `laser` needs layers"),
        ({"do": "laser", "layers": 1, "device": "cpu"}, "--device"),
        ({"do": "convert to-hf", "max_shard_size": "much"}, "'much' is not a size"),
        ({"do": "convert"}, "unknown verb 'convert'"),
        ({"do": "quantize", "method": "exl2"}, "quantize.method: 'exl2' is not one of gguf, gptq, awq, nf4, int8"),
        ({"do": "quantize", "method": "awq", "type": ["Q4_K_M"]}, "--type does not go with --method awq"),
        ({"do": "quantize", "type": ["Q9"]}, "--type Q9: there is no such type"),
        ({"do": "card"}, "`card` has no such option; did you mean outputs?"),
        ({"do": "doctor"}, "unknown verb"),
    ],
)
def test_a_recipe_that_cannot_run_is_one_line_and_code_2(step: dict[str, Any], said: str, tmp_path: Path) -> None:
    file, out = tmp_path / "r.yaml", tmp_path / "out"
    first = {"do": "convert torrent-to-hf", "as": "first", "src": str(NANO), "out": str(out)}
    bad = {**step, "src": "${steps.first.out}", "out": str(tmp_path / "second")}
    file.write_text(yaml.safe_dump({"name": "n", "description": "d", "steps": [first, bad]}))
    for verb in (("run",), ("run", "--dry-run"), ("recipe", "validate")):
        done = run(*verb, file)
        assert done.code == 2 and done.out == "", done.err
        assert done.err.startswith(f"error: {file}: steps.") and said in done.err and done.err.count("\n") == 1
    error = json.loads(run("run", file, "--json").out)["error"]
    assert error["type"] == "RecipeError" and error["file"] == str(file)
    assert not out.exists()


def test_names_and_pairs_that_there_are_not(tmp_path: Path) -> None:
    for arguments in (("run", "no-such-recipe"), ("run", tmp_path / "missing.yaml"), ("recipe", "show", "x.yaml"),
                      ("run", "torrent-to-hf"), ("run", "torrent-to-hf", "sorce=x"), ("run",)):  # fmt: skip
        done = run(*arguments)
        assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1, done


def recipe(folder: Path, *steps: dict[str, Any]) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("# mine\n" + yaml.safe_dump({"name": "x", "description": "y", "steps": list(steps)}), "utf-8")
    return path


def statuses(path: Path) -> list[str]:
    return [step["status"] for step in document("run", path)["steps"]]


def test_gguf_files_of_one_folder_are_made_once_each(nano: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """Beside the recipe itself, which is the user's own; a file that is gone is made again."""
    monkeypatch.chdir(tmp_path)
    text = nano / "text.txt"
    text.write_bytes((DATA / "text.txt").read_bytes())
    path = recipe(
        tmp_path,
        {"do": "imatrix", "src": str(nano), "out": "x.imatrix.gguf", "text": str(text), "ctx": 128, "chunks": 2},
        {"do": "quantize", "as": "a", "src": str(nano), "out": "a.gguf", "type": ["Q4_0"], "imatrix": "x.imatrix.gguf"},
        {"do": "quantize", "as": "b", "src": str(nano), "out": "b.gguf", "type": ["Q8_0"]},
    )
    mine = path.read_bytes()
    assert statuses(path) == ["done"] * 3
    made = {name: (tmp_path / name).read_bytes() for name in ("x.imatrix.gguf", "a.gguf", "b.gguf")}
    assert statuses(path) == ["skipped"] * 3
    (tmp_path / "b.gguf").unlink()
    assert statuses(path) == ["skipped", "skipped", "done"]
    assert made == {name: (tmp_path / name).read_bytes() for name in made} and path.read_bytes() == mine
    for name in made:
        assert yaml.safe_load((tmp_path / name).with_suffix(".recipe.yaml").read_text("utf-8"))["made"]


def test_a_file_of_the_copy_s_name_is_its_owner_s(nano: Path, tmp_path: Path) -> None:
    folder = tmp_path / "quants"
    folder.mkdir()
    own = recipe(folder, {"do": "quantize", "src": str(nano), "out": str(folder), "type": ["Q8_0"]})
    mine = own.read_bytes()
    done = run("run", own)
    assert done.code == 8 and f"{own}: is there, and no copy that a run left" in done.err
    assert own.read_bytes() == mine and [path.name for path in folder.iterdir()] == ["recipe.yaml"]


def test_a_file_of_the_hub_is_a_source(nano: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = recipe(tmp_path, {"do": "convert to-hf", "src": "org/name/x.Q8_0.gguf@main", "out": str(tmp_path / "hf")})
    assert run("run", path, "--dry-run").code == 0
