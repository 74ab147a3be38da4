"""Every kind of damage is found by its name, and a sound store is sound."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from cachefs.errors import StoreFormat, StoreLocked, StoreUnusable
from cachefs.plan.extents import PAGE
from cachefs.store import check as checking
from cachefs.store import format as f
from cachefs.store.check import LEFT, Severity, check
from cachefs.store.content import Store
from cachefs.store.format import Chunk, ChunkId, Counters, Entry, Kind, Punch, SegmentNo, SpanNo, Table, ViewNo
from cachefs.store.index import WriteSet
from tests import stores
from tests.stores import (
    SPAN,
    chunks_of,
    flip,
    image_id,
    land,
    land_all,
    padded,
    patchwork,
    random_bytes,
    running,
    segment_file,
    view_of,
)

CONTENT = patchwork(1, 2 * SPAN + 5 * PAGE + 1)
VIEW = ViewNo(1)
FIRST, LAST = f.span_key(VIEW, SpanNo(0)), f.span_key(VIEW, SpanNo(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with two views that share chunks, one of them in part, and an image."""
    folder = tmp_path / "store"

    async def main() -> None:
        async with running(folder) as store:
            store.put_image(image_id(1), {"name": "one", "number": store.new_image_number()})
            await land_all(store, view_of(store, 1, len(CONTENT)), CONTENT)
            other = view_of(store, 2, len(CONTENT))
            await land(store, other, SPAN, padded(CONTENT, SPAN, 2 * SPAN))
            await land(store, other, 64 * PAGE, padded(CONTENT, 64 * PAGE, 80 * PAGE))

    trio.run(main)
    return folder


def damages(folder: Path) -> list[str]:
    """What `check` finds, without where."""
    report = check(folder)
    found = [finding.what for finding in report.findings if finding.severity is Severity.DAMAGE]
    assert report.sound == (not found)
    return found


def recipe(folder: Path, key: bytes) -> list[Entry]:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        record = snapshot.get(Table.SPANS, key)
    assert record is not None
    return list(f.decode_recipe(key, record))


def put_recipe(folder: Path, key: bytes, entries: list[Entry]) -> None:
    stores.put(folder, Table.SPANS, key, f.encode_recipe(key, tuple(entries)))


def put_chunk(folder: Path, chunk_id: ChunkId, chunk: Chunk) -> None:
    stores.put(folder, Table.CHUNKS, f.chunk_key(chunk_id), chunk.encode(chunk_id))


def commit(folder: Path, writes: WriteSet) -> None:
    with stores.index_of(folder) as index:
        index.commit(writes)


def some_chunk(folder: Path) -> tuple[ChunkId, Chunk]:
    """The one with the most pages."""
    return max(chunks_of(folder).items(), key=lambda item: (item[1].pages, item[0]))


def everything(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes())
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


# ── a sound store ──


def test_a_sound_store_is_sound_and_unchanged(folder: Path) -> None:
    chunks = chunks_of(folder)
    before = everything(folder)
    report = check(folder)
    assert report.sound
    assert report.findings == []
    assert report.spans == 5
    assert report.chunks == len(chunks)
    assert report.bytes_verified == sum(chunk.length for chunk in chunks.values())
    assert everything(folder) == before


def test_an_empty_store_is_sound(tmp_path: Path) -> None:
    Store.open(tmp_path / "store").close()
    assert check(tmp_path / "store") == checking.Report()


def test_a_store_in_use_is_not_looked_at(folder: Path) -> None:
    store = Store.open(folder)
    try:
        with pytest.raises(StoreLocked):
            check(folder)
    finally:
        store.close()
    assert check(folder).sound


def test_what_is_no_store_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(StoreUnusable, match="there is no store there yet"):
        check(tmp_path / "nothing")
    with pytest.raises(StoreFormat, match="there is no store there yet"):
        check(tmp_path)
    assert os.listdir(tmp_path) == []


def test_what_a_crash_leaves_is_noted_and_no_damage(folder: Path) -> None:
    with segment_file(folder).open("ab") as file:
        file.write(b"x" * 100)
    segment_file(folder, 9).touch()
    stores.drop_span(folder, VIEW, SpanNo(2), punch=False)
    with segment_file(folder).open("ab") as file:
        file.write(b"x" * 100)
    segment_file(folder, 9).touch()
    report = check(folder)
    assert report.sound
    assert {finding.severity for finding in report.findings} == {Severity.NOTE}
    assert {finding.where for finding in report.findings} >= {"segment 9", "segment 1"}
    assert all(finding.what.endswith(LEFT) for finding in report.findings)
    assert any("still to be punched" in finding.what for finding in report.findings)


def test_a_quarantined_chunk_is_noted(folder: Path) -> None:
    chunk_id, chunk = some_chunk(folder)
    put_chunk(folder, chunk_id, chunk._replace(flags=f.ROTTEN))
    flip(segment_file(folder), chunk.offset + 5)
    report = check(folder)
    assert report.sound
    assert [(x.severity, x.where) for x in report.findings] == [(Severity.NOTE, f"chunk {chunk_id}")]


# ── damage ──


@pytest.mark.parametrize(
    ("table", "key"),
    [
        (Table.IMAGES, f.image_key(image_id(1))),
        (Table.VIEWS, f.view_key(VIEW)),
        (Table.SPANS, FIRST),
        (Table.CHUNKS, f.chunk_key(ChunkId(1))),
        (Table.SEGMENTS, f.segment_key(SegmentNo(1))),
        (Table.META, f.COUNTERS_KEY),
    ],
)
@pytest.mark.parametrize("rot", [lambda r: r[:-1] + bytes([r[-1] ^ 1]), lambda r: r[:-3], lambda r: b""])
def test_a_record_without_its_seal(folder: Path, table: Table, key: bytes, rot: Callable[[bytes], bytes]) -> None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        if table is Table.CHUNKS:
            key = next(snapshot.items(table))[0]
        record = snapshot.get(table, key)
    assert record is not None
    stores.put(folder, table, key, rot(record))
    assert "its record cannot be read" in damages(folder)


def test_a_sealed_record_that_makes_no_sense(folder: Path) -> None:
    stores.put(folder, Table.SPANS, FIRST, f.seal(Table.SPANS, FIRST, b"\xff" * 8))
    assert "its record cannot be read" in damages(folder)
    stores.put(folder, Table.SPANS, FIRST, f.seal(Table.SPANS, FIRST, b"\xff" * 7))
    assert "its record cannot be read" in damages(folder)


def test_the_store_record(folder: Path) -> None:
    stores.put(folder, Table.META, f.STORE_KEY, f.MAGIC + (1).to_bytes(4, "little") + bytes(28))
    report = check(folder)
    assert [finding.where for finding in report.findings] == ["index", "index"]
    assert not report.sound


def test_a_recipe_that_covers_too_much_or_too_little(folder: Path) -> None:
    entries = recipe(folder, LAST)
    put_recipe(folder, LAST, [*entries, Entry(Kind.HOLE, 1, ChunkId(0))])
    assert "its recipe covers 7 pages of 6" in damages(folder)
    put_recipe(folder, LAST, [])
    assert "its recipe covers 0 pages of 6" in damages(folder)


@pytest.mark.parametrize("kind", [Kind.ABSENT, Kind.HOLE])
def test_neighbours_that_should_be_one(folder: Path, kind: Kind) -> None:
    put_recipe(folder, LAST, [Entry(kind, 2, ChunkId(0)), Entry(kind, 4, ChunkId(0))])
    assert "its recipe has neighbours that should be one entry" in damages(folder)


def test_entries_that_are_nothing(folder: Path) -> None:
    put_recipe(folder, LAST, [Entry(Kind.HOLE, 6, ChunkId(0)), Entry(Kind.ABSENT, 0, ChunkId(0))])
    assert "its recipe has an empty entry" in damages(folder)
    for entry in (Entry(Kind.HOLE, 6, ChunkId(3)), Entry(Kind.CHUNK, 6, ChunkId(0))):
        put_recipe(folder, LAST, [entry])
        assert "its recipe has an entry that is no chunk and names one, or the reverse" in damages(folder)


def test_a_recipe_without_a_view(folder: Path) -> None:
    key = f.span_key(ViewNo(77), SpanNo(0))
    put_recipe(folder, key, [Entry(Kind.HOLE, 6, ChunkId(0))])
    assert damages(folder) == ["there is no such view"]


def test_a_recipe_beyond_its_view(folder: Path) -> None:
    key = f.span_key(VIEW, SpanNo(3))
    put_recipe(folder, key, [Entry(Kind.HOLE, 6, ChunkId(0))])
    assert damages(folder) == [f"lies beyond the view's {len(CONTENT)} bytes"]


def test_a_recipe_that_names_a_lost_chunk(folder: Path) -> None:
    chunk_id, _ = some_chunk(folder)
    stores.put(folder, Table.CHUNKS, f.chunk_key(chunk_id), None)
    found = damages(folder)
    assert f"names chunk {chunk_id}, which does not exist" in found
    assert f"leads to chunk {chunk_id}, which has not got it" in found


def test_a_recipe_that_takes_a_chunk_for_longer(folder: Path) -> None:
    chunk_id, chunk = some_chunk(folder)
    put_chunk(folder, chunk_id, chunk._replace(pages=chunk.pages - 1))
    found = damages(folder)
    assert f"takes chunk {chunk_id} for {chunk.pages} pages, and it has {chunk.pages - 1}" in found
    assert "its bytes are not what its digest says" in found


@pytest.mark.parametrize("by", [1, -1])
def test_a_wrong_count(folder: Path, by: int) -> None:
    chunk_id, chunk = max(chunks_of(folder).items(), key=lambda item: item[1].refs)
    put_chunk(folder, chunk_id, chunk.with_refs(chunk.refs + by))
    assert damages(folder) == [f"counts {chunk.refs + by} references, and recipes name it {chunk.refs} times"]


def test_a_chunk_that_nobody_names(folder: Path) -> None:
    _, chunk = some_chunk(folder)
    extra = ChunkId(500)
    stores.put(folder, Table.META, f.COUNTERS_KEY, Counters(1000, 10, 10).encode())
    put_chunk(folder, extra, chunk._replace(refs=0))
    found = damages(folder)
    assert "counts 0 references, and recipes name it 0 times" in found
    assert "overlaps another chunk" in found
    assert "is not found by its digest" in found


def test_a_digest_pair_that_is_gone(folder: Path) -> None:
    chunk_id, chunk = some_chunk(folder)
    commit(folder, WriteSet(digests_removed=[(chunk.digest, chunk_id)]))
    assert damages(folder) == ["is not found by its digest"]


def test_a_digest_pair_that_dangles(folder: Path) -> None:
    chunk_id, _ = some_chunk(folder)
    commit(folder, WriteSet(digests_added=[(bytes(16), ChunkId(999)), (bytes(16), chunk_id)]))
    assert sorted(damages(folder)) == sorted(
        ["leads to chunk 999, which has not got it", f"leads to chunk {chunk_id}, which has not got it"]
    )


def test_rotten_bytes(folder: Path) -> None:
    chunk_id, chunk = some_chunk(folder)
    flip(segment_file(folder), chunk.offset + chunk.length - 1)
    report = check(folder)
    assert [str(finding) for finding in report.findings] == [
        f"damage: chunk {chunk_id} (segment 1, offset {chunk.offset}): its bytes are not what its digest says"
    ]
    total = sum(chunk.length for chunk in chunks_of(folder).values())
    assert report.bytes_verified == total - chunk.length


def test_a_segment_that_is_cut_short(folder: Path) -> None:
    last = max(chunks_of(folder).values(), key=lambda chunk: chunk.offset)
    end = segment_file(folder).stat().st_size
    os.truncate(segment_file(folder), last.offset + 1)
    assert damages(folder) == [
        f"its file ends at {last.offset + 1}, before {end}",
        "its bytes are not what its digest says",
    ]


def test_a_missing_segment(folder: Path) -> None:
    segment_file(folder).unlink()
    assert damages(folder) == ["its file is missing"]


def test_a_chunk_outside_what_was_committed(folder: Path) -> None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        key, record = next(snapshot.items(Table.SEGMENTS))
    segment = f.SegmentRecord.decode(key, record)
    shorter = segment._replace(end=segment.end - PAGE)
    stores.put(folder, Table.SEGMENTS, key, shorter.encode(SegmentNo(1)))
    assert damages(folder) == ["lies outside what was committed of the segment"]
    stores.put(folder, Table.SEGMENTS, key, None)
    found = damages(folder)
    assert found.count("lies outside what was committed of the segment") == len(chunks_of(folder))


def test_a_wrong_total_of_live_bytes(folder: Path) -> None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        key, record = next(snapshot.items(Table.SEGMENTS))
    segment = f.SegmentRecord.decode(key, record)
    wrong = segment._replace(live=segment.live - PAGE)
    stores.put(folder, Table.SEGMENTS, key, wrong.encode(SegmentNo(1)))
    assert damages(folder) == [f"has {segment.live} live bytes, and says {segment.live - PAGE}"]


def test_a_wrong_total_of_cached_bytes(folder: Path) -> None:
    with stores.index_of(folder) as index, index.reading() as snapshot:
        record = snapshot.get(Table.VIEWS, f.view_key(VIEW))
    assert record is not None
    view = f.ViewRecord.decode(f.view_key(VIEW), record)
    stores.put(folder, Table.VIEWS, f.view_key(VIEW), view.with_cached(5).encode(VIEW))
    assert damages(folder) == [f"has {len(CONTENT)} bytes by its recipes, and says 5"]


def test_bytes_that_are_live_and_freed(folder: Path) -> None:
    _, chunk = some_chunk(folder)
    note = Punch(SegmentNo(1), chunk.offset + chunk.length - PAGE, PAGE)
    stores.put(folder, Table.PUNCHES, note.key, note.encode())
    assert damages(folder) == ["overlaps bytes that were freed"]


def test_freed_bytes_outside_their_segment(folder: Path) -> None:
    for note in (Punch(SegmentNo(1), 1 << 29, PAGE), Punch(SegmentNo(5), 0, PAGE)):
        stores.put(folder, Table.PUNCHES, note.key, note.encode())
    assert damages(folder) == ["freed bytes lie outside what was committed of the segment"] * 2


def test_numbers_that_would_be_given_again(folder: Path) -> None:
    stores.put(folder, Table.META, f.COUNTERS_KEY, Counters(1, 1, 1).encode())
    found = damages(folder)
    assert "the next view would be 1" in found
    assert "the next chunk would be 1" in found
    assert "has number 1, and the next would be 1" in found


def test_a_chunk_of_impossible_length(folder: Path) -> None:
    chunk_id, chunk = some_chunk(folder)
    put_chunk(folder, chunk_id, chunk._replace(pages=0xFFFF))
    assert "has 65535 pages" in damages(folder)


def test_findings_are_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "FINDINGS_MAX", 3)
    segment_file(folder).write_bytes(b"")
    report = check(folder)
    assert not report.sound
    assert len(report.findings) == 3
    assert report.unlisted == 1 + len(chunks_of(folder)) - 3


def test_bytes_are_verified_in_reads_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "READ_BYTES", 64 * PAGE)
    content = random_bytes(2, SPAN)

    async def main() -> None:
        async with running(tmp_path / "store") as store:
            await land_all(store, view_of(store, 1, SPAN), content)

    trio.run(main)
    assert check(tmp_path / "store").bytes_verified == SPAN
