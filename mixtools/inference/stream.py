"""Layer-major running: all the text goes through one layer before the next layer is needed.

    reader ─► thread: fill layer i+1 while layer i computes ─┐
    ids ─► Embedding ─► States ─► layer i over every pass ─► States ─► ... ─► Head ─► logits
                        (memory, or an unnamed file)

Each weight is read once, whatever the amount of text. `plan` says before anything is read how the memory will be used.
Sequences are independent; a pass is a run of sequences of one length, so give sequences of one length side by side.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..config import MixtralConfig
from ..errors import InputError, MemoryBudgetError
from ..layouts.reader import Reader
from ..machine import human_bytes
from ..ops.gpu import able
from ..progress import Progress, Silent
from . import budget
from .arriving import Arriving, packed_layers, stays_packed
from .attention import Span, span
from .lane import Card, Lane
from .model import Block, Embedding, Head, Observer
from .states import States

PASS_TOKENS = {"cpu": 1024}  # products are bound by arithmetic, and what a pass makes stays within malloc's own memory
PASS_TOKENS_ACCELERATOR = 8192
LOGIT_ROWS = 1024  # rows of logits at once; the head is widened to fp32 anew for each such chunk


@dataclass(frozen=True)
class Plan:
    """How a run will use memory, bytes throughout; `peak_bytes` is an upper bound of what it allocates."""

    double: bool  # the next layer is read while this one computes; False: in turn, since two do not fit
    spilled: bool  # hidden states lie in a temporary file, since they do not fit
    pass_tokens: int
    logit_rows: int
    states_bytes: int
    peak_bytes: int
    kept: bool = False  # the layers' memory is held after the run, for the next one


class Stream:
    """A model that is run a layer at a time, from any Reader."""

    def __init__(
        self,
        reader: Reader,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        max_memory: int | None = None,
        progress: Progress | None = None,
        spill: Path | None = None,
        reuse: bool = False,
        packed: bool = False,
    ) -> None:
        """`max_memory` bytes for weights, activations and hidden states together; None sets no limit.

        `spill`: the folder of hidden states that do not fit; the system's temporary folder if None. `reuse`: hold the
        layers' memory from run to run, if there is room for all else beside it; see `forget`. `packed`: on a GPU whose
        kernels take them, layers are run as they are stored, so that no more than one projection is widened at a time.
        """
        self.reader, self.config, self.device, self.dtype = reader, reader.config, torch.device(device), dtype
        self.max_memory, self.progress = max_memory, progress or Silent()
        self.spill = spill or Path(tempfile.gettempdir())
        self.reserved = 0  # bytes of max_memory that the caller has given away
        self.remarks: list[str] = []  # what the last run gave up to stay within the memory allowed
        self.reuse, self.packed = reuse, packed
        self._spans: dict[int, Span] = {}
        self._spare: list[Arriving] = []  # layers' memory that waits for the next run

    # --- what fits ---

    def plan(self, lengths: Sequence[int], *, copies: int = 1, held: int = 0) -> Plan:
        """How sequences of these lengths will run, with room for `copies` sets of hidden states.

        `held`: bytes in memory already, that stay there. Raises MemoryBudgetError, which names the least that works, if
        even one layer at a time does not fit.
        """
        longest, tokens = max(lengths, default=0), sum(lengths)
        needs = budget.Needs.of(self.reader, self.device, self.dtype, longest)
        held += self.reserved
        states = copies * tokens * self.config.hidden_size * self.dtype.itemsize
        target = max(longest, min(tokens, PASS_TOKENS.get(self.device.type, PASS_TOKENS_ACCELERATOR)))
        rows = max(1, min(tokens, LOGIT_ROWS))
        if self.max_memory is None:
            peak = held + states + needs.peak(2, target, rows, self.reuse)
            return Plan(True, False, target, rows, states, peak, self.reuse)
        allowed = self.max_memory - held
        least = needs.peak(1, longest, 1)
        if least > allowed:
            raise MemoryBudgetError(
                f"even one layer and one sequence of {longest} tokens do not fit; allow {human_bytes(least + held)} or "
                "more, or take a shorter context",
                expected=f"at most {human_bytes(self.max_memory)}", found=human_bytes(least + held),
            )  # fmt: skip
        # a second layer hides the reading, states in memory save a little traffic: the layer goes first
        double = needs.peak(2, longest, 1) <= allowed
        spilled = needs.peak(1 + double, longest, 1) + states > allowed
        free = allowed - (0 if spilled else states)
        target = min(target, max(longest, (free - needs.layers(1 + double)) // needs.token))
        kept = self.reuse and needs.peak(1 + double, target, rows, kept=True) <= free
        rows = min(rows, max(1, (free - needs.head) // needs.logits))
        peak = needs.peak(1 + double, target, rows, kept) + (0 if spilled else states)
        return Plan(double, spilled, target, rows, states, held + peak, kept)

    # --- the run ---

    def hidden(
        self, sequences: Sequence[Tensor], *, stop: int | None = None, observer: Observer | None = None
    ) -> States:
        """ids, [T] each -> the states before layer `stop`, or after the last.

        Raises MemoryBudgetError before anything is read, InputError for an id outside the vocabulary, and
        whatever the reader raises.
        """
        return self.run(self.embed(sequences), stop=stop, observer=observer)

    def embed(self, sequences: Sequence[Tensor], *, spilled: bool = False) -> States:
        """ids, [T] each -> the states before layer 0, in a file if they do not fit or if asked. Raises as `hidden`."""
        lengths = [len(ids) for ids in sequences]
        plan = self.plan(lengths)
        check_ids(sequences, self.config)
        if not plan.kept:
            self.forget()
        states = self.states(lengths, spilled=spilled or plan.spilled)
        embedding = Embedding.load(self.reader, self.device, self.dtype)
        for start, ids in zip(states.starts, sequences, strict=False):
            states.write(start, embedding(ids.to(self.device)))
        return states

    def run(
        self, states: States, *, stop: int | None = None, observer: Observer | None = None, keep: bool = False
    ) -> States:
        """Carry states from their layer up to before layer `stop` (None: through the last), in place.

        With `keep` they stay as they are, to start from again, and others are returned.
        """
        stop = self.config.num_layers if stop is None else stop
        plan = self.plan(states.lengths, copies=int(keep), held=states.memory_bytes)
        source, target = states, states
        if keep:
            target = self.states(states.lengths, states.layer, spilled=plan.spilled)
            if states.layer >= stop:
                for start in range(0, states.tokens, plan.pass_tokens):
                    target.write(start, states.rows(start, min(start + plan.pass_tokens, states.tokens)))
        self.remarks = _remarks(plan, target)
        if self.packed and (without := able.remark(self.device)):
            self.remarks.append(without)
        self.progress.start("; ".join(["layers", *self.remarks]), states.tokens * max(0, stop - states.layer), "tok")
        for layer in self._running(states.layer, stop, plan):
            self.through(layer, source, into=target, observer=observer, pass_tokens=plan.pass_tokens)
            source, target.layer = target, layer.index + 1
        self.progress.finish()
        return target

    def _running(self, first: int, stop: int, plan: Plan) -> Iterator[Block]:
        """`layers`, or as they are stored."""
        if not self.packed or first >= stop or not stays_packed(self.reader, self.device):
            return iter(self.layers(first, stop, double=plan.double, reuse=plan.kept))
        return packed_layers(self.reader, range(first, stop), self.device, self.dtype, self.lane(), double=plan.double)

    def states(self, lengths: Sequence[int], layer: int = 0, *, spilled: bool) -> States:
        """Room for states before `layer`, where this stream computes or in a file. Raises DiskError as States."""
        spill = self.spill if spilled else None
        return States(lengths, self.config.hidden_size, self.dtype, layer, spill, device=self.device)

    def layers(self, first: int, stop: int, *, double: bool = True, reuse: bool = False) -> Iterator[Arriving]:
        """Layers first .. stop-1. Each is valid until the next is asked for.

        They are read on a thread of their own, a tensor at a time in the order in which they are needed: a layer runs
        as soon as its first tensors are there. With `double`, the next one is read meanwhile into a second layer's
        memory. What reading raises is raised where the tensor is needed, at the latest when the next layer is asked
        for. With `reuse`, their memory stays for the next call (a plan says whether it fits).
        """
        if first >= stop:
            return
        count = min(2 if double else 1, stop - first)
        spare, self._spare = self._spare[:count], []
        while len(spare) < count:
            spare.append(Arriving(self.config, first, self.device, self.dtype))
        lane = self.lane()
        with ThreadPoolExecutor(1, "mixtools-reader") as pool:
            try:
                spare[0].read_ahead(self.reader, first, pool, lane)
                for index in range(first, stop):
                    layer, following = spare[(index - first) % count], spare[(index + 1 - first) % count]
                    if count == 2 and index + 1 < stop:
                        following.read_ahead(self.reader, index + 1, pool, lane)
                    yield layer
                    layer.finish()
                    if count == 1 and index + 1 < stop:
                        following.read_ahead(self.reader, index + 1, pool, lane)
            finally:
                pool.shutdown(cancel_futures=True)
                if lane is not None:
                    lane.finish()
        if reuse:
            self._spare = spare

    def lane(self) -> Lane | None:
        """The way to a GPU; None where layers lie in the memory that they are read into, or where none is known."""
        return Lane(Card(self.device)) if self.device.type == "cuda" else None

    def inherit(self, other: Stream) -> None:
        """Take over the layers' memory that another stream holds, if it fits this model; it is given back if not."""
        same = (self.config, self.device, self.dtype) == (other.config, other.device, other.dtype)
        self._spare, other._spare = other._spare if same else [], []

    def forget(self) -> None:
        """Give the layers' memory back."""
        self._spare = []

    def through(
        self,
        layer: Block,
        states: States,
        *,
        into: States | None,
        observer: Observer | None = None,
        pass_tokens: int,
    ) -> None:
        """All sequences through one layer, and the result into `into` (may be `states`; None: for an observer only).

        A pass is at most `pass_tokens` tokens, but one sequence at least.
        """
        for first, last in passes(states.lengths, pass_tokens):
            length, start, end = states.lengths[first], states.starts[first], states.starts[last]
            x = states.rows(start, end).to(self.device).view(last - first, length, -1)
            y = layer(x, self.span(length), observer=observer)
            if into is not None:
                into.write(start, y.flatten(0, 1))
            self.progress.advance(end - start)

    def logits(
        self, states: States, rows: Tensor | None = None, *, head: Head | None = None, chunk: int | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        """(n, logits [r, V] fp32) chunk by chunk: of the tokens rows[n : n + r], indices into all sequences joined.

        `rows` [R], ascending; None takes every token. `head`: one that is loaded already. `chunk` rows at once; None
        takes as many as fit.
        """
        rows = torch.arange(states.tokens) if rows is None else rows
        chunk = chunk or self.plan(states.lengths, copies=0, held=states.memory_bytes).logit_rows
        head = head or Head.load(self.reader, self.device, self.dtype)
        for start in range(0, len(rows), chunk):
            yield start, head(states.select(rows[start : start + chunk]).to(self.device))

    def span(self, length: int) -> Span:
        """Where sequences of `length` tokens stand; made once."""
        if length not in self._spans:
            self._spans[length] = span(self.config, length, self.device)
        return self._spans[length]


def _remarks(plan: Plan, states: States) -> list[str]:
    remarks = [] if plan.double else ["two layers do not fit in memory: reading and computing take turns"]
    if states.spilled:
        remarks.append(
            f"the hidden states do not fit in memory: a temporary file holds {human_bytes(plan.states_bytes)}"
        )
    return remarks


def passes(lengths: Sequence[int], pass_tokens: int) -> Iterator[tuple[int, int]]:
    """Runs [first, last) of neighbouring sequences of one length, at most `pass_tokens` tokens but one sequence."""
    first = 0
    while first < len(lengths):
        last = first + 1
        while (
            last < len(lengths)
            and lengths[last] == lengths[first]
            and (last + 1 - first) * lengths[first] <= pass_tokens
        ):
            last += 1
        yield first, last
        first = last


def check_ids(sequences: Sequence[Tensor], config: MixtralConfig) -> None:
    """Raise InputError for an id that the model has no embedding for, or an empty sequence."""
    for number, ids in enumerate(sequences):
        if not len(ids):
            raise InputError(f"sequence {number} is empty")
        if int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
            position = int(((ids < 0) | (ids >= config.vocab_size)).nonzero()[0])
            raise InputError(
                f"sequence {number}, position {position}: the id is outside the vocabulary; is this the model's "
                "own tokenizer?",
                expected=f"0 to {config.vocab_size - 1}", found=int(ids[position]),
            )  # fmt: skip
