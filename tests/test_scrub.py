"""A scrub's eyes: every flipped bit is seen, and nothing that is whole is ever called rotten."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from cachefs.plan.extents import PAGE, Extent
from cachefs.store import format as f
from cachefs.store import scrub as looking
from cachefs.store.format import ChunkId, SegmentNo, SegmentRecord, SpanNo, Table, ViewNo
from cachefs.store.index import Index, WriteSet
from cachefs.store.scrub import ChunkScan, DiskReader, Step, page_buffer, repunch, totals, walk
from tests import stores
from tests.stores import (
    SPAN,
    chunks_of,
    data_extents,
    flip,
    index_of,
    land_all,
    leaked,
    patchwork,
    random_bytes,
    running,
    segment_file,
    view_of,
)

SEED = 20261122
CONTENTS = [patchwork(i, 6 * SPAN + 7 * PAGE + 13) for i in range(4)]
EVERY = ChunkId(1 << 60)


def never() -> bool:
    return False


def at_once() -> None:
    return None


def fill(folder: Path, *contents: bytes) -> None:
    async def main() -> None:
        async with running(folder) as store:
            for number, content in enumerate(contents or CONTENTS, 1):
                await land_all(store, view_of(store, number, len(content)), content)

    trio.run(main)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store with four views that share chunks."""
    fill(tmp_path / "store")
    return tmp_path / "store"


@contextmanager
def scanning(
    index: Index, folder: Path, first: int = 1, end: int = EVERY, open_file: looking.OpenFile = os.open
) -> Iterator[ChunkScan]:
    scan = ChunkScan(index, folder / "segments", ChunkId(first), ChunkId(end), open_file)
    try:
        yield scan
    finally:
        scan.close()


def steps(scan: ChunkScan) -> list[Step]:
    found = []
    while (step := scan.step()) is not None:
        found.append(step)
    return found


def suspects(found: list[Step]) -> set[ChunkId]:
    return {suspect.chunk for step in found for suspect in step.suspects}


def scrub(folder: Path, open_file: looking.OpenFile = os.open) -> list[Step]:
    with index_of(folder) as index, scanning(index, folder, open_file=open_file) as scan:
        return steps(scan)


def refuse_direct(path: Path, flags: int) -> int:
    if flags & os.O_DIRECT:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), str(path))
    return os.open(path, flags)


# ── bytes ──


def test_a_sound_store_is_verified_whole(folder: Path) -> None:
    found = scrub(folder)
    assert sum(step.bytes_verified for step in found) == sum(chunk.length for chunk in chunks_of(folder).values())
    assert not any(step.suspects or step.faults or step.errors or step.rotten for step in found)
    assert found[-1].next_chunk == EVERY


@pytest.mark.parametrize("open_file", [os.open, refuse_direct])
def test_every_flipped_bit_is_found(folder: Path, open_file: looking.OpenFile) -> None:
    rng = random.Random(SEED)
    chunks = chunks_of(folder)
    hit = set(rng.sample(sorted(chunks), min(300, len(chunks))))
    for chunk_id in hit:
        chunk = chunks[chunk_id]
        flip(segment_file(folder, chunk.segment), chunk.offset + rng.randrange(chunk.length))
    assert suspects(scrub(folder, open_file)) == hit


def test_the_disk_is_read_and_not_the_page_cache(folder: Path) -> None:
    opened: list[int] = []

    def note(path: Path, flags: int) -> int:
        opened.append(flags)
        return os.open(path, flags)

    scrub(folder, note)
    assert opened
    assert all(flags & os.O_DIRECT for flags in opened)


def test_a_filesystem_may_refuse_direct_reads_when_opening_or_when_reading(folder: Path) -> None:
    length = segment_file(folder).stat().st_size
    buffer = page_buffer(64)[: min(length, 64 * PAGE)]
    expected = segment_file(folder).read_bytes()[: len(buffer)]
    for unaligned in (False, True):
        reader = DiskReader(folder / "segments", os.open if unaligned else refuse_direct)
        target = memoryview(bytearray(len(buffer) + 1))[1:] if unaligned else buffer
        assert reader.read(1, 0, target) == len(target)
        assert bytes(target) == expected
        assert not reader.direct
        reader.close()


def test_a_segment_that_is_missing_or_short_makes_suspects_of_its_chunks(folder: Path) -> None:
    chunks = chunks_of(folder)
    middle = sorted(chunks.values(), key=lambda chunk: chunk.page)[len(chunks) // 2].offset
    os.truncate(segment_file(folder), middle)
    assert suspects(scrub(folder)) == {i for i, chunk in chunks.items() if chunk.offset + chunk.length > middle}
    segment_file(folder).unlink()
    assert suspects(scrub(folder)) == set(chunks)


def test_a_scan_goes_on_where_another_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(looking, "WINDOW", 16)
    total = sum(chunk.length for chunk in chunks_of(folder).values())
    with index_of(folder) as index:
        reached, seen, scans = 1, 0, 0
        while reached < EVERY:
            with scanning(index, folder, reached) as scan:
                for _ in range(3):
                    step = scan.step()
                    if step is not None:
                        seen += step.bytes_verified
                        reached = step.next_chunk or reached
            scans += 1
    assert scans > 3
    assert seen == total  # Here each window is one read: nothing is read twice.


def test_chunks_from_the_end_on_are_left_for_the_next_run(folder: Path) -> None:
    chunks = chunks_of(folder)
    end = sorted(chunks)[len(chunks) // 2]
    with index_of(folder) as index, scanning(index, folder, end=end) as scan:
        found = steps(scan)
    assert sum(step.bytes_verified for step in found) == sum(c.length for i, c in chunks.items() if i < end)
    assert found[-1].next_chunk == end


def test_a_record_that_cannot_be_read_is_a_fault_and_one_known_to_be_rotten_is_no_suspect(folder: Path) -> None:
    chunks = chunks_of(folder)
    first, second, *_ = sorted(chunks)
    stores.put(folder, Table.CHUNKS, f.chunk_key(first), b"rot" + chunks[first].encode(first)[3:])
    chunk = chunks[second]
    bad = f.Chunk(chunk.segment, chunk.page, chunk.pages, chunk.digest, chunk.refs, f.ROTTEN)
    stores.put(folder, Table.CHUNKS, f.chunk_key(second), bad.encode(second))
    flip(segment_file(folder, chunk.segment), chunk.offset)
    found = scrub(folder)
    assert suspects(found) == set()
    assert [len(step.faults) for step in found if step.faults] == [1]
    assert [chunk_id for step in found for chunk_id in step.rotten] == [second]


def test_bytes_that_cannot_be_read_are_suspects_and_the_disk_is_named(folder: Path) -> None:
    def fail(path: Path, flags: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    found = scrub(folder, fail)
    assert suspects(found) == set(chunks_of(folder))
    assert all(error.errno == errno.EIO for step in found for error in step.errors)


# ── while others work ──


def test_eviction_and_landing_during_a_scan_make_no_suspects(folder: Path) -> None:
    """Spans are dropped and landed as fast as the writer takes them, while scans go over the same store."""
    rng = random.Random(SEED)

    async def main() -> None:
        async with running(folder, commit_interval_s=0.01) as store, trio.open_nursery() as nursery:
            views = [view_of(store, number, len(content)) for number, content in enumerate(CONTENTS, 1)]
            rounds = 0

            async def churn() -> None:
                nonlocal rounds
                while True:
                    number = rng.randrange(len(views))
                    spans = rng.sample(range(7), 3)
                    await store.evict([(views[number].number, SpanNo(span)) for span in spans])
                    for span in spans:
                        end = min((span + 1) * SPAN, len(CONTENTS[number]))
                        data = stores.padded(CONTENTS[number], span * SPAN, end)
                        assert await stores.land(store, views[number], span * SPAN, data)
                    rounds += 1

            nursery.start_soon(churn)
            for _ in range(12):
                with scanning(store.index, folder) as scan:
                    found = await trio.to_thread.run_sync(steps, scan)
                assert suspects(found) == set()
                assert not any(step.faults or step.errors for step in found)
                key: bytes | None = b""
                while key is not None:
                    part = await trio.to_thread.run_sync(walk, store.index, SPAN, key)
                    assert (part.bad, part.faults) == ([], [])
                    key = part.last_key
                counted = await trio.to_thread.run_sync(
                    totals, store.index, folder / "segments", SPAN, never, at_once
                )
                assert counted is not None
                assert counted.faults == []
            assert rounds > 3
            nursery.cancel_scope.cancel()

    trio.run(main)


def test_a_chunk_that_is_freed_after_it_was_planned_is_no_suspect(folder: Path) -> None:
    """The window is planned, and then its bytes are punched."""

    async def main() -> None:
        async with running(folder) as store:
            with scanning(store.index, folder) as scan:
                scan._plan()
                for number, content in enumerate(CONTENTS, 1):
                    view = view_of(store, number, len(content))
                    await store.evict([(view.number, SpanNo(span)) for span in range(7)])
                assert data_extents(segment_file(folder)) == []
                found = await trio.to_thread.run_sync(steps, scan)
            assert found
            assert suspects(found) == set()

    trio.run(main)


# ── recipes ──


def test_a_sound_index_has_no_bad_spans_and_is_walked_in_slices(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "SLICE", 5)
    with index_of(folder) as index:
        key: bytes | None = b""
        sizes = []
        while key is not None:
            part = walk(index, SPAN, key)
            assert (part.bad, part.faults) == ([], [])
            sizes.append(part.spans)
            key = part.last_key
    assert sizes == [5, 5, 5, 5, 5, 3]


def test_spans_that_name_rotten_or_missing_chunks_are_found_with_their_bytes(folder: Path) -> None:
    key = f.span_key(ViewNo(2), SpanNo(3))
    with index_of(folder) as index, index.reading() as snapshot:
        recipe = snapshot.recipe(ViewNo(2), SpanNo(3))
    assert recipe is not None
    at, extent, victim = 3 * SPAN, Extent(0, 0), ChunkId(0)
    for entry in recipe:
        if entry.kind is f.Kind.CHUNK:
            extent, victim = Extent(at, at + entry.pages * PAGE), entry.chunk
        at += entry.pages * PAGE
    chunk = chunks_of(folder)[victim]
    for record in (
        f.Chunk(chunk.segment, chunk.page, chunk.pages, chunk.digest, chunk.refs, f.ROTTEN).encode(victim),
        None,
    ):
        stores.put(folder, Table.CHUNKS, f.chunk_key(victim), record)
        with index_of(folder) as index:
            found = walk(index, SPAN)
            named = walk(index, SPAN, of={victim})
        bad = [span for span in found.bad if span.view == 2 and span.span == 3]
        assert [span.chunks for span in bad] == [(victim,)]
        assert extent in bad[0].extents
        assert named.bad == found.bad
        assert bool(found.faults) == (record is None)
    assert f.split_span_key(key) == (bad[0].view, bad[0].span)


def test_a_recipe_that_cannot_be_read_or_does_not_cover_its_span_is_a_fault(folder: Path) -> None:
    first, second = f.span_key(ViewNo(1), SpanNo(0)), f.span_key(ViewNo(1), SpanNo(1))
    stores.put(folder, Table.SPANS, first, b"nonsense" * 3)
    short = (f.Entry(f.Kind.HOLE, 3, ChunkId(0)),)
    stores.put(folder, Table.SPANS, second, f.encode_recipe(second, short))
    with index_of(folder) as index:
        found = walk(index, SPAN)
    assert found.bad == []
    assert found.faults == [
        "span 0 of view 1: its recipe cannot be read",
        "span 1 of view 1: its recipe covers 3 pages of 256",
    ]


# ── counts ──


def counted(folder: Path) -> list[str]:
    with index_of(folder) as index:
        found = totals(index, folder / "segments", SPAN, never, at_once)
    assert found is not None
    return found.faults


def test_counts_of_a_sound_store_agree(folder: Path) -> None:
    assert counted(folder) == []


def test_references_that_only_agree_in_total_do_not_agree(folder: Path) -> None:
    chunks = chunks_of(folder)
    one, two, *_ = (i for i, chunk in chunks.items() if chunk.refs > 1)
    stores.put(folder, Table.CHUNKS, f.chunk_key(one), chunks[one].with_refs(chunks[one].refs - 1).encode(one))
    stores.put(folder, Table.CHUNKS, f.chunk_key(two), chunks[two].with_refs(chunks[two].refs + 1).encode(two))
    assert counted(folder) == ["chunks count other references than recipes have"]


def test_wrong_totals_of_views_and_segments_are_faults(folder: Path) -> None:
    with index_of(folder) as index, index.reading() as snapshot:
        view = f.ViewRecord.decode(f.view_key(ViewNo(1)), snapshot.get(Table.VIEWS, f.view_key(ViewNo(1))) or b"")
        key = f.segment_key(SegmentNo(1))
        end, live = SegmentRecord.decode(key, snapshot.get(Table.SEGMENTS, key) or b"")
    stores.put(folder, Table.VIEWS, f.view_key(ViewNo(1)), view.with_cached(view.cached - 1).encode(ViewNo(1)))
    stores.put(folder, Table.SEGMENTS, key, SegmentRecord(end, live + PAGE).encode(SegmentNo(1)))
    assert counted(folder) == [
        f"view 1 has {view.cached} bytes by its recipes, and says {view.cached - 1}",
        f"segment 1 has {live} live bytes, and says {live + PAGE}",
    ]


def test_counting_gives_up_when_the_index_is_wanted(folder: Path) -> None:
    with index_of(folder) as index:
        assert totals(index, folder / "segments", SPAN, lambda: True, at_once) is None
        assert looking.dead_extents(index, [SegmentNo(1)], lambda: True, at_once) is None


# ── holes ──


def test_what_should_be_holes_becomes_holes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "EXCESS_BYTES", 64 << 10)
    folder = tmp_path / "store"
    own = [random_bytes(i, 3 * SPAN) for i in range(2)]
    fill(folder, *own)
    stores.drop_span(folder, ViewNo(1), SpanNo(1), punch=False)
    forget_notes(folder)
    stores.drop_span(folder, ViewNo(1), SpanNo(2), punch=False)
    # A second segment, so that the first is not the one to which may be appended.
    stores.put(folder, Table.SEGMENTS, f.segment_key(SegmentNo(2)), SegmentRecord().encode(SegmentNo(2)))
    segment_file(folder, 2).touch(0o600)
    with index_of(folder) as index:
        found = totals(index, folder / "segments", SPAN, never, at_once)
        assert found is not None
        assert SPAN <= found.excess[SegmentNo(1)] < 2 * SPAN  # Of the second there is a note.
    forget_notes(folder)
    with index_of(folder) as index:
        found = totals(index, folder / "segments", SPAN, never, at_once)
        assert found is not None
        assert 2 * SPAN <= found.excess[SegmentNo(1)] < 3 * SPAN
        dead = looking.dead_extents(index, found.excess, never, at_once)
        assert dead is not None
        assert sum(extent.length for extent in dead[SegmentNo(1)]) == 2 * SPAN
        assert repunch(folder / "segments", SegmentNo(1), dead[SegmentNo(1)]) >= 2 * SPAN
        found = totals(index, folder / "segments", SPAN, never, at_once)
        assert found is not None
        assert found.excess == {}
    assert leaked(folder) == []
    assert suspects(scrub(folder)) == set()


def forget_notes(folder: Path) -> None:
    """As a filesystem that does not punch when it is told to."""
    with index_of(folder) as index:
        writes = WriteSet()
        with index.reading() as snapshot:
            for key, _ in snapshot.items(Table.PUNCHES):
                writes.put(Table.PUNCHES, key, None)
        index.commit(writes)


def test_a_chunk_that_is_freed_while_it_is_looked_at_again_is_no_suspect(folder: Path) -> None:
    """Its record was there before its bytes were read, and they were punched before."""
    chunk = min(chunks_of(folder).values(), key=lambda chunk: chunk.page)
    flip(segment_file(folder, chunk.segment), chunk.offset)
    freed = 0

    async def main() -> None:
        async with running(folder) as store:

            async def free() -> None:
                nonlocal freed
                for number, content in enumerate(CONTENTS, 1):
                    view = view_of(store, number, len(content))
                    freed += await store.evict([(view.number, SpanNo(span)) for span in range(7)])

            def open_file(path: Path, flags: int) -> int:
                if not threading.current_thread().name.startswith("scrub"):
                    trio.from_thread.run(free)  # It is being looked at by itself.
                return os.open(path, flags)

            with scanning(store.index, folder, open_file=open_file) as scan:
                found = await trio.to_thread.run_sync(steps, scan)
            assert freed > 0
            assert suspects(found) == set()

    trio.run(main)
