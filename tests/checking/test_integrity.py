"""Damage that we do ourselves must be found and named; what is sound must pass."""

from __future__ import annotations

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mixtral_oracle import NANO, SHAPES, read_nano
from safetensors.torch import load_file, save_file

from mixtools import conversion, job
from mixtools.checking import faults, integrity
from mixtools.errors import ChecksumError, ConfigError, FormatError, TensorError
from mixtools.layouts.detect import open_checkpoint
from mixtools.layouts.memory import MemoryReader, random_reader
from mixtools.names import Role, Slot

CONFIG = dataclasses.replace(SHAPES["mqa"], num_kv_heads=2)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "hf"
    job.run(conversion.plan_hf(open_checkpoint(NANO), conversion.Options()), folder)
    return folder


@pytest.fixture
def copy(converted, tmp_path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "copy"))


@pytest.fixture(scope="module")
def source() -> MemoryReader:
    return random_reader(CONFIG, seed=3, dtype=torch.bfloat16)


def tensors_of(reader: MemoryReader) -> dict[Slot, torch.Tensor]:
    return {slot: reader.read(slot) for slot in reader.slots()}


class Read:
    """A progress that adds up."""

    total = done = 0

    def start(self, label: str, total: int, unit: str = "B") -> None:
        self.total = total

    def advance(self, amount: int) -> None:
        self.done += amount

    def finish(self) -> None:
        pass


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


# --- verify ---


def test_a_sound_checkpoint_has_no_problems_and_every_byte_is_read(converted):
    for folder in (NANO, converted):
        checkpoint, read = open_checkpoint(folder), Read()
        assert integrity.verify(checkpoint, read) == []
        assert read.total == read.done == 2 * checkpoint.config.num_parameters


@pytest.mark.parametrize("place", [0.1, 0.5, 0.999])
def test_a_flipped_bit_is_named_with_its_tensor(copy, place):
    file = weights(copy)
    sound = {name: tensor.clone() for name, tensor in load_file(file).items()}  # load_file maps the file
    raw = bytearray(file.read_bytes())
    raw[int(len(raw) * place)] ^= 1
    file.write_bytes(raw)
    problems = integrity.verify(open_checkpoint(copy))
    assert [type(problem) for problem in problems] == [ChecksumError]
    assert problems[0].file == str(file)
    damaged = load_file(file)  # safetensors itself loads the flipped bit without a word
    assert [name for name in sound if not torch.equal(sound[name], damaged[name])] == [problems[0].tensor]


def test_two_damages_are_both_found(copy):
    file = weights(copy)
    raw = bytearray(file.read_bytes())
    for place in (0.3, 0.8):
        raw[int(len(raw) * place)] ^= 4
    file.write_bytes(raw)
    assert len({problem.tensor for problem in integrity.verify(open_checkpoint(copy))}) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_nan_or_inf_is_named_with_its_index(copy, bad):
    file = weights(copy)
    (copy / "mixtools.json").unlink()  # the damage is in the values, as a bad method would leave it
    stored = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    stored[name][200, 17] = bad
    stored[name][201, 2] = bad
    save_file(stored, file)
    problems = integrity.verify(open_checkpoint(copy))
    assert [type(problem) for problem in problems] == [TensorError]
    assert problems[0].tensor == name
    assert str(problems[0]).endswith(f"holds {bad} at [200, 17]")


def test_a_file_that_shrinks_after_it_was_opened_is_told(copy):
    checkpoint = open_checkpoint(copy)
    file = weights(copy)
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size - 1000)
    problems = integrity.verify(checkpoint)
    assert problems
    assert {type(problem) for problem in problems} == {FormatError}


# --- compare ---


def test_a_conversion_is_identical_and_a_cast_is_a_cast(converted, tmp_path):
    nano = open_checkpoint(NANO)
    same = integrity.compare(nano, open_checkpoint(converted))
    assert (same.identical, same.cast, same.differences, same.problems) == (len(list(nano.slots())), 0, [], [])
    job.run(conversion.plan_hf(nano, conversion.Options(dtype="f32")), tmp_path / "f32")
    wide = integrity.compare(nano, open_checkpoint(tmp_path / "f32"))
    assert (wide.identical, wide.cast, wide.differences) == (0, len(list(nano.slots())), [])


def test_one_changed_value_is_found_with_its_error(source):
    tensors = tensors_of(source)
    slot = Slot(Role.UP, 1, 2)
    before = tensors[slot].double().numpy().copy()
    tensors[slot][3, 4] += 0.5
    after = tensors[slot].double().numpy()
    found = integrity.compare(source, MemoryReader(CONFIG, tensors))
    assert [difference.slot for difference in found.differences] == [slot]
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert found.differences[0].relative_error == pytest.approx(expected, rel=1e-9)
    assert found.problems == []
    assert found.document()["different"] == 1


def test_the_worst_tensor_comes_first_and_nan_is_worst(source):
    tensors = tensors_of(source)
    tensors[Slot(Role.V, 0)] *= 1.5
    tensors[Slot(Role.O, 0)] *= 1.1
    tensors[Slot(Role.NORM)][0] = math.nan
    found = integrity.compare(source, MemoryReader(CONFIG, tensors)).differences
    assert [difference.slot for difference in found] == [Slot(Role.NORM), Slot(Role.V, 0), Slot(Role.O, 0)]
    assert found[0].relative_error == math.inf


def damaged(source: MemoryReader, fault: str) -> MemoryReader:
    """The source as a faulty converter would leave it. Written from the format's page, not from our code."""
    tensors, hd = tensors_of(source), CONFIG.head_dim
    first, second = Slot(Role.GATE, 1, 0), Slot(Role.UP, 1, 0)
    if fault == "unpermuted":  # w.view(h, hd//2, 2, D).transpose(1, 2) was left out: undo it
        for slot in (Slot(Role.Q, 0), Slot(Role.K, 2)):
            w = tensors[slot]
            tensors[slot] = w.view(-1, 2, hd // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    elif fault == "twice":
        w = tensors[Slot(Role.Q, 1)]
        tensors[Slot(Role.Q, 1)] = w.view(-1, hd // 2, 2, w.shape[1]).transpose(1, 2).reshape(w.shape)
    elif fault == "reshaped":
        w = tensors[Slot(Role.DOWN, 2, 1)]
        tensors[Slot(Role.DOWN, 2, 1)] = w.T.contiguous().view(w.shape)
    elif fault == "swapped":
        tensors[first], tensors[second] = tensors[second], tensors[first]
    elif fault == "experts":
        for role in (Role.GATE, Role.DOWN, Role.UP):
            order = [tensors[Slot(role, 0, expert)] for expert in (1, 2, 0)]
            tensors.update({Slot(role, 0, expert): tensor for expert, tensor in enumerate(order)})
    return MemoryReader(CONFIG, tensors)


@pytest.mark.parametrize(
    ("fault", "slots", "message"),
    [
        ("unpermuted", {Slot(Role.Q, 0), Slot(Role.K, 2)}, faults.UNPERMUTED),
        ("twice", {Slot(Role.Q, 1)}, faults.TWICE),
        ("reshaped", {Slot(Role.DOWN, 2, 1)}, faults.RESHAPED),
        ("swapped", {Slot(Role.GATE, 1, 0), Slot(Role.UP, 1, 0)}, "holds the source's layers.1.experts.0.w"),
        ("experts", {Slot(r, 0, e) for r in (Role.GATE, Role.DOWN, Role.UP) for e in range(3)}, "holds the source's"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_classic_faults_are_named(source, fault, slots, message, dtype):
    output = damaged(source, fault)
    cast = MemoryReader(CONFIG, {slot: tensor.to(dtype) for slot, tensor in tensors_of(output).items()})
    found = integrity.compare(source, cast, file=Path("the output"))
    assert {difference.slot for difference in found.differences} == slots
    assert {problem.file for problem in found.problems} == {"the output"}
    assert all((difference.fault or "").startswith(message) for difference in found.differences)
    assert len(found.problems) == 1
    assert str(min(map(str, slots))) in str(found.problems[0])


def test_a_lookalike_is_not_called_a_swap(source):
    """The sampled rows are another expert's; the rest is not."""
    tensors = tensors_of(source)
    fake = tensors[Slot(Role.GATE, 0, 1)].clone()
    fake[5] += 1
    tensors[Slot(Role.GATE, 0, 0)] = fake
    found = integrity.compare(source, MemoryReader(CONFIG, tensors))
    assert [difference.fault for difference in found.differences] == [None]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [("rope_theta", 1e4, "1e4 or 1e5.*expected 1000000.0, found 10000.0"), ("rms_norm_eps", 1e-6, "slightly wrong")],
)
def test_a_wrong_constant_in_the_config_is_a_problem(source, field, value, message):
    config = dataclasses.replace(CONFIG, **{field: value})
    base = dataclasses.replace(CONFIG, rms_norm_eps=1e-5)
    problems = integrity.compare_configs(base, dataclasses.replace(base, **{field: value}), "config.json")
    assert [type(problem) for problem in problems] == [ConfigError]
    with pytest.raises(ConfigError, match=message):
        raise problems[0]
    found = integrity.compare(source, MemoryReader(config, tensors_of(source)))
    assert found.identical == len(list(CONFIG.slots()))


def test_another_model_is_refused_by_its_config_not_by_a_crash(source):
    other = random_reader(SHAPES["top1"], seed=1)
    found = integrity.compare(source, other)
    assert found.identical == found.cast == len(found.differences) == 0
    assert any("hidden_size" in str(problem) for problem in found.problems)


def test_a_tensor_that_cannot_be_read_is_a_problem(converted, copy):
    file = weights(copy)
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 8
    file.write_bytes(raw)
    found = integrity.compare(open_checkpoint(converted), open_checkpoint(copy))
    assert [type(problem) for problem in found.problems] == [ChecksumError]
    assert found.identical == len(list(read_nano().slots())) - 1


def test_a_fault_s_tensors_are_named_in_the_model_s_order():
    """Layer 2 before layer 10, whatever their errors."""
    deep = random_reader(dataclasses.replace(CONFIG, num_layers=12), seed=4)
    tensors = tensors_of(deep)
    wrong = [Slot(Role.Q, layer) for layer in (11, 2, 10, 3)]
    for slot in wrong:
        heads = tensors[slot].view(-1, 2, CONFIG.head_dim // 2, tensors[slot].shape[1])
        tensors[slot] = heads.transpose(1, 2).reshape(tensors[slot].shape).contiguous()
    (problem,) = integrity.compare(deep, MemoryReader(deep.config, tensors)).problems
    assert problem.tensor == "layers.2.q"
    assert str(problem).endswith(": layers.2.q, layers.3.q, layers.10.q, layers.11.q")


def test_nothing_has_no_error_and_something_for_nothing_has_all():
    """Where the source is all zeros there is no share to tell."""
    zeros, ones = torch.zeros(3, 4), torch.ones(3, 4)
    assert integrity.relative_error(zeros, zeros) == 0.0
    assert integrity.relative_error(zeros, ones) == float("inf")
    assert integrity.relative_error(ones, zeros) == 1.0
