"""Counting how long things take. Rule: pure; `observe` costs a search among some ten bounds and three additions,
and whoever reads gets a copy of one moment.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

# Upper bounds in seconds. What comes from memory takes microseconds, what waits for Glance up to a deadline.
MEMORY_S = (5e-6, 10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 5e-3, 25e-3)
WAIT_S = (250e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Counted(NamedTuple):
    """A histogram at one moment: for each bound how many were no greater, how many there were, and their sum."""

    bounds: tuple[float, ...]
    up_to: tuple[int, ...]
    total: int
    sum: float


class Histogram:
    """Of values by ascending upper `bounds`; each counts what is no greater, as Prometheus has it."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float] = WAIT_S) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    @property
    def count(self) -> int:
        return sum(self._counts)

    def now(self) -> Counted:
        up_to = tuple(accumulate(self._counts))
        return Counted(self._bounds, up_to[:-1], up_to[-1], self._sum)


class Timed:
    """Reads of one kind: how long they took, and how many bytes they gave."""

    __slots__ = ("bytes", "seconds")

    def __init__(self, bounds: Sequence[float] = WAIT_S) -> None:
        self.seconds = Histogram(bounds)
        self.bytes = 0
