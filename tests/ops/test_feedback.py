"""Second-order rounding of a block: the kernel on each instruction set against plain torch, and that against numpy.

The oracle is the same loop in numpy, which seeks the nearest among all levels; test_feedback_gptq.py has others.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor
from well_formed import opcheck

from mixtools.errors import MixtoolsError
from mixtools.ops.feedback import Block, round_block, round_block_reference

# bitsandbytes' (https://arxiv.org/abs/2305.14314) and ggml-common.h's
NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip
IQ4_NL = torch.tensor([-127.0, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113])
LEVELS = {
    "4 bits": range(16), "4 bits, symmetric": range(-8, 8), "2 bits": range(4), "8 bits": range(-127, 128),
    "one": range(3, 4), "all above zero": range(1, 16), "NF4": NF4, "IQ4_NL": IQ4_NL, "one in a table": NF4[3:4],
    "a long table": torch.linspace(-3, 5, 256) ** 3,
}  # fmt: skip
# columns around the 2 and 4 whose sums are kept together, rows around the 16, 32 and 64 that are worked on together
SHAPES = [(1, 1), (1, 200), (2, 63), (3, 5), (4, 64), (5, 65), (7, 16), (16, 127), (33, 130), (128, 97), (512, 3)]
CHANGED = ("targets", "errors", "codes")

each_grid = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


def block_of(shape: tuple[int, int], levels: range | Tensor = range(16), groups: int = 3, seed: int = 0) -> Block:
    """Random, with errors that exist already, some scales zero and some negative, and NaN where nothing may look."""
    random = torch.Generator().manual_seed(seed)
    (columns, rows), width = shape, levels[-1] - levels[0] + 1
    scales = torch.randn(groups, rows, generator=random) * 3 / width
    scales[torch.rand(groups, rows, generator=random) < 0.1] = 0
    feedback = torch.randn(columns, columns, generator=random) / columns**0.5
    weights = torch.randn(shape, generator=random)
    return Block(
        targets=weights + torch.randn(shape, generator=random) / 10,
        weights=weights,
        errors=torch.randn(shape, generator=random) / 10,
        codes=torch.full(shape, 77, dtype=torch.uint8),
        scales=scales,
        mins=torch.randn(groups, rows, generator=random) - scales * (levels[0] + width / 2),
        group_of=torch.randint(groups, (columns,), generator=random, dtype=torch.int32),
        feedback=feedback.triu(1) + torch.full_like(feedback, torch.nan).tril(),
    )


def like(block: Block, **changes: Tensor) -> Block:
    """A copy that shares no memory, with other tensors for some."""
    tensors = {field.name: getattr(block, field.name).clone() for field in dataclasses.fields(block)}
    return Block(**tensors | changes)


def tensors(block: Block) -> list[Tensor]:
    return [getattr(block, field.name) for field in dataclasses.fields(block)]


def assert_same(found: Block, expected: Block) -> None:
    """Every bit, but that one NaN is as good as another."""
    for field in dataclasses.fields(Block):
        one, other = (getattr(block, field.name) for block in (found, expected))
        if one.dtype == torch.float32:
            one, other = (tensor.where(~tensor.isnan(), torch.nan).view(torch.int32) for tensor in (one, other))
        assert torch.equal(one, other), field.name


def by_reference(block: Block, levels: range | Tensor) -> Block:
    result = like(block)
    round_block_reference(result, levels)
    return result


def by_numpy(block: Block, levels: range | Tensor) -> Block:
    """As the docstring of round_block has it; the nearest level is sought among all, in float64."""
    result = like(block)
    targets, weights, errors, codes, scales, mins, group_of, feedback = (one.numpy() for one in tensors(result))
    numbers = np.array(levels.tolist() if isinstance(levels, Tensor) else levels, np.float32)
    # of two levels as near, the even one or the lower one comes first
    order = np.argsort(numbers % 2, kind="stable") if isinstance(levels, range) else np.arange(len(numbers))
    for i in range(len(targets)):
        scale, least = scales[group_of[i]], mins[group_of[i]]
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(scale == 0, np.float32(0), (targets[i] - least) / scale)
        far = np.abs(wanted.astype(np.float64)[:, None] - numbers.astype(np.float64)[order])
        codes[i] = order[far.argmin(axis=1)]
        error = weights[i] - (scale * numbers[codes[i]] + least)
        delta, errors[i] = error - errors[i], error
        for k in range(i + 1, len(targets)):
            targets[k] = targets[k] + delta * feedback[i, k]
    return result


@each_shape
@each_grid
def test_plain_torch_equals_numpy(shape, levels):
    block = block_of(shape, levels)
    assert_same(by_reference(block, levels), by_numpy(block, levels))


@each_shape
@each_grid
def test_kernel_equals_plain_torch(isa, shape, levels):
    block = block_of(shape, levels, seed=1)
    found = like(block)
    round_block(found, levels)
    assert_same(found, by_reference(block, levels))
    if len(levels) >= 15 and block.codes.numel() > 500:
        assert len(found.codes.unique()) == len(levels) or len(levels) > 16


@pytest.mark.parametrize("levels", [range(16), NF4], ids=["even", "table"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_make_no_difference(isa, levels, threads):
    block = block_of((40, 1000), levels)
    found = like(block)
    round_block(found, levels, threads=threads)
    assert_same(found, by_reference(block, levels))


@pytest.mark.parametrize("cut", [slice(0, 70), slice(3, 67), slice(20, 120), slice(7, 8)], ids=str)
def test_slices_of_larger_tensors(isa, cut):
    """Lines far apart, at odd addresses; nothing is written outside of them."""
    whole, levels, columns = block_of((24, 128), groups=9), range(16), slice(5, 16)
    sliced = {name: getattr(whole, name)[columns, cut] for name in ("targets", "weights", "errors", "codes")}
    sliced |= {name: getattr(whole, name)[::2, cut] for name in ("scales", "mins")}
    sliced |= {"feedback": whole.feedback[columns, columns], "group_of": torch.arange(22, dtype=torch.int32)[::2] % 5}
    before, block = like(whole), Block(**sliced)
    expected = by_reference(block, levels)
    round_block(block, levels, threads=2)
    assert_same(block, expected)
    for name in CHANGED:
        getattr(before, name)[columns, cut] = getattr(expected, name)
    assert_same(whole, before)


def batch_of(blocks: list[Block], room: int = 0) -> Block:
    """All in one: the matrices of one tensor beside each other in each line, with so many items between them."""
    made = {}
    for field in dataclasses.fields(Block):
        own = [getattr(block, field.name) for block in blocks]
        if own[0].ndim == 1:
            made[field.name] = torch.stack(own)
            continue
        lines, items = own[0].shape
        wide = torch.full((lines, len(own), items + room), 77, dtype=own[0].dtype)
        wide[..., :items] = torch.stack(own, 1)
        made[field.name] = wide[..., :items].transpose(0, 1)
    return Block(**made)


@pytest.mark.parametrize("levels", [range(-8, 8), NF4], ids=["even", "table"])
@pytest.mark.parametrize("operation", [round_block, round_block_reference])
def test_matrices_together_are_each_by_itself(levels, operation):
    blocks = [block_of((11, 45), levels, seed=seed) for seed in range(3)]
    found = batch_of(blocks, room=2)
    operation(found, levels)
    for number, block in enumerate(blocks):
        assert_same(Block(*(one[number] for one in tensors(found))), by_reference(block, levels))
    between = torch.as_strided(found.codes, (11, 3, 2), (3 * 47, 47, 1), 45)
    assert (between == 77).all()


def test_no_matrices(isa):
    block = Block(*(one[:0] for one in tensors(batch_of([block_of((5, 3))]))))
    round_block(block, range(16))
    round_block_reference(block, NF4)


@pytest.mark.parametrize("name", CHANGED)
def test_refuses_matrices_that_lie_upon_each_other(name):
    block = batch_of([block_of((4, 8)), block_of((4, 8), seed=1)])
    one = getattr(block, name)
    for wrong in (one[:1].expand(2, -1, -1), torch.as_strided(one, one.shape, (7, *one.stride()[1:]))):
        with pytest.raises(MixtoolsError, match=f"lines of {name} lie upon each other"):
            round_block(dataclasses.replace(block, **{name: wrong}), range(16))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda block: {"scales": block.scales[:1]}, "wrong scales"),
        (lambda block: {"feedback": block.feedback[0]}, "wrong feedback"),
        (lambda block: {"group_of": block.group_of[0]}, "wrong group_of"),
        (lambda block: {"group_of": block.group_of + 3}, "names the groups 3 to 5, of 3"),
        (lambda block: {"targets": block.targets[None]}, "a matrix of"),
    ],
)  # fmt: skip
def test_refuses_matrices_of_which_something_is_missing(changes, message):
    block = batch_of([block_of((40, 8)), block_of((40, 8), seed=1)])
    with pytest.raises(MixtoolsError, match=message):
        round_block(dataclasses.replace(block, **changes(block)), range(16))


def test_no_rows(isa):
    block = block_of((5, 0))
    round_block(block, range(16))
    round_block_reference(block, NF4)
    assert block.codes.shape == (5, 0)


def one_column(values: Tensor, **changes: Tensor) -> Block:
    """Scales of one and mins of zero: what is rounded are the values."""
    weights = values[None].clone()
    zeros = torch.zeros_like(weights)
    scales, group_of = torch.ones_like(weights), torch.zeros(1, dtype=torch.int32)
    codes, feedback = zeros.to(torch.uint8), torch.zeros(1, 1)
    return like(Block(weights, weights, zeros, codes, scales, zeros, group_of, feedback), **changes)


def test_ties_of_integers_go_to_the_even_one(isa):
    block = one_column(torch.tensor([-99, -8.5, -7.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 7.4, 7.5, 1e30]))
    round_block(block, range(-8, 8))
    assert (block.codes[0].int() - 8).tolist() == [-8, -8, -8, -2, -2, 0, 0, 2, 2, 6, 7, 7, 7]
    assert by_reference(one_column(block.weights[0]), range(-8, 8)).codes.equal(block.codes)


@pytest.mark.parametrize(
    "table", [NF4, IQ4_NL, NF4 * 1e-40, torch.tensor([1e38, 1.1e38, 3.3e38])], ids=["NF4", "IQ4_NL", "denormal", "huge"]
)
def test_a_table_is_exact_to_the_last_bit_about_a_middle(isa, table):
    middles = (table[:-1].double() + table[1:].double()) / 2
    about = [middles.float()]
    for _ in range(2):
        about = [torch.nextafter(about[0], torch.tensor(-4e38)), *about, torch.nextafter(about[-1], torch.tensor(4e38))]
    block = one_column(torch.cat([*about, table]))
    expected = by_numpy(block, table)
    assert_same(by_reference(block, table), expected)
    round_block(block, table)
    assert_same(block, expected)


@pytest.mark.parametrize(
    ("levels", "code"), [(range(16), 0), (range(-8, 8), 8), (range(3, 9), 0), (NF4, 7), (IQ4_NL, 8)]
)
@pytest.mark.parametrize("scale", [0.0, -0.0])
def test_a_scale_of_zero_takes_the_level_nearest_to_zero(isa, levels, code, scale):
    """What rounds a constant group elsewhere to NaN (GPTQModel's pull request 1531) or to any level."""
    values, scales = torch.tensor([5.0, -5.0, 0.25, 0.0] * 9), torch.full((1, 36), scale)
    block = one_column(values, scales=scales, mins=torch.full((1, 36), 0.25))
    round_block(block, levels)
    assert (block.codes == code).all()
    assert torch.equal(block.errors[0], values - 0.25)


@pytest.mark.parametrize("levels", [range(-8, 8), NF4], ids=["even", "table"])
def test_any_number_at_all(isa, levels):
    """Overflow, infinities, NaN and denormals, in all that is read: the same codes, and NaN in the same places."""
    random = np.random.default_rng(0)
    block = block_of((24, 500), levels)
    for tensor in (block.targets, block.weights, block.errors, block.scales, block.mins):
        values, few = tensor.numpy(), random.random(tensor.shape) < 0.02
        values[few] = random.integers(0, 1 << 32, int(few.sum()), np.uint32).view(np.float32)
        values[random.random(tensor.shape) < 0.005] = np.inf
        values[random.random(tensor.shape) < 0.005] *= np.float32(1e-40)
    found = like(block)
    round_block(found, levels)
    expected = by_reference(block, levels)
    assert_same(found, expected)
    assert found.errors.isnan().any() and found.errors.isfinite().any()


def test_a_nan_among_the_weights_shows(isa):
    block = block_of((6, 40))
    block.weights[2, 7] = torch.nan
    round_block(block, range(16))
    assert block.errors.isnan().nonzero().tolist() == [[2, 7]]
    assert block.targets.isnan().nonzero().tolist() == [[3, 7], [4, 7], [5, 7]]


def test_denormals_are_kept_where_a_process_flushes_them(isa):
    block = block_of((20, 70))
    for tensor in (block.targets, block.weights, block.errors, block.scales, block.mins):
        tensor.mul_(1e-39)
    expected, found = by_reference(block, range(16)), like(block)
    assert torch.set_flush_denormal(True)
    try:
        round_block(found, range(16))
    finally:
        torch.set_flush_denormal(False)
    assert expected.errors.any()
    assert_same(found, expected)


@pytest.mark.parametrize("levels", [range(-8, 8), NF4], ids=["even", "table"])
def test_a_well_formed_operation(levels):
    table, low = (None, levels.start) if isinstance(levels, range) else (levels, 0)
    for block in (block_of((9, 33), levels), block_of((1, 1), levels), batch_of([block_of((5, 6), levels)] * 2)):
        operation = torch.ops.mixtools.round_block.default
        opcheck(operation, (*tensors(block), table, len(levels), low, 2))


def test_parameters_are_not_changed_behind_autograd():
    weights = torch.nn.Parameter(torch.randn(4, 8))
    block = like(block_of((4, 8)), weights=weights)
    round_block(block, range(16))
    assert not block.errors.requires_grad


def narrow(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, dim=1)[:, ::2]


def behind(lines: int, first: int) -> dict[str, Tensor]:
    """Four lines of targets, and of the same memory weights from a later line on."""
    both = torch.zeros(lines, 8)
    return {"targets": both[:4], "weights": both[first:]}


WRONG = {
    "no matrix": (lambda block: {"targets": block.targets[0]}, "a matrix of 1 to 512 columns"),
    "too many columns": (lambda block: {"targets": torch.zeros(513, 4)}, "a matrix of 1 to 512 columns"),
    "no columns": (lambda block: {"targets": torch.zeros(0, 4)}, "a matrix of 1 to 512 columns"),
    "scales of one dimension": (lambda block: {"scales": block.scales[0]}, "a matrix"),
    "other rows": (lambda block: {"weights": block.weights[:, 1:]}, "wrong weights"),
    "mins of other groups": (lambda block: {"mins": block.mins[1:]}, "wrong mins"),
    "doubles": (lambda block: {"errors": block.errors.double()}, "wrong errors .* torch.float32 .* torch.float64"),
    "signed codes": (lambda block: {"codes": block.codes.to(torch.int8)}, "wrong codes .* torch.uint8 .* torch.int8"),
    "elsewhere": (lambda block: {"weights": block.weights.to("meta")}, "wrong weights .* on cpu, found .* on meta"),
    "feedback of other columns": (lambda block: {"feedback": torch.zeros(4, 5)}, "wrong feedback"),
    "not transposed": (lambda block: {"weights": torch.zeros(8, 4).t()}, "items of a line of weights lie side by side"),
    "one for all rows": (lambda block: {"mins": torch.zeros(3, 1).expand(3, 8)}, "items of a line of mins"),
    "every second row": (lambda block: {"feedback": narrow(block.feedback)}, "items of a line of feedback"),
    "long groups": (lambda block: {"group_of": block.group_of.long()}, "wrong group_of"),
    "too few groups": (lambda block: {"group_of": block.group_of[1:]}, "wrong group_of"),
    "an unknown group": (lambda block: {"group_of": block.group_of + 3}, "names the groups 3 to 5, of 3"),
    "a negative group": (lambda block: {"group_of": block.group_of - 1}, "names the groups -1 to 1, of 3"),
    "one line for all": (lambda block: {"errors": torch.zeros(1, 8).expand(4, 8)}, "errors lie upon each other"),
    "targets are weights": (lambda block: {"targets": block.weights}, "targets of a block overlap its weights"),
    "targets end in the weights": (lambda block: behind(7, 3), "targets of a block overlap its weights"),
    "targets are errors": (lambda block: {"errors": block.targets}, "targets of a block overlap its errors"),
    "codes in the scales": (
        lambda block: {"codes": block.scales.view(torch.uint8).view(-1)[:32].view(4, 8)},
        "codes of a block overlap its scales",
    ),
}  # fmt: skip


@pytest.mark.parametrize("operation", [round_block, round_block_reference])
@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_refuses(operation, changes, message):
    block = dataclasses.replace(block_of((4, 8)), group_of=torch.tensor([0, 1, 2, 0], dtype=torch.int32))
    before = like(block)
    with pytest.raises(MixtoolsError, match=message):
        operation(dataclasses.replace(block, **changes(block)), range(16))
    assert_same(block, before)


@pytest.mark.parametrize("operation", [round_block, round_block_reference])
@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (range(0), "1 to 256 consecutive integers"),
        (range(257), "1 to 256 consecutive integers"),
        (range(0, 16, 2), "1 to 256 consecutive integers"),
        (range(1 << 20, (1 << 20) + 5), "near zero"),
        (NF4.double(), "1 to 256 torch.float32"),
        (NF4[None], "1 to 256 torch.float32"),
        (torch.arange(257.0), "1 to 256 torch.float32"),
        (NF4[:0], "1 to 256 torch.float32"),
        (NF4.flip(0), "each greater than the one before"),
        (torch.tensor([0.0, -0.0, 1.0]), "each greater than the one before"),
        (torch.tensor([0.0, torch.nan]), "finite numbers"),
        (torch.tensor([0.0, torch.inf]), "finite numbers"),
    ],
    ids=str,
)
def test_refuses_levels(operation, levels, message):
    with pytest.raises(MixtoolsError, match=message):
        operation(block_of((4, 8)), levels)


def test_refuses_no_threads():
    with pytest.raises(MixtoolsError, match="0 threads"):
        round_block(block_of((4, 8)), range(16), threads=0)
