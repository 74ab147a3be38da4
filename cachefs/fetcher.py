"""Flights: every fetch under way, and who waits for it. Rule: at most one flight at a time is to bring any one
block, and a flight belongs to this module's nursery, never to the reader that happened to start it.

A flight receives one extent in order, into slabs that do not cross a span. What has arrived can be read from
its slab at once; a full slab is handed to the store and let go when the store has it. All slabs together are
bounded (`MEMORY_MAX`): a flight that finds no room waits, and so does the origin behind it.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from enum import IntEnum

import trio

from cachefs.errors import OriginBusy, OriginError, OriginLied, OriginUnavailable, RangeRefused
from cachefs.plan.extents import BLOCK, PAGE, Extent, ceil, subtract
from cachefs.plan.windows import NEVER, Link
from cachefs.sources import Source, Timing
from cachefs.store.content import Store, StoredView
from cachefs.store.format import OriginMode

log = logging.getLogger(__name__)

MEMORY_MAX = 64 << 20
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 5.0
OFFER_AGAIN_S = 10.0  # Longer than the store's own pause after it was full.
# Flights that wait for a place become one up to here; beyond it several connections are faster than one.
TOGETHER_MAX = 4 << 20


class Priority(IntEnum):
    """Who is served first. Hydration will stand below READAHEAD."""

    DEMAND = 0
    READAHEAD = 1


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

    def __post_init__(self) -> None:
        self.at = self.extent.start

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
        if self.waiting:
            still = []
            for until, event in self.waiting:
                if self.over or until <= self.at or self.at >= self.extent.end:
                    event.set()
                else:
                    still.append((until, event))
            self.waiting = still
            self.wanted = min((until for until, _ in still), default=NEVER)


class _Slots:
    """A bound on flights at once: the most urgent first, first come first served; the last `reserved` ones
    are for demand alone, so that reading ahead never makes a guest wait for a place."""

    def __init__(self, total: int) -> None:
        self._free = total
        self._reserved = min(2, total - 1)
        self._waiting: list[tuple[Priority, int, Flight, trio.Event]] = []
        self._order = itertools.count()

    async def take(self, flight: Flight) -> None:
        event = trio.Event()
        heapq.heappush(self._waiting, (flight.priority, next(self._order), flight, event))
        self._serve()  # Even when others wait: they may wait for a place that demand need not wait for.
        try:
            await event.wait()
        except trio.Cancelled:
            if event.is_set():
                self.give_back()
            else:
                self._waiting = [entry for entry in self._waiting if entry[3] is not event]
                heapq.heapify(self._waiting)
            raise

    def give_back(self) -> None:
        self._free += 1
        self._serve()

    def hurry(self, flight: Flight) -> None:
        """Somebody waits for a flight that was to read ahead."""
        flight.priority = Priority.DEMAND
        self._waiting = [(waiting.priority, order, waiting, event) for _, order, waiting, event in self._waiting]
        heapq.heapify(self._waiting)
        self._serve()

    def _serve(self) -> None:
        while self._waiting and self._may(self._waiting[0][0]):
            self._free -= 1
            heapq.heappop(self._waiting)[3].set()

    def _may(self, priority: Priority) -> bool:
        return self._free > (0 if priority is Priority.DEMAND else self._reserved)


class _Memory:
    """A bound on the bytes of all slabs, and the place that they come from. Served in order, so that nobody
    starves. Whole spans are used again: zeroing and faulting in 4 MiB takes as long as receiving it."""

    def __init__(self, total: int, span_size: int, reclaim: Callable[[], bool]) -> None:
        self._free = total
        self.total = total
        self._reclaim = reclaim  # Gives something back that is only nice to have; False when there is nothing.
        self._waiting: dict[trio.Event, int] = {}
        self._span_size = span_size
        self._spare: list[bytearray] = []

    async def slab(self, start: int, length: int) -> Slab:
        """Room for `length` bytes, in whole pages; zeros behind them."""
        pages = ceil(length, PAGE)
        is_span = pages > self._span_size // 2
        size = self._span_size if is_span else pages
        await self.take(size)
        whole = self._spare.pop() if is_span and self._spare else bytearray(size)
        while self._spare and self.used + len(self._spare) * self._span_size > self.total:
            self._spare.pop()
        data = memoryview(whole)[:pages]
        data[length:] = bytes(pages - length)
        return Slab(start, length, data)

    def drop(self, slab: Slab) -> None:
        """Nobody looks at the slab any more: readers copy out of it, and the store is done with it."""
        whole = slab.data.obj
        assert isinstance(whole, bytearray)
        if not slab.loose and len(whole) == self._span_size:
            self._spare.append(whole)
        self.give_back(len(whole))

    @property
    def used(self) -> int:
        return self.total - self._free

    @property
    def is_wanted(self) -> bool:
        return bool(self._waiting)

    async def take(self, n: int) -> None:
        while n > self._free and self._reclaim():
            pass
        if not self._waiting and n <= self._free:
            self._free -= n
            return
        event = trio.Event()
        self._waiting[event] = n
        try:
            await event.wait()
        except trio.Cancelled:
            if event.is_set():
                self.give_back(n)
            else:
                del self._waiting[event]
            raise

    def give_back(self, n: int) -> None:
        self._free += n
        while self._waiting:
            event, wanted = next(iter(self._waiting.items()))
            if wanted > self._free:
                return
            del self._waiting[event]
            self._free -= wanted
            event.set()


@dataclass
class Counts:
    """Since the start, for `status`."""

    requests: int = 0
    bytes_fetched: int = 0
    retries: int = 0
    failures: int = 0


class Fetcher:
    """Starts flights and keeps what is under way. `run` is its task; everything else is called on the loop.

    `connections` bounds the requests at once, `retries` the tries after the first that bring nothing new.
    """

    def __init__(
        self, source: Source, store: Store, connections: int, retries: int, memory_max: int = MEMORY_MAX
    ) -> None:
        self._source, self._store, self._retries = source, store, retries
        self._slots = _Slots(connections)
        self._memory = _Memory(max(memory_max, store.span_size), store.span_size, self._drop_unkept)
        # What the store did not take is read from here as long as nothing else needs the memory: a sequential
        # reader would otherwise have each window fetched again and again. Oldest first.
        self._unkept: deque[tuple[Flight, Slab]] = deque()
        self._offering = False
        self._nursery: trio.Nursery | None = None
        self._running = False
        self._flights: dict[StoredView, list[Flight]] = {}
        self.link = Link()
        self.counts = Counts()

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; what is under way then is abandoned."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            self._running = True
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Before the nursery closes: the writer may still say that it did not keep something.
                self._running = False

    # ── what is under way ──

    @property
    def memory_used(self) -> int:
        return self._memory.used

    @property
    def memory_unkept(self) -> int:
        """The part of it that the store did not take, and that goes when the rest is needed."""
        return sum(len(slab.data) for _, slab in self._unkept)

    def flights(self) -> Iterator[Flight]:
        for flights in self._flights.values():
            yield from flights

    def slab_at(self, view: StoredView, offset: int) -> Slab | None:
        """Where the byte at `offset` has arrived, if it has and the store does not have it yet."""
        for flight in self._flights.get(view, ()):
            slab = flight.slab_at(offset)
            if slab is not None:
                return slab
        return None

    def flight_for(self, view: StoredView, offset: int) -> Flight | None:
        """The flight that is to bring the byte at `offset`."""
        for flight in self._flights.get(view, ()):
            if flight.brings(offset):
                return flight
        return None

    def hurry(self, flight: Flight) -> None:
        """A reader waits for this flight: it is no reading ahead any more."""
        if flight.priority is not Priority.DEMAND:
            self._slots.hurry(flight)

    def not_under_way(self, view: StoredView, extent: Extent) -> list[Extent]:
        """What of `extent` no flight brings or holds."""
        taken = []
        for flight in self._flights.get(view, ()):
            if not flight.over:
                taken.append(Extent(flight.at, flight.extent.end))
            taken.extend(Extent(slab.start, slab.start + slab.filled) for slab in flight.slabs)
        return subtract(extent, taken)

    # ── starting ──

    def spawn(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Runs `work` in the fetcher's nursery: what a reader set off and does not wait for."""
        assert self._nursery is not None, "the fetcher is not running"
        self._nursery.start_soon(self._run_alone, work, args)

    @staticmethod
    async def _run_alone(work: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            await work(*args)
        except Exception:  # Nobody waits for it, and nobody is to suffer from it.
            log.exception("unexpected failure of %s", work)

    def start(self, view: StoredView, extent: Extent, priority: Priority) -> Flight:
        """Begins to fetch `extent`, whole blocks that nothing brings yet. Where the origin gives no ranges,
        this is the flight of the whole image."""
        assert self._nursery is not None, "the fetcher is not running"
        if view.record.origin is OriginMode.STREAM:
            return self._begin(Flight(view, Extent(0, view.size), priority, whole=True))
        for queued in self._flights.get(view, ()):
            mergeable = not queued.started and not queued.whole and queued.priority <= priority
            small = extent.end - queued.extent.start <= TOGETHER_MAX
            if mergeable and small and queued.extent.end == extent.start:
                queued.extent = Extent(queued.extent.start, extent.end)
                return queued
        return self._begin(Flight(view, extent, priority))

    def _begin(self, flight: Flight) -> Flight:
        assert self._nursery is not None
        self._flights.setdefault(flight.view, []).append(flight)
        self._nursery.start_soon(self._fly, flight)
        return flight

    def _forget(self, flight: Flight) -> None:
        flights = self._flights.get(flight.view, [])
        if flight.over and not flight.slabs and flight in flights:
            flights.remove(flight)
            if not flights:
                del self._flights[flight.view]

    # ── flying ──

    async def _fly(self, flight: Flight) -> None:
        try:
            await self._try(flight)
        except OriginError as error:
            flight.error = error
            self.counts.failures += 1
            log.warning("[image %s] %s", flight.view.record.image, error)
        except Exception:  # A bug in one fetch is an error of its readers, not the end of everybody's mount.
            image = flight.view.record.image
            log.exception("[image %s] unexpected failure of a fetch", image)
            flight.error = OriginUnavailable(image, "unexpected failure of a fetch")
            self.counts.failures += 1
        finally:
            flight.over = True
            self._drop_unfilled(flight)
            flight.wake()
            self._forget(flight)

    async def _try(self, flight: Flight) -> None:
        tries, best = 0, flight.at
        while flight.at < flight.extent.end:
            began_at = flight.at
            try:
                await self._request_in_turn(flight)
            except RangeRefused:
                if flight.whole:
                    raise
                self._become_whole(flight)
            except OriginError as error:
                tries, best = tries + 1 if flight.at <= best else 1, max(best, flight.at)
                allowed = self._retries if error.retries_max is None else min(error.retries_max, self._retries)
                # A guest would rather wait than see an error: an origin that is away is tried while a reader
                # waits, which its deadline bounds.
                patient = isinstance(error, OriginUnavailable) and flight.at == began_at and flight.waiting
                if tries > allowed and not patient:
                    raise
                self.counts.retries += 1
                log.debug("[image %s] %s: trying again", flight.view.record.image, error)
                if flight.whole:
                    flight.at = 0  # Who lacks something from here on waits for it, and begins no second stream.
                await trio.sleep(self._pause_s(tries, error))

    async def _request_in_turn(self, flight: Flight) -> None:
        """One request in a place of its own. Between its tries a flight has none: images that cannot be had would
        hold up all others."""
        await self._slots.take(flight)
        try:
            flight.started = True
            if flight.at < flight.extent.end:  # Else it became another's while it waited.
                await self._request(flight)
        finally:
            self._slots.give_back()

    @staticmethod
    def _pause_s(tries: int, error: OriginError) -> float:
        """Doubling, with jitter over its whole length, so that a thousand nodes do not come back at once."""
        pause = min(BACKOFF_FIRST_S * 2.0 ** min(tries - 1, 16), BACKOFF_MAX_S) * random.uniform(0.5, 1.0)
        return max(pause, error.pause_s, error.retry_after if isinstance(error, OriginBusy) else 0.0)

    async def _request(self, flight: Flight) -> None:
        view = flight.view
        sink = _FlightSink(self, flight)
        self.counts.requests += 1
        try:
            if flight.whole:
                timing = await self._source.stream(view.record.image, view.size, sink)
            else:
                timing = await self._source.fetch(
                    view.record.image, view.size, Extent(flight.at, flight.extent.end), sink
                )
        except trio.Cancelled:
            sink.leave()
            raise
        finally:
            sink.close()
        if sink.at != flight.extent.end:
            raise OriginLied(view.record.image, f"the body ended at {sink.at}, not at {flight.extent.end}")
        self._learn(flight, sink, timing)

    def _learn(self, flight: Flight, sink: _FlightSink, timing: Timing) -> None:
        if not flight.whole and flight.view.record.origin is OriginMode.UNKNOWN:
            self._store.set_origin(flight.view, OriginMode.RANGES)
        # Flights share the link, so what all of them got in this time is what it carried.
        length = self.counts.bytes_fetched - sink.fetched_at_first
        first_byte_s = max(timing.first_byte_s - sink.waited_first_s, 0.0)
        self.link.observe(first_byte_s, length, max(timing.body_s - sink.waited_s, 1e-6))

    def _become_whole(self, flight: Flight) -> None:
        """This image comes as one stream or not at all: so does this flight, unless one is on its way."""
        view = flight.view
        self._store.set_origin(view, OriginMode.STREAM)
        whole = next((f for f in self._flights[view] if f.whole and not f.over), flight)
        for other in self._flights[view]:
            if other is not whole and (other is flight or not other.started):
                other.extent = Extent(other.at, other.at)  # Its waiters look again, and find the stream.
                other.wake()
        if whole is flight:
            flight.whole = True
            flight.extent = Extent(0, view.size)
            flight.at = 0

    # ── slabs ──

    async def new_slab(self, flight: Flight, start: int) -> Slab:
        span = self._store.span_size
        end = min(start - start % span + span, flight.extent.end)
        slab = await self._memory.slab(start, end - start)
        flight.slabs.append(slab)
        return slab

    def drop_slab(self, flight: Flight, slab: Slab) -> None:
        flight.slabs.remove(slab)
        self._memory.drop(slab)

    def keep_slab(self, flight: Flight, slab: Slab) -> None:
        """Hands what has arrived to the store: whole blocks, or up to the view's end."""
        if not slab.filled or not flight.view.absent(Extent(slab.start, slab.start + slab.filled)):
            self.drop_slab(flight, slab)
            self._forget(flight)
            return

        def done(kept: bool) -> None:
            if not kept and not self._memory.is_wanted and self._running:
                self._unkept.append((flight, slab))
                if not self._offering:
                    self._offering = True
                    self.spawn(self._offer_again)
                return
            self.drop_slab(flight, slab)
            self._forget(flight)
            if kept and self._unkept:  # The store takes bytes again.
                self.keep_slab(*self._unkept.popleft())

        data = slab.data[: ceil(slab.filled, PAGE)].toreadonly()
        self._store.keep(flight.view, slab.start, data, done)

    async def _offer_again(self) -> None:
        """Asks the store now and then whether it takes what it refused; if it does, the rest follows."""
        while self._unkept:
            await trio.sleep(OFFER_AGAIN_S)
            if self._unkept:
                self.keep_slab(*self._unkept.popleft())
        self._offering = False

    def _drop_unkept(self) -> bool:
        if not self._unkept:
            return False
        flight, slab = self._unkept.popleft()
        self.drop_slab(flight, slab)
        self._forget(flight)
        return True

    def _drop_unfilled(self, flight: Flight) -> None:
        for slab in list(flight.slabs):
            if not slab.filled:
                self.drop_slab(flight, slab)


class _FlightSink:
    """Takes one request's body into its flight's slabs. For lack of memory the first byte was kept waiting for
    `waited_first_s`, and the others for `waited_s`."""

    def __init__(self, fetcher: Fetcher, flight: Flight) -> None:
        self._fetcher, self._flight = fetcher, flight
        self._slab: Slab | None = None
        self._closed = False
        self.start = self.at = flight.at
        self.waited_s = self.waited_first_s = 0.0
        self.fetched_at_first = 0  # What all flights had fetched when this request's first bytes were there.

    async def room(self) -> memoryview:
        if self._slab is None:
            began_s = trio.current_time()
            if self.at >= self._flight.extent.end:
                raise OriginLied(self._flight.view.record.image, "more bytes came than were asked for")
            slab = await self._fetcher.new_slab(self._flight, self.at)
            if self._closed:  # It is a thread that a cancelled flight left behind.
                self._fetcher.drop_slab(self._flight, slab)
                raise OriginUnavailable(self._flight.view.record.image, "nobody waits for these bytes any more")
            self._slab = slab
            waited_s = trio.current_time() - began_s
            if self.at == self.start:
                self.waited_first_s = waited_s
            else:
                self.waited_s += waited_s
        return self._slab.data[self._slab.filled : self._slab.length]

    def room_now(self) -> memoryview | None:
        return None if self._slab is None else self._slab.data[self._slab.filled : self._slab.length]

    def awaited(self, n: int) -> bool:
        return self.at + n >= self._flight.wanted

    def arrived(self, n: int) -> None:
        slab, flight = self._slab, self._flight
        assert slab is not None, "room comes first"
        slab.filled += n
        self.at += n
        counts = self._fetcher.counts
        counts.bytes_fetched += n
        if self.at - n == self.start:
            self.fetched_at_first = counts.bytes_fetched
        if slab.filled == slab.length:
            self._slab = None
            self._fetcher.keep_slab(flight, slab)
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
        self._fetcher.keep_slab(flight, slab)
