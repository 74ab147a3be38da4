"""The guest disk inside an image: its size, whether it may be served, and its bytes. Rule: what an image says of
itself is believed only after inspection, and never becomes a path, a URL or a command.

An image is inspected when its size is asked for: a few KiB, remembered from then on. When it is opened, the first
bytes of the disk inside are inspected too. A plain image is its own disk. The disk of a qcow2 is a view of its
own (`ViewKind.RAW`), fetched by clusters: tables are read through the image's own view, so that they are kept;
clusters come straight from Glance and are kept once, as the disk's bytes. All other formats are converted.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import trio

from cachefs import logs
from cachefs.arriving import FlightSink
from cachefs.blocks import Blocks
from cachefs.catalog import Catalog, Disk, Image
from cachefs.errors import (
    CachefsError,
    FormatError,
    ImageCondemned,
    ImageGone,
    ImageRefused,
    NoEntry,
)
from cachefs.fetcher import Fetcher
from cachefs.flights import Flight
from cachefs.formats.inspection import Inspection, guest_disk_inspection
from cachefs.formats.qcow2 import Mapping, Need
from cachefs.formats.qcow2_fetch import front, reach
from cachefs.formats.qcow2_header import HEAD_MAX, Header
from cachefs.plan.extents import BLOCK, Extent, floor
from cachefs.sources import Source
from cachefs.sources.converted import ConversionRefused, ToolMissing
from cachefs.store.content import Store
from cachefs.store.format import ViewKind, ViewNo
from cachefs.store.view import StoredView
from cachefs.translation import Inside, Translator

log = logs.get(__name__)

# How far one look at the tables goes for a window, in bytes and in clusters: some 0.1 ms of the loop.
REACH_MAX, REACH_CLUSTERS = 16 << 20, 256

# Images whose tables are kept in memory (4 MiB each at most).
MAPPINGS_MAX, TABLES_MAX = 16, 4 << 20
# Formats of Glance whose file is the disk.
PLAIN = frozenset({"raw", "iso", "ami", "ari", "aki"})


class Converted(Source, Protocol):
    """Gives the disks of formats that are not translated here."""


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
        self._mappings: OrderedDict[ViewNo, Mapping] = OrderedDict()  # By the view of the file.
        self._looking: dict[str, _Looking] = {}
        self._translator = Translator(store, fetcher, blocks)
        self.keep_files = self._translator.keep_files

    # ── what is inside ──

    async def inspect(self, image: Image) -> Disk:
        """What is known of the disk inside, asked for once. Raises OriginError when that cannot be had now, and
        NoEntry when the image is gone meanwhile. A refused one has a reason and no size."""
        while (disk := (image := self._still(image)).disk) is None:
            if image.condemned is not None:
                raise ImageCondemned(image.id, image.condemned)
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
            if (why_not := self.why_not(image)) is not None:
                raise ImageRefused(image.id, why_not)
            assert disk.size is not None, "what is not refused has a size"
            if image.disk_format in PLAIN:
                return self._original(image)
            view = self._store.view(image.id, ViewKind.RAW, disk.size)
            if disk.seen:
                return view
            await self._look(image.id, partial(self._inspect_inside, image, view, disk))

    def why_not(self, image: Image) -> str | None:
        """Why its disk is not served, as far as is known; None where it is."""
        if image.disk is not None and image.disk.refused is not None:
            return image.disk.refused
        if image.disk_format != "qcow2" and image.disk_format not in PLAIN and self._converted is None:
            return f"a disk in {image.disk_format} needs qemu-utils: not installed"
        return None

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
        if (first := inspection.wants()) is not None:
            await self._fetch_front(view, first)
        while (extent := inspection.wants()) is not None:
            inspection.feed(extent.start, await self._exactly(view, extent))
        verdict = inspection.verdict
        assert verdict is not None, "it wants nothing more"
        if verdict.ok:
            self._learn(image, Disk(size=disk.size, format=disk.format, seen=True))
        else:
            self._learn(image, Disk(refused=verdict.reason))

    async def _fetch_front(self, view: StoredView, first: Extent) -> None:
        """What the first cluster of the disk needs comes with one request, unless `first` of it is here."""
        await self._blocks.load(view, first)
        original = self.original_of(view)
        if original is None or not view.absent(first):
            return
        try:
            extent = front((await self.mapping(original)).header)
        except FormatError:
            return  # Who reads it meets that.
        if extent is not None:
            await self._blocks.fetch_just(original, extent)

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
            log.warning("refused as a disk: %s", disk.refused, image=image.id)
        self._catalog.learn_disk(image.id, disk)

    def refuse(self, image: str, error: FormatError) -> ImageRefused:
        """What was to be translated turned out to lie."""
        known = self._catalog.known(image)
        if known is not None:
            self._learn(known, Disk(refused=error.reason))
        return ImageRefused(image, error.reason)

    def forget(self, image: str) -> None:
        """The image is gone, and nobody can open it any more."""
        for number in list(self._mappings):
            view = self._store.view_by_number(number)
            if view is None or view.record.image == image:
                del self._mappings[number]

    # ── bytes of the file ──

    def _original(self, image: Image) -> StoredView:
        return self._store.view(image.id, ViewKind.ORIGINAL, image.size)

    async def _exactly(self, view: StoredView, extent: Extent) -> bytes:
        """Bytes through the view, and into the store: what is looked at again."""
        return bytes(await self._blocks.read_just(view, extent))

    # ── bytes of the disk ──

    def original_of(self, view: StoredView) -> StoredView | None:
        """The file that a disk is translated from. None for what is no such disk, or of an image that is gone."""
        image = self._catalog.known(view.record.image)
        if image is None or image.disk_format != "qcow2":
            return None
        return self._original(image) if self._store.known_view(image.id, ViewKind.RAW) is view else None

    def reach(self, view: StoredView, offset: int, cost: int) -> int:
        """How many bytes of the view, from `offset` on, cost about `cost` bytes of what Glance has, in whole
        blocks and at least `cost`: in a qcow2 much is packed, or not even there. As far as its tables are known;
        whoever reads it meets what is wrong with them."""
        original = self.original_of(view) if view.record.kind is ViewKind.RAW else None
        mapping = self._mappings.get(original.number) if original is not None else None
        if mapping is None:
            return cost
        longest = min(REACH_MAX, REACH_CLUSTERS * mapping.header.cluster_size, mapping.header.size - offset)
        if longest <= cost:
            return cost
        try:
            found = mapping.lookup(offset, longest)
        except FormatError:
            return cost
        return cost if isinstance(found, Need) else max(floor(reach(found, cost), BLOCK), cost)

    async def bring(self, flight: Flight, sink: FlightSink) -> None:
        """Gives `sink` the bytes of the disk from `flight.at` to the end of the flight. Raises OriginError."""
        view = flight.view
        image = self._catalog.known(view.record.image)
        if image is None or self._store.known_view(image.id, ViewKind.RAW) is not view:
            raise ImageGone(view.record.image, "what its disk is made of is known no more")
        original = self.original_of(view)
        if original is None:
            if self._converted is None:
                raise ImageRefused(image.id, "qemu-utils is not installed")
            try:
                await self._converted.fetch(image.id, view.size, Extent(flight.at, flight.extent.end), sink)
            except ConversionRefused as error:
                if isinstance(error, ToolMissing):
                    raise
                raise self.refuse(image.id, FormatError(error.detail)) from error
            return
        try:
            mapping = await self.mapping(original)
            if mapping.header.size != view.size:
                raise FormatError(f"its disk of {view.size} bytes has {mapping.header.size} now")
            await self._translator.translate(Inside(flight, original, mapping), sink)
        except FormatError as error:
            raise self.refuse(view.record.image, error) from error

    async def mapping(self, original: StoredView) -> Mapping:
        """The tables of a qcow2, as far as they are known. Raises OriginError, FormatError."""
        key = original.number
        mapping = self._mappings.get(key)
        if mapping is None:
            head = await self._exactly(original, Extent(0, min(HEAD_MAX, original.size)))
            mapping = self._mappings.setdefault(key, Mapping(Header.parse(head, original.size), TABLES_MAX))
            while len(self._mappings) > MAPPINGS_MAX:
                self._mappings.popitem(last=False)
        self._mappings.move_to_end(key)
        return mapping
