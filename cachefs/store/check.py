"""Offline verification: is everything there that the index names, and is it what the index says? Rule: changes
nothing, and trusts no total: whatever a record counts is counted here again.

One pass over each table, then one over each segment in the order of its bytes. Chunks are kept as columns of
numbers, about 30 bytes each, so that a store with 16 million of them is checked in half a GiB; the rest is
looked up in the index again where it is needed.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import Enum
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from cachefs.errors import RecordCorrupt, StoreFormat
from cachefs.plan.cutting import CHUNK_PAGES_MAX
from cachefs.plan.extents import PAGE, Extent, ceil, coalesce
from cachefs.store import format as f
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Counters,
    Entry,
    Kind,
    Punch,
    Recipe,
    SegmentNo,
    SegmentRecord,
    StoreRecord,
    Table,
    ViewNo,
    ViewRecord,
)
from cachefs.store.index import Index, Snapshot
from cachefs.store.recipe import present_bytes
from cachefs.store.recover import INDEX, SEGMENTS, StoreLock, require_own
from cachefs.store.segments import Segments

READ_BYTES = 8 << 20
# A store that lost a segment names some 16,000 chunks of it; nobody reads more than this.
FINDINGS_MAX = 10_000

LEFT = "left by a crash; removed at the next start"


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
    if not (folder / INDEX / "data.mdb").exists():
        raise StoreFormat(str(folder), "this is not a cachefs store")
    lock = StoreLock(folder)
    try:
        with closing(Index(folder / INDEX, read_only=True)) as index, index.reading() as snapshot:
            return _Check(folder, snapshot).run()
    finally:
        lock.release()


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


class _Chunks:
    """Every readable chunk record, as columns in the order of the ids. `named`: how often recipes name it;
    `found`: whether the digests lead to it."""

    def __init__(self) -> None:
        self.ids = array("Q")
        self.segments, self.first_pages, self.pages = array("I"), array("I"), array("H")
        self.refs, self.named = array("I"), array("I")
        self.rotten, self.found = bytearray(), bytearray()
        self._rows, self._bounds = array("I"), dict[int, tuple[int, int]]()

    def add(self, chunk_id: ChunkId, chunk: Chunk) -> None:
        self.ids.append(chunk_id)
        self.segments.append(chunk.segment)
        self.first_pages.append(chunk.page)
        self.pages.append(chunk.pages)
        self.refs.append(chunk.refs)
        self.named.append(0)
        self.rotten.append(chunk.rotten)
        self.found.append(0)

    def at(self, chunk_id: int) -> int | None:
        """The row of a chunk."""
        row = bisect_left(self.ids, chunk_id)
        return row if row < len(self.ids) and self.ids[row] == chunk_id else None

    def extent(self, row: int) -> Extent:
        start = self.first_pages[row] * PAGE
        return Extent(start, start + self.pages[row] * PAGE)

    def arrange(self) -> None:
        """Prepares `of_segment`. Sorts by counting: a list of all rows would be larger than the columns."""
        counts = Counter(self.segments)
        fill: dict[int, int] = {}
        at = 0
        for segment, count in counts.items():
            fill[segment] = at
            self._bounds[segment] = (at, at + count)
            at += count
        self._rows = array("I", bytes(self._rows.itemsize * at))
        for row, segment in enumerate(self.segments):
            self._rows[fill[segment]] = row
            fill[segment] += 1

    def of_segment(self, segment: SegmentNo) -> list[int]:
        """The rows of a segment's chunks, in the order of their bytes."""
        begin, end = self._bounds.get(segment, (0, 0))
        return sorted(self._rows[begin:end], key=self.first_pages.__getitem__)

    def all_segments(self) -> set[SegmentNo]:
        return set(map(SegmentNo, self._bounds))


class _Check:
    """One run over one snapshot. The order of the steps is that of what they need of each other."""

    def __init__(self, folder: Path, snapshot: Snapshot) -> None:
        self._folder, self._snapshot = folder, snapshot
        self._report = Report()
        self._chunks = _Chunks()
        self._views: dict[ViewNo, ViewRecord] = {}
        self._segments: dict[SegmentNo, SegmentRecord] = {}
        self._punches: dict[SegmentNo, list[Extent]] = {}
        self._counters = Counters()

    def run(self) -> Report:
        found = self._snapshot.get(Table.META, f.STORE_KEY)
        try:
            record = StoreRecord.decode(found or b"", str(self._folder))
        except RecordCorrupt as error:
            self._report.damage(f"{error}: nothing else can be judged", "store")
            return self._report
        self._read_counters()
        self._read_views()
        self._read_images()
        self._read_segments()
        self._read_punches()
        self._read_chunks()
        self._read_spans(record.span_size)
        self._compare_counts()
        self._read_digests()
        self._compare_segments()
        return self._report

    # ── tables ──

    def _decoded(self, table: Table, decode: Callable[[bytes, bytes], Any]) -> Iterator[tuple[bytes, Any]]:
        """Every record of `table` that can be read; the others are damage."""
        for key, record in self._snapshot.items(table):
            try:
                value = decode(key, record)
            except (RecordCorrupt, ValueError, TypeError, struct.error):
                # A sealed record that does not decode was written so: no rot, and damage all the same.
                self._report.damage("its record cannot be read", f"{table.name.lower()} {key.hex()}")
            else:
                yield key, value

    def _read_counters(self) -> None:
        record = self._snapshot.get(Table.META, f.COUNTERS_KEY)
        try:
            self._counters = Counters.decode(record or b"")
        except (RecordCorrupt, struct.error):
            self._report.damage("its record cannot be read", "counters")
            self._counters = Counters(1 << 63, 1 << 31, 1 << 31)  # Nothing to compare with.

    def _read_views(self) -> None:
        for key, record in self._decoded(Table.VIEWS, ViewRecord.decode):
            view = ViewNo(int.from_bytes(key, "big"))
            self._views[view] = record
            if view >= self._counters.view:
                self._report.damage(f"the next view would be {self._counters.view}", f"view {view}")

    def _read_images(self) -> None:
        for _, (image, fields) in self._decoded(Table.IMAGES, f.decode_image):
            number = fields.get("number", 0)
            if isinstance(number, int) and number >= self._counters.image:
                self._report.damage(
                    f"has number {number}, and the next would be {self._counters.image}", f"image {image}"
                )

    def _read_segments(self) -> None:
        for key, record in self._decoded(Table.SEGMENTS, SegmentRecord.decode):
            self._segments[SegmentNo(int.from_bytes(key, "big"))] = record

    def _read_punches(self) -> None:
        for _, punch in self._decoded(Table.PUNCHES, Punch.decode):
            where = f"segment {punch.segment}, offset {punch.offset}"
            self._report.note(f"{punch.length} freed bytes are still to be punched: {LEFT}", where)
            record = self._segments.get(punch.segment)
            if record is None or punch.offset + punch.length > record.end:
                self._report.damage("freed bytes lie outside what was committed of the segment", where)
            self._punches.setdefault(punch.segment, []).append(Extent(punch.offset, punch.offset + punch.length))

    def _read_chunks(self) -> None:
        for key, chunk in self._decoded(Table.CHUNKS, Chunk.decode):
            chunk_id = f.split_chunk_key(key)
            self._chunks.add(chunk_id, chunk)
            if chunk_id >= self._counters.chunk:
                self._report.damage(f"the next chunk would be {self._counters.chunk}", f"chunk {chunk_id}")
            if not 0 < chunk.pages <= CHUNK_PAGES_MAX:
                self._report.damage(f"has {chunk.pages} pages", f"chunk {chunk_id}")
            if chunk.rotten:
                self._report.note("is quarantined, and fetched again when it is read", f"chunk {chunk_id}")
        self._report.chunks = len(self._chunks.ids)

    # ── spans ──

    def _read_spans(self, span_size: int) -> None:
        cached: Counter[ViewNo] = Counter()
        for key, recipe in self._decoded(Table.SPANS, f.decode_recipe):
            self._report.spans += 1
            view, span = f.split_span_key(key)
            where = f"span {span} of view {view}"
            for entry in recipe:
                if entry.kind is Kind.CHUNK:
                    self._name(entry, where)
            record = self._views.get(view)
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
        for view, record in self._views.items():
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
                    f"counts {refs} references, and recipes name it {named} times", f"chunk {chunks.ids[row]}"
                )

    # ── digests ──

    def _read_digests(self) -> None:
        chunks = self._chunks
        for digest, key in self._snapshot.items(Table.DIGESTS):
            chunk_id = int.from_bytes(key, "big")
            row = chunks.at(chunk_id)
            if row is None or self._digest(row) != digest:
                self._report.damage(f"leads to chunk {chunk_id}, which has not got it", f"digest {digest.hex()}")
            else:
                chunks.found[row] = 1
        for row, (found, rotten) in enumerate(zip(chunks.found, chunks.rotten, strict=True)):
            if not found and not rotten:
                self._report.damage("is not found by its digest", f"chunk {chunks.ids[row]}")

    def _digest(self, row: int) -> bytes:
        chunk = self._snapshot.chunk(ChunkId(self._chunks.ids[row]))
        assert chunk is not None, "it was read in the same snapshot"
        return chunk.digest

    # ── segments ──

    def _compare_segments(self) -> None:
        self._chunks.arrange()
        segments = Segments(self._folder / SEGMENTS)
        stored = set(segments.stored())
        for stray in sorted(stored - set(self._segments)):
            self._report.note(LEFT, f"segment {stray}")
        for segment in sorted(set(self._segments) | self._chunks.all_segments()):
            rows = self._chunks.of_segment(segment)
            record = self._segments.get(segment, SegmentRecord())
            self._compare_places(segment, record.end, rows)
            live = sum(self._chunks.extent(row).length for row in rows)
            if live != record.live:
                self._report.damage(f"has {live} live bytes, and says {record.live}", f"segment {segment}")
            if segment not in stored:
                self._report.damage("its file is missing", f"segment {segment}")
                continue
            segments.open(segment)
            try:
                self._compare_bytes(segments, segment, record.end, rows)
            finally:
                segments.close()  # One at a time: there may be more than a process may have open.

    def _compare_places(self, segment: SegmentNo, end: int, rows: list[int]) -> None:
        freed = coalesce(self._punches.get(segment, ()))
        free_at = reached = 0
        for row in rows:
            extent = self._chunks.extent(row)
            where = self._place(row)
            if extent.end > end:
                self._report.damage("lies outside what was committed of the segment", where)
            if extent.start < reached:
                self._report.damage("overlaps another chunk", where)
            while free_at < len(freed) and freed[free_at].end <= extent.start:
                free_at += 1
            if free_at < len(freed) and freed[free_at].meets(extent):
                self._report.damage("overlaps bytes that were freed", where)
            reached = max(reached, extent.end)

    def _place(self, row: int) -> str:
        start = self._chunks.extent(row).start
        return f"chunk {self._chunks.ids[row]} (segment {self._chunks.segments[row]}, offset {start})"

    def _compare_bytes(self, segments: Segments, segment: SegmentNo, end: int, rows: list[int]) -> None:
        beyond = segments.size(segment) - end
        if beyond > 0:
            self._report.note(f"{beyond} bytes beyond its end: {LEFT}", f"segment {segment}")
        for run in self._runs(rows):
            begin, trouble = self._chunks.extent(run[0]).start, "its bytes are not what its digest says"
            try:
                stored = segments.read(segment, begin, self._chunks.extent(run[-1]).end - begin)
            except OSError as error:
                stored, trouble = b"", f"cannot be read: {error.strerror}"
            for row in run:
                extent = self._chunks.extent(row)
                part = memoryview(stored)[extent.start - begin : extent.end - begin]
                if len(part) == extent.length and f.digest_of(part) == self._digest(row):
                    self._report.bytes_verified += len(part)
                else:
                    self._report.damage(trouble, self._place(row))

    def _runs(self, rows: list[int]) -> Iterator[list[int]]:
        """Those that lie side by side, as many as one read takes; without those that nobody reads."""
        run: list[int] = []
        for row in rows:
            extent = self._chunks.extent(row)
            if self._chunks.rotten[row] or not 0 < self._chunks.pages[row] <= CHUNK_PAGES_MAX:
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
