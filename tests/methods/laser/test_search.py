"""The search against full evaluations by transformers, SVDs by numpy, and planted cases whose answer is known."""

from __future__ import annotations

import contextlib
import json
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mixtral_oracle import DATA, NANO, read_nano, transformers_model

from mixtools.checking.perplexity import Windows, cut, measure
from mixtools.errors import MemoryBudgetError, SpectrumError, TensorError, UsageError
from mixtools.inference.model import Layer, Mixtral
from mixtools.inference.stream import Stream
from mixtools.layouts.memory import MemoryReader
from mixtools.methods.laser.search import Row, SearchOptions, SearchResult, search
from mixtools.methods.laser.search.bench import Bench, paired
from mixtools.names import Role, Slot
from mixtools.text.tokenizer import Tokenizer

O1, DOWN1, UP1 = Slot(Role.O, 1), Slot(Role.DOWN, 1, 6), Slot(Role.UP, 1, 1)
Q0, GATE0 = Slot(Role.Q, 0), Slot(Role.GATE, 0, 5)
CTX = 64


@cache
def texts() -> tuple[Windows, Windows]:
    ids = Tokenizer.from_folder(NANO).encode((DATA / "text.txt").read_text("utf-8"))
    return cut(ids[: 16 * CTX], ctx=CTX, bos_id=1), cut(ids[16 * CTX : 24 * CTX], ctx=CTX, bos_id=1)


def weights(edits: dict[Slot, torch.Tensor] | None = None) -> MemoryReader:
    nano = read_nano()
    return MemoryReader(nano.config, {slot: nano.read(slot) for slot in nano.slots()} | (edits or {}))


def truncated(weight: torch.Tensor, rank: int) -> torch.Tensor:
    """By numpy's SVD in fp64, rounded once to the weight's dtype."""
    u, s, v = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.from_numpy((u[:, :rank] * s[:rank]) @ v[:rank]).to(weight.dtype)


@cache
def planted() -> MemoryReader:
    """Nano whose O1 is of rank 24 and noise: what lies below the noise's edge is harm alone."""
    weight = read_nano().read(O1)
    u, s, v = np.linalg.svd(weight.double().numpy())
    noise = np.random.default_rng(1).standard_normal(weight.shape)
    noise *= 0.6 * s[23] / np.linalg.norm(noise, 2)
    return weights({O1: torch.from_numpy((u[:, :24] * s[:24]) @ v[:24] + noise).to(weight.dtype)})


@torch.no_grad()
def sequence_nll(reader: MemoryReader, windows: Windows) -> np.ndarray:
    """Mean -ln p of each window under transformers: [sequences]."""
    model = transformers_model(reader)
    found = [
        F.cross_entropy(model(ids[None]).logits[0, :-1].double(), ids[1:], reduction="mean")
        for ids in windows.sequences
    ]
    return torch.stack(found).numpy()


def run(reader: MemoryReader, slots: list[Slot], *, calls: list[Row] | None = None, **options) -> SearchResult:
    text, held_out = texts()
    extra = {name: options.pop(name) for name in ("done", "max_memory") if name in options}
    chosen = SearchOptions(**({"min_tokens": 10} | options))
    told = None if calls is None else calls.append
    return search(reader, slots, text, held_out, chosen, dtype=torch.float32, on_decision=told, **extra)


def least_memory(reader: MemoryReader) -> int:
    """Bytes in which one layer and one window run, to the next 100 kB."""
    for allowed in range(0, 1 << 30, 100_000):
        with contextlib.suppress(MemoryBudgetError):
            Stream(reader, dtype=torch.float32, max_memory=allowed).plan([CTX], copies=0)
            return allowed
    raise AssertionError("no plan fits")


FEW = [O1, DOWN1, UP1, Q0, GATE0]


@cache
def few() -> SearchResult:
    return run(planted(), FEW, rank_rules=("mp", "rho=0.5"), max_error=0.9)


# --- gain ---


def test_changes_equal_full_evaluations_by_transformers():
    reader, (text, _) = planted(), texts()
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    rows = few().rows
    later = {slot: truncated(tensors[slot], rank) for slot, rank in few().edits.items() if slot.layer == 1}
    assert later  # or layer 0 would not show that accepted edits stay in force
    compared = 0
    for slot, trial in [(row.slot, trial) for row in rows for trial in row.trials]:
        standing = later if slot.layer == 0 else {}
        before = sequence_nll(MemoryReader(reader.config, tensors | standing), text)
        edited = tensors | standing | {slot: truncated(tensors[slot], trial.rank)}
        change = sequence_nll(MemoryReader(reader.config, edited), text) - before
        if trial.delta_nll is not None:
            assert trial.delta_nll == pytest.approx(change.mean(), abs=2e-5)
            assert trial.stderr == pytest.approx(change.std(ddof=1) / len(change) ** 0.5, abs=2e-5)
            compared += 1
    assert compared >= 8


def test_held_out_figure_equals_transformers():
    reader, (_, held_out) = planted(), texts()
    edits = {slot: truncated(reader.read(slot), rank) for slot, rank in few().edits.items()}
    tensors = {slot: reader.read(slot) for slot in reader.slots()} | edits
    before, after = sequence_nll(reader, held_out), sequence_nll(MemoryReader(reader.config, tensors), held_out)
    figure = few().held_out
    assert figure.tokens == 8 * (CTX - 1)
    assert figure.perplexity_before == pytest.approx(np.exp(before.mean()), rel=2e-5)
    assert figure.perplexity_after == pytest.approx(np.exp(after.mean()), rel=2e-5)
    assert figure.ln_ratio == pytest.approx((after - before).mean(), abs=2e-5)
    assert figure.stderr == pytest.approx((after - before).std(ddof=1) / len(after) ** 0.5, abs=2e-5)


def test_layer_errors_equal_the_outputs_computed_outright():
    reader, (text, _) = planted(), texts()
    inputs: dict[Slot, list[torch.Tensor]] = {slot: [] for slot in FEW}

    def observe(slot, x, tokens, weights):
        if slot in inputs:
            inputs[slot].append(x.double())

    Mixtral.load(reader, dtype=torch.float32).hidden(torch.stack(list(text.sequences)), observer=observe)
    rows = {row.slot: row for row in few().rows}
    for slot in (O1, DOWN1, UP1):  # layer 0's inputs are those of the same, unedited model
        x, weight = torch.cat(inputs[slot]), reader.read(slot)
        assert rows[slot].tokens == len(x)
        for trial in rows[slot].trials:
            lost = (x @ (weight.double() - truncated(weight.double(), trial.rank)).T).square().sum()
            assert trial.layer_error == pytest.approx(float(lost / (x @ weight.double().T).square().sum()), rel=1e-3)


def test_planted_noise_is_found_and_harm_is_left_alone():
    result = run(planted(), [O1, DOWN1, UP1], rank_rules=("mp",), max_error=1.0, margin=2.0)
    assert result.edits == {O1: 24}
    assert result.held_out.ln_ratio < 0
    rows = {row.slot: row for row in result.rows}
    for slot in (DOWN1, UP1):
        (trial,) = rows[slot].trials
        assert not rows[slot].accepted and trial.delta_nll > 0
    assert "2 standard errors" in rows[O1].why


def test_the_margin_and_the_layer_error_decide():
    (row,) = run(planted(), [O1], rank_rules=("mp",), max_error=1.0).rows
    t_value = -row.best.delta_nll / row.best.stderr
    assert row.accepted and t_value > 1
    (refused,) = run(planted(), [O1], rank_rules=("mp",), max_error=1.0, margin=t_value + 0.01).rows
    assert not refused.accepted and refused.best == row.best
    (screened,) = run(planted(), [O1], rank_rules=("mp",), max_error=row.best.layer_error * 0.99).rows
    assert not screened.accepted and screened.best is None and screened.why.startswith("screened")


def test_edits_of_one_layer_are_judged_together():
    result = run(planted(), [O1, UP1, DOWN1], rank_rules=("mp", "energy=0.999"), max_error=1.0, margin=0.0)
    reader, (text, _) = planted(), texts()
    edits = {slot: truncated(reader.read(slot), rank) for slot, rank in result.edits.items()}
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    change = sequence_nll(MemoryReader(reader.config, tensors | edits), text) - sequence_nll(reader, text)
    helping = [row for row in result.rows if row.best and row.best.delta_nll < 0]
    assert len(helping) >= 2
    assert change.mean() <= min(row.best.delta_nll for row in helping) + 2e-5


def test_of_a_layers_edits_the_best_prefix_stays():
    """Three help alone, and the first is best without the others: judged here by transformers."""
    slots = [O1, *(Slot(role, 1) for role in (Role.Q, Role.K, Role.V))]
    reader, (text, _) = planted(), texts()
    result = run(reader, slots, rank_rules=("mp", "rho=0.6", "rho=0.8", "rho=0.9"), max_error=1.0, margin=0.0)
    helping = [row for row in result.rows if row.best and row.best.delta_nll < 0]
    helping.sort(key=lambda row: row.best.delta_nll)
    tensors, changes = {slot: reader.read(slot) for slot in reader.slots()}, []
    before = sequence_nll(reader, text).mean()
    for row in helping:
        tensors[row.slot] = truncated(tensors[row.slot], row.best.rank)
        changes.append(sequence_nll(MemoryReader(reader.config, tensors), text).mean() - before)
    best = int(np.argmin(changes))
    assert best + 1 < len(helping) and max(changes) < 0  # the others still help: what they cost must be seen
    assert result.edits == {row.slot: row.best.rank for row in helping[: best + 1]}
    assert sum("not beside" in row.why for row in result.rows) == len(helping) - best - 1


@pytest.mark.parametrize(("method", "kept"), [("gain", False), ("laserrmt", True)])
def test_an_edit_that_changes_nothing(method, kept):
    """No gain, and no rise either: LaserRMT keeps what leaves perplexity as it was."""
    reader = weights({DOWN1: torch.zeros_like(read_nano().read(DOWN1))})  # what this expert's w3 gives is lost
    up = Slot(Role.UP, 1, DOWN1.expert)
    (row,) = run(reader, [up], method=method, rank_rules=("laserrmt",), max_error=1.0, margin=0.0).rows
    assert [trial.delta_nll for trial in row.trials] == [0.0]
    assert row.accepted is kept


# --- what must not change a figure ---


def test_kept_states_change_nothing():
    reader, (text, _) = planted(), texts()
    bench = Bench(reader, text, [0, 1], batch=4, device=torch.device("cpu"), dtype=torch.float32,
                  max_memory=None, progress=None)  # fmt: skip
    chosen = [{O1: 20}, {GATE0: 30}, {O1: 20, GATE0: 30}, {}]
    sets = [{s: bench.truncate(bench.analyse(s), rank) for s, rank in ranks.items()} for ranks in chosen]
    for edits, found in zip(sets, bench.nll(sets), strict=True):
        tensors = {slot: reader.read(slot) for slot in reader.slots()}
        tensors |= {slot: bench.shelf.get(place) for slot, place in edits.items()}
        plain = measure(Stream(MemoryReader(reader.config, tensors), dtype=torch.float32), text)
        torch.testing.assert_close(found, plain.nll, rtol=0, atol=1e-6)
    bench.close()


def test_same_rows_in_batches_of_any_size_and_from_disk():
    alike = {"rank_rules": ("mp", "rho=0.5"), "max_error": 0.9}
    one = run(planted(), FEW, batch=1, **alike)
    disk = run(planted(), FEW, max_memory=least_memory(planted()) + 1_400_000, **alike)  # 1.4 MB of second moments
    assert disk.remarks and not one.remarks
    for other in (one, disk):
        assert other.edits == few().edits
        for a, b in zip(few().rows, other.rows, strict=True):
            assert [t.rank for t in a.trials] == [t.rank for t in b.trials]
            assert [t.delta_nll for t in a.trials] == pytest.approx([t.delta_nll for t in b.trials], abs=1e-6)


def test_deterministic_and_resumable():
    told: list[Row] = []
    alike = {"rank_rules": ("mp", "rho=0.5"), "max_error": 0.9}
    again = run(planted(), FEW, calls=told, **alike)
    assert again == few()
    assert tuple(told) == again.rows
    # killed within layer 0: layer 1 is taken as decided, layer 0 judged anew
    kept = [Row.from_document(json.loads(json.dumps(row.document()))) for row in told[:4]]
    assert kept == told[:4]
    later: list[Row] = []
    resumed = run(planted(), FEW, calls=later, done=kept, **alike)
    assert resumed.rows == few().rows and resumed.held_out == few().held_out
    assert [row.slot for row in later] == [Q0, GATE0]
    assert resumed.layer_passes < few().layer_passes


def test_layer_passes_are_what_runs(monkeypatch):
    tokens, forward = [0], Layer.__call__

    def counted(self, x, *args, **kwargs):
        tokens[0] += x.shape[0] * x.shape[1]
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(Layer, "__call__", counted)
    result = run(planted(), [O1, Q0], rank_rules=("mp", "rho=0.5"), max_error=1.0, margin=0.0)
    text, held_out = (windows.ctx * len(windows.sequences) for windows in texts())
    figure = 2 * (2 if result.edits else 1)  # two layers, before and after
    assert tokens[0] == (result.layer_passes - figure) * text + figure * held_out
    # what the module promises: layer 0 on the way, the model as it is, then each layer's moments, trials and joint sets
    promised = 1 + 1
    for row, depth in zip(result.rows, (1, 2), strict=True):
        tried = [trial for trial in row.trials if trial.delta_nll is not None]
        helps = any(trial.delta_nll < 0 for trial in tried)
        promised += 1 + (len(tried) + helps) * depth
    assert result.layer_passes == promised + figure


# --- LaserRMT's way ---


def laserrmt_by_hand(reader: MemoryReader, slots: list[Slot], text: Windows, lowest: int):
    """numpy's SVD, the published formula, perplexity by transformers."""
    ratios, ranks = {}, {}
    for slot in slots:
        weight = reader.read(slot).double().numpy()
        s = np.linalg.svd(weight, compute_uv=False)
        sigma = (np.percentile(s, 75) - np.percentile(s, 25)) / 1.349
        threshold = sigma * np.sqrt((1 + np.sqrt(min(weight.shape) / max(weight.shape))) ** 2)
        ratios[slot], ranks[slot] = s[s > threshold].sum() / s[s <= threshold].sum(), int((s > threshold).sum())
    order = sorted(slots, key=lambda slot: ratios[slot])[:lowest]
    tensors = {slot: reader.read(slot) for slot in reader.slots()}
    standing, kept = sequence_nll(reader, text).mean(), {}
    for slot in order:
        tried = tensors | {slot: truncated(tensors[slot], ranks[slot])}
        found = sequence_nll(MemoryReader(reader.config, tried), text).mean()
        if found <= standing:
            tensors, standing, kept[slot] = tried, found, ranks[slot]
    return order, kept, ratios


def test_laserrmt_order_and_decisions_equal_independent_lines():
    slots = [O1, UP1, Q0, GATE0, *(Slot(Role.DOWN, 1, expert) for expert in range(8)), Slot(Role.V, 1)]
    reader, (text, _) = planted(), texts()
    order, kept, ratios = laserrmt_by_hand(reader, slots, text, 9)
    told: list[Row] = []
    result = run(reader, slots, calls=told, method="laserrmt", lowest=9)
    assert [row.slot for row in told if row.trials] == order
    assert result.edits == kept
    assert 0 < len(kept) < 9
    for row in told:
        assert row.snr == pytest.approx(ratios[row.slot], rel=1e-6)
    assert sum(row.why.startswith("not tried") for row in told) == len(slots) - 9


def test_laserrmt_resumes_without_computing_spectra_again(monkeypatch):
    slots = [O1, *(Slot(Role.DOWN, 1, expert) for expert in range(4))]
    told: list[Row] = []
    whole = run(planted(), slots, calls=told, method="laserrmt", lowest=3)
    spectra = []
    monkeypatch.setattr("mixtools.methods.laser.search.laserrmt.snr", lambda *_: spectra.append(1) or pytest.approx(0))
    resumed = run(planted(), slots, done=told, method="laserrmt", lowest=3)
    assert not spectra
    assert resumed.edits == whole.edits and resumed.held_out == whole.held_out
    assert set(resumed.rows) == set(whole.rows)


# --- what is said instead of done ---


def test_starved_and_truncated_matrices_are_skipped_and_said():
    reader = weights({O1: truncated(read_nano().read(O1), 40)})
    counts = {row.slot: row.tokens for row in run(reader, [O1, DOWN1], rank_rules=("mp",)).rows}
    rows = {row.slot: row for row in run(reader, [O1, DOWN1], rank_rules=("mp",), min_tokens=counts[DOWN1] + 1).rows}
    assert rows[DOWN1].why.startswith(f"starved: {counts[DOWN1]} tokens") and not rows[DOWN1].trials
    assert rows[O1].why == "no rule lowers its rank of 40" and not rows[O1].trials


def test_nothing_accepted_leaves_the_perplexity():
    figure = run(weights(), [DOWN1], rank_rules=("rho=0.05",), max_error=1.0).held_out
    assert figure.perplexity_before == figure.perplexity_after and figure.ln_ratio == figure.stderr == 0


def test_standard_error_weighs_sequences_by_their_tokens():
    before, after = torch.zeros(6, dtype=torch.float64), torch.tensor([1.0, 1, 1, 1, 4, 4], dtype=torch.float64)
    delta, error = paired(before, after, [4, 2])
    assert delta == pytest.approx(2.0)
    # weights 2/3 and 1/3, deviations -1 and 2, times the factor n/(n-1) of a sample
    assert error == pytest.approx(((2 / 3) ** 2 * 1 + (1 / 3) ** 2 * 4) ** 0.5 * 2**0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "greedy"}, {"rank_rules": ()}, {"rank_rules": ("mq",)}, {"max_error": 0.0}, {"max_error": 1.1},
        {"margin": -1.0}, {"margin": float("nan")}, {"min_tokens": 0}, {"lowest": 0}, {"batch": 0},
    ],
)  # fmt: skip
def test_options_that_cannot_be(options):
    with pytest.raises(UsageError):
        SearchOptions(**options)


@pytest.mark.parametrize(
    ("slots", "says"),
    [
        ([], "no matrix"), ([O1, O1], "twice"), ([Slot(Role.ROUTER, 0)], "touches"), ([Slot(Role.EMBED)], "touches"),
        ([Slot(Role.Q, 2)], "not in this model"), ([O1, Slot(Role.K, 1)], "128x256"),
    ],
)  # fmt: skip
def test_slots_that_cannot_be(slots, says):
    with pytest.raises(UsageError, match=says):
        run(weights(), slots, rank_rules=("rank=200",))


def test_texts_that_cannot_be():
    text, held_out = texts()
    single = Windows("gptq", CTX, text.sequences[:1], (0,))
    shared = Windows("gptq", CTX, (*held_out.sequences[:2], text.sequences[3].clone()), (0,) * 3)
    for pair, says in (((single, held_out), "single"), ((text, single), "single"), ((text, shared), "1 of 3")):
        with pytest.raises(UsageError, match=says):
            search(weights(), [O1], *pair, SearchOptions(), dtype=torch.float32)


@pytest.mark.parametrize("method", ["gain", "laserrmt"])
def test_nan_in_a_weight_is_named(method):
    broken = read_nano().read(O1).clone()
    broken[3, 5] = float("nan")
    with pytest.raises(SpectrumError) as caught:
        run(weights({O1: broken}), [O1], method=method)
    assert caught.value.tensor == "layers.1.o"


@pytest.mark.parametrize("method", ["gain", "laserrmt"])
def test_nan_elsewhere_leaves_nothing_to_compare_with(method):
    norm = read_nano().read(Slot(Role.NORM)).clone()
    norm[0] = float("nan")
    with pytest.raises(TensorError, match="as it is"):
        run(weights({Slot(Role.NORM): norm}), [O1], method=method, rank_rules=("mp",))
