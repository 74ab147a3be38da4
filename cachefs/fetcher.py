"""The fetcher: every flight under way, its turn and its tries. Rule: at most one flight at a time is to bring any
one block, and a flight belongs to this module's nursery, never to the reader that happened to start it.

A flight receives one extent in order, into slabs that do not cross a span. What has arrived can be read from
its slab at once; a full slab is handed to the store and let go when the store has it. All slabs together are
bounded (`MEMORY_MAX`): a flight that finds no room waits, and so does the origin behind it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable, Iterator

import trio

from cachefs import logs
from cachefs.arriving import Arriving, FlightSink
from cachefs.bounds import Bound
from cachefs.errors import (
    ImageRefused,
    OriginAway,
    OriginBusy,
    OriginChanged,
    OriginError,
    OriginLied,
    OriginUnavailable,
    RangeRefused,
)
from cachefs.flights import Counts, Flight, Priority, Slab
from cachefs.leisure import Guests
from cachefs.plan.extents import Extent, subtract
from cachefs.plan.windows import Link
from cachefs.sources import Sink, Source, Timing
from cachefs.store.content import Store
from cachefs.store.format import OriginMode, ViewKind
from cachefs.store.view import StoredView

log = logs.get(__name__)

MEMORY_MAX = 64 << 20
BACKOFF_FIRST_S, BACKOFF_MAX_S = 0.2, 5.0
# What an origin asks for, up to a quarter more: it says the same to all nodes.
RETRY_AFTER_JITTER = 0.25
# Places that only demand may take.
RESERVED_MAX = 2
# Disks inside images that are translated at once. Each holds some steps of up to 4 MiB.
TRANSLATIONS_MAX = 4
# Flights that wait for a place become one up to here; beyond it several connections are faster than one.
TOGETHER_MAX = 4 << 20


async def _no_translation(flight: Flight, sink: FlightSink) -> None:
    raise OriginUnavailable(flight.view.record.image, "nothing here translates disks")


class Fetcher:
    """Starts flights and keeps what is under way. `run` is its task; everything else is called on the loop.

    `connections` bounds the requests at once, `retries` the tries after the first that bring nothing new.
    """

    def __init__(
        self, source: Source, store: Store, connections: int, retries: int, memory_max: int = MEMORY_MAX
    ) -> None:
        self._source, self._store, self._retries = source, store, retries
        self._repeats = logs.Repeats(log)
        self._nursery: trio.Nursery | None = None
        self._flights: dict[StoredView, list[Flight]] = {}
        self.link = Link()
        self.counts = Counts()
        self._slots = Bound(connections, reserved=min(RESERVED_MAX, connections - 1))
        self._translations = Bound(TRANSLATIONS_MAX, reserved=1)
        self.translate: Callable[[Flight, FlightSink], Awaitable[None]] = _no_translation
        self.rank_of: Callable[[str], int] = lambda image: 1  # Of an image: see `Flight.rank`.
        self.until_origin_is_well: Callable[[], Awaitable[None]] = trio.sleep_forever
        self._arriving = Arriving(store, memory_max, self.counts, self._forget, self.spawn)
        self.connections = connections
        for bound in (self._slots, self._translations):
            self.share(bound)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Until cancelled; what is under way then is abandoned."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Before the nursery closes: the writer may still say that it did not keep something.
                self._arriving.stop()

    # ── what is under way ──

    @property
    def memory_used(self) -> int:
        return self._arriving.memory.used

    @property
    def memory_unkept(self) -> int:
        """The part of it that the store did not take, and that goes when the rest is needed."""
        return self._arriving.unkept

    @property
    def queued(self) -> int:
        """Flights that wait for a place of a request."""
        return self._slots.waiting

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

    def was_read(self, slab: Slab) -> None:
        """Its last byte was: it need not be in memory any more, once the store has it."""
        self._arriving.was_read(slab)

    def flight_for(self, view: StoredView, offset: int) -> Flight | None:
        """The flight that is to bring the byte at `offset`."""
        for flight in self._flights.get(view, ()):
            if flight.brings(offset):
                return flight
        return None

    def hurry(self, flight: Flight) -> None:
        """A reader waits for this flight: it is no reading ahead any more."""
        if flight.priority is not Priority.DEMAND:
            flight.priority = Priority.DEMAND
            self._slots.reorder()
            self._translations.reorder()
            self._arriving.memory.reorder()
            self._arriving.go_on(flight)
            for needed in flight.needs:
                self.hurry(needed)

    def withdraw(self, flight: Flight) -> None:
        """Nothing of it is wanted any more, unless it has begun, or somebody waits for it."""
        if not flight.started and not flight.waiting and not flight.whole:
            flight.extent = Extent(flight.at, flight.at)
            flight.wake()

    def abandon(self, view: StoredView) -> None:
        """What is fetched of the view in the background, and nobody waits for, is not kept."""
        for flight in self._flights.get(view, ()):
            if flight.priority is Priority.HYDRATION:
                self.withdraw(flight)
                flight.unwanted = True

    def is_under_way(self, view: StoredView) -> bool:
        """Whether anything of the view is, or is here and not in the store."""
        return view in self._flights

    async def until_one_landed(self, view: StoredView) -> bool:
        """Returns when the first of the flights that are under way for the view has landed; False, and at once, if
        there is none."""
        for flight in self._flights.get(view, ()):
            await flight.landed.wait()
            return True
        return False

    def not_under_way(self, view: StoredView, extent: Extent) -> list[Extent]:
        """What of `extent` no flight brings or holds."""
        taken = []
        for flight in self._flights.get(view, ()):
            if not flight.over:
                taken.append(Extent(flight.at, flight.extent.end))
            taken.extend(Extent(slab.start, slab.start + slab.filled) for slab in flight.slabs)
        return subtract(extent, taken)

    def refused(self, view: StoredView, extent: Extent) -> list[Extent]:
        """Blocks of `extent` that are not to be asked for now: they came otherwise than they were verified."""
        return self._arriving.refused(view, extent)

    def give_way(self, guests: Guests, beside_traces: Guests | None = None) -> None:
        """From now on what is fetched in the background stops taking bytes while one of `guests` waits, unless it
        holds what is needed for that one: then it comes to its end. What is fetched of boot traces does so for
        `beside_traces`, guests that wait for something else."""
        self._arriving.guests, self._arriving.beside_traces = guests, beside_traces

    def narrow(self, width: int) -> None:
        """So many requests at once, as the origin can bear just now."""
        self._slots.narrow(width)

    def share(self, bound: Bound) -> None:
        """Flights of all priorities take of `bound`: see `give_way`."""
        self._arriving.share(bound)

    # ── starting ──

    def spawn(self, work: Callable[..., Awaitable[None]], *args: object) -> None:
        """Runs `work` in the fetcher's nursery: what a reader set off and does not wait for."""
        assert self._nursery is not None, "the fetcher is not running"
        self._nursery.start_soon(self._run_alone, work, args)

    @staticmethod
    async def _run_alone(work: Callable[..., Awaitable[None]], args: tuple[object, ...]) -> None:
        try:
            await work(*args)
        except OriginError as error:  # An image that was condemned meanwhile, for one.
            log.debug("%s: %s", work, error)
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
            mergeable &= queued.at < queued.extent.end  # What was withdrawn comes to its end.
            mergeable &= queued.traced is (priority is Priority.TRACE)  # A trace is fetched exactly.
            small = extent.end - queued.extent.start <= TOGETHER_MAX
            if mergeable and small and queued.extent.end == extent.start:
                queued.extent = Extent(queued.extent.start, extent.end)
                return queued
        return self._begin(Flight(view, extent, priority))

    def _begin(self, flight: Flight) -> Flight:
        assert self._nursery is not None
        flight.rank = self.rank_of(flight.view.record.image)
        self._flights.setdefault(flight.view, []).append(flight)
        self._nursery.start_soon(self._fly, flight)
        return flight

    def _forget(self, flight: Flight) -> None:
        flights = self._flights.get(flight.view, [])
        if flight.over and not flight.slabs and flight in flights:
            flights.remove(flight)
            if not flights:
                del self._flights[flight.view]
            flight.landed.set()

    # ── flying ──

    async def _fly(self, flight: Flight) -> None:
        try:
            await self._try(flight)
        except OriginError as error:
            flight.error = error
            self.counts.failures += 1
            said = isinstance(error, ImageRefused | OriginChanged | OriginAway)  # Once, when it was found.
            level = logging.DEBUG if said else logging.WARNING
            self._repeats.log(level, type(error), "%s", error, image=flight.view.record.image)
        except Exception:  # A bug in one fetch is an error of its readers, not the end of everybody's mount.
            image = flight.view.record.image
            log.exception("unexpected failure of a fetch", image=image)
            flight.error = OriginUnavailable(image, "unexpected failure of a fetch")
            self.counts.failures += 1
        finally:
            flight.over = True
            self._arriving.drop_unfilled(flight)
            flight.wake()
            flight.ended.set()
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
                if flight.traced and not flight.waiting:
                    allowed = 0  # Whoever replays it tries again, but not all of it at once.
                # A guest would rather wait than see an error: an origin that is away is tried while a reader
                # waits, which its deadline bounds.
                patient = isinstance(error, OriginUnavailable) and flight.at == began_at and flight.waiting
                if tries > allowed and not patient:
                    raise
                self.counts.retries += 1
                log.debug("%s: trying again", error, image=flight.view.record.image)
                if flight.whole:
                    flight.at = 0  # Who lacks something from here on waits for it, and begins no second stream.
                with trio.move_on_after(self._pause_s(tries, error)):
                    # Nobody was asked, so it costs nobody anything to go on as soon as somebody may be.
                    await (self.until_origin_is_well if isinstance(error, OriginAway) else trio.sleep_forever)()

    async def _request_in_turn(self, flight: Flight) -> None:
        """One request in a place of its own. Between its tries a flight has none: images that cannot be had would
        hold up all others."""
        if flight.view.record.kind is not ViewKind.ORIGINAL:
            await self._translate_in_turn(flight)
            return
        await self._slots.take(flight)
        try:
            flight.started = True
            if flight.at < flight.extent.end:  # Else it became another's while it waited.
                await self._request(flight)
        finally:
            self._slots.give_back()

    async def _translate_in_turn(self, flight: Flight) -> None:
        """The same for a disk that lies inside an image. It takes no place of a request: those that bring its
        parts do (`ask`), and could not if flights that wait for them had all places."""
        await self._translations.take(flight)
        try:
            flight.started = True
            if flight.at >= flight.extent.end:
                return  # It was withdrawn while it waited.
            sink = self._arriving.sink(flight, counted=False)
            try:
                try:
                    await self.translate(flight, sink)
                finally:
                    await sink.settle()
            except trio.Cancelled:
                sink.leave()
                raise
            finally:
                sink.close()
            if sink.error is not None:
                raise sink.error
            if sink.at != flight.extent.end:
                raise OriginLied(
                    flight.view.record.image, f"its disk ended at {sink.at}, not at {flight.extent.end}"
                )
        finally:
            self._translations.give_back()

    async def ask(self, flight: Flight, image: str, size: int, extent: Extent, sink: Sink) -> None:
        """One request for a part of an image that `flight` needs, in a place of its own; what it brings is not
        kept. Raises OriginError."""
        await self._slots.take(flight)
        try:
            self.counts.requests += 1
            timing = await self._source.fetch(image, size, extent, sink)
        finally:
            self._slots.give_back()
        self.counts.bytes_fetched += extent.length
        self.link.observe(timing.first_byte_s, extent.length, max(timing.body_s, 1e-6))

    @staticmethod
    def _pause_s(tries: int, error: OriginError) -> float:
        """Doubling, with jitter over its whole length, so that a thousand nodes do not come back at once; and not
        before the origin said that it may be asked again, nor all at the moment that it said."""
        pause = min(BACKOFF_FIRST_S * 2.0 ** min(tries - 1, 16), BACKOFF_MAX_S) * random.uniform(0.5, 1.0)
        asked = max(error.pause_s, error.retry_after if isinstance(error, OriginBusy) else 0.0)
        return max(pause, asked * random.uniform(1.0, 1.0 + RETRY_AFTER_JITTER))

    async def _request(self, flight: Flight) -> None:
        view = flight.view
        sink = self._arriving.sink(flight)
        self.counts.requests += 1
        try:
            try:
                if flight.whole:
                    timing = await self._source.stream(view.record.image, view.size, sink)
                else:
                    timing = await self._source.fetch(
                        view.record.image, view.size, Extent(flight.at, flight.extent.end), sink
                    )
            finally:
                await sink.settle()
        except trio.Cancelled:
            sink.leave()
            raise
        finally:
            sink.close()
        if sink.error is not None:
            raise sink.error
        if sink.at != flight.extent.end:
            raise OriginLied(view.record.image, f"the body ended at {sink.at}, not at {flight.extent.end}")
        self._learn(flight, sink, timing)

    def _learn(self, flight: Flight, sink: FlightSink, timing: Timing) -> None:
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
            flight.whole = flight.in_passing = True
            flight.extent = Extent(0, view.size)
            flight.at = 0
