"""The check as a whole: its document, its gates, and its report."""

from __future__ import annotations

import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtral_oracle import DATA, NANO
from safetensors.torch import load_file, save_file

from mixtools import conversion, job
from mixtools.checking import gates, judge, report
from mixtools.errors import InputError, OutputError, UsageError
from mixtools.layouts.detect import open_checkpoint

TEXT, PROMPTS = DATA / "text.txt", DATA / "prompts.json"
CPU = judge.Machine(torch.device("cpu"))
PROMISED = {
    "passed", "verdict", "source", "output", "integrity", "perplexity", "kld", "same_top", "rms_delta_p", "generation",
    "gates", "seconds", "peak_memory_bytes",
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "hf"
    job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), folder)
    return folder


@pytest.fixture(scope="module")
def worse(good, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a method without a manifest of ours would leave it: noise on the experts, and one of them swapped."""
    folder = Path(shutil.copytree(good, tmp_path_factory.mktemp("worse") / "hf"))
    (folder / "mixtools.json").unlink()
    file = next(folder.glob("*.safetensors"))
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    generator = torch.Generator().manual_seed(1)
    for tensor in (stored[name] for name in sorted(stored) if ".w2." in name):
        tensor.add_(0.1 * tensor.float().std() * torch.randn(tensor.shape, generator=generator))
    save_file(stored, file)
    return folder


def check(output: Path, **options) -> judge.Check:
    models = open_checkpoint(NANO), open_checkpoint(output, strict=False)
    return judge.run(*models, judge.Options(**options), CPU)


@pytest.fixture(scope="module")
def passed(good) -> judge.Check:
    return check(good, text=TEXT, prompts=PROMPTS, ctx=256, new_tokens=12)


@pytest.fixture(scope="module")
def failed(worse) -> judge.Check:
    return check(worse, text=TEXT, prompts=PROMPTS, ctx=256, new_tokens=12)


def test_a_conversion_passes_with_figures_of_exactly_nothing(passed):
    document = passed.document
    assert document.keys() >= PROMISED
    assert document["passed"] is True
    assert document["integrity"]["identical"] == document["integrity"]["tensors"] == 65
    assert document["kld"]["max"] == document["rms_delta_p"] == document["perplexity"]["ln_ratio"] == 0
    assert document["generation"]["identical"] == 5
    assert document["generation"]["forced_on"] == "greedy"
    assert [gate["name"] for gate in document["gates"]] == ["tensors_different", "ppl_ratio", "kld_mean"]
    json.dumps(document, allow_nan=False)


def test_a_worse_output_fails_and_says_by_how_much(failed):
    document = failed.document
    assert document["passed"] is False
    assert document["integrity"]["passed"] is True
    assert document["integrity"]["different"] == 16
    gate = {gate["name"]: gate for gate in document["gates"]}["kld_mean"]
    assert gate["value"] == document["kld"]["mean"] > gate["limit"]
    assert gate["passed"] is False
    assert document["perplexity"]["ln_ratio"] == pytest.approx(
        math.log(document["perplexity"]["output"] / document["perplexity"]["source"])
    )


def test_limits_can_be_changed(worse):
    asked = gates.parse(["tensors_different=16", "kld_mean=0.5", "ppl_ratio=1.2", "same_top=0.5"])
    found = check(worse, text=TEXT, ctx=256, new_tokens=0, gates=asked)
    assert found.passed
    assert found.document["generation"] is None
    assert {gate["name"] for gate in found.document["gates"]} == set(asked)


def test_without_a_text_the_tensors_decide(good, worse):
    assert check(good).passed
    found = check(worse)
    assert not found.passed
    assert found.document["perplexity"] is found.document["generation"] is None


def test_damage_is_told_not_raised_and_nothing_is_measured_on_it(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "damaged"))
    file = next(folder.glob("*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    found = check(folder, text=TEXT, ctx=256)
    assert not found.passed
    assert [problem["type"] for problem in found.document["integrity"]["problems"]] == ["ChecksumError"]
    assert found.document["kld"] is None
    assert "damaged" in report.headline(found.document)


def test_a_missing_tensor_is_told(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "short"))
    (folder / "mixtools.json").unlink()
    file = next(folder.glob("*.safetensors"))
    stored = {name: tensor.clone() for name, tensor in load_file(file).items()}
    del stored["model.norm.weight"]
    save_file(stored, file)
    found = check(folder, text=TEXT, ctx=256)
    assert not found.passed
    assert "model.norm.weight" in found.document["integrity"]["problems"][0]["message"]


def test_a_tokenizer_that_cuts_otherwise_is_a_problem(good, tmp_path):
    folder = Path(shutil.copytree(good, tmp_path / "copy"))
    (folder / "tokenizer.model").unlink(missing_ok=True)
    document = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    document["model"]["merges"] = document["model"]["merges"][:300]  # its other pieces can no longer be made
    (folder / "tokenizer.json").write_text(json.dumps(document), "utf-8")
    found = check(folder, text=TEXT, ctx=256, new_tokens=0)
    assert not found.passed
    messages = [problem["message"] for problem in found.document["integrity"]["problems"]]
    message = next(message for message in messages if "other ids" in message)
    told = re.search(r"other ids than the source's tokenizer, .*expected (\[.*\]), found (\[.*\])", message)
    assert told and [len(json.loads(ids)) for ids in told.groups()] == [3, 3]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": TEXT}, InputError, "fewer than one window of 2048"),
        ({"gates": {"kld_mean": 1.0}}, UsageError, "kld_mean needs a figure that is not measured"),
        ({"text": TEXT, "ctx": 256, "generation": "sampled"}, UsageError, "not one of auto, greedy, text"),
    ],
)
def test_options_are_judged_before_a_weight_is_read(good, options, error, message, monkeypatch):
    monkeypatch.setattr(judge.integrity, "verify", lambda *_: pytest.fail("read the weights"))
    with pytest.raises(error, match=message):
        check(good, **options)


# --- gates ---


def test_gates_are_parsed_and_unknown_names_are_listed():
    assert gates.parse(["kld_mean=0.05", "same_top=.9"]) == {"kld_mean": 0.05, "same_top": 0.9}
    with pytest.raises(UsageError, match="'kld' is not one of tensors_different, ppl_ratio, kld_mean"):
        gates.parse(["kld=1"])
    for text in ("kld_mean", "kld_mean=", "kld_mean=small", "kld_mean=nan"):
        with pytest.raises(UsageError, match="write kld_mean=NUMBER"):
            gates.parse([text])


def test_gates_pass_on_their_side_of_the_limit():
    values = {"kld_mean": 0.02, "same_top": 0.9, "kld_max": math.nan}
    limits = {"kld_mean": 0.02, "same_top": 0.9, "kld_max": 5.0, "kld_p99": 1.0}
    assert {gate.name: gate.passed for gate in gates.judge(limits, values)} == {
        "kld_mean": True, "same_top": True, "kld_max": False, "kld_p99": False,
    }  # fmt: skip
    assert not gates.Gate("same_top", 0.9, 0.89).passed
    assert not gates.Gate("kld_mean", 0.9, 0.91).passed


def test_a_quantized_output_is_not_judged_by_its_tensors_alone():
    with pytest.raises(UsageError, match="a Q4_K_M output is judged by its perplexity and divergence: add --text"):
        gates.choose("Q4_K_M", {}, {"tensors_different"})
    assert gates.choose("Q4_K_M", {}, {"tensors_different", "ppl_ratio", "kld_mean"}) == gates.DEFAULTS["Q4_K_M"]
    assert gates.choose("laser", {}, {"tensors_different"}) == {}
    assert all(limits.keys() <= gates.NAMES.keys() for limits in gates.DEFAULTS.values())


def test_laser_is_known_by_its_report(tmp_path):
    assert gates.kind_of(object(), tmp_path) == "dense"
    (tmp_path / "laser-report.json").write_text("{}")
    assert gates.kind_of(object(), tmp_path) == "laser"


# --- report ---


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and collects the text and every address."""

    VOID = frozenset({"meta", "line", "br", "link", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses, self.marks = "", [], 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.marks += tag == "mark"
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.text += data


def test_the_report_is_one_well_formed_page_that_loads_nothing(passed, failed, tmp_path):
    for found in (passed, failed):
        files = report.write(found, tmp_path / "report")
        assert [file.name for file in files] == ["report.json", "report.html"]
        text = files[1].read_text("utf-8")
        page = Page(text)
        assert page.addresses == []
        assert "url(" not in text
        assert "@import" not in text
        assert json.loads(files[0].read_text("utf-8")) == found.document


def test_the_verdict_comes_first(passed, failed):
    good, bad = Page(report.html(passed)).text, Page(report.html(failed)).text
    for text, verdict in ((good, "Passed"), (bad, "Failed")):
        body = text[text.index("\n", text.index(verdict)) :]  # after the title
        assert body.split()[0] == verdict
    assert "65 tensors were read to the last byte; every one is its source's, bit for bit." in good
    assert re.search(r"3 of 3 gates failed: tensors_different is 16, limit 0, ppl_ratio is 1\.", bad)


def test_divergences_are_marked_on_both_sides(passed, failed):
    differing = len(failed.document["generation"]["divergences"])
    assert differing > 0
    legend = 2
    assert Page(report.html(failed)).marks == 2 * differing + legend
    assert Page(report.html(passed)).marks == legend
    assert Page(report.html(passed)).text.count("no difference") == 5


def test_what_comes_from_files_cannot_become_markup(failed):
    attack = "<script>alert(1)</script>"
    document = json.loads(json.dumps(failed.document))
    document["output"]["path"] = document["remarks"] = [attack]
    document["integrity"]["worst"][0]["tensor"] = attack
    text = report.html(judge.Check(document, failed.figures, failed.generation, failed.tokenizer))
    assert "<script" not in text
    assert Page(text).text.count(attack) >= 3


def test_a_report_that_cannot_be_written_says_so(passed, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        report.write(passed, tmp_path / "file" / "report")


def test_histograms_count_every_token(failed):
    for chart in report._histograms(failed.figures):
        counted = sum(int(bar["title"].split()[0]) for bar in chart["bars"])
        assert counted == len(failed.figures.kld)
        assert all(0 <= bar["x"] <= chart["width"] and bar["height"] >= 0 for bar in chart["bars"])
        assert all(0 <= tick["x"] <= chart["width"] for tick in chart["ticks"])
        assert len(chart["ticks"]) >= 2


@pytest.mark.parametrize(("low", "high"), [(-12.0, 0.4), (-3.2, 0.1), (-40.0, 2.0), (0.2, 0.9)])
def test_a_scale_of_powers_has_few_whole_ticks(low, high):
    ticks = report._ticks(low, high, whole=True)
    assert len(ticks) <= 8 and all(low <= tick <= high and tick == int(tick) for tick in ticks)
    assert len(ticks) >= min(4, int(high) - int(low))
    assert len(set(np.diff(ticks))) <= 1


@pytest.mark.parametrize("given", [{"text": NANO / "RELEASE"}, {"prompts": NANO / "RELEASE"}])
def test_a_text_or_prompts_alone_are_continued(given):
    continued = {"teacher_forced_agreement", "identical"}
    assert judge._measured(judge.Options(**given)) >= continued
    assert not judge._measured(judge.Options(**given, new_tokens=0)) & continued
    assert judge._measured(judge.Options()) == {"tensors_different"}
    assert ("kld_mean" in judge._measured(judge.Options(**given))) == ("text" in given)


def test_the_tallest_bar_leaves_room_for_a_mark_s_name(failed):
    for chart in report._histograms(failed.figures):
        assert min(bar["y"] for bar in chart["bars"]) == 12
        assert all(abs(bar["y"] + bar["height"] - chart["floor"]) < 0.11 for bar in chart["bars"])


@pytest.mark.parametrize("value", [0.0, -7.25, 3.0])
def test_a_histogram_of_one_value_has_one_bar_in_its_middle(value):
    chart = report._histogram(np.full(9, value), "{:+.2g}", [("mean", value)])
    (bar,) = chart["bars"]
    assert bar["title"].startswith("9 tokens, ")
    assert abs(bar["x"] + bar["width"] / 2 - chart["width"] / 2) <= bar["width"]
    assert chart["marks"][0]["x"] == chart["width"] / 2


@pytest.mark.parametrize(
    ("kind", "ratio", "kld"),
    [("dense", 1.002, 0.002), ("Q8_0", 1.002, 0.002), ("Q6_K", 1.005, 0.006), ("int8", 1.005, 0.006),
     ("Q5_K_M", 1.01, 0.012), ("Q4_K_M", 1.03, 0.035), ("gptq", 1.03, 0.035), ("awq", 1.03, 0.035),
     ("nf4", 1.04, 0.045), ("IQ4_XS", 1.04, 0.045), ("Q3_K_L", 1.07, 0.09), ("Q3_K_M", 1.08, 0.1),
     ("Q3_K_S", 1.12, 0.15), ("gptq-3bit", 1.12, 0.15), ("IQ3_XXS", 1.15, 0.2), ("Q2_K", 1.35, 0.35),
     ("Q2_K_S", 1.6, 0.6), ("IQ2_XXS", 1.6, 0.6)],
)  # fmt: skip
def test_default_limits_are_those_around_what_llama_cpp_publishes(kind, ratio, kld):
    limits = gates.DEFAULTS[kind]
    assert (limits["ppl_ratio"], limits["kld_mean"]) == (ratio, kld)
