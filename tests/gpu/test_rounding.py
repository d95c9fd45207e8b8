"""Second-order rounding by the GPU's kernel, in Triton's interpreter: the bits of plain torch and the CPU's kernel."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ops.test_feedback import (
    CHANGED,
    IQ4_NL,
    LEVELS,
    NF4,
    assert_same,
    batch_of,
    block_of,
    by_numpy,
    by_reference,
    like,
    one_column,
    tensors,
)
from torch import Tensor

from mixtools.errors import MixtoolsError
from mixtools.ops import feedback
from mixtools.ops.feedback import Block, round_block
from mixtools.ops.gpu import able, launch, round

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # scales of zero, as numpy has it

EVEN_AND_TABLE = pytest.mark.parametrize("levels", [range(-8, 8), NF4], ids=["even", "table"])


def told(levels: range | Tensor) -> range | tuple[Tensor, Tensor]:
    """As the launch takes them."""
    return levels if isinstance(levels, range) else (levels, feedback._limits(levels))


def by_triton(block: Block, levels: range | Tensor, *, lanes: int = 64, tile: int = 4) -> Block:
    """Few columns are a whole tile, many rows one program: the interpreter takes as long for one lane as for all."""
    result = like(block)
    round.round_blocks(tuple(tensors(result)), told(levels), lanes, tile).run()
    return result


def assert_right(block: Block, levels: range | Tensor, **sizes: int) -> Block:
    found, by_kernel = by_triton(block, levels, **sizes), like(block)
    round_block(by_kernel, levels)
    assert_same(found, by_kernel)
    assert_same(found, by_reference(block, levels))
    return found


# around the 4 columns of a tile here, and the 64 rows of a program
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 64), (5, 65), (8, 63), (9, 130)], ids=str)
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
def test_the_same_bits(shape, levels):
    block = block_of(shape, levels, seed=3)
    assert_same(assert_right(block, levels), by_numpy(block, levels))


@EVEN_AND_TABLE
@pytest.mark.parametrize("shape", [(2, 33), (8, 32), (27, 40), (32, 31)], ids=str)
def test_as_a_gpu_starts_it(shape, levels):
    block = block_of(shape, levels, seed=4)
    assert_right(block, levels, lanes=launch.LANES, tile=round.TILE)


@pytest.mark.parametrize(("columns", "groups"), [(128, 1), (50, 7)])
def test_a_whole_block_of_columns(columns, groups):
    levels = range(16)
    assert_right(block_of((columns, 90), levels, groups=groups, seed=5), levels, lanes=128, tile=round.TILE)


@EVEN_AND_TABLE
def test_any_number_at_all(levels):
    """Overflow, infinities, NaN and denormals, in all that is read: the same codes, and NaN in the same places."""
    random = np.random.default_rng(1)
    block = block_of((14, 500), levels)
    for tensor in (block.targets, block.weights, block.errors, block.scales, block.mins):
        values, few = tensor.numpy(), random.random(tensor.shape) < 0.02
        values[few] = random.integers(0, 1 << 32, int(few.sum()), np.uint32).view(np.float32)
        values[random.random(tensor.shape) < 0.005] = np.inf
        values[random.random(tensor.shape) < 0.005] *= np.float32(1e-40)
    found = assert_right(block, levels, lanes=512)
    assert found.errors.isnan().any() and found.errors.isfinite().any()


def test_a_nan_among_the_weights_shows():
    block = block_of((6, 40))
    block.weights[2, 7] = torch.nan
    found = assert_right(block, range(16))
    assert found.errors.isnan().nonzero().tolist() == [[2, 7]]
    assert found.targets.isnan().nonzero().tolist() == [[3, 7], [4, 7], [5, 7]]


def test_ties_of_integers_go_to_the_even_one():
    block = one_column(torch.tensor([-99, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.4, 7.5, 1e30]))
    codes = by_triton(block, range(-8, 8)).codes[0].int() - 8
    assert codes.tolist() == [-8, -8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7, 7]


@EVEN_AND_TABLE
def test_quotients_are_exact_to_the_last_bit(levels):
    """Targets half way between two levels, times a scale of any kind: a quotient that is a bit off is another code."""
    random = torch.Generator().manual_seed(0)
    numbers = torch.tensor([*levels], dtype=torch.float32)
    place = torch.randint(15, (4000,), generator=random)
    scales = torch.rand(1, 4000, generator=random) + 0.1
    values = ((numbers[place].double() + numbers[place + 1].double()) / 2 * scales[0]).float()
    block = one_column(values, scales=scales)
    found = by_triton(block, levels, lanes=4096)
    assert_same(found, by_reference(block, levels))
    product = values * (1 / scales[0])
    assert (product != values / scales[0]).float().mean() > 0.1


@pytest.mark.parametrize("first", [-(1 << 20), (1 << 20) - 256, -300])
def test_integers_far_from_zero(first):
    """About every middle between two of them."""
    levels = range(first, first + 256)
    middles = torch.arange(first - 1, first + 257) + torch.tensor([0.5, 0.4375, 0.5625])[:, None]
    assert_right(one_column(middles.flatten()), levels, lanes=1024)


@pytest.mark.parametrize(
    "table", [NF4, IQ4_NL, NF4 * 1e-40, torch.tensor([1e38, 1.1e38, 3.3e38])], ids=["NF4", "IQ4_NL", "denormal", "huge"]
)
def test_a_table_is_exact_to_the_last_bit_about_a_middle(table):
    middles = (table[:-1].double() + table[1:].double()) / 2
    about = [middles.float()]
    for _ in range(2):
        about = [torch.nextafter(about[0], torch.tensor(-4e38)), *about, torch.nextafter(about[-1], torch.tensor(4e38))]
    block = one_column(torch.cat([*about, table]))
    assert_same(by_triton(block, table), by_numpy(block, table))


@pytest.mark.parametrize(
    ("levels", "code"), [(range(16), 0), (range(-8, 8), 8), (range(3, 9), 0), (NF4, 7), (IQ4_NL, 8)]
)
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_scale_of_zero_takes_the_level_nearest_to_zero(levels, code, scale):
    values, scales = torch.tensor([5.0, -5.0, 0.25, 0.0] * 9), torch.full((1, 36), scale)
    found = by_triton(one_column(values, scales=scales, mins=torch.full((1, 36), 0.25)), levels)
    assert (found.codes == code).all()
    assert torch.equal(found.errors[0], values - 0.25)


# --- where things lie ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [slice(0, 70), slice(3, 67), slice(7, 8)], ids=str)
def test_slices_of_larger_tensors(cut):
    """Lines far apart, at odd addresses; nothing is written outside of them."""
    whole, levels, columns = block_of((24, 128), groups=9), range(16), slice(5, 16)
    sliced = {name: getattr(whole, name)[columns, cut] for name in ("targets", "weights", "errors", "codes")}
    sliced |= {name: getattr(whole, name)[::2, cut] for name in ("scales", "mins")}
    sliced |= {"feedback": whole.feedback[columns, columns], "group_of": torch.arange(22, dtype=torch.int32)[::2] % 5}
    before, block = like(whole), Block(**sliced)
    expected = by_reference(block, levels)
    round.round_blocks(tuple(tensors(block)), levels, 32, 4).run()
    assert_same(block, expected)
    for name in CHANGED:
        getattr(before, name)[columns, cut] = getattr(expected, name)
    assert_same(whole, before)


def test_lines_of_each_tensor_lie_as_they_like():
    block, levels = block_of((6, 70)), range(16)
    own = {}
    for room, (name, tensor) in enumerate(vars(block).items()):
        own[name] = tensor
        if tensor.ndim == 2:
            wide = torch.zeros(len(tensor), tensor.shape[1] + room, dtype=tensor.dtype)
            own[name] = wide[:, : tensor.shape[1]].copy_(tensor)
    found = Block(**own)
    assert len({tensor.stride(0) for tensor in tensors(found)}) == 8
    round.round_blocks(tuple(tensors(found)), levels, 64, 4).run()
    assert_same(found, by_reference(block, levels))


@EVEN_AND_TABLE
@pytest.mark.parametrize("columns", [8, 11])
def test_a_batch_of_matrices(levels, columns):
    """Each with scales, groups and feedback of its own, and all in one launch; some room between them."""
    blocks = [block_of((columns, 45), levels, seed=seed) for seed in range(3)]
    names = [field.name for field in dataclasses.fields(Block)]
    room = {name: torch.stack([getattr(block, name) for block in blocks for _ in range(2)]) for name in names}
    before = {name: tensor.clone() for name, tensor in room.items()}
    batch = tuple(tensor[::2] for tensor in room.values())
    started = round.round_blocks(batch, told(levels), 32, 4)
    assert started.grid == (2, 3)
    started.run()
    deltas = started.arguments["deltas"]
    assert isinstance(deltas, Tensor)
    for number, block in enumerate(blocks):
        found = Block(*(one[number] for one in batch))
        assert_same(found, by_reference(block, levels))
        # each has its own room for them: on a GPU all run at once
        assert torch.equal(deltas[number, :columns, :45], found.errors - block.errors)
    for name, tensor in room.items():
        assert tensor[1::2].view(torch.uint8).equal(before[name][1::2].view(torch.uint8))


def test_again_the_same():
    block = block_of((21, 70))
    found = by_triton(block, range(16), lanes=32, tile=8)
    for lanes, tile in ((32, 8), (64, 8), (128, 4), (32, 16)):
        assert_same(by_triton(block, range(16), lanes=lanes, tile=tile), found)


# --- the operation ---------------------------------------------------------------------------------------------------


@EVEN_AND_TABLE
def test_the_operation_hands_its_blocks_over(levels):
    table, low = (None, levels.start) if isinstance(levels, range) else (levels, 0)
    block = block_of((10, 36), levels)
    found = like(block)
    feedback._round_on_gpu(found, table, len(levels), low)
    assert_same(found, by_reference(block, levels))
    blocks = [block_of((10, 36), levels, seed=seed) for seed in (1, 2)]
    together = batch_of(blocks, room=1)
    feedback._round_on_gpu(together, table, len(levels), low)
    for number, block in enumerate(blocks):
        assert_same(Block(*(one[number] for one in tensors(together))), by_reference(block, levels))


def test_which_devices_the_kernel_is_for(monkeypatch):
    assert feedback._way(torch.device("mps")) is feedback._each_by_torch
    for problem, way in ((None, feedback._round_on_gpu), ("too old", feedback._each_by_torch)):
        monkeypatch.setattr(able, "problem", lambda _, problem=problem: problem)
        assert feedback._way(torch.device("cuda", 1)) is way


def test_without_triton_it_is_told(monkeypatch):
    def missing(name: str) -> None:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    launch.kernels.cache_clear()
    monkeypatch.setattr(launch.importlib, "import_module", missing)
    with pytest.raises(MixtoolsError, match="need Triton"):
        by_triton(block_of((4, 8)), range(16))
