"""scripts/test --peers: what it installs, what it runs and what it says. Its tests themselves need the programs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peers_script", ROOT / "scripts" / "peers.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["peers_script"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


script = load()


@pytest.fixture
def peers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A house with two peers; pip and pytest only write down how they were called."""
    for name, value in {"PINS": tmp_path, "ENVIRONMENTS": tmp_path / "made", "BESIDE": tmp_path / "none"}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.delenv(script.WHEELS_VARIABLE, raising=False)
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(f"{name}==1\nnumpy==1.26.4\n")

    def make(folder: Path, with_pip: bool) -> None:
        assert with_pip
        (folder / "bin").mkdir(parents=True)
        lines = ("#!/bin/sh", 'echo "$@" >>"$0.calls"', 'sh "$(dirname "$0")/../../../answers" "$@"')
        (folder / "bin" / "python").write_text("\n".join(lines))
        (folder / "bin" / "python").chmod(0o755)

    monkeypatch.setattr(script.venv, "create", make)
    answer(tmp_path, "exit 0")
    return tmp_path


def answer(peers: Path, *lines: str) -> None:
    (peers / "answers").write_text("\n".join(lines))


def calls(peers: Path, name: str) -> list[str]:
    file = peers / "made" / name / "bin" / "python.calls"
    return file.read_text().splitlines() if file.exists() else []


def test_a_peers_own_versions_go_before_ours() -> None:
    ours = "# why\ntorch==2.13.0\nNumPy==2.3.5\ntypes-pyyaml==1\nhuggingface-hub==2\n"
    found = script.constraints("numpy<2 # old\nhuggingface_hub==0.30\n# torch==1\n--no-binary x\n", ours)
    assert found.splitlines() == ["# why", "torch==2.13.0", "types-pyyaml==1"]


def test_torch_goes_first_then_the_pins_then_mixtools(peers: Path) -> None:
    assert script.main(["print", "one"]) == 0
    installed = [call for call in calls(peers, "one") if "pip install" in call]
    assert [call.rpartition(" ")[2] for call in installed] == ["torch", "hypothesis", f"{script.ROOT}[iq]"]
    assert installed[1].endswith(" one==1 numpy==1.26.4 pytest hypothesis")
    assert all(f"-c {peers / 'made' / 'one' / 'constraints.txt'}" in call for call in installed)
    assert "numpy" not in (peers / "made" / "one" / "constraints.txt").read_text()
    assert not any("find-links" in call for call in installed)


def test_what_asks_for_too_much_goes_without_its_dependencies(peers: Path) -> None:
    lines = ("# why", "old == 3 # without dependencies", "one==1 # of its time", "bad # removed again")
    (peers / "one.txt").write_text("\n".join((*lines, "mixtools # without dependencies")))
    assert script.main(["print", "one"]) == 0
    ends = (
        "torch",
        "one==1 pytest hypothesis",
        "--no-deps old == 3",
        "--yes --quiet bad",
        f"--no-deps -e {script.ROOT}",
    )
    assert all(call.endswith(f" {end}") for call, end in zip(calls(peers, "one"), ends, strict=False))


def test_what_is_there_is_used_again_until_something_changes(peers: Path) -> None:
    def installs(fingerprint: str) -> int:
        before = calls(peers, "one")
        script.main([fingerprint, "one"])
        after = calls(peers, "one")
        return sum(
            "pip install" in call for call in (after[len(before) :] if after[: len(before)] == before else after)
        )

    assert [installs("print"), installs("print"), installs("another")] == [3, 0, 1]
    (peers / "one.txt").write_text("one==2\n")
    assert [installs("another"), installs("another")] == [3, 0]


def test_an_installation_that_failed_is_tried_again(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(peers, 'case "$*" in *one==1*) echo "ERROR: no one==1"; exit 1;; esac')
    assert script.main(["print", "one"]) == 1
    assert "one: not had: ERROR: no one==1 (see .venv-peers/one.log)" in capsys.readouterr().out
    answer(peers, "exit 0")
    assert script.main(["print", "one"]) == 0


def test_a_peer_that_cannot_be_had_is_told_and_the_others_run(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(peers, 'case "$*" in *one==1*) echo "ERROR: no one==1"; exit 1;; esac')
    assert script.main(["print"]) == 0
    last = capsys.readouterr().out.partition("== peers\n")[2].splitlines()
    assert last == ["one: not had: ERROR: no one==1 (see .venv-peers/one.log)", "two: had; passed"]


def test_a_test_that_failed_is_the_exit_status(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(peers, 'case "$*" in *pytest*-q*) [ "$MIXTOOLS_PEER" = two ] || exit 1;; esac')
    assert script.main(["print"]) == 1
    assert capsys.readouterr().out.endswith("one: had; FAILED\ntwo: had; passed\n")


def test_a_program_that_crashes_is_told(peers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(peers, 'case "$*" in *pytest*-q*) kill -ILL $PPID;; esac')
    assert script.main(["print", "one"]) == 1
    assert capsys.readouterr().out.endswith("one: had; FAILED, ended by SIGILL\n")


def test_the_rest_goes_to_pytest(peers: Path) -> None:
    assert script.main(["print", "two", "-k", "a or b"]) == 0
    assert calls(peers, "two")[-1] == f"-m pytest -q --durations=5 {peers} -k a or b"
    assert calls(peers, "one") == []


@pytest.mark.parametrize(("arguments", "status"), [((), 1), (("-k", "x"), 1)])
def test_nothing_tested_is_no_pass(
    peers: Path, arguments: tuple[str, ...], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(peers, 'case "$*" in *pytest*-q*) exit 5;; esac')
    assert script.main(["print", "one", *arguments]) == status
    assert ("none of its tests was picked\nnothing was tested" in capsys.readouterr().out) == bool(arguments)


def test_a_peer_without_the_test_that_was_picked(peers: Path) -> None:
    answer(peers, 'case "$*" in *pytest*-q*) [ "$MIXTOOLS_PEER" = two ] || exit 5;; esac')
    assert script.main(["print", "-k", "x"]) == 0
    assert script.main(["print"]) == 1


def test_wheels_of_the_folder_that_is_named(
    peers: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(script.WHEELS_VARIABLE, str(peers / "wheels"))
    assert script.main(["print", "one"]) == 1
    assert "which is no folder" in capsys.readouterr().out
    (peers / "wheels").mkdir()
    assert script.main(["print", "one"]) == 0
    installed = [call for call in calls(peers, "one") if "pip install" in call]
    assert installed and all(f"--find-links {peers / 'wheels'}" in call for call in installed)


def test_a_peer_that_there_is_not(peers: Path) -> None:
    with pytest.raises(SystemExit, match="no peer 'three'; there are: one, two"):
        script.main(["print", "three"])


def test_every_peer_has_pins_and_tests() -> None:
    folder = ROOT / "tests" / "peers"
    for name in script.known():
        assert script.package((folder / f"{name}.txt").read_text().splitlines()[1])
        assert (folder / f"test_{name}.py").exists()
    known = tuple(f"test_{name}{end}" for name in script.known() for end in ("_", "."))
    assert all(path.name.startswith(known) for path in folder.glob("test_*.py"))


@pytest.mark.parametrize("peer", [None, "another"])
def test_elsewhere_nothing_of_a_peer_is_collected(peer: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != script.PEER_VARIABLE}
    environment |= {script.PEER_VARIABLE: peer} if peer else {}
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/peers"]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert found.returncode == script.NO_TESTS and "skip" not in found.stdout, found.stdout
