"""What the tables of an index hold, in memory, for `check` and `repair`: chunks as columns. Rule: facts without
judgement, but for the marks that the judge makes.

The functions `decode_...` raise one of UNDECODABLE for every record that is not to be believed: by its seal, or
because nobody could have written it.
"""

from __future__ import annotations

import struct
from array import array
from bisect import bisect_left
from collections import Counter as Multiset
from dataclasses import dataclass, field

from cachefs.errors import RecordCorrupt
from cachefs.plan import trace
from cachefs.plan.extents import BLOCK, PAGE, Extent, ceil
from cachefs.store import format as f
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Counters,
    DisksRecord,
    HoldRecord,
    LeaseReason,
    LeaseRecord,
    OpensRecord,
    PrecacheKind,
    Recipe,
    SegmentNo,
    SegmentRecord,
    Table,
    TouchRecord,
    TraceRecord,
    UsesRecord,
    ViewNo,
    ViewRecord,
)

ROTTEN, FOUND, BAD = 1, 2, 4


CHUNK_ID_MAX = (1 << 46) - 1  # What an entry of a recipe has room for.
NUMBER_MAX = (1 << 32) - 1  # Of views and images: the counter must have room for one more.

UNDECODABLE = (RecordCorrupt, ValueError, TypeError, struct.error)


def decode_view(key: bytes, record: bytes) -> ViewRecord:
    _require(len(key) == 4 and 0 < int.from_bytes(key, "big") < NUMBER_MAX)
    return ViewRecord.decode(key, record)


def decode_span(key: bytes, record: bytes) -> Recipe:
    _require(len(key) == 8)
    return f.decode_recipe(key, record)


def decode_chunk(key: bytes, record: bytes) -> Chunk:
    _require(len(key) == 8)
    return Chunk.decode(key, record)


def decode_segment(key: bytes, record: bytes) -> SegmentRecord:
    _require(len(key) == 4 and any(key))
    return SegmentRecord.decode(key, record)


def decode_uses(key: bytes, record: bytes) -> UsesRecord:
    _require(len(key) == 8)
    return UsesRecord.decode(key, record)


def decode_lease(key: bytes, record: bytes) -> None:
    """A reason of a later cachefs has its own record: its seal must do."""
    _require(len(key) >= 17)
    f.unseal(Table.LEASES, key, record)
    if key[16] not in list(LeaseReason):
        return
    match LeaseReason(key[16]):
        case LeaseReason.TOUCH:
            f.split_touch_key(key)
            TouchRecord.decode(key, record)
        case LeaseReason.DISK:
            _require(len(key) == 17)
            DisksRecord.decode(key, record)
        case LeaseReason.PIN:
            _require(len(key) == 17)
            LeaseRecord.decode(key, record)


def decode_precache(key: bytes, record: bytes) -> None:
    """A kind of a later cachefs has its own record: its seal must do."""
    _require(bool(key))
    f.unseal(Table.PRECACHE, key, record)
    if key[0] in list(PrecacheKind):
        kind = f.split_precache_key(key)[0]
        record_of = OpensRecord.decode if kind is PrecacheKind.OPENS else HoldRecord.decode
        record_of(key, record)


def decode_trace(key: bytes, record: bytes) -> TraceRecord:
    content, kind = f.split_trace_key(key)
    _require(trace.is_content(content) and kind in trace.KINDS)
    found = TraceRecord.decode(key, record)
    _require(trace.fault(found) is None)
    return found


def decode_block_digests(key: bytes, record: bytes, survey: Survey) -> None:
    """Of a view that `survey` has. Those of a span that it does not have mean nothing."""
    view = survey.views[ViewNo(int.from_bytes(key[:4], "big"))]
    if len(key) == 4:
        _require(f.decode_digests_mark(key, record) == view.size)
        return
    _require(len(key) == 8)
    held = min(view.size - f.split_span_key(key)[1] * survey.span_size, survey.span_size)
    _require(held > 0)
    f.decode_block_digests(key, record, ceil(held, BLOCK) // BLOCK)


def _require(sense: bool) -> None:
    if not sense:
        raise ValueError


class Chunks:
    """Every readable chunk record, as columns in the order of the ids: 31 bytes a chunk. `named`: how often
    recipes name it. `marks`: ROTTEN by its record; FOUND, by its digest; BAD, it must not be read."""

    def __init__(self) -> None:
        self.ids = array("Q")
        self.segments, self.first_pages, self.pages = array("I"), array("I"), array("H")
        self.refs, self.named = array("I"), array("I")
        self.marks = bytearray()
        self._rows, self._bounds = array("I"), dict[int, tuple[int, int]]()

    def add(self, chunk_id: ChunkId, chunk: Chunk) -> None:
        self.ids.append(chunk_id)
        self.segments.append(chunk.segment)
        self.first_pages.append(chunk.page)
        self.pages.append(chunk.pages)
        self.refs.append(chunk.refs)
        self.named.append(0)
        self.marks.append(ROTTEN | BAD if chunk.rotten else 0)

    def __len__(self) -> int:
        return len(self.ids)

    def at(self, chunk_id: int) -> int | None:
        """The row of a chunk."""
        row = bisect_left(self.ids, chunk_id)
        return row if row < len(self.ids) and self.ids[row] == chunk_id else None

    def usable(self, chunk_id: int, pages: int) -> int | None:
        """The row of a chunk that may be read, and has as many pages."""
        row = self.at(chunk_id)
        return row if row is not None and not self.marks[row] & BAD and self.pages[row] == pages else None

    def mark(self, row: int, mark: int) -> None:
        self.marks[row] |= mark

    def extent(self, row: int) -> Extent:
        start = self.first_pages[row] * PAGE
        return Extent(start, start + self.pages[row] * PAGE)

    def arrange(self) -> None:
        """Prepares `of_segment`. Sorts by counting: a list of all rows would be larger than the columns."""
        counts = Multiset(self.segments)
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


@dataclass
class Survey:
    """All that was read of an index. `disordered`: tables in which a look-up does not find what a walk does.
    `false_pairs`: how many pairs of `digests` lead nowhere. `unreachable`: segments of which the disk gives
    nothing at all, so that nothing is known of them."""

    span_size: int
    counters: Counters | None = None
    views: dict[ViewNo, ViewRecord] = field(default_factory=dict)
    segments: dict[SegmentNo, SegmentRecord] = field(default_factory=dict)
    punches: dict[SegmentNo, list[Extent]] = field(default_factory=dict)
    chunks: Chunks = field(default_factory=Chunks)
    next_image: int = 1
    disordered: set[Table] = field(default_factory=set)
    false_pairs: int = 0
    unreachable: dict[SegmentNo, str] = field(default_factory=dict)
