"""Looks at everything that a store has on its disk while others work in it: bytes against digests, recipes against
chunks, counts against what they count, and files against what is said to be in them. Rule: changes nothing but
bytes of segments that no chunk names (`repunch`), and calls nothing damaged before it has looked again.

Everything here runs in threads. What is read may be freed, punched or moved at the same moment; a chunk whose
committed record is the same after its bytes were read had its bytes all the while, because a punch comes after
the commit that frees them. So that is the order: bytes first, then the record.

Segments are read past the kernel's page cache (O_DIRECT): what counts is what the disk has, and the guests'
pages stay where they are. Each has a descriptor of its own, which is given up when reading pauses: the space
of a removed segment comes back only when nobody has it open.
"""

from __future__ import annotations

import errno
import os
import time
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from xxhash import xxh3_64_intdigest

from cachefs.errors import RecordCorrupt
from cachefs.huge import place
from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import PAGE, Extent, coalesce, subtract
from cachefs.plan.scrub import READ_PAGES, Piece, Read, reads
from cachefs.store import format as f
from cachefs.store.check import recipe_faults
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Kind,
    Punch,
    Recipe,
    SegmentNo,
    SegmentRecord,
    SpanNo,
    Table,
    ViewNo,
    ViewRecord,
    segment_name,
)
from cachefs.store.index import Index, Snapshot
from cachefs.store.recipe import present_bytes
from cachefs.store.segments import Segments

# Chunks that are looked up in one snapshot and sorted by place: 256 MiB of a store, in half a MiB.
WINDOW = 4096
# Spans in one snapshot: some 10 ms.
SLICE = 64
# A chunk that moves while it is looked at is followed so often.
FOLLOW_MAX = 3
# Records between two breaths of a walk in one snapshot, and how long a breath is: half of the time is others'.
BREATH_RECORDS, BREATH_S = 256, 0.0005
# A segment that holds this much more than it should is punched again: less is how filesystems count.
EXCESS_BYTES = 1 << 20
REPUNCHED_MAX = 16  # Segments in one run: their live extents are in memory at the same time.

OpenFile = Callable[[Path, int], int]


# ── Reading the disk ──────────────────────────────────────────────────────────────────────────────────


class DiskReader:
    """Reads segments past the page cache, one open at a time. For one thread. Where the filesystem refuses
    O_DIRECT, the cached pages of the range are dropped before and after: also those that guests have read."""

    def __init__(self, folder: Path, open_file: OpenFile = os.open) -> None:
        self._folder, self._open_file = folder, open_file
        self._file = -1
        self._segment = 0
        self.direct = True  # Whether the last segment was read so.

    def read(self, segment: int, offset: int, buffer: memoryview) -> int:
        """Fills `buffer`, which begins on a page of memory and is whole pages, from a page of the segment.
        Returns how many bytes it got: less where the file ends. Raises OSError."""
        if segment != self._segment or self._file < 0:
            self._open(segment, direct=True)
        try:
            return self._read(offset, buffer)
        except OSError as error:
            # Some refuse when opening, some when reading.
            if error.errno != errno.EINVAL or not self.direct:
                raise
            self._open(segment, direct=False)
            return self._read(offset, buffer)

    def forget(self, segment: int, offset: int, length: int) -> None:
        """Drops what the page cache has of these bytes, so that whoever reads next sees the disk."""
        if segment != self._segment or self._file < 0:
            self._open(segment, direct=True)
        os.posix_fadvise(self._file, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self, segment: int, *, direct: bool) -> None:
        self.close()
        path = self._folder / segment_name(SegmentNo(segment))
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        self._segment, self.direct = segment, direct
        if direct:
            try:
                self._file = self._open_file(path, flags | os.O_DIRECT)
                return
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self.direct = False
        self._file = self._open_file(path, flags)

    def _read(self, offset: int, buffer: memoryview) -> int:
        if not self.direct:
            os.posix_fadvise(self._file, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        got = 0
        while got < len(buffer):
            n = os.preadv(self._file, (buffer[got:],), offset + got)
            got += n
            if n == 0 or got % PAGE:
                break  # The file ends here.
        if not self.direct:
            os.posix_fadvise(self._file, offset, len(buffer), os.POSIX_FADV_DONTNEED)
        return got


def page_buffer(pages: int) -> memoryview:
    """Memory that begins on a page, as O_DIRECT asks for."""
    return memoryview(place(pages * PAGE))


# ── The chunks ────────────────────────────────────────────────────────────────────────────────────────


class Suspect(NamedTuple):
    """A chunk whose bytes are not there as they should be, twice."""

    piece: Piece
    what: str

    @property
    def chunk(self) -> ChunkId:
        return ChunkId(self.piece.chunk)


@dataclass
class Step:
    """What one read found. `next_chunk`: all chunks below are done, None when that is no more than before.
    `rotten` were known to be; `faults` are of the index; `errors` are the disk's."""

    bytes_read: int = 0
    bytes_verified: int = 0
    next_chunk: ChunkId | None = None
    suspects: list[Suspect] = field(default_factory=list)
    rotten: list[ChunkId] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    errors: list[OSError] = field(default_factory=list)


@dataclass
class _Filled:
    """A read that was done, and a step to go on with."""

    step: Step
    read: Read | None = None
    buffer: memoryview | None = None
    got: int = 0


class ChunkScan:
    """Goes over the chunks with `first` <= number < `end`. `step` is for one thread at a time; a thread of its own
    has the next read under way while one is compared."""

    def __init__(
        self, index: Index, folder: Path, first: ChunkId, end: ChunkId, open_file: OpenFile = os.open
    ) -> None:
        self._index, self._end = index, end
        self._next = first
        self._ahead, self._again = DiskReader(folder, open_file), DiskReader(folder, open_file)
        self._planned: deque[Read] = deque()
        self._window = Step()  # What is known of the window, for the step of its last read.
        self._thread = ThreadPoolExecutor(1, "scrub")
        self._buffers = [page_buffer(READ_PAGES), page_buffer(READ_PAGES)]
        self._piece = page_buffer(CHUNK_PAGES_MAX)
        self._pending: Future[_Filled | None] | None = None

    def close(self) -> None:
        """Waits for the read that is under way."""
        self._thread.shutdown()
        self._ahead.close()
        self._again.close()

    def rest(self) -> None:
        """Gives up descriptors, before a pause. What was read ahead stays good."""
        self._thread.submit(self._ahead.close).result()
        self._again.close()

    def step(self) -> Step | None:
        """Reads and compares some megabytes; None when there is nothing left."""
        if self._pending is None:
            self._pending = self._thread.submit(self._fill, self._buffers[0])
        filled = self._pending.result()
        if filled is None:
            return None
        self._buffers.reverse()
        self._pending = self._thread.submit(self._fill, self._buffers[0])
        self._compare(filled)
        return filled.step

    # ── in the thread that reads ahead ──

    def _fill(self, buffer: memoryview) -> _Filled | None:
        if not self._planned:
            if self._next >= self._end:
                return None
            self._plan()
            if not self._planned:
                return _Filled(self._window)  # A window without a byte to read.
        read = self._planned.popleft()
        part = buffer[: read.pages * PAGE]
        filled = _Filled(Step() if self._planned else self._window, read, part)
        try:
            filled.got = self._ahead.read(read.segment, read.page * PAGE, part)
        except FileNotFoundError:
            pass  # Each of its chunks is looked up again: perhaps the segment was emptied and removed.
        except OSError as error:
            filled.step.errors.append(error)
        return filled

    def _plan(self) -> None:
        """Looks up the next window."""
        with self._index.reading() as snapshot:
            records = snapshot.records(Table.CHUNKS, f.chunk_key(ChunkId(self._next - 1)), WINDOW)
        pieces, step = [], Step()
        after = self._end
        if len(records) == WINDOW:
            after = min(ChunkId(f.split_chunk_key(records[-1][0]) + 1), self._end)
        for key, record in records:
            chunk_id = f.split_chunk_key(key)
            if chunk_id >= self._end:
                break
            try:
                chunk = Chunk.decode(key, record)
            except RecordCorrupt as error:
                step.faults.append(str(error))
                continue
            if chunk.rotten:
                step.rotten.append(chunk_id)
            elif not 0 < chunk.pages <= CHUNK_PAGES_MAX:
                step.faults.append(f"chunk {chunk_id} has {chunk.pages} pages")
            else:
                pieces.append(_piece(chunk_id, chunk))
        self._planned.extend(reads(pieces))
        self._next = step.next_chunk = after
        self._window = step

    # ── in the thread that compares ──

    def _compare(self, filled: _Filled) -> None:
        step, read = filled.step, filled.read
        if read is None or filled.buffer is None:
            return
        step.bytes_read = filled.got
        doubtful = []
        for piece in read.pieces:
            at = (piece.page - read.page) * PAGE
            end = at + piece.pages * PAGE
            if end <= filled.got and f.digest_of(filled.buffer[at:end]) == piece.digest:
                step.bytes_verified += end - at
            else:
                doubtful.append(piece)
        for piece in doubtful:
            self.look_again(piece, step)

    def look_again(self, piece: Piece, step: Step) -> None:
        """Reads a chunk by itself, and adds to `step` what it is: a suspect only when its record says after that
        what it said before."""
        for _ in range(FOLLOW_MAX):
            now = self._look_up(ChunkId(piece.chunk))
            if now is None:
                return
            what = self._fault(now, step.errors)
            if what is None:
                step.bytes_verified += now.pages * PAGE
                return
            piece = now
            if self._look_up(ChunkId(piece.chunk)) == piece:
                step.suspects.append(Suspect(piece, what))
                return

    def _fault(self, piece: Piece, errors: list[OSError]) -> str | None:
        """What is wrong with a chunk's bytes, on the disk."""
        buffer = self._piece[: piece.pages * PAGE]
        try:
            got = self._again.read(piece.segment, piece.page * PAGE, buffer)
        except FileNotFoundError:
            return "the segment is missing"
        except OSError as error:
            errors.append(error)
            return f"cannot be read: {error.strerror}"
        if got < len(buffer):
            return "the segment ends before them"
        return None if f.digest_of(buffer) == piece.digest else "their bytes are not what their digests say"

    def forget(self, suspects: Collection[Suspect]) -> None:
        """Drops what the page cache has of the suspects: the writer is to see what the disk has."""
        for piece, _ in suspects:
            try:
                self._again.forget(piece.segment, piece.page * PAGE, piece.pages * PAGE)
            except OSError:
                continue  # Missing: then nobody reads it from the cache either, or a descriptor is still good.

    def _look_up(self, chunk_id: ChunkId) -> Piece | None:
        """Where the chunk is now; None when it is gone, rotten, or its record cannot be read (which the walk over
        the index reports)."""
        with self._index.reading() as snapshot:
            try:
                chunk = snapshot.chunk(chunk_id)
            except RecordCorrupt:
                return None
        return None if chunk is None or chunk.rotten else _piece(chunk_id, chunk)


def _piece(chunk_id: ChunkId, chunk: Chunk) -> Piece:
    return Piece(chunk.segment, chunk.page, chunk.pages, chunk_id, chunk.digest)


# ── The recipes ───────────────────────────────────────────────────────────────────────────────────────


class BadSpan(NamedTuple):
    """A span that names chunks which are missing or rotten. `extents` are the view's bytes in them, coalesced."""

    view: ViewNo
    span: SpanNo
    chunks: tuple[ChunkId, ...]
    extents: tuple[Extent, ...]


class Slice(NamedTuple):
    """What a part of the walk found. `last_key` is what to go on after; None at the end."""

    last_key: bytes | None
    spans: int
    bad: list[BadSpan]
    faults: list[str]


def walk(index: Index, span_size: int, after: bytes = b"", of: Container[ChunkId] | None = None) -> Slice:
    """Compares the next recipes behind the key `after` with the chunks that they name, in one snapshot. With `of`,
    only looks which spans name one of these chunks, and looks nothing up."""
    bad: list[BadSpan] = []
    faults: list[str] = []
    with index.reading() as snapshot:
        records = snapshot.records(Table.SPANS, after, SLICE)
        for at, record in records:
            view, span = f.split_span_key(at)
            where = f"span {span} of view {view}"
            try:
                recipe = f.decode_recipe(at, record)
            except (RecordCorrupt, ValueError):
                faults.append(f"{where}: its recipe cannot be read")
                continue
            if of is None:
                found = _unusable(snapshot, recipe, where, faults)
                shape = _shape_faults(snapshot, view, span, recipe, span_size)
                faults.extend(f"{where}: {fault}" for fault in shape)
            else:
                found = {e.chunk for e in recipe if e.kind is Kind.CHUNK and e.chunk in of}
            if found:
                bad.append(_bad_span(view, span, recipe, found, span_size))
    return Slice(records[-1][0] if len(records) == SLICE else None, len(records), bad, faults)


def _unusable(snapshot: Snapshot, recipe: Recipe, where: str, faults: list[str]) -> set[ChunkId]:
    """The chunks of a recipe that are rotten, or not there."""
    found = set()
    for entry in recipe:
        if entry.kind is not Kind.CHUNK:
            continue
        chunk = None
        try:
            chunk = snapshot.chunk(entry.chunk)
            if chunk is None:
                faults.append(f"{where}: names chunk {entry.chunk}, which does not exist")
        except RecordCorrupt as error:
            faults.append(f"{where}: {error}")
        if chunk is None or chunk.rotten:
            found.add(entry.chunk)
        elif chunk.pages != entry.pages:
            faults.append(f"{where}: takes chunk {entry.chunk} for {entry.pages} pages of {chunk.pages}")
    return found


def _shape_faults(snapshot: Snapshot, view: ViewNo, span: SpanNo, recipe: Recipe, span_size: int) -> Iterator[str]:
    key = f.view_key(view)
    record = snapshot.get(Table.VIEWS, key)
    if record is None:
        yield "there is no such view"
        return
    try:
        left = ViewRecord.decode(key, record).size - span * span_size
    except (RecordCorrupt, ValueError):
        yield "its view's record cannot be read"
        return
    if left <= 0:
        yield "lies beyond its view's end"
    else:
        yield from recipe_faults(recipe, -(-min(span_size, left) // PAGE))


def _bad_span(view: ViewNo, span: SpanNo, recipe: Recipe, chunks: Collection[ChunkId], span_size: int) -> BadSpan:
    extents, at = [], span * span_size
    for entry in recipe:
        end = at + entry.pages * PAGE
        if entry.chunk in chunks:
            extents.append(Extent(at, end))
        at = end
    return BadSpan(view, span, tuple(sorted(chunks)), tuple(coalesce(extents)))


# ── The counts ────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Totals:
    """What the index counts, and what there is to count, in one snapshot. `excess` are the segments whose files
    hold more than they should, with how much (bytes); `unread` are records that could not be counted."""

    faults: list[str] = field(default_factory=list)
    excess: dict[SegmentNo, int] = field(default_factory=dict)
    unread: int = 0


class _Gaveup(Exception):
    """Somebody waits for the snapshot to end."""


def breathe() -> None:
    """Leaves the processor to others, in a long walk."""
    time.sleep(BREATH_S)


def totals(
    index: Index,
    folder: Path,
    span_size: int,
    should_yield: Callable[[], bool],
    breathe: Callable[[], None] = breathe,
) -> Totals | None:
    """Counts again what the index counts: references, bytes present of each view, live bytes of each segment. In
    one snapshot, with memory for views and segments only: references are compared by sums of hashes, which
    agree by chance once in 2^64. None when `should_yield` said so: to be tried again later."""

    def items(table: Table) -> Iterator[tuple[bytes, bytes]]:
        for number, item in enumerate(snapshot.items(table)):
            if number % BREATH_RECORDS == 0:
                if should_yield():
                    raise _Gaveup
                if number % (64 * BREATH_RECORDS) == 0:
                    index.trim()
                breathe()
            yield item

    try:
        with index.reading() as snapshot:
            count = _Count(span_size, int.from_bytes(os.urandom(8), "big"))
            count.views(items(Table.VIEWS))
            count.chunks(items(Table.CHUNKS))
            count.spans(items(Table.SPANS))
            count.segments(items(Table.SEGMENTS), items(Table.PUNCHES))
    except _Gaveup:
        return None
    # After the snapshot: what was freed since is less than it says, and never more.
    return Totals(count.faults(), count.excess(folder), count.unread)


class _Count:
    """Sums of one snapshot."""

    def __init__(self, span_size: int, seed: int) -> None:
        self._span_size, self._seed = span_size, seed
        self._references = 0  # What chunks say, less what recipes name.
        self._live: Counter[SegmentNo] = Counter()
        self._present: Counter[ViewNo] = Counter()
        self._pending: Counter[SegmentNo] = Counter()
        self._segments: dict[SegmentNo, SegmentRecord] = {}
        self._views: dict[ViewNo, ViewRecord] = {}
        self.unread = 0

    def _hash(self, chunk: int) -> int:
        return xxh3_64_intdigest(chunk.to_bytes(8, "big"), self._seed)

    def views(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        for key, record in items:
            try:
                self._views[ViewNo(int.from_bytes(key, "big"))] = ViewRecord.decode(key, record)
            except (RecordCorrupt, ValueError):
                self.unread += 1

    def chunks(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        for key, record in items:
            try:
                chunk = Chunk.decode(key, record)
            except RecordCorrupt:
                self.unread += 1
                continue
            self._references += chunk.refs * self._hash(f.split_chunk_key(key))
            self._live[chunk.segment] += chunk.length

    def spans(self, items: Iterator[tuple[bytes, bytes]]) -> None:
        for key, record in items:
            view, span = f.split_span_key(key)
            try:
                recipe = f.decode_recipe(key, record)
            except (RecordCorrupt, ValueError):
                self.unread += 1
                continue
            self._references -= sum(self._hash(e.chunk) for e in recipe if e.kind is Kind.CHUNK)
            if view in self._views:
                self._present[view] += present_bytes(recipe, self._views[view].size - span * self._span_size)

    def segments(self, items: Iterator[tuple[bytes, bytes]], punches: Iterator[tuple[bytes, bytes]]) -> None:
        for key, record in items:
            try:
                self._segments[SegmentNo(int.from_bytes(key, "big"))] = SegmentRecord.decode(key, record)
            except RecordCorrupt:
                self.unread += 1
        for key, record in punches:
            try:
                punch = Punch.decode(key, record)
            except RecordCorrupt:
                self.unread += 1
                continue
            self._pending[punch.segment] += punch.length

    def faults(self) -> list[str]:
        """Nothing can be compared while a record is missing; that one is reported by itself."""
        if self.unread:
            return []
        found = []
        if self._references % (1 << 64):
            found.append("chunks count other references than recipes have")
        for view, record in self._views.items():
            present = self._present[view]
            if present != record.cached:
                found.append(f"view {view} has {present} bytes by its recipes, and says {record.cached}")
        for segment in sorted(set(self._segments) | set(self._live)):
            live, said = self._live[segment], self._segments.get(segment, SegmentRecord()).live
            if live != said:
                found.append(f"segment {segment} has {live} live bytes, and says {said}")
        return found

    def excess(self, folder: Path) -> dict[SegmentNo, int]:
        """Not of the last one, to which may be appended, and which a filesystem may give room in advance."""
        found: dict[SegmentNo, int] = {}
        if self.unread:
            return found
        for segment in sorted(self._segments)[:-1]:
            try:
                blocks = (folder / segment_name(segment)).stat().st_blocks * 512
            except OSError:
                continue  # Gone, which its chunks will tell, or removed since.
            over = blocks - self._live[segment] - self._pending[segment]
            if over > EXCESS_BYTES:
                found[segment] = over
        return found


# ── What should be holes ──────────────────────────────────────────────────────────────────────────────


def dead_extents(
    index: Index,
    segments: Collection[SegmentNo],
    should_yield: Callable[[], bool],
    breathe: Callable[[], None] = breathe,
) -> Mapping[SegmentNo, list[Extent]] | None:
    """What no chunk names of `segments`, below their committed ends. It stays so: an offset is never used
    again. None when `should_yield` said so, or a record of a chunk could not be read: it might lie there."""
    live = {segment: (array("I"), array("I")) for segment in segments}
    ends: dict[SegmentNo, int] = {}
    with index.reading() as snapshot:
        for number, (key, record) in enumerate(snapshot.items(Table.CHUNKS)):
            if number % BREATH_RECORDS == 0:
                if should_yield():
                    return None
                breathe()
            try:
                chunk = Chunk.decode(key, record)
            except RecordCorrupt:
                return None
            if chunk.segment in live:
                begins, lengths = live[chunk.segment]
                begins.append(chunk.page)
                lengths.append(chunk.pages)
        for segment in live:
            key = f.segment_key(segment)
            found = snapshot.get(Table.SEGMENTS, key)
            ends[segment] = 0 if found is None else SegmentRecord.decode(key, found).end
    return {
        segment: subtract(
            Extent(0, ends[segment]),
            (Extent(page * PAGE, (page + pages) * PAGE) for page, pages in zip(begins, lengths, strict=True)),
        )
        for segment, (begins, lengths) in live.items()
    }


def repunch(folder: Path, segment: SegmentNo, dead: list[Extent]) -> int:
    """Makes holes of `dead`; returns how many bytes that gave back. Raises OSError. No map may name these bytes:
    forget the maps between `dead_extents` and this."""
    mine = Segments(folder)
    mine.open(segment)
    try:
        before = mine.blocks_bytes()
        for extent in dead:
            mine.punch(Punch(segment, extent.start, extent.length))
        return max(0, before - mine.blocks_bytes())
    finally:
        mine.close()
