"""What the store gives back, verifies and moves. Rule: bytes and blocks are what counts, not calls."""

from __future__ import annotations

import os
from math import inf
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from cachefs.errors import Absent, StoreError
from cachefs.plan.extents import BLOCK, PAGE, Extent
from cachefs.store import format as f
from cachefs.store.check import check
from cachefs.store.content import Store
from cachefs.store.format import SpanNo, Table
from cachefs.store.health import DiskUnusable
from cachefs.store.recipe import SpanMap
from cachefs.store.recover import open_store
from cachefs.store.room import Limits
from cachefs.store.verified import Verified
from cachefs.store.writer import BACKOFF_S, HELD_S
from tests import stores
from tests.stores import (
    SPAN,
    Edge,
    Edges,
    Fate,
    land,
    land_all,
    random_bytes,
    read,
    running,
    segment_file,
    view_of,
)
from tests.xxh3_twin import twin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def spans_of(view_number: int, count: int, first: int = 0) -> list[tuple[f.ViewNo, SpanNo]]:
    return [(f.ViewNo(view_number), SpanNo(span)) for span in range(first, first + count)]


# ── evicting ──


def test_evicted_spans_are_absent_and_their_blocks_are_back(folder: Path) -> None:
    content = random_bytes(1, 3 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            before = store.usage()
            assert await store.evict(spans_of(1, 2)) == 2 * SPAN
            after = store.usage()
            assert before.used - after.used >= 2 * SPAN - 64 * PAGE, "the index may have grown by some pages"
            assert [await read(view, span * SPAN, SPAN) for span in range(2)] == [None, None]
            assert await read(view, 2 * SPAN, SPAN) == content[2 * SPAN :]
            assert view.cached == SPAN
            assert list(store.resident()) == spans_of(1, 1, 2)
            assert await store.evict(spans_of(1, 3)) == SPAN
            assert await store.evict(spans_of(1, 3)) == 0
            assert store.items(Table.SPANS) == store.items(Table.CHUNKS) == store.items(Table.DIGESTS) == []
            await land_all(store, view, content)
            assert await read(view, 0, len(content) - SPAN) == content[: len(content) - SPAN]

    trio.run(main)
    assert check(folder).sound
    assert stores.leaked(folder) == []


def test_what_another_image_shares_stays(folder: Path) -> None:
    content = random_bytes(2, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            views = [view_of(store, number, SPAN) for number in (1, 2)]
            for view in views:
                await land_all(store, view, content)
            assert await store.evict(spans_of(1, 1)) == 0, "nothing comes back while another names it"
            assert await read(views[0], 0, 1) is None
            assert await read(views[1], 0, SPAN) == content
            assert await store.evict(spans_of(2, 1)) == SPAN

    trio.run(main)
    assert check(folder).sound


def test_forged_twins_survive_eviction_and_refetch_of_either(folder: Path) -> None:
    one = random_bytes(3, SPAN)
    forged = b"".join(twin(one[at : at + 4 * PAGE], payload=b"evil") for at in range(0, SPAN, 4 * PAGE))

    async def main() -> None:
        async with running(folder) as store:
            contents = {1: one, 2: forged}
            views = {number: view_of(store, number, SPAN) for number in contents}
            for number, content in contents.items():
                await land_all(store, views[number], content)
            for gone in (1, 2, 1, 2):
                await store.evict(spans_of(gone, 1))
                assert await read(views[3 - gone], 0, SPAN) == contents[3 - gone]
                await land_all(store, views[gone], contents[gone])
                for number, content in contents.items():
                    assert await read(views[number], 0, SPAN) == content

    trio.run(main)
    assert check(folder).sound


def test_eviction_that_cannot_be_committed_frees_nothing_and_says_so(folder: Path) -> None:
    content = random_bytes(4, SPAN)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, content)
            await store.writer.flush()
            edges.arm(Fate.FAIL, Edge.COMMIT)
            with pytest.raises(StoreError, match="still there"):
                await store.evict(spans_of(1, 1))
            assert await read(view, 0, SPAN) == content

    trio.run(main)
    assert check(folder).sound


def test_what_lands_for_a_view_that_is_forgotten_meanwhile_is_nobodys(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await store.writer.flush()
            outcome: list[bool] = []
            store.end_views(view.record.image)
            store.keep(view, 0, memoryview(random_bytes(1, SPAN)), outcome.append)
            store.forget_view(view.number)
            store.keep(view, 0, memoryview(random_bytes(1, SPAN)), outcome.append)
            await store.writer.flush()
            assert outcome == [True, True], "it holds bytes, so it was not forgotten after all"
            (again,) = store.views()
            assert (again.number, again.cached) == (view.number, SPAN)
            await store.evict(spans_of(1, 1))
            store.forget_view(view.number)
            await store.writer.flush()
            store.keep(view, 0, memoryview(random_bytes(1, SPAN)), outcome.append)
            await store.writer.flush()
            assert (outcome[2], store.items(Table.VIEWS)) == (False, [])

    trio.run(main)
    assert check(folder).sound


def test_an_ended_view_is_forgotten_when_nothing_of_it_is_left(folder: Path) -> None:
    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, random_bytes(5, SPAN))
            store.put(Table.USES, f.uses_key(view.number, 0), f.UsesRecord((1,) * 256, (0,) * 256).encode(b""))
            store.forget_view(view.number)
            assert store.views() == [view], "it has not ended"
            store.end_views(view.record.image)
            store.forget_view(view.number)
            assert store.views() == [view], "it holds bytes"
            await store.evict(spans_of(1, 1))
            store.forget_view(view.number)
            assert store.views() == []
            await store.writer.flush()
            assert store.items(Table.VIEWS) == store.items(Table.USES) == []
            assert view_of(store, 1, SPAN).number == view.number + 1, "numbers are not given twice"

    trio.run(main)
    assert check(folder).sound


# ── the limit ──


def test_landings_that_meet_the_limit_wait_for_eviction(folder: Path) -> None:
    content = random_bytes(6, 4 * SPAN)
    asked: list[int] = []

    async def main() -> None:
        limits = Limits(2 * SPAN + SPAN // 2, 0)
        async with running(folder, limits=lambda: limits) as store, trio.open_nursery() as nursery:
            view = view_of(store, 1, len(content))

            def make_room(wanted: int) -> None:
                asked.append(wanted)
                nursery.start_soon(store.evict, spans_of(1, 1, len(asked) - 1))

            store.on_full = make_room
            await land_all(store, view, content)
            assert asked == [SPAN, SPAN]
            assert [await read(view, span * SPAN, SPAN) is None for span in range(4)] == [True, True, False, False]
            assert await read(view, 2 * SPAN, 2 * SPAN) == content[2 * SPAN :]
            assert store.usage().left >= 0
            assert store.writer.trouble is None
            assert store.writer.not_kept_bytes == 0

    trio.run(main)
    assert check(folder).sound


def test_without_anything_to_evict_bytes_are_served_and_not_kept(folder: Path) -> None:
    content = random_bytes(7, 2 * SPAN)

    async def main() -> None:
        limits = Limits(SPAN + SPAN // 2, 0)
        async with running(folder, limits=lambda: limits) as store:
            view = view_of(store, 1, len(content))
            store.on_full = lambda wanted: store.no_room()
            assert await land(store, view, 0, content[:SPAN])
            assert not await land(store, view, SPAN, content[SPAN:])
            assert store.writer.trouble == f"no room for {SPAN} bytes"
            # Nobody answers: the landing does not wait for ever.
            await trio.sleep(60)
            store.on_full = lambda wanted: None
            began_s = trio.current_time()
            assert not await land(store, view, SPAN, content[SPAN:])
            assert trio.current_time() - began_s == pytest.approx(HELD_S)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


def test_what_was_evicted_is_room_that_is_told_of(folder: Path) -> None:
    """Until then nothing is fetched ahead, so nobody may be there whose bytes would show it."""
    content = random_bytes(7, 2 * SPAN)

    async def main() -> None:
        limits = Limits(SPAN + SPAN // 2, 0)
        async with running(folder, limits=lambda: limits) as store:
            view = view_of(store, 1, len(content))
            assert await land(store, view, 0, content[:SPAN])
            assert not await land(store, view, SPAN, content[SPAN:])
            assert store.writer.trouble == f"no room for {SPAN} bytes"
            await trio.sleep(BACKOFF_S)
            assert await store.evict(spans_of(1, 1)) == SPAN
            assert store.writer.trouble is None

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert check(folder).sound


def test_the_bound_holds_with_many_writers(folder: Path) -> None:
    """To within what is in flight: judged before anything is written, so here it is never passed at all."""
    limits = Limits(6 * SPAN, 0)
    seen: list[int] = []

    async def main() -> None:
        async with (
            running(folder, limits=lambda: limits, commit_interval_s=0.01) as store,
            trio.open_nursery() as nursery,
        ):
            landed: list[tuple[f.ViewNo, SpanNo]] = []

            async def make_room() -> None:
                while not landed:
                    await trio.lowlevel.checkpoint()
                some, landed[:] = landed[:3], landed[3:]
                await store.evict(some)

            async def write(number: int) -> None:
                view = view_of(store, number, 5 * SPAN)
                for span in range(5):
                    assert await land(store, view, span * SPAN, random_bytes(number * 10 + span, SPAN))
                    landed.append((view.number, SpanNo(span)))
                    seen.append(store.usage().used)

            store.on_full = lambda wanted: nursery.start_soon(make_room)
            for number in range(1, 7):
                nursery.start_soon(write, number)

    trio.run(main)
    assert len(seen) == 30
    assert max(seen) <= 6 * SPAN + SPAN // 4, "the index may grow by some pages after the question"


# ── first read after start ──


async def fill(folder: Path, content: bytes) -> None:
    async with running(folder) as store:
        await land_all(store, view_of(store, 1, len(content)), content)


def test_the_first_read_after_a_start_verifies_and_the_second_is_a_hit(folder: Path) -> None:
    content = random_bytes(8, SPAN)
    trio.run(fill, folder, content)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await view.load(Extent(0, SPAN))
            assert view.read_now(0, PAGE) is None, "nobody has looked at these bytes yet"
            assert view.present_at(0)
            assert view.absent(Extent(0, SPAN)) == []
            assert await view.read(0, PAGE) == content[:PAGE]
            assert bytes(view.read_now(0, PAGE) or b"") == content[:PAGE]
            # The chunk whole, and no more.
            first = min(chunk.length for chunk in stores_chunks(store) if chunk.offset == 0)
            assert bytes(view.read_now(first - PAGE, PAGE) or b"") == content[first - PAGE : first]
            assert view.read_now(first, PAGE) is None
            assert await view.read(PAGE + 1, SPAN - PAGE - 1) == content[PAGE + 1 :]
            assert bytes(view.read_now(0, SPAN) or b"") == content
            view.forget_maps()
            await view.load(Extent(0, SPAN))
            assert bytes(view.read_now(0, SPAN) or b"") == content, "it is remembered beyond the map"

    trio.run(main)


def test_a_chunk_that_was_verified_by_another_way_is_read_slowly_once_more_at_most(folder: Path) -> None:
    content = random_bytes(17, SPAN)

    async def prepare() -> None:
        async with running(folder) as store:
            for number in (1, 2):
                await land_all(store, view_of(store, number, SPAN), content)

    async def main() -> None:
        async with running(folder) as store:
            views = [view_of(store, number, SPAN) for number in (1, 2)]
            for view in views:
                await view.load(Extent(0, SPAN))  # Before anything is verified.
            for view in views:
                assert view.read_now(0, PAGE) is None
                assert await view.read(0, PAGE) == content[:PAGE]
                assert bytes(view.read_now(0, PAGE) or b"") == content[:PAGE]

    trio.run(prepare)
    trio.run(main)


def stores_chunks(store: Store) -> list[f.Chunk]:
    return [f.Chunk.decode(key, record) for key, record in store.items(Table.CHUNKS)]


def test_rot_is_found_by_the_first_read_and_never_served(folder: Path) -> None:
    content = random_bytes(9, 2 * SPAN)
    trio.run(fill, folder, content)
    stores.flip(segment_file(folder), 5 * PAGE + 7)
    found: list[f.ChunkId] = []

    async def main() -> None:
        async with running(folder) as store:
            store.on_rot = found.extend
            view = view_of(store, 1, len(content))
            with pytest.raises(Absent):
                await view.read(4 * PAGE, 4 * PAGE)
            await view.doubt(5 * PAGE)
            assert len(found) == 1
            (gap,) = view.absent(Extent(0, SPAN))
            assert gap.start <= 5 * PAGE < gap.end
            assert await read(view, SPAN, SPAN) == content[SPAN:]
            # Landed again, it is right, and what was quarantined is freed.
            assert await land(store, view, 0, content[:SPAN])
            assert await read(view, 0, SPAN) == content[:SPAN]

    trio.run(main)
    assert check(folder).sound


# ── a disk that does not give a place ──


def far_chunk(store: Store) -> f.Chunk:
    """One in the middle of the segment."""
    return next(chunk for chunk in stores_chunks(store) if chunk.offset >= SPAN // 2)


@pytest.mark.parametrize("verified", [False, True], ids=["first read", "later read"])
def test_a_long_read_says_where_the_disk_failed_and_what_came_before(folder: Path, verified: bool) -> None:
    content = random_bytes(18, SPAN)
    trio.run(fill, folder, content)
    edges = Edges()
    found: list[f.ChunkId] = []

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            store.on_rot = found.extend
            view = view_of(store, 1, SPAN)
            if verified:
                assert await view.read(0, SPAN) == content
            chunk = far_chunk(store)
            bad = chunk.offset + chunk.length - PAGE
            edges.bad.append((chunk.segment, Extent(bad, bad + 512)))
            with pytest.raises(DiskUnusable) as failure:
                await view.read(3, SPAN - 3)
            at = failure.value.offset
            assert at is not None
            assert chunk.offset <= at <= bad
            assert failure.value.before == content[3:at]
            assert store.health.reads.errors == len(edges.met_bad) == 1
            # That chunk is to be fetched, and nothing else.
            await view.doubt(at)
            assert len(found) == 1
            (gap,) = view.absent(Extent(0, SPAN))
            assert gap.start <= chunk.offset < bad < gap.end
            assert gap.length <= chunk.length + 2 * BLOCK

    trio.run(main)


def test_a_place_that_nobody_asked_for_harms_no_read(folder: Path) -> None:
    content = random_bytes(19, SPAN)
    trio.run(fill, folder, content)
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            chunk = far_chunk(store)
            edges.bad.append((chunk.segment, Extent(chunk.offset, chunk.offset + PAGE)))
            start = chunk.offset - 128 * 1024
            assert await view.read(start, chunk.offset - start) == content[start : chunk.offset]
            assert store.health.reads.errors == len(edges.met_bad) == 1, "it was looked at ahead, once"
            assert bytes(view.read_now(start, chunk.offset - start) or b"") == content[start : chunk.offset]
            assert view.present_at(chunk.offset)
            # Whoever wants it is told.
            with pytest.raises(DiskUnusable) as failure:
                await view.read(start, chunk.offset - start + 1)
            assert (failure.value.offset, len(failure.value.before)) == (chunk.offset, chunk.offset - start)

    trio.run(main)


def test_a_view_that_lost_bytes_with_a_commit_says_so(folder: Path) -> None:
    content = random_bytes(20, 2 * SPAN)
    edges = Edges()
    lost: list[int] = []

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            store.on_loss = lambda view: lost.append(view.number)
            views = [view_of(store, number, len(content)) for number in (1, 2)]
            for view in views:
                await land(store, view, 0, content[:SPAN])
            await store.flush()
            edges.arm(Fate.FAIL, Edge.SYNC)
            await land(store, views[1], SPAN, content[SPAN:])
            assert lost == []
            await store.flush()
            assert [view.cached for view in views] == [SPAN, SPAN]
            assert lost == [views[1].number], "and the other one lost nothing"

    trio.run(main)


def test_a_quarantined_chunk_is_not_counted_after_mending(folder: Path) -> None:
    content = random_bytes(10, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            views = [view_of(store, number, SPAN) for number in (1, 2)]
            for view in views:
                await land_all(store, view, content)
            await store.writer.flush()
            stores.flip(segment_file(folder), 0)
            (first,) = [f.split_chunk_key(key) for key, _ in store.items(Table.CHUNKS)][:1]
            others = [f.split_chunk_key(key) for key, _ in store.items(Table.CHUNKS)][1:]
            assert await store.quarantine([*others, first]) == [first]
            assert [view.cached for view in views] == [SPAN, SPAN]
            assert await store.mend(spans_of(1, 1) + spans_of(2, 1)) == 2
            await store.writer.flush()
            lost = SPAN - views[0].cached
            assert 4 * PAGE <= lost <= 64 * PAGE
            assert views[1].cached == SPAN - lost
            assert store.items(Table.CHUNKS, f.chunk_key(first)) == [], "nobody names it"
            assert await store.mend(spans_of(1, 1) + spans_of(2, 1)) == 0
            assert await read(views[0], lost, SPAN - lost) == content[lost:]

    trio.run(main)
    assert check(folder).sound
    assert stores.leaked(folder) == []


def test_what_was_seen_on_the_disk_is_believed_whatever_the_page_cache_has(folder: Path) -> None:
    content = random_bytes(15, SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, content)
            await store.writer.flush()
            (key, record), *_ = store.items(Table.CHUNKS)
            chunk_id, chunk = f.split_chunk_key(key), f.Chunk.decode(key, record)
            assert await store.quarantine([chunk_id], {chunk_id: (chunk.segment, chunk.page + 1)}) == []
            assert await store.quarantine([chunk_id], {chunk_id: (chunk.segment, chunk.page)}) == [chunk_id]
            assert await read(view, 0, 1) is None

    trio.run(main)


def test_verification_can_be_switched_off(folder: Path) -> None:
    content = random_bytes(11, SPAN)
    trio.run(fill, folder, content)

    async def main() -> None:
        opened = open_store(folder, SPAN)
        store = Store(opened, lambda: stores.UNLIMITED, verify_first_read=False)
        view = view_of(store, 1, SPAN)
        await view.load(Extent(0, SPAN))
        assert bytes(view.read_now(0, SPAN) or b"") == content
        store.close()

    trio.run(main)


def test_what_is_not_synced_is_verified_when_it_comes_from_the_disk(folder: Path) -> None:
    """Some filesystems drop pages that they could not write; until the sync fails they read as zeros."""
    content = random_bytes(12, SPAN)

    async def main() -> None:
        async with running(folder, commit_interval_s=inf) as store:
            view = view_of(store, 1, SPAN)
            assert await land(store, view, 0, content)
            with segment_file(folder).open("r+b") as file:
                file.write(bytes(16 * PAGE))
            with pytest.raises(Absent):
                await view.read(0, PAGE)

    trio.run(main)


def test_verified_is_a_set_of_chunks() -> None:
    verified = Verified()
    chunks = [f.ChunkId(n) for n in (1, 7, 8, 32767, 32768, 10**9)]
    assert not any(chunk in verified for chunk in chunks)
    verified.add(chunks)
    assert all(chunk in verified for chunk in chunks)
    assert f.ChunkId(2) not in verified
    assert f.ChunkId(10**9 + 1) not in verified
    assert f.ChunkId(2) in Verified(everything=True)


def test_a_map_changes_only_where_it_was_verified() -> None:
    place = {f.ChunkId(n): f.Chunk(f.SegmentNo(3), n * 10, 10, bytes(16), 1) for n in (1, 2, 3, 5)}
    recipe = tuple(f.Entry(f.Kind.CHUNK, 10, f.ChunkId(n)) for n in (1, 2, 3, 5))
    unknown = SpanMap.of(recipe, place.get, lambda chunk: False)
    known = SpanMap.of(recipe, place.get)
    assert list(unknown.segments) == [-4, -4]
    step = unknown.with_verified([Extent(10 * PAGE, 20 * PAGE)])
    assert list(step.segments) == [-4, 3, -4, -4]
    assert step.with_verified([Extent(0, 10 * PAGE), Extent(20 * PAGE, 40 * PAGE)]) == known


# ── moving ──


def test_chunks_move_and_empty_segments_are_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefs.store.landing.SEGMENT_SIZE", 2 * SPAN)
    content = random_bytes(13, 8 * SPAN)

    async def main() -> None:
        async with running(folder) as store:
            view = view_of(store, 1, len(content))
            await land_all(store, view, content)
            await store.evict([span for i in range(0, 6, 2) for span in spans_of(1, 1, i)])
            files = set(store.segments.files)
            assert files == {1, 2, 3, 4}
            await view.load(Extent(0, view.size))
            chunks = [f.split_chunk_key(key) for key, _ in store.items(Table.CHUNKS)]
            sources = frozenset(f.SegmentNo(n) for n in (1, 2, 3))
            assert await store.move(chunks, sources) == 3 * SPAN
            # Old places can be read until the segments go.
            assert await store.remove_lifeless() == 3
            assert set(store.segments.files) == {4, 5, 6}
            assert not segment_file(folder, 1).exists()
            for span in range(8):
                kept = span in (1, 3, 5, 6, 7)
                assert await read(view, span * SPAN, SPAN) == (content[span * SPAN :][:SPAN] if kept else None)
            used = store.usage().used
            assert 5 * SPAN <= used <= 5 * SPAN + SPAN // 2

    trio.run(main)
    assert check(folder).findings == []
    assert stores.leaked(folder) == []


def test_a_segment_that_is_being_read_is_closed_by_its_reader(folder: Path) -> None:
    content = random_bytes(14, SPAN)

    async def main() -> None:
        edges = Edges()
        async with running(folder, edges=edges) as store:
            view = view_of(store, 1, SPAN)
            await land_all(store, view, content)
            await store.writer.flush()
            with store.segments._held(f.SegmentNo(1)) as file:
                assert file is not None
                store.segments.retire(f.SegmentNo(1))
                store.segments.remove_retired([f.SegmentNo(1)])
                assert os.pread(file, PAGE, 0) == content[:PAGE]
                assert store.segments.blocks_bytes() >= SPAN, "its space is not back yet"
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(file)
            assert store.segments.blocks_bytes() == 0

    trio.run(main)


# ── records ──


def test_records_that_nothing_refers_to_outlive_a_failed_commit(folder: Path) -> None:
    key, record = f.lease_key(stores.image_id(1), f.LeaseReason.PIN), b"x" * 24
    edges = Edges()

    async def main() -> None:
        async with running(folder, edges=edges) as store:
            edges.arm(Fate.FAIL, Edge.COMMIT)
            store.put(Table.LEASES, key, record)
            await store.writer.flush()
            await store.writer.flush()
            assert store.get(Table.LEASES, key) == record
            store.put(Table.LEASES, key, None)
            await store.writer.flush()
            assert store.items(Table.LEASES) == []

    trio.run(main)
