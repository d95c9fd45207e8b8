"""The test bench of a search: the change of log-likelihood that an edit makes, without running what it leaves alone.

    source ─► states before each layer with candidates, kept ─┬─► layers from the first edited one on ─► head ─► nll
                                                              └─► second moments of one layer's inputs

The states before layer i are those of the unedited model, and stay valid for every edit in layer i or later. Several
edits go through the layers side by side, so that each layer is read once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from ....checking.perplexity import Windows, measure, token_nll
from ....errors import SpectrumError, TensorError
from ....inference.calibrate import Moments
from ....inference.model import Head, Layer
from ....inference.states import States
from ....inference.stream import Plan, Stream, check_ids
from ....layouts.reader import Reader
from ....names import Slot
from ....progress import Progress
from ..figures import OUTPUT
from ..method import Analysis, Options, analyse
from .rows import Figure, Row
from .shelf import EditedReader, Edits, Place, Shelf

_SPILLED_BATCH = 4  # edits at once where even one set of hidden states needs the disk


def paired(before: Tensor, after: Tensor, counts: Sequence[int]) -> tuple[float, float]:
    """Mean change of nll [n] per token, and its standard error from the spread of the sequences' means.

    `counts`: tokens of each sequence, two sequences at least. Tokens of one sequence share its context, so the
    sequences are the independent draws, weighed by their tokens.
    """
    weight = torch.tensor(counts, dtype=torch.float64)
    weight = weight / weight.sum()
    means = torch.stack([part.mean() for part in torch.split(after - before, list(counts))])
    delta = float((weight * means).sum())
    spread = float((weight * (means - delta)).square().sum())
    return delta, math.sqrt(spread * len(counts) / (len(counts) - 1))


class Bench:
    """A text, a source, and what edits of some of its layers do to the text's log-likelihood."""

    def __init__(
        self,
        reader: Reader,
        text: Windows,
        layers: Sequence[int],
        *,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        max_memory: int | None,
        progress: Progress | None,
        spill: Path | None = None,
        method: Options | None = None,
        routed: bool = False,
    ) -> None:
        """Runs the source up to the last of `layers`, where candidates are. Raises what Stream.hidden raises."""
        self.source, self.text, self.batch = reader, text, batch
        self.method, self.routed = method or Options(), routed
        self.stream = Stream(reader, device, dtype, max_memory=max_memory, progress=progress, spill=spill)
        self.shelf = Shelf(self.stream.spill)
        self.stream.reader = self.reader = EditedReader(reader, self.shelf)
        self.edits: dict[Slot, Place] = {}  # accepted so far
        self._standing: Tensor | None = None
        self.layer_passes = 0
        self.remarks: list[str] = []
        self.lengths = [len(ids) for ids in text.sequences]
        self.boundaries: dict[int, States] = {}
        self._fill_boundaries(sorted(set(layers)))

    # --- the source's states ---

    def _fill_boundaries(self, wanted: Sequence[int]) -> None:
        check_ids(self.text.sequences, self.stream.config)
        plan = self.stream.plan(self.lengths, copies=len(wanted) + 1)
        self._remark(plan, f"the hidden states before {len(wanted)} layers")
        states = self.stream.embed(self.text.sequences, spilled=plan.spilled)
        self.stream.progress.start("layers, as they are", states.tokens * wanted[-1], "tok")
        if wanted[0] == 0:
            self.boundaries[0] = states
        for layer in self.stream.layers(0, wanted[-1], double=plan.double):
            target = (
                self.stream.states(self.lengths, layer.index + 1, spilled=plan.spilled)
                if layer.index in self.boundaries
                else states
            )
            self.stream.through(layer, states, into=target, pass_tokens=plan.pass_tokens)
            self.layer_passes += 1
            states, target.layer = target, layer.index + 1
            if states.layer in wanted:
                self.boundaries[states.layer] = states
        self.stream.progress.finish()

    @property
    def _held(self) -> int:
        return sum(states.memory_bytes for states in self.boundaries.values())

    def _remark(self, plan: Plan, what: str) -> None:
        remark = f"{what} do not fit in memory: temporary files hold them"
        if plan.spilled and remark not in self.remarks:
            self.remarks.append(remark)

    # --- what stands ---

    @property
    def standing(self) -> Tensor:
        """-ln p of each counted token, [n], with the accepted edits. Raises TensorError if the model gives NaN."""
        if self._standing is None:
            (self._standing,) = self.nll([self.edits])
            if not bool(self._standing.isfinite().all()):
                raise TensorError("the model, as it is, gives NaN or infinity on the text: nothing to compare with")
        return self._standing

    def change(self, nll: Tensor) -> tuple[float, float]:
        """Of the mean -ln p, against what stands, and its standard error."""
        return paired(self.standing, nll, self.text.counts())

    def accept(self, edits: Edits, nll: Tensor) -> None:
        """From now on these edits stand; `nll` is what they gave."""
        self.edits, self._standing = dict(edits), nll

    def restore(self, rows: Sequence[Row]) -> None:
        """What an earlier run decided of matrices of one layer stands."""
        accepted = {row.slot: row.rank for row in rows if row.rank is not None}
        moments = None
        if accepted and self.method.norm == OUTPUT:
            moments = self.moments(int(next(iter(accepted)).layer or 0), list(accepted))
        for slot, rank in accepted.items():
            self.edits[slot] = self.truncate(self.analyse(slot, moments), rank)
            self._standing = None

    # --- one matrix ---

    def analyse(self, slot: Slot, moments: Moments | None = None) -> Analysis:
        """The matrix decomposed, where the model runs. Raises SpectrumError for NaN or Inf."""
        weight = self.source.read(slot).to(self.stream.device)
        try:
            return analyse(weight, self.method, moments.covariance(slot) if moments else None)
        except SpectrumError as error:
            raise SpectrumError(error.message, file=error.file, tensor=slot) from None

    def truncate(self, analysis: Analysis, rank: int) -> Place:
        """Set the matrix aside as it would be written at this rank."""
        return self.shelf.put(analysis.project(rank))

    def moments(self, index: int, slots: Sequence[Slot]) -> Moments:
        """Second moments of these slots of layer `index`, over the text. One layer pass."""
        self.reader.edits = {}
        states = self.boundaries[index]
        plan = self.stream.plan(self.lengths, copies=0, held=self._held + _moment_bytes(self.source, slots))
        self.stream.progress.start(f"layer {index}: inputs", states.tokens, "tok")
        for layer in self.stream.layers(index, index + 1, double=False):
            moments = Moments(layer, slots, self.routed)
            self.stream.through(layer, states, into=None, observer=moments, pass_tokens=plan.pass_tokens)
        self.stream.progress.finish()
        moments.forget_weights()
        self.layer_passes += 1
        return moments

    # --- sets of edits ---

    def nll(self, sets: Sequence[Edits]) -> list[Tensor]:
        """-ln p of each counted token of the text, [n] fp64 each, of the source with each set of edits.

        Each batch costs (layers from the first edited one of the batch on) x (sets) layer passes, and reads those
        layers once.
        """
        found: list[Tensor] = []
        while len(found) < len(sets):
            count = self._fitting(len(sets) - len(found))
            found += self._side_by_side(sets[len(found) : len(found) + count])
        return found

    def _fitting(self, wanted: int) -> int:
        """How many sets go at once: as many as memory holds the states of."""
        for count in range(min(wanted, self.batch), 0, -1):
            if not self.stream.plan(self.lengths, copies=count, held=self._held).spilled:
                return count
        return min(wanted, self.batch, _SPILLED_BATCH)

    def _side_by_side(self, sets: Sequence[Edits]) -> list[Tensor]:
        plan = self.stream.plan(self.lengths, copies=len(sets), held=self._held)
        self._remark(plan, "the hidden states of edited models")
        stream, last = self.stream, self.stream.config.num_layers
        common = dict(set.intersection(*(set(edits.items()) for edits in sets)))
        self.reader.edits = common  # read with the layer; the others are put in and taken out
        own = [{slot: place for slot, place in edits.items() if slot not in common} for edits in sets]
        first = min((int(slot.layer or 0) for edits in sets for slot in edits), default=last)
        begin = max(layer for layer in self.boundaries if layer <= first)
        targets = [self.stream.states(self.lengths, begin, spilled=plan.spilled) for _ in sets]
        stream.progress.start(
            f"layers {begin} on: {len(sets)} edits", len(sets) * sum(self.lengths) * (last - begin), "tok"
        )
        for layer in stream.layers(begin, last, double=plan.double):
            for edits, target in zip(own, targets, strict=True):
                source = self.boundaries[begin] if layer.index == begin else target
                with self._edited(layer, edits):
                    stream.through(layer, source, into=target, pass_tokens=plan.pass_tokens)
                self.layer_passes += 1
                target.layer = layer.index + 1
        stream.progress.finish()
        head = Head.load(self.reader, stream.device, stream.dtype)
        found = []
        for target in targets:
            found.append(self._score(target, head, plan))
            target.close()
        return found

    @contextmanager
    def _edited(self, layer: Layer, edits: Edits) -> Iterator[None]:
        here = [(layer.weight(slot), place) for slot, place in edits.items() if slot.layer == layer.index]
        kept = [live.clone() for live, _ in here]
        for live, place in here:
            live.copy_(self.shelf.get(place))
        yield
        for (live, _), weight in zip(here, kept, strict=True):
            live.copy_(weight)

    def _score(self, states: States, head: Head, plan: Plan) -> Tensor:
        rows, targets = self.text.rows(), self.text.targets()
        nll = torch.empty(len(rows), dtype=torch.float64)
        for at, logits in self.stream.logits(states, rows, head=head, chunk=plan.logit_rows):
            end = at + len(logits)
            nll[at:end] = token_nll(logits, targets[at:end].to(logits.device))
        return nll

    # --- the end ---

    def figure(self, held_out: Windows) -> Figure:
        """The accepted edits together on another text: L layer passes before, L after. The kept states are given up."""
        self.forget()
        self.reader.edits = {}
        before = measure(self.stream, held_out)
        self.reader.edits = self.edits
        after = measure(self.stream, held_out) if self.edits else before
        self.remarks += [remark for remark in before.remarks if remark not in self.remarks]
        self.layer_passes += self.stream.config.num_layers * (2 if self.edits else 1)
        ln_ratio, error = paired(before.nll, after.nll, held_out.counts())
        return Figure(len(before.nll), before.perplexity, after.perplexity, ln_ratio, error)

    def forget(self) -> None:
        for states in self.boundaries.values():
            states.close()
        self.boundaries.clear()

    def close(self) -> None:
        """Give memory and disk back."""
        self.forget()
        self.shelf.close()


def _moment_bytes(reader: Reader, slots: Sequence[Slot]) -> int:
    """Of the sums of `Moments`, fp32, as if none were shared."""
    return sum(4 * min(reader.config.shape(slot.role)) ** 2 for slot in slots)
