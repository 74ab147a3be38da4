"""Makes an index and its segments agree again: all that `check` calls damage goes, and nothing else. Rule: what a
view may still read afterwards are bytes that it had before; everything doubtful becomes absent.

The order is that of every change (docs/format.md). One transaction says what there is from now on, and notes what
is to be punched: it streams, so it may be of any size. Then files are removed, cut and punched; then the notes
go. Whatever ends in between leaves a store that the next start finishes.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cachefs import logs
from cachefs.errors import StoreUnusable
from cachefs.plan.extents import PAGE, Extent, ceil, floor, subtract
from cachefs.store import format as f
from cachefs.store.check import recipe_faults
from cachefs.store.folder import SEGMENTS
from cachefs.store.format import (
    ChunkId,
    Counters,
    Entry,
    Kind,
    Punch,
    Recipe,
    ScrubRecord,
    SegmentNo,
    SegmentRecord,
    Table,
    ViewNo,
)
from cachefs.store.index import Index, Snapshot, WriteSet
from cachefs.store.recipe import NO_CHUNK, present_bytes
from cachefs.store.segments import Segments, sync_folder
from cachefs.store.survey import (
    CHUNK_ID_MAX,
    FOUND,
    UNDECODABLE,
    Survey,
    decode_block_digests,
    decode_chunk,
    decode_lease,
    decode_precache,
    decode_span,
    decode_trace,
    decode_uses,
    decode_view,
)
from cachefs.words import counted

log = logs.get(__name__)

_BATCH = 4096  # Changes that are held at once.

_Change = Callable[[WriteSet], None]


@dataclass
class Repaired:
    """What was done. Sizes in bytes; `aside` is where the store is, if its index could not be read."""

    records_changed: int = 0  # Of all kinds; what follows says which.
    records_dropped: int = 0  # Could not be read, or belong to nothing.
    spans_changed: int = 0
    bytes_absent: int = 0  # Of views, that they had by their recipes and have no more.
    chunks_dropped: int = 0
    counts_changed: int = 0  # Of references, by chunk.
    digests_changed: int = 0
    views_changed: int = 0
    segments_changed: int = 0
    segments_removed: int = 0
    strays_removed: int = 0
    numbers_raised: bool = False
    bytes_cut: int = 0
    bytes_punched: int = 0
    tables_rebuilt: list[str] = field(default_factory=list)
    aside: str | None = None

    def __bool__(self) -> bool:
        return self != Repaired()

    def __str__(self) -> str:
        """One line, of what was done only."""
        if self.aside:
            return f"index and segments set aside in {self.aside}"
        said = [
            f"{counted(n, what)} {done}"
            for n, what, done in (
                (self.records_changed, "record", "changed"),
                (self.records_dropped, "record", "dropped"),
                (self.spans_changed, "span", "changed"),
                (self.bytes_absent, "byte", "absent now"),
                (self.chunks_dropped, "chunk", "dropped"),
                (self.counts_changed, "count", "of references corrected"),
                (self.digests_changed, "digest", "corrected"),
                (self.views_changed, "view", "corrected"),
                (self.segments_changed, "segment", "corrected"),
                (self.segments_removed, "dead segment", "removed"),
                (self.strays_removed, "stray segment", "removed"),
                (self.bytes_cut, "byte", "cut off"),
                (self.bytes_punched, "byte", "punched"),
            )
            if n
        ]
        if self.numbers_raised:
            said.append("numbers raised")
        said.extend(f"table {name} rebuilt" for name in self.tables_rebuilt)
        return ", ".join(said) or "nothing to do"


def repair(folder: Path, index: Index, survey: Survey) -> Repaired:
    """Repairs the locked store in `folder`, whose `index` is as `survey` found it. Raises StoreUnusable when the
    disk gives nothing of a segment: then nothing is changed, because nothing is known. Raises OSError when the
    disk does not take the change."""
    for segment, trouble in survey.unreachable.items():
        raise StoreUnusable(str(folder), f"segment {segment} cannot be read ({trouble}): nothing is repaired")
    return _Repair(folder, index, survey).run()


def mended(recipe: Recipe, usable: Callable[[int, int], int | None]) -> Recipe:
    """`recipe` with every chunk that is not `usable` (by its number and pages) absent."""
    out: list[Entry] = []
    for entry in recipe:
        if entry.kind is Kind.CHUNK and usable(entry.chunk, entry.pages) is None:
            entry = Entry(Kind.ABSENT, entry.pages, NO_CHUNK)
        if out and entry.kind is not Kind.CHUNK and out[-1].kind is entry.kind:
            out[-1] = Entry(entry.kind, out[-1].pages + entry.pages, NO_CHUNK)
        else:
            out.append(entry)
    return tuple(out)


class _Repair:
    """One run. The steps of `_changes` are in the order of what they need of each other."""

    def __init__(self, folder: Path, index: Index, survey: Survey) -> None:
        self._index, self._survey, self._chunks = index, survey, survey.chunks
        self._segments = Segments(folder / SEGMENTS)
        self._done = Repaired()
        self._notes: list[Punch] = []
        self._cached: Counter[ViewNo] = Counter()  # By view, what its recipes hold from now on.
        self._ends: dict[SegmentNo, int] = {}  # Of the segments that stay.

    def run(self) -> Repaired:
        cleared = self._survey.disordered
        self._index.rewrite(self._changes, cleared)
        self._done.tables_rebuilt = sorted(table.name.lower() for table in cleared)
        self._perform()
        return self._done

    # ── the index ──

    def _changes(self, snapshot: Snapshot) -> Iterator[WriteSet]:
        """Everything that is to change, in bounded sets. Asked again from the start when the map had to grow."""
        self._done, self._notes, self._cached, self._ends = Repaired(), [], Counter(), {}
        for row in range(len(self._chunks)):
            self._chunks.named[row] = 0
        for step in (self._spans, self._chunks_, self._digests, self._views, self._places, self._rest):
            writes, held = WriteSet(), 0
            for change in step(snapshot):
                change(writes)
                held += 1
                if held == _BATCH:
                    yield writes
                    writes, held = WriteSet(), 0
            yield writes
            self._index.trim()

    def _put(self, table: Table, key: bytes, before: bytes | None, after: bytes | None) -> Iterator[_Change]:
        """The change from one record to another, if there is one to make. A cleared table holds nothing."""
        if after is not None if table in self._survey.disordered else after != before:
            # A note of a punch that is to be done right away is not worth a word.
            self._done.records_changed += table is not Table.PUNCHES or after is None
            yield lambda writes: writes.put(table, key, after)

    def _spans(self, snapshot: Snapshot) -> Iterator[_Change]:
        for key, record in snapshot.items(Table.SPANS):
            recipe = self._span(key, record)
            after = None if recipe is None else f.encode_recipe(key, recipe)
            if after != record:
                self._done.spans_changed += 1
            yield from self._put(Table.SPANS, key, record, after)

    def _span(self, key: bytes, record: bytes) -> Recipe | None:
        """What a span is from now on, None when all of it is absent. Counts what it names."""
        try:
            before = decode_span(key, record)
            view, span = f.split_span_key(key)
            left = self._survey.views[view].size - span * self._survey.span_size
        except (KeyError, *UNDECODABLE):
            self._done.records_dropped += 1
            return None
        wanted = ceil(max(0, min(self._survey.span_size, left)), PAGE) // PAGE
        after = mended(before, self._chunks.usable)
        if not wanted or any(recipe_faults(after, wanted)):
            self._done.records_dropped += 1
            return None
        held = present_bytes(after, left)
        self._done.bytes_absent += present_bytes(before, left) - held
        if all(entry.kind is Kind.ABSENT for entry in after):
            return None if after != before else after
        self._cached[view] += held
        for entry in after:
            row = self._chunks.usable(entry.chunk, entry.pages) if entry.kind is Kind.CHUNK else None
            if row is not None:
                self._chunks.named[row] += 1
        return after

    def _chunks_(self, snapshot: Snapshot) -> Iterator[_Change]:
        chunks, done = self._chunks, self._done
        row = -1
        for key, record in snapshot.items(Table.CHUNKS):
            try:
                chunk, chunk_id = decode_chunk(key, record), f.split_chunk_key(key)
            except UNDECODABLE:
                done.records_dropped += 1
                yield from self._put(Table.CHUNKS, key, record, None)
                continue
            row += 1
            refs = chunks.named[row]
            if not refs:
                done.chunks_dropped += 1
                yield from self._put(Table.CHUNKS, key, record, None)
                yield self._digest_removed(chunk.digest, chunk_id)
                continue
            done.counts_changed += refs != chunk.refs
            yield from self._put(Table.CHUNKS, key, record, chunk.with_refs(refs).encode(chunk_id))
            lost = not chunks.marks[row] & FOUND
            done.digests_changed += lost
            if lost or Table.DIGESTS in self._survey.disordered:
                yield self._digest_added(chunk.digest, chunk_id)

    def _digests(self, snapshot: Snapshot) -> Iterator[_Change]:
        """Pairs that lead to no chunk, or to one without the digest. (Those of dropped chunks are gone.)"""
        if not self._survey.false_pairs or Table.DIGESTS in self._survey.disordered:
            return
        for digest, value in snapshot.items(Table.DIGESTS):
            chunk_id = ChunkId(int.from_bytes(value, "big"))
            record = snapshot.get(Table.CHUNKS, value) if self._chunks.at(chunk_id) is not None else None
            if record is None or decode_chunk(value, record).digest != digest:
                self._done.digests_changed += 1
                yield self._digest_removed(digest, chunk_id)

    @staticmethod
    def _digest_removed(digest: bytes, chunk: ChunkId) -> _Change:
        return lambda writes: writes.digests_removed.append((digest, chunk))

    @staticmethod
    def _digest_added(digest: bytes, chunk: ChunkId) -> _Change:
        return lambda writes: writes.digests_added.append((digest, chunk))

    def _views(self, snapshot: Snapshot) -> Iterator[_Change]:
        for key, record in snapshot.items(Table.VIEWS):
            try:
                view = decode_view(key, record)
            except UNDECODABLE:
                self._done.records_dropped += 1
                yield from self._put(Table.VIEWS, key, record, None)
                continue
            number = ViewNo(int.from_bytes(key, "big"))
            self._done.views_changed += view.cached != self._cached[number]
            yield from self._put(Table.VIEWS, key, record, view.with_cached(self._cached[number]).encode(number))

    # ── segments, as the index is to have them ──

    def _places(self, snapshot: Snapshot) -> Iterator[_Change]:
        """Segments and punches. What is dead and occupies the disk is noted, in the same transaction."""
        survey = self._survey
        notes: dict[bytes, bytes] = {}
        records: dict[bytes, bytes] = {}
        known = set(survey.segments) | self._chunks.all_segments()
        files = set(self._segments.stored())
        for segment in sorted(known):
            live = self._live(segment)
            if not live:
                continue
            record = self._record(segment, live)
            records[f.segment_key(segment)] = record.encode(segment)
            self._ends[segment] = record.end
            self._done.segments_changed += record != survey.segments.get(segment)
            for note in self._dead(segment, record.end, live):
                notes[note.key] = note.encode()
                self._notes.append(note)
        self._done.segments_removed = len((set(survey.segments) | (known & files)) - set(self._ends))
        yield from self._replace(snapshot, Table.SEGMENTS, records)
        yield from self._replace(snapshot, Table.PUNCHES, notes)

    def _replace(self, snapshot: Snapshot, table: Table, records: dict[bytes, bytes]) -> Iterator[_Change]:
        before = dict(snapshot.items(table))
        for key in sorted(before.keys() | records.keys()):
            yield from self._put(table, key, before.get(key), records.get(key))

    def _live(self, segment: SegmentNo) -> list[Extent]:
        rows = self._chunks.of_segment(segment)
        return [self._chunks.extent(row) for row in rows if self._chunks.named[row]]

    def _record(self, segment: SegmentNo, live: list[Extent]) -> SegmentRecord:
        """Where the end is not known, or not there, it is that of the last chunk."""
        last = max(extent.end for extent in live)
        known = self._survey.segments.get(segment)
        end = known.end if known is not None else last
        if end < last or end % PAGE or end > self._file_bytes(segment):
            end = last
        return SegmentRecord(end, sum(extent.length for extent in live))

    def _file_bytes(self, segment: SegmentNo) -> int:
        return os.stat(self._segments.folder / f.segment_name(segment)).st_size

    def _dead(self, segment: SegmentNo, end: int, live: list[Extent]) -> Iterator[Punch]:
        """What of a segment is no chunk's and occupies whole blocks of the disk."""
        self._segments.open(segment)
        try:
            file = self._segments.files[segment]
            block = max(PAGE, os.fstatvfs(file).f_frsize)
            for gap in subtract(Extent(0, end), live):
                whole = Extent(ceil(gap.start, block), floor(gap.end, block))
                for extent in stored_extents(file, whole):
                    yield Punch(segment, extent.start, extent.length)
        finally:
            self._segments.close()

    # ── the rest of the index ──

    def _rest(self, snapshot: Snapshot) -> Iterator[_Change]:
        hints: tuple[tuple[Table, Callable[[bytes, bytes], object]], ...] = (
            (Table.IMAGES, f.decode_image),
            (Table.USES, self._decode_uses),
            (Table.LEASES, decode_lease),
            (Table.PRECACHE, decode_precache),
            (Table.TRACES, decode_trace),
            (Table.BLOCK_DIGESTS, self._decode_block_digests),
            (Table.META, self._decode_meta),
        )
        for table, decode in hints:
            for key, record in snapshot.items(table):
                after: bytes | None = record
                try:
                    decode(key, record)
                except UNDECODABLE:
                    after = None
                    self._done.records_dropped += 1
                yield from self._put(table, key, record, after)
        survey = self._survey
        possible = bisect_right(self._chunks.ids, CHUNK_ID_MAX)
        last_chunk = self._chunks.ids[possible - 1] if possible else 0
        seen = Counters(last_chunk + 1, max(survey.views, default=0) + 1, survey.next_image)
        counters = Counters(*map(max, seen, survey.counters or Counters()))
        if counters != survey.counters:
            self._done.numbers_raised = True
            yield lambda writes: writes.put(Table.META, f.COUNTERS_KEY, counters.encode())

    def _decode_uses(self, key: bytes, record: bytes) -> None:
        decode_uses(key, record)
        if f.split_uses_key(key)[0] not in self._survey.views:
            raise ValueError

    def _decode_block_digests(self, key: bytes, record: bytes) -> None:
        try:
            decode_block_digests(key, record, self._survey)
        except KeyError:
            raise ValueError from None

    @staticmethod
    def _decode_meta(key: bytes, record: bytes) -> None:
        """What a later cachefs may have put there is its own."""
        if key == f.SCRUB_KEY:
            ScrubRecord.decode(record)
        elif key == f.COUNTERS_KEY:
            Counters.decode(record)

    # ── the files, after the index ──

    def _perform(self) -> None:
        """What is not done, for a crash or an error, the next start does."""
        segments, done = self._segments, self._done
        known = set(self._survey.segments) | self._chunks.all_segments()
        removed = [segment for segment in segments.stored() if segment not in self._ends]
        for segment in removed:
            segments.remove_stray(segment)
        done.strays_removed = len(set(removed) - known)
        if removed:
            sync_folder(segments.folder)
        by_segment: dict[SegmentNo, list[Punch]] = {}
        for note in self._notes:
            by_segment.setdefault(note.segment, []).append(note)
        try:
            for segment, end in sorted(self._ends.items()):
                self._trim_file(segment, end, by_segment.get(segment, []))
        except OSError as error:  # A full disk, as a hole may need a block more: the next start tries again.
            log.error("freed bytes cannot be given back: %s", error)
            return
        writes = WriteSet()
        for note in self._notes:
            writes.put(Table.PUNCHES, note.key, None)
        if writes:
            self._index.commit(writes)

    def _trim_file(self, segment: SegmentNo, end: int, notes: list[Punch]) -> None:
        """Cuts and punches; counts what really came back."""
        segments = self._segments
        if not notes and self._file_bytes(segment) <= end:
            return
        segments.open(segment)
        try:
            beyond = segments.size(segment) - end
            if beyond > 0:
                segments.truncate(segment, end)
                self._done.bytes_cut += beyond
            before = segments.blocks_bytes()
            for note in notes:
                segments.punch(note)
            self._done.bytes_punched += max(0, before - segments.blocks_bytes())
        finally:
            segments.close()


def stored_extents(file: int, within: Extent) -> Iterator[Extent]:
    """Where a file has bytes in `within`, by the filesystem's word; all of it where that does not know."""
    at = within.start
    while at < within.end:
        try:
            start = os.lseek(file, at, os.SEEK_DATA)
            if start >= within.end:
                return
            at = min(os.lseek(file, start, os.SEEK_HOLE), within.end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # No bytes behind this.
                return
            raise
        yield Extent(start, at)
