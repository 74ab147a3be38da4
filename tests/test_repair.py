"""Whatever is damaged is repaired: the store is sound afterwards, and what a view still has is what it had."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cachefs import cli
from cachefs.errors import StoreLocked, StoreUnusable
from cachefs.plan.extents import PAGE, Extent, pieces
from cachefs.store import format as f
from cachefs.store.check import Severity, check
from cachefs.store.content import Store
from cachefs.store.format import (
    Chunk,
    ChunkId,
    Counters,
    Entry,
    Kind,
    LeaseRecord,
    Punch,
    SegmentNo,
    SegmentRecord,
    SpanNo,
    Table,
    UsesRecord,
    ViewKind,
    ViewNo,
    ViewRecord,
)
from cachefs.store.index import WriteSet
from cachefs.store.recover import open_store, repair_store
from cachefs.store.repair import Repaired, mended
from cachefs.store.segments import Segments
from tests import stores
from tests.stores import (
    HUNT,
    SPAN,
    chunks_of,
    examples,
    flip,
    image_id,
    land,
    land_all,
    leaked,
    padded,
    patchwork,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)

CONTENTS = {
    1: patchwork(1, SPAN + 70 * PAGE + 1),
    2: patchwork(2, SPAN),
    3: random_bytes(3, 20 * PAGE),  # Shares nothing.
}
FIRST = f.span_key(ViewNo(1), SpanNo(0))
PIN = f.lease_key(image_id(2), f.LeaseReason.PIN)
LATER = PIN[:-1] + b"\x07"  # A reason that this cachefs does not know.
USES = f.uses_key(ViewNo(1), 0)
TRACE = f.trace_key(f"image:{image_id(1)}", f.ViewKind.ORIGINAL)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with three views, in two segments, of which two share chunks; with uses, leases and a scrub."""
    folder = tmp_path_factory.mktemp("original") / "store"

    async def main() -> None:
        async with running(folder) as store:
            for number, content in CONTENTS.items():
                store.put_image(image_id(number), {"name": str(number), "number": store.new_image_number()})
                if number < 3:
                    await land_all(store, view_of(store, number, len(content)), content)
            again = view_of(store, 4, len(CONTENTS[1]))
            await land(store, again, 0, padded(CONTENTS[1], 0, 70 * PAGE))

    trio.run(main)
    # The last segment is full for whoever appends next, so that there are two.
    with segment_file(folder).open("ab") as file:
        end = file.tell()
    key = f.segment_key(SegmentNo(1))
    with stores.index_of(folder) as index, index.reading() as snapshot:
        segment = SegmentRecord.decode(key, snapshot.get(Table.SEGMENTS, key) or b"")
    assert segment.end == end
    os.truncate(segment_file(folder), f.SEGMENT_SIZE - PAGE)
    stores.put(folder, Table.SEGMENTS, key, segment._replace(end=f.SEGMENT_SIZE - PAGE).encode(SegmentNo(1)))

    async def more() -> None:
        async with running(folder) as store:
            await land_all(store, view_of(store, 3, len(CONTENTS[3])), CONTENTS[3])

    trio.run(more)
    writes = WriteSet()
    writes.put(Table.USES, USES, UsesRecord((7,) * 256, (0,) * 256).encode(USES))
    writes.put(Table.LEASES, PIN, LeaseRecord(5.0).encode(PIN))
    writes.put(Table.TRACES, TRACE, f.TraceRecord(1 << 20, 1.0, 2.0, 1, (f.TraceRun(3, 2, 0),)).encode(TRACE))
    writes.put(Table.LEASES, LATER, f.seal(Table.LEASES, LATER, b"what a later cachefs has here"))
    writes.put(Table.META, f.SCRUB_KEY, f.ScrubRecord(next_chunk=3, end_chunk=9).encode())
    commit(folder, writes)
    with stores.index_of(folder) as index:
        index._env.copy(str(folder.parent), compact=True)  # So that every record is in the file once.
    (folder.parent / "data.mdb").rename(folder / "index" / "data.mdb")
    assert check(folder).findings == []
    assert {chunk.segment for chunk in chunks_of(folder).values()} == {1, 2}
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return copied(original, tmp_path / "store")


def copied(original: Path, to: Path) -> Path:
    """With its holes, which make most of it."""
    subprocess.run(["cp", "-a", "--sparse=always", str(original), str(to)], check=True)
    return to


def commit(folder: Path, writes: WriteSet) -> None:
    with stores.index_of(folder) as index:
        index.commit(writes)


def get(folder: Path, table: Table, key: bytes) -> bytes | None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        return snapshot.get(table, key)


def items(folder: Path, table: Table) -> dict[bytes, bytes]:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        return dict(snapshot.items(table))


def put_chunk(folder: Path, chunk_id: ChunkId, chunk: Chunk) -> None:
    stores.put(folder, Table.CHUNKS, f.chunk_key(chunk_id), chunk.encode(chunk_id))


def a_chunk(folder: Path) -> tuple[ChunkId, Chunk]:
    """The largest of view 1, which others share."""
    chunks = chunks_of(folder)
    recipe = f.decode_recipe(FIRST, get(folder, Table.SPANS, FIRST) or b"")
    named = {entry.chunk for entry in recipe if entry.kind is Kind.CHUNK}
    return max(((i, chunks[i]) for i in named), key=lambda item: (item[1].pages, item[0]))


def absent_bytes(folder: Path) -> dict[int, int]:
    """How many bytes of each view are absent. All others are right."""
    absent = dict.fromkeys((*CONTENTS, 4), 0)

    async def main() -> None:
        async with running(folder) as store:
            for number in absent:
                content = CONTENTS[1 if number == 4 else number]
                view = view_of(store, number, len(content))
                await view.load(Extent(0, len(content)))
                for part in pieces(Extent(0, len(content)), PAGE):
                    found = await read(view, part.start, part.length)
                    if found is None:
                        absent[number] += part.length
                    else:
                        assert found == content[part.start : part.end], f"view {number}, byte {part.start}"

    trio.run(main)
    return absent


UNDAMAGED = {1: 0, 2: 0, 3: 0, 4: len(CONTENTS[1]) - 70 * PAGE}


def run(folder: Path, *options: str) -> int:
    return cli.main(["check", "--store", str(folder), *options])


# ── every kind of damage ──

Damage = Callable[[Path], None]


def rot(table: Table, key: bytes) -> Damage:
    def damage(folder: Path) -> None:
        record = get(folder, table, key)
        assert record
        stores.put(folder, table, key, record[:-1] + bytes([record[-1] ^ 1]))

    return damage


def gone(table: Table, key: bytes) -> Damage:
    return lambda folder: stores.put(folder, table, key, None)


def change_chunk(**fields: Any) -> Damage:
    def damage(folder: Path) -> None:
        chunk_id, chunk = a_chunk(folder)
        put_chunk(folder, chunk_id, chunk._replace(**{k: v(chunk) for k, v in fields.items()}))

    return damage


def change_segment(end: int = 0, live: int = 0) -> Damage:
    def damage(folder: Path) -> None:
        key = f.segment_key(SegmentNo(2))
        found = SegmentRecord.decode(key, get(folder, Table.SEGMENTS, key) or b"")
        changed = SegmentRecord(found.end + end, found.live + live)
        stores.put(folder, Table.SEGMENTS, key, changed.encode(SegmentNo(2)))

    return damage


def change_recipe(change: Callable[[list[Entry]], list[Entry]]) -> Damage:
    def damage(folder: Path) -> None:
        recipe = list(f.decode_recipe(FIRST, get(folder, Table.SPANS, FIRST) or b""))
        stores.put(folder, Table.SPANS, FIRST, f.encode_recipe(FIRST, tuple(change(recipe))))

    return damage


def rotten_bytes(folder: Path) -> None:
    _, chunk = a_chunk(folder)
    flip(segment_file(folder, chunk.segment), chunk.offset + 9)


def quarantined_and_another(folder: Path) -> None:
    change_chunk(flags=lambda c: f.ROTTEN)(folder)
    rot(Table.SPANS, f.span_key(ViewNo(2), SpanNo(0)))(folder)


def a_twin_record(folder: Path) -> None:
    """Two chunks in one place: both are named, so neither is believed."""
    chunk_id, chunk = a_chunk(folder)
    twin = ChunkId(chunk_id + 1000)
    put_chunk(folder, twin, chunk)
    stores.put(folder, Table.META, f.COUNTERS_KEY, Counters(5000, 100, 100).encode())

    def once(recipe: list[Entry]) -> list[Entry]:
        at = [entry.chunk for entry in recipe].index(chunk_id)
        return [*recipe[:at], recipe[at]._replace(chunk=twin), *recipe[at + 1 :]]

    assert chunk.refs > 1
    change_recipe(once)(folder)


def cut_short(folder: Path) -> None:
    last = max(c.offset for c in chunks_of(folder).values() if c.segment == 2)
    os.truncate(segment_file(folder, 2), last + 5)


def pair(added: bool) -> Damage:
    def damage(folder: Path) -> None:
        chunk_id, chunk = a_chunk(folder)
        if added:
            commit(folder, WriteSet(digests_added=[(bytes(16), chunk_id), (bytes(16), ChunkId(4000))]))
        else:
            commit(folder, WriteSet(digests_removed=[(chunk.digest, chunk_id)]))

    return damage


def orphan_span(folder: Path) -> None:
    chunk_id, chunk = a_chunk(folder)
    key = f.span_key(ViewNo(77), SpanNo(0))
    stores.put(folder, Table.SPANS, key, f.encode_recipe(key, (Entry(Kind.CHUNK, chunk.pages, chunk_id),)))


def put_punch(folder: Path) -> None:
    _, chunk = a_chunk(folder)
    note = Punch(chunk.segment, chunk.offset, PAGE)
    stores.put(folder, Table.PUNCHES, note.key, note.encode())


def rotten_punch(folder: Path) -> None:
    put_punch(folder)
    rot(Table.PUNCHES, next(iter(items(folder, Table.PUNCHES))))(folder)


def wrong_view(folder: Path) -> None:
    key = f.view_key(ViewNo(2))
    view = ViewRecord.decode(key, get(folder, Table.VIEWS, key) or b"")
    stores.put(folder, Table.VIEWS, key, view.with_cached(5).encode(ViewNo(2)))


def counters(folder: Path) -> None:
    stores.put(folder, Table.META, f.COUNTERS_KEY, Counters().encode())


A_SPAN = f.span_key(ViewNo(2), SpanNo(0))
# What is done, and of which views bytes may be absent then.
DAMAGES: dict[str, tuple[Damage, set[int]]] = {
    "rotten bytes": (rotten_bytes, {1, 2, 4}),
    "a missing segment": (lambda folder: segment_file(folder, 1).unlink(), {1, 2, 4}),
    "another missing segment": (lambda folder: segment_file(folder, 2).unlink(), {3}),
    "a segment cut short": (cut_short, {3}),
    "an empty segment file": (lambda folder: os.truncate(segment_file(folder, 2), 0), {3}),
    "a rotten recipe": (rot(Table.SPANS, A_SPAN), {2}),
    "a lost recipe": (gone(Table.SPANS, A_SPAN), {2}),
    "a rotten view": (rot(Table.VIEWS, f.view_key(ViewNo(2))), {2}),
    "a lost view": (gone(Table.VIEWS, f.view_key(ViewNo(2))), {2}),
    "a rotten image": (rot(Table.IMAGES, f.image_key(image_id(1))), set()),
    "a rotten chunk record": (lambda x: rot(Table.CHUNKS, f.chunk_key(a_chunk(x)[0]))(x), {1, 2, 4}),
    "a lost chunk record": (lambda x: gone(Table.CHUNKS, f.chunk_key(a_chunk(x)[0]))(x), {1, 2, 4}),
    "a rotten segment record": (rot(Table.SEGMENTS, f.segment_key(SegmentNo(1))), set()),
    "a lost segment record": (gone(Table.SEGMENTS, f.segment_key(SegmentNo(2))), set()),
    "rotten counters": (rot(Table.META, f.COUNTERS_KEY), set()),
    "lost counters": (gone(Table.META, f.COUNTERS_KEY), set()),
    "counters that are too low": (counters, set()),
    "a rotten lease": (rot(Table.LEASES, PIN), set()),
    "one reference too many": (change_chunk(refs=lambda c: c.refs + 1), set()),
    "one reference too few": (change_chunk(refs=lambda c: c.refs - 1), set()),
    "a shorter chunk": (change_chunk(pages=lambda c: c.pages - 1), {1, 2, 4}),
    "an impossible chunk": (change_chunk(pages=lambda c: 0xFFFF), {1, 2, 4}),
    "a chunk of no segment": (change_chunk(segment=lambda c: 0), {1, 2, 4}),
    "a chunk elsewhere": (change_chunk(page=lambda c: c.page + 1), {1, 2, 4}),
    "a chunk far away": (change_chunk(page=lambda c: 1 << 31), {1, 2, 4}),
    "another digest": (change_chunk(digest=lambda c: bytes(16)), {1, 2, 4}),
    "quarantined, and a rotten recipe": (quarantined_and_another, {1, 2, 4}),
    "two chunks in one place": (a_twin_record, {1, 2, 4}),
    "an end that is too small": (change_segment(end=-PAGE), set()),
    "an end that is too great": (change_segment(end=PAGE), set()),
    "an odd end": (change_segment(end=1), set()),
    "wrong live bytes": (change_segment(live=-PAGE), set()),
    "wrong cached bytes": (wrong_view, set()),
    "a lost pair of a digest": (pair(False), set()),
    "false pairs of digests": (pair(True), set()),
    "a span without a view": (orphan_span, set()),
    "live bytes that were freed": (put_punch, set()),
    "a rotten punch": (rotten_punch, set()),
    "a recipe of too much": (change_recipe(lambda r: [*r, Entry(Kind.HOLE, 1, f.ChunkId(0))]), {1}),
    "a recipe of nothing": (change_recipe(lambda r: []), {1}),
    "an empty entry": (change_recipe(lambda r: [Entry(Kind.ABSENT, 0, f.ChunkId(0)), *r]), {1}),
    "holes that are two": (
        change_recipe(
            lambda r: [
                part
                for e in r
                for part in ([Entry(e.kind, 1, e.chunk)] * e.pages if e.kind is Kind.HOLE else [e])
            ]
        ),
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_repaired_and_gone(folder: Path, name: str) -> None:
    damage, concerned = DAMAGES[name]
    before = {(i, c.digest) for i, c in chunks_of(folder).items()}
    damage(folder)
    assert run(folder) == 2
    report, done, sound = repair_store(folder)
    assert not report.sound
    assert done
    assert sound
    after = check(folder)
    assert after.findings == []
    assert run(folder, "--repair") == 0, "and there is nothing left to do"
    assert leaked(folder) == []
    absent = absent_bytes(folder)
    assert {n for n in absent if absent[n] != UNDAMAGED[n]} <= concerned
    if concerned:
        assert any(absent[n] != UNDAMAGED[n] for n in concerned)
    assert {(i, c.digest) for i, c in chunks_of(folder).items()} <= before
    assert check(folder).sound


@pytest.mark.parametrize("name", ["rotten bytes", "a lost view", "a missing segment"])
def test_what_was_lost_lands_again(folder: Path, name: str) -> None:
    DAMAGES[name][0](folder)
    assert run(folder, "--repair") == 1

    async def main() -> None:
        async with running(folder) as store:
            for number, content in CONTENTS.items():
                await land_all(store, view_of(store, number, len(content)), content)

    trio.run(main)
    assert absent_bytes(folder) == UNDAMAGED | {4: absent_bytes(folder)[4]}
    assert check(folder).findings == []


def test_a_quarantined_chunk_goes_and_its_space_comes_back(folder: Path) -> None:
    chunk_id, chunk = a_chunk(folder)
    put_chunk(folder, chunk_id, chunk._replace(flags=f.ROTTEN))
    _, done, sound = repair_store(folder)
    assert sound
    assert done.chunks_dropped == 1
    assert done.bytes_punched >= chunk.length
    assert done.bytes_absent >= chunk.length
    assert chunk_id not in chunks_of(folder)
    assert leaked(folder) == []


def test_what_was_leaked_comes_back(folder: Path) -> None:
    """A rotten recipe that was fetched again since: its chunks kept their counts."""
    with segment_file(folder, 1).open("r+b") as file:
        file.seek(512 << 20)
        file.write(random_bytes(9, 40 * PAGE))
    assert sum(extent.length for _, extent in leaked(folder)) == 40 * PAGE
    _, done, sound = repair_store(folder)
    assert sound
    assert done == Repaired(bytes_punched=40 * PAGE)
    assert leaked(folder) == []


def test_what_a_crash_left_is_cleared_away(folder: Path) -> None:
    stores.drop_span(folder, ViewNo(2), SpanNo(0), punch=False)
    with segment_file(folder, 2).open("ab") as file:
        file.write(b"x" * 5000)
    segment_file(folder, 9).write_bytes(b"stray")
    report, done, sound = repair_store(folder)
    assert report.sound
    assert sound
    assert (done.bytes_cut, done.strays_removed) == (5000, 1)
    assert done.bytes_punched > 0
    assert check(folder).findings == []
    assert not segment_file(folder, 9).exists()


def test_a_dead_segment_goes(folder: Path) -> None:
    stores.drop_span(folder, ViewNo(4), SpanNo(0))
    _, done, sound = repair_store(folder)
    assert sound
    assert done.segments_removed == 1
    assert not segment_file(folder, 2).exists()
    assert f.segment_key(SegmentNo(2)) not in items(folder, Table.SEGMENTS)


def test_a_sound_store_is_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {table: items(folder, table) for table in Table}
    data = (folder / "index" / "data.mdb").read_bytes()
    assert run(folder, "--repair") == 0
    assert "repair: nothing to do\nsound: " in capsys.readouterr().out
    assert (folder / "index" / "data.mdb").read_bytes() == data
    assert {table: items(folder, table) for table in Table} == before
    assert absent_bytes(folder) == UNDAMAGED


# ── uses, leases and the scrub ──


def test_hints_that_cannot_be_read_are_noted_and_dropped(folder: Path) -> None:
    strange = f.uses_key(ViewNo(99), 0)
    stores.put(folder, Table.USES, strange, UsesRecord((0,) * 256, (0,) * 256).encode(strange))
    rot(Table.USES, USES)(folder)
    rot(Table.META, f.SCRUB_KEY)(folder)
    rot(Table.TRACES, TRACE)(folder)
    backwards = f.TraceRecord(1 << 20, 1.0, 2.0, 1, (f.TraceRun(3, 2, 5), f.TraceRun(1, 1, 0)))
    other = f.trace_key(f"image:{image_id(2)}", f.ViewKind.RAW)
    stores.put(folder, Table.TRACES, other, backwards.encode(other))
    stores.put(folder, Table.TRACES, b"\x01nonsense", f.seal(Table.TRACES, b"\x01nonsense", b""))
    report = check(folder)
    assert report.sound
    assert [x.severity for x in report.findings] == [Severity.NOTE] * 6
    assert repair_store(folder)[1] == Repaired(records_changed=6, records_dropped=6)
    assert items(folder, Table.USES) == items(folder, Table.TRACES) == {}
    assert get(folder, Table.META, f.SCRUB_KEY) is None
    assert check(folder).findings == []


def test_what_policies_held_stays_and_what_cannot_be_read_of_it_is_dropped(folder: Path) -> None:
    opens, hold, later = f.opens_key(image_id(1)), f.hold_key(image_id(1), "newest"), b"\x07of a later cachefs"
    stores.put(folder, Table.PRECACHE, opens, f.OpensRecord(1.5, 2.0).encode(opens))
    stores.put(folder, Table.PRECACHE, hold, f.HoldRecord(True, False, 2.0, "the newest").encode(hold))
    stores.put(folder, Table.PRECACHE, later, f.seal(Table.PRECACHE, later, b"its own"))
    assert check(folder).findings == []
    for key, record in ((opens[:9], b""), (f.hold_key(image_id(2), "p"), b"short")):
        stores.put(folder, Table.PRECACHE, key, f.seal(Table.PRECACHE, key, record))
    stores.put(folder, Table.PRECACHE, f.opens_key(image_id(2)), b"rot")
    assert [x.severity for x in check(folder).findings] == [Severity.NOTE] * 3
    assert repair_store(folder)[1] == Repaired(records_changed=3, records_dropped=3)
    assert set(items(folder, Table.PRECACHE)) == {opens, hold, later}


def test_pins_stay_and_so_do_the_leases_of_a_later_cachefs(folder: Path) -> None:
    before = items(folder, Table.LEASES)
    assert set(before) == {PIN, LATER}
    for table in Table:
        for key in items(folder, table):
            if table not in (Table.LEASES, Table.DIGESTS) and key != f.STORE_KEY:
                rot(table, key)(folder)
    assert run(folder, "--repair") == 1
    assert items(folder, Table.LEASES) == before
    assert check(folder).findings == []
    rot(Table.LEASES, LATER)(folder)
    assert run(folder) == 2
    assert run(folder, "--repair") == 1
    assert set(items(folder, Table.LEASES)) == {PIN}


def test_an_unknown_record_of_meta_is_left_alone(folder: Path) -> None:
    stores.put(folder, Table.META, b"hydration", b"of a later cachefs")
    counters(folder)
    assert run(folder, "--repair") == 1
    assert get(folder, Table.META, b"hydration") == b"of a later cachefs"


def test_a_store_without_the_later_tables_is_checked_and_repaired(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    Store.open(folder).close()
    stores.put(folder, Table.META, f.COUNTERS_KEY, None)
    with stores.index_of(folder) as index, index._env.begin(write=True) as txn:
        for table in (Table.USES, Table.LEASES, Table.PRECACHE, Table.TRACES):
            txn.drop(index._tables[table])
    assert run(folder) == 2
    assert run(folder, "--repair") == 1
    assert run(folder) == 0


# ── numbers ──


def test_numbers_are_greater_than_all_that_were_seen(folder: Path) -> None:
    rot(Table.META, f.COUNTERS_KEY)(folder)
    highest = max(chunks_of(folder))
    assert run(folder, "--repair") == 1
    found = Counters.decode(get(folder, Table.META, f.COUNTERS_KEY) or b"")
    assert found == Counters(highest + 1, 5, 4)


def test_numbers_never_fall(folder: Path) -> None:
    raised = Counters(1 << 40, 1 << 30, 1 << 29)
    stores.put(folder, Table.META, f.COUNTERS_KEY, raised.encode())
    rot(Table.SPANS, A_SPAN)(folder)
    assert run(folder, "--repair") == 1
    assert Counters.decode(get(folder, Table.META, f.COUNTERS_KEY) or b"") == raised


@pytest.mark.parametrize(
    ("table", "key"),
    [
        (Table.VIEWS, f.view_key(ViewNo(0xFFFFFFFF))),
        (Table.VIEWS, f.view_key(ViewNo(0))),
        (Table.CHUNKS, f.chunk_key(ChunkId(0))),
        (Table.CHUNKS, f.chunk_key(ChunkId(1 << 46))),
        (Table.CHUNKS, f.chunk_key(ChunkId((1 << 64) - 1))),
        (Table.SEGMENTS, f.segment_key(SegmentNo(0))),
    ],
)
def test_numbers_that_cannot_be_are_not_counted_from(folder: Path, table: Table, key: bytes) -> None:
    number = int.from_bytes(key, "big")
    record = {
        Table.VIEWS: lambda: ViewRecord(image_id(9), ViewKind.ORIGINAL, 5).encode(ViewNo(number)),
        Table.CHUNKS: lambda: a_chunk(folder)[1].encode(ChunkId(number)),
        Table.SEGMENTS: lambda: SegmentRecord().encode(SegmentNo(number)),
    }[table]()
    stores.put(folder, table, key, record)
    before = get(folder, Table.META, f.COUNTERS_KEY)
    assert run(folder) == 2
    assert run(folder, "--repair") == 1
    assert get(folder, table, key) is None
    assert get(folder, Table.META, f.COUNTERS_KEY) == before
    assert run(folder) == 0


# ── rot, at random ──


def records(folder: Path) -> list[tuple[Table, int, int]]:
    """(table, offset, length) of every record in the index's file, key and all."""
    data = (folder / "index" / "data.mdb").read_bytes()
    found = []
    with stores.index_of(folder) as index, index.reading() as snapshot:
        for table in Table:
            for key, record in snapshot.items(table):
                whole = key + record
                if data.count(whole) == 1:  # (Of digests, only some values lie behind their keys.)
                    found.append((table, data.index(whole), len(whole)))
    return found


def test_rot_in_records_is_found_survived_and_repaired(original: Path, tmp_path: Path) -> None:
    places = records(original)
    assert {table for table, _, _ in places} >= {Table.VIEWS, Table.SPANS, Table.CHUNKS, Table.SEGMENTS}
    rng = random.Random(4 if HUNT == 1 else None)
    healed = 0
    for n in range(60 * HUNT):
        folder = copied(original, tmp_path / str(n))
        hit = rng.sample(places, rng.choice((1, 1, 1, 2, 20)))
        for _, at, length in hit:
            flip(folder / "index" / "data.mdb", at + rng.randrange(length))
        assert check(folder).findings, hit
        opened_first = rng.random() < 0.3
        if opened_first:
            open_store(folder).close()
        _, done, sound = repair_store(folder)
        assert sound, hit
        assert [x for x in check(folder).findings if x.where != "index"] == [], hit
        if done.aside is None and not list(folder.glob("aside-*")):
            healed += 1
            absent_bytes(folder)
        shutil.rmtree(folder)
    assert healed > 40 * HUNT


def test_rot_in_segments_is_found_and_never_served(original: Path, tmp_path: Path) -> None:
    rng = random.Random(5)
    chunks = list(chunks_of(original).values())
    for n in range(15 * HUNT):
        folder = copied(original, tmp_path / str(n))
        hit = rng.sample(chunks, rng.randrange(1, 9))
        for chunk in hit:
            flip(segment_file(folder, chunk.segment), chunk.offset + rng.randrange(chunk.length))
        assert sum(x.what == "its bytes are not what its digest says" for x in check(folder).findings) == len(hit)
        assert repair_store(folder)[1].chunks_dropped == len(hit)
        assert check(folder).findings == []
        absent = absent_bytes(folder)
        assert sum(absent.values()) > sum(UNDAMAGED.values())
        shutil.rmtree(folder)


# ── anything, sealed ──

_small = st.integers(0, 40)
_entries = st.lists(
    st.builds(Entry, st.sampled_from(Kind), st.integers(0, 300), st.integers(0, 60).map(ChunkId)), max_size=4
)
_changes = st.one_of(
    st.tuples(st.just("chunk"), _small, st.integers(0, 3), st.integers(0, 600), st.integers(0, 70), _small),
    st.tuples(st.just("segment"), st.integers(0, 4), st.integers(0, 3 << 20), st.integers(0, 3 << 20)),
    st.tuples(st.just("view"), st.integers(0, 6), st.integers(0, 3 << 20), st.integers(0, 3 << 20)),
    st.tuples(st.just("span"), st.integers(0, 6), st.integers(0, 4), _entries),
    st.tuples(st.just("punch"), st.integers(0, 4), st.integers(0, 600), st.integers(0, 99)),
    st.tuples(st.just("counters"), _small, _small, _small),
    st.tuples(st.just("pair"), _small, st.binary(min_size=16, max_size=16), st.booleans()),
    st.tuples(st.just("gone"), st.sampled_from(Table), _small),
)


def apply(folder: Path, change: tuple[Any, ...]) -> None:
    match change:
        case ("chunk", n, segment, page, pages, refs):
            put_chunk(folder, ChunkId(n), Chunk(SegmentNo(segment), page, pages, bytes(16), refs))
        case ("segment", n, end, live):
            key = f.segment_key(SegmentNo(n))
            stores.put(folder, Table.SEGMENTS, key, SegmentRecord(end, live).encode(SegmentNo(n)))
        case ("view", n, size, cached):
            record = ViewRecord(image_id(n), ViewKind.ORIGINAL, size, cached)
            stores.put(folder, Table.VIEWS, f.view_key(ViewNo(n)), record.encode(ViewNo(n)))
        case ("span", view, span, entries):
            key = f.span_key(ViewNo(view), SpanNo(span))
            stores.put(folder, Table.SPANS, key, f.encode_recipe(key, tuple(entries)))
        case ("punch", segment, page, pages):
            note = Punch(SegmentNo(segment), page * PAGE, pages * PAGE)
            stores.put(folder, Table.PUNCHES, note.key, note.encode())
        case ("counters", *numbers):
            stores.put(folder, Table.META, f.COUNTERS_KEY, Counters(*numbers).encode())
        case ("pair", n, digest, added):
            some = [(digest, ChunkId(n))]
            commit(folder, WriteSet(digests_added=some) if added else WriteSet(digests_removed=some))
        case ("gone", table, n):
            keys = [key for key in items(folder, table) if key != f.STORE_KEY]
            if keys and table is not Table.DIGESTS:
                stores.put(folder, table, keys[n % len(keys)], None)


@examples(40)
@given(st.lists(_changes, min_size=1, max_size=12))
def test_whatever_the_records_say_repair_makes_it_sound(
    original: Path, tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[Any, ...]]
) -> None:
    folder = copied(original, tmp_path_factory.mktemp("any") / "store")
    try:
        for change in changes:
            apply(folder, change)
        _, _, sound = repair_store(folder)
        assert sound
        report = check(folder)
        assert [x for x in report.findings if x.severity is Severity.DAMAGE] == []
        assert repair_store(folder)[1] == Repaired(), "and the second time there is nothing to do"
        opened = open_store(folder)
        opened.close()
    finally:
        shutil.rmtree(folder.parent)


# ── kill -9 ──

LINES_OF = ("repair.py", "index.py", "segments.py", "recover.py")


def killed_at_line(folder: Path, at: int) -> bool:
    """Repairs in a process that is killed when it comes to a line of the store's code that it has not been at,
    for the `at`th time. Whether it came so far."""
    child = os.fork()
    if child == 0:
        try:
            seen: set[tuple[str, int]] = set()

            def trace(frame: FrameType, event: str, _: object) -> Any:
                name = frame.f_code.co_filename
                if not name.endswith(LINES_OF) or "/store/" not in name:
                    return None
                if event == "line" and (name, frame.f_lineno) not in seen:
                    seen.add((name, frame.f_lineno))
                    if len(seen) > at:
                        os.kill(os.getpid(), signal.SIGKILL)
                return trace

            sys.settrace(trace)
            repair_store(folder)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def damage_much(folder: Path) -> None:
    """So that every step has something to do."""
    for name in (
        "rotten bytes",
        "a rotten recipe",
        "a lost segment record",
        "one reference too many",
        "false pairs of digests",
    ):
        DAMAGES[name][0](folder)
    segment_file(folder, 9).write_bytes(b"stray")


def test_a_repair_that_is_killed_leaves_what_is_sound_or_can_be_repaired(original: Path, tmp_path: Path) -> None:
    damaged = copied(original, tmp_path / "damaged")
    damage_much(damaged)
    whole = copied(damaged, tmp_path / "whole")
    expected = repair_store(whole)[1]
    assert expected.bytes_punched
    assert expected.strays_removed
    absent = absent_bytes(whole)
    kills = sound = at = 0
    while True:
        folder = copied(damaged, tmp_path / "killed")
        if not killed_at_line(folder, at):
            break
        kills += 1
        if check(folder).sound:
            sound += 1
        else:
            assert repair_store(folder)[2]
        open_store(folder).close()
        assert check(folder).findings == []
        assert leaked(folder) == []
        if at % 20 == 0:
            assert absent_bytes(folder) == absent
        shutil.rmtree(folder)
        at += 1 if HUNT > 1 else 4
    assert kills > 40
    assert 0 < sound < kills


def test_a_repair_that_is_killed_at_any_moment(original: Path, tmp_path: Path) -> None:
    """The command itself, as somebody runs it."""
    rng = random.Random(6)
    damaged = copied(original, tmp_path / "damaged")
    damage_much(damaged)
    command = [sys.executable, "-m", "cachefs.cli", "check", "--repair", "--store"]
    for n in range(12 * HUNT):
        folder = copied(damaged, tmp_path / str(n))
        with subprocess.Popen([*command, str(folder)], stdout=subprocess.DEVNULL) as process:
            try:
                process.wait(rng.uniform(0.15, 0.6))
            except subprocess.TimeoutExpired:
                process.kill()
        if not check(folder).sound:
            assert run(folder, "--repair") == 1
        open_store(folder).close()
        assert check(folder).findings == []
        shutil.rmtree(folder)


# ── the command ──


def test_the_command_says_what_it_did(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rotten_bytes(folder)
    rot(Table.SPANS, A_SPAN)(folder)
    assert run(folder) == 2
    assert capsys.readouterr().out.splitlines()[-1].startswith("damaged: ")
    assert run(folder, "--repair") == 1
    *findings, repaired, outcome = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("damage: ", "note: ")) for line in findings)
    assert repaired.startswith("repair: ")
    assert " chunks dropped, " in repaired
    assert outcome.startswith("repaired: ")


def test_the_command_says_it_in_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rotten_bytes(folder)
    assert run(folder, "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["sound"], found["repair"]) == ("damaged", False, None)
    assert run(folder, "--repair", "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["repair"]["chunks_dropped"], found["repair"]["aside"]) == ("repaired", 1, None)
    assert run(folder, "--json") == 0
    assert json.loads(capsys.readouterr().out)["outcome"] == "sound"


def test_a_refusal_is_never_taken_for_a_repair(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened = open_store(folder)
    try:
        for options, status in (([], 1), (["--repair"], 2)):
            assert run(folder, *options) == status
            assert "in use by process" in capsys.readouterr().err
        with pytest.raises(StoreLocked):
            repair_store(folder)
    finally:
        opened.close()
    assert run(folder / "nothing", "--repair") == 2


def test_nothing_is_repaired_when_the_disk_gives_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cable, not rot."""
    rot(Table.SPANS, A_SPAN)(folder)
    before = {table: items(folder, table) for table in Table}

    def pread(*_: object) -> bytes:
        raise OSError(5, os.strerror(5))

    monkeypatch.setattr(Segments, "read", pread)
    report = check(folder)
    assert any("cannot be read: Input/output error" in x.what for x in report.findings)
    with pytest.raises(StoreUnusable, match=r"segment 1 cannot be read \(Input/output error\): nothing is"):
        repair_store(folder)
    assert {table: items(folder, table) for table in Table} == before


# ── bounds ──


def test_a_recipe_is_mended() -> None:
    none, seven = ChunkId(0), ChunkId(7)
    recipe = (
        Entry(Kind.ABSENT, 2, none), Entry(Kind.CHUNK, 3, seven), Entry(Kind.ABSENT, 1, none),
        Entry(Kind.CHUNK, 4, ChunkId(8)), Entry(Kind.HOLE, 5, none),
    )  # fmt: skip
    assert mended(recipe, lambda chunk, pages: 0) == recipe
    assert mended(recipe, lambda chunk, pages: 0 if chunk == 8 else None) == (
        Entry(Kind.ABSENT, 6, none), Entry(Kind.CHUNK, 4, ChunkId(8)), Entry(Kind.HOLE, 5, none),
    )  # fmt: skip
    assert mended(recipe, lambda chunk, pages: None) == (Entry(Kind.ABSENT, 10, none), Entry(Kind.HOLE, 5, none))


def test_sparse_segments_stay_sparse(folder: Path) -> None:
    """The first segment is a GiB long, and nearly all of it is a hole."""
    assert segment_file(folder).stat().st_size == f.SEGMENT_SIZE - PAGE
    before = segment_file(folder).stat().st_blocks
    damage_much(folder)
    tracemalloc.start()
    assert repair_store(folder)[2]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 40 << 20
    assert segment_file(folder).stat().st_blocks <= before
