"""Offline verification: is everything there that the index names, and is it what the index says? Rule: changes
nothing, and trusts no total: whatever a record counts is counted here again.

One pass over each table, then one over each segment in the order of its bytes. Chunks are kept as columns of
numbers (`survey`), so that a store with 16 million of them is checked in half a GiB; the rest is looked up in
the index again where it is needed. `repair` goes by the same survey and the marks that are made here.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cachefs.errors import RecordCorrupt, StoreFormat, StoreUnreadable
from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import PAGE, Extent, ceil, coalesce
from cachefs.store import format as f
from cachefs.store.aside import why_unreadable
from cachefs.store.folder import DATA, INDEX, SEGMENTS, StoreLock, require_own, require_store
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
    StoreRecord,
    Table,
    ViewNo,
)
from cachefs.store.index import Index, Snapshot, index_faults
from cachefs.store.recipe import present_bytes
from cachefs.store.segments import Segments
from cachefs.store.survey import (
    BAD,
    CHUNK_ID_MAX,
    FOUND,
    NUMBER_MAX,
    ROTTEN,
    UNDECODABLE,
    Survey,
    decode_block_digests,
    decode_chunk,
    decode_lease,
    decode_precache,
    decode_segment,
    decode_span,
    decode_trace,
    decode_uses,
    decode_view,
)
from cachefs.words import counted

READ_BYTES = 8 << 20
# A store that lost a segment names some 16,000 chunks of it; nobody reads more than this.
FINDINGS_MAX = 10_000

# How many records are read before the process lets go of what it mapped for them.
TRIM_EVERY = 1 << 18
_HEAD = f.MAGIC + f.FORMAT.to_bytes(4, "little")

LEFT = "left by a crash; removed at the next start"
UNREADABLE = "its record cannot be read"


class Severity(Enum):
    """A NOTE asks for nothing: the next start or the next fetch sees to it."""

    DAMAGE = "damage"
    NOTE = "note"


class Finding(NamedTuple):
    severity: Severity
    what: str
    where: str

    def __str__(self) -> str:
        return f"{self.severity.value}: {self.where}: {self.what}"


@dataclass
class Report:
    """What was found. `unlisted` counts the findings beyond FINDINGS_MAX; `bytes_verified` those of chunks
    whose bytes have their digest."""

    findings: list[Finding] = field(default_factory=list)
    unlisted: int = 0
    sound: bool = True
    spans: int = 0
    chunks: int = 0
    bytes_verified: int = 0

    def add(self, severity: Severity, what: str, where: str) -> None:
        if severity is Severity.DAMAGE:
            self.sound = False
        if len(self.findings) < FINDINGS_MAX:
            self.findings.append(Finding(severity, what, where))
        else:
            self.unlisted += 1

    def damage(self, what: str, where: str) -> None:
        self.add(Severity.DAMAGE, what, where)

    def note(self, what: str, where: str) -> None:
        self.add(Severity.NOTE, what, where)


def check(folder: Path) -> Report:
    """Verifies the store in `folder`. Raises StoreUnusable or one of its kinds for what cannot be looked at:
    no store, another format, in use."""
    require_own(folder)
    require_store(folder, empty_will_do=False)
    lock = StoreLock(folder)
    try:
        return look(folder)[0]
    finally:
        lock.release()


def look(folder: Path, *, bytes_too: bool = True) -> tuple[Report, Survey | None]:
    """Verifies a store that this process has locked, and gives what is needed to repair it; None when there is
    nothing to repair: the index cannot be read at all, which is damage, or there is none yet. Without `bytes_too`
    no segment is read."""
    report = Report()
    reason = why_unreadable(folder, thorough=True)
    if reason is None and not (folder / INDEX / DATA).exists():
        report.note("there is none: the next start begins one", "index")
        return report, None
    if reason is None:
        try:
            with (
                index_faults(folder),
                closing(Index(folder / INDEX, read_only=True)) as index,
                index.reading() as snapshot,
            ):
                return inspect(folder, snapshot, trim=index.trim, bytes_too=bytes_too)
        except StoreUnreadable as error:
            reason = error.reason
    report.damage(reason, "index")
    report.note("the next start sets the store aside", "index")
    return report, None


def inspect(
    folder: Path, snapshot: Snapshot, *, bytes_too: bool, trim: Callable[[], None] = lambda: None
) -> tuple[Report, Survey]:
    """Verifies what `snapshot` shows. `trim` is called now and then: the process has no need of what it read.
    Raises StoreUnreadable when the record of the store is rotten."""
    checking = _Check(folder, snapshot, read_store_record(snapshot, folder), bytes_too, trim)
    return checking.run(), checking.survey


def read_store_record(snapshot: Snapshot, folder: Path) -> StoreRecord:
    """Raises StoreFormat for a store of another format, and StoreUnreadable for a record that has rotted."""
    found = snapshot.get(Table.META, f.STORE_KEY)
    if found is None and is_unmade(folder, snapshot):
        raise StoreFormat(str(folder), "this is not a cachefs store")
    try:
        return StoreRecord.decode(found or b"", str(folder))
    except (RecordCorrupt, struct.error):
        pass
    except StoreFormat:
        # Rot in the first bytes may look like another format. That would have another seal, behind our magic.
        healed = _HEAD + (found or b"")[len(_HEAD) :]
        if (found or b"").startswith(f.MAGIC) and f.seal(
            Table.META, f.STORE_KEY, healed[: -f.SEAL_BYTES]
        ) != healed:
            raise
    raise StoreUnreadable(str(folder), "the record of the store is lost or has rotted")


def is_unmade(folder: Path, snapshot: Snapshot) -> bool:
    """Whether there is nothing in the store at all: a crash ended its making."""
    return not any(next(snapshot.items(table), None) for table in Table) and not any(
        Segments(folder / SEGMENTS).stored()
    )


def recipe_faults(recipe: Recipe, pages: int) -> Iterator[str]:
    """What is wrong with a recipe by itself, when it is to cover `pages` pages."""
    covered = sum(e.pages for e in recipe)
    if covered != pages:
        yield f"its recipe covers {covered} pages of {pages}"
    if any(e.pages == 0 for e in recipe):
        yield "its recipe has an empty entry"
    if any((e.kind is Kind.CHUNK) != (e.chunk != 0) for e in recipe):
        yield "its recipe has an entry that is no chunk and names one, or the reverse"
    if any(a.kind is b.kind is not Kind.CHUNK for a, b in pairwise(recipe)):
        yield "its recipe has neighbours that should be one entry"


class _Check:
    """One run over one snapshot. The order of the steps is that of what they need of each other."""

    def __init__(
        self, folder: Path, snapshot: Snapshot, record: StoreRecord, bytes_too: bool, trim: Callable[[], None]
    ) -> None:
        self._folder, self._snapshot, self._trim = folder, snapshot, trim
        self._bytes_too = bytes_too
        self._report = Report()
        self.survey = Survey(record.span_size)
        self._chunks = self.survey.chunks
        self._counters = Counters()

    def run(self) -> Report:
        self._read_meta()
        self._read_views()
        self._read_images()
        self._read_uses()
        self._read_leases()
        self._read_precache()
        self._read_traces()
        self._read_block_digests()
        self._read_segments()
        self._read_punches()
        self._read_chunks()
        self._read_spans(self.survey.span_size)
        self._compare_counts()
        self._read_digests()
        self._compare_segments()
        return self._report

    # ── tables ──

    def _items(self, table: Table) -> Iterator[tuple[bytes, bytes]]:
        """Every record of `table`. Where one is not found by its key, the keys or the pages above have rotted."""
        before = b""
        unfound = 0
        for n, (key, record) in enumerate(self._snapshot.items(table)):
            if key <= before or self._snapshot.get(table, key) != record:
                unfound += 1
            before = key
            if n % TRIM_EVERY == TRIM_EVERY - 1:
                self._trim()
            yield key, record
        if unfound:
            self.survey.disordered.add(table)
            self._report.damage(f"{unfound} records are not found by their keys", f"table {table.name.lower()}")

    def _decoded(
        self, table: Table, decode: Callable[[bytes, bytes], Any], severity: Severity = Severity.DAMAGE
    ) -> Iterator[tuple[bytes, Any]]:
        """Every record of `table` that can be read; the others are damage, unless they are mere hints."""
        for key, record in self._items(table):
            try:
                value = decode(key, record)
            except UNDECODABLE:
                # A sealed record that does not decode was written so: no rot, and damage all the same.
                self._report.add(severity, UNREADABLE, f"{table.name.lower()} {key.hex()}")
            else:
                yield key, value

    def _read_meta(self) -> None:
        for _ in self._items(Table.META):
            pass
        try:
            self._counters = Counters.decode(self._snapshot.get(Table.META, f.COUNTERS_KEY) or b"")
            self.survey.counters = self._counters
        except UNDECODABLE:
            self._report.damage(UNREADABLE, "counters")
            self._counters = Counters(1 << 63, 1 << 32, 1 << 32)  # Nothing to compare with.
        scrub = self._snapshot.get(Table.META, f.SCRUB_KEY)
        try:
            if scrub is not None:
                ScrubRecord.decode(scrub)
        except UNDECODABLE:
            self._report.note(f"{UNREADABLE}: the next run begins anew", "scrub")

    def _read_views(self) -> None:
        for key, record in self._decoded(Table.VIEWS, decode_view):
            view = ViewNo(int.from_bytes(key, "big"))
            self.survey.views[view] = record
            if view >= self._counters.view:
                self._report.damage(f"the next view would be {self._counters.view}", f"view {view}")

    def _read_images(self) -> None:
        for _, (image, fields) in self._decoded(Table.IMAGES, f.decode_image):
            number = fields.get("number", 0)
            if not isinstance(number, int):
                continue
            if 0 <= number < NUMBER_MAX:
                self.survey.next_image = max(self.survey.next_image, number + 1)
            if number >= self._counters.image:
                self._report.damage(
                    f"has number {number}, and the next would be {self._counters.image}", f"image {image}"
                )

    def _read_uses(self) -> None:
        for key, _ in self._decoded(Table.USES, decode_uses, Severity.NOTE):
            if f.split_uses_key(key)[0] not in self.survey.views:
                self._report.note("there is no such view", f"uses {key.hex()}")

    def _read_leases(self) -> None:
        for _key, _ in self._decoded(Table.LEASES, decode_lease):
            pass

    def _read_precache(self) -> None:
        for _key, _ in self._decoded(Table.PRECACHE, decode_precache, Severity.NOTE):
            pass

    def _read_traces(self) -> None:
        for _key, _ in self._decoded(Table.TRACES, decode_trace, Severity.NOTE):
            pass

    def _read_block_digests(self) -> None:
        """What is wrong here costs the protection of what is fetched again, and no byte."""
        for key, record in self._items(Table.BLOCK_DIGESTS):
            where = f"block_digests {key.hex()}"
            try:
                decode_block_digests(key, record, self.survey)
            except KeyError:
                self._report.note("there is no such view", where)
            except UNDECODABLE:
                self._report.note(UNREADABLE, where)

    def _read_segments(self) -> None:
        for key, record in self._decoded(Table.SEGMENTS, decode_segment):
            self.survey.segments[SegmentNo(int.from_bytes(key, "big"))] = record

    def _read_punches(self) -> None:
        for _, punch in self._decoded(Table.PUNCHES, Punch.decode):
            where = f"segment {punch.segment}, offset {punch.offset}"
            self._report.note(f"{punch.length} freed bytes are still to be punched: {LEFT}", where)
            record = self.survey.segments.get(punch.segment)
            if record is None or punch.offset + punch.length > record.end:
                self._report.damage("freed bytes lie outside what was committed of the segment", where)
            extent = Extent(punch.offset, punch.offset + punch.length)
            self.survey.punches.setdefault(punch.segment, []).append(extent)

    def _read_chunks(self) -> None:
        for key, chunk in self._decoded(Table.CHUNKS, decode_chunk):
            chunk_id = f.split_chunk_key(key)
            row = len(self._chunks)
            self._chunks.add(chunk_id, chunk)
            where = f"chunk {chunk_id}"
            if chunk_id >= self._counters.chunk:
                self._report.damage(f"the next chunk would be {self._counters.chunk}", where)
            if not 0 < chunk_id <= CHUNK_ID_MAX or not chunk.segment:
                self._bad(row, "has a number that cannot be", where)
            if not 0 < chunk.pages <= CHUNK_PAGES_MAX:
                self._bad(row, f"has {chunk.pages} pages", where)
            if chunk.rotten:
                self._report.note("is quarantined, and fetched again when it is read", where)
        self._report.chunks = len(self._chunks)

    def _bad(self, row: int, what: str, where: str) -> None:
        """Damage that makes the chunk of no use to anybody."""
        self._report.damage(what, where)
        self._chunks.mark(row, BAD)

    # ── spans ──

    def _read_spans(self, span_size: int) -> None:
        cached: Counter[ViewNo] = Counter()
        for key, recipe in self._decoded(Table.SPANS, decode_span):
            self._report.spans += 1
            view, span = f.split_span_key(key)
            where = f"span {span} of view {view}"
            for entry in recipe:
                if entry.kind is Kind.CHUNK:
                    self._name(entry, where)
            record = self.survey.views.get(view)
            if record is None:
                self._report.damage("there is no such view", where)
                continue
            left = record.size - span * span_size
            if left <= 0:
                self._report.damage(f"lies beyond the view's {record.size} bytes", where)
                continue
            for fault in recipe_faults(recipe, ceil(min(span_size, left), PAGE) // PAGE):
                self._report.damage(fault, where)
            cached[view] += present_bytes(recipe, left)
        for view, record in self.survey.views.items():
            if record.cached != cached[view]:
                self._report.damage(
                    f"has {cached[view]} bytes by its recipes, and says {record.cached}", f"view {view}"
                )

    def _name(self, entry: Entry, where: str) -> None:
        row = self._chunks.at(entry.chunk)
        if row is None:
            self._report.damage(f"names chunk {entry.chunk}, which does not exist", where)
            return
        self._chunks.named[row] += 1
        if self._chunks.pages[row] != entry.pages:
            self._report.damage(
                f"takes chunk {entry.chunk} for {entry.pages} pages, and it has {self._chunks.pages[row]}", where
            )

    def _compare_counts(self) -> None:
        chunks = self._chunks
        if chunks.refs == chunks.named and 0 not in chunks.refs:
            return
        for row, (refs, named) in enumerate(zip(chunks.refs, chunks.named, strict=True)):
            if refs != named or not refs:
                self._report.damage(
                    f"counts {counted(refs, 'reference')}, and recipes name it {counted(named, 'time')}",
                    f"chunk {chunks.ids[row]}",
                )

    # ── digests ──

    def _read_digests(self) -> None:
        chunks = self._chunks
        before = (b"", b"")
        disorder = unfound = 0
        for n, (digest, value) in enumerate(self._snapshot.items(Table.DIGESTS)):
            disorder += (digest, value) <= before or len(value) != 8
            if digest != before[0]:
                unfound += self._snapshot.get(Table.DIGESTS, digest) is None
            before = (digest, value)
            if n % TRIM_EVERY == TRIM_EVERY - 1:
                self._trim()
            chunk_id = int.from_bytes(value, "big")
            row = chunks.at(chunk_id)
            if row is None or self._digest(row) != digest:
                self.survey.false_pairs += 1
                self._report.damage(f"leads to chunk {chunk_id}, which has not got it", f"digest {digest.hex()}")
            else:
                chunks.mark(row, FOUND)
        if disorder or unfound:
            self.survey.disordered.add(Table.DIGESTS)
            self._report.damage(f"{disorder + unfound} records are not found by their keys", "table digests")
        for row, marks in enumerate(chunks.marks):
            if not marks & (FOUND | ROTTEN):
                self._report.damage("is not found by its digest", f"chunk {chunks.ids[row]}")

    def _digest(self, row: int) -> bytes | None:
        """None where the record that was met on the walk is not found by its key."""
        key = f.chunk_key(ChunkId(self._chunks.ids[row]))
        record = self._snapshot.get(Table.CHUNKS, key)
        try:
            return None if record is None else decode_chunk(key, record).digest
        except UNDECODABLE:
            return None

    # ── segments ──

    def _compare_segments(self) -> None:
        self._chunks.arrange()
        segments = Segments(self._folder / SEGMENTS)
        stored = set(segments.stored())
        for stray in sorted(stored - set(self.survey.segments) - self._chunks.all_segments()):
            self._report.note(LEFT, f"segment {stray}")
        for segment in sorted(set(self.survey.segments) | self._chunks.all_segments()):
            rows = self._chunks.of_segment(segment)
            self._compare_live(segment, rows)
            if segment not in stored:
                for row in rows:
                    self._chunks.mark(row, BAD)
                self._report.damage("its file is missing", f"segment {segment}")
                continue
            try:
                segments.open(segment)
            except OSError as error:
                self._report.damage(f"its file cannot be opened: {error.strerror}", f"segment {segment}")
                self.survey.unreachable[segment] = os.strerror(error.errno or 0)
                continue
            try:
                self._compare_segment(segments, segment, rows)
            finally:
                segments.close()  # One at a time: there may be more than a process may have open.

    def _compare_live(self, segment: SegmentNo, rows: list[int]) -> None:
        record = self.survey.segments.get(segment, SegmentRecord())
        live = sum(self._chunks.extent(row).length for row in rows)
        if live != record.live:
            self._report.damage(f"has {live} live bytes, and says {record.live}", f"segment {segment}")

    def _compare_segment(self, segments: Segments, segment: SegmentNo, rows: list[int]) -> None:
        record, size = self.survey.segments.get(segment), segments.size(segment)
        if record is None:
            self._report.damage("has chunks and no record", f"segment {segment}")
        self._compare_places(segment, SegmentRecord().end if record is None else record.end, rows)
        if record is not None and size > record.end:
            self._report.note(f"{size - record.end} bytes beyond its end: {LEFT}", f"segment {segment}")
        elif record is not None and size < record.end:
            self._report.damage(f"its file ends at {size}, before {record.end}", f"segment {segment}")
        if self._bytes_too:
            self._compare_bytes(segments, segment, rows)
        else:
            for row in rows:
                if self._chunks.extent(row).end > size and not self._chunks.marks[row] & ROTTEN:
                    self._bad(row, "lies beyond the end of the file", self._place(row))
        self._compare_neighbours(rows)

    def _compare_places(self, segment: SegmentNo, end: int, rows: list[int]) -> None:
        """Where one of the two is wrong, the bytes decide, if they are looked at."""
        freed = coalesce(self.survey.punches.get(segment, ()))
        free_at = 0
        doubtful = 0 if self._bytes_too else BAD
        for row in rows:
            extent = self._chunks.extent(row)
            if extent.end > end:
                self._report.damage("lies outside what was committed of the segment", self._place(row))
                # Without a record there is no end that it could be outside of.
                self._chunks.mark(row, doubtful if segment in self.survey.segments else 0)
            while free_at < len(freed) and freed[free_at].end <= extent.start:
                free_at += 1
            if free_at < len(freed) and freed[free_at].meets(extent):
                self._report.damage("overlaps bytes that were freed", self._place(row))
                self._chunks.mark(row, doubtful)

    def _compare_neighbours(self, rows: list[int]) -> None:
        """Of chunks that overlap none is believed: freeing one would punch the other. One that nobody names, or
        that is of no use anyway, takes nothing with it."""
        chunks, reached = self._chunks, 0
        last: int | None = None
        for row in rows:
            extent = chunks.extent(row)
            if extent.start < reached:
                self._report.damage("overlaps another chunk", self._place(row))
            reached = max(reached, extent.end)
            if chunks.marks[row] & BAD or not chunks.named[row]:
                continue
            if last is not None and extent.start < chunks.extent(last).end:
                chunks.mark(row, BAD)
                chunks.mark(last, BAD)
            if last is None or extent.end > chunks.extent(last).end:
                last = row

    def _place(self, row: int) -> str:
        start = self._chunks.extent(row).start
        return f"chunk {self._chunks.ids[row]} (segment {self._chunks.segments[row]}, offset {start})"

    def _compare_bytes(self, segments: Segments, segment: SegmentNo, rows: list[int]) -> None:
        trouble, read = "", 0
        for run in self._runs(rows):
            begin, what = self._chunks.extent(run[0]).start, "its bytes are not what its digest says"
            try:
                stored = segments.read(segment, begin, self._chunks.extent(run[-1]).end - begin)
                read += 1
            except OSError as error:
                trouble = error.strerror or str(error)
                stored, what = b"", f"cannot be read: {trouble}"
            for row in run:
                extent = self._chunks.extent(row)
                part = memoryview(stored)[extent.start - begin : extent.end - begin]
                if len(part) == extent.length and f.digest_of(part) == self._digest(row):
                    self._report.bytes_verified += len(part)
                else:
                    self._bad(row, what, self._place(row))
        if trouble and not read:
            self.survey.unreachable[segment] = trouble

    def _runs(self, rows: list[int]) -> Iterator[list[int]]:
        """Those that lie side by side, as many as one read takes; without those that nobody reads."""
        run: list[int] = []
        for row in rows:
            extent = self._chunks.extent(row)
            if self._chunks.marks[row] & ROTTEN or not 0 < self._chunks.pages[row] <= CHUNK_PAGES_MAX:
                continue
            if run and (
                extent.start != self._chunks.extent(run[-1]).end
                or extent.end - self._chunks.extent(run[0]).start > READ_BYTES
            ):
                yield run
                run = []
            run.append(row)
        if run:
            yield run
