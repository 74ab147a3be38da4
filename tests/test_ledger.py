"""What will be committed, and what every look-up says meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cachefs.plan.extents import PAGE
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
    SpanNo,
    Table,
    ViewKind,
    ViewNo,
    ViewRecord,
)
from cachefs.store.index import WriteSet
from cachefs.store.ledger import CANDIDATES_MAX, CHUNKS_A_STEP, Found, Ledger, merged
from cachefs.store.recipe import absent_recipe, present_bytes
from tests import stores
from tests.stores import image_id

SEGMENT = SegmentNo(1)
VIEW = ViewNo(1)
SPAN = SpanNo(0)
PAGES = 8


class Durable:
    """The committed state: tables as dicts of records, as LMDB has them."""

    def __init__(self) -> None:
        self.tables: dict[Table, dict[bytes, bytes]] = {table: {} for table in Table}
        self.digests: set[tuple[bytes, ChunkId]] = set()

    def commit(self, writes: WriteSet) -> None:
        for table, records in writes.puts.items():
            for key, record in records.items():
                if record is None:
                    self.tables[table].pop(key, None)
                else:
                    self.tables[table][key] = record
        for table, prefix in writes.prefixes_removed:
            for key in [key for key in self.tables[table] if key.startswith(prefix)]:
                del self.tables[table][key]
        self.digests.difference_update(writes.digests_removed)
        self.digests.update(writes.digests_added)

    def batch(self) -> AbstractContextManager[None]:
        return nullcontext()

    def recipe(self, view: ViewNo, span: SpanNo) -> Recipe | None:
        key = f.span_key(view, span)
        record = self.tables[Table.SPANS].get(key)
        return None if record is None else f.decode_recipe(key, record)

    def chunk(self, chunk: ChunkId) -> Chunk | None:
        key = f.chunk_key(chunk)
        record = self.tables[Table.CHUNKS].get(key)
        return None if record is None else Chunk.decode(key, record)

    def chunks(self, chunks: Sequence[ChunkId]) -> dict[ChunkId, Chunk]:
        return {chunk_id: chunk for chunk_id in chunks if (chunk := self.chunk(chunk_id)) is not None}

    def chunk_records(self, chunks: Sequence[ChunkId]) -> list[tuple[ChunkId, bytes]]:
        records = self.tables[Table.CHUNKS]
        return [(chunk, records[key]) for chunk in chunks if (key := f.chunk_key(chunk)) in records]

    def decode(self, chunk: ChunkId, record: bytes) -> Chunk | None:
        return Chunk.decode(f.chunk_key(chunk), record)

    def known(self, digests: Sequence[bytes]) -> set[bytes]:
        return {digest for digest in digests if self.candidates(digest, 1)}

    def candidates(self, digest: bytes, most: int) -> list[ChunkId]:
        return sorted(chunk for found, chunk in self.digests if found == digest)[:most]

    def counters(self) -> Counters:
        record = self.tables[Table.META].get(f.COUNTERS_KEY)
        return Counters() if record is None else Counters.decode(record)

    def views(self) -> dict[ViewNo, ViewRecord]:
        return {
            ViewNo(int.from_bytes(key, "big")): ViewRecord.decode(key, record)
            for key, record in self.tables[Table.VIEWS].items()
        }

    def segments(self) -> dict[SegmentNo, SegmentRecord]:
        return {
            SegmentNo(int.from_bytes(key, "big")): SegmentRecord.decode(key, record)
            for key, record in self.tables[Table.SEGMENTS].items()
        }

    def punches(self) -> list[Punch]:
        return [Punch.decode(key, record) for key, record in self.tables[Table.PUNCHES].items()]


def ledger_of(durable: Durable) -> Ledger:
    return Ledger(durable, durable.counters(), durable.views(), durable.segments())


def fresh() -> tuple[Durable, Ledger]:
    durable = Durable()
    ledger = ledger_of(durable)
    ledger.set_view(VIEW, ViewRecord(image_id(1), ViewKind.ORIGINAL, 1 << 30))
    ledger.begin_segment(SEGMENT)
    return durable, ledger


def digest(kind: int) -> bytes:
    return bytes([kind]) * 16


def new_chunk(ledger: Ledger, pages: int = 4, kind: int = 0) -> tuple[ChunkId, Chunk]:
    """Bytes at the end of the segment, and what will be their chunk."""
    begin = ledger.segments[SEGMENT].end
    ledger.advance(SEGMENT, begin + pages * PAGE)
    return ledger.new_chunk_id(), Chunk(SEGMENT, begin // PAGE, pages, digest(kind), refs=0)


def put(ledger: Ledger, span: SpanNo, entries: list[Entry], new: dict[ChunkId, Chunk] | None = None) -> None:
    """Sets a span's recipe: `entries`, and absent pages up to PAGES."""
    left = PAGES - sum(e.pages for e in entries)
    recipe = (*entries, *(absent_recipe(left) if left else ()))
    old = ledger.recipe(VIEW, span) or absent_recipe(PAGES)
    change = present_bytes(recipe, PAGES * PAGE) - present_bytes(old, PAGES * PAGE)
    ledger.set_recipe(VIEW, span, recipe, new or {}, change)


def taken_back(ledger: Ledger, span: SpanNo, found: Found) -> tuple[Recipe, int] | None:
    """What `take_back` says, taken to its end."""
    steps = ledger.take_back(VIEW, span, found, PAGES * PAGE)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            taken: tuple[Recipe, int] | None = end.value
            return taken


def commit(durable: Durable, ledger: Ledger) -> None:
    durable.commit(ledger.seal()[1])
    ledger.committed()


def test_a_new_chunk_is_found_in_every_state_of_its_commit() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    wanted = chunk.with_refs(1)

    def everywhere() -> None:
        assert ledger.chunk(chunk_id) == wanted
        assert ledger.candidates(digest(0)) == [(chunk_id, wanted)]
        assert ledger.recipe(VIEW, SPAN) == (Entry(Kind.CHUNK, 4, chunk_id), *absent_recipe(4))
        assert ledger.usable(chunk_id)

    everywhere()
    _, writes = ledger.seal()
    everywhere()
    durable.commit(writes)
    everywhere()
    ledger.committed()
    everywhere()
    assert ledger_of(durable).chunk(chunk_id) == wanted
    assert durable.segments() == {SEGMENT: SegmentRecord(4 * PAGE, 4 * PAGE)}
    assert durable.views()[VIEW].cached == 4 * PAGE


def test_a_freed_chunk_is_shared_by_nobody_from_that_moment_on() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    commit(durable, ledger)
    put(ledger, SPAN, [])

    def nowhere() -> None:
        assert ledger.chunk(chunk_id) is None
        assert ledger.candidates(digest(0)) == []
        assert not ledger.usable(chunk_id)

    nowhere()
    layer, writes = ledger.seal()
    nowhere()
    assert layer.punches == [Punch(SEGMENT, 0, 4 * PAGE)]
    durable.commit(writes)
    ledger.committed()
    nowhere()
    assert durable.digests == set()
    assert durable.punches() == layer.punches, "noted in the commit that frees"
    ledger.punched(layer.punches)
    commit(durable, ledger)
    assert durable.punches() == []
    assert durable.segments() == {SEGMENT: SegmentRecord(4 * PAGE, 0)}
    assert durable.views()[VIEW].cached == 0


def test_a_chunk_freed_before_it_was_committed_leaves_only_a_punch() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    put(ledger, SPAN, [])
    commit(durable, ledger)
    assert durable.tables[Table.CHUNKS] == {}
    assert durable.digests == set()
    assert durable.punches() == [Punch(SEGMENT, 0, 4 * PAGE)]


def test_a_chunk_freed_while_its_commit_is_under_way_is_freed_by_the_next() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    _, writes = ledger.seal()
    put(ledger, SPAN, [])
    assert ledger.candidates(digest(0)) == []
    durable.commit(writes)
    ledger.committed()
    assert ledger.chunk(chunk_id) is None
    commit(durable, ledger)
    assert durable.chunk(chunk_id) is None
    assert durable.digests == set()


def test_what_is_taken_back_goes_in_steps_and_is_found_by_nobody() -> None:
    durable, ledger = fresh()
    new = dict(new_chunk(ledger, pages=1, kind=kind) for kind in range(4 * CHUNKS_A_STEP))
    whole = 4 * CHUNKS_A_STEP * PAGE
    ledger.set_recipe(VIEW, SPAN, tuple(Entry(Kind.CHUNK, 1, chunk_id) for chunk_id in new), new, whole)
    commit(durable, ledger)
    found = ledger.look_ahead([(VIEW, SPAN)])
    assert sum(1 for _ in ledger.take_back(VIEW, SPAN, found, whole)) > 4
    assert ledger.recipe(VIEW, SPAN) is None
    assert not any(ledger.candidates(digest(kind)) for kind in range(4 * CHUNKS_A_STEP))
    assert taken_back(ledger, SPAN, found) is None, "once"
    layer, writes = ledger.seal()
    assert layer.punches == [Punch(SEGMENT, 0, whole)]
    durable.commit(writes)
    ledger.committed()
    assert (durable.tables[Table.CHUNKS], durable.digests) == ({}, set())
    assert durable.views()[VIEW].cached == 0


def test_counts_are_those_of_the_entries() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger, pages=2)
    entry = Entry(Kind.CHUNK, 2, chunk_id)
    put(ledger, SPAN, [entry, entry], {chunk_id: chunk})
    commit(durable, ledger)
    put(ledger, SpanNo(1), [entry])
    found = ledger.chunk(chunk_id)
    assert found is not None
    assert found.refs == 3
    put(ledger, SPAN, [entry])
    commit(durable, ledger)
    stored = durable.chunk(chunk_id)
    assert stored is not None
    assert stored.refs == 2


def test_one_commit_at_a_time() -> None:
    _, ledger = fresh()
    ledger.seal()
    with pytest.raises(AssertionError, match="one commit at a time"):
        ledger.seal()


def test_a_rotten_chunk_is_no_candidate_and_stays_counted() -> None:
    durable, ledger = fresh()
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    commit(durable, ledger)
    ledger.mark_rotten(chunk_id)
    assert not ledger.usable(chunk_id)
    assert ledger.candidates(digest(0)) == []
    commit(durable, ledger)
    assert durable.chunk(chunk_id) == chunk._replace(refs=1, flags=f.ROTTEN)
    put(ledger, SPAN, [])
    commit(durable, ledger)
    assert durable.chunk(chunk_id) is None
    assert durable.digests == set()


def test_candidates_are_bounded() -> None:
    durable, ledger = fresh()
    for span in range(3 * CANDIDATES_MAX):
        chunk_id, chunk = new_chunk(ledger)
        put(ledger, SpanNo(span), [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
        assert len(ledger.candidates(digest(0))) == min(span + 1, CANDIDATES_MAX)
        if span == CANDIDATES_MAX:
            commit(durable, ledger)
    assert len(ledger.candidates(digest(0))) == CANDIDATES_MAX


def test_numbers_are_not_given_twice_after_a_lost_commit() -> None:
    durable, ledger = fresh()
    commit(durable, ledger)
    ledger.new_chunk_id()
    ledger.set_view(ViewNo(7), ViewRecord(image_id(7), ViewKind.ORIGINAL, 5))
    ledger.set_image(b"key", b"record", number=9)
    ledger.seal()  # And this commit fails.
    ledger.set_image(b"key", None)
    again = ledger_of(durable)
    again.take_over(ledger)
    assert again.counters == Counters(chunk=2, view=8, image=10)
    assert again.views[ViewNo(7)].size == 5
    assert again.open.images == {b"key": None}, "the latest word counts"
    commit(durable, again)
    assert durable.counters() == again.counters
    assert ViewNo(7) in durable.views()


def test_what_is_cached_is_not_taken_over() -> None:
    durable, ledger = fresh()
    commit(durable, ledger)
    chunk_id, chunk = new_chunk(ledger)
    put(ledger, SPAN, [Entry(Kind.CHUNK, 4, chunk_id)], {chunk_id: chunk})
    assert ledger.uncommitted_segments() == {SEGMENT}
    again = ledger_of(durable)
    again.take_over(ledger)
    assert again.views[VIEW].cached == 0
    assert not again.open.views, "nothing but the cached bytes had changed"
    assert again.uncommitted_segments() == set()


def test_neighbouring_punches_are_one() -> None:
    notes = [Punch(SEGMENT, 8, 4), Punch(SegmentNo(2), 12, 4), Punch(SEGMENT, 0, 8), Punch(SEGMENT, 20, 4)]
    assert merged(notes) == [Punch(SEGMENT, 0, 12), Punch(SEGMENT, 20, 4), Punch(SegmentNo(2), 12, 4)]


class LedgerMachine(RuleBasedStateMachine):
    """Any order of changes, seals and commits, against recipes in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.recipes: dict[SpanNo, list[Entry]] = {}
        self.committed_recipes: dict[SpanNo, list[Entry]] = {}
        self.sealed: tuple[WriteSet, dict[SpanNo, list[Entry]]] | None = None

    @initialize()
    def begin(self) -> None:
        self.durable, self.ledger = fresh()
        commit(self.durable, self.ledger)

    @rule(span=st.integers(0, 3), kinds=st.lists(st.integers(0, 3), max_size=4), share=st.booleans())
    def land(self, span: int, kinds: list[int], share: bool) -> None:
        new: dict[ChunkId, Chunk] = {}
        entries: list[Entry] = []
        for kind in kinds:
            found = self.ledger.candidates(digest(kind))
            if share and found:
                entries.append(Entry(Kind.CHUNK, 2, found[0][0]))
            else:
                chunk_id, chunk = new_chunk(self.ledger, 2, kind)
                new[chunk_id] = chunk
                entries.append(Entry(Kind.CHUNK, 2, chunk_id))
        put(self.ledger, SpanNo(span), entries, new)
        self.recipes[SpanNo(span)] = entries

    @rule(spans=st.lists(st.integers(0, 3), max_size=4), ends_between=st.booleans())
    def take_back(self, spans: list[int], ends_between: bool) -> None:
        """The commit that is under way may end between the look and the steps; the layer stays, as the writer
        keeps it."""
        found = self.ledger.look_ahead((VIEW, SpanNo(span)) for span in spans)
        if ends_between and self.sealed is not None:
            self.durable.commit(self.sealed[0])
            self.committed_recipes = self.sealed[1]
        for span in spans:
            was = self.recipes.pop(SpanNo(span), None)
            live = self.ledger.segments[SEGMENT].live
            taken = taken_back(self.ledger, SpanNo(span), found)
            assert (taken is not None) == bool(was)
            if taken is not None:
                assert [entry for entry in taken[0] if entry.kind is Kind.CHUNK] == was
                assert taken[1] == live - self.ledger.segments[SEGMENT].live

    @precondition(lambda self: self.sealed is None)
    @rule()
    def seal(self) -> None:
        self.sealed = (self.ledger.seal()[1], dict(self.recipes))

    @precondition(lambda self: self.sealed is not None)
    @rule()
    def commit(self) -> None:
        assert self.sealed is not None
        writes, self.committed_recipes = self.sealed
        self.durable.commit(writes)
        self.ledger.committed()
        self.sealed = None

    @rule()
    def fail(self) -> None:
        again = ledger_of(self.durable)
        again.take_over(self.ledger)
        self.ledger = again
        self.recipes = dict(self.committed_recipes)
        self.sealed = None

    @invariant()
    def counts_are_what_recipes_name(self) -> None:
        if not hasattr(self, "ledger"):
            return
        self.check(self.recipes, self.ledger)
        self.check(self.committed_recipes, ledger_of(self.durable))
        named = {e.chunk for entries in self.committed_recipes.values() for e in entries}
        assert {int.from_bytes(key, "big") for key in self.durable.tables[Table.CHUNKS]} == named
        assert {chunk for _, chunk in self.durable.digests} == named
        freed = {p for punch in self.durable.punches() for p in range(punch.offset, punch.offset + punch.length)}
        for chunk_id in named:
            chunk = self.durable.chunk(chunk_id)
            assert chunk is not None
            assert not freed & {chunk.offset, chunk.offset + chunk.length - 1}

    @staticmethod
    def check(recipes: dict[SpanNo, list[Entry]], ledger: Ledger) -> None:
        named = Counter(e.chunk for entries in recipes.values() for e in entries)
        live = 0
        for chunk_id, refs in named.items():
            chunk = ledger.chunk(chunk_id)
            assert chunk is not None
            assert chunk.refs == refs
            live += chunk.length
        assert ledger.segments[SEGMENT].live == live
        assert ledger.views[VIEW].cached == sum(e.pages * PAGE for es in recipes.values() for e in es)


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=60 * stores.HUNT, stateful_step_count=25)
