"""Options of `laser` and `spectrum` that contradict each other, told before anything is read."""

from __future__ import annotations

from typing import Any

from ...errors import UsageError
from ...machine import parse_size


def expect_consistent(
    *, search: str | None = None, text: object = None, held_out: object = None, rank_rule: str | None = None,
    norm: str = "weights", budget: float | None = None, layer_floor: float | None = None, sequential: bool = False,
    damping: float = 1e-4, routed: bool = False, exact: bool = False, max_shard_size: str | int = 0, **_: Any,
) -> None:  # fmt: skip
    """Raises UsageError for options of `laser` that contradict each other, or a value that is none."""
    from .budget import check_shares
    from .selection import Options

    parse_size(max_shard_size, "max_shard_size")
    if search is None and held_out is not None:
        raise UsageError("--held-out is the text of a search's final figure; give it with --search")
    if search is not None and (text is None or held_out is None):
        raise UsageError("--search needs --text FILE to choose by and --held-out FILE for the final figure")
    if search == "laserrmt" and rank_rule not in (None, "laserrmt"):
        raise UsageError("--search laserrmt takes LaserRMT's own threshold; leave out --rank-rule")
    if norm == "output" and text is None:
        raise UsageError("--norm output is the norm of the outputs over a text: give it --text FILE")
    if norm != "output" and (sequential or routed):
        name = "sequential" if sequential else "routed"
        raise UsageError(f"--{name} is about the inputs over a text: it goes with --norm output")
    if budget is not None and (rank_rule is not None or search is not None):
        raise UsageError(f"--budget chooses the ranks itself: leave out --{'search' if search else 'rank-rule'}")
    if budget is None and layer_floor is not None:
        raise UsageError("--layer-floor bounds each layer's share of --budget; give it with one")
    if search is not None and sequential:
        raise UsageError("--search judges each edit on the source's own inputs: leave out --sequential")
    options = Options("all", rank_rule=rank_rule, exact=exact, norm=norm, damping=damping, budget=budget,
                      layer_floor=layer_floor)  # fmt: skip
    if budget is not None:
        check_shares(budget, options.floor)
    options.method.require(text is not None)
