"""The disk of a qcow2, out of its file: what is fetched for a flight, and how it becomes the disk's bytes.
Rule: how much is in memory at once is bounded, whatever an image says of itself.

A flight is worked on in steps, which are unpacked side by side and handed on in order. Steps whose clusters lie
close together in the file are one group, and have few large requests in common: a request costs Glance as much as
a MiB does. A step begins as soon as its own part has come. What lies scattered is fetched step by step, and piece
by piece.

Bytes: each flight has a few steps of at most STEP_MAX; the bodies of all flights together take FETCHES_MAX. A
group takes what it needs at once, and whoever holds some of it needs no more to be done: so nobody waits for ever.
"""

from __future__ import annotations

import mmap
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

import trio

from cachefs.arriving import FlightSink
from cachefs.blocks import Blocks
from cachefs.bounds import Bound
from cachefs.errors import FormatError, OriginError, OriginLied, OriginUnavailable, RangeRefused
from cachefs.fetcher import Fetcher
from cachefs.flights import Flight
from cachefs.formats.decompress import decompress
from cachefs.formats.qcow2 import Compressed, Data, Mapping, Need, Piece, Zero
from cachefs.formats.qcow2_fetch import Fetch, Placed, Plan, sequential_plan
from cachefs.formats.qcow2_header import Header
from cachefs.huge import place
from cachefs.plan.extents import BLOCK, Extent, ceil, coalesce, pieces
from cachefs.store.content import Store
from cachefs.store.format import OriginMode
from cachefs.store.view import StoredView

# What of the disk is translated in one go: little first, so that who waits for the first byte does not wait long.
STEP_FIRST, STEP_MAX = 512 << 10, 4 << 20
# A step's bytes are put together in a place of its own. No step passes a multiple of STEP_MAX, which is a span: so
# most places become slabs as they are. Those that did not are kept for other steps.
ROOMS_MAX = 4
# So many steps are under way at once in one flight.
STEPS_AT_ONCE = 3
# What the steps of one group want of the file, and what may be fetched for it with all that lies between.
GROUP_BYTES, GROUP_MAX = 14 << 20, 16 << 20
# Of the bodies of all flights.
FETCHES_MAX = 48 << 20
# Fetched along where it lies between two wanted extents of the file: cheaper than another request.
GAP_MAX = 256 << 10
# Where a step lies scattered in the file: bytes of one request, and requests at once.
FETCH_MAX, FETCHES_AT_ONCE = 4 << 20, 4
# Of a file that is kept, handed on at once.
PASSED_ON = 256 << 10
# Clusters that are unpacked in one hop to a thread, in bytes of the disk.
UNPACK_BATCH, UNPACK_AT_ONCE = 1 << 20, 2
# Tables that others push out while one waits for its own are asked for again so often.
LOOKUPS_MAX = 16

_ZEROS = bytes(STEP_MAX)


@dataclass(frozen=True, eq=False)
class Inside:
    """A qcow2 whose disk `flight` is to bring: the view of its file, and its tables."""

    flight: Flight
    original: StoredView
    mapping: Mapping

    @property
    def image(self) -> str:
        return self.original.record.image


@dataclass(eq=False)
class _Step:
    """A piece of a flight, with what it is made of. At the beginning of `room` are its bytes, once it is done;
    None for zeros alone."""

    extent: Extent
    pieces: list[Piece]
    room: mmap.mmap | None = None
    done: trio.Event = field(default_factory=trio.Event)
    error: OriginError | FormatError | None = None


class _Group:
    """Steps that have requests in common. What it holds of FETCHES_MAX goes back when all of them are done."""

    def __init__(self, steps: list[_Step], plan: Plan, held: Bound) -> None:
        self.steps, self.plan, self._bound = steps, plan, held
        self.held = 0
        self._left = len(steps)
        self.bodies: list[_Body] = []
        self._parts: dict[_Step, list[tuple[_Body, list[Placed]]]] = {step: [] for step in steps}

    async def take(self, flight: Flight) -> None:
        total = self.plan.bytes
        await self._bound.take(flight, total)
        self.held = total

    def make_bodies(self, image: str) -> None:
        self.bodies = [_Body(image, fetch) for fetch in self.plan.fetches]
        starts = [step.extent.start for step in self.steps]
        for body in self.bodies:
            parts: dict[int, list[Placed]] = {}
            for part in body.fetch.parts:  # None lies in two steps.
                parts.setdefault(bisect_right(starts, part.disk_offset) - 1, []).append(part)
            for number, some in parts.items():
                self._parts[self.steps[number]].append((body, some))

    def parts_of(self, step: _Step) -> list[tuple[_Body, list[Placed]]]:
        """What the step is made of, by the body that brings it."""
        return self._parts[step]

    def step_is_over(self) -> None:
        self._left -= 1
        if not self._left:
            self.end()

    def end(self) -> None:
        self.bodies, self._parts = [], {}
        self._bound.give_back(self.held)
        self.held = 0


class Translator:
    """See the module. All on the loop."""

    def __init__(self, store: Store, fetcher: Fetcher, blocks: Blocks) -> None:
        self._store, self._fetcher, self._blocks = store, fetcher, blocks
        self._held = Bound(FETCHES_MAX)
        fetcher.share(self._held)
        self._is_file_kept: Callable[[StoredView], bool] = lambda original: False
        self._unpacking = trio.CapacityLimiter(UNPACK_AT_ONCE)
        self._flights = 0
        self._rooms: list[mmap.mmap] = []  # Of steps that are over: faulting in new memory takes long.

    def keep_files(self, is_file_kept: Callable[[StoredView], bool]) -> None:
        """What is fetched of a file `is_file_kept` of is kept as the file's too: all of it will be wanted."""
        self._is_file_kept = is_file_kept

    async def translate(self, inside: Inside, sink: FlightSink) -> None:
        """Gives `sink` the bytes of the disk from `flight.at` to the end of the flight. Raises OriginError, and
        FormatError for an image that lies."""
        self._flights += 1
        groups: list[_Group] = []
        try:
            await self._translate(inside, sink, groups)
        finally:
            for group in groups:
                group.end()
            self._flights -= 1
            if not self._flights:
                self._rooms.clear()

    async def _translate(self, inside: Inside, sink: FlightSink, groups: list[_Group]) -> None:
        error: OriginError | FormatError | None = None
        send, receive = trio.open_memory_channel[_Step](STEPS_AT_ONCE - 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._begin_steps, inside, groups, send, nursery)
            async for step in receive:
                error = await self._deliver(step, sink)
                if error is not None:
                    break
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _begin_steps(
        self, inside: Inside, groups: list[_Group], send: trio.MemorySendChannel[_Step], nursery: trio.Nursery
    ) -> None:
        async with send:
            whole = Extent(inside.flight.at, inside.flight.extent.end)
            extents = _steps(whole, inside.mapping.header.cluster_size)
            following = next(extents, None)
            while following is not None:
                try:
                    steps = [_Step(following, await self._pieces(inside, following))]
                    following = _complete(inside.mapping, steps, extents)
                except (OriginError, FormatError) as error:
                    failed = _Step(Extent(0, 0), [], error=error)
                    failed.done.set()
                    await send.send(failed)
                    return
                group = _Group(steps, _plan(steps, GROUP_MAX), self._held)
                if group.plan.bytes > GROUP_MAX:
                    works = [partial(self._work_alone, inside, step) for step in steps]
                else:
                    await group.take(inside.flight)
                    groups[:] = [one for one in groups if one.held] + [group]
                    group.make_bodies(inside.image)
                    for body in group.bodies:
                        nursery.start_soon(self._receive, inside, body)
                    works = [partial(self._work, inside, group, step) for step in steps]
                for step, work in zip(steps, works, strict=True):
                    await send.send(step)
                    nursery.start_soon(self._finish, step, work)

    @staticmethod
    async def _finish(step: _Step, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except (OriginError, FormatError) as error:
            step.error = error
        step.done.set()

    # ── tables ──

    async def _pieces(self, inside: Inside, extent: Extent) -> list[Piece]:
        for _ in range(LOOKUPS_MAX):
            found = inside.mapping.lookup(extent.start, extent.length)
            if not isinstance(found, Need):
                return found
            got: list[tuple[Extent, bytes]] = []

            async def bring(extent: Extent, got: list[tuple[Extent, bytes]] = got) -> None:
                data = await self._blocks.read_just(inside.original, extent, inside.flight)
                got.append((extent, bytes(data)))

            # Small tables lie close to one another, and come in blocks anyway.
            together = coalesce(found.extents, BLOCK)
            await _each((partial(bring, extent) for extent in together), FETCHES_AT_ONCE)
            got.sort()
            at = 0
            for need in sorted(found.extents):  # No await in between: nobody pushes them out.
                while got[at][0].end < need.end:
                    at += 1
                start, data = got[at][0].start, got[at][1]
                inside.mapping.feed(need.start, data[need.start - start : need.end - start])
        raise OriginUnavailable(inside.image, "its tables do not stay in memory")

    # ── bytes of the file ──

    async def _receive(self, inside: Inside, body: _Body) -> None:
        """From Glance, and kept as the disk's bytes alone, unless half of them are here or on their way, or all of
        the file is being kept. What is fetched for less than half of it is kept as the file's, so that it is not
        fetched over and over."""
        original, extent = inside.original, body.fetch.extent
        try:
            await self._blocks.load(original, extent)
            absent = original.absent(extent)
            lacking = sum(part.length for gap in absent for part in self._fetcher.not_under_way(original, gap))
            here = original.is_well and lacking <= extent.length // 2
            # What comes of a file that was verified once is compared there.
            kept = self._is_file_kept(original) and self._store.writer.trouble is None
            here = here or kept or self._store.digests.trusted(original)
            if not here and not body.fetch.is_wasteful and original.record.origin is not OriginMode.STREAM:
                try:
                    await self._fetcher.ask(inside.flight, inside.image, original.size, extent, body)
                    body.finish()
                    return
                except RangeRefused:
                    self._store.set_origin(original, OriginMode.STREAM)
            await self._pass_on(inside, body)
        except OriginError as error:
            body.fail(error)

    async def _pass_on(self, inside: Inside, body: _Body) -> None:
        """From the file's own view: what is absent is asked for as a whole, and handed on as it comes."""
        original, extent = inside.original, body.fetch.extent
        await self._blocks.fetch_just(original, extent, inside.flight)
        # Where blocks are compared, one that is refused costs nobody what lies before it.
        compared = self._store.digests.trusted(original) and original.absent(extent)
        for part in pieces(extent, BLOCK if compared else PASSED_ON):
            data = await self._blocks.read_just(original, part, inside.flight)
            (await body.room())[: part.length] = data
            body.arrived(part.length)

    # ── bytes of the disk ──

    async def _work(self, inside: Inside, group: _Group, step: _Step) -> None:
        """One step of a group, whose bodies are on their way."""
        try:
            self._make_room(step)
            header = inside.mapping.header
            works = (partial(self._place, header, body, parts, step) for body, parts in group.parts_of(step))
            await _each(works, FETCHES_AT_ONCE)
        finally:
            group.step_is_over()

    async def _work_alone(self, inside: Inside, step: _Step) -> None:
        """One step whose bytes lie scattered."""

        async def fill(fetch: Fetch) -> None:
            await self._held.take(inside.flight, fetch.extent.length)
            try:
                body = _Body(inside.image, fetch)
                await self._receive(inside, body)
                await self._place(inside.mapping.header, body, list(fetch.parts), step)
            finally:
                self._held.give_back(fetch.extent.length)

        self._make_room(step)
        await _each((partial(fill, fetch) for fetch in _plan([step], FETCH_MAX).fetches), FETCHES_AT_ONCE)

    def _make_room(self, step: _Step) -> None:
        if all(isinstance(piece, Zero) for piece in step.pieces):
            return
        step.room = self._rooms.pop() if self._rooms else place(STEP_MAX)
        at = 0
        for piece in step.pieces:
            if isinstance(piece, Zero):
                step.room[at : at + piece.length] = _ZEROS[: piece.length]
            at += piece.length

    async def _place(self, header: Header, body: _Body, parts: list[Placed], step: _Step) -> None:
        """Puts what the bytes are, or hold, to its place."""
        assert step.room is not None, "what is placed is not all zeros"
        data = await body.wait_for(max(part.file_extent.end for part in parts))
        data_at, out = body.fetch.extent.start, memoryview(step.room)
        packed: list[Placed] = []
        for part in parts:
            if isinstance(part.piece, Data):
                at, source = part.disk_offset - step.extent.start, part.piece.file_offset - data_at
                out[at : at + part.piece.length] = data[source : source + part.piece.length]
            else:
                packed.append(part)

        async def unpack(some: list[Placed]) -> None:
            await trio.to_thread.run_sync(
                _unpack, header, some, data, data_at, out, step.extent.start, limiter=self._unpacking
            )

        batch = max(1, UNPACK_BATCH // header.cluster_size)
        batches = (packed[first : first + batch] for first in range(0, len(packed), batch))
        await _each((partial(unpack, some) for some in batches), UNPACK_AT_ONCE)

    async def _deliver(self, step: _Step, sink: FlightSink) -> OriginError | FormatError | None:
        """Hands on what a step came to."""
        await step.done.wait()
        if step.error is not None:
            return step.error
        room, step.room = step.room, None  # Its group knows the step for long; the place is others' soon.
        if room is not None and step.extent.length == len(room):
            given = await sink.take(room)
            if given is not None:
                self._keep_room(given)
                return None
        data = memoryview(_ZEROS if room is None else room)
        at, end = 0, step.extent.length
        while at < end:
            free = await sink.room()
            n = min(len(free), end - at)
            free[:n] = data[at : at + n]
            sink.arrived(n)
            at += n
        if room is not None:
            self._keep_room(room)
        return None

    def _keep_room(self, room: mmap.mmap) -> None:
        if len(self._rooms) < ROOMS_MAX:
            self._rooms.append(room)


class _Body:
    """Takes the bytes of one fetch, and lets them be used as they come. A Sink."""

    def __init__(self, image: str, fetch: Fetch) -> None:
        self.fetch = fetch
        self._image = image
        self._data = memoryview(b"")
        self._at = 0
        self._error: OriginError | None = None
        self._changed = trio.Event()
        self._wanted = fetch.extent.length  # The least that somebody waits for.

    async def wait_for(self, end: int) -> memoryview:
        """All of the body, of which what lies before byte `end` of the file has come. Raises OriginError."""
        needed = end - self.fetch.extent.start
        while self._at < needed and self._error is None:
            self._wanted = min(self._wanted, needed)
            await self._changed.wait()
        if self._at < needed and self._error is not None:
            raise self._error.again()
        return self._data

    def _wake(self) -> None:
        if self._at >= self._wanted or self._error is not None:
            self._changed.set()
            self._changed = trio.Event()
            self._wanted = self.fetch.extent.length

    def fail(self, error: OriginError) -> None:
        self._error = error
        self._wake()

    def finish(self) -> None:
        """The source says that this is all."""
        if self._at < self.fetch.extent.length:
            raise OriginLied(self._image, f"the body ended {self.fetch.extent.length - self._at} bytes early")

    # ── Sink ──

    async def room(self) -> memoryview:
        room = self.room_now()
        if room is None:
            raise OriginLied(self._image, "more bytes came than were asked for")
        return room

    def room_now(self) -> memoryview | None:
        if not self._data:
            self._data = memoryview(_memory(self.fetch.extent.length))
        return self._data[self._at :] if self._at < len(self._data) else None

    def awaited(self, n: int) -> bool:
        return self._at + n >= self._wanted

    def arrived(self, n: int) -> None:
        self._at += n
        self._wake()


def _memory(size: int) -> mmap.mmap:
    """Zeros, of this process alone: what is shared by default costs more for each page that is touched first."""
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _steps(whole: Extent, cluster: int) -> Iterator[Extent]:
    """`whole` in pieces that grow, and end on clusters; none passes a multiple of STEP_MAX."""
    assert STEP_MAX % cluster == 0, "it ends on a cluster as well"
    at, length = whole.start, STEP_FIRST
    while at < whole.end:
        end = min(ceil(at + length, cluster), ceil(at + 1, STEP_MAX), whole.end)
        yield Extent(at, end)
        at, length = end, min(length * 2, STEP_MAX)


def _complete(mapping: Mapping, steps: list[_Step], extents: Iterator[Extent]) -> Extent | None:
    """Adds steps to the first as long as they want little in all, and need no table that is not here. Returns the
    first that is not of them."""
    wanted = _bytes_wanted(steps[0].pieces)
    for extent in extents:
        found = mapping.lookup(extent.start, extent.length)
        if isinstance(found, Need):
            return extent
        wanted += _bytes_wanted(found)
        if wanted > GROUP_BYTES:
            return extent
        steps.append(_Step(extent, found))
    return None


def _bytes_wanted(pieces: Iterable[Piece]) -> int:
    return sum(
        piece.file_length if isinstance(piece, Compressed) else piece.length
        for piece in pieces
        if not isinstance(piece, Zero)
    )


def _plan(steps: list[_Step], fetch_max: int) -> Plan:
    # Piece by piece, so that none lies in two steps.
    pieces = [piece for step in steps for piece in step.pieces]
    return sequential_plan(steps[0].extent.start, pieces, GAP_MAX, fetch_max)


async def _each(works: Iterable[Callable[[], Awaitable[None]]], at_once: int) -> None:
    """Does all of them, so many at once. Raises what the first that fails does, and ends the others."""
    failed: list[OriginError | FormatError] = []
    waiting = iter(works)
    async with trio.open_nursery() as nursery:

        async def one_by_one() -> None:
            try:
                for work in waiting:
                    await work()
            except (OriginError, FormatError) as error:
                failed.append(error)
                nursery.cancel_scope.cancel()

        for _ in range(at_once):
            nursery.start_soon(one_by_one)
    if failed:
        raise failed[0]


def _unpack(
    header: Header, parts: list[Placed], data: memoryview, data_at: int, out: memoryview, out_at: int
) -> None:
    """In a thread: each part from its compressed cluster to its place."""
    for offset, piece in parts:
        assert isinstance(piece, Compressed), "the rest is copied"
        source = piece.file_offset - data_at
        cluster = decompress(header.compression, data[source : source + piece.file_length], header.cluster_size)
        at = offset - out_at
        out[at : at + piece.length] = memoryview(cluster)[piece.within : piece.within + piece.length]
