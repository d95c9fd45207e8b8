"""What was asked of `quantize`, and what a calibrated run makes of it: text, stream, memory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ...errors import MemoryBudgetError
from ...inference import budget
from ...inference.corpus import sequences
from ...inference.hessian import gram_bytes
from ...inference.stream import PASS_TOKENS, PASS_TOKENS_ACCELERATOR, Stream
from ...job import WITH_TORCH
from ...layouts.checkpoint import Checkpoint
from ...linalg.few import LEAST_RATIO
from ...machine import find_device, human_bytes, memory_for, product_rate
from ...progress import Progress
from ...text.reading import DEFAULT
from .calibrated import Calibrated
from .matrix import DAMPING, Options
from .passage import Room

COMFORTABLE = 12_000_000_000  # bytes: on a CPU hidden states go to a file rather than beyond, unless told otherwise


@dataclass(frozen=True)
class Asked:
    """Options of the verb; sizes in bytes."""

    method: str
    calibration: str | Path | None
    samples: int
    seq_len: int
    sampling: str | None
    seed: int | None
    smooth: bool
    rounding: str
    damping: float | None
    sweeps: int
    block: int | None
    sequential: bool
    requantize: bool
    dry_run: bool
    resume: bool
    overwrite: bool
    jobs: int
    limit: int | None
    device: str
    progress: Progress
    shard: int | None

    def calibrated(self, source: Checkpoint) -> tuple[Calibrated, Stream]:
        """Raises what reading the text raises."""
        text = DEFAULT if str(self.calibration or DEFAULT) == DEFAULT else str(self.calibration)
        found = sequences(
            text, source, samples=self.samples, seq_len=self.seq_len, sampling=self.sampling, seed=self.seed
        )
        damping = DAMPING if self.damping is None else self.damping
        options = Options(self.rounding, damping, self.sweeps, self.block)
        stream = Stream(source, find_device(self.device), source.main_dtype().torch())
        return Calibrated(found, options, self.smooth, self.sequential), stream


@dataclass(frozen=True)
class Needs:
    """Of a calibrated run: bytes at most, what they are spent on, operations, and where."""

    memory: int
    room: Room
    operations: float
    device: torch.device

    @property
    def seconds(self) -> float:
        """At the rate of a product that is measured now."""
        return round(self.operations / product_rate(self.device), 1)


def needs(source: Checkpoint, how: Calibrated, stream: Stream, limit: int | None) -> Needs:
    """Raises MemoryBudgetError where `limit`, or what a card has free, is less than one layer and its largest Hessian
    take."""
    config, options = source.config, how.options
    hidden, inner = config.hidden_size, config.intermediate_size
    block = min(options.block or inner, inner)
    tokens = sum(map(len, how.text.sequences))
    layer = budget.layer_bytes(config, stream.dtype.itemsize)
    own = gram_bytes(hidden) * (2 + config.num_experts) + gram_bytes(config.num_heads * config.head_dim)
    matrix = 4 * hidden * inner
    factors = 0 if options.rounding == "nearest" else 4 * (inner * block + 3 * block**2)
    expert = gram_bytes(inner, options.block) + factors + 8 * matrix
    run = budget.Needs.of(source, stream.device, stream.dtype, max(map(len, how.text.sequences)))
    together = PASS_TOKENS.get(stream.device.type, PASS_TOKENS_ACCELERATOR)
    fixed = WITH_TORCH + layer + own + max(expert, run.token * together + run.aside)
    states = 2 * tokens * hidden * stream.dtype.itemsize
    on_card = stream.device.type == "cuda"
    room = limit if limit is not None else memory_for(stream.device, None) if on_card else COMFORTABLE
    if room is not None and fixed > room and (on_card or limit is not None):
        what = "--max-memory is too small" if limit is not None else f"{stream.device} has too little memory free"
        raise MemoryBudgetError(
            f"{what} for one layer and its Hessians; --hessian-block 2048 takes less",
            expected=human_bytes(fixed), found=human_bytes(room),
        )  # fmt: skip
    spilled = room is not None and fixed + states > room
    most = fixed + (0 if spilled else states)
    ahead, experts = False, 1
    if on_card and room is not None:
        ahead = most + layer <= room
        most += layer if ahead else 0
        # each more of them keeps what one has, and all of w1 and w3 that is made meanwhile
        more = gram_bytes(inner, options.block) + factors + 12 * matrix
        experts = min(config.num_experts, 1 + max(0, room - most) // more)
        most += (experts - 1) * more
    return Needs(most, Room(spilled, experts, ahead), _operations(source, how, tokens), stream.device)


def _operations(source: Checkpoint, how: Calibrated, tokens: int) -> float:
    """Forward passes, Hessians, factors, and the columns' updates of all layers."""
    config, options = source.config, how.options
    hidden, inner, experts = config.hidden_size, config.intermediate_size, config.num_experts
    block = min(options.block or inner, inner)
    routed = tokens * config.experts_per_token
    forward = 2 * 2 * routed * 3 * hidden * inner + 2 * 2 * tokens * 4 * hidden**2
    shared = routed * hidden**2 + 2 * tokens * hidden**2
    if options.rounding == "nearest":
        return float(config.num_layers * (forward + shared + routed * inner * block))
    few = routed / experts  # rows that w2's Hessian is made of, should the router be even; see linalg/few.py
    few = few if block == inner and few * LEAST_RATIO <= inner else 0.0
    factor, column = (4 * few**2 * inner, 4 * few) if few else (2 * inner * block**2 / 3, float(block))
    factors = experts * (2 * hidden**3 / 3 + factor)
    updates = float(experts * (2 * inner * hidden**2 * (1 + 2 * options.sweeps)))
    updates += experts * hidden * inner * (4 * few * (1 + options.sweeps) if few else block * (1 + 2 * options.sweeps))
    tried = 5 * experts * 512 * (2 * hidden**2 + inner * column) * 3 * how.smooth
    hessians = shared + (0.0 if few else routed * inner * block)
    return float(config.num_layers * (forward + hessians + factors + updates + tried))
