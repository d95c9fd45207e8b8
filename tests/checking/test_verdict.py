"""Passed, intact or failed: what was judged, what was not, and that no word is kinder than the figures."""

from __future__ import annotations

import contextlib
import html
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtral_oracle import DATA, NANO
from safetensors.torch import load_file, save_file

from mixtools import conversion, job
from mixtools.checking import gates, judge, report
from mixtools.cli.main import main
from mixtools.layouts.detect import open_checkpoint

TEXT, PROMPTS = DATA / "text.txt", DATA / "prompts.json"
MEASURED = {"text": TEXT, "ctx": 256, "max_tokens": 512, "new_tokens": 0}
CPU = judge.Machine(torch.device("cpu"))


def command(*arguments: object) -> tuple[int, str]:
    """Exit code and standard output."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--quiet"])
    return int(stop.value.code or 0), out.getvalue()


def check(output: Path, **options: Any) -> judge.Check:
    models = open_checkpoint(NANO), open_checkpoint(output, strict=False)
    return judge.run(*models, judge.Options(**options), CPU)


# --- the decision ---

HELD, NOT_HELD = gates.Gate("kld_mean", 0.1, 0.05), gates.Gate("kld_mean", 0.1, 0.2)
NO_FIGURE, NAN = gates.Gate("identical", 0, None), gates.Gate("kld_max", 9.0, math.nan)


@pytest.mark.parametrize(
    ("sound", "asked", "judged", "verdict"),
    [
        (True, 0, [], "intact"),
        (True, 1, [HELD], "passed"),
        (True, 2, [HELD, HELD], "passed"),
        (True, 1, [NOT_HELD], "failed"),
        (True, 2, [HELD, NOT_HELD], "failed"),
        (True, 2, [HELD, NO_FIGURE], "failed"),
        (True, 2, [HELD, NAN], "failed"),
        (True, 1, [], "failed"),  # a limit that was not judged at all
        (True, 2, [HELD], "failed"),
        (False, 0, [], "failed"),
        (False, 1, [HELD], "failed"),
        (False, 1, [], "failed"),
    ],
)
def test_only_gates_that_held_pass(sound, asked, judged, verdict):
    limits = dict.fromkeys([*gates.NAMES][:asked], 0.1)
    assert judge.decide(sound, limits, judged) == verdict


# --- outputs of every kind ---


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verdict") / "dense"
    job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), folder)
    return folder


@pytest.fixture(scope="module")
def laser(dense) -> Path:
    """Every matrix at the rank of the MP edge, which costs nano half of its perplexity and more."""
    code, out = command("laser", NANO, dense.parent / "laser", "--layers", "all", "--rank-rule", "mp")
    assert code == 0, out
    return dense.parent / "laser"


Edit = Callable[[dict[str, torch.Tensor]], object]


def edited(folder: Path, name: str, edit: Edit, **config: int) -> Path:
    """A copy with other tensors, as a program without a manifest of ours would leave it."""
    copy = folder.parent / name
    if copy.exists():
        return copy
    shutil.copytree(folder, copy)
    (copy / "mixtools.json").unlink()
    file = next(copy.glob("*.safetensors"))
    stored = {key: tensor.clone() for key, tensor in load_file(file).items()}
    edit(stored)
    save_file(stored, file)
    document = json.loads((copy / "config.json").read_text("utf-8"))
    (copy / "config.json").write_text(json.dumps(document | config), "utf-8")
    return copy


def damaged(folder: Path) -> Path:
    copy = folder.parent / "damaged"
    if not copy.exists():
        shutil.copytree(folder, copy)
        file = next(copy.glob("*.safetensors"))
        raw = bytearray(file.read_bytes())
        raw[-100] ^= 1
        file.write_bytes(raw)
    return copy


def _louder(stored: dict[str, torch.Tensor]) -> None:
    stored["lm_head.weight"] *= 1.5


def _smaller(stored: dict[str, torch.Tensor]) -> None:
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        stored[name] = stored[name][:2000].clone()


def _overflowing(stored: dict[str, torch.Tensor]) -> None:
    """Every weight a finite number, and no logit is."""
    stored["model.norm.weight"].fill_(3e38)


@pytest.fixture(scope="module")
def outputs(dense, laser, short) -> dict[str, Path]:
    return {
        "dense": dense, "laser": laser, "damaged": damaged(laser),
        "differs": edited(dense, "differs", _louder),
        "smaller": edited(laser, "smaller", _smaller, vocab_size=2000),
        "overflowing": edited(laser, "overflowing", _overflowing), "short": short,
    }  # fmt: skip


@pytest.fixture(scope="module")
def short(dense) -> Path:
    """Long enough for a window of 16 tokens, too short to take prompts from."""
    file = dense.parent / "short.txt"
    file.write_text(" ".join(TEXT.read_text("utf-8").split()[:16]), "utf-8")
    return file


@pytest.mark.parametrize(
    ("output", "options", "verdict", "judged"),
    [
        ("dense", {}, "passed", {"tensors_different": True}),
        ("dense", MEASURED, "passed", {"tensors_different": True, "ppl_ratio": True, "kld_mean": True}),
        ("differs", {}, "failed", {"tensors_different": False}),
        ("differs", MEASURED, "failed", {"tensors_different": False, "ppl_ratio": False, "kld_mean": False}),
        ("laser", {}, "intact", {}),
        ("laser", MEASURED, "intact", {}),
        ("laser", {"prompts": PROMPTS, "new_tokens": 4}, "intact", {}),
        ("laser", {"gates": {"tensors_different": 56}}, "passed", {"tensors_different": True}),
        ("laser", {"gates": {"tensors_different": 55}}, "failed", {"tensors_different": False}),
        ("laser", {**MEASURED, "gates": {"ppl_ratio": 2.0}}, "passed", {"ppl_ratio": True}),
        ("laser", {**MEASURED, "gates": {"ppl_ratio": 1.3}}, "failed", {"ppl_ratio": False}),
        # continuations were to be judged, and the text is too short to have any: none of 0 is no figure
        ("laser", {"text": "short", "ctx": 16, "gates": {"identical": 0}}, "failed", {"identical": False}),
        ("laser", {"text": "short", "ctx": 16}, "intact", {}),
        ("damaged", {}, "failed", {}),
        ("damaged", {**MEASURED, "gates": {"ppl_ratio": 2.0}}, "failed", {}),
        ("smaller", {}, "failed", {}),
        ("smaller", MEASURED, "failed", {}),
        ("smaller", {**MEASURED, "gates": {"ppl_ratio": 2.0}}, "failed", {}),
        ("overflowing", {}, "intact", {}),  # every byte is a number; only a text shows what they make
        ("overflowing", MEASURED, "failed", {}),
        ("overflowing", {**MEASURED, "gates": {"tensors_different": 65}}, "failed", {"tensors_different": True}),
        ("overflowing", {**MEASURED, "gates": {"kld_mean": 9.0}}, "failed", {"kld_mean": False}),
    ],
)
def test_the_verdict_on(outputs, output, options, verdict, judged):
    if options.get("text") == "short":
        options = options | {"text": outputs["short"]}
    found = check(outputs[output], **options)
    document = found.document
    assert (found.verdict, document["verdict"]) == (verdict, verdict)
    assert document["passed"] is {"passed": True, "intact": None, "failed": False}[verdict]
    assert found.passed is (verdict == "passed")
    assert {gate["name"]: gate["passed"] for gate in document["gates"]} == judged
    told = report.html(found)
    assert f'<section class="verdict {verdict}">' in told
    assert f"<title>{report.TITLES[verdict]}: " in told
    assert "Passed" not in told or verdict == "passed"
    words = {"passed": "passed", "intact": "intact, not judged", "failed": "FAILED"}[verdict]
    assert [*report.lines(document, None)][-1].startswith(f"checked: {words}. ")


@pytest.mark.parametrize("options", [{}, MEASURED])
def test_a_kind_without_gates_of_its_own_is_never_passed(options, dense, monkeypatch):
    monkeypatch.setattr(judge.gates, "kind_of", lambda *_: "IQ1_M")
    found = check(dense, **options)  # even where nothing changed
    assert found.verdict == "intact"
    assert "every one is its source's, bit for bit. No gate judges" in report.headline(found.document)


# --- the words ---


@pytest.fixture(scope="module")
def intact(laser) -> judge.Check:
    return check(laser, text=TEXT, ctx=256, new_tokens=4)


def body(found: judge.Check) -> list[str]:
    """The page's words, a line each, from the verdict on."""
    page = report.html(found)
    text = html.unescape(re.sub(r"<[^>]+>", "\n", page[page.index("<section") :]))
    return [line.strip() for line in text.splitlines() if line.strip()]


def test_what_an_intact_output_lost_stands_first(intact):
    ppl, kld = intact.document["perplexity"], intact.document["kld"]
    percent = round(100 * (ppl["output"] / ppl["source"] - 1))
    assert percent > 40
    error = f"(ln ratio {ppl['ln_ratio']:.3g} ± {ppl['ln_ratio_stderr']:.2g})"
    moved = f"{ppl['source']:.4g} {{}} {ppl['output']:.4g}"
    title, change, divergence, *rest = body(intact)
    assert title == "Intact, not judged"
    assert change == f"Perplexity {moved.format('→')}, +{percent} % {error}."
    assert divergence.startswith(f"KL divergence: mean {kld['mean']:.4g}, median ")
    assert "Figures" in rest
    first, second, *_, last = report.lines(intact.document, None)
    assert first == f"perplexity {moved.format('->')}, +{percent} % {error}"
    assert second.startswith("KL divergence: mean ")
    assert last.startswith(f"checked: intact, not judged. perplexity {moved.format('->')} (+{percent} %), mean KL ")
    assert "none is damaged, 56 changed. No gate judges this kind of output (laser)" in last


def test_what_was_not_measured_is_said_first_and_how_to_measure_it(laser):
    found = check(laser)
    title, change, *_ = body(found)
    assert (title, change) == ("Intact, not judged", "Change of perplexity not measured: give a text with --text FILE.")
    first, *_, last = report.lines(found.document, None)
    assert first == "change of perplexity not measured: give a text with --text FILE"
    assert last.startswith(f"checked: intact, not judged. {first}. 65 tensors were read to the last byte; none")


def test_an_intact_page_is_amber(intact):
    rules = report.html(intact).split("</style>")[0]
    assert ".intact { background: var(--warn-wash); border-color: var(--warn); }" in rules
    assert ".intact h1 { color: var(--warn); }" in rules


def test_figures_that_are_no_numbers_are_no_change_and_no_verdict(outputs):
    found = check(outputs["overflowing"], **MEASURED)
    assert found.document["perplexity"]["ln_ratio"] is None
    assert "Perplexity or divergence is not finite: the output cannot be judged." in body(found)
    assert not re.search(r"\b(nan|inf)\b", report.html(found))
    assert " -> not finite, change not finite (ln ratio not finite" in next(report.lines(found.document, None))
    asked = check(outputs["overflowing"], **MEASURED, gates={"kld_mean": 9.0})
    assert "gate kld_mean: no figure, limit 9: FAILED" in report.lines(asked.document, None)


@pytest.mark.parametrize(
    ("ratio", "words"),
    [
        (1.0, "unchanged"), (1.47, "+47 %"), (1.0204, "+2 %"), (1.00062, "+0.062 %"), (0.9, "-10 %"), (0.985, "-1.5 %"),
        (1.9951, "+100 %"), (9.5, "+850 %"), (47.3, "47.3 times as high"), (1e300, "1.00e+300 times as high"),
    ],
)  # fmt: skip
def test_a_change_in_words(ratio, words):
    assert report._relative(math.log(ratio)) == words
    assert report._relative(None) == "change not finite"


# --- the command ---


def test_an_intact_output_ends_with_0_and_a_judged_one_by_its_gate(laser, tmp_path):
    arguments = ("check", laser, "--against", NANO, "--text", TEXT, "--ctx", 256, "--new-tokens", 0)
    code, out = command(*arguments, "--report", tmp_path / "report")
    assert code == 0
    assert out.startswith("perplexity 32.17 -> ")
    assert out.splitlines()[-1].startswith("checked: intact, not judged. perplexity 32.17 -> ")
    assert "<h1>Intact, not judged</h1>" in (tmp_path / "report" / "report.html").read_text("utf-8")
    code, out = command(*arguments, "--gate", "ppl_ratio=1.05")
    assert code == 4
    assert out.splitlines()[-1].startswith("checked: FAILED. 1 of 1 gates failed: ppl_ratio is 1.")
    code, out = command(*arguments, "--gate", "ppl_ratio=3", "--json")
    assert (code, json.loads(out)["verdict"]) == (0, "passed")


def test_a_damaged_output_that_nothing_judges_ends_with_4(outputs):
    code, out = command("check", outputs["damaged"], "--against", NANO)
    assert code == 4
    assert out.startswith("problem: ")
    assert out.splitlines()[-1].startswith("checked: FAILED. The output is damaged: ")
