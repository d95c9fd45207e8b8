"""Matrices of a layer decomposed at once, as on a GPU; here by LAPACK, which takes one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from methods.laser.test_run import damaged, reduce

from mixtools.errors import SpectrumError
from mixtools.layouts.checkpoint import Checkpoint
from mixtools.layouts.detect import open_checkpoint
from mixtools.linalg.spectrum import decompose
from mixtools.methods.laser import run as laser
from mixtools.methods.laser import together, worker
from mixtools.methods.laser.method import Options
from mixtools.methods.laser.survey import Noted, Survey, budget_survey, survey
from mixtools.methods.laser.together import Together, groups
from mixtools.names import Role, Slot

NANO = Path(__file__).parents[2] / "data" / "nano-mixtral"
CPU = torch.device("cpu")


@pytest.fixture
def nano() -> Checkpoint:
    return open_checkpoint(NANO)


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> list[list[Slot]]:
    """As on a GPU. What was decomposed at once."""
    made: list[list[Slot]] = []
    by_batch = together.decompose_batch

    def noted(weights: list[Any]) -> list[Any]:
        made.append([*weights])
        return by_batch(weights)

    monkeypatch.setattr(together, "decompose_batch", noted)
    monkeypatch.setattr(worker, "fits", lambda method, device: method.norm == "weights" and not method.exact)
    return made


def chosen(source: Checkpoint, **options: str) -> list[Slot]:
    return laser.select(source.config, laser.Options(**{"layers": "all", **options}))


def test_a_group_is_of_one_layer_and_one_short_side(nano: Checkpoint) -> None:
    slots = chosen(nano)
    made = groups(nano, slots, 1 << 40)
    assert sorted(map(str, (slot for group in made for slot in group))) == sorted(map(str, slots))
    for group in made:
        assert len({(slot.layer, min(nano.spec(slot).shape)) for slot in group}) == 1
        assert group == [slot for slot in slots if slot in group]  # in their order
    assert len(made) == len({(slot.layer, min(nano.spec(slot).shape)) for slot in slots})


def test_a_group_is_as_large_as_fits(nano: Checkpoint) -> None:
    slots = chosen(nano, layers="1", targets="w1")
    shape, dtype = nano.spec(slots[0])
    one = dtype.nbytes(shape) + 10 * min(shape) ** 2
    assert [len(group) for group in groups(nano, slots, 3 * one)] == [3, 3, 2]
    assert [len(group) for group in groups(nano, slots, 3 * one - 1)] == [2] * 4
    assert [len(group) for group in groups(nano, slots, 0)] == [1] * 8


def test_each_is_decomposed_once_whatever_the_order(nano: Checkpoint, in_groups: list[list[Slot]]) -> None:
    slots = chosen(nano, targets="w2")
    found = Together(nano, slots, CPU)
    for slot in reversed(slots):
        alone = decompose(nano.read(slot))
        ours = found.take(slot, nano.read)
        assert (abs(ours.values - alone.values) < 1e-12 * alone.values[0]).all()
        assert torch.equal(ours.project(20), alone.project(20))
    assert [len(group) for group in in_groups] == [8] * nano.config.num_layers


def test_what_nobody_takes_is_forgotten(nano: Checkpoint) -> None:
    """A run that goes on asks for no matrix that is made already."""
    slots = chosen(nano, targets="w2")
    found = Together(nano, slots, CPU)
    found.groups = [slots[first : first + 2] for first in range(0, len(slots), 2)]
    found._group_of = {slot: number for number, group in enumerate(found.groups) for slot in group}
    for group in found.groups:
        found.take(group[0], nano.read)
    assert set(found._ready) == {group[1] for group in found.groups[-3:]}


def test_threads_that_change_places_make_nothing_twice(nano: Checkpoint, in_groups: list[list[Slot]]) -> None:
    slots = chosen(nano, targets="w2,k")
    first, last = (max(index for index, slot in enumerate(slots) if slot.layer == 0) + step for step in (0, 1))
    slots[first], slots[last] = slots[last], slots[first]
    found = Together(nano, chosen(nano, targets="w2,k"), CPU)
    for slot in slots:
        found.take(slot, nano.read)
    assert len(in_groups) == 2 * nano.config.num_layers and not found._ready


@pytest.mark.parametrize("how", [{}, {"rank_rule": "rank=12"}, {"rank_rule": "rho=0.1", "factored": True}], ids=str)
def test_the_output_is_that_of_one_by_one(
    how: dict[str, Any], nano: Checkpoint, tmp_path: Path, in_groups: list[list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = laser.Options(layers="1", targets="w2,k,q", **how)
    ours = reduce(nano, tmp_path / "groups", options)
    # the survey that factors take, too
    assert [len(group) for group in in_groups] == [1, 9] * (1 + options.factored) or [9, 1] * (1 + options.factored)
    monkeypatch.setattr(worker, "fits", lambda *_: False)
    theirs = reduce(nano, tmp_path / "alone", options)
    assert len(in_groups) == 2 * (1 + options.factored)
    if not options.factored:  # whose survey takes values alone, by another of LAPACK's ways
        assert ours["matrices"] == theirs["matrices"]
    for file in (tmp_path / "alone").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "groups" / file.name).read_bytes()


def test_a_budget_is_shared_as_one_by_one(
    nano: Checkpoint, in_groups: list[list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = laser.Options(layers="1", targets="w2,q", budget=0.5)
    slots = laser.select(nano.config, options)

    def surveyed() -> Survey:
        return budget_survey(worker.Worker(nano, options.method, CPU, None), slots, (0.5, 0.25))

    found = surveyed()
    assert [len(group) for group in in_groups] == [9]
    monkeypatch.setattr(worker, "fits", lambda *_: False)
    one_by_one = surveyed()
    assert one_by_one.ranks == found.ranks
    assert one_by_one.told["budget"]["mean_error"] == pytest.approx(found.told["budget"]["mean_error"], rel=1e-12)


def test_what_an_earlier_run_saw_is_not_looked_at_again(nano: Checkpoint, in_groups: list[list[Slot]]) -> None:
    options = laser.Options(layers="1", targets="w2")
    slots, kept = laser.select(nano.config, options), Noted()
    survey(worker.Worker(nano, options.method, CPU, None), slots, kept=kept)
    for slot in slots[5:]:
        del kept.found[str(slot)]
    survey(worker.Worker(nano, options.method, CPU, None), slots, kept=kept)
    assert [len(group) for group in in_groups] == [8, 3]


@pytest.mark.parametrize("asked", ["analyse", "spectrum", "scan"])
def test_all_are_read_to_the_device(
    asked: str, nano: Checkpoint, in_groups: list[list[Slot]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Slot] = []
    plain = worker.Worker.weight
    monkeypatch.setattr(worker.Worker, "weight", lambda self, slot: read.append(slot) or plain(self, slot))
    slots = chosen(nano, layers="0", targets="w2")
    work = worker.Worker(nano, Options(), CPU, None)
    work.expect(slots)
    getattr(work, asked)(slots[3])
    assert read == slots and [len(group) for group in in_groups] == [8]


def test_a_bad_matrix_is_named_and_not_the_one_that_was_asked_for(
    nano: Checkpoint, tmp_path: Path, in_groups: list[list[Slot]]
) -> None:
    bad = Slot(Role.DOWN, 1, 3)
    weight = nano.read(bad)
    weight[4, 7] = torch.nan
    source = damaged(tmp_path, bad, weight)
    asked = worker.Worker(source, Options(), CPU, None)
    asked.expect(chosen(source, layers="1", targets="w2"))
    with pytest.raises(SpectrumError, match=r"\[4, 7\]") as caught:
        asked.analyse(Slot(Role.DOWN, 1, 0))
    assert caught.value.tensor == source.entry(bad).name
    assert not in_groups


def test_only_a_gpu_and_the_weights_own_norm_take_groups() -> None:
    assert not together.fits(Options(), CPU)
    assert not together.fits(Options.parse("rank=3", exact=True), CPU)
