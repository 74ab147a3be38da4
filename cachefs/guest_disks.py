"""The guest disk inside an image: its size, whether it may be served, and its bytes. Rule: what an image says of
itself is believed only after inspection, and never becomes a path, a URL or a command.

An image is inspected when its size is asked for: a few KiB, remembered from then on. When it is opened, the first
bytes of the disk inside are inspected too. A plain image is its own disk. The disk of a qcow2 is a view of its
own (`ViewKind.RAW`), fetched by clusters: tables are read through the image's own view, so that they are kept;
clusters come straight from Glance and are kept once, as the disk's bytes. All other formats are converted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from cachefs.arriving import FlightSink
from cachefs.blocks import Blocks
from cachefs.bounds import Bound
from cachefs.catalog import Catalog, Disk, Image
from cachefs.errors import (
    CachefsError,
    FormatError,
    ImageGone,
    ImageRefused,
    NoEntry,
    OriginError,
    OriginLied,
    OriginUnavailable,
    RangeRefused,
)
from cachefs.fetcher import Fetcher
from cachefs.flights import Flight
from cachefs.formats.decompress import decompress
from cachefs.formats.inspection import Inspection, guest_disk_inspection
from cachefs.formats.qcow2 import Compressed, Data, Mapping, Need, Piece
from cachefs.formats.qcow2_fetch import Fetch, Placed, sequential_plan
from cachefs.formats.qcow2_header import HEAD_MAX, Header
from cachefs.plan.extents import BLOCK, Extent, ceil, coalesce
from cachefs.sources import Source
from cachefs.sources.converted import ConversionRefused, ToolMissing
from cachefs.store.content import Store, StoredView
from cachefs.store.format import OriginMode, ViewKind

log = logging.getLogger(__name__)

# What of the disk is translated in one go: little first, so that who waits for the first byte does not wait long.
STEP_FIRST, STEP_MAX = 512 << 10, 4 << 20
# So many steps are under way at once in one flight: the link is busy while clusters are unpacked.
STEPS_AT_ONCE = 3
# Fetched along where it lies between two wanted extents of the file: cheaper than another request.
GAP_MAX = 256 << 10
# One request for a step, and all of them of all steps, in bytes of the file.
FETCH_MAX, FETCHES_MAX = 4 << 20, 32 << 20
# Requests at once for one step, where a disk lies scattered in its file.
FETCHES_AT_ONCE = 4
# Clusters that are unpacked in one hop to a thread.
UNPACK_BATCH = 1 << 20
UNPACK_AT_ONCE = 2
# Images whose tables are kept in memory (4 MiB each at most).
MAPPINGS_MAX, TABLES_MAX = 16, 4 << 20
# Tables that others push out while one waits for its own are asked for again so often.
LOOKUPS_MAX = 16

# Formats of Glance whose file is the disk.
PLAIN = frozenset({"raw", "iso", "ami", "ari", "aki"})


class Converted(Source, Protocol):
    """Gives the disks of formats that are not translated here."""


@dataclass(eq=False)
class _Step:
    """A piece of a flight that is being translated."""

    extent: Extent
    out: bytearray = field(init=False)
    done: trio.Event = field(default_factory=trio.Event)
    error: OriginError | None = None

    def __post_init__(self) -> None:
        self.out = bytearray(self.extent.length)


@dataclass(frozen=True, eq=False)
class _Inside:
    """A qcow2 whose disk a flight is to bring: the view of its file, and its tables."""

    flight: Flight
    image: Image
    original: StoredView
    mapping: Mapping


@dataclass(eq=False)
class _Looking:
    """An inspection that is under way, and everybody who waits for what it comes to."""

    done: trio.Event = field(default_factory=trio.Event)
    error: CachefsError | None = None


class GuestDisks:
    """See the module. `converted` is None where there is no tool for other formats. All on the loop."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        fetcher: Fetcher,
        blocks: Blocks,
        converted: Source | None = None,
    ) -> None:
        self._catalog, self._store, self._fetcher, self._blocks = catalog, store, fetcher, blocks
        self._converted = converted
        self._mappings: OrderedDict[tuple[str, int], Mapping] = OrderedDict()
        self._looking: dict[str, _Looking] = {}
        self._fetched = Bound(FETCHES_MAX)
        self._unpacking = trio.CapacityLimiter(UNPACK_AT_ONCE)

    # ── what is inside ──

    async def inspect(self, image: Image) -> Disk:
        """What is known of the disk inside, asked for once. Raises OriginError when that cannot be had now, and
        NoEntry when the image is gone meanwhile. A refused one has a reason and no size."""
        while (disk := (image := self._still(image)).disk) is None:
            await self._look(image.id, partial(self._inspect, image))
        return disk

    async def open(self, image: Image) -> StoredView:
        """The view of the disk, which may be read from now on. Raises ImageRefused, and as `inspect` does."""
        while True:
            await self.inspect(image)
            image = self._still(image)
            disk = image.disk
            if disk is None:
                continue  # It is said to be of another format now.
            if disk.refused is not None:
                raise ImageRefused(image.id, disk.refused)
            assert disk.size is not None, "what is not refused has a size"
            if image.disk_format in PLAIN:
                return self._original(image)
            if image.disk_format != "qcow2" and self._converted is None:
                raise ImageRefused(image.id, f"a disk in {image.disk_format} needs qemu-utils: not installed")
            view = self._store.view(image.id, ViewKind.RAW, disk.size)
            if disk.seen:
                return view
            await self._look(image.id, partial(self._inspect_inside, image, view, disk))

    async def _look(self, image: str, work: Callable[[], Awaitable[None]]) -> None:
        """Does `work`, unless an inspection of this image is under way: then its end is waited for, and its
        failure is everybody's. Who returns looks at what is known now."""
        looking = self._looking.get(image)
        if looking is not None:
            await looking.done.wait()
            if looking.error is not None:
                raise looking.error.again()
            return
        looking = self._looking[image] = _Looking()
        try:
            await work()
        except CachefsError as error:
            looking.error = error
            raise
        finally:
            del self._looking[image]
            looking.done.set()

    async def _inspect(self, image: Image) -> None:
        self._still(image)
        original = self._original(image)
        inspection = Inspection(image.disk_format, image.size)
        while (extent := inspection.wants()) is not None:
            inspection.feed(extent.start, await self._exactly(original, extent))
        verdict = inspection.verdict
        assert verdict is not None, "it wants nothing more"
        if not verdict.ok or verdict.virtual_size is None:
            self._learn(image, Disk(refused=verdict.reason or "its content cannot be made out"))
            return
        plain = image.disk_format in PLAIN
        self._learn(image, Disk(size=verdict.virtual_size, format=verdict.real_format, seen=plain))

    async def _inspect_inside(self, image: Image, view: StoredView, disk: Disk) -> None:
        inspection = guest_disk_inspection(view.size)
        while (extent := inspection.wants()) is not None:
            inspection.feed(extent.start, await self._exactly(view, extent))
        verdict = inspection.verdict
        assert verdict is not None, "it wants nothing more"
        if verdict.ok:
            self._learn(image, Disk(size=disk.size, format=disk.format, seen=True))
        else:
            self._learn(image, Disk(refused=verdict.reason))

    def _still(self, image: Image) -> Image:
        """The same image, as it is known now. Raises NoEntry when it is gone, whatever has its id by now."""
        known = self._catalog.known(image.id)
        if known is None or known.number != image.number:
            raise NoEntry(image.id)
        return known

    def _learn(self, image: Image, disk: Disk) -> None:
        """Remembers what was found of `image`, unless that is another one by now, or said to be something else."""
        known = self._catalog.known(image.id)
        if known is None or (known.number, known.disk_format) != (image.number, image.disk_format):
            return
        if known.disk is not None and known.disk.refused is not None:
            return  # For good.
        if disk.refused is not None:
            log.warning("[image %s] refused as a disk: %s", image.id, disk.refused)
        self._catalog.learn_disk(image.id, disk)

    def _refuse(self, image: Image, error: FormatError) -> ImageRefused:
        """What was to be translated turned out to lie."""
        self._learn(image, Disk(refused=error.reason))
        return ImageRefused(image.id, error.reason)

    def forget(self, image: str) -> None:
        """The image is gone."""
        for key in [key for key in self._mappings if key[0] == image]:
            del self._mappings[key]

    # ── bytes of the file ──

    def _original(self, image: Image) -> StoredView:
        return self._store.view(image.id, ViewKind.ORIGINAL, image.size)

    async def _exactly(self, view: StoredView, extent: Extent) -> bytes:
        """Bytes through the view, and into the store: what is looked at again."""
        return bytes(await self._blocks.read_just(view, extent))

    async def _file(self, inside: _Inside, fetch: Fetch) -> bytes | memoryview:
        """Bytes that are to be kept as those of the disk: from Glance, unless they are here or on their way.
        What is fetched for less than half of it is kept as the file's, so that it is not fetched over and over."""
        original, extent = inside.original, fetch.extent
        await self._blocks.load(original, extent)
        absent = original.absent(extent)
        here = original.is_well and not any(self._fetcher.not_under_way(original, gap) for gap in absent)
        if not here and not fetch.is_wasteful and original.record.origin is not OriginMode.STREAM:
            body = _Body(inside.image.id, extent)
            try:
                await self._fetcher.ask(inside.flight, inside.image.id, original.size, extent, body)
            except RangeRefused:
                self._store.set_origin(original, OriginMode.STREAM)
            else:
                return body.whole()
        return bytes(await self._blocks.read_just(original, extent))

    # ── bytes of the disk ──

    async def bring(self, flight: Flight, sink: FlightSink) -> None:
        """Gives `sink` the bytes of the disk from `flight.at` to the end of the flight. Raises OriginError."""
        view = flight.view
        image = self._catalog.known(view.record.image)
        if image is None or self._store.known_view(image.id, ViewKind.RAW) is not view:
            raise ImageGone(view.record.image, "what its disk is made of is known no more")
        if image.disk_format != "qcow2":
            if self._converted is None:
                raise ImageRefused(image.id, "qemu-utils is not installed")
            try:
                await self._converted.fetch(image.id, view.size, Extent(flight.at, flight.extent.end), sink)
            except ConversionRefused as error:
                if isinstance(error, ToolMissing):
                    raise
                raise self._refuse(image, FormatError(error.detail)) from error
            return
        original = self._original(image)
        try:
            mapping = await self._mapping(image, original)
            if mapping.header.size != view.size:
                raise FormatError(f"its disk of {view.size} bytes has {mapping.header.size} now")
            await self._translate(_Inside(flight, image, original, mapping), sink)
        except FormatError as error:
            raise self._refuse(image, error) from error

    async def _mapping(self, image: Image, original: StoredView) -> Mapping:
        key = image.id, image.number
        mapping = self._mappings.get(key)
        if mapping is None:
            head = await self._exactly(original, Extent(0, min(HEAD_MAX, image.size)))
            mapping = self._mappings.setdefault(key, Mapping(Header.parse(head, image.size), TABLES_MAX))
            while len(self._mappings) > MAPPINGS_MAX:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(key)
        return mapping

    async def _translate(self, inside: _Inside, sink: FlightSink) -> None:
        pending: deque[_Step] = deque()
        error: OriginError | None = None
        whole = Extent(inside.flight.at, inside.flight.extent.end)
        async with trio.open_nursery() as nursery:
            for extent in _steps(whole, inside.mapping.header.cluster_size):
                if len(pending) == STEPS_AT_ONCE:
                    error = await _deliver(pending.popleft(), sink)
                if error is not None:
                    break
                pending.append(_Step(extent))
                nursery.start_soon(self._work, inside, pending[-1])
            while pending and error is None:
                error = await _deliver(pending.popleft(), sink)
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _work(self, inside: _Inside, step: _Step) -> None:
        try:
            pieces = await self._pieces(inside, step.extent)
            plan = sequential_plan(step.extent.start, pieces, GAP_MAX, FETCH_MAX)
            await _each((partial(self._fill, inside, fetch, step) for fetch in plan.fetches), FETCHES_AT_ONCE)
        except FormatError as error:
            step.error = self._refuse(inside.image, error)
        except OriginError as error:
            step.error = error
        except Exception:
            log.exception("[image %s] unexpected failure of a translation", inside.image.id)
            step.error = OriginUnavailable(inside.image.id, "unexpected failure of a translation")
        step.done.set()

    async def _pieces(self, inside: _Inside, extent: Extent) -> list[Piece]:
        for _ in range(LOOKUPS_MAX):
            found = inside.mapping.lookup(extent.start, extent.length)
            if not isinstance(found, Need):
                return found
            got: list[tuple[Extent, bytes]] = []

            async def bring(extent: Extent, got: list[tuple[Extent, bytes]] = got) -> None:
                got.append((extent, await self._exactly(inside.original, extent)))

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
        raise OriginUnavailable(inside.image.id, "its tables do not stay in memory")

    async def _fill(self, inside: _Inside, fetch: Fetch, step: _Step) -> None:
        """Fetches, and puts what the bytes are or hold to its place."""
        await self._fetched.take(inside.flight, fetch.extent.length)
        try:
            data = memoryview(await self._file(inside, fetch))
            await self._place(inside.mapping.header, fetch, data, step)
        finally:
            self._fetched.give_back(fetch.extent.length)

    async def _place(self, header: Header, fetch: Fetch, data: memoryview, step: _Step) -> None:
        out = memoryview(step.out)
        packed: list[Placed] = []
        for part in fetch.parts:
            if isinstance(part.piece, Data):
                at, source = part.disk_offset - step.extent.start, part.piece.file_offset - fetch.extent.start
                out[at : at + part.piece.length] = data[source : source + part.piece.length]
            else:
                packed.append(part)

        async def unpack(some: list[Placed]) -> None:
            await trio.to_thread.run_sync(
                _unpack, header, some, data, fetch.extent.start, out, step.extent.start, limiter=self._unpacking
            )

        batch = max(1, UNPACK_BATCH // header.cluster_size)
        batches = (packed[first : first + batch] for first in range(0, len(packed), batch))
        await _each((partial(unpack, some) for some in batches), UNPACK_AT_ONCE)


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


def _steps(whole: Extent, cluster: int) -> Iterator[Extent]:
    """`whole` in pieces that grow, and end on clusters."""
    at, length = whole.start, STEP_FIRST
    while at < whole.end:
        end = min(ceil(at + length, cluster), whole.end)
        yield Extent(at, end)
        at, length = end, min(length * 2, STEP_MAX)


async def _deliver(step: _Step, sink: FlightSink) -> OriginError | None:
    """Hands on what a step came to, in the order of the disk."""
    await step.done.wait()
    if step.error is not None:
        return step.error
    left = memoryview(step.out)
    while left:
        room = await sink.room()
        n = min(len(room), len(left))
        room[:n] = left[:n]
        sink.arrived(n)
        left = left[n:]
    return None


class _Body:
    """Takes one extent of the file, whole."""

    def __init__(self, image: str, extent: Extent) -> None:
        self._image = image
        self._data = memoryview(bytearray(extent.length))
        self._at = 0

    async def room(self) -> memoryview:
        if self._at == len(self._data):
            raise OriginLied(self._image, "more bytes came than were asked for")
        return self._data[self._at :]

    def room_now(self) -> memoryview | None:
        return self._data[self._at :] if self._at < len(self._data) else None

    def awaited(self, n: int) -> bool:
        return self._at + n >= len(self._data)

    def arrived(self, n: int) -> None:
        self._at += n

    def whole(self) -> memoryview:
        if self._at < len(self._data):
            raise OriginLied(self._image, f"the body ended {len(self._data) - self._at} bytes early")
        return self._data
