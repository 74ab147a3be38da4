"""What a span is made of, as values: filling absent runs, and the map that a read needs. Rule: no I/O.

A recipe names chunks; a `SpanMap` is the same with every chunk's place looked up and neighbours that lie
side by side in a segment made one run, which is what the hit path reads by.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from cachefs.plan.extents import BLOCK, PAGE, Extent, ceil, coalesce, floor
from cachefs.store.format import Chunk, ChunkId, Entry, Kind, Recipe

NO_CHUNK = ChunkId(0)

# In place of a segment's number, which starts at 1.
ABSENT, HOLE = -1, 0


def unverified(segment: int) -> int:
    """What stands for a segment whose bytes were not compared with their digest yet, and back: below ABSENT, so
    that the way of a hit, which takes what is above HOLE, passes it by."""
    return -1 - segment


def always(chunk: ChunkId) -> bool:
    return True


def absent_recipe(pages: int) -> Recipe:
    return (Entry(Kind.ABSENT, pages, NO_CHUNK),)


def pages_of(recipe: Recipe) -> int:
    return sum(entry.pages for entry in recipe)


def present_bytes(recipe: Recipe, size: int) -> int:
    """How many of the first `size` bytes of the span the recipe names something for."""
    at = held = 0
    for kind, pages, _ in recipe:
        end = at + pages * PAGE
        if kind is not Kind.ABSENT:
            held += max(0, min(end, size) - at)
        at = end
    return held


def absent_runs(recipe: Recipe, usable: Callable[[ChunkId], bool]) -> Iterator[tuple[int, int]]:
    """(first page, pages) of every run that is to be fetched: absent, or a chunk that is not `usable`."""
    page = begin = 0
    open_run = False
    for entry in recipe:
        missing = entry.kind is Kind.ABSENT or (entry.kind is Kind.CHUNK and not usable(entry.chunk))
        if missing and not open_run:
            begin, open_run = page, True
        elif not missing and open_run:
            yield begin, page - begin
            open_run = False
        page += entry.pages
    if open_run:
        yield begin, page - begin


def replaced(recipe: Recipe, first: int, pages: int, entries: Iterable[Entry]) -> Recipe:
    """`recipe` with the pages `first <= p < first + pages` made of `entries`. A chunk is never split: the
    edges must lie on edges of entries, or inside absent runs and holes."""
    out: list[Entry] = []

    def add(entry: Entry) -> None:
        if out and entry.kind is not Kind.CHUNK and out[-1].kind is entry.kind:
            out[-1] = Entry(entry.kind, out[-1].pages + entry.pages, NO_CHUNK)
        else:
            out.append(entry)

    page = 0
    pending = True
    for entry in recipe:
        begin, end = page, page + entry.pages
        page = end
        before = min(end, first) - begin
        after = end - max(begin, first + pages)
        if 0 < before < entry.pages or 0 < after < entry.pages:
            assert entry.kind is not Kind.CHUNK, "a recipe cannot keep part of a chunk"
        if before > 0:
            add(Entry(entry.kind, before, entry.chunk))
        if pending and end > first:
            pending = False
            for new in entries:
                add(new)
        if after > 0:
            add(Entry(entry.kind, after, entry.chunk))
    return tuple(out)


class Run(NamedTuple):
    """`length` bytes at `offset` of segment file `segment`, which is ABSENT or HOLE where there is none, and
    `unverified` where they are to be verified first."""

    segment: int
    offset: int
    length: int


def places(runs: Iterable[Run]) -> list[Run]:
    """Where bytes are, verified or not, in as few runs as there can be: to compare two look-ups."""
    out: list[Run] = []
    for segment, offset, length in runs:
        place = unverified(segment) if segment < ABSENT else segment
        last = out[-1] if out else None
        if last is not None and last.segment == place and (place <= HOLE or last.offset + last.length == offset):
            out[-1] = Run(place, last.offset, last.length + length)
        else:
            out.append(Run(place, offset, length))
    return out


class SpanMap:
    """Where the bytes of one span are. `starts` has one more item than there are runs: the span's end.
    `sources` holds, for each run, what to add to an offset within the span to find it in the segment. `used`:
    whether it was read since somebody last looked."""

    __slots__ = ("segments", "sources", "starts", "used")

    def __init__(self, runs: Iterable[Run], *, used: bool = False) -> None:
        self.used = used
        starts, segments, sources = array("L"), array("l"), array("q")
        at = 0
        for segment, offset, length in runs:
            source = offset - at if segment not in (ABSENT, HOLE) else 0
            if not (segments and segments[-1] == segment and sources[-1] == source):
                starts.append(at)
                segments.append(segment)
                sources.append(source)
            at += length
        starts.append(at)
        self.starts, self.segments, self.sources = starts, segments, sources

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        chunk: Callable[[ChunkId], Chunk | None],
        verified: Callable[[ChunkId], bool] = always,
        *,
        used: bool = False,
    ) -> SpanMap:
        """The map of `recipe`. A chunk that is gone or rotten is absent: it will be fetched again."""

        def runs() -> Iterator[Run]:
            for kind, pages, chunk_id in recipe:
                if kind is Kind.HOLE:
                    yield Run(HOLE, 0, pages * PAGE)
                    continue
                found = chunk(chunk_id) if kind is Kind.CHUNK else None
                if found is None or found.rotten or found.pages != pages:
                    yield Run(ABSENT, 0, pages * PAGE)
                else:
                    segment = found.segment if verified(chunk_id) else unverified(found.segment)
                    yield Run(segment, found.offset, found.length)

        return cls(runs(), used=used)

    def with_verified(self, extents: Collection[Extent]) -> SpanMap:
        """The same, when the bytes of `extents` (of the span) were verified meanwhile."""
        edges = sorted({edge for extent in extents for edge in extent} | {0, self.end})
        wanted = coalesce(extents)

        def runs() -> Iterator[Run]:
            for start, end in pairwise(edges):
                inside = any(extent.start <= start < extent.end for extent in wanted)
                for run in self.locate(start, end - start):
                    yield run._replace(segment=unverified(run.segment)) if inside and run.segment < ABSENT else run

        return SpanMap(runs(), used=self.used)

    @property
    def end(self) -> int:
        return self.starts[-1]

    def locate(self, start: int, length: int) -> Iterator[Run]:
        """The runs that hold `length` bytes from `start`; offsets and lengths in bytes of the span."""
        i = bisect_right(self.starts, start) - 1
        while length > 0:
            n = min(self.starts[i + 1] - start, length)
            segment = self.segments[i]
            yield Run(segment, self.sources[i] + start if segment not in (ABSENT, HOLE) else 0, n)
            start, length, i = start + n, length - n, i + 1

    def absent(self, within: Extent) -> list[Extent]:
        """The blocks that meet `within` and have a byte missing, coalesced, cut at the span's end."""
        missing = [
            Extent(floor(self.starts[i], BLOCK), min(ceil(self.starts[i + 1], BLOCK), self.end))
            for i, segment in enumerate(self.segments)
            if segment == ABSENT
        ]
        wanted = Extent(floor(within.start, BLOCK), min(ceil(within.end, BLOCK), self.end))
        return coalesce(e.clamp(wanted) for e in missing if e.meets(wanted))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SpanMap):
            return NotImplemented
        return (self.starts, self.segments, self.sources) == (other.starts, other.segments, other.sources)

    __hash__ = None  # type: ignore[assignment]  # compared by content, never a key
