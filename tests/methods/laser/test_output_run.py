"""laser --norm output from start to end, against inputs that are kept whole and SVDs by scipy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import scipy.linalg
import torch

import mixtools
from mixtools.errors import OutputExists, TensorError, UsageError
from mixtools.inference import calibrate
from mixtools.inference.calibrate import Calibration, Moments
from mixtools.inference.stream import Stream
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.memory import MemoryReader
from mixtools.layouts.reader import Reader
from mixtools.methods.laser import method
from mixtools.methods.laser.worker import Worker
from mixtools.names import Role, Slot
from mixtools.storage import findings, output
from mixtools.text.tokenizer import Tokenizer

DATA = Path(__file__).parents[2] / "data"
NANO, TEXT = DATA / "nano-mixtral", DATA / "text.txt"
SAMPLES, SEQ_LEN = 20, 64
ASKED: dict[str, Any] = {"text": TEXT, "samples": SAMPLES, "seq_len": SEQ_LEN, "norm": "output"}
Matrix = npt.NDArray[np.float64]


@cache
def nano() -> Checkpoint:
    return open_checkpoint(NANO)


@cache
def sequences(samples: int = SAMPLES, seq_len: int = SEQ_LEN) -> tuple[torch.Tensor, ...]:
    tokenizer = Tokenizer.from_folder(NANO)
    ids = tokenizer.encode(TEXT.read_text("utf-8"), bos=False)
    return calibrate.cut(ids, samples, seq_len, tokenizer.bos_id).sequences


class _Inputs:
    """Keeps every input of some linears, [tokens, in], and the routing weights there."""

    def __init__(self, slots: list[Slot]) -> None:
        self.rows: dict[Slot, list[torch.Tensor]] = {slot: [] for slot in slots}
        self.shares: dict[Slot, list[torch.Tensor]] = {slot: [] for slot in slots}

    def __call__(self, slot: Slot, x: torch.Tensor, _: object, weights: torch.Tensor | None) -> None:
        if slot in self.rows:
            self.rows[slot].append(x.double().clone())
            self.shares[slot].append(torch.ones(len(x)) if weights is None else weights.double().clone())


def inputs(reader: Reader, slots: list[Slot], routed: bool = False) -> dict[Slot, Matrix]:
    """[tokens, in] of each; those of a model in bf16, as the command runs it."""
    seen = _Inputs(slots)
    Stream(reader).hidden(sequences(), observer=seen)
    found = {}
    for slot in slots:
        x = torch.cat(seen.rows[slot])
        found[slot] = (x * torch.cat(seen.shares[slot])[:, None].double() if routed else x).numpy()
    return found


def best(weight: torch.Tensor, x: Matrix, rank: int, damping: float = 1e-4) -> tuple[Matrix, float]:
    """The matrix of this rank that errs least at the outputs x Wᵀ, by the SVD of W C_λ^½, and its error there."""
    W, C = weight.double().numpy(), x.T @ x
    if len(x) < min(W.shape):
        damping *= 10
    L = np.linalg.cholesky(C + damping * C.trace() / len(C) * np.eye(len(C)))
    U = scipy.linalg.svd(W @ L, full_matrices=False, lapack_driver="gesvd")[0][:, :rank]
    found = U @ (U.T @ W)
    return found, error(W, found, x)


def error(weight: Matrix, other: Matrix, x: Matrix) -> float:
    return float(np.square(x @ (weight - other).T).sum() / np.square(x @ weight.T).sum())


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["tensor"]: row for row in json.loads((folder / "laser-report.json").read_text("utf-8"))["matrices"]}


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


SOME = [Slot(Role.Q, 1), Slot(Role.K, 0), Slot(Role.GATE, 0, 2), Slot(Role.UP, 1, 5), Slot(Role.DOWN, 0, 1),
        Slot(Role.DOWN, 1, 3)]  # fmt: skip


@pytest.mark.parametrize("routed", [False, True])
@pytest.mark.parametrize("factored", [False, True])
def test_what_is_written_is_the_best_for_the_output(tmp_path: Path, routed: bool, factored: bool) -> None:
    done = mixtools.laser(
        NANO, tmp_path / "out", layers="all", rank_rule="rank=60", routed=routed, factored=factored, **ASKED
    )
    written, rows = open_checkpoint(tmp_path / "out"), rows_of(tmp_path / "out")
    assert done.document["laser"]["routed"] is routed
    for slot, x in inputs(nano(), SOME, routed).items():
        weight = nano().read(slot)
        expected, least = best(weight, x, 60)
        found = written.read(slot).double().numpy()
        row = rows[written.piece(slot).name]
        # what bf16 rounds of the result, of two factors twice as much; the sums over inputs are fp32
        assert np.abs(found - expected).max() < (0.02 if factored else 0.006) * np.abs(expected).max(), slot
        assert row["layer_error"] == pytest.approx(least, rel=2e-3, abs=1e-7)
        assert row["norm"] == "output" and row["tokens"] == len(x)
        W = weight.double().numpy()
        assert row["energy"] == pytest.approx(1 - np.square(W - expected).sum() / np.square(W).sum(), rel=1e-3)
        u, s, vt = scipy.linalg.svd(W)
        plain = (u[:, :60] * s[:60]) @ vt[:60]
        assert least < error(W, plain, x), slot  # which is the point of it


def test_activation_is_the_share_of_the_output_that_is_lost(tmp_path: Path) -> None:
    mixtools.laser(NANO, tmp_path / "out", layers="1", targets="w2,w3", rank_rule="activation=0.05", **ASKED)
    mixtools.laser(NANO, tmp_path / "same", layers="1", targets="w2,w3", rank_rule="energy=0.95", **ASKED)
    rows = rows_of(tmp_path / "out")
    assert rows_of(tmp_path / "same") == rows
    slots = [Slot(role, 1, expert) for role in (Role.DOWN, Role.UP) for expert in (1, 4)]
    for slot, x in inputs(nano(), slots).items():
        rank = rows[open_checkpoint(tmp_path / "out").piece(slot).name]["rank"]
        assert best(nano().read(slot), x, rank)[1] <= 0.0501
        assert best(nano().read(slot), x, rank - 1)[1] > 0.0499


def test_in_sequence_inputs_come_from_the_reduced_layers(tmp_path: Path) -> None:
    how = {**ASKED, "layers": "all", "rank_rule": "rank=40"}
    mixtools.laser(NANO, tmp_path / "out", sequential=True, **how)
    mixtools.laser(NANO, tmp_path / "apart", **how)
    written, apart = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "apart")
    mixed = {slot: (written if slot.layer == 0 else nano()).read(slot) for slot in nano().slots()}
    slots = [Slot(Role.Q, 1), Slot(Role.GATE, 1, 2), Slot(Role.DOWN, 1, 3)]
    for slot, x in inputs(MemoryReader(nano().config, mixed), slots).items():
        expected, least = best(nano().read(slot), x, 40)
        found = written.read(slot).double().numpy()
        assert np.abs(found - expected).max() < 0.006 * np.abs(expected).max(), slot
        assert rows_of(tmp_path / "out")[written.piece(slot).name]["layer_error"] == pytest.approx(
            least, rel=2e-3, abs=1e-7
        )
        assert not torch.equal(written.read(slot), apart.read(slot))
    first = [slot for slot in nano().slots() if slot.layer == 0]
    assert all(torch.equal(written.read(slot), apart.read(slot)) for slot in first)


def test_starved_and_unseen_experts(tmp_path: Path) -> None:
    """A text of a few tokens: some experts see fewer than they have directions, some see none."""
    few = {**ASKED, "samples": 1, "seq_len": 6}
    done = mixtools.laser(NANO, tmp_path / "out", layers="all", targets="w2,w1", rank_rule="activation=0.1", **few)
    rows = done.document["matrices"]
    seen = [row for row in rows if row["tokens"]]
    unseen = [row for row in rows if not row["tokens"]]
    assert seen and unseen
    assert all(row["norm"] == "output" and row["damping"] == pytest.approx(1e-3) and row["starved"] for row in seen)
    weights = {slot: nano().read(slot).double().numpy() for slot in nano().slots() if slot.role is Role.DOWN}
    for row in unseen:
        assert row["norm"] == "weights" and row["damping"] is None and row["layer_error"] is None
        if row["target"] == "w2":
            s = scipy.linalg.svdvals(weights[Slot(Role.DOWN, row["layer"], row["expert"])])
            energy = np.cumsum(s**2) / np.square(s).sum()
            assert row["rank"] == int(np.argmax(energy >= 0.9)) + 1  # of its own energy
    assert any("no calibration token came to" in remark and "weights" in remark for remark in done.document["remarks"])
    assert any("damped 10 times as much" in remark for remark in done.document["remarks"])
    reached = {row["tensor"]: row for row in seen}
    written = open_checkpoint(tmp_path / "out")
    slot = next(slot for slot in weights if written.piece(slot).name in reached)
    kept = reached[written.piece(slot).name]["rank"]
    assert np.linalg.matrix_rank(written.read(slot).double().numpy(), tol=0.02) >= kept - 1


# --- a budget ---


@pytest.mark.parametrize("norm", ["weights", "output"])
def test_a_budget_is_kept_in_the_output_bytes(tmp_path: Path, norm: str) -> None:
    given = ASKED if norm == "output" else {}
    done = mixtools.laser(NANO, tmp_path / "out", layers="all", budget=0.8, factored=True, **given)
    written = open_checkpoint(tmp_path / "out")
    told = done.document["budget"]
    sizes: dict[int, list[int]] = {0: [], 1: []}
    whole = 0
    for slot in nano().slots():
        if slot.role in (Role.NORM, Role.EMBED, Role.HEAD, Role.ROUTER, Role.ATTENTION_NORM, Role.FFN_NORM):
            assert (nano().bits(slot) == written.bits(slot)).all()
            continue
        rows, cols = nano().spec(slot).shape
        rank = rows_of(tmp_path / "out")[written.piece(slot).name]["rank"]
        if rank == min(rows, cols):
            whole += 1
            assert (nano().bits(slot) == written.bits(slot)).all()
            sizes[int(slot.layer or 0)].append(2 * rows * cols)
        else:
            assert rank * (rows + cols) < rows * cols
            sizes[int(slot.layer or 0)].append(2 * rank * (rows + cols))
    before = sum(2 * np.prod(nano().spec(slot).shape) for slot in nano().slots() if slot.layer == 0 and slot.role in
                 (Role.Q, Role.K, Role.V, Role.O, Role.GATE, Role.UP, Role.DOWN))  # fmt: skip
    total = sum(map(sum, sizes.values()))
    assert told["bytes"] == total and told["of_bytes"] == 2 * before and told["whole"] == whole > 0
    assert told["share"] == pytest.approx(total / told["of_bytes"])
    assert 0.795 < told["share"] <= 0.8
    assert told["layers"] == pytest.approx({str(layer): sum(sizes[layer]) / before for layer in sizes})
    there = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    all_before = sum(nano().bits(slot).nbytes for slot in nano().slots())
    assert there == pytest.approx(all_before - told["of_bytes"] + total, rel=0.005)  # headers


def test_a_floor_holds_in_each_layer(tmp_path: Path) -> None:
    free = mixtools.laser(NANO, tmp_path / "free", layers="all", targets="w2", budget=0.6, layer_floor=0.0, **ASKED)
    bound = mixtools.laser(NANO, tmp_path / "bound", layers="all", targets="w2", budget=0.6, layer_floor=0.58, **ASKED)
    assert min(free.document["budget"]["layers"].values()) < 0.56
    assert min(bound.document["budget"]["layers"].values()) > 0.578
    assert bound.document["budget"]["share"] <= 0.6
    assert bound.document["budget"]["mean_error"] > free.document["budget"]["mean_error"]


def test_a_budget_beats_the_same_rank_everywhere(tmp_path: Path) -> None:
    spread = mixtools.laser(NANO, tmp_path / "a", layers="all", targets="w1,w2,w3", budget=0.75, **ASKED)
    same = mixtools.laser(NANO, tmp_path / "b", layers="all", targets="w1,w2,w3", rank_rule="rank=96", **ASKED)
    errors = [[row["layer_error"] for row in done.document["matrices"]] for done in (spread, same)]
    assert sum(errors[0]) < 0.5 * sum(errors[1])


# --- killed and continued ---


class _Killed(BaseException):
    pass


KINDS: dict[str, dict[str, Any]] = {
    "rule": {"rank_rule": "activation=0.05"},
    "factors": {"rank_rule": "activation=0.2", "factored": True},
    "budget": {"budget": 0.7},
    "budget of factors": {"budget": 0.7, "factored": True},
    "in sequence": {"rank_rule": "rank=40", "sequential": True},
    "budget in sequence": {"budget": 0.7, "sequential": True, "factored": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_killed_anywhere_and_continued_gives_the_same_bytes(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fatal = 0

    def dying(append: Any) -> Any:
        def call(self: Any, line: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == fatal:
                raise _Killed
            append(self, line)

        return call

    monkeypatch.setattr(output.Output, "_append", dying(output.Output._append))
    monkeypatch.setattr(findings.Findings, "_append", dying(findings.Findings._append))

    def run(out: Path) -> None:
        mixtools.laser(NANO, out, layers="all", targets="w2,q", experts="1,6", jobs=1, **KINDS[kind], **ASKED)

    run(tmp_path / "whole")
    everything = calls
    for moment in sorted({2, 4, everything // 3, everything // 2, everything - 6, everything - 2, everything}):
        out, calls, fatal = tmp_path / str(moment), 0, moment
        with pytest.raises(_Killed):
            run(out)
        fatal = 0
        run(out)
        assert files(out) == files(tmp_path / "whole"), (moment, everything)


def test_what_was_seen_before_a_kill_is_not_looked_at_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[Slot] = []
    real = Worker.spectrum

    def counted(self: Worker, slot: Slot) -> Any:
        if len(looked) == stop_at:
            raise KeyboardInterrupt
        looked.append(slot)
        return real(self, slot)

    monkeypatch.setattr(Worker, "spectrum", counted)
    asked = {**ASKED, "layers": "all", "targets": "w2", "budget": 0.7}
    stop_at = 10
    with pytest.raises(KeyboardInterrupt):
        mixtools.laser(NANO, tmp_path / "out", **asked)
    stop_at = -1
    mixtools.laser(NANO, tmp_path / "out", **asked)
    assert len(looked) == len(set(looked)) == 16
    looked.clear()
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        mixtools.laser(NANO, tmp_path / "other", **asked)
    stop_at = -1
    mixtools.laser(NANO, tmp_path / "other", **{**asked, "budget": 0.6})  # the spectra are the same
    assert len(looked) == len(set(looked)) == 16
    looked.clear()
    stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        mixtools.laser(NANO, tmp_path / "third", **asked)
    stop_at = -1
    mixtools.laser(NANO, tmp_path / "third", **{**asked, "samples": 5})  # another text's are not
    assert len(looked) == 3 + 16
    assert not (tmp_path / "third" / ".mixtools").exists()


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="too small for a rank of 1"):
        mixtools.laser(NANO, tmp_path / "out", layers="0", targets="w2", budget=0.001)
    monkeypatch.setattr(Worker, "covariance", _broken)
    with pytest.raises(TensorError):  # before the first matrix was seen
        mixtools.laser(NANO, tmp_path / "broken", layers="0", targets="w2", budget=0.5, **ASKED)
    assert not (tmp_path / "broken").exists()


def _broken(*_: object) -> Any:
    raise TensorError("covariance holds NaN or infinity")


def test_a_journal_fits_no_other_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"layers": "1", "targets": "w2", "rank_rule": "rank=20"}
    seen = iter(range(5))

    def stopped(self: Worker, slot: Slot) -> Any:
        if next(seen) == 3:
            raise KeyboardInterrupt
        return real(self, slot)

    real = Worker.analyse
    monkeypatch.setattr(Worker, "analyse", stopped)
    with pytest.raises(KeyboardInterrupt):
        mixtools.laser(NANO, tmp_path / "out", **asked, **ASKED)
    monkeypatch.setattr(Worker, "analyse", real)
    with pytest.raises(OutputExists, match="laser"):
        mixtools.laser(NANO, tmp_path / "out", **asked)


# --- a search ---


def test_a_search_in_the_outputs_norm_writes_what_it_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = TEXT.read_text("utf-8")
    (tmp_path / "a.txt").write_text(content[: 3 * len(content) // 4])
    (tmp_path / "b.txt").write_text(content[3 * len(content) // 4 :])
    asked: dict[str, Any] = {
        "layers": "all", "targets": "w2", "experts": "0-3", "search": "gain", "margin": 0.0, "norm": "output",
        "text": tmp_path / "a.txt", "held_out": tmp_path / "b.txt", "seq_len": SEQ_LEN, "jobs": 1,
    }  # fmt: skip
    from mixtools.methods.laser.search.bench import Bench

    judged: dict[tuple[Slot, int], torch.Tensor] = {}
    truncate, calls, fatal = Bench.truncate, 0, 0

    def noted(self: Bench, analysis: Any, rank: int) -> Any:
        place = truncate(self, analysis, rank)
        weight = self.shelf.get(place)
        slot = next(s for s in nano().slots() if torch.equal(nano().read(s), analysis.weight))
        judged.setdefault((slot, rank), weight)
        assert torch.equal(judged[slot, rank], weight)  # also when an earlier decision is taken up again
        return place

    monkeypatch.setattr(Bench, "truncate", noted)
    done = mixtools.laser(NANO, tmp_path / "whole", **asked)
    written = open_checkpoint(tmp_path / "whole")
    accepted = [row for row in done.document["matrices"] if row["accepted"]]
    assert 0 < len(accepted) < 8
    for row in accepted:
        slot = Slot(Role.DOWN, row["layer"], row["expert"])
        found, expected = written.read(slot).double(), judged[slot, row["rank"]].double()
        assert float((found - expected).abs().max()) <= 0.008 * float(expected.abs().max())  # fp32 sums, bf16
        assert row["norm"] == "output" and 0 < row["layer_error"] < 0.3
    note = output.Output.note

    def dying(self: output.Output, name: str, found: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fatal:
            raise _Killed
        note(self, name, found)

    monkeypatch.setattr(output.Output, "note", dying)
    for moment in (6, 10):  # among the decisions of the second layer; at the second matrix
        calls, fatal = 0, moment
        with pytest.raises(_Killed):
            mixtools.laser(NANO, tmp_path / str(moment), **asked)
        fatal = 0
        mixtools.laser(NANO, tmp_path / str(moment), **asked)
        assert files(tmp_path / str(moment)) == files(tmp_path / "whole")


# --- spectrum ---


def test_spectrum_tells_every_rank_in_both_norms(tmp_path: Path) -> None:
    how = {"layers": "0", "targets": "w2,k", "experts": "1"}
    seen = mixtools.spectrum(NANO, out=tmp_path / "seen", **how, **ASKED)
    document = json.loads((tmp_path / "seen" / "laser-report.json").read_text("utf-8"))
    assert document["laser"]["rank_rule"] == "activation=0.01"
    slots = [Slot(Role.K, 0), Slot(Role.DOWN, 0, 1)]
    for row, (slot, x) in zip(document["matrices"], inputs(nano(), slots).items(), strict=True):
        curves, W = row["curves"], nano().read(slot).double().numpy()
        assert curves["ranks"] == list(range(row["of"] + 1)) and not curves["damped"]
        u, s, vt = scipy.linalg.svd(W, full_matrices=False)
        for rank in (0, 1, 30, 100, row["of"] - 1):
            plain, good = (u[:, :rank] * s[:rank]) @ vt[:rank], best(nano().read(slot), x, rank)[0]
            weight = np.square(W).sum()
            for norm, found in (("weights", plain), ("output", good)):
                share = np.square(W - found).sum() / weight
                assert curves[norm]["weights"][rank] == pytest.approx(share, rel=2e-3, abs=1e-6)
                assert curves[norm]["output"][rank] == pytest.approx(error(W, found, x), rel=2e-3, abs=1e-6)
        assert row["layer_error"] == pytest.approx(curves["output"]["output"][row["rank"]], rel=1e-4)
        chosen = row["choices"]
        assert chosen["weights"]["activation=0.1"] == int(np.argmax(np.array(curves["weights"]["output"]) <= 0.1))
        undamped = int(np.argmax(np.array(curves["output"]["output"]) <= 0.1))
        assert abs(chosen["output"]["activation=0.1"] - undamped) <= 1
        assert chosen["output"]["energy=0.9"] == chosen["output"]["activation=0.1"]
        assert "mp" in chosen["weights"] and "mp" not in chosen["output"]
    reduced = mixtools.laser(NANO, tmp_path / "out", rank_rule="activation=0.01", **how, **ASKED)
    for row, other in zip(seen.document["matrices"], reduced.document["matrices"], strict=True):
        assert row["rank"] == other["rank"] and row["tokens"] == other["tokens"]
        assert row["layer_error"] == pytest.approx(other["layer_error"], rel=1e-6)
        assert row["energy"] == pytest.approx(other["energy"], rel=1e-6)


# --- moments ---


def _moments(slot: Slot, routed: bool = False) -> Moments:
    calibration = Calibration(Stream(nano()), calibrate.Text(sequences(), {}), [slot], routed)
    calibration.covariance(slot)
    assert calibration._moments is not None
    return calibration._moments


@pytest.mark.parametrize("slot", [Slot(Role.DOWN, 0, 1), Slot(Role.GATE, 1, 4), Slot(Role.K, 1)])
@pytest.mark.parametrize("routed", [False, True])
def test_moments_tell_tokens_and_the_power_of_their_inputs(slot: Slot, routed: bool) -> None:
    found, x = _moments(slot, routed).covariance(slot), inputs(nano(), [slot], routed)[slot]
    assert found.tokens == len(x) and not found.empty
    W = nano().read(slot).double().numpy()
    rows = x @ W.T if found.side == "out" else x
    assert found.side == ("out" if slot.role is Role.K else "in")  # experts here are square
    expected = rows.T @ rows
    assert np.abs(found.matrix.numpy() - expected).max() < 1e-5 * np.abs(expected).max()
    if found.side == "out":
        assert found.power == pytest.approx(np.square(x).sum() / x.shape[1], rel=1e-6)


@pytest.mark.parametrize("routed", [False, True])
def test_moments_of_experts_wider_than_the_model(routed: bool) -> None:
    """As Mixtral's are: the sums of w2 are those of its outputs."""
    config = dataclasses.replace(nano().config, intermediate_size=320)
    generator = torch.Generator().manual_seed(0)
    wide = {slot: nano().read(slot) for slot in nano().slots()}
    for slot in nano().slots():
        if slot.role in (Role.GATE, Role.UP, Role.DOWN):
            wide[slot] = (0.08 * torch.randn(*config.shape(slot.role), generator=generator)).bfloat16()
    reader, slot = MemoryReader(config, wide), Slot(Role.DOWN, 1, 3)
    calibration = Calibration(Stream(reader), calibrate.Text(sequences(), {}), [slot], routed)
    found, x = calibration.covariance(slot), inputs(reader, [slot], routed)[slot]
    assert found.side == "out" and found.tokens == len(x)
    assert found.power == pytest.approx(np.square(x).sum() / 320, rel=1e-6)
    rows = x @ wide[slot].double().numpy().T
    assert np.abs(found.matrix.numpy() - rows.T @ rows).max() < 1e-5 * np.square(rows).sum(0).max()
    expected, least = best(wide[slot], x, 50)
    given = method.Options.parse("rank=50", norm="output")
    result = method.encode(wide[slot].float(), given, found)
    assert np.abs(result.dense.double().numpy() - expected).max() < 1e-3 * np.abs(expected).max()
    assert result.report.layer_error == pytest.approx(least, abs=1e-7)  # sums in fp32


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """LAPACK's results differ in the last bits between numbers of threads; bytes are compared here."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
