"""The disk of a qcow2, made out of its file once that is here whole and was compared with Glance's hash. Rule: the
origin is asked for nothing, and what is called verified was made of verified bytes, or compared with them.

One pass over the disk, span by span: what is absent of it is made and kept, what is present is compared with what
it should be. So what guests read before, by requests of their own, is verified as well. What the tables say is
zeros becomes holes without a byte being moved: a disk of terabytes of which little is used costs its index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import trio

from cachefs import logs
from cachefs.catalog import Catalog
from cachefs.errors import FormatError, StoreError
from cachefs.fetcher import Fetcher
from cachefs.formats.decompress import decompress
from cachefs.formats.qcow2 import Data, Mapping, Need, Piece, Zero
from cachefs.formats.qcow2_fetch import Fetch, sequential_plan
from cachefs.formats.qcow2_header import CLUSTER_BITS_MAX, Header
from cachefs.guest_disks import TABLES_MAX, GuestDisks
from cachefs.huge import place
from cachefs.leisure import Leisure
from cachefs.plan.extents import PAGE, Extent, ceil, pieces, subtract
from cachefs.store.content import Store
from cachefs.store.format import SpanNo, ViewKind
from cachefs.store.view import StoredView
from cachefs.verifier import promise_of

log = logs.get(__name__)

# Of the file in one hop to a thread, and what may lie between two wanted parts of it: it is read from the disk.
READ_MAX, GAP_MAX = 4 << 20, 64 << 10
# One look at the tables: some 1 ms of the loop.
CLUSTERS_AT_ONCE, LOOKUP_MAX = 1024, 64 << 20
# Spans of zeros in one command to the writer: some 10 ms of its thread.
ZEROS_AT_ONCE = 512
COMPARED_AT_ONCE = 256 << 10  # While it compares, a thread keeps Python's lock.
_TABLE_ROUNDS = 3  # L1 before L2.


class Derivation:
    """Makes and verifies disks. All on the loop."""

    def __init__(
        self, catalog: Catalog, store: Store, fetcher: Fetcher, disks: GuestDisks, leisure: Leisure
    ) -> None:
        self._catalog, self._store, self._fetcher, self._disks = catalog, store, fetcher, disks
        self._leisure = leisure
        self._lost: set[int] = set()
        self.verified = 0  # Since the start, for `status`.

    def original_of(self, view: StoredView) -> StoredView | None:
        """The file that the view is made of; None for a view that is not made of one here."""
        return self._disks.original_of(view)

    def is_wanted(self, view: StoredView) -> bool:
        """Whether something is left to be done for a view that has an original."""
        image = self._catalog.known(view.record.image)
        if view.condemned is not None or (image is not None and image.disk and image.disk.refused is not None):
            return False
        if not view.complete:
            return True
        promised = image is not None and promise_of(image) is not None
        return promised and not (image and image.disk and image.disk.verified)

    def is_ready(self, view: StoredView) -> bool:
        """Whether its file is here, and is what Glance promises (where it promises anything)."""
        original = self.original_of(view)
        if original is None or not original.complete or original.condemned is not None:
            return False
        image = self._catalog.known(view.record.image)
        return image is None or image.verified or promise_of(image) is None

    def lost(self, view: StoredView) -> None:
        """Something of the view is not here any more: what comes in its place was not compared."""
        if view.record.kind is not ViewKind.RAW:
            return
        self._lost.add(view.number)
        image = self._catalog.known(view.record.image)
        if image is not None and image.disk is not None and image.disk.verified:
            self._catalog.learn_disk(image.id, replace(image.disk, verified=False))

    async def derive(self, view: StoredView, goes_on: Callable[[], bool] = lambda: True) -> None:
        """Makes what is absent and compares the rest, as long as `goes_on`. Raises StoreError when the store did
        not give or keep something; ImageRefused for an image that lies; OriginError when a table was lost."""
        original = self.original_of(view)
        assert original is not None, "it is made of a file"
        self._lost.discard(view.number)
        try:
            header = (await self._disks.mapping(original)).header
            if header.size != view.size:
                raise FormatError(f"its disk of {view.size} bytes has {header.size} now")
            one = _Pass(self._store, self._fetcher, self._leisure, view, original, Mapping(header, TABLES_MAX))
            if not await one.run(goes_on):
                return
        except FormatError as error:
            raise self._disks.refuse(view.record.image, error) from error
        image = self._catalog.known(view.record.image)
        if image is None or self._store.known_view(image.id, ViewKind.RAW) is not view:
            return  # Gone, or another one has its id.
        sound = view.complete and view.number not in self._lost and original.complete
        if sound and image.verified and image.disk is not None:
            self.verified += 1
            self._catalog.learn_disk(image.id, replace(image.disk, verified=True))
            log.info("its disk of %d bytes is here whole, and verified", view.size, image=image.id)


class _Pass:
    """One pass over a disk."""

    def __init__(
        self,
        store: Store,
        fetcher: Fetcher,
        leisure: Leisure,
        view: StoredView,
        original: StoredView,
        mapping: Mapping,
    ) -> None:
        self._store, self._fetcher, self._leisure = store, fetcher, leisure
        self._view, self._original, self._mapping = view, original, mapping
        self._zeros: list[SpanNo] = []
        # Its own: a thread that is late may still write to them when the pass is over.
        room = ceil(min(store.span_size, max(view.size, 1)), PAGE)
        self._made, self._found = memoryview(place(room)), memoryview(place(room))
        self._file = memoryview(place(max(READ_MAX, room, 2 << CLUSTER_BITS_MAX)))

    async def run(self, goes_on: Callable[[], bool]) -> bool:
        """Whether it came to its end."""
        span_size = self._store.span_size
        cluster = self._mapping.header.cluster_size
        at_once = max(min(LOOKUP_MAX, CLUSTERS_AT_ONCE * cluster) // span_size, 1) * span_size
        for window in pieces(Extent(0, self._view.size), at_once):
            if not goes_on():
                return False
            await trio.lowlevel.checkpoint()
            spans = range(window.start // span_size, -(-window.end // span_size))
            if _are_zeros(await self._pieces(window)):
                await self._are_zeros(map(SpanNo, spans))
                continue
            for span in map(SpanNo, spans):
                if not goes_on():
                    return False
                await self._span(span)
        await self._keep_zeros()
        return True

    async def _span(self, span: SpanNo) -> None:
        extent = self._view.extent_of(span)
        found = await self._pieces(extent)
        if _are_zeros(found):
            await self._are_zeros([span])
            return
        await self._make(span, extent, found)

    async def _pieces(self, extent: Extent) -> list[Piece]:
        found: list[Piece] = []
        at_once = min(LOOKUP_MAX, CLUSTERS_AT_ONCE * self._mapping.header.cluster_size)
        for part in pieces(extent, at_once):
            if part.start != extent.start:
                await trio.lowlevel.checkpoint()
            found += await self._look_up(part)
        return found

    async def _look_up(self, extent: Extent) -> list[Piece]:
        for _ in range(_TABLE_ROUNDS):
            found = self._mapping.lookup(extent.start, extent.length)
            if not isinstance(found, Need):
                return found
            tables = [(need.start, await self._original.read(need.start, need.length)) for need in found.extents]
            for start, table in tables:
                self._mapping.feed(start, bytes(table))
        raise FormatError("its tables do not come to an end")

    # ── zeros ──

    async def _are_zeros(self, spans: Iterable[SpanNo]) -> None:
        for span in spans:
            self._zeros.append(span)
            if len(self._zeros) >= ZEROS_AT_ONCE:
                await self._keep_zeros()

    async def _keep_zeros(self) -> None:
        zeros, self._zeros = self._zeros, []
        if not zeros:
            return
        began_s = trio.current_time()
        others = await self._store.keep_zeros(self._view, zeros)
        await self._leisure.pause(trio.current_time() - began_s)
        for span in others:
            extent = self._view.extent_of(span)
            await self._make(span, extent, [Zero(extent.length)])

    # ── bytes ──

    async def _make(self, span: SpanNo, extent: Extent, found: list[Piece]) -> None:
        began_s = trio.current_time()
        header, made = self._mapping.header, self._made
        plan = sequential_plan(extent.start, found, GAP_MAX, READ_MAX)
        for zeros in plan.zeros:
            made[zeros.start - extent.start : zeros.end - extent.start] = bytes(zeros.length)
        made[extent.length : ceil(extent.length, PAGE)] = bytes(ceil(extent.length, PAGE) - extent.length)
        for fetch in plan.fetches:
            place = partial(_place, header, fetch, made, extent.start)
            await self._original.look_at(fetch.extent.start, self._file[: fetch.extent.length], place)
        await self._settle(span, extent)
        await self._leisure.pause(trio.current_time() - began_s)

    async def _settle(self, span: SpanNo, extent: Extent) -> None:
        """What is present must be what was made; what is absent becomes it."""
        view = self._view
        is_alone = self._fetcher.not_under_way(view, extent) == [extent]
        await view.load(extent)
        gaps = view.absent(extent)
        for part in subtract(extent, gaps):
            if not await self._is_right(extent, part):
                await self._drop(span, extent)
                gaps = [extent]
                break
        for gap in gaps:
            await self._keep(extent, gap)
        if is_alone and self._fetcher.not_under_way(view, extent) == [extent]:
            return
        # What somebody else brought meanwhile was not looked at.
        if not await self._is_right(extent, extent):
            await self._drop(span, extent)
            await self._keep(extent, extent)

    async def _is_right(self, extent: Extent, part: Extent) -> bool:
        expected = self._made[part.start - extent.start : part.end - extent.start]
        return await self._view.look_at(part.start, self._found[: part.length], partial(_same, expected))

    async def _drop(self, span: SpanNo, extent: Extent) -> None:
        log.error(
            "bytes of its disk within %d-%d are not those of its file, which has Glance's hash: they "
            "came wrong from the origin, and are dropped", extent.start, extent.end, image=self._view.record.image,
        )  # fmt: skip
        await self._store.evict([(self._view.number, span)])

    async def _keep(self, extent: Extent, gap: Extent) -> None:
        done, kept = trio.Event(), [False]

        def landed(was_kept: bool) -> None:
            kept[0] = was_kept
            done.set()

        data = self._made[gap.start - extent.start : ceil(gap.end - extent.start, PAGE)]
        self._store.keep(self._view, gap.start, data.toreadonly(), landed)
        await done.wait()
        if not kept[0]:
            raise StoreError(self._store.writer.trouble or "what was made of the disk is not kept")


def _are_zeros(found: list[Piece]) -> bool:
    return all(isinstance(piece, Zero) for piece in found)


def _place(header: Header, fetch: Fetch, out: memoryview, out_at: int, data: memoryview) -> None:
    """In a thread: the disk's bytes that `data` holds, each to its place."""
    for offset, piece in fetch.parts:
        source = piece.file_offset - fetch.extent.start
        at = offset - out_at
        if isinstance(piece, Data):
            out[at : at + piece.length] = data[source : source + piece.length]
        else:
            cluster = decompress(
                header.compression, data[source : source + piece.file_length], header.cluster_size
            )
            out[at : at + piece.length] = memoryview(cluster)[piece.within : piece.within + piece.length]


def _same(expected: memoryview, found: memoryview) -> bool:
    """In a thread. Comparing memoryviews goes byte by byte."""
    return all(
        bytes(expected[at : at + COMPARED_AT_ONCE]) == bytes(found[at : at + COMPARED_AT_ONCE])
        for at in range(0, len(expected), COMPARED_AT_ONCE)
    )
