"""The store as everybody else sees it: views to read, bytes to keep, images to remember. Rule: what is stored is
changed by the writer only; what is asked for here goes into its queue.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from cachefs import huge, logs
from cachefs.errors import RecordCorrupt, StoreError
from cachefs.plan.compaction import Sealed
from cachefs.plan.extents import PAGE, ceil
from cachefs.store import format as f
from cachefs.store import turns
from cachefs.store.committed import CommittedIndex
from cachefs.store.digests import Digests
from cachefs.store.format import OriginMode, SpanNo, Table, ViewKind, ViewNo, ViewRecord
from cachefs.store.health import Health, is_disk_fault, read_probe, write_probe
from cachefs.store.index import MAP_SIZE_FIRST, Index
from cachefs.store.landing import Landed, Lander
from cachefs.store.ledger import Ledger
from cachefs.store.recipe import SpanMap, absent_recipe, unverified
from cachefs.store.recover import Opened, open_store
from cachefs.store.room import Limits, Room, Usage
from cachefs.store.verified import Verified
from cachefs.store.view import READ_MAX, StoredView
from cachefs.store.writer import (
    Drop,
    DropView,
    Land,
    LandZeros,
    Mend,
    Move,
    Put,
    Quarantine,
    Remove,
    Reply,
    SetImage,
    SetView,
    Writer,
)

log = logs.get(__name__)

# About 1 KiB each: the maps of 64 GiB of views, in 16 MiB.
MAPS_MAX = 16384
DISK_READS_MAX = 64
_KEYS_AT_ONCE = 4096
# Looking up a span's chunks touches some 16 pages of the index.
_TRIM_EVERY = 256

T = TypeVar("T")
Args = TypeVarTuple("Args")


class Store:
    """An open store. `run` is the writer's task; `close` after it has returned. All on one trio loop."""

    def __init__(
        self,
        opened: Opened,
        limits: Callable[[], Limits],
        commit_interval_s: float = 1.0,
        *,
        verify_first_read: bool = True,
        health: Health | None = None,
    ) -> None:
        self._limits = limits
        self.verified = Verified(everything=not verify_first_read)
        # Set by whoever makes room, and whoever mends: see `Evictor` and `Scrubber`.
        self.on_full: Callable[[int], None] | None = None
        self.on_loss: Callable[[StoredView], None] = lambda view: None  # Something of it went.
        self.on_whole: Callable[[StoredView], None] = lambda view: None  # Its last byte has come.
        self.on_partial: Callable[[StoredView], None] = lambda view: None  # It was whole until now.
        self.on_rot: Callable[[Sequence[f.ChunkId]], None] = lambda chunks: None
        self.used_and_forgotten: deque[tuple[ViewNo, int]] = deque(maxlen=MAPS_MAX)  # Spans whose maps went.
        self._opened = opened
        self.path = opened.folder
        self.span_size = opened.record.span_size
        self.uuid = opened.record.uuid
        self.segments, self._index = opened.segments, opened.index
        self.buffer = huge.buffer(READ_MAX)
        self.disk_reads = trio.CapacityLimiter(DISK_READS_MAX)
        self.images: dict[str, dict[str, Any]] = {}
        self._views: dict[ViewNo, StoredView] = {}
        self._by_image: dict[tuple[str, ViewKind, int], StoredView] = {}
        self._maps_known: deque[tuple[StoredView, int]] = deque()
        self._next_view = opened.counters.view
        self._next_image = opened.counters.image
        self.read_errors = 0
        self._looked_up = 0
        self.health = Health() if health is None else health
        self.health.on_change = self._health_changed
        room = Room(self.usage)

        def lander(ledger: Ledger) -> Lander:
            made = Lander(
                ledger,
                opened.segments,
                self.span_size,
                room,
                self.verified,
                lambda: self.health.may_look_up,
            )
            made.continue_segment(opened.append_to)
            opened.append_to = None  # After a failed commit appends begin in a new segment.
            return made

        for number, record in opened.views.items():
            self._add_view(number, record)
        self._load_images()
        self.writer = Writer(
            opened.index,
            opened.segments,
            self._ledger(opened.counters, opened.views, opened.segment_records),
            lander,
            self._reload,
            self,
            commit_interval_s,
            self.health.writes.patiently,
        )
        self.digests = Digests(self)
        self.digests.load_marks()

    @classmethod
    def open(
        cls,
        folder: Path,
        limits: Callable[[], Limits] = lambda: Limits(1 << 62, 0),
        span_size: int | None = None,
        commit_interval_s: float = 1.0,
        map_size: int = MAP_SIZE_FIRST,
        *,
        verify_first_read: bool = True,
        health: Health | None = None,
    ) -> Store:
        """Opens or makes the store in `folder`, recovering what a crash left. Raises StoreUnusable."""
        opened = open_store(folder, span_size, map_size)
        return cls(opened, limits, commit_interval_s, verify_first_read=verify_first_read, health=health)

    async def run(self) -> None:
        """Until `writer.stop`: everything that was handed over is landed and committed then."""
        async with trio.open_nursery() as nursery:
            probes = partial(read_probe, self.segments.files), partial(write_probe, self.path)
            nursery.start_soon(self.health.run, *probes)
            await self.writer.run()
            nursery.cancel_scope.cancel()

    async def read_disk(self, what: str, work: Callable[[*Args], T], *args: *Args) -> T:
        """What `work` returns, from a thread that may wait for the disk. Raises DiskUnusable when that fails, or
        takes too long."""
        return await self.health.reads.attempt(what, work, *args, limiter=self.disk_reads)

    def _health_changed(self) -> None:
        if not self.health.may_write:
            self.writer.refuse_queued()

    def close(self) -> None:
        self._opened.close()

    # ── views ──

    def view(self, image: str, kind: ViewKind, size: int, number: ViewNo | None = None) -> StoredView:
        """The view of `image`, remembered from now on; a new one gets `number`, if that was given by
        `new_view_number`. There is one resized view for each size; else an image's bytes never change, so a
        size that differs from the stored one is an error of the origin: StoreError."""
        found = self._by_image.get(_view_key(image, kind, size))
        if found is not None:
            if found.size != size:
                raise StoreError(f"image {image} had {found.size} bytes and is said to have {size}")
            return found
        number = self.new_view_number() if number is None else number
        record = ViewRecord(image, kind, size)
        self.writer.submit(SetView(number, record))
        return self._add_view(number, record)

    def new_view_number(self) -> ViewNo:
        """A number that no view of this store had or will have."""
        number = ViewNo(self._next_view)
        self._next_view += 1
        return number

    def known_view(self, image: str, kind: ViewKind, size: int = 0) -> StoredView | None:
        """`size` matters for a resized view only."""
        return self._by_image.get(_view_key(image, kind, size))

    def resized_views(self, image: str) -> list[StoredView]:
        """Those that were opened, by size."""
        found = [view for key, view in self._by_image.items() if key[:2] == (image, ViewKind.RESIZED)]
        return sorted(found, key=lambda view: view.size)

    def view_by_number(self, number: ViewNo) -> StoredView | None:
        return self._views.get(number)

    def end_views(self, image: str) -> None:
        """The image is gone for good. Whoever has it open reads on; should its id ever come to mean other bytes,
        they get views of their own. What these hold is to be freed."""
        for key in [key for key in self._by_image if key[0] == image]:
            view = self._by_image.pop(key)
            view.record = replace(view.record, kind=ViewKind.ENDED)
            self.writer.submit(SetView(view.number, view.record))
        self.digests.changed.pop(image, None)

    def set_origin(self, view: StoredView, origin: OriginMode) -> None:
        """Remembers how the origin gives the image's bytes."""
        if view.record.origin is not origin:
            view.record = replace(view.record, origin=origin)
            self.writer.submit(SetView(view.number, view.record))

    def _add_view(self, number: ViewNo, record: ViewRecord) -> StoredView:
        view = StoredView(self, number, record)
        self._views[number] = view
        if record.kind is not ViewKind.ENDED:
            self._by_image[_view_key(record.image, record.kind, record.size)] = view
        return view

    def keep(
        self,
        view: StoredView,
        offset: int,
        data: memoryview,
        done: Callable[[bool], None],
        *,
        in_passing: bool = False,
    ) -> None:
        """Lands `data`, which begins on a page at `offset`, ends on one or at the view's end (padded with
        zeros to a page), and lies in one span. `done(kept)` is called on the loop, later or at once. `in_passing`:
        nobody is expected to read it soon, so it is kept out of the kernel's cache."""
        assert offset % PAGE == 0, "what lands begins on a page"
        assert len(data) % PAGE == 0, "what lands is whole pages"
        if not self.health.may_write:
            self.writer.refuse(Land(view.number, SpanNo(0), 0, data, done))
            return
        span = SpanNo(offset // self.span_size)
        self.writer.submit(Land(view.number, span, offset - span * self.span_size, data, done, in_passing))

    async def keep_zeros(self, view: StoredView, spans: Sequence[SpanNo]) -> list[SpanNo]:
        """Those of `spans` of which nothing is here are zeros from now on, without a byte being moved. Returns
        those that have something else than zeros by their map. Raises StoreError when nothing is kept now."""
        if not self.health.may_write:
            raise StoreError("nothing is kept while the disk is not well")
        reply: Reply[list[SpanNo] | None] = Reply(None)
        self.writer.submit(LandZeros(view.number, spans, reply))
        others = await reply.wait()
        if others is None:
            raise StoreError(self.writer.trouble or "there is no room for its index")
        return others

    # ── taking back ──

    async def evict(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> int:
        """These spans become absent, whatever holds them. Returns the bytes of segments that were freed, when
        their space is back. Raises StoreError when that could not be committed."""
        if not self.health.may_look_up:
            raise StoreError("nothing is evicted while the disk is not well")
        reply = Reply(-1)
        self.writer.submit(Drop(spans, reply))
        freed = await reply.wait()
        if freed < 0:
            raise StoreError("what was to be evicted is still there: it could not be committed")
        return freed

    async def mend(self, spans: Sequence[tuple[ViewNo, SpanNo]]) -> int:
        """What of these spans is in chunks that are missing or rotten becomes absent. Returns how many changed."""
        reply = Reply(0)
        self.writer.submit(Mend(spans, reply))
        return await reply.wait()

    async def quarantine(
        self, chunks: Sequence[f.ChunkId], seen: Mapping[f.ChunkId, tuple[f.SegmentNo, int]] | None = None
    ) -> list[f.ChunkId]:
        """Looks at these chunks again; returns those that are rotten, which nobody will read again. Those that
        were `seen` to be rotten on the disk, at a segment and page, are if they still lie there."""
        reply: Reply[list[f.ChunkId]] = Reply([])
        self.writer.submit(Quarantine(chunks, seen or {}, reply))
        return await reply.wait()

    async def move(self, chunks: Sequence[f.ChunkId], sources: frozenset[f.SegmentNo]) -> int:
        """Writes those of the chunks that lie in `sources` once more, to where is appended now. Returns bytes."""
        reply = Reply(0)
        self.writer.submit(Move(chunks, sources, reply))
        return await reply.wait()

    def sealed_segments(self) -> tuple[dict[f.SegmentNo, Sealed], int]:
        """The segments to which nothing is appended, and the bytes of the chunks in all; for a thread."""
        records = dict(self.writer.ledger.segments)
        appended_to = self.writer.lander.appended_to
        sealed = {
            segment: Sealed(record.end, record.live, self.segments.extents(segment))
            for segment, record in records.items()
            if segment != appended_to
        }
        return sealed, sum(record.live for record in records.values())

    def chunks_in(self, segments: Set[f.SegmentNo]) -> list[f.ChunkId]:
        """The committed chunks that lie in `segments`; for a thread. Looks at all there are."""
        found: list[f.ChunkId] = []
        key = b""
        while True:
            with self._index.reading() as snapshot:
                records = snapshot.records(Table.CHUNKS, key, _KEYS_AT_ONCE)
            if not records:
                return found
            found.extend(f.split_chunk_key(key) for key, record in records if f.segment_of(record) in segments)
            key = records[-1][0]
            turns.rest()

    async def remove_lifeless(self) -> int:
        """Removes the segments in which no chunk lies. Returns how many."""
        segments = self.writer.lander.lifeless()
        if not segments:
            return 0
        await self.forget_segments(frozenset(segments))
        reply = Reply(0)
        self.writer.submit(Remove(segments, reply))
        return await reply.wait()

    async def forget_segments(self, segments: frozenset[f.SegmentNo]) -> None:
        """No map that is here now names any of these segments afterwards. New ones come from the ledger."""
        names = segments | {unverified(segment) for segment in segments}
        for view in list(self._views.values()):
            view.forget_maps_of(names)
            await trio.lowlevel.checkpoint()

    def forget_view(self, view: ViewNo) -> None:
        """Forgets an ended view of which nothing is cached, and that nobody has open."""
        found = self._views.get(view)
        if found is not None and found.record.kind is ViewKind.ENDED and not found.cached:
            del self._views[view]
            self.digests.forget(view)
            self.writer.submit(DropView(view))

    async def flush(self) -> None:
        """Returns when everything that was handed over before is durable, or was given up."""
        await self.writer.flush()

    @property
    def index(self) -> Index:
        """For the scrubber, which looks at all of it."""
        return self._index

    def no_room(self) -> None:
        """The answer to `on_full` when nothing can be evicted."""
        self.writer.no_room()

    def usage(self) -> Usage:
        """For a thread: asks the filesystem about every segment."""
        limits = self._limits()
        used = self.segments.blocks_bytes() + self._index.blocks_bytes()
        return Usage(used, self.segments.free_bytes(), limits.max_size, limits.min_free)

    # ── records that nothing refers to ──

    def put(self, table: Table, key: bytes, record: bytes | None) -> None:
        """Goes with the next commit; None removes it."""
        self.writer.submit(Put(table, key, record))

    def get(self, table: Table, key: bytes) -> bytes | None:
        """What is committed; for a thread."""
        with self._index.reading() as snapshot:
            return snapshot.get(table, key)

    def items(self, table: Table, prefix: bytes = b"") -> list[tuple[bytes, bytes]]:
        """What is committed, all at once; for a thread."""
        with self._index.reading() as snapshot:
            return list(snapshot.items(table, prefix))

    def resident(self) -> Iterator[tuple[ViewNo, SpanNo]]:
        """The spans of which something is here, in order; for a thread. Each few thousand are of one moment."""
        key = b""
        while True:
            with self._index.reading() as snapshot:
                keys = snapshot.keys(Table.SPANS, key, _KEYS_AT_ONCE)
            yield from map(f.split_span_key, keys)
            if not keys:
                return
            key = keys[-1]
            turns.rest()

    # ── images ──

    def put_image(self, image: str, fields: dict[str, Any]) -> None:
        """Remembers what is known of an image; writes only what changed."""
        if self.images.get(image) != fields:
            number = 0 if image in self.images else int(fields.get("number", 0))
            self.images[image] = fields
            self.writer.submit(SetImage(f.image_key(image), f.encode_image(image, fields), number))

    def drop_image(self, image: str) -> None:
        if self.images.pop(image, None) is not None:
            self.writer.submit(SetImage(f.image_key(image), None, 0))

    def new_image_number(self) -> int:
        """A number that no image of this store had or will have."""
        number = self._next_image
        self._next_image += 1
        return number

    def _load_images(self) -> None:
        with self._index.reading() as snapshot:
            for key, record in snapshot.items(Table.IMAGES):
                try:
                    image, fields = f.decode_image(key, record)
                except RecordCorrupt as error:
                    log.error("%s: to be asked for again", error)
                    continue
                self.images[image] = fields

    # ── maps ──

    def span_pages(self, size: int, base: int) -> int:
        """How many pages the span that begins at `base` has, in a view of `size` bytes."""
        return ceil(min(self.span_size, size - base), PAGE) // PAGE

    def load_maps(self, view: ViewNo, spans: Sequence[SpanNo], size: int) -> dict[SpanNo, SpanMap]:
        """The maps of spans, from the ledger and the index below it; runs in a thread."""
        ledger = self.writer.ledger
        self._looked_up += len(spans)
        if self._looked_up >= _TRIM_EVERY:  # Threads may lose count; one of the next ones has it.
            self._looked_up = 0
            self._index.trim()
        maps = {}
        for span in spans:
            recipe = ledger.recipe(view, span)
            if recipe is None:
                recipe = absent_recipe(self.span_pages(size, span * self.span_size))
            maps[span] = SpanMap.of(recipe, ledger.chunk, self.verified.__contains__)
        return maps

    def count_map(self, view: StoredView, span: int) -> None:
        """One more map is in memory. Beyond MAPS_MAX the oldest goes, and is remembered if it was used."""
        self._maps_known.append((view, span))
        if len(self._maps_known) > MAPS_MAX:
            old, old_span = self._maps_known.popleft()
            span_map = old.forget_map(old_span)
            if span_map is not None and span_map.used:
                self.used_and_forgotten.append((old.number, old_span))

    def note_read_error(self, error: OSError) -> None:
        """EAGAIN only says that the page is not cached; the rest is counted, and the slow way tries again."""
        if error.errno not in (errno.EAGAIN, errno.EOPNOTSUPP):
            self.read_errors += 1

    # ── what the writer tells ──

    def published(self, landed: Iterable[Landed]) -> None:
        for span in landed:
            view = self._views.get(span.view)
            if view is None:  # It was forgotten while this was on its way: somebody has to evict it again.
                record = self.writer.ledger.views.get(span.view)
                if record is None:
                    continue
                view = self._add_view(span.view, record)
            view.publish(span)

    def committed(self, chunks: Iterable[f.ChunkId]) -> None:
        self.verified.add(chunks)

    def went_back(self, views: Mapping[ViewNo, ViewRecord]) -> None:
        self._forget_maps()
        for number, record in views.items():
            if number in self._views:  # What was decided since, and not committed, still stands.
                mine = self._views[number]
                if record.cached < mine.record.cached:
                    if mine.complete:
                        self.on_partial(mine)
                    self.on_loss(mine)
                mine.record = mine.record.with_cached(record.cached)

    def full(self, wanted: int) -> bool:
        if self.on_full is not None:
            self.on_full(wanted)
        return self.on_full is not None

    def failed(self, error: OSError) -> None:
        if is_disk_fault(error):
            self.health.writes.note_error(f"landing: {error.strerror}")

    def rot_found(self, chunks: Sequence[f.ChunkId]) -> None:
        self._forget_maps()
        self.on_rot(chunks)

    def unreadable(self, chunks: Sequence[f.ChunkId]) -> None:
        # Not all maps are forgotten: the disk may be about to fail, and they could not be loaded again.
        self.on_rot(chunks)

    def _forget_maps(self) -> None:
        for view in self._views.values():
            view.forget_maps()
        self._maps_known.clear()

    # ── ledgers ──

    def _ledger(
        self,
        counters: f.Counters,
        views: Mapping[ViewNo, ViewRecord],
        segments: Mapping[Any, f.SegmentRecord],
    ) -> Ledger:
        return Ledger(CommittedIndex(self._index), counters, views, segments)

    def _reload(self) -> Ledger:
        with self._index.reading() as snapshot:
            counters = f.Counters.decode(snapshot.get(Table.META, f.COUNTERS_KEY) or b"")
            views = {
                ViewNo(int.from_bytes(key, "big")): ViewRecord.decode(key, record)
                for key, record in snapshot.items(Table.VIEWS)
            }
            segments = {
                f.SegmentNo(int.from_bytes(key, "big")): f.SegmentRecord.decode(key, record)
                for key, record in snapshot.items(Table.SEGMENTS)
            }
        return self._ledger(counters, views, segments)

    # ── what there is, for `status` ──

    def views(self) -> list[StoredView]:
        return list(self._views.values())

    def live_bytes(self) -> int:
        """Of all chunks that there are."""
        return sum(record.live for record in list(self.writer.ledger.segments.values()))

    def totals(self) -> dict[str, Any]:
        """For `status`; asks the filesystem, so not for a hot path. Bytes unless said otherwise."""
        lander = self.writer.lander
        usage = self.usage()
        return {
            "path": str(self.path),
            "segments": len(self.segments.files),
            "bytes_on_disk": usage.used,
            "bytes_limit": usage.limit,
            "bytes_free": usage.free,
            "bytes_cached": sum(view.cached for view in self.views()),
            "bytes_landed": lander.bytes_landed,
            "bytes_shared": lander.bytes_shared,
            "bytes_zero": lander.bytes_zero,
            "bytes_not_kept": self.writer.not_kept_bytes,
            "disk": self.health.status(),
            "rotten_chunks_found": lander.rotten_found,
            "read_errors": self.read_errors,
            "commits": self.writer.commits,
            "trouble": self.writer.trouble,
        }


def _view_key(image: str, kind: ViewKind, size: int) -> tuple[str, ViewKind, int]:
    return image, kind, size if kind is ViewKind.RESIZED else 0
