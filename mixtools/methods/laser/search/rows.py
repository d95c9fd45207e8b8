"""What a search is asked and what it answers: options, a row for each candidate, and the figure at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ....errors import UsageError
from ....linalg.weighted import DAMPING
from ....names import Role, Slot
from ..figures import OUTPUT, WEIGHTS
from ..method import Options

METHODS = ("gain", "laserrmt")
_RULES = {
    WEIGHTS: ("mp", "gavish-donoho", "activation=0.02", "activation=0.1"),
    OUTPUT: ("activation=0.01", "activation=0.03", "activation=0.1"),
}


@dataclass(frozen=True)
class SearchOptions:
    """How to search.

    method: `gain`, or `laserrmt` for LaserRMT's published way. Of `gain` alone: norm, damping and routed, as of
    `mixtools laser`; rank_rules, whose ranks are tried (None: those of the norm); max_error, the largest share of the
    layer's output energy that a rank may lose and still be evaluated; margin, how many standard errors the text must
    gain before an edit stays (by chance one edit in 6 without any effect passes at 1, one in 44 at 2, one in 740 at
    3); min_tokens, below which a matrix is starved: too few tokens reach it to judge an edit. Of `laserrmt` alone:
    lowest, how many matrices of lowest SNR are tried. batch: edits that are evaluated at once, at most; memory may
    make them fewer.
    """

    method: str = "gain"
    rank_rules: tuple[str, ...] | None = None
    max_error: float = 0.3
    margin: float = 2.0
    min_tokens: int = 100
    lowest: int = 15
    batch: int = 16
    norm: str = WEIGHTS
    damping: float = DAMPING
    routed: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for what cannot be."""
        if self.method not in METHODS:
            raise UsageError(f"search {self.method!r} is not one of {', '.join(METHODS)}")
        self.for_matrix()
        if self.norm == OUTPUT and self.method != "gain":
            raise UsageError("--search laserrmt is LaserRMT's way, in the weights' norm: leave out --norm output")
        if not self.rules:
            raise UsageError("a search needs at least one rank rule")
        for rule in self.rules:
            self.for_matrix(rule)
        if not 0.0 < self.max_error <= 1.0:
            raise UsageError(f"search: max_error={self.max_error:g} is a share of the output's energy, above 0 up to 1")
        if not (math.isfinite(self.margin) and self.margin >= 0):
            raise UsageError(f"search: margin={self.margin:g} counts standard errors, 0 or more")
        for name in ("min_tokens", "lowest", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"search: {name}={getattr(self, name)} is below 1")

    @property
    def rules(self) -> tuple[str, ...]:
        return _RULES.get(self.norm, ()) if self.rank_rules is None else self.rank_rules

    def for_matrix(self, rule: str = "activation=0.1") -> Options:
        """How one matrix is decomposed. Raises UsageError for a norm, a damping or a rule that cannot be."""
        return Options.parse(rule, norm=self.norm, damping=self.damping)


@dataclass(frozen=True)
class Trial:
    """One rank of one matrix.

    layer_error: share of the linear's output energy that is lost over the text. delta_nll: mean change of -ln p per
    token, with its paired standard error over sequences, of this edit alone beside those that stood already. None:
    not measured.
    """

    rank: int
    layer_error: float | None = None
    delta_nll: float | None = None
    stderr: float | None = None


@dataclass(frozen=True)
class Row:
    """What was decided of one matrix, and why. `rank`: the rank that stays, None where the matrix does.

    tokens: of the text, that reach it; snr: LaserRMT's. None where the method does not ask.
    """

    slot: Slot
    accepted: bool
    why: str
    rank: int | None = None
    trials: tuple[Trial, ...] = ()
    tokens: int | None = None
    snr: float | None = None

    @property
    def best(self) -> Trial | None:
        """The trial that stays, or else the measured one of the lowest change, if any."""
        for trial in self.trials:
            if self.accepted and trial.rank == self.rank:
                return trial
        measured = [trial for trial in self.trials if trial.delta_nll is not None]
        return min(measured, key=lambda trial: float(trial.delta_nll or 0.0)) if measured else None

    def document(self) -> dict[str, Any]:
        """Ready for JSON; from_document() reads it. Infinities and NaN become None."""
        slot = {"role": self.slot.role.value, "layer": self.slot.layer, "expert": self.slot.expert}
        trials = [{name: _finite(value) for name, value in asdict(trial).items()} for trial in self.trials]
        return {
            "slot": slot, "accepted": self.accepted, "why": self.why, "rank": self.rank, "trials": trials,
            "tokens": self.tokens, "snr": _finite(self.snr),
        }  # fmt: skip

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Row:
        where = document["slot"]
        return cls(
            Slot(Role(where["role"]), where["layer"], where["expert"]),
            document["accepted"],
            document["why"],
            document["rank"],
            tuple(Trial(**trial) for trial in document["trials"]),
            document["tokens"],
            document["snr"],
        )


@dataclass(frozen=True)
class Figure:
    """All accepted edits together, on text that was not used for choosing. stderr: of ln_ratio, paired, by sequence."""

    tokens: int
    perplexity_before: float
    perplexity_after: float
    ln_ratio: float
    stderr: float

    def document(self) -> dict[str, Any]:
        return {name: _finite(value) for name, value in asdict(self).items()}


@dataclass(frozen=True)
class SearchResult:
    """edits: accepted matrices and their ranks. layer_passes: how often all sequences of a text went through a layer.

    remarks: what was given up to stay within the memory allowed.
    """

    edits: dict[Slot, int]
    rows: tuple[Row, ...]
    held_out: Figure
    layer_passes: int
    remarks: tuple[str, ...] = field(default=())

    def document(self) -> dict[str, Any]:
        return {
            "accepted": len(self.edits), "candidates": len(self.rows), "held_out": self.held_out.document(),
            "layer_passes": self.layer_passes, "rows": [row.document() for row in self.rows],
            "remarks": list(self.remarks),
        }  # fmt: skip


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
