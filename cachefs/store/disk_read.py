"""One read of a view in a thread: what the disk gave, and what of it has its digest. Rule: no map is looked at or
changed; the loop, which found the places to read, looks again before it believes what was read there.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import PAGE, Extent
from cachefs.store import format as f
from cachefs.store.format import SpanNo, ViewNo
from cachefs.store.health import is_disk_fault
from cachefs.store.recipe import ABSENT, HOLE, Run
from cachefs.store.segments import CutShort, Segments
from cachefs.store.verified import Verified
from cachefs.store.writer import Writer

# A read that is longer than this is one of many in order: the chunks behind it are verified with it.
_LONG_READ, _VERIFY_AHEAD = 64 << 10, 4

T = TypeVar("T")


# A chunk of a span, None where that is not usable, and where it is in the span.
_Found = tuple[f.ChunkId, f.Chunk | None, Extent]


class DiskReadStore(Protocol):
    """What is asked of the store. `writer` for its ledger, which is another one after a commit failed."""

    span_size: int
    segments: Segments
    verified: Verified
    writer: Writer
    read_errors: int


class DiskRead:
    """One read in a thread. `out` is filled up to `failed_at` (an offset of the view), or whole; `verified` are
    the chunks that were found to have their digests, as extents of their spans, and where they lie. `errors` are
    the disk's, each once; `disk_failed`: one of them is why it ended at `failed_at`."""

    def __init__(
        self,
        store: DiskReadStore,
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
        """Once, in a thread that may wait for the disk. What the disk failed with is in `errors`, not raised."""
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
