"""A view's range → its bytes: from the store, from what is arriving, or from a new flight. Rule: nothing is
believed across an await; after each one the range is looked at again from where it stopped.

This is the way of a miss. The way of a hit is `StoredView.read_now`, and does not come here.
"""

from __future__ import annotations

import trio

from cachefs.errors import Absent, OriginUnavailable, ReadDeadline
from cachefs.fetcher import Fetcher, Priority
from cachefs.plan import windows
from cachefs.plan.extents import BLOCK, Extent, aligned
from cachefs.plan.windows import Pattern
from cachefs.store.content import StoredView
from cachefs.store.format import OriginMode

# A byte that the store says it has and cannot give is looked at and fetched again so often.
TRIES_MAX = 3


class Blocks:
    """Reads stored views, fetching what is absent. `read_deadline_s` is the longest that a read may take."""

    def __init__(self, fetcher: Fetcher, read_deadline_s: float) -> None:
        self._fetcher = fetcher
        self._deadline_s = read_deadline_s
        self.waiting = 0  # Reads that wait at this moment.
        self.misses = 0

    async def read(self, view: StoredView, offset: int, length: int, pattern: Pattern) -> bytes | bytearray:
        """`length` bytes from `offset`, which lie in the view. Raises OriginError; ReadDeadline in time."""
        wanted = Extent(offset, offset + length)
        self.waiting += 1
        try:
            with trio.move_on_after(self._deadline_s):
                await view.load(wanted)
                if not view.absent(wanted):
                    try:
                        return await view.read(offset, length)
                    except Absent:
                        pass
                self.misses += 1
                return await self._collect(view, wanted, pattern)
        finally:
            self.waiting -= 1
        raise ReadDeadline(view.record.image, f"{length} bytes at {offset} did not come in {self._deadline_s} s")

    async def _collect(self, view: StoredView, wanted: Extent, pattern: Pattern) -> bytearray:
        out = bytearray(wanted.length)
        await self._start_missing(view, wanted, pattern)
        at = wanted.start
        tries = 0
        while at < wanted.end:
            slab = self._fetcher.slab_at(view, at)
            if slab is not None:
                end = min(slab.start + slab.filled, wanted.end)
                out[at - wanted.start : end - wanted.start] = slab.data[at - slab.start : end - slab.start]
                at = end
                continue
            gaps = view.absent(Extent(at, wanted.end))
            present = Extent(at, min(gaps[0].start, wanted.end) if gaps else wanted.end)
            if present.length > 0:
                try:
                    part = await view.read(present.start, present.length)
                except Absent as error:
                    tries += 1
                    if tries > TRIES_MAX:
                        raise OriginUnavailable(view.record.image, f"the store cannot give byte {at}") from error
                    await view.load(wanted)
                    if not view.absent(Extent(error.offset, error.offset + 1)):
                        await view.doubt(error.offset)
                        await view.load(wanted)
                else:
                    out[at - wanted.start : present.end - wanted.start] = part
                    at = present.end
                continue
            flight = self._fetcher.flight_for(view, at)
            if flight is not None:
                # Up to where its slab ends: after that the bytes may be in the store, or let go.
                await flight.wait_for(min(wanted.end, view.span_of(at).end))
                continue
            tries += 1
            if tries > TRIES_MAX:
                raise OriginUnavailable(view.record.image, f"byte {at} was fetched and is not there")
            await self._start_missing(view, Extent(at, wanted.end), pattern)
        return out

    # ── starting flights ──

    async def _start_missing(self, view: StoredView, wanted: Extent, pattern: Pattern) -> None:
        """Sees to it that everything absent in `wanted` is on its way."""
        await view.load(wanted)
        for miss in view.absent(wanted):
            parts = self._fetcher.not_under_way(view, miss)
            for part in parts:
                await self._start(view, aligned(part, BLOCK, view.size), pattern, Priority.DEMAND)
            joined = None if parts else self._fetcher.flight_for(view, miss.start)
            if joined is not None and not joined.whole:
                pattern.follow(joined.extent, pattern.is_next(miss.start))

    async def _start(self, view: StoredView, miss: Extent, pattern: Pattern, priority: Priority) -> None:
        if view.record.origin is OriginMode.STREAM:
            if self._fetcher.flight_for(view, miss.start) is None:
                self._fetcher.start(view, miss, priority)
            return
        want, sequential = windows.window(self._fetcher.link, pattern, miss.start)
        around = Extent(miss.start, min(max(miss.start + want, miss.end), view.size))
        await view.load(around)
        # Others may have started what we want while the maps were read.
        free = [gap for absent in view.absent(around) for gap in self._fetcher.not_under_way(view, absent)]
        extent = windows.request(miss, free, want)
        if extent.length and any(gap.meets(extent) for gap in free):
            pattern.follow(self._fetcher.start(view, extent, priority).extent, sequential)

    def reached_mark(self, view: StoredView, pattern: Pattern, offset: int) -> None:
        """A sequential reader is half through what it was fetched: the next window is started behind it."""
        if offset <= pattern.expected < view.size:
            self._fetcher.spawn(self._read_ahead, view, pattern)

    async def _read_ahead(self, view: StoredView, pattern: Pattern) -> None:
        at = pattern.expected
        if self._fetcher.flight_for(view, at) is None:
            await self._start(view, Extent(at, min(at + BLOCK, view.size)), pattern, Priority.READAHEAD)
