"""The store as everybody else sees it: views to read, bytes to keep, images to remember. Rule: the way of a hit,
from `StoredView.read_now` to its return, has no await, no thread and no look-up but of what is in memory.

Reads go by `SpanMap`s, which the loop alone owns. A map is put in place by `published`, in one step with
everything else that changed, before the writer may punch what the old one named; so a map that was looked up
in this step of the loop names bytes that are there. Whoever waited (for a thread, for the disk) looks up again
and compares before it believes what it read.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import trio

from cachefs import logs
from cachefs.errors import Absent, ImageCondemned, RecordCorrupt, StoreError
from cachefs.plan.compaction import Sealed
from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import PAGE, Extent, ceil, pieces
from cachefs.store import format as f
from cachefs.store.digests import Digests
from cachefs.store.format import OriginMode, SpanNo, Table, ViewKind, ViewNo, ViewRecord
from cachefs.store.health import DiskUnusable, Health, is_disk_fault, read_probe, write_probe
from cachefs.store.index import MAP_SIZE_FIRST, Index, Snapshot
from cachefs.store.landing import Landed, Lander
from cachefs.store.ledger import Ledger
from cachefs.store.recipe import ABSENT, HOLE, Run, SpanMap, absent_recipe, places, unverified
from cachefs.store.recover import Opened, open_store
from cachefs.store.segments import RWF_NOWAIT, CutShort
from cachefs.store.verified import Verified
from cachefs.store.writer import (
    Doubt,
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

# What the kernel asks for at most in one FUSE read (256 pages), and some room.
READ_MAX = 4 << 20
# About 1 KiB each: the maps of 64 GiB of views, in 16 MiB.
MAPS_MAX = 16384
DISK_READS_MAX = 64
# What is kept free on the filesystem for the index, so that a full store can still write down what it evicts.
INDEX_RESERVE = 4 << 20
_KEYS_AT_ONCE = 4096
# Looking up a span's chunks touches some 16 pages of the index.
_TRIM_EVERY = 256
# A read that is longer than this is one of many in order: the chunks behind it are verified with it.
_LONG_READ, _VERIFY_AHEAD = 64 << 10, 4
_YIELD_S = 0.002

T = TypeVar("T")
Args = TypeVarTuple("Args")

_ZEROS = memoryview(bytes(READ_MAX))
preadv = os.preadv


@dataclass(frozen=True, slots=True)
class Limits:
    """How large the store may grow, in bytes: `max_size` of segments and index, `min_free` left on the
    filesystem."""

    max_size: int
    min_free: int


@dataclass(frozen=True, slots=True)
class Usage:
    """In bytes: what the store occupies by the filesystem's own count (`used`, with what is removed and not back
    yet), what the filesystem has left (`free`), and the limits."""

    used: int
    free: int
    max_size: int
    min_free: int

    @property
    def limit(self) -> int:
        """What the store may hold, as full as the filesystem is now."""
        return max(0, min(self.max_size, self.used + self.free - self.min_free))

    @property
    def left(self) -> int:
        """What may be added; negative where the limit is passed."""
        return min(self.max_size - self.used, self.free - self.min_free)


class Room:
    """Whether bytes may be added: judged by real blocks and `statvfs`, asked anew for every 64 MiB, and more often
    where little is left."""

    _ASK_EVERY = 64 << 20

    def __init__(self, usage: Callable[[], Usage]) -> None:
        self._usage = usage
        self._left = self._unasked = 0

    def __call__(self, wanted: int) -> bool:
        """Takes `wanted` bytes of what is left; False, and nothing taken, when that is too much."""
        if wanted > min(self._left, self._unasked):
            usage = self._usage()
            self._left = min(usage.left, usage.free - usage.min_free - INDEX_RESERVE)
            self._unasked = max(min(self._ASK_EVERY, self._left // 8), wanted)
        if wanted > self._left:
            return False
        self._left -= wanted
        self._unasked -= wanted
        return True


class StoredView:
    """One view as far as it is stored. Made by `Store.view`; `size` in bytes."""

    __slots__ = (
        "_buffer", "_files", "_loading", "_maps", "_mask", "_shift", "_store", "condemned", "number", "record",
    )  # fmt: skip

    def __init__(self, store: Store, number: ViewNo, record: ViewRecord) -> None:
        self.number, self.record = number, record
        self.condemned: str | None = None  # Why nothing of it may be read any more.
        self._store = store
        self._shift, self._mask = store.span_size.bit_length() - 1, store.span_size - 1
        self._files: dict[Any, int] = store.segments.files
        self._buffer = store.buffer
        self._maps: dict[int, SpanMap] = {}
        self._loading: dict[int, object] = {}

    @property
    def size(self) -> int:
        return self.record.size

    @property
    def cached(self) -> int:
        """Bytes that are present."""
        return self.record.cached

    @property
    def complete(self) -> bool:
        return self.record.cached >= self.record.size

    def condemn(self, why: str) -> None:
        """Nothing of it is read from now on, by nobody."""
        self.condemned = why
        self.forget_maps()

    @property
    def is_well(self) -> bool:
        """Whether the disk gives what is here, as far as is known."""
        return self._store.health.may_look_up

    @property
    def spans(self) -> int:
        """How many spans it has."""
        return (self.record.size + self._mask) >> self._shift

    @property
    def maps(self) -> Mapping[int, SpanMap]:
        """The maps that are in memory, by span."""
        return self._maps

    # ── the way of a hit ──

    def read_now(self, offset: int, length: int) -> memoryview | None:
        """The bytes, when they are present and in the kernel's page cache; None when that is not so. They are
        good until the next read of the store: use them before the next await. The range must lie in the view
        and be no longer than READ_MAX."""
        span_map = self._maps.get(offset >> self._shift)
        if span_map is None:
            return None
        span_map.used = True
        within = offset & self._mask
        starts = span_map.starts
        i = bisect_right(starts, within) - 1
        if within + length > starts[i + 1]:
            return self._gather_now(offset, length)
        segment = span_map.segments[i]
        if segment > 0:
            piece = self._buffer[:length]
            try:
                # A segment whose file is missing: EBADF, as good as any other error.
                file = self._files.get(segment, -1)
                if preadv(file, (piece,), span_map.sources[i] + within, RWF_NOWAIT) == length:
                    return piece
            except OSError as error:
                self._store.note_read_error(error)
            return None
        return _ZEROS[:length] if segment == HOLE else None

    def _gather_now(self, offset: int, length: int) -> memoryview | None:
        """The same for a range of several runs."""
        at = 0
        for part in pieces(Extent(offset, offset + length), self._mask + 1):
            span_map = self._maps.get(part.start >> self._shift)
            if span_map is None:
                return None
            span_map.used = True
            for segment, source, n in span_map.locate(part.start & self._mask, part.length):
                piece = self._buffer[at : at + n]
                if segment > 0:
                    try:
                        if preadv(self._files.get(segment, -1), (piece,), source, RWF_NOWAIT) != n:
                            return None
                    except OSError as error:
                        self._store.note_read_error(error)
                        return None
                elif segment == HOLE:
                    piece[:] = _ZEROS[:n]
                else:
                    return None
                at += n
        return self._buffer[:length]

    # ── the other ways ──

    async def read(self, offset: int, length: int) -> bytes | bytearray:
        """The bytes, from the disk if need be: one thread hop. Chunks that were not verified since the start are
        read whole and compared with their digests first. Raises Absent when a byte is not there, or not right;
        DiskUnusable when the disk cannot say: with what came before, where it failed at one place."""
        whole = Extent(offset, offset + length)
        while True:
            runs = await self._load_runs(whole)
            reading = _DiskRead(self._store, self.number, self._shift, whole, runs)
            await self._store.read_disk("a read", reading.run)
            if await self._stands(reading, whole, runs):
                self._note_verified(reading.verified)
                assert isinstance(reading.out, bytearray), "it made its own"
                return reading.out

    async def look_at(self, offset: int, into: memoryview, look: Callable[[memoryview], T]) -> T:
        """What `look` says of the bytes from `offset`, as many as `into` has room for, in the thread that read
        them there. It is asked again when they were replaced meanwhile: then what it said before is void. No use
        of the view, as eviction counts them, and the kernel's cache stays as it is, if `into` begins on a page of
        memory. Raises as `read`; a late thread may still write to `into` then."""
        whole = Extent(offset, offset + len(into))
        while True:
            runs = await self._load_runs(whole)
            reading = _DiskRead(self._store, self.number, self._shift, whole, runs, into)
            said = await self._store.read_disk("a read", reading.run_and, look)
            if await self._stands(reading, whole, runs):
                self._note_verified(reading.verified, used=False)
                assert said, "it did not fail"
                return said[0]

    async def _stands(self, reading: _DiskRead, whole: Extent, runs: list[Run]) -> bool:
        """Whether what was read may be believed: it may have been replaced and punched meanwhile. Raises what it
        failed with, if that still stands."""
        for error in reading.errors:
            self._store.health.reads.note_error(f"a read: {error.strerror}")
        if places(await self._load_runs(whole)) != places(runs):
            return False
        if reading.failed_at is None:
            return True
        self._note_verified(reading.verified)
        if reading.disk_failed:
            came = bytearray(reading.out[: reading.failed_at - whole.start])
            raise DiskUnusable(f"a read: {reading.errors[0].strerror}", reading.failed_at, came)
        raise Absent(self.number, reading.failed_at)

    async def _load_runs(self, whole: Extent) -> list[Run]:
        await self.load(whole)
        return self._runs(whole)

    def _runs(self, whole: Extent) -> list[Run]:
        return [
            run
            for part in pieces(whole, self._mask + 1)
            for run in self._maps[part.start >> self._shift].locate(part.start & self._mask, part.length)
        ]

    def _note_verified(self, verified: Mapping[SpanNo, list[tuple[Extent, Run]]], *, used: bool = True) -> None:
        for span, found in verified.items():
            span_map = self._maps.get(span)
            if span_map is None:
                continue
            # The ledger may have been ahead of the map: only what lies where it was read is what was verified.
            same = [
                extent for extent, place in found if places(span_map.locate(*_start_and_length(extent))) == [place]
            ]
            if same:
                self._put_map(span, span_map.with_verified(same))
                self._maps[span].used |= used

    async def doubt(self, offset: int) -> None:
        """The byte at `offset` should be here and could not be read: its chunk is looked at, and quarantined
        if it is rotten, so that it is absent and will be fetched."""
        done = trio.Event()
        span = SpanNo(offset >> self._shift)
        self._store.writer.submit(Doubt(self.number, span, (offset & self._mask) // PAGE, done))
        await done.wait()

    async def load(self, extent: Extent) -> None:
        """Makes sure that the maps of `extent`'s spans are in memory. No checkpoint when they are. Raises
        DiskUnusable when they cannot be read now."""
        while missing := [span for span in self._spans(extent) if span not in self._maps]:
            if self.condemned is not None:
                raise ImageCondemned(self.record.image, self.condemned)
            # One token for all who load at once: each overruling the other, two could go on for ever.
            tokens = {span: self._loading.setdefault(span, object()) for span in missing}
            try:
                if not self._store.health.may_look_up:
                    raise DiskUnusable("the index is left alone while its disk is not well")
                loaded = await self._store.read_disk(
                    "a look-up", self._store.load_maps, self.number, missing, self.size
                )
            finally:
                valid = [span for span, token in tokens.items() if self._loading.get(span) is token]
                for span in valid:
                    del self._loading[span]
            # Where `published` or another loader was faster, ours may be older than what stands there.
            for span in valid:
                if span not in self._maps:
                    self._put_map(span, loaded[span])

    def span_of(self, offset: int) -> Extent:
        """The span that holds the byte at `offset`, cut at the view's end."""
        start = offset & ~self._mask
        return Extent(start, min(start + self._mask + 1, self.size))

    def extent_of(self, span: SpanNo) -> Extent:
        """The span's bytes, cut at the view's end."""
        return self.span_of(span << self._shift)

    def absent(self, extent: Extent) -> list[Extent]:
        """The blocks of `extent` that are to be fetched, coalesced. Their spans' maps must be loaded; a span
        whose map is not is taken for absent."""
        missing: list[Extent] = []
        for part in pieces(extent, self._mask + 1):
            base = part.start & ~self._mask
            span_map = self._maps.get(part.start >> self._shift)
            if span_map is None:
                span_map = SpanMap.of(absent_recipe(self._store.span_pages(self.size, base)), lambda _: None)
            for gap in span_map.absent(Extent(part.start - base, part.end - base)):
                found = Extent(base + gap.start, min(base + gap.end, self.size))
                if missing and missing[-1].end == found.start:
                    found = Extent(missing.pop().start, found.end)
                missing.append(found)
        return missing

    def present_at(self, offset: int) -> bool | None:
        """Whether the byte is here; None when its span's map is not in memory."""
        span_map = self._maps.get(offset >> self._shift)
        if span_map is None:
            return None
        return span_map.segments[bisect_right(span_map.starts, offset & self._mask) - 1] != ABSENT

    def _spans(self, extent: Extent) -> Iterable[SpanNo]:
        return map(SpanNo, range(extent.start >> self._shift, ((extent.end - 1) >> self._shift) + 1))

    # ── what the store tells it ──

    def _put_map(self, span: int, span_map: SpanMap) -> None:
        if self.condemned is not None:
            return  # Nothing of it is to be found any more.
        if span not in self._maps:
            self._store.count_map(self, span)
        self._maps[span] = span_map

    def publish(self, landed: Landed) -> None:
        self._loading.pop(landed.span, None)
        if landed.map is not None:
            self._put_map(landed.span, landed.map)
        else:
            self._maps.pop(landed.span, None)
        was = self.record.cached
        self.record = self.record.with_cached(landed.cached)
        if landed.cached < was:
            self._store.on_loss(self)
        elif was < self.record.size <= landed.cached:
            self._store.on_whole(self)

    def forget_maps(self) -> None:
        self._loading.clear()
        self._maps.clear()

    def forget_maps_of(self, segments: Set[int]) -> None:
        self._loading.clear()
        for span in [n for n, m in self._maps.items() if not segments.isdisjoint(m.segments)]:
            del self._maps[span]

    def forget_map(self, span: int) -> SpanMap | None:
        return self._maps.pop(span, None)


# A chunk of a span, None where that is not usable, and where it is in the span.
_Found = tuple[f.ChunkId, f.Chunk | None, Extent]


class _DiskRead:
    """One read in a thread. `out` is filled up to `failed_at` (an offset of the view), or whole; `verified` are
    the chunks that were found to have their digests, as extents of their spans, and where they lie. `errors` are
    the disk's, each once; `disk_failed`: one of them is why it ended at `failed_at`."""

    def __init__(
        self,
        store: Store,
        view: ViewNo,
        shift: int,
        whole: Extent,
        runs: list[Run],
        out: memoryview | None = None,
    ) -> None:
        """`out`: used, as large as `whole`, by somebody who passes by; a new one when None."""
        self._store, self._view, self._shift, self._whole, self._runs = store, view, shift, whole, runs
        self._used = out is not None
        self.out: bytearray | memoryview = bytearray(whole.length) if out is None else out
        self.failed_at: int | None = None
        self.disk_failed = False
        self.errors: list[OSError] = []
        self.verified: dict[SpanNo, list[tuple[Extent, Run]]] = {}
        self._unsynced: set[f.SegmentNo] = set()
        self._span: SpanNo | None = None
        self._recipe: f.Recipe = ()  # Of that span.
        self._buffer = memoryview(b"")  # For one chunk, where chunks are verified.

    def run(self) -> None:
        buffer = memoryview(self.out)
        at = self._whole.start
        # Some filesystems drop pages that they could not write; before the sync that says so they read as zeros.
        self._unsynced = self._store.writer.ledger.uncommitted_segments()
        for run in self._runs:
            got = self._fill(run, at, buffer[at - self._whole.start : at - self._whole.start + run.length])
            if got < run.length:
                self._store.read_errors += run.segment != ABSENT
                self.failed_at, self.disk_failed = at + got, bool(self.errors)
                return
            at += run.length
        if self.verified and self._whole.length >= _LONG_READ:
            self._verify_ahead()

    def run_and(self, look: Callable[[memoryview], T]) -> tuple[T] | None:
        """The same, and what `look` says of all that was read; None where that is not all."""
        self.run()
        return (look(memoryview(self.out)),) if self.failed_at is None else None

    def _fill(self, run: Run, at: int, out: memoryview) -> int:
        """Fills `out` from offset `at` of the view, where `run` is; returns how many bytes are right."""
        if run.segment == ABSENT:
            return 0
        if run.segment == HOLE:
            if self._used:
                out[:] = bytes(run.length)
            return run.length
        if run.segment > HOLE and run.segment not in self._unsynced:
            return self._read(f.SegmentNo(run.segment), run.offset, out)
        return self._verify(at, out)

    def _read(self, segment: f.SegmentNo, offset: int, into: memoryview) -> int:
        """How many bytes of `into` the segment gave: less than all where it ends, or where the disk failed."""
        try:
            return self._store.segments.read_into(segment, offset, into, past_cache=self._used)
        except OSError as error:
            if not is_disk_fault(error):
                raise
            self.errors.append(error)
            return error.got if isinstance(error, CutShort) else 0

    def _verify(self, at: int, out: memoryview) -> int:
        """Fills `out` from offset `at` of the view, all in one span, with bytes of chunks that have their digests;
        returns how many bytes that were."""
        base = at & -self._store.span_size
        wanted = Extent(at - base, at - base + len(out))
        got = 0
        for several in _together(self._chunks(base, wanted), wanted):
            chunk_id, chunk, extent = several[0]
            if chunk is None:
                break  # It was a chunk when the map was made: whoever compares will look again.
            part = Extent(extent.start, several[-1][2].end).clamp(wanted)
            into = out[part.start - wanted.start : part.end - wanted.start]
            if len(several) > 1:
                right = self._read_chunks(chunk, several, into)
            else:
                right = len(into) if self._read_chunk(chunk_id, chunk, extent, part, into) else 0
            got += right
            if right < len(into):
                break
        return got

    def _verify_ahead(self) -> None:
        """Verifies some chunks behind a long read: who reads in order comes to them next, and each hop to a thread
        costs more than they do. Nobody waits for them: where one cannot be read, the rest is left as it is."""
        base = (self._whole.end - 1) & -self._store.span_size
        end = self._whole.end - base
        for chunk_id, chunk, extent in self._chunks(base, Extent(end, end + self._whole.length * _VERIFY_AHEAD)):
            if chunk is not None:
                self._read_chunk(chunk_id, chunk, extent, Extent(extent.end, extent.end), memoryview(b""))
            if self.errors:
                return

    def _chunks(self, base: int, wanted: Extent) -> Iterator[_Found]:
        """What the span that begins at `base` has in `wanted` (of the span); None for what is no usable chunk."""
        ledger = self._store.writer.ledger
        span = SpanNo(base >> self._shift)
        if span != self._span:
            self._span, self._recipe = span, ledger.recipe(self._view, span) or ()
        start = end = 0
        for kind, pages, chunk_id in self._recipe:
            start, end = end, end + pages * PAGE
            if end <= wanted.start:
                continue
            if start >= wanted.end:
                return
            chunk = ledger.chunk(chunk_id) if kind is f.Kind.CHUNK else None
            yield chunk_id, None if chunk is None or chunk.rotten else chunk, Extent(start, end)

    def _read_chunks(self, first: f.Chunk, several: Sequence[_Found], into: memoryview) -> int:
        """Reads chunks that lie side by side from the `first` on; returns how many bytes are of right ones."""
        came = self._read(first.segment, first.offset, into)
        at = 0
        right: list[f.ChunkId] = []
        for chunk_id, chunk, extent in several:
            assert chunk is not None, "it lies behind the one before"
            end = at + extent.length
            if came < end or f.digest_of(into[at:end]) != chunk.digest:
                break
            right.append(chunk_id)
            at = end
        if right:
            start = several[0][2].start
            self._note_right(right, Extent(start, start + at), Run(first.segment, first.offset, at))
        return at

    def _note_right(self, chunks: Iterable[f.ChunkId], extent: Extent, place: Run) -> None:
        """What is stored of these chunks, which are `extent` of the span, has their digests."""
        assert self._span is not None, "they are chunks of that span"
        if place.segment not in self._unsynced:
            self._store.verified.add(chunks)
        self.verified.setdefault(self._span, []).append((extent, place))

    def _read_chunk(
        self, chunk_id: f.ChunkId, chunk: f.Chunk, extent: Extent, part: Extent, into: memoryview
    ) -> bool:
        """Reads `part` of the chunk that is `extent` of its span. False when its bytes are not right."""
        if chunk_id in self._store.verified and chunk.segment not in self._unsynced:
            if self._read(chunk.segment, chunk.offset + part.start - extent.start, into) != len(into):
                return False
            # By another way than this map's: the next read need not come here.
            self._note_right((chunk_id,), extent, Run(chunk.segment, chunk.offset, chunk.length))
            return True
        if not self._buffer:
            self._buffer = memoryview(mmap.mmap(-1, CHUNK_PAGES_MAX * PAGE))
        stored = self._buffer[: chunk.length]
        full = self._read(chunk.segment, chunk.offset, stored) == chunk.length
        if not full or f.digest_of(stored) != chunk.digest:
            return False
        self._note_right((chunk_id,), extent, Run(chunk.segment, chunk.offset, chunk.length))
        if len(into):
            into[:] = stored[part.start - extent.start : part.end - extent.start]
        return True


def _together(chunks: Iterable[_Found], wanted: Extent) -> Iterator[list[_Found]]:
    """Chunks that one read gives: wholly wanted, and side by side on the disk. All others alone."""
    several: list[_Found] = []
    for found in chunks:
        _, chunk, extent = found
        is_whole = chunk is not None and extent == extent.clamp(wanted)
        if several and not (is_whole and _is_behind(several[-1][1], chunk)):
            yield several
            several = []
        several.append(found)
        if not is_whole:
            yield several
            several = []
    if several:
        yield several


def _is_behind(before: f.Chunk | None, chunk: f.Chunk | None) -> bool:
    if before is None or chunk is None:
        return False
    return before.segment == chunk.segment and before.offset + before.length == chunk.offset


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
        self.on_rot: Callable[[Sequence[f.ChunkId]], None] = lambda chunks: None
        self.used_and_forgotten: deque[tuple[ViewNo, int]] = deque(maxlen=MAPS_MAX)  # Spans whose maps went.
        self._opened = opened
        self.path = opened.folder
        self.span_size = opened.record.span_size
        self.uuid = opened.record.uuid
        self.segments, self._index = opened.segments, opened.index
        self.buffer = memoryview(bytearray(READ_MAX))
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
            time.sleep(_YIELD_S)  # Python's lock to others.

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
        return Ledger(_Committed(self._index), counters, views, segments)

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


def _start_and_length(extent: Extent) -> tuple[int, int]:
    return extent.start, extent.length


def _view_key(image: str, kind: ViewKind, size: int) -> tuple[str, ViewKind, int]:
    return image, kind, size if kind is ViewKind.RESIZED else 0


class _Committed:
    """The index as the ledger sees it: one short snapshot a look-up, or one for all look-ups of a batch. What
    cannot be decoded is not there: it will be fetched again."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._batch = threading.local()
        self._repeats = logs.Repeats(log)  # Whoever looks a record up says it.

    @contextmanager
    def batch(self) -> Iterator[None]:
        with self._index.reading() as snapshot:
            self._batch.snapshot = snapshot
            try:
                yield
            finally:
                self._batch.snapshot = None

    @contextmanager
    def _reading(self) -> Iterator[Snapshot]:
        snapshot: Snapshot | None = getattr(self._batch, "snapshot", None)
        if snapshot is not None:
            yield snapshot
            return
        with self._index.reading() as own:
            yield own

    def recipe(self, view: ViewNo, span: SpanNo) -> f.Recipe | None:
        with self._reading() as snapshot:
            try:
                return snapshot.recipe(view, span)
            except RecordCorrupt as error:
                self._repeats.error("recipe", "%s: taken for absent", error)
                return None

    def chunk(self, chunk: f.ChunkId) -> f.Chunk | None:
        with self._reading() as snapshot:
            try:
                return snapshot.chunk(chunk)
            except RecordCorrupt as error:
                self._repeats.error("chunk", "%s: taken for lost", error)
                return None

    def candidates(self, digest: bytes, most: int) -> list[f.ChunkId]:
        with self._reading() as snapshot:
            return snapshot.candidates(digest, most)

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        with self._reading() as snapshot:
            return snapshot.known(digests)
