"""Flights: what one fetch is, what of it has arrived, and who waits for more. Rule: a flight is told what happens
to it; nothing here asks the origin, or the store, for anything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

import trio

from cachefs.errors import OriginError
from cachefs.plan.extents import Extent
from cachefs.plan.windows import NEVER
from cachefs.store.view import StoredView


class Priority(IntEnum):
    """Who is served first: the least."""

    DEMAND = 0
    READAHEAD = 1
    TRACE = 2
    HYDRATION = 3


@dataclass(eq=False)
class Slab:
    """A piece of a flight within one span. `data` is whole pages; `filled` bytes of it have arrived."""

    start: int
    length: int
    data: memoryview
    filled: int = 0
    loose: bool = False  # A thread that was left behind may still write into it: not to be used again.

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(eq=False)
class Flight:
    """One fetch: `extent` of `view`; everything before `at` has arrived."""

    view: StoredView
    extent: Extent
    priority: Priority
    whole: bool = False  # One stream of the whole image, which begins at its first byte again on each try.
    at: int = 0
    slabs: list[Slab] = field(default_factory=list)
    waiting: list[tuple[int, trio.Event]] = field(default_factory=list)
    wanted: int = NEVER  # The least offset that somebody waits for.
    error: OriginError | None = None
    started: bool = False
    over: bool = False
    needs: set[Flight] = field(default_factory=set)  # What it is made of, and waits for.
    unwanted: bool = False  # What comes of it in the background is not to be kept.
    rank: int = 1  # How important its image is: 0 critical, 1 normal, 2 low.
    in_passing: bool = False  # What it brings will be read once, in order, and not again soon.
    traced: bool = False  # It brings a part of a boot trace, whoever waits for it by now.
    ended: trio.Event = field(default_factory=trio.Event)
    landed: trio.Event = field(default_factory=trio.Event)  # Over, and the store has or refused all that came.

    def __post_init__(self) -> None:
        self.at = self.extent.start
        self.traced = self.priority is Priority.TRACE
        self.in_passing |= self.whole

    def brings(self, offset: int) -> bool:
        """Whether the byte at `offset` is still to come."""
        return not self.over and self.at <= offset < self.extent.end

    def slab_at(self, offset: int) -> Slab | None:
        """The slab in which the byte at `offset` has arrived."""
        for slab in self.slabs:
            if slab.start <= offset < slab.start + slab.filled:
                return slab
        return None

    async def wait_for(self, offset: int) -> None:
        """Returns when the bytes before `offset` have arrived, or the flight is over; raises its error anew."""
        if not self.over and self.at < min(offset, self.extent.end):
            entry = (min(offset, self.extent.end), trio.Event())
            self.waiting.append(entry)
            self.wanted = min(self.wanted, entry[0])
            try:
                await entry[1].wait()
            finally:
                if entry in self.waiting:  # The reader went away.
                    self.waiting.remove(entry)
        if self.error is not None and self.at < offset:
            raise self.error.again()

    def wake(self) -> None:
        """Whoever waits for what is here now, or will never be, goes on."""
        if self.waiting:
            still = []
            for until, event in self.waiting:
                if self.over or until <= self.at or self.at >= self.extent.end:
                    event.set()
                else:
                    still.append((until, event))
            self.waiting = still
            self.wanted = min((until for until, _ in still), default=NEVER)


@dataclass
class Counts:
    """Of all flights since the start, for `status`."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    failures: int = 0
