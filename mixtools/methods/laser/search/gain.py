"""Edits chosen by measured gain, from the last layer to the first.

    layer i ─► moments ─► layer error of every rank ─► trials ─► each alone, side by side ─► best rank of each matrix
                                                                                             │
               accepted edits of layer i ◄─ best prefix ◄─ the best, the best two, ... ◄─────┘

What was accepted in later layers stays in force. An edit stays if the text's mean -ln p falls by `margin` standard
errors of the paired change. Edits that help alone may hinder each other, so those of one layer are judged again
together, best first. With L layers, t trials and h matrices that help in layer i, that layer costs
1 + (t + h)(L - i) layer passes, beside as many before the first as there are layers below the last candidate, and
L - i once for the model as it is. A layer's trials lie in a temporary file: 117 MB each for an expert matrix of 8x7B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ....inference.calibrate import Moments
from ....linalg.rules import parse_rule
from ....names import Slot
from .bench import Bench
from .rows import Row, SearchOptions, Trial
from .shelf import Place


@dataclass
class _Candidate:
    """A matrix on its way to a row. `row` is set once it is decided; `places` hold its trials' weights, by rank."""

    slot: Slot
    tokens: int
    trials: dict[int, Trial]
    places: dict[int, Place]
    row: Row | None = None

    def reject(self, why: str) -> None:
        self.row = Row(self.slot, False, why, trials=tuple(self.trials.values()), tokens=self.tokens)

    def accept(self, rank: int, why: str) -> None:
        self.row = Row(self.slot, True, why, rank, tuple(self.trials.values()), self.tokens)


def gain(bench: Bench, slots: Sequence[Slot], options: SearchOptions, done: Mapping[Slot, Row]) -> Iterator[Row]:
    """A row for each slot, as it is decided. A layer whose rows are not all in `done` is judged anew."""
    for index in sorted({int(slot.layer or 0) for slot in slots}, reverse=True):
        here = [slot for slot in slots if slot.layer == index]
        if all(slot in done for slot in here):
            bench.restore([done[slot] for slot in here])
            yield from (done[slot] for slot in here)
        else:
            yield from _LayerSearch(bench, options, index).run(here)


class _LayerSearch:
    """The candidates of one layer, beside the edits that stand in later ones."""

    def __init__(self, bench: Bench, options: SearchOptions, index: int) -> None:
        self.bench, self.options, self.index = bench, options, index

    def run(self, slots: Sequence[Slot]) -> Iterator[Row]:
        moments = self.bench.moments(self.index, slots)
        candidates = [self._screen(slot, moments) for slot in slots]
        del moments
        self._measure(candidates)
        self._join([candidate for candidate in candidates if candidate.row is None])
        for candidate in candidates:
            for rank, place in candidate.places.items():
                if candidate.row is None or candidate.row.rank != rank:
                    self.bench.shelf.drop(place)
            assert candidate.row is not None
            yield candidate.row

    # --- one matrix ---

    def _screen(self, slot: Slot, moments: Moments) -> _Candidate:
        """Its ranks and their layer errors; those worth a run are set aside as weights."""
        tokens, least = moments.tokens[slot], self.options.min_tokens
        candidate = _Candidate(slot, tokens, {}, {})
        if tokens < least:
            candidate.reject(f"starved: {tokens:,} tokens of the text reach it, at least {least:,} are asked for")
            return candidate
        analysis = self.bench.analyse(slot, moments)
        full, lost = analysis.numerical_rank, analysis.lost
        assert lost is not None
        ranks = sorted({analysis.rank(parse_rule(rule)) for rule in self.options.rules})
        lower = [rank for rank in ranks if rank < full]
        candidate.trials = {rank: Trial(rank, float(lost[rank])) for rank in lower}
        chosen = [rank for rank in lower if lost[rank] <= self.options.max_error]
        if not lower:
            candidate.reject(f"no rule lowers its rank of {full}")
        elif not chosen:
            why = f"screened: the mildest, rank {lower[-1]}, loses {lost[lower[-1]]:.1%} of the layer's output energy"
            candidate.reject(f"{why}, at most {self.options.max_error:.1%} is tried")
        candidate.places = {rank: self.bench.truncate(analysis, rank) for rank in chosen}
        return candidate

    def _measure(self, candidates: Sequence[_Candidate]) -> None:
        """Every trial of the layer alone; what does not help is rejected."""
        trials = [(candidate, rank) for candidate in candidates for rank in candidate.places]
        sets = [{**self.bench.edits, candidate.slot: candidate.places[rank]} for candidate, rank in trials]
        for (candidate, rank), nll in zip(trials, self.bench.nll(sets), strict=True):
            delta, error = self.bench.change(nll)
            candidate.trials[rank] = dataclasses.replace(candidate.trials[rank], delta_nll=delta, stderr=error)
        for candidate in candidates:
            if candidate.row is None and self._best(candidate) is None:
                candidate.reject(f"no gain of {_errors(self.options.margin)} or more")

    def _best(self, candidate: _Candidate) -> Trial | None:
        """The trial of the lowest -ln p among those that help; of equals, the lowest rank."""
        helps = [trial for trial in candidate.trials.values() if self._helps(trial.delta_nll, trial.stderr)]
        return min(helps, key=lambda trial: (trial.delta_nll, trial.rank), default=None)

    def _helps(self, delta: float | None, error: float | None) -> bool:
        # NaN compares false; a change of nothing at all is no gain
        return delta is not None and error is not None and delta < 0 and delta <= -self.options.margin * error

    # --- the matrices of a layer together ---

    def _join(self, candidates: Sequence[_Candidate]) -> None:
        """Of the best edit, the best two, ..., keep the set that gains most."""
        pairs = [(candidate, best) for candidate in candidates if (best := self._best(candidate))]
        pairs.sort(key=lambda pair: (pair[1].delta_nll, pair[0].slot.role.value, pair[0].slot.expert or 0))
        if not pairs:
            return
        sets = [dict(self.bench.edits)]
        for candidate, trial in pairs:
            sets.append({**sets[-1], candidate.slot: candidate.places[trial.rank]})
        nlls = self.bench.nll(sets[1:])
        changes = [self.bench.change(nll) for nll in nlls]
        # the first was measured alone already and helps, so that there is always one
        kept = min((i for i in range(len(pairs)) if self._helps(*changes[i])), key=lambda i: changes[i][0])
        for place, (candidate, trial) in enumerate(pairs):
            if place <= kept:
                candidate.accept(trial.rank, _gained(trial, self.options.margin))
            else:
                candidate.reject("helps alone, but not beside the better edits of its layer")
        self.bench.accept(sets[kept + 1], nlls[kept])


def _gained(trial: Trial, margin: float) -> str:
    change = f"{-(trial.delta_nll or 0.0):.3g} ± {trial.stderr or 0.0:.2g}"
    return f"gains {change} a token: {_errors(margin)} or more"


def _errors(margin: float) -> str:
    return f"{margin:g} standard error{'' if margin == 1 else 's'}"
