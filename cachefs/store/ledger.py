"""What the store will say once it is committed: recipes, chunks and their counts, in memory. Rule: no I/O but
short reads of the committed state, and only the writer changes it.

Changes gather in a `Layer`. When the writer commits, the layer is sealed into a `WriteSet` and a new one
begins above it, so that landing goes on while the disk works. A look-up asks the open layer, then the sealed
one, then the index; the sealed layer goes once the index holds the same, so each order of events gives the
same answer. Values in a layer are final: a count is read once, changed here, and written as it is.

A chunk whose count reaches 0 is gone at once for everybody who looks here, so that nothing can come to share
it between the decision and the commit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

from cachefs.plan.extents import PAGE, Extent, coalesce
from cachefs.store import format as f
from cachefs.store import turns
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Counters,
    Kind,
    Punch,
    Recipe,
    SegmentNo,
    SegmentRecord,
    SpanNo,
    Table,
    ViewNo,
    ViewRecord,
)
from cachefs.store.index import WriteSet
from cachefs.store.recipe import present_bytes

# Chance gives one. An image full of forged twins gives as many as it has chunks, and comparing each with all
# others would occupy the writer for hours: beyond this many they are stored without a look.
CANDIDATES_MAX = 8
# In some 20 µs.
CHUNKS_A_STEP = 8
# In one look at the index: some 40 µs.
CHUNKS_A_LOOK = 32


class Committed(Protocol):
    """The durable state below the layers: one short look-up each."""

    def recipe(self, view: ViewNo, span: SpanNo) -> Recipe | None: ...
    def chunk(self, chunk: ChunkId) -> Chunk | None: ...
    def chunks(self, chunks: Sequence[ChunkId]) -> dict[ChunkId, Chunk]: ...
    def chunk_records(self, chunks: Sequence[ChunkId]) -> list[tuple[ChunkId, bytes]]: ...
    def decode(self, chunk: ChunkId, record: bytes) -> Chunk | None: ...
    def candidates(self, digest: bytes, most: int) -> list[ChunkId]: ...
    def known(self, digests: Sequence[bytes]) -> set[bytes]: ...
    def batch(self) -> AbstractContextManager[None]: ...


@dataclass
class Found:
    """What there is of some spans: their recipes, and the records of the chunks that those name and that no layer
    has."""

    recipes: dict[tuple[ViewNo, SpanNo], Recipe] = field(default_factory=dict)
    records: dict[ChunkId, bytes] = field(default_factory=dict)


@dataclass
class Layer:
    """Changes that are not committed. `recipes[span] is None`: dropped; `chunks[id] is None`: freed. `appended`:
    segments to sync first; `removed`: those that are gone, with their notes."""

    recipes: dict[tuple[ViewNo, SpanNo], Recipe | None] = field(default_factory=dict)
    chunks: dict[ChunkId, Chunk | None] = field(default_factory=dict)
    digests: dict[bytes, list[ChunkId]] = field(default_factory=dict)  # Of chunks first seen in this layer.
    unseen: set[ChunkId] = field(default_factory=set)  # Of them, those that went past the kernel's cache.
    freed: dict[ChunkId, Chunk] = field(default_factory=dict)
    segments: set[SegmentNo] = field(default_factory=set)
    views: dict[ViewNo, ViewRecord | None] = field(default_factory=dict)
    images: dict[bytes, bytes | None] = field(default_factory=dict)
    others: dict[tuple[Table, bytes], bytes | None] = field(
        default_factory=dict
    )  # Records that nothing refers to.
    removed: set[SegmentNo] = field(default_factory=set)
    prefixes_removed: list[tuple[Table, bytes]] = field(default_factory=list)
    punches: list[Punch] = field(default_factory=list)
    punched: list[Punch] = field(default_factory=list)
    appended: set[SegmentNo] = field(default_factory=set)
    created_segment: bool = False
    bytes_appended: int = 0

    def seen(self) -> Iterator[ChunkId]:
        """New chunks that are in the kernel's cache as they were hashed; the others are only on the disk, and what
        that made of them is compared when it is first read."""
        return (chunk for ids in self.digests.values() for chunk in ids if chunk not in self.unseen)

    def __bool__(self) -> bool:
        return bool(
            self.recipes or self.chunks or self.segments or self.views or self.images or self.punched
            or self.others or self.removed
        )  # fmt: skip


class Ledger:
    """See the module. `segments` and `views` are whole in memory; recipes and chunks are not."""

    def __init__(
        self,
        committed: Committed,
        counters: Counters,
        views: Mapping[ViewNo, ViewRecord],
        segments: Mapping[SegmentNo, SegmentRecord],
    ) -> None:
        self._committed = committed
        self.counters = counters
        self.views = dict(views)
        self.segments = dict(segments)
        # The open layer, and below it the sealed one while it is being committed. One tuple, replaced as a
        # whole: a map may be looked up in a thread while the writer seals.
        self._layers: tuple[Layer, ...] = (Layer(),)

    @property
    def open(self) -> Layer:
        return self._layers[0]

    # ── look-ups ──

    def batch(self) -> AbstractContextManager[None]:
        """For many look-ups by one thread: they see one committed state, so what is sealed meanwhile must stay
        among the layers until the `with` ends."""
        return self._committed.batch()

    def recipe(self, view: ViewNo, span: SpanNo) -> Recipe | None:
        for layer in self._layers:
            if (view, span) in layer.recipes:
                return layer.recipes[view, span]
        return self._committed.recipe(view, span)

    def chunk(self, chunk: ChunkId) -> Chunk | None:
        for layer in self._layers:
            if chunk in layer.chunks:
                return layer.chunks[chunk]
        return self._committed.chunk(chunk)

    def chunks(self, chunks: Iterable[ChunkId]) -> dict[ChunkId, Chunk]:
        """Those of `chunks` that there are. Looked up at once: that costs a third."""
        found: dict[ChunkId, Chunk] = {}
        others = []
        layers = self._layers  # Before the index is asked: what leaves them while we look is there by then.
        for chunk_id in chunks:
            for layer in layers:
                if chunk_id in layer.chunks:
                    if (chunk := layer.chunks[chunk_id]) is not None:
                        found[chunk_id] = chunk
                    break
            else:
                others.append(chunk_id)
        found.update(self._committed.chunks(others))
        return found

    def look_ahead(self, spans: Iterable[tuple[ViewNo, SpanNo]]) -> Found:
        """What `take_back` needs to know of `spans`; for a thread. It holds as long as only `take_back` changes
        anything, and what is sealed stays among the layers."""
        found, pauses = Found(), turns.Pauses(1)
        for view, span in spans:
            recipe = self.recipe(view, span)
            pauses.may_come()
            if recipe is None:
                continue
            found.recipes[view, span] = recipe
            chunks = [e.chunk for e in recipe if e.kind is Kind.CHUNK]
            for first in range(0, len(chunks), CHUNKS_A_LOOK):
                found.records.update(self._committed.chunk_records(chunks[first : first + CHUNKS_A_LOOK]))
                pauses.may_come()
        return found

    def usable(self, chunk: ChunkId) -> bool:
        found = self.chunk(chunk)
        return found is not None and not found.rotten

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of `digests` that are worth a look at their `candidates`: nearly always none. All are looked up at
        once, for a tenth of what each by itself costs."""
        # The layers first, as there.
        here = {digest for layer in self._layers for digest in digests if digest in layer.digests}
        return here | self._committed.known(digests)

    def candidates(self, digest: bytes) -> list[tuple[ChunkId, Chunk]]:
        """The living chunks that have this digest, and so may be the same bytes; not all where it was forged."""
        # The layers first: what leaves them while we look is in the index by then.
        ids = dict.fromkeys(
            chunk for layer in self._layers for chunk in layer.digests.get(digest, ())[:CANDIDATES_MAX]
        )
        ids.update(dict.fromkeys(self._committed.candidates(digest, CANDIDATES_MAX)))
        if not ids:
            return []  # As nearly always: worth a line.
        found = ((chunk_id, self.chunk(chunk_id)) for chunk_id in islice(ids, CANDIDATES_MAX))
        return [(chunk_id, chunk) for chunk_id, chunk in found if chunk is not None and not chunk.rotten]

    # ── changes ──

    def new_chunk_id(self) -> ChunkId:
        chunk = ChunkId(self.counters.chunk)
        self.counters = self.counters._replace(chunk=chunk + 1)
        return chunk

    def set_view(self, view: ViewNo, record: ViewRecord) -> None:
        self.views[view] = self.open.views[view] = record
        if view >= self.counters.view:
            self.counters = self.counters._replace(view=view + 1)

    def drop_view(self, view: ViewNo) -> None:
        """Forgets a view of which nothing is cached."""
        assert self.views[view].cached == 0, "its spans would be nobody's"
        del self.views[view]
        self.open.views[view] = None
        for table in (Table.USES, Table.BLOCK_DIGESTS):
            self.open.prefixes_removed.append((table, f.view_key(view)))

    def set_image(self, key: bytes, record: bytes | None, number: int = 0) -> None:
        """Keeps what is known of an image; `number` is the one that it was given, if it was."""
        self.open.images[key] = record
        if number >= self.counters.image:
            self.counters = self.counters._replace(image=number + 1)

    def put(self, table: Table, key: bytes, record: bytes | None) -> None:
        """A record that nothing else refers to: uses, leases, how far the scrubber is."""
        self.open.others[table, key] = record

    def begin_segment(self, segment: SegmentNo) -> None:
        self.segments[segment] = SegmentRecord()
        self.open.segments.add(segment)
        self.open.created_segment = True

    def advance(self, segment: SegmentNo, end: int) -> None:
        """The segment's bytes up to `end` were written. What no chunk names of them is to be a hole."""
        record = self.segments[segment]
        self.open.bytes_appended += end - record.end
        self.segments[segment] = record._replace(end=end)
        self.open.segments.add(segment)
        self.open.appended.add(segment)

    def remove_segment(self, segment: SegmentNo) -> None:
        """No chunk lies in the segment: its record goes, with all notes, and after that its file."""
        assert self.segments[segment].live == 0, "chunks lie in it"
        del self.segments[segment]
        self.open.segments.discard(segment)
        self.open.appended.discard(segment)
        self.open.punches = [punch for punch in self.open.punches if punch.segment != segment]
        self.open.removed.add(segment)

    def move_chunk(self, chunk_id: ChunkId, segment: SegmentNo, offset: int) -> None:
        """The chunk's bytes were written once more, at `offset` of `segment`: that is its place now. Where they
        were they stay, until their segment is removed."""
        chunk = self.chunk(chunk_id)
        assert chunk is not None, "whoever moves a chunk has looked at it"
        self.open.chunks[chunk_id] = chunk._replace(segment=segment, page=offset // PAGE)
        self._add_live({chunk.segment: -chunk.length})
        self._add_live({segment: chunk.length})

    def not_seen(self, chunks: Iterable[ChunkId]) -> None:
        """Nobody can have seen what the disk made of these new ones: see `Layer.seen`."""
        self.open.unseen.update(chunks)

    def abandon_bytes(self, punch: Punch) -> None:
        """Bytes of a segment that were written and that no chunk will name."""
        self.open.punches.append(punch)

    def punched(self, punches: list[Punch]) -> None:
        self.open.punched.extend(punches)

    def mark_rotten(self, chunk: ChunkId) -> None:
        """The stored bytes are not what their digest says: never read or share them again."""
        found = self.chunk(chunk)
        if found is not None and not found.rotten:
            self.open.chunks[chunk] = found._replace(flags=found.flags | f.ROTTEN)

    def set_recipe(
        self, view: ViewNo, span: SpanNo, recipe: Recipe, new: Mapping[ChunkId, Chunk], cached_change: int
    ) -> int:
        """Puts `recipe` in place of the span's. `new` are the chunks among its entries that the ledger does
        not know (their `refs` are made right here); `cached_change` is how many more bytes of the view are
        present. Returns how many more bytes live in segments."""
        change: Counter[ChunkId] = Counter(e.chunk for e in recipe if e.kind is Kind.CHUNK)
        for entry in self.recipe(view, span) or ():
            if entry.kind is Kind.CHUNK:
                change[entry.chunk] -= 1
        # A span of which nothing is left has no record.
        kept = None if all(e.kind is Kind.ABSENT for e in recipe) else recipe
        layer = self.open
        live: Counter[SegmentNo] = Counter()
        for chunk_id, chunk in new.items():
            refs = change.pop(chunk_id)
            layer.chunks[chunk_id] = chunk if chunk.refs == refs else chunk.with_refs(refs)
            layer.digests.setdefault(chunk.digest, []).append(chunk_id)
            live[chunk.segment] += chunk.length
        # Not one whose record is lost: the recipe that named it is being replaced, which is the mending.
        counted = [chunk_id for chunk_id, by in change.items() if by]
        for chunk_id, chunk in self.chunks(counted).items():
            refs = chunk.refs + change[chunk_id]
            if refs > 0:
                layer.chunks[chunk_id] = chunk.with_refs(refs)
            else:
                self._free(chunk_id, chunk)
                live[chunk.segment] -= chunk.length
        self._add_live(live)
        layer.recipes[view, span] = kept
        if cached_change:
            record = self.views[view]
            self.set_view(view, record.with_cached(record.cached + cached_change))
        return live.total()

    def take_back(
        self, view: ViewNo, span: SpanNo, found: Found, size: int
    ) -> Generator[None, None, tuple[Recipe, int] | None]:
        """Nothing of the span is here any more; `size` is what the view has from its first byte on. In steps, of
        which none asks the index; to be taken to the end. Returns what it was made of, and how many bytes fewer
        live in segments; None where there was nothing."""
        layers, layer = self._layers, self.open
        old = found.recipes.get((view, span))
        if (view, span) in layer.recipes:  # It was taken back since.
            old = layer.recipes[view, span]
        if old is None:
            return None
        named: Counter[ChunkId] = Counter(e.chunk for e in old if e.kind is Kind.CHUNK)
        yield
        record = self.views[view]
        self.set_view(view, record.with_cached(record.cached - present_bytes(old, size)))
        layer.recipes[view, span] = None
        live: Counter[SegmentNo] = Counter()
        for n, (chunk_id, by) in enumerate(named.items(), 1):
            chunk = self._found(chunk_id, found, layers)
            if chunk is not None:
                if chunk.refs > by:
                    layer.chunks[chunk_id] = chunk.with_refs(chunk.refs - by)
                else:
                    self._free(chunk_id, chunk)
                    live[chunk.segment] += chunk.length
            if n % CHUNKS_A_STEP == 0:
                yield
        self._add_live({segment: -by for segment, by in live.items()})
        return old, live.total()

    def _found(self, chunk_id: ChunkId, found: Found, layers: Sequence[Layer]) -> Chunk | None:
        for layer in layers:
            if chunk_id in layer.chunks:
                return layer.chunks[chunk_id]
        record = found.records.get(chunk_id)
        return None if record is None else self._committed.decode(chunk_id, record)

    def _add_live(self, live: Mapping[SegmentNo, int]) -> None:
        for segment, by in live.items():
            record = self.segments[segment]
            self.segments[segment] = record._replace(live=record.live + by)
            self.open.segments.add(segment)

    def _free(self, chunk_id: ChunkId, chunk: Chunk) -> None:
        layer = self.open
        layer.chunks[chunk_id] = None
        layer.freed[chunk_id] = chunk
        segment, begin, length, punches = chunk.segment, chunk.offset, chunk.length, layer.punches
        if punches:
            last_segment, last_begin, last_length = punches[-1]
            if last_segment == segment and last_begin + last_length == begin:  # As nearly always.
                punches[-1] = Punch(segment, last_begin, last_length + length)
                return
        punches.append(Punch(segment, begin, length))

    # ── committing ──

    def seal(self) -> tuple[Layer, WriteSet]:
        """Closes the open layer and begins another. Only when the one before is committed or dropped."""
        assert len(self._layers) == 1, "one commit at a time"
        layer = self.open
        layer.punches = merged(layer.punches)
        self._layers = (Layer(), layer)
        return layer, self._encode(layer)

    def committed(self) -> None:
        """The sealed layer is in the index now."""
        self._layers = self._layers[:1]

    def uncommitted_segments(self) -> set[SegmentNo]:
        """Those that were appended to since the last commit."""
        return {segment for layer in self._layers for segment in layer.appended}

    def take_over(self, lost: Ledger) -> None:
        """Takes what is no fetched byte from a ledger whose changes could not be committed: views, images,
        and the numbers that were given."""
        self.counters = Counters(*map(max, self.counters, lost.counters))
        for view, dropped in ((v, r) for layer in lost._layers for v, r in layer.views.items()):
            if dropped is None and view in self.views and self.views[view].cached == 0:
                self.drop_view(view)
        for view, record in lost.views.items():
            known = self.views.get(view)
            if known is None or known.with_cached(record.cached) != record:
                self.set_view(view, record.with_cached(known.cached if known is not None else 0))
        for layer in reversed(lost._layers):
            self.open.images.update(layer.images)
            self.open.others.update(layer.others)

    def _encode(self, layer: Layer) -> WriteSet:
        writes, pauses = WriteSet(), turns.Pauses(64)
        for (view, span), recipe in layer.recipes.items():
            key = f.span_key(view, span)
            writes.put(Table.SPANS, key, None if recipe is None else f.encode_recipe(key, recipe))
            pauses.may_come()
        for chunk_id, chunk in layer.chunks.items():
            writes.put(Table.CHUNKS, f.chunk_key(chunk_id), None if chunk is None else chunk.encode(chunk_id))
            pauses.may_come()
        for view, view_record in layer.views.items():
            writes.put(Table.VIEWS, f.view_key(view), None if view_record is None else view_record.encode(view))
        for key, image in layer.images.items():
            writes.put(Table.IMAGES, key, image)
        for (table, key), record in layer.others.items():
            writes.put(table, key, record)
        writes.prefixes_removed.extend(layer.prefixes_removed)
        for segment in layer.removed:
            writes.put(Table.SEGMENTS, f.segment_key(segment), None)
            writes.prefixes_removed.append((Table.PUNCHES, f.segment_key(segment)))
        for segment in layer.segments:
            writes.put(Table.SEGMENTS, f.segment_key(segment), self.segments[segment].encode(segment))
        for punch in layer.punches:
            writes.put(Table.PUNCHES, punch.key, punch.encode())
        for punch in layer.punched:
            writes.put(Table.PUNCHES, punch.key, None)
        for digest, ids in layer.digests.items():
            writes.digests_added.extend((digest, i) for i in ids if layer.chunks.get(i) is not None)
        writes.digests_removed.extend((chunk.digest, i) for i, chunk in layer.freed.items())
        writes.put(Table.META, f.COUNTERS_KEY, self.counters.encode())
        return writes


def merged(punches: list[Punch]) -> list[Punch]:
    """The same bytes in as few notes as there can be: chunks that lay side by side go in one call."""
    by_segment: dict[SegmentNo, list[Extent]] = {}
    for segment, offset, length in punches:
        by_segment.setdefault(segment, []).append(Extent(offset, offset + length))
    return [
        Punch(segment, extent.start, extent.length)
        for segment, extents in by_segment.items()
        for extent in coalesce(extents)
    ]
