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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import trio

from cachefs.arriving import FlightSink
from cachefs.blocks import Blocks
from cachefs.catalog import Catalog, Disk, Image
from cachefs.errors import FormatError, ImageRefused, OriginError, OriginLied, OriginUnavailable, RangeRefused
from cachefs.fetcher import Fetcher
from cachefs.flights import Flight
from cachefs.formats.decompress import decompress
from cachefs.formats.inspection import Inspection, guest_disk_inspection
from cachefs.formats.qcow2 import Compressed, Data, Mapping, Need, Piece
from cachefs.formats.qcow2_fetch import Fetch, Placed, sequential_plan
from cachefs.formats.qcow2_header import HEAD_MAX, Header
from cachefs.plan.extents import Extent, ceil
from cachefs.sources import Source
from cachefs.store.content import Store, StoredView
from cachefs.store.format import OriginMode, ViewKind

log = logging.getLogger(__name__)

# What of the disk is translated in one go: little first, so that who waits for the first byte does not wait long.
STEP_FIRST, STEP_MAX = 512 << 10, 4 << 20
# So many steps are under way at once in one flight: the link is busy while clusters are unpacked.
STEPS_AT_ONCE = 3
# Fetched along where it lies between two wanted extents of the file: cheaper than another request.
GAP_MAX = 256 << 10
# Requests at once for one step, where a disk lies scattered in its file.
FETCHES_AT_ONCE = 4
# Clusters that are unpacked in one hop to a thread.
UNPACK_BATCH = 1 << 20
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


class GuestDisks:
    """See the module. `converted` is None where there is no tool for other formats. All on the loop."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        fetcher: Fetcher,
        blocks: Blocks,
        converted: Callable[[], Source] | None = None,
    ) -> None:
        self._catalog, self._store, self._fetcher, self._blocks = catalog, store, fetcher, blocks
        self._converted = converted
        self._mappings: OrderedDict[str, Mapping] = OrderedDict()
        self._inspecting: dict[str, trio.Lock] = {}
        self._unpacking = trio.CapacityLimiter(2)

    # ── what is inside ──

    async def inspect(self, image: Image) -> Disk:
        """What is known of the disk inside, asked for once. Raises OriginError when that cannot be had now. A
        refused one has a reason and no size."""
        if image.disk is not None:
            return image.disk
        lock = self._inspecting.setdefault(image.id, trio.Lock())
        try:
            async with lock:
                known = self._catalog.known(image.id) or image
                if known.disk is None:
                    disk = await self._inspect(image)
                    self._learn(image, disk)
                    return disk
                return known.disk
        finally:
            if not lock.locked():
                self._inspecting.pop(image.id, None)

    async def _inspect(self, image: Image) -> Disk:
        original = self._original(image)
        inspection = Inspection(image.disk_format, image.size)
        while (extent := inspection.wants()) is not None:
            inspection.feed(extent.start, await self._exactly(original, extent))
        verdict = inspection.verdict
        assert verdict is not None, "it wants nothing more"
        if not verdict.ok or verdict.virtual_size is None:
            return Disk(refused=verdict.reason or "its content cannot be made out")
        plain = image.disk_format in PLAIN
        if not plain and image.disk_format != "qcow2" and self._converted is None:
            return Disk(size=verdict.virtual_size, format=verdict.real_format)
        return Disk(size=verdict.virtual_size, format=verdict.real_format, seen=plain)

    async def open(self, image: Image) -> StoredView:
        """The view of the disk, which may be read from now on. Raises ImageRefused, or OriginError."""
        disk = await self.inspect(image)
        if disk.refused is not None:
            raise ImageRefused(image.id, disk.refused)
        assert disk.size is not None, "what is not refused has a size"
        if image.disk_format in PLAIN:
            return self._original(image)
        if image.disk_format != "qcow2" and self._converted is None:
            raise ImageRefused(image.id, f"a disk in {image.disk_format} needs qemu-utils, which is not installed")
        view = self._store.view(image.id, ViewKind.RAW, disk.size)
        if not disk.seen:
            await self._inspect_inside(image, view, disk)
        return view

    async def _inspect_inside(self, image: Image, view: StoredView, disk: Disk) -> None:
        inspection = guest_disk_inspection(view.size)
        while (extent := inspection.wants()) is not None:
            inspection.feed(extent.start, bytes(await self._blocks.read_just(view, extent)))
        verdict = inspection.verdict
        assert verdict is not None, "it wants nothing more"
        if not verdict.ok:
            self._learn(image, Disk(refused=verdict.reason))
            raise ImageRefused(image.id, verdict.reason)
        self._learn(image, Disk(size=disk.size, format=disk.format, seen=True))

    def _learn(self, image: Image, disk: Disk) -> None:
        if disk.refused is not None:
            log.warning("[image %s] refused as a disk: %s", image.id, disk.refused)
        self._catalog.learn_disk(image.id, disk)

    def _refuse(self, image: str, reason: str) -> ImageRefused:
        known = self._catalog.known(image)
        if known is not None and (known.disk is None or known.disk.refused is None):
            self._learn(known, Disk(refused=reason))
        return ImageRefused(image, reason)

    def forget(self, image: str) -> None:
        """The image is gone."""
        self._mappings.pop(image, None)

    # ── bytes of the file ──

    def _original(self, image: Image) -> StoredView:
        return self._store.view(image.id, ViewKind.ORIGINAL, image.size)

    async def _exactly(self, view: StoredView, extent: Extent) -> bytes:
        """Bytes through the view, and into the store: what is looked at again."""
        return bytes(await self._blocks.read_just(view, extent))

    async def _file(self, flight: Flight, original: StoredView, extent: Extent) -> bytes | memoryview:
        """Bytes that are to be kept as those of the disk: from Glance, unless the file is here, or comes whole."""
        await self._blocks.load(original, extent)
        here = not original.absent(extent) and original.is_well
        if not here and original.record.origin is not OriginMode.STREAM:
            body = _Body(original.record.image, extent)
            try:
                await self._fetcher.ask(flight, original.record.image, original.size, extent, body)
            except RangeRefused:
                self._store.set_origin(original, OriginMode.STREAM)
            else:
                return body.whole()
        return bytes(await self._blocks.read_just(original, extent))

    # ── bytes of the disk ──

    async def bring(self, flight: Flight, sink: FlightSink) -> None:
        """Gives `sink` the bytes of the disk from `flight.at` to the end of the flight. Raises OriginError."""
        image = self._catalog.known(flight.view.record.image)
        if image is None:
            raise OriginUnavailable(flight.view.record.image, "nothing is known of the image any more")
        if image.disk_format != "qcow2":
            if self._converted is None:
                raise ImageRefused(image.id, "qemu-utils is not installed")
            rest = Extent(flight.at, flight.extent.end)
            await self._converted().fetch(image.id, flight.view.size, rest, sink)
            return
        try:
            await self._translate(flight, image, await self._mapping(image), sink)
        except FormatError as error:
            raise self._refuse(image.id, error.reason) from error

    async def _mapping(self, image: Image) -> Mapping:
        mapping = self._mappings.get(image.id)
        if mapping is None:
            head = await self._exactly(self._original(image), Extent(0, min(HEAD_MAX, image.size)))
            mapping = self._mappings.setdefault(image.id, Mapping(Header.parse(head, image.size), TABLES_MAX))
            while len(self._mappings) > MAPPINGS_MAX:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(image.id)
        return mapping

    async def _translate(self, flight: Flight, image: Image, mapping: Mapping, sink: FlightSink) -> None:
        pending: deque[_Step] = deque()
        async with trio.open_nursery() as nursery:
            for extent in _steps(Extent(flight.at, flight.extent.end), mapping.header.cluster_size):
                step = _Step(extent)
                nursery.start_soon(self._work, flight, image, mapping, step)
                pending.append(step)
                if len(pending) == STEPS_AT_ONCE and (error := await _deliver(pending.popleft(), sink)):
                    break
            else:
                error = None
                while pending and error is None:
                    error = await _deliver(pending.popleft(), sink)
            nursery.cancel_scope.cancel()
        if error is not None:
            raise error

    async def _work(self, flight: Flight, image: Image, mapping: Mapping, step: _Step) -> None:
        try:
            pieces = await self._pieces(image, mapping, step.extent)
            plan = sequential_plan(step.extent.start, pieces, GAP_MAX)
            limit = trio.CapacityLimiter(FETCHES_AT_ONCE)
            failed: list[OriginError] = []

            async def one(fetch: Fetch) -> None:
                async with limit:
                    try:
                        if not failed:
                            data = await self._file(flight, self._original(image), fetch.extent)
                            await self._place(mapping.header, fetch, memoryview(data), step)
                    except (OriginError, FormatError) as error:
                        failed.append(self._as_origin_error(image, error))

            async with trio.open_nursery() as nursery:
                for fetch in plan.fetches:
                    nursery.start_soon(one, fetch)
            step.error = failed[0] if failed else None
        except (OriginError, FormatError) as error:
            step.error = self._as_origin_error(image, error)
        except Exception:
            log.exception("[image %s] unexpected failure of a translation", image.id)
            step.error = OriginUnavailable(image.id, "unexpected failure of a translation")
        step.done.set()

    def _as_origin_error(self, image: Image, error: OriginError | FormatError) -> OriginError:
        return self._refuse(image.id, error.reason) if isinstance(error, FormatError) else error

    async def _pieces(self, image: Image, mapping: Mapping, extent: Extent) -> list[Piece]:
        original = self._original(image)
        for _ in range(LOOKUPS_MAX):
            found = mapping.lookup(extent.start, extent.length)
            if not isinstance(found, Need):
                return found
            tables = [(need, await self._exactly(original, need)) for need in found.extents]
            for need, data in tables:  # No await in between: nobody pushes them out.
                mapping.feed(need.start, data)
        raise OriginUnavailable(image.id, "its tables do not stay in memory")

    async def _place(self, header: Header, fetch: Fetch, data: memoryview, step: _Step) -> None:
        out = memoryview(step.out)
        packed: list[Placed] = []
        for part in fetch.parts:
            if isinstance(part.piece, Data):
                at, source = part.disk_offset - step.extent.start, part.piece.file_offset - fetch.extent.start
                out[at : at + part.piece.length] = data[source : source + part.piece.length]
            else:
                packed.append(part)
        batch = max(1, UNPACK_BATCH // header.cluster_size)
        async with trio.open_nursery() as nursery:
            failed: list[FormatError] = []

            async def unpack(some: list[Placed]) -> None:
                try:
                    await trio.to_thread.run_sync(
                        _unpack, header, some, data, fetch.extent.start, out, step.extent.start,
                        limiter=self._unpacking,
                    )  # fmt: skip
                except FormatError as error:
                    failed.append(error)

            for first in range(0, len(packed), batch):
                nursery.start_soon(unpack, packed[first : first + batch])
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
