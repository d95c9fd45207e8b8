"""Which samples of a text are taken, where there are more than are asked for."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

from ..errors import UsageError

SAMPLINGS = ("spread", "start", "random")


class Sampling(NamedTuple):
    """`name`: "spread" evenly, the first from the "start", or "random" by a seed."""

    name: str = "spread"
    seed: int | None = None

    @classmethod
    def of(cls, name: str | None, seed: int | None) -> Sampling:
        """Random where only a seed is given, with seed 0 where only that is asked for; spread where nothing is.

        Raises UsageError for a sampling that there is not, and for a seed that would do nothing.
        """
        if name not in {None, *SAMPLINGS}:
            raise UsageError(f"sampling {name!r} is not one of {', '.join(SAMPLINGS)}")
        if seed is None:
            return cls(name, 0) if name == "random" else cls(name or "spread")
        if name not in {None, "random"}:
            raise UsageError(f"a seed belongs to random sampling, not to {name}")
        if seed < 0:  # Python takes its absolute value
            raise UsageError(f"seed {seed}: take 0 or more")
        return cls("random", seed)

    def choose(self, count: int, there: int) -> list[int]:
        """`count` of range(there), ascending."""
        if self.name == "spread":
            return [index * there // count for index in range(count)]
        return sorted(itertools.islice(self.order(there), count))

    def order(self, there: int) -> Iterator[int]:
        """All of range(there): at random, else ascending.

        The shuffle is Fisher and Yates's by random.Random(seed).random(), which Python promises to give the same on
        every machine and in every version; of its other functions it does not.
        """
        if self.name != "random":
            yield from range(there)
            return
        draw, moved = random.Random(self.seed).random, dict[int, int]()  # what lies where, if not its own number
        for index in range(there):
            other = index + int(draw() * (there - index))
            here = moved.pop(index, index)
            if other == index:
                yield here
            else:
                yield moved.get(other, other)
                moved[other] = here

    def record(self) -> dict[str, Any]:
        """Nothing for spread, which records from before there was a choice mean."""
        if self.name == "spread":
            return {}
        return {"sampling": self.name} | ({} if self.seed is None else {"seed": self.seed})
