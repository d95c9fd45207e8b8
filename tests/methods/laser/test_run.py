"""mixtools laser on the nano model: what is written, what is told, and what is refused."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch

from mixtools import conversion, job
from mixtools.checking import perplexity
from mixtools.errors import ConfigError, InputError, SpectrumError, UsageError
from mixtools.formats import Factored, Plain
from mixtools.inference import calibrate
from mixtools.inference.stream import Stream
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.methods.laser import method, selection
from mixtools.methods.laser import run as laser
from mixtools.methods.laser.search import SearchOptions
from mixtools.methods.laser.search import run as laser_search
from mixtools.methods.laser.survey import survey
from mixtools.methods.laser.worker import Worker
from mixtools.names import Role, Slot
from mixtools.storage import output as storage_output
from mixtools.storage.dtypes import DType
from mixtools.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
NANO = DATA / "nano-mixtral"
W2 = Slot(Role.DOWN, 1, 3)
RULES = ("mp", "gavish-donoho", "laserrmt", "energy=0.9", "rho=0.1", "rank=12")


@pytest.fixture
def nano() -> Checkpoint:
    return open_checkpoint(NANO)


def reduce(source: Checkpoint, out: Path, options: laser.Options, **how: Any) -> dict[str, Any]:
    """As the command does, without a calibration. Returns the report."""
    worker = Worker(source, options.method, torch.device("cpu"), None)
    known = survey(worker, laser.select(source.config, options)) if options.factored else None
    job.run(laser.plan_laser(source, options, known=known), out, job.Run(**how))
    return laser.read_report(out)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def damaged(tmp_path: Path, slot: Slot, weight: torch.Tensor) -> Checkpoint:
    """The nano model in layout D with another matrix in one place, without checksums."""
    out = tmp_path / "damaged"
    if not out.exists():
        job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), out)
        (out / "mixtools.json").unlink()
    entry = open_checkpoint(out).entry(slot)
    with entry.source.paths[0].open("r+b") as file:
        file.seek(entry.offset)
        file.write(weight.to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return open_checkpoint(out)


# --- what is written ---


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_changes_the_chosen_and_nothing_else(tmp_path: Path, nano: Checkpoint, rule: str) -> None:
    options = laser.Options(layers="1", targets="w2,k", experts="0,3", rank_rule=rule)
    report = reduce(nano, tmp_path / "out", options)
    written = open_checkpoint(tmp_path / "out")
    assert written.layout.letter == "D"
    chosen = [Slot(Role.K, 1), Slot(Role.DOWN, 1, 0), Slot(Role.DOWN, 1, 3)]
    assert laser.select(nano.config, options) == chosen
    assert len(report["matrices"]) == 3
    for slot in nano.slots():
        if slot in chosen:
            expected = method.encode(nano.read(slot), options.method).dense
            assert torch.equal(written.read(slot).view(torch.int16), expected.view(torch.int16)), slot
            assert not torch.equal(written.read(slot), nano.read(slot))
        else:
            assert np.array_equal(written.bits(slot), nano.bits(slot)), slot
    plain = tmp_path / "plain"
    job.run(conversion.plan_hf(nano, conversion.Options()), plain)
    both = files(tmp_path / "out"), files(plain)
    own = {"laser-report.json", "laser-report.csv", "laser-report.html"}
    assert both[0].keys() - both[1].keys() == own
    same = {name for name in both[1] if both[0][name] == both[1][name]}
    assert both[1].keys() - same == {"mixtools.json", "model.safetensors"}


def test_a_reduced_matrix_is_the_nearest_of_its_rank(tmp_path: Path, nano: Checkpoint) -> None:
    """Eckart and Young, with scipy's SVD: up to the rounding to bf16, no other matrix of the rank is nearer."""
    report = reduce(nano, tmp_path / "out", laser.Options("1", "w2", "3", "rank=20"))
    weight = nano.read(W2).double().numpy()
    found = open_checkpoint(tmp_path / "out").read(W2).double().numpy()
    u, s, vt = scipy.linalg.svd(weight, lapack_driver="gesvd")
    best = (u[:, :20] * s[:20]) @ vt[:20]
    assert np.abs(found - best).max() <= 2**-8 * np.abs(best).max()
    assert np.linalg.norm(weight - found) == pytest.approx(np.sqrt((s[20:] ** 2).sum()), rel=1e-4)
    assert report["matrices"][0]["rank"] == 20


def test_from_every_dense_layout_the_same_bytes(tmp_path: Path, nano: Checkpoint) -> None:
    options = laser.Options("0-1", "q,w1", "1", "energy=0.8")
    reduce(nano, tmp_path / "from-a", options)
    job.run(conversion.plan_torrent(nano, conversion.Options(), safetensors=True), tmp_path / "c")
    reduce(open_checkpoint(tmp_path / "c"), tmp_path / "from-c", options)
    pair = [files(tmp_path / name) for name in ("from-a", "from-c")]
    assert {name for name in pair[0] if pair[0][name] != pair[1][name]} <= {"mixtools.json", "laser-report.json"}
    rows = [json.loads(folder["laser-report.json"])["matrices"] for folder in pair]
    assert rows[0] == rows[1]


def test_a_full_rank_leaves_the_bits(tmp_path: Path, nano: Checkpoint) -> None:
    report = reduce(nano, tmp_path / "out", laser.Options("1", "v", rank_rule="rank=128"))
    slot = Slot(Role.V, 1)
    assert np.array_equal(open_checkpoint(tmp_path / "out").bits(slot), nano.bits(slot))
    assert report["summary"]["kept_whole"] == 1


# --- factors ---


def test_factors_and_their_dense_form_agree_bit_for_bit(tmp_path: Path, nano: Checkpoint) -> None:
    options = laser.Options("0-1", "w2,k", "3", "energy=0.5", factored=True)
    report = reduce(nano, tmp_path / "factored", options)
    factored = open_checkpoint(tmp_path / "factored")
    chosen = laser.select(nano.config, options)
    ranks = {row["tensor"]: row["rank"] for row in report["matrices"]}
    for slot in chosen:
        assert isinstance(factored.format(slot), Factored)
        name = factored.piece(slot).name
        first, second = (factored.store.entries[f"{name}{suffix}"].shape for suffix in ("", "_b"))
        assert first[1] == second[0] == ranks[name]
        expected = method.encode(nano.read(slot), options.method).dense
        assert torch.equal(factored.read(slot).view(torch.int16), expected.view(torch.int16))
        for size in (1, 5000):  # blocks of whatever size hold the same bits
            blocks = [block.copy() for block in factored.blocks(slot, size)]
            assert len(blocks) > 1
            assert np.array_equal(np.concatenate(blocks), factored.bits(slot))
    job.run(conversion.plan_hf(factored, conversion.Options()), tmp_path / "dense")
    dense = open_checkpoint(tmp_path / "dense")
    for slot in nano.slots():
        assert np.array_equal(dense.bits(slot), factored.bits(slot))
        assert slot in chosen or np.array_equal(dense.bits(slot), nano.bits(slot))
    assert dense.format(W2) == Plain(DType.BF16)
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("factored", "dense")]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("config", ["as written", "a loader that passes over quantization_config"])
@pytest.mark.parametrize("chosen", [("w2", "3"), ("w1,w3", "all"), ("k,o", "all")], ids=str)
def test_no_loader_invents_weights_for_factors(
    tmp_path: Path, nano: Checkpoint, chosen: tuple[str, str], config: str
) -> None:
    """transformers 4.36 does not look at a quantization_config without quant_method: there the shapes must stop it."""
    from transformers import AutoModelForCausalLM, MixtralForCausalLM

    reduce(nano, tmp_path / "out", laser.Options("1", *chosen, rank_rule="rank=20", factored=True))
    if config != "as written":
        document = json.loads((tmp_path / "out" / "config.json").read_text())
        del document["quantization_config"]
        (tmp_path / "out" / "config.json").write_text(json.dumps(document))
    for loader in (AutoModelForCausalLM, MixtralForCausalLM):
        with pytest.raises(
            (ValueError, RuntimeError), match="quant_method" if config == "as written" else "size|shape|conversion"
        ):
            loader.from_pretrained(tmp_path / "out")


def test_factors_that_save_nothing_are_refused(tmp_path: Path, nano: Checkpoint) -> None:
    with pytest.raises(UsageError, match=r"rank 128 hold 65,536 numbers, the 256x256 matrix 65,536") as caught:
        reduce(nano, tmp_path / "out", laser.Options("1", "w2", "3", "rank=128", factored=True))
    assert caught.value.tensor == "layers.1.feed_forward.experts.3.w2.weight"
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="ranks before"):
        laser.plan_laser(nano, laser.Options("1", "w2", factored=True))


def test_a_lone_or_misshapen_factor_is_a_fault(tmp_path: Path, nano: Checkpoint) -> None:
    from safetensors.torch import load_file, save_file

    reduce(nano, tmp_path / "out", laser.Options("1", "w2", "3", "rank=20", factored=True))
    (tmp_path / "out" / "mixtools.json").unlink()
    path = tmp_path / "out" / "model.safetensors"
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors = load_file(path)
    for change in ({f"{name}_b": torch.zeros(21, 256)}, {name: torch.zeros(256, 256)}):
        save_file({**tensors, **{key: value.bfloat16() for key, value in change.items()}}, path)
        with pytest.raises(InputError, match="wrong shape|unknown to layout"):
            open_checkpoint(tmp_path / "out")
    for lost, what in ((name, "lacks"), (f"{name}_b", "wrong shape")):
        save_file({key: value for key, value in tensors.items() if key != lost}, path)
        with pytest.raises(InputError, match=what):
            open_checkpoint(tmp_path / "out")


# --- killed and continued ---


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("factored", [False, True])
def test_killed_anywhere_and_continued_gives_the_same_bytes(
    tmp_path: Path, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch, factored: bool
) -> None:
    options = laser.Options("0-1", "w2", "3", "energy=0.4", factored=factored)
    append = storage_output.Output._append
    seen: list[str] = []
    fatal = 0

    def dying(self: storage_output.Output, line: Any) -> None:
        seen.append(next(iter(line)))
        if len(seen) == fatal:
            raise _Killed
        append(self, line)

    monkeypatch.setattr(storage_output.Output, "_append", dying)
    reduce(nano, tmp_path / "whole", options, jobs=1)
    note = len(seen) - seen[::-1].index("note")  # the second matrix's
    for moment in (note, note + 1, note + 2, len(seen)):  # a note, a tensor, perhaps the second factor; the commit
        seen.clear()
        fatal = moment
        out = tmp_path / str(moment)
        with pytest.raises(_Killed):
            reduce(nano, out, options, jobs=1)
        fatal = 0
        reduce(open_checkpoint(NANO), out, options, jobs=1)
        assert files(out) == files(tmp_path / "whole"), moment


def test_a_killed_search_goes_on_and_ends_in_the_same_bytes(
    tmp_path: Path, nano: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = Tokenizer.from_folder(NANO).encode((DATA / "text.txt").read_text("utf-8"))
    half = len(ids) // 2
    windows = [perplexity.cut(part, ctx=64, bos_id=1) for part in (ids[:half], ids[half:])]
    searched = SearchOptions(rank_rules=("energy=0.9", "mp"), margin=0.0)
    asked = laser_search.Asked(searched, *windows, {"text": "a", "held_out_text": "b"})
    options = laser.Options("0-1", "w2", "0-3")

    def reduced(out: Path) -> None:
        planned = laser_search.plan_search(open_checkpoint(NANO), options, asked, dtype=torch.float32)
        job.run(planned, out, job.Run(jobs=1))

    reduced(tmp_path / "whole")
    report = laser.read_report(tmp_path / "whole")
    assert 0 < report["search"]["accepted"] < len(report["search"]["candidates"]) == 8
    for row in report["matrices"]:
        assert row["accepted"] and row["delta_nll"] <= 0 and row["rank"] < row["of"]
    note, notes = storage_output.Output.note, 0

    def dying(self: storage_output.Output, name: str, found: Any) -> None:
        nonlocal notes
        notes += 1
        if notes == fatal:
            raise _Killed
        note(self, name, found)

    monkeypatch.setattr(storage_output.Output, "note", dying)
    for fatal in (6, 9, 10):  # among the second layer's decisions, at the whole's, at the first matrix
        out, notes = tmp_path / str(fatal), 0
        with pytest.raises(_Killed):
            reduced(out)
        reduced(out)
        assert files(out) == files(tmp_path / "whole"), fatal


# --- what is told ---


def test_the_report_tells_what_scipy_finds(tmp_path: Path, nano: Checkpoint) -> None:
    options = laser.Options("1", "w2,k", "3", "energy=0.7")
    report = reduce(nano, tmp_path / "out", options)
    assert report["laser"] == {"layers": "1", "targets": "w2,k", "experts": "3", "rank_rule": "energy=0.7",
                               "factored": False, "exact": False, "norm": "weights"}  # fmt: skip
    for row, slot in zip(report["matrices"], laser.select(nano.config, options), strict=True):
        weight = nano.read(slot).double().numpy()
        s = scipy.linalg.svdvals(weight)
        energy = np.cumsum(s**2) / (s**2).sum()
        assert row["shape"] == list(weight.shape) and row["of"] == min(weight.shape)
        assert row["rank"] == int(np.argmax(energy >= 0.7)) + 1
        assert row["share"] == row["rank"] / row["of"]
        assert row["energy"] == pytest.approx(energy[row["rank"] - 1], rel=1e-9)
        assert row["smallest_kept"] == pytest.approx(s[row["rank"] - 1], rel=1e-9)
        for name, threshold in (("snr_mp", "edge"), ("snr_laserrmt", "laserrmt_threshold")):
            above = s > row[threshold]
            assert row[name] == pytest.approx(s[above].sum() / s[~above].sum(), rel=1e-9)
        beta = min(weight.shape) / max(weight.shape)
        iqr = np.percentile(s, 75) - np.percentile(s, 25)
        assert row["laserrmt_threshold"] == pytest.approx(iqr / 1.349 * (1 + np.sqrt(beta)), rel=1e-9)
        assert row["edge"] == pytest.approx(row["sigma"] * (np.sqrt(max(weight.shape)) * (1 + np.sqrt(beta))), rel=1e-9)
        assert row["break_even"] == weight.size // sum(weight.shape)
        bins = row["histogram"]
        counts, _ = np.histogram(np.minimum(s, bins["high"]), 64, (0, bins["high"]))
        assert sum(bins["counts"]) == len(s)
        assert np.abs(np.array(bins["counts"]) - counts).sum() <= 2  # a value on the border of two bins
        assert bins["largest"] == pytest.approx(s[0]) and bins["smallest"] == pytest.approx(s[-1], rel=1e-5)


def test_the_three_files_tell_the_same(tmp_path: Path, nano: Checkpoint) -> None:
    report = reduce(nano, tmp_path / "out", laser.Options("all", "w1,q", rank_rule="mp"))
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "laser-report.csv").read_text("utf-8"))))
    page = (tmp_path / "out" / "laser-report.html").read_text("utf-8")
    assert len(lines) == len(report["matrices"]) == 18
    for line, row in zip(lines, report["matrices"], strict=True):
        assert line["tensor"] == row["tensor"] and int(line["rank"]) == row["rank"]
        assert float(line["energy"]) == row["energy"]
        assert page.count(f"<code>{row['tensor']}</code></td>") == 1
    assert page.count('<polyline class="law"') == 12  # of many matrices, some are drawn
    assert "http" not in page.replace("http-equiv", "")
    document = json.loads((tmp_path / "out" / "mixtools.json").read_text())
    assert document["laser"] == report["laser"]


def test_what_is_already_truncated_is_said(tmp_path: Path, nano: Checkpoint) -> None:
    reduce(nano, tmp_path / "once", laser.Options("1", "w2", "3", "rank=10"))
    report = reduce(open_checkpoint(tmp_path / "once"), tmp_path / "twice", laser.Options("1", "w2", "3", "mp"))
    row = report["matrices"][0]
    assert row["already_low_rank"] and "already truncated" in row["note"]
    assert row["rank"] == 10
    assert any("no noise left to cut" in remark for remark in report["remarks"])


def test_a_zero_matrix_is_said(tmp_path: Path) -> None:
    source = damaged(tmp_path, W2, torch.zeros(256, 256))
    report = reduce(source, tmp_path / "out", laser.Options("1", "w2", "3", "mp"))
    assert report["matrices"][0]["note"] == "the matrix is zero"
    assert not open_checkpoint(tmp_path / "out").read(W2).any()


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "2"}, "--layers: 2 is out of range; the model has layers 0 to 1"),
        ({"layers": "0-9"}, "out of range"),
        ({"layers": "1-0"}, "runs backwards; write 0-1"),
        ({"layers": "first"}, "is no number"),
        ({"layers": "-1"}, "is no number"),
        ({"layers": ""}, "is no number"),
        ({"experts": "8"}, "--experts: 8 is out of range; the model has experts 0 to 7"),
        ({"targets": "w4"}, "'w4' is not one of w1,w2,w3,q,k,v,o"),
        ({"targets": "router"}, "is not one of"),
        ({"rank_rule": "noise"}, "is not one of mp, gavish-donoho"),
        ({"rank_rule": "rank=257"}, "has rank 256 at most"),
        ({"rank_rule": "rank=0"}, "at least 1"),
        ({"rank_rule": "activation=0.01"}, "give it a calibration text"),
    ],
)
def test_options_that_cannot_be(tmp_path: Path, nano: Checkpoint, change: dict[str, str], message: str) -> None:
    options = laser.Options(**{"layers": "1", "targets": "w2", **change})
    with pytest.raises(UsageError) as caught:
        reduce(nano, tmp_path / "out", options)
    assert message in str(caught.value)


def test_numbers_of_layers() -> None:
    assert selection.parse_numbers("all", 3, "layers") == {0, 1, 2}
    assert selection.parse_numbers(" 3, 7,20-22 ", 32, "layers") == {3, 7, 20, 21, 22}


@pytest.mark.parametrize("factored", [False, True])
def test_nan_is_named(tmp_path: Path, nano: Checkpoint, factored: bool) -> None:
    weight = nano.read(W2)
    weight[2, 5] = float("nan")
    source = damaged(tmp_path, W2, weight)
    with pytest.raises(SpectrumError, match=r"nan at \[2, 5\]") as caught:
        reduce(source, tmp_path / "out", laser.Options("1", "w2", rank_rule="mp", factored=factored))
    assert str(caught.value.file).endswith("model.safetensors")
    assert caught.value.tensor == "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_broken_configuration_is_refused(tmp_path: Path, nano: Checkpoint) -> None:
    reduce(nano, tmp_path / "out", laser.Options("1", "w2", "3", "rank=20", factored=True))
    config = tmp_path / "out" / "config.json"
    config.write_text(config.read_text().replace('"mixtral"', '"llama"'))
    with pytest.raises(ConfigError):
        open_checkpoint(tmp_path / "out")


# --- calibration ---


@pytest.fixture(scope="module")
def text() -> calibrate.Text:
    tokenizer = Tokenizer.from_folder(NANO)
    ids = tokenizer.encode((DATA / "text.txt").read_text("utf-8"), bos=False)
    return calibrate.cut(ids, samples=6, seq_len=64, bos_id=tokenizer.bos_id)


class _Inputs:
    """Keeps every input of some linears: the slow oracle of the sums."""

    def __init__(self, slots: list[Slot]) -> None:
        self.kept: dict[Slot, list[torch.Tensor]] = {slot: [] for slot in slots}

    def __call__(self, slot: Slot, x: torch.Tensor, *_: object) -> None:
        if slot in self.kept:
            self.kept[slot].append(x.double().clone())


def test_layer_errors_are_those_of_the_outputs(nano: Checkpoint, text: calibrate.Text) -> None:
    slots = [slot for slot in nano.slots() if slot.role.value in selection.TARGETS and slot.expert in (None, 2)]
    inputs = _Inputs(slots)
    stream = Stream(nano, dtype=torch.float32)
    stream.hidden(text.sequences, observer=inputs)
    calibration = calibrate.Calibration(stream, text, slots)
    worker = Worker(nano, method.Options.parse("rank=30"), torch.device("cpu"), calibration)
    for slot in slots:
        weight, x = nano.read(slot).double(), torch.cat(inputs.kept[slot])
        report = worker.scan(slot)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        whole = (x @ weight.T).square().sum()
        lost = (x @ ((u[:, 30:] * s[30:]) @ vt[30:]).T).square().sum()
        assert report.layer_error == pytest.approx(float(lost / whole), rel=1e-3), slot
        assert worker.row(slot, report)["tokens"] == len(x)
    assert calibration.tokens[Slot(Role.Q, 0)] == 6 * 64


def test_activation_keeps_the_smallest_rank_that_is_good_enough(
    tmp_path: Path, nano: Checkpoint, text: calibrate.Text
) -> None:
    options = laser.Options("all", "w2,w1", "2", "activation=0.05")
    slots = laser.select(nano.config, options)
    calibration = calibrate.Calibration(Stream(nano, dtype=torch.float32), text, slots)
    planned = laser.plan_laser(nano, options, calibration=calibration, record={"calibration": text.record})
    job.run(planned, tmp_path / "out", job.Run(jobs=4))
    report, written = laser.read_report(tmp_path / "out"), open_checkpoint(tmp_path / "out")
    assert report["calibration"]["tokens"] == 6 * 64
    inputs = _Inputs(slots)
    Stream(nano, dtype=torch.float32).hidden(text.sequences, observer=inputs)  # of the source, not of what became of it
    for row, slot in zip(report["matrices"], slots, strict=True):
        x = torch.cat(inputs.kept[slot])
        change = (nano.read(slot).double() - written.read(slot).double()) @ x.T
        share = float(change.square().sum() / (nano.read(slot).double() @ x.T).square().sum())
        assert row["layer_error"] <= 0.05
        assert share == pytest.approx(row["layer_error"], abs=2e-4)  # bf16's rounding comes on top
    assert any("fewer calibration tokens" in remark for remark in report["remarks"])


def test_an_expert_that_no_token_reached_stays_whole(nano: Checkpoint, text: calibrate.Text) -> None:
    calibration = calibrate.Calibration(Stream(nano, dtype=torch.float32), text, [W2])
    worker = Worker(nano, method.Options.parse("activation=0.5"), torch.device("cpu"), calibration)
    analysis = worker.analyse(W2)
    assert worker.rank(W2, analysis) < 256
    unseen = method.Analysis(analysis.best, method.Covariance(torch.zeros(256, 256), tokens=0))
    assert worker.rank(W2, unseen) == 256


def test_cutting_a_calibration_text() -> None:
    text = calibrate.cut(range(100, 200), samples=3, seq_len=11, bos_id=1)
    assert [ids.tolist() for ids in text.sequences] == [
        [1, *range(start, start + 10)] for start in (100, 130, 160)
    ]  # of ten windows, three
    assert calibrate.cut(range(25), 9, 11, 1).record["samples"] == 2
    with pytest.raises(InputError, match="--seq-len 6 would fit"):
        calibrate.cut(range(5), 1, 7, 1)
    with pytest.raises(UsageError):
        calibrate.cut(range(5), 0, 7, 1)
