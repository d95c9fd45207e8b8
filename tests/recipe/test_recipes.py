"""The recipes that come along, end to end on nano, with a Hub on this machine; and all of it, killed and continued."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from converting import environment
from hub.loopback import Hub

import mixtools
from mixtools.recipe import run as running

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
DATA = Path(__file__).parents[1] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
REPO = "me/nano"
SMALL = {"samples": 4, "seq_len": 64}  # of a calibration
CALIBRATED = {"text": TEXT, "ctx": 128, "calibration": TEXT, **SMALL, "base": "org/nano"}


def values(folder: Path, name: str) -> dict[str, Any]:
    """Of each recipe, so that it is done in seconds."""
    common = {"source": NANO, "out": folder / "out"}
    return {
        "torrent-to-hf": {**common, "text": TEXT, "steps.check.ctx": 128},
        "laser-instruct": {
            **common, "text": _first_half(folder), "held_out": _second_half(folder), "steps.laser.layers": "1",
            "steps.laser.targets": "w2", "steps.laser.samples": 4, "steps.laser.seq_len": 64, "steps.check.ctx": 128,
        },
        "laser-output": {
            **common, "text": _first_half(folder), "held_out": _second_half(folder), "layers": "1", "targets": "w2",
            "steps.laser.samples": 4, "steps.laser.seq_len": 64, "steps.check.ctx": 128,
        },
        "gguf-set": {**common, **CALIBRATED, "name": "nano", "repo": REPO},
        "gptq-branches": {**common, **CALIBRATED, "repo": REPO},
        "awq": {**common, **CALIBRATED, "repo": REPO},
        "everything": {**CALIBRATED, "source": NANO, "name": folder / "nano", "layers": "1"},
    }[name]  # fmt: skip


def _first_half(folder: Path) -> Path:
    return _part(folder / "first.txt", TEXT.read_text()[: TEXT.stat().st_size // 2])


def _second_half(folder: Path) -> Path:
    return _part(folder / "second.txt", TEXT.read_text()[TEXT.stat().st_size // 2 :])


def _part(file: Path, text: str) -> Path:
    if not file.exists():  # what is newer than an output is not what it was made of
        file.write_text(text)
    return file


def names() -> list[str]:
    return sorted(path.stem for path in running.folder().glob("*.yaml"))


@pytest.mark.parametrize("name", names())
def test_it_validates_and_tells_what_it_expects(name: str, tmp_path: Path) -> None:
    written, steps = running.resolved(name, [f"{key}={value}" for key, value in values(tmp_path, name).items()])
    assert written.name == name and steps
    head = [line for line in running.find(name).read_text().splitlines() if line.startswith("#")]
    assert any(line.startswith(f"#   mixtools run {name} ") for line in head), "its header shows the command"
    said = " ".join([*head, written.description])
    assert any(word in said for word in ("Expected", "Known", "checked against", "smaller"))


@pytest.mark.parametrize("name", [name for name in names() if name != "everything"])
def test_it_runs_on_nano(
    name: str,
    tmp_path: Path,
    hub: Hub,
    slept: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    done = mixtools.run_recipe(name, values(tmp_path, name))
    assert [step.status for step in done.steps] == ["done"] * len(done.planned) and done.exit_code == 0
    if "repo" in values(tmp_path, name):
        kept = hub.repositories[REPO]
        assert b"base_model: org/nano" in _content(kept.branches["main"]["README.md"])
        assert json.loads(_content(kept.branches["main"]["mixtools-check.json"]))["outputs"]
        if name == "gptq-branches":
            assert {"gptq-4bit-128g", "gptq-4bit-32g", "gptq-8bit-128g"} < kept.branches.keys()
    puts = len(hub.paths("PUT"))
    again = mixtools.run_recipe(name, values(tmp_path, name))
    told = {step.step.verb.name: step.status for step in again.steps}
    assert all(status == "skipped" for verb, status in told.items() if verb not in ("card", "push", "check"))
    assert len(hub.paths("PUT")) == puts and again.exit_code == 0


def test_a_text_to_judge_by_is_asked_for_before_anything_runs(tmp_path: Path) -> None:
    for name in ("gguf-set", "gptq-branches", "awq", "everything"):
        given = {key: value for key, value in values(tmp_path, name).items() if key != "text"}
        with pytest.raises(mixtools.errors.RecipeError, match=r"vars\.text: has no value; give text=VALUE"):
            mixtools.run_recipe(name, given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "nano").exists()


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ("{do: card}", "steps.card: `card` needs outputs"),
        ("{do: push, outputs: made}", "steps.push: `push` needs repo"),
        ("{do: push, outputs: made, repo: nano}", "'nano' is no repository"),
        ("{do: card, outputs: [made, nowhere]}", "steps.card.outputs: nowhere does not exist"),
        ("{do: card, outputs: made, dry_run: true}", "says how, not what"),
        ("{do: card, when: '${nothing}', outputs: made}", "nothing above is called"),
    ],
)
def test_what_cannot_run_is_refused(step: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    (tmp_path / "r.yaml").write_text(f"name: n\ndescription: d\nvars: {{text: null}}\nsteps:\n- {step}\n")
    with pytest.raises(mixtools.errors.RecipeError) as caught:
        mixtools.run_recipe("r.yaml")
    assert said in str(caught.value)


def test_a_step_without_its_condition_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    step = "- {do: convert torrent-to-hf, when: '${text}', src: nowhere, out: o}\n"
    more = f"- {{do: convert torrent-to-hf, as: other, src: {NANO}, out: {tmp_path / 'o'}}}\n"
    file.write_text(f"name: n\ndescription: d\nvars: {{text: null}}\nsteps:\n{step}{more}")
    assert [one.name for one in running.resolved(file, [])[1]] == ["other"]
    with pytest.raises(mixtools.errors.RecipeError, match="nowhere does not exist"):
        running.resolved(file, ["text=yes"])
    for needs, said in (
        ("[text]", "has no value; give text=VALUE"),
        ("[txt]", "must list variables"),
        ("text", "must list"),
    ):
        file.write_text(f"name: n\ndescription: d\nvars: {{text: null}}\nneeds: {needs}\nsteps:\n{more}")
        with pytest.raises(mixtools.errors.RecipeError, match=said):
            running.resolved(file, [])


def test_without_a_repository_nothing_is_published(tmp_path: Path) -> None:
    given = {key: value for key, value in values(tmp_path, "awq").items() if key != "repo"}
    _, steps = running.resolved("awq", [f"{key}={value}" for key, value in given.items()])
    assert [step.verb.name for step in steps] == ["quantize", "check", "card"]


def test_all_of_it_killed_ten_times_ends_the_same(tmp_path: Path) -> None:
    """At random moments; but for times and memory in reports, every byte is that of a run that nobody disturbed."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    given = [f"{key}={value}" for key, value in values(tmp_path, "everything").items() if key != "name"]
    script = Path(__file__).parent / "killed_recipe.py"
    done = subprocess.run(
        [sys.executable, script, whole, killed, *given, "name=nano"], capture_output=True, text=True, check=False,
        env=environment(OMP_NUM_THREADS="1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0  # ten, or it came to its end between two kills
    one, other = _contents(whole), _contents(killed)
    assert one.keys() == other.keys()
    assert [name for name in one if one[name] != other[name]] == []


def _contents(folder: Path) -> dict[str, bytes]:
    """Files, but for what tells how long something took, in how much memory."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.endswith(".html"):
            data = path.read_bytes()
            if path.name == "recipe.yaml":  # it has a hash of its inputs, and those hold such reports
                data = re.sub(rb"\n  inputs: \w+\n", b"\n", data)
            found[path.relative_to(folder).as_posix()] = _timeless(data) if path.suffix == ".json" else data
    return found


def _timeless(data: bytes) -> bytes:
    """Of a document without times, and without the hashes of reports that hold some."""
    document = json.loads(data)

    def cleaned(found: Any) -> Any:
        if isinstance(found, dict):
            kept = {key: cleaned(value) for key, value in found.items() if key not in ("seconds", "peak_memory_bytes")}
            return {key: value for key, value in kept.items() if not key.endswith(("-report.json", "-report.html"))}
        return [cleaned(one) for one in found] if isinstance(found, list) else found

    return json.dumps(cleaned(document)).encode()


def _content(blob: Any) -> bytes:
    return blob.content.read_bytes() if isinstance(blob.content, Path) else blob.content
