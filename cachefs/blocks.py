"""A view's range → its bytes: from the store, from what is arriving, or from a new flight. Rule: nothing is
believed across an await; after each one the range is looked at again from where it stopped.

This is the way of a miss. The way of a hit is `StoredView.read_now`, and does not come here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import trio

from cachefs import logs
from cachefs.errors import Absent, ImageCondemned, OriginChanged, OriginUnavailable, ReadDeadline
from cachefs.fetcher import Fetcher
from cachefs.flights import Flight, Priority
from cachefs.histogram import Timed
from cachefs.plan import windows
from cachefs.plan.extents import BLOCK, Extent, aligned, subtract
from cachefs.plan.windows import Pattern
from cachefs.store.format import OriginMode, ViewKind
from cachefs.store.health import DiskUnusable
from cachefs.store.view import READ_MAX, StoredView

log = logs.get(__name__)

Buffer = bytes | bytearray | memoryview

# What somebody waited for meanwhile, and the store refused, stays in memory.
LANDING_MAX_S = 30.0
# A byte that should be here and is not is looked at and fetched again so often.
TRIES_MAX = 3


@dataclass(eq=False)
class _Reading:
    """One read under way: what it wants, since when, and how often it did not find what should be there."""

    view: StoredView
    wanted: Extent
    since_s: float
    tried_at: int = -1
    tries: int = 0
    just: bool = False  # Nothing around it is wanted.
    within: Flight | None = None  # The flight that is made of it.
    fails: bool = True  # Where a block of it is refused; else the others are fetched.
    unreadable: bool = False  # The disk does not give what is here: it is fetched as if it were not.

    @property
    def priority(self) -> Priority:
        return Priority.DEMAND if self.within is None else self.within.priority

    def try_again(self, offset: int) -> None:
        """Counts tries at one offset; raises when they are too many."""
        self.tries = self.tries + 1 if offset == self.tried_at else 1
        self.tried_at = offset
        if self.tries > TRIES_MAX:
            raise OriginUnavailable(self.view.record.image, f"byte {offset} came and cannot be read")


class Beside:
    """Guests that wait for what no boot trace brings: what is fetched of traces gives way to them."""

    def __init__(self) -> None:
        self.waiting = 0
        self._calm = trio.lowlevel.ParkingLot()

    @contextmanager
    def one_more(self) -> Iterator[None]:
        """One of them waits, as long as this lasts."""
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1
            if not self.waiting:
                self._calm.unpark_all()

    async def until_calm(self, at_most_s: float) -> None:
        """Returns when none of them waits, or after `at_most_s`."""
        with trio.move_on_after(at_most_s):
            while self.waiting:
                await self._calm.park()


class Blocks:
    """Reads stored views, fetching what is absent. `read_deadline_s` is the longest that a read may take."""

    def __init__(self, fetcher: Fetcher, read_deadline_s: float) -> None:
        self._fetcher = fetcher
        self._deadline_s = read_deadline_s
        self.reading: set[_Reading] = set()  # Reads that wait at this moment.
        self._calm = trio.lowlevel.ParkingLot()
        self.misses = 0
        # Reads of guests that are no hits: of bytes on their way to the store, of those on its disk, and the rest.
        self.from_memory, self.from_disk, self.missed = Timed(), Timed(), Timed()
        self.beside_traces = Beside()
        # A guest waits for something of a view's from an offset on, that nobody had asked for.
        self.on_miss: Callable[[StoredView, int], None] = lambda view, offset: None
        # How many bytes of a view, from an offset on, cost so many of its origin's.
        self.reach: Callable[[StoredView, int, int], int] = lambda view, offset, cost: cost

    async def read_just(self, view: StoredView, extent: Extent, within: Flight | None = None) -> Buffer:
        """As `read`, fetching no more than the blocks of `extent`. `within`: the flight that is made of it, and is
        as urgent."""
        return await self.read(view, extent.start, extent.length, Pattern(), just=True, within=within)

    async def fetch_just(self, view: StoredView, extent: Extent, within: Flight | None = None) -> None:
        """Sees to it that what is absent of the blocks of `extent` is on its way: each gap as one request.
        `within`: as in `read_just`."""
        reading = _Reading(view, extent, trio.current_time(), just=True, fails=False, within=within)
        await self._start_missing(reading, extent, Pattern())

    async def load(self, view: StoredView, extent: Extent) -> None:
        """The maps of `extent`, where the disk gives them."""
        await _load(view, extent)

    async def read(
        self,
        view: StoredView,
        offset: int,
        length: int,
        pattern: Pattern,
        *,
        just: bool = False,
        within: Flight | None = None,
    ) -> Buffer:
        """`length` bytes from `offset`, which lie in the view; good until the next await. Raises OriginError;
        ReadDeadline in time."""
        if view.condemned is not None:
            raise ImageCondemned(view.record.image, view.condemned)
        wanted = Extent(offset, offset + length)
        reading = _Reading(view, wanted, trio.current_time(), just=just, within=within)
        timed = self.from_disk
        nobody_waits = reading.priority is Priority.HYDRATION
        if not nobody_waits:
            self.reading.add(reading)
        try:
            with trio.move_on_after(inf if nobody_waits else self._deadline_s):
                await _load(view, wanted)
                if view.absent(wanted):
                    self.misses += 1
                    timed = self.missed
                    await self._start_missing(reading, wanted, pattern)
                data = await self._collect(reading, pattern)
                timed.bytes += 0 if just else length
                return data
        finally:
            if not just:
                timed.seconds.observe(trio.current_time() - reading.since_s)
            self.reading.discard(reading)
            if not self.reading:
                self._calm.unpark_all()
        raise ReadDeadline(view.record.image, f"{length} bytes at {offset} did not come in {self._deadline_s} s")

    def arrived(self, view: StoredView, offset: int, length: int) -> memoryview | None:
        """The bytes, when all of them are in memory on their way to the store; good until the next await."""
        part = None if view.condemned is not None else self._arrived(view, Extent(offset, offset + length))
        if part is None or len(part) != length:
            return None
        self.from_memory.seconds.observe(0.0)  # Nothing was waited for.
        self.from_memory.bytes += length
        return part

    @property
    def waiting(self) -> int:
        """How many reads wait at this moment."""
        return len(self.reading)

    async def until_calm(self, at_most_s: float) -> None:
        """Returns when no read waits, or after `at_most_s`: what is done in the background begins its next bit
        of work then."""
        with trio.move_on_after(at_most_s):
            while self.reading:
                await self._calm.park()

    async def _collect(self, reading: _Reading, pattern: Pattern) -> Buffer:
        view, wanted = reading.view, reading.wanted
        out: bytearray | None = None
        at = wanted.start
        while at < wanted.end:
            if view.condemned is not None:
                raise ImageCondemned(view.record.image, view.condemned)
            part: Buffer | None = self._arrived(view, Extent(at, wanted.end))
            if part is None:
                part = await self._stored(reading, at)
            if part is not None:
                if len(part) == wanted.length:
                    return part  # All of it in one place: the kernel copies it from there.
                if out is None:
                    out = bytearray(wanted.length)
                out[at - wanted.start : at - wanted.start + len(part)] = part
                at += len(part)
                continue
            flight = self._fetcher.flight_for(view, at)
            if flight is not None:
                self._hurry(reading, flight)
                # Up to where its slab ends: after that the bytes may be in the store, or let go.
                until = min(wanted.end, view.span_of(at).end)
                try:
                    if flight.traced or reading.just:
                        await flight.wait_for(until)
                    else:
                        with self.beside_traces.one_more():
                            await flight.wait_for(until)
                except OriginChanged as error:
                    if _is_about(error, flight, at, until):
                        raise
                continue
            await _load(view, wanted)
            if reading.unreadable or view.absent(Extent(at, at + 1)):
                reading.try_again(at)
                await self._start_missing(reading, Extent(at, wanted.end), pattern)
        return b"" if out is None else out

    def _hurry(self, reading: _Reading, flight: Flight) -> None:
        """It is as urgent from now on as what waits for it."""
        if reading.priority is Priority.DEMAND:
            self._fetcher.hurry(flight)
        elif reading.within is not None:
            reading.within.needs.add(flight)

    def _arrived(self, view: StoredView, wanted: Extent) -> memoryview | None:
        """What is in memory of `wanted`, from its start."""
        slab = self._fetcher.slab_at(view, wanted.start)
        if slab is None:
            return None
        if wanted.end >= slab.end == slab.start + slab.filled:
            self._fetcher.was_read(slab)
        return slab.data[wanted.start - slab.start : min(slab.filled, wanted.end - slab.start)]

    async def _stored(self, reading: _Reading, at: int) -> Buffer | None:
        """What the store has of the range, from `at`; None where it has nothing there, or could not give it."""
        view = reading.view
        gaps = view.absent(Extent(at, reading.wanted.end))
        end = gaps[0].start if gaps else reading.wanted.end
        if end <= at:
            return None
        now = view.read_now(at, end - at) if end - at <= READ_MAX else None
        if now is not None or reading.unreadable:
            return now
        try:
            return await view.read(at, end - at)
        except DiskUnusable as error:
            log.debug("%d bytes at %d: %s", end - at, at, error, image=view.record.image)
            if view.is_well:  # It is this place, not the disk.
                await self._doubt(reading, at if error.offset is None else error.offset)
            else:
                reading.unreadable = True
            return error.before or None
        except Absent as error:
            await _load(view, Extent(at, end))
            if not view.absent(Extent(error.offset, error.offset + 1)):
                await self._doubt(reading, error.offset)
        return None

    async def _doubt(self, reading: _Reading, offset: int) -> None:
        reading.try_again(offset)
        await reading.view.doubt(offset)

    # ── starting flights ──

    async def _start_missing(self, reading: _Reading, wanted: Extent, pattern: Pattern) -> None:
        """Sees to it that everything absent in `wanted` is on its way."""
        view = reading.view
        await _load(view, wanted)
        for miss in [wanted] if reading.unreadable else view.absent(wanted):
            refused = self._fetcher.refused(view, miss)
            if refused and reading.fails:
                raise OriginChanged(view.record.image, refused[0].start)
            parts = [rest for part in self._fetcher.not_under_way(view, miss) for rest in subtract(part, refused)]
            for part in parts:
                await self._start(view, aligned(part, BLOCK, view.size), pattern, reading, reading.priority)
            joined = None if parts else self._fetcher.flight_for(view, miss.start)
            if joined is not None and not joined.whole and not pattern.covers(miss.start):
                pattern.follow(joined.extent, pattern.is_next(miss.start))

    async def _start(
        self,
        view: StoredView,
        miss: Extent,
        pattern: Pattern,
        reading: _Reading | None = None,
        priority: Priority = Priority.DEMAND,
    ) -> None:
        if view.record.origin is OriginMode.STREAM:
            if self._fetcher.flight_for(view, miss.start) is None:
                self._fetcher.start(view, miss, priority)
            return
        want, sequential = windows.window(self._fetcher.link, pattern, miss.start)
        if not sequential:
            want = self.reach(view, miss.start, want)
        elif want >= view.span_of(miss.start).length and miss.start + want < view.size:
            # A span that comes in two windows is cut, written and read twice.
            want = view.span_of(miss.start + want - 1).end - miss.start
        unreadable = reading is not None and reading.unreadable
        if reading is not None and (reading.just or unreadable):  # What is unreadable will not be kept.
            want = miss.length
        around = Extent(miss.start, min(max(miss.start + want, miss.end), view.size))
        await _load(view, around)
        # Others may have started what we want while the maps were read.
        gaps = [around] if unreadable else view.absent(around)
        free = [gap for absent in gaps for gap in self._fetcher.not_under_way(view, absent)]
        extent = windows.request(miss, free, want)
        if extent is not None:
            flight = self._fetcher.start(view, extent, priority)
            if priority is Priority.DEMAND and not sequential:
                self.on_miss(view, miss.start)
            # Whoever reads so much in order goes over all of it, and does not come back soon.
            flight.in_passing |= sequential and want > windows.RANDOM_MAX
            pattern.follow(flight.extent, sequential)

    def reached_mark(self, view: StoredView, pattern: Pattern, offset: int) -> None:
        """A sequential reader is half through what it was fetched: the next window is started behind it."""
        if offset <= pattern.expected < view.size:
            self._fetcher.spawn(self._read_ahead, view, pattern)

    async def _read_ahead(self, view: StoredView, pattern: Pattern) -> None:
        at = pattern.expected
        if self._fetcher.flight_for(view, at) is None:
            await self._start(view, Extent(at, min(at + BLOCK, view.size)), pattern, priority=Priority.READAHEAD)

    async def hydrate(self, view: StoredView, extent: Extent) -> Extent | None:
        """Fetches what nobody brings of `extent`, from its first such block as far as it goes, below all that
        anybody waits for. Returns what that was, when the store has it, or refused it. Raises OriginError."""
        await _load(view, extent)
        # From here to the start no await: others fetch the same image.
        free = [part for gap in view.absent(extent) for part in self._fetcher.not_under_way(view, gap)]
        if not free:
            return None
        flight = self._fetcher.start(view, free[0], Priority.HYDRATION)
        await flight.ended.wait()
        if flight.error is not None:
            raise flight.error.again()
        with trio.move_on_after(LANDING_MAX_S):
            await flight.landed.wait()
        return free[0]

    async def fetch(self, view: StoredView, extent: Extent) -> None:
        """Sees to it that what is absent in `extent` is on its way, though nobody waits for it."""
        reading = _Reading(view, extent, trio.current_time(), fails=False)
        await self._start_missing(reading, extent, Pattern())


def _is_about(error: OriginChanged, flight: Flight, at: int, until: int) -> bool:
    """Whether a flight was given up over what is wanted of it from `at` on; else that is worth one of its own."""
    if flight.view.record.kind is ViewKind.ORIGINAL:
        return error.offset < until and at < error.offset + BLOCK
    # The offset is one of the file. A flight that began with what is wanted failed over it, or what it needs.
    return flight.extent.start + BLOCK > at


async def _load(view: StoredView, extent: Extent) -> None:
    """The maps, where the disk gives them: a span whose map is not in memory is taken for absent."""
    try:
        await view.load(extent)
    except DiskUnusable as error:
        log.debug("%s", error, image=view.record.image)
