"""Bytes on their way: what has arrived of flights, until the store has it. Rule: bytes go in at one end and out at
the other; nothing here decides which are asked for, or when.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from cachefs.bounds import Memory
from cachefs.errors import OriginLied, OriginUnavailable
from cachefs.flights import Counts, Flight, Priority, Slab
from cachefs.plan.extents import BLOCK, PAGE, Extent, ceil
from cachefs.store.content import Store
from cachefs.store.format import ViewKind

# What is fetched in the background gives way to guests so long at a time, and looks so often whether it must.
GIVE_WAY_S, GIVE_WAY_LOOK_S = 5.0, 0.02
TRANSLATED_SLAB_MAX = 4 << 20
OFFER_AGAIN_S = 10.0  # Longer than the store's own pause after it was full.


class Arriving:
    """The slabs of all flights. `emptied` is told when a flight has one less, `spawn` runs what nobody waits for.

    What the store did not take is kept as long as nothing else needs the memory: a sequential reader would
    otherwise have each window fetched again and again.
    """

    def __init__(
        self,
        store: Store,
        memory_max: int,
        counts: Counts,
        emptied: Callable[[Flight], None],
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._store, self.counts, self._emptied, self._spawn = store, counts, emptied, spawn
        self.memory = Memory(max(memory_max, store.span_size), store.span_size, self._drop_unkept)
        self._unkept: deque[tuple[Flight, Slab]] = deque()  # Oldest first.
        self._offering = False
        self.guests_wait: Callable[[], bool] = lambda: False
        self.stopping = False  # What the store refuses from then on is let go at once.

    @property
    def unkept(self) -> int:
        """Bytes in memory that the store did not take."""
        return sum(len(slab.data) for _, slab in self._unkept)

    async def slab(self, flight: Flight, start: int) -> Slab:
        """The flight's next one, from `start` to the end of the span."""
        slab = await self.memory.slab(flight, start, self._length(flight, start))
        flight.slabs.append(slab)
        return slab

    def slab_now(self, flight: Flight, start: int) -> Slab | None:
        """The same, or None where that would have to wait."""
        slab = self.memory.slab_now(start, self._length(flight, start))
        if slab is not None:
            flight.slabs.append(slab)
        return slab

    def _length(self, flight: Flight, start: int) -> int:
        span = self._store.span_size
        length = min(start - start % span + span, flight.extent.end) - start
        # A translation keeps its slab while its tables are fetched, which need memory too.
        return length if flight.view.record.kind is ViewKind.ORIGINAL else min(length, TRANSLATED_SLAB_MAX)

    def drop(self, flight: Flight, slab: Slab) -> None:
        flight.slabs.remove(slab)
        self.memory.drop(slab)
        self._emptied(flight)

    def drop_unfilled(self, flight: Flight) -> None:
        for slab in list(flight.slabs):
            if not slab.filled:
                self.drop(flight, slab)

    def keep(self, flight: Flight, slab: Slab) -> None:
        """Hands what has arrived to the store: whole blocks, or up to the view's end."""
        # While the disk is not well, also what it has is served from here, to whoever could not read it.
        here = flight.view.is_well and not flight.view.absent(Extent(slab.start, slab.start + slab.filled))
        if not slab.filled or here:
            self.drop(flight, slab)
            return

        def done(kept: bool) -> None:
            in_vain = self.memory.is_wanted or self.stopping or flight.priority is Priority.HYDRATION
            if not kept and not in_vain:
                self._unkept.append((flight, slab))
                if not self._offering:
                    self._offering = True
                    self._spawn(self._offer_again)
                return
            if not kept and flight.waiting and not self.stopping:
                # Whoever was woken by these bytes copies them first.
                self._spawn(partial(self._drop_soon, flight, slab))
                return
            self.drop(flight, slab)
            if kept and self._unkept:  # The store takes bytes again.
                self.keep(*self._unkept.popleft())

        data = slab.data[: ceil(slab.filled, PAGE)].toreadonly()
        self._store.keep(flight.view, slab.start, data, done)

    async def _drop_soon(self, flight: Flight, slab: Slab) -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        self.drop(flight, slab)

    async def _offer_again(self) -> None:
        """Asks the store now and then whether it takes what it refused; if it does, the rest follows."""
        while self._unkept:
            await trio.sleep(OFFER_AGAIN_S)
            if self._unkept:
                self.keep(*self._unkept.popleft())
        self._offering = False

    def _drop_unkept(self) -> bool:
        if not self._unkept:
            return False
        self.drop(*self._unkept.popleft())
        return True


class FlightSink:
    """Takes one request's body into its flight's slabs. For lack of memory the first byte was kept waiting for
    `waited_first_s`, and the others for `waited_s`."""

    def __init__(self, arriving: Arriving, flight: Flight, *, counted: bool = True) -> None:
        """`counted`: its bytes come from the origin as they are."""
        self._arriving, self._flight, self._counted = arriving, flight, counted
        self._slab: Slab | None = None
        self._closed = False
        self.start = self.at = flight.at
        self.waited_s = self.waited_first_s = 0.0
        self.fetched_at_first = 0  # What all flights had fetched when this request's first bytes were there.

    async def room(self) -> memoryview:
        await self._give_way()
        if self._slab is None:
            began_s = trio.current_time()
            if self.at >= self._flight.extent.end:
                raise OriginLied(self._flight.view.record.image, "more bytes came than were asked for")
            slab = await self._arriving.slab(self._flight, self.at)
            if self._closed:  # It is a thread that a cancelled flight left behind.
                self._arriving.drop(self._flight, slab)
                raise OriginUnavailable(self._flight.view.record.image, "nobody waits for these bytes any more")
            self._slab = slab
            waited_s = trio.current_time() - began_s
            if self.at == self.start:
                self.waited_first_s += waited_s
            else:
                self.waited_s += waited_s
        return self._slab.data[self._slab.filled : self._slab.length]

    @property
    def _in_the_way(self) -> bool:
        """Whether the link is needed for what a guest waits for. (A flight that it waits for was hurried.)"""
        return self._flight.priority is Priority.HYDRATION and self._arriving.guests_wait()

    async def _give_way(self) -> None:
        """Takes no byte while a guest waits, so that the origin soon sends none; not so long that it hangs up."""
        began_s = trio.current_time()
        while self._in_the_way and trio.current_time() < began_s + GIVE_WAY_S:  # noqa: ASYNC110
            await trio.sleep(GIVE_WAY_LOOK_S)
        waited_s = trio.current_time() - began_s
        if self.at == self.start:
            self.waited_first_s += waited_s
        else:
            self.waited_s += waited_s

    def room_now(self) -> memoryview | None:
        if self._in_the_way:
            return None
        if self._slab is None and not self._closed and self.at < self._flight.extent.end:
            self._slab = self._arriving.slab_now(self._flight, self.at)
        return None if self._slab is None else self._slab.data[self._slab.filled : self._slab.length]

    def awaited(self, n: int) -> bool:
        return self.at + n >= self._flight.wanted

    def arrived(self, n: int) -> None:
        slab, flight = self._slab, self._flight
        assert slab is not None, "room comes first"
        slab.filled += n
        self.at += n
        self._arriving.counts.bytes_fetched += n if self._counted else 0
        if self.at - n == self.start:
            self.fetched_at_first = self._arriving.counts.bytes_fetched
        if slab.filled == slab.length:
            self._slab = None
            self._arriving.keep(flight, slab)
        flight.at = self.at
        flight.wake()

    def leave(self) -> None:
        """The request goes on in a thread, and nobody waits for it."""
        if self._slab is not None:
            self._slab.loose = True

    def close(self) -> None:
        """The request is over: what it brought of an unfinished slab is worth keeping."""
        slab, self._slab = self._slab, None
        self._closed = True
        if slab is None:
            return
        flight = self._flight
        loose = slab.filled % BLOCK if self.at != flight.view.size else 0
        flight.at -= loose  # The next try begins on a block again.
        slab.filled -= loose
        self._arriving.keep(flight, slab)
