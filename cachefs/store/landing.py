"""How landed bytes become part of the store: cut, compared, shared or appended. Runs in the writer's thread.
Rule: bytes that are already in the store are never replaced, and a chunk is shared only after its stored bytes
were compared with the new ones (design §5: xxh3_128 finds, it does not prove).

The order within one landing matters. Chunks are first written to a segment and only then entered in the
ledger, so that a failed write leaves the ledger as it was and at most some bytes that nothing names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from cachefs import logs
from cachefs.errors import StoreFull
from cachefs.plan.cutting import cut
from cachefs.plan.extents import PAGE, ceil
from cachefs.store.format import (
    SEGMENT_SIZE,
    Chunk,
    ChunkId,
    Entry,
    Kind,
    Punch,
    Recipe,
    SegmentNo,
    SpanNo,
    ViewNo,
    digest_of,
)
from cachefs.store.ledger import CANDIDATES_MAX, Found, Ledger
from cachefs.store.recipe import (
    NO_CHUNK,
    SpanMap,
    absent_recipe,
    absent_runs,
    pages_of,
    present_bytes,
    replaced,
)
from cachefs.store.segments import Segments
from cachefs.store.verified import Verified

log = logs.get(__name__)

ZEROS_RECORD_BYTES = 128  # Of the index, for a span that is zeros: its record and its share of pages.


class Landed(NamedTuple):
    """A span as it is now, whether it gained bytes or lost them. `cached` is how many bytes of the whole view
    are present. Without a map it is to be looked up."""

    view: ViewNo
    span: SpanNo
    map: SpanMap | None
    cached: int


@dataclass
class _Plan:
    """What one landing adds, gathered before anything is written."""

    new: dict[ChunkId, tuple[bytes, memoryview]] = field(default_factory=dict)  # id → (digest, bytes)
    by_digest: dict[bytes, list[ChunkId]] = field(default_factory=dict)


class Lander:
    """Lands bytes, one span at a time. `room(n)` says whether n bytes may be added."""

    def __init__(
        self,
        ledger: Ledger,
        segments: Segments,
        span_size: int,
        room: Callable[[int], bool],
        verified: Verified,
        disk_is_well: Callable[[], bool] = lambda: True,
    ) -> None:
        self._ledger, self._segments, self._span_size = ledger, segments, span_size
        self._room, self._verified, self._disk_is_well = room, verified, disk_is_well
        self._segment: SegmentNo | None = None  # The one that is appended to.
        # Counted since the start, for `status`: bytes appended; landed and not appended, as they were there or
        # were zeros.
        self.bytes_landed = self.bytes_shared = self.bytes_zero = 0
        self.rotten_found = 0
        self._repeats = logs.Repeats(log)  # A disk that rots has millions of chunks.
        # Since somebody last took them: rotten, and such as the disk did not give.
        self.newly_rotten: list[ChunkId] = []
        self.newly_unreadable: list[ChunkId] = []

    def continue_segment(self, segment: SegmentNo | None) -> None:
        """Appends go to `segment` next; to a new one when None."""
        self._segment = segment

    @property
    def appended_to(self) -> SegmentNo | None:
        """The segment to which bytes are appended now."""
        return self._segment

    def span_pages(self, view: ViewNo, span: SpanNo) -> int:
        size = self._ledger.views[view].size
        return ceil(min(self._span_size, size - span * self._span_size), PAGE) // PAGE

    def land(
        self, view: ViewNo, span: SpanNo, start: int, data: memoryview, *, in_passing: bool = False
    ) -> Landed:
        """Keeps `data`, whole pages from byte `start` of the span; `in_passing`: nobody is expected to read it
        soon. Raises StoreFull or OSError, and then nothing of it is kept."""
        pages = self.span_pages(view, span)
        old = self._ledger.recipe(view, span) or absent_recipe(pages)
        first, count = start // PAGE, len(data) // PAGE
        plan = _Plan()
        recipe = old
        filled = zero = 0
        for run_first, run_pages in list(absent_runs(old, self._ledger.usable)):
            begin, end = max(run_first, first), min(run_first + run_pages, first + count)
            if begin < end:
                part = data[(begin - first) * PAGE : (end - first) * PAGE]
                entries = self._cut(plan, part)
                filled += len(part)
                zero += sum(e.pages for e in entries if e.kind is Kind.HOLE) * PAGE
                begin, entries = self._widen(old, begin, end, entries)
                recipe = replaced(recipe, begin, sum(e.pages for e in entries), entries)
        if recipe == old:
            return self._landed(view, span, old, ())
        in_pieces = count < pages or old != absent_recipe(pages)
        if in_pieces and self._is_whole(recipe, plan):
            whole = self._assemble(recipe, plan)
            if whole is not None:
                plan = _Plan()
                recipe = tuple(self._cut(plan, whole))
        new = self._write(plan, recipe, past_cache=in_passing)
        size = self._ledger.views[view].size - span * self._span_size
        change = present_bytes(recipe, size) - present_bytes(old, size)
        live = self._ledger.set_recipe(view, span, recipe, new, change)
        self.bytes_zero += zero
        self.bytes_shared += filled - zero - live
        if in_passing:
            self._ledger.not_seen(new)
        return self._landed(view, span, recipe, () if in_passing else new)

    def land_zeros(self, view: ViewNo, spans: Sequence[SpanNo]) -> tuple[list[Landed], list[SpanNo]]:
        """Those of `spans` of which nothing is here become holes. There may be very many: their maps are made when
        somebody reads them. Also those that have something else. Raises StoreFull."""
        if not self._room(len(spans) * ZEROS_RECORD_BYTES):
            raise StoreFull(len(spans) * ZEROS_RECORD_BYTES)
        landed, others = [], []
        size = self._ledger.views[view].size
        for span in spans:
            old = self._ledger.recipe(view, span)
            if old is not None:
                if any(entry.kind is not Kind.HOLE for entry in old):
                    others.append(span)
            else:
                recipe = (Entry(Kind.HOLE, self.span_pages(view, span), NO_CHUNK),)
                here = present_bytes(recipe, size - span * self._span_size)
                self._ledger.set_recipe(view, span, recipe, {}, here)
                self.bytes_zero += here
                landed.append(Landed(view, span, None, self._ledger.views[view].cached))
        return landed, others

    def _landed(self, view: ViewNo, span: SpanNo, recipe: Recipe, seen: Container[ChunkId]) -> Landed:
        """What is `seen` was just written, and is read at once: its pages are the ones that were hashed."""
        span_map = SpanMap.of(recipe, self._ledger.chunk, lambda c: c in seen or c in self._verified, used=True)
        return Landed(view, span, span_map, self._ledger.views[view].cached)

    def _is_whole(self, recipe: Recipe, plan: _Plan) -> bool:
        return not any(absent_runs(recipe, lambda c: c in plan.new or self._ledger.usable(c)))

    @staticmethod
    def _widen(old: Recipe, begin: int, end: int, entries: list[Entry]) -> tuple[int, list[Entry]]:
        """The same, reaching over the whole of a chunk that is unusable and only partly covered: what is not
        covered of it becomes absent, because a recipe cannot keep part of a chunk."""
        page = 0
        for entry in old:
            entry_end = page + entry.pages
            if entry.kind is Kind.CHUNK:
                if page < begin < entry_end:
                    entries = [Entry(Kind.ABSENT, begin - page, NO_CHUNK), *entries]
                    begin = page
                if page < end < entry_end:
                    entries = [*entries, Entry(Kind.ABSENT, entry_end - end, NO_CHUNK)]
            page = entry_end
        return begin, entries

    # ── taking back ──

    def drop(self, view: ViewNo, span: SpanNo, found: Found) -> Generator[None, None, tuple[Landed, int] | None]:
        """Everything of a span becomes absent, in steps: see `Ledger.take_back`. Also how many bytes of segments
        that frees; None where nothing is."""
        record = self._ledger.views.get(view)
        if record is None:
            return None
        dropped = yield from self._ledger.take_back(view, span, found, record.size - span * self._span_size)
        if dropped is None:
            return None
        old, freed = dropped
        yield
        span_map = SpanMap.of(absent_recipe(pages_of(old)), self._ledger.chunk)
        return Landed(view, span, span_map, self._ledger.views[view].cached), freed

    def mend(self, view: ViewNo, span: SpanNo) -> tuple[Landed, int] | None:
        """What of a span is in chunks that are missing or rotten becomes absent; None where nothing is."""
        old = self._ledger.recipe(view, span)
        if old is None:
            return None
        recipe = old
        for first, pages in list(absent_runs(old, self._ledger.usable)):
            recipe = replaced(recipe, first, pages, (Entry(Kind.ABSENT, pages, NO_CHUNK),))
        return None if recipe == old else self._become(view, span, old, recipe)

    def _become(self, view: ViewNo, span: SpanNo, old: Recipe, recipe: Recipe) -> tuple[Landed, int]:
        size = self._ledger.views[view].size - span * self._span_size
        change = present_bytes(recipe, size) - present_bytes(old, size)
        freed = -self._ledger.set_recipe(view, span, recipe, {}, change)
        span_map = SpanMap.of(recipe, self._ledger.chunk, self._verified.__contains__)
        return Landed(view, span, span_map, self._ledger.views[view].cached), freed

    def quarantine(self, chunk_id: ChunkId, seen: tuple[SegmentNo, int] | None) -> bool:
        """Looks at a chunk again; whether it is rotten. That is believed without a look where somebody has `seen`
        it on the disk at this segment and page: the page cache may still have what the disk has lost."""
        chunk = self._ledger.chunk(chunk_id)
        if chunk is None or chunk.rotten:
            return chunk is not None
        believed = seen == (chunk.segment, chunk.page)
        return not self._check(chunk_id, chunk, b"" if believed else self._read(chunk))

    # ── moving ──

    def move(self, chunk_ids: Iterable[ChunkId], sources: Container[SegmentNo]) -> int:
        """Writes those of the chunks that lie in one of `sources` once more, to where is appended now; where they
        were they can be read until their segment is removed. Returns bytes. Raises StoreFull or OSError; what
        was moved by then is moved."""
        moved = 0
        for chunk_id in chunk_ids:
            chunk = self._ledger.chunk(chunk_id)
            if chunk is None or chunk.rotten or chunk.segment not in sources or chunk.segment == self._segment:
                continue
            stored = self._read(chunk)
            if self._check(chunk_id, chunk, stored):
                segment, offset = self._append([memoryview(stored)])
                self._ledger.move_chunk(chunk_id, segment, offset)
                moved += chunk.length
        return moved

    def lifeless(self) -> list[SegmentNo]:
        """The segments in which no chunk lies, and to which nothing will be appended."""
        return [n for n, record in list(self._ledger.segments.items()) if record.live == 0 and n != self._segment]

    def doubt(self, view: ViewNo, span: SpanNo, page: int) -> Landed | None:
        """Looks again at the chunk that holds `page` of a span, and quarantines it if it is rotten, or if the disk
        does not give it: a sector may be bad. Not so while the whole disk is unwell. Returns the span as it is."""
        recipe = self._ledger.recipe(view, span)
        if recipe is None or view not in self._ledger.views:
            return None
        at = 0
        for entry in recipe:
            at += entry.pages
            if page < at:
                chunk = self._ledger.chunk(entry.chunk) if entry.kind is Kind.CHUNK else None
                if chunk is not None and not chunk.rotten:
                    self._doubt_chunk(entry.chunk, chunk)
                break
        span_map = SpanMap.of(recipe, self._ledger.chunk, self._verified.__contains__)
        return Landed(view, span, span_map, self._ledger.views[view].cached)

    def _doubt_chunk(self, chunk_id: ChunkId, chunk: Chunk) -> None:
        try:
            stored = self._segments.read(chunk.segment, chunk.offset, chunk.length)
        except OSError as error:
            self._could_not_read(chunk, error)
            if self._disk_is_well():
                self.newly_unreadable.append(chunk_id)
                self._ledger.mark_rotten(chunk_id)
        else:
            self._check(chunk_id, chunk, stored)

    # ── cutting and sharing ──

    def _cut(self, plan: _Plan, data: memoryview) -> list[Entry]:
        cuts = cut(data)
        pieces = [data[first * PAGE : (first + pages) * PAGE] for first, pages, is_hole in cuts if not is_hole]
        digests = [digest_of(piece) for piece in pieces]
        known = self._ledger.known(digests)
        ids = (self._same_or_new(plan, *new, new[1] in known) for new in zip(pieces, digests, strict=True))
        return [
            Entry(Kind.HOLE, pages, NO_CHUNK) if is_hole else Entry(Kind.CHUNK, pages, next(ids))
            for _, pages, is_hole in cuts
        ]

    def _same_or_new(self, plan: _Plan, piece: memoryview, digest: bytes, is_known: bool) -> ChunkId:
        for chunk_id in plan.by_digest.get(digest, ())[:CANDIDATES_MAX]:
            if bytes(plan.new[chunk_id][1]) == bytes(piece):
                return chunk_id
        for chunk_id, chunk in self._ledger.candidates(digest) if is_known else ():
            if chunk.length == len(piece) and self._stored_is(chunk_id, chunk, piece):
                return chunk_id
        chunk_id = self._ledger.new_chunk_id()
        plan.new[chunk_id] = (digest, piece)
        plan.by_digest.setdefault(digest, []).append(chunk_id)
        return chunk_id

    def _stored_is(self, chunk_id: ChunkId, chunk: Chunk, piece: memoryview) -> bool:
        stored = self._read(chunk)
        if stored == bytes(piece):  # memcmp; comparing a memoryview goes byte by byte.
            if chunk.segment not in self._ledger.uncommitted_segments():
                self._verified.add((chunk_id,))
            return True
        self._check(chunk_id, chunk, stored)
        return False

    def _read(self, chunk: Chunk) -> bytes:
        try:
            return self._segments.read(chunk.segment, chunk.offset, chunk.length)
        except OSError as error:
            self._could_not_read(chunk, error)
            return b""

    def _could_not_read(self, chunk: Chunk, error: OSError) -> None:
        self._repeats.error(
            ("read", chunk.segment), "segment %d, offset %d: %s", chunk.segment, chunk.offset, error
        )

    def _check(self, chunk_id: ChunkId, chunk: Chunk, stored: bytes) -> bool:
        if len(stored) == chunk.length and digest_of(stored) == chunk.digest:
            return True
        self.rotten_found += 1
        self.newly_rotten.append(chunk_id)
        self._repeats.error(
            ("rotten", chunk.segment),
            "chunk %d (segment %d, offset %d, %d bytes) is rotten: quarantined, to be fetched again",
            chunk_id, chunk.segment, chunk.offset, chunk.length,
        )  # fmt: skip
        self._ledger.mark_rotten(chunk_id)
        return False

    def _assemble(self, recipe: Recipe, plan: _Plan) -> memoryview | None:
        """All bytes of a span that has become whole, or None when a stored part of it is rotten: a new chunk
        made of bytes that nobody checked would turn rot into truth."""
        whole = memoryview(bytearray(sum(e.pages for e in recipe) * PAGE))
        at = 0
        for kind, pages, chunk_id in recipe:
            length = pages * PAGE
            if kind is Kind.CHUNK:
                if chunk_id in plan.new:
                    whole[at : at + length] = plan.new[chunk_id][1]
                else:
                    chunk = self._ledger.chunk(chunk_id)
                    stored = b"" if chunk is None else self._read(chunk)
                    if chunk is None or not self._check(chunk_id, chunk, stored):
                        return None
                    whole[at : at + length] = stored
            at += length
        return whole

    # ── writing ──

    def _write(self, plan: _Plan, recipe: Recipe, *, past_cache: bool) -> dict[ChunkId, Chunk]:
        """Appends what is new and still named by `recipe`; returns it with its place and its count."""
        named = Counter(e.chunk for e in recipe if e.kind is Kind.CHUNK and e.chunk in plan.new)
        parts = [plan.new[chunk_id][1] for chunk_id in named]
        if not parts:
            return {}
        segment, offset = self._append(parts, past_cache=past_cache)
        self.bytes_landed += sum(len(part) for part in parts)
        placed = {}
        for chunk_id, refs in named.items():
            digest, part = plan.new[chunk_id]
            placed[chunk_id] = Chunk(segment, offset // PAGE, len(part) // PAGE, digest, refs)
            offset += len(part)
        return placed

    def _append(self, parts: Sequence[memoryview], *, past_cache: bool = False) -> tuple[SegmentNo, int]:
        """Writes `parts` side by side; returns where."""
        total = sum(len(part) for part in parts)
        if not self._room(total):
            raise StoreFull(total)
        segment, offset = self._place(total)
        try:
            self._segments.append(segment, offset, parts, past_cache=past_cache)
        except OSError:
            self._ledger.advance(segment, offset + total)
            self._ledger.abandon_bytes(Punch(segment, offset, total))
            with suppress(OSError):  # A file that is as long as its record says looks like one that lost nothing.
                self._segments.truncate(segment, offset + total)
            raise
        self._ledger.advance(segment, offset + total)
        return segment, offset

    def _place(self, length: int) -> tuple[SegmentNo, int]:
        if self._segment is not None:
            end = self._ledger.segments[self._segment].end
            if end + length <= SEGMENT_SIZE:
                return self._segment, end
        # A number whose segment was lost in a failed commit is not given again.
        segment = SegmentNo(max((*self._ledger.segments, self._segments.last)) + 1)
        self._segments.open(segment, create=True)
        self._ledger.begin_segment(segment)
        self._segment = segment
        return segment, 0
