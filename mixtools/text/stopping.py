"""Where a text stops: at the first of some strings, which may be spread over several pieces of it."""

from __future__ import annotations

from collections.abc import Sequence


class Until:
    """Passes a text on, piece by piece, up to where one of `stops` is complete; the stop itself is left out.

    What might be the beginning of a stop is held back until it is decided. How the text is cut into pieces makes no
    difference; of stops that end at the same place the longest counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """`stops`: none of them empty."""
        self.done = False
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> str:
        """The text that is now known to be no part of a stop. After the stop, nothing."""
        if self.done:
            return ""
        self._held += piece
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.done = True
            return self._let_go(min(found)[1])
        longest = max((self._begun(stop) for stop in self._stops), default=0)
        return self._let_go(len(self._held) - longest)

    def finish(self) -> str:
        """What was held back, at the end of the text."""
        return "" if self.done else self._let_go(len(self._held))

    def _begun(self, stop: str) -> int:
        """How many characters at the end of the held text are the beginning of `stop`."""
        most = min(len(stop) - 1, len(self._held))
        return next((size for size in range(most, 0, -1) if self._held.endswith(stop[:size])), 0)

    def _let_go(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        return text
