"""How much at once: requests, and the memory that they receive into. Rule: of a flight nothing counts here but how
urgent it is and when it came; what it fetches is no reason.
"""

from __future__ import annotations

import heapq
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from cachefs.flights import Flight, Priority, Slab
from cachefs.plan.extents import PAGE, ceil


@dataclass(order=True)
class _Waiter:
    priority: Priority
    order: int
    flight: Flight = field(compare=False)
    n: int = field(compare=False)
    event: trio.Event = field(compare=False, default_factory=trio.Event)


class Bound:
    """`total` of something, for flights to take and give back: the most urgent first, first come first served
    among equals. The last `reserved` are for demand alone, so that reading ahead never makes a guest wait."""

    def __init__(self, total: int, reserved: int = 0) -> None:
        self.free = self.total = total
        self._reserved = reserved
        self._waiting: list[_Waiter] = []
        self._order = itertools.count()

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits."""
        return bool(self._waiting)

    def take_now(self, n: int) -> bool:
        """Takes `n` for demand if that keeps nobody waiting."""
        if self._waiting or n > self.free:
            return False
        self.free -= n
        return True

    async def take(self, flight: Flight, n: int = 1) -> None:
        """Returns when the flight has `n`."""
        waiter = _Waiter(flight.priority, next(self._order), flight, n)
        heapq.heappush(self._waiting, waiter)
        self._serve()  # Even when others wait: they may wait for what demand need not wait for.
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

    def _serve(self) -> None:
        while self._waiting and self._may(self._waiting[0]):
            waiter = heapq.heappop(self._waiting)
            self.free -= waiter.n
            waiter.event.set()

    def _may(self, waiter: _Waiter) -> bool:
        return waiter.n <= self.free - (0 if waiter.priority is Priority.DEMAND else self._reserved)


class Memory:
    """A bound on the bytes of all slabs, and the place that they come from. Whole spans are used again: faulting
    in 4 MiB takes as long as receiving it.

    `reclaim` gives something back that is only nice to have; False when there is nothing.
    """

    def __init__(self, total: int, span_size: int, reclaim: Callable[[], bool]) -> None:
        self._bytes = Bound(total)
        self._reclaim = reclaim
        self._span_size = span_size
        self._spare: list[mmap.mmap] = []

    async def slab(self, flight: Flight, start: int, length: int) -> Slab:
        """Room for `length` bytes, in whole pages; zeros behind them."""
        size = self._size(length)
        while size > self._bytes.free and self._reclaim():
            pass
        await self._bytes.take(flight, size)
        return self._made(start, length, size)

    def slab_now(self, start: int, length: int) -> Slab | None:
        """The same, or None where that would have to wait."""
        size = self._size(length)
        return self._made(start, length, size) if self._bytes.take_now(size) else None

    def drop(self, slab: Slab) -> None:
        """Nobody looks at the slab any more: readers copy out of it, and the store is done with it."""
        whole = slab.data.obj
        assert isinstance(whole, mmap.mmap)
        if not slab.loose and len(whole) == self._span_size:
            self._spare.append(whole)
        self._bytes.give_back(len(whole))

    def reorder(self) -> None:
        """Some flight is more urgent than it was when it came."""
        self._bytes.reorder()

    @property
    def used(self) -> int:
        return self._bytes.total - self._bytes.free

    @property
    def is_wanted(self) -> bool:
        return self._bytes.is_wanted

    def _size(self, length: int) -> int:
        pages = ceil(length, PAGE)
        return self._span_size if pages > self._span_size // 2 else pages

    def _made(self, start: int, length: int, size: int) -> Slab:
        # Of the kernel's own pages, which it zeroes as they are received into: in a thread, and not on the loop.
        whole = (
            self._spare.pop()
            if size == self._span_size and self._spare
            else mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        )
        while self._spare and self.used + len(self._spare) * self._span_size > self._bytes.total:
            self._spare.pop()
        pages = ceil(length, PAGE)
        data = memoryview(whole)[:pages]
        if length < pages:
            data[length:] = bytes(pages - length)
        return Slab(start, length, data)
