"""The back ends around their drivers, with a package of our own making: the real ones run in tests/peers."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from layouts import make
from safetensors.torch import load_file, save_file

import mixtools
from mixtools.errors import (
    HubError,
    LayoutError,
    MemoryBudgetError,
    MixtoolsError,
    OutputExists,
    QuantizedError,
    UsageError,
)
from mixtools.formats import Gptq
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.quantize import backends
from mixtools.progress import Calling

ROOT = Path(__file__).parents[3]
DIMS = make.Dims(d=64, f=96, layers=2, heads=4, kv=2, hd=16, vocab=320, experts=3)
SEQUENCES = [[1, 5, 6], [1, 7]]

# what stands for the package: it takes a folder that is ready, READY beside it, for what it made of the source
PACKAGE = """
import json, shutil, sys
from pathlib import Path
job, ready = json.loads(Path(sys.argv[-1]).read_text()), Path(__file__).with_name("ready")
out = Path(job["out"])
shutil.copytree(ready, out)
(out / "job.json").write_text(json.dumps(job))
config = json.loads((Path(job["source"]) / "config.json").read_text())
about = {"bits": job["bits"], "group_size": job["group_size"], "sym": job["sym"], "quant_method": "gptq"}
(out / "config.json").write_text(json.dumps({**config, "_name_or_path": job["source"], "quantization_config": about}))
(out / "quantize_config.json").write_text(json.dumps(about))
print("loading", flush=True)
for layer in range(2):
    print(json.dumps({"layer": layer, "layers": 2}), flush=True)
print("a warning", file=sys.stderr)
"""


def ready(folder: Path, scale: float = 0.5, word: str = "scales") -> None:
    """Tensors as auto-gptq has them, biases included: each code of 8 bits is its zero, 128."""
    kept = {}
    for name, one in make.hf(make.torrent(DIMS), DIMS).items():
        if not is_packed(name):
            kept[name] = one.half()
            continue
        stem, (rows, columns) = name.removesuffix("weight"), one.shape
        kept |= {
            stem + "qweight": torch.full((columns // 4, rows), -0x7F7F7F80, dtype=torch.int32),
            stem + "qzeros": torch.full((columns // 32, rows // 4), 0x7F7F7F7F, dtype=torch.int32),
            stem + word: torch.full((columns // 32, rows), scale, dtype=torch.float16),
            stem + "g_idx": torch.arange(columns, dtype=torch.int32) // 32,
            stem + "bias": torch.zeros(rows, dtype=torch.float16),
        }
    folder.mkdir(exist_ok=True)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def is_packed(name: str) -> bool:
    return ".self_attn." in name or ".experts." in name


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the environments are; none is made."""
    monkeypatch.setenv(backends.VARIABLE, str(tmp_path / "backends"))
    return tmp_path / "backends"


def lend(house: Path, package: str, name: str = "auto-gptq") -> Path:
    """An environment whose Python runs that program for any driver."""
    folder = house / name
    (folder / "bin").mkdir(parents=True)
    (folder / "package.py").write_text(package)
    ready(folder / "ready")
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >"{folder}/called"\nexec "{sys.executable}" "{folder}/package.py" "$3"\n')
    python.chmod(0o755)
    (folder / "made").write_text(backends.stamp(backends.find(name)))
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Checkpoint:
    folder = make.write_a(tmp_path / "source", DIMS)
    (folder / "tokenizer.model").write_bytes((ROOT / "tests/data/nano-mixtral/tokenizer.model").read_bytes())
    (folder / "LICENSE").write_text("theirs")
    return open_checkpoint(folder)


ASKED = backends.Asked(bits=8, group=32)


def ran(source: Checkpoint, out: Path, asked: backends.Asked = ASKED, name: str = "auto-gptq") -> backends.Ran:
    return backends.run_backend(name, source, out, asked, SEQUENCES)


# --- a run ---


def test_what_the_package_writes_is_a_checkpoint(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    seen: list[tuple[str, int, int, str]] = []
    done = backends.run_backend(
        "auto-gptq", source, tmp_path / "out", ASKED, SEQUENCES, progress=Calling(lambda *told: seen.append(told))
    )
    found = open_checkpoint(tmp_path / "out")
    assert found.quantized() == [Gptq(8, 32)]
    canonical = make.hf(make.torrent(DIMS), DIMS)
    for slot in found.slots():
        dense, name = found.read(slot), make.hf_name(slot)
        assert torch.equal(dense, torch.zeros_like(dense) if is_packed(name) else canonical[name].half()), name
    assert ("auto-gptq: quantizing", 2, 2, "layer") in seen
    assert {*done.log} == {"loading", "a warning"}
    assert done.bytes == sum((tmp_path / "out" / name).stat().st_size for name in done.files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["backends", "out", "source"]  # no work is left


def test_the_driver_is_told_what_was_asked(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    folder = lend(house, PACKAGE)
    ran(source, tmp_path / "out", replace(ASKED, damping=0.05))
    job = json.loads((tmp_path / "out" / "job.json").read_text())
    wanted = {"bits": 8, "group_size": 32, "sym": True, "damp_percent": 0.05, "desc_act": False, "sequences": SEQUENCES}
    assert {key: job[key] for key in wanted} == wanted
    isolated, driver, _ = (folder / "called").read_text().split()
    assert isolated == "-I" and Path(driver).name == "backend_autogptq.py" and Path(driver).is_file()


def test_the_documents_are_the_sources(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    ran(source, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "theirs"
    assert {"tokenizer.model", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def test_the_manifest_tells_of_it(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    done = ran(source, tmp_path / "out")
    document = json.loads((tmp_path / "out" / "mixtools.json").read_text())
    assert document["method"] == {
        "name": "gptq", "backend": "auto-gptq", "bits": 8, "group": 32, "symmetric": True, "damping": 0.01
    }  # fmt: skip
    assert document["source"]["files"] == {
        "consolidated.00.pth": (source.folder / "consolidated.00.pth").stat().st_size
    }
    assert document["files"].keys() == {*done.files}
    for name, told in document["files"].items():
        data = (tmp_path / "out" / name).read_bytes()
        assert told["size"] == len(data) and told["sha256"] == hashlib.sha256(data).hexdigest(), name
    raw = bytearray((tmp_path / "out" / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "out" / "model.safetensors").write_bytes(raw)
    told = mixtools.inspect(tmp_path / "out", verify=True).document
    assert "checksum" in json.dumps(told["problems"])


def test_a_folder_that_transformers_reads_is_not_converted(house: Path, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    folder = make.write_hf(tmp_path / "hf", make.hf(make.torrent(DIMS), DIMS), DIMS)
    (folder / "tokenizer.model").write_bytes((ROOT / "tests/data/nano-mixtral/tokenizer.model").read_bytes())
    ran(open_checkpoint(folder), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "job.json").read_text())["source"] == str(folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}
    (folder / "config.json").write_text(json.dumps(config))  # as transformers 5 writes it: 4 would not find its theta
    ran(open_checkpoint(folder), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "job.json").read_text())["source"] != str(folder)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["rope_theta"] == 1e6


# --- what goes wrong ---


def test_a_package_that_fails_is_quoted(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, "import sys; print('Traceback', file=sys.stderr); sys.exit('RuntimeError: no such kernel')")
    with pytest.raises(MixtoolsError, match=r"auto-gptq failed: RuntimeError: no such kernel \(all it said: .*log.txt"):
        ran(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "Traceback" in (tmp_path / ".out.auto-gptq" / "log.txt").read_text()
    (house / "auto-gptq" / "package.py").write_text(PACKAGE)
    ran(source, tmp_path / "out")  # the same command, once it is mended


def test_what_is_no_checkpoint_is_not_published(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    ready(lend(house, PACKAGE) / "ready", word="scale")
    with pytest.raises(LayoutError):
        ran(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_without_its_environment_the_command_that_makes_it_is_told(
    house: Path, source: Checkpoint, tmp_path: Path
) -> None:
    for name, asked in (("auto-gptq", ASKED), ("autoawq", backends.Asked(symmetric=False))):
        with pytest.raises(UsageError, match=rf"make it, once, with: .*--backend {name} --make-backend"):
            ran(source, tmp_path / "out", asked, name)
    folder = lend(house, PACKAGE)
    (folder / "made").write_text("of other pins")
    with pytest.raises(UsageError, match="--make-backend"):
        ran(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "asked", "why"),
    [
        ("auto-gptq", backends.Asked(bits=5), "2 or 3 or 4 or 8 bits"),
        ("auto-gptq", backends.Asked(group=0), "no groups of 0"),
        ("autoawq", backends.Asked(bits=8, symmetric=False), "has 4 bits"),
        ("autoawq", backends.Asked(), "no symmetric grid"),
        ("autoawq", backends.Asked(symmetric=False, group=-1), "no groups of -1"),
        ("gptqmodel", backends.Asked(), "there is native, auto-gptq, autoawq"),
    ],
)
def test_what_a_package_cannot_do_is_refused(
    name: str, asked: backends.Asked, why: str, source: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=why):
        ran(source, tmp_path / "out", asked, name)


def test_more_experts_than_auto_gptq_has_a_list_for(tmp_path: Path) -> None:
    dims = DIMS._replace(experts=9)
    source = open_checkpoint(make.write_a(tmp_path / "source", dims))
    with pytest.raises(LayoutError, match="knows of 8 experts; this model has 9"):
        ran(source, tmp_path / "out")


def test_a_quantized_source_is_refused(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    ran(source, tmp_path / "out")
    with pytest.raises((LayoutError, QuantizedError), match="is quantized"):
        ran(open_checkpoint(tmp_path / "out"), tmp_path / "again")


def test_a_model_larger_than_the_memory(
    house: Path, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lend(house, PACKAGE)
    monkeypatch.setattr(backends, "available_memory", lambda: 2 * source.config.num_parameters - 1)
    with pytest.raises(MemoryBudgetError, match="holds the whole model in memory"):
        ran(source, tmp_path / "out")
    monkeypatch.setattr(backends, "available_memory", lambda: 2 * source.config.num_parameters)
    ran(source, tmp_path / "out")


def test_nothing_is_replaced(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    lend(house, PACKAGE)
    (tmp_path / "out").mkdir()
    ran(source, tmp_path / "out")  # an empty folder is none
    before = load_file(tmp_path / "out" / "model.safetensors").keys()
    with pytest.raises(OutputExists):
        ran(source, tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == before


def test_nan_of_a_package_is_found(house: Path, source: Checkpoint, tmp_path: Path) -> None:
    ready(lend(house, PACKAGE) / "ready", scale=float("nan"))
    ran(source, tmp_path / "out")
    told = mixtools.inspect(tmp_path / "out", verify=True).document["problems"]
    assert any(str(one["tensor"]).endswith("q_proj.scales") for one in told)


# --- the environment ---


@pytest.fixture
def pip(house: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands that are asked for; none is run."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(backends.subprocess, "run", run)
    return asked


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_an_environment_is_made_once(name: str, house: Path, pip: list[list[str]]) -> None:
    assert not backends.is_made(name)
    assert backends.make_backend(name) == house / name
    assert backends.is_made(name)
    backend = backends.find(name)
    python = str(house / name / "bin" / "python")
    assert pip[0][1:] == ["-m", "venv", str(house / name)]
    assert [command[0] for command in pip[1:]] == [python] * len(pip[1:])
    assert pip[1][-1] == "torch==2.13.0"  # before what is built with it
    assert pip[2][-len(backend.pins) :] == [*backend.pins]
    assert [command[-1] for command in pip[3:]] == [*backend.alone]
    assert all("--no-deps" in command and "--no-build-isolation" in command for command in pip[3:])
    count = len(pip)
    backends.make_backend(name)
    assert len(pip) == count
    (house / name / "made").write_text("of other pins")
    backends.make_backend(name)
    assert len(pip) == 2 * count


def test_what_pip_says_is_told(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], stdout: object, **_: object) -> subprocess.CompletedProcess[str]:
        failed = any("auto-gptq" in word for word in command)
        stdout.write("ERROR: no auto-gptq==0.7.1\nnote: more\n" if failed else "fine\n")  # type: ignore[attr-defined]
        return subprocess.CompletedProcess(command, int(failed))

    monkeypatch.setattr(backends.subprocess, "run", run)
    with pytest.raises(HubError, match=r"ERROR: no auto-gptq==0.7.1 \(all of it: .*pip.log"):
        backends.make_backend("auto-gptq")
    assert not backends.is_made("auto-gptq")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(backends.VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert backends.place("autoawq") == tmp_path / ".cache" / "mixtools" / "backends" / "autoawq"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert backends.place("autoawq") == tmp_path / "x" / "mixtools" / "backends" / "autoawq"


def test_another_python_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends.sys, "version_info", (3, 13, 1))
    monkeypatch.setattr(backends.shutil, "which", lambda name: f"/there/{name}" if name == "python3.10" else None)
    assert backends._python() == "/there/python3.10"
    monkeypatch.setattr(backends.shutil, "which", lambda name: None)
    with pytest.raises(UsageError, match="put python3.11 into the PATH"):
        backends._python()


@pytest.mark.parametrize(("name", "peer"), [("auto-gptq", "autogptq"), ("autoawq", "autoawq")])
def test_the_versions_are_those_that_the_peers_tests_ran_with(name: str, peer: str) -> None:
    lines = (ROOT / "tests" / "peers" / f"{peer}.txt").read_text().splitlines()
    tried = {line.partition("#")[0].strip() for line in lines} - {""}
    builds = {"setuptools==80.9.0", "wheel==0.45.1"}  # where no wheel is at hand
    backend = backends.find(name)
    assert {*backend.pins, *backend.alone} - builds <= tried


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_driver_asks_nothing_of_mixtools(name: str) -> None:
    file = ROOT / "mixtools" / "methods" / "quantize" / backends.find(name).driver
    tree = ast.parse(file.read_text())
    asked = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    for node in asked:
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None and not node.module.startswith("mixtools")
        else:
            assert not any(one.name.startswith("mixtools") for one in node.names)
    assert importlib.util.find_spec(f"mixtools.methods.quantize.{file.stem}") is not None
