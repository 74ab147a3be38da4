"""Bytes on their way: what has arrived of flights, until the store has it. Rule: bytes go in at one end and out at
the other; nothing here decides which are asked for, or when.
"""

from __future__ import annotations

import mmap
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from functools import partial

import trio

from cachefs import logs
from cachefs.bounds import Bound, Memory
from cachefs.errors import OriginChanged, OriginError, OriginLied, OriginUnavailable
from cachefs.flights import Counts, Flight, Priority, Slab
from cachefs.leisure import Guests
from cachefs.plan.extents import BLOCK, PAGE, Extent, ceil, floor
from cachefs.store.content import Store
from cachefs.store.digests import first_difference
from cachefs.store.format import BLOCK_DIGEST_BYTES, OriginMode, SpanNo, ViewKind, ViewNo
from cachefs.store.view import StoredView

log = logs.get(__name__)

# What is fetched in the background gives way to guests so long at a time.
GIVE_WAY_S = 5.0
TRANSLATED_SLAB_MAX = 4 << 20
# What somebody reads in order waits so long to be read from memory before it goes to the store.
UNREAD_S = 1.0
OFFER_AGAIN_S = 10.0  # Longer than the store's own pause after it was full.
# A millisecond or two of a thread: what is compared comes to readers in such pieces.
COMPARED_AT_ONCE, COMPARERS_MAX = 1 << 20, 2
# A block that came otherwise than it was verified is asked for once more, in case it was the way and not the
# origin; where that would take the whole image, it is not. Then it is left alone for a while, whoever wants it.
ASKED_MAX, REFUSED_S = 2, 10.0
REFUSED_MAX, REFUSED_KNOWN_MAX = 64, 4096  # Of one request; of all.


class Arriving:
    """The slabs of all flights. `emptied` is told when a flight has one less, `spawn` runs what nobody waits for.

    What the store did not take is kept as long as nothing else needs the memory: a sequential reader would
    otherwise have each window fetched again and again. What is fetched ahead of such a reader stays here until it
    was read: then it goes to the disk past the kernel's cache, and nobody reads it from there.
    """

    def __init__(
        self,
        store: Store,
        memory_max: int,
        counts: Counts,
        emptied: Callable[[Flight], None],
        spawn: Callable[[Callable[[], Awaitable[None]]], None],
    ) -> None:
        self._store, self.counts, self._emptied, self.spawn = store, counts, emptied, spawn
        self.memory = Memory(max(memory_max, store.span_size), store.span_size, self._make_room)
        self._unkept: deque[tuple[Flight, Slab]] = deque()  # Oldest first.
        self._offering = False
        self._unread: dict[Slab, tuple[Flight, float]] = {}  # Full, and since when; oldest first.
        self._awaiting = False
        self.guests: Guests | None = None  # Whom what is fetched in the background gives way to.
        self.beside_traces: Guests | None = None  # And whom flights of boot traces do.
        self._shared: list[Bound] = []
        self._giving_way: dict[Flight, trio.CancelScope] = {}
        self.share(self.memory.bound)
        self._stopping = False  # What the store refuses from then on is let go at once.
        self._comparers = trio.CapacityLimiter(COMPARERS_MAX)
        # Blocks that came otherwise than they were verified, oldest first: how often, and when at last.
        self._refused: OrderedDict[tuple[ViewNo, int], tuple[int, float]] = OrderedDict()

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

    def sink(self, flight: Flight, *, counted: bool = True) -> FlightSink:
        """What takes one request's body. `counted`: its bytes come from the origin as they are."""
        kind = ComparedSink if self._store.digests.trusted(flight.view) else FlightSink
        return kind(self, flight, counted=counted)

    # ── comparing ──

    async def differs(self, view: StoredView, slab: Slab, extent: Extent) -> int | None:
        """The offset of the first block of `extent`, in the slab, that is not what was verified; None where all of
        them are, or nothing can be compared with now."""
        base = floor(slab.start, self._store.span_size)
        digests = await self._store.digests.load(view, SpanNo(base // self._store.span_size))
        if digests is None:
            return None
        wanted = digests[(extent.start - base) // BLOCK * BLOCK_DIGEST_BYTES :]
        data = slab.data[extent.start - slab.start : extent.end - slab.start]
        found = await trio.to_thread.run_sync(
            first_difference, data, wanted, abandon_on_cancel=True, limiter=self._comparers
        )
        return None if found is None else extent.start + found * BLOCK

    def refuse(self, view: StoredView, offset: int) -> None:
        """The block at `offset` came otherwise than it was verified."""
        now_s = trio.current_time()
        times, at_s = self._refused.pop((view.number, offset), (0, 0.0))
        self._refused[view.number, offset] = (times + 1 if now_s < at_s + REFUSED_S else 1, now_s)
        if len(self._refused) > REFUSED_KNOWN_MAX:
            self._refused.popitem(last=False)
        self._store.digests.note_changed(view, offset)

    def refused(self, view: StoredView, extent: Extent) -> list[Extent]:
        """Blocks of `extent` that are not to be asked for now."""
        if not self._refused:
            return []
        found = []
        asked_max = 1 if view.record.origin is OriginMode.STREAM else ASKED_MAX
        for offset in range(floor(extent.start, BLOCK), extent.end, BLOCK):
            times, at_s = self._refused.get((view.number, offset), (0, 0.0))
            if times >= asked_max and trio.current_time() < at_s + REFUSED_S:
                found.append(Extent(offset, offset + BLOCK))
        return found

    # ── giving way ──

    def share(self, bound: Bound) -> None:
        """A guest's flight may need of `bound` what one in the background holds: that one gives way no longer
        then, and comes to its end."""
        self._shared.append(bound)
        bound.on_demand_waits = self.go_on

    def is_in_the_way(self, flight: Flight) -> bool:
        """Whether the link is needed for what a guest waits for. (A flight that it waits for was hurried.)"""
        guests = self._guests_before(flight)
        if guests is None or not guests.waiting:
            return False
        return not any(bound.is_wanted_by_demand for bound in self._shared)

    def _guests_before(self, flight: Flight) -> Guests | None:
        if flight.priority is Priority.HYDRATION:
            return self.guests
        return self.beside_traces if flight.priority is Priority.TRACE else None

    async def give_way(self, flight: Flight) -> None:
        """Returns when the flight is in nobody's way, and not so late that the origin hangs up."""
        until_s = trio.current_time() + GIVE_WAY_S
        while self.is_in_the_way(flight) and trio.current_time() < until_s:
            guests = self._guests_before(flight)
            assert guests is not None, "else nobody is in the way"
            with trio.CancelScope() as scope:
                self._giving_way[flight] = scope
                try:
                    await guests.until_calm(until_s - trio.current_time())
                finally:
                    del self._giving_way[flight]

    def go_on(self, flight: Flight | None = None) -> None:
        """It (all of them, when None) is to look again whether it is in the way."""
        for giving_way, scope in self._giving_way.items():
            if flight in (None, giving_way):
                scope.cancel()

    # ── slabs ──

    def drop(self, flight: Flight, slab: Slab) -> None:
        flight.slabs.remove(slab)
        self.memory.drop(slab)
        self._emptied(flight)

    def drop_unfilled(self, flight: Flight) -> None:
        for slab in list(flight.slabs):
            if not slab.filled:
                self.drop(flight, slab)

    def stop(self) -> None:
        """No more is read, or arrives."""
        self._stopping = True
        while self._unread:
            self._land_oldest()

    def keep(self, flight: Flight, slab: Slab) -> None:
        """What has arrived goes to the store: whole blocks, or up to the view's end. Now, or when it was read."""
        # What is hydrated a guest has opened, and may read any moment: that is for the kernel's cache.
        is_read_along = flight.in_passing and flight.priority is not Priority.HYDRATION
        if is_read_along and slab.filled and not self._stopping and not self.memory.is_wanted:
            self._unread[slab] = flight, trio.current_time()
            if not self._awaiting:
                self._awaiting = True
                self.spawn(self._await_readers)
        else:
            self._land(flight, slab)

    def was_read(self, slab: Slab) -> None:
        """Its last byte was."""
        found = self._unread.pop(slab, None)
        if found is not None:
            self._land(found[0], slab, in_passing=True)

    def _land_oldest(self) -> None:
        """Though it is still to be read."""
        slab = next(iter(self._unread))
        flight, _ = self._unread.pop(slab)
        self._land(flight, slab)

    async def _await_readers(self) -> None:
        """Not for long: they may read something else, or have gone away."""
        while self._unread:
            _, since_s = next(iter(self._unread.values()))
            if trio.current_time() < since_s + UNREAD_S:
                await trio.sleep_until(since_s + UNREAD_S)
            else:
                self._land_oldest()
        self._awaiting = False

    def _land(self, flight: Flight, slab: Slab, *, in_passing: bool = False) -> None:
        # While the disk is not well, also what it has is served from here, to whoever could not read it.
        here = flight.view.is_well and not flight.view.absent(Extent(slab.start, slab.start + slab.filled))
        unwanted = flight.unwanted and flight.priority is Priority.HYDRATION
        unwanted = unwanted or flight.view.condemned is not None
        if not slab.filled or here or unwanted:
            self.drop(flight, slab)
            return

        def done(kept: bool) -> None:
            in_vain = self.memory.is_wanted or self._stopping or flight.priority is Priority.HYDRATION
            if not kept and not in_vain:
                self._unkept.append((flight, slab))
                if not self._offering:
                    self._offering = True
                    self.spawn(self._offer_again)
                return
            if not kept and flight.waiting and not self._stopping:
                # Whoever was woken by these bytes copies them first.
                self.spawn(partial(self._drop_soon, flight, slab))
                return
            self.drop(flight, slab)
            if kept and self._unkept:  # The store takes bytes again.
                self._land(*self._unkept.popleft())

        data = slab.data[: ceil(slab.filled, PAGE)].toreadonly()
        self._store.keep(flight.view, slab.start, data, done, in_passing=in_passing)

    async def _drop_soon(self, flight: Flight, slab: Slab) -> None:
        for _ in range(3):
            await trio.lowlevel.checkpoint()
        self.drop(flight, slab)

    async def _offer_again(self) -> None:
        """Asks the store now and then whether it takes what it refused; if it does, the rest follows."""
        while self._unkept:
            await trio.sleep(OFFER_AGAIN_S)
            if self._unkept:
                self._land(*self._unkept.popleft())
        self._offering = False

    def _make_room(self, lacking: int) -> bool:
        """Whether some was made at once. Else of what waits to be read so much lands, and makes some soon."""
        if self._unkept:
            self.drop(*self._unkept.popleft())
            return True
        while lacking > 0 and self._unread:
            lacking -= len(next(iter(self._unread)).data)
            self._land_oldest()
        return bool(self._unkept)  # The store may have refused it at once.


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
            self._begin(slab)
            waited_s = trio.current_time() - began_s
            if self.at == self.start:
                self.waited_first_s += waited_s
            else:
                self.waited_s += waited_s
        assert self._slab is not None, "it was begun just now"
        return self._place(self._slab)

    def _begin(self, slab: Slab) -> None:
        self._slab = slab

    def _place(self, slab: Slab) -> memoryview:
        """Where the next bytes go."""
        return slab.data[slab.filled : slab.length]

    async def _give_way(self) -> None:
        """Takes no byte while a guest waits, so that the origin soon sends none."""
        began_s = trio.current_time()
        await self._arriving.give_way(self._flight)
        waited_s = trio.current_time() - began_s
        if self.at == self.start:
            self.waited_first_s += waited_s
        else:
            self.waited_s += waited_s

    def room_now(self) -> memoryview | None:
        if self._arriving.is_in_the_way(self._flight):
            return None
        if self._slab is None and not self._closed and self.at < self._flight.extent.end:
            slab = self._arriving.slab_now(self._flight, self.at)
            if slab is not None:
                self._begin(slab)
        return None if self._slab is None else self._place(self._slab)

    async def take(self, whole: mmap.mmap) -> mmap.mmap | None:
        """The next bytes are all of `whole`, and it becomes the slab: nothing is copied. Returns what the caller
        has in its place; None, and takes nothing, where these bytes are no slab by themselves."""
        room = await self.room()
        slab = self._slab
        assert slab is not None, "there is room"
        before = slab.data.obj
        assert isinstance(before, mmap.mmap)
        if self.at != slab.start or not len(whole) == len(room) == len(before):
            return None
        slab.data = memoryview(whole)
        self.arrived(len(whole))
        return before

    def awaited(self, n: int) -> bool:
        return self.at + n >= self._flight.wanted

    def arrived(self, n: int) -> None:
        slab, flight = self._slab, self._flight
        assert slab is not None, "room comes first"
        slab.filled += n
        self._count(n)
        if slab.filled == slab.length:
            self._slab = None
            self._arriving.keep(flight, slab)
        flight.at = self.at
        flight.wake()

    def _count(self, n: int) -> None:
        self.at += n
        self._arriving.counts.bytes_fetched += n if self._counted else 0
        if self.at - n == self.start:
            self.fetched_at_first = self._arriving.counts.bytes_fetched

    async def settle(self) -> None:
        """Returns when everything that arrived can be read, or never will be."""

    @property
    def error(self) -> OriginError | None:
        """Why some of what arrived will not be."""
        return None

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


class ComparedSink(FlightSink):
    """The same for a view whose blocks have digests to be compared with: what has come counts as `filled`, for
    readers and for the store, when its block was compared, in a thread. The link is not held up by that.

    A block that differs is cut out of its slab and comes to nobody; what comes behind it goes on, because a stream
    that is begun again would meet it again. After REFUSED_MAX of them the rest is not worth having.
    """

    def __init__(self, arriving: Arriving, flight: Flight, *, counted: bool = True) -> None:
        super().__init__(arriving, flight, counted=counted)
        self._begun: deque[Slab] = deque()  # In order; of the first one `filled` bytes were compared.
        self._comparing = False
        self._compared = trio.Event()
        self._refused: list[int] = []
        self._error: OriginError | None = None

    async def room(self) -> memoryview:
        if self._error is not None:
            raise self._error.again()
        return await super().room()

    def room_now(self) -> memoryview | None:
        return None if self._error is not None else super().room_now()

    def _begin(self, slab: Slab) -> None:
        assert slab.end % BLOCK == 0 or slab.end == self._flight.view.size, "it is whole blocks"
        super()._begin(slab)
        self._begun.append(slab)

    def _place(self, slab: Slab) -> memoryview:
        return slab.data[self.at - slab.start : slab.length]

    def awaited(self, n: int) -> bool:
        end = self.at + n
        return (end if end >= self._flight.extent.end else floor(end, BLOCK)) >= self._flight.wanted

    def arrived(self, n: int) -> None:
        slab = self._slab
        assert slab is not None, "room comes first"
        self._count(n)
        if self.at == slab.end:
            self._slab = None
        if not self._comparing and self._next() is not None:
            self._comparing, self._compared = True, trio.Event()
            self._arriving.spawn(self._compare)

    def _next(self) -> Extent | None:
        """Whole blocks that came and were not compared."""
        if not self._begun or self._closed or self._error is not None:
            return None
        slab = self._begun[0]
        start, came = slab.start + slab.filled, min(self.at, slab.end)
        end = min(came if came == slab.end else floor(came, BLOCK), start + COMPARED_AT_ONCE)
        return Extent(start, end) if start < end else None

    async def _compare(self) -> None:
        """Until nothing is left."""
        try:
            while (extent := self._next()) is not None:
                bad = await self._arriving.differs(self._flight.view, self._begun[0], extent)
                if self._closed:
                    return
                self._hand_on(extent, bad)
        except Exception:  # What could not be compared is not known to be right.
            image = self._flight.view.record.image
            log.exception("unexpected failure of comparing", image=image)
            self._error = OriginUnavailable(image, "unexpected failure of comparing what came")
        finally:
            self._comparing = False
            self._compared.set()

    def _hand_on(self, extent: Extent, bad: int | None) -> None:
        """What of `extent` is right, up to the block at `bad`, if that differs."""
        slab, flight = self._begun[0], self._flight
        if bad is None:
            slab.filled = extent.end - slab.start
            at, behind = extent.end, None
        else:
            slab.filled = bad - slab.start
            at = min(bad + BLOCK, slab.end)
            behind = self._cut_out(slab, bad, at)
        if slab.filled == slab.length:
            self._begun.popleft()
            if behind is not None:
                self._begun.appendleft(behind)
            self._arriving.keep(flight, slab)
        flight.at = at
        flight.wake()

    def _cut_out(self, slab: Slab, bad: int, end: int) -> Slab | None:
        view = self._flight.view
        self._arriving.refuse(view, bad)
        self._refused.append(bad)
        if len(self._refused) >= REFUSED_MAX:
            self._error = OriginChanged(view.record.image, bad)
        behind = self._arriving.memory.split(slab, bad, end)
        if behind is not None:
            self._flight.slabs.append(behind)
            if self._slab is slab:
                self._slab = behind
        return behind

    async def settle(self) -> None:
        while self._comparing:
            await self._compared.wait()

    @property
    def error(self) -> OriginError | None:
        if self._error is None and self._refused:
            return OriginChanged(self._flight.view.record.image, self._refused[0])
        return self._error

    def close(self) -> None:
        """The request is over: what was compared of what it brought is worth keeping."""
        self._slab = None
        self._closed = True
        while self._begun:
            self._arriving.keep(self._flight, self._begun.popleft())
