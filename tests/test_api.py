"""`import mixtools`: its functions, held together with commands and recipes, and what they answer."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import typer.testing
import yaml

import mixtools
from mixtools import api, errors, methods
from mixtools.cli import commands
from mixtools.cli.main import app, main
from mixtools.formats import Plain
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.recipe import run as recipes
from mixtools.recipe.schema import schema
from mixtools.verbs import Entry, Forecast

TREE = Path(__file__).parents[1]
DATA = TREE / "tests" / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
FUNCTIONS = (
    "open",
    "inspect",
    "convert",
    "expert_names",
    "laser",
    "spectrum",
    "quantize",
    "imatrix",
    "perplexity",
    "check",
    "generate",
    "card",
    "push",
    "run_recipe",
)
COMMANDS = {  # by the function behind each
    "inspect": mixtools.inspect, "laser": mixtools.laser, "spectrum": mixtools.spectrum, "quantize": mixtools.quantize,
    "imatrix": mixtools.imatrix,
    "check": mixtools.check,
    "perplexity": mixtools.perplexity, "generate": mixtools.generate, "run": mixtools.run_recipe,
    "convert torrent-to-hf": mixtools.convert, "convert to-hf": mixtools.convert,
    "convert hf-to-torrent": mixtools.convert, "convert gguf-upgrade": mixtools.convert,
    "convert expert-names": mixtools.expert_names, "card": mixtools.card, "push": mixtools.push,
}  # fmt: skip
SHARED = {"json", "quiet", "debug", "help"}
# SRC, RECIPE, KEY=VALUE on the command line
SPELLED = {"repo": "repository", "src": "source", "file": "recipe", "pairs": "values"}
OWN = {"safetensors"}  # hf-to-torrent's way to say to="torrent"


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("api") / "hf"
    mixtools.convert(NANO, out)
    return out


def command(name: str) -> Any:
    """As typer built it."""
    found: Any = typer.main.get_command(app)
    for word in name.split():
        found = found.commands[word]
    return found


# --- one truth ---


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_has_the_function_s_names_and_defaults(name: str) -> None:
    parameters = inspect.signature(COMMANDS[name]).parameters
    for option in command(name).params:
        if option.name in SHARED | OWN:
            continue
        own = parameters[SPELLED.get(option.name, option.name)]
        if own.default is inspect.Parameter.empty:
            assert option.required, option.name
        else:
            assert not option.required and option.default == own.default, option.name
    offered = {SPELLED.get(option.name, option.name) for option in command(name).params}
    callbacks = {"progress", "on_text", "on_begin", "on_step"}
    missing = parameters.keys() - offered - callbacks
    assert missing <= ({"to", "dtype", "max_shard_size", "keep_tied"} if name.startswith("convert") else set())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_of_a_command_is_explained(name: str) -> None:
    unexplained = {option.name for option in command(name).params if not getattr(option, "help", None)}
    assert unexplained <= {"max_new_tokens", "seed"}
    assert "Example: mixtools" in (command(name).help or "")


def test_recipes_take_the_same_options() -> None:
    verbs = recipes.functions()
    assert verbs.keys() == COMMANDS.keys() - {"inspect", "spectrum", "perplexity", "generate", "run"}
    for name, verb in verbs.items():
        taken, parameters = schema(verb), inspect.signature(COMMANDS[name]).parameters
        assert taken.machine == parameters.keys() & {
            "dry_run", "resume", "overwrite", "jobs", "max_memory", "device", "make_backend", "record", "replace",
        }  # fmt: skip
        offered = {option.name for option in command(name).params} - SHARED - taken.machine
        assert taken.options.keys() == offered
        for key, option in taken.options.items():
            if key not in OWN:
                default = parameters[SPELLED.get(key, key)].default
                assert option.default == (None if option.required else default), key


def test_no_room_bears_a_function_s_name() -> None:
    """Importing mixtools.convert would rebind the name to the room."""
    rooms = {path.stem for path in (TREE / "mixtools").iterdir()}
    assert not rooms & set(FUNCTIONS)
    assert set(FUNCTIONS) <= set(dir(mixtools))
    for name in FUNCTIONS:
        assert inspect.getdoc(getattr(mixtools, name))
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = mixtools.quantise


def test_importing_is_light_and_says_nothing() -> None:
    code = "import sys, mixtools; mixtools.convert; mixtools.laser; mixtools.check; "
    code += "print(sorted({'torch', 'numpy', 'scipy', 'typer', 'tokenizers', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n" and done.stderr == ""


# --- what they answer ---


def test_a_checkpoint_is_opened_once_and_handed_on(tmp_path: Path) -> None:
    opened = mixtools.open(NANO)
    assert isinstance(opened, Checkpoint)
    assert mixtools.open(opened) is opened
    made = mixtools.convert(opened, tmp_path / "out")
    assert made.output == tmp_path / "out" and made.source == NANO and made.layout == "hf" and made.tensors == 65
    assert (made.output / made.files[0]).stat().st_size >= made.bytes == 9_185_792
    assert made.missing == () and made.resumed_bytes == 0 and made.seconds > 0 and made.peak_memory_bytes > 10**7
    for slot in opened.slots():
        assert torch.equal(mixtools.open(made.output).read(slot), opened.read(slot))


def test_convert_to_each_layout(hf: Path, tmp_path: Path) -> None:
    for to, file in (("torrent", "consolidated.00.pth"), ("consolidated", "consolidated.safetensors")):
        made = mixtools.convert(hf, tmp_path / to, to)
        assert made.layout == to and made.files == (file,)
    again = mixtools.convert(tmp_path / "torrent", tmp_path / "c", to="consolidated")
    assert (again.output / "consolidated.safetensors").read_bytes() == (
        tmp_path / "consolidated" / "consolidated.safetensors"
    ).read_bytes()
    with pytest.raises(errors.UsageError, match="not one of hf, torrent, consolidated, gguf"):
        mixtools.convert(hf, tmp_path / "x", "awq")
    assert not (tmp_path / "x").exists()


def test_a_dry_run_is_a_forecast(tmp_path: Path) -> None:
    told = mixtools.convert(NANO, tmp_path / "out", max_shard_size=3_000_000, dry_run=True)
    assert isinstance(told, Forecast) and told.bytes == sum(told.document["files"].values())
    assert len(told.document["files"]) > 1 and told.peak_memory_bytes > 0
    assert "would write 65 tensors" in str(told)
    reduced = mixtools.laser(NANO, tmp_path / "out", layers="all", dry_run=True)
    assert isinstance(reduced, Forecast) and reduced.document["matrices"] == 56
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", ["keep", "f16", "f32"])
def test_a_forecast_of_memory_holds(tmp_path: Path, dtype: str) -> None:
    """In a process of its own, and with a limit that leaves room for one thread: torch is imported only for a cast."""
    code = (
        "import sys, mixtools\n"
        "told = mixtools.convert(*sys.argv[1:3], dtype=sys.argv[3], jobs=1, dry_run=True)\n"
        "done = mixtools.convert(*sys.argv[1:3], dtype=sys.argv[3], max_memory=told.peak_memory_bytes)\n"
        "print(told.peak_memory_bytes, done.peak_memory_bytes)"
    )
    call = [sys.executable, "-c", code, str(NANO), str(tmp_path / "out"), dtype]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    told, peak = map(int, done.stdout.split())
    assert peak <= told <= 3 * peak


def test_results_print_what_commands_print(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = mixtools.inspect(hf, verify=True)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit):
        main(["inspect", str(hf), "--verify", "--quiet"])
    assert capsys.readouterr().out == f"{found}\n"
    assert found.verified is True and found.problems == [] and found.exit_code == 0
    with pytest.raises(SystemExit):
        main(["inspect", str(hf), "--verify", "--quiet", "--json"])
    assert json.loads(capsys.readouterr().out) == found.document


def test_laser_check_and_spectrum(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = mixtools.spectrum(hf, layers="1", targets="w2", experts="0", rank_rule="rank=24")
    made = mixtools.laser(hf, tmp_path / "low", layers="1", targets="w2", experts="0", rank_rule="rank=24")
    assert seen.output is None and [row["rank"] for row in seen.report["matrices"]] == [24]
    assert made.report["matrices"][0]["energy"] == pytest.approx(seen.report["matrices"][0]["energy"])
    checked = mixtools.check(made.output, hf, text=TEXT, ctx=64, max_tokens=256, new_tokens=0)
    assert checked.verdict == "intact" and checked.passed is None and checked.exit_code == 0
    judged = mixtools.check(made.output, hf, text=TEXT, ctx=64, max_tokens=256, new_tokens=0, gate={"kld_mean": 1e-9})
    assert judged.verdict == "failed" and judged.passed is False and judged.exit_code == 4
    assert "kld_mean" in str(judged)
    same = mixtools.check(hf, NANO, report=tmp_path / "report")
    assert same.passed is True and (tmp_path / "report" / "report.html").is_file()
    assert capsys.readouterr() == ("", "")


def test_perplexity_and_generate(hf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = mixtools.perplexity(hf, TEXT, ctx=64, max_tokens=512)
    assert found.tokens == 8 * 63 and found.protocol == "gptq" and found.ctx == 64 and found.stderr > 0
    assert found.document.keys() == {
        "perplexity", "word_perplexity", "byte_perplexity", "stderr", "tokens", "protocol", "ctx", "seconds",
        "peak_memory_bytes", "remarks",
    }  # fmt: skip
    pieces: list[str] = []
    said = mixtools.generate(hf, "Le programme", max_new_tokens=8, on_text=pieces.append)
    assert "".join(pieces) == said.text == str(said) and len(said.tokens) == 8 and said.tokens_per_second > 0
    assert mixtools.generate(hf, "Hello", chat=True, max_new_tokens=2).prompt_tokens > said.prompt_tokens
    assert capsys.readouterr() == ("", "")


def test_progress_is_a_function_or_an_object(hf: Path, tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    mixtools.convert(NANO, tmp_path / "a", jobs=4, progress=lambda *now: told.append(now))
    assert told[0] == ("converting", 0, 9_185_792, "B") and told[-1] == ("converting", 9_185_792, 9_185_792, "B")
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)

    class Watch:
        seen = 0

        def start(self, label: str, total: int, unit: str = "B") -> None:
            self.total = total

        def advance(self, amount: int) -> None:
            self.seen += amount

        def finish(self) -> None:
            pass

    watch = Watch()
    mixtools.convert(NANO, tmp_path / "b", jobs=1, progress=watch)
    assert watch.seen == watch.total == 9_185_792


def test_errors_are_those_of_the_commands(tmp_path: Path) -> None:
    cases: list[tuple[type[errors.MixtoolsError], int, Any]] = [
        (errors.InputError, 3, lambda: mixtools.open(tmp_path / "missing")),
        (errors.UsageError, 2, lambda: mixtools.convert(NANO, NANO)),
        (errors.UsageError, 2, lambda: mixtools.convert(NANO, tmp_path / "a", device="cuda:x")),
        (errors.UsageError, 2, lambda: mixtools.convert(NANO, tmp_path / "a", max_memory="much")),
        (errors.UsageError, 2, lambda: mixtools.convert(NANO, tmp_path / "a", jobs=0)),
        (errors.MemoryBudgetError, 5, lambda: mixtools.convert(NANO, tmp_path / "a", max_memory=1_000_000)),
        (errors.UsageError, 2, lambda: mixtools.laser(NANO, tmp_path / "a", layers="9")),
        (errors.UsageError, 2, lambda: mixtools.check(NANO, NANO, gate=["speed=1"])),
        (errors.UsageError, 2, lambda: mixtools.perplexity(NANO, TEXT, protocol="mine")),
        (errors.UsageError, 2, lambda: mixtools.generate(NANO)),
        (errors.RecipeError, 2, lambda: mixtools.run_recipe("torrent-to-hf", {"sorce": "x"})),
    ]
    for kind, code, call in cases:
        with pytest.raises(kind) as caught:
            call()
        assert caught.value.exit_code == code
    assert not any(tmp_path.iterdir())


def test_a_recipe_by_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"source": NANO, "out": tmp_path / "hf", "steps.convert.dtype": "f32"}
    plan = mixtools.run_recipe("torrent-to-hf", values, dry_run=True)
    assert str(plan).splitlines()[0] == f"mixtools convert torrent-to-hf {NANO} {tmp_path / 'hf'} --dtype f32"
    steps: list[str] = []
    done = mixtools.run_recipe("torrent-to-hf", values, on_step=lambda step: steps.append(step.status))
    assert steps == ["done", "done"] and done.exit_code == 0
    assert [step.step.name for step in done.steps] == ["convert", "check"]
    assert done.steps[1].result.document["verdict"] == "passed"
    again = mixtools.run_recipe("torrent-to-hf", values)
    assert again.steps[0].status == "skipped"
    assert capsys.readouterr() == ("", "")
    spec = mixtools.open(tmp_path / "hf")
    assert all(spec.format(slot) == Plain(spec.main_dtype()) for slot in spec.slots())


# --- the README ---


def code_blocks(heading: str) -> list[str]:
    """The Python of a section of the README."""
    text = (TREE / "README.md").read_text("utf-8")
    section = re.split(r"^#+ ", text.split(f" {heading}\n", 1)[1], maxsplit=1, flags=re.M)[0]
    return re.findall(r"```python\n(.*?)```", section, re.S)


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "nano").symlink_to(NANO)
    (tmp_path / "text.txt").symlink_to(TEXT)
    monkeypatch.chdir(tmp_path)
    (block,) = code_blocks("In Python")
    exec(compile(block, "README.md", "exec"), {"__name__": "__readme__"})
    shown = capsys.readouterr().out
    assert "wrote 65 tensors" in shown and "passed" in shown and "perplexity 32." in shown
    assert (tmp_path / "low" / "config.json").is_file()


def test_the_smallest_method_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README has it: one module and one line make a command, a recipe's step and a function."""
    (block,) = code_blocks("Adding a method")
    module = types.ModuleType("mixtools.methods.prune")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block, "README.md", "exec"), module.__dict__)
    monkeypatch.setitem(methods.METHODS, "prune", Entry("methods.prune:prune"))
    monkeypatch.setitem(api.VERBS, "prune", Entry("methods.prune:prune"))
    api.verbs.cache_clear()
    try:
        made = mixtools.prune(NANO, tmp_path / "pruned", share=0.25)
        assert made.tensors == 65
        source, pruned = mixtools.open(NANO), mixtools.open(made.output)
        for slot in source.slots():
            weight, found = source.read(slot), pruned.read(slot)
            if slot.expert is None:
                assert torch.equal(weight, found)
            else:
                assert 0.25 <= float((found == 0).float().mean()) < 0.27
                assert torch.equal(found[found != 0], weight[found != 0])
        assert isinstance(mixtools.prune(NANO, tmp_path / "none", dry_run=True), Forecast)
        checked = mixtools.check(made.output, NANO)
        assert checked.document["kind"] == "prune" and checked.verdict == "intact"
        step = {"do": "prune", "src": str(NANO), "out": str(tmp_path / "again"), "share": 0.25}
        file = tmp_path / "r.yaml"
        file.write_text(yaml.safe_dump({"name": "n", "description": "d", "steps": [step]}))
        mixtools.run_recipe(file)
        file.write_text(yaml.safe_dump({"name": "n", "description": "d", "steps": [{**step, "share": 7}]}))
        with pytest.raises(errors.RecipeError, match="out of range"):
            mixtools.run_recipe(file)
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pruned", "again")]
        assert weights[0] == weights[1]
        alone = typer.Typer()
        alone.command("prune")(commands.command(api.verbs()["prune"]))
        alone.command("other")(lambda: None)
        done = typer.testing.CliRunner().invoke(alone, ["prune", str(NANO), str(tmp_path / "c"), "--share", "0.25"])
        assert done.exit_code == 0 and "wrote 65 tensors" in done.output
        assert (tmp_path / "c" / "model.safetensors").read_bytes() == weights[0]
    finally:
        api.verbs.cache_clear()


def test_a_large_parent_s_memory_is_not_ours() -> None:
    code = (
        "import subprocess, sys\nballast = bytearray(600_000_000)\n"
        "child = 'from mixtools import machine; print(machine.peak_memory())'\n"
        "print(subprocess.run([sys.executable, '-c', child], capture_output=True, text=True, check=True).stdout)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 5e6 < int(done.stdout) < 1e8
