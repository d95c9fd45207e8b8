"""Where a text stops, against the whole text searched at once."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mixtools.text.stopping import Until


def cut(text: str, stops: list[str]) -> str:
    """Up to the stop that is complete first, of those the longest."""
    for end in range(1, len(text) + 1):
        sizes = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if sizes:
            return text[: end - max(sizes)]
    return text


PIECES = st.lists(st.text(alphabet="ab\n", max_size=4), max_size=12)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), max_size=3)


@given(pieces=PIECES, stops=STOPS)
def test_any_cut_into_pieces_gives_what_the_whole_text_gives(pieces: list[str], stops: list[str]) -> None:
    until, shown = Until(stops), ""
    for piece in pieces:
        shown += until.push(piece)
    whole = "".join(pieces)
    assert until.done == any(stop in whole for stop in stops)
    assert shown + until.finish() == cut(whole, stops)


def test_only_what_may_be_a_stop_is_held_back() -> None:
    until = Until(["\n\nUser:", "END"])
    assert [until.push(piece) for piece in ("Hi E", "N", "x\n", "\n", "Us", "age\n\n", "User", ":", "more")] == [
        "Hi ", "", "ENx", "", "", "\n\nUsage", "", "", "",
    ]  # fmt: skip
    assert until.done and until.finish() == ""


def test_an_undecided_end_is_let_go() -> None:
    until = Until(["stop"])
    assert (until.push("a sto"), until.done, until.finish(), until.finish()) == ("a ", False, "sto", "")


@pytest.mark.parametrize("stops", [[], ["absent"]])
def test_without_a_stop_everything_passes(stops: list[str]) -> None:
    until = Until(stops)
    assert [until.push("one"), until.push(" two"), until.finish()] == ["one", " two", ""]
