"""How much at once: requests, and the memory that they receive into. Rule: of a flight nothing counts here but how
urgent it is, how important its image, and when it came; what it fetches is no reason.
"""

from __future__ import annotations

import heapq
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from cachefs.flights import Flight, Priority, Slab
from cachefs.huge import place
from cachefs.plan.extents import PAGE, ceil

# Among equally urgent ones, an image of one rank goes before one of the next that came up to so much earlier:
# longer than flights wait before they ask an origin again that was away, and so short that nobody waits for ever.
HEAD_START_S = 10.0


# Of the places that are reserved for demand.
TRACE_RESERVED_MAX = 1


@dataclass(order=True)
class _Waiter:
    priority: Priority
    since_s: float  # When it came, and later the less its image matters: see HEAD_START_S.
    order: int
    flight: Flight = field(compare=False)
    n: int = field(compare=False)
    event: trio.Event = field(compare=False, default_factory=trio.Event)


class Bound:
    """`total` of something, for flights to take and give back: the most urgent first; among equally urgent ones
    first come first served, with a head start by the image's rank. The last `reserved` are for demand alone, so
    that reading ahead never makes a guest wait."""

    def __init__(self, total: int, reserved: int = 0) -> None:
        self.free = self.total = self._width = total
        self._reserved = reserved
        self._waiting: list[_Waiter] = []
        self._order = itertools.count()
        self.on_demand_waits: Callable[[], None] = lambda: None  # A guest's flight has to wait from now on.

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    @property
    def is_wanted_by_demand(self) -> bool:
        """Whether a flight waits that a guest waits for."""
        return bool(self._waiting) and self._waiting[0].priority is Priority.DEMAND

    def take_now(self, n: int) -> bool:
        """Takes `n` for demand if that keeps nobody waiting."""
        if self._waiting or n > self.free:
            return False
        self.free -= n
        return True

    async def take(self, flight: Flight, n: int = 1) -> None:
        """Returns when the flight has `n`."""
        since_s = trio.current_time() + flight.rank * HEAD_START_S
        waiter = _Waiter(flight.priority, since_s, next(self._order), flight, n)
        heapq.heappush(self._waiting, waiter)
        self._serve()  # Even when others wait: they may wait for what demand need not wait for.
        self._tell_of_demand()
        try:
            await waiter.event.wait()
        except trio.Cancelled:
            if waiter.event.is_set():
                self.give_back(n)
            else:
                self._waiting.remove(waiter)
                heapq.heapify(self._waiting)
                self._serve()  # It may have been the first, and in the way of others.
            raise

    def give_back(self, n: int = 1) -> None:
        self.free += n
        self._serve()

    def reorder(self) -> None:
        """Some flight is more urgent than it was when it came."""
        for waiter in self._waiting:
            waiter.priority = waiter.flight.priority
        heapq.heapify(self._waiting)
        self._serve()
        self._tell_of_demand()

    def narrow(self, width: int) -> None:
        """No more than `width` are given away at once, until the next word."""
        self._width = width
        self._serve()

    def _tell_of_demand(self) -> None:
        if self.is_wanted_by_demand:
            self.on_demand_waits()

    def _serve(self) -> None:
        while self._waiting and self._may(self._waiting[0]):
            waiter = heapq.heappop(self._waiting)
            self.free -= waiter.n
            waiter.event.set()

    def _reserved_from(self, priority: Priority) -> int:
        if priority is Priority.DEMAND:
            return 0
        # What a boot trace brings a guest is about to wait for: one place is kept from it, however many there are.
        return min(self._reserved, TRACE_RESERVED_MAX) if priority is Priority.TRACE else self._reserved

    def _may(self, waiter: _Waiter) -> bool:
        reserved = min(self._reserved_from(waiter.priority), self._width - 1)
        return waiter.n <= self.free - (self.total - self._width) - reserved


class Memory:
    """A bound on the bytes of all slabs, and the place that they come from. Whole spans are used again: faulting
    in 4 MiB takes as long as receiving it.

    `reclaim` is told how much is lacking, and gives something back that is only nice to have; False when there is
    nothing.
    """

    def __init__(self, total: int, span_size: int, reclaim: Callable[[int], bool]) -> None:
        self.bound = Bound(total)
        self._reclaim = reclaim
        self._span_size = span_size
        self._spare: list[mmap.mmap] = []
        self._parts: dict[int, int] = {}  # Of places that were split: how many slabs are in one.

    async def slab(self, flight: Flight, start: int, length: int) -> Slab:
        """Room for `length` bytes, in whole pages; zeros behind them."""
        size = self._size(length)
        while size > self.bound.free and self._reclaim(size - self.bound.free):
            pass
        await self.bound.take(flight, size)
        return self._made(start, length, size)

    def slab_now(self, start: int, length: int) -> Slab | None:
        """The same, or None where that would have to wait."""
        size = self._size(length)
        return self._made(start, length, size) if self.bound.take_now(size) else None

    def split(self, slab: Slab, end: int, start: int) -> Slab | None:
        """What lies between `end` and `start`, offsets of the view, is in no slab from now on. Returns the slab
        behind it; None where `slab` ended there."""
        behind = None
        if start < slab.end:
            behind = Slab(start, slab.end - start, slab.data[start - slab.start :], loose=slab.loose)
            self._parts[id(slab.data.obj)] = self._parts.get(id(slab.data.obj), 1) + 1
        slab.length = end - slab.start
        slab.data = slab.data[: slab.length]
        return behind

    def drop(self, slab: Slab) -> None:
        """Nobody looks at the slab any more: readers copy out of it, and the store is done with it."""
        whole = slab.data.obj
        assert isinstance(whole, mmap.mmap)
        if id(whole) in self._parts:
            self._parts[id(whole)] -= 1
            if self._parts[id(whole)]:
                return
            del self._parts[id(whole)]
        elif not slab.loose and len(whole) == self._span_size:
            self._spare.append(whole)
        self.bound.give_back(len(whole))

    def reorder(self) -> None:
        """Some flight is more urgent than it was when it came."""
        self.bound.reorder()

    @property
    def used(self) -> int:
        return self.bound.total - self.bound.free

    @property
    def is_wanted(self) -> bool:
        return self.bound.is_wanted

    def _size(self, length: int) -> int:
        pages = ceil(length, PAGE)
        return self._span_size if pages > self._span_size // 2 else pages

    def _made(self, start: int, length: int, size: int) -> Slab:
        # Of the kernel's own pages, which it zeroes as they are received into: in a thread, and not on the loop.
        whole = self._spare.pop() if size == self._span_size and self._spare else place(size)
        while self._spare and self.used + len(self._spare) * self._span_size > self.bound.total:
            self._spare.pop()
        pages = ceil(length, PAGE)
        data = memoryview(whole)[:pages]
        if length < pages:
            data[length:] = bytes(pages - length)
        return Slab(start, length, data)
